"""ResNet and ResNeXt, 18 to 152 layers deep.

Published in "Deep Residual Learning for Image Recognition" (arXiv:1512.03385) and "Aggregated Residual
Transformations for Deep Neural Networks" (arXiv:1611.05431); with deformable convolutions in "Deformable
Convolutional Networks" (arXiv:1703.06211) and "Deformable ConvNets v2" (arXiv:1811.11168).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn import functional as F

from detlib.layers import Conv2d, DeformConv, ModulatedDeformConv, get_norm
from detlib.layers.blocks import CNNBlockBase
from detlib.layers.fvcore_nn import weight_init
from detlib.layers.wrappers import conv_relu
from detlib.modeling.backbone.backbone import Backbone
from detlib.modeling.backbone.build import BACKBONE_REGISTRY
from detlib.modeling.config_checks import check_choice, check_features, check_norm

__all__ = [
    "BasicBlock",
    "BasicStem",
    "BottleneckBlock",
    "DeformBottleneckBlock",
    "ResNet",
    "ResNetBlockBase",
    "build_resnet_backbone",
    "make_stage",
]

_BLOCKS_PER_STAGE = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
_STAGE_NAMES = ("res2", "res3", "res4", "res5")

ResNetBlockBase = CNNBlockBase


def _normed_conv(
    in_channels, out_channels, kernel_size, *, norm, stride=1, dilation=1, conv_class=Conv2d, **kwargs
):
    """Return a convolution without bias, with "same" padding, a norm and MSRA initialization."""
    conv = conv_class(
        in_channels,
        out_channels,
        kernel_size=kernel_size,
        stride=stride,
        padding=dilation * (kernel_size // 2),
        dilation=dilation,
        bias=False,
        norm=get_norm(norm, out_channels),
        **kwargs,
    )
    weight_init.c2_msra_fill(conv)
    return conv


def _projection(in_channels, out_channels, *, norm, stride):
    """Return the 1x1 convolution of the shortcut, or None if the shortcut is the identity."""
    if in_channels == out_channels and stride == 1:
        return None
    return _normed_conv(in_channels, out_channels, 1, norm=norm, stride=stride)


class BasicStem(CNNBlockBase):
    """The standard ResNet stem: a 7x7 convolution and 3x3 max pooling, stride 4 in total."""

    def __init__(self, in_channels=3, out_channels=64, norm="BN"):
        """
        Args:
            in_channels: number of image channels.
            out_channels: number of output channels.
            norm: a norm's name or a callable, see `detlib.layers.get_norm`.
        """
        super().__init__(in_channels, out_channels, 4)
        self.conv1 = _normed_conv(in_channels, out_channels, 7, norm=norm, stride=2)

    def forward(self, x):
        """Map (N, in_channels, H, W) to (N, out_channels, ceil(H/4), ceil(W/4))."""
        x = conv_relu(self.conv1, x)
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


class BasicBlock(CNNBlockBase):
    """The residual block of ResNet-18 and ResNet-34: two 3x3 convolutions and a shortcut."""

    def __init__(self, in_channels, out_channels, *, stride=1, norm="BN"):
        """
        Args:
            in_channels: number of input channels.
            out_channels: number of output channels.
            stride: stride of the first convolution and of the shortcut.
            norm: a norm's name or a callable, see `detlib.layers.get_norm`.
        """
        super().__init__(in_channels, out_channels, stride)
        self.shortcut = _projection(in_channels, out_channels, norm=norm, stride=stride)
        self.conv1 = _normed_conv(in_channels, out_channels, 3, norm=norm, stride=stride)
        self.conv2 = _normed_conv(out_channels, out_channels, 3, norm=norm)

    def forward(self, x):
        """Map (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride)."""
        out = conv_relu(self.conv1, x)
        return conv_relu(self.conv2, out, x if self.shortcut is None else self.shortcut(x))


class BottleneckBlock(CNNBlockBase):
    """The residual block of ResNet-50 and deeper, and of ResNeXt: 1x1, 3x3, 1x1 convolutions, a shortcut."""

    def __init__(
        self,
        in_channels,
        out_channels,
        *,
        bottleneck_channels,
        stride=1,
        num_groups=1,
        norm="BN",
        stride_in_1x1=False,
        dilation=1,
    ):
        """
        Args:
            in_channels: number of input channels.
            out_channels: number of output channels.
            bottleneck_channels: number of channels of the 3x3 convolution.
            stride: stride of the block.
            num_groups: groups of the 3x3 convolution (32 or 64 in ResNeXt).
            norm: a norm's name or a callable, see `detlib.layers.get_norm`.
            stride_in_1x1: whether the stride is in the first 1x1 convolution (the original MSRA models,
                Caffe) or in the 3x3 convolution (torchvision, fb.resnet.torch, ResNeXt).
            dilation: dilation of the 3x3 convolution.
        """
        super().__init__(in_channels, out_channels, stride)
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.shortcut = _projection(in_channels, out_channels, norm=norm, stride=stride)
        self.conv1 = _normed_conv(in_channels, bottleneck_channels, 1, norm=norm, stride=stride_1x1)
        self.conv2 = _normed_conv(
            bottleneck_channels,
            bottleneck_channels,
            3,
            norm=norm,
            stride=stride_3x3,
            dilation=dilation,
            groups=num_groups,
        )
        self.conv3 = _normed_conv(bottleneck_channels, out_channels, 1, norm=norm)

    def forward(self, x):
        """Map (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride)."""
        out = conv_relu(self.conv1, x)
        out = conv_relu(self.conv2, out)
        return conv_relu(self.conv3, out, x if self.shortcut is None else self.shortcut(x))


class DeformBottleneckBlock(CNNBlockBase):
    """A bottleneck block with a deformable 3x3 convolution.

    Another 3x3 convolution, `conv2_offset`, predicts the sampling offsets. It is initialized to zero, so a
    new block computes the same as a `BottleneckBlock` with the same weights. In a modulated block the output
    of the 3x3 convolution is halved at first, as each modulation factor starts at 0.5.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        *,
        bottleneck_channels,
        stride=1,
        num_groups=1,
        norm="BN",
        stride_in_1x1=False,
        dilation=1,
        deform_modulated=False,
        deform_num_groups=1,
    ):
        """
        Args:
            in_channels, out_channels, bottleneck_channels, stride, num_groups, norm, stride_in_1x1,
                dilation: see `BottleneckBlock`.
            deform_modulated: whether each sampling position also has a factor in (0, 1), as in Deformable
                ConvNets v2.
            deform_num_groups: number of channel groups with separate offsets.
        """
        super().__init__(in_channels, out_channels, stride)
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.deform_modulated = deform_modulated
        self.shortcut = _projection(in_channels, out_channels, norm=norm, stride=stride)
        self.conv1 = _normed_conv(in_channels, bottleneck_channels, 1, norm=norm, stride=stride_1x1)
        self.num_taps = 9 * deform_num_groups
        self.conv2_offset = Conv2d(
            bottleneck_channels,
            self.num_taps * (3 if deform_modulated else 2),
            kernel_size=3,
            stride=stride_3x3,
            padding=dilation,
            dilation=dilation,
        )
        nn.init.zeros_(self.conv2_offset.weight)
        nn.init.zeros_(self.conv2_offset.bias)
        self.conv2 = _normed_conv(
            bottleneck_channels,
            bottleneck_channels,
            3,
            norm=norm,
            stride=stride_3x3,
            dilation=dilation,
            conv_class=ModulatedDeformConv if deform_modulated else DeformConv,
            groups=num_groups,
            deformable_groups=deform_num_groups,
        )
        self.conv3 = _normed_conv(bottleneck_channels, out_channels, 1, norm=norm)

    def forward(self, x):
        """Map (N, in_channels, H, W) to (N, out_channels, H/stride, W/stride)."""
        out = conv_relu(self.conv1, x)
        offset = self.conv2_offset(out)
        if self.deform_modulated:
            offset, mask = offset.split((2 * self.num_taps, self.num_taps), dim=1)
            out = self.conv2(out, offset, mask.sigmoid())
        else:
            out = self.conv2(out, offset)
        return conv_relu(self.conv3, F.relu_(out), x if self.shortcut is None else self.shortcut(x))


