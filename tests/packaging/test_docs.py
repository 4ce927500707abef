"""The site builds without a warning, reads without a network, and holds every public name."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BUILDING_BLOCKS = ["batch", "distributions", "errors", "nets", "penalties"]
PAIRS = [
    f"{room}.{file.stem}"
    for room in ("models", "guides")
    for file in sorted((Path(__file__).parents[2] / room).glob("[a-z]*.py"))
]
ROOMS = [
    "baselines",
    "data",
    "datasets",
    "evaluate",
    "inference",
    "plot",
    "predict",
    "report",
    "simulate",
    "studies",
]


@pytest.fixture(scope="module")
def site(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built pages."""
    folder = tmp_path_factory.mktemp("docs")
    package = folder / "links" / "pyro_causalcell"
    package.mkdir(parents=True)
    for entry in (*(checkout / "pyro_causalcell").iterdir(), checkout / "models", checkout / "guides"):
        (package / entry.name).symlink_to(entry)
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder / "site")],
        cwd=checkout,
        env=os.environ | {"LINKS": str(package.parent), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "site"


def test_rooms_are_those_of_the_package(packages_on_disk: set[str]) -> None:
    without_page = {"pyro_causalcell", "pyro_causalcell.models", "pyro_causalcell.guides"}
    assert {f"pyro_causalcell.{room}" for room in ROOMS} == packages_on_disk - without_page


def places(room: str, name: str) -> set[str]:
    """Where a public name may stand: in its room, or in its module where the two have one name."""
    module = importlib.import_module(f"pyro_causalcell.{room}")
    return {f"{module.__name__}.{name}", f"{getattr(getattr(module, name), '__module__', '')}.{name}"}


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    pages = "".join(page.read_text() for page in (site / "api").glob("*.html"))
    missing = [
        (room, name)
        for room in [*ROOMS, *PAIRS, *BUILDING_BLOCKS]
        for name in importlib.import_module(f"pyro_causalcell.{room}").__all__
        if not any(f'id="{place}"' in pages for place in places(room, name))
    ]
    assert missing == []


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    loads = re.compile(
        r"<(?:script|img|iframe)[^>]*\ssrc=\"?(?:https?:)?//|<link[^>]*stylesheet[^>]*//[^>]*>"
    )
    assert [page.name for page in site.rglob("*.html") if loads.search(page.read_text())] == []


def test_formulas_are_drawn_by_the_browser(site: Path) -> None:
    assert (site / "sparse-shift.html").read_text().count("<math") >= 6
    assert (site / "api" / "models.html").read_text().count("<math") >= 3
    left = [page.name for page in site.rglob("*.html") if re.search(r"\\mathrm|\.\. math::", visible(page))]
    assert left == []


def visible(page: Path) -> str:
    return re.sub(r"<annotation.*?</annotation>|<script.*?</script>", "", page.read_text(), flags=re.S)
