import itertools

import anndata
import numpy as np
import pytest
from scipy import integrate, stats
from scipy.special import logsumexp

from pyro_causalcell.data import Screen
from pyro_causalcell.errors import DataError
from pyro_causalcell.simulate import expected_counts, latent_scm, oracle_nll, rotated_scm

SMALL = {
    "n_genes": 40,
    "n_responsive": 3,
    "n_invariant": 2,
    "n_perturbations": 6,
    "n_combinations": 3,
    "n_train": 140,
    "n_test": 70,
    "cells_per_combination": 10,
}
ROTATION = stats.ortho_group(3, seed=0).rvs()


@pytest.fixture(scope="module")
def small():
    return latent_scm(**SMALL)


def truth(adata):
    return adata.uns["simulation"]


def law(adata, c):
    """Mean and covariance of all programmes in a condition, from the stored weights."""
    record = truth(adata)
    total = np.linalg.inv(np.eye(len(record["weight_ckk"][c])) - record["weight_ckk"][c])
    return total @ record["mean_ck"][c], total @ np.diag(record["variance_ck"][c]) @ total.T


def logits(adata, z_nk):
    """The decoder written again, from what the AnnData says."""
    hidden = z_nk
    for i in range(len(truth(adata)["decoder"])):
        hidden = hidden @ truth(adata)["decoder"][f"hidden_{i}"]
        hidden = np.where(hidden > 0, hidden, 0.2 * hidden)
    return hidden @ adata.varm["decoder_output"].T / truth(adata)["logit_scale"]


def programmes(adata):
    return np.hstack([adata.obsm["z_invariant"], adata.obsm["z_responsive"]])


def test_paper_sizes_are_the_defaults():
    adata = latent_scm()
    assert adata.shape == (4600, 500)
    assert adata.obsm["z_invariant"].shape[1] == 7 and adata.obsm["z_responsive"].shape[1] == 4
    assert adata.obs["split"].value_counts().to_dict() == {"train": 3000, "test": 1000, "heldout": 600}
    train = adata.obs.loc[adata.obs["split"] == "train", "target"].astype(str).value_counts()
    assert len(train) == 13 and train.max() - train.min() <= 1 and "control" in train
    assert truth(adata)["simulated"] and truth(adata)["changes"] == "sparse"


def test_cells_follow_the_stated_law():
    adata = latent_scm(**SMALL | {"n_train": 28_000, "cells_per_combination": 4000})
    z_nk = programmes(adata)
    for c, name in enumerate(truth(adata)["conditions"]):
        z_ik = z_nk[(adata.obs["target"] == name) & (adata.obs["split"] != "test")]
        mean_k, covariance_kk = law(adata, c)
        np.testing.assert_allclose(z_ik.mean(0), mean_k, atol=0.3)
        np.testing.assert_allclose(
            np.cov(z_ik.T), covariance_kk, atol=0.1 * np.abs(covariance_kk).max() + 0.1
        )


def test_weights_are_triangular_and_control_is_the_anchor(small):
    record = truth(small)
    weight_ckk, n_l = record["weight_ckk"], 2
    assert not np.tril(weight_ckk[:, :n_l, :n_l]).any() and not np.tril(weight_ckk[:, n_l:, n_l:]).any()
    assert not weight_ckk[:, :n_l, n_l:].any()  # nothing acts on the invariant programmes but themselves
    assert (weight_ckk[:, :n_l] == weight_ckk[0, :n_l]).all()
    assert not weight_ckk[0, n_l:].any() and not record["mean_ck"][0].any()
    assert (record["variance_ck"][0] == 1).all()
    on = (weight_ckk[1:, n_l:] != 0).any(0)
    assert not (on[:, :n_l] & ~record["graph_vl"]).any() and not (on[:, n_l:] & ~record["graph_vv"]).any()


def test_sparse_changes_touch_one_or_two_programmes(small):
    altered_pv = truth(small)["altered_pv"]
    assert np.array_equal(altered_pv[:3], np.eye(3, dtype=bool))
    assert set(altered_pv.sum(1)) <= {1, 2}
    weight_pvk = truth(small)["weight_ckk"][1:7, 2:]
    assert not weight_pvk[~altered_pv].any()
    assert not truth(small)["mean_ck"][1:7, 2:][~altered_pv].any()
    assert (truth(small)["variance_ck"][1:7, 2:][~altered_pv] == 1).all()
    dense = truth(latent_scm(**SMALL, changes="dense"))
    assert dense["altered_pv"].all() and dense["graph_vl"].all() and dense["graph_vv"].sum() == 3


