"""The few pieces of HTML a page is made of. Every piece of text from outside is escaped here."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from html import escape
from string import Template

import pandas as pd
from matplotlib.figure import Figure

from pyro_causalcell.plot import style

__all__ = ["details", "figure", "figure_row", "items", "page", "paragraph", "section", "table", "tiles"]


def paragraph(text: str, kind: str = "") -> str:
    """One paragraph of plain text; ``kind`` is a CSS class."""
    return f'<p class="{escape(kind)}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def items(texts: Sequence[str]) -> str:
    """A list of plain sentences."""
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"


def tiles(values: Mapping[str, str]) -> str:
    """A row of big numbers with a label under each."""
    cells = (
        f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>" for label, value in values.items()
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def details(title: str, body: str) -> str:
    """HTML that opens on a click."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def figure(drawing: Figure, caption: str) -> str:
    """A drawing as an inline picture with its caption, which is its alternative text too."""
    buffer = io.BytesIO()
    with style():
        drawing.savefig(buffer, format="svg", dpi=200, metadata={"Date": None, "Creator": None})
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    width = round(96 * drawing.get_figwidth())
    return (
        f'<figure><img alt="{escape(caption)}" width="{width}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def figure_row(figures: Sequence[str]) -> str:
    """Figures or tables beside each other, as many as fit."""
    return f'<div class="row">{"".join(figures)}</div>'


def table(frame: pd.DataFrame, formats: Mapping[str, Callable[[float], str]] | None = None) -> str:
    """A table that sorts on a click at a column's head and filters on what is typed.

    Args:
        frame: Its columns are the table's columns; the index is left out.
        formats: How to write the numbers of a column; others get three significant digits.
    """
    formats = formats or {}
    head = "".join(f'<th tabindex="0">{escape(str(column))}</th>' for column in frame)
    rows = []
    for row in frame.itertuples(index=False):
        cells = (_cell(value, formats.get(str(name))) for name, value in zip(frame, row, strict=True))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    search = '<input type="search" placeholder="type to filter" aria-label="filter the table">'
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="table">{search if len(rows) > 12 else ""}<div><table>{body}</table></div></div>'


def _cell(value: object, write: Callable[[float], str] | None) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        text = "–" if pd.isna(value) else write(value) if write else f"{value:.3g}"
        return f'<td class="number" data-value="{float(value)!r}">{escape(text)}</td>'
    return f"<td>{escape(str(value))}</td>"


def section(key: str, title: str, body: str) -> str:
    """A titled part of the page; ``key`` names it in the table of contents."""
    return f'<section id="{escape(key)}"><h2>{escape(title)}</h2>{body}</section>'


def page(title: str, subtitle: str, sections: Mapping[str, str], footer: str) -> str:
    """The whole page: no file, font or script is loaded from elsewhere.

    Args:
        title: Heading, and title of the window.
        subtitle: One line under it.
        sections: Title to body, in order.
        footer: Last line.
    """
    keys = {name: f"s{i}" for i, name in enumerate(sections)}
    links = "".join(f'<a href="#{key}">{escape(name)}</a>' for name, key in keys.items())
    body = "".join(section(keys[name], name, html) for name, html in sections.items())
    return Template(_PAGE).substitute(
        title=escape(title),
        subtitle=escape(subtitle),
        links=links,
        body=body,
        footer=escape(footer),
        css=_CSS,
        script=_SCRIPT,
    )


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>$title</title>
<style>$css</style>
</head>
<body>
<header><h1>$title</h1><p>$subtitle</p></header>
<nav>$links</nav>
<main>$body</main>
<footer>$footer</footer>
<script>$script</script>
</body>
</html>
"""

_CSS = """
:root { --ink: #20242a; --soft: #5b626c; --line: #e1e4e8; --accent: #0072b2; --paper: #fff;
  --ground: #f4f6f8; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: var(--ground);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
header { background: #12344d; color: #fff; padding: 28px max(24px, calc((100% - 1080px) / 2)); }
header h1 { margin: 0; font-size: 27px; } header p { margin: 6px 0 0; color: #c9d9e6; }
nav { position: sticky; top: 0; z-index: 2; display: flex; flex-wrap: wrap; gap: 2px 18px;
  background: var(--paper);
  padding: 9px max(24px, calc((100% - 1080px) / 2)); border-bottom: 1px solid var(--line); font-size: 14px; }
nav a { color: var(--accent); text-decoration: none; } nav a:hover { text-decoration: underline; }
main { max-width: 1128px; margin: 0 auto; padding: 8px 24px; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: 8px 26px 20px;
  margin: 18px 0; scroll-margin-top: 52px; }
h2 { font-size: 20px; margin: 14px 0 8px; } h3 { font-size: 16px; margin: 18px 0 4px; }
p, ul { max-width: 82ch; margin: 8px 0; } li { margin: 4px 0; } ul { padding-left: 22px; }
.lead { font-size: 18px; } .note { color: var(--soft); font-size: 14px; }
.warn { border-left: 4px solid #d55e00; padding: 6px 12px; background: #fdf3ec; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 14px 0; }
.tiles div { flex: 1 1 130px; background: var(--ground); border-radius: 8px; padding: 10px 14px; }
.tiles b { display: block; font-size: 23px; line-height: 1.25; }
.tiles span { color: var(--soft); font-size: 13px; }
figure { margin: 14px 0; } figure img { max-width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: 14px; max-width: 90ch; margin-top: 4px; }
.row { display: flex; flex-wrap: wrap; gap: 4px 22px; align-items: flex-start; }
.row figure { margin: 8px 0; }
.row figcaption { max-width: 44ch; } .row .table { flex: 1 1 320px; min-width: 0; }
.row th { white-space: normal; }
.table > div { overflow: auto; max-height: 430px; border: 1px solid var(--line); border-radius: 6px; }
.table { margin: 12px 0; max-width: max-content; }
.table input { margin-bottom: 8px; padding: 6px 10px; width: 240px; font: inherit; font-size: 14px;
  border: 1px solid #b9c0c8; border-radius: 6px; }
table { border-collapse: collapse; font-size: 14px; }
th { position: sticky; top: 0; background: #eef1f4; text-align: left; cursor: pointer; white-space: nowrap; }
th::after { content: " \\2195"; color: #98a1ab; } th.up::after { content: " \\2191"; color: var(--ink); }
th.down::after { content: " \\2193"; color: var(--ink); }
th, td { padding: 5px 12px; border-bottom: 1px solid var(--line); }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
tbody tr:hover { background: #f5f9fc; }
details { margin: 10px 0; } summary { cursor: pointer; color: var(--accent); }
footer { text-align: center; color: var(--soft); font-size: 13px; padding: 8px 24px 28px; }
@media print { nav, .table input { display: none; } section { break-inside: avoid; border: 0; }
  .table > div { max-height: none; } }
"""

_SCRIPT = """
document.querySelectorAll('.table').forEach(function (box) {
  var body = box.querySelector('tbody'), heads = Array.from(box.querySelectorAll('th'));
  var search = box.querySelector('input');
  if (search) search.addEventListener('input', function () {
    var words = search.value.toLowerCase().split(/\\s+/);
    Array.from(body.rows).forEach(function (row) {
      var text = row.textContent.toLowerCase();
      row.hidden = !words.every(function (word) { return text.includes(word); });
    });
  });
  function key(row, column) {
    var cell = row.cells[column];
    if (cell.dataset.value === undefined) return cell.textContent;
    return cell.dataset.value === 'nan' ? -Infinity : Number(cell.dataset.value);
  }
  function sort(column) {
    var numeric = body.rows[0].cells[column].dataset.value !== undefined;
    var before = heads[column].className, descending = before ? before === 'up' : numeric;
    heads.forEach(function (head) { head.className = ''; });
    heads[column].className = descending ? 'down' : 'up';
    var rows = Array.from(body.rows).sort(function (a, b) {
      var x = key(a, column), y = key(b, column);
      var order = numeric ? (x > y) - (x < y) : x.localeCompare(y, undefined, {numeric: true});
      return descending ? -order : order;
    });
    rows.forEach(function (row) { body.appendChild(row); });
  }
  heads.forEach(function (head, column) {
    head.addEventListener('click', function () { sort(column); });
    head.addEventListener('keydown', function (event) { if (event.key === 'Enter') sort(column); });
  });
});
"""
