"""detectron2's path of `detlib.visualization.visualizer`, which is imported on first use."""

from typing import Any

_NAMES = {
    "ColorMode": "ColorMode",
    "GenericMask": "GenericMask",
    "VisImage": "VisImage",
    "Visualizer": "Visualizer",
    "_PanopticPrediction": "PanopticSegments",
    "_create_text_labels": "create_text_labels",
}


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from detlib.visualization import visualizer

    return getattr(visualizer, _NAMES[name])


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES])
