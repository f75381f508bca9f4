"""The published lazy configs, and functions to compare configs with them.

`lazy_configs.json.gz` has the published trees: targets as dotted paths, `functools.partial` as ``_partial_``,
and ``<lambda>`` for lambdas, which are partials in our configs. Those of DINO, Deformable DETR and DETR are
from detrex and have the device "cuda", which is "auto" in ours.
"""

import copy
import functools
import gzip
import json
from pathlib import Path

from omegaconf import DictConfig, OmegaConf, SCMode

from detlib.config import LazyConfig
from detlib.utils.registry import locate
from tests.conformance.harness import Case, add_ground_truth, add_semantic_ground_truth, make_inputs

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs"
PUBLISHED = json.loads(gzip.decompress((HERE / "lazy_configs.json.gz").read_bytes()))

NAMES = list(PUBLISHED)
# Parts that multiple configs share.
PARTS = {"edits", "mvitv2", "regnet", "vit", "lvis", "detr", "coco_detr"}
DETR_LIKE = ("DINO/", "DeformableDETR/", "DETR/")
FILES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.py"))
# Recipes that only this project has.
OWN = sorted(
    name for name in FILES if name.startswith(DETR_LIKE) and "/models/" not in name and name not in PUBLISHED
)


@functools.cache
def load(name):
    """Load a lazy config. It is read-only, since all tests share it."""
    cfg = LazyConfig.load(str(CONFIGS / name))
    OmegaConf.set_readonly(cfg, True)
    return cfg


def tree(value):
    """Convert a config to the form of the published trees."""
    if isinstance(value, DictConfig):
        mode = SCMode.DICT_CONFIG if OmegaConf.get_type(value) is dict else SCMode.DICT
        value = OmegaConf.to_container(value, resolve=False, structured_config_mode=mode)
    if isinstance(value, dict):
        return {key: tree(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [tree(item) for item in value]
    if isinstance(value, functools.partial):
        return {"_partial_": value.func, **tree(value.keywords)}
    return value


def differences(ours, name):
    """Return the differences between a tree and the published config with this name."""
    if name.startswith(DETR_LIKE):
        published = copy.deepcopy(PUBLISHED[name])
        assert published["model"].pop("device") == published["train"]["device"] == "cuda"
        published["train"]["device"] = "auto"
        return _differences(ours, published, name)
    return _differences(ours, PUBLISHED[name], name)


def _differences(ours, published, path):
    if published == "<lambda>":
        return [] if "_partial_" in ours else [f"{path}: {ours!r}"]
    if isinstance(published, dict) and isinstance(ours, dict):
        return [
            found
            for key in sorted(ours.keys() | published.keys())
            for found in (
                _differences(ours[key], published[key], f"{path}.{key}")
                if key in ours and key in published
                else [f"{path}.{key}: {'missing' if key in published else 'unexpected'}"]
            )
        ]
    if isinstance(published, list) and isinstance(ours, list) and len(ours) == len(published):
        return [
            found
            for i, (a, b) in enumerate(zip(ours, published))
            for found in _differences(a, b, f"{path}[{i}]")
        ]
    if callable(ours):
        published = locate(published)
    elif isinstance(published, str) and published.startswith("detlib."):
        ours, published = locate(ours), locate(published)
    return (
        []
        if ours == published and type(ours) is type(published)
        else [f"{path}: {ours!r}, expected {published!r}"]
    )


def training_items(model):
    """Return two small images with the ground truth for any model."""
    inputs = [
        {"image": [96, 128], "image_seed": 1, "height": 96, "width": 128},
        {"image": [128, 96], "image_seed": 2, "height": 128, "width": 96},
    ]
    heads = getattr(model, "roi_heads", None)
    case = Case({"inputs": inputs, "num_classes": getattr(heads, "num_classes", 80)}, {})
    items = make_inputs(case)
    add_ground_truth(items, case, with_masks=True, with_keypoints=getattr(heads, "keypoint_on", False))
    if hasattr(model, "sem_seg_head"):
        add_semantic_ground_truth(items, case, model.sem_seg_head.num_classes)
    return items
