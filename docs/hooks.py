"""What MkDocs does for this site beyond its settings: notebooks, formulas, and docstrings as Markdown."""

import re
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent.parent


def math(source: str, *_: Any, **__: Any) -> str:
    """A ``math`` fence as MathML, which browsers draw without a script."""
    if "&" in source:
        source = rf"\begin{{align*}}{source}\end{{align*}}"
    drawn = convert(source, display="block").replace("<mi>&#x0007E;</mi>", "<mo>&#x0223C;</mo>")
    return f'<div class="math">{drawn}</div>'


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Make ``math`` fences formulas."""
    fence = {"name": "math", "class": "math", "format": math}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add each notebook, with the outputs it was saved with, as a page and its figures."""
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        settings = {"unique_key": path.stem, "output_files_dir": path.stem}
        body, resources = MarkdownExporter().from_filename(str(path), resources=settings)
        source = f"Made by `examples/{path.stem}.py`; `examples/{path.name}` is the same as a notebook."
        files.append(
            File.generated(config, f"examples/{path.stem}.md", content=f"{body}\n\n---\n\n{source}\n")
        )
        for name, content in resources["outputs"].items():
            files.append(File.generated(config, f"examples/{name}", content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Add the functions that their module is named after: the reference of a room takes them for modules."""
    added = []
    for room in re.findall(r"^::: pyro_causalcell\.(\w+)$", markdown, flags=re.M):
        folder = ROOT / "pyro_causalcell" / room
        init = folder / "__init__.py"
        public = re.search(r"__all__ = \[(.*?)\]", init.read_text(), flags=re.S) if init.exists() else None
        names = re.findall(r'"(\w+)"', public[1]) if public else []
        added += [f"::: pyro_causalcell.{room}.{n}.{n}" for n in names if (folder / f"{n}.py").exists()]
    heading = "    options:\n      show_root_heading: true\n      show_root_toc_entry: true\n"
    return "\n\n".join([markdown, *(f"{directive}\n{heading}" for directive in added)])


class RestructuredText(griffe.Extension):
    """Docstrings hold a little reStructuredText: formulas, simple tables and roles."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Turn it into Markdown before the docstring is read."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """Formulas as ``math`` fences, simple tables as Markdown tables, roles as code."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    text = re.sub(r"^\.\. math::((?:.+)?(?:\n(?: +.*)?)*)", _fence, text, flags=re.M)
    return re.sub(r"^=+ [= ]*=\n(?:.+\n)+?=+ [= ]*=\n(?:.+\n)+?=+ [= ]*=$", _table, text, flags=re.M)


def _fence(found: re.Match[str]) -> str:
    lines = [line.strip() for line in found[1].splitlines()]
    return "\n".join(["```math", *filter(None, lines), "```", ""]) + "\n"


def _table(found: re.Match[str]) -> str:
    lines = found[0].splitlines()
    starts = [column.start() for column in re.finditer("=+", lines[0])]
    rows: list[list[str]] = []
    for line in lines:
        if line.startswith("="):
            continue
        cells = [
            line[a:b].strip().replace("|", r"\|") for a, b in zip(starts, [*starts[1:], None], strict=True)
        ]
        if cells[0]:
            rows.append(cells)
        else:  # the row above goes on
            rows[-1] = [" ".join(filter(None, pair)) for pair in zip(rows[-1], cells, strict=True)]
    rows.insert(1, ["---"] * len(starts))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
