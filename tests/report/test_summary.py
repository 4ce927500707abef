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
    assert join([]) == "none"
    assert join(["a"]) == "a"
    assert join(["a", "b", "c"]) == "a, b and c"
    assert join(list("abcdefghij")) == "a, b, c, d, e, f, g, h and 2 more"


def test_the_busiest_programme_comes_first(graph):
    groups = shared_programmes(graph)
    assert list(groups)[0] == "programme_3"
    assert groups["programme_3"] == ["IFNGR1", "IFNGR2", "JAK2", "STAT1"]
    assert "programme_2" not in groups  # BRD4's edge has probability .71


def test_sentences_follow_the_numbers(graph, effects):
    first, second, third, unsure, silent = summarise_graph(graph, effects)
    assert first == (
        "IFNGR1, IFNGR2, JAK2 and STAT1 share programme 3: perturbing any of them lowers GENE1 and raises "
        "GENE2."
    )
    assert second == "MYC and SMAD4 share programme 1 (SMAD4 the opposite way)."  # no gene that is sure
    assert third == "IRF1 moves programme 5."
    assert unsure == "Likely but not sure: BRD4 on programme 2 (71%)."
    assert silent.startswith("ATF2 and CAV1 show no effect")


def test_sentences_do_not_depend_on_the_arbitrary_sign(graph, effects):
    turned = graph.copy()
    turned.loc[turned["programme"] == "programme_3", "effect"] *= -1
    assert summarise_graph(turned, effects) == summarise_graph(graph, effects)


def test_what_a_perturbation_masks_is_told_and_counts_as_an_effect(graph, effects):
    masking = graph.assign(masks=0.1)
    masking.loc[(masking["perturbation"] == "ATF2") & (masking["programme"] == "programme_3"), "masks"] = 0.8
    sentences = summarise_graph(masking, effects)
    assert "ATF2 masks most of what other perturbations of the same cell do to programme 3." in sentences
    assert sentences[-1].startswith("CAV1 shows no effect")


def test_only_genes_that_all_members_change_are_named(graph, effects):
    effects["gene_low"].loc["JAK2", "GENE2"] = -1.0
    assert "GENE2" not in summarise_graph(graph, effects)[0]


def test_the_perturbed_gene_itself_is_no_news(graph, effects):
    own = effects.assign_coords(gene=["JAK2" if g == "GENE2" else g for g in effects["gene"].values])
    assert summarise_graph(graph, own)[0].endswith("perturbing any of them lowers GENE1.")


def test_opposite_members_are_left_out_of_the_direction(graph, effects):
    for name in ("gene_effect", "gene_low", "gene_high"):
        effects[name].loc["SMAD4", "GENE7"], effects[name].loc["MYC", "GENE7"] = -3.0, 3.0
    assert summarise_graph(graph, effects)[1].endswith("perturbing MYC raises GENE7.")


def test_models_without_gates_are_said_to_have_none(graph):
    assert "no programme" in summarise_graph(graph.iloc[:0])[0]
    assert "every perturbation moves every programme" in summarise_graph(graph.assign(probability=1.0))[0]


def test_graph_without_edges(graph):
    (only,) = summarise_graph(graph.assign(probability=0.01))
    assert "no effect that these cells can tell from control" in only


def test_scores_count_conditions():
    rows = [("model", 1.0, 2.0, 4.0), ("control mean", 2.0, 3.0, 3.0), ("additive", 1.5, 1.5, 3.0)]
    rows.append(("technical duplicate", 0.0, 0.0, 0.0))  # a ceiling, not a baseline
    scores = pd.DataFrame(
        [(m, f"c{i}", "rmse", v) for m, *values in rows for i, v in enumerate(values)],
        columns=["method", "condition", "metric", "value"],
    )
    error, counts = summarise_scores(scores, seen=False)
    assert f"{np.mean([1, 2, 4]):.3f}" in error and "the best baseline, additive, has 2.000" in error
    assert counts == (
        "Of 3 conditions, the model is closer to the held-out cells than the control mean in 2 and than "
        "the additive in 1."
    )


def test_baselines_that_are_absent_are_not_spoken_of():
    rows = [("model", 1.0), ("perturbed mean", 2.0), ("matching mean", 3.0)]
    scores = pd.DataFrame(
        [(m, "A", "rmse", v) for m, v in rows], columns=["method", "condition", "metric", "value"]
    )
    _, counts = summarise_scores(scores, seen=True)
    assert "matching mean is then the mean of its own training cells" in counts and "additive" not in counts


def test_an_unmeasured_control_is_said_only_where_there_is_none():
    assert any("which was not measured here" in text for text in caveats(299, False, controls=False))
    assert not any("not measured here" in text for text in caveats(299, False))


def test_panel_caveat_only_where_totals_are_of_the_panel():
    assert any("299 genes" in text for text in caveats(299, True))
    assert not any("299 genes" in text for text in caveats(299, False))
