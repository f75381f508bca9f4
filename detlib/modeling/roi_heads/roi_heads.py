"""The second stages under the path that detectron2's users import them from."""

from detlib.modeling.roi_heads.base import (
    ROI_HEADS_REGISTRY,
    ROIHeads,
    build_roi_heads,
    select_foreground_proposals,
)
from detlib.modeling.roi_heads.keypoint_head import select_proposals_with_visible_keypoints
from detlib.modeling.roi_heads.res5 import Res5ROIHeads
from detlib.modeling.roi_heads.standard import StandardROIHeads

__all__ = [
    "ROI_HEADS_REGISTRY",
    "ROIHeads",
    "Res5ROIHeads",
    "StandardROIHeads",
    "build_roi_heads",
    "select_foreground_proposals",
    "select_proposals_with_visible_keypoints",
]
