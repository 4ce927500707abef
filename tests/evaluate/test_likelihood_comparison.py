"""The comparison of models by held-out likelihood: ArviZ's numbers, and what it refuses to rank."""

import arviz as az
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from pyro_causalcell.errors import DataError
from pyro_causalcell.evaluate import compare_likelihoods, iw_nll
from pyro_causalcell.evaluate.likelihood import _summary

N = 300
OLD_ARVIZ = pytest.mark.skipif(not hasattr(az, "ELPDData"), reason="ArviZ 1 has other interfaces")
CONDITION = np.repeat([f"c{i}" for i in range(10)], N // 10)


def scores(nll_n, k=0.1, mc_se=0.02, n_particles=1000, **attrs):
    n = len(nll_n)
    columns = {"nll": nll_n, "pareto_k": np.broadcast_to(k, n), "ess": np.full(n, 100.0)}
    columns["mc_se"] = np.full(n, mc_se)
    return xr.Dataset(
        {name: ("cell", np.asarray(column, dtype=float)) for name, column in columns.items()},
        coords={"cell": [f"cell{i}" for i in range(n)], "condition": ("cell", CONDITION[:n])},
        attrs={"n_particles": n_particles, **attrs},
    )


@pytest.fixture
def nll():
    rng = np.random.default_rng(0)
    base = rng.normal(180, 20, N)
    return {name: base + rng.normal(gap, 1, N) for name, gap in (("a", 0.0), ("b", -0.5), ("c", 2.0))}


@OLD_ARVIZ
def test_equals_arviz(nll):
    ours = compare_likelihoods({name: scores(values) for name, values in nll.items()})
    elpd = {
        name: az.ELPDData(
            data=[-v.sum(), np.sqrt(N * v.var()), 0.0, 1000, N, False, xr.DataArray(-v), "log"],
            index=["elpd_loo", "se", "p_loo", "n_samples", "n_data_points", "warning", "loo_i", "scale"],
        )
        for name, v in nll.items()
    }
    theirs = az.compare(elpd, ic="loo")
    assert ours.index.tolist() == theirs.index.tolist() == ["b", "a", "c"]
    assert ours["rank"].tolist() == theirs["rank"].tolist()
    for mine, its in (("elpd", "elpd_loo"), ("se", "se"), ("elpd_diff", "elpd_diff"), ("dse", "dse")):
        np.testing.assert_allclose(ours[mine].astype(float), theirs[its].astype(float), rtol=1e-10)


@OLD_ARVIZ
def test_pareto_k_equals_that_of_arviz_loo():
    log_weight_sn = torch.randn(400, 6, generator=torch.Generator().manual_seed(0)) * torch.linspace(
        0.3, 4, 6
    )
    nll_n, k_n, _, _ = _summary([log_weight_sn])
    draws = -log_weight_sn.double().numpy()[None]  # the weights of leave-one-out are those of -log p
    data = az.from_dict(posterior={"m": draws[..., 0]}, log_likelihood={"x": draws})
    with pytest.warns(UserWarning, match="shape parameter"):
        loo = az.loo(data, pointwise=True, reff=1.0)
    np.testing.assert_allclose(k_n, loo.pareto_k.values, rtol=1e-6)
    np.testing.assert_allclose(nll_n, -log_weight_sn.double().logsumexp(0) + np.log(400), rtol=1e-6)


def test_by_hand():
    one, two = scores([1.0, 2.0, 3.0, 4.0]), scores([2.0, 2.0, 4.0, 8.0])
    for table in (one, two):
        table.coords["condition"] = ("cell", ["A", "A", "B", "B"])
    result = compare_likelihoods({"two": two, "one": one})
    assert result.index.tolist() == ["one", "two"] and result["rank"].tolist() == [0, 1]
    assert result.loc["two", ["elpd", "elpd_per_cell", "elpd_diff"]].tolist() == [-16.0, -4.0, 6.0]
    assert result.loc["two", "dse"] == pytest.approx(np.sqrt(4 * 2.25))  # of 1, 0, 1, 4
    # around their mean 1.5 the clusters sum to -2 and 2; two of them
    assert result.loc["two", "dse_clusters"] == pytest.approx(np.sqrt(2 * 8))
    assert result.loc["two", "mc_se"] == pytest.approx(0.04)
    assert result.loc["one", ["elpd_diff", "dse", "dse_clusters"]].tolist() == [0, 0, 0]


def test_clusters_widen_the_error_where_cells_of_a_perturbation_go_together(nll):
    shared = np.random.default_rng(1).normal(0, 2, 10)
    together = nll["a"] + shared[np.arange(N) // (N // 10)]
    row = compare_likelihoods({"a": scores(nll["a"]), "b": scores(together)}).iloc[1]
    assert row["dse_clusters"] > 3 * row["dse"]
    single = {name: scores(values[:20]) for name, values in nll.items()}
    assert np.isnan(compare_likelihoods(single)["dse_clusters"]).all()


def test_a_model_with_bad_weights_is_not_ranked(nll):
    k = np.full(N, 0.1)
    k[:30] = 0.9
    result = compare_likelihoods({"a": scores(nll["a"]), "b": scores(nll["b"], k), "c": scores(nll["c"])})
    assert result.index.tolist() == ["a", "c", "b"] and result["ranked"].tolist() == [True, True, False]
    assert result["rank"].tolist()[:2] == [0, 1] and pd.isna(result.loc["b", "rank"])
    assert np.isnan(result.loc["b", "elpd_diff"]) and result.loc["b", "bad_k"] == pytest.approx(0.1)
    for words in ("10.0%", "1000 particles", "more particles", "n_rounds", "better guide"):
        assert words in result.loc["b", "reason"]
    assert result.loc["a", "reason"] == ""


def test_nothing_is_ranked_where_one_model_alone_is_reliable(nll):
    result = compare_likelihoods({"a": scores(nll["a"]), "b": scores(nll["b"], 0.9)})
    assert not result["ranked"].any() and result["rank"].isna().all()
    assert "no other model" in result.loc["a", "reason"]


@pytest.mark.parametrize(
    ("k", "n_particles", "ranked"), [(0.6, 1000, True), (0.6, 100, False), (0.1, 5, False)]
)
def test_few_particles_lower_the_limit(nll, k, n_particles, ranked):
    # 1 - 1 / log10(100) = 0.5
    tables = {name: scores(nll[name], k, n_particles=n_particles) for name in ("a", "b")}
    assert compare_likelihoods(tables)["ranked"].tolist() == [ranked, ranked]


def test_unknown_k_is_bad(nll):
    assert not compare_likelihoods({n: scores(nll[n], np.nan) for n in ("a", "b")})["ranked"].any()


def test_cells_of_bad_k_may_not_decide_the_order(nll):
    k, better = np.full(N, 0.1), nll["a"] + 0.01
    k[0], better[0] = 0.9, nll["a"][0] - 50  # one cell of 300 turns the order round
    result = compare_likelihoods({"a": scores(nll["a"]), "b": scores(better, k)})
    assert not result["ranked"].any() and "decide its order against b" in result.loc["a", "reason"]
    assert "no other model" in result.loc["b", "reason"]
    third = compare_likelihoods(
        {n: scores(v, k if n == "b" else 0.1) for n, v in (nll | {"b": better}).items()}
    )
    assert third.index.tolist() == ["b", "c", "a"] and third["ranked"].tolist() == [True, True, False]


def test_cells_are_matched_by_name(nll):
    ordered = compare_likelihoods({n: scores(nll[n]) for n in ("a", "b")})
    shuffled = scores(nll["b"]).isel(cell=np.random.default_rng(0).permutation(N))
    pd.testing.assert_frame_equal(ordered, compare_likelihoods({"a": scores(nll["a"]), "b": shuffled}))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda v: scores(v[:-1]), "1 that only one"),
        (lambda v: scores(v, x="counts"), "scored on X.*on counts"),
        (lambda v: scores(v, x="X", n_genes=7), "genes"),
    ],
)
def test_other_cells_or_values_are_refused(nll, other, words):
    first = scores(nll["a"], x="X", n_genes=5)
    with pytest.raises(DataError, match=words):
        compare_likelihoods({"a": first, "b": other(nll["b"])})
    with pytest.raises(DataError, match="at least 2"):
        compare_likelihoods({"a": first})


def test_on_fits(small_fit, small_screen):
    rows = np.arange(30)
    tables = {str(seed): iw_nll(small_fit, small_screen, rows, n_particles=200, seed=seed) for seed in (0, 1)}
    result = compare_likelihoods(tables)
    assert tables["0"].attrs["x"] == "X" and tables["0"].attrs["n_genes"] == small_screen.n_genes
    gap = abs(result["elpd"].iloc[0] - result["elpd"].iloc[1])
    assert gap < 6 * np.hypot(*result["mc_se"])  # one model, twice: they differ by Monte Carlo error alone
