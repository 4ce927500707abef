import itertools

import anndata
import numpy as np
import pytest
from scipy import integrate, stats
from scipy.special import logsumexp

from pyro_causalcell.errors import DataError
from pyro_causalcell.simulate import expected_counts, oracle_nll, out_of_domain, sparse_shift

SMALL = {"n_latents": 4, "n_genes": 40, "n_interventions": 10, "cells_per_intervention": 60}


@pytest.fixture(scope="module")
def released():
    return sparse_shift(**SMALL)


def truth(adata):
    return adata.uns["simulation"]


def numpy_logits(adata, z_nk):
    """The decoder written again, from what the AnnData says."""
    hidden = z_nk
    for i in range(3):
        hidden = hidden @ truth(adata)["decoder"][f"hidden_{i}"]
        hidden = np.where(hidden > 0, hidden, 0.2 * hidden)
    return hidden @ adata.varm["decoder_output"].T / truth(adata)["logit_scale"]


def test_layout(released):
    assert released.shape == (600, 40)
    assert np.issubdtype(released.X.dtype, np.integer)
    assert released.obs["target"].value_counts().to_dict() == {f"intervention_{i:02d}": 60 for i in range(10)}
    heldout = released.obs.loc[released.obs["split"] == "heldout", "target"].unique()
    assert list(heldout) == ["intervention_08", "intervention_09"]
    assert truth(released)["simulated"] and truth(released)["n_train"] == 8
    assert truth(released)["shift_pk"].shape == truth(released)["graph_pk"].shape == (10, 4)
    assert released.obsm["z"].shape == (600, 4)


def test_cells_scatter_around_the_shift_of_their_intervention():
    adata = sparse_shift(**SMALL | {"cells_per_intervention": 2000})
    z_pnk = adata.obsm["z"].reshape(10, 2000, 4)
    np.testing.assert_allclose(z_pnk.mean(1), truth(adata)["shift_pk"], atol=0.12)
    np.testing.assert_allclose(z_pnk.std(1), 1, atol=0.08)


def test_released_genes_all_have_the_same_total_and_the_library_follows_z(released):
    rate_ng = expected_counts(released)
    np.testing.assert_allclose(rate_ng.sum(0), 1e6)
    assert np.all(np.abs(released.X.sum(0) - 1e6) < 5 * 1e3)
    np.testing.assert_allclose(released.obs["library_true"], rate_ng.sum(1))
    assert released.obs["library_true"].std() > 0.05 * released.obs["library_true"].mean()


def test_released_counts_per_cell_shrink_with_the_number_of_cells(released):
    more = sparse_shift(**SMALL | {"cells_per_intervention": 120})
    assert more.X.mean() == pytest.approx(released.X.mean() / 2, rel=0.01)


@pytest.mark.parametrize("preset", ["released", "paper", "clean"])
def test_expected_counts_are_those_of_the_network(preset):
    adata = sparse_shift(preset, **SMALL)
    logits = numpy_logits(adata, adata.obsm["z"])
    assert logits.std() == pytest.approx(1, rel=1e-3)
    axis = 0 if preset == "released" else 1
    share = np.exp(logits - logsumexp(logits, axis=axis, keepdims=True))
    total = 1e6 if preset == "released" else adata.obs["library_true"].to_numpy()[:, None]
    np.testing.assert_allclose(expected_counts(adata), share * total, rtol=1e-8)
    np.testing.assert_allclose(expected_counts(adata, np.array([3, 1])), (share * total)[[3, 1]], rtol=1e-8)
    standardised = (adata.X - share * total) / np.sqrt(share * total)
    assert standardised.mean() == pytest.approx(0, abs=0.05)
    assert standardised.std() == pytest.approx(1, abs=0.05)


def test_libraries_of_the_other_presets():
    paper = sparse_shift("paper", **SMALL)
    np.testing.assert_allclose(paper.obs["library_true"], 1e5)
    clean = sparse_shift("clean", **SMALL)
    log_library = np.log(clean.obs["library_true"])
    assert np.exp(log_library.median()) == pytest.approx(2000, rel=0.1)
    assert log_library.std() == pytest.approx(0.4, rel=0.1)
    own = sparse_shift("clean", library_size=100.0, library_log_sd=0.0, **SMALL)
    np.testing.assert_allclose(own.obs["library_true"], 100)


