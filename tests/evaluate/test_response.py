import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.stats import mannwhitneyu, spearmanr, ttest_ind
from sklearn.metrics import average_precision_score, r2_score, roc_auc_score

from pyro_causalcell.baselines import condition_means, log_cp10k, training_means
from pyro_causalcell.data import Screen, random_cells
from pyro_causalcell.errors import DataError
from pyro_causalcell.evaluate import (
    METRICS,
    Truth,
    additive_means,
    auprc,
    auprc_over_prevalence,
    auroc,
    centroid_accuracy,
    de_labels_top_k,
    de_labels_train,
    differential_expression,
    direction_match,
    effect_weights,
    interaction_auroc,
    interaction_pearson,
    interaction_residual,
    l2,
    mae,
    other_genes,
    overlap_at_n,
    pearson_of_effects,
    perturbation_discrimination,
    precision_at_k,
    r2_by_regression,
    r2_of_effects,
    r2_of_means,
    response_scores,
    rmse,
    rmse_cell_vs_mean,
    spearman_of_effects,
    strong_interactions,
    t_against_rest,
    top_expressed,
    weighted_mse,
    weighted_r2_of_effects,
)


def _all(shape):
    return np.ones(shape, dtype=bool)


# ---------------------------------------------------------------- by hand


def test_errors_by_hand():
    true_cg = np.array([[1.0, 2, 3, 4], [0, 0, 0, 0]])
    predicted_cg = np.array([[1.0, 5, 3, 0], [0, 3, 0, 99]])
    scored_cg = np.array([[True, True, True, True], [True, True, True, False]])
    assert l2(true_cg, predicted_cg, scored_cg) == pytest.approx([5, 3])
    assert rmse(true_cg, predicted_cg, scored_cg) == pytest.approx([2.5, np.sqrt(3)])
    assert mae(true_cg, predicted_cg, scored_cg) == pytest.approx([7 / 4, 1])
    nothing = np.zeros((2, 4), dtype=bool)
    assert all(np.isnan(error(true_cg, predicted_cg, nothing)).all() for error in (l2, rmse, mae))


def test_top_expressed_takes_the_largest():
    assert top_expressed(np.array([0.1, 3.0, 2.0, 3.0]), 2).tolist() == [False, True, False, True]
    assert top_expressed(np.array([1.0, 1.0, 1.0]), 2).sum() == 2
    assert top_expressed(np.array([1.0, 2.0]), 1000).all()


def test_perturbed_genes_are_not_scored(tiny_adata):
    tiny_adata.var_names = ["A", "x", "B", *tiny_adata.var_names[3:]]
    scored_cg = other_genes(Screen(tiny_adata), ["A", "D", "A+B"])
    assert [np.flatnonzero(~scored_g).tolist() for scored_g in scored_cg] == [[0], [], [0, 2]]


def test_pearson_depends_on_the_reference():
    true_cg = np.array([[2.0, 1, 0, 3]])
    predicted_cg = np.array([[1.0, 1, 0, 1]])
    control_g, perturbed_g = np.zeros(4), np.array([1.0, 1, 0, 1])
    by_hand = np.corrcoef([2, 1, 0, 3], [1, 1, 0, 1])[0, 1]
    assert pearson_of_effects(true_cg, predicted_cg, control_g, _all((1, 4))) == pytest.approx([by_hand])
    assert np.isnan(pearson_of_effects(true_cg, predicted_cg, perturbed_g, _all((1, 4)))).all()
    only_two = np.array([[True, False, True, False]])
    assert pearson_of_effects(true_cg, predicted_cg, control_g, only_two) == pytest.approx([1])


