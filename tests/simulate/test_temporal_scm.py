import anndata
import numpy as np
import pytest

from pyro_causalcell.data import Screen
from pyro_causalcell.errors import DataError
from pyro_causalcell.simulate import (
    expected_counts,
    linear_snapshots,
    oracle_nll,
    temporal_cells,
    temporal_scm,
)
from pyro_causalcell.simulate.temporal_scm import Dynamics

SMALL = {
    "n_genes": 40,
    "n_responsive": 3,
    "n_invariant": 2,
    "n_perturbations": 6,
    "n_combinations": 2,
    "times": (1, 2, 4),
    "cells_per_snapshot": 10,
    "truth_draws": 50,
}


@pytest.fixture(scope="module")
def small():
    return temporal_scm(**SMALL)


def truth(adata):
    return adata.uns["simulation"]


def programmes(adata, target, time):
    rows = ((adata.obs["target"] == target) & (adata.obs["time"] == time)).to_numpy()
    return np.hstack([adata.obsm["z_invariant"], adata.obsm["z_responsive"]])[rows]


def linear_means(record, c, steps):
    """Mean programmes after some steps, from the stored truth of a linear process; at time 0 they are 0."""
    u_p = record["design_cp"][c]
    mean_k, n_l = np.zeros(len(record["sd_k"])), record["n_invariant"]
    for _ in range(steps):
        mean_k = record["weight_kk"] @ mean_k
        mean_k[n_l:][(record["cut_pv"] & u_p[:, None]).any(0)] = 0
        mean_k[n_l:] += u_p @ record["shift_pv"]
    return mean_k


def test_defaults_are_the_stated_sizes():
    adata = temporal_scm()
    assert adata.shape == (19 * 4 * 150, 500)
    assert adata.obsm["z_invariant"].shape[1] == 7 and adata.obsm["z_responsive"].shape[1] == 4
    assert sorted(adata.obs["time"].unique()) == [1.0, 2.0, 3.0, 4.0]
    heldout = adata.obs.loc[adata.obs["split"] == "heldout", "target"].astype(str)
    assert heldout.nunique() == 6 and heldout.str.contains("+", regex=False).all()
    assert {"control", "P01", "P12"} < set(adata.obs["target"])
    assert truth(adata)["simulated"]


def test_one_step_by_hand():
    process = Dynamics(
        weight_kk=np.array([[0.5, 0, 0], [0.4, 0.6, -1.0], [0, 0.3, 0.2]]),
        sd_k=np.zeros(3),
        nonlinear=False,
        shift_pv=np.array([[2.0, 0.0], [1.0, 0.0]]),
        scale_pv=np.ones((2, 2)),
        cut_pv=np.array([[False, False], [False, True]]),
    )
    z_nk, rng = np.array([[2.0, 1.0, 3.0]]), np.random.default_rng(0)
    np.testing.assert_allclose(
        process.step(z_nk, np.array([True, False]), rng), [[1, 0.8 + 0.6 - 3 + 2, 0.9]]
    )
    np.testing.assert_allclose(process.step(z_nk, np.array([True, True]), rng), [[1, -1.6 + 3, 0]])
    curved = Dynamics(
        process.weight_kk, process.sd_k, True, process.shift_pv, process.scale_pv, process.cut_pv
    )
    expected = 0.4 * np.tanh(3) + 0.6 - np.tanh(4.5) + 1
    assert curved.step(z_nk, np.array([False, True]), rng)[0, 1] == pytest.approx(expected)


def test_noise_of_a_combination_multiplies():
    scale_pv, none_pv = np.array([[2.0], [3.0]]), np.zeros((2, 1))
    process = Dynamics(np.zeros((1, 1)), np.ones(1), False, none_pv, scale_pv, none_pv > 0)
    z_nk = process.step(np.zeros((4000, 1)), np.array([True, True]), np.random.default_rng(0))
    assert z_nk.std() == pytest.approx(6, rel=0.05)


def test_cells_follow_the_stored_truth():
    adata = temporal_scm(**SMALL | {"cells_per_snapshot": 3000, "truth_draws": 3000})
    record = truth(adata)
    for c, name in enumerate(record["conditions"]):
        for t, time in enumerate((1, 2, 4)):
            expected_k = linear_means(record, c, time)
            np.testing.assert_allclose(programmes(adata, name, time).mean(0), expected_k, atol=0.15)
            np.testing.assert_allclose(record["programme_ctk"][c, t], expected_k, atol=0.15)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dynamics", ["linear", "nonlinear"])
