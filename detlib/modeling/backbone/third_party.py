"""Foreign networks as backbones: how their feature maps look is found by running them without computing."""

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from detlib.modeling.backbone.backbone import Backbone

__all__ = ["MapLayout", "ThirdPartyBackbone", "probe_maps", "probe_size_divisibility", "unused_parameters"]

# Large, so that borders (convolutions without padding) do not blur what stride a map has.
_SIDE = 512


@dataclass(frozen=True)
class MapLayout:
    """A feature map of a network."""

    channels: int
    stride: int
    """Pixels of the image per pixel of the map."""
    channels_last: bool
    """Whether the network gives it as (N, H, W, C)."""


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy without values: it costs no time, and what networks cache while they run goes with it."""
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
    """The shapes that `run(model, images)` gives for images of these (height, width)."""
    model = _on_meta(model).eval()
    with torch.device("meta"), torch.no_grad():
        return [[y.shape for y in run(model, torch.empty(1, in_channels, h, w))] for h, w in sizes]


def unused_parameters(model: nn.Module, run, in_channels: int) -> list[str]:
    """Names of the parameters that no map depends on in training.

    They would never get a gradient, which training on several devices takes for a mistake.

    Args:
        model, run, in_channels: as for `probe_maps`.
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
    """Find out what maps a network gives.

    Args:
        model: the network.
        run: called as `run(model, images)` with (1, in_channels, H, W) images; gives the maps.
        in_channels: channels of the images.
        names: what to call each map in messages.
        what: what to call the network in messages.

    Returns:
        A layout for each map.

    Raises:
        ValueError: the network does not take images of different sizes, or gives something else than maps
            that grow with the image.
    """
    try:
        square, wide = _shapes(model, run, in_channels, [(_SIDE, _SIDE), (_SIDE, 2 * _SIDE)])
    except Exception as error:
        raise ValueError(
            f"{what} is of no use to a detector: it cannot be run on images of other sizes than its own "
            f"({type(error).__name__}: {error})"
        ) from error
    layouts = []
    for name, a, b in zip(names, square, wide, strict=True):
        growing = [axis for axis, (x, y) in enumerate(zip(a, b)) if x != y]
        if len(a) != 4 or growing not in ([2], [3]):
            raise ValueError(
                f"{what} gives {name!r} as a {tuple(a)} tensor for a {_SIDE} x {_SIDE} image and as a "
                f"{tuple(b)} one for an image twice as wide: that is no feature map"
            )
        axis = growing[0]
        stride = round(_SIDE / (b[axis] - a[axis]))
        channels_last = axis == 2
        layouts.append(MapLayout(int(a[3 if channels_last else 1]), stride, channels_last))
    return layouts


def probe_size_divisibility(model: nn.Module, run, in_channels: int) -> int:
    """The number that heights and widths of images must be multiples of; 0 if any will do.

    Args:
        model, run, in_channels: as for `probe_maps`.
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
        return 128  # `probe_maps` has seen it run on such images
    return 0


class ThirdPartyBackbone(Backbone):
    """A foreign network whose maps are found by probing it.

    A subclass puts the network into the attribute that `_network_name` names, and then calls `_probe`.
    """

    _network_name: str

    @abstractmethod
    def _run(self, network: nn.Module, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """The network's own maps, in the order of their names."""

    def _probe(self, in_channels: int, names: Sequence[str], what: str) -> None:
        """Finds out what there is to know, and stops those parameters from training that no map depends on.

        Args:
            in_channels: channels of the images.
            names: of the maps.
            what: what to call the network in messages.

        Raises:
            ValueError: as `probe_maps`.
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
        """0, but for the few networks (HRNet, DLA) whose parts meet only in images of such sizes."""
        return self._size_divisibility

    def forward(self, x):
        """Compute the maps.

        Args:
            x: (N, C, H, W) float tensor, normalized images.

        Returns:
            dict[str, Tensor]: (N, C_f, H_f, W_f) maps by name, in the order of `output_shape`.
        """
        maps = self._run(getattr(self, self._network_name), x)
        return {
            name: y.permute(0, 3, 1, 2).contiguous() if last else y
            for name, y, last in zip(self._out_features, maps, self._channels_last)
        }
