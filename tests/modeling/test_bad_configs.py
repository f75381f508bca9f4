"""Errors of invalid configs and inputs: each names the key, its value and the legal values."""

import pytest
import torch

from detlib.modeling import build_model
from tests.builders import (
    BOTTLENECKS,
    FAST_RCNN,
    MASK_RCNN,
    RPN,
    ground_truth,
    random_image,
    small_config,
    training_batch,
)

C4 = "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
KEYPOINTS = "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml"
PANOPTIC = "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml"
SEMANTIC = "Misc/semantic_R_50_FPN_1x.yaml"
CASCADE = "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml"


def error_of(kind, overrides: dict, name: str = MASK_RCNN) -> str:
    """Return the error message of building a config; the keys of `overrides` are below MODEL."""
    cfg = small_config(name)
    cfg.merge_from_list([x for key, value in overrides.items() for x in (f"MODEL.{key}", value)])
    with pytest.raises(kind) as error:
        build_model(cfg)
    return str(error.value)


def built(name: str) -> torch.nn.Module:
    overrides = BOTTLENECKS if name == C4 else {}
    return build_model(small_config(name, **overrides))


@pytest.mark.parametrize(
    "key, name, near, config",
    [
        ("META_ARCHITECTURE", "GeneralisedRCNN", "GeneralizedRCNN", MASK_RCNN),
        ("META_ARCHITECTURE", "RetinaNets", "RetinaNet", RETINANET),
        ("META_ARCHITECTURE", "PanopticFpn", "PanopticFPN", PANOPTIC),
        ("BACKBONE.NAME", "build_resnet_fpn_backbon", "build_resnet_fpn_backbone", MASK_RCNN),
        ("PROPOSAL_GENERATOR.NAME", "RPM", "RPN", MASK_RCNN),
        ("PROPOSAL_GENERATOR.NAME", "PrecomputedProposal", "PrecomputedProposals", FAST_RCNN),
        ("RPN.HEAD_NAME", "StandardRpnHeads", "StandardRPNHead", MASK_RCNN),
        ("ANCHOR_GENERATOR.NAME", "AnchorGenerator", "DefaultAnchorGenerator", MASK_RCNN),
        ("ANCHOR_GENERATOR.NAME", "AnchorGenerator", "DefaultAnchorGenerator", RETINANET),
        ("ROI_HEADS.NAME", "StandardRoIHead", "StandardROIHeads", MASK_RCNN),
        ("ROI_HEADS.NAME", "Res5RoiHead", "Res5ROIHeads", C4),
        ("ROI_HEADS.NAME", "CascadeRoiHead", "CascadeROIHeads", CASCADE),
        ("ROI_BOX_HEAD.NAME", "", "FastRCNNConvFCHead", MASK_RCNN),
        ("ROI_BOX_HEAD.NAME", "FastRCNNConvHead", "FastRCNNConvFCHead", CASCADE),
        ("ROI_MASK_HEAD.NAME", "MaskRCNNConvHead", "MaskRCNNConvUpsampleHead", C4),
        ("ROI_KEYPOINT_HEAD.NAME", "KRCNNConvDeconvHead", "KRCNNConvDeconvUpsampleHead", KEYPOINTS),
        ("SEM_SEG_HEAD.NAME", "SemSegFPN", "SemSegFPNHead", SEMANTIC),
        ("SEM_SEG_HEAD.NAME", "SemSegFPN", "SemSegFPNHead", PANOPTIC),
    ],
)
def test_unknown_component_names_raise_with_suggestions(key, name, near, config):
    message = error_of(KeyError, {key: name}, config)
    assert f"MODEL.{key} is {name!r}" in message and f"{near}" in message, message


@pytest.mark.parametrize(
    "key, config",
    [
        ("RESNETS.NORM", MASK_RCNN),
        ("RESNETS.NORM", C4),
        ("FPN.NORM", MASK_RCNN),
        ("FPN.NORM", RETINANET),
        ("ROI_BOX_HEAD.NORM", CASCADE),
        ("ROI_MASK_HEAD.NORM", MASK_RCNN),
        ("RETINANET.NORM", RETINANET),
        ("SEM_SEG_HEAD.NORM", SEMANTIC),
        ("SEM_SEG_HEAD.NORM", PANOPTIC),
    ],
)
def test_unknown_norm_raises_with_its_key(key, config):
    message = error_of(ValueError, {key: "GNN"}, config)
    assert f"MODEL.{key}" in message and "'GNN'" in message, message
    assert "FrozenBN" in message and "Did you mean 'GN'" in message, message


