"""Feature Pyramid Network (arXiv:1612.03144), with the extra levels of RetinaNet (arXiv:1708.02002)."""

from torch import nn
from torch.nn import functional as F

from detlib.layers import Conv2d, ShapeSpec, get_norm
from detlib.layers.fvcore_nn import weight_init
from detlib.modeling.backbone.backbone import Backbone
from detlib.modeling.backbone.build import BACKBONE_REGISTRY
from detlib.modeling.backbone.resnet import build_resnet_backbone
from detlib.modeling.config_checks import check_choice, check_features, check_norm, config_keys

__all__ = [
    "FPN",
    "LastLevelMaxPool",
    "LastLevelP6P7",
    "build_resnet_fpn_backbone",
    "build_retinanet_resnet_fpn_backbone",
    "fpn_from_config",
]


def _pyramid_conv(in_channels, out_channels, kernel_size, norm=""):
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size=kernel_size,
        padding=kernel_size // 2,
        bias=norm == "",
        norm=get_norm(norm, out_channels),
    )
    weight_init.c2_xavier_fill(conv)
    return conv


def _level(name: str, stride: int) -> int:
    """Return log2 of a stride, which is the number in "p2" to "p7"."""
    if stride < 1 or stride & (stride - 1):
        raise ValueError(f"FPN needs strides that are powers of two; the feature {name!r} has {stride}")
    return stride.bit_length() - 1


class FPN(Backbone):
    """A feature pyramid: a top-down pathway with lateral connections to the features of another backbone.

    The features are named by their level: "p2" has stride 2**2, "p6" has stride 2**6.
    """

    def __init__(
        self, bottom_up, in_features, out_channels, norm="", top_block=None, fuse_type="sum", square_pad=0
    ):
        """
        Args:
            bottom_up: the `Backbone` below the pyramid.
            in_features: names of its features to use, from high to low resolution; each stride must be twice
                the previous one.
            out_channels: channels of every output level.
            norm: norm of the lateral and output convolutions, see `detlib.layers.get_norm`; convolutions with
                a norm have no bias.
            top_block: a module that computes additional, coarser levels from one feature and returns them as
                a list. Its attributes are `num_levels` and `in_feature`, the name of a feature of the
                bottom-up network or the pyramid (of the pyramid only if its attribute `of_pyramid` is True).
            fuse_type: "sum" or "avg" of the lateral and the top-down feature map.
            square_pad: if above 0, images are padded to squares of this side length, in pixels.

        Raises:
            ValueError: a feature or the fuse type is unknown, or the strides do not double.
        """
        super().__init__()
        shapes = bottom_up.output_shape()
        unknown = [name for name in in_features if name not in shapes]
        if unknown or not in_features:
            raise ValueError(f"FPN in_features {list(in_features)}: the bottom-up network has {list(shapes)}")
        if fuse_type not in ("sum", "avg"):
            raise ValueError(f"FPN fuse_type is {fuse_type!r}; legal are 'sum' and 'avg'")
        levels = [_level(name, shapes[name].stride) for name in in_features]
        if any(b != a + 1 for a, b in zip(levels, levels[1:])):
            strides = [shapes[name].stride for name in in_features]
            raise ValueError(f"FPN in_features must double in stride one by one, got {strides}")

        lateral_convs, output_convs = [], []
        for level, name in zip(levels, in_features):
            lateral = _pyramid_conv(shapes[name].channels, out_channels, 1, norm)
            output = _pyramid_conv(out_channels, out_channels, 3, norm)
            self.add_module(f"fpn_lateral{level}", lateral)
            self.add_module(f"fpn_output{level}", output)
            lateral_convs.append(lateral)
            output_convs.append(output)
        self.lateral_convs, self.output_convs = lateral_convs[::-1], output_convs[::-1]  # top-down order
        self.top_block = top_block
        self.in_features = tuple(in_features)
        self.bottom_up = bottom_up
        if top_block is not None:
            levels += range(levels[-1] + 1, levels[-1] + 1 + top_block.num_levels)
        self._out_features = [f"p{level}" for level in levels]
        self._out_feature_strides = {f"p{level}": 2**level for level in levels}
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)
        self._size_divisibility = shapes[in_features[-1]].stride
        self._square_pad = square_pad
        self._fuse_type = fuse_type

    @property
    def size_divisibility(self) -> int:
        """The stride of the coarsest bottom-up feature map; each map is twice the size of the next."""
        return self._size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        """{"square_size": side length in pixels, 0 for none}."""
        return {"square_size": self._square_pad}

    def forward(self, x):
        """Compute the feature pyramid.

        Args:
            x: input of the bottom-up network, (N, C, H, W) images.

        Returns:
            dict[str, Tensor]: name to (N, out_channels, H/stride, W/stride) feature map, high to low
            resolution.
        """
        features = self.bottom_up(x)
        merged = None
        results: list = []
        for name, lateral, output in zip(self.in_features[::-1], self.lateral_convs, self.output_convs):
            current = lateral(features[name])
            if merged is not None:
                up = F.interpolate(merged, scale_factor=2.0, mode="nearest")
                # Odd sizes are rounded up on the way down. Images padded to `size_divisibility` lose nothing.
                current += up[..., : current.shape[-2], : current.shape[-1]]
                if self._fuse_type == "avg":
                    current /= 2
            merged = current
            results.insert(0, output(merged))
        if self.top_block is not None:
            of_pyramid = getattr(self.top_block, "of_pyramid", False)
            source = None if of_pyramid else features.get(self.top_block.in_feature)
            if source is None:
                source = results[self._out_features.index(self.top_block.in_feature)]
            results.extend(self.top_block(source))
        return dict(zip(self._out_features, results, strict=True))


