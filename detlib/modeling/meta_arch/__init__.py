"""Whole models and how to build them."""

from detlib.modeling.meta_arch.build import META_ARCH_REGISTRY, build_model
from detlib.modeling.meta_arch.rcnn import GeneralizedRCNN, ProposalNetwork

__all__ = ["GeneralizedRCNN", "META_ARCH_REGISTRY", "ProposalNetwork", "build_model"]