def test_changes_of_a_combination_are_sums(small):
    record = truth(small)
    for c in (7, 8, 9):
        first, second = 1 + np.flatnonzero(record["design_cp"][c])
        names = record["conditions"]
        assert names[c] == f"{names[first]}+{names[second]}"
        for part in (record["weight_ckk"], record["mean_ck"], np.log(record["variance_ck"])):
            np.testing.assert_allclose(
                part[c] - part[0], part[first] + part[second] - 2 * part[0], atol=1e-12
            )
    held = set(small.obs.loc[small.obs["split"] == "heldout", "target"])
    assert held == set(record["conditions"][7:])
    assert not held & set(small.obs.loc[small.obs["split"] != "heldout", "target"])


def test_twins_share_the_background_and_are_control_cells():
    adata = latent_scm(**SMALL | {"n_train": 4200})
    z_twin = np.hstack([adata.obsm["z_invariant"], adata.obsm["z_responsive_twin"]])
    np.testing.assert_allclose(adata.layers["control_twin"], logits(adata, z_twin))
    np.testing.assert_allclose(adata.obsm["z_responsive_twin"].mean(0), 0, atol=0.07)
    np.testing.assert_allclose(np.cov(adata.obsm["z_responsive_twin"].T), np.eye(3), atol=0.1)
    together = np.corrcoef(adata.obsm["z_responsive"].T, adata.obsm["z_responsive_twin"].T)[:3, 3:]
    assert np.abs(together).max() < 0.08
    # A screen of the twins has their cells in the order of the cells.
    rows = np.array([4000, 3])
    twins = Screen(adata, "target", "control", layer="control_twin").x(rows)
    np.testing.assert_allclose(twins, adata.layers["control_twin"][rows], rtol=1e-6)


def test_observations_of_each_likelihood(small):
    np.testing.assert_allclose(small.X, logits(small, programmes(small)))
    train = (small.obs["split"] == "train").to_numpy()
    assert small.X[train].std() == pytest.approx(1, rel=1e-3)
    noisy = latent_scm(**SMALL, likelihood="gaussian", noise_sd=0.5)
    np.testing.assert_allclose(expected_counts(noisy), small.X)
    assert (noisy.X - small.X).std() == pytest.approx(0.5, rel=0.05)
    for likelihood, spread in (("poisson", 0.0), ("nb", 1 / 8)):
        own = {"inverse_dispersion": 8.0} if likelihood == "nb" else {}
        counts = latent_scm(**SMALL | {"n_train": 1400}, likelihood=likelihood, **own)
        assert np.issubdtype(counts.X.dtype, np.integer)
        mean = expected_counts(counts)
        np.testing.assert_allclose(mean.sum(1), counts.obs["library_true"])
        assert ((counts.X - mean) ** 2 / (mean + spread * mean**2)).mean() == pytest.approx(1, abs=0.04)
        assert np.log(counts.obs["library_true"]).std() == pytest.approx(0.4, rel=0.1)


def test_seeds_and_sizes_leave_the_other_draws_alone(small):
    assert np.array_equal(latent_scm(**SMALL).X, small.X)
    assert not np.array_equal(latent_scm(**SMALL, seed=1).X, small.X)
    more = latent_scm(**SMALL | {"n_test": 200, "n_combinations": 0})
    assert np.array_equal(more.X[:140], small.X[:140])
    same_decoder = latent_scm(**SMALL, seed=1, decoder_seed=0)
    assert np.array_equal(same_decoder.varm["decoder_output"], small.varm["decoder_output"])


def conditional(adata, c):
    """Of the responsive programmes given the invariant ones: intercept, slope and covariance."""
    mean_k, covariance_kk = law(adata, c)
    slope = np.linalg.solve(covariance_kk[:2, :2], covariance_kk[:2, 2:]).T
    return mean_k[2:] - slope @ mean_k[:2], slope, covariance_kk[2:, 2:] - slope @ covariance_kk[:2, 2:]


def test_dense_changes_do_not_identify_the_axes():
    adata = latent_scm(**SMALL, changes="dense", likelihood="gaussian")
    other = rotated_scm(adata, ROTATION)
    weight_ckk = truth(other)["weight_ckk"]
    assert not np.tril(weight_ckk[:, 2:, 2:]).any() and not weight_ckk[:, :2, 2:].any()
    assert (truth(other)["variance_ck"] > 0).all()
    assert np.abs(weight_ckk[0, 2:]).max() < 1e-12  # control is still the anchor
    for c in range(len(weight_ckk)):
        intercept, slope, covariance = conditional(adata, c)
        new_intercept, new_slope, new_covariance = conditional(other, c)
        np.testing.assert_allclose(new_intercept, ROTATION @ intercept, atol=1e-10)
        np.testing.assert_allclose(new_slope, ROTATION @ slope, atol=1e-10)
        np.testing.assert_allclose(new_covariance, ROTATION @ covariance @ ROTATION.T, atol=1e-10)
    assert truth(other)["altered_pv"].sum() == truth(adata)["altered_pv"].sum()  # no truth is the sparser one
    assert np.abs(weight_ckk - truth(adata)["weight_ckk"]).max() > 0.3
    np.testing.assert_allclose(expected_counts(other), expected_counts(adata), atol=1e-10)
    rows = np.arange(0, 210, 30)
    np.testing.assert_allclose(oracle_nll(other, rows), oracle_nll(adata, rows), atol=0.05)