def test_the_three_r2_differ():
    true_cg, reference_g = np.array([[1.0, 2, 3]]), np.array([1.0, 2, 2])
    predicted_cg, scored_cg = np.array([[1.0, 2, 4]]), _all((1, 3))
    assert r2_of_means(true_cg, predicted_cg, scored_cg) == pytest.approx([1 - 1 / 2])
    correlation = np.corrcoef([1, 2, 3], [1, 2, 4])[0, 1]
    assert r2_by_regression(true_cg, predicted_cg, scored_cg) == pytest.approx([correlation**2])
    assert r2_of_effects(true_cg, predicted_cg, reference_g, scored_cg) == pytest.approx([1 - 1 / (2 / 3)])
    assert r2_by_regression(true_cg, -3 * true_cg, scored_cg) == pytest.approx([1])  # blind to scale and sign
    assert np.isnan(r2_of_effects(true_cg, predicted_cg, true_cg[0], scored_cg)).all()


def test_r2_is_that_of_scikit_learn(rng):
    true_cg, predicted_cg = rng.standard_normal((2, 3, 30))
    reference_g, weight_cg = rng.standard_normal(30), rng.random((3, 30))
    scored_cg = rng.random((3, 30)) < 0.7
    for c in range(3):
        y, p, scored = true_cg[c], predicted_cg[c], scored_cg[c]
        assert r2_of_means(true_cg, predicted_cg, scored_cg)[c] == pytest.approx(
            r2_score(y[scored], p[scored])
        )
        expected = r2_score(y - reference_g, p - reference_g, sample_weight=weight_cg[c])
        found = weighted_r2_of_effects(true_cg, predicted_cg, reference_g, weight_cg)[c]
        assert found == pytest.approx(expected)
        expected = r2_score((y - reference_g)[scored], (p - reference_g)[scored])
        assert r2_of_effects(true_cg, predicted_cg, reference_g, scored_cg)[c] == pytest.approx(expected)


def _moments(x_ng, condition_n, n):
    groups = [x_ng[condition_n == c] for c in range(n)]
    mean, variance = zip(*((x.mean(0), x.var(0, ddof=1)) for x in groups), strict=True)
    return np.array(mean), np.array(variance), np.array([len(x) for x in groups])


def test_t_against_rest_is_that_of_scipy(rng):
    condition_n = np.repeat([0, 1, 2], [5, 9, 4])
    x_ng = 7 + rng.standard_normal((18, 4)) * [1, 2, 3, 0]
    t_cg = t_against_rest(*_moments(x_ng, condition_n, 3))
    for c in range(3):
        own, rest = x_ng[condition_n == c, :3], x_ng[condition_n != c, :3]
        assert t_cg[c, :3] == pytest.approx(ttest_ind(own, rest, equal_var=False).statistic)
    assert (t_cg[:, 3] == 0).all()  # a gene that never varies


def test_t_needs_two_cells_of_the_condition_and_of_the_rest():
    mean_cg, variance_cg = np.array([[1.0], [np.nan], [3.0]]), np.array([[0.5], [np.nan], [np.nan]])
    t_cg = t_against_rest(mean_cg, variance_cg, np.array([5, 0, 1]))
    assert np.isnan(t_cg).all()  # the rest of the first is one cell


def test_weights_by_hand():
    t_cg = np.array([[-3.0, 1.0, 2.0, 99.0], [1, 1, 1, 1], [np.nan, 1, 2, 3]])
    scored_cg = np.array([[True, True, True, False], [True] * 4, [True] * 4])
    weight_cg = effect_weights(t_cg, scored_cg)
    assert weight_cg[0] == pytest.approx([0.8, 0, 0.2, 0])  # (1, 0, 1/2)² = (4, 0, 1) / 4
    assert np.isnan(weight_cg[1:]).all()
    true_cg, predicted_cg = np.zeros((1, 4)), np.array([[1.0, 7.0, 2.0, 5.0]])
    assert weighted_mse(true_cg, predicted_cg, weight_cg[:1]) == pytest.approx([0.8 + 0.2 * 4])


LINE = np.array([[0.0, 0], [1, 0], [3, 0]])  # three true means on a line


