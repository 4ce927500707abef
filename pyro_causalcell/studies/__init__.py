"""Studies: one module per paper's tables, with a common runner."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd

from pyro_causalcell.errors import CausalCellError

__all__ = ["STUDIES", "run_study"]

STUDIES = {"sparse-shift": "pyro_causalcell.studies.sparse_shift"}
"""Name of a study -> module with its ``run``."""


def run_study(name: str, out: str | Path, **settings: Any) -> pd.DataFrame:
    """Run a study by name, or go on with it.

    Args:
        name: One of :data:`STUDIES`.
        out: Folder of results.
        **settings: Arguments of the study's ``run``.

    Returns:
        The table: study, setting, method, metric, mean, sd, n_seeds, paper.

    Raises:
        CausalCellError: No study of that name.
    """
    if name not in STUDIES:
        raise CausalCellError(f"no study {name!r}; there are {sorted(STUDIES)}")
    table: pd.DataFrame = import_module(STUDIES[name]).run(out, **settings)
    return table
