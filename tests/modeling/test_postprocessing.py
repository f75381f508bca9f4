import math

import pytest
import torch

from detlib.modeling import detector_postprocess
from detlib.structures import Boxes, Instances, ROIMasks


def detections() -> Instances:
    boxes = torch.tensor(
        [[10.0, 20, 30, 60], [-5, -5, 5, 5], [90, 10, 120, 20], [40, 40, 40, 50], [-20, 0, -1, 9]]
    )
    x = Instances((100, 100), pred_boxes=Boxes(boxes), scores=torch.linspace(0.9, 0.1, 5))
    x.pred_classes = torch.arange(5)
    return x


def test_boxes_are_scaled_clipped_and_empty_ones_dropped():
    x = detections()
    before = x.pred_boxes.tensor.clone()
    out = detector_postprocess(x, 50, 200)
    assert out.image_size == (50, 200)
    want = [[20.0, 10, 60, 30], [0, 0, 10, 2.5], [180, 5, 200, 10]]
    torch.testing.assert_close(out.pred_boxes.tensor, torch.tensor(want))
    assert out.pred_classes.tolist() == [0, 1, 2]
    torch.testing.assert_close(out.scores, torch.tensor([0.9, 0.7, 0.5]))
    assert torch.equal(x.pred_boxes.tensor, before) and x.image_size == (100, 100)


def test_proposals_are_scaled():
    x = Instances((10, 20), proposal_boxes=Boxes(torch.tensor([[1.0, 2, 3, 4]])))
    x.objectness_logits = torch.tensor([0.5])
    out = detector_postprocess(x, 30, 40)
    assert out.proposal_boxes.tensor.tolist() == [[2, 6, 6, 12]]
    assert out.objectness_logits.tolist() == [0.5]


def slow_paste(mask, box, height: int, width: int, threshold: float) -> torch.Tensor:
    """Sample the mask bilinearly at each pixel's center; it is 0 outside."""
    side = len(mask)

    def value(row: int, column: int) -> float:
        return mask[row][column] if 0 <= row < side and 0 <= column < side else 0.0

    out = torch.zeros(height, width, dtype=torch.bool)
    for y in range(height):
        for x in range(width):
            v = (y + 0.5 - box[1]) / (box[3] - box[1]) * side - 0.5
            u = (x + 0.5 - box[0]) / (box[2] - box[0]) * side - 0.5
            r, c = math.floor(v), math.floor(u)
            a, b = v - r, u - c
            top = (1 - b) * value(r, c) + b * value(r, c + 1)
            bottom = (1 - b) * value(r + 1, c) + b * value(r + 1, c + 1)
            out[y, x] = (1 - a) * top + a * bottom >= threshold
    return out


@pytest.mark.parametrize("threshold", [0.5, 0.3])
@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: ROIMasks(m[:, 0])])
def test_masks_are_pasted_into_their_boxes(wrap, threshold):
    x = detections()
    masks = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    x.pred_masks = wrap(masks)
    out = detector_postprocess(x, 50, 80, mask_threshold=threshold)
    assert out.pred_masks.shape == (3, 50, 80) and out.pred_masks.dtype == torch.bool
    # A mask covers the box after clipping: the last box extends from 72 to 80, not to 96.
    for got, mask, box in zip(out.pred_masks, masks, [[8, 10, 24, 30], [0, 0, 4, 2.5], [72, 5, 80, 10]]):
        want = slow_paste(mask[0].tolist(), box, 50, 80, threshold)
        assert torch.equal(got, want) and want.any()


def test_keypoints_are_scaled():
    x = detections()[:1]
    x.pred_keypoints = torch.tensor([[[10.0, 20, 0.7], [12, 22, 0.2]]])
    out = detector_postprocess(x, 50, 200)
    torch.testing.assert_close(out.pred_keypoints, torch.tensor([[[20.0, 10, 0.7], [24, 11, 0.2]]]))
    assert x.pred_keypoints[0, 0].tolist()[:2] == [10, 20]


def test_results_without_detections_stay_empty():
    x = detections()[:0]
    x.pred_masks = torch.zeros(0, 1, 28, 28)
    out = detector_postprocess(x, 50, 60)
    assert len(out) == 0 and out.pred_masks.shape == (0, 50, 60)


def test_wrong_arguments_raise():
    with pytest.raises(ValueError, match="0 x 10"):
        detector_postprocess(detections(), 0, 10)
    with pytest.raises(ValueError, match="'pred_boxes' nor 'proposal_boxes'"):
        detector_postprocess(Instances((5, 5), scores=torch.zeros(0)), 5, 5)
