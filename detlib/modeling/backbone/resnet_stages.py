"""The stages of ResNets: lists of residual blocks, from their dimensions or from the depth alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from detlib.modeling.backbone.resnet_blocks import BasicBlock, BottleneckBlock, DeformBottleneckBlock
from detlib.modeling.config_checks import check_choice

__all__ = [
    "BLOCKS_PER_STAGE",
    "STAGE_NAMES",
    "check_stages",
    "make_blocks",
    "make_default_stages",
    "make_stage",
    "make_stages",
]

BLOCKS_PER_STAGE = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
STAGE_NAMES = ("res2", "res3", "res4", "res5")


def make_blocks(block_class, num_blocks, *, in_channels, out_channels, **kwargs) -> list[nn.Module]:
    """The blocks of one stage; see `ResNet.make_stage`."""
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


def _make_all(
    depth: int,
    kind_of: Callable[[int], tuple[type[nn.Module], dict[str, Any]]],
    *,
    in_channels: int = 64,
    out_channels: int | None = None,
    bottleneck_channels: int = 64,
    strides: Sequence[int] = (1, 2, 2, 2),
) -> list[list[nn.Module]]:
    """As many stages as there are `strides`, each of twice as many channels as the one before.

    Args:
        depth: a key of `BLOCKS_PER_STAGE`.
        kind_of: from a stage's number to the class of its blocks and further arguments of theirs.
        in_channels, out_channels, bottleneck_channels: those of the first stage; by default the published
            ones.
        strides: of each stage's first block.
    """
    if out_channels is None:
        out_channels = 64 if depth < 50 else 256
    stages = []
    for index, (num_blocks, stride) in enumerate(zip(BLOCKS_PER_STAGE[depth], strides)):
        block_class, kwargs = kind_of(index)
        if depth >= 50:
            kwargs = {**kwargs, "bottleneck_channels": bottleneck_channels * 2**index}
        blocks = make_blocks(
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


def make_default_stages(depth, block_class=None, **kwargs) -> list[list[nn.Module]]:
    """The four stages of a ResNet of the given depth; see `ResNet.make_default_stages`."""
    check_choice(depth, BLOCKS_PER_STAGE, "depth")
    if block_class is None:
        block_class = BasicBlock if depth < 50 else BottleneckBlock
    if block_class is BasicBlock:
        kwargs.pop("stride_in_1x1", None)  # it has no 1x1 convolution; so that depth alone can be changed
    return _make_all(depth, lambda index: (block_class, kwargs))


def make_stages(
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
    """The first `num_stages` stages of a ResNet or ResNeXt; see `make_stage`."""
    check_stages(depth, num_groups, out_channels, res5_dilation, deform_on_per_stage)

    def kind_of(index):
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

    # A dilated stage keeps the resolution: the dilation stands in for the stride.
    strides = (1, 2, 2, 1 if res5_dilation > 1 else 2)
    return _make_all(
        depth,
        kind_of,
        in_channels=in_channels,
        out_channels=out_channels,
        bottleneck_channels=num_groups * width_per_group,
        strides=strides[:num_stages],
    )


def check_stages(
    depth: int,
    num_groups: int,
    out_channels: int | None,
    res5_dilation: int,
    deform_on_per_stage: Sequence[bool],
    names: Mapping[str, str] | None = None,
) -> None:
    """Raise ValueError where the arguments ask for a network that does not exist.

    Args:
        depth, num_groups, out_channels, res5_dilation, deform_on_per_stage: those of `make_stage`.
        names: what to call an argument in messages, such as its config key; by default its own name.
    """
    names = names or {}

    def call(name):
        return names.get(name, name)

    check_choice(depth, BLOCKS_PER_STAGE, call("depth"))
    check_choice(res5_dilation, (1, 2), call("res5_dilation"))
    if len(deform_on_per_stage) != len(STAGE_NAMES):
        raise ValueError(
            f"{call('deform_on_per_stage')} is {list(deform_on_per_stage)}; it needs a flag for each "
            f"of {', '.join(STAGE_NAMES)}"
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
            f"{depth} has no bottleneck blocks to make deformable; depths 50, 101 and 152 have"
        )


def make_stage(*args, **kwargs):
    """Build the four stages of a ResNet, or the blocks of one stage.

    Called with a block class first, it is `ResNet.make_stage`. Otherwise it makes all stages of a network, as
    `ResNet.make_default_stages` does, but with dilation, groups and deformable convolutions::

        stages=L(make_stage)(depth=50, stride_in_1x1=False, norm="FrozenBN", res5_dilation=2)  # DC5

    Args:
        depth: 18, 34, 50 (default), 101 or 152.
        norm: a norm's name or a callable, see `detlib.layers.get_norm`; "FrozenBN" by default.
        num_groups: groups of the 3x3 convolutions (1; ResNeXt has 32 or 64).
        width_per_group: channels of each group in "res2" (64).
        in_channels: channels that the stem gives (64).
        out_channels: channels of "res2"; each later stage has twice as many as the one before. By default
            256, and 64 for depths 18 and 34.
        stride_in_1x1: as in `BottleneckBlock` (False); without effect on depths 18 and 34.
        res5_dilation: 2 keeps "res5" at stride 16 (1).
        deform_on_per_stage: for each of the four stages whether its 3x3 convolutions are deformable (none).
        deform_modulated, deform_num_groups: as in `DeformBottleneckBlock` (False, 1).

    Returns:
        list[list[nn.Module]]: the blocks of "res2" to "res5", for `ResNet(stages=...)`; or the blocks of one
        stage.

    Raises:
        ValueError: an unknown depth, or arguments that do not go together.
    """
    if "block_class" in kwargs or (args and callable(args[0])):
        return make_blocks(*args, **kwargs)
    return make_stages(*args, **kwargs)
