"""Text of labels and where to put them."""

from collections.abc import Sequence

import numpy as np

__all__ = ["create_text_labels", "place_label"]


def create_text_labels(
    classes: Sequence[int] | None,
    scores: Sequence[float] | None = None,
    class_names: Sequence[str] | None = None,
    is_crowd: Sequence[bool] | None = None,
) -> list[str] | None:
    """Write one label per object, e.g. "cat 97%".

    Args:
        classes: class ids, or None.
        scores: in [0, 1], or None.
        class_names: name of each class; where it is missing or too short the id stands instead.
        is_crowd: marks objects with "|crowd".

    Returns:
        The labels; None if there is nothing to say.
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
    """Choose a place for a label beside its object, within the picture and off the labels already placed.

    All coordinates are pixels of the picture.

    Args:
        size: (width, height) of the label.
        box: x0, y0, x1, y1 around the object.
        image_size: (height, width) of the picture.
        taken: rectangles x0, y0, x1, y1 of labels already placed.
        center: a point of the object where the label is welcome, e.g. of its mask; if None its corners are.

    Returns:
        Rectangle x0, y0, x1, y1 of the label.
    """
    width, height = size
    x0, y0, x1, y1 = box
    inside = [(x0, y0), (x1 - width, y0), (x0, y1 - height), (x1 - width, y1 - height)]
    beside = [(x0, y0 - height), (x0, y1), (x1, y0), (x0 - width, y0)]
    if center is not None:
        inside.insert(0, (center[0] - width / 2, center[1] - height / 2))
    # A label should not hide a small object.
    hides = width * height > 0.3 * max(x1 - x0, 0) * max(y1 - y0, 0)
    corners = np.array(beside + inside if hides else inside + beside)
    # What reaches beyond the picture is moved into it; the left and top border win for too long labels.
    limits = np.array([image_size[1] - width, image_size[0] - height])
    shifted = np.maximum(np.minimum(corners, limits), 0)
    moved = np.abs(shifted - corners).sum(axis=1)
    rectangles = np.concatenate([shifted, shifted + [width, height]], axis=1)
    # Covering another label is worst; being pushed off its place comes next; then the order decides.
    cost = _overlaps(rectangles, np.asarray(taken, dtype=np.float64).reshape(-1, 4)) * 100 + moved
    return tuple(rectangles[int(cost.argmin())].tolist())


def _overlaps(rectangles: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """Area that each of (C, 4) rectangles shares with all of (T, 4) others together."""
    low = np.maximum(rectangles[:, None, :2], taken[None, :, :2])
    high = np.minimum(rectangles[:, None, 2:], taken[None, :, 2:])
    return np.clip(high - low, 0, None).prod(axis=2).sum(axis=1)
