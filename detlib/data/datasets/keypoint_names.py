"""Keypoint metadata derived from names: the pairs that a horizontal flip swaps, and connections."""

from __future__ import annotations

import logging
from typing import Any

__all__ = ["check_keypoint_names", "keypoint_metadata", "left_right_pairs", "warn_of_no_pairs"]

logger = logging.getLogger(__name__)

_SIDES = (("left", "right"), ("Left", "Right"), ("LEFT", "RIGHT"))


def left_right_pairs(names: list[str]) -> list[tuple[str, str]]:
    """Return the pairs of names that differ only in left and right, the left one first."""
    pairs = [(n, n.replace(left, right)) for n in names for left, right in _SIDES if left in n]
    return [pair for pair in pairs if pair[1] in names]


def warn_of_no_pairs(names: list[str], pairs: list[tuple[str, str]], source: str) -> None:
    """Log a warning if there is more than one keypoint, but no pair to swap."""
    if len(names) > 1 and not pairs:
        logger.warning(
            "%s: a horizontal flip swaps no keypoints. That is wrong if there are left and right keypoints.",
            source,
        )


def check_keypoint_names(names: Any) -> None:
    """Raise ValueError unless `names` is a list of distinct strings."""
    if (
        not isinstance(names, list)
        or not all(isinstance(n, str) for n in names)
        or len({*names}) < len(names)
    ):
        raise ValueError(f"the keypoints must be a list of distinct names, got {names!r}")


def keypoint_metadata(categories: list[dict], json_file: str) -> dict[str, Any]:
    """Return names, flip map and connections of the first category with keypoints.

    COCO files have no flip map: names that differ only in left and right are a pair. Connections are used for
    drawing only. Those that are not pairs of keypoint numbers are left out with a warning.

    Raises:
        ValueError: The names are malformed; `json_file` is for the message.
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
    if not isinstance(skeleton, list):
        raise ValueError(
            f"{json_file}: category {category['name']!r}: 'skeleton' must be a list of pairs, not "
            f"{skeleton!r}."
        )
    valid = [line for line in skeleton if _is_connection(line, len(names))]
    if len(valid) < len(skeleton):
        logger.warning(
            "%s: left out %d connections in 'skeleton' that are not pairs of numbers from 1 to %d.",
            *(json_file, len(skeleton) - len(valid), len(names)),
        )
    colors = ((255, 128, 0), (51, 153, 255), (102, 204, 102))
    return {
        "keypoint_names": names,
        "keypoint_flip_map": pairs,
        "keypoint_connection_rules": [
            (names[a - 1], names[b - 1], colors[i % len(colors)]) for i, (a, b) in enumerate(valid)
        ],
    }


def _is_connection(line: Any, num_keypoints: int) -> bool:
    legal = range(1, num_keypoints + 1)
    return isinstance(line, list) and len(line) == 2 and all(type(i) is int and i in legal for i in line)
