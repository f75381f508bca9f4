"""A convolution with norm and activation as modules beside it."""

from torch import nn

__all__ = ["ConvNormAct"]


class ConvNormAct(nn.Module):
    """A convolution, then an optional norm, then an optional activation.

    Its parameters are `conv.*` and `norm.*`. It differs from `detlib.layers.Conv2d`, whose own parameters are
    those of the convolution; checkpoints of DETR-like models have these names.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: those of
            `torch.nn.Conv2d`; padding is none by default, the bias is there by default.
        norm_layer: a module for (N, out_channels, H', W') maps, or None.
        activation: a module, or None.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        norm_layer: nn.Module | None = None,
        activation: nn.Module | None = None,
    ):
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
        )
        self.norm = norm_layer
        self.activation = activation

    def forward(self, x):
        """Maps (N, in_channels, H, W) to (N, out_channels, H', W')."""
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x