class ResNet(Backbone):
    """A stem followed by stages of residual blocks, which are named "res2", "res3" and so on."""

    def __init__(self, stem, stages, num_classes=None, out_features=None, freeze_at=0):
        """
        Args:
            stem: a module with the attributes `out_channels` and `stride`.
            stages: one list of blocks per stage; blocks are modules with `out_channels` and `stride`.
            num_classes: if given, add average pooling and a linear classifier after the last stage; its
                (N, num_classes) logits are the feature "linear".
            out_features: names of the features to return, from "stem", "res2", ..., "linear"; the last one by
                default. Stages after the last of them are dropped.
            freeze_at: see `freeze`.

        Raises:
            ValueError: there are no stages, a stage is empty, or an output feature is unknown.
        """
        super().__init__()
        if not stages or not all(len(blocks) for blocks in stages):
            raise ValueError(
                f"stages must be non-empty lists of blocks, got {[len(s) for s in stages]} blocks"
            )
        names = [f"res{i}" for i in range(2, 2 + len(stages))]
        known = ["stem", *names] + (["linear"] if num_classes is not None else [])
        out_features = [known[-1]] if out_features is None else list(out_features)
        unknown = [name for name in out_features if name not in known]
        if unknown or not out_features:
            raise ValueError(f"out_features {unknown or out_features} not among the features {known}")
        if "linear" not in out_features:  # the stages after the last feature would never be used
            last = max(known.index(name) for name in out_features)
            names, stages = names[:last], stages[:last]

        self.stem = stem
        self.num_classes = num_classes
        self.stage_names, self.stages = tuple(names), []
        channels, strides = {"stem": stem.out_channels}, {"stem": stem.stride}
        current_channels, current_stride = stem.out_channels, stem.stride
        for name, blocks in zip(names, stages):
            stage = nn.Sequential(*blocks)
            self.add_module(name, stage)
            self.stages.append(stage)
            for block in blocks:
                current_stride *= block.stride
            current_channels = blocks[-1].out_channels
            channels[name], strides[name] = current_channels, current_stride
        if num_classes is not None:
            self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
            self.linear = nn.Linear(current_channels, num_classes)
            # Section 5.1 of "Accurate, Large Minibatch SGD" (arXiv:1706.02677).
            nn.init.normal_(self.linear.weight, std=0.01)
            channels["linear"], strides["linear"] = num_classes, None
        self._out_features = out_features
        self._out_feature_channels = channels
        self._out_feature_strides = strides
        self.freeze(freeze_at)

    def forward(self, x):
        """Compute the features.

        Args:
            x: (N, C, H, W) float tensor of normalized images.

        Returns:
            dict[str, Tensor]: name to (N, C_f, H/stride, W/stride) feature map; "linear" is (N, num_classes).

        Raises:
            ValueError: `x` does not have four dimensions.
        """
        if x.dim() != 4:
            raise ValueError(f"ResNet takes an (N, C, H, W) tensor, got the shape {tuple(x.shape)}")
        outputs = {}
        x = self.stem(x)
        if "stem" in self._out_features:
            outputs["stem"] = x
        for name, stage in zip(self.stage_names, self.stages):
            x = stage(x)
            if name in self._out_features:
                outputs[name] = x
        if "linear" in self._out_features:
            outputs["linear"] = self.linear(self.avgpool(x).flatten(1))
        return outputs

    def freeze(self, freeze_at=0):
        """Freeze the first stages: fix their parameters and replace their batch norms by FrozenBN.

        Args:
            freeze_at: number of stages to freeze, the stem included: 0 for none, 1 for the stem, 2 for the
                stem and "res2", and so on.

        Returns:
            ResNet: self.
        """
        if freeze_at >= 1:
            self.stem.freeze()
        for stage in self.stages[: max(freeze_at - 1, 0)]:
            for block in stage.children():
                block.freeze()
        return self

    @staticmethod
    def make_stage(block_class, num_blocks, *, in_channels, out_channels, **kwargs):
        """Build the blocks of one stage.

        Args:
            block_class: a class such as `BottleneckBlock`, with arguments `in_channels` and `out_channels`.
            num_blocks: number of blocks.
            in_channels: input channels of the first block; the others have `out_channels`.
            out_channels: output channels of every block.
            **kwargs: other arguments of `block_class`, the same for all blocks; `NAME_per_block=[...]` gives
                each block its own value of the argument NAME.

        Returns:
            list[nn.Module]: the blocks.

        Raises:
            ValueError: a `_per_block` list does not have `num_blocks` entries, or NAME is given both ways.

        Example:
            Three blocks, of which the first halves the resolution::

                ResNet.make_stage(BottleneckBlock, 3, in_channels=256, out_channels=512,
                                  bottleneck_channels=128, stride_per_block=[2, 1, 1])
        """
        suffix = "_per_block"
        shared = {k: v for k, v in kwargs.items() if not k.endswith(suffix)}
        each = {k.removesuffix(suffix): v for k, v in kwargs.items() if k.endswith(suffix)}
        for name, values in each.items():
            if name in shared:
                raise ValueError(f"make_stage got both {name} and {name}{suffix}")
            if len(values) != num_blocks:
                raise ValueError(f"{name}{suffix} has {len(values)} entries for {num_blocks} blocks")
        blocks = []
        for i in range(num_blocks):
            own = {name: values[i] for name, values in each.items()}
            blocks.append(block_class(in_channels=in_channels, out_channels=out_channels, **own, **shared))
            in_channels = out_channels
        return blocks

    @staticmethod
    def make_default_stages(depth, block_class=None, **kwargs):
        """Build the four stages of a ResNet of the given depth.

        Args:
            depth: 18, 34, 50, 101 or 152.
            block_class: `BasicBlock` below depth 50 and `BottleneckBlock` otherwise, by default.
            **kwargs: other arguments of the block class, for all blocks (strides and channels excluded).

        Returns:
            list[list[nn.Module]]: the blocks of "res2" to "res5", for `ResNet(stages=...)`.

        Raises:
            ValueError: `depth` is unknown.
        """
        check_choice(depth, _BLOCKS_PER_STAGE, "depth")
        if block_class is None:
            block_class = BasicBlock if depth < 50 else BottleneckBlock
        if block_class is BasicBlock:
            # The block has no 1x1 convolution; ignoring the argument lets a config change `depth` alone.
            kwargs.pop("stride_in_1x1", None)
        return _make_all_stages(depth, lambda index: (block_class, kwargs))