def test_centroid_accuracy_and_discrimination_by_hand():
    # the first is nearest its own mean; the second nearest the third; the third ranks behind both
    predicted_cg = np.array([[0.1, 0], [2.5, 0], [-1, 0]])
    scored_cg = _all((3, 2))
    assert centroid_accuracy(LINE, predicted_cg, scored_cg) == pytest.approx([1, 1 / 2, 0])
    for distance in ("l1", "l2"):
        score_c = perturbation_discrimination(LINE, predicted_cg, np.zeros(2), scored_cg, distance)
        assert score_c == pytest.approx([1, 2 / 3, 1 / 3])
    assert np.isnan(centroid_accuracy(LINE[:1], predicted_cg[:1], scored_cg[:1])).all()


@pytest.mark.parametrize("distance", ["l1", "l2", "cosine"])
def test_discrimination_by_a_direct_ranking(rng, distance):
    true_cg = 5 + rng.standard_normal((12, 30))
    predicted_cg, control_g = true_cg + 4 * rng.standard_normal((12, 30)), 5 + rng.random(30)
    scored_cg = rng.random((12, 30)) < 0.6
    kind = {"l1": "cityblock", "l2": "euclidean", "cosine": "cosine"}[distance]
    direct = []
    for c, kept in enumerate(scored_cg):
        effects_cg, effect_g = (true_cg - control_g)[:, kept], (predicted_cg[c] - control_g)[kept]
        order = np.argsort(cdist(effect_g[None], effects_cg, kind)[0])
        direct.append(1 - np.flatnonzero(order == c)[0] / 12)
    found = perturbation_discrimination(true_cg, predicted_cg, control_g, scored_cg, distance)
    assert found == pytest.approx(direct)
    assert 0.5 < found.mean() < 1


def test_l1_and_l2_can_disagree():
    true_cg = np.array([[0.0, 0, 0], [2.0, 2, 2]])
    predicted_cg = np.array([[3.5, 0, 0], [2.0, 2, 2]])  # 3.5 and 5.5 away in L1, 3.5 and 3.2 in L2
    scores = {
        d: perturbation_discrimination(true_cg, predicted_cg, np.zeros(3), _all((2, 3)), d)[0]
        for d in ("l1", "l2")
    }
    assert scores == {"l1": 1, "l2": 0.5}


def test_cosine_sees_direction_only():
    true_cg = np.array([[1.0, 0], [1, 1], [0, 1]])
    for scale in (0.01, 1, 100):
        score_c = perturbation_discrimination(true_cg, scale * true_cg, np.zeros(2), _all((3, 2)), "cosine")
        assert score_c == pytest.approx([1, 1, 1])
    still = perturbation_discrimination(true_cg, np.zeros((3, 2)), np.zeros(2), _all((3, 2)), "cosine")
    assert np.isnan(still).all()
    without = np.array([[0.0, 0], [1, 1], [0, 1]])
    score_c = perturbation_discrimination(without, true_cg, np.zeros(2), _all((3, 2)), "cosine")
    assert np.isnan(score_c[0])
    assert score_c[1:].tolist() == [1, 1]


def test_the_target_gene_gives_the_condition_away_unless_masked():
    true_cg = np.array([[-5.0, 0, 1, 0], [0, -5.0, 0, 1]])  # genes 0 and 1 are the targets
    predicted_cg = np.array([[-5.0, 0, 0, 1], [0, -5.0, 1, 0]])  # knock-down right, response swapped
    masked_cg = np.array([[False, True, True, True], [True, False, True, True]])
    keep = masked_cg & np.array([False, False, True, True])
    assert centroid_accuracy(true_cg, predicted_cg, _all((2, 4))).tolist() == [1, 1]
    assert centroid_accuracy(true_cg, predicted_cg, keep).tolist() == [0, 0]
    for scored_cg, expected in ((_all((2, 4)), 1), (keep, 0.5)):
        score_c = perturbation_discrimination(true_cg, predicted_cg, np.zeros(4), scored_cg, "l2")
        assert score_c.tolist() == [expected, expected]


