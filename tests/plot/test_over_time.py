"""Figures of responses over time show what they were given, legibly."""

import io
import itertools

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from pyro_causalcell import plot
from pyro_causalcell.errors import DataError
from pyro_causalcell.plot.style import BLUE, VERMILLION


def edges(n_invariant=2, n_responsive=3, seed=0):
    rng = np.random.default_rng(seed)
    parents = [f"invariant_{i + 1}" for i in range(n_invariant)]
    parents += [f"responsive_{i + 1}" for i in range(n_responsive)]
    rows = [
        (parent, v, 1.0 if parent == v else rng.uniform(0, 1), rng.normal())
        for v, parent in itertools.product(parents[n_invariant:], parents)
    ]
    return pd.DataFrame(rows, columns=["parent", "programme", "probability", "weight"])


def changes():
    rows = [
        ("A", "responsive_1", 0.9, 1.0, 0.1),
        ("B", "responsive_1", 0.9, -1.0, 0.9),
        ("A", "responsive_2", 0.2, 1.0, 0.1),
        *((f"C{i}", "responsive_3", 0.9, 2.0, 0.0) for i in range(4)),
    ]
    return pd.DataFrame(rows, columns=["perturbation", "programme", "probability", "effect", "cut"])


def paths(conditions=("control", "A", "B"), times=(1.0, 2.0, 4.0), n_programmes=3, seed=0):
    rng = np.random.default_rng(seed)
    shape = (len(conditions), len(times), n_programmes)
    mean = np.cumsum(rng.normal(size=shape), 1) * np.linspace(0.1, 1, n_programmes)
    over = ("condition", "time", "programme")
    coords = {"condition": list(conditions), "time": list(times)}
    coords["programme"] = [f"responsive_{k + 1}" for k in range(n_programmes)]
    variables = {name: (over, mean + add) for name, add in (("mean", 0), ("low", -0.3), ("high", 0.3))}
    return xr.Dataset(variables, coords, {"interval": 0.9, "units": "standard deviations"})


def effects():
    rng = np.random.default_rng(0)
    rows = pd.DataFrame(itertools.product("AB", (1.0, 2.0), range(20)), columns=["condition", "time", "gene"])
    observed = rng.normal(size=len(rows))
    return rows.assign(observed=observed, predicted=np.where(rows["time"] == 1, observed, -observed))


def cells(n=200):
    rng = np.random.default_rng(0)
    names = rng.choice(["control", "A", "B"], n)
    times = rng.choice([1.0, 2.0], n)
    z = rng.normal(size=(n, 3))
    z[:, 0] += np.where(names == "A", 6 * times, 0)
    return z, names, times


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_only_likely_edges_are_drawn_and_their_sign_has_a_colour_and_a_dash():
    table = edges().assign(probability=0.4)
    table.loc[[0, 2], "probability"] = [0.9, 1.0]
    table.loc[[0, 2], "weight"] = [-0.5, 2.0]
    ax = plot.lagged_graph(table).axes[0]
    arrows = {a.xyann[1]: a.arrow_patch for a in ax.texts if getattr(a, "arrow_patch", None) is not None}
    assert set(arrows) == {0, 2}  # invariant 1, and the own past of responsive 1
    assert [to_hex(arrows[y].get_edgecolor()).upper() for y in (0, 2)] == [BLUE, VERMILLION]
    assert arrows[0].get_linestyle() != arrows[2].get_linestyle()
    assert arrows[0].get_linewidth() < arrows[2].get_linewidth()
    assert arrows[0].get_edgecolor()[3] < arrows[2].get_edgecolor()[3] == 1
    own = next(a for a in ax.texts if getattr(a, "arrow_patch", None) is not None and a.xyann[1] == 2)
    assert own.xy[1] == 2  # level
    assert ax.figure.legends[0].get_title().get_text().startswith("2 of 15 possible edges")


def test_perturbations_are_named_or_counted():
    shown = texts(plot.lagged_graph(edges(), changes()))
    assert "raised by A\nlowered by B\ncut off by B" in shown
    assert "none" in shown and "raised by 4 perturbations" in shown
    assert "changed by" not in texts(plot.lagged_graph(edges()))


def test_graphs_without_likely_edges_and_mistakes():
    nothing = plot.lagged_graph(edges().assign(probability=0.1))
    assert nothing.legends[0].get_title().get_text().startswith("0 of 15")
    with pytest.raises(DataError, match=r"lack the columns \['weight'\]"):
        plot.lagged_graph(edges().drop(columns="weight"))
    with pytest.raises(DataError, match="found none"):
        plot.lagged_graph(edges()[:0])


