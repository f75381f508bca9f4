"""Configs: `get_cfg`, `CfgNode`, and `configurable`, which makes components from them."""

from detlib.config.cfg_node import CfgNode
from detlib.config.compat import downgrade_config, upgrade_config
from detlib.config.config import get_cfg, global_cfg, set_global_cfg
from detlib.config.construct import configurable

__all__ = [
    "CfgNode",
    "configurable",
    "downgrade_config",
    "get_cfg",
    "global_cfg",
    "set_global_cfg",
    "upgrade_config",
]
