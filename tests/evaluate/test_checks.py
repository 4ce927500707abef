import numpy as np
import pytest

from pyro_causalcell.data import Screen
from pyro_causalcell.errors import DataError
from pyro_causalcell.evaluate import posterior_predictive_checks, prior_predictive_checks
from pyro_causalcell.evaluate.checks import (
    STATISTICS,
    check,
    correlation,
    mean_variance,
    total_counts,
    zero_fraction,
)
from pyro_causalcell.inference import fit

NAMES = ["control", "A"]
STATISTICS_OF_COUNTS = ["total_mean", "total_sd", "zero_fraction", "mean_variance_slope", "dispersion"]


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
    # means 2 and 1, variances 8 and 2, third gene does not vary
    assert mean_variance(x)["slope"] == pytest.approx(2)
    assert mean_variance(x)["dispersion"] == pytest.approx(np.median([6 / 4, 1.0]))
    values = {name: np.asarray(function(x)).tolist() for name, function in STATISTICS.items()}
    assert (values["total_mean"], values["total_sd"], values["maximum"]) == (4, 1, 4)
    assert values["gene_mean"] == [2, 1, 1] and values["gene_sd"] == [2, 1, 0]
    assert values["gene_zero_fraction"] == [0.5, 0.5, 0]
    assert values["correlation"] == pytest.approx(1)  # the first two genes mirror each other


def test_correlation_is_that_of_numpy(rng):
    x_ng = rng.normal(size=(50, 4)) @ rng.normal(size=(4, 4))
    off = np.corrcoef(x_ng.T)[np.triu_indices(4, 1)]
    assert correlation(x_ng) == pytest.approx(np.sqrt((off**2).mean()))
    assert np.isnan(correlation(np.ones((5, 3)))) and np.isnan(correlation(x_ng[:1]))


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
    assert table["statistic"].tolist() == STATISTICS_OF_COUNTS * 2
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


def test_a_statistic_of_genes_has_a_row_for_each(rng, condition_n):
    observed = draw(rng)
    observed[condition_n == 1, 4] += 20
    genes = [f"g{i}" for i in range(30)]
    copies = [draw(rng) for _ in range(40)]
    table = check(observed, copies, condition_n, NAMES, statistic="gene_mean", gene_names=genes)
    assert len(table) == 60 and list(table.columns[:4]) == ["condition", "statistic", "n_cells", "gene"]
    assert (
        table["condition"].tolist() == ["control"] * 30 + ["A"] * 30 and table["gene"].tolist() == genes * 2
    )
    moved = table[(table["observed"] > table["high"]) & (table["p_value"] == 0)]
    assert ("A", "g4") in set(zip(moved["condition"], moved["gene"], strict=True))
    row = table[(table["condition"] == "A") & (table["gene"] == "g4")].iloc[0]
    assert row["observed"] == pytest.approx(observed[150:, 4].mean())
    assert (table["p_value"] == 0).mean() < 0.2


def test_a_function_of_the_user_beside_a_built_in(rng, condition_n):
    def third_gene(x_ng):
        return x_ng[:, 2].mean()

    x = draw(rng)
    table = check(x, [x, x + 1], condition_n, NAMES, statistic=[third_gene, "maximum"])
    assert table["statistic"].tolist() == ["third_gene", "maximum"] * 2
    assert table["observed"].iloc[2] == pytest.approx(x[150:, 2].mean())
    assert (table["p_value"] == 0.75).all()  # one tie, one above


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"replicated_sng": []}, "at least one"),
        ({"replicated_sng": [np.ones((3, 3))]}, r"\(250, 30\)"),
        ({"condition_n": np.zeros(3, int)}, "same cells"),
        ({"condition_n": np.full(250, -1)}, "-1"),
        ({"condition_names": ["control"]}, "from 0 to 0"),
        ({"gene_names": ["g"]}, "one name per gene"),
        ({"statistic": "mode"}, "unknown statistic 'mode'; known are total_mean"),
        ({"statistic": []}, "found none"),
        ({"statistic": ["maximum", "maximum"]}, "'maximum' twice"),
        ({"statistic": lambda x_ng: x_ng[:, 0]}, "reduce over the cells"),
        ({"interval": 1.0}, "between 0 and 1"),
    ],
)
def test_bad_input(rng, condition_n, change, words):
    x = draw(rng)
    good = {"observed_ng": x, "replicated_sng": [x], "condition_n": condition_n, "condition_names": NAMES}
    with pytest.raises(DataError, match=words):
        check(**good | change)


def test_checks_of_a_fit(small_fit, small_screen):
    rows = np.flatnonzero(np.isin(small_screen.condition_n, [0, 1]))
    table = posterior_predictive_checks(small_fit, small_screen, rows, n_samples=20).table()
    assert list(table["statistic"].drop_duplicates()) == STATISTICS_OF_COUNTS
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
    def table(screen, seed=0, **asked):
        return posterior_predictive_checks(small_fit, screen, n_samples=20, seed=seed, **asked).table()

    first = table(small_screen)
    assert first.groupby("condition")["n_cells"].first().sum() == len(small_fit.split.validation)
    assert first.equals(table(small_screen)) and not first.equals(table(small_screen, seed=1))

    strange = small_screen.adata.copy()
    strange.X = strange.X.toarray()[:, ::-1].copy()  # every gene has another gene's counts
    strange.X[:, :10] = 0
    zeros = table(Screen(strange, batch="batch", allow_empty=True), statistic="zero_fraction")
    assert (zeros["p_value"] == 0).all() and (zeros["observed"] > zeros["high"]).all()


