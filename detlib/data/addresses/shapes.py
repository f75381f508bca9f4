"""Addresses of generated pictures."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from detlib.data.datasets.shapes import ShapesParameters, load_shapes, shapes_metadata
from detlib.utils.suggest import suggest

from .parts import split_options

__all__ = ["ShapesAddress"]


class ShapesAddress:
    """`shapes:train` or `shapes:val`, with `?num=...&size=...&seed=...&rotated=1`: generated pictures.

    Their dicts always have instances, stuff and panoptic segments; `?task=...` says which metrics are
    computed.
    """

    EVALUATOR_TYPES = {"instances": "coco", "panoptic": "coco_panoptic_seg", "stuff": "sem_seg"}

    def __init__(self, address: str) -> None:
        numeric = tuple(field.name for field in fields(ShapesParameters) if field.name != "split")
        split, options = split_options(address, (*numeric, "task"))
        self.task = options.pop("task", "instances")
        if self.task not in self.EVALUATOR_TYPES:
            raise ValueError(
                f"Dataset address {address!r}: there is no task {self.task!r}, only "
                f"{', '.join(self.EVALUATOR_TYPES)}.{suggest(self.task, self.EVALUATOR_TYPES)}"
            )
        numbers = {}
        for key, text in options.items():
            try:
                numbers[key] = int(text)
            except ValueError as error:
                raise ValueError(
                    f"Dataset address {address!r}: {key}={text!r} is not a whole number."
                ) from error
        try:
            self.parameters = ShapesParameters(split, **numbers)
        except ValueError as error:
            raise ValueError(f"Dataset address {address!r}: {error}.") from error

    def check(self) -> None:
        """Nothing is left to check: parsing did."""

    def load(self) -> list[dict]:
        """Returns the data set in the standard dict format, drawing the pictures the first time."""
        return load_shapes(self.parameters)

    def metadata(self) -> dict[str, Any]:
        """Returns things, stuff and keypoints with their names and colours."""
        return shapes_metadata(self.parameters) | {"evaluator_type": self.EVALUATOR_TYPES[self.task]}
