"""Building a whole model from a config."""

import torch

from detlib.config import CfgNode
from detlib.utils.env import resolve_device
from detlib.utils.registry import Registry

__all__ = ["META_ARCH_REGISTRY", "build_model"]

META_ARCH_REGISTRY = Registry("META_ARCH")
META_ARCH_REGISTRY.__doc__ = """
Whole models: modules that take a list of dicts, one for each image, and return a dict of losses in training
and a list of dicts otherwise. An entry is called as `entry(cfg)`.
"""


def build_model(cfg: CfgNode) -> torch.nn.Module:
    """Build the model that `cfg.MODEL.META_ARCHITECTURE` names, with random weights, on `cfg.MODEL.DEVICE`.

    Weights are loaded by `detlib.checkpoint.DetectionCheckpointer`.

    Raises:
        TypeError: `cfg` is no CfgNode.
        KeyError: no such architecture; the message lists near names.
    """
    if not isinstance(cfg, CfgNode):
        raise TypeError(f"build_model takes a CfgNode, such as get_cfg() returns; got {type(cfg).__name__}.")
    model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE, key="MODEL.META_ARCHITECTURE")(cfg)
    return model.to(resolve_device(cfg.MODEL.DEVICE))