def test_one_profile_for_all_is_chance(rng):
    true_cg = rng.standard_normal((9, 20))
    same_cg = np.tile(rng.standard_normal(20), (9, 1))
    scored_cg = _all((9, 20))
    assert centroid_accuracy(true_cg, same_cg, scored_cg).mean() == pytest.approx(0.5)
    for distance in ("l1", "l2", "cosine"):
        score_c = perturbation_discrimination(true_cg, same_cg, np.zeros(20), scored_cg, distance)
        assert score_c.mean() == pytest.approx(10 / 18)


@pytest.mark.parametrize("test", ["wilcoxon", "t"])
def test_differential_expression_is_that_of_scipy(rng, test):
    control_ng, x_ng = rng.poisson(1.0, (40, 5)).astype(float), rng.poisson(1.3, (30, 5)).astype(float)
    control_ng[:, 4] = x_ng[:, 4] = 1
    difference_cg, adjusted_cg = differential_expression([x_ng, x_ng[:1], x_ng[:0]], control_ng, test)
    assert difference_cg[0] == pytest.approx(x_ng.mean(0) - control_ng.mean(0))
    if test == "wilcoxon":
        p_g = mannwhitneyu(x_ng[:, :4], control_ng[:, :4], method="asymptotic").pvalue
    else:
        p_g = ttest_ind(x_ng[:, :4], control_ng[:, :4], equal_var=False).pvalue
    ordered = np.sort([*p_g, 1.0])
    by_hand = np.minimum.accumulate((ordered * 5 / np.arange(1, 6))[::-1])[::-1]
    assert np.sort(adjusted_cg[0]) == pytest.approx(np.minimum(by_hand, 1))
    assert adjusted_cg[0, 4] == 1
    assert (adjusted_cg[1:] == 1).all()  # one cell and none
    assert np.isnan(difference_cg[2]).all()


@pytest.mark.parametrize("test", ["wilcoxon", "t"])
def test_genes_constant_on_a_side_are_tested(test):
    x_ng, control_ng = np.zeros((20, 2)), np.column_stack([np.ones(20), np.arange(20.0)])
    adjusted_cg = differential_expression([x_ng], control_ng, test)[1]
    assert (adjusted_cg < 1e-4).all()


def test_training_labels_find_planted_genes(tiny_screen):
    """Simulated: A raises genes 0 to 4, and D does nothing."""
    x_ng = log_cp10k(tiny_screen.x(np.arange(tiny_screen.n_cells)), np.full(tiny_screen.n_cells, 100.0))
    cells = [x_ng[tiny_screen.condition_n == tiny_screen.conditions.index(c)] for c in ("A", "D")]
    label_cg = de_labels_train([*cells, x_ng[:0]], x_ng[tiny_screen.condition_n == 0])
    assert label_cg[0].tolist() == [True] * 5 + [False] * 15
    assert not label_cg[1:].any()


def test_top_k_labels():
    true_cg, reference_g = np.array([[5.0, 1, 0, -3], [9.0, 0, 0, 0]]), np.array([5.0, 0, 0, 0])
    scored_cg = np.array([[True] * 4, [False, True, True, True]])
    label_cg = de_labels_top_k(true_cg, reference_g, scored_cg, k=2)
    assert label_cg[0].tolist() == [False, True, False, True]
    assert not label_cg[1, 0]
    assert de_labels_top_k(true_cg, reference_g, scored_cg, k=9).tolist() == scored_cg.tolist()


LABEL = np.array([[True, True, False, False, False, True]])
SCORE = np.array([[0.9, 0.1, 0.8, 0.5, 0.4, 0.7]])


