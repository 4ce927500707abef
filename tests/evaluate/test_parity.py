"""The same numbers as cell-eval and pertpy on the same simulated cells, where these are installed."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from pyro_causalcell import evaluate

EXACT = 1e-6
TARGETS = [f"P{i}" for i in range(8)]
GENES = [*TARGETS, *(f"g{i}" for i in range(52))]
# What the peers, and not this package, warn about.
pytestmark = [pytest.mark.filterwarnings("ignore")]


class Cells:
    """Simulated log-normalised cells; measured and predicted sets share their control cells."""

    def __init__(self):
        rng = np.random.default_rng(0)
        base_g = rng.gamma(1.0, 1.0, len(GENES)) + 0.2
        change = {}
        for target in TARGETS:
            change[target] = np.exp(0.6 * rng.standard_normal(len(GENES)) * (rng.random(len(GENES)) < 0.4))
        for i, target in enumerate(TARGETS):
            change[target][i] = 0.1  # knocked down

        def draw(mean_g, n):
            return np.log1p(rng.gamma(2.0, mean_g / 2.0, (n, len(GENES))))

        self.control = draw(base_g, 90)
        self.real = [draw(base_g * change[t], 70) for t in TARGETS]
        wrong = [*TARGETS[1:], TARGETS[0]]  # predictions mix in the effect of another target
        self.predicted = [
            draw(base_g * change[t] ** 0.5 * change[w] ** share, 50)
            for t, w, share in zip(TARGETS, wrong, np.linspace(0, 0.8, len(TARGETS)), strict=True)
        ]
        self.control_g = self.control.mean(0)
        self.true_cg = np.array([x.mean(0) for x in self.real])
        self.predicted_cg = np.array([x.mean(0) for x in self.predicted])
        self.every_cg = np.ones(self.true_cg.shape, dtype=bool)
        self.others_cg = self.every_cg & (np.array(GENES) != np.array(TARGETS)[:, None])

    def adata(self, cells):
        labels = np.repeat(["non-targeting", *TARGETS], [len(self.control), *map(len, cells)])
        obs = pd.DataFrame({"target": labels}, index=[str(n) for n in range(len(labels))])
        return ad.AnnData(np.concatenate([self.control, *cells]), obs=obs, var=pd.DataFrame(index=GENES))


@pytest.fixture(scope="module")
def cells():
    return Cells()


# ---------------------------------------------------------------- cell-eval


@pytest.fixture(scope="module")
def pair(cells):
    types = pytest.importorskip("cell_eval._types")
    return types.PerturbationAnndataPair(
        real=cells.adata(cells.real),
        pred=cells.adata(cells.predicted),
        pert_col="target",
        control_pert="non-targeting",
    )


@pytest.fixture(scope="module")
def tests(cells):
    """Differential expression of measured and of predicted cells: differences, adjusted p values.

    The p values are rounded: cell-eval keeps single precision, in which near values can become ties.
    """
    found = [evaluate.differential_expression(x, cells.control) for x in (cells.real, cells.predicted)]
    return [(difference_cg, adjusted_cg.round(3).clip(min=1e-3)) for difference_cg, adjusted_cg in found]


@pytest.fixture(scope="module")
def comparison(tests):
    types = pytest.importorskip("cell_eval._types")
    pl = pytest.importorskip("polars")

    def table(difference_cg, adjusted_cg):
        columns = {"target": np.repeat(TARGETS, len(GENES)), "feature": np.tile(GENES, len(TARGETS))}
        columns |= {"log2_fold_change": difference_cg.ravel(), "p_value": adjusted_cg.ravel()}
        return pl.DataFrame(columns | {"fdr": adjusted_cg.ravel()})

    real, predicted = (table(*result) for result in tests)
    return types.initialize_de_comparison(real, predicted)


def _values(by_target):
    return np.array([by_target[target] for target in TARGETS])


def test_errors_and_pearson_of_cell_eval(cells, pair):
    metrics = pytest.importorskip("cell_eval.metrics")
    arrays = cells.true_cg, cells.predicted_cg
    peers = {
        "mae": (_values(metrics.mae(pair)), evaluate.mae(*arrays, cells.every_cg)),
        "mse": (_values(metrics.mse(pair)), evaluate.rmse(*arrays, cells.every_cg) ** 2),
        "pearson_delta": (
            _values(metrics.pearson_delta(pair)),
            evaluate.pearson_of_effects(*arrays, cells.control_g, cells.every_cg),
        ),
    }
    for name, (theirs, ours) in peers.items():
        assert ours == pytest.approx(theirs, abs=EXACT), name


@pytest.mark.parametrize("distance", ["l1", "l2", "cosine"])
@pytest.mark.parametrize("masked", [True, False])
def test_discrimination_of_cell_eval(cells, pair, distance, masked):
    metrics = pytest.importorskip("cell_eval.metrics")
    theirs = _values(metrics.discrimination_score(pair, distance, exclude_target_gene=masked))
    scored_cg = cells.others_cg if masked else cells.every_cg
    ours = evaluate.perturbation_discrimination(
        cells.true_cg, cells.predicted_cg, cells.control_g, scored_cg, distance
    )
    assert ours == pytest.approx(theirs, abs=EXACT)
    assert 0.5 < ours.mean() < 1  # some are confused: the comparison is not one of constants


def test_correlation_of_e_distances_of_cell_eval(cells, pair):
    anndata_metrics = pytest.importorskip("cell_eval.metrics._anndata")
    real, predicted = (
        [evaluate.e_distance_with_diagonal(x, cells.control) for x in group]
        for group in (cells.real, cells.predicted)
    )
    assert np.corrcoef(real, predicted)[0, 1] == pytest.approx(anndata_metrics.edistance(pair), abs=EXACT)


def test_genes_found_of_cell_eval(tests, comparison, cells):
    metrics = pytest.importorskip("cell_eval.metrics")
    (true_cg, true_p_cg), (found_cg, found_p_cg) = tests
    label_cg, every_cg = true_p_cg < 0.05, cells.every_cg
    assert 5 < label_cg.sum(1).min() < label_cg.sum(1).max() < 50
    called_cg = np.where(found_p_cg < 0.05, np.abs(found_cg), -np.inf)
    assert (called_cg > 0).sum(1).min() >= 3  # with fewer, cell-eval divides by their number and not by k
    certainty_cg = -np.log10(found_p_cg)
    top_cg = evaluate.de_labels_top_k(np.where(label_cg, true_cg, 0), np.zeros(len(GENES)), every_cg, 3)
    peers = {
        "overlap at N": (
            metrics.de_overlap_metric(comparison, k=None),
            evaluate.overlap_at_n(label_cg, called_cg, every_cg),
        ),
        "precision at 3": (
            metrics.de_overlap_metric(comparison, k=3, metric="precision"),
            evaluate.precision_at_k(top_cg, called_cg, every_cg, 3),
        ),
        "direction": (
            metrics.DEDirectionMatch()(comparison),
            evaluate.direction_match(label_cg, true_cg, found_cg),
        ),
        "spearman": (
            metrics.DESpearmanLFC()(comparison),
            evaluate.spearman_of_effects(label_cg, true_cg, found_cg),
        ),
        "roc_auc": (metrics.compute_roc_auc(comparison), evaluate.auroc(label_cg, certainty_cg, every_cg)),
        "pr_auc": (metrics.compute_pr_auc(comparison), evaluate.auprc(label_cg, certainty_cg, every_cg)),
    }
    for name, (theirs, ours) in peers.items():
        assert ours == pytest.approx(_values(theirs), abs=EXACT), name
        assert np.ptp(ours) > 0, name
    assert evaluate.auroc(label_cg, certainty_cg, every_cg)[0] == roc_auc_score(label_cg[0], certainty_cg[0])
    assert evaluate.auprc(label_cg, certainty_cg, every_cg)[0] == average_precision_score(
        label_cg[0], certainty_cg[0]
    )


def test_wilcoxon_of_pdex(cells):
    """The test that cell-eval labels genes with."""
    pdex = pytest.importorskip("pdex")
    table = pdex.pdex(cells.adata(cells.real), groupby="target", is_log1p=True, as_pandas=False, threads=1)
    theirs = {(row["target"], row["feature"]): row["fdr"] for row in table.iter_rows(named=True)}
    theirs_cg = np.array([[theirs[target, gene] for gene in GENES] for target in TARGETS])
    ours_cg = evaluate.differential_expression(cells.real, cells.control)[1]
    assert ours_cg == pytest.approx(theirs_cg, abs=EXACT)


# ---------------------------------------------------------------- pertpy


@pytest.fixture(scope="module")
def distances():
    pytest.importorskip("pertpy")
    return pytest.importorskip("pertpy.tools._distances._distances")


def test_distances_of_pertpy(cells, distances):
    widths = [1000.0 * 2.0 ** (i - 5) for i in range(10)]
    for x, y in zip(cells.real, cells.predicted, strict=True):
        theirs = {
            "energy": (distances.Edistance()(x, y), evaluate.e_distance_with_diagonal(x, y)),
            "linear kernel": (distances.MMD()(x, y), evaluate.linear_mmd(x, y)),
            "ten Gaussian kernels": (
                sum(distances.MMD()(x, y, kernel="rbf", gamma=1 / width) for width in widths),
                evaluate.discrepancy_vae_mmd(x, y),
            ),
        }
        for name, (their, our) in theirs.items():
            assert our == pytest.approx(their, abs=EXACT), name
            assert our > 1e-3, name


def test_distances_of_means_of_pertpy(cells, distances):
    arrays = cells.true_cg, cells.predicted_cg
    ours = {
        "EuclideanDistance": evaluate.l2(*arrays, cells.every_cg),
        "MeanSquaredDistance": evaluate.rmse(*arrays, cells.every_cg) ** 2,
        "MeanAbsoluteDistance": evaluate.mae(*arrays, cells.every_cg),
        "PearsonDistance": 1 - np.sqrt(evaluate.r2_by_regression(*arrays, cells.every_cg)),
        "R2ScoreDistance": 1 - evaluate.r2_of_means(*arrays, cells.every_cg),
    }
    for name, our_c in ours.items():
        distance = getattr(distances, name)()
        their_c = [distance(x, y) for x, y in zip(cells.real, cells.predicted, strict=True)]
        assert our_c == pytest.approx(np.array(their_c), abs=EXACT), name
