import numpy as np
import pandas as pd
import pytest

from pyro_causalcell.report import sections

EVIL = "<b>ATF2</b>"


def test_summary_shows_sizes_findings_and_caveats():
    text = sections.summary_section(["A moves it."], ["It fits."], ["Beware."], {"genes": "299"})
    for part in ("A moves it.", "It fits.", "Beware.", "<b>299</b>", "How far to trust it"):
        assert part in text


def test_settings_are_listed():
    text = sections.settings_section(["A model."], {"training.epochs": 30, "seed": 0})
    assert "training.epochs" in text and "<td>30</td>" in text


def test_training_has_one_figure(history):
    assert sections.training_section(history).count("<figure>") == 1


def test_graph_lists_every_edge_most_probable_first(graph):
    text = sections.graph_section(graph)
    assert text.count("<tr>") == len(graph) + 1
    assert text.index("IFNGR1") < text.index("BRD4") < text.index("CAV1")


def test_large_graphs_draw_only_what_has_an_edge():
    names = [f"T{i}" for i in range(80)]
    graph = pd.DataFrame(
        {"perturbation": names, "programme": "k", "probability": 0.01, "effect": 1.0, "effect_sd": 0.1}
    )
    assert "No perturbation has an edge" in sections.graph_section(graph)
    graph.loc[:2, "probability"] = 0.9
    assert "77 perturbations without a likely edge are in the table only" in sections.graph_section(graph)


def test_names_from_the_data_are_escaped(graph, loadings, effects):
    graph["perturbation"] = graph["perturbation"].replace({"IFNGR1": EVIL})
    effects = effects.assign_coords(condition=[EVIL, *effects["condition"].values[1:]])
    for text in (
        sections.graph_section(graph),
        sections.programmes_section(loadings, graph),
        sections.effects_section(effects, 0.9),
    ):
        assert EVIL not in text
        assert "&lt;b&gt;ATF2&lt;/b&gt;" in text


def test_programmes_that_nothing_moves_are_folded(loadings, graph):
    text = sections.programmes_section(loadings, graph)
    assert "2 programmes that no perturbation moves" in text
    shown, folded = text.split("<details>")
    assert "programme 3: IFNGR1, IFNGR2, JAK2 and STAT1" in shown
    assert folded.count("<figure>") == 1


def test_effects_of_many_perturbations_are_folded(effects):
    many = effects.isel(condition=np.arange(20) % effects.sizes["condition"])
    many = many.assign_coords(condition=[f"T{i}" for i in range(20)])
    text = sections.effects_section(many, 0.9)
    assert "90% intervals" in text and "11 more perturbations" in text
    assert "There are none" in sections.effects_section(None, 0.9)


def test_effects_say_what_they_are_against(effects):
    measured = sections.effects_section(effects, 0.9)
    assert "JAK2 against control" in measured and "not measured here" not in measured
    inferred = sections.effects_section(effects, 0.9, controls=False)
    assert "JAK2 against the model&#x27;s control state" in inferred
    assert "control state (no perturbation), which was not measured here" in inferred


def test_checks_put_the_most_surprising_first(checks):
    table = pd.DataFrame(
        {
            "condition": ["A", "B", "C"],
            "statistic": "zero_fraction",
            "observed": 0.5,
            "p_value": [0.5, 0.99, 0.1],
        }
    )
    text = sections.checks_section(checks, table, "counts", "200 cells")
    assert text.index("<td>B</td>") < text.index("<td>C</td>") < text.index("<td>A</td>")
    assert "200 cells" in text


def test_calibration_table_is_in_percent(coverage):
    text = sections.calibration_section(coverage, "200 cells")
    assert "51.0%" in text and "single cells" in text


@pytest.mark.parametrize(("k", "warned"), [(0.2, False), (0.9, True)])
def test_unreliable_likelihoods_are_marked(likelihood, k, warned):
    likelihood["pareto_k"][:] = k
    text = sections.likelihood_section(likelihood, 200, "500 cells")
    assert ('class="warn"' in text) == warned
    assert f"{likelihood['nll'].values.mean():.1f}" in text


def test_comparison_explains_what_was_seen(scores):
    seen = sections.comparison_section(scores, "200 cells", seen=True)
    assert "were trained on" in seen
    assert "were trained on" not in sections.comparison_section(scores, "200 cells", seen=False)
    assert seen.count("<tr>") == 7
    assert "left out" not in seen
    no_control = scores[~scores["method"].isin(["control mean", "additive"])]
    without = sections.comparison_section(no_control, "200 cells", seen=True)
    assert "left out, because they need control cells and none were trained on" in without
    assert "matching mean is as good" in without and "Control mean says" not in without
    none = sections.comparison_section(scores.iloc[:0], "200 cells", seen=True)
    assert "No perturbed condition" in none
