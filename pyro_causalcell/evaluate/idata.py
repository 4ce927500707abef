"""ArviZ: posterior, predictive draws, observed data and log-likelihood with named coordinates."""

from typing import Any

import arviz as az
import numpy as np
import xarray as xr

from pyro_causalcell.data import Screen
from pyro_causalcell.evaluate.likelihood import iw_nll
from pyro_causalcell.inference import Fit
from pyro_causalcell.predict import edge_names, global_draws, latents, programme_names, replicate

__all__ = ["to_inference_data"]

EDGE_DIMS = ["perturbation", "programme"]


def to_inference_data(
    fit: Fit, screen: Screen, rows: np.ndarray | None = None, *, n_samples: int = 100, seed: int = 0
) -> Any:
    """What ArviZ needs: draws of the global latents, replicated cells, observed cells, log-likelihood.

    Args:
        fit: The fit.
        screen: The cells, through the fit's names (``Screen.from_spec(fit.screen, adata)``).
        rows: Which cells; None takes the validation cells, at most 500 of them.
        n_samples: Posterior draws.
        seed: Seed of the draws.

    Returns:
        InferenceData (ArviZ < 1) or DataTree (ArviZ ≥ 1) with the groups ``posterior`` (gate, shift, ...
        over perturbation and programme; left out where a pair has no global latents),
        ``posterior_predictive`` and ``observed_data`` (``x`` over cell and gene), ``log_likelihood`` (one
        importance-weighted value a cell) and ``constant_data`` (``z_mean``: each cell's posterior mean).
    """
    rows = fit.split.validation[:500] if rows is None else np.asarray(rows)
    cells = screen.adata.obs_names.to_numpy()[rows].astype(str)
    draws = {name: value.cpu().numpy() for name, value in global_draws(fit, n_samples, seed).items()}
    coords = {"chain": [0], "draw": np.arange(n_samples), "cell": cells, "gene": fit.screen.genes}
    coords["programme"] = programme_names(fit)
    n_edges = max((value.shape[1] for value in draws.values() if value.ndim == 3), default=0)
    coords["perturbation"] = edge_names(fit, n_edges)
    posterior = {
        name: (["chain", "draw", *(EDGE_DIMS if value.ndim == 3 else _plain_dims(name, value))], value[None])
        for name, value in draws.items()
    }
    z_nk = latents(fit, screen).obsm["X_causalcell"][rows]
    nll_n = iw_nll(fit, screen, rows, n_particles=200, seed=seed)["nll"].to_numpy()
    x_sng = replicate(fit, screen, rows, n_samples, seed)
    groups = {
        "posterior": xr.Dataset(posterior),
        "posterior_predictive": xr.Dataset({"x": (["chain", "draw", "cell", "gene"], x_sng[None])}),
        "observed_data": xr.Dataset({"x": (["cell", "gene"], screen.x(rows))}),
        "log_likelihood": xr.Dataset({"x": (["chain", "draw", "cell"], -nll_n[None, None])}),
        "constant_data": xr.Dataset({"z_mean": (["cell", "programme"], z_nk)}),
    }
    named = {name: _with_coords(group, coords) for name, group in groups.items() if group.data_vars}
    return _convert(named)


def _plain_dims(name: str, value: np.ndarray) -> list[str]:
    return [f"{name}_dim_{i}" for i in range(value.ndim - 1)]


def _with_coords(group: xr.Dataset, coords: dict[str, Any]) -> xr.Dataset:
    """Only the coordinates that a group uses; the log-likelihood has a single draw."""
    used = {k: v for k, v in coords.items() if k in group.sizes and len(v) == group.sizes[k]}
    return group.assign_coords(used)


def _convert(groups: dict[str, Any]) -> Any:
    """The container of the ArviZ that is installed."""
    if hasattr(az, "InferenceData"):
        return az.InferenceData(**groups)
    return xr.DataTree.from_dict(groups)
