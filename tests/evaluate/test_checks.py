import numpy as np
import pytest

from pyro_causalcell.data import Screen
from pyro_causalcell.errors import DataError
from pyro_causalcell.evaluate import posterior_predictive_checks
from pyro_causalcell.evaluate.checks import (
    check,
    check_gene_means,
    gene_means,
    mean_variance,
    total_counts,
    zero_fraction,
)

NAMES = ["control", "A"]
STATISTICS = ["total_mean", "total_sd", "zero_fraction", "mean_variance_slope", "dispersion"]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def condition_n():
    return np.repeat([0, 1], [150, 100])


def draw(rng, theta=None, rate=2.0):
    """Counts of 250 cells x 30 genes with means spread around the rate."""
    mean_g = rate * np.geomspace(0.2, 5, 30)
    if theta is not None:
        mean_g = mean_g * rng.gamma(theta, 1 / theta, (250, 30))
    return rng.poisson(mean_g, (250, 30))


def test_statistics_by_hand():
    x = np.array([[0, 2, 1], [4, 0, 1]])
    assert total_counts(x).tolist() == [3, 5]
    assert zero_fraction(x) == pytest.approx(1 / 3)
    assert gene_means(np.vstack([x, [[6, 6, 6]]]), np.array([0, 0, 2]), np.array([0, 2])).tolist() == [
        [2, 1, 1],
        [6, 6, 6],
    ]
    # means 2 and 1, variances 8 and 2, third gene does not vary
    assert mean_variance(x)["slope"] == pytest.approx(2)
    assert mean_variance(x)["dispersion"] == pytest.approx(np.median([6 / 4, 1.0]))


def test_mean_variance_knows_poisson_from_negative_binomial(rng):
    mean_g = np.geomspace(1, 100, 200)
    poisson = mean_variance(rng.poisson(mean_g, (2000, 200)))
    assert poisson["slope"] == pytest.approx(1, abs=0.03)
    assert poisson["dispersion"] == pytest.approx(0, abs=0.01)
    over = mean_variance(rng.poisson(mean_g * rng.gamma(4, 1 / 4, (2000, 200))))
    assert over["dispersion"] == pytest.approx(0.25, abs=0.02)
    assert over["slope"] > 1.3


@pytest.mark.parametrize("x", [np.ones((1, 3)), np.ones((5, 3)), np.zeros((5, 3))])
def test_mean_variance_is_undefined_without_variation(x):
    assert np.isnan(list(mean_variance(x).values())).all()


def test_table_has_one_row_per_condition_and_statistic(rng, condition_n):
    table = check(draw(rng), np.stack([draw(rng) for _ in range(5)]), condition_n, [*NAMES, "absent"])
    assert list(table.columns) == [
        *("condition", "statistic", "n_cells", "observed", "replicate_mean", "low", "high", "p_value")
    ]
    assert table["condition"].tolist() == ["control"] * 5 + ["A"] * 5
    assert table["statistic"].tolist() == STATISTICS * 2
    assert table["n_cells"].tolist() == [150] * 5 + [100] * 5


def test_right_model_passes_and_wrong_model_fails(rng, condition_n):
    observed = draw(rng, theta=2.0)
    right = check(observed, (draw(rng, theta=2.0) for _ in range(80)), condition_n, NAMES)
    assert right["p_value"].between(0.005, 0.995).all()
    wrong = check(observed, (draw(rng) for _ in range(80)), condition_n, NAMES).set_index("statistic")
    assert (
        wrong.loc[["total_sd", "zero_fraction", "dispersion", "mean_variance_slope"], "p_value"] == 0
    ).all()
    assert (wrong.loc["dispersion", "observed"] > wrong.loc["dispersion", "high"]).all()


def test_a_shift_in_one_condition_shows_there_only(rng, condition_n):
    observed = draw(rng)
    observed[condition_n == 1] += 3
    table = check(observed, [draw(rng) for _ in range(40)], condition_n, NAMES)
    total = table[table["statistic"] == "total_mean"].set_index("condition")
    assert total.loc["A", "p_value"] == 0
    assert 0 < total.loc["control", "p_value"] < 1


