"""Converted weights of other libraries, whose outputs must equal those of the libraries."""

import logging
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torchvision

from detlib import model_zoo
from detlib.checkpoint import DetectionCheckpointer
from detlib.checkpoint.conversions import CONVERSIONS, convert_timm_swin, convert_timm_vit
from detlib.config import get_cfg
from detlib.layers import ShapeSpec
from detlib.modeling import build_model, build_resnet_backbone

ENDINGS = {
    "norm.weight": ("_bn_s", "_gn_s"),
    "norm.bias": ("_bn_b", "_gn_b"),
    "weight": ("_w",),
    "bias": ("_b",),
}


def caffe2_name(name: str) -> str:
    """Return Detectron's name of a parameter of Mask R-CNN R-50-FPN, independently of the conversion."""
    module, ending = next(
        (name.removesuffix(f".{ours}"), theirs[0])
        for ours, theirs in ENDINGS.items()
        if name.endswith(f".{ours}")
    )
    parts = module.split(".")
    last_block = {"2": "2", "3": "3", "4": "5", "5": "2"}
    if "stem" in parts:
        return ("res_conv1" if ending.startswith("_bn") else "conv1") + ending
    if parts[:2] == ["backbone", "bottom_up"]:
        branch = {"shortcut": "1", "conv1": "2a", "conv2": "2b", "conv3": "2c"}[parts[4]]
        return f"{parts[2]}_{parts[3]}_branch{branch}{ending}"
    if module.startswith("backbone.fpn_lateral"):
        stage = module[-1]
        return f"fpn_inner_res{stage}_{last_block[stage]}_sum{'' if stage == '5' else '_lateral'}{ending}"
    if module.startswith("backbone.fpn_output"):
        return f"fpn_res{module[-1]}_{last_block[module[-1]]}_sum{ending}"
    fixed = {
        "rpn_head.conv": "conv_rpn_fpn2",
        "rpn_head.objectness_logits": "rpn_cls_logits_fpn2",
        "rpn_head.anchor_deltas": "rpn_bbox_pred_fpn2",
        "box_head.fc1": "fc6",
        "box_head.fc2": "fc7",
        "box_predictor.cls_score": "cls_score",
        "box_predictor.bbox_pred": "bbox_pred",
        "mask_head.deconv": "conv5_mask",
        "mask_head.predictor": "mask_fcn_logits",
    }
    tail = ".".join(parts[1:])
    return (fixed[tail] if tail in fixed else f"_[mask]_fcn{module[-1]}") + ending


def test_detectron_file_sets_every_parameter(tmp_path, caplog):
    cfg = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml")
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    rng = np.random.default_rng(0)
    expected, blobs = {}, {}
    for name, value in model.state_dict().items():
        if "running" in name:
            continue
        array = rng.standard_normal(value.shape, dtype=np.float32)
        expected[name], theirs = array, caffe2_name(name)
        if "cls_score" in name:  # the background comes first
            array = np.concatenate([array[-1:], array[:-1]])
        elif "bbox_pred" in name and "roi_heads" in name:
            array = np.concatenate([np.full_like(array[:4], 9), array])
        elif "mask_head.predictor" in name:
            array = np.concatenate([np.full_like(array[:1], 9), array])
        blobs[theirs] = array
        blobs[f"{theirs}_momentum"] = np.zeros_like(array)
    (tmp_path / "e2e.pkl").write_bytes(pickle.dumps({"blobs": blobs, "cfg": "MODEL: {}"}, protocol=2))
    checkpointer = DetectionCheckpointer(model)
    with caplog.at_level(logging.WARNING, logger="detlib"):
        checkpointer.load(str(tmp_path / "e2e.pkl"))
    assert not caplog.records
    state = model.state_dict()
    for name, array in expected.items():
        assert np.array_equal(state[name].numpy(), array), name
    # Batch norms are folded into an affine transformation, so their statistics must have no effect.
    means = [value for name, value in state.items() if name.endswith("running_mean")]
    assert means and all((value == 0).all() for value in means)
    assert all((value == 1).all() for name, value in state.items() if name.endswith("running_var"))


def resnet(depth: int, norm: str = "BN"):
    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.NORM = norm
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 256 if depth >= 50 else 64
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    return build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_converted_torchvision_resnet_has_the_same_features(tmp_path, depth, norm):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, f"resnet{depth}")(weights=None).eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    torch.save(theirs.state_dict(), tmp_path / "resnet.pth")
    ours = resnet(depth, norm)
    checkpointer = DetectionCheckpointer(ours)
    checkpointer.load(f"{tmp_path}/resnet.pth?convert=torchvision")
    assert not checkpointer.report.missing_keys
    assert checkpointer.report.unexpected_keys == ["fc.weight", "fc.bias"]
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
        features = ours(image)
        for i in range(1, 5):
            x = getattr(theirs, f"layer{i}")(x)
            assert (features[f"res{i + 1}"] - x).abs().max() <= 1e-5 * x.abs().max()


def test_wrong_channel_order_and_mean_give_a_warning(tmp_path, caplog):
    cfg = model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", [1.0, 2.0, 3.0]])
    model = build_model(cfg)
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps({"conv1_w": np.zeros((64, 3, 7, 7), np.float32)}))
    with caplog.at_level(logging.WARNING, logger="detlib"):
        DetectionCheckpointer(model).load(str(tmp_path / "R-50.pkl"))
    text = caplog.text
    assert "INPUT.FORMAT is 'RGB' instead of 'BGR'" in text
    assert "MODEL.PIXEL_MEAN is [1.0, 2.0, 3.0] instead of [103.5" in text
    assert (model.backbone.bottom_up.stem.conv1.weight == 0).all()


def test_names_of_converted_transformers():
    arrays = {
        name: np.zeros(1) for name in ("cls_token", "pos_embed", "norm.weight", "blocks.0.attn.qkv.weight")
    }
    assert list(convert_timm_vit(arrays)) == ["pos_embed", "blocks.0.attn.qkv.weight"]
    swin = [
        "layers.1.downsample.norm.weight",
        "layers.0.blocks.1.attn.relative_position_index",
        "head.fc.bias",
    ]
    assert list(convert_timm_swin(dict.fromkeys(swin, 0))) == ["layers.0.downsample.norm.weight"]
    old = ["layers.0.downsample.norm.weight", "layers.1.downsample.norm.weight"]
    assert list(convert_timm_swin(dict.fromkeys(old, 0))) == old
    assert set(CONVERSIONS) == {"caffe2", "torchvision", "timm_resnet", "timm_vit", "timm_swin"}


def test_conversion_keeps_the_order_of_parameters():
    state = OrderedDict(
        (name, i) for i, name in enumerate(("layer1.0.bn1.weight", "conv1.weight", "fc.bias"))
    )
    assert list(CONVERSIONS["torchvision"].convert(state).items()) == [
        ("res2.0.conv1.norm.weight", 0),
        ("stem.conv1.weight", 1),
        ("linear.bias", 2),
    ]