def test_sparse_changes_do(small):
    other = rotated_scm(small, ROTATION)
    assert truth(small)["altered_pv"].sum() < 10
    assert truth(other)["altered_pv"].all()
    swap = rotated_scm(small, np.diag([1.0, -1.0, 1.0]))  # a sign is no new axis
    assert np.array_equal(truth(swap)["altered_pv"], truth(small)["altered_pv"])


@pytest.mark.parametrize("likelihood", ["gaussian", "nb", "poisson"])
def test_oracle_with_two_programmes_is_the_integral(likelihood):
    sizes = {"n_responsive": 1, "n_invariant": 1, "n_perturbations": 2, "n_combinations": 1}
    settings = {"noise_sd": 0.8} if likelihood == "gaussian" else {"library_size": 300.0}
    adata = latent_scm(**SMALL | sizes, likelihood=likelihood, **settings)
    rows, exact = np.array([0, 100, 215]), []
    index = {name: c for c, name in enumerate(truth(adata)["conditions"])}
    for n in rows:
        centre, reach = programmes(adata)[n], 5.0
        axes = [middle + np.linspace(-reach, reach, 201) for middle in centre]
        grid = np.array(list(itertools.product(*axes)))
        out = logits(adata, grid)
        if likelihood == "gaussian":
            log_p = stats.norm.logpdf(adata.X[n], out, 0.8).sum(1)
        else:
            rate = np.exp(out - logsumexp(out, axis=1, keepdims=True)) * adata.obs["library_true"].iloc[n]
            of = stats.poisson(rate) if likelihood == "poisson" else stats.nbinom(5, 5 / (5 + rate))
            log_p = of.logpmf(adata.X[n]).sum(1)
        log_p += stats.multivariate_normal(*law(adata, index[adata.obs["target"].iloc[n]])).logpdf(grid)
        top = log_p.max()
        density = np.exp(log_p - top).reshape(201, 201)
        exact.append(-top - np.log(integrate.trapezoid(integrate.trapezoid(density, axes[1]), axes[0])))
    np.testing.assert_allclose(oracle_nll(adata, rows, n_particles=4000), exact, atol=0.03)


def test_a_file_keeps_the_truth(tmp_path):
    adata = latent_scm(**SMALL, likelihood="nb")
    adata.write_h5ad(tmp_path / "sim.h5ad")
    back = anndata.read_h5ad(tmp_path / "sim.h5ad")
    rows = np.array([1, 150, 220])
    nll = oracle_nll(adata, rows, n_particles=300)
    np.testing.assert_allclose(oracle_nll(back, rows, n_particles=300), nll)
    np.testing.assert_allclose(oracle_nll(back[rows, ::-1].copy(), n_particles=300), nll)
    assert list(truth(back)["conditions"]) == list(truth(adata)["conditions"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"changes": "few"}, "sparse"),
        ({"likelihood": "zip"}, "poisson"),
        ({"noise_sd": 0.1}, "noise_sd"),
        ({"likelihood": "gaussian", "noise_sd": 0.0}, "noise_sd"),
        ({"likelihood": "poisson", "inverse_dispersion": 2.0}, "inverse_dispersion"),
        ({"n_combinations": 16}, "15"),
        ({"n_train": 6}, "n_train"),
        ({"n_invariant": 38}, "40 latents"),
        ({"n_genes": 39}, "40 genes"),
    ],
)
def test_bad_settings_say_what_is_wrong(settings, words):
    with pytest.raises(DataError, match=words):
        latent_scm(**SMALL | settings)


def test_what_cannot_be_done_is_said(small):
    with pytest.raises(DataError, match="no density"):
        oracle_nll(small)
    with pytest.raises(DataError, match="orthogonal"):
        rotated_scm(small, np.ones((3, 3)))
    with pytest.raises(DataError, match=r"simulate\.latent_scm"):
        rotated_scm(anndata.AnnData(np.ones((2, 3))), ROTATION)
