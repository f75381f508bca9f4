"""Meta architectures and their parts: backbones, proposal generators and ROI heads."""

from detlib.layers.shape_spec import ShapeSpec
from detlib.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY, build_anchor_generator
from detlib.modeling.backbone import (
    BACKBONE_REGISTRY,
    FPN,
    Backbone,
    BasicBlock,
    BasicStem,
    BottleneckBlock,
    DeformBottleneckBlock,
    MViT,
    ResNet,
    ResNetBlockBase,
    SimpleFeaturePyramid,
    SwinTransformer,
    TimmBackbone,
    TorchvisionBackbone,
    ViT,
    build_backbone,
    build_resnet_backbone,
    get_vit_lr_decay_rate,
    make_stage,
)
from detlib.modeling.detr import DETR, DINO, DeformableDETR, HungarianMatcher, SetCriterion
from detlib.modeling.meta_arch import (
    FCOS,
    META_ARCH_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
    GeneralizedRCNN,
    MetaArchitecture,
    PanopticFPN,
    ProposalNetwork,
    RetinaNet,
    SemanticSegmentor,
    build_model,
    build_sem_seg_head,
    facts_of,
)
from detlib.modeling.neck import ChannelMapper
from detlib.modeling.postprocessing import detector_postprocess, sem_seg_postprocess
from detlib.modeling.proposal_generator import (
    PROPOSAL_GENERATOR_REGISTRY,
    RPN_HEAD_REGISTRY,
    build_proposal_generator,
    build_rpn_head,
)
from detlib.modeling.roi_heads import (
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    BaseKeypointRCNNHead,
    BaseMaskRCNNHead,
    FastRCNNOutputLayers,
    ROIHeads,
    StandardROIHeads,
    build_box_head,
    build_keypoint_head,
    build_mask_head,
    build_roi_heads,
)

__all__ = [
    "ANCHOR_GENERATOR_REGISTRY",
    "BACKBONE_REGISTRY",
    "Backbone",
    "BaseKeypointRCNNHead",
    "BaseMaskRCNNHead",
    "BasicBlock",
    "BasicStem",
    "BottleneckBlock",
    "ChannelMapper",
    "DETR",
    "DINO",
    "DatasetMapperTTA",
    "DeformBottleneckBlock",
    "DeformableDETR",
    "FCOS",
    "FPN",
    "FastRCNNOutputLayers",
    "GeneralizedRCNN",
    "GeneralizedRCNNWithTTA",
    "HungarianMatcher",
    "META_ARCH_REGISTRY",
    "MViT",
    "MetaArchitecture",
    "PROPOSAL_GENERATOR_REGISTRY",
    "PanopticFPN",
    "ProposalNetwork",
    "ROIHeads",
    "ROI_BOX_HEAD_REGISTRY",
    "ROI_HEADS_REGISTRY",
    "ROI_KEYPOINT_HEAD_REGISTRY",
    "ROI_MASK_HEAD_REGISTRY",
    "RPN_HEAD_REGISTRY",
    "ResNet",
    "ResNetBlockBase",
    "RetinaNet",
    "SEM_SEG_HEADS_REGISTRY",
    "SemanticSegmentor",
    "SetCriterion",
    "ShapeSpec",
    "SimpleFeaturePyramid",
    "StandardROIHeads",
    "SwinTransformer",
    "TimmBackbone",
    "TorchvisionBackbone",
    "ViT",
    "build_anchor_generator",
    "build_backbone",
    "build_box_head",
    "build_keypoint_head",
    "build_mask_head",
    "build_model",
    "build_proposal_generator",
    "build_resnet_backbone",
    "build_roi_heads",
    "build_rpn_head",
    "build_sem_seg_head",
    "detector_postprocess",
    "facts_of",
    "get_vit_lr_decay_rate",
    "make_stage",
    "sem_seg_postprocess",
]


def __getattr__(name: str):
    # These two belong to `detlib.evaluation`, a higher level, and are imported on first use.
    if name in ("DatasetMapperTTA", "GeneralizedRCNNWithTTA"):
        from detlib.modeling import test_time_augmentation

        return getattr(test_time_augmentation, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