def test_finding_genes_by_hand():
    scored_cg = _all((1, 6))
    # by falling score: 1 0 1 0 0 1
    assert precision_at_k(LABEL, SCORE, scored_cg, 2) == pytest.approx([1 / 2])
    assert overlap_at_n(LABEL, SCORE, scored_cg) == pytest.approx([2 / 3])
    assert auroc(LABEL, SCORE, scored_cg) == pytest.approx([(3 + 2 + 0) / 9])
    assert auprc(LABEL, SCORE, scored_cg) == pytest.approx([(1 + 2 / 3 + 3 / 6) / 3])
    assert auprc_over_prevalence(LABEL, SCORE, scored_cg) == pytest.approx([(1 + 2 / 3 + 3 / 6) / 3 / 0.5])
    without = np.array([[True, True, False, True, True, True]])
    assert precision_at_k(LABEL, SCORE, without, 2) == pytest.approx([1])
    assert auroc(LABEL, SCORE, without) == pytest.approx([roc_auc_score(LABEL[without], SCORE[without])])
    assert auprc(LABEL, SCORE, without) == pytest.approx(
        [average_precision_score(LABEL[without], SCORE[without])]
    )


def test_ties_are_broken_in_expectation():
    scored_cg, constant = _all((1, 6)), np.zeros((1, 6))
    for k in (1, 3, 6, 50):
        assert precision_at_k(LABEL, constant, scored_cg, k) == pytest.approx([0.5])
    assert auroc(LABEL, constant, scored_cg) == pytest.approx([0.5])
    assert auprc_over_prevalence(LABEL, constant, scored_cg) == pytest.approx([1])
    partly = np.array([[1.0, 0, 1, 0, -np.inf, -np.inf]])
    assert overlap_at_n(LABEL, partly, scored_cg) == pytest.approx([(1 + 1 / 2) / 3])
    never = np.where(SCORE > 0.6, SCORE, -np.inf)[:, [0, 1, 3, 4, 2, 5]]
    assert overlap_at_n(LABEL, never[:, [0, 1, 4, 2, 3, 5]], scored_cg) == pytest.approx([2 / 3])
    assert overlap_at_n(LABEL, np.full((1, 6), -np.inf), scored_cg) == pytest.approx([0])


@pytest.mark.parametrize("label", [np.zeros((1, 6), dtype=bool), np.ones((1, 6), dtype=bool)])
def test_without_labels_or_without_others_there_is_no_score(label):
    scored_cg = _all((1, 6))
    metrics = (auroc, auprc, auprc_over_prevalence, overlap_at_n, precision_at_k)
    assert all(np.isnan(metric(label, SCORE, scored_cg)).all() for metric in metrics)


def test_direction_and_rank_of_effects_by_hand():
    true_cg = np.array([[1.0, -2, 3, 0.5], [1, 1, 1, 1]])
    effect_cg = np.array([[0.1, 2, 9, -1], [1, 1, 1, 1]])
    label_cg = np.array([[True, True, True, False], [False] * 4])
    match_c = direction_match(label_cg, true_cg, effect_cg)
    assert match_c[0] == pytest.approx(2 / 3)
    assert direction_match(label_cg, true_cg, np.zeros((2, 4)))[0] == 0
    rank_c = spearman_of_effects(label_cg, true_cg, effect_cg)
    assert rank_c[0] == pytest.approx(spearmanr([1, -2, 3], [0.1, 2, 9]).statistic)
    assert np.isnan([match_c[1], rank_c[1]]).all()


def test_interactions_by_hand():
    singles = {"A": np.array([1.0, 0, 0, 2]), "B": np.array([0.0, 1, 0, 2])}
    control_g = np.array([0.0, 0, 0, 1])
    additive_cg = additive_means([["A", "B"], ["A"], ["A", "C"]], singles, control_g)
    assert additive_cg[0].tolist() == [1, 1, 0, 3]
    assert np.isnan(additive_cg[1:]).all()
    true_cg = np.array([[1.0, 1, 2, 0], [1, 0, 0, 2], [0, 0, 0, 0]])
    true_residual = interaction_residual(true_cg, additive_cg)
    assert true_residual[0].tolist() == [0, 0, 2, -3]
    scored_cg = _all((3, 4))
    strong_cg = strong_interactions(true_residual, scored_cg, share=0.25)
    assert strong_cg.tolist() == [[False, False, False, True], [False] * 4, [False] * 4]
    predicted = interaction_residual(true_cg * 0 + [1.0, 1, 1, 1], additive_cg)  # residuals 0 0 1 -2
    assert interaction_pearson(true_residual, predicted, scored_cg)[0] == pytest.approx(
        np.corrcoef([0, 0, 2, -3], [0, 0, 1, -2])[0, 1]
    )
    assert interaction_auroc(strong_cg, predicted, scored_cg)[0] == 1
    none = interaction_residual(additive_cg + 1e-15, additive_cg)
    assert np.isnan(interaction_pearson(true_residual, none, scored_cg)).all()
    assert interaction_auroc(strong_cg, none, scored_cg)[0] == 0.5
    assert np.isnan(interaction_auroc(strong_cg, predicted, scored_cg)[1:]).all()


