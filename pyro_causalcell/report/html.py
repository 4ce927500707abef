"""The few pieces of HTML a page is made of. Every piece of text from outside is escaped here."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from html import escape
from string import Template

import pandas as pd
from matplotlib.figure import Figure

from pyro_causalcell.plot import style

__all__ = [
    "details",
    "figure",
    "figure_row",
    "filtered",
    "items",
    "page",
    "paragraph",
    "picture",
    "section",
    "table",
    "tiles",
]

_WIDE = 620  # pixels; wider figures scroll in a narrow window, to stay readable
_MANY_ROWS = 12  # a table with more gets a box to filter it by


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


def figure(drawing: Figure, caption: str, name: str = "") -> str:
    """A drawing as an inline picture with its caption, which is its alternative text too.

    Args:
        drawing: The drawing.
        caption: What it shows.
        name: What :func:`filtered` finds it by; a figure without one is never filtered out.
    """
    buffer = io.BytesIO()
    with style():
        drawing.savefig(buffer, format="svg", dpi=200, metadata={"Date": None, "Creator": None})
    return picture(buffer.getvalue(), "svg+xml", round(96 * drawing.get_figwidth()), caption, name)


def picture(content: bytes, kind: str, width: int, caption: str, name: str = "") -> str:
    """An image file as an inline picture.

    Args:
        content: The file's content.
        kind: What follows ``image/`` in its media type.
        width: Width in pixels, where there is room.
        caption: What it shows; its alternative text too.
        name: As for :func:`figure`.
    """
    data = base64.b64encode(content).decode("ascii")
    named = f' data-name="{escape(name)}"' if name else ""
    image = f'<img alt="{escape(caption)}" width="{width}" src="data:image/{kind};base64,{data}">'
    box = "scroll wide" if width > _WIDE else "scroll"
    return (
        f'<figure{named}><div class="{box}">{image}</div><figcaption>{escape(caption)}</figcaption></figure>'
    )


def figure_row(figures: Sequence[str]) -> str:
    """Figures or tables beside each other, as many as fit."""
    return f'<div class="row">{"".join(figures)}</div>'


def filtered(body: str, label: str) -> str:
    """HTML under a box that hides the table rows and named figures without the words typed in it.

    The box is shown by the page's script; without it, all of the body is.

    Args:
        body: The HTML; no part of it may be under another box.
        label: Of the box.
    """
    box = (
        f'<label class="filter" hidden>{escape(label)} <input type="search" autocomplete="off">'
        '<span role="status"></span></label>'
    )
    return f'<div class="filtered">{box}{body}</div>'


def table(
    frame: pd.DataFrame,
    formats: Mapping[str, Callable[[float], str]] | None = None,
    *,
    label: str = "Filter the table",
    kinds: Mapping[str, Mapping[str, str]] | None = None,
) -> str:
    """A table that scrolls in its own box and sorts on a click at a column's head.

    More than a dozen rows are under a box to filter them by.

    Args:
        frame: Its columns are the table's columns; the index is left out.
        formats: How to write the numbers of a column; others get three significant digits.
        label: Of the filter; without text the table gets none.
        kinds: CSS class of the cells of a column, by their text.
    """
    formats, kinds = formats or {}, kinds or {}
    names = [str(column) for column in frame]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    rows = []
    for row in frame.itertuples(index=False):
        cells = (
            _cell(value, formats.get(name), kinds.get(name, {}).get(str(value), ""))
            for name, value in zip(names, row, strict=True)
        )
        rows.append(f"<tr>{''.join(cells)}</tr>")
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    text = f'<div class="table" tabindex="0" role="region" aria-label="table"><table>{body}</table></div>'
    return filtered(text, label) if label and len(rows) > _MANY_ROWS else text


def _cell(value: object, write: Callable[[float], str] | None, kind: str) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        text = "–" if pd.isna(value) else write(value) if write else f"{value:.3g}"
        return f'<td class="number" data-value="{float(value)!r}">{escape(text)}</td>'
    marked = f' class="{escape(kind)}"' if kind else ""
    return f"<td{marked}>{escape(str(value))}</td>"


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
:root { --ink: #20242a; --soft: #5b626c; --line: #e1e4e8; --accent: #00619a; --paper: #fff;
  --ground: #f4f6f8; }
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body { margin: 0; color: var(--ink); background: var(--ground);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
header { background: #12344d; color: #fff; padding: 28px max(24px, calc((100% - 1080px) / 2)); }
header h1 { margin: 0; font-size: 27px; line-height: 1.25; } header p { margin: 6px 0 0; color: #c9d9e6; }
nav { position: sticky; top: 0; z-index: 2; display: flex; flex-wrap: wrap; gap: 2px 18px;
  background: var(--paper);
  padding: 9px max(24px, calc((100% - 1080px) / 2)); border-bottom: 1px solid var(--line); font-size: 14px; }
nav a { color: var(--accent); text-decoration: none; white-space: nowrap; }
nav a:hover { text-decoration: underline; }
:focus-visible { outline: 3px solid #d55e00; outline-offset: 2px; border-radius: 3px; }
main { max-width: 1128px; margin: 0 auto; padding: 8px 24px; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: 8px 26px 20px;
  margin: 18px 0; scroll-margin-top: 70px; }
h2 { font-size: 20px; margin: 14px 0 8px; } h3 { font-size: 16px; margin: 22px 0 4px; }
p, ul { max-width: 82ch; margin: 8px 0; } li { margin: 4px 0; } ul { padding-left: 22px; }
p, li, td, figcaption, h1 { overflow-wrap: break-word; }
.lead { font-size: 18px; } .note { color: var(--soft); font-size: 14px; }
.good, .warn { border-left: 4px solid #00785a; padding: 6px 12px; background: #eef8f4; }
.warn { border-color: #d55e00; background: #fdf3ec; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 14px 0; }
.tiles div { flex: 1 1 130px; background: var(--ground); border-radius: 8px; padding: 10px 14px; }
.tiles b { display: block; font-size: 23px; line-height: 1.25; }
.tiles span { color: var(--soft); font-size: 13px; }
figure { margin: 14px 0; } figure img { max-width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
figcaption { color: var(--soft); font-size: 14px; max-width: 90ch; margin-top: 4px; }
.row { display: flex; flex-wrap: wrap; gap: 4px 22px; align-items: flex-start; }
.row > * { max-width: 100%; }
.row figure { margin: 8px 0; }
.row figcaption { max-width: 52ch; }
.table { overflow: auto; margin: 12px 0; width: fit-content; max-width: 100%;
  border: 1px solid var(--line); border-radius: 6px; }
.filtered .table { max-height: 430px; }
.row .table { flex: 1 1 320px; min-width: 0; }
.filter { display: block; margin: 12px 0 8px; font-size: 14px; }
.filter input { padding: 6px 10px; margin: 0 8px; width: 240px; max-width: 100%; font: inherit;
  border: 1px solid #767f8a; border-radius: 6px; }
.filter span { color: var(--soft); }
table { border-collapse: collapse; font-size: 14px; }
th { position: sticky; top: 0; background: #eef1f4; text-align: left; vertical-align: bottom; }
th button { all: unset; box-sizing: border-box; cursor: pointer; width: 100%; }
th button:focus-visible { outline: 3px solid #d55e00; outline-offset: 2px; }
th button::after { content: " \\2195"; color: #6b7480; }
th[aria-sort=ascending] button::after { content: " \\2191"; color: var(--ink); }
th[aria-sort=descending] button::after { content: " \\2193"; color: var(--ink); }
th, td { padding: 5px 12px; border-bottom: 1px solid var(--line); }
td { vertical-align: top; max-width: 46ch; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.ok, td.warning, td.fails, td.unknown { white-space: nowrap; font-weight: 600; }
td.ok { color: #00644b; } td.warning { color: #8a4b00; } td.fails { color: #a32000; }
td.unknown { color: var(--soft); }
tbody tr:hover { background: #f5f9fc; }
details { margin: 10px 0; } summary { cursor: pointer; color: var(--accent); }
footer { text-align: center; color: var(--soft); font-size: 13px; padding: 8px 24px 28px; }
@media (max-width: 700px) {
  header { padding: 18px 16px; } header h1 { font-size: 22px; }
  nav { flex-wrap: nowrap; overflow-x: auto; padding: 9px 16px; }
  main { padding: 0 8px; } section { padding: 4px 14px 14px; margin: 10px 0; scroll-margin-top: 48px; }
  .filter input { display: block; margin: 4px 0; width: 100%; }
  th, td { padding: 5px 8px; }
  .wide img { max-width: 620px; }
  table { width: max-content; } td { max-width: 26ch; } th { max-width: 16ch; }
}
@media print { nav, .filter { display: none; } section { break-inside: avoid; border: 0; }
  .filtered .table { max-height: none; } }
"""

