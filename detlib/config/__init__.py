"""YAML configs (`get_cfg`, `CfgNode`, `configurable`) and lazy configs (`LazyConfig`, `instantiate`)."""

from detlib.config._targets import allow_packages
from detlib.config.cfg_node import CfgNode
from detlib.config.compat import downgrade_config, upgrade_config
from detlib.config.config import configurable, get_cfg, get_config, global_cfg, set_global_cfg, try_get_key
from detlib.config.instantiate import instantiate
from detlib.config.lazy import LazyCall, LazyConfig

__all__ = [
    "CfgNode",
    "LazyCall",
    "LazyConfig",
    "allow_packages",
    "configurable",
    "downgrade_config",
    "get_cfg",
    "get_config",
    "global_cfg",
    "instantiate",
    "set_global_cfg",
    "try_get_key",
    "upgrade_config",
]