@pytest.mark.parametrize(
    "key, config, given",
    [
        ("RPN.IN_FEATURES", MASK_RCNN, "p6"),
        ("RPN.IN_FEATURES", C4, "res4"),
        ("ROI_HEADS.IN_FEATURES", MASK_RCNN, "p6"),
        ("ROI_HEADS.IN_FEATURES", FAST_RCNN, "p6"),
        ("ROI_HEADS.IN_FEATURES", C4, "res4"),
        ("ROI_HEADS.IN_FEATURES", CASCADE, "p6"),
        ("ROI_HEADS.IN_FEATURES", KEYPOINTS, "p6"),
        ("FPN.IN_FEATURES", MASK_RCNN, "res5"),
        ("FPN.IN_FEATURES", RETINANET, "res5"),
        ("RETINANET.IN_FEATURES", RETINANET, "p7"),
        ("SEM_SEG_HEAD.IN_FEATURES", SEMANTIC, "p6"),
        ("SEM_SEG_HEAD.IN_FEATURES", PANOPTIC, "p6"),
        ("RESNETS.OUT_FEATURES", MASK_RCNN, "stem"),
    ],
)
@pytest.mark.parametrize("value", [["x9"], []])
def test_unknown_features_raise_with_their_key(key, config, given, value):
    message = error_of(ValueError, {key: value}, config)
    assert f"MODEL.{key} is {value}" in message and f"'{given}'" in message, message
    assert ("'x9' is not among them" if value else "at least one") in message, message


@pytest.mark.parametrize("config, levels", [(MASK_RCNN, 5), (RETINANET, 5), (C4, 1)])
@pytest.mark.parametrize("key", ["ANCHOR_GENERATOR.SIZES", "ANCHOR_GENERATOR.ASPECT_RATIOS"])
def test_anchors_that_do_not_fit_the_levels_raise(key, config, levels):
    message = error_of(ValueError, {key: [[1.0], [2.0], [3.0]]}, config)
    assert f"MODEL.{key} has 3 lists for {levels} feature levels" in message, message


