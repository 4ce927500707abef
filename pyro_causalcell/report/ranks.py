"""Simulation-based calibration that was run beforehand: what its folder holds, and how to make one."""

import inspect
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from pyro import poutine

from pyro_causalcell.errors import DataError
from pyro_causalcell.inference import Fit
from pyro_causalcell.inference.posterior import sample_sites
from pyro_causalcell.predict import programme_names
from pyro_causalcell.predict.globals import stub_batch
from pyro_causalcell.report.over_time import follows_cells

__all__ = ["Ranks", "read_ranks", "sbc_command"]

_COLUMNS = ["quantity", "position", "spread", "ecdf_p", "chi2_p", "symmetry_p", "rejected", "finding"]


@dataclass(frozen=True)
class Ranks:
    """Simulation-based calibration as ``pyro-causalcell sbc`` wrote it.

    Attributes:
        table: One row per latent quantity, as ``evaluate.rank_tests`` returns.
        n_replicates: Simulated screens.
        picture: The figure of the ranks, a PNG file.
    """

    table: pd.DataFrame
    n_replicates: int
    picture: bytes


def read_ranks(folder: str | Path, fit: Fit) -> Ranks:
    """Read a folder that ``pyro-causalcell sbc`` wrote.

    Args:
        folder: The folder: sbc.csv, ranks.csv and sbc.png.
        fit: The fit of the report; its model must have the latents that were ranked.

    Raises:
        DataError: A file is missing or another one, or the ranks are of another model's latents.
    """
    folder, command = Path(folder), sbc_command(fit)
    if command is None:
        raise DataError(
            "expected a model of single snapshots for sbc=, found one that follows cells over time, which "
            "'pyro-causalcell sbc' cannot simulate; leave it out."
        )
    try:
        table, ranks = pd.read_csv(folder / "sbc.csv"), pd.read_csv(folder / "ranks.csv")
        picture = (folder / "sbc.png").read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(
            f"expected sbc.csv, ranks.csv and sbc.png in {folder}, found: {error}. Give the folder that "
            "'pyro-causalcell sbc' wrote."
        ) from error
    missing = [name for name in _COLUMNS if name not in table]
    if missing:
        raise DataError(f"{folder / 'sbc.csv'} lacks the columns {missing}; run 'pyro-causalcell sbc' again.")
    ranked = sorted({str(quantity).partition("[")[0] for quantity in table["quantity"]})
    own = sorted(_latents(fit)[0])
    if ranked != own:
        raise DataError(
            f"{folder} has ranks of the latents {ranked}, and the model of this fit has {own}; run "
            f"'{command}'."
        )
    return Ranks(table.assign(finding=table["finding"].fillna("")), len(ranks), picture)


def sbc_command(fit: Fit) -> str | None:
    """What checks the pair of a fit on small simulated screens; None where these cannot, for lack of times.

    Factors that weigh the prior are switched off, since it refuses them.
    """
    if follows_cells(fit):
        return None
    chosen = fit.settings["model"]
    if chosen["settings"] is None:  # built by the user, so no command knows how
        return "pyro_causalcell.evaluate.sbc(model, guide, pyro_causalcell.evaluate.design_screen())"
    arguments = inspect.signature(type(fit.model)).parameters
    size = f" --latents {min(2, len(programme_names(fit)))}" if "n_latents" in arguments else ""
    off = "".join(f" --settings.{name} 0" for name in _latents(fit)[1] if name in arguments)
    return f"pyro-causalcell sbc {chosen['source']}{size}{off} --out sbc"


def _latents(fit: Fit) -> tuple[list[str], list[str]]:
    """Names of the model's latents, and of the factors that weigh its prior."""
    batch = stub_batch(fit, torch.zeros(1, fit.dims.n_targets))._replace(x_ng=None)
    with torch.no_grad(), torch.random.fork_rng():
        trace = poutine.trace(fit.model).get_trace(batch)
    sites = sample_sites(trace)
    latents = [name for name, site in sites.items() if not site["is_observed"] and name != "x"]
    factors = [
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and type(site["fn"]).__name__ == "Unit"
    ]
    return latents, factors
