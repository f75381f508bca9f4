"""Third-party networks as backbones: their feature maps are probed by running them on the meta device."""

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from detlib.modeling.backbone.backbone import Backbone

__all__ = ["MapLayout", "ThirdPartyBackbone", "probe_maps", "probe_size_divisibility", "unused_parameters"]

# Large, so that strides can be measured despite borders (of convolutions without padding).
_SIDE = 512


@dataclass(frozen=True)
class MapLayout:
    """The layout of a feature map."""

    channels: int
    stride: int
    """Pixels of the image per pixel of the feature map."""
    channels_last: bool
    """Whether the network returns it as (N, H, W, C)."""


def _on_meta(model: nn.Module) -> nn.Module:
    """Copy a model to the meta device, where running it is free and cannot change caches of the original."""
    memo: dict[int, torch.Tensor] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()
    }
    memo |= {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    return copy.deepcopy(model, memo)


def _shapes(
    model: nn.Module,
    run: Callable[[nn.Module, torch.Tensor], Sequence[torch.Tensor]],
    in_channels: int,
    sizes: Sequence[tuple[int, int]],
) -> list[list[torch.Size]]:
    """Return the shapes of the outputs of `run(model, images)`, for images of each (height, width)."""
    model = _on_meta(model).eval()
    with torch.device("meta"), torch.no_grad():
        return [[y.shape for y in run(model, torch.empty(1, in_channels, h, w))] for h, w in sizes]


def unused_parameters(model: nn.Module, run, in_channels: int) -> list[str]:
    """Return the names of the parameters that no feature map depends on in training.

    They would never get a gradient, which is an error in distributed training.

    Args:
        model, run, in_channels: see `probe_maps`.
    """
    model = _on_meta(model).train()
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
    with torch.device("meta"), torch.enable_grad():
        maps = run(model, torch.empty(2, in_channels, _SIDE, _SIDE))
        gradients = torch.autograd.grad(
            maps, parameters, [torch.empty_like(y) for y in maps], allow_unused=True
        )
    return [name for name, gradient in zip(names, gradients) if gradient is None]


def probe_maps(model: nn.Module, run, in_channels: int, names: Sequence[str], what: str) -> list[MapLayout]:
    """Determine the layout of a network's feature maps.

    Args:
        model: the network.
        run: a callable `run(model, images)` that returns the feature maps of (1, in_channels, H, W) images.
        in_channels: number of image channels.
        names: names of the feature maps in messages.
        what: name of the network in messages.

    Returns:
        A layout for each feature map.

    Raises:
        ValueError: the network does not accept images of different sizes, or an output is not a feature map
            that grows with the image.
    """
    try:
        square, wide = _shapes(model, run, in_channels, [(_SIDE, _SIDE), (_SIDE, 2 * _SIDE)])
    except Exception as error:
        raise ValueError(
            f"{what} is not usable in a detector: it cannot be run on images of other sizes than its own "
            f"({type(error).__name__}: {error})"
        ) from error
    layouts = []
    for name, a, b in zip(names, square, wide, strict=True):
        growing = [axis for axis, (x, y) in enumerate(zip(a, b)) if x != y]
        if len(a) != 4 or growing not in ([2], [3]):
            raise ValueError(
                f"{what} returns {name!r} as a {tuple(a)} tensor for a {_SIDE} x {_SIDE} image and as a "
                f"{tuple(b)} tensor for an image twice as wide: it is not a feature map"
            )
        axis = growing[0]
        stride = round(_SIDE / (b[axis] - a[axis]))
        channels_last = axis == 2
        layouts.append(MapLayout(int(a[3 if channels_last else 1]), stride, channels_last))
    return layouts


def probe_size_divisibility(model: nn.Module, run, in_channels: int) -> int:
    """Return the required divisor of image heights and widths; 0 if images may have any size.

    Args:
        model, run, in_channels: see `probe_maps`.
    """
    try:
        _shapes(model, run, in_channels, [(221, 333)])
    except Exception:
        for step in (4, 8, 16, 32, 64):
            try:
                _shapes(model, run, in_channels, [(5 * step, 7 * step)])
            except Exception:
                continue
            return step
        return 128  # `probe_maps` has run it on such images
    return 0


class ThirdPartyBackbone(Backbone):
    """The base of backbones that wrap a third-party network and probe its feature maps.

    Subclasses store the network in the attribute named by `_network_name`, and then call `_probe`.
    """

    _network_name: str

    @abstractmethod
    def _run(self, network: nn.Module, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return the outputs of the network, in the order of their names."""

    def _probe(self, in_channels: int, names: Sequence[str], what: str) -> None:
        """Determine the feature maps of the network, and freeze parameters that none of them depends on.

        Args:
            in_channels: number of image channels.
            names: names of the feature maps.
            what: name of the network in messages.

        Raises:
            ValueError: see `probe_maps`.
        """
        network = getattr(self, self._network_name)
        self._out_features = list(names)
        layouts = probe_maps(network, self._run, in_channels, names, what)
        unused = set(unused_parameters(network, self._run, in_channels))
        used = {id(p) for name, p in network.named_parameters() if name not in unused}
        for parameter in self.parameters():
            if id(parameter) not in used:
                parameter.requires_grad = False
        self._size_divisibility = probe_size_divisibility(network, self._run, in_channels)
        self._channels_last = tuple(layout.channels_last for layout in layouts)
        self._out_feature_channels = {n: layout.channels for n, layout in zip(names, layouts)}
        self._out_feature_strides = {n: layout.stride for n, layout in zip(names, layouts)}

    @property
    def size_divisibility(self) -> int:
        """The required divisor of image sizes: 0, except for a few networks with branches (HRNet, DLA)."""
        return self._size_divisibility

    def forward(self, x):
        """Compute the feature maps.

        Args:
            x: (N, C, H, W) float tensor of normalized images.

        Returns:
            dict[str, Tensor]: name to (N, C_f, H_f, W_f) feature map, in the order of `output_shape`.
        """
        maps = self._run(getattr(self, self._network_name), x)
        return {
            name: y.permute(0, 3, 1, 2).contiguous() if last else y
            for name, y, last in zip(self._out_features, maps, self._channels_last)
        }
