import logging
from collections import OrderedDict

import pytest
import torch
from torch import nn

from detlib.engine.freezing import freeze_by_name, log_model
from detlib.layers import FrozenBatchNorm2d
from detlib.utils.logger import setup_logger
from tests.builders import small_config
from tests.modeling.architectures import architecture_batch, build_architecture


def _small() -> nn.Module:
    model = nn.Module()
    model.stem = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(2, affine=False))
    model.head = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.GroupNorm(1, 2))
    return model


@pytest.mark.parametrize(
    ("patterns", "frozen", "norms"),
    [
        ([], set(), 0),
        (["stem"], {"stem.0.weight", "stem.0.bias"}, 1),
        (["*.0.*"], {"stem.0.weight", "stem.0.bias", "head.0.weight", "head.0.bias"}, 0),
        (["head.?.weight"], {"head.0.weight", "head.1.weight", "head.2.weight"}, 0),
        (["*.1", "head.2.bias"], {"head.2.bias"}, 2),
        (["*"], {f"{m}.{k}" for m in ("stem.0", "head.0", "head.2") for k in ("weight", "bias")}, 2),
    ],
)
def test_patterns_freeze_parameters_and_the_norms_they_cover(patterns, frozen, norms):
    model = _small()
    names = list(model.state_dict())
    total = sum(p.numel() for p in model.parameters())
    count = freeze_by_name(model, patterns)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen
    assert sum(isinstance(m, FrozenBatchNorm2d) for m in model.modules()) == norms
    # The norm without parameters.
    assert model.train().stem[2].training == (not {"stem", "*"} & set(patterns))
    assert list(model.state_dict()) == names
    assert count == total - sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Frozen parameters may be named again.
    assert freeze_by_name(model, patterns) == 0


def test_frozen_parameters_and_statistics_do_not_change_in_a_step(caplog):
    model = build_architecture("retinanet_bn")
    with caplog.at_level(logging.INFO, logger="detlib"):
        freeze_by_name(model, ["backbone.bottom_up", "head.cls_subnet"])
    assert "Froze 64 of 88 parameters" in caplog.text and "statistics of 5 BatchNorm layers" in caplog.text
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.train()
    sum(model(architecture_batch("retinanet_bn")).values()).backward()
    optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and not [k for k in changed if k.startswith(("backbone.bottom_up.", "head.cls_subnet."))]
    assert any("running_mean" in k for k in changed)  # of the box tower


def test_a_pattern_without_match_raises_an_error_with_similar_names():
    model = build_architecture("retinanet")
    with pytest.raises(ValueError, match=r"no parameter matches 'backbone.botom_up'.*backbone.bottom_up"):
        freeze_by_name(model, ["backbone.botom_up"])
    with pytest.raises(ValueError, match="MODEL.FREEZE .train.freeze.: no parameter matches 'x.\\*'"):
        freeze_by_name(model, ["head", "x.*"])
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(TypeError, match="list of patterns, got 'head'"):
        freeze_by_name(model, "head")
    assert small_config().MODEL.FREEZE == []


def test_console_shows_a_summary_of_the_model_and_the_file_all_layers(tmp_path, capsys):
    model = nn.Sequential(OrderedDict(body=nn.Linear(2, 3), head=nn.Sequential(nn.Linear(3, 4))))
    model.body.requires_grad_(False)
    setup_logger(str(tmp_path))
    log_model(model)
    lines = [
        "Sequential, 25 parameters, 9 of them frozen",
        "  body: Linear, 9 parameters, 9 of them frozen",
        "  head: Sequential, 16 parameters",
    ]
    console, file = capsys.readouterr().out, (tmp_path / "log.txt").read_text()
    assert console.splitlines()[1:] == lines and "in_features" not in console
    assert "\n".join(lines) in file and "Linear(in_features=3, out_features=4" in file
