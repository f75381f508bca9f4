"""RegNet and AnyNet: residual networks whose widths follow a line ("Designing Network Design Spaces",
arXiv:2003.13678), with squeeze-and-excitation (arXiv:1709.01507) in the RegNetY family.

The parameters have the names of the published models (pycls).
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
    """A convolution that keeps the size, up to `stride`."""
    padding = (kernel_size - 1) // 2
    return nn.Conv2d(w_in, w_out, kernel_size, stride, padding, groups=groups, bias=bias)


def _norm(norm, width):
    return get_norm(norm, width) or nn.Identity()


def _init_weights(module):
    """He initialization that counts all output channels, grouped convolutions' too, as pycls does."""
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))


class SqueezeExcite(nn.Module):
    """Multiplies each channel by a number in (0, 1), computed from the averages of all channels."""

    def __init__(self, w_in, w_se, activation_class):
        """
        Args:
            w_in: channels that go in and come out.
            w_se: channels in between.
            activation_class: makes the activation in between, called without arguments.
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
    """The stem of ResNet: 7x7 convolution and 3x3 max pooling, stride 4."""

    def __init__(self, w_in, w_out, norm, activation_class):
        """
        Args:
            w_in, w_out: channels that go in and come out.
            norm: a norm's name or a callable, see `detlib.layers.get_norm`.
            activation_class: makes an activation, called without arguments.
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
            w_in, w_out, norm, activation_class: as for `ResStem`.
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
            w_in, w_out: channels that go in and come out.
            stride: stride of the first convolution.
            norm, activation_class: as for `ResStem`.
            _params: not used; the other blocks have parameters there.
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
        # The excitation's width follows what goes into the block, not what it excites.
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
    """A residual branch `f` and a shortcut, which is a strided 1x1 convolution where shapes change."""

    transform_class: type[nn.Module]

    def __init__(self, w_in, w_out, stride, norm, activation_class, params):
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
    """Two 3x3 convolutions and a shortcut.

    Args:
        w_in, w_out: channels that go in and come out.
        stride: stride of the block.
        norm, activation_class: as for `ResStem`.
        params: not used.
    """

    transform_class = BasicTransform


class ResBottleneckBlock(_ResBlock):
    """1x1, grouped 3x3 and 1x1 convolutions and a shortcut: the block of RegNet.

    Args:
        w_in, w_out: channels that go in and come out.
        stride: stride of the block.
        norm, activation_class: as for `ResStem`.
        params: dict with "bot_mul", the width of the 3x3 convolution by `w_out`; "group_w", the channels of
            one of its groups; "se_r", the width of the squeeze-and-excitation by `w_in`, 0 for none.
    """

    transform_class = BottleneckTransform


def _fit_groups(width, ratio, group_width):
    """The nearest width of a stage, and width of groups, at which groups divide the bottleneck."""
    bottleneck = int(max(1, width * ratio))
    group_width = int(min(group_width, bottleneck))
    # Both the groups and, where the bottleneck is the wider, the ratio must divide it.
    divisor = math.lcm(group_width, int(ratio)) if ratio > 1 else group_width
    bottleneck = max(divisor, int(round(bottleneck / divisor) * divisor))
    return int(bottleneck / ratio), group_width


class AnyNet(Backbone):
    """A stem ("stem") and stages of blocks ("s1", "s2", ...), each stage of one width."""

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
            stem_class: `SimpleStem`, `ResStem` or a class that is called alike.
            stem_width: channels of the stem.
            block_class: `ResBottleneckBlock`, `ResBasicBlock`, `VanillaBlock` or one that is called alike.
            depths: number of blocks of each stage.
            widths: channels of each stage; rounded so that groups divide the bottleneck.
            group_widths: channels of a group in each stage.
            strides: stride of each stage's first block.
            bottleneck_ratios: bottleneck width by stage width, for each stage.
            se_ratio: width of the squeeze-and-excitation by the block's input width; 0 for none.
            activation_class: makes an activation, called without arguments.
            freeze_at: see `freeze`.
            norm: a norm's name or a callable, see `detlib.layers.get_norm`.
            out_features: names of the features to return, from "stem", "s1", "s2", ...; by default the last.

        Raises:
            ValueError: lists of unlike lengths, numbers that are not positive, or an unknown out feature.
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
            x: (N, 3, H, W) float tensor, normalized images.

        Returns:
            dict[str, Tensor]: (N, C_f, H/stride, W/stride) maps by name.

        Raises:
            ValueError: `x` has not four dimensions.
        """
        if x.dim() != 4:
            raise ValueError(f"{type(self).__name__} takes a (N, C, H, W) tensor, got {tuple(x.shape)}")
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
        """Stop the first parts from training: their parameters, and their batch norms become FrozenBN.

        Args:
            freeze_at: how many parts: 0 none, 1 the stem, 2 the stem and "s1", and so on.

        Returns:
            AnyNet: itself.
        """
        if freeze_at >= 1:
            self.stem.freeze()
        for stage, _ in self.stages_and_names[: max(freeze_at - 1, 0)]:
            for block in stage.children():
                block.freeze()
        return self


def regnet_stages(w_a, w_0, w_m, depth):
    """Widths and depths of the stages of a RegNet (equations 2 to 4 of the paper).

    Block j would have the width `w_0 + w_a * j`; it gets the nearest `w_0 * w_m**k` of whole k, by the
    logarithm, rounded to a multiple of 8. Blocks of one width are a stage.

    Args:
        w_a: slope, at least 0.
        w_0: first width, a multiple of 8.
        w_m: step between stages, over 1.
        depth: number of blocks.

    Returns:
        tuple[list[int], list[int]]: width and number of blocks of each stage.

    Raises:
        ValueError: an argument out of its range.
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
    """A network whose blocks widen along a line, quantised to a few stages."""

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
            depth, w_a, w_0, w_m: number of blocks and the line of their widths, see `regnet_stages`.
            group_width: channels of a group.
            stride: stride of every stage's first block.
            bottleneck_ratio: bottleneck width by stage width.
            activation_class: makes an activation, called without arguments; by default a ReLU.
            stem_class, stem_width, block_class, se_ratio, freeze_at, norm, out_features: as for `AnyNet`.

        Raises:
            ValueError: as of `AnyNet` and `regnet_stages`.
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
