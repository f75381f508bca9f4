"""Text and placement of object labels."""

from collections.abc import Sequence

import numpy as np

__all__ = ["create_text_labels", "place_label"]


def create_text_labels(
    classes: Sequence[int] | None,
    scores: Sequence[float] | None = None,
    class_names: Sequence[str] | None = None,
    is_crowd: Sequence[bool] | None = None,
) -> list[str] | None:
    """Return one label per object, such as "cat 97%".

    Args:
        classes: class ids, or None.
        scores: scores in [0, 1], or None.
        class_names: class names by id; ids without a name are printed as numbers.
        is_crowd: whether to append "|crowd" to the label of each object.

    Returns:
        The labels, or None if there are neither classes nor scores.
    """
    labels = None
    if classes is not None:
        class_names = class_names or ()
        known = len(class_names)
        labels = [class_names[i] if 0 <= i < known else str(i) for i in classes]
    if scores is not None:
        percents = [f"{score * 100:.0f}%" for score in scores]
        labels = percents if labels is None else [f"{n} {p}" for n, p in zip(labels, percents)]
    if labels is not None and is_crowd is not None:
        labels = [label + ("|crowd" if crowd else "") for label, crowd in zip(labels, is_crowd)]
    return labels


def place_label(
    size: tuple[float, float],
    box: Sequence[float],
    image_size: tuple[int, int],
    taken: Sequence[Sequence[float]] = (),
    center: tuple[float, float] | None = None,
) -> tuple[float, float, float, float]:
    """Choose a position for a label in or next to its object, inside the image and clear of other labels.

    All coordinates are image pixels.

    Args:
        size: (width, height) of the label.
        box: bounding box x0, y0, x1, y1 of the object.
        image_size: (height, width) of the image.
        taken: rectangles x0, y0, x1, y1 of the labels already placed.
        center: preferred center of the label, such as the center of the mask; None prefers the corners of
            the box.

    Returns:
        Rectangle x0, y0, x1, y1 of the label.
    """
    width, height = size
    x0, y0, x1, y1 = box
    inside = [(x0, y0), (x1 - width, y0), (x0, y1 - height), (x1 - width, y1 - height)]
    outside = [(x0, y0 - height), (x0, y1), (x1, y0), (x0 - width, y0)]
    if center is not None:
        inside.insert(0, (center[0] - width / 2, center[1] - height / 2))
    # A label should not hide a small object.
    hides = width * height > 0.3 * max(x1 - x0, 0) * max(y1 - y0, 0)
    corners = np.array(outside + inside if hides else inside + outside)
    # Positions beyond the image are moved inside; labels longer than the image start at its left or top edge.
    limits = np.array([image_size[1] - width, image_size[0] - height])
    shifted = np.maximum(np.minimum(corners, limits), 0)
    moved = np.abs(shifted - corners).sum(axis=1)
    rectangles = np.concatenate([shifted, shifted + [width, height]], axis=1)
    # Covering another label is worst, then being moved; ties keep the order of the candidates.
    cost = _overlaps(rectangles, np.asarray(taken, dtype=np.float64).reshape(-1, 4)) * 100 + moved
    return tuple(rectangles[int(cost.argmin())].tolist())


def _overlaps(rectangles: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """Return the area that each of (C, 4) rectangles shares with all of (T, 4) others in total."""
    low = np.maximum(rectangles[:, None, :2], taken[None, :, :2])
    high = np.minimum(rectangles[:, None, 2:], taken[None, :, 2:])
    return np.clip(high - low, 0, None).prod(axis=2).sum(axis=1)
