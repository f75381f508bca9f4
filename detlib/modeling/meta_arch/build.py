"""The registry of meta architectures and the function that builds a model from a config."""

from collections.abc import Mapping
from typing import Any

import torch

from detlib.config import CfgNode, instantiate
from detlib.modeling.meta_arch.base import MetaArchitecture
from detlib.utils.env import resolve_device
from detlib.utils.registry import Registry

__all__ = ["META_ARCH_REGISTRY", "build_model", "facts_of"]

META_ARCH_REGISTRY = Registry("META_ARCH")
META_ARCH_REGISTRY.__doc__ = """
Meta architectures: modules that take a list of dicts, one for each image, and return a dict of losses in
training and a list of dicts otherwise. An entry is called as `entry(cfg)`. See `MetaArchitecture`, their base
class.
"""


def build_model(cfg: CfgNode | Mapping[str, Any]) -> torch.nn.Module:
    """Build a model with random weights.

    Weights are loaded by `detlib.checkpoint.DetectionCheckpointer`.

    Args:
        cfg: a CfgNode, whose `cfg.MODEL.META_ARCHITECTURE` is built and moved to `cfg.MODEL.DEVICE`; or the
            model's node of a lazy config, a mapping with `_target_`, which is instantiated on PyTorch's
            default device.

    Raises:
        TypeError: `cfg` is neither.
        KeyError: the architecture is unknown; the message lists similar names.
    """
    if isinstance(cfg, CfgNode):
        model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE, key="MODEL.META_ARCHITECTURE")(cfg)
        return model.to(resolve_device(cfg.MODEL.DEVICE))
    if isinstance(cfg, Mapping) and "_target_" in cfg:
        return instantiate(cfg)
    hint = ""
    if isinstance(cfg, Mapping) and "model" in cfg:
        hint = " Give the model's node of a lazy config: build_model(cfg.model)."
    raise TypeError(
        "build_model takes a CfgNode, such as get_cfg() returns, or a lazy node, a mapping with '_target_'; "
        f"got {type(cfg).__name__}.{hint}"
    )


def facts_of(source: CfgNode | torch.nn.Module) -> type[MetaArchitecture]:
    """Return the class that states a model's facts, see `MetaArchitecture`.

    Args:
        source: a config, whose `MODEL.META_ARCHITECTURE` is looked up; or a model.

    Returns:
        The model's class if it derives from `MetaArchitecture`. Otherwise, and where the config names an
        unknown architecture (which `build_model` reports), `MetaArchitecture` with its defaults.
    """
    if isinstance(source, CfgNode):
        try:
            entry = META_ARCH_REGISTRY.get(source.MODEL.META_ARCHITECTURE)
        except KeyError:
            entry = None
    else:
        entry = type(source)
    return entry if isinstance(entry, type) and issubclass(entry, MetaArchitecture) else MetaArchitecture
