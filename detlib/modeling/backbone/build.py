"""The registry of backbones and the function that builds one from a config."""

from detlib.layers.shape_spec import ShapeSpec
from detlib.modeling.backbone.backbone import Backbone
from detlib.utils.registry import Registry

__all__ = ["BACKBONE_REGISTRY", "build_backbone"]

BACKBONE_REGISTRY = Registry("BACKBONE")
BACKBONE_REGISTRY.__doc__ = """
Callables `(cfg, input_shape: ShapeSpec) -> Backbone`, selected by `cfg.MODEL.BACKBONE.NAME`.
"""


def build_backbone(cfg, input_shape: ShapeSpec | None = None) -> Backbone:
    """Build the backbone that `cfg.MODEL.BACKBONE.NAME` names.

    Args:
        cfg: the full config.
        input_shape: shape of the images; by default as many channels as `cfg.MODEL.PIXEL_MEAN` has entries.

    Raises:
        TypeError: the registered builder did not return a `Backbone`.
    """
    if input_shape is None:
        input_shape = ShapeSpec(channels=len(cfg.MODEL.PIXEL_MEAN))
    name = cfg.MODEL.BACKBONE.NAME
    backbone = BACKBONE_REGISTRY.get(name, key="MODEL.BACKBONE.NAME")(cfg, input_shape)
    if not isinstance(backbone, Backbone):
        raise TypeError(f"MODEL.BACKBONE.NAME {name!r} built a {type(backbone).__name__}, not a Backbone")
    return backbone
