"""What a head that pools its own features needs from the config."""

from detlib.config import CfgNode
from detlib.layers.shape_spec import ShapeSpec
from detlib.modeling.config_checks import check_features, config_keys
from detlib.modeling.poolers import ROIPooler

__all__ = ["feature_shapes", "pooler_from_config"]


def feature_shapes(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, ShapeSpec]:
    """The shapes of the maps that `cfg.MODEL.ROI_HEADS.IN_FEATURES` names, in its order.

    Raises:
        ValueError: a name that the backbone does not give, or no name at all.
    """
    names = list(cfg.MODEL.ROI_HEADS.IN_FEATURES)
    check_features(names, input_shape, "MODEL.ROI_HEADS.IN_FEATURES")
    return {name: input_shape[name] for name in names}


def pooler_from_config(
    cfg: CfgNode, key: str, input_shape: dict[str, ShapeSpec]
) -> tuple[ROIPooler | None, ShapeSpec | dict[str, ShapeSpec]]:
    """The pooler of `cfg.MODEL[key]` over `cfg.MODEL.ROI_HEADS.IN_FEATURES`, and the shape of what it gives.

    Without POOLER_TYPE there is no pooler: the head takes the dict of feature maps, and the shape is a dict
    too.

    Args:
        cfg: the whole config.
        key: name of a head's node below MODEL, such as "ROI_BOX_HEAD", with POOLER_RESOLUTION,
            POOLER_SAMPLING_RATIO and POOLER_TYPE.
        input_shape: the backbone's feature maps by name.

    Raises:
        ValueError: feature maps that the backbone does not give, that have different numbers of channels or
            strides with a gap, or a pooler that does not exist.
    """
    node = cfg.MODEL[key]
    shapes = feature_shapes(cfg, input_shape)
    if not node.POOLER_TYPE:
        return None, shapes
    channels = {shape.channels for shape in shapes.values()}
    if len(channels) != 1:
        raise ValueError(
            f"MODEL.ROI_HEADS.IN_FEATURES {list(shapes)} must have equal channels, got {sorted(channels)}."
        )
    resolution = node.POOLER_RESOLUTION
    keys = (f"MODEL.{key}.POOLER_TYPE", f"MODEL.{key}.POOLER_RESOLUTION", "MODEL.ROI_HEADS.IN_FEATURES")
    with config_keys(*keys):
        pooler = ROIPooler(
            output_size=resolution,
            scales=[1.0 / shape.stride for shape in shapes.values()],
            sampling_ratio=node.POOLER_SAMPLING_RATIO,
            pooler_type=node.POOLER_TYPE,
        )
    return pooler, ShapeSpec(channels=channels.pop(), height=resolution, width=resolution)