def test_negative_binomial_counts_have_the_stated_variance():
    adata = sparse_shift("clean", inverse_dispersion=5.0, **SMALL | {"cells_per_intervention": 400})
    mean_ng = expected_counts(adata)
    ratio = (adata.X - mean_ng) ** 2 / (mean_ng + mean_ng**2 / 5)
    assert ratio.mean() == pytest.approx(1, abs=0.03)


def test_rows_of_the_weights_are_orthogonal(released):
    weights = [truth(released)["decoder"][f"hidden_{i}"] for i in range(3)]
    for weight in [*weights, released.varm["decoder_output"].T]:
        gram = weight @ weight.T
        gain = 2 / 1.04 * 2 / sum(weight.shape)
        np.testing.assert_allclose(gram, gain * np.eye(len(weight)), atol=1e-12)


def test_number_of_targets():
    many = {"n_genes": 40, "n_interventions": 3000, "cells_per_intervention": 1}
    counts = {}
    for preset in ("released", "paper"):
        n_targets = truth(sparse_shift(preset, n_latents=2, **many))["graph_pk"].sum(1)
        counts[preset] = (n_targets == 1).mean()
    assert counts["paper"] == pytest.approx(1 / 3, abs=0.03)
    assert counts["released"] == pytest.approx(1 / 3 + 1 / 6 + 1 / 12, abs=0.03)  # repeats merge


def test_sparsity_is_the_fraction_of_targeted_latents():
    settings = {"n_genes": 40, "n_latents": 10, "n_interventions": 2000, "cells_per_intervention": 1}
    fifth = truth(sparse_shift(sparsity=0.2, **settings))["graph_pk"]
    assert set(fifth.sum(1)) == {2}
    quarter = truth(sparse_shift(sparsity=0.25, **settings))["graph_pk"]
    assert set(quarter.sum(1)) == {2, 3}
    assert quarter.mean() == pytest.approx(0.25, abs=0.01)
    assert truth(sparse_shift(sparsity=0.01, **settings))["graph_pk"].sum(1).min() == 1


@pytest.mark.parametrize("preset", ["released", "clean"])
def test_only_the_stated_latents_are_targeted(preset):
    graph = truth(sparse_shift(preset, n_targeted_latents=2, **SMALL))["graph_pk"]
    assert graph[:, :2].any(0).all() and not graph[:, 2:].any()


def test_shifts_have_the_stated_size_both_signs_and_sit_on_targets():
    adata = sparse_shift(n_genes=40, n_interventions=1000, cells_per_intervention=1, effect=3.0)
    shift, graph = truth(adata)["shift_pk"], truth(adata)["graph_pk"]
    assert np.array_equal(shift != 0, graph)
    assert np.abs(shift[graph]).mean() == pytest.approx(3, abs=0.05)
    assert np.abs(shift[graph]).std() == pytest.approx(0.5, abs=0.05)
    assert (shift[graph] > 0).mean() == pytest.approx(0.5, abs=0.05)


def test_seeds(released):
    again, other = sparse_shift(**SMALL), sparse_shift(seed=1, **SMALL)
    assert np.array_equal(released.X, again.X)
    assert not np.array_equal(released.X, other.X)
    same_decoder = sparse_shift(seed=1, decoder_seed=0, **SMALL)
    np.testing.assert_array_equal(same_decoder.varm["decoder_output"], released.varm["decoder_output"])
    np.testing.assert_array_equal(truth(same_decoder)["graph_pk"], truth(other)["graph_pk"])
    assert not np.array_equal(other.varm["decoder_output"], released.varm["decoder_output"])


