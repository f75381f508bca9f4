"""The keypoint head: selection of regions, loss compared with a loop over keypoints, inference."""

import math

import pytest
import torch
from torch.nn import functional as F

from detlib.layers import ShapeSpec
from detlib.modeling.roi_heads.keypoint_head import (
    KRCNNConvDeconvUpsampleHead,
    build_keypoint_head,
    keypoint_rcnn_inference,
    keypoint_rcnn_loss,
    select_proposals_with_visible_keypoints,
)
from detlib.structures import Boxes, Instances, Keypoints
from detlib.utils.events import EventStorage
from tests.builders import small_config

K, SIDE = 3, 8
KEYPOINT_RCNN = "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml"


def make_head(**kwargs) -> KRCNNConvDeconvUpsampleHead:
    args = {"num_keypoints": K, "conv_dims": [6, 5]}
    return KRCNNConvDeconvUpsampleHead(ShapeSpec(channels=4), **(args | kwargs))


def regions() -> list[Instances]:
    """Return three regions in two images; 5 of their 9 keypoints are labeled and inside the region."""
    first = Instances((50, 50), proposal_boxes=Boxes([[0.0, 0, 16, 16], [10, 20, 30, 36]]))
    first.gt_keypoints = Keypoints(
        [
            [[3, 5, 2], [16, 16, 1], [17, 5, 2]],  # inside, on the far corner, outside
            [[10, 20, 2], [12, 22, 0], [29, 35, 2]],  # on the near corner, not labeled, inside
        ]
    )
    second = Instances((50, 50), proposal_boxes=Boxes([[5.0, 5, 13, 13]]))
    second.gt_keypoints = Keypoints([[[6, 12, 1], [0, 0, 0], [5, 14, 2]]])
    return [first, second]


# (region, keypoint, row, column) of the visible keypoints, in grids of 8 x 8 cells.
VISIBLE = [(0, 0, 2, 1), (0, 1, 7, 7), (1, 0, 0, 0), (1, 2, 7, 7), (2, 0, 7, 1)]


def empty_image() -> Instances:
    return Instances((9, 9), proposal_boxes=Boxes(torch.zeros(0, 4)))


@pytest.mark.parametrize("normalizer", [None, 7.5])
def test_loss_equals_the_formula(normalizer):
    torch.manual_seed(0)
    logits = torch.randn(3, K, SIDE, SIDE, requires_grad=True)
    loss = keypoint_rcnn_loss(logits, [empty_image(), *regions()], normalizer)
    total = 0.0
    for r, k, row, column in VISIBLE:
        cells = logits[r, k].flatten().tolist()
        largest = max(cells)
        total += largest + math.log(sum(math.exp(x - largest) for x in cells)) - cells[row * SIDE + column]
    assert loss.item() == pytest.approx(total / (normalizer or len(VISIBLE)), rel=1e-5)
    loss.backward()
    learns = logits.grad.flatten(2).any(dim=2).nonzero().tolist()
    assert learns == [[r, k] for r, k, _, _ in VISIBLE]


def test_loss_without_visible_keypoints_is_zero_and_requires_grad():
    head = make_head(loss_normalizer="visible")
    with EventStorage() as storage:
        for _ in range(2):
            loss = head(torch.zeros(0, 4, 7, 7), [empty_image(), empty_image()])["loss_keypoint"]
        assert storage.latest()["kpts_num_skipped_batches"][0] == 2
    hidden = regions()
    for x in hidden:
        x.gt_keypoints.tensor[..., 2] = 0
    loss = loss + head(torch.randn(3, 4, 2, 2), hidden)["loss_keypoint"]
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


def test_loss_is_scaled_by_weight_and_normalizer():
    features = torch.randn(3, 4, 2, 2)
    head = make_head(loss_normalizer="visible", loss_weight=3.0)
    static = make_head(loss_normalizer=10.0)
    static.load_state_dict(head.state_dict())
    logits = head.layers(features)
    want = keypoint_rcnn_loss(logits, regions(), None)
    torch.testing.assert_close(head(features, regions())["loss_keypoint"], 3 * want)
    # 5 visible keypoints, two images of 10 each.
    torch.testing.assert_close(static(features, regions())["loss_keypoint"], want * 5 / 20)
    with pytest.raises(ValueError, match="'visible' or a number, got 'seen'"):
        make_head(loss_normalizer="seen")


def test_only_regions_with_a_visible_keypoint_are_selected():
    x = Instances((50, 50), proposal_boxes=Boxes([[10.0, 10, 20, 20]] * 6))
    points = [(15, 15, 2), (10, 20, 1), (15, 15, 0), (21, 15, 2), (15, 9.5, 2), (20, 10, 2)]
    x.gt_keypoints = Keypoints([[list(p), [0, 0, 2]] for p in points])
    x.index = torch.arange(6)
    with EventStorage() as storage:
        first, second, third = select_proposals_with_visible_keypoints([x, empty_image(), x[2:4]])
    assert first.index.tolist() == [0, 1, 5] and len(second) == len(third) == 0
    assert storage.latest()["keypoint_head/num_fg_samples"][0] == 1


