"""The labels of Cityscapes (https://www.cityscapes-dataset.com), including those ignored in evaluation."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CITYSCAPES_LABELS", "CityscapesLabel", "cityscapes_label"]


@dataclass(frozen=True)
class CityscapesLabel:
    """One label.

    Attributes:
        name: as in the polygon files, where a group of objects is called name + "group".
        id: as in the `labelIds` PNGs. The `instanceIds` PNGs have id * 1000 + number for instances, and id
            for stuff and groups. Negative ids are in no PNG.
        train_id: as in the `labelTrainIds` PNGs; None for labels ignored in evaluation.
        category: the supercategory.
        has_instances: whether single objects are annotated.
        color: red, green, blue.
    """

    name: str
    id: int
    train_id: int | None
    category: str
    has_instances: bool
    color: tuple[int, int, int]

    @property
    def ignored(self) -> bool:
        """Return whether the evaluation ignores the label and its pixels."""
        return self.train_id is None


# Labels by category: id, name, training id or "-", color. "*" marks labels with instances.
_TABLE = {
    "void": """0 unlabeled - #000000, 1 ego vehicle - #000000, 2 rectification border - #000000,
        3 out of roi - #000000, 4 static - #000000, 5 dynamic - #6f4a00, 6 ground - #510051""",
    "flat": "7 road 0 #804080, 8 sidewalk 1 #f423e8, 9 parking - #faaaa0, 10 rail track - #e6968c",
    "construction": """11 building 2 #464646, 12 wall 3 #66669c, 13 fence 4 #be9999,
        14 guard rail - #b4a5b4, 15 bridge - #966464, 16 tunnel - #96785a""",
    "object": """17 pole 5 #999999, 18 polegroup - #999999, 19 traffic light 6 #faaa1e,
        20 traffic sign 7 #dcdc00""",
    "nature": "21 vegetation 8 #6b8e23, 22 terrain 9 #98fb98",
    "sky": "23 sky 10 #4682b4",
    "human": "24 *person 11 #dc143c, 25 *rider 12 #ff0000",
    "vehicle": """26 *car 13 #00008e, 27 *truck 14 #000046, 28 *bus 15 #003c64, 29 *caravan - #00005a,
        30 *trailer - #00006e, 31 *train 16 #005064, 32 *motorcycle 17 #0000e6, 33 *bicycle 18 #770b20,
        -1 license plate - #00008e""",
}


def _parse(table: dict[str, str]) -> tuple[CityscapesLabel, ...]:
    labels = []
    for category, entries in table.items():
        for entry in entries.split(","):
            label_id, *words, train_id, color = entry.split()
            name = " ".join(words)
            labels.append(
                CityscapesLabel(
                    name.removeprefix("*"),
                    int(label_id),
                    None if train_id == "-" else int(train_id),
                    category,
                    name.startswith("*"),
                    (int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)),
                )
            )
    return tuple(labels)


CITYSCAPES_LABELS = _parse(_TABLE)

_BY_NAME = {label.name: label for label in CITYSCAPES_LABELS}


def cityscapes_label(name: str) -> tuple[CityscapesLabel, bool]:
    """Find a label by its name in a polygon file.

    Returns:
        The label, and whether the name stands for a group of its objects without single annotations.

    Raises:
        KeyError: The label is unknown.
    """
    if name in _BY_NAME:
        return _BY_NAME[name], False
    return _BY_NAME[name.removesuffix("group")], True
