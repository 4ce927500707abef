import io
import itertools

import matplotlib
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.text import Text

from pyro_causalcell import plot
from pyro_causalcell.errors import DataError

GENES = [f"GENE{g}" for g in range(50)]


def _graph(n_perturbations, n_programmes, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for p in range(n_perturbations):
        hit = set(rng.choice(n_programmes, rng.integers(0, 3), replace=False))
        for k in range(n_programmes):
            probability, effect = (
                (rng.uniform(0.8, 1), rng.normal(0, 2)) if k in hit else (rng.uniform(0, 0.1), 0.0)
            )
            rows.append((f"TARGET{p}", f"programme_{k + 1}", probability, effect))
    return pd.DataFrame(rows, columns=["perturbation", "programme", "probability", "effect"])


def _history(n=80):
    epoch = np.arange(n)
    loss = 450 + 300 * np.exp(-epoch / 4)
    columns = {
        "train_loss": loss,
        "validation_loss": loss + (epoch - 50) ** 2 / 500,
        "term_x": loss,
        "term_z": 5.0 + 0 * loss,
    }
    return pd.DataFrame(columns, index=epoch)


def _effects():
    rng = np.random.default_rng(0)
    mean, half = rng.laplace(0, 0.4, (2, len(GENES))), rng.gamma(2, 0.08, (2, len(GENES)))
    over = ("condition", "gene")
    return xr.Dataset(
        {"gene_effect": (over, mean), "gene_low": (over, mean - half), "gene_high": (over, mean + half)},
        coords={"condition": ["A", "B"], "gene": GENES},
    )


def _checks():
    rng = np.random.default_rng(0)
    mean_g = rng.lognormal(-1, 1, 50)
    arrays = []
    for _ in range(2):
        x_ng = rng.negative_binomial(1.5, 1.5 / (1.5 + mean_g), (200, 50))
        arrays.append(
            [x_ng.sum(1), (x_ng == 0).mean(0), x_ng.mean(0), x_ng.var(0), x_ng.reshape(2, 100, 50).mean(1)]
        )
    return list(itertools.chain.from_iterable(zip(*arrays, strict=True)))


def _scores():
    rng = np.random.default_rng(0)
    rows = [
        (
            method,
            f"c{c}",
            metric,
            np.nan if (method, metric) == ("control mean", "pearson_control") else rng.random(),
        )
        for method in ("model", "control mean", "additive")
        for metric in ("rmse", "pearson_control")
        for c in range(12)
    ]
    return pd.DataFrame(rows, columns=["method", "condition", "metric", "value"])


def _many_scores():
    one = _scores().replace({"method": {"model": "perturbed mean", "additive": "technical duplicate"}})
    return pd.concat(
        [one, one.replace({"metric": {"rmse": "mae", "pearson_control": "auprc_lift_train_de"}})] * 2
    )


def _calibrated():
    rng = np.random.default_rng(0)
    rows = [
        (method, metric, np.nan if method == "additive" and k == 1 else rng.normal(0, 2), k != 2)
        for method in ("model", "control mean", "additive")
        for k, metric in enumerate(("rmse", "pearson_control", "e_distance", "interaction_auroc"))
    ]
    return pd.DataFrame(rows, columns=["method", "metric", "score", "resolved"])


def _study():
    rows = [
        (setting, method, metric, 0.8, 0.02, np.nan if method == "oracle" else 0.7)
        for setting in ("p = 5", "p = 15")
        for method in ("VAE", "sVAE+", "oracle")
        for metric in ("MCC", "graph F1")
    ]
    return pd.DataFrame(rows, columns=["setting", "method", "metric", "mean", "sd", "paper"])


CLASSES = ["mostly zero", "low", "middle", "high", "all"]


def _classes():
    rng = np.random.default_rng(0)
    shares = {f"coverage_{n}": n / 100 + rng.normal(0, 0.02, 5) for n in (50, 80, 90, 95)}
    return pd.DataFrame({"gene_class": CLASSES, **shares})


def _pit():
    low = np.linspace(0, 0.95, 20)
    table = pd.DataFrame({"gene_class": np.repeat(CLASSES, 20), "low": np.tile(low, 5)})
    return table.assign(high=table["low"] + 0.05, density=np.random.default_rng(0).uniform(0.8, 1.2, 100))


def _risk():
    kept = np.arange(1, 27) / 26
    return pd.DataFrame({"coverage": kept, "risk": 0.1 + 0.05 * kept, "best": 0.15 * kept, "random": 0.15})


def _statistics(n):
    rng = np.random.default_rng(0)
    blocks = []
    for name in ("total_mean", "zero_fraction"):
        mean = rng.gamma(1, 2, n)
        block = pd.DataFrame({"condition": [f"TARGET{i}" for i in range(n)], "statistic": name})
        block = block.assign(observed=mean + rng.normal(0, 0.2, n), replicate_mean=mean)
        blocks.append(block.assign(low=mean - 0.3, high=mean + 0.3))
    return pd.concat(blocks)


def _ranks():
    rng = np.random.default_rng(0)
    ranks = pd.DataFrame({f"shift[{i},1]": rng.integers(0, 20, 50) for i in range(8)})
    place = np.arange(1, 20) / 20
    band = pd.DataFrame({"place": place, "low": place - 0.18, "high": place + 0.18})
    table = pd.DataFrame({"quantity": list(ranks), "ecdf_p": rng.random(8), "rejected": [True] + [False] * 7})
    return ranks, band, table


FIGURES = {
    "training": lambda: plot.training_curve(_history()),
    "graph, small": lambda: plot.graph_heatmap(_graph(25, 10)),
    "graph, large": lambda: plot.graph_heatmap(_graph(100, 15)),
    "top genes": lambda: plot.top_genes(
        pd.DataFrame(
            np.random.default_rng(0).normal(size=(6, 50)), [f"programme_{k}" for k in range(6)], GENES
        )
    ),
    "effects": lambda: plot.effect_intervals(_effects(), "A"),
    "checks": lambda: plot.predictive_checks(*_checks()),
    "reliability": lambda: plot.reliability({"all genes": ([0.5, 0.9], [0.45, 0.88])}),
    "coverage": lambda: plot.coverage(_classes()),
    "pit": lambda: plot.pit(_pit()),
    "risk and coverage": lambda: plot.risk_coverage(_risk()),
    "statistics of groups": lambda: plot.predictive_statistics(_statistics(26)),
    "statistics of genes": lambda: plot.predictive_statistics(_statistics(300)),
    "ranks": lambda: plot.sbc_ranks(*_ranks()),
    "pareto k": lambda: plot.pareto_k(np.random.default_rng(0).normal(0.4, 0.2, 300)),
    "methods": lambda: plot.compare_methods(_scores(), highlight=["model"]),
    "methods, many metrics": lambda: plot.compare_methods(_many_scores(), ["perturbed mean"]),
    "calibrated": lambda: plot.calibrated_scores(_calibrated()),
    "study": lambda: plot.study_table(_study()),
}


def _drawn(figure):
    figure.savefig(io.BytesIO(), format="png", dpi=100)
    return figure


def _boxes(texts):
    shown = [t for t in texts if t.get_visible() and t.get_text().strip()]
    return [t.get_window_extent() for t in shown]


def _tick_labels(axis):
    """Labels of the ticks inside the frame; the others are never drawn."""
    low, high = sorted(axis.get_view_interval())
    ticks = axis.get_major_ticks()
    return [tick.label1 for tick in ticks if low - 1e-9 <= tick.get_loc() <= high + 1e-9]


@pytest.fixture(scope="module", params=FIGURES)
def figure(request):
    return _drawn(FIGURES[request.param]())


def test_every_axis_is_labelled(figure):
    for ax in figure.axes:
        place = ax.get_subplotspec()
        if place is not None and not place.is_last_row():
            continue  # panels of one column share the label under the last
        named = ax.get_xlabel() or ax.get_ylabel() or ax.get_title(loc="left") or figure.get_supxlabel()
        assert named


def test_tick_labels_do_not_overlap(figure):
    for ax in figure.axes:
        for axis, over in ((ax.xaxis, "x"), (ax.yaxis, "y")):
            if over == "x" and any(t.get_rotation() % 90 for t in _tick_labels(axis)):
                continue  # slanted labels have overlapping boxes without touching
            boxes = sorted(_boxes(_tick_labels(axis)), key=lambda b: b.y0 if over == "y" else b.x0)
            for a, b in itertools.pairwise(boxes):
                low, high = (a.y1, b.y0) if over == "y" else (a.x1, b.x0)
                assert low <= high + 1.5, (ax.get_title(loc="left"), over)


def test_nothing_leaves_the_figure(figure):
    frame = figure.bbox
    texts = list(figure.texts)
    for ax in figure.axes:
        titles = [t for t in ax.get_children() if isinstance(t, Text)]
        texts += [*titles, ax.xaxis.label, ax.yaxis.label, *_tick_labels(ax.xaxis), *_tick_labels(ax.yaxis)]
    for box in _boxes(texts):
        assert box.x0 >= frame.x0 - 1 and box.x1 <= frame.x1 + 1
        assert box.y0 >= frame.y0 - 1 and box.y1 <= frame.y1 + 1


def test_no_global_state_is_touched():
    before = dict(matplotlib.rcParams)
    figures = [make() for make in FIGURES.values()]
    assert dict(matplotlib.rcParams) == before
    assert all(isinstance(figure, Figure) for figure in figures)
    import matplotlib.pyplot as plt

    assert plt.get_fignums() == []


def test_shared_programmes_sit_together():
    edges = {"A": [1], "B": [2], "C": [1], "D": [], "E": [2], "F": [1]}
    rows = [(p, f"k{k}", 0.99 if k in hit else 0.01, 1.0) for p, hit in edges.items() for k in (0, 1, 2)]
    graph = pd.DataFrame(rows, columns=["perturbation", "programme", "probability", "effect"])
    perturbations, programmes = plot.order_graph(graph)
    assert programmes == ["k1", "k2", "k0"]
    assert perturbations == ["A", "C", "F", "B", "E", "D"]


def test_graph_colours_are_centred_and_area_is_probability():
    graph = pd.DataFrame(
        [("A", "k", 1.0, -4.0), ("B", "k", 0.25, 1.0)],
        columns=["perturbation", "programme", "probability", "effect"],
    )
    dots = plot.graph_heatmap(graph).axes[0].collections[0]
    sizes = dict(zip(np.asarray(dots.get_array()), dots.get_sizes(), strict=True))
    assert sizes[-4.0] == pytest.approx(4 * sizes[1.0])
    assert dots.norm(0.0) == pytest.approx(0.5)
    assert (dots.norm.vmin, dots.norm.vmax) == (-4.0, 4.0)


def test_graph_without_any_open_edge_is_drawn():
    graph = _graph(5, 3).assign(probability=0.02, effect=0.0)
    assert len(_drawn(plot.graph_heatmap(graph)).axes[0].get_yticklabels()) == 5


def test_effects_are_ranked_by_what_is_sure():
    over = ("condition", "gene")
    effects = xr.Dataset(
        {
            "gene_effect": (over, [[5.0, 1.0, 0.1]]),
            "gene_low": (over, [[-1.0, 0.8, -0.1]]),
            "gene_high": (over, [[9.0, 1.2, 0.2]]),
        },
        coords={"condition": ["A"], "gene": ["unsure", "sure", "none"]},
    )
    ax = plot.effect_intervals(effects, "A", n_genes=1).axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["sure"]


def test_top_genes_are_the_largest_of_either_sign():
    loadings = pd.DataFrame([[3.0, -4.0, 0.1, 1.0]], ["k"], ["up", "down", "none", "some"])
    ax = plot.top_genes(loadings, n_genes=2).axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["down", "up"]


def test_training_curve_marks_the_best_epoch_of_the_last_stage():
    history = _history()
    history["stage"] = ["warm start"] * 60 + ["main"] * 20
    best = history["validation_loss"].iloc[60:].idxmin()
    labels = [t.get_text() for t in plot.training_curve(history).axes[0].get_legend().get_texts()]
    assert f"lowest: epoch {best}" in labels


def test_late_losses_fill_the_frame():
    low, high = plot.training_curve(_history()).axes[0].get_ylim()
    assert low < 450 and high < 700


def test_pareto_k_title_counts_the_cells_above_the_line():
    figure = plot.pareto_k([0.1, 0.2, 0.3, 0.9])
    assert figure.axes[0].get_title(loc="left") == "25.0% of 4 cells above 0.7"


def test_pareto_k_that_is_not_finite_counts_as_large():
    figure = plot.pareto_k([0.1, np.inf, np.nan, 40.0])
    assert figure.axes[0].get_title(loc="left") == "75.0% of 4 cells above 0.7"
    assert figure.axes[0].get_xlim()[1] < 2


def test_what_lies_outside_its_interval_is_red():
    table = _statistics(3).assign(observed=1.0, low=[0.0, 2.0, 0.0] * 2, high=3.0)
    ax = plot.predictive_statistics(table).axes[0]
    assert [len(c.get_offsets()) for c in ax.collections[1:]] == [2, 1]
    names = ["TARGET0", "TARGET1", "TARGET2"]
    assert [t.get_text() for t in ax.get_yticklabels()] == names
    for gene, shown in ((np.nan, names), ("G", [f"{name}, G" for name in names])):
        ax = plot.predictive_statistics(table.assign(gene=gene)).axes[0]
        assert [t.get_text() for t in ax.get_yticklabels()] == shown


def test_quantities_that_stand_out_are_drawn_first():
    ranks, band, table = _ranks()
    figure = plot.sbc_ranks(ranks, band, table.assign(ecdf_p=[0.5] * 6 + [0.01, 0.02]), most=2)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["shift[6,1]", "shift[7,1]"]


def test_undefined_scores_are_said():
    figure = plot.compare_methods(_scores())
    assert "not defined" in [t.get_text() for t in figure.axes[1].texts]


def test_floor_and_ceiling_are_lines_at_their_means():
    scores = _many_scores()
    ax = plot.compare_methods(scores).axes[0]
    rmse = scores[scores["metric"] == "rmse"].groupby("method")["value"].mean()
    upright = [
        line.get_xdata()[0]
        for line in ax.lines
        if len(set(line.get_xdata())) == 1 and len(line.get_xdata()) == 2
    ]
    assert upright == pytest.approx([rmse["perturbed mean"], rmse["technical duplicate"]])


def test_an_axis_ends_before_scores_that_lie_far_out_and_says_so():
    value = np.random.default_rng(0).normal(size=(2, 150))
    value[1, 0] = 80.0
    scores = pd.DataFrame({"method": np.repeat(["a", "b"], 150), "condition": [*range(150)] * 2})
    scores = scores.assign(metric="e_distance", value=value.ravel())
    ax = plot.compare_methods(scores).axes[0]
    assert 3 < ax.get_xlim()[1] < 20 and "beyond the axis" in ax.get_xlabel()
    assert [*ax.collections[-1].get_offsets()[0]] == pytest.approx([ax.get_xlim()[1], 1])
    ax = plot.compare_methods(scores[scores["value"] < 80]).axes[0]
    assert "beyond" not in ax.get_xlabel() and ax.get_xlim()[1] > value[value < 80].max()


def test_calibrated_numbers_are_not_clipped_and_unresolved_ones_not_coloured():
    table = _calibrated()
    table.loc[0, "score"] = -12.345
    ax = plot.calibrated_scores(table).axes[0]
    shown = [text.get_text() for text in ax.texts]
    assert "-12.35" in shown or "-12.34" in shown
    assert "n/a" in shown
    coloured = np.ma.filled(np.ma.masked_invalid(ax.images[0].get_array()), np.nan)
    assert np.isnan(coloured[2]).all() and np.isfinite(coloured[0]).all()


def test_oracle_is_a_line_and_not_a_row():
    ax = plot.study_table(_study()).axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["VAE", "sVAE+"]
    assert any(list(line.get_xdata()) == [0.8, 0.8] for line in ax.lines)


def test_a_setting_shows_the_methods_that_were_run_in_it():
    table = _study()
    figure = plot.study_table(table[(table["setting"] == "p = 5") | (table["method"] != "VAE")])
    rows = [[t.get_text() for t in figure.axes[i].get_yticklabels()] for i in (0, 2)]
    assert rows == [["VAE", "sVAE+"], ["sVAE+"]]
    heights = [figure.axes[i].get_gridspec().get_height_ratios()[i // 2] for i in (0, 2)]
    assert heights[0] > heights[1]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plot.training_curve(pd.DataFrame({"loss": [1.0]})), "train_loss or validation_loss"),
        (lambda: plot.pit(_pit().drop(columns="low")), r"lacks the columns \['low'\]"),
        (lambda: plot.coverage(_classes()[["gene_class"]]), "coverage_50"),
        (lambda: plot.sbc_ranks(pd.DataFrame({"z": [1]}), *_ranks()[1:]), "shift"),
        (lambda: plot.graph_heatmap(pd.DataFrame({"perturbation": ["A"]})), "lacks the columns"),
        (lambda: plot.effect_intervals(_effects(), "C"), "no effects of 'C'"),
        (lambda: plot.top_genes(pd.DataFrame(np.ones((1, 2)), ["k"]), ["j"]), "not among"),
        (lambda: plot.compare_methods(pd.DataFrame({"method": ["m"]})), "lack the columns"),
        (lambda: plot.calibrated_scores(pd.DataFrame({"method": ["m"]})), "lacks the columns"),
        (lambda: plot.study_table(pd.DataFrame({"method": ["m"]})), "lacks the columns"),
    ],
)
def test_errors_name_what_is_missing(draw, message):
    with pytest.raises(DataError, match=message):
        draw()
