"""Tests of `instantiate`."""

import functools
import os
import sys

import pytest
from omegaconf import OmegaConf
from torch import nn

from detlib.config import CfgNode, LazyCall, LazyConfig, _targets, allow_packages, instantiate
from detlib.layers import ShapeSpec


def collect(*args, **kwargs):
    return args, kwargs


def explode(kind):
    raise kind("exploded")


def test_arguments_are_plain_python():
    node = LazyCall(collect)(
        numbers=[1, [2]],
        pair=(3, 4),
        table={"a": {"b": 5}},
        none=None,
        shape=ShapeSpec(channels=3),
        same="${.numbers}",
    )
    _, made = instantiate(node)
    assert list(made.pop("pair")) == [3, 4]  # a tuple since OmegaConf 2.4
    assert made == {
        "numbers": [1, [2]],
        "table": {"a": {"b": 5}},
        "none": None,
        "shape": ShapeSpec(channels=3),
        "same": [1, [2]],
    }
    assert type(made["numbers"]) is list and type(made["numbers"][1]) is list
    assert type(made["table"]["a"]) is dict and type(made["shape"]) is ShapeSpec


def test_interpolations_relative_and_absolute():
    cfg = OmegaConf.create({"n": 3}, flags={"allow_objects": True})
    cfg.model = LazyCall(collect)(width=2, part=LazyCall(collect)(a="${..width}", b="${n}", c="${...n}"))
    assert instantiate(cfg.model)[1]["part"][1] == {"a": 2, "b": 3, "c": 3}
    assert instantiate(cfg.model.part)[1] == {"a": 2, "b": 3, "c": 3}


def test_nodes_in_lists_tuples_and_dicts():
    relu = {"_target_": "torch.nn.ReLU"}
    made = instantiate({"a": [relu, (relu, 1)], "b": {"c": relu}})
    assert isinstance(made["a"][0], nn.ReLU) and isinstance(made["a"][1][0], nn.ReLU)
    assert isinstance(made["b"]["c"], nn.ReLU)
    assert [type(m) for m in instantiate(OmegaConf.create([relu, relu]))] == [nn.ReLU, nn.ReLU]


def test_other_objects_are_returned_unchanged():
    cfg, module = CfgNode({"_target_": "x"}), nn.ReLU()
    assert instantiate(cfg) is cfg and instantiate(module) is module and instantiate(None) is None
    norm = functools.partial(nn.LayerNorm, eps=1e-6)
    assert instantiate(LazyCall(collect)(norm=norm))[1]["norm"].keywords == {"eps": 1e-6}


def test_args_partial_and_recursive_entries():
    assert instantiate({"_target_": collect, "_args_": [1, {"_target_": "builtins.dict"}], "a": 2}) == (
        (1, {}),
        {"a": 2},
    )
    made = instantiate({"_target_": "torch.nn.LayerNorm", "_partial_": True, "eps": 1e-6})
    assert made(4).eps == 1e-6
    inner = LazyCall(nn.ReLU)()
    assert instantiate(LazyCall(collect)(_recursive_=False, inner=inner))[1]["inner"] == inner
    target = {"_target_": "detlib.utils.registry.locate", "name": "torch.nn.ReLU"}
    assert isinstance(instantiate({"_target_": target}), nn.ReLU)


def test_wrong_argument_is_named():
    cfg = OmegaConf.create({"model": {"parts": [{"_target_": "torch.nn.Linear", "in_feature": 3}]}})
    with pytest.raises(
        TypeError, match=r"torch\.nn\.Linear at config path 'model\.parts\[0\]'.*mean 'in_features'"
    ):
        instantiate(cfg.model)


@pytest.mark.parametrize("kind", [ValueError, KeyError, TypeError])
def test_error_of_a_target_has_the_config_path(kind):
    cfg = OmegaConf.create(
        {"model": {"_target_": "builtins.dict", "head": LazyCall(explode)(kind=kind)}},
        flags={"allow_objects": True},
    )
    with pytest.raises(kind, match="exploded") as info:
        instantiate(cfg)
    (note,) = info.value.__notes__
    assert note.endswith("explode at config path 'model.head'")


