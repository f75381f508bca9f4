"""The mask head: loss compared with a loop over pixels, inference by class."""

import math

import numpy as np
import pytest
import torch

from detlib.layers import ShapeSpec
from detlib.modeling.roi_heads.mask_head import (
    MaskRCNNConvUpsampleHead,
    mask_rcnn_inference,
    mask_rcnn_loss,
)
from detlib.structures import BitMasks, Boxes, Instances, PolygonMasks
from detlib.utils.events import EventStorage

NUM_CLASSES = 3


def rectangle(x0, y0, x1, y1) -> list[np.ndarray]:
    return [np.array([x0, y0, x1, y0, x1, y1, x0, y1], dtype=np.float64)]


def foreground(kind: str = "polygon") -> list[Instances]:
    """Return 8 x 8 regions with masks that cover the left half, the lower quarter and the full region."""
    first = Instances((40, 40), proposal_boxes=Boxes([[0.0, 0, 8, 8], [10, 10, 18, 18]]))
    first.gt_classes = torch.tensor([2, 0])
    second = Instances((30, 40), proposal_boxes=Boxes([[4.0, 4, 12, 12]]))
    second.gt_classes = torch.tensor([1])
    masks = PolygonMasks([rectangle(0, 0, 4, 8), rectangle(10, 16, 18, 18)])
    other = PolygonMasks([rectangle(4, 4, 12, 12)])
    if kind == "bitmask":
        masks = BitMasks.from_polygon_masks(masks, 40, 40)
        other = BitMasks.from_polygon_masks(other, 30, 40)
    first.gt_masks, second.gt_masks = masks, other
    return [first, second]


def expected_masks(side: int) -> torch.Tensor:
    masks = torch.zeros(3, side, side, dtype=torch.bool)
    masks[0, :, : side // 2] = True
    masks[1, side * 3 // 4 :] = True
    masks[2] = True
    return masks


@pytest.mark.parametrize("kind", ["polygon", "bitmask"])
@pytest.mark.parametrize("agnostic", [False, True])
def test_loss_equals_the_formula(kind, agnostic):
    torch.manual_seed(0)
    logits = torch.randn(3, 1 if agnostic else NUM_CLASSES, 8, 8, requires_grad=True)
    with EventStorage() as storage:
        loss = mask_rcnn_loss(logits, foreground(kind))
    total, wrong, false_positive, false_negative = 0.0, 0, 0, 0
    target = expected_masks(8)
    for i, c in enumerate([2, 0, 1]):
        for y in range(8):
            for x in range(8):
                value = logits[i, 0 if agnostic else c, y, x].item()
                p, t = 1 / (1 + math.exp(-value)), target[i, y, x].item()
                total -= math.log(p if t else 1 - p)
                wrong += (p > 0.5) != t
                false_positive += p > 0.5 and not t
                false_negative += p <= 0.5 and t
    assert loss.item() == pytest.approx(total / 192, rel=1e-5)
    positive = target.sum().item()
    scalars = {k: v[0] for k, v in storage.latest().items()}
    assert scalars["mask_rcnn/accuracy"] == pytest.approx(1 - wrong / 192)
    assert scalars["mask_rcnn/false_positive"] == pytest.approx(false_positive / (192 - positive))
    assert scalars["mask_rcnn/false_negative"] == pytest.approx(false_negative / positive)

    loss.backward()
    channels_with_grad = logits.grad.flatten(2).any(dim=2)
    if not agnostic:  # only the channels of the ground-truth classes get a gradient
        assert channels_with_grad.nonzero().tolist() == [[0, 2], [1, 0], [2, 1]]


def test_polygons_and_bit_masks_may_be_in_one_batch():
    torch.manual_seed(0)
    polygons, bits = foreground("polygon"), foreground("bitmask")
    logits = torch.randn(sum(map(len, polygons)), 3, 28, 28)
    with EventStorage():
        expected = [mask_rcnn_loss(logits, instances) for instances in (polygons, bits)]
        mixed = mask_rcnn_loss(logits, [polygons[0], *bits[1:]])
    assert torch.isfinite(mixed) and min(expected) - 0.01 <= mixed <= max(expected) + 0.01


def test_images_without_regions_do_not_change_the_loss():
    with_empty = [Instances((9, 9)), *foreground(), Instances((9, 9))]
    for x in (with_empty[0], with_empty[-1]):
        x.proposal_boxes, x.gt_classes = Boxes(torch.zeros(0, 4)), torch.zeros(0, dtype=torch.int64)
    logits = torch.randn(3, NUM_CLASSES, 8, 8)
    with EventStorage():
        assert mask_rcnn_loss(logits, with_empty) == mask_rcnn_loss(logits, foreground())


def test_loss_without_regions_is_zero_and_requires_grad():
    head = make_head()
    empty = Instances((9, 9), proposal_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0).long())
    with EventStorage():
        loss = head(torch.zeros(0, 4, 7, 7), [empty, empty])["loss_mask"]
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in head.parameters())


