"""The page of a report: a self-contained, responsive HTML file with a light and a dark color scheme."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from typing import Any

from detlib.report.class_table import Table

__all__ = ["Page"]

# The page loads nothing from elsewhere, and this policy makes the browser enforce it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #5b636d; --ground: #f6f7f9; --card: #fff;
  --line: #dfe3e8; --accent: #0072b2; --note: #fff4e0; --note-line: #e69f00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a3abb5; --ground: #14171b;
  --card: #1d2126; --line: #343a42; --accent: #56b4e9; --note: #33290f; --note-line: #e69f00; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: .5rem 0; } h2 { font-size: 1.25rem; margin: 0 0 .6rem; }
h3 { font-size: 1.05rem; margin: 1.2rem 0 .4rem; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1rem; margin: .4rem 0 1rem; } a { color: var(--accent); }
section { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem;
  margin: 0 0 1rem; }
p, figcaption { color: var(--soft); margin: .3rem 0 .6rem; max-width: 60rem; }
p.note { background: var(--note); color: var(--ink); border-left: 4px solid var(--note-line);
  padding: .5rem .8rem; border-radius: .3rem; }
figure { margin: 0 0 1.2rem; } figure > div, .table { overflow-x: auto; }
img { display: block; max-width: 100%; min-width: min(34rem, 160%); height: auto; background: #fff;
  border-radius: .4rem; }
.table { max-height: 34rem; overflow: auto; border: 1px solid var(--line); border-radius: .4rem;
  width: fit-content; max-width: 100%; margin: 0 0 1rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
thead th { position: sticky; top: 0; background: var(--card); }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
th button::after { content: " \\2195"; color: var(--soft); font-weight: 400; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .25rem 1rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; }
"""

# The first click sorts numbers in descending order. Empty cells stay at the end.
_SCRIPT = """
document.querySelectorAll("th button").forEach(function (button) {
  button.addEventListener("click", function () {
    var th = button.closest("th"), body = th.closest("table").tBodies[0];
    var k = th.cellIndex, rows = Array.from(body.rows), was = th.getAttribute("aria-sort");
    var key = function (row) { return row.cells[k].dataset.value; };
    var numeric = rows.every(function (row) { return key(row) === "" || !isNaN(key(row)); });
    var up = was ? was === "descending" : !numeric;
    rows.sort(function (a, b) {
      var x = key(a), y = key(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      return (numeric ? x - y : x.localeCompare(y)) * (up ? 1 : -1);
    });
    th.parentNode.querySelectorAll("th").forEach(function (o) { o.removeAttribute("aria-sort"); });
    th.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append.apply(body, rows);
  });
});
"""


class Page:
    """An HTML page that is built section by section. All texts are escaped."""

    def __init__(self, title: str) -> None:
        """Create an empty page.

        Args:
            title: the title of the page.
        """
        self._title = title
        self._sections: list[tuple[str, list[str]]] = []

    def section(self, title: str) -> None:
        """Begin a section; everything added afterwards goes into it."""
        self._sections.append((title, []))

    def _add(self, html: str) -> None:
        if not self._sections:
            raise ValueError(f"Page {self._title!r} has no section yet; call section() first.")
        self._sections[-1][1].append(html)

    def heading(self, text: str) -> None:
        """Add a heading inside the section."""
        self._add(f"<h3>{escape(text)}</h3>")

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._add(f"<p>{escape(text)}</p>")

    def note(self, text: str) -> None:
        """Add a highlighted paragraph about something missing or in need of attention."""
        self._add(f'<p class="note">{escape(text)}</p>')

    def facts(self, facts: Mapping[str, Any]) -> None:
        """Add a list of names and values."""
        rows = "".join(
            f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items()
        )
        self._add(f"<dl>{rows}</dl>")

    def figure(self, image: bytes, alt: str, caption: str = "", mime: str = "image/png") -> None:
        """Add an image.

        Args:
            image: the encoded image.
            alt: the alternative text for screen readers.
            caption: the text below the image.
            mime: the MIME type of the image.
        """
        source = f"data:{mime};base64,{base64.b64encode(image).decode('ascii')}"
        below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        # Narrow screens scroll figures sideways; the tabindex makes that possible with the keyboard.
        self._add(f'<figure><div tabindex="0"><img src="{source}" alt="{escape(alt)}"></div>{below}</figure>')

    def table(self, table: Table, label: str) -> None:
        """Add a table whose columns can be sorted.

        Args:
            table: the column names and the rows; None is an empty cell.
            label: the label for screen readers.
        """
        columns, rows = table
        is_text = [any(isinstance(row[k], str) for row in rows) for k in range(len(columns))]
        attributes = [' class="text"' if text else "" for text in is_text]
        head = "".join(
            f'<th scope="col"{attribute}><button type="button">{escape(name)}</button></th>'
            for name, attribute in zip(columns, attributes)
        )
        body = "".join(
            "<tr>" + "".join(_cell(value, attribute) for value, attribute in zip(row, attributes)) + "</tr>"
            for row in rows
        )
        self._add(
            f'<div class="table" tabindex="0"><table aria-label="{escape(label)}">'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )

    def render(self) -> str:
        """Return the page as HTML."""
        names = [f"part-{number}" for number in range(1, len(self._sections) + 1)]
        links = "".join(
            f'<a href="#{name}">{escape(title)}</a>' for name, (title, _) in zip(names, self._sections)
        )
        body = "\n".join(
            f'<section id="{name}"><h2>{escape(title)}</h2>\n' + "\n".join(parts) + "\n</section>"
            for name, (title, parts) in zip(names, self._sections)
        )
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
            f"<title>{escape(self._title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
            f"<h1>{escape(self._title)}</h1>\n<nav>{links}</nav>\n<main>\n{body}\n</main>\n"
            f"<script>{_SCRIPT}</script>\n</body>\n</html>\n"
        )


def _cell(value: Any, attribute: str) -> str:
    if value is None:
        return f'<td data-value=""{attribute}>–</td>'
    shown = f"{value:.2f}" if isinstance(value, float) else str(value)
    return f'<td data-value="{escape(str(value))}"{attribute}>{escape(shown)}</td>'