def _make_all_stages(
    depth: int,
    block_of_stage: Callable[[int], tuple[type[nn.Module], dict[str, Any]]],
    *,
    in_channels: int = 64,
    out_channels: int | None = None,
    bottleneck_channels: int = 64,
    strides: Sequence[int] = (1, 2, 2, 2),
) -> list[list[nn.Module]]:
    """Build `len(strides)` stages; the number of channels doubles from stage to stage.

    Args:
        depth: a key of `_BLOCKS_PER_STAGE`.
        block_of_stage: maps the index of a stage to its block class and the class's other arguments.
        in_channels, out_channels, bottleneck_channels: channels of the first stage, as published by default.
        strides: stride of the first block of each stage.
    """
    if out_channels is None:
        out_channels = 64 if depth < 50 else 256
    stages = []
    for index, (num_blocks, stride) in enumerate(zip(_BLOCKS_PER_STAGE[depth], strides)):
        block_class, kwargs = block_of_stage(index)
        if depth >= 50:
            kwargs = {**kwargs, "bottleneck_channels": bottleneck_channels * 2**index}
        blocks = ResNet.make_stage(
            block_class,
            num_blocks,
            in_channels=in_channels,
            out_channels=out_channels * 2**index,
            stride_per_block=[stride] + [1] * (num_blocks - 1),
            **kwargs,
        )
        stages.append(blocks)
        in_channels = out_channels * 2**index
    return stages


