"""Finding the shipped configs, and building what they describe."""

import os
from typing import Any

import torch
from torch import nn

from detlib.checkpoint import DetectionCheckpointer
from detlib.checkpoint.catalog import DETECTRON2_PREFIX
from detlib.config import CfgNode, LazyConfig, get_cfg, instantiate
from detlib.config.shipped import config_dir as _config_dir
from detlib.config.shipped import find_config
from detlib.model_zoo.addresses import CHECKPOINTS
from detlib.modeling import build_model
from detlib.utils.suggest import suggest

__all__ = ["get", "get_checkpoint_url", "get_config", "get_config_file"]


def get_config_file(config_path: str) -> str:
    """Returns the absolute path of a shipped config file.

    Args:
        config_path: its path below ``configs/``, such as
            ``"COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"``.

    Raises:
        FileNotFoundError: there is no such config; near names are listed.
    """
    return find_config(config_path, _config_dir())


def get_checkpoint_url(config_path: str) -> str:
    """Returns the address of the weights that were published for a config.

    Args:
        config_path: path below ``configs/``, with or without ending.

    Raises:
        KeyError: none were published for it; near names are listed.
    """
    name, ending = os.path.splitext(config_path)
    name = name if ending in (".yaml", ".py") else config_path
    group, _, stem = name.partition("/")
    suffix = CHECKPOINTS.get(group, {}).get(stem)
    if suffix is None:
        known = [f"{folder}/{config}" for folder, configs in CHECKPOINTS.items() for config in configs]
        raise KeyError(f"No weights were published for the config {config_path!r}.{suggest(name, known)}")
    return f"{DETECTRON2_PREFIX}{group}/{stem}/{suffix}"


def get_config(config_path: str, trained: bool = False) -> Any:
    """Returns a shipped config: a CfgNode for a ``.yaml`` path, a DictConfig for a ``.py`` path.

    Args:
        config_path: path below ``configs/``.
        trained: let ``MODEL.WEIGHTS``, or ``train.init_checkpoint``, be the published weights; otherwise it
            is what the config says, mostly weights of a backbone that was trained on ImageNet.

    Raises:
        FileNotFoundError: there is no such config.
        KeyError: `trained`, but no weights were published.
        ValueError: `trained`, but the config is of a part of a training and has no ``train.init_checkpoint``.
    """
    file = get_config_file(config_path)
    if not file.endswith(".py"):
        cfg = get_cfg()
        cfg.merge_from_file(file)
        if trained:
            cfg.MODEL.WEIGHTS = get_checkpoint_url(config_path)
        return cfg
    cfg = LazyConfig.load(file)
    if trained:
        if "init_checkpoint" not in cfg.get("train", {}):
            raise ValueError(f"{config_path!r} has no train.init_checkpoint to put the weights in.")
        cfg.train.init_checkpoint = get_checkpoint_url(config_path)
    return cfg


def get(config_path: str, trained: bool = False, device: str | None = None) -> nn.Module:
    """Builds the model of a shipped config and loads its weights.

    Args:
        config_path: path below ``configs/``.
        trained: see `get_config`.
        device: where the model goes; by default to CUDA if there is any, else to the CPU.

    Raises:
        FileNotFoundError: there is no such config.
        KeyError: `trained`, but no weights were published.
        ValueError: the config describes no model.
    """
    cfg = get_config(config_path, trained)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(cfg, CfgNode):
        cfg.MODEL.DEVICE = device
        model, weights = build_model(cfg), cfg.MODEL.WEIGHTS
    elif "model" in cfg:
        model = instantiate(cfg.model).to(device)
        weights = cfg.get("train", {}).get("init_checkpoint", "")
    else:
        raise ValueError(f"The config {config_path!r} describes no model; it has {', '.join(cfg)}.")
    DetectionCheckpointer(model).load(weights)
    return model
