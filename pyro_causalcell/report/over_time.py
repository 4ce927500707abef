"""What the page shows of a fit that follows cells over time: computed here, and written as HTML."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from pyro_causalcell import plot
from pyro_causalcell.baselines.fitted import TimeModelPredictor
from pyro_causalcell.data import Screen
from pyro_causalcell.data.spec import CONTROL
from pyro_causalcell.errors import PredictionError
from pyro_causalcell.evaluate import effects_over_time, largest_movements, measured_trajectories
from pyro_causalcell.inference import Fit
from pyro_causalcell.predict import lagged_graph, latents, trajectories
from pyro_causalcell.report import html
from pyro_causalcell.report.summary import join

__all__ = [
    "OverTime",
    "effects_over_time_section",
    "follows_cells",
    "gather_over_time",
    "lagged_section",
    "trajectories_section",
]

_SAMPLES = 30  # draws of the global latents behind an interval
_CELLS = 256  # simulated cells of each
_DRAWN = 500  # cells drawn for a predicted mean
_MANY = 20  # cells a condition needs at a time before its effect is worth predicting
_FIGURE = 6  # perturbations in a figure: more lines hide each other


@dataclass(frozen=True)
class OverTime:
    """What was computed over time.

    Attributes:
        lagged: What ``predict.lagged_graph`` returns; no rows for a model without lagged edges.
        paths: What ``predict.trajectories`` returns, for control and the perturbations of the graph's likely
            edges, those that move most first.
        measured: What ``evaluate.measured_trajectories`` returns, of the training cells.
        z_nk: Programmes of the training cells that perturbations act on; all without perturbations.
        conditions: Condition of each of these cells.
        time_n: Time of each.
        effects: What ``evaluate.effects_over_time`` returns.
        compared: Which cells the effects were compared with, in words.
        unit: Name of the column of times.
    """

    lagged: pd.DataFrame
    paths: xr.Dataset
    measured: xr.Dataset
    z_nk: NDArray[np.float64]
    conditions: list[str]
    time_n: NDArray[np.float32]
    effects: pd.DataFrame
    compared: str
    unit: str


def follows_cells(fit: Fit) -> bool:
    """Whether the fit's model follows cells over time."""
    return "time" in getattr(fit.model, "needs", set())


def gather_over_time(
    fit: Fit,
    screen: Screen,
    graph: pd.DataFrame,
    conditions: Sequence[str],
    held_out: tuple[NDArray[np.int64], str],
    interval: float,
    seed: int,
) -> OverTime:
    """Compute everything.

    Args:
        fit: A fit of a model that follows cells over time.
        screen: The cells it was fitted on.
        graph: What ``predict.graph`` returns.
        conditions: Perturbations to follow.
        held_out: Cells to compare effects with, and what they are. Where no condition has enough of them at
            a time, it is the training cells, and the words say so.
        interval: Mass of the intervals.
        seed: Of every random choice.
    """
    train = fit.split.train
    paths = trajectories(
        fit, [CONTROL, *conditions], n_samples=_SAMPLES, n_cells=_CELLS, interval=interval, seed=seed
    )
    order = list(dict.fromkeys(largest_movements(paths)["condition"]))
    found = latents(fit, screen)
    programmes = found.uns["causalcell"]["programmes"]
    moved = np.isin(programmes, programmes if graph.empty else graph["programme"].unique())
    rows, words = held_out
    predictor = TimeModelPredictor(fit, n_cells=_DRAWN, seed=seed)
    effects = effects_over_time(predictor, screen, rows, min_cells=_MANY)
    if effects.empty:
        words = f"{len(train):,} training cells, since no condition has {_MANY} of the {words} at a time"
        effects = effects_over_time(predictor, screen, train, min_cells=_MANY)
    assert screen.time_n is not None  # or the model could not have been fitted
    return OverTime(
        lagged=_lagged(fit),
        paths=paths.sel(condition=[CONTROL, *order]),
        measured=measured_trajectories(fit, screen, train),
        z_nk=found.obsm["X_causalcell"][train][:, moved],
        conditions=[screen.conditions[c] for c in screen.condition_n[train]],
        time_n=screen.time_n[train],
        effects=effects,
        compared=words,
        unit=fit.screen.time or "time",
    )


def _lagged(fit: Fit) -> pd.DataFrame:
    """The lagged graph; no rows for a model without one."""
    try:
        return lagged_graph(fit)
    except PredictionError:
        return pd.DataFrame(columns=["parent", "programme", "probability", "weight", "weight_sd"])


