import dataclasses
import re

import numpy as np
import pandas as pd
import pytest

from pyro_causalcell.evaluate import Audit, Check
from pyro_causalcell.report import sections
from pyro_causalcell.report.ranks import Ranks

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


def test_names_from_the_data_are_escaped(graph, signatures, effects):
    graph["perturbation"] = graph["perturbation"].replace({"IFNGR1": EVIL})
    effects = effects.assign_coords(condition=[EVIL, *effects["condition"].values[1:]])
    for text in (
        sections.graph_section(graph),
        sections.programmes_section(signatures, graph),
        sections.effects_section(effects, 0.9),
    ):
        assert EVIL not in text
        assert "&lt;b&gt;ATF2&lt;/b&gt;" in text


def test_programmes_that_nothing_moves_are_folded(signatures, graph):
    text = sections.programmes_section(signatures, graph)
    assert "2 programmes that no perturbation moves" in text
    shown, idle, shared, numbers = text.split("<details>")
    assert "programme 3: IFNGR1, IFNGR2, JAK2 and STAT1" in shown
    assert idle.count("<figure>") == shared.count("<figure>") == 1
    assert numbers.count("<tr>") == 6 * 10 + 1 and "log1p CP10k" in numbers
    assert numbers.index("+5.00") < numbers.index("-4.00")  # the largest changes of programme 3 first


def test_gene_sets_are_named_where_they_are_found(signatures, graph):
    rows = [
        ("programme_3", "INTERFERON", 12, -2.1, 0.0, 0.001, "GENE1 GENE2"),
        ("programme_3", EVIL, 9, 0.8, 0.4, 0.6, "GENE5"),
        ("programme_6", "IDLE", 9, 2.5, 0.0, 0.001, "GENE7"),
    ]
    columns = ["programme", "gene_set", "n_genes", "score", "p_value", "fdr", "leading_genes"]
    table = pd.DataFrame(rows, columns=columns)
    text = sections.programmes_section(signatures, graph, table)
    assert "programme 3: INTERFERON falls." in text and "programme 6" not in text
    assert EVIL not in text and "<td>IDLE</td>" in text
    nothing = sections.programmes_section(signatures, graph, table.assign(fdr=0.5))
    assert "No set has an FDR below 0.05 in a moved programme." in nothing


def test_doubles_are_counted_drawn_and_listed(doubles):
    text = sections.doubles_section(doubles)
    assert "Measured: 1 additive, 1 dominant and 1 unknown." in text
    assert "The model gives the measured kind of 1 of 2 doubles." in text
    assert text.count("<figure>") == 1 and text.count("<tr>") == 7
    unknown = doubles.assign(kind="unknown", residual_share=np.nan, size_ratio=np.nan)
    assert "<figure>" not in sections.doubles_section(unknown)


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


def test_effects_are_listed_surest_first(effects):
    text = sections.effects_section(effects, 0.9)
    rows = text.split("<tbody>")[1].split("</tbody>")[0].split("</tr>")[:-1]
    assert len(rows) == 10 * effects.sizes["condition"]
    jak2 = [row for row in rows if "<td>JAK2</td>" in row]
    assert len(jak2) == 10
    assert {"GENE1", "GENE2"} == {re.findall(r"<td>(.*?)</td>", row)[1] for row in jak2[:2]}
    assert 'data-name="JAK2"' in text and "Filter by perturbation or gene" in text
    assert text.count("<input") == 1  # one box for figures and table


def test_checks_put_the_most_surprising_first(checks, check_table):
    text = sections.checks_section(checks, check_table, "counts", "200 cells", 50)
    numbers = text.split("<tbody>")[1]
    assert numbers.index("dispersion") < numbers.index("zero fraction")
    assert "200 cells" in text and "50 copies" in text and "3 of 6 do" in text
    assert text.count("<figure>") == 2


def test_calibration_names_what_is_wrong_and_what_the_verdict_hides(measured, check_table):
    together = check_table[check_table["condition"] == "all cells"]
    text = sections.calibration_section(measured, together, "900 cells")
    assert '<p class="warn">Miscalibrated. 90% intervals of low genes hold 80.0%, too narrow.' in text
    assert "forgives a wrong model" in text
    assert "The dispersion of the real cells (median over genes) is 0.90" in text
    assert "copies have 0.40 to 0.60" in text
    assert "does not agree" in text and "rank correlation of 0.41" in text
    assert "85.0%" in text and ">55%<" in text and "uncertain by 1.0 points" in text
    row = text[text.index('<div class="row">') :]
    assert row.count("<figure>") == 3  # PIT and risk side by side, all classes on a click


