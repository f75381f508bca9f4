"""Figures of a training run: losses, learning rates, metrics."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from detlib.report.records import Records
from detlib.report.style import COLORS, INK, hide_unused, label_axes, legend, line_styles, new_figure, png

__all__ = ["evaluation_figure", "learning_rate_figure", "losses_figure", "smooth"]

_LOG_RANGE = 30  # losses that span more than this factor are drawn on a log scale
_SMOOTHING_SHARE = 0.05  # fraction of the points on either side
_FEWEST_TO_SMOOTH = 8


def smooth(values: Sequence[float]) -> np.ndarray:
    """Return the moving average over a centered window of a tenth of the points, but at least three.

    The window is truncated at the ends. Very short series are returned unchanged.
    """
    values = np.asarray(values, dtype=np.float64)
    reach = max(int(len(values) * _SMOOTHING_SHARE), len(values) >= _FEWEST_TO_SMOOTH)
    sums = np.r_[0.0, np.cumsum(values)]
    at = np.arange(len(values))
    low, high = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def losses_figure(records: Records) -> bytes:
    """Plot the total loss and its components, with the validation losses in the same axes.

    Raises:
        ValueError: there are no losses.
    """
    names = records.losses()
    validation = records.validation_losses()
    total = [name for name in names if name == "total_loss"]
    parts = [name for name in names if name != "total_loss"]
    # A validation loss without a corresponding training loss is drawn with the total loss.
    with_total = ["total_loss", *sorted(set(validation) - set(names) - {"total_loss"})]
    if not names and not validation:
        raise ValueError("metrics.json has no losses")
    panels = [("Total loss", total, with_total)]
    if parts:
        panels.append(("Loss components", parts, [name for name in parts if name in validation]))
    figure, axes = new_figure(1, len(panels))
    for ax, (title, training, held_out) in zip(axes, panels):
        lowest, highest = math.inf, 0.0
        for name, style in zip(training, line_styles(len(training))):
            iterations, values = records.series(name)
            smoothed = smooth(values)
            ax.plot(iterations, values, color=style["color"], alpha=0.25, linewidth=1)
            ax.plot(iterations, smoothed, **style, linewidth=2, label=name, marker=_marker(values))
            lowest, highest = _span(smoothed, lowest, highest)
        for base in held_out:
            shared = COLORS[training.index(base) % len(COLORS)] if base in training else COLORS[1]
            color = COLORS[1] if base == "total_loss" else shared
            for name, dashes in zip(validation.get(base, ()), itertools.cycle(("-", "--", ":"))):
                iterations, values = records.series(name)
                ax.plot(
                    iterations, values, color=color, linestyle=dashes, marker="o", markersize=4, label=name
                )
                lowest, highest = _span(values, lowest, highest)
        if highest > _LOG_RANGE * lowest > 0:
            ax.set_yscale("log")
        label_axes(ax, title, "iteration", "loss")
        if ax.lines:
            legend(ax, outside=True, ncols=1 + len(ax.lines) // 32)
    return png(figure)


def _span(values: Iterable[float], lowest: float, highest: float) -> tuple[float, float]:
    positive = [value for value in values if value > 0]
    return min([lowest, *positive]), max([highest, *positive])


def _marker(values: Sequence[float]) -> str | None:
    return "o" if len(values) == 1 else None


def learning_rate_figure(records: Records) -> bytes:
    """Plot the learning rate of each parameter group that has a recorded one.

    Raises:
        ValueError: no learning rate is recorded.
    """
    names = records.learning_rates()
    if not names:
        raise ValueError("metrics.json has no learning rate")
    figure, (ax,) = new_figure(height=3.4)
    for name, style in zip(names, line_styles(len(names))):
        iterations, values = records.series(name)
        ax.plot(iterations, values, **style, linewidth=2, label=name, marker=_marker(values))
    label_axes(ax, "Learning rate", "iteration", "learning rate")
    ax.set_ylim(bottom=0)
    ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    if len(names) > 1:
        legend(ax)
    return png(figure)


def evaluation_figure(records: Records) -> bytes:
    """Plot the metrics of each task over the iterations and mark the best value of the main metric.

    Raises:
        ValueError: there are no evaluation results.
    """
    groups = records.evaluations()
    if not groups:
        raise ValueError("metrics.json has no evaluation results")
    columns = min(2, len(groups))
    rows = math.ceil(len(groups) / columns)
    figure, axes = new_figure(columns, rows, width=9.0 if columns == 1 else 12.5, height=4.2)
    for ax, (group, metrics) in zip(axes, groups.items()):
        _draw_metrics(ax, records, group, _ordered(metrics))
    hide_unused(axes[len(groups) :])
    return png(figure)


def _ordered(metrics: dict[str, str]) -> dict[str, str]:
    """Return the metrics with the main one first."""
    first = [name for name in ("AP", "PQ", "mIoU") if name in metrics]
    return {name: metrics[name] for name in (*first, *(name for name in metrics if name not in first))}


def _draw_metrics(ax: Any, records: Records, group: str, metrics: dict[str, str]) -> None:
    drawn = {metric: records.series(name) for metric, name in metrics.items()}
    drawn = {metric: series for metric, series in drawn.items() if series[0]}
    for (metric, (iterations, values)), style in zip(drawn.items(), line_styles(len(drawn))):
        is_main = metric == next(iter(drawn))
        width = 2.5 if is_main else 1.4
        ax.plot(iterations, values, **style, linewidth=width, marker="o", markersize=3.5, label=metric)
        if is_main and len(values) > 1:
            best = int(np.argmax(values))
            note = {"fontsize": 9, "color": INK, "textcoords": "offset points", "ha": "right"}
            ax.plot(iterations[best], values[best], "o", markersize=10, mfc="none", mec=INK)
            ax.annotate(f"best {values[best]:.1f}", (iterations[best], values[best]), (0, 10), **note)
    label_axes(ax, group, "iteration", "percent")
    ax.margins(y=0.12)
    if drawn:
        legend(ax, outside=True)
        if min(min(values) for _, values in drawn.values()) >= 0:
            ax.set_ylim(bottom=0)
    else:
        ax.text(0.5, 0.5, "all values are nan", ha="center", transform=ax.transAxes, color=INK)
