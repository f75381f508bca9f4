"""Names and layouts of other libraries' weights, turned into detlib's.

Each conversion takes and gives arrays by name. The names it gives are those within a backbone or head, such
as ``stem.conv1.weight``, and are matched to the model's by their ending.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from detlib.utils.suggest import suggest

__all__ = ["CONVERSIONS", "Conversion", "get_conversion"]


@dataclass(frozen=True)
class Conversion:
    """How one library's weights are read."""

    convert: Callable[[Mapping[str, Any]], dict[str, Any]]
    input_format: str
    """Order of the colours that the weights were trained on: "BGR" or "RGB"."""
    pixel_mean: tuple[float, float, float]
    """In that order, of pixels in [0, 255]."""


def get_conversion(name: str) -> Conversion:
    """The conversion called `name`.

    Raises:
        ValueError: if there is none; near names are listed.
    """
    if name in CONVERSIONS:
        return CONVERSIONS[name]
    raise ValueError(
        f"There is no conversion '{name}' of weights.{suggest(name, CONVERSIONS)} There are "
        f"{', '.join(CONVERSIONS)}."
    )


def _substitute(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    """Apply the first of `rules` (regular expression of the whole name, replacement) that fits."""
    for pattern, replacement in rules:
        new, count = re.subn(f"^{pattern}$", replacement, name)
        if count:
            return new
    return name


# What the end of a Caffe2 name says of the parameter.
_CAFFE2_ENDINGS = {
    "_bn_s": ".norm.weight",
    "_bn_b": ".norm.bias",
    "_bn_rm": ".norm.running_mean",
    "_bn_riv": ".norm.running_var",
    "_gn_s": ".norm.weight",
    "_gn_b": ".norm.bias",
    "_w": ".weight",
    "_b": ".bias",
}
_BRANCHES = {"branch1": "shortcut", "branch2a": "conv1", "branch2b": "conv2", "branch2c": "conv3"}
_RPN = "proposal_generator.rpn_head"
_KEYPOINTS = "roi_heads.keypoint_head"
_CAFFE2_MODULES = (
    *((rf"res(\d)_(\d+)_{theirs}", rf"res\1.\2.{ours}") for theirs, ours in _BRANCHES.items()),
    (r"(?:res_)?conv1", "stem.conv1"),
    (r"pred", "linear"),
    (r"fpn_inner_res(\d)_\d+_sum(?:_lateral)?", r"fpn_lateral\1"),
    (r"fpn_res(\d)_\d+_sum", r"fpn_output\1"),
    (r"conv_rpn(?:_fpn\d)?", f"{_RPN}.conv"),
    (r"rpn_bbox_pred(?:_fpn\d)?", f"{_RPN}.anchor_deltas"),
    (r"rpn_cls_logits(?:_fpn\d)?", f"{_RPN}.objectness_logits"),
    (r"fc6", "box_head.fc1"),
    (r"fc7", "box_head.fc2"),
    (r"head_conv(\d+)", r"box_head.conv\1"),
    (r"_\[mask\]_fcn(\d+)", r"mask_head.mask_fcn\1"),
    (r"conv5_mask", "mask_head.deconv"),
    (r"mask_fcn_logits", "mask_head.predictor"),
    (r"conv_fcn(\d+)", rf"{_KEYPOINTS}.conv_fcn\1"),
    (r"kps_score_lowres", f"{_KEYPOINTS}.score_lowres"),
    (r"kps_score", f"{_KEYPOINTS}.score"),
)


def _caffe2_name(name: str) -> str:
    for theirs, ours in _CAFFE2_ENDINGS.items():
        if name.endswith(theirs):
            return _substitute(name.removesuffix(theirs), _CAFFE2_MODULES) + ours
    return name


def convert_caffe2(state: Mapping[str, Any]) -> dict[str, Any]:
    """Detectron's and Caffe2's blobs: ``res2_0_branch2a_w`` and the like.

    Momenta of the optimizer are dropped. Detectron's class 0 is the background, ours is the last one: the
    scores' rows are moved, and boxes and masks of the background, which mean nothing, are dropped.
    """
    result = {}
    for name, value in state.items():
        if name.endswith("_momentum"):
            continue
        new = name if "." in name else _caffe2_name(name)
        if name.startswith("cls_score_"):
            value = np.roll(value, -1, axis=0) if isinstance(value, np.ndarray) else value.roll(-1, 0)
        elif name.startswith("bbox_pred_") and value.shape[0] > 4:
            value = value[4:]
        elif name.startswith("mask_fcn_logits_") and value.shape[0] > 1:
            value = value[1:]
        result[new] = value
    return result


_RESNET_MODULES = (
    (r"conv1\.(.+)", r"stem.conv1.\1"),
    (r"bn1\.(.+)", r"stem.conv1.norm.\1"),
    (r"layer(\d)\.(\d+)\.downsample\.0\.(.+)", r"LAYER\1.\2.shortcut.\3"),
    (r"layer(\d)\.(\d+)\.downsample\.1\.(.+)", r"LAYER\1.\2.shortcut.norm.\3"),
    (r"layer(\d)\.(\d+)\.conv(\d)\.(.+)", r"LAYER\1.\2.conv\3.\4"),
    (r"layer(\d)\.(\d+)\.bn(\d)\.(.+)", r"LAYER\1.\2.conv\3.norm.\4"),
    (r"fc\.(.+)", r"linear.\1"),
)


def convert_torchvision(state: Mapping[str, Any]) -> dict[str, Any]:
    """ResNets and ResNeXts of torchvision, and those of timm, which are named alike.

    Their strides are in the 3x3 convolutions: MODEL.RESNETS.STRIDE_IN_1X1 must be False.
    """
    stage = re.compile(r"LAYER(\d)")
    return {
        stage.sub(lambda match: f"res{int(match[1]) + 1}", _substitute(name, _RESNET_MODULES)): value
        for name, value in state.items()
    }


_VIT_UNUSED = re.compile(r"(?:cls_token|norm\.|fc_norm\.|head\.|head_dist\.|dist_token)")


def convert_timm_vit(state: Mapping[str, Any]) -> dict[str, Any]:
    """Plain vision transformers of timm (also MAE's), whose classifier a detector has no use for."""
    return {name: value for name, value in state.items() if not _VIT_UNUSED.match(name)}


_SWIN_DOWNSAMPLE = re.compile(r"layers\.(\d)\.downsample\.(.+)")
_SWIN_UNUSED = re.compile(r"(?:norm\.|head\.)|.+\.(?:relative_position_index|attn_mask)$")


def convert_timm_swin(state: Mapping[str, Any]) -> dict[str, Any]:
    """Swin transformers of timm, where a stage begins with the reduction that ours ends with."""
    result = {}
    at_start = not any(name.startswith("layers.0.downsample.") for name in state)
    for name, value in state.items():
        if _SWIN_UNUSED.match(name):
            continue
        match = _SWIN_DOWNSAMPLE.fullmatch(name)
        if match and at_start:
            name = f"layers.{int(match[1]) - 1}.downsample.{match[2]}"
        result[name] = value
    return result


_CAFFE2_MEAN = (103.53, 116.28, 123.675)
_IMAGENET_MEAN = (123.675, 116.28, 103.53)
CONVERSIONS = {
    "caffe2": Conversion(convert_caffe2, "BGR", _CAFFE2_MEAN),
    "torchvision": Conversion(convert_torchvision, "RGB", _IMAGENET_MEAN),
    "timm_resnet": Conversion(convert_torchvision, "RGB", _IMAGENET_MEAN),
    "timm_vit": Conversion(convert_timm_vit, "RGB", _IMAGENET_MEAN),
    "timm_swin": Conversion(convert_timm_swin, "RGB", _IMAGENET_MEAN),
}