# ---------------------------------------------------------------- all of them together


@pytest.fixture
def rng():
    return np.random.default_rng(0)


N_GENES, TARGETS = 300, [f"P{i}" for i in range(12)]
PAIRS = [("P0", "P1"), ("P2", "P3"), ("P4", "P5")]


class Simulated:
    """Simulated means with noise: what all perturbations share, what is their own, and interactions."""

    def __init__(self):
        rng = np.random.default_rng(1)
        self.control_g = rng.gamma(0.5, 1.0, N_GENES)
        shared_g = 0.3 * rng.standard_normal(N_GENES) * (rng.random(N_GENES) < 0.2)
        own = {t: 0.6 * rng.standard_normal(N_GENES) * (rng.random(N_GENES) < 0.1) for t in TARGETS}
        mean = {t: self.control_g + shared_g + own[t] for t in TARGETS}
        for a, b in PAIRS:
            interaction_g = 0.8 * rng.standard_normal(N_GENES) * (rng.random(N_GENES) < 0.05)
            mean[f"{a}+{b}"] = mean[a] + mean[b] - self.control_g + interaction_g
        self.conditions = list(mean)
        self.mean_cg = np.array(list(mean.values()))

        def measured():
            return self.mean_cg + 0.03 * rng.standard_normal(self.mean_cg.shape)

        self.train_cg, self.test_cg, self.duplicate_cg = measured(), measured(), measured()
        n_cells = np.full(len(mean), 50)
        variance_cg = np.full(self.mean_cg.shape, 50 * 0.03**2)
        self.perturbed_g = self.train_cg.mean(0)
        singles = dict(zip(TARGETS, self.train_cg, strict=False))
        scored_cg = _all(self.mean_cg.shape)
        scored_cg[:12, :12] = ~np.eye(12, dtype=bool)
        self.additive_cg = additive_means([c.split("+") for c in self.conditions], singles, self.control_g)
        self.truth = Truth(
            conditions=self.conditions,
            true_cg=self.test_cg,
            perturbed_g=self.perturbed_g,
            scored_cg=scored_cg,
            control_g=self.control_g,
            variance_cg=variance_cg,
            de_train_cg=np.abs(self.train_cg - self.control_g) > 0.15,
            weight_train_cg=effect_weights(t_against_rest(self.train_cg, variance_cg, n_cells), scored_cg),
            weight_test_cg=effect_weights(t_against_rest(self.test_cg, variance_cg, n_cells), scored_cg),
            additive_cg=self.additive_cg,
            k=30,
            n_top=100,
        )

    def average(self, predicted_cg):
        return {name: np.nanmean(value) for name, value in response_scores(self.truth, predicted_cg).items()}


@pytest.fixture(scope="module")
def simulated():
    return Simulated()


