"""Tests that keys and defaults are those of detectron2."""

import json
from pathlib import Path

from detlib.config import get_cfg
from detlib.config.run_options import yaml_defaults

DEFAULTS = json.loads((Path(__file__).parent / "config_defaults.json").read_text())

# Keys that detectron2 does not have, in `detlib/config/defaults.py`.
ADDED = {
    "DATALOADER.DATASET_WEIGHTS",
    "INPUT.COLOR_JITTER.BRIGHTNESS",
    "INPUT.COLOR_JITTER.CONTRAST",
    "INPUT.COLOR_JITTER.HUE",
    "INPUT.COLOR_JITTER.SATURATION",
    "INPUT.COPY_PASTE.PROB",
    "INPUT.DECODER",
    "INPUT.LSJ.ENABLED",
    "INPUT.LSJ.SCALE",
    "INPUT.LSJ.SIZE",
    "INPUT.MOSAIC.PROB",
    "INPUT.MOSAIC.SIZE",
    "MODEL.TIMM.CHECKPOINT_PATH",
    "MODEL.TIMM.MODEL_NAME",
    "MODEL.TIMM.NORM",
    "MODEL.TIMM.OUT_INDICES",
    "MODEL.TIMM.PRETRAINED",
    "MODEL.TORCHVISION.MODEL_NAME",
    "MODEL.TORCHVISION.OUT_FEATURES",
    "MODEL.TORCHVISION.PRETRAINED",
    "MODEL.TORCHVISION.RETURN_NODES",
    "SOLVER.BETAS",
    "SOLVER.LAYER_DECAY",
    "SOLVER.LR_FACTORS",
    "SOLVER.OPTIMIZER",
}
# Those of training options; each option has a sentence of documentation instead of an entry here.
DECLARED = yaml_defaults().keys() - DEFAULTS.keys()


def flatten(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def as_json(value):
    """Convert to JSON, which has tuples as lists but tells 0, 0.0 and False apart."""
    return json.dumps(value)


def test_every_key_has_its_type_and_default():
    ours = dict(flatten(get_cfg()))
    assert len(DEFAULTS) == 192
    unexpected = sorted(ours.keys() - DEFAULTS.keys() - ADDED - DECLARED)
    assert not unexpected, f"new config keys; add them to ADDED in this file: {unexpected}"
    missing = sorted((DEFAULTS.keys() | ADDED | DECLARED) - ours.keys())
    assert not missing, f"config keys without a default; remove those of ADDED that are gone: {missing}"
    for key, fact in DEFAULTS.items():
        assert type(ours[key]).__name__ == fact["type"], key
        expected = "auto" if key == "MODEL.DEVICE" else fact["default"]
        assert as_json(ours[key]) == as_json(expected), key


def test_get_cfg_returns_a_new_config_each_time():
    first = get_cfg()
    first.SOLVER.BASE_LR = 5.0
    first.MODEL.FPN.IN_FEATURES.append("res9")
    assert get_cfg().SOLVER.BASE_LR == 0.001 and get_cfg().MODEL.FPN.IN_FEATURES == []
