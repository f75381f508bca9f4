"""The common style of the figures of a report."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

__all__ = ["COLORS", "INK", "line_styles", "new_figure", "png", "shorten"]

# The color-blind safe palette of Okabe and Ito (https://jfly.uni-koeln.de/color/), without its yellow, which
# is hard to see on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK = "#333333"
_GRID = "#e3e3e3"
_DASHES = ("-", "--", ":", "-.")
_DPI = 110


def line_styles(count: int) -> Iterator[dict[str, Any]]:
    """Yield line styles: the colors of the palette, then the same colors with dashes."""
    for i in range(count):
        dashes = _DASHES[i // len(COLORS) % len(_DASHES)]
        yield {"color": COLORS[i % len(COLORS)], "linestyle": dashes}


def new_figure(columns: int = 1, rows: int = 1, *, width: float = 9.0, height: float = 4.6) -> tuple:
    """Create an empty figure.

    Args:
        columns, rows: number of columns and rows of axes.
        width: width of the figure in inches.
        height: height of each row of axes in inches.

    Returns:
        The figure and the list of its axes, row by row.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height * rows), dpi=_DPI, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr, call-arg]  # it is constrained
    axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for ax in axes:
        _style_axes(ax)
    return figure, axes


def _style_axes(ax: Any) -> None:
    ax.grid(True, color=_GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(which="both", colors=INK, labelsize=9, length=0)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#bbbbbb")
    for text in (ax.xaxis.label, ax.yaxis.label, ax.title):
        text.set_color(INK)


def label_axes(ax: Any, title: str, x: str, y: str) -> None:
    """Set the title and the axis labels."""
    ax.set_title(title, fontsize=11, loc="left", color=INK, parse_math=False)
    ax.set_xlabel(x, fontsize=9.5, parse_math=False)
    ax.set_ylabel(y, fontsize=9.5, parse_math=False)


def legend(ax: Any, *, outside: bool = False, **kwargs: Any) -> None:
    """Add a legend, inside the axes or to the right of them.

    Math parsing is off: a class name may contain "$".
    """
    if outside:
        kwargs |= {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
    made = ax.legend(frameon=True, framealpha=0.85, edgecolor="none", fontsize=8.5, labelcolor=INK, **kwargs)
    for text in made.get_texts():
        text.set_parse_math(False)


def plain_ticks(ax: Any, axis: str, labels: Sequence[str], **kwargs: Any) -> None:
    """Label the ticks at 0, 1, 2, ... of an axis."""
    set_ticks = ax.set_xticks if axis == "x" else ax.set_yticks
    set_ticks(range(len(labels)), [shorten(label) for label in labels], **kwargs)
    for text in ax.get_xticklabels() if axis == "x" else ax.get_yticklabels():
        text.set_parse_math(False)


def shorten(text: str, limit: int = 22) -> str:
    """Truncate a name to `limit` characters, so that it leaves room for the plot."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def png(figure: Any) -> bytes:
    """Render a figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def hide_unused(axes: Iterable[Any]) -> None:
    """Hide unused axes."""
    for ax in axes:
        ax.set_visible(False)