def test_values_by_hand():
    observed = np.array([[2], [4]])
    replicated = np.array([[[1], [1]], [[3], [3]], [[5], [7]], [[2], [4]]])
    row = (
        check(observed, replicated, np.zeros(2, int), ["all"], interval=0.5)
        .set_index("statistic")
        .loc["total_mean"]
    )
    assert row["observed"] == 3 and row["replicate_mean"] == pytest.approx((1 + 3 + 6 + 3) / 4)
    assert row["p_value"] == pytest.approx((1 + 2 / 2) / 4)  # one above, two ties
    assert (row["low"], row["high"]) == (2.5, 3.75)


def test_undefined_statistics_have_no_p_value(condition_n):
    ones = np.ones((250, 30), int)
    table = check(ones, [ones, ones], condition_n, NAMES).set_index("statistic")
    assert table.loc["dispersion", "p_value"].isna().all()
    assert (table.loc["total_mean", "p_value"] == 0.5).all()


def test_gene_means_table(rng, condition_n):
    observed = draw(rng)
    observed[condition_n == 1, 4] += 20
    genes = [f"g{i}" for i in range(30)]
    table = check_gene_means(observed, [draw(rng) for _ in range(40)], condition_n, NAMES, genes)
    assert len(table) == 60 and list(table.columns[:2]) == ["condition", "gene"]
    moved = table[(table["observed"] > table["high"]) & (table["p_value"] == 0)]
    assert ("A", "g4") in set(zip(moved["condition"], moved["gene"], strict=True))
    row = table[(table["condition"] == "A") & (table["gene"] == "g4")].iloc[0]
    assert row["observed"] == pytest.approx(observed[150:, 4].mean())
    assert (table["p_value"] == 0).mean() < 0.2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"replicated_sng": []}, "at least one"),
        ({"replicated_sng": [np.ones((3, 3))]}, r"\(250, 30\)"),
        ({"condition_n": np.zeros(3, int)}, "same cells"),
        ({"condition_n": np.full(250, -1)}, "-1"),
        ({"condition_names": ["control"]}, "from 0 to 0"),
    ],
)
def test_bad_input(rng, condition_n, change, words):
    x = draw(rng)
    good = {"observed_ng": x, "replicated_sng": [x], "condition_n": condition_n, "condition_names": NAMES}
    with pytest.raises(DataError, match=words):
        check(**good | change)
    with pytest.raises(DataError, match="one name per gene"):
        check_gene_means(**good, gene_names=["g"])


def test_checks_of_a_fit(small_fit, small_screen):
    rows = np.flatnonzero(np.isin(small_screen.condition_n, [0, 1]))
    table = posterior_predictive_checks(small_fit, small_screen, rows, n_samples=20)
    by_name = table.set_index(["condition", "statistic"])
    assert table["condition"].drop_duplicates().tolist() == small_screen.conditions[:2]
    x_ng = small_screen.x(rows[small_screen.condition_n[rows] == 1])
    assert by_name.loc[(small_screen.conditions[1], "total_mean"), "observed"] == pytest.approx(
        x_ng.sum(1).mean()
    )
    assert (by_name.loc["control", "n_cells"] == 100).all()
    # The library of every cell is given to the replicates, so their totals agree with what was measured.
    totals = by_name.xs("total_mean", level="statistic")
    np.testing.assert_allclose(totals["replicate_mean"], totals["observed"], rtol=0.05)


def test_checks_of_a_fit_take_the_validation_cells_and_find_strange_ones(small_fit, small_screen):
    table = posterior_predictive_checks(small_fit, small_screen, n_samples=20)
    assert table.groupby("condition")["n_cells"].first().sum() == len(small_fit.split.validation)
    again = posterior_predictive_checks(small_fit, small_screen, n_samples=20)
    other = posterior_predictive_checks(small_fit, small_screen, n_samples=20, seed=1)
    assert table.equals(again) and not table.equals(other)

    strange = small_screen.adata.copy()
    strange.X = strange.X.toarray()[:, ::-1].copy()  # every gene has another gene's counts
    strange.X[:, :10] = 0
    zeros = posterior_predictive_checks(
        small_fit, Screen(strange, batch="batch", allow_empty=True), n_samples=20
    ).query("statistic == 'zero_fraction'")
    assert (zeros["p_value"] == 0).all() and (zeros["observed"] > zeros["high"]).all()