def _make_stages(
    depth: int = 50,
    norm: str = "FrozenBN",
    num_groups: int = 1,
    width_per_group: int = 64,
    in_channels: int = 64,
    out_channels: int | None = None,
    stride_in_1x1: bool = False,
    res5_dilation: int = 1,
    deform_on_per_stage: Sequence[bool] = (False, False, False, False),
    deform_modulated: bool = False,
    deform_num_groups: int = 1,
    *,
    num_stages: int = 4,
) -> list[list[nn.Module]]:
    """Build the first `num_stages` stages of a ResNet or ResNeXt; see `make_stage`."""
    _check_stages(depth, num_groups, out_channels, res5_dilation, deform_on_per_stage)

    def block_of_stage(index):
        if depth < 50:
            return BasicBlock, {"norm": norm}
        kwargs = {
            "norm": norm,
            "stride_in_1x1": stride_in_1x1,
            "dilation": res5_dilation if index == 3 else 1,
            "num_groups": num_groups,
        }
        if not deform_on_per_stage[index]:
            return BottleneckBlock, kwargs
        kwargs |= {"deform_modulated": deform_modulated, "deform_num_groups": deform_num_groups}
        return DeformBottleneckBlock, kwargs

    # Dilation replaces the stride, so a dilated stage keeps the resolution.
    strides = (1, 2, 2, 1 if res5_dilation > 1 else 2)
    return _make_all_stages(
        depth,
        block_of_stage,
        in_channels=in_channels,
        out_channels=out_channels,
        bottleneck_channels=num_groups * width_per_group,
        strides=strides[:num_stages],
    )


