"""The report of a fit that follows cells over time."""

import re

import pandas as pd
import pytest

from pyro_causalcell.data import Screen, random_cells
from pyro_causalcell.errors import DataError
from pyro_causalcell.evaluate import largest_movements
from pyro_causalcell.inference import fit
from pyro_causalcell.predict import graph
from pyro_causalcell.report import evidence, over_time, sections, write_report
from pyro_causalcell.report.summary import summarise_graph
from pyro_causalcell.simulate import temporal_scm

SMALL = {
    "n_invariant": 1,
    "n_responsive": 2,
    "likelihood": "gaussian",
    "n_hidden": 16,
    "n_layers": 1,
    "epochs": 3,
    "warm_start": None,
    "lr": 1e-2,
    "progress": False,
    "compile": False,
}


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch):
    few = {"_CHECKED": 60, "_CALIBRATED": 60, "_WEIGHED": 20, "_REPLICATES": 4, "_DRAWS": 20, "_MANY": 4}
    for name, value in {**few, "_DRAWN": 60}.items():
        monkeypatch.setattr(evidence, name, value)
    for name, value in {"_SAMPLES": 3, "_CELLS": 20, "_DRAWN": 30}.items():
        monkeypatch.setattr(over_time, name, value)


@pytest.fixture(scope="module")
def adata():
    simulated = temporal_scm(
        n_genes=40,
        n_invariant=1,
        n_responsive=2,
        n_perturbations=3,
        n_combinations=1,
        times=(1, 2, 4),
        cells_per_snapshot=30,
        truth_draws=5,
    )
    train = simulated[simulated.obs["split"] == "train"].copy()
    train.obs["day"] = train.obs["time"]
    return train


@pytest.fixture(scope="module")
def trained(adata):
    screen = Screen(adata, "target", "control", time="day")
    return fit("temporal-scm", None, screen, split=random_cells(screen, 0.2), **SMALL), screen


def test_the_page_has_everything_over_time(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(over_time, "_MANY", 3)
    text = write_report(*trained, tmp_path / "r.html", n_particles=20).read_text()
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert titles[2:7] == [
        "Perturbations and programmes",
        "Lagged graph",
        "Programmes over time",
        "Effects over time",
        "Genes of programmes",
    ]
    assert "of 6 possible" not in text and "<td>invariant_1</td><td>responsive_1</td>" in text
    assert "at day 4, the last snapshot" in text
    assert "held-out validation cells show them" in text
    assert "says nothing of a model that follows cells over time" in text
    assert "Means here are over all snapshots" in text
    assert "what the perturbation adds in every step" in text and "cut ↕" not in text
    assert "Audit" not in titles and "<td>time points</td>" in text


def test_training_cells_stand_in_for_few_held_out_ones_and_the_words_say_so(trained):
    fitted, screen = trained
    held_out = fitted.split.validation, "72 held-out validation cells"
    over = over_time.gather_over_time(fitted, screen, graph(fitted), ["P01", "P02"], held_out, 0.9, seed=0)
    words = "288 training cells, since no condition has 20 of the 72 held-out validation cells at a time"
    assert over.compared == words and set(over.effects["condition"]) == set(screen.conditions[1:])
    moved = largest_movements(over.paths)["condition"]
    assert over.paths["condition"].values.tolist() == ["control", *dict.fromkeys(moved)]
    assert over.z_nk.shape == (288, 2) and over.unit == "day"  # programmes that perturbations act on


def test_control_cells_alone(adata, tmp_path):
    screen = Screen(adata[adata.obs["target"] == "control"].copy(), "target", "control", time="day")
    course = fit("temporal-scm", None, screen, **SMALL)
    text = write_report(course, screen, tmp_path / "r.html", n_particles=20).read_text()
    assert "All training cells are controls" in text
    assert "effects over time cannot be compared" in text
    assert "Courses of control; control is dotted." in text


def test_simulations_without_times_are_refused(trained, sbc_folder, tmp_path):
    with pytest.raises(DataError, match="follows cells over time"):
        write_report(*trained, tmp_path / "r.html", sbc=sbc_folder)


def test_cuts_are_said():
    edges = pd.DataFrame(
        [
            ("A", "responsive_1", 0.99, 1.0, 0.1, 0.0),
            ("B", "responsive_1", 0.1, 0.0, 0.1, 0.9),
            ("C", "responsive_1", 0.1, 0.0, 0.1, 0.1),
        ],
        columns=["perturbation", "programme", "probability", "effect", "effect_sd", "cut"],
    )
    sentences = summarise_graph(edges)
    assert "B cuts responsive 1 off from its parents, its own past too." in sentences
    assert sentences[-1].startswith("C shows no effect")
    assert "cuts the programme off from its parents" in sections.graph_section(edges)
    assert "cuts" not in sections.graph_section(edges.drop(columns="cut"))


def test_lagged_edges_are_listed_most_probable_first():
    lagged = pd.DataFrame(
        [("a", "v", 0.2, 0.1, 0.1), ("v", "v", 1.0, -0.5, 0.1), ("<b>", "v", 0.7, 0.3, 0.1)],
        columns=["parent", "programme", "probability", "weight", "weight_sd"],
    )
    text = over_time.lagged_section(lagged, pd.DataFrame())
    rows = re.findall(r"<tr><td>(.*?)</td>", text)
    assert rows == ["v", "&lt;b&gt;", "a"]
    assert "no lagged edges" in over_time.lagged_section(lagged[:0], pd.DataFrame())


def test_each_perturbation_has_its_agreement():
    effects = pd.DataFrame(
        {
            "condition": ["A"] * 3,
            "time": [1.0] * 3,
            "gene": list("xyz"),
            "observed": [1.0, 2.0, 3.0],
            "predicted": [0.5, 1.0, 1.5],
        }
    )
    text = over_time.effects_over_time_section(effects, "9 cells", "day", "log1p CP10k")
    assert "and as 9 cells show them" in text
    values = [float(value) for value in re.findall(r'data-value="(.*?)"', text)]
    assert values == pytest.approx([1.0, 1.0, 0.5, (3.5 / 3) ** 0.5])  # time, r, slope, RMSE
    flat = over_time.effects_over_time_section(effects.assign(predicted=0.0), "9 cells", "day", "x")
    assert "–" in flat
