"""Responses that unfold over time: the lagged graph, courses of programmes, cells, effects."""

import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike, NDArray
from sklearn.decomposition import PCA

from pyro_causalcell.data.spec import CONTROL
from pyro_causalcell.errors import DataError
from pyro_causalcell.evaluate.over_time import change_from_control
from pyro_causalcell.plot.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    OTHERS,
    PURPLE,
    SKY,
    VERMILLION,
    axes_grid,
    furthest,
    new_figure,
    style,
)

__all__ = ["effects_over_time", "lagged_graph", "time_embedding", "trajectories"]

Floats = NDArray[np.float64]


class Look(NamedTuple):
    """How a condition is drawn."""

    colour: str
    marker: str
    dashes: str

    def line(self, label: str, markersize: float = 4) -> Line2D:
        """A line for the legend."""
        return Line2D([], [], markersize=markersize, label=label, **self.drawn())

    def drawn(self) -> dict[str, Any]:
        """Arguments of ``Axes.plot``."""
        return {"color": self.colour, "marker": self.marker, "linestyle": self.dashes}


_INK = "#4A4F57"
_COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
_MARKERS = ("o", "s", "D", "^", "P", "X")
_DASHES = ("-", "--", "-.")
_TIMES = ListedColormap(colormaps["viridis_r"](np.linspace(0.1, 1, 256)))  # without the palest yellow
_OF_CONTROL = Look(BLACK, "v", ":")
MOST_COURSES = len(_COLOURS) * len(_DASHES)
"""Perturbations that one figure can tell apart."""
_FLAT: dict[str, Any] = {"linewidths": 0, "rasterized": True}
_DOTS = {"s": 7, "alpha": 0.55, **_FLAT}
_NAMED = 3  # perturbations of a programme that are named, before they are only counted
_COLUMNS = 4

# ---------------------------------------------------------------------- two-slice graph


def lagged_graph(edges: pd.DataFrame, changes: pd.DataFrame | None = None, threshold: float = 0.5) -> Figure:
    """Programmes at one step on the left, and on the right what they act on a step later.

    Only edges above the threshold are drawn: the wider, the larger the slope; the fainter, the less probable.
    A programme's own past is a level line. At the right stands what perturbations change in the programme.

    Args:
        edges: Columns parent, programme, probability, weight (``predict.lagged_graph``).
        changes: Columns perturbation, programme, probability, effect, and cut where perturbations cut parents
            (``predict.graph``); None leaves perturbations out.
        threshold: Edges and changes above this probability are shown.

    Raises:
        DataError: A column is missing, or there is no possible edge.
    """
    _require(edges, {"parent", "programme", "probability", "weight"}, "edges")
    if edges.empty:
        raise DataError("expected possible lagged edges, found none; fit a model with lagged edges.")
    parents, programmes = (list(dict.fromkeys(edges[name])) for name in ("parent", "programme"))
    rows = {name: y for y, name in enumerate(dict.fromkeys([*parents, *programmes]))}
    shown = edges[edges["probability"] > threshold].sort_values("probability", kind="stable")
    widest = max(float(shown["weight"].abs().max()), 1e-9) if len(shown) else 1.0
    said = {} if changes is None else _changes(changes, threshold)
    with style():
        figure = new_figure(7.6 if said else 5.4, (0.44 if said else 0.34) * len(rows) + 1.4)
        ax = figure.subplots()
        for edge in shown.itertuples():
            _edge(ax, rows[edge.parent], rows[edge.programme], edge.weight / widest, edge.probability)
        for side, names in ((0.0, parents), (1.0, programmes)):
            y = [rows[name] for name in names]
            ax.scatter([side] * len(y), y, s=46, color="white", edgecolors=BLACK, linewidths=1.1, zorder=4)
        for name in parents:
            ax.text(-0.05, rows[name], _plain(name), ha="right", va="center", fontsize=8)
        for name in programmes:
            text = f"{_plain(name)}   " if said else _plain(name)
            ax.text(1.05, rows[name], text, va="center", fontsize=8)
            if name in said:
                ax.text(1.42, rows[name], said[name], va="center", fontsize=7, color=_INK, linespacing=1.05)
        ax.set(xlim=(-0.45, 2.35 if said else 1.45), ylim=(len(rows) - 0.4, -1.1))
        heads = [(0.0, "at one step"), (1.0, "a step later")] + [(1.42, "changed by")] * bool(said)
        for x, head in heads:
            ax.text(x, -0.8, head, ha="left" if x > 1 else "center", fontsize=8, color=_INK, style="italic")
        ax.axis("off")
        n = f"{len(shown)} of {len(edges)} possible edges have a probability above {threshold:g}"
        _edge_legend(figure, widest if len(shown) else None, n)
    return figure


