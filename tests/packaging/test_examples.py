"""Every example runs, as a user runs it, in a folder of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Each file of examples/ -> the arguments that make it quick.
EXAMPLES: dict[str, list[str]] = {"edit_a_model.py": [], "plain_pyro.py": []}


def test_every_example_is_listed(checkout: Path) -> None:
    assert set(EXAMPLES) == {path.name for path in (checkout / "examples").glob("*.py")}


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_example_runs(name: str, checkout: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(checkout / "examples" / name), *EXAMPLES[name]],
        cwd=tmp_path,
        env=os.environ | {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "PYRO_CAUSALCELL_QUICK": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