@pytest.mark.parametrize("preset", ["released", "clean"])
def test_controls_are_unshifted_and_leave_the_other_cells_alone(preset):
    without = sparse_shift(preset, **SMALL)
    adata = sparse_shift(preset, n_control_cells=3000, **SMALL)
    assert "control" not in set(without.obs["target"])
    control = (adata.obs["target"] == "control").to_numpy()
    assert control.sum() == 3000 and set(adata.obs.loc[control, "split"]) == {"train"}
    np.testing.assert_allclose(adata.obsm["z"][control].mean(0), 0, atol=0.1)
    assert np.array_equal(adata.X[~control], without.X)


@pytest.mark.parametrize("preset", ["released", "clean"])
def test_out_of_domain_keeps_the_decoder_and_changes_the_interventions(preset):
    adata = sparse_shift(preset, effect=2.0, sparsity=0.25, **SMALL)
    new = out_of_domain(adata, effect=6.0, sparsity=0.75, n_interventions=30, cells_per_intervention=40)
    assert new.shape == (1200, 40)
    assert set(new.obs["split"]) == {"heldout"}
    assert not set(new.obs["target"]) & set(adata.obs["target"])
    assert set(truth(new)["graph_pk"].sum(1)) == {3}
    assert np.abs(truth(new)["shift_pk"])[truth(new)["graph_pk"]].mean() == pytest.approx(6, abs=0.2)
    np.testing.assert_array_equal(new.varm["decoder_output"], adata.varm["decoder_output"])
    assert truth(new)["logit_scale"] == truth(adata)["logit_scale"]
    # the same latents decode to the same rates
    logits = numpy_logits(adata, new.obsm["z"])
    if preset == "released":
        rate = np.exp(logits + adata.var["log_offset"].to_numpy())
    else:
        rate = np.exp(logits - logsumexp(logits, axis=1, keepdims=True))
        rate *= new.obs["library_true"].to_numpy()[:, None]
    np.testing.assert_allclose(expected_counts(new), rate, rtol=1e-8)


def test_out_of_domain_without_settings_repeats_the_rule_with_new_draws():
    adata = sparse_shift(effect=2.0, sparsity=0.5, **SMALL)
    new = out_of_domain(adata, n_interventions=10)
    assert set(truth(new)["graph_pk"].sum(1)) == {2}
    assert not np.array_equal(truth(new)["shift_pk"], truth(adata)["shift_pk"])
    assert len(new) == 600


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"preset": "tidy"}, "released"),
        ({"n_latents": 41}, "41"),
        ({"n_genes": 10}, "40 genes"),
        ({"n_train": 11}, "n_train"),
        ({"sparsity": 1.5}, "sparsity"),
        ({"n_targeted_latents": 9}, "n_targeted_latents"),
        ({"effect": -1.0}, "effect"),
        ({"cells_per_intervention": 0}, "cells_per_intervention"),
        ({"library_size": 100.0}, "library_size"),
        ({"preset": "clean", "inverse_dispersion": 0.0}, "inverse_dispersion"),
    ],
)
def test_bad_settings_say_what_is_wrong(settings, words):
    with pytest.raises(DataError, match=words):
        sparse_shift(**SMALL | settings)


# -------------------------------------------------------------------------------------------- oracle


def likelihood(adata, n):
    """log p(x_n | z) for an array of latents, by scipy, with the decoder written again."""
    theta = truth(adata).get("inverse_dispersion")

    def log_p(z_ik):
        logits = numpy_logits(adata, z_ik)
        if "log_offset" in adata.var:
            rate = np.exp(logits + adata.var["log_offset"].to_numpy())
        else:
            rate = (
                np.exp(logits - logsumexp(logits, axis=1, keepdims=True)) * adata.obs["library_true"].iloc[n]
            )
        if theta is None:
            return stats.poisson.logpmf(adata.X[n], rate).sum(1)
        return stats.nbinom.logpmf(adata.X[n], theta, theta / (theta + rate)).sum(1)

    return log_p


