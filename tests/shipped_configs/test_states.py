"""Every shipped model of the zoo, built without memory: parameter names, shapes and what is frozen."""

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
    """The model of a shipped config, with shapes alone and without values."""
    cfg = model_zoo.get_config(name)
    with torch.device("meta"):
        if not isinstance(cfg, CfgNode):
            return instantiate(cfg.model)
        cfg.MODEL.DEVICE = "meta"
        return build_model(cfg)


def test_all_models_are_walked():
    values = json.loads((HERE / "config_deltas.json").read_text())
    assert values.keys() == {name for name in FACTS if name.endswith(".yaml")}
    assert len(FACTS) == 72


@pytest.mark.parametrize("name", FACTS)
def test_state_is_the_published_one(name):
    model = on_meta(name)
    state = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert state == dict(FACTS[name]["state"])
    frozen = {key for key, p in model.named_parameters() if not p.requires_grad}
    assert frozen == set(FACTS[name]["frozen"])