def make_stage(*args, **kwargs):
    """Build the four stages of a ResNet, or the blocks of one stage.

    If the first argument is a block class, this is `ResNet.make_stage`. Otherwise it builds all stages like
    `ResNet.make_default_stages`, with support for dilation, groups and deformable convolutions::

        stages=L(make_stage)(depth=50, stride_in_1x1=False, norm="FrozenBN", res5_dilation=2)  # DC5

    Args:
        depth: 18, 34, 50, 101 or 152. Default: 50.
        norm: a norm's name or a callable, see `detlib.layers.get_norm`. Default: "FrozenBN".
        num_groups: groups of the 3x3 convolutions, 32 or 64 in ResNeXt. Default: 1.
        width_per_group: channels of each group in "res2". Default: 64.
        in_channels: output channels of the stem. Default: 64.
        out_channels: channels of "res2"; they double from stage to stage. Default: 256, or 64 for depths 18
            and 34.
        stride_in_1x1: see `BottleneckBlock`; ignored for depths 18 and 34. Default: False.
        res5_dilation: 1, or 2 to keep "res5" at stride 16. Default: 1.
        deform_on_per_stage: whether the 3x3 convolutions are deformable, for each of the four stages.
            Default: none of them.
        deform_modulated, deform_num_groups: see `DeformBottleneckBlock`. Default: False, 1.

    Returns:
        list[list[nn.Module]]: the blocks of "res2" to "res5", for `ResNet(stages=...)`; or the blocks of one
        stage.

    Raises:
        ValueError: the depth is unknown, or arguments contradict each other.
    """
    if "block_class" in kwargs or (args and callable(args[0])):
        return ResNet.make_stage(*args, **kwargs)
    return _make_stages(*args, **kwargs)