@pytest.mark.parametrize(
    "settings",
    [{}, {"preset": "clean", "library_size": 300.0}, {"preset": "clean", "inverse_dispersion": 4.0}],
    ids=["released", "poisson", "negative-binomial"],
)
def test_oracle_with_one_latent_is_the_integral(settings):
    adata = sparse_shift(
        n_latents=1, n_genes=40, n_interventions=3, cells_per_intervention=300, n_control_cells=5, **settings
    )
    rows, exact = np.array([0, 350, 700, 902]), []
    for n, shift in zip(rows, [*truth(adata)["shift_pk"][:, 0], 0.0], strict=True):
        grid = shift + np.linspace(-7, 7, 20001)
        log_joint = likelihood(adata, n)(grid[:, None]) + stats.norm.logpdf(grid, shift)
        top = log_joint.max()
        exact.append(-top - np.log(integrate.trapezoid(np.exp(log_joint - top), grid)))
    np.testing.assert_allclose(oracle_nll(adata, rows, n_particles=4000), exact, atol=0.02)


@pytest.mark.parametrize(
    ("settings", "reach"),
    [({}, 1.6), ({"preset": "clean", "inverse_dispersion": 4.0}, 4.0)],
    ids=["released", "negative-binomial"],
)
def test_oracle_with_two_latents_is_the_integral(settings, reach):
    adata = sparse_shift(n_latents=2, n_genes=40, n_interventions=4, cells_per_intervention=2000, **settings)
    rows, exact = np.array([10, 3010, 7010]), []
    for n in rows:
        shift = truth(adata)["shift_pk"][n // 2000]
        axes = [c + np.linspace(-reach, reach, 201) for c in adata.obsm["z"][n]]
        grid = np.array(list(itertools.product(*axes)))
        log_joint = likelihood(adata, n)(grid) + stats.norm.logpdf(grid, shift).sum(1)
        exact.append(-logsumexp(log_joint) - 2 * np.log(reach / 100))
    np.testing.assert_allclose(oracle_nll(adata, rows, n_particles=4000), exact, atol=0.02)


def test_oracle_from_a_file_a_subset_and_other_gene_order(released, tmp_path):
    rows = np.array([5, 300, 599])
    nll = oracle_nll(released, rows, n_particles=500)
    released.write_h5ad(tmp_path / "sim.h5ad")
    back = anndata.read_h5ad(tmp_path / "sim.h5ad")
    assert np.array_equal(truth(back)["graph_pk"], truth(released)["graph_pk"])
    np.testing.assert_allclose(oracle_nll(back, rows, n_particles=500), nll)
    np.testing.assert_allclose(oracle_nll(back[rows].copy(), n_particles=500), nll)
    np.testing.assert_allclose(oracle_nll(back[:, ::-1].copy(), rows, n_particles=500), nll)
    mask = np.isin(np.arange(600), rows)
    np.testing.assert_allclose(oracle_nll(back, mask, n_particles=500), nll)
    new = out_of_domain(back, n_interventions=2)
    assert np.isfinite(oracle_nll(new, np.array([0, 119]), n_particles=100)).all()


def test_no_other_shift_explains_the_cells_better(released):
    rows = np.arange(0, 600, 12)
    right = oracle_nll(released, rows, n_particles=200).mean()
    wrong = released.copy()
    truth(wrong)["shift_pk"] = truth(released)["shift_pk"] + 0.7
    assert oracle_nll(wrong, rows, n_particles=200).mean() > right + 0.3


def test_oracle_of_the_released_setting():
    adata = sparse_shift()
    assert adata.X.mean() == pytest.approx(20, abs=0.05)
    rows = np.random.default_rng(0).choice(np.flatnonzero(adata.obs["split"] == "heldout"), 60, replace=False)
    nll = oracle_nll(adata, rows, n_particles=500)
    assert nll.mean() == pytest.approx(297, abs=4)
    # another seed gives nearly the same numbers: the Monte Carlo error is small
    assert np.abs(nll - oracle_nll(adata, rows, n_particles=500, seed=1)).mean() < 0.3


def test_oracle_refuses_what_is_no_simulation(released):
    with pytest.raises(DataError, match="simulate.sparse_shift"):
        oracle_nll(anndata.AnnData(np.ones((3, 4))))
    with pytest.raises(DataError, match="39"):
        oracle_nll(released[:, 1:].copy())
    renamed = released.copy()
    renamed.obs["target"] = "elsewhere"
    with pytest.raises(DataError, match="elsewhere"):
        oracle_nll(renamed)
