"""Backbones: networks that map a batch of images to named feature maps."""

from detlib.modeling.backbone.backbone import Backbone, get_backbone_lr_factor
from detlib.modeling.backbone.build import BACKBONE_REGISTRY, build_backbone
from detlib.modeling.backbone.fpn import (
    FPN,
    LastLevelMaxPool,
    LastLevelP6P7,
    build_resnet_fpn_backbone,
    build_retinanet_resnet_fpn_backbone,
)
from detlib.modeling.backbone.mvit import MViT
from detlib.modeling.backbone.regnet import RegNet
from detlib.modeling.backbone.resnet import (
    BasicBlock,
    BasicStem,
    BottleneckBlock,
    DeformBottleneckBlock,
    ResNet,
    ResNetBlockBase,
    build_resnet_backbone,
    make_stage,
)
from detlib.modeling.backbone.swin import SwinTransformer
from detlib.modeling.backbone.timm_backbone import (
    TimmBackbone,
    build_retinanet_timm_fpn_backbone,
    build_timm_backbone,
    build_timm_fpn_backbone,
)
from detlib.modeling.backbone.torchvision_backbone import (
    TorchvisionBackbone,
    build_retinanet_torchvision_fpn_backbone,
    build_torchvision_backbone,
    build_torchvision_fpn_backbone,
)
from detlib.modeling.backbone.vit import SimpleFeaturePyramid, ViT, get_vit_lr_decay_rate

__all__ = [
    "BACKBONE_REGISTRY",
    "Backbone",
    "BasicBlock",
    "BasicStem",
    "BottleneckBlock",
    "DeformBottleneckBlock",
    "FPN",
    "LastLevelMaxPool",
    "LastLevelP6P7",
    "MViT",
    "RegNet",
    "ResNet",
    "ResNetBlockBase",
    "SimpleFeaturePyramid",
    "SwinTransformer",
    "TimmBackbone",
    "TorchvisionBackbone",
    "ViT",
    "build_backbone",
    "build_resnet_backbone",
    "build_resnet_fpn_backbone",
    "build_retinanet_resnet_fpn_backbone",
    "build_retinanet_timm_fpn_backbone",
    "build_retinanet_torchvision_fpn_backbone",
    "build_timm_backbone",
    "build_timm_fpn_backbone",
    "build_torchvision_backbone",
    "build_torchvision_fpn_backbone",
    "get_backbone_lr_factor",
    "get_vit_lr_decay_rate",
    "make_stage",
]
