"""From detections in the frame of the network input to detections in the frame that was asked for."""

from detlib.structures import Instances, ROIMasks

__all__ = ["detector_postprocess"]


def detector_postprocess(
    results: Instances, output_height: int, output_width: int, mask_threshold: float = 0.5
) -> Instances:
    """Scale detections to the output size, clip them, drop the empty ones and paste their masks.

    Args:
        results: detections of one image, in pixels of the network input (`results.image_size`), with
            `pred_boxes` or `proposal_boxes`; `pred_masks`, if there, is (R, 1, M, M) float probabilities or
            `ROIMasks`; `pred_keypoints`, if there, is (R, K, 3).
        output_height: height of the wanted frame, in pixels.
        output_width: width of the wanted frame.
        mask_threshold: a pixel whose probability reaches it belongs to the mask.

    Returns:
        New `Instances` of image size (output_height, output_width); `pred_masks` is then (R, output_height,
        output_width) bool. `results` is left as it is.

    Raises:
        ValueError: an output size below 1, or results without boxes.
    """
    output_height, output_width = int(output_height), int(output_width)
    if output_height < 1 or output_width < 1:
        raise ValueError(
            f"detector_postprocess: an output of {output_height} x {output_width} has no pixels."
        )
    scale_x = output_width / results.image_size[1]
    scale_y = output_height / results.image_size[0]
    out = Instances((output_height, output_width), **results.get_fields())

    name = next((n for n in ("pred_boxes", "proposal_boxes") if out.has(n)), None)
    if name is None:
        raise ValueError(
            "detector_postprocess: the results have neither 'pred_boxes' nor 'proposal_boxes', only "
            f"{sorted(results.get_fields())}."
        )
    boxes = out.get(name).clone()
    boxes.scale(scale_x, scale_y)
    boxes.clip(out.image_size)
    out.set(name, boxes)
    if out.has("pred_keypoints"):
        keypoints = out.pred_keypoints.clone()
        keypoints[:, :, 0] *= scale_x
        keypoints[:, :, 1] *= scale_y
        out.pred_keypoints = keypoints
    out = out[boxes.nonempty()]

    if out.has("pred_masks"):
        masks = out.pred_masks
        if not isinstance(masks, ROIMasks):
            masks = ROIMasks(masks[:, 0])
        out.pred_masks = masks.to_bitmasks(out.pred_boxes, output_height, output_width, mask_threshold).tensor
    return out
