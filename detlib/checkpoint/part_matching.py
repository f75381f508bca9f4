"""Files that hold the weights of one part of a model, such as those that timm and torchvision publish."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

__all__ = ["match_part"]

# Of the names under one place of the model, or of the file's names, at least this share must agree.
_ENOUGH = 0.5


def _flat(name: str) -> str:
    """timm's feature extractors write ``stages_0.blocks`` for what its files call ``stages.0.blocks``."""
    return re.sub(r"\.(?=\d+(?:\.|$))", "_", name)


def match_part(
    model_shapes: Mapping[str, tuple[int, ...]], state: Mapping[str, Any]
) -> tuple[dict[str, Any], str] | None:
    """Finds the part of a model that a file's weights belong to.

    That is the place under which most of the file's names lie with the same shapes: for a file with
    "layer1.0.conv1.weight" and a model with "backbone.timm_model.layer1.0.conv1.weight" it is
    "backbone.timm_model".

    Args:
        model_shapes: shape of each parameter and buffer of the model, by name.
        state: the file's arrays by name.

    Returns:
        The file's arrays under the model's names, those that fit nothing under their own, and the place; None
        if some name is the model's own, or no place fits.
    """
    if not state or any(name in model_shapes for name in state):
        return None
    files = {_flat(name): (name, tuple(value.shape)) for name, value in state.items()}
    found: dict[str, dict[str, str]] = {}  # place in the model -> name in the file -> name in the model
    below: Counter[str] = Counter()
    for name, shape in model_shapes.items():
        parts = name.split(".")
        for i in range(1, len(parts)):
            place = ".".join(parts[:i])
            below[place] += 1
            ours = files.get(_flat(".".join(parts[i:])))
            if ours is not None and ours[1] == tuple(shape):
                found.setdefault(place, {})[ours[0]] = name
    if not found:
        return None
    place = max(found, key=lambda p: (len(found[p]), -below[p], -len(p)))
    names = found[place]
    if len(names) < _ENOUGH * min(below[place], len(state)):
        return None
    return {names.get(name, name): value for name, value in state.items()}, place
