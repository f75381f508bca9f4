"""Meta architectures, which are full models, and how to build them."""

from detlib.modeling.meta_arch.base import MetaArchitecture
from detlib.modeling.meta_arch.build import META_ARCH_REGISTRY, build_model, facts_of
from detlib.modeling.meta_arch.dense_detector import DenseDetector
from detlib.modeling.meta_arch.fcos import FCOS
from detlib.modeling.meta_arch.panoptic_fpn import PanopticFPN
from detlib.modeling.meta_arch.rcnn import GeneralizedRCNN, ProposalNetwork
from detlib.modeling.meta_arch.retinanet import RetinaNet
from detlib.modeling.meta_arch.semantic_seg import (
    SEM_SEG_HEADS_REGISTRY,
    SemanticSegmentor,
    SemSegFPNHead,
    build_sem_seg_head,
)

__all__ = [
    "DenseDetector",
    "FCOS",
    "GeneralizedRCNN",
    "META_ARCH_REGISTRY",
    "MetaArchitecture",
    "PanopticFPN",
    "ProposalNetwork",
    "RetinaNet",
    "SEM_SEG_HEADS_REGISTRY",
    "SemSegFPNHead",
    "SemanticSegmentor",
    "build_model",
    "build_sem_seg_head",
    "facts_of",
]
