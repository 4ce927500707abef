"""The checks that `make test` runs first do bite, and nothing of one machine is left in the files."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

TEXT = {".cfg", ".cff", ".ipynb", ".md", ".py", ".toml", ".txt", ".yaml", ""}
SKIPPED = {"build", "demo", "dist", "runs", "__pycache__"}
HOME = re.compile(r"(?<![\w.~/])/(?:home|root|Users|work)/")


def ruff_codes(checkout: Path, place: str, code: str) -> set[str]:
    """Codes that ruff, set up as the project is, finds in ``code`` standing at ``place``."""
    command = [sys.executable, "-m", "ruff", "check", "--output-format", "json", "--no-cache"]
    result = subprocess.run(
        [*command, "--stdin-filename", str(checkout / place), "-"],
        cwd=checkout,
        input=code,
        capture_output=True,
        text=True,
        check=False,
    )
    return {finding["code"] for finding in json.loads(result.stdout)}


@pytest.mark.parametrize(
    ("place", "code", "expected"),
    [
        ("tests/test_x.py", "import models.sparse_shift\n\nprint(models)\n", {"TID251"}),
        ("tests/test_x.py", "from guides import template\n\nprint(template)\n", {"TID251"}),
        ("tests/test_x.py", "from pyro_causalcell.models import template\n\nprint(template)\n", set()),
        ("models/x.py", '"""X."""\n\n\ndef shift(z_nk):\n    return z_nk\n', {"D103"}),
        ("models/x.py", "X = 1\n", {"D100"}),
        ("pyro_causalcell/data/x.py", '"""X."""\n\nimport os\n', {"F401"}),
        ("pyro_causalcell/nets.py", '"""X."""\n\nW_kg = 1\n', set()),
    ],
)
def test_ruff_bites(checkout: Path, place: str, code: str, expected: set[str]) -> None:
    assert ruff_codes(checkout, place, code) == expected


def test_mypy_bites_in_every_folder(checkout: Path, tmp_path: Path) -> None:
    places = [tmp_path / "pyro_causalcell" / room for room in ("", "data", "models", "guides")]
    for place in places:
        place.mkdir(exist_ok=True)
        (place / "__init__.py").write_text("def untyped(x):\n    return x\n")
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(checkout / "pyproject.toml"), "--no-incremental"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1, result.stdout + result.stderr
    found = {line.split(":")[0] for line in result.stdout.splitlines() if "[no-untyped-def]" in line}
    assert found == {str((place / "__init__.py").relative_to(tmp_path)) for place in places}


def test_no_path_of_a_machine(checkout: Path) -> None:
    files = (
        path
        for entry in checkout.iterdir()
        if entry.name not in SKIPPED and (not entry.name.startswith(".") or entry.name == ".ci")
        for path in ([entry] if entry.is_file() else entry.rglob("*"))
        if path.is_file() and path.suffix in TEXT and "egg-info" not in str(path)
    )
    assert [str(path) for path in files if HOME.search(path.read_text())] == []


def test_set_up_names_no_package_index(checkout: Path) -> None:
    for name in ("Makefile", ".ci/run", "constraints.txt", "setup.cfg", "pyproject.toml"):
        assert re.findall(r"https?://|index-url|find-links", (checkout / name).read_text()) == [], name
