"""Res5ROIHeads built from parts: the shared stage, the box and the mask branch."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from detlib.layers import ShapeSpec
from detlib.modeling import build_model
from detlib.modeling.backbone import ResNet
from detlib.modeling.backbone.resnet import BottleneckBlock
from detlib.modeling.box_regression import Box2BoxTransform
from detlib.modeling.matcher import Matcher
from detlib.modeling.poolers import ROIPooler
from detlib.modeling.roi_heads import FastRCNNOutputLayers, MaskRCNNConvUpsampleHead, Res5ROIHeads
from detlib.structures import Instances
from tests.builders import NUM_CLASSES, ground_truth, make_proposals, small_config

SIZE = (64, 96)
C4 = "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml"


def make_heads(**kwargs) -> Res5ROIHeads:
    torch.manual_seed(0)
    args = {
        "num_classes": NUM_CLASSES,
        "batch_size_per_image": 1000,
        "positive_fraction": 1.0,
        "proposal_matcher": Matcher([0.5], [0, 1]),
        "in_features": ["res4"],
        "pooler": ROIPooler(6, [1 / 16], 0, "ROIAlignV2"),
        "res5": ResNet.make_stage(
            BottleneckBlock,
            2,
            stride_per_block=[2, 1],
            in_channels=4,
            out_channels=8,
            bottleneck_channels=4,
            norm="",
        ),
        "box_predictor": FastRCNNOutputLayers(
            8, box2box_transform=Box2BoxTransform((10, 10, 5, 5)), num_classes=NUM_CLASSES
        ),
        "mask_head": MaskRCNNConvUpsampleHead(ShapeSpec(channels=8), num_classes=NUM_CLASSES, conv_dims=[5]),
    }
    return Res5ROIHeads(**(args | kwargs))


def make_features(num_images: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"res4": torch.randn(num_images, 4, 4, 6, generator=generator), "other": torch.zeros(1)}


NEAR_FIRST, APART = (8, 8, 40, 36), (50, 0, 90, 10)


def test_training_losses_equal_those_of_the_branches():
    heads = make_heads()
    assert isinstance(heads.res5, nn.Sequential) and "res5.1.conv3.weight" in heads.state_dict()
    features = make_features(2)
    proposals = [make_proposals([NEAR_FIRST, APART]), make_proposals([APART])]
    sampled, losses = heads(None, features, proposals, [ground_truth(), ground_truth(boxes=())])
    assert [len(x) for x in sampled] == [4, 1]

    regions = heads.res5(heads.pooler([features["res4"]], [x.proposal_boxes for x in sampled]))
    assert regions.shape == (5, 8, 3, 3)
    logits = heads.box_predictor.cls_score(regions.flatten(2).mean(dim=2))
    classes = torch.cat([x.gt_classes for x in sampled])
    torch.testing.assert_close(losses["loss_cls"], F.cross_entropy(logits, classes))

    # The mask loss uses the features computed for the boxes, of the foreground only.
    rows = (classes < NUM_CLASSES).nonzero()[:, 0]
    assert len(rows) == 3
    logits = heads.mask_head.layers(regions[rows])[torch.arange(3), classes[rows]]
    foreground = sampled[0][rows]
    masks = foreground.gt_masks.crop_and_resize(foreground.proposal_boxes.tensor, 6).float()
    want = F.binary_cross_entropy_with_logits(logits, masks)
    torch.testing.assert_close(losses["loss_mask"], want)


@torch.no_grad()
def test_mask_features_are_pooled_from_the_detections():
    heads = make_heads().eval()
    nn.init.constant_(heads.box_predictor.bbox_pred.bias, 0.7)
    features = make_features(2)
    proposals = [make_proposals([NEAR_FIRST, APART]), make_proposals([])]
    full, losses = heads(None, features, proposals)
    assert losses == {} and len(full[0]) > 0 and len(full[1]) == 0
    assert full[1].pred_masks.shape == (0, 1, 6, 6)
    x = heads._shared_roi_transform([features["res4"]], [x.pred_boxes for x in full])
    logits = heads.mask_head.layers(x)
    want = logits[torch.arange(len(x)), full[0].pred_classes].sigmoid()
    torch.testing.assert_close(full[0].pred_masks[:, 0], want)

    given = [Instances(SIZE, pred_boxes=x.pred_boxes, pred_classes=x.pred_classes) for x in full]
    again = heads.forward_with_given_boxes(features, given)
    assert torch.equal(again[0].pred_masks, full[0].pred_masks)


def test_heads_without_mask_head_predict_boxes():
    heads = make_heads(mask_head=None, res5=nn.Conv2d(4, 8, 3, stride=2, padding=1))
    assert not heads.mask_on and isinstance(heads.res5, nn.Conv2d)
    _, losses = heads(None, make_features(1), [make_proposals([NEAR_FIRST])], [ground_truth()])
    assert set(losses) == {"loss_cls", "loss_box_reg"}
    out, _ = heads.eval()(None, make_features(1), [make_proposals([NEAR_FIRST])])
    assert set(out[0].get_fields()) == {"pred_boxes", "scores", "pred_classes"}


def test_wrong_arguments_raise():
    heads = make_heads()
    with pytest.raises(ValueError, match="targets"):
        heads(None, make_features(1), [make_proposals([APART])])
    with pytest.raises(ValueError, match=r"eval\(\)"):
        heads.forward_with_given_boxes(make_features(1), [])
    with pytest.raises(ValueError, match="'pred_boxes' and 'pred_classes'"):
        heads.eval().forward_with_given_boxes(make_features(1), [make_proposals([APART])])


def test_config_values_reach_the_heads():
    cfg = small_config(C4, MODEL__RESNETS__STRIDE_IN_1X1=False, MODEL__RESNETS__NORM="FrozenBN")
    heads = build_model(cfg).roi_heads
    blocks = heads.res5
    assert len(blocks) == 3 and [b.stride for b in blocks] == [2, 1, 1]
    assert blocks[0].conv1.stride == (1, 1) and blocks[0].conv2.stride == (2, 2)
    assert blocks[0].in_channels == 256 and blocks[2].out_channels == 512
    assert blocks[0].conv2.out_channels == 512
    assert heads.pooler.output_size == (14, 14)
    assert heads.mask_head.mask_fcn1.in_channels == heads.box_predictor.cls_score.in_features == 512


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"MODEL__KEYPOINT_ON": True}, "KEYPOINT_ON.*Res5ROIHeads"),
        ({"MODEL__ROI_BOX_HEAD__POOLER_TYPE": ""}, "ROI_BOX_HEAD.POOLER_TYPE"),
        (
            {"MODEL__RESNETS__OUT_FEATURES": ["res3", "res4"], "MODEL__ROI_HEADS__IN_FEATURES": ["res3"]},
            "256",
        ),
        (
            {
                "MODEL__RESNETS__OUT_FEATURES": ["res3", "res4"],
                "MODEL__ROI_HEADS__IN_FEATURES": ["res3", "res4"],
            },
            r"one feature map.*\['res3', 'res4'\]",
        ),
        (
            {
                "MODEL__RESNETS__DEFORM_ON_PER_STAGE": [False, False, False, True],
                "MODEL__RESNETS__DEPTH": 50,
                "MODEL__RESNETS__RES2_OUT_CHANNELS": 256,
            },
            "does not support deformable",
        ),
        ({"MODEL__ROI_HEADS__IN_FEATURES": ["res9"]}, r"\['res9'\].*\['res4'\]"),
    ],
)
def test_wrong_configs_raise_with_their_key(overrides, message):
    with pytest.raises(ValueError, match=message):
        build_model(small_config(C4, **overrides))
