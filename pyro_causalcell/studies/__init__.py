"""Studies: one module per paper's tables, with a common runner."""

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd

from pyro_causalcell.errors import CausalCellError

__all__ = ["STUDIES", "run_study"]

STUDIES = {
    "sparse-shift": "pyro_causalcell.studies.sparse_shift:run",
    "interventional": "pyro_causalcell.studies.interventional:run",
    "latent-scm": "pyro_causalcell.studies.latent_scm:run",
    "norman": "pyro_causalcell.studies.combinations:run_norman",
    "simulated-screen": "pyro_causalcell.studies.combinations:run_simulated",
    "joining": "pyro_causalcell.studies.joining:run",
    "unseen-singles": "pyro_causalcell.studies.unseen_singles:run",
    "temporal-scm": "pyro_causalcell.studies.temporal:run",
    "semrau": "pyro_causalcell.studies.semrau:run",
    "hipsc": "pyro_causalcell.studies.knock_outs:run_hipsc",
    "ipsc2": "pyro_causalcell.studies.knock_outs:run_ipsc2",
    "causal3dident": "pyro_causalcell.studies.causal3dident:run",
}
"""Name of a study -> the function that runs it."""


def run_study(name: str, out: str | Path, **settings: Any) -> pd.DataFrame:
    """Run a study by name, or go on with it.

    Args:
        name: One of :data:`STUDIES`.
        out: Folder of results.
        **settings: Arguments of the function that runs it.

    Returns:
        The table: study, setting, method, metric, mean, sd, n_seeds, paper.

    Raises:
        CausalCellError: No study of that name, or it has no such setting.
    """
    if name not in STUDIES:
        raise CausalCellError(f"no study {name!r}; there are {sorted(STUDIES)}")
    module, function = STUDIES[name].split(":")
    run = getattr(import_module(module), function)
    takes = [argument for argument in inspect.signature(run).parameters if argument != "out"]
    foreign = sorted(set(settings) - set(takes))
    if foreign:
        raise CausalCellError(f"the study {name} has no setting {foreign}; it takes {takes}")
    table: pd.DataFrame = run(out, **settings)
    return table