@pytest.fixture
def rows():
    return np.arange(60)


@pytest.mark.parametrize("by", ["batch", "guide", None])
def test_groups(small_fit, small_screen, rows, by):
    checks = posterior_predictive_checks(
        small_fit, small_screen, rows, by=by, statistic="maximum", n_samples=3
    )
    table = checks.table()
    assert checks.by == table.columns[0] == (by or "group")
    x_ng = small_screen.x(rows)
    labels = small_screen.adata.obs[by].iloc[rows].to_numpy() if by else np.repeat("all cells", 60)
    observed = {label: x_ng[labels == label].max() for label in labels}
    assert dict(zip(table[checks.by], table["observed"], strict=True)) == observed
    assert table["n_cells"].sum() == 60


def test_time_and_columns_named_like_a_dimension(tiny_adata):
    tiny_adata.obs["hour"] = np.arange(400) % 2 * 6.0
    tiny_adata.obs["gene"] = "one"
    screen = Screen(tiny_adata, time="hour")
    settings = {"n_latents": 2, "n_hidden": 8, "epochs": 1, "warm_start": 0, "progress": False}
    trained = fit("sparse-shift", None, screen, device="cpu", **settings)
    table = posterior_predictive_checks(trained, screen, by="time", statistic="maximum", n_samples=2).table()
    assert table["time"].tolist() == ["0.0", "6.0"]
    checks = posterior_predictive_checks(trained, screen, by="gene", statistic="gene_mean", n_samples=2)
    assert checks.by == "obs_gene" and checks.table()["gene"].tolist() == screen.genes


def test_prior_draws_do_not_know_the_effects(small_fit, small_screen):
    rows = np.flatnonzero(small_screen.condition_n > 0)

    def first_genes(x_ng):
        return x_ng[:, :5].sum() / x_ng.sum()

    asked = {"rows": rows, "statistic": first_genes, "n_samples": 40}
    prior = prior_predictive_checks(small_fit, small_screen, **asked)
    posterior = posterior_predictive_checks(small_fit, small_screen, **asked)
    assert prior.source == "prior"
    spread = [c.table().eval("high - low").to_numpy() for c in (prior, posterior)]
    assert (spread[0] > 1.5 * spread[1]).all()  # the data have narrowed every effect
    again = prior_predictive_checks(small_fit, small_screen, **asked)
    assert prior.table().equals(again.table())


def test_arviz_groups_of_checks(small_fit, small_screen, rows):
    checks = posterior_predictive_checks(
        small_fit, small_screen, rows, statistic=["maximum", "gene_sd"], n_samples=4
    )
    idata = checks.to_inference_data()
    assert set(idata.groups()) == {"posterior_predictive", "observed_data"}
    assert idata["posterior_predictive"]["gene_sd"].dims == ("chain", "draw", "condition", "gene")
    assert idata["observed_data"]["maximum"].dims == ("condition",)
    assert idata["observed_data"]["gene"].values.tolist() == small_screen.genes
    row = checks.table().query("statistic == 'gene_sd' and gene == 'gene7'").iloc[0]
    chosen = idata["posterior_predictive"]["gene_sd"].sel(condition=row["condition"], gene="gene7")
    assert row["replicate_mean"] == pytest.approx(float(chosen.mean()))


def test_normalised_values_have_statistics_of_their_own(tiny_adata):
    tiny_adata.X = np.log1p(tiny_adata.X.toarray())
    screen = Screen(tiny_adata)
    settings = {"n_latents": 2, "n_hidden": 8, "epochs": 2, "warm_start": 0, "progress": False}
    trained = fit("sparse-shift", None, screen, likelihood="gaussian", device="cpu", **settings)
    table = posterior_predictive_checks(trained, screen, by=None, n_samples=3).table()
    assert table["statistic"].tolist() == ["total_mean", "total_sd", "correlation", "maximum"]
    assert table["replicate_mean"].notna().all()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"by": "donor"}, r"obs\['donor'\] not found"),
        ({"by": "time"}, r"obs\['time'\] not found"),
        ({"by": "half"}, r"30 missing of 60"),
        ({"n_samples": 0}, "at least one draw"),
        ({"statistic": "mode"}, "unknown statistic"),
    ],
)
def test_what_cannot_be_checked(small_fit, small_screen, rows, asked, words):
    other = small_screen.adata.copy()
    other.obs["half"] = np.where(np.arange(400) % 2, "b", None)
    with pytest.raises(DataError, match=words):
        posterior_predictive_checks(small_fit, Screen(other, batch="batch"), rows, **asked)
