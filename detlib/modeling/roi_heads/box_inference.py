"""From scored boxes to detections: threshold, clip, NMS.

Shape legend: R_i regions of one image, K classes, B numbers of a box (4, or 5 for rotated boxes).
"""

import torch

from detlib.layers import nonzero_tuple
from detlib.structures import Boxes, Instances

__all__ = ["fast_rcnn_inference", "fast_rcnn_inference_single_image"]


def fast_rcnn_inference(
    boxes: list[torch.Tensor],
    scores: list[torch.Tensor],
    image_shapes: list[tuple[int, int]],
    score_thresh: float,
    nms_thresh: float,
    topk_per_image: int,
    box_type: type[Boxes] = Boxes,
) -> tuple[list[Instances], list[torch.Tensor]]:
    """Turn scored boxes into detections, image by image: see `fast_rcnn_inference_single_image`.

    Args:
        boxes: for each image (R_i, K * B), or (R_i, B) when boxes do not depend on the class; absolute
            pixels.
        scores: for each image (R_i, K + 1) probabilities, the background last.
        image_shapes: (height, width) of each image.
        score_thresh: only scores above it are kept.
        nms_thresh: overlap above which the lower scoring of two boxes of a class is dropped.
        topk_per_image: at most so many detections an image; negative for all.
        box_type: what kind of boxes these are; it brings clipping and NMS.

    Returns:
        The detections of each image (`pred_boxes`, `scores`, `pred_classes`, by falling score), and for each
        image the rows of `boxes` that they come from, (detections,) int64.
    """
    results = [
        fast_rcnn_inference_single_image(
            image_boxes, image_scores, shape, score_thresh, nms_thresh, topk_per_image, box_type
        )
        for image_boxes, image_scores, shape in zip(boxes, scores, image_shapes)
    ]
    return [r[0] for r in results], [r[1] for r in results]


def fast_rcnn_inference_single_image(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    image_shape: tuple[int, int],
    score_thresh: float,
    nms_thresh: float,
    topk_per_image: int,
    box_type: type[Boxes] = Boxes,
) -> tuple[Instances, torch.Tensor]:
    """Threshold the scores, clip the boxes, apply NMS class by class and keep the best.

    Regions with a box or score that is not finite are left out. Arguments and results are those of
    `fast_rcnn_inference` for one image.
    """
    finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores).all(dim=1)
    scores = scores[:, :-1]
    boxes = boxes.unflatten(1, (-1, box_type.box_dim))  # (R_i, K or 1, B)
    rows, classes = nonzero_tuple((scores > score_thresh) & finite[:, None])
    candidates = box_type(boxes[rows, 0 if boxes.shape[1] == 1 else classes])
    candidates.clip(image_shape)
    scores = scores[rows, classes]
    keep = candidates.batched_nms(scores, classes, nms_thresh)
    if topk_per_image >= 0:
        keep = keep[:topk_per_image]
    result = Instances(
        image_shape, pred_boxes=candidates[keep], scores=scores[keep], pred_classes=classes[keep]
    )
    return result, rows[keep]
