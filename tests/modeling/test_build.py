import pytest
import torch
from torch import nn

from detlib import modeling
from detlib.config import LazyCall
from detlib.modeling import META_ARCH_REGISTRY, build_model
from tests.builders import FAST_RCNN, FASTER_RCNN, MASK_RCNN, RPN, small_config


def test_build_model_builds_the_parts_in_the_config():
    model = build_model(small_config(MASK_RCNN))
    assert isinstance(model, modeling.GeneralizedRCNN)
    assert isinstance(model.roi_heads, modeling.StandardROIHeads)
    assert model.training and model.device == torch.device("cpu")
    assert isinstance(build_model(small_config(RPN)), modeling.ProposalNetwork)
    assert build_model(small_config(FAST_RCNN)).proposal_generator is None
    assert not build_model(small_config(FASTER_RCNN)).roi_heads.mask_on


def test_config_values_reach_the_parts():
    model = build_model(
        small_config(
            MASK_RCNN,
            INPUT__FORMAT="RGB",
            VIS_PERIOD=7,
            MODEL__PIXEL_MEAN=[1.0, 2.0, 3.0],
            MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.3,
            MODEL__ROI_HEADS__NMS_THRESH_TEST=0.4,
            MODEL__ROI_HEADS__POSITIVE_FRACTION=0.6,
            MODEL__ROI_HEADS__PROPOSAL_APPEND_GT=False,
            MODEL__ROI_BOX_HEAD__POOLER_SAMPLING_RATIO=3,
            MODEL__ROI_BOX_HEAD__POOLER_TYPE="ROIAlign",
            MODEL__ROI_BOX_HEAD__BBOX_REG_LOSS_TYPE="giou",
            MODEL__ROI_BOX_HEAD__BBOX_REG_LOSS_WEIGHT=4.0,
            MODEL__ROI_BOX_HEAD__SMOOTH_L1_BETA=0.2,
            MODEL__ROI_BOX_HEAD__BBOX_REG_WEIGHTS=(1.0, 2.0, 3.0, 4.0),
            MODEL__ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG=True,
            MODEL__ROI_BOX_HEAD__TRAIN_ON_PRED_BOXES=True,
            MODEL__ROI_BOX_HEAD__NUM_CONV=1,
            MODEL__ROI_BOX_HEAD__CONV_DIM=24,
            MODEL__ROI_MASK_HEAD__CLS_AGNOSTIC_MASK=True,
            MODEL__ROI_MASK_HEAD__NORM="GN",
            MODEL__ROI_MASK_HEAD__CONV_DIM=32,
        )
    )
    assert (model.input_format, model.vis_period) == ("RGB", 7)
    assert model.pixel_mean.flatten().tolist() == [1, 2, 3]
    heads, predictor = model.roi_heads, model.roi_heads.box_predictor
    assert heads.in_features == heads.box_in_features == heads.mask_in_features == ["p2", "p3", "p4", "p5"]
    assert (heads.positive_fraction, heads.proposal_append_gt) == (0.6, False)
    assert heads.train_on_pred_boxes
    assert heads.batch_size_per_image == 16 and heads.num_classes == 3
    level = heads.box_pooler.level_poolers[1]
    assert (level.spatial_scale, level.sampling_ratio, level.aligned) == (1 / 8, 3, False)
    assert heads.mask_pooler.level_poolers[0].aligned and heads.mask_pooler.output_size == (14, 14)
    assert (predictor.test_score_thresh, predictor.test_nms_thresh) == (0.3, 0.4)
    assert predictor.test_topk_per_image == 20
    assert (predictor.box_reg_loss_type, predictor.smooth_l1_beta) == ("giou", 0.2)
    assert predictor.loss_weight == {"loss_box_reg": 4.0}
    assert tuple(predictor.box2box_transform.weights) == (1, 2, 3, 4)
    assert predictor.bbox_pred.out_features == 4
    assert heads.box_head.conv1.out_channels == 24 and heads.box_head.output_shape.channels == 32
    assert heads.mask_head.predictor.out_channels == 1 and heads.mask_head.mask_fcn1.norm is not None


def test_pixel_statistics_are_not_in_the_state_dict():
    names = build_model(small_config(FASTER_RCNN)).state_dict()
    assert not [n for n in names if n.startswith("pixel")]


def test_model_is_built_on_the_device_of_the_config():
    assert build_model(small_config(RPN, MODEL__DEVICE="auto")).device.type in ("cpu", "cuda", "mps")


def test_wrong_configs_raise_with_suggestions():
    with pytest.raises(TypeError, match="CfgNode.*dict"):
        build_model({"MODEL": {}})
    with pytest.raises(KeyError, match="GeneralizedRCNN"):
        build_model(small_config(MODEL__META_ARCHITECTURE="GeneralisedRCNN"))
    with pytest.raises(KeyError, match="StandardROIHeads"):
        build_model(small_config(MODEL__ROI_HEADS__NAME="StandardRoiHeads"))
    with pytest.raises(ValueError, match="IN_FEATURES.*'p9'.*'p2'"):
        build_model(small_config(MODEL__ROI_HEADS__IN_FEATURES=["p2", "p9"]))
    with pytest.raises(ValueError, match="NUM_CONV or NUM_FC"):
        build_model(small_config(MODEL__ROI_BOX_HEAD__NUM_FC=0))
    with pytest.raises(KeyError, match="KRCNNConvDeconvUpsampleHead"):
        build_model(small_config(MODEL__KEYPOINT_ON=True, MODEL__ROI_KEYPOINT_HEAD__NAME="KRCNNHead"))


def test_registered_architecture_is_built_by_name():
    class Plain(nn.Module):
        def __init__(self, cfg):
            super().__init__()
            self.layer = nn.Linear(cfg.MODEL.ROI_HEADS.NUM_CLASSES, 1)

    name = "PlainForThisTest"
    Plain.__name__ = name
    if name not in META_ARCH_REGISTRY:
        META_ARCH_REGISTRY.register(Plain)
    assert build_model(small_config(MODEL__META_ARCHITECTURE=name)).layer.in_features == 3


def test_public_names_are_importable():
    missing = [name for name in modeling.__all__ if not hasattr(modeling, name)]
    assert not missing


def test_build_model_instantiates_lazy_nodes():
    model = build_model(LazyCall(nn.Linear)(in_features=2, out_features=3))
    assert isinstance(model, nn.Linear) and model.out_features == 3
    assert isinstance(build_model({"_target_": "torch.nn.ReLU"}), nn.ReLU)
    with pytest.raises(
        TypeError, match=r"got dict\. Give the model's node of a lazy config: build_model\(cfg\.model"
    ):
        build_model({"model": {"_target_": "torch.nn.ReLU"}, "train": {}})