def test_wrong_target_fails():
    with pytest.raises(ImportError, match="Did you mean 'ReLU'") as info:
        instantiate({"a": {"_target_": "torch.nn.Relu"}})
    assert "config path 'a'" in info.value.__notes__[0]
    with pytest.raises(TypeError, match="_target_ at config path 'a' must be a callable.*got 3"):
        instantiate({"a": {"_target_": 3}})


HOSTILE = [
    "os.system",
    "builtins.eval",
    "subprocess.call",
    "torch.os.system",
    "torch.sys.exit",
    "torch.load",
    "torch.hub.load",
    "torch.serialization.load",
    "torch.utils.cpp_extension.load",
    "torch.ops.load_library",
    "torch.jit.load",
    "torch.storage.io.open",
    "detlib.config.LazyConfig.load",
    "detlib.config.lazy.LazyConfig.load",
    "detlib.model_zoo.get_config",
    "detlib.engine.launch",
    "detlib.utils.registry.importlib.import_module",
    "detlib.utils.file_io.os.remove",
    "torchx.Model",
]


@pytest.mark.parametrize("target", HOSTILE)
@pytest.mark.parametrize("form", ["yaml", "override", "located", "interpolation"])
def test_dotted_path_outside_of_the_allowed_packages_is_refused(tmp_path, target, form):
    path = tmp_path / "a.yaml"
    if form == "override":
        cfg = OmegaConf.create({"model": {"_target_": "torch.nn.ReLU"}})
        LazyConfig.apply_overrides(cfg, [f"model._target_={target}"])
    else:
        node = {
            "yaml": f"{{_target_: {target}}}",
            "located": f"{{_target_: {{_target_: detlib.utils.registry.locate, name: {target}}}}}",
            "interpolation": "{_target_: '${name}'}",
        }[form]
        path.write_text(f"name: {target}\nmodel: {node}\n")
        cfg = LazyConfig.load(str(path))
    with pytest.raises(ValueError, match="is refused"):
        instantiate(cfg.model)


def test_module_of_a_refused_target_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "danger_zone.py").write_text("def f(x=1):\n    return x\n")
    monkeypatch.syspath_prepend(tmp_path)
    cfg = OmegaConf.create({"model": {"_target_": "danger_zone.f"}})
    with pytest.raises(KeyError, match=r"has no 'x'.*Write \+model.x=... to add it"):
        LazyConfig.apply_overrides(cfg, ["model.x=3"])
    with pytest.raises(
        ValueError, match=r"at config path 'model': 'danger_zone.f' .*ALLOWED_PACKAGES=danger_zone"
    ):
        instantiate(cfg)
    assert "danger_zone" not in sys.modules
    monkeypatch.setenv("DETLIB_ALLOWED_PACKAGES", "other, danger_zone")
    LazyConfig.apply_overrides(cfg, ["model.x=3"])
    assert instantiate(cfg.model) == 3
    monkeypatch.delenv("DETLIB_ALLOWED_PACKAGES")
    monkeypatch.setattr(_targets, "_packages", set(_targets._packages))
    allow_packages("danger_zone")
    assert instantiate(cfg.model) == 3
    with pytest.raises(ValueError, match="dotted path, got 'a b'"):
        allow_packages("a b")


@pytest.mark.parametrize(
    "target",
    [
        "torch.nn.Linear",
        "torch.relu",
        "torch.nn.functional.gelu",
        "torch.Tensor.view",
        "torch.optim.SGD",
        "torchvision.models.resnet18",
        "detlib.modeling.FPN",
        "fvcore.common.param_scheduler.CosineParamScheduler",
        "builtins.dict",
        "functools.partial",
    ],
)
def test_allowed_targets_are_found(target):
    assert callable(instantiate({"_target_": "detlib.utils.registry.locate", "name": target}))


def test_paths_in_python_code_need_no_permission(monkeypatch):
    monkeypatch.setattr(_targets, "_trusted", set())
    assert instantiate(LazyCall("os.path.join")(_args_=["a", "b"])) == "a/b"
    assert instantiate({"_target_": os.path.basename, "p": "a/b"}) == "b"