class LastLevelMaxPool(nn.Module):
    """The level "p6" of Faster R-CNN with FPN: every second pixel of "p5"."""

    def __init__(self):
        super().__init__()
        self.num_levels = 1
        self.in_feature, self.of_pyramid = "p5", True

    def forward(self, x):
        """Map (N, C, H, W) to a list with one (N, C, ceil(H/2), ceil(W/2)) feature map."""
        return [F.max_pool2d(x, kernel_size=1, stride=2, padding=0)]


class LastLevelP6P7(nn.Module):
    """The levels "p6" and "p7" of RetinaNet, by strided convolutions."""

    def __init__(self, in_channels, out_channels, in_feature="res5"):
        """
        Args:
            in_channels: channels of `in_feature`.
            out_channels: channels of both levels.
            in_feature: name of the input feature.
        """
        super().__init__()
        self.num_levels = 2
        self.in_feature = in_feature
        self.p6 = nn.Conv2d(in_channels, out_channels, 3, 2, 1)
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, 2, 1)
        for conv in (self.p6, self.p7):
            weight_init.c2_xavier_fill(conv)

    def forward(self, c5):
        """Map (N, in_channels, H, W) to two feature maps of half and a quarter of the size."""
        p6 = self.p6(c5)
        return [p6, self.p7(F.relu(p6))]


_RESNET_FEATURES = "the bottom-up network (MODEL.RESNETS.OUT_FEATURES)"


def fpn_from_config(
    cfg, bottom_up: Backbone, top_block: nn.Module | None, giver: str = _RESNET_FEATURES
) -> FPN:
    """Build an FPN from `cfg.MODEL.FPN`.

    Args:
        cfg: the full config.
        bottom_up: the backbone below the pyramid.
        top_block: see `FPN`.
        giver: name of `bottom_up` for messages, with the config key of its output features.

    Raises:
        ValueError: a value is illegal; the message names the key.
    """
    fpn = cfg.MODEL.FPN
    check_features(fpn.IN_FEATURES, bottom_up.output_shape(), "MODEL.FPN.IN_FEATURES", giver)
    check_norm(fpn.NORM, "MODEL.FPN.NORM")
    check_choice(fpn.FUSE_TYPE, ("sum", "avg"), "MODEL.FPN.FUSE_TYPE")
    with config_keys("MODEL.FPN.IN_FEATURES", "MODEL.FPN.NORM", "MODEL.FPN.OUT_CHANNELS"):
        return FPN(
            bottom_up=bottom_up,
            in_features=fpn.IN_FEATURES,
            out_channels=fpn.OUT_CHANNELS,
            norm=fpn.NORM,
            top_block=top_block,
            fuse_type=fpn.FUSE_TYPE,
        )


def retinanet_fpn_from_config(cfg, bottom_up: Backbone, giver: str) -> FPN:
    """Build an FPN with RetinaNet's "p6" and "p7", computed from the last of `cfg.MODEL.FPN.IN_FEATURES`.

    Args:
        cfg, bottom_up, giver: see `fpn_from_config`.
    """
    shapes, names = bottom_up.output_shape(), cfg.MODEL.FPN.IN_FEATURES
    last = names[-1] if names and names[-1] in shapes else next(reversed(shapes))
    top_block = LastLevelP6P7(shapes[last].channels, cfg.MODEL.FPN.OUT_CHANNELS, in_feature=last)
    return fpn_from_config(cfg, bottom_up, top_block, giver)


@BACKBONE_REGISTRY.register()
def build_resnet_fpn_backbone(cfg, input_shape: ShapeSpec):
    """Build a ResNet with FPN and `LastLevelMaxPool` from `cfg.MODEL.RESNETS` and `cfg.MODEL.FPN`.

    Args:
        cfg: the full config.
        input_shape: `ShapeSpec` with the number of image channels.

    Returns:
        FPN: the backbone.
    """
    return fpn_from_config(cfg, build_resnet_backbone(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_resnet_fpn_backbone(cfg, input_shape: ShapeSpec):
    """Build a ResNet with FPN and RetinaNet's "p6" and "p7", computed from "res5".

    Args:
        cfg: the full config.
        input_shape: `ShapeSpec` with the number of image channels.

    Returns:
        FPN: the backbone.

    Raises:
        ValueError: `cfg.MODEL.RESNETS.OUT_FEATURES` does not contain "res5".
    """
    bottom_up = build_resnet_backbone(cfg, input_shape)
    shapes = bottom_up.output_shape()
    if "res5" not in shapes:
        raise ValueError(f"MODEL.RESNETS.OUT_FEATURES must contain 'res5' for p6 and p7, got {list(shapes)}")
    top_block = LastLevelP6P7(shapes["res5"].channels, cfg.MODEL.FPN.OUT_CHANNELS)
    return fpn_from_config(cfg, bottom_up, top_block)
