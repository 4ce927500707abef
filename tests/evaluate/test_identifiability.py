"""Agreement of runs, rank of parameters and alignment, on latents whose answer is known."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from pyro_causalcell.data import Screen
from pyro_causalcell.errors import DataError, PredictionError
from pyro_causalcell.evaluate import (
    alignment,
    mixing,
    numerical_rank,
    perturbation_auc,
    seed_agreement,
    shift_rank,
    udr,
)
from pyro_causalcell.evaluate import identifiability as room
from pyro_causalcell.predict import latents

PERMUTED = [2, 0, 3, 1]
SIGNS = np.array([1, -1, -1, 1])


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def z(rng):
    return rng.standard_normal((400, 4))


def test_runs_that_differ_in_order_sign_and_scale_agree(z):
    result = seed_agreement([z, 3 * (SIGNS * z)[:, PERMUTED] + 1])
    assert result["mcc"].dims == ("block", "run", "other")
    np.testing.assert_allclose(result["mcc"].sel(block="z"), np.ones((2, 2)))
    np.testing.assert_allclose(result["r2"].sel(block="z"), np.ones((2, 2)))


def test_a_rotation_keeps_the_block_and_loses_the_programmes(z, rng):
    rotated = z @ np.linalg.qr(rng.standard_normal((4, 4)))[0]
    result = seed_agreement([z, rotated]).sel(block="z", run=0, other=1)
    assert float(result["r2"]) == pytest.approx(1) and float(result["mcc"]) < 0.9


def test_agreement_by_hand_with_a_programme_that_is_missing(z):
    result = seed_agreement([z, z[:, :3]]).sel(block="z")
    assert float(result["mcc"].sel(run=0, other=1)) == pytest.approx(3 / 4)
    assert float(result["mcc"].sel(run=1, other=0)) == pytest.approx(3 / 4)
    assert float(result["r2"].sel(run=0, other=1)) == pytest.approx(1)
    assert float(result["r2"].sel(run=1, other=0)) == pytest.approx(3 / 4, abs=0.02)


def test_latents_left_at_the_prior_take_no_part(z, rng):
    idle = 0.01 * rng.standard_normal((400, 2))
    result = seed_agreement([np.hstack([z, idle]), np.hstack([idle[::-1], z])]).sel(block="z")
    np.testing.assert_allclose(result["mcc"], np.ones((2, 2)))
    assert result["n_active"].values.tolist() == [4, 4]
    nothing = seed_agreement([idle, idle])
    assert np.isnan(nothing["mcc"]).all() and np.isnan(nothing["r2"]).all()


def test_blocks_are_compared_each_with_itself(z, rng):
    runs = [{"z_v": z[:, :2], "z_l": z[:, 2:]}, {"z_v": z[:, [1, 0]], "z_l": rng.standard_normal((400, 2))}]
    result = seed_agreement(runs).sel(run=0, other=1)
    assert float(result["mcc"].sel(block="z_v")) == pytest.approx(1)
    assert float(result["r2"].sel(block="z_l")) < 0.05
    with pytest.raises(DataError, match="same blocks"):
        seed_agreement([runs[0], z])


def test_agreement_of_fits_is_that_of_their_latents(small_fit, small_screen):
    rows = np.arange(120)
    z_nk = latents(small_fit, small_screen).obsm["X_causalcell"]
    result = seed_agreement([small_fit, z_nk[rows]], small_screen, rows=rows)
    np.testing.assert_allclose(result["mcc"].sel(block="z"), np.ones((2, 2)), atol=1e-5)
    with pytest.raises(DataError, match="screen="):
        seed_agreement([small_fit, small_fit])


def test_agreement_needs_two_runs_of_the_same_cells(z):
    with pytest.raises(DataError, match="at least 2"):
        seed_agreement([z])
    with pytest.raises(DataError, match="same cells"):
        seed_agreement([z, z[:10]])


@pytest.mark.parametrize("method", ["spearman", "lasso"])
def test_udr_rewards_agreement_up_to_order_and_sign(z, rng, method):
    same = [z, (SIGNS * z)[:, PERMUTED], z + 0.05 * rng.standard_normal(z.shape)]
    rotated = [z @ np.linalg.qr(rng.standard_normal((4, 4)))[0] for _ in range(3)]
    high, low = udr(same, method=method), udr(rotated, method=method)
    assert high.shape == (3,)
    assert high.min() > 0.8 > 0.7 > low.max()


def test_udr_by_hand_and_without_idle_latents():
    # orthogonal columns: |Spearman correlation| between the models is the identity, whatever the scale
    a = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=float)
    np.testing.assert_allclose(udr([a, 5 * a]), [1, 1])
    idle = np.column_stack([a, np.full(4, 0.3)])
    np.testing.assert_allclose(udr([idle, a]), [1, 1])
    # one latent against two copies of it: shares 1 and 1, and 1/2 from the other side
    np.testing.assert_allclose(udr([a[:, :1], a[:, [0, 0]]]), [(1 + 1 + 0.5) / 3] * 2)
    assert udr([np.zeros((4, 2)), a]).tolist() == [0, 0]


def test_udr_needs_two_models(z):
    with pytest.raises(DataError, match="at least 2"):
        udr([z])


def test_rank_counts_what_stands_out_of_noise(rng):
    signal = rng.standard_normal((30, 3)) @ rng.standard_normal((3, 8))
    noise = 0.1 * rng.standard_normal((50, 30, 8))
    found = numerical_rank(signal + noise[0], noise[1:])
    assert found.rank == 3 and len(found.singular_values) == 8
    assert found.singular_values[2] > found.threshold > found.singular_values[3]
    assert numerical_rank(noise[0], noise[1:]).rank == 0


def test_rank_by_hand():
    noise = np.zeros((2, 2, 2))
    noise[:, 0, 0] = 2.0
    assert numerical_rank(np.diag([3.0, 1.0]), noise).rank == 1
    assert numerical_rank(np.diag([3.0, 1.0]), noise / 4).rank == 2


@pytest.mark.parametrize(
    ("matrix", "noise", "words"),
    [
        (np.eye(2), np.zeros((1, 3, 2)), "shapes"),
        (np.eye(2), np.zeros((0, 2, 2)), "draws"),
        (np.eye(2), np.full((1, 2, 2), np.nan), "finite"),
    ],
)
def test_rank_of_bad_input(matrix, noise, words):
    with pytest.raises(DataError, match=words):
        numerical_rank(matrix, noise)


def test_shift_rank_of_a_fit(small_fit, monkeypatch):
    assert 0 <= shift_rank(small_fit, n_draws=20).rank <= 3
    shift = torch.zeros(40, 6, 3)
    shift[:, 0, 0], shift[:, 1, 1] = 4.0, 3.0
    shift += 0.1 * torch.randn(shift.shape, generator=torch.Generator().manual_seed(0))
    gate = torch.ones(40, 6, 3)
    gate[:, 1] = 0.0  # a shift behind a closed gate moves nothing
    monkeypatch.setattr(room, "global_draws", lambda *_: {"shift": shift, "gate": gate})
    assert shift_rank(small_fit).rank == 1
    monkeypatch.setattr(room, "global_draws", lambda *_: {})
    with pytest.raises(PredictionError, match="numerical_rank"):
        shift_rank(small_fit)


@pytest.fixture
def screen(rng) -> Screen:
    label_n = np.repeat(["non-targeting", "A", "B"], [200, 100, 100])
    obs = pd.DataFrame({"target": label_n}, index=[f"cell{i}" for i in range(400)])
    x_ng = rng.standard_normal((400, 2)).astype(np.float32)
    return Screen(ad.AnnData(x_ng, obs, pd.DataFrame(index=["g0", "g1"])))


def test_alignment_finds_the_perturbation_that_leaks(screen, z):
    leaky = z.copy()
    leaky[screen.condition_n == 2, 0] += 2 * leaky[screen.condition_n == 0, 0].std()
    table = alignment(leaky, screen).set_index("condition")
    assert table.index.tolist() == ["control", "A", "B"] and table["n_cells"].tolist() == [200, 100, 100]
    noise = table.loc["control"]
    assert table.loc["A", "mean_distance"] < 2 * noise["mean_distance"]
    assert table.loc["B", "mean_distance"] == pytest.approx(2, abs=0.4)
    assert table.loc["B", "mmd"] > 0.05 > abs(table.loc["A", "mmd"])


def test_alignment_sees_what_the_mean_does_not(screen, z):
    wide = z.copy()
    wide[screen.condition_n == 1] *= 3
    table = alignment({"z_l": wide, "z_v": 0 * z}, screen, block="z_l").set_index("condition")
    assert table.loc["A", "mmd"] > 5 * abs(table.loc["B", "mmd"])


def test_alignment_of_a_fit_and_bad_input(small_fit, small_screen, screen, z):
    table = alignment(small_fit, small_screen, block="z")
    assert table["condition"].tolist() == small_screen.conditions and np.isfinite(table["mmd"]).all()
    with pytest.raises(DataError, match="block="):
        alignment({"z_l": z, "z_v": z}, screen)
    with pytest.raises(DataError, match="control cells"):
        alignment(z[200:], screen, rows=np.arange(200, 400))
    with pytest.raises(DataError, match="400 cells"):
        alignment(z[:10], screen)


def test_a_dense_weight_variant_model_is_known_up_to_a_rotation_only(rng):
    """Rich environments do not settle its axes: the rotated programmes obey a valid model of the same kind.

    z = B_u y + W_u z + n, n ~ N(m_u, D_u), W_u strictly triangular, W and B zero in control; y are the
    invariant programmes. The laws p(z | y, u) of a rotation of z (control variances one) have this form too.
    """
    k, n_invariant = 4, 3
    control_variance = rng.uniform(0.5, 2, k)
    turn = np.linalg.qr(rng.standard_normal((k, k)))[0] / np.sqrt(control_variance)
    in_control = turn @ np.diag(control_variance) @ turn.T
    np.testing.assert_allclose(in_control, np.eye(k), atol=1e-12)  # diagonal noise, weights zero: the anchor
    for _ in range(30):
        weight, noise = np.tril(rng.standard_normal((k, k)), -1), np.diag(rng.uniform(0.5, 2, k))
        mean, from_invariant = rng.standard_normal((k, 1)), rng.standard_normal((k, n_invariant))
        reach = turn @ np.linalg.inv(np.eye(k) - weight)
        covariance, slope, offset = reach @ noise @ reach.T, reach @ from_invariant, reach @ mean
        root = np.linalg.cholesky(covariance)
        new_noise = np.diag(np.diag(root) ** 2)
        keep = np.linalg.inv(root / np.diag(root))  # I - W of the rotated programmes
        new_weight = np.eye(k) - keep
        np.testing.assert_allclose(new_weight, np.tril(new_weight, -1), atol=1e-10)
        back = np.linalg.inv(np.eye(k) - new_weight)
        np.testing.assert_allclose(back @ new_noise @ back.T, covariance, atol=1e-8)
        np.testing.assert_allclose(back @ (keep @ slope), slope, atol=1e-8)
        np.testing.assert_allclose(back @ (keep @ offset), offset, atol=1e-8)
    assert (np.abs(turn) > 0.05).sum() > k  # and they are other programmes: no permutation of the first ones


def test_a_rotation_costs_the_sparsity_of_shifts(rng):
    """Where each perturbation moves one programme, it moves several of the turned ones."""
    shift_pk = np.kron(np.eye(4), np.ones((3, 1))) * 3
    turned_pk = shift_pk @ np.linalg.qr(rng.standard_normal((4, 4)))[0]
    assert (np.abs(shift_pk) > 0.1).sum(1).max() == 1 < (np.abs(turned_pk) > 0.1).sum(1).min()


def test_perturbation_auc_is_a_half_where_nothing_differs_and_one_where_all_does():
    rng = np.random.default_rng(0)
    label_n = np.repeat(["a", "b", "c"], 150)
    z_nk = rng.standard_normal((450, 3))
    assert abs(perturbation_auc(z_nk, label_n) - 0.5) < 0.06
    shifted = z_nk + 8.0 * (label_n[:, None] == np.array(["a", "b", "c"]))
    assert perturbation_auc(shifted, label_n) > 0.99
    wider = z_nk * np.where(label_n == "a", 4.0, 1.0)[:, None]  # squares see a change of variance alone
    assert perturbation_auc(wider[label_n != "c"], label_n[label_n != "c"]) > 0.85


def test_perturbation_auc_needs_labels_with_cells():
    with pytest.raises(DataError, match="at least 5 cells"):
        perturbation_auc(np.zeros((9, 2)), np.array(["a"] * 6 + ["b"] * 3))


def test_mixing_tells_a_block_that_feels_perturbations_from_one_that_does_not(rng):
    label_n = np.repeat(["control", "a", "b"], [200, 100, 60])
    noise_nk = rng.standard_normal((360, 4))
    apart_nk = noise_nk + 9.0 * (label_n == "a")[:, None] - 9.0 * (label_n == "b")[:, None]
    table = mixing({"invariant": noise_nk, "responsive": apart_nk}, label_n).set_index("block")
    assert abs(table.loc["invariant", "auc"] - 0.5) < 0.08 and table.loc["responsive", "auc"] > 0.99
    assert table.loc["invariant", "silhouette"] < 0.02 and table.loc["responsive", "silhouette"] > 0.6
    assert table.loc["invariant", "neighbours"] == pytest.approx(1.0, abs=0.1)
    # every neighbour is of the same condition; chance is the sum of n(n - 1) over all pairs
    chance = (200 * 199 + 100 * 99 + 60 * 59) / (360 * 359)
    assert table.loc["responsive", "neighbours"] == pytest.approx(1 / chance, rel=1e-9)
    scaled = mixing({"responsive": 1e3 * apart_nk}, label_n)
    assert scaled["silhouette"][0] == pytest.approx(table.loc["responsive", "silhouette"], rel=1e-6)


def test_mixing_needs_more_cells_than_neighbours(rng):
    with pytest.raises(DataError, match="more than 15 cells, found 12"):
        mixing({"z": rng.standard_normal((12, 2))}, np.repeat(["a", "b"], 6))