def test_missing_masks_raise():
    instances = foreground()
    instances[1].remove("gt_masks")
    with EventStorage(), pytest.raises(ValueError, match="'gt_masks'.*MASK_ON"):
        mask_rcnn_loss(torch.zeros(3, NUM_CLASSES, 8, 8), instances)


@pytest.mark.parametrize("agnostic", [False, True])
def test_inference_uses_the_channel_of_the_class(agnostic):
    logits = torch.randn(3, 1 if agnostic else NUM_CLASSES, 8, 8)
    instances = [Instances((9, 9), pred_classes=torch.tensor(c)) for c in ([2, 0], [1])]
    mask_rcnn_inference(logits, instances)
    assert [tuple(x.pred_masks.shape) for x in instances] == [(2, 1, 8, 8), (1, 1, 8, 8)]
    channels = [0, 0, 0] if agnostic else [2, 0, 1]
    want = torch.stack([logits[i, c].sigmoid() for i, c in enumerate(channels)])[:, None]
    assert torch.equal(torch.cat([x.pred_masks for x in instances]), want)


def make_head(**kwargs) -> MaskRCNNConvUpsampleHead:
    args = {"num_classes": NUM_CLASSES, "conv_dims": [5, 6, 7]}
    return MaskRCNNConvUpsampleHead(ShapeSpec(channels=4), **(args | kwargs))


def test_layers_have_published_names_and_shapes():
    head = make_head()
    assert {k: tuple(v.shape) for k, v in head.state_dict().items()} == {
        "mask_fcn1.weight": (5, 4, 3, 3),
        "mask_fcn1.bias": (5,),
        "mask_fcn2.weight": (6, 5, 3, 3),
        "mask_fcn2.bias": (6,),
        "deconv.weight": (6, 7, 2, 2),
        "deconv.bias": (7,),
        "predictor.weight": (NUM_CLASSES, 7, 1, 1),
        "predictor.bias": (NUM_CLASSES,),
    }
    assert head.layers(torch.randn(2, 4, 7, 7)).shape == (2, NUM_CLASSES, 14, 14)
    names = set(make_head(conv_norm="GN", conv_dims=[32, 32, 7]).state_dict())
    assert {"mask_fcn1.norm.weight", "mask_fcn2.norm.bias"} < names and "mask_fcn1.bias" not in names


def test_loss_is_weighted_and_inference_adds_masks():
    features = torch.randn(3, 4, 4, 4)
    head, double = make_head(), make_head(loss_weight=2.0)
    double.load_state_dict(head.state_dict())
    with EventStorage():
        once, twice = head(features, foreground()), double(features, foreground())
    assert set(once) == {"loss_mask"}
    torch.testing.assert_close(2 * once["loss_mask"], twice["loss_mask"])
    instances = [Instances((9, 9), pred_classes=torch.tensor([2, 0, 1]))]
    assert head.eval()(features, instances) is instances
    assert instances[0].pred_masks.shape == (3, 1, 8, 8)


def test_head_without_layers_raises():
    with pytest.raises(ValueError, match="conv_dims"):
        make_head(conv_dims=[])