def lagged_section(lagged: pd.DataFrame, graph: pd.DataFrame) -> str:
    """Which programme acts on which a step later, as a figure and as a table.

    Args:
        lagged: Columns parent, programme, probability, weight, weight_sd.
        graph: Columns perturbation, programme, probability, effect, and cut where perturbations cut parents.
    """
    if lagged.empty:
        return html.paragraph("This model has no lagged edges between programmes.")
    caption = (
        "Left: programmes at one step; right: those that they act on, a step later. Only edges more likely "
        "than not are drawn. Orange, solid: a high parent raises the programme; blue, dashed: it lowers "
        "it. Width: slope; faint: less probable. On the right: perturbations that shift a programme in "
        "every step, and those that cut it off from its parents, its own past too."
    )
    text = (
        "A slope is in standard deviations of control programmes, for one of the parent. A programme's own "
        "past is always a parent. Turning the sign of a programme turns that of its edges, except of the "
        "edge to itself. Snapshots do not show which cell became which: edges are read off how whole "
        "populations move, so conditions that start from different states, and perturbations that cut "
        "parents, make them known."
    )
    drawn = plot.lagged_graph(lagged, None if graph.empty else graph)
    rows = lagged.sort_values("probability", ascending=False, kind="stable")
    rows = rows.rename(columns={"weight": "slope", "weight_sd": "slope s.d."})
    formats = {"probability": "{:.3f}".format, "slope": "{:+.2f}".format, "slope s.d.": "{:.2f}".format}
    return (
        html.figure(drawn, caption)
        + html.paragraph(text)
        + html.details("All possible edges", html.table(rows, formats, label="Filter by programme"))
    )


def trajectories_section(over: OverTime) -> str:
    """Courses of programmes under each perturbation, and the cells themselves.

    Args:
        over: What was computed.
    """
    paths, unit = over.paths, over.unit
    names = [str(c) for c in paths["condition"].values if c != CONTROL]
    text = (
        "How the mean of each programme moves after each perturbation. Lines and bands are the model's: "
        f"mean and {paths.attrs['interval']:.0%} interval of the posterior of the mean. Open points are "
        "training cells, read by the guide one by one. Where the points leave the band, the transitions do "
        "not tell the whole story there. Programmes that move most come first."
    )
    groups = [names[i : i + _FIGURE] for i in range(0, len(names), _FIGURE)] or [[]]
    figures = [
        html.figure(
            plot.trajectories(paths.sel(condition=[CONTROL, *group]), over.measured, unit=unit),
            f"Courses of {join([*group, CONTROL])}; control is dotted.",
            name=" ".join(group),
        )
        for group in groups
    ]
    rest = names[_FIGURE:]
    more = html.details(f"{len(rest)} more perturbations", "".join(figures[1:])) if rest else ""
    return (
        html.paragraph(text)
        + html.filtered(figures[0] + more + _movements(paths, unit), "Filter by perturbation or programme")
        + _cells(over)
    )


def _movements(paths: xr.Dataset, unit: str) -> str:
    """When each programme is furthest from control, in numbers."""
    table = largest_movements(paths)
    if table.empty:
        return ""
    columns = {"condition": "perturbation", "time": f"at {unit}"}
    formats = dict.fromkeys(("change", "mean", "low", "high"), "{:+.2f}".format)
    head = "<h3>Largest movements</h3>" + html.paragraph(
        "When each programme is furthest from control at the same time, and where it is then, with its "
        "interval."
    )
    return head + html.table(table.rename(columns=columns), formats, label="")


def _cells(over: OverTime) -> str:
    """The cells in two dimensions; nothing where perturbations act on a single programme."""
    if over.z_nk.shape[1] < 2:
        return ""
    caption = (
        "Training cells in the two leading components of the programmes that perturbations act on. Left: "
        "the perturbations that lie furthest from control; their means over time are joined, from the "
        "small point to the large one. Right: the same cells by time."
    )
    drawn = plot.time_embedding(over.z_nk, over.conditions, over.time_n, unit=over.unit)
    return "<h3>Cells</h3>" + html.figure(drawn, caption)


def effects_over_time_section(effects: pd.DataFrame, cells: str, unit: str, units: str) -> str:
    """Predicted against observed effects at each time.

    Args:
        effects: What ``evaluate.effects_over_time`` returns.
        cells: Which cells were compared, in words.
        unit: What times are in.
        units: What effects are in.
    """
    if effects.empty:
        return html.paragraph(
            f"No condition has {_MANY} cells at a time with as many control cells, so effects over time "
            "cannot be compared."
        )
    text = (
        "Effects of perturbations on genes against control of the same time, as the model predicts them "
        f"and as {cells} show them. r is the correlation over genes and conditions; the noise of few cells "
        "lowers it and widens the cloud. Where cells are many, a cloud flatter than the dashed line is a "
        "model that moves too little. The perturbed genes themselves are left out, and conditions with "
        f"fewer than {_MANY} cells at a time."
    )
    caption = "A point is a gene in a condition. Dashed: equal."
    by_pair = effects.groupby(["condition", "time"], sort=False)[["observed", "predicted"]]
    rows = by_pair.apply(_agreement).reset_index().rename(columns={"condition": "perturbation"})
    note = (
        "Slope: of the regression of predicted on observed effects; 1 is right, noise of the observed "
        "effects lowers it. RMSE is in the units of the figure."
    )
    numbers = html.paragraph(note) + html.table(rows, label="Filter by perturbation")
    drawn = plot.effects_over_time(effects, unit=unit, units=units)
    return html.paragraph(text) + html.figure(drawn, caption) + html.details("Each perturbation", numbers)


def _agreement(both: pd.DataFrame) -> pd.Series:
    """Correlation, slope and error of one condition at one time."""
    error = float(np.sqrt(np.mean((both["predicted"] - both["observed"]) ** 2)))
    moves = both.std() > 0
    r = both["observed"].corr(both["predicted"]) if moves.all() else float("nan")
    slope = r * both["predicted"].std() / both["observed"].std() if moves["observed"] else float("nan")
    return pd.Series({"r": r, "slope": slope, "RMSE": error})
