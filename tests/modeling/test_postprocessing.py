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


def test_proposals_are_scaled_too():
    x = Instances((10, 20), proposal_boxes=Boxes(torch.tensor([[1.0, 2, 3, 4]])))
    x.objectness_logits = torch.tensor([0.5])
    out = detector_postprocess(x, 30, 40)
    assert out.proposal_boxes.tensor.tolist() == [[2, 6, 6, 12]]
    assert out.objectness_logits.tolist() == [0.5]


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: ROIMasks(m[:, 0])])
def test_masks_are_pasted_into_their_boxes(wrap):
    x = detections()
    masks = torch.zeros(5, 1, 4, 4)
    masks[0] = 1  # all of the box
    masks[2, :, :, :2] = 1  # its left half, part of a box that is cut by the border
    x.pred_masks = wrap(masks)
    out = detector_postprocess(x, 100, 100)
    assert out.pred_masks.shape == (3, 100, 100) and out.pred_masks.dtype == torch.bool
    want = torch.zeros(100, 100, dtype=torch.bool)
    want[20:60, 10:30] = True
    assert torch.equal(out.pred_masks[0], want)
    assert not out.pred_masks[1].any()
    # The mask belongs to the box as it is in the picture after clipping: 90 to 100.
    assert out.pred_masks[2, 15].nonzero().flatten().tolist() == [90, 91, 92, 93, 94]


def test_mask_threshold():
    x = detections()
    x.pred_masks = torch.full((5, 1, 4, 4), 0.4)
    assert not detector_postprocess(x, 100, 100).pred_masks.any()
    assert detector_postprocess(x, 100, 100, mask_threshold=0.3).pred_masks[0].sum() == 40 * 20


def test_keypoints_are_scaled():
    x = detections()[:1]
    x.pred_keypoints = torch.tensor([[[10.0, 20, 0.7], [12, 22, 0.2]]])
    out = detector_postprocess(x, 50, 200)
    torch.testing.assert_close(out.pred_keypoints, torch.tensor([[[20.0, 10, 0.7], [24, 11, 0.2]]]))
    assert x.pred_keypoints[0, 0].tolist()[:2] == [10, 20]


def test_nothing_detected():
    x = detections()[:0]
    x.pred_masks = torch.zeros(0, 1, 28, 28)
    out = detector_postprocess(x, 50, 60)
    assert len(out) == 0 and out.pred_masks.shape == (0, 50, 60)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="0 x 10"):
        detector_postprocess(detections(), 0, 10)
    with pytest.raises(ValueError, match="'pred_boxes' nor 'proposal_boxes'"):
        detector_postprocess(Instances((5, 5), scores=torch.zeros(0)), 5, 5)