def _edge(ax: Axes, start: int, end: int, weight: float, probability: float) -> None:
    """One edge; its weight is a share of the largest one."""
    colour = to_rgba(VERMILLION if weight > 0 else BLUE, 0.25 + 0.75 * float(probability) ** 2)
    look = {
        "arrowstyle": "-|>,head_length=0.35,head_width=0.14",
        "shrinkA": 4.5,
        "shrinkB": 4.5,
        "linewidth": 0.7 + 2.6 * abs(weight),
        "linestyle": "-" if weight > 0 else (0, (4, 1.6)),
        "facecolor": colour,
        "edgecolor": colour,
    }
    ax.annotate("", xy=(1, end), xytext=(0, start), arrowprops=look, zorder=2)


def _changes(table: pd.DataFrame, threshold: float) -> dict[str, str]:
    """What perturbations do to each programme, in words."""
    _require(table, {"perturbation", "programme", "probability", "effect"}, "changes")
    likely, effect = table["probability"] > threshold, table["effect"]
    kinds = {"raised by": likely & (effect > 0), "lowered by": likely & (effect < 0)}
    if "cut" in table:
        kinds["cut off by"] = table["cut"] > threshold
    names, said = table["perturbation"], {}
    for name, index in table.groupby("programme", sort=False).groups.items():
        found = [(verb, list(names.loc[index[hit.loc[index]]])) for verb, hit in kinds.items()]
        said[str(name)] = "\n".join(f"{verb} {_few(hits)}" for verb, hits in found if hits) or "none"
    return said


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= _NAMED else f"{len(names)} perturbations"


def _edge_legend(figure: Figure, widest: float | None, title: str) -> None:
    handles = []
    if widest is not None:
        handles = [
            Line2D([], [], color=VERMILLION, linewidth=2, label="raises"),
            Line2D([], [], color=BLUE, linewidth=2, linestyle=(0, (4, 1.6)), label="lowers"),
            Line2D([], [], color=GREY, linewidth=3.3, label=f"slope {widest:.2g}"),
            Line2D([], [], color=GREY, linewidth=2.0, label=f"slope {widest / 2:.2g}"),
        ]
    figure.legend(handles=handles, loc="outside upper left", ncols=4, title=title, alignment="left")


# ---------------------------------------------------------------------- courses of programmes


