"""ShapeSpec: what a module needs to know of a feature map to be built on it."""

from dataclasses import dataclass

__all__ = ["ShapeSpec"]


@dataclass
class ShapeSpec:
    """The shape of a feature map, as far as it is known when a model is built.

    Backbones describe their outputs with it (`{"p2": ShapeSpec(channels=256, stride=4)}`) and the modules
    on top of them take it as the `input_shape` argument.

    Attributes:
        channels: number of channels.
        height: height in pixels of the map itself.
        width: width in pixels of the map itself.
        stride: input image pixels per pixel of the map.
    """

    channels: int | None = None
    height: int | None = None
    width: int | None = None
    stride: int | None = None