def _check_stages(
    depth: int,
    num_groups: int,
    out_channels: int | None,
    res5_dilation: int,
    deform_on_per_stage: Sequence[bool],
    names: Mapping[str, str] | None = None,
) -> None:
    """Raise ValueError if these arguments of `make_stage` describe a network that does not exist.

    `names` maps arguments to their names in messages, such as their config keys.
    """
    names = names or {}

    def call(name):
        return names.get(name, name)

    check_choice(depth, _BLOCKS_PER_STAGE, call("depth"))
    check_choice(res5_dilation, (1, 2), call("res5_dilation"))
    if len(deform_on_per_stage) != len(_STAGE_NAMES):
        raise ValueError(
            f"{call('deform_on_per_stage')} is {list(deform_on_per_stage)}; it needs one flag for each of "
            f"{', '.join(_STAGE_NAMES)}"
        )
    if depth >= 50:
        return
    needed = (
        ("out_channels", out_channels, 64),
        ("num_groups", num_groups, 1),
        ("res5_dilation", res5_dilation, 1),
    )
    for name, value, legal in needed:
        if value is not None and value != legal:
            raise ValueError(f"{call(name)} is {value!r}, but {call('depth')} {depth} needs {legal}")
    if any(deform_on_per_stage):
        raise ValueError(
            f"{call('deform_on_per_stage')} is {list(deform_on_per_stage)}, but {call('depth')} "
            f"{depth} has no bottleneck blocks; deformable convolutions need depth 50, 101 or 152"
        )


def _check_config(resnets) -> None:
    """Raise ValueError that names the key if `cfg.MODEL.RESNETS` describes a network that does not exist."""
    where = "MODEL.RESNETS"
    names = ("depth", "num_groups", "res5_dilation", "deform_on_per_stage")
    keys = {name: f"{where}.{name.upper()}" for name in names}
    keys["out_channels"] = f"{where}.RES2_OUT_CHANNELS"
    _check_stages(
        resnets.DEPTH,
        resnets.NUM_GROUPS,
        resnets.RES2_OUT_CHANNELS,
        resnets.RES5_DILATION,
        resnets.DEFORM_ON_PER_STAGE,
        keys,
    )
    check_norm(resnets.NORM, f"{where}.NORM")
    check_features(resnets.OUT_FEATURES, ("stem", *_STAGE_NAMES), f"{where}.OUT_FEATURES", "a ResNet")


@BACKBONE_REGISTRY.register()
def build_resnet_backbone(cfg, input_shape):
    """Build a ResNet from `cfg.MODEL.RESNETS` and `cfg.MODEL.BACKBONE.FREEZE_AT`.

    Args:
        cfg: the full config.
        input_shape: `ShapeSpec` with the number of image channels.

    Returns:
        ResNet: the network up to the last of `MODEL.RESNETS.OUT_FEATURES`.

    Raises:
        ValueError: values are illegal or contradict each other; the message names the key.
    """
    resnets = cfg.MODEL.RESNETS
    _check_config(resnets)
    stem = BasicStem(input_shape.channels, resnets.STEM_OUT_CHANNELS, resnets.NORM)
    num_stages = max([1] + [_STAGE_NAMES.index(f) + 1 for f in resnets.OUT_FEATURES if f != "stem"])
    stages = _make_stages(
        resnets.DEPTH,
        resnets.NORM,
        resnets.NUM_GROUPS,
        resnets.WIDTH_PER_GROUP,
        stem.out_channels,
        resnets.RES2_OUT_CHANNELS,
        resnets.STRIDE_IN_1X1,
        resnets.RES5_DILATION,
        resnets.DEFORM_ON_PER_STAGE,
        resnets.DEFORM_MODULATED,
        resnets.DEFORM_NUM_GROUPS,
        num_stages=num_stages,
    )
    return ResNet(stem, stages, out_features=resnets.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)