_SCRIPT = """
function names(row) {
  return Array.from(row.cells).filter(function (cell) { return cell.dataset.value === undefined; })
    .map(function (cell) { return cell.textContent; }).join(' ');
}
document.querySelectorAll('.filtered').forEach(function (group) {
  var label = group.querySelector('.filter'), box = label.querySelector('input');
  var count = label.querySelector('[role=status]');
  var items = Array.from(group.querySelectorAll('tbody tr, figure[data-name]'));
  var folds = Array.from(group.querySelectorAll('details'));
  label.hidden = false;
  box.addEventListener('input', function () {
    var words = box.value.toLowerCase().split(/\\s+/), shown = 0;
    items.forEach(function (item) {
      var text = (item.dataset.name || names(item)).toLowerCase();
      item.hidden = !words.every(function (word) { return text.includes(word); });
      if (!item.hidden) shown += 1;
    });
    var typed = box.value.trim() !== '';
    if (typed) folds.forEach(function (fold) { fold.open = true; });
    count.textContent = typed ? shown + ' of ' + items.length + ' shown' : '';
  });
});
document.querySelectorAll('table').forEach(function (table) {
  var body = table.tBodies[0], heads = Array.from(table.tHead.rows[0].cells);
  if (body.rows.length < 2) return;
  function key(row, column) {
    var cell = row.cells[column];
    if (cell.dataset.value === undefined) return cell.textContent;
    return cell.dataset.value === 'nan' ? NaN : Number(cell.dataset.value);
  }
  function sort(column) {
    var numeric = body.rows[0].cells[column].dataset.value !== undefined;
    var before = heads[column].getAttribute('aria-sort');
    var descending = before ? before === 'ascending' : numeric;
    heads.forEach(function (head) { head.removeAttribute('aria-sort'); });
    heads[column].setAttribute('aria-sort', descending ? 'descending' : 'ascending');
    Array.from(body.rows).sort(function (a, b) {
      var x = key(a, column), y = key(b, column);
      if (numeric && (isNaN(x) || isNaN(y))) return isNaN(x) - isNaN(y);
      var order = numeric ? x - y : x.localeCompare(y, undefined, {numeric: true});
      return descending ? -order : order;
    }).forEach(function (row) { body.appendChild(row); });
  }
  heads.forEach(function (head, column) {
    var button = document.createElement('button');
    button.type = 'button';
    button.append.apply(button, Array.from(head.childNodes));
    button.addEventListener('click', function () { sort(column); });
    head.append(button);
  });
});
"""
