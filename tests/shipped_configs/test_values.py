"""Values of the shipped YAML configs, which must equal those of detectron2's configs of the same name."""

import json
from pathlib import Path

import pytest

from detlib.config import get_cfg

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs"
DELTAS = json.loads((HERE / "config_deltas.json").read_text())


def flatten(node, prefix=""):
    """Yield (dotted key, value as JSON), with tuples as lists. JSON tells 0, 0.0 and False apart."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value)


DEFAULTS = dict(flatten(get_cfg()))


def resolve(path):
    cfg = get_cfg()
    cfg.merge_from_file(str(path))
    return cfg


def delta(cfg):
    values = dict(flatten(cfg))
    assert values.keys() == DEFAULTS.keys()
    return {key: value for key, value in values.items() if value != DEFAULTS[key]}


def test_shipped_configs_are_those_of_the_zoo():
    assert len(DELTAS) == 59
    own = {"Quickstart"}
    shipped = {path.relative_to(CONFIGS) for path in CONFIGS.glob("*/*.yaml")}
    models = {str(x) for x in shipped if x.parts[0] not in own and not x.name.startswith("Base-")}
    assert models == DELTAS.keys()


@pytest.mark.parametrize("name", DELTAS)
def test_config_equals_the_published_one(name):
    assert delta(resolve(CONFIGS / name)) == {key: json.dumps(value) for key, value in DELTAS[name].items()}


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_dumped_config_loads_as_the_same_config(path, tmp_path):
    cfg = resolve(path)
    (tmp_path / "dump.yaml").write_text(cfg.dump())
    again = resolve(tmp_path / "dump.yaml")
    assert again == cfg
    assert str(again) == str(cfg)  # the strings also differ between tuples and lists


def test_quickstart_recipe_differs_from_faster_rcnn_as_intended():
    got = delta(resolve(CONFIGS / "Quickstart" / "faster_rcnn_R_18_FPN.yaml"))
    expected = dict(DELTAS["COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"])
    for key in ("MODEL.WEIGHTS", "DATASETS.TRAIN", "DATASETS.TEST"):
        del expected[key]
    expected |= {
        "MODEL.RESNETS.DEPTH": 18,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
        "MODEL.RESNETS.NORM": "GN",
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.FPN.NORM": "GN",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.PIXEL_STD": [57.375, 57.12, 58.395],
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 128,
        "INPUT.MIN_SIZE_TRAIN": [240],
        "INPUT.MIN_SIZE_TEST": 240,
        "SOLVER.IMS_PER_BATCH": 4,
        "SOLVER.BASE_LR": 0.01,
        "SOLVER.MAX_ITER": 480,
        "SOLVER.STEPS": [384],
        "SOLVER.WARMUP_ITERS": 50,
        "DATALOADER.NUM_WORKERS": 2,
        "OUTPUT_DIR": "./output/faster_rcnn_R_18_FPN",
    }
    assert got == {key: json.dumps(value) for key, value in expected.items()}
