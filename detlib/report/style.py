"""How all figures of a report look."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

__all__ = ["COLORS", "INK", "line_styles", "new_figure", "png", "shorten"]

# The palette of Okabe and Ito (https://jfly.uni-koeln.de/color/), which colour-blind people can tell apart;
# without its yellow, which is faint on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK = "#333333"
_GRID = "#e3e3e3"
_DASHES = ("-", "--", ":", "-.")
_DPI = 110


def line_styles(count: int) -> Iterator[dict[str, Any]]:
    """Colours, and dashes where there are more lines than colours."""
    for i in range(count):
        dashes = _DASHES[i // len(COLORS) % len(_DASHES)]
        yield {"color": COLORS[i % len(COLORS)], "linestyle": dashes}


def new_figure(columns: int = 1, rows: int = 1, *, width: float = 9.0, height: float = 4.6) -> tuple:
    """An empty figure.

    Args:
        columns, rows: of axes.
        width, height: of the whole figure, and of a row of axes, in inches.

    Returns:
        The figure, and its axes as a list, row by row.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height * rows), dpi=_DPI, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr, call-arg]  # it is constrained
    axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for ax in axes:
        _dress(ax)
    return figure, axes


def _dress(ax: Any) -> None:
    ax.grid(True, color=_GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(which="both", colors=INK, labelsize=9, length=0)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#bbbbbb")
    for text in (ax.xaxis.label, ax.yaxis.label, ax.title):
        text.set_color(INK)


def label_axes(ax: Any, title: str, x: str, y: str) -> None:
    """Write title and names of the axes."""
    ax.set_title(title, fontsize=11, loc="left", color=INK, parse_math=False)
    ax.set_xlabel(x, fontsize=9.5, parse_math=False)
    ax.set_ylabel(y, fontsize=9.5, parse_math=False)


def legend(ax: Any, *, beside: bool = False, **kwargs: Any) -> None:
    """Add a legend, within the axes or to the right of them.

    Names of classes and metrics are no mathematics, whatever they contain.
    """
    if beside:
        kwargs |= {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
    made = ax.legend(frameon=True, framealpha=0.85, edgecolor="none", fontsize=8.5, labelcolor=INK, **kwargs)
    for text in made.get_texts():
        text.set_parse_math(False)


def plain_ticks(ax: Any, axis: str, labels: Sequence[str], **kwargs: Any) -> None:
    """Label the places 0, 1, 2, ... of an axis."""
    set_ticks = ax.set_xticks if axis == "x" else ax.set_yticks
    set_ticks(range(len(labels)), [shorten(label) for label in labels], **kwargs)
    for text in ax.get_xticklabels() if axis == "x" else ax.get_yticklabels():
        text.set_parse_math(False)


def shorten(text: str, limit: int = 22) -> str:
    """A name that does not push everything else out of the figure."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def png(figure: Any) -> bytes:
    """Draw a figure and returns it as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def hide_rest(axes: Iterable[Any]) -> None:
    """Take away axes that nothing was drawn into."""
    for ax in axes:
        ax.set_visible(False)