@pytest.mark.parametrize(
    "overrides, config, words",
    [
        ({"RESNETS.DEPTH": 51}, MASK_RCNN, "DEPTH is 51; legal are 18, 34, 50, 101, 152"),
        ({"RESNETS.RES5_DILATION": 3}, MASK_RCNN, "RES5_DILATION is 3"),
        ({"FPN.FUSE_TYPE": "mean"}, MASK_RCNN, "FUSE_TYPE is 'mean'; legal are 'sum', 'avg'"),
        ({"FPN.IN_FEATURES": ["res2", "res4"]}, MASK_RCNN, "double in stride"),
        ({"FPN.OUT_CHANNELS": 40, "FPN.NORM": "GN"}, MASK_RCNN, "40"),
        ({"ROI_BOX_HEAD.POOLER_TYPE": "ROIAlignV3"}, MASK_RCNN, "'ROIAlignV3'"),
        ({"ROI_BOX_HEAD.POOLER_TYPE": "ROIAlignV3"}, C4, "'ROIAlignV3'"),
        ({"ROI_BOX_HEAD.POOLER_TYPE": "ROIAlignV3"}, CASCADE, "'ROIAlignV3'"),
        ({"ROI_MASK_HEAD.POOLER_TYPE": "ROIAlignV3"}, MASK_RCNN, "'ROIAlignV3'"),
        ({"ROI_KEYPOINT_HEAD.POOLER_TYPE": "ROIAlignV3"}, KEYPOINTS, "'ROIAlignV3'"),
        ({"ROI_BOX_HEAD.POOLER_RESOLUTION": 0}, MASK_RCNN, "(0, 0)"),
        ({"ROI_HEADS.IN_FEATURES": ["p2", "p4"]}, MASK_RCNN, "factors of 2"),
        ({"ROI_HEADS.IOU_LABELS": [0, -1, 1]}, MASK_RCNN, "1 thresholds need 2 labels"),
        ({"RPN.IOU_THRESHOLDS": [0.7, 0.3]}, MASK_RCNN, "[0.7, 0.3]"),
        ({"RETINANET.IOU_LABELS": [0, 1]}, RETINANET, "2 thresholds need 3 labels"),
        ({"RPN.BBOX_REG_LOSS_TYPE": "giuo"}, MASK_RCNN, "Did you mean 'giou'"),
        ({"ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": "giuo"}, MASK_RCNN, "Did you mean 'giou'"),
        ({"ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": "giuo"}, C4, "Did you mean 'giou'"),
        ({"ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": "giuo"}, CASCADE, "Did you mean 'giou'"),
        ({"RETINANET.BBOX_REG_LOSS_TYPE": "giuo"}, RETINANET, "Did you mean 'giou'"),
        ({"RPN.BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0)}, MASK_RCNN, "(1.0, 1.0, 1.0)"),
        ({"ROI_BOX_HEAD.BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0)}, MASK_RCNN, "(1.0, 1.0, 1.0)"),
        ({"RETINANET.BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0)}, RETINANET, "(1.0, 1.0, 1.0)"),
        ({"RPN.CONV_DIMS": []}, MASK_RCNN, "[]"),
        ({"PIXEL_MEAN": [1.0, 2.0]}, MASK_RCNN, "PIXEL_STD"),
        ({"PIXEL_MEAN": [1.0, 2.0]}, RETINANET, "PIXEL_STD"),
        ({"PIXEL_MEAN": [1.0, 2.0]}, SEMANTIC, "PIXEL_STD"),
        ({"ROI_HEADS.NUM_CLASSES": 0}, MASK_RCNN, "0"),
        ({"ROI_HEADS.NUM_CLASSES": -1}, C4, "-1"),
        ({"RETINANET.NUM_CLASSES": 0}, RETINANET, "0"),
        ({"SEM_SEG_HEAD.NUM_CLASSES": 0}, SEMANTIC, "0"),
        ({"ROI_BOX_CASCADE_HEAD.IOUS": (0.5, 0.6)}, CASCADE, "BBOX_REG_WEIGHTS"),
        ({"ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": False}, CASCADE, "= True"),
        ({"ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 0}, KEYPOINTS, "0"),
        ({"KEYPOINT_ON": True}, C4, "True"),
        ({"SEM_SEG_HEAD.COMMON_STRIDE": 8}, SEMANTIC, "8"),
    ],
)
def test_illegal_values_raise_with_their_key(overrides, config, words):
    message = error_of(ValueError, overrides, config)
    assert f"MODEL.{next(iter(overrides))}" in message and words in message, message


SEM_SEG = torch.zeros(64, 96, dtype=torch.int64)


@pytest.mark.parametrize(
    "config, lacks, has",
    [
        (FAST_RCNN, "proposals", {"instances": ground_truth()}),
        (FAST_RCNN, "instances", {"proposals": ground_truth()}),
        (MASK_RCNN, "instances", {}),
        (RPN, "instances", {}),
        (CASCADE, "instances", {}),
        (C4, "instances", {}),
        (RETINANET, "instances", {}),
        (SEMANTIC, "sem_seg", {"instances": ground_truth()}),
        (PANOPTIC, "sem_seg", {"instances": ground_truth()}),
        (PANOPTIC, "instances", {"sem_seg": SEM_SEG}),
    ],
)
def test_training_input_without_a_key_raises(config, lacks, has):
    model = built(config)
    items = [training_batch()[0] | {"sem_seg": SEM_SEG, "proposals": ground_truth()}]
    items.append({"image": random_image(seed=1), "file_name": "second.jpg"} | has)
    with pytest.raises(ValueError, match=rf"'{lacks}'.*item 1 of the batch \(second.jpg\)"):
        model(items)


@pytest.mark.parametrize(
    "config, key", [(MASK_RCNN, "gt_masks"), (KEYPOINTS, "gt_keypoints"), (C4, "gt_masks")]
)
def test_ground_truth_without_a_required_field_raises(config, key):
    items = training_batch()
    for item in items:
        if item["instances"].has(key):
            item["instances"].remove(key)
    with pytest.raises(ValueError, match=f"'{key}'.*'instances'"):
        built(config)(items)


@torch.no_grad()
def test_inference_without_proposals_raises():
    with pytest.raises(ValueError, match="'proposals'.*item 0 of the batch"):
        built(FAST_RCNN).eval()([{"image": random_image()}])


@pytest.mark.parametrize("config", [MASK_RCNN, CASCADE])
@pytest.mark.parametrize(
    "part, argument",
    [
        ("proposal_generator", "in_features"),
        ("roi_heads", "box_in_features"),
        ("roi_heads", "mask_in_features"),
    ],
)
def test_unknown_features_of_a_model_without_config_raise(config, part, argument):
    model = built(config)
    setattr(getattr(model, part), argument, ["p2", "p9"])
    with pytest.raises(ValueError, match=r"in_features .*IN_FEATURES\).*'p9'\].*'p6'"):
        model(training_batch())
