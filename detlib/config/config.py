"""The default config, and the one that a program may share."""

from detlib.config.cfg_node import CfgNode
from detlib.config.construct import configurable
from detlib.config.defaults import _C

__all__ = ["CfgNode", "configurable", "get_cfg", "global_cfg", "set_global_cfg"]

global_cfg = CfgNode()


def get_cfg() -> CfgNode:
    """Returns a new config with every key at its default."""
    return _C.clone()


def set_global_cfg(cfg: CfgNode) -> None:
    """Makes `global_cfg` hold what `cfg` holds.

    It is there for short experiments; in code that lasts, hand configs to what needs them.
    """
    global_cfg.clear()
    global_cfg.update(cfg)
