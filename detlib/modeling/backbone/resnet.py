"""ResNet and ResNeXt, 18 to 152 layers deep (arXiv:1512.03385, arXiv:1611.05431)."""

from torch import nn

from detlib.modeling.backbone.backbone import Backbone
from detlib.modeling.backbone.build import BACKBONE_REGISTRY
from detlib.modeling.backbone.resnet_blocks import (
    BasicBlock,
    BasicStem,
    BottleneckBlock,
    DeformBottleneckBlock,
    ResNetBlockBase,
)
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


class ResNet(Backbone):
    """A stem followed by stages of residual blocks, named "res2", "res3" and so on."""

    def __init__(self, stem, stages, num_classes=None, out_features=None, freeze_at=0):
        """
        Args:
            stem: a module with the attributes `out_channels` and `stride`.
            stages: for each stage the list of its blocks, modules with `out_channels` and `stride`.
            num_classes: if given, a linear classifier over the average of the last stage is added, and its
                (N, num_classes) scores are the feature "linear".
            out_features: names of the features to return, from "stem", "res2", ..., "linear"; by default
                the last one there is. Stages behind the last of them are not kept.
            freeze_at: see `freeze`.

        Raises:
            ValueError: no stages, an empty stage, or an out feature that does not exist.
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
        if "linear" not in out_features:  # what lies behind the last feature would never be used
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
            x: (N, C, H, W) float tensor, normalised pictures.

        Returns:
            dict[str, Tensor]: (N, C_f, H/stride, W/stride) maps by name, and (N, num_classes) scores
            as "linear" where asked for.

        Raises:
            ValueError: `x` has not four dimensions.
        """
        if x.dim() != 4:
            raise ValueError(f"ResNet takes a (N, C, H, W) tensor, got the shape {tuple(x.shape)}")
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
        """Stop the first parts from training: their parameters, and their batch norms become FrozenBN.

        Args:
            freeze_at: how many parts: 0 none, 1 the stem, 2 the stem and "res2", and so on.

        Returns:
            ResNet: itself.
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
            block_class: a class such as `BottleneckBlock`, with `in_channels` and `out_channels`.
            num_blocks: how many.
            in_channels: channels that go into the first block; the others take `out_channels`.
            out_channels: channels that come out of every block.
            **kwargs: further arguments of `block_class`, the same for all blocks; `NAME_per_block=[...]`
                gives the argument NAME a value for each block.

        Returns:
            list[nn.Module]: the blocks.

        Raises:
            ValueError: a `_per_block` list of another length than `num_blocks`, or NAME given both ways.

        Example: a stage of three blocks, the first of which halves the resolution::

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
            block_class: by default `BasicBlock` below depth 50, else `BottleneckBlock`.
            **kwargs: further arguments of the block class for all blocks (not strides or channels).

        Returns:
            list[list[nn.Module]]: the blocks of "res2" to "res5", for `ResNet(stages=...)`.

        Raises:
            ValueError: an unknown depth.
        """
        check_choice(depth, _BLOCKS_PER_STAGE, "depth")
        if block_class is None:
            block_class = BasicBlock if depth < 50 else BottleneckBlock
        if block_class is BasicBlock:
            kwargs.pop("stride_in_1x1", None)  # it has no 1x1 convolution; so that depth alone can be changed
        in_channels, expansion = 64, 1 if depth < 50 else 4
        stages = []
        for i, num_blocks in enumerate(_BLOCKS_PER_STAGE[depth]):
            width = 64 * 2**i
            if depth >= 50:
                kwargs["bottleneck_channels"] = width
            stride = 1 if i == 0 else 2
            stages.append(
                ResNet.make_stage(
                    block_class,
                    num_blocks,
                    stride_per_block=[stride] + [1] * (num_blocks - 1),
                    in_channels=in_channels,
                    out_channels=width * expansion,
                    **kwargs,
                )
            )
            in_channels = width * expansion
        return stages


make_stage = ResNet.make_stage


