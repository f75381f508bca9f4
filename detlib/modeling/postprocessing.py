"""Conversion of results from the frame of the network input to the output frame."""

import torch
from torch.nn import functional as F

from detlib.structures import Instances, ROIMasks

__all__ = ["detector_postprocess", "sem_seg_postprocess"]


def _check_output_size(function: str, height: int, width: int) -> tuple[int, int]:
    height, width = int(height), int(width)
    if height < 1 or width < 1:
        raise ValueError(f"{function}: the output size must be at least 1 x 1, got {height} x {width}.")
    return height, width


def detector_postprocess(
    results: Instances, output_height: int, output_width: int, mask_threshold: float = 0.5
) -> Instances:
    """Scale detections to the output size, clip them, drop the empty ones and paste their masks.

    Args:
        results: detections of one image, in pixels of the network input (`results.image_size`), with
            `pred_boxes` or `proposal_boxes`; `pred_masks`, if there, is (R, 1, M, M) float probabilities or
            `ROIMasks`; `pred_keypoints`, if there, is (R, K, 3).
        output_height: height of the output frame, in pixels.
        output_width: width of the output frame.
        mask_threshold: pixels of at least this probability belong to the mask.

    Returns:
        New `Instances` of image size (output_height, output_width), with `pred_masks` (R, output_height,
        output_width) bool. `results` is not changed.

    Raises:
        ValueError: the output size is below 1, or the results have no boxes.
    """
    output_height, output_width = _check_output_size("detector_postprocess", output_height, output_width)
    scale_x = output_width / results.image_size[1]
    scale_y = output_height / results.image_size[0]
    fields = dict(results.get_fields())

    name = next((n for n in ("pred_boxes", "proposal_boxes") if n in fields), None)
    if name is None:
        raise ValueError(
            "detector_postprocess: the results have neither 'pred_boxes' nor 'proposal_boxes', only "
            f"{sorted(fields)}."
        )
    boxes = fields[name].clone()
    boxes.scale(scale_x, scale_y)
    boxes.clip((output_height, output_width))
    fields[name] = boxes
    if "pred_keypoints" in fields:
        keypoints = fields["pred_keypoints"].clone()
        keypoints[:, :, 0] *= scale_x
        keypoints[:, :, 1] *= scale_y
        fields["pred_keypoints"] = keypoints
    out = Instances((output_height, output_width), **fields)[boxes.nonempty()]

    masks = out.get_fields().get("pred_masks")
    if masks is not None:
        if not isinstance(masks, ROIMasks):
            masks = ROIMasks(masks[:, 0])
        out.pred_masks = masks.to_bitmasks(out.pred_boxes, output_height, output_width, mask_threshold).tensor
    return out


def sem_seg_postprocess(
    result: torch.Tensor, img_size: tuple[int, int], output_height: int, output_width: int
) -> torch.Tensor:
    """Crop the padding from one image's semantic logits and resize them to the output size.

    Args:
        result: (C, H, W) float logits of the padded network input.
        img_size: (height, width) of the image in it.
        output_height: height of the output frame, in pixels.
        output_width: width of the output frame.

    Returns:
        (C, output_height, output_width) logits, resized bilinearly; a view of `result` if the image has
        that size already.

    Raises:
        ValueError: the output size is below 1, or the result is smaller than the image.
    """
    size = _check_output_size("sem_seg_postprocess", output_height, output_width)
    height, width = img_size
    if result.dim() != 3 or result.shape[1] < height or result.shape[2] < width:
        raise ValueError(
            f"sem_seg_postprocess: the result must be (C, H, W) and contain an image of {height} x {width}, "
            f"got {tuple(result.shape)}."
        )
    result = result[:, :height, :width]
    if size == (height, width):
        return result
    return F.interpolate(result[None], size=size, mode="bilinear", align_corners=False)[0]
