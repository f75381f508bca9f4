"""Conversion of weights of other libraries to the names and layouts of detlib.

Each conversion maps arrays by name to arrays by name. The new names are relative to a backbone or head, such
as ``stem.conv1.weight``, and are matched to the names in the model by their suffix.
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
    """The conversion of one library's weights, and the input that they expect."""

    convert: Callable[[Mapping[str, Any]], dict[str, Any]]
    input_format: str
    """Channel order of the images that the weights were trained on: "BGR" or "RGB"."""
    pixel_mean: tuple[float, float, float]
    """Mean of each channel, in the order of `input_format`, for pixels in [0, 255]."""


def get_conversion(name: str) -> Conversion:
    """Return the conversion with this name.

    Raises:
        ValueError: if there is none. The message lists similar names.
    """
    if name in CONVERSIONS:
        return CONVERSIONS[name]
    raise ValueError(
        f"There is no conversion '{name}' of weights.{suggest(name, CONVERSIONS)} Known conversions: "
        f"{', '.join(CONVERSIONS)}."
    )


def _substitute(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    """Apply the first matching rule: a regular expression for the full name, and a replacement."""
    for pattern, replacement in rules:
        new, count = re.subn(f"^{pattern}$", replacement, name)
        if count:
            return new
    return name


# Suffix of a Caffe2 name -> suffix of the parameter name.
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
    """Convert the blobs of Detectron and Caffe2, such as ``res2_0_branch2a_w``.

    Optimizer momenta are dropped. In Detectron the background is class 0, here it is the last class: score
    weights are reordered, and box and mask weights of the background, which are not used, are dropped.
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
    """Convert ResNets and ResNeXts of torchvision, and those of timm, which have the same names.

    Their strides are in the 3x3 convolutions: MODEL.RESNETS.STRIDE_IN_1X1 must be False.
    """
    stage = re.compile(r"LAYER(\d)")
    return {
        stage.sub(lambda match: f"res{int(match[1]) + 1}", _substitute(name, _RESNET_MODULES)): value
        for name, value in state.items()
    }


_VIT_UNUSED = re.compile(r"(?:cls_token|norm\.|fc_norm\.|head\.|head_dist\.|dist_token)")


def convert_timm_vit(state: Mapping[str, Any]) -> dict[str, Any]:
    """Convert plain vision transformers of timm (also those of MAE) by dropping the classifier."""
    return {name: value for name, value in state.items() if not _VIT_UNUSED.match(name)}


_SWIN_DOWNSAMPLE = re.compile(r"layers\.(\d)\.downsample\.(.+)")
_SWIN_UNUSED = re.compile(r"(?:norm\.|head\.)|.+\.(?:relative_position_index|attn_mask)$")


def convert_timm_swin(state: Mapping[str, Any]) -> dict[str, Any]:
    """Convert Swin transformers of timm, where patch merging is at the start of a stage, not its end."""
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