def test_cells_around_a_predicted_mean(rng):
    """Bias and noise add up: the same as going through the cells."""
    x_ng, predicted_g = rng.normal(size=(7, 3)), np.array([0.5, -1.0, 2.0])
    scored_cg = np.array([[True, False, True]])
    by_hand = np.sqrt(((x_ng - predicted_g)[:, scored_cg[0]] ** 2).mean())
    mean_cg, variance_cg = x_ng.mean(0)[None], x_ng.var(0)[None]
    found = rmse_cell_vs_mean(mean_cg, variance_cg, predicted_g[None], scored_cg)
    assert found == pytest.approx([by_hand])
    floor = rmse_cell_vs_mean(mean_cg, variance_cg, mean_cg, scored_cg)
    assert floor == pytest.approx(np.sqrt(variance_cg[:, [0, 2]].mean(1))) and floor < found


def test_every_metric_is_computed_and_described(simulated):
    scores = response_scores(simulated.truth, simulated.duplicate_cg)
    assert list(scores) == list(METRICS)
    assert all(value_c.shape == (15,) for value_c in scores.values())
    singles = scores["interaction_pearson"][:12]
    assert np.isnan(singles).all()
    headings = [metric.heading for metric in METRICS.values()]
    assert len(set(headings)) == len(headings)


def test_a_perfect_prediction_gets_the_perfect_score(simulated):
    average = simulated.average(simulated.test_cg)
    for name, metric in METRICS.items():
        if name == "auprc_lift_test_top":
            assert average[name] == pytest.approx(simulated.truth.scored_cg.sum(1).mean() / 30)
        elif name.endswith("train_de"):  # labels of other cells than the truth: near, not exact
            assert average[name] > 0.7
        elif metric.perfect is not None:
            assert average[name] == pytest.approx(metric.perfect, abs=1e-9), name


def test_direction_of_every_metric(simulated):
    good, bad = simulated.average(simulated.duplicate_cg), simulated.average(simulated.test_cg[::-1])
    for name, metric in METRICS.items():
        assert (good[name] > bad[name]) == metric.higher_is_better, name


def test_without_control_and_labels_their_metrics_are_left_out(simulated):
    truth = Truth(
        conditions=simulated.conditions,
        true_cg=simulated.test_cg,
        perturbed_g=simulated.perturbed_g,
        scored_cg=simulated.truth.scored_cg,
    )
    found = response_scores(truth, simulated.train_cg)
    assert list(found) == [
        "l2",
        "rmse",
        "mae",
        "pearson_perturbed",
        "r2_means",
        "r2_regression",
        "centroid_accuracy",
    ]
    full = response_scores(simulated.truth, simulated.train_cg)
    assert all(np.array_equal(found[name], full[name]) for name in found)


def _without(simulated, **changes):
    kept = ("conditions", "true_cg", "perturbed_g", "scored_cg")
    return Truth(**{name: getattr(simulated.truth, name) for name in kept} | changes)


def test_wrong_input_is_named(simulated):
    predicted_cg = simulated.test_cg.copy()
    predicted_cg[2, 5] = np.nan
    with pytest.raises(DataError, match=r"NaN or infinity in mine for \['P2'\]"):
        response_scores(simulated.truth, predicted_cg, "mine")
    with pytest.raises(DataError, match=r"mine has shape \(15, 9\); expected .* = \(15, 300\)"):
        response_scores(simulated.truth, predicted_cg[:, :9], "mine")
    with pytest.raises(DataError, match=r"weight_test_cg has shape \(1, 300\)"):
        _without(simulated, weight_test_cg=np.ones((1, N_GENES)))
    with pytest.raises(DataError, match=r"control_g has shape \(9,\); expected \(genes,\) = \(300,\)"):
        _without(simulated, control_g=np.zeros(9))
    with pytest.raises(DataError, match=r"in true_cg for \['P2'\]"):
        _without(simulated, true_cg=predicted_cg)
    scored_cg = simulated.truth.scored_cg.copy()
    scored_cg[3] = False
    with pytest.raises(DataError, match=r"found none in \['P3'\]"):
        _without(simulated, scored_cg=scored_cg)


# ---------------------------------------------------------------- cheats are exposed