def test_courses_of_programmes_that_move_most_come_first():
    data = paths()
    observed = data[["mean"]].assign(se=xr.full_like(data["mean"], 0.1)).where(data["time"] < 4)
    figure = plot.trajectories(data, observed, unit="days", n_programmes=2)
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    size = np.abs(data["mean"] - data["mean"].sel(condition="control")).max(("condition", "time"))
    assert titles == [f"responsive {k + 1}" for k in np.argsort(-size.values)[:2]]
    drawn = {line.get_color(): line for line in figure.axes[0].lines if len(line.get_xdata()) == 3}
    first = data.sel(programme=titles[0].replace(" ", "_"))
    np.testing.assert_allclose(drawn[BLUE].get_ydata(), first["mean"].sel(condition="A"))
    points = [line for line in figure.axes[0].lines if line.get_linestyle() == "None"]
    assert len(points) == 3 and all(len(line.get_xdata()) == 2 for line in points)  # nothing at time 4
    (legend,) = figure.legends
    words = [text.get_text() for text in legend.get_texts()]
    assert words == ["control", "A", "B", "90% interval\nof the mean", "measured cells,\n2 standard errors"]
    assert "days" in texts(figure)


def test_each_perturbation_looks_different_and_too_many_are_refused():
    names = [f"P{i}" for i in range(19)]
    figure = plot.trajectories(paths(["control", *names[:18]]))
    looks = {
        (line.get_color(), line.get_marker(), str(line.get_linestyle())) for line in figure.axes[0].lines
    }
    assert len(looks) == 19
    with pytest.raises(DataError, match="at most 18 perturbations in one figure, found 19"):
        plot.trajectories(paths(names))


def test_time_embedding_names_the_furthest_and_joins_their_means():
    z, names, times = cells()
    figure = plot.time_embedding(z, names, times, unit="days", n_named=1)
    left, right, bar = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["A", "control", "other cells"]
    assert "days" in bar.get_ylabel()
    course = next(line for line in left.lines if line.get_color() == BLUE)
    first = z[(names == "A") & (times == 1)].mean(0) - z.mean(0)
    later = z[(names == "A") & (times == 2)].mean(0) - z.mean(0)
    length = np.hypot(*np.diff(course.get_xydata(), axis=0)[0])
    assert length == pytest.approx(np.linalg.norm(later - first), rel=0.05)
    assert len(right.collections[0].get_offsets()) == len(z)


@pytest.mark.parametrize(("z", "n"), [(np.zeros((5, 1)), 5), (np.zeros((5, 2)), 4)])
def test_embeddings_need_two_programmes_of_every_cell(z, n):
    with pytest.raises(DataError, match="two or more"):
        plot.time_embedding(z, ["A"] * n, np.ones(n))


def test_effects_have_a_panel_for_each_time():
    figure = plot.effects_over_time(effects(), unit="day")
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["day 1", "day 2"]
    assert {"r = 1.00\n2 conditions", "r = -1.00\n2 conditions"} <= set(texts(figure))
    assert figure.axes[0].get_xlim() == figure.axes[1].get_ylim()
    with pytest.raises(DataError, match="found none"):
        plot.effects_over_time(effects()[:0])


FIGURES = {
    "lagged": lambda: plot.lagged_graph(edges(), changes()),
    "lagged_large": lambda: plot.lagged_graph(edges(8, 12)),
    "courses": lambda: plot.trajectories(paths(n_programmes=14)),
    "uneven": lambda: plot.trajectories(paths(times=(0.0, 6.0, 12.0, 24.0, 96.0)), unit="hours"),
    "embedding": lambda: plot.time_embedding(*cells()),
    "effects": lambda: plot.effects_over_time(effects()),
}


def drawn_texts(figure: Figure) -> list[Text]:
    """All texts but labels of ticks outside the frame, which are never drawn."""
    found = [*figure.texts, figure._supxlabel, figure._supylabel]
    for legend in figure.legends:
        found += [legend.get_title(), *legend.get_texts()]
    for ax in figure.axes:
        found += [text for text in ax.get_children() if isinstance(text, Text)]
        for axis in (ax.xaxis, ax.yaxis) if ax.axison else ():
            low, high = sorted(axis.get_view_interval())
            ticks = axis.get_major_ticks()
            found += [axis.label, *(t.label1 for t in ticks if low - 1e-9 <= t.get_loc() <= high + 1e-9)]
    shown = {id(text): text for text in found if text is not None and text.get_text().strip()}
    return [text for text in shown.values() if text.get_visible()]


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_overlaps_and_nothing_is_cut_off(name):
    figure = FIGURES[name]()
    figure.savefig(io.BytesIO(), format="png")
    frame, boxes = figure.bbox, []
    for text in drawn_texts(figure):
        box = text.get_window_extent()
        assert frame.x0 - 1 <= box.x0 and box.x1 <= frame.x1 + 1, text.get_text()
        assert frame.y0 - 1 <= box.y0 and box.y1 <= frame.y1 + 1, text.get_text()
        boxes.append((text.get_text(), box.padded(-1.5)))
    pairs = itertools.combinations(boxes, 2)
    assert [(a, b) for (a, box), (b, other) in pairs if box.overlaps(other)] == []
