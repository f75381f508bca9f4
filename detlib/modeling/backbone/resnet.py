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
from detlib.modeling.backbone.resnet_stages import (
    STAGE_NAMES,
    check_stages,
    make_blocks,
    make_default_stages,
    make_stage,
    make_stages,
)
from detlib.modeling.config_checks import check_features, check_norm

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
        return make_blocks(
            block_class, num_blocks, in_channels=in_channels, out_channels=out_channels, **kwargs
        )

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
        return make_default_stages(depth, block_class, **kwargs)


def _check_config(resnets) -> None:
    """Raise ValueError, naming the key, where `cfg.MODEL.RESNETS` asks for a network that does not exist."""
    where = "MODEL.RESNETS"
    keys = {"out_channels": f"{where}.RES2_OUT_CHANNELS"}
    keys |= {
        name: f"{where}.{name.upper()}"
        for name in ("depth", "num_groups", "res5_dilation", "deform_on_per_stage")
    }
    check_stages(
        resnets.DEPTH,
        resnets.NUM_GROUPS,
        resnets.RES2_OUT_CHANNELS,
        resnets.RES5_DILATION,
        resnets.DEFORM_ON_PER_STAGE,
        keys,
    )
    check_norm(resnets.NORM, f"{where}.NORM")
    check_features(resnets.OUT_FEATURES, ("stem", *STAGE_NAMES), f"{where}.OUT_FEATURES", "a ResNet")


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
    num_stages = max([1] + [STAGE_NAMES.index(f) + 1 for f in resnets.OUT_FEATURES if f != "stem"])
    stages = make_stages(
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