def test_mode_collapse_is_exposed(simulated):
    """One profile for all: fair against control, worthless where conditions are to be told apart."""
    same_cg = np.tile(simulated.perturbed_g, (15, 1))
    scores = response_scores(simulated.truth, same_cg)
    collapsed = {name: value_c.mean() for name, value_c in scores.items()}
    honest = simulated.average(simulated.duplicate_cg)
    assert collapsed["r2_means"] > 0.85
    assert collapsed["pearson_control"] > 0.3
    assert np.isnan(scores["pearson_perturbed"]).all()
    assert collapsed["centroid_accuracy"] == pytest.approx(0.5, abs=0.05)
    assert collapsed["discrimination_cosine"] == pytest.approx(16 / 30, abs=0.05)
    assert collapsed["weighted_r2_train"] < 0.5
    assert honest["centroid_accuracy"] == honest["discrimination_cosine"] == 1


def test_leakage_is_exposed(simulated):
    """Copied test means beat the technical duplicate, by which alone they are told from a good method."""
    leaked, duplicate = simulated.average(simulated.test_cg), simulated.average(simulated.duplicate_cg)
    assert leaked["rmse"] == 0 < duplicate["rmse"]
    assert leaked["auprc_test_top"] == 1 > duplicate["auprc_test_top"]
    # labels of training cells do not reward the copied noise
    assert abs(leaked["auprc_train_de"] - duplicate["auprc_train_de"]) < 0.02


@pytest.mark.parametrize(
    ("name", "blind", "exposed"),
    [
        (
            "three times the effect",
            ["pearson_control", "discrimination_cosine", "auroc_train_de", "spearman_train_de"],
            ["rmse", "mae", "r2_effects", "weighted_r2_train", "weighted_mse_test", "pearson_perturbed"],
        ),
        (
            "counts instead of log",
            [],
            [
                "rmse",
                "mae",
                "r2_means",
                "r2_effects",
                "pearson_control",
                "auroc_train_de",
                "precision_train_de",
            ],
        ),
    ],
)
def test_wrong_scale_is_exposed(simulated, name, blind, exposed):
    effect_cg = simulated.duplicate_cg - simulated.control_g
    wrong = {
        "three times the effect": simulated.control_g + 3 * effect_cg,
        "counts instead of log": np.expm1(simulated.duplicate_cg),
    }[name]
    right_scores, wrong_scores = simulated.average(simulated.duplicate_cg), simulated.average(wrong)
    for metric in blind:
        assert wrong_scores[metric] == pytest.approx(right_scores[metric], abs=1e-9), metric
    for metric in exposed:
        worse = right_scores[metric] - wrong_scores[metric]
        assert (worse if METRICS[metric].higher_is_better else -worse) > 0.01, metric


def test_additive_prediction_has_no_interaction(simulated):
    predicted_cg = np.where(np.isnan(simulated.additive_cg), simulated.train_cg, simulated.additive_cg)
    scores = response_scores(simulated.truth, predicted_cg)
    assert np.isnan(scores["interaction_pearson"]).all()
    assert (scores["interaction_auroc"][12:] == 0.5).all()
    honest = response_scores(simulated.truth, simulated.duplicate_cg)
    assert honest["interaction_pearson"][12:].min() > 0.7
    assert honest["interaction_auroc"][12:].min() > 0.9


def test_scores_of_a_screen(tiny_screen):
    """Simulated screen: B is told from A and C, whose effects are the same; D does nothing."""
    split = random_cells(tiny_screen, test=0.4, seed=0)
    conditions = ["A", "B", "C", "D"]
    means = training_means(tiny_screen, split.train)
    truth = Truth(
        conditions=conditions,
        true_cg=condition_means(tiny_screen, split.test, conditions),
        perturbed_g=means.perturbed_g,
        scored_cg=other_genes(tiny_screen, conditions),
        control_g=means.control_g,
        k=5,
    )
    scores = response_scores(truth, condition_means(tiny_screen, split.train, conditions))
    assert scores["pearson_control"][:3].min() > 0.75
    assert scores["centroid_accuracy"][1] == scores["auroc_test_top"][1] == 1
