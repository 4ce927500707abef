"""Who may import whom, checked on the package laid out as it is installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GROUND = {
    f"pyro_causalcell.{name}"
    for name in ("batch", "direct", "distributions", "embeddings", "epistasis", "errors", "nets", "penalties")
}

# A forbidden import in each room -> the contract that must break.
VIOLATIONS = [
    ("batch.py", "import pyro_causalcell.data", "Imports go down"),
    ("nets.py", "import scanpy", "The ground floor"),
    ("models/__init__.py", "import pyro_causalcell.guides", "Models import"),
    ("models/__init__.py", "import anndata", "Models import"),
    ("guides/__init__.py", "import pyro_causalcell.models", "Guides import"),
    ("guides/__init__.py", "import pyro_causalcell.inference", "Guides import"),
    ("data/__init__.py", "import pyro_causalcell.inference", "Data, simulators"),
    ("simulate/__init__.py", "import pyro_causalcell.distributions", "Data, simulators"),
    ("inference/__init__.py", "import pyro_causalcell.models", "Inference imports"),
    ("inference/__init__.py", "import pyro_causalcell.predict", "Inference imports"),
    ("predict/__init__.py", "import pyro_causalcell.guides", "Prediction, evaluation"),
    ("evaluate/__init__.py", "import pyro_causalcell.studies", "Prediction, evaluation"),
    ("plot/__init__.py", "import pyro_causalcell.models", "Figures are drawn"),
    ("report/__init__.py", "import pyro_causalcell.cli", "Imports go down"),
]


def run(code: str, folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run code where ``folder`` holds the package; this process has the one of the checkout loaded."""
    environment = os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "200"}
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def lint(folder: Path, checkout: Path) -> subprocess.CompletedProcess[str]:
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return run(code, folder, "--config", str(checkout / "pyproject.toml"), "--no-cache", "--no-logo")


@pytest.fixture
def imports(link_tree: Path) -> dict[str, list[str]]:
    """Each module of the package -> the modules and libraries that it names, as the linter reads them."""
    code = (
        "import grimp, json\n"
        "graph = grimp.build_graph('pyro_causalcell', include_external_packages=True, cache_dir=None)\n"
        "named = {m: sorted(graph.find_modules_directly_imported_by(m)) for m in graph.modules}\n"
        "print(json.dumps({m: named[m] for m in named if m.split('.')[0] == 'pyro_causalcell'}))\n"
    )
    result = run(code, link_tree)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def broken(output: str) -> list[str]:
    return [line.removesuffix(" BROKEN") for line in output.splitlines() if line.endswith(" BROKEN")]


def test_rules_hold(link_tree: Path, checkout: Path) -> None:
    result = lint(link_tree, checkout)
    assert result.returncode == 0, result.stdout + result.stderr


def test_linter_sees_every_module(imports: dict[str, list[str]], modules_on_disk: set[str]) -> None:
    assert imports.keys() == modules_on_disk


@pytest.mark.parametrize(("file", "line", "contract"), VIOLATIONS)
def test_a_planted_violation_breaks_its_contract(
    source_copy: Path, checkout: Path, file: str, line: str, contract: str
) -> None:
    path = source_copy / "pyro_causalcell" / file
    path.write_text(f"{path.read_text()}\n{line}\n")
    result = lint(source_copy, checkout)
    assert result.returncode == 1, result.stdout + result.stderr
    assert any(name.startswith(contract) for name in broken(result.stdout)), result.stdout


def test_a_room_without_a_rule_is_refused(source_copy: Path, checkout: Path) -> None:
    (source_copy / "pyro_causalcell" / "attic.py").touch()
    result = lint(source_copy, checkout)
    assert result.returncode == 1
    assert "pyro_causalcell.attic" in result.stdout


@pytest.mark.parametrize("room", ["models", "guides"])
def test_models_and_guides_need_torch_and_pyro_alone(imports: dict[str, list[str]], room: str) -> None:
    inside = {name for name in imports if f"{name}.".startswith(f"pyro_causalcell.{room}.")}
    imported = {target for name in inside for target in imports[name]}
    assert imported - inside - GROUND - {"pyro", "torch"} - set(sys.stdlib_module_names) == set()
