"""StandardROIHeads built from parts: sampling, the box and mask branches, and training on predicted boxes."""

import pytest
import torch
from torch import nn

from detlib.layers import ShapeSpec
from detlib.modeling.box_regression import Box2BoxTransform
from detlib.modeling.matcher import Matcher
from detlib.modeling.poolers import ROIPooler
from detlib.modeling.roi_heads import (
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
    StandardROIHeads,
    select_foreground_proposals,
)
from detlib.structures import Boxes, Instances
from detlib.utils.events import EventStorage
from tests.builders import NUM_CLASSES, ground_truth, make_proposals, small_config

SIZE = (64, 96)
SHAPES = {"p2": ShapeSpec(channels=4, stride=4), "p3": ShapeSpec(channels=4, stride=8)}


def make_heads(**kwargs) -> StandardROIHeads:
    torch.manual_seed(0)
    scales = [1 / s.stride for s in SHAPES.values()]
    box_head = FastRCNNConvFCHead(ShapeSpec(channels=4, height=5, width=5), conv_dims=[6], fc_dims=[8, 9])
    args = {
        "num_classes": NUM_CLASSES,
        "batch_size_per_image": 1000,
        "positive_fraction": 1.0,
        "proposal_matcher": Matcher([0.5], [0, 1]),
        "box_in_features": list(SHAPES),
        "box_pooler": ROIPooler(5, scales, 0, "ROIAlignV2"),
        "box_head": box_head,
        "box_predictor": FastRCNNOutputLayers(
            box_head.output_shape,
            box2box_transform=Box2BoxTransform((10, 10, 5, 5)),
            num_classes=NUM_CLASSES,
            test_topk_per_image=10,
        ),
        "mask_in_features": list(SHAPES),
        "mask_pooler": ROIPooler(7, scales, 0, "ROIAlignV2"),
        "mask_head": MaskRCNNConvUpsampleHead(
            ShapeSpec(channels=4), num_classes=NUM_CLASSES, conv_dims=[5, 5]
        ),
    }
    return StandardROIHeads(**(args | kwargs))


