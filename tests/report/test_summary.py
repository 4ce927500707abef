import numpy as np
import pandas as pd

from pyro_causalcell.report.summary import (
    caveats,
    join,
    shared_programmes,
    summarise_graph,
    summarise_scores,
)


def test_names_are_joined_as_in_a_sentence():
    assert join(["a"]) == "a"
    assert join(["a", "b", "c"]) == "a, b and c"
    assert join(list("abcdefghij")) == "a, b, c, d, e, f, g, h and 2 more"


def test_the_busiest_programme_comes_first(graph):
    groups = shared_programmes(graph)
    assert list(groups)[0] == "programme_3"
    assert groups["programme_3"] == ["IFNGR1", "IFNGR2", "JAK2", "STAT1"]
    assert "programme_2" not in groups  # BRD4's edge has probability .71


def test_sentences_follow_the_numbers(graph, loadings):
    first, second, third, unsure, silent = summarise_graph(graph, loadings)
    assert first.startswith("IFNGR1, IFNGR2, JAK2 and STAT1 share programme 3: perturbing any of them lowers GENE1,")
    assert "raises GENE2," in first  # negative effect, negative loading
    assert second.startswith("MYC and SMAD4 share programme 1 (MYC the opposite way): perturbing SMAD4 ")
    assert third.startswith("IRF1 moves programme 5: perturbing it ")
    assert unsure == "Likely but not sure: BRD4 on programme 2 (71%)."
    assert silent.startswith("ATF2 and CAV1 show no effect")


def test_sentences_do_not_depend_on_the_arbitrary_sign(graph, loadings):
    turned = graph.copy()
    turned.loc[turned["programme"] == "programme_3", "effect"] *= -1
    other = loadings.copy()
    other.loc["programme_3"] *= -1
    assert summarise_graph(turned, other) == summarise_graph(graph, loadings)


def test_graph_without_edges(graph):
    (only,) = summarise_graph(graph.assign(probability=0.01))
    assert "no effect that these cells can tell from control" in only


def test_scores_count_conditions():
    rows = [("model", 1.0, 2.0, 4.0), ("control mean", 2.0, 3.0, 3.0), ("additive", 1.5, 1.5, 3.0)]
    scores = pd.DataFrame(
        [(m, f"c{i}", "rmse", v) for m, *values in rows for i, v in enumerate(values)],
        columns=["method", "condition", "metric", "value"],
    )
    error, counts = summarise_scores(scores)
    assert f"{np.mean([1, 2, 4]):.3f}" in error and "the best baseline, additive, has 2.000" in error
    assert counts == (
        "Of 3 conditions, the model is closer to the held-out cells than the control mean in 2 and than the additive in 1."
    )


def test_panel_caveat_only_where_totals_are_of_the_panel():
    assert any("299 genes" in text for text in caveats(299, True))
    assert not any("299 genes" in text for text in caveats(299, False))
