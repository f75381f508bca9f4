"""Builders of backbones from timm and torchvision, alone and with FPN, for YAML configs."""

from detlib.layers.shape_spec import ShapeSpec
from detlib.modeling.backbone.backbone import Backbone
from detlib.modeling.backbone.build import BACKBONE_REGISTRY
from detlib.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7, fpn_from_config
from detlib.modeling.backbone.timm_backbone import TimmBackbone
from detlib.modeling.backbone.torchvision_backbone import TorchvisionBackbone
from detlib.modeling.config_checks import config_keys

__all__ = [
    "build_retinanet_timm_fpn_backbone",
    "build_retinanet_torchvision_fpn_backbone",
    "build_timm_backbone",
    "build_timm_fpn_backbone",
    "build_torchvision_backbone",
    "build_torchvision_fpn_backbone",
]

_TIMM_MAPS = "timm's network (MODEL.TIMM.OUT_INDICES)"
_TORCHVISION_MAPS = "torchvision's network (MODEL.TORCHVISION.OUT_FEATURES)"


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg, input_shape: ShapeSpec) -> TimmBackbone:
    """Build a network of timm from `cfg.MODEL.TIMM`.

    Args:
        cfg: the whole config.
        input_shape: channels of the picture.

    Raises:
        ValueError: a key with an illegal value; the key is named.
        FileNotFoundError: weights that are not there.
    """
    timm = cfg.MODEL.TIMM
    with config_keys("MODEL.TIMM"):
        return TimmBackbone(
            timm.MODEL_NAME,
            pretrained=timm.PRETRAINED,
            checkpoint_path=timm.CHECKPOINT_PATH,
            in_channels=input_shape.channels,
            out_indices=timm.OUT_INDICES,
            norm_layer=timm.NORM or None,
        )


@BACKBONE_REGISTRY.register()
def build_torchvision_backbone(cfg, input_shape: ShapeSpec) -> TorchvisionBackbone:
    """Build a network of torchvision from `cfg.MODEL.TORCHVISION`.

    Args:
        cfg: the whole config.
        input_shape: channels of the picture, which must be 3.

    Raises:
        ValueError: a key with an illegal value; the key is named.
        FileNotFoundError: weights that are not there.
    """
    keys = cfg.MODEL.TORCHVISION
    where = "MODEL.TORCHVISION"
    if input_shape.channels != 3:
        raise ValueError(
            f"{where}: torchvision's networks take pictures of 3 channels, MODEL.PIXEL_MEAN has "
            f"{input_shape.channels}"
        )
    if len(keys.RETURN_NODES) != len(keys.OUT_FEATURES):
        raise ValueError(
            f"{where}.OUT_FEATURES must name each node of {where}.RETURN_NODES: got "
            f"{list(keys.OUT_FEATURES)} for {list(keys.RETURN_NODES)}"
        )
    with config_keys(where):
        return TorchvisionBackbone(
            keys.MODEL_NAME,
            pretrained=keys.PRETRAINED,
            return_nodes=dict(zip(keys.RETURN_NODES, keys.OUT_FEATURES)),
        )


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """Build a network of timm with FPN, and "p6", from `cfg.MODEL.TIMM` and `cfg.MODEL.FPN`.

    `MODEL.FPN.IN_FEATURES` names timm's maps: "p1" to "p4" of a ResNet become levels "p2" to "p5".

    Args:
        cfg: the whole config.
        input_shape: channels of the picture.
    """
    return fpn_from_config(cfg, build_timm_backbone(cfg, input_shape), LastLevelMaxPool(), _TIMM_MAPS)


@BACKBONE_REGISTRY.register()
def build_torchvision_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """Build a network of torchvision with FPN, and "p6", from `cfg.MODEL.TORCHVISION` and `cfg.MODEL.FPN`.

    Args:
        cfg: the whole config.
        input_shape: channels of the picture.
    """
    bottom_up = build_torchvision_backbone(cfg, input_shape)
    return fpn_from_config(cfg, bottom_up, LastLevelMaxPool(), _TORCHVISION_MAPS)


def _retinanet_fpn(cfg, bottom_up: Backbone, giver: str) -> FPN:
    """With RetinaNet's "p6" and "p7" from the coarsest map that the pyramid takes."""
    shapes, names = bottom_up.output_shape(), cfg.MODEL.FPN.IN_FEATURES
    last = names[-1] if names and names[-1] in shapes else next(reversed(shapes))
    top_block = LastLevelP6P7(shapes[last].channels, cfg.MODEL.FPN.OUT_CHANNELS, in_feature=last)
    return fpn_from_config(cfg, bottom_up, top_block, giver)


@BACKBONE_REGISTRY.register()
def build_retinanet_timm_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """Build a network of timm with FPN, and RetinaNet's "p6" and "p7" from the last of its maps.

    Args:
        cfg: the whole config.
        input_shape: channels of the picture.
    """
    return _retinanet_fpn(cfg, build_timm_backbone(cfg, input_shape), _TIMM_MAPS)


@BACKBONE_REGISTRY.register()
def build_retinanet_torchvision_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """Build a network of torchvision with FPN, and RetinaNet's "p6" and "p7" from the last of its maps.

    Args:
        cfg: the whole config.
        input_shape: channels of the picture.
    """
    return _retinanet_fpn(cfg, build_torchvision_backbone(cfg, input_shape), _TORCHVISION_MAPS)