def make_features(num_images: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(num_images, 4, SIZE[0] // s.stride, SIZE[1] // s.stride, generator=generator)
        for name, s in SHAPES.items()
    }


# The ground truth has boxes (8, 8, 40, 40) of class 0 and (30, 20, 90, 60) of class 1.
NEAR_FIRST, NEAR_SECOND, APART = (8, 8, 40, 36), (32, 20, 90, 60), (50, 0, 90, 10)
HALF_FIRST = (8, 8, 40, 24)  # IoU of exactly 0.5 with the first, which is not below the threshold
LESS_THAN_HALF = (8, 8, 40, 23)


def test_proposals_are_labeled_by_overlap():
    heads = make_heads(proposal_append_gt=False)
    boxes = [APART, NEAR_SECOND, NEAR_FIRST, HALF_FIRST, LESS_THAN_HALF]
    targets = ground_truth()
    targets.gt_extra = torch.tensor([7, 9])
    targets.other = torch.tensor([1, 2])
    with EventStorage() as storage:
        (got,) = heads.label_and_sample_proposals([make_proposals(boxes)], [targets])
    rows = {tuple(int(v) for v in b): i for i, b in enumerate(got.proposal_boxes.tensor)}
    assert set(rows) == set(boxes)
    labels = {box: got.gt_classes[i].item() for box, i in rows.items()}
    assert labels == {APART: 3, NEAR_SECOND: 1, NEAR_FIRST: 0, HALF_FIRST: 0, LESS_THAN_HALF: 3}
    assert (got.gt_classes[:3] < 3).all() and (got.gt_classes[3:] == 3).all()  # foreground comes first
    assert got.gt_boxes[rows[NEAR_SECOND]].tensor.tolist() == [[30, 20, 90, 60]]
    assert got.gt_boxes[rows[HALF_FIRST]].tensor.tolist() == [[8, 8, 40, 40]]
    assert got.gt_extra[rows[NEAR_SECOND]] == 9 and got.gt_extra[rows[NEAR_FIRST]] == 7
    assert not got.has("other") and len(got.gt_masks) == 5
    scalars = {k: v[0] for k, v in storage.latest().items()}
    assert scalars == {"roi_head/num_fg_samples": 3, "roi_head/num_bg_samples": 2}


def test_ground_truth_boxes_are_added_to_the_proposals():
    heads = make_heads()
    (got,) = heads.label_and_sample_proposals([make_proposals([APART])], [ground_truth()])
    found = sorted(tuple(map(int, b)) for b in got.proposal_boxes.tensor)
    assert found == sorted([APART, (8, 8, 40, 40), (30, 20, 90, 60)])
    assert sorted(got.gt_classes.tolist()) == [0, 1, 3]


def test_regions_of_an_image_without_objects_are_background():
    heads = make_heads()
    (got,) = heads.label_and_sample_proposals([make_proposals([APART, NEAR_FIRST])], [ground_truth(boxes=())])
    assert got.gt_classes.tolist() == [3, 3]
    assert not got.has("gt_boxes") and not got.has("gt_masks")


def test_sample_has_the_requested_size_and_foreground_fraction():
    heads = make_heads(batch_size_per_image=8, positive_fraction=0.25, proposal_append_gt=False)
    torch.manual_seed(0)
    (got,) = heads.label_and_sample_proposals(
        [make_proposals([NEAR_FIRST] * 9 + [APART] * 9)], [ground_truth()]
    )
    assert got.gt_classes.tolist() == [0] * 2 + [3] * 6
    (got,) = heads.label_and_sample_proposals([make_proposals([NEAR_FIRST] + [APART] * 3)], [ground_truth()])
    assert got.gt_classes.tolist() == [0] + [3] * 3


def test_foreground_regions_are_selected():
    xs = [
        Instances(SIZE, gt_classes=torch.tensor([3, 0, -1, 2])),
        Instances(SIZE, gt_classes=torch.tensor([3])),
    ]
    got, masks = select_foreground_proposals(xs, bg_label=3)
    assert [x.gt_classes.tolist() for x in got] == [[0, 2], []]
    assert [m.tolist() for m in masks] == [[False, True, False, True], [False]]
    with pytest.raises(ValueError, match="gt_classes"):
        select_foreground_proposals([Instances(SIZE)], 3)


def test_training_losses_equal_those_of_the_branches():
    heads = make_heads()
    features, boxes = make_features(2), [NEAR_FIRST, NEAR_SECOND, APART]
    proposals = [make_proposals(boxes), make_proposals(boxes)]
    with EventStorage() as storage:
        sampled, losses = heads(None, features, proposals, [ground_truth(), ground_truth(boxes=())])
    # Four foreground regions in the first image, none in the second: two per image on average.
    assert storage.latest()["roi_head/num_fg_samples"][0] == 2
    assert storage.latest()["roi_head/num_bg_samples"][0] == 2
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_mask"}
    assert [len(x) for x in sampled] == [5, 3]

    maps = list(features.values())
    pooled = heads.box_pooler(maps, [x.proposal_boxes for x in sampled])
    x = torch.relu(heads.box_head.conv1(pooled)).flatten(1)
    x = torch.relu(heads.box_head.fc2(torch.relu(heads.box_head.fc1(x))))
    logits = heads.box_predictor.cls_score(x)
    want = nn.functional.cross_entropy(logits, torch.cat([s.gt_classes for s in sampled]))
    torch.testing.assert_close(losses["loss_cls"], want)

    # The mask loss uses the foreground of the first image only; its ground-truth masks fill the boxes.
    foreground = sampled[0][sampled[0].gt_classes < 3]
    pooled = heads.mask_pooler(maps, [foreground.proposal_boxes, Boxes(torch.zeros(0, 4))])
    logits = heads.mask_head.layers(pooled)[torch.arange(4), foreground.gt_classes]
    masks = foreground.gt_masks.crop_and_resize(foreground.proposal_boxes.tensor, 14).float()
    want = nn.functional.binary_cross_entropy_with_logits(logits, masks)
    torch.testing.assert_close(losses["loss_mask"], want)


def test_train_on_pred_boxes_replaces_the_proposals():
    features, proposals = make_features(1), [make_proposals([NEAR_FIRST, APART])]
    plain, moved = make_heads(), make_heads(train_on_pred_boxes=True)
    for heads in (plain, moved):
        nn.init.constant_(heads.box_predictor.bbox_pred.bias, 1.0)
    torch.manual_seed(5)
    before, losses = plain(None, features, proposals, [ground_truth()])
    torch.manual_seed(5)
    after, moved_losses = moved(None, features, proposals, [ground_truth()])
    torch.testing.assert_close(losses["loss_box_reg"], moved_losses["loss_box_reg"])
    old, new = before[0].proposal_boxes, after[0].proposal_boxes
    assert not new.tensor.requires_grad and (new.get_centers() > old.get_centers()).all()
    assert losses["loss_mask"] != moved_losses["loss_mask"]


@torch.no_grad()
def test_heads_on_given_boxes_equal_full_inference():
    heads = make_heads().eval()
    features = make_features(2)
    proposals = [make_proposals([NEAR_FIRST, APART]), make_proposals([NEAR_SECOND])]
    full, losses = heads(None, features, proposals)
    assert losses == {} and [x.pred_masks.shape[1:] for x in full] == [(1, 14, 14)] * 2
    parts = heads._forward_box(features, proposals)
    assert not parts[0].has("pred_masks")
    parts = heads.forward_with_given_boxes(features, parts)
    for a, b in zip(full, parts):
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
        assert torch.equal(a.pred_masks, b.pred_masks)


@torch.no_grad()
def test_inference_without_proposals_gives_no_detections():
    heads = make_heads().eval()
    out, _ = heads(None, make_features(2), [make_proposals([]), make_proposals([])])
    assert [len(x) for x in out] == [0, 0] and out[0].pred_masks.shape == (0, 1, 14, 14)


def test_heads_without_mask_head_predict_boxes():
    heads = make_heads(mask_in_features=None, mask_pooler=None, mask_head=None)
    assert not heads.mask_on and not [n for n in heads.state_dict() if n.startswith("mask")]
    _, losses = heads(None, make_features(1), [make_proposals([NEAR_FIRST])], [ground_truth()])
    assert set(losses) == {"loss_cls", "loss_box_reg"}
    out, _ = heads.eval()(None, make_features(1), [make_proposals([NEAR_FIRST])])
    assert set(out[0].get_fields()) == {"pred_boxes", "scores", "pred_classes"}


def test_mask_head_without_pooler_gets_the_feature_maps():
    class Head(nn.Module):
        def forward(self, x, instances):
            self.seen = x
            return {} if self.training else instances

    heads = make_heads(mask_pooler=None, mask_head=Head())
    features = make_features(1)
    heads(None, features, [make_proposals([NEAR_FIRST])], [ground_truth()])
    assert set(heads.mask_head.seen) == set(SHAPES) and heads.mask_head.seen["p2"] is features["p2"]


def test_wrong_arguments_raise():
    heads = make_heads()
    with pytest.raises(ValueError, match="targets"):
        heads(None, make_features(1), [make_proposals([APART])])
    with pytest.raises(ValueError, match=r"eval\(\)"):
        heads.forward_with_given_boxes(make_features(1), [])
    with pytest.raises(ValueError, match="'pred_boxes' and 'pred_classes'"):
        heads.eval().forward_with_given_boxes(make_features(1), [make_proposals([APART])])


def test_box_head_has_published_names_and_shapes():
    head = FastRCNNConvFCHead(
        ShapeSpec(channels=4, height=5, width=6), conv_dims=[32, 64], fc_dims=[8], conv_norm="GN"
    )
    assert [n for n in head.state_dict() if n.endswith("weight")] == [
        *("conv1.weight", "conv1.norm.weight", "conv2.weight", "conv2.norm.weight", "fc1.weight")
    ]
    assert head.fc1.in_features == 64 * 5 * 6 and head.output_shape == ShapeSpec(channels=8)
    assert head(torch.randn(3, 4, 5, 6)).shape == (3, 8)
    only_convs = FastRCNNConvFCHead(ShapeSpec(channels=4, height=5, width=6), conv_dims=[7], fc_dims=[])
    assert only_convs.output_shape == ShapeSpec(channels=7, height=5, width=6)
    assert only_convs(torch.randn(3, 4, 5, 6)).shape == (3, 7, 5, 6)


def test_convolutions_of_a_box_head_are_channels_last():
    shape, layouts = ShapeSpec(channels=4, height=5, width=6), []
    head = FastRCNNConvFCHead(shape, conv_dims=[7], fc_dims=[8])
    head.conv1.register_forward_pre_hook(
        lambda _, args: layouts.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    x = torch.randn(3, 4, 5, 6)
    same = head(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(head(x), same)
    assert layouts == [True, True]


class HeadsWithOwnMaskHead(StandardROIHeads):
    """Builds its mask head after the rest, in a method of the instance."""

    def __init__(self, cfg, input_shape):
        super().__init__(cfg, input_shape)
        self._init_mask_head(cfg, input_shape)

    def _init_mask_head(self, cfg, input_shape):
        self.mask_on = True
        self.scale = nn.Parameter(torch.tensor(2.0))

    def _forward_mask(self, features, instances):
        return {"loss_mask": self.scale * 3} if self.training else instances


def test_subclass_may_build_a_head_in_an_instance_method():
    shapes = {f"p{i}": ShapeSpec(channels=4, stride=2**i) for i in range(2, 6)}
    heads = HeadsWithOwnMaskHead(small_config(), shapes)
    assert not hasattr(heads, "mask_head") and heads.box_head.fc1.in_features == 4 * 7 * 7
    assert heads._forward_mask({}, [])["loss_mask"] == 6
