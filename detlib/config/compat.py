"""Upgrade and downgrade of configs between versions with different key names.

Configs of detectron2 before October 2019 have VERSION 1. The current version is VERSION 2. Files of VERSION 1
are upgraded when they are merged; nothing else in detlib uses the old names.
"""

import logging
from typing import Any

__all__ = ["LATEST_VERSION", "RENAMED_IN_2", "downgrade_config", "upgrade_config", "upgrade_tree"]

logger = logging.getLogger(__name__)

LATEST_VERSION = 2

# Names of VERSION 1 -> names of VERSION 2.
RENAMED_IN_2 = {
    "MODEL.WEIGHT": "MODEL.WEIGHTS",
    "MODEL.PANOPTIC_FPN.SEMANTIC_LOSS_SCALE": "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT",
    "MODEL.PANOPTIC_FPN.RPN_LOSS_SCALE": "MODEL.RPN.LOSS_WEIGHT",
    "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_SCALE": "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT",
    "MODEL.PANOPTIC_FPN.COMBINE_ON": "MODEL.PANOPTIC_FPN.COMBINE.ENABLED",
    "MODEL.PANOPTIC_FPN.COMBINE_OVERLAP_THRESHOLD": "MODEL.PANOPTIC_FPN.COMBINE.OVERLAP_THRESH",
    "MODEL.PANOPTIC_FPN.COMBINE_STUFF_AREA_LIMIT": "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT",
    "MODEL.PANOPTIC_FPN.COMBINE_INSTANCES_CONFIDENCE_THRESHOLD": (
        "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH"
    ),
    "MODEL.ROI_HEADS.SCORE_THRESH": "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
    "MODEL.ROI_HEADS.NMS": "MODEL.ROI_HEADS.NMS_THRESH_TEST",
    "MODEL.RETINANET.INFERENCE_SCORE_THRESHOLD": "MODEL.RETINANET.SCORE_THRESH_TEST",
    "MODEL.RETINANET.INFERENCE_TOPK_CANDIDATES": "MODEL.RETINANET.TOPK_CANDIDATES_TEST",
    "MODEL.RETINANET.INFERENCE_NMS_THRESHOLD": "MODEL.RETINANET.NMS_THRESH_TEST",
    "TEST.DETECTIONS_PER_IMG": "TEST.DETECTIONS_PER_IMAGE",
    "TEST.AUG_ON": "TEST.AUG.ENABLED",
    "TEST.AUG_MIN_SIZES": "TEST.AUG.MIN_SIZES",
    "TEST.AUG_MAX_SIZE": "TEST.AUG.MAX_SIZE",
    "TEST.AUG_FLIP": "TEST.AUG.FLIP",
}
# VERSION 1 has anchor keys in the section of each model; VERSION 2 has one section for all models.
_ANCHOR_KEYS = {"ANCHOR_SIZES": "SIZES", "ANCHOR_ASPECT_RATIOS": "ASPECT_RATIOS"}
_ONLY_IN_1 = ("MODEL.RETINANET.ANCHOR_STRIDES", "MODEL.RPN.ANCHOR_STRIDES")
_MISSING = object()


