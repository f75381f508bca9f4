"""What is known of keypoints by their names: which change places where a picture is mirrored, and more."""

from __future__ import annotations

import logging
from typing import Any

__all__ = ["check_keypoint_names", "keypoint_metadata", "left_right_pairs", "warn_of_no_pairs"]

logger = logging.getLogger(__name__)

_SIDES = (("left", "right"), ("Left", "Right"), ("LEFT", "RIGHT"))


def left_right_pairs(names: list[str]) -> list[tuple[str, str]]:
    """Returns the pairs of names that differ in left and right only, the left one first."""
    pairs = [(n, n.replace(left, right)) for n in names for left, right in _SIDES if left in n]
    return [pair for pair in pairs if pair[1] in names]


def warn_of_no_pairs(names: list[str], pairs: list[tuple[str, str]], source: str) -> None:
    """Says that nothing will be swapped, where there could be something."""
    if len(names) > 1 and not pairs:
        logger.warning(
            "%s: where pictures are mirrored, no keypoints are swapped. That is wrong if there are left and "
            "right ones.",
            source,
        )


def check_keypoint_names(names: Any) -> None:
    """Raises ValueError unless `names` is a list of strings that all differ."""
    if (
        not isinstance(names, list)
        or not all(isinstance(n, str) for n in names)
        or len({*names}) < len(names)
    ):
        raise ValueError(f"the keypoints must be a list of names that all differ, got {names!r}")


def keypoint_metadata(categories: list[dict], json_file: str) -> dict[str, Any]:
    """Returns names, flip map and connections from the first category with keypoints.

    COCO has no place for the flip map: names that differ in left and right only are taken as a pair.
    Connections, which are for drawing only, are left out with a warning where they are no pairs of places.

    Raises:
        ValueError: the names are none; `json_file` is for the message.
    """
    category = next((category for category in categories if category.get("keypoints")), None)
    if category is None:
        return {}
    names = category["keypoints"]
    try:
        check_keypoint_names(names)
    except ValueError as error:
        raise ValueError(f"{json_file}: category {category['name']!r}: {error}.") from error
    pairs = left_right_pairs(names)
    warn_of_no_pairs(names, pairs, f"{json_file} has no keypoints named left and right")
    skeleton = category.get("skeleton") or []
    good = [line for line in skeleton if _is_connection(line, len(names))]
    if len(good) < len(skeleton):
        logger.warning(
            "%s: left out %d connections in 'skeleton' that are no pairs of numbers from 1 to %d.",
            *(json_file, len(skeleton) - len(good), len(names)),
        )
    colors = ((255, 128, 0), (51, 153, 255), (102, 204, 102))
    return {
        "keypoint_names": names,
        "keypoint_flip_map": pairs,
        "keypoint_connection_rules": [
            (names[a - 1], names[b - 1], colors[i % len(colors)]) for i, (a, b) in enumerate(good)
        ],
    }


def _is_connection(line: Any, num_keypoints: int) -> bool:
    legal = range(1, num_keypoints + 1)
    return isinstance(line, list) and len(line) == 2 and all(type(i) is int and i in legal for i in line)
