"""The audit of a design from the command line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

Run = Callable[..., Any]


def test_audit_prints_and_writes_a_table(cli: Run, data: Path) -> None:
    words = ["--perturbation", "target", "--control", "non-targeting", "--batch", "batch"]
    result = cli("audit", data, *words, "--latents", 3, "--out", "new/audit.csv")
    assert (result.code, result.err) == (0, [])
    assert result.out[0] == "3 programmes, 400 cells of 5 perturbations and 100 controls"
    table = pd.read_csv("new/audit.csv").set_index("name")
    assert table.loc["independent perturbations", "status"] == "ok"
    assert table.loc["control cells", "status"] == "warning" and table.loc["time points", "status"] == "fails"
    assert any("independent perturbations" in line for line in result.out)


def test_audit_of_a_screen_without_controls(cli: Run, data: Path) -> None:
    result = cli("audit", data, "--perturbation", "target", "--no-controls", "--latents", 2)
    assert result.code == 0 and any("profile" in line and "unperturbed" in line for line in result.out)
    assert not list(Path().iterdir())
    missing = cli("audit", data, "--perturbation", "target")
    assert missing.code == 2 and "--no-controls" in missing.err[0]
