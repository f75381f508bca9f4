"""Parameter names, shapes and frozen parameters of all shipped models, built on the meta device."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from detlib import model_zoo
from detlib.config import CfgNode, instantiate
from detlib.modeling import build_model

HERE = Path(__file__).parent
with gzip.open(HERE / "zoo_states.json.gz", "rt") as f:
    FACTS = json.load(f)


def on_meta(name: str) -> torch.nn.Module:
    """Build the model of a shipped config on the meta device, without values."""
    cfg = model_zoo.get_config(name)
    with torch.device("meta"):
        if not isinstance(cfg, CfgNode):
            return instantiate(cfg.model)
        cfg.MODEL.DEVICE = "meta"
        return build_model(cfg)


def test_every_yaml_config_has_a_published_state():
    values = json.loads((HERE / "config_deltas.json").read_text())
    assert values.keys() == {name for name in FACTS if name.endswith(".yaml")}
    assert len(FACTS) == 72


@pytest.mark.parametrize("name", FACTS)
def test_state_equals_the_published_one(name):
    model = on_meta(name)
    state = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert state == dict(FACTS[name]["state"])
    frozen = {key for key, p in model.named_parameters() if not p.requires_grad}
    assert frozen == set(FACTS[name]["frozen"])
