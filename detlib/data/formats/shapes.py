"""The generated dataset of shapes, drawn where it is needed."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from detlib.data.datasets.shapes import ShapesParameters, load_shapes, shapes_metadata
from detlib.data.formats.base import Format, ParsedURI, URIOption, register_format
from detlib.utils.suggest import suggest

__all__ = ["ShapesURI"]

_EVALUATOR_TYPES = {"instances": "coco", "panoptic": "coco_panoptic_seg", "stuff": "sem_seg"}


class ShapesURI(ParsedURI):
    """`shapes:SPLIT`, where the split is train or val.

    The dicts always have instances, stuff and panoptic segments; the task selects the metrics.
    """

    form = "shapes:SPLIT"
    options = (
        URIOption("num", "the number of images; 1000 for train and 200 for val by default"),
        URIOption("size", "height and width of the images in pixels, 32 to 1024; 128 by default"),
        URIOption("seed", "another seed gives other images; 0 by default"),
        URIOption("rotated", "`1` draws rectangles with rotated boxes"),
        URIOption("task", "what is evaluated: `instances` (default), `panoptic` or `stuff`"),
    )

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.task = self.values.get("task", "instances")
        if self.task not in _EVALUATOR_TYPES:
            raise self.error(
                f"there is no task {self.task!r}, only {', '.join(_EVALUATOR_TYPES)}."
                f"{suggest(self.task, _EVALUATOR_TYPES)}"
            )
        numbers = {}
        for key in (field.name for field in fields(ShapesParameters) if field.name in self.values):
            try:
                numbers[key] = int(self.values[key])
            except ValueError as error:
                raise self.error(f"{key}={self.values[key]!r} is not an integer.") from error
        try:
            self.parameters = ShapesParameters(self.body, **numbers)
        except ValueError as error:
            raise self.error(f"{error}.") from error

    def check(self) -> None:
        """Do nothing: a dataset that can be parsed can be drawn."""

    def load(self) -> list[dict]:
        """Return the dataset in the standard dict format; the first call draws the images."""
        return load_shapes(self.parameters)

    def metadata(self) -> dict[str, Any]:
        """Return the names and colors of things, stuff and keypoints."""
        return shapes_metadata(self.parameters) | {"evaluator_type": _EVALUATOR_TYPES[self.task]}


register_format(
    Format(
        name="shapes",
        summary="generated images of shapes: boxes, polygons, keypoints, stuff and panoptic segments. "
        "The splits are `train` and `val`",
        uri_class=ShapesURI,
    )
)
