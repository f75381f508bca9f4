"""Every shipped model of the zoo, built without memory: parameter names, shapes and what is frozen."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from detlib.config import get_cfg
from detlib.modeling import build_model

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs"
with gzip.open(HERE / "zoo_states.json.gz", "rt") as f:
    FACTS = json.load(f)
# Parts of the names of configs whose architecture is not there yet.
NOT_YET = ()


def on_meta(name: str) -> torch.nn.Module:
    """The model of a shipped config, with shapes alone and without values."""
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIGS / name))
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


def test_all_models_are_walked():
    values = json.loads((HERE / "config_deltas.json").read_text())
    assert values.keys() == {name for name in FACTS if name.endswith(".yaml")}
    assert len(FACTS) == 72


@pytest.mark.parametrize(
    "name", [n for n in FACTS if n.endswith(".yaml") and not any(part in n for part in NOT_YET)]
)
def test_state_is_the_published_one(name):
    model = on_meta(name)
    state = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert state == dict(FACTS[name]["state"])
    frozen = {key for key, p in model.named_parameters() if not p.requires_grad}
    assert frozen == set(FACTS[name]["frozen"])