def _check_config(resnets) -> None:
    """Raise ValueError, naming the key, where `cfg.MODEL.RESNETS` asks for a network that does not exist."""
    where = "MODEL.RESNETS"
    check_choice(resnets.DEPTH, _BLOCKS_PER_STAGE, f"{where}.DEPTH")
    check_choice(resnets.RES5_DILATION, (1, 2), f"{where}.RES5_DILATION")
    check_norm(resnets.NORM, f"{where}.NORM")
    if len(resnets.DEFORM_ON_PER_STAGE) != len(_STAGE_NAMES):
        raise ValueError(
            f"{where}.DEFORM_ON_PER_STAGE is {list(resnets.DEFORM_ON_PER_STAGE)}; it needs a flag for each "
            f"of {', '.join(_STAGE_NAMES)}"
        )
    check_features(resnets.OUT_FEATURES, ("stem", *_STAGE_NAMES), f"{where}.OUT_FEATURES", "a ResNet")
    if resnets.DEPTH < 50:
        needed = {"RES2_OUT_CHANNELS": 64, "NUM_GROUPS": 1, "RES5_DILATION": 1}
        for key, value in needed.items():
            if resnets[key] != value:
                raise ValueError(
                    f"{where}.{key} is {resnets[key]!r}, but {where}.DEPTH {resnets.DEPTH} needs {value}"
                )
        if any(resnets.DEFORM_ON_PER_STAGE):
            raise ValueError(
                f"{where}.DEFORM_ON_PER_STAGE is {list(resnets.DEFORM_ON_PER_STAGE)}, but {where}.DEPTH "
                f"{resnets.DEPTH} has no bottleneck blocks to make deformable; depths 50, 101 and 152 have"
            )


def _stage_from_config(resnets, index: int, in_channels: int):
    """The blocks of stage `index` (0 is "res2") as `cfg.MODEL.RESNETS` describes it."""
    num_blocks = _BLOCKS_PER_STAGE[resnets.DEPTH][index]
    dilation = resnets.RES5_DILATION if index == 3 else 1
    # A dilated stage keeps the resolution: the dilation stands in for the stride.
    first_stride = 1 if index == 0 or dilation > 1 else 2
    kwargs = {
        "in_channels": in_channels,
        "out_channels": resnets.RES2_OUT_CHANNELS * 2**index,
        "stride_per_block": [first_stride] + [1] * (num_blocks - 1),
        "norm": resnets.NORM,
    }
    if resnets.DEPTH < 50:
        return ResNet.make_stage(BasicBlock, num_blocks, **kwargs)
    block_class = BottleneckBlock
    if resnets.DEFORM_ON_PER_STAGE[index]:
        block_class = DeformBottleneckBlock
        kwargs["deform_modulated"] = resnets.DEFORM_MODULATED
        kwargs["deform_num_groups"] = resnets.DEFORM_NUM_GROUPS
    return ResNet.make_stage(
        block_class,
        num_blocks,
        bottleneck_channels=resnets.NUM_GROUPS * resnets.WIDTH_PER_GROUP * 2**index,
        stride_in_1x1=resnets.STRIDE_IN_1X1,
        dilation=dilation,
        num_groups=resnets.NUM_GROUPS,
        **kwargs,
    )


@BACKBONE_REGISTRY.register()
def build_resnet_backbone(cfg, input_shape):
    """Build a ResNet from `cfg.MODEL.RESNETS` and `cfg.MODEL.BACKBONE.FREEZE_AT`.

    Args:
        cfg: the whole config.
        input_shape: a `ShapeSpec` with the channels of the picture.

    Returns:
        ResNet: with the stages up to the last of `MODEL.RESNETS.OUT_FEATURES`.

    Raises:
        ValueError: a key with an illegal value, or values that do not go together; the key is named.
    """
    resnets = cfg.MODEL.RESNETS
    _check_config(resnets)
    stem = BasicStem(input_shape.channels, resnets.STEM_OUT_CHANNELS, resnets.NORM)
    num_stages = max([0] + [_STAGE_NAMES.index(f) + 1 for f in resnets.OUT_FEATURES if f != "stem"])
    stages, in_channels = [], stem.out_channels
    for index in range(max(num_stages, 1)):
        stages.append(_stage_from_config(resnets, index, in_channels))
        in_channels = stages[-1][-1].out_channels
    return ResNet(stem, stages, out_features=resnets.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)
