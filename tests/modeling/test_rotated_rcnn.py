"""Rotated models: published values of their parts, and agreement with axis-aligned models at angle 0.

For other dtypes and images without objects see test_all_architectures.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from detlib.layers import ShapeSpec
from detlib.modeling import build_model
from detlib.modeling.anchor_generator import RotatedAnchorGenerator, build_anchor_generator
from detlib.modeling.box_regression import (
    Box2BoxTransformRotated,
    box2box_transform_for,
    box_regression_loss,
)
from detlib.modeling.proposal_generator import RRPN
from detlib.modeling.proposal_generator.rrpn import find_top_rrpn_proposals
from detlib.modeling.roi_heads import RotatedFastRCNNOutputLayers, RROIHeads
from detlib.modeling.roi_heads.rotated_fast_rcnn import (
    fast_rcnn_inference_rotated,
    fast_rcnn_inference_single_image_rotated,
)
from detlib.structures import Boxes, BoxMode, Instances, RotatedBoxes
from detlib.structures.rotated_boxes import pairwise_iou
from tests.builders import (
    FASTER_RCNN,
    MASK_RCNN,
    ROTATED,
    random_image,
    rotated_batch,
    rotated_config,
    rotated_ground_truth,
    small_config,
    training_batch,
)


@pytest.fixture(scope="module")
def published():
    """Return boxes, the deltas between them, and anchors, as computed by detectron2."""
    with np.load(Path(__file__).with_name("rotated.npz")) as arrays:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


class TestAnchors:
    def test_anchors_have_published_values(self, published):
        generator = RotatedAnchorGenerator(
            sizes=[[32], [64]], aspect_ratios=[[0.5, 1.0]], angles=[[-45, 0, 30]], strides=[8, 16], offset=0.5
        )
        anchors = generator([torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 2, 2)])
        assert [type(a) for a in anchors] == [RotatedBoxes, RotatedBoxes]
        for i, level in enumerate(anchors):
            torch.testing.assert_close(level.tensor, published[f"anchors{i}"])
        assert generator.num_anchors == generator.num_cell_anchors == [6, 6]
        assert generator.box_dim == 5 and not generator.state_dict()

    def test_order_is_sizes_then_ratios_then_angles(self):
        cells = RotatedAnchorGenerator(
            sizes=[8], aspect_ratios=[1.0], angles=[0], strides=[4]
        ).generate_cell_anchors((8, 16), (1.0, 4.0), (-90, 45))
        assert cells.tolist() == [
            *([0, 0, 8, 8, -90], [0, 0, 8, 8, 45], [0, 0, 4, 16, -90], [0, 0, 4, 16, 45]),
            *([0, 0, 16, 16, -90], [0, 0, 16, 16, 45], [0, 0, 8, 32, -90], [0, 0, 8, 32, 45]),
        ]

    def test_config_values_reach_the_generator(self):
        cfg = rotated_config(
            MODEL__ANCHOR_GENERATOR__SIZES=[[32], [64]],
            MODEL__ANCHOR_GENERATOR__ASPECT_RATIOS=[[1.0]],
            MODEL__ANCHOR_GENERATOR__ANGLES=[[10], [20, 30]],
        )
        generator = build_anchor_generator(cfg, [ShapeSpec(stride=4), ShapeSpec(stride=8)])
        assert generator.num_anchors == [1, 2]
        first, second = generator([torch.zeros(1, 1, 1, 2)] * 2)
        assert first.tensor.tolist() == [[0, 0, 32, 32, 10], [4, 0, 32, 32, 10]]
        assert second.tensor[1].tolist() == [0, 0, 64, 64, 30]

    def test_angles_that_do_not_fit_the_levels_raise(self):
        with pytest.raises(ValueError, match="ANGLES has 2 lists for 3 feature levels"):
            RotatedAnchorGenerator(
                sizes=[32], aspect_ratios=[1.0], angles=[[0], [45]], strides=[4, 8, 16], offset=0.0
            )


class TestTransform:
    def test_deltas_have_published_values(self, published):
        transform = Box2BoxTransformRotated((10, 10, 5, 5, 1))
        src, dst = published["boxes"].split(30)
        deltas = transform.get_deltas(src, dst)
        torch.testing.assert_close(deltas, published["deltas"], rtol=1e-5, atol=1e-5)
        applied = transform.apply_deltas(published["deltas"], src)
        torch.testing.assert_close(applied, published["applied"], rtol=1e-5, atol=1e-4)
        assert published["applied"][:, 4].abs().max() <= 180

    def test_deltas_of_several_classes_are_decoded(self, published):
        transform = Box2BoxTransformRotated((10, 10, 5, 5, 2.0))
        boxes = published["boxes"][:7]
        deltas = torch.randn(7, 15, generator=torch.Generator().manual_seed(0))
        together = transform.apply_deltas(deltas, boxes)
        for k in range(3):
            part = transform.apply_deltas(deltas[:, 5 * k : 5 * k + 5], boxes)
            assert torch.equal(together[:, 5 * k : 5 * k + 5], part)

    @pytest.mark.parametrize(
        "source, target, turn", [(170, -170, 20), (-170, 170, -20), (0, 180, -180), (30, 750, 0)]
    )
    def test_angles_are_wrapped(self, source, target, turn):
        src, dst = torch.tensor([[0.0, 0, 4, 8, source]]), torch.tensor([[0.0, 0, 4, 8, target]])
        deltas = Box2BoxTransformRotated((1, 1, 1, 1, 3.0)).get_deltas(src, dst)
        torch.testing.assert_close(deltas, torch.tensor([[0.0, 0, 0, 0, 3 * math.radians(turn)]]))

    def test_large_size_deltas_are_clamped(self):
        box = torch.tensor([[1.0, 2.0, 16.0, 8.0, 30.0]])
        grown = Box2BoxTransformRotated((1, 1, 1, 1, 1)).apply_deltas(
            torch.tensor([[0.0, 0, 50, 50, 0]]), box
        )
        torch.testing.assert_close(grown, torch.tensor([[1.0, 2.0, 1000.0, 500.0, 30.0]]))

    def test_half_precision_and_empty_boxes_are_decoded(self, published):
        transform = Box2BoxTransformRotated((1, 1, 1, 1, 1))
        boxes = published["boxes"][:3]
        assert transform.apply_deltas(torch.zeros(3, 5, dtype=torch.half), boxes).dtype == torch.float32
        assert transform.apply_deltas(torch.zeros(3, 5, dtype=torch.double), boxes).dtype == torch.float64
        assert transform.apply_deltas(torch.zeros(0, 10), boxes[:0]).shape == (0, 10)
        assert transform.get_deltas(boxes[:0], boxes[:0]).shape == (0, 5)

    def test_wrong_weights_and_source_boxes_raise(self, published):
        with pytest.raises(ValueError, match=r"five numbers.*\(1, 1, 1, 1\)"):
            Box2BoxTransformRotated((1, 1, 1, 1))
        flat = published["boxes"][:3].clone()
        flat[1, 3] = 0
        transform = box2box_transform_for((1, 1, 1, 1, 1))
        with pytest.raises(ValueError, match=r"without area.*rows \[1\]"):
            transform.get_deltas(flat, flat)
        with pytest.raises(ValueError, match="giou"):
            box_regression_loss(transform, flat, torch.zeros(3, 5), flat, "giou")


@pytest.fixture(scope="module")
def axis_aligned_and_rotated():
    """Return two models with the same weights: one axis-aligned, one with rotated anchors at angle 0."""
    torch.manual_seed(0)
    axis_aligned = build_model(small_config(FASTER_RCNN, MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.0))
    for layer in (
        axis_aligned.proposal_generator.rpn_head.anchor_deltas,
        axis_aligned.roi_heads.box_predictor.bbox_pred,
    ):
        torch.nn.init.normal_(layer.weight, std=0.02)
    overrides = {"MODEL__ANCHOR_GENERATOR__ANGLES": [[0]], "MODEL__ROI_HEADS__SCORE_THRESH_TEST": 0.0}
    rotated = build_model(rotated_config(**overrides))
    state = axis_aligned.state_dict()
    for name, value in rotated.state_dict().items():
        if value.shape != state[name].shape:
            pieces = state[name].unflatten(0, (-1, 4))
            state[name] = torch.cat([pieces, torch.zeros_like(pieces[:, :1])], dim=1).flatten(0, 1)
    rotated.load_state_dict(state)
    return axis_aligned, rotated


class TestAngleZeroEqualsAxisAligned:
    """With all angles 0, a rotated model equals the axis-aligned one, which other tests check."""

    @staticmethod
    def as_rotated(batch):
        for item in batch:
            old = item["instances"]
            boxes = BoxMode.convert(old.gt_boxes.tensor, BoxMode.XYXY_ABS, BoxMode.XYWHA_ABS)
            item["instances"] = Instances(
                old.image_size, gt_boxes=RotatedBoxes(boxes), gt_classes=old.gt_classes
            )
        return batch

    def test_losses_agree(self, axis_aligned_and_rotated):
        losses = []
        for model, batch in zip(
            axis_aligned_and_rotated, (training_batch(), self.as_rotated(training_batch()))
        ):
            torch.manual_seed(3)
            losses.append(model.train()(batch))
        assert losses[0]["loss_rpn_loc"] > 0 and losses[0]["loss_box_reg"] > 0
        torch.testing.assert_close(losses[1], losses[0], rtol=2e-4, atol=1e-5)

    def test_detections_agree(self, axis_aligned_and_rotated):
        axis_aligned, rotated = (
            model.eval()([{"image": random_image(), "height": 100, "width": 120}])[0]["instances"]
            for model in axis_aligned_and_rotated
        )
        assert len(rotated) == len(axis_aligned) == 20
        boxes = BoxMode.convert(rotated.pred_boxes.tensor, BoxMode.XYWHA_ABS, BoxMode.XYXY_ABS)
        torch.testing.assert_close(boxes, axis_aligned.pred_boxes.tensor, rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(rotated.scores, axis_aligned.scores, rtol=1e-4, atol=1e-5)
        assert rotated.pred_classes.tolist() == axis_aligned.pred_classes.tolist()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(rotated_config(MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.0))


class TestModel:
    def test_parameters_are_those_of_faster_rcnn(self, model):
        axis_aligned = build_model(small_config(FASTER_RCNN)).state_dict()
        assert list(model.state_dict()) == list(axis_aligned)
        shapes = {
            k: tuple(v.shape) for k, v in model.state_dict().items() if v.shape != axis_aligned[k].shape
        }
        assert shapes == {
            "proposal_generator.rpn_head.objectness_logits.weight": (12, 32, 1, 1),
            "proposal_generator.rpn_head.objectness_logits.bias": (12,),
            "proposal_generator.rpn_head.anchor_deltas.weight": (60, 32, 1, 1),
            "proposal_generator.rpn_head.anchor_deltas.bias": (60,),
            "roi_heads.box_predictor.bbox_pred.weight": (15, 32),
            "roi_heads.box_predictor.bbox_pred.bias": (15,),
        }
        assert isinstance(model.proposal_generator, RRPN) and isinstance(model.roi_heads, RROIHeads)
        assert isinstance(model.roi_heads.box_predictor, RotatedFastRCNNOutputLayers)

    @pytest.mark.parametrize("empty", [(False, False), (True, False), (True, True)])
    def test_training_step_gives_every_parameter_a_gradient(self, model, empty):
        model.train().zero_grad(set_to_none=True)
        losses = model(rotated_batch(empty))
        assert set(losses) == {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
        sum(losses.values()).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if all(empty):
            assert losses["loss_box_reg"] == losses["loss_rpn_loc"] == 0

    def test_outputs_are_in_the_output_frame(self, model):
        model.eval()
        (plain,), (scaled,) = (
            model([{"image": random_image(), "height": height, "width": width}])
            for height, width in ((64, 96), (128, 96))
        )
        expected = plain["instances"].pred_boxes.clone()
        expected.scale(1, 2)
        got = scaled["instances"]
        assert got.image_size == (128, 96) and got.pred_boxes.tensor.shape[1] == 5
        # Boxes that are nearly axis-aligned are clipped, in both frames.
        turned = (expected.tensor[:, 4].abs() > 2) & (plain["instances"].pred_boxes.tensor[:, 4].abs() > 2)
        torch.testing.assert_close(got.pred_boxes.tensor[turned], expected.tensor[turned])

    def test_proposals_are_sorted_rotated_boxes_without_grad(self, model):
        model.train()
        images = model.preprocess_image(rotated_batch())
        features = model.backbone(images.tensor)
        proposals, _ = model.proposal_generator(images, features, [b["instances"] for b in rotated_batch()])
        for p in proposals:
            assert type(p.proposal_boxes) is RotatedBoxes and 0 < len(p) <= 60
            assert not p.proposal_boxes.tensor.requires_grad
            assert (p.objectness_logits.diff() <= 0).all()

    @pytest.mark.parametrize("thresh, num_left", [(-1, 3), (0, 1), (10, 2)])
    def test_anchors_beyond_the_border_are_ignored(self, thresh, num_left):
        """The center decides, as the sides of a rotated anchor are not parallel to the border."""
        rrpn = build_model(rotated_config(MODEL__RPN__BOUNDARY_THRESH=thresh)).proposal_generator
        anchors = RotatedBoxes([[90, 60, 50, 50, 45], [100, 60, 20, 20, 0], [-20, 5, 20, 20, 0]])
        ((labels,), _) = rrpn.label_and_sample_anchors([anchors], [rotated_ground_truth(boxes=())])
        assert (labels == 0).tolist() == [True] + [thresh < 0 or thresh > 5, thresh < 0]
        assert (labels >= 0).sum() == num_left

    def test_model_can_be_built_on_the_meta_device(self):
        with torch.device("meta"):
            model = build_model(rotated_config(MODEL__DEVICE="meta"))
        assert all(p.is_meta for p in model.parameters())


class TestFunctions:
    def test_rotated_proposals_are_filtered_by_rotated_iou(self):
        boxes = torch.tensor(
            [[50.0, 50, 40, 10, 45], [50, 50, 40, 10, 47], [50, 50, 40, 10, -45], [20, 20, 0.5, 9, 0]]
        )
        scores = torch.tensor([[2.0, 3.0, 1.0, 4.0]])
        (found,) = find_top_rrpn_proposals([boxes[None]], [scores], [(100, 100)], 0.7, 10, 10, 1.0, False)
        assert found.objectness_logits.tolist() == [3, 1]
        assert found.proposal_boxes.tensor.tolist() == boxes[[1, 2]].tolist()
        assert pairwise_iou(found.proposal_boxes, found.proposal_boxes)[0, 1] < 0.7

    def test_rotated_detections_are_filtered_by_rotated_iou(self):
        boxes = torch.tensor([[50.0, 50, 40, 10, 45], [50, 50, 40, 10, 47], [50, 50, 40, 10, 590]])
        scores = torch.tensor([[0.6, 0.1, 0.3], [0.8, 0.2, 0.0], [0.3, 0.1, 0.6]])
        result, rows = fast_rcnn_inference_single_image_rotated(boxes, scores, (90, 80), 0.15, 0.5, 10)
        # 590 degrees is -130, which covers the same area as 50, so the best of class 0 suppresses the others.
        assert rows.tolist() == [1, 1] and result.pred_classes.tolist() == [0, 1]
        assert result.pred_boxes.tensor[0].tolist() == [50, 50, 40, 10, 47]
        all_classes, rows = fast_rcnn_inference_rotated(
            [boxes.repeat(1, 2)], [scores], [(90, 80)], 0.25, 1.0, -1
        )
        assert rows[0].tolist() == [1, 0, 2]
        torch.testing.assert_close(all_classes[0].pred_boxes.tensor[2, 4], torch.tensor(-130.0))


class TestErrors:
    @pytest.mark.parametrize(
        "overrides, words",
        [
            ({"MODEL__RPN__BBOX_REG_WEIGHTS": (1.0,) * 4}, "BBOX_REG_WEIGHTS.*five numbers"),
            ({"MODEL__ROI_BOX_HEAD__BBOX_REG_WEIGHTS": (1.0,) * 4}, "BBOX_REG_WEIGHTS.*five numbers"),
            (
                {"MODEL__ANCHOR_GENERATOR__NAME": "DefaultAnchorGenerator"},
                "GENERATOR.NAME.*boxes of 4",
            ),
            ({"MODEL__ROI_BOX_HEAD__POOLER_TYPE": "ROIAlignV2"}, "POOLER_TYPE must be 'ROIAlignRotated'"),
            ({"MODEL__RPN__BBOX_REG_LOSS_TYPE": "giou"}, "MODEL.RPN.BBOX_REG_LOSS_TYPE 'giou'"),
            ({"MODEL__ROI_BOX_HEAD__BBOX_REG_LOSS_TYPE": "ciou"}, "MODEL.ROI_BOX_HEAD.*'ciou'"),
            ({"MODEL__ROI_BOX_HEAD__TRAIN_ON_PRED_BOXES": True}, "TRAIN_ON_PRED_BOXES"),
            ({"MODEL__MASK_ON": True}, "MASK_ON"),
            ({"MODEL__KEYPOINT_ON": True}, "KEYPOINT_ON"),
        ],
    )
    def test_wrong_configs_raise(self, overrides, words):
        with pytest.raises(ValueError, match=words):
            build_model(rotated_config(**overrides))

    def test_mismatched_box_types_of_parts_raise(self):
        only_rpn = {k: v for k, v in ROTATED.items() if "RPN" in k or "ANCHOR" in k}
        with pytest.raises(ValueError, match="ROIAlign pools boxes of 4 numbers, got RotatedBoxes"):
            build_model(small_config(FASTER_RCNN, **only_rpn)).eval()([{"image": random_image()}])
        with pytest.raises(ValueError, match="RotatedAnchorGenerator"):
            build_model(
                rotated_config(MODEL__PROPOSAL_GENERATOR__NAME="RPN", MODEL__RPN__BBOX_REG_WEIGHTS=(1.0,) * 4)
            )

    def test_empty_ground_truth_may_be_of_another_type(self):
        """The box type of an image without objects is unknown."""
        batch = rotated_batch((False, True))
        batch[1]["instances"].gt_boxes = Boxes(torch.zeros(0, 4))
        losses = build_model(rotated_config())(batch)
        assert all(loss.isfinite() for loss in losses.values()) and losses["loss_rpn_loc"] > 0

    def test_ground_truth_of_another_type_raises(self):
        with pytest.raises(ValueError, match="works on RotatedBoxes.*'gt_boxes' are Boxes"):
            build_model(rotated_config())(training_batch())
        with pytest.raises(ValueError, match="works on Boxes.*'gt_boxes' are RotatedBoxes"):
            build_model(small_config(MASK_RCNN))(rotated_batch())