def test_control_is_stationary_with_unit_variance(dynamics, seed):
    adata = temporal_scm(
        n_genes=40, dynamics=dynamics, times=(0, 8), cells_per_snapshot=2000, truth_draws=1, seed=seed
    )
    for time in (0, 8):
        np.testing.assert_allclose(programmes(adata, "control", time).std(0), 1, atol=0.1)
    start = programmes(adata, "P01", 0)
    np.testing.assert_allclose(start.mean(0), 0, atol=0.12)  # a perturbation acts only from then on
    weight_kk = truth(adata)["weight_kk"]
    assert (np.diag(weight_kk) > 0.25).all()
    if dynamics == "linear":
        covariance_kk = np.cov(programmes(adata, "control", 0).T)
        later_kk = weight_kk @ covariance_kk @ weight_kk.T + np.diag(truth(adata)["sd_k"] ** 2)
        np.testing.assert_allclose(later_kk, covariance_kk, atol=0.15)


@pytest.mark.parametrize("graph", ["full", "triangular"])
def test_graph_and_changes_have_the_stated_form(graph):
    for seed in range(5):
        record = truth(temporal_scm(**SMALL | {"graph": graph, "seed": seed, "n_invariant": 4}))
        weight_kk, edge_vk = record["weight_kk"], record["adjacency_vk"]
        assert not weight_kk[:4, 4:].any()  # invariant programmes evolve on their own
        off_diagonal = ~np.eye(7, dtype=bool)[4:]
        assert (edge_vk == (weight_kk[4:] != 0) & off_diagonal).all() and edge_vk.any(1).all()
        assert np.abs(weight_kk[4:][edge_vk]).min() > 0.1
        if graph == "triangular":
            assert not np.triu(edge_vk[:, 4:]).any()
        altered_pv = record["altered_pv"]
        assert set(altered_pv.sum(1)) <= {1, 2} and (altered_pv[:3].sum(1) == 1).all()
        assert ((record["shift_pv"] != 0) == altered_pv).all()
        size = np.abs(record["shift_pv"][altered_pv])
        assert size.min() >= 1 and size.max() <= 2
        assert (record["cut_pv"].any(1) == (np.arange(6) >= 4)).all()
        assert not (record["cut_pv"] & ~altered_pv).any()


def test_snapshots_are_unpaired_and_independent_of_the_others(small):
    z_nk = np.hstack([small.obsm["z_invariant"], small.obsm["z_responsive"]])
    assert len(np.unique(z_nk[:, 0])) == small.n_obs
    fewer = temporal_scm(**SMALL | {"missing": [("P02", 2)]})
    kept = ~((small.obs["target"] == "P02") & (small.obs["time"] == 2)).to_numpy()
    np.testing.assert_array_equal(fewer.obsm["z_responsive"], small.obsm["z_responsive"][kept])
    assert not truth(fewer)["measured_ct"][2, 1] and truth(fewer)["measured_ct"].sum() == 9 * 3 - 1
    later = temporal_scm(**SMALL | {"times": (2, 7)})
    np.testing.assert_array_equal(programmes(later, "P01", 2), programmes(small, "P01", 2))


def test_a_share_of_snapshots_goes_missing_but_never_all_of_a_condition():
    record = truth(temporal_scm(**SMALL | {"missing": 0.6}))
    measured_ct = record["measured_ct"]
    assert measured_ct[0].all() and measured_ct.any(1).all()
    assert (~measured_ct[1:]).sum() == round(0.6 * 8 * 3)
    assert record["mean_ctg"].shape == (9, 3, 40) and np.isfinite(record["mean_ctg"]).all()