def _get(tree: dict, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return _MISSING
        tree = tree[part]
    return tree


def _pop(tree: dict, key: str) -> Any:
    """Remove a dotted key and the sections that it leaves empty; return its value."""
    section, _, name = key.rpartition(".")
    node = _get(tree, section) if section else tree
    if not isinstance(node, dict) or name not in node:
        return _MISSING
    value = node.pop(name)
    if not node and section:
        _pop(tree, section)
    return value


def _put(tree: dict, key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for part in sections:
        if part not in tree:
            tree[part] = type(tree)()
        tree = tree[part]
    tree[name] = value


def _anchor_keys(section: str) -> dict[str, str]:
    return {f"MODEL.{section}.{old}": f"MODEL.ANCHOR_GENERATOR.{new}" for old, new in _ANCHOR_KEYS.items()}


def _old_names() -> list[str]:
    return [*RENAMED_IN_2, *_anchor_keys("RPN"), *_anchor_keys("RETINANET"), *_ONLY_IN_1]


def _to_2(tree: dict, meta_architecture: str | None) -> None:
    for old, new in RENAMED_IN_2.items():
        value = _pop(tree, old)
        if value is not _MISSING:
            _put(tree, new, value)
    own = _get(tree, "MODEL.META_ARCHITECTURE")
    model = meta_architecture if own is _MISSING else own
    used, unused = ("RETINANET", "RPN") if model == "RetinaNet" else ("RPN", "RETINANET")
    for old, new in _anchor_keys(used).items():
        value = _pop(tree, old)
        if value is not _MISSING:
            _put(tree, new, value)
    for old in (*_anchor_keys(unused), *_ONLY_IN_1):
        _pop(tree, old)
    tree["VERSION"] = 2


def _to_1(tree: dict) -> None:
    for old, new in RENAMED_IN_2.items():
        value = _pop(tree, new)
        if value is not _MISSING:
            _put(tree, old, value)
    for section in ("RPN", "RETINANET"):
        for old, new in _anchor_keys(section).items():
            value = _get(tree, new)
            if value is not _MISSING:
                _put(tree, old, value)
    for new in _anchor_keys("RPN").values():
        _pop(tree, new)
    _put(tree, "MODEL.RETINANET.ANCHOR_STRIDES", [])
    tree["VERSION"] = 1


def upgrade_tree(tree: dict, name: str, meta_architecture: str | None = None) -> None:
    """Upgrade the content of a config file to the current version, in place. It need not set every key.

    Args:
        tree: nested dicts. Without the key VERSION, it is of VERSION 1 if it has a key that only VERSION
            1 has.
        name: the file, for messages.
        meta_architecture: the model if the file does not set it. It determines which anchors are used.

    Raises:
        ValueError: if the version is not a number, or is newer than this library supports.
    """
    version = tree.get("VERSION")
    if version is None:
        old = [key for key in _old_names() if _get(tree, key) is not _MISSING]
        version = 1 if old else LATEST_VERSION
        if old:
            logger.warning(
                "Config %r has no VERSION; it is read as VERSION 1, since it sets %s", name, ", ".join(old)
            )
    if type(version) is not int or not 1 <= version <= LATEST_VERSION:
        raise ValueError(f"{name}: VERSION is {version!r}; this library reads 1 to {LATEST_VERSION}.")
    if version == 1:
        logger.warning("Config %r has VERSION 1 and was upgraded to VERSION %d", name, LATEST_VERSION)
        _to_2(tree, meta_architecture)


def upgrade_config(cfg, to_version: int | None = None):
    """Return a copy of a config, upgraded to `to_version`.

    Args:
        cfg: a CfgNode with the key VERSION.
        to_version: the target version; None for the latest.

    Raises:
        ValueError: if the config is newer than `to_version`, or there is no such version.
    """
    to_version = LATEST_VERSION if to_version is None else to_version
    if not 1 <= cfg.VERSION <= to_version <= LATEST_VERSION:
        raise ValueError(f"Cannot upgrade a config from VERSION {cfg.VERSION} to {to_version}.")
    cfg = cfg.clone()
    if cfg.VERSION < to_version:
        _to_2(cfg, None)
    return cfg


def downgrade_config(cfg, to_version: int):
    """Return a copy of a config, downgraded to `to_version`, for tools that only support the old names.

    Args:
        cfg: a CfgNode with the key VERSION.
        to_version: the target version.

    Raises:
        ValueError: if the config is older than `to_version`, or there is no such version.
    """
    if not 1 <= to_version <= cfg.VERSION <= LATEST_VERSION:
        raise ValueError(f"Cannot downgrade a config from VERSION {cfg.VERSION} to {to_version}.")
    cfg = cfg.clone()
    if cfg.VERSION > to_version:
        _to_1(cfg)
    return cfg