def trajectories(
    paths: xr.Dataset,
    observed: xr.Dataset | None = None,
    *,
    unit: str = "time",
    n_programmes: int = 12,
) -> Figure:
    """Courses of programmes under each perturbation, one panel a programme, with intervals.

    Programmes that move most come first. Control is a black dotted line.

    Args:
        paths: What ``predict.trajectories`` returns: ``mean``, ``low`` and ``high`` over condition, time and
            programme; attributes ``interval`` and ``units``.
        observed: ``mean`` and ``se`` of measured cells over the same dimensions
            (``evaluate.measured_trajectories``), drawn as open points with two standard errors to each side;
            other conditions than those of ``paths`` are left out.
        unit: Label of the axis of time, such as ``"days"``.
        n_programmes: Panels, at most.

    Raises:
        DataError: There are more perturbations than can be told apart.
    """
    names = [str(c) for c in paths["condition"].values]
    moved = [name for name in names if name != CONTROL]
    if len(moved) > MOST_COURSES:
        raise DataError(
            f"expected at most {MOST_COURSES} perturbations in one figure, found {len(moved)}; select some: "
            "paths.sel(condition=[...])."
        )
    looks = {name: _look(i) for i, name in enumerate(moved)} | {CONTROL: _OF_CONTROL}
    size_k = np.abs(change_from_control(paths).values).max((0, 1))
    first = [str(paths["programme"].values[k]) for k in np.argsort(-size_k, kind="stable")[:n_programmes]]
    n_columns = min(_COLUMNS, len(first))
    n_rows = -(-len(first) // n_columns)
    with style():
        figure = new_figure(2.25 * n_columns + 1.7, 1.95 * n_rows + 0.6, gap=0.06)
        axes = axes_grid(figure, len(first), n_columns)
        for ax, programme in zip(axes, first, strict=True):
            for i, name in enumerate(names):
                course = paths.sel(condition=name, programme=programme)
                _course(ax, course, looks[name])
                if observed is not None and name in observed["condition"].values:
                    dodge = (i - (len(names) - 1) / 2) * _dodge(paths) / len(names)
                    _points(ax, observed.sel(condition=name, programme=programme), looks[name], dodge)
            ax.set_title(_plain(programme))
            labelled = _apart(paths["time"].values)
            ax.set_xticks(labelled, [f"{time:g}" for time in labelled])
            ax.set_xticks(paths["time"].values, minor=True)
            low, high = ax.get_ylim()
            ax.set_ylim(min(low, (low + high) / 2 - 1), max(high, (low + high) / 2 + 1))  # noise stays small
            ax.locator_params(axis="y", nbins=4)
            ax.grid()
        figure.supxlabel(unit, fontsize=9)
        figure.supylabel(_wrapped_unit(paths), fontsize=9)
        handles = [looks[name].line(name) for name in names]
        handles += _band_handles(paths, observed)
        figure.legend(handles=handles, loc="outside right upper")
    return figure


def _look(i: int) -> Look:
    """Colour, marker and dashes of the i-th perturbation."""
    place = i % len(_COLOURS)
    return Look(_COLOURS[place], _MARKERS[place], _DASHES[i // len(_COLOURS)])


def _apart(times: Floats) -> list[float]:
    """Times whose labels do not run into each other."""
    least = 0.14 * float(times.max() - times.min())
    kept: list[float] = []
    for time in times.tolist():
        if not kept or time - kept[-1] >= least:
            kept.append(time)
    return kept


def _dodge(paths: xr.Dataset) -> float:
    """Width over which points of one time are spread, so that they do not cover each other."""
    times = paths["time"].values
    return 0.3 * float(np.diff(times).min()) if len(times) > 1 else 0.0


def _course(ax: Axes, course: xr.Dataset, look: Look) -> None:
    time = course["time"].values
    ax.fill_between(
        time, course["low"].values, course["high"].values, color=look.colour, alpha=0.13, linewidth=0
    )
    ax.plot(time, course["mean"].values, markersize=3, linewidth=1.4, zorder=3, **look.drawn())


def _points(ax: Axes, seen: xr.Dataset, look: Look, dodge: float) -> None:
    there = np.isfinite(seen["mean"].values)
    ax.errorbar(
        seen["time"].values[there] + dodge,
        seen["mean"].values[there],
        2 * seen["se"].values[there],
        color=look.colour,
        linestyle="none",
        marker=look.marker,
        markersize=5,
        markerfacecolor="white",
        linewidth=1.0,
        zorder=4,
    )


def _band_handles(paths: xr.Dataset, observed: xr.Dataset | None) -> list[Line2D]:
    """What bands and open points mean."""
    said = f"{paths.attrs['interval']:.0%} interval\nof the mean" if "interval" in paths.attrs else "interval"
    handles = [Line2D([], [], color=GREY, alpha=0.3, linewidth=7, label=said)]
    if observed is not None:
        handles.append(
            Line2D(
                [],
                [],
                color=GREY,
                linestyle="none",
                marker="o",
                markerfacecolor="white",
                label="measured cells,\n2 standard errors",
            )
        )
    return handles


def _wrapped_unit(paths: xr.Dataset) -> str:
    return textwrap.fill(str(paths.attrs.get("units", "programme")), 40)


# ---------------------------------------------------------------------- cells over time


def time_embedding(
    z_nk: ArrayLike,
    conditions: Sequence[str],
    time_n: ArrayLike,
    *,
    unit: str = "time",
    n_named: int = 6,
    n_cells: int = 4000,
    seed: int = 0,
) -> Figure:
    """Cells in the two leading principal components of their programmes, by perturbation and by time.

    On the left the perturbations whose mean lies furthest from control's have colours, and their means over
    time are joined, from the small point to the large one; other cells are grey. On the right the same cells
    by time.

    Args:
        z_nk: Programmes of the cells that perturbations act on (columns of ``predict.latents``), two or more.
        conditions: Condition of each cell.
        time_n: Time of each cell.
        unit: What times are in.
        n_named: Perturbations in colour, at most.
        n_cells: Cells drawn, at most; components and means are those of all.
        seed: Of the choice of these cells, and of their order.

    Raises:
        DataError: There are fewer than two programmes, or numbers of cells differ.
    """
    z, names, times = np.asarray(z_nk, dtype=float), np.asarray(conditions, dtype=str), np.asarray(time_n)
    if z.ndim != 2 or z.shape[1] < 2 or not len(z) == len(names) == len(times):
        raise DataError(
            "expected programmes [cells, two or more] with a condition and a time for each cell, found the "
            f"shapes {z.shape}, {names.shape} and {times.shape}."
        )
    pca = PCA(2, random_state=seed)
    xy_n2 = pca.fit_transform(z)
    named = furthest(xy_n2, names, min(n_named, MOST_COURSES))
    looks = {name: _look(i) for i, name in enumerate(named)}
    if CONTROL in names:
        looks[CONTROL] = _OF_CONTROL
    drawn = np.random.default_rng(seed).permutation(len(z))[:n_cells]
    with style():
        figure = new_figure(8.4, 3.9)
        left, right = figure.subplots(1, 2, sharex=True, sharey=True)
        colours = {name: look.colour for name, look in looks.items() if name != CONTROL}
        left.scatter(*xy_n2[drawn].T, c=[colours.get(name, OTHERS) for name in names[drawn]], **_DOTS)
        for name, look in looks.items():
            _mean_course(left, xy_n2[names == name], times[names == name], look)
        handles = [look.line(name, markersize=5) for name, look in looks.items()]
        handles.append(Line2D([], [], color=OTHERS, marker="o", linestyle="none", label="other cells"))
        figure.legend(handles=handles, loc="outside lower center", ncols=4)
        shown = right.scatter(*xy_n2[drawn].T, c=times[drawn], cmap=_TIMES, **_DOTS)
        few = np.unique(times) if len(np.unique(times)) < 9 else None
        bar = figure.colorbar(shown, ax=right, ticks=few)
        bar.set_label(unit)
        bar.outline.set_visible(False)
        left.set_title("by perturbation")
        right.set_title("by time")
        share = pca.explained_variance_ratio_
        for ax in (left, right):
            ax.locator_params(nbins=6)
            ax.set_xlabel(f"first component ({share[0]:.0%} of variance)")
        left.set_ylabel(f"second component ({share[1]:.0%})")
    return figure


def _mean_course(ax: Axes, xy_n2: Floats, time_n: Floats, look: Look) -> None:
    """Means over time, joined; later ones are larger."""
    times = np.unique(time_n)
    mean_t2 = np.stack([xy_n2[time_n == time].mean(0) for time in times])
    x_t, y_t = mean_t2.T
    for width, shade in ((3.4, "white"), (1.6, look.colour)):  # a rim keeps the line apart from the cells
        ax.plot(x_t, y_t, color=shade, linestyle=look.dashes, linewidth=width, zorder=3)
    ax.scatter(
        x_t,
        y_t,
        s=np.linspace(22, 75, len(times)),
        c=look.colour,
        marker=look.marker,
        edgecolors="white",
        linewidths=0.8,
        zorder=4,
    )


# ---------------------------------------------------------------------- effects


def effects_over_time(effects: pd.DataFrame, *, unit: str = "time", units: str = "log1p CP10k") -> Figure:
    """Predicted against observed effects on genes, one panel a time; a point is a gene in a condition.

    Args:
        effects: Columns condition, time, gene, observed, predicted (``evaluate.effects_over_time``).
        unit: What times are in.
        units: What effects are in.

    Raises:
        DataError: A column is missing, or there is no effect.
    """
    _require(effects, {"condition", "time", "observed", "predicted"}, "effects")
    if effects.empty:
        raise DataError("expected effects, found none; give conditions and times with enough cells.")
    times = np.unique(effects["time"])
    ends = float(effects[["observed", "predicted"]].abs().to_numpy().max()) * 1.05
    n_columns = min(_COLUMNS, len(times))
    n_rows = -(-len(times) // n_columns)
    with style():
        figure = new_figure(2.3 * n_columns + 0.6, 2.35 * n_rows + 0.5)
        for ax, time in zip(axes_grid(figure, len(times), n_columns), times, strict=True):
            rows = effects[effects["time"] == time]
            ax.axhline(0, color="#D9DCE1", linewidth=0.8, zorder=0)
            ax.axvline(0, color="#D9DCE1", linewidth=0.8, zorder=0)
            ax.plot([-ends, ends], [-ends, ends], color=BLACK, linestyle="--", linewidth=0.9)
            alpha = 0.3 if len(rows) > 1000 else 0.6
            ax.scatter(rows["observed"], rows["predicted"], s=8, color=BLUE, alpha=alpha, **_FLAT)
            ax.set(xlim=(-ends, ends), ylim=(-ends, ends), aspect="equal")
            n = rows["condition"].nunique()
            ax.set_title(f"{unit} {time:g}")
            ax.text(
                0.04,
                0.96,
                f"r = {_correlation(rows):.2f}\n{n} condition{'s' * (n > 1)}",
                transform=ax.transAxes,
                va="top",
                fontsize=8,
            )
            ax.locator_params(nbins=4)
        figure.supxlabel(f"observed effect against control of the time ({units})", fontsize=9)
        figure.supylabel(f"predicted effect ({units})", fontsize=9)
    return figure


def _correlation(rows: pd.DataFrame) -> float:
    """Pearson correlation; NaN where one side is constant."""
    both = rows[["observed", "predicted"]].to_numpy(dtype=float)
    return float(np.corrcoef(both.T)[0, 1]) if (both.std(0) > 0).all() else float("nan")


def _require(table: pd.DataFrame, columns: set[str], name: str) -> None:
    missing = columns - set(table)
    if missing:
        raise DataError(f"{name} lack the columns {sorted(missing)}; they have {list(table)}.")


def _plain(programme: str) -> str:
    return programme.replace("_", " ")
