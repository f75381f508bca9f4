"""The simple feature pyramid of ViTDet (arXiv:2203.16527), and its layer-wise learning rates."""

from torch import nn

from detlib.layers import Conv2d, get_norm
from detlib.modeling.backbone.backbone import Backbone

__all__ = ["SimpleFeaturePyramid", "get_vit_lr_decay_rate"]


def _rescale(scale: float, dim: int, norm) -> tuple[list[nn.Module], int]:
    """The layers that make a map of `dim` channels `scale` times as large, and the channels it then has."""
    if scale == 4.0:
        # Without a norm an identity keeps the positions in the sequence, and so the parameters' names.
        between = get_norm(norm, dim // 2) or nn.Identity()
        up = nn.ConvTranspose2d(dim // 2, dim // 4, kernel_size=2, stride=2)
        return [nn.ConvTranspose2d(dim, dim // 2, kernel_size=2, stride=2), between, nn.GELU(), up], dim // 4
    if scale == 2.0:
        return [nn.ConvTranspose2d(dim, dim // 2, kernel_size=2, stride=2)], dim // 2
    if scale == 1.0:
        return [], dim
    if scale == 0.5:
        return [nn.MaxPool2d(kernel_size=2, stride=2)], dim
    raise ValueError(f"SimpleFeaturePyramid scale_factors may hold 4.0, 2.0, 1.0 and 0.5; got {scale}")


def _project(in_channels: int, out_channels: int, norm) -> list[nn.Module]:
    """A 1x1 and a 3x3 convolution to `out_channels`, each with its norm."""

    def conv(channels, kernel_size):
        return Conv2d(
            channels,
            out_channels,
            kernel_size=kernel_size,
            padding=kernel_size // 2,
            bias=not norm,
            norm=get_norm(norm, out_channels),
        )

    return [conv(in_channels, 1), conv(out_channels, 3)]


class SimpleFeaturePyramid(Backbone):
    """A pyramid out of one feature map, each level computed from it alone.

    The features are named by their level: "p2" has stride 2**2, "p6" stride 2**6.
    """

    def __init__(self, net, in_feature, out_channels, scale_factors, top_block=None, norm="LN", square_pad=0):
        """
        Args:
            net: the `Backbone` whose feature goes in.
            in_feature: name of that feature.
            out_channels: channels of every level.
            scale_factors: the sizes of the levels as multiples of the feature's, out of 4, 2, 1 and 0.5,
                high to low resolution, each half the last.
            top_block: a module that makes further, coarser levels, see `FPN`.
            norm: norm of the convolutions, see `detlib.layers.get_norm`; without one they have a bias.
            square_pad: if above 0, pictures are padded to squares of this side, in pixels.

        Raises:
            ValueError: a feature that does not exist, scale factors that are not as above, or strides that
                are not powers of two.
        """
        super().__init__()
        shapes = net.output_shape()
        if in_feature not in shapes:
            raise ValueError(
                f"SimpleFeaturePyramid in_feature {in_feature!r}: the network has {list(shapes)}"
            )
        dim, stride = shapes[in_feature].channels, shapes[in_feature].stride
        strides = [int(stride / scale) for scale in scale_factors]
        if not strides or any(b != 2 * a for a, b in zip(strides, strides[1:])):
            raise ValueError(
                "SimpleFeaturePyramid scale_factors must go from high to low resolution, each half the last; "
                f"got {list(scale_factors)}"
            )
        if strides[0] < 1 or strides[0] & (strides[0] - 1):
            raise ValueError(
                f"SimpleFeaturePyramid needs strides that are powers of two; {in_feature!r} of stride "
                f"{stride} and scale_factors {list(scale_factors)} give {strides}"
            )

        levels = [stride.bit_length() - 1 for stride in strides]
        self.stages = []
        for level, scale in zip(levels, scale_factors):
            layers, channels = _rescale(scale, dim, norm)
            stage = nn.Sequential(*layers, *_project(channels, out_channels, norm))
            self.add_module(f"simfp_{level}", stage)
            self.stages.append(stage)
        self.net = net
        self.in_feature = in_feature
        self.top_block = top_block
        if top_block is not None:
            levels += range(levels[-1] + 1, levels[-1] + 1 + top_block.num_levels)
        self._out_features = [f"p{level}" for level in levels]
        self._out_feature_strides = {f"p{level}": 2**level for level in levels}
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)
        self._square_pad = square_pad

    def layers_above(self, name: str) -> int:
        """Number of the ViT's blocks above one of this backbone's parameters, for layer-wise decay."""
        return _layers_above(f".{name}", len(self.net.blocks))

    @property
    def padding_constraints(self) -> dict[str, int]:
        """{"square_size": side in pixels, 0 for none}.

        Without a square nothing is padded, as in the published models: what reaches beyond the last whole
        patch is not seen.
        """
        return {"square_size": self._square_pad}

    def forward(self, x):
        """Compute the pyramid.

        Args:
            x: what the network takes, (N, C, H, W) pictures.

        Returns:
            dict[str, Tensor]: (N, out_channels, H/stride, W/stride) maps, high to low resolution.
        """
        features = self.net(x)
        results = [stage(features[self.in_feature]) for stage in self.stages]
        if self.top_block is not None:
            source = features.get(self.top_block.in_feature)
            if source is None:
                source = results[self._out_features.index(self.top_block.in_feature)]
            results.extend(self.top_block(source))
        return dict(zip(self._out_features, results, strict=True))


def get_vit_lr_decay_rate(name, lr_decay_rate=1.0, num_layers=12):
    """Factor on the learning rate of one parameter of a detector on a ViT, falling towards the input.

    Args:
        name: the parameter's name in the detector, such as "backbone.net.blocks.3.mlp.fc1.weight".
        lr_decay_rate: factor from one block to the one below it.
        num_layers: number of blocks of the ViT.

    Returns:
        float: `lr_decay_rate` to the power of the number of blocks above the parameter, where the embeddings
        lie below the first block, and all that is no part of a block (the pyramid, the heads, the
        propagation blocks) has factor 1.
    """
    return lr_decay_rate ** _layers_above(name, num_layers) if name.startswith("backbone") else 1.0


def _layers_above(name: str, num_layers: int) -> int:
    """Number of blocks above a parameter of a ViT; 0 for what is no part of a block or below one."""
    if ".pos_embed" in name or ".patch_embed" in name:
        return num_layers + 1
    if ".blocks." in name and ".residual." not in name:
        return num_layers - int(name.partition(".blocks.")[2].partition(".")[0])
    return 0
