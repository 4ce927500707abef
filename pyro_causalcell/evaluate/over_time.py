"""Measured cells beside what is predicted over time: courses of programmes, effects on genes."""

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from pyro_causalcell.baselines.temporal import DuplicateInTime, TimePredictor, snapshots
from pyro_causalcell.data import Screen
from pyro_causalcell.data.spec import CONTROL
from pyro_causalcell.errors import DataError
from pyro_causalcell.evaluate.response import other_genes
from pyro_causalcell.inference import Fit
from pyro_causalcell.predict import latents

__all__ = ["change_from_control", "effects_over_time", "largest_movements", "measured_trajectories"]


def measured_trajectories(fit: Fit, screen: Screen, rows: NDArray[np.int64] | None = None) -> xr.Dataset:
    """Where measured cells stand: the mean programmes of each condition at each time.

    A cell's programmes are its posterior means, which the guide reads from the cell alone; they do not go
    through the transitions that ``predict.trajectories`` follows. Posterior means shrink towards the prior,
    so where cells say little of a programme their mean is too small.

    Args:
        fit: A fit of a model that follows cells over time.
        screen: The cells, through the fit's names (``Screen.from_spec(fit.screen, adata)``).
        rows: Which cells; None takes all.

    Returns:
        Over ``condition``, ``time`` and ``programme``: ``mean``, and ``se``, its standard error over cells.
        ``cells`` over ``condition`` and ``time``. NaN where a condition has no cells at a time; ``se`` is NaN
        for a single cell.

    Raises:
        DataError: The screen has no times, or a cell has an unknown condition.
    """
    rows = np.arange(screen.n_cells) if rows is None else np.asarray(rows, dtype=np.int64)
    if screen.time_n is None or (screen.condition_n[rows] < 0).any():
        raise DataError(
            "expected cells of known conditions with times; open them with Screen.from_spec(fit.screen, ...) "
            "of a fit with time="
        )
    found = latents(fit, screen)
    names = np.asarray(screen.conditions)[screen.condition_n[rows]]
    table = pd.DataFrame(found.obsm["X_causalcell"][rows], columns=found.uns["causalcell"]["programmes"])
    groups = table.groupby([pd.Series(names, name="condition"), pd.Series(screen.time_n[rows], name="time")])
    order = [name for name in screen.conditions if name in set(names)]
    times = np.unique(screen.time_n[rows])
    index = pd.MultiIndex.from_product([order, times], names=["condition", "time"])
    shape = (len(order), len(times), table.shape[1])
    values = {"mean": groups.mean(), "se": groups.sem()}
    over = {
        "condition": order,
        "time": times.astype(str).astype(float),
        "programme": list(table),
    }  # 0.1 stays 0.1
    variables: dict[str, Any] = {
        name: (tuple(over), value.reindex(index).to_numpy().reshape(shape)) for name, value in values.items()
    }
    cells = groups.size().reindex(index, fill_value=0).to_numpy().reshape(shape[:2])
    return xr.Dataset(variables | {"cells": (("condition", "time"), cells)}, over)


def change_from_control(paths: xr.Dataset) -> xr.DataArray:
    """How far each programme is from control at the same time.

    Args:
        paths: ``mean`` over condition, time and programme, as ``predict.trajectories`` returns. Without
            control among its conditions, the change is from the first of its times.
    """
    mean = paths["mean"].transpose("condition", "time", "programme")
    has_control = CONTROL in paths["condition"].values
    reference = mean.sel(condition=CONTROL, drop=True) if has_control else mean.isel(time=0, drop=True)
    return mean - reference


def largest_movements(paths: xr.Dataset) -> pd.DataFrame:
    """When each programme is furthest from control under each perturbation, largest change first.

    Args:
        paths: What ``predict.trajectories`` returns; see :func:`change_from_control`.

    Returns:
        Columns condition, programme, time, change, and mean, low and high of the programme at that time.
    """
    table = paths[["mean", "low", "high"]].assign(change=change_from_control(paths)).to_dataframe()
    table = table.reset_index()
    table = table[table["condition"] != CONTROL]
    size = table["change"].abs()
    furthest = size.groupby([table["condition"], table["programme"]], sort=False).idxmax()
    order = size.loc[furthest].sort_values(ascending=False, kind="stable").index
    columns = ["condition", "programme", "time", "change", "mean", "low", "high"]
    return table.loc[order, columns].reset_index(drop=True)


def effects_over_time(
    predictor: TimePredictor, screen: Screen, rows: NDArray[np.int64], *, min_cells: int = 20
) -> pd.DataFrame:
    """Predicted beside observed effects of perturbations on genes at each time.

    An observed effect is the mean of these cells minus the mean of all control cells of the time; a predicted
    one is the same difference of predicted means. Nothing stands in for a condition, or for control, with too
    few cells at a time: it has no rows. The perturbed genes themselves are left out.

    Args:
        predictor: Predicts means over time.
        screen: A screen with times and control cells.
        rows: Cells to compare with; held-out ones, for an honest picture.
        min_cells: Cells that a condition needs at a time, among ``rows``, and control in the screen.

    Returns:
        Columns condition, time, gene, observed, predicted, in log1p CP10k (normalised values as they are);
        no rows where no condition has enough cells.

    Raises:
        DataError: The screen has no times, or a cell has an unknown condition.
    """
    columns = ["condition", "time", "gene", "observed", "predicted"]
    control_rows = np.flatnonzero(screen.condition_n == 0)
    if not len(rows) or not len(control_rows):
        return pd.DataFrame(columns=columns)
    held, control = snapshots(screen, rows), snapshots(screen, control_rows)
    known = {time for time, n in zip(control.times, control.cells_ct[0], strict=True) if n >= min_cells}
    enough_ct = (held.cells_ct >= min_cells) & np.isin(held.times, list(known))
    enough_ct[0] = False
    used_c, used_t = np.flatnonzero(enough_ct.any(1)), np.flatnonzero(enough_ct.any(0))
    if not len(used_c):
        return pd.DataFrame(columns=columns)
    names, times = [screen.conditions[c] for c in used_c], held.times[used_t].tolist()
    observed_ctg = held.mean_ctg[np.ix_(used_c, used_t)] - DuplicateInTime(control).predict([CONTROL], times)
    predicted_ctg = predictor.predict([CONTROL, *names], times)
    predicted_ctg = predicted_ctg[1:] - predicted_ctg[:1]
    shown_ctg = enough_ct[np.ix_(used_c, used_t)][..., None] & other_genes(screen, names)[:, None]
    c, t, g = np.nonzero(shown_ctg)
    values = {
        "condition": np.asarray(names)[c],
        "time": np.asarray(times)[t],
        "gene": np.asarray(screen.genes)[g],
        "observed": observed_ctg[c, t, g],
        "predicted": predicted_ctg[c, t, g],
    }
    return pd.DataFrame(values)[columns]
