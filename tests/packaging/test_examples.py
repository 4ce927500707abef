"""Every example runs, as a user runs it, in a folder of its own; its notebook holds the same code."""

import os
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest

EXAMPLES = [
    "checks_and_likelihood",
    "edit_a_model",
    "first_fit",
    "plain_pyro",
    "unseen_combinations",
    "your_data",
]


def test_every_example_is_listed(checkout: Path) -> None:
    for suffix in (".py", ".ipynb"):
        assert EXAMPLES == sorted(path.stem for path in (checkout / "examples").glob(f"*{suffix}"))


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name: str, checkout: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(checkout / "examples" / f"{name}.py")],
        cwd=tmp_path,
        env=os.environ | {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "PYRO_CAUSALCELL_QUICK": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Quick run: its numbers mean nothing." in result.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_notebook_is_its_script_with_results(name: str, checkout: Path) -> None:
    notebook, script = (
        jupytext.read(checkout / "examples" / f"{name}{suffix}") for suffix in (".ipynb", ".py")
    )
    cells = [[(cell.cell_type, cell.source) for cell in read.cells] for read in (notebook, script)]
    assert cells[0] == cells[1], "run `make notebooks` after a change of an example"
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert outputs
    assert [output for output in outputs if output.output_type == "error"] == []
    assert "Quick run" not in str(outputs)