def test_a_calibrated_fit_is_said_to_be_so(measured):
    measured.classes["coverage_90"] = 0.9
    text = sections.calibration_section(measured, pd.DataFrame({"statistic": [], "p_value": []}), "900 cells")
    assert '<p class="good">Calibrated' in text and "dispersion of the real" not in text
    few = dataclasses.replace(measured, spearman=float("nan"))
    assert "no correlation can be told" in sections.calibration_section(
        few, pd.DataFrame({"statistic": [], "p_value": []}), "900 cells"
    )


def test_status_of_a_check_is_a_word_and_a_symbol():
    checks = (
        Check("control cells", "ok", "300", "202"),
        Check("directions", "fails", "3", "at least 10", "fit at most 3 programmes"),
        Check("sVAE+", "fails", "does not hold: directions", "", kind="guarantee"),
        Check(EVIL, "unknown", "cannot be seen", "one to one", "think", "assumption"),
    )
    text = sections.audit_section(Audit("10 programmes, 300 cells", checks))
    assert '<td class="ok">✓ ok</td>' in text and '<td class="fails">✗ fails</td>' in text
    assert "1 ✓ ok and 1 ✗ fails" in text and "10 programmes, 300 cells" in text
    assert text.count("<table>") == 3 and EVIL not in text
    assert text.index("fit at most 3 programmes") < text.index("sVAE+") < text.index("<details>")


def test_ranks_that_are_uniform(sbc_folder):
    table = pd.read_csv(sbc_folder / "sbc.csv").assign(rejected=False, finding="")
    picture = (sbc_folder / "sbc.png").read_bytes()
    text = sections.ranks_section(Ranks(table, 30, picture), "sbc")
    assert '<p class="good">Uniform: none of 4' in text and "only large errors show" in text
    assert "only large errors" not in sections.ranks_section(Ranks(table, 100, picture), "sbc")


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
    means = seen.split("Mean scores of all methods")[1]
    assert means.count("<tr>") == 7
    assert "left out" not in seen
    no_control = scores[~scores["method"].isin(["control mean", "additive"])]
    without = sections.comparison_section(no_control, "200 cells", seen=True)
    assert "left out, because they need control cells and none were trained on" in without
    assert "matching mean is as good" in without and "Control mean says" not in without
    none = sections.comparison_section(scores.iloc[:0], "200 cells", seen=True)
    assert "No perturbed condition" in none


def test_comparison_places_the_model_between_floor_and_ceiling():
    """Made-up errors: the model is halfway in one condition and at the floor in the other."""
    value = {"model": (3.0, 4.0), "perturbed mean": (4.0, 4.0), "technical duplicate": (2.0, 2.0)}
    rows = [(m, f"c{c}", "rmse", v) for m, both in value.items() for c, v in enumerate(both)]
    scores = pd.DataFrame(rows, columns=["method", "condition", "metric", "value"])
    text = sections.comparison_section(scores, "200 cells", seen=False)
    row = text.split("RMSE (log1p CP10k)</td>")[1].split("</tr>")[0]
    assert re.findall(r">([^<]+)</td>", row) == ["0.25", "0.00", "0.50"]
    assert "0 is the floor (perturbed mean), 1 the ceiling (technical duplicate)" in text
    assert "Left out" not in text


def test_metrics_that_cannot_tell_methods_apart_get_no_calibrated_score():
    """Made-up errors: a repeat is noisier than the floor, so a better model would score below zero."""
    value = {"model": (3.0, 3.0), "perturbed mean": (4.0, 4.0), "technical duplicate": (5.0, 5.0)}
    rows = [(m, f"c{c}", "rmse", v) for m, both in value.items() for c, v in enumerate(both)]
    scores = pd.DataFrame(rows, columns=["method", "condition", "metric", "value"])
    text = sections.comparison_section(scores, "200 cells", seen=False)
    assert "Left out: RMSE (log1p CP10k)." in text and "RMSE (log1p CP10k)</td>" not in text


def test_the_graph_says_how_far_shared_effects_saturate(graph):
    graph = graph.assign(masks=0.1)
    assert "make" not in sections.graph_section(graph)
    graph.attrs["saturation"] = 1.0
    assert "make 1.41 times one of them" in sections.graph_section(graph)