@pytest.mark.parametrize("likelihood", ["none", "gaussian", "nb", "poisson"])
def test_observations_and_true_means(likelihood, tmp_path):
    adata = temporal_scm(**SMALL | {"likelihood": likelihood, "cells_per_snapshot": 400, "truth_draws": 2000})
    record = truth(adata)
    rows = ((adata.obs["target"] == "P03") & (adata.obs["time"] == 4)).to_numpy()
    c = list(record["conditions"]).index("P03")
    expected_ng = expected_counts(adata, rows)
    if likelihood in ("nb", "poisson"):
        assert adata.X.dtype == np.int32
        shares_ng = expected_ng / adata.obs["library_true"].to_numpy()[rows][:, None]
        np.testing.assert_allclose(shares_ng.mean(0), record["share_ctg"][c, 2], rtol=0.4)
        np.testing.assert_allclose(record["share_ctg"].sum(-1), 1)
    else:
        np.testing.assert_allclose(expected_ng.mean(0), record["mean_ctg"][c, 2], atol=0.2)
        noise = adata.X[rows] - expected_ng
        assert noise.std() == pytest.approx(0.2 if likelihood == "gaussian" else 0, abs=0.01)
    adata.write_h5ad(tmp_path / "t.h5ad")
    back = anndata.read_h5ad(tmp_path / "t.h5ad")
    new_ng, old_ng = temporal_cells(back, "P03", 4, 400, seed=1), adata.X[rows]
    error_g = np.sqrt((new_ng.var(0) + old_ng.var(0)) / 400)
    assert (np.abs(new_ng.mean(0) - old_ng.mean(0)) < 4.5 * error_g).all()
    assert not np.array_equal(new_ng, old_ng)


def test_new_cells_of_what_was_not_measured(small):
    unseen_ng = temporal_cells(small, "P01+P02+P03", 6, 5)
    assert unseen_ng.shape == (5, 40)
    np.testing.assert_array_equal(unseen_ng, temporal_cells(small, "P01+P02+P03", 6, 5))
    with pytest.raises(DataError, match="P99"):
        temporal_cells(small, "P01+P99", 2, 5)
    with pytest.raises(DataError, match="whole numbers"):
        temporal_cells(small, "P01", 1.5, 5)


def test_screens_read_it_and_the_oracle_says_it_cannot(small):
    screen = Screen(small, "target", "control", time="time")
    assert screen.conditions[0] == "control" or "control" in screen.conditions
    with pytest.raises(DataError, match="sparse_shift or simulate.latent_scm"):
        oracle_nll(temporal_scm(**SMALL | {"likelihood": "gaussian"}), [0])


def test_linear_snapshots_regress_to_their_weights(tmp_path):
    adata = linear_snapshots(cells_per_snapshot=2000)
    record = truth(adata)
    assert adata.shape == (9 * 4 * 2000, 4)
    np.testing.assert_array_equal(adata.X, adata.obsm["z_responsive"])
    assert record["weight_kk"].diagonal().tolist() == [0.6] * 4
    assert sorted(record["weight_kk"][record["adjacency_vk"]]) == [-0.5, 0.4, 0.5]
    for c, name in enumerate(record["conditions"]):
        np.testing.assert_allclose(programmes(adata, name, 3).mean(0), linear_means(record, c, 3), atol=0.1)
    assert programmes(adata, "control", 1)[:, 0].var() == pytest.approx(0.25 / (1 - 0.36), rel=0.1)
    adata.write_h5ad(tmp_path / "l.h5ad")
    with pytest.raises(DataError, match="explode"):
        linear_snapshots(np.eye(2))
    with pytest.raises(DataError, match="square"):
        linear_snapshots(np.ones((2, 3)))


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("times", (2, 1), "increasing whole numbers"),
        ("times", (1, 1), "increasing whole numbers"),
        ("times", (0.5, 1), "increasing whole numbers"),
        ("times", (), "increasing whole numbers"),
        ("missing", 0.9, "between 0 and 0.67"),
        ("missing", [("P99", 1)], "P99"),
        ("missing", [("P01", 1), ("P01", 2), ("P01", 4)], "none of"),
        ("graph", "dense", "full"),
        ("dynamics", "curved", "nonlinear"),
        ("cut_share", 1.5, "cut_share"),
        ("n_combinations", 16, "between 0 and 15"),
        ("likelihood", "normal", "gaussian"),
        ("noise_sd", 0.1, "only with a likelihood"),
        ("cells_per_snapshot", 0, "at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(setting, value, words):
    with pytest.raises(DataError, match=words):
        temporal_scm(**SMALL | {setting: value})
