"""Every config key with its default: one module per area, each a plain nested dict with what its keys mean.

Lengths are in pixels of the picture that goes into the model (after resizing) unless a comment says
otherwise. IoU thresholds, scores and fractions are between 0 and 1.
"""

from detlib.config.cfg_node import CfgNode
from detlib.config.defaults.backbone import BACKBONE
from detlib.config.defaults.data import DATA
from detlib.config.defaults.dense_heads import DENSE_HEADS
from detlib.config.defaults.proposals import PROPOSALS
from detlib.config.defaults.roi_heads import ROI_HEADS
from detlib.config.defaults.run import RUN
from detlib.config.defaults.solver import SOLVER
from detlib.config.defaults.test import TEST
from detlib.config.defaults.train import TRAIN

__all__ = ["_C"]

_MODEL = {
    # Which model class of META_ARCH_REGISTRY to build: GeneralizedRCNN, ProposalNetwork, RetinaNet,
    # SemanticSegmentor, PanopticFPN.
    "META_ARCHITECTURE": "GeneralizedRCNN",
    # Where the model lives: "auto" (cuda, else mps, else cpu), "cpu", "cuda", "cuda:1", "mps".
    "DEVICE": "auto",
    # Weights to start from: a file or an address that PathManager knows; "" for random weights.
    "WEIGHTS": "",
    # Parameters that are not trained, by name with * and ?: ["backbone.*", "*.norm.*"].
    "FREEZE": [],
    # Whether R-CNN models predict masks, and whether they predict keypoints.
    "MASK_ON": False,
    "KEYPOINT_ON": False,
    # Whether to read proposals from files (DATASETS.PROPOSAL_FILES_*) in place of computing them.
    "LOAD_PROPOSALS": False,
    # What is subtracted from each channel and what it is divided by, in the order of INPUT.FORMAT, on the
    # 0..255 scale. The defaults are ImageNet's means in BGR; weights converted from Caffe2 have their
    # deviations inside and need ones, weights of torchvision need [57.375, 57.120, 58.395] (BGR) or its
    # reverse (RGB).
    "PIXEL_MEAN": [103.530, 116.280, 123.675],
    "PIXEL_STD": [1.0, 1.0, 1.0],
    **BACKBONE,
    **PROPOSALS,
    **ROI_HEADS,
    **DENSE_HEADS,
}

_C = CfgNode({**RUN, **DATA, "MODEL": _MODEL, "SOLVER": SOLVER, "TEST": TEST, "TRAIN": TRAIN})
