import base64
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from pyro_causalcell.report import html

EVIL = "<script>alert('x')</script> & \"quoted\""
VOID = {"meta", "img", "input", "br"}


class Balanced(HTMLParser):
    """Reads a page and fails where tags do not match."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.texts = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def read(text):
    parser = Balanced()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


def _figure():
    figure = Figure()
    figure.subplots().plot([0, 1])
    return figure


def test_every_piece_escapes_what_it_is_given():
    frame = pd.DataFrame({EVIL: [EVIL], "n": [1.0]})
    pieces = [
        html.paragraph(EVIL, EVIL),
        html.items([EVIL]),
        html.tiles({EVIL: EVIL}),
        html.details(EVIL, ""),
        html.figure(_figure(), EVIL, EVIL),
        html.filtered("", EVIL),
        html.table(frame, {"n": lambda _: EVIL}, kinds={EVIL: {EVIL: EVIL}}),
        html.table(pd.concat([frame] * 20), label=EVIL),
        html.section(EVIL, EVIL, ""),
    ]
    for piece in pieces:
        assert "<script" not in piece
        assert [tag for tag, _ in read(piece).seen if tag == "script"] == []
    whole = html.page(EVIL, EVIL, {EVIL: "".join(pieces)}, EVIL)
    assert len([tag for tag, _ in read(whole).seen if tag == "script"]) == 1


def test_page_loads_nothing_from_outside():
    text = html.page(
        "t", "s", {"a": html.figure(_figure(), "c"), "b": html.table(pd.DataFrame({"x": [1]}))}, "f"
    )
    for tag, attributes in read(text).seen:
        assert tag not in {"link", "iframe", "object"}
        assert attributes.get("src", "data:").startswith("data:")
        assert attributes.get("href", "#").startswith("#")
    assert not re.search(r"https?://|@import|url\(", text)
    assert "default-src 'none'" in text


def test_contents_link_to_sections():
    seen = read(html.page("t", "s", {"First": "", "Second": ""}, "f")).seen
    ids = [a["id"] for tag, a in seen if tag == "section"]
    assert [a["href"] for tag, a in seen if tag == "a"] == [f"#{i}" for i in ids]


def test_figures_are_drawn_and_repeat_exactly():
    first, second = html.figure(_figure(), "c"), html.figure(_figure(), "c")
    assert first == second
    data = re.search(r"base64,([^\"]+)", first).group(1)
    assert b"</svg>" in base64.b64decode(data)


def test_tables_carry_sortable_values():
    frame = pd.DataFrame({"name": ["a", "b"], "p": [0.12345, np.nan]})
    text = html.table(frame, {"p": "{:.1%}".format})
    assert 'data-value="0.12345"' in text and ">12.3%<" in text and ">–<" in text
    assert "<input" not in text
    many = pd.concat([frame] * 7)
    assert "Filter by name <input" in html.table(many, label="Filter by name")
    assert "<input" not in html.table(many, label="")


def test_cells_are_marked_by_their_text():
    frame = pd.DataFrame({"status": ["good", "bad"], "name": ["good", "b"]})
    text = html.table(frame, kinds={"status": {"good": "ok"}})
    assert text.count('<td class="ok">good</td>') == 1 and "<td>good</td>" in text and "<td>bad</td>" in text


def test_filters_wait_for_the_script():
    text = html.filtered("<p>all of it</p>", "Filter")
    assert '<label class="filter" hidden>' in text and "<p>all of it</p>" in text
