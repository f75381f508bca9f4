"""Figures of detections: precision and recall, F1, confusions, label statistics.

K is the number of classes. Figures show only as many classes as stay legible; the tables have all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from detlib.evaluation.coco_metrics import CocoScores
from detlib.report.detections import Detections
from detlib.report.matching import F1Curve
from detlib.report.style import (
    COLORS,
    INK,
    label_axes,
    legend,
    line_styles,
    new_figure,
    plain_ticks,
    png,
    shorten,
)

__all__ = [
    "class_metric_figure",
    "confusion_figure",
    "f1_figure",
    "labels_figure",
    "pr_curve",
    "pr_figure",
    "shown_classes",
]

_CURVES, _BARS, _CELLS = 10, 40, 24
_TASK_NAMES = {"bbox": "Boxes", "segm": "Masks", "keypoints": "Keypoints"}
_RECALLS = np.linspace(0, 1, 101)


def shown_classes(counts: np.ndarray, limit: int) -> np.ndarray:
    """Return the indices of the `limit` classes with the most objects, in ascending order.

    Classes without objects are left out unless no class has any.
    """
    order = np.argsort(-counts, kind="stable")[:limit]
    return np.sort(order[counts[order] > 0]) if counts.any() else np.sort(order)


def pr_curve(scores: CocoScores, iou: float | None = None, class_index: int | None = None) -> np.ndarray:
    """Return the precision at the metric's 101 recall levels. Its mean is the AP.

    Args:
        scores: the scores of one task.
        iou: the IoU threshold; None averages over all thresholds.
        class_index: the class; None averages over all classes that have objects.

    Returns:
        (101,) float64 in [0, 1]; nan if there are no objects.
    """
    precision = scores.precision[:, :, :, 0, -1]
    if iou is not None:
        precision = precision[np.isclose(scores.iou_thresholds, iou)]
    if class_index is not None:
        precision = precision[:, :, [class_index]]
    precision = precision[:, :, (precision > -1).all(axis=(0, 1))]
    return precision.mean(axis=(0, 2)) if precision.size else np.full(precision.shape[1], np.nan)


def pr_figure(found: Detections, scores: Mapping[str, CocoScores]) -> bytes:
    """Plot precision over recall of each task, at IoU 0.5 and averaged over all IoU thresholds."""
    shown = shown_classes(found.gt_counts, _CURVES)
    with_objects = int((found.gt_counts > 0).sum())
    figure, axes = new_figure(2, len(scores), width=13.0, height=4.4)
    for row, (task, of_task) in enumerate(scores.items()):
        for column, iou in enumerate((0.5, None)):
            ax = axes[2 * row + column]
            for k, style in zip(shown, line_styles(len(shown))):
                curve = pr_curve(of_task, iou, k)
                if not np.isnan(curve).any():
                    label = f"{shorten(found.class_names[k])} {100 * curve.mean():.1f}"
                    ax.plot(_RECALLS, curve, **style, linewidth=1.3, label=label)
            curve = pr_curve(of_task, iou)
            label = f"mean of {with_objects} classes {100 * curve.mean():.1f}"
            ax.plot(_RECALLS, curve, color=INK, linewidth=3, label=label)
            at = "IoU 0.5" if iou else "mean over IoU 0.5 to 0.95"
            label_axes(ax, f"{_TASK_NAMES.get(task, task)}, {at}", "recall", "precision")
            ax.set(xlim=(0, 1.01), ylim=(0, 1.03))
            legend(ax, outside=True, title="AP")
    return png(figure)


def f1_figure(found: Detections, curve: F1Curve) -> bytes:
    """Plot F1, precision and recall over the confidence threshold."""
    figure, (overall, classes) = new_figure(2, width=12.0)
    names = ("precision", "recall", "F1")
    for name, values, color in zip(names, curve.rates(), (COLORS[0], COLORS[2], COLORS[1])):
        width = 2.6 if name == "F1" else 1.6
        overall.plot(curve.thresholds, values, color=color, linewidth=width, label=name)
    label_axes(overall, "All classes together", "confidence threshold", "")
    shown = shown_classes(found.gt_counts, _CURVES)
    for k, style in zip(shown, line_styles(len(shown))):
        classes.plot(
            curve.thresholds,
            curve.rates(k)[2],
            **style,
            linewidth=1.5,
            label=shorten(found.class_names[k]),
        )
    label_axes(classes, "F1 per class", "confidence threshold", "F1")
    best = curve.rates()[2][curve.best]
    for ax in (overall, classes):
        ax.axvline(curve.threshold, color=INK, linewidth=1, linestyle="--")
        ax.set(xlim=(0, 1), ylim=(0, 1.03))
        legend(ax, outside=True)
    if not np.isnan(best):
        on_left = curve.threshold > 0.55
        overall.annotate(
            f"best F1 {best:.3f} at {curve.threshold:.3f}",
            (curve.threshold, 0.03),
            (-6 if on_left else 6, 0),
            textcoords="offset points",
            ha="right" if on_left else "left",
            fontsize=9,
            color=INK,
        )
    return png(figure)


def _shown_matrix(matrix: np.ndarray, found: Detections) -> tuple[np.ndarray, list[str]]:
    """Merge all but the most frequent classes of a confusion matrix into one row and column."""
    if found.num_classes <= _CELLS:
        return matrix, [*found.class_names, "background"]
    shown = shown_classes(found.gt_counts, _CELLS - 1)
    position = np.full(len(matrix), len(shown))
    position[shown] = np.arange(len(shown))
    position[-1] = len(shown) + 1
    small = np.zeros((len(shown) + 2, len(shown) + 2), dtype=matrix.dtype)
    np.add.at(small, (position[:, None], position[None, :]), matrix)
    others = f"{found.num_classes - len(shown)} others"
    return small, [*(found.class_names[k] for k in shown), others, "background"]


def confusion_figure(matrix: np.ndarray, found: Detections, threshold: float) -> bytes:
    """Plot the confusion matrix as counts and normalized per row."""
    counts, labels = _shown_matrix(matrix, found)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = min(max(4.6, 1.4 + 0.33 * len(labels)), 9.5)
    figure, axes = new_figure(2, width=2 * size + 1.0, height=size)
    # Most of the counts are on the diagonal; the square root keeps the other cells visible.
    for ax, values, title in (
        (axes[0], counts, f"Counts, confidence >= {threshold:.3f}"),
        (axes[1], shares, "Fraction of the true class"),
    ):
        colors = np.sqrt(values / max(values.max(), 1e-12))
        ax.imshow(colors, cmap="Blues", vmin=0, vmax=1.15)
        ax.grid(False)
        plain_ticks(ax, "x", labels, rotation=45, ha="right", rotation_mode="anchor")
        plain_ticks(ax, "y", labels)
        label_axes(ax, title, "predicted", "true")
        _write_cells(ax, values, colors)
    return png(figure)


def _write_cells(ax: Any, values: np.ndarray, colors: np.ndarray) -> None:
    size = 9 if len(values) <= 10 else 6.5
    for (row, column), value in np.ndenumerate(values):
        if value >= 0.005:
            text = _short_number(value) if values.dtype.kind == "i" else f"{value:.2f}".removeprefix("0")
            color = "white" if colors[row, column] > 0.6 else INK
            ax.text(column, row, text, ha="center", va="center", fontsize=size, color=color)


def _short_number(value: int) -> str:
    return str(value) if value < 10000 else f"{value / 1000:.0f}k"


def labels_figure(found: Detections, curve: F1Curve) -> bytes:
    """Plot the number of objects of each class and the sizes of the objects."""
    shown = shown_classes(found.gt_counts, _BARS)
    shown = shown[np.argsort(-found.gt_counts[shown], kind="stable")]
    figure, axes = new_figure(3, width=13.0, height=max(4.2, 1.2 + 0.17 * len(shown)))
    objects, detected = found.gt_counts[shown], curve.num_detections[curve.best][shown]
    positions = np.arange(len(shown))
    axes[0].barh(positions - 0.2, objects, 0.4, color=COLORS[0], label="objects")
    axes[0].barh(positions + 0.2, detected, 0.4, color=COLORS[4], label="detections")
    plain_ticks(axes[0], "y", [found.class_names[k] for k in shown])
    axes[0].set_ylim(len(shown) - 0.4, -0.6)
    if len(objects) and objects.max() > 100 * max(1, objects.min()):
        axes[0].set_xscale("log")
    is_partial = len(shown) < found.num_classes
    title = f"Objects of the {len(shown)} most frequent classes" if is_partial else "Objects of each class"
    label_axes(axes[0], title, "number", "")
    axes[0].set_xlim(right=axes[0].get_xlim()[1] * 1.02)
    legend(axes[0], loc="best")

    sizes = (
        found.gt_boxes[~found.gt_crowd][:, -3:-1]
        if found.is_rotated
        else found.gt_boxes[~found.gt_crowd][:, 2:]
    )
    sides = np.sqrt(sizes.prod(axis=1).clip(min=0))
    sides = sides[sides > 0]
    if len(sides):
        bins = np.geomspace(max(sides.min(), 1) * 0.98, max(sides.max(), 2) * 1.02, 30)
        axes[1].hist(sides.clip(min=1), bins=bins, color=COLORS[0])
        axes[1].set_xscale("log")
        for limit in (32, 96):  # COCO's limits between small, medium and large
            axes[1].axvline(limit, color=INK, linewidth=1, linestyle="--")
        _plain_log_ticks(axes[1], bins)
    label_axes(axes[1], "Object size (dashed: 32 and 96)", "sqrt(width x height) in pixels", "objects")
    _draw_shares(axes[2], found, sizes)
    return png(figure)


def _plain_log_ticks(ax: Any, bins: np.ndarray) -> None:
    from matplotlib.ticker import NullFormatter

    ticks = [2**k for k in range(14) if bins[0] <= 2**k <= bins[-1]]
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.xaxis.set_minor_formatter(NullFormatter())


def _draw_shares(ax: Any, found: Detections, sizes: np.ndarray) -> None:
    sides = {image["id"]: (image["width"], image["height"]) for image in found.ground_truth.coco["images"]}
    image_sizes = np.array([sides[i] for i in found.image_ids.tolist()], dtype=np.float64).reshape(-1, 2)
    shares = sizes / image_sizes[found.gt_image[~found.gt_crowd]]
    grid = np.linspace(0, 1, 41)
    x, y = shares.clip(0, 1).T
    counts = np.histogram2d(x, y, bins=[grid, grid])[0].T
    ax.imshow(np.sqrt(counts), origin="lower", extent=(0, 1, 0, 1), cmap="Blues", aspect="auto")
    ax.grid(False)
    label_axes(
        ax, "Box size relative to the image (darker: more)", "width / image width", "height / image height"
    )


def class_metric_figure(metric: str, values: Mapping[str, float]) -> bytes:
    """Plot a metric of each class as bars, the best class first.

    If there are many classes, only the best and the worst are shown.

    Args:
        metric: name of the metric.
        values: values in percent, by class name; nan is left out.

    Raises:
        ValueError: every value is nan.
    """
    known = sorted(((v, name) for name, v in values.items() if not np.isnan(v)), reverse=True)
    if not known:
        raise ValueError(f"{metric} is nan for every class")
    half = _BARS // 2
    shown = known if len(known) <= _BARS else known[:half] + known[-half:]
    figure, (ax,) = new_figure(height=max(2.6, 1.0 + 0.22 * len(shown)))
    ax.barh(np.arange(len(shown)), [value for value, _ in shown], 0.7, color=COLORS[0])
    plain_ticks(ax, "y", [name for _, name in shown])
    for i, (value, _) in enumerate(shown):
        ax.text(value, i, f" {value:.1f}", va="center", fontsize=8.5, color=INK)
    ax.set_ylim(len(shown) - 0.4, -0.6)
    suffix = f", the best and the worst {half} of {len(known)} classes" if len(shown) < len(known) else ""
    label_axes(ax, f"{metric} of each class{suffix}", "percent", "")
    ax.set_xlim(0, max(5.0, known[0][0]) * 1.1)
    return png(figure)
