"""RegNet and AnyNet ("Designing Network Design Spaces", arXiv:2003.13678).

The RegNetY family has squeeze-and-excitation (arXiv:1709.01507). Parameter names match the published models
(pycls).
"""

import math
from collections import OrderedDict

from torch import nn

from detlib.layers import get_norm
from detlib.layers.blocks import CNNBlockBase
from detlib.modeling.backbone.backbone import Backbone

__all__ = ["AnyNet", "RegNet", "ResBasicBlock", "ResBottleneckBlock", "ResStem", "SimpleStem", "VanillaBlock"]

_WIDTH_STEP = 8  # every width is a multiple of this (section 3.3 of the paper)


def _conv(w_in, w_out, kernel_size, *, stride=1, groups=1, bias=False):
    """Return a convolution with "same" padding."""
    padding = (kernel_size - 1) // 2
    return nn.Conv2d(w_in, w_out, kernel_size, stride, padding, groups=groups, bias=bias)


def _norm(norm, width):
    return get_norm(norm, width) or nn.Identity()


def _init_weights(module):
    """Apply He initialization; like pycls, count all output channels, even of grouped convolutions."""
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation: scale channels by factors in (0, 1), computed from the channel averages."""

    def __init__(self, w_in, w_se, activation_class):
        """
        Args:
            w_in: input and output channels.
            w_se: hidden channels.
            activation_class: callable without arguments that creates the hidden activation.
        """
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d((1, 1))
        self.f_ex = nn.Sequential(
            _conv(w_in, w_se, 1, bias=True), activation_class(), _conv(w_se, w_in, 1, bias=True), nn.Sigmoid()
        )

    def forward(self, x):
        """Map (N, w_in, H, W) to the same shape."""
        return x * self.f_ex(self.avg_pool(x))


class ResStem(CNNBlockBase):
    """The stem of ResNet: a 7x7 convolution and 3x3 max pooling, stride 4 in total."""

    def __init__(self, w_in, w_out, norm, activation_class):
        """
        Args:
            w_in, w_out: input and output channels.
            norm: a norm's name or a callable, see `detlib.layers.get_norm`.
            activation_class: callable without arguments that creates an activation.
        """
        super().__init__(w_in, w_out, 4)
        self.conv = _conv(w_in, w_out, 7, stride=2)
        self.bn = _norm(norm, w_out)
        self.af = activation_class()
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)

    def forward(self, x):
        """Map (N, w_in, H, W) to (N, w_out, ceil(H/4), ceil(W/4))."""
        return self.pool(self.af(self.bn(self.conv(x))))


class SimpleStem(CNNBlockBase):
    """The stem of RegNet: one 3x3 convolution of stride 2."""

    def __init__(self, w_in, w_out, norm, activation_class):
        """
        Args:
            w_in, w_out, norm, activation_class: see `ResStem`.
        """
        super().__init__(w_in, w_out, 2)
        self.conv = _conv(w_in, w_out, 3, stride=2)
        self.bn = _norm(norm, w_out)
        self.af = activation_class()

    def forward(self, x):
        """Map (N, w_in, H, W) to (N, w_out, ceil(H/2), ceil(W/2))."""
        return self.af(self.bn(self.conv(x)))


class VanillaBlock(CNNBlockBase):
    """Two 3x3 convolutions without a shortcut."""

    def __init__(self, w_in, w_out, stride, norm, activation_class, _params):
        """
        Args:
            w_in, w_out: input and output channels.
            stride: stride of the first convolution.
            norm, activation_class: see `ResStem`.
            _params: unused, for the same signature as the other blocks.
        """
        super().__init__(w_in, w_out, stride)
        self.a = _conv(w_in, w_out, 3, stride=stride)
        self.a_bn = _norm(norm, w_out)
        self.a_af = activation_class()
        self.b = _conv(w_out, w_out, 3)
        self.b_bn = _norm(norm, w_out)
        self.b_af = activation_class()

    def forward(self, x):
        """Map (N, w_in, H, W) to (N, w_out, H/stride, W/stride)."""
        x = self.a_af(self.a_bn(self.a(x)))
        return self.b_af(self.b_bn(self.b(x)))


class BasicTransform(nn.Module):
    """The residual branch of `ResBasicBlock`: two 3x3 convolutions."""

    def __init__(self, w_in, w_out, stride, norm, activation_class, _params):
        super().__init__()
        self.a = _conv(w_in, w_out, 3, stride=stride)
        self.a_bn = _norm(norm, w_out)
        self.a_af = activation_class()
        self.b = _conv(w_out, w_out, 3)
        self.b_bn = _norm(norm, w_out)

    def forward(self, x):
        """Map (N, w_in, H, W) to (N, w_out, H/stride, W/stride)."""
        x = self.a_af(self.a_bn(self.a(x)))
        return self.b_bn(self.b(x))


class BottleneckTransform(nn.Module):
    """The residual branch of `ResBottleneckBlock`: 1x1, grouped 3x3, squeeze-and-excitation, 1x1."""

    def __init__(self, w_in, w_out, stride, norm, activation_class, params):
        super().__init__()
        width = int(round(w_out * params["bot_mul"]))
        # The hidden width of the excitation depends on the block's input, not on the bottleneck.
        width_se = int(round(w_in * params["se_r"]))
        self.a = _conv(w_in, width, 1)
        self.a_bn = _norm(norm, width)
        self.a_af = activation_class()
        self.b = _conv(width, width, 3, stride=stride, groups=width // params["group_w"])
        self.b_bn = _norm(norm, width)
        self.b_af = activation_class()
        self.se = SqueezeExcite(width, width_se, activation_class) if width_se else None
        self.c = _conv(width, w_out, 1)
        self.c_bn = _norm(norm, w_out)

    def forward(self, x):
        """Map (N, w_in, H, W) to (N, w_out, H/stride, W/stride)."""
        x = self.a_af(self.a_bn(self.a(x)))
        x = self.b_af(self.b_bn(self.b(x)))
        if self.se is not None:
            x = self.se(x)
        return self.c_bn(self.c(x))


class _ResBlock(CNNBlockBase):
    """A residual branch `f` and a shortcut, which is a strided 1x1 convolution if the shape changes."""

    transform_class: type[nn.Module]

    def __init__(self, w_in, w_out, stride, norm, activation_class, params):
        """
        Args:
            w_in, w_out: input and output channels.
            stride: stride of the block.
            norm, activation_class: see `ResStem`.
            params: parameters of `transform_class`.
        """
        super().__init__(w_in, w_out, stride)
        self.proj = None
        if w_in != w_out or stride != 1:
            self.proj = _conv(w_in, w_out, 1, stride=stride)
            self.bn = _norm(norm, w_out)
        self.f = self.transform_class(w_in, w_out, stride, norm, activation_class, params)
        self.af = activation_class()

    def forward(self, x):
        """Map (N, w_in, H, W) to (N, w_out, H/stride, W/stride)."""
        shortcut = x if self.proj is None else self.bn(self.proj(x))
        return self.af(shortcut + self.f(x))


class ResBasicBlock(_ResBlock):
    """The basic residual block: two 3x3 convolutions and a shortcut. The argument `params` is unused."""

    transform_class = BasicTransform


class ResBottleneckBlock(_ResBlock):
    """The block of RegNet: 1x1, grouped 3x3 and 1x1 convolutions and a shortcut.

    The argument `params` is a dict with "bot_mul", the width of the 3x3 convolution as a multiple of `w_out`;
    "group_w", the channels of each of its groups; and "se_r", the width of the squeeze-and-excitation as a
    multiple of `w_in`, 0 for none.
    """

    transform_class = BottleneckTransform


def _fit_groups(width, ratio, group_width):
    """Return the nearest width of a stage and group width such that groups divide the bottleneck."""
    bottleneck = int(max(1, width * ratio))
    group_width = int(min(group_width, bottleneck))
    # The group width must divide the bottleneck, and so must the ratio if it is above 1.
    divisor = math.lcm(group_width, int(ratio)) if ratio > 1 else group_width
    bottleneck = max(divisor, int(round(bottleneck / divisor) * divisor))
    return int(bottleneck / ratio), group_width


class AnyNet(Backbone):
    """A stem ("stem") and stages of residual blocks ("s1", "s2", ...), each with its own width."""

    def __init__(
        self,
        *,
        stem_class,
        stem_width,
        block_class,
        depths,
        widths,
        group_widths,
        strides,
        bottleneck_ratios,
        se_ratio,
        activation_class,
        freeze_at=0,
        norm="BN",
        out_features=None,
    ):
        """
        Args:
            stem_class: `SimpleStem`, `ResStem` or a class with the same signature.
            stem_width: output channels of the stem.
            block_class: `ResBottleneckBlock`, `ResBasicBlock`, `VanillaBlock` or a class with the same
                signature.
            depths: number of blocks of each stage.
            widths: channels of each stage; rounded so that groups divide the bottleneck.
            group_widths: channels per group of each stage.
            strides: stride of the first block of each stage.
            bottleneck_ratios: ratio of the bottleneck width to the stage width, for each stage.
            se_ratio: ratio of the squeeze-and-excitation width to the block's input width; 0 for none.
            activation_class: callable without arguments that creates an activation.
            freeze_at: see `freeze`.
            norm: a norm's name or a callable, see `detlib.layers.get_norm`.
            out_features: names of the features to return, from "stem", "s1", "s2", ...; the last one by
                default.

        Raises:
            ValueError: the lists differ in length, a number is not positive, or an output feature is unknown.
        """
        super().__init__()
        per_stage = {
            "depths": depths,
            "widths": widths,
            "group_widths": group_widths,
            "strides": strides,
            "bottleneck_ratios": bottleneck_ratios,
        }
        for name, values in per_stage.items():
            if len(values) != len(widths) or not values or min(values) <= 0:
                raise ValueError(
                    f"{name} is {list(values)}; it needs a positive number for each of the {len(widths)} "
                    "stages"
                )
        self.stem = stem_class(3, stem_width, norm, activation_class)
        self.stages_and_names = []
        self._out_feature_channels = {"stem": stem_width}
        self._out_feature_strides = {"stem": self.stem.stride}
        width_in, total_stride = stem_width, self.stem.stride
        for i, (depth, width, group_width, stride, ratio) in enumerate(zip(*per_stage.values()), start=1):
            width, group_width = _fit_groups(width, ratio, group_width)
            params = {"bot_mul": ratio, "group_w": group_width, "se_r": se_ratio}
            blocks = OrderedDict()
            for j in range(1, depth + 1):
                step = stride if j == 1 else 1
                blocks[f"b{j}"] = block_class(width_in, width, step, norm, activation_class, params)
                width_in = width
            stage, name = nn.Sequential(blocks), f"s{i}"
            self.add_module(name, stage)
            self.stages_and_names.append((stage, name))
            total_stride *= stride
            self._out_feature_channels[name] = width
            self._out_feature_strides[name] = total_stride
        self.apply(_init_weights)

        known = list(self._out_feature_channels)
        self._out_features = [known[-1]] if out_features is None else list(out_features)
        unknown = [name for name in self._out_features if name not in known]
        if unknown or not self._out_features:
            raise ValueError(f"out_features {unknown or self._out_features} not among the features {known}")
        self.freeze(freeze_at)

    def forward(self, x):
        """Compute the features.

        Args:
            x: (N, 3, H, W) float tensor of normalized images.

        Returns:
            dict[str, Tensor]: name to (N, C_f, H/stride, W/stride) feature map.

        Raises:
            ValueError: `x` does not have four dimensions.
        """
        if x.dim() != 4:
            raise ValueError(f"{type(self).__name__} takes an (N, C, H, W) tensor, got {tuple(x.shape)}")
        outputs = {}
        x = self.stem(x)
        if "stem" in self._out_features:
            outputs["stem"] = x
        for stage, name in self.stages_and_names:
            x = stage(x)
            if name in self._out_features:
                outputs[name] = x
        return outputs

    def freeze(self, freeze_at=0):
        """Freeze the first stages: fix their parameters and replace their batch norms by FrozenBN.

        Args:
            freeze_at: number of stages to freeze, the stem included: 0 for none, 1 for the stem, 2 for the
                stem and "s1", and so on.

        Returns:
            AnyNet: self.
        """
        if freeze_at >= 1:
            self.stem.freeze()
        for stage, _ in self.stages_and_names[: max(freeze_at - 1, 0)]:
            for block in stage.children():
                block.freeze()
        return self


def regnet_stages(w_a, w_0, w_m, depth):
    """Return the widths and depths of the stages of a RegNet (equations 2 to 4 of the paper).

    The width `w_0 + w_a * j` of block j is quantized to `w_0 * w_m**k`, where k is the nearest integer in
    log space, and then rounded to a multiple of 8. Blocks of equal width form a stage.

    Args:
        w_a: slope of the widths, at least 0.
        w_0: width of the first block, a multiple of 8.
        w_m: ratio between the widths of stages, above 1.
        depth: number of blocks.

    Returns:
        tuple[list[int], list[int]]: width and number of blocks of each stage.

    Raises:
        ValueError: an argument is out of range.
    """
    if w_a < 0 or w_0 <= 0 or w_m <= 1 or w_0 % _WIDTH_STEP or depth < 1:
        raise ValueError(
            f"RegNet needs w_a >= 0, w_0 > 0 a multiple of {_WIDTH_STEP}, w_m > 1 and depth >= 1, got "
            f"w_a={w_a}, w_0={w_0}, w_m={w_m}, depth={depth}"
        )
    stages: dict[int, int] = {}
    for j in range(depth):
        exponent = round(math.log((w_0 + w_a * j) / w_0) / math.log(w_m))
        width = round(w_0 * w_m**exponent / _WIDTH_STEP) * _WIDTH_STEP
        stages[width] = stages.get(width, 0) + 1
    return list(stages), list(stages.values())


class RegNet(AnyNet):
    """A RegNet: the widths of its blocks grow linearly and are quantized to a few stages."""

    def __init__(
        self,
        *,
        stem_class,
        stem_width,
        block_class,
        depth,
        w_a,
        w_0,
        w_m,
        group_width,
        stride=2,
        bottleneck_ratio=1.0,
        se_ratio=0.0,
        activation_class=None,
        freeze_at=0,
        norm="BN",
        out_features=None,
    ):
        """
        Args:
            depth, w_a, w_0, w_m: number of blocks and parameters of their widths, see `regnet_stages`.
            group_width: channels per group.
            stride: stride of the first block of every stage.
            bottleneck_ratio: ratio of the bottleneck width to the stage width.
            activation_class: callable without arguments that creates an activation; ReLU by default.
            stem_class, stem_width, block_class, se_ratio, freeze_at, norm, out_features: see `AnyNet`.

        Raises:
            ValueError: see `AnyNet` and `regnet_stages`.
        """
        widths, depths = regnet_stages(w_a, w_0, w_m, depth)
        num_stages = len(widths)
        super().__init__(
            stem_class=stem_class,
            stem_width=stem_width,
            block_class=block_class,
            depths=depths,
            widths=widths,
            group_widths=[group_width] * num_stages,
            strides=[stride] * num_stages,
            bottleneck_ratios=[bottleneck_ratio] * num_stages,
            se_ratio=se_ratio,
            activation_class=activation_class or _relu,
            freeze_at=freeze_at,
            norm=norm,
            out_features=out_features,
        )


def _relu():
    return nn.ReLU(inplace=True)
