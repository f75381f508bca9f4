"""Damaged configs: YAML, lazy YAML, overrides on the command line, and expressions in YAML."""

import os

from detlib.config import LazyConfig, get_cfg
from detlib.config._expression import evaluate
from tests.fuzz import mutations
from tests.fuzz.engine import Target, fuzz_tests

_YAML = """
_BASE_: base.yaml
MODEL:
  META_ARCHITECTURE: RetinaNet
  WEIGHTS: model.pth
  PIXEL_MEAN: [103.5, 116.3, 123.7]
  RETINANET: {NUM_CLASSES: 3}
  ANCHOR_GENERATOR:
    SIZES: !!python/object/apply:eval ["[[x, x * 2**(1.0/3)] for x in [32, 64]]"]
DATASETS: {TRAIN: ["coco:a.json@images"], TEST: []}
SOLVER: {BASE_LR: 0.01, STEPS: [10, 20], MAX_ITER: 40}
VERSION: 2
"""
_LAZY = """
model: {num_classes: 3, sizes: [32, 64], copied: "${.num_classes}"}
train: {max_iter: 100, amp: {enabled: false}}
dataloader: {train: {batch: 2}}
"""
_OVERRIDES = """train.max_iter=100
model.sizes=[32, 64]
+train.extra={a: 1, b: [x, 'y']}
~train.amp
model.copied=${..n}
"""
_EXPRESSIONS = """[[x, x * 2**(1.0/3), x * 2**(2.0/3)] for x in [32, 64, 128]]
[ a + b for a in [ 1 , 2 ] for b in [ 3 , 4 ] ]
{"a": (1, 2.5), "b": [-3 // 2, 7 % 4]}
"""


def _write_file(folder, name, text):
    with open(os.path.join(folder, name), "w") as file:
        file.write(text)


def _write(folder):
    _write_file(folder, "config.yaml", _YAML)
    _write_file(folder, "base.yaml", "SOLVER: {MAX_ITER: 30}\n")


def _write_lazy(folder):
    _write_file(folder, "lazy.yaml", _LAZY)


def _write_overrides(folder):
    _write_lazy(folder)
    _write_file(folder, "values.txt", _OVERRIDES)


def _write_expressions(folder):
    _write_file(folder, "values.txt", _EXPRESSIONS)


def _merge(folder):
    cfg = get_cfg()
    cfg.merge_from_file(os.path.join(folder, "config.yaml"))
    cfg.dump()


def _load_lazy(folder):
    cfg = LazyConfig.load(os.path.join(folder, "lazy.yaml"))
    LazyConfig.to_py(cfg)


def _lines(folder):
    with open(os.path.join(folder, "values.txt"), "rb") as file:
        return [line for line in file.read().decode("utf-8", "surrogateescape").splitlines() if line.strip()]


def _override(folder):
    """Apply overrides, one a line. Their errors have no file to name; they must not be empty."""
    cfg = LazyConfig.load(os.path.join(folder, "lazy.yaml"))
    for override in _lines(folder):
        try:
            LazyConfig.apply_overrides(cfg, [override])
        except (ValueError, TypeError, KeyError) as error:
            assert len(str(error)) > 10, (override[:99], error)


def _evaluate(folder):
    for expression in _lines(folder):
        try:
            evaluate(expression)
        except ValueError as error:
            assert str(error).startswith("The expression"), error


TARGETS = [
    Target("yaml", _write, ("config.yaml", "base.yaml"), mutations.mutate_yaml_text, _merge),
    Target("lazy-yaml", _write_lazy, ("lazy.yaml",), mutations.mutate_yaml, _load_lazy),
    Target("overrides", _write_overrides, ("values.txt",), mutations.mutate_text, _override),
    Target("expressions", _write_expressions, ("values.txt",), mutations.mutate_text, _evaluate),
]

test_damaged_files_are_refused_or_read, test_damaged_files_for_five_minutes = fuzz_tests(TARGETS)
