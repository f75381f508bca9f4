"""Keys and defaults against detectron2's, and the shipped configs against what theirs resolve to."""

import json
from pathlib import Path

import pytest

from detlib.config import get_cfg

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs"
DEFAULTS = json.loads((HERE / "config_defaults.json").read_text())
DELTAS = json.loads((HERE / "config_deltas.json").read_text())
PRESENT = [name for name in DELTAS if (CONFIGS / name).exists()]


def flatten(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def as_json(value):
    """Tuples as lists, but 0, 0.0 and False apart."""
    return json.dumps(value)


def resolve(path):
    cfg = get_cfg()
    cfg.merge_from_file(str(path))
    return cfg


def delta(cfg):
    defaults = dict(flatten(get_cfg()))
    assert defaults.keys() == dict(flatten(cfg)).keys()
    return {k: v for k, v in flatten(cfg) if as_json(v) != as_json(defaults[k])}


def test_every_key_has_its_type_and_default():
    ours = dict(flatten(get_cfg()))
    assert len(DEFAULTS) == 192
    assert ours.keys() == DEFAULTS.keys()
    for key, fact in DEFAULTS.items():
        assert type(ours[key]).__name__ == fact["type"], key
        wanted = "auto" if key == "MODEL.DEVICE" else fact["default"]
        assert as_json(ours[key]) == as_json(wanted), key


def test_get_cfg_gives_a_new_config_each_time():
    first = get_cfg()
    first.SOLVER.BASE_LR = 5.0
    first.MODEL.FPN.IN_FEATURES.append("res9")
    assert get_cfg().SOLVER.BASE_LR == 0.001 and get_cfg().MODEL.FPN.IN_FEATURES == []


def test_configs_are_found():
    assert {
        "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
        "COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml",
        "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml",
        "COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml",
        "COCO-Detection/rpn_R_50_FPN_1x.yaml",
        "COCO-Detection/fast_rcnn_R_50_FPN_1x.yaml",
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml",
        "COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x.yaml",
        "COCO-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_3x.yaml",
    } <= set(PRESENT)


@pytest.mark.parametrize("name", PRESENT)
def test_config_resolves_to_the_published_one(name):
    got = delta(resolve(CONFIGS / name))
    assert {k: as_json(v) for k, v in got.items()} == {k: as_json(v) for k, v in DELTAS[name].items()}


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_comes_back_from_its_dump(path, tmp_path):
    cfg = resolve(path)
    (tmp_path / "dump.yaml").write_text(cfg.dump())
    again = resolve(tmp_path / "dump.yaml")
    assert again == cfg
    assert str(again) == str(cfg)  # tells tuples from lists at any depth


def test_quickstart_recipe():
    got = delta(resolve(CONFIGS / "Quickstart" / "faster_rcnn_R_18_FPN.yaml"))
    wanted = dict(DELTAS["COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"])
    for key in ("MODEL.WEIGHTS", "DATASETS.TRAIN", "DATASETS.TEST"):
        del wanted[key]
    wanted |= {
        "MODEL.RESNETS.DEPTH": 18,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
        "MODEL.RESNETS.NORM": "GN",
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.FPN.NORM": "GN",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.PIXEL_STD": [57.375, 57.12, 58.395],
        "MODEL.ROI_HEADS.NUM_CLASSES": 3,
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
    assert {k: as_json(v) for k, v in got.items()} == {k: as_json(v) for k, v in wanted.items()}
