"""How programmes evolve: of whole conditions, and of single cells under perturbations they did not have."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_causalcell.batch import Batch
from pyro_causalcell.data import Minibatches, Screen
from pyro_causalcell.errors import PredictionError
from pyro_causalcell.inference import Fit
from pyro_causalcell.predict.cells import (
    asked_times,
    cell_latents,
    cell_trace,
    prior_cells,
    seeded,
    situated,
)
from pyro_causalcell.predict.globals import design, global_draws, programme_names

__all__ = ["cell_trajectories", "trajectories"]


def trajectories(
    fit: Fit,
    conditions: Sequence[str],
    times: Sequence[float] | None = None,
    *,
    n_samples: int = 50,
    n_cells: int = 256,
    interval: float = 0.9,
    seed: int = 0,
) -> xr.Dataset:
    """Mean of each programme over time under each perturbation, with intervals.

    Args:
        fit: A fit of a model that follows cells over time.
        conditions: Names such as ``"A"``, ``"A+B"`` or ``"control"``, measured or not.
        times: Times, from the first snapshot on; None is every snapshot of the fit.
        n_samples: Draws of the global latents.
        n_cells: Simulated cells for each draw.
        interval: Mass of the equal-tailed intervals.
        seed: Seed of the draws.

    Returns:
        Over ``condition``, ``time`` and ``programme``: ``mean``, and ``low`` and ``high`` of the posterior of
        the mean; ``cell_sd``, the standard deviation of single cells. In standard deviations of a control
        programme at the first snapshot.

    Raises:
        PredictionError: The model does not follow cells over time, or numbers are out of range.
        DataError: A target is unknown.
    """
    names, at = _asked(fit, conditions, times, n_samples, n_cells, interval)
    u_cp = design(fit, names).to(fit.device)
    draws = global_draws(fit, n_samples, seed)
    mean_sctk, sd_sctk = [], []
    with seeded(fit, seed):
        cells = prior_cells(fit, u_cp[:1].expand(n_cells, -1), seed)
        for s in range(n_samples):
            draw = {site: values[s] for site, values in draws.items()}
            z_ctnk = torch.stack(
                [
                    torch.stack([_programmes(fit, cells, name, u_p, time, draw, seed + s) for time in at])
                    for name, u_p in zip(names, u_cp, strict=True)
                ]
            )
            mean_sctk.append(z_ctnk.mean(2).cpu().numpy())
            sd_sctk.append(z_ctnk.std(2).cpu().numpy())
    values = _summary(np.stack(mean_sctk), interval) | {"cell_sd": np.stack(sd_sctk).mean(0)}
    coords = {"condition": names, "time": at, "programme": programme_names(fit)}
    return _dataset(values, coords, interval, n_samples)


def cell_trajectories(
    fit: Fit,
    screen: Screen,
    rows: Sequence[int],
    conditions: Sequence[str],
    times: Sequence[float] | None = None,
    *,
    n_samples: int = 100,
    interval: float = 0.9,
    seed: int = 0,
) -> xr.Dataset:
    """What becomes of measured cells under perturbations: this control cell, had it been given A+B.

    Each draw takes the cell's programmes from the guide and the global latents from their posterior, and
    lets the cell evolve from its own time on, with innovations drawn anew, the same under all perturbations.

    Args:
        fit: A fit of a model that follows cells over time.
        screen: The cells, through the fit's names.
        rows: Which cells.
        conditions: Names such as ``"A"``, ``"A+B"`` or ``"control"``, measured or not.
        times: Times, none before a cell's own; None is every snapshot from the latest of these cells on.
        n_samples: Draws for each cell.
        interval: Mass of the equal-tailed intervals.
        seed: Seed of the draws.

    Returns:
        Over ``cell``, ``condition``, ``time`` and ``programme``: ``mean``, ``low``, ``high`` of what the cell
        may become.

    Raises:
        PredictionError: The model does not follow cells over time, a time lies before a cell's, or numbers
            are out of range.
        DataError: A target is unknown.
    """
    names, at = _asked(fit, conditions, times, n_samples, len(rows), interval)
    if screen.time_n is None:
        raise PredictionError(
            "these cells have no times; open their screen with Screen.from_spec(fit.screen, ...)"
        )
    index = np.asarray(rows, dtype=np.int64)
    if times is None:
        at = [time for time in at if time >= screen.time_n[index].max()]
    u_cp = design(fit, names).to(fit.device)
    draws = global_draws(fit, n_samples, seed)
    drawn = []
    with seeded(fit, seed):
        factual = next(iter(Minibatches(screen, index, len(index), shuffle=False, device=fit.device)))
        for s in range(n_samples):
            draw = {site: values[s] for site, values in draws.items()}
            z_ctnk = torch.stack(
                [
                    torch.stack(
                        [_programmes(fit, factual, name, u_p, time, draw, seed + s, factual) for time in at]
                    )
                    for name, u_p in zip(names, u_cp, strict=True)
                ]
            )
            drawn.append(z_ctnk.permute(2, 0, 1, 3).cpu().numpy())
    cells = screen.adata.obs_names.to_numpy()[index].astype(str)
    coords = {"cell": cells, "condition": names, "time": at, "programme": programme_names(fit)}
    return _dataset(_summary(np.stack(drawn), interval), coords, interval, n_samples)


def _asked(
    fit: Fit,
    conditions: Sequence[str],
    times: Sequence[float] | None,
    n_samples: int,
    n_cells: int,
    interval: float,
) -> tuple[list[str], list[float]]:
    if n_samples < 1 or n_cells < 1 or not conditions or not 0 < interval < 1:
        raise PredictionError(
            "expected conditions, n_samples and cells of at least 1, and interval between 0 and 1"
        )
    at = asked_times(fit, times)
    if at == [None]:
        raise PredictionError("this model does not follow cells over time; fit temporal-scm for trajectories")
    return [fit.screen.canonical(c) for c in conditions], [float(time) for time in at if time is not None]


def _programmes(
    fit: Fit,
    cells: Batch,
    name: str,
    u_p: Tensor,
    time: float,
    draw: Mapping[str, Tensor],
    seed: int,
    factual: Batch | None = None,
) -> Tensor:
    """Programmes of cells in a condition at a time, n, k; one seed gives all conditions the same noise."""
    torch.manual_seed(seed)
    batch = situated(fit, cells._replace(u_np=u_p.expand(cells.n_cells, -1)), name, time)
    return cell_latents(cell_trace(fit, batch, draw, factual))


def _summary(value_s: np.ndarray, interval: float) -> dict[str, np.ndarray]:
    low, high = np.quantile(value_s, [(1 - interval) / 2, (1 + interval) / 2], axis=0)
    return {"mean": value_s.mean(0), "low": low, "high": high}


def _dataset(
    values: Mapping[str, np.ndarray], coords: Mapping[str, Any], interval: float, n_samples: int
) -> xr.Dataset:
    variables = {name: (tuple(coords), value.astype(np.float32)) for name, value in values.items()}
    units = "standard deviations of a control programme at the first snapshot"
    return xr.Dataset(variables, coords, {"interval": interval, "n_samples": n_samples, "units": units})
