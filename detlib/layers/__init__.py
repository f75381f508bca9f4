"""Neural network layers: extensions of torch.nn, norms, blocks, and modules around `detlib.ops`."""

from detlib.layers.aspp import ASPP
from detlib.layers.batch_norm import (
    CycleBatchNormList,
    FrozenBatchNorm2d,
    LayerNorm,
    NaiveSyncBatchNorm,
    get_norm,
)
from detlib.layers.blocks import CNNBlockBase, DepthwiseSeparableConv2d
from detlib.layers.box_ops import (
    box_cxcywh_to_xyxy,
    box_iou,
    box_xyxy_to_cxcywh,
    generalized_box_iou,
    inverse_sigmoid,
    masks_to_boxes,
)
from detlib.layers.deform_conv import DeformConv, ModulatedDeformConv
from detlib.layers.losses import ciou_loss, diou_loss
from detlib.layers.mask_ops import paste_masks_in_image
from detlib.layers.multi_scale_deform_attn import (
    MultiScaleDeformableAttention,
    multi_scale_deformable_attn_pytorch,
)
from detlib.layers.nms import batched_nms, batched_nms_rotated, nms, nms_rotated
from detlib.layers.position_embedding import (
    PositionEmbeddingLearned,
    PositionEmbeddingSine,
    get_sine_pos_embed,
)
from detlib.layers.roi_align import ROIAlign, ROIPool, roi_align
from detlib.layers.roi_align_rotated import ROIAlignRotated, roi_align_rotated
from detlib.layers.rotated_boxes import pairwise_iou_rotated
from detlib.layers.shape_spec import ShapeSpec
from detlib.layers.transformer import (
    FFN,
    MLP,
    BaseTransformerLayer,
    MultiheadAttention,
    TransformerLayerSequence,
)
from detlib.layers.wrappers import (
    BatchNorm2d,
    Conv2d,
    ConvNormAct,
    ConvTranspose2d,
    Linear,
    cat,
    check_if_dynamo_compiling,
    cross_entropy,
    empty_input_loss_func_wrapper,
    for_convolutions,
    interpolate,
    move_device_like,
    nonzero_tuple,
    shapes_to_tensor,
)

__all__ = [
    "ASPP",
    "BaseTransformerLayer",
    "BatchNorm2d",
    "CNNBlockBase",
    "Conv2d",
    "ConvNormAct",
    "ConvTranspose2d",
    "CycleBatchNormList",
    "DeformConv",
    "DepthwiseSeparableConv2d",
    "FFN",
    "FrozenBatchNorm2d",
    "LayerNorm",
    "Linear",
    "MLP",
    "ModulatedDeformConv",
    "MultiScaleDeformableAttention",
    "MultiheadAttention",
    "NaiveSyncBatchNorm",
    "PositionEmbeddingLearned",
    "PositionEmbeddingSine",
    "ROIAlign",
    "ROIAlignRotated",
    "ROIPool",
    "ShapeSpec",
    "TransformerLayerSequence",
    "batched_nms",
    "batched_nms_rotated",
    "box_cxcywh_to_xyxy",
    "box_iou",
    "box_xyxy_to_cxcywh",
    "cat",
    "check_if_dynamo_compiling",
    "ciou_loss",
    "cross_entropy",
    "diou_loss",
    "empty_input_loss_func_wrapper",
    "for_convolutions",
    "generalized_box_iou",
    "get_norm",
    "get_sine_pos_embed",
    "interpolate",
    "inverse_sigmoid",
    "masks_to_boxes",
    "move_device_like",
    "multi_scale_deformable_attn_pytorch",
    "nms",
    "nms_rotated",
    "nonzero_tuple",
    "pairwise_iou_rotated",
    "paste_masks_in_image",
    "roi_align",
    "roi_align_rotated",
    "shapes_to_tensor",
]