def test_wrong_ground_truth_raises():
    x = Instances((9, 9), proposal_boxes=Boxes([[0.0, 0, 4, 4]]), gt_boxes=Boxes([[0.0, 0, 4, 4]]))
    with pytest.raises(ValueError, match=r"'gt_keypoints'.*\['gt_boxes'\].*KEYPOINT_ON"):
        select_proposals_with_visible_keypoints([x])
    with pytest.raises(ValueError, match="3 keypoints per object, the head predicts 17.*NUM_KEYPOINTS"):
        keypoint_rcnn_loss(torch.zeros(3, 17, 8, 8), regions(), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_returns_the_peaks_of_heatmaps(dtype):
    logits = torch.full((3, K, SIDE, SIDE), -4.0, dtype=dtype)
    boxes = torch.tensor([[0.0, 0, 80, 40], [100, 20, 116, 36], [5, 5, 45, 85]])
    cells = [[(1, 2), (7, 7), (0, 0)], [(3, 3), (4, 4), (5, 6)], [(2, 5), (6, 1), (3, 0)]]
    for r in range(3):
        for k, (row, column) in enumerate(cells[r]):
            logits[r, k, row, column] = 9
    sizes = (2, 0, 1)
    instances = [Instances((99, 99), pred_boxes=Boxes(b)) for b in boxes.split(sizes)]
    keypoint_rcnn_inference(logits, instances)
    assert [tuple(x.pred_keypoints.shape) for x in instances] == [(2, K, 3), (0, K, 3), (1, K, 3)]
    assert [len(x.pred_keypoint_heatmaps) for x in instances] == list(sizes)
    torch.testing.assert_close(instances[2].pred_keypoint_heatmaps, logits[2:].float())
    got = torch.cat([x.pred_keypoints for x in instances])
    assert got.dtype == torch.float32
    for r in range(3):
        cell = (boxes[r, 2:] - boxes[r, :2]) / SIDE
        for k, (row, column) in enumerate(cells[r]):
            want = boxes[r, :2] + cell * (torch.tensor([column, row]) + 0.5)
            assert ((got[r, k, :2] - want).abs() <= cell / 2 + 0.5).all()
            width, height = (boxes[r, 2:] - boxes[r, :2]).int().tolist()
            own = logits[r, k].float()
            peak = F.interpolate(own[None, None], size=(height, width), mode="bicubic").max()
            assert got[r, k, 2].item() == pytest.approx(peak.exp().item() / own.exp().sum().item(), rel=1e-4)


def test_layers_have_published_names_and_initial_values():
    head = make_head()
    assert {name: tuple(p.shape) for name, p in head.named_parameters()} == {
        "conv_fcn1.weight": (6, 4, 3, 3),
        "conv_fcn1.bias": (6,),
        "conv_fcn2.weight": (5, 6, 3, 3),
        "conv_fcn2.bias": (5,),
        "score_lowres.weight": (5, K, 4, 4),
        "score_lowres.bias": (K,),
    }
    x = torch.randn(2, 4, 7, 7)
    y = torch.relu(head.conv_fcn2(torch.relu(head.conv_fcn1(x))))
    y = F.conv_transpose2d(y, head.score_lowres.weight, head.score_lowres.bias, stride=2, padding=1)
    assert y.shape == (2, K, 14, 14)
    got = head.layers(x)
    assert got.shape == (2, K, 28, 28)
    # Pixel centers are at half integers, so the fifth doubled pixel is 1/4 before the third original one.
    rows = 0.75 * y[0, 0, 2] + 0.25 * y[0, 0, 1]
    torch.testing.assert_close(got[0, 0, 4, 9], 0.75 * rows[4] + 0.25 * rows[5])
    torch.testing.assert_close(got[0, 0, 0, 0], y[0, 0, 0, 0])
    wide = make_head(conv_dims=[512])
    assert wide.conv_fcn1.weight.std().item() == pytest.approx(math.sqrt(2 / (512 * 9)), rel=0.05)
    assert not wide.conv_fcn1.bias.any()


def test_config_values_reach_the_head():
    shape = ShapeSpec(channels=32, height=14, width=14)
    cfg = small_config(KEYPOINT_RCNN, MODEL__ROI_KEYPOINT_HEAD__CONV_DIMS=(8, 8, 8))
    cfg.MODEL.ROI_KEYPOINT_HEAD.LOSS_WEIGHT = 0.5
    head = build_keypoint_head(cfg, shape)
    assert head.loss_normalizer == "visible" and head.loss_weight == 0.5 and head.num_keypoints == 17
    assert head.conv_fcn3.out_channels == 8 and not hasattr(head, "conv_fcn4")
    cfg.MODEL.ROI_KEYPOINT_HEAD.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS = False
    assert build_keypoint_head(cfg, shape).loss_normalizer == 17 * 16 * 0.25
