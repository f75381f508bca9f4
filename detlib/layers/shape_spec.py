"""`ShapeSpec`, which describes the feature maps that modules exchange."""

from dataclasses import dataclass

__all__ = ["ShapeSpec"]


@dataclass
class ShapeSpec:
    """The shape of a feature map, as far as it is known when a model is built.

    Backbones describe their outputs with it, e.g. `{"p2": ShapeSpec(channels=256, stride=4)}`, and modules
    that use these outputs take it as the argument `input_shape`.

    Attributes:
        channels: number of channels.
        height: height of the feature map in its own pixels.
        width: width of the feature map in its own pixels.
        stride: input image pixels per pixel of the feature map.
    """

    channels: int | None = None
    height: int | None = None
    width: int | None = None
    stride: int | None = None
