"""Sparse rotation: known rotations come back; turning the axes changes no likelihood."""

import tracemalloc

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from scipy.stats import ortho_group
from sklearn.linear_model import LinearRegression

from pyro_causalcell.batch import Rotation
from pyro_causalcell.data import Minibatches, random_cells
from pyro_causalcell.inference import Pair, block_rotation, build_pair, fit, sparse_rotation
from pyro_causalcell.inference.posterior import encode
from pyro_causalcell.inference.warm_start import _regress, can_rotate, distinct_designs
from pyro_causalcell.simulate import latent_scm


def _sparse_latents(design: str, controls: bool, k: int = 6, seed: int = 1):
    """Latents with sparse shifts, seen through an unknown linear map."""
    rng = np.random.default_rng(seed)
    n_targets, n_each = 18, 120
    shift_pk = np.zeros((n_targets, k))
    for p in range(n_targets):
        hit = rng.choice(k, size=rng.integers(1, 3), replace=False)
        shift_pk[p, hit] = rng.choice([-1, 1], len(hit)) * rng.uniform(2, 4, len(hit))
    rows = [np.eye(n_targets)[p] for p in range(n_targets)]
    if design == "multi-hot":
        rows += [rows[p] + rows[(p + 5) % n_targets] for p in range(0, n_targets, 2)]
    u_np = np.repeat(np.array(rows + [np.zeros(n_targets)] * (4 if controls else 0)), n_each, 0)
    z_nk = u_np @ shift_pk + rng.normal(size=(len(u_np), k))
    mix_kk = (
        ortho_group.rvs(k, random_state=seed) * rng.uniform(0.3, 3.0, k) @ ortho_group.rvs(k, random_state=9)
    )
    seen_nk = z_nk @ mix_kk + rng.normal(size=k) * 5
    return z_nk, shift_pk, torch.tensor(seen_nk, dtype=torch.float32), torch.tensor(u_np, dtype=torch.float32)


def _matched(a_nk, b_nk):
    """|correlation| of the best one-to-one matching of columns, and the matching."""
    k = a_nk.shape[1]
    correlation_kk = np.corrcoef(a_nk.T, b_nk.T)[:k, k:]
    rows, columns = linear_sum_assignment(-np.abs(correlation_kk))
    return np.abs(correlation_kk[rows, columns]), columns, np.sign(correlation_kk[rows, columns])


@pytest.mark.parametrize("design", ["one-hot", "multi-hot"])
@pytest.mark.parametrize("controls", [True, False], ids=["controls", "no controls"])
def test_a_known_rotation_comes_back(design, controls):
    z_nk, shift_pk, seen_nk, u_np = _sparse_latents(design, controls)
    turn = sparse_rotation(seen_nk, u_np)
    found_nk = (seen_nk @ turn.map_kk.T + turn.offset_k).numpy()
    correlation, columns, sign = _matched(z_nk, found_nk)
    assert correlation.min() > 0.99
    found_pk = turn.shift_pk.numpy()[:, columns] * sign
    assert np.abs(found_pk - shift_pk).max() < 0.6  # in standard deviations, as the simulation
    assert ((np.abs(found_pk) > 1) == (shift_pk != 0)).all()


def test_targets_without_cells_stay_at_zero():
    """Held-out targets have a column in the design and nothing else."""
    for controls in (True, False):
        _, _, seen_nk, u_np = _sparse_latents("one-hot", controls)
        held_np = torch.cat([u_np[:, :4], torch.zeros(len(u_np), 2), u_np[:, 4:]], 1)
        plain, wide = sparse_rotation(seen_nk, u_np), sparse_rotation(seen_nk, held_np)
        assert bool((wide.shift_pk[4:6] == 0).all())
        torch.testing.assert_close(wide.map_kk, plain.map_kk, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", range(2, 6))
def test_other_graphs_come_back_too(seed):
    """Quartimax alone ends beside the sparsest axes in half of these."""
    z_nk, _, seen_nk, u_np = _sparse_latents("one-hot", True, seed=seed)
    turn = sparse_rotation(seen_nk, u_np, n_starts=10)
    assert _matched(z_nk, (seen_nk @ turn.map_kk.T).numpy())[0].min() > 0.99


def test_control_lies_at_zero_and_spreads_by_one():
    _, _, seen_nk, u_np = _sparse_latents("one-hot", True)
    turn = sparse_rotation(seen_nk, u_np)
    control_nk = (seen_nk @ turn.map_kk.T + turn.offset_k)[u_np.sum(1) == 0]
    assert float(control_nk.mean(0).abs().max()) < 0.2
    torch.testing.assert_close(torch.cov(control_nk.T), torch.eye(6), atol=0.25, rtol=0)


def test_posterior_variance_counts_as_spread():
    """Means alone are too narrow; with the posterior variance the shifts keep their unit."""
    _, _, seen_nk, u_np = _sparse_latents("one-hot", True)
    plain = sparse_rotation(seen_nk, u_np)
    wider = sparse_rotation(seen_nk, u_np, variance_k=torch.full((6,), 100.0))
    assert float(wider.shift_pk.abs().max()) < 0.7 * float(plain.shift_pk.abs().max())


def test_rotation_is_repeatable_and_keeps_the_type():
    _, _, seen_nk, u_np = _sparse_latents("one-hot", True)
    first, again = (sparse_rotation(seen_nk, u_np, n_starts=3, seed=4) for _ in range(2))
    for a, b in zip(first[:3], again[:3], strict=True):
        assert torch.equal(a, b) and a.dtype == torch.float32


def test_a_dead_latent_does_no_harm():
    _, _, seen_nk, u_np = _sparse_latents("one-hot", True)
    dead_nk = torch.cat([seen_nk, torch.zeros(len(seen_nk), 1)], 1)
    turn = sparse_rotation(dead_nk, u_np, variance_k=torch.cat([torch.zeros(6), torch.ones(1)]))
    assert all(bool(torch.isfinite(t).all()) for t in turn[:3])
    assert float(turn.shift_pk.abs().max(0).values.min()) < 1e-3  # one axis without any shift


def test_equal_rows_of_a_design_are_found():
    rows = [[0, 2.0, 0], [1, 0, 1], [0, 0, 0], [0, 2.0, 0], [0, 1.0, 0], [0, 0, 0]]
    for design in (torch.tensor(rows), sparse.csr_matrix(rows)):
        u_dp, design_n = distinct_designs(design)
        np.testing.assert_array_equal(u_dp.toarray(), [rows[2], rows[0], rows[1], rows[4]])  # control first
        np.testing.assert_array_equal(design_n, [1, 2, 0, 1, 3, 0])


@pytest.mark.parametrize("kind", ["controls", "no controls", "doses alone", "two targets always together"])
def test_the_regression_on_designs_is_that_on_cells(kind):
    rows_by_kind = {
        "controls": [[0, 0], [1, 0], [0, 1]],
        "no controls": [[1, 0], [0, 1]],
        "doses alone": [[1, 0], [2, 0], [0, 1]],
        "two targets always together": [[0, 0], [1, 1]],
    }
    u_np = np.repeat(np.array(rows_by_kind[kind], dtype=float), [30, 50, 70][: len(rows_by_kind[kind])], 0)
    z = u_np @ [[1.0, -2.0], [0.5, 3.0]] + [4.0, 5.0] + np.random.default_rng(0).normal(size=(len(u_np), 2))
    centre_k, shift_pk, within_kk, is_known = _regress(z, *distinct_designs(torch.tensor(u_np)))
    assert is_known == (kind != "no controls")
    design = np.column_stack([np.ones(len(u_np)), u_np])
    expected = np.linalg.lstsq(design, z, rcond=None)[0]
    if not is_known:  # the typical target stands in for control
        median_k = np.median(expected[1:], 0)
        expected = np.vstack([expected[0] + median_k, expected[1:] - median_k])
    np.testing.assert_allclose(np.vstack([centre_k, shift_pk]), expected, atol=1e-8)
    left = z - design @ expected
    np.testing.assert_allclose(within_kk, left.T @ left / len(z), atol=1e-8)


def test_memory_does_not_grow_with_targets_times_cells():
    """Simulated: 20,000 cells of 2,000 targets; a dense design in double precision takes 320 MB."""
    rng = np.random.default_rng(0)
    target_n = np.r_[np.full(1000, -1), rng.integers(0, 2000, 19_000)]
    rows = np.flatnonzero(target_n >= 0)
    u_np = sparse.csr_matrix((np.ones(len(rows)), (rows, target_n[rows])), shape=(20_000, 2000))
    z_nk = torch.from_numpy(rng.normal(size=(20_000, 3)))
    z_nk[:, 2] += torch.from_numpy(2.0 * (target_n % 3 == 0))
    tracemalloc.start()
    try:
        sparse_rotation(z_nk, u_np, n_starts=1)
        block_rotation(z_nk, u_np, 1, variance_k=torch.zeros(3), n_starts=0)
        assert tracemalloc.get_traced_memory()[1] < 40e6
    finally:
        tracemalloc.stop()


def _scm_latents(seed: int):
    """Programmes of a simulated SCM, 7 invariant before 4 responsive, seen through a random linear map."""
    adata = latent_scm(n_genes=40, n_train=3000, n_test=1, n_combinations=1, seed=seed)
    cells = adata[adata.obs["split"] == "train"]
    truth = adata.uns["simulation"]
    z_nk = np.hstack([cells.obsm["z_invariant"], cells.obsm["z_responsive"]])
    u_np = cells.obs["target"].to_numpy()[:, None] == truth["perturbations"][None]
    rng = np.random.default_rng(seed)
    seen_nk = z_nk @ rng.normal(size=(11, 11)) + 3 * rng.normal(size=11)
    return z_nk, truth, torch.tensor(seen_nk, dtype=torch.float32), torch.tensor(u_np, dtype=torch.float32)


@pytest.mark.parametrize("seed", [0, 5, 6, 7])
def test_blocks_and_mechanisms_come_back(seed):
    z_nk, truth, seen_nk, u_np = _scm_latents(seed)
    turn = block_rotation(seen_nk, u_np, 7, variance_k=torch.zeros(11), seed=seed)
    found_nk = (seen_nk @ turn.map_kk.T + turn.offset_k).numpy()
    background = LinearRegression().fit(found_nk[:, :7], z_nk[:, :7])
    assert background.score(found_nk[:, :7], z_nk[:, :7]) > 0.95
    correlation, of_true, _ = _matched(z_nk[:, 7:], found_nk[:, 7:])
    assert correlation.min() > 0.9
    control_nk = found_nk[u_np.sum(1).numpy() == 0]
    assert np.abs(control_nk.mean(0)).max() < 1e-3
    np.testing.assert_allclose(np.cov(control_nk.T), np.eye(11), atol=1e-3)
    seen = turn.mechanisms
    true_of = np.argsort(of_true)  # the true programme of each one found
    np.testing.assert_array_equal(seen.altered_pv, truth["altered_pv"][:, true_of])
    shift_pv, closed_pv = seen.shift_pv.numpy(), ~seen.altered_pv.numpy()
    assert (shift_pv[closed_pv] == 0).all() and (seen.weight_pvk.numpy()[closed_pv] == 0).all()
    assert (turn.shift_pk[:, :7] == 0).all() and (turn.shift_pk[:, 7:] == seen.shift_pv).all()
    weight_ckk = truth["weight_ckk"][1:13, 7:, 7:][:, true_of][:, :, true_of]
    assert (weight_ckk[:, *np.tril_indices(4)] == 0).all()  # parents last


def test_a_mechanism_is_read_off_by_regression():
    """Two programmes with known mechanisms under one perturbation: the second acts on the first."""
    rng = np.random.default_rng(0)
    noise_nk = rng.normal(size=(8000, 3))
    u_np = np.repeat([[0.0], [1.0]], 4000, 0)
    last = noise_nk[:, 2]
    first = np.where(
        u_np[:, 0] > 0, 1.5 + 0.8 * last - 0.6 * noise_nk[:, 0] + 1.5 * noise_nk[:, 1], noise_nk[:, 1]
    )
    z_nk = np.column_stack([noise_nk[:, 0], first, last])
    turn = block_rotation(torch.tensor(z_nk), torch.tensor(u_np), 2, variance_k=torch.zeros(3))
    seen = turn.mechanisms  # one programme responds; the two that do not are one block
    assert seen.altered_pv.tolist() == [[True]]
    assert float(seen.shift_pv.abs()) == pytest.approx(1.5, abs=0.1)
    assert float(seen.log_scale_pv) == pytest.approx(np.log(1.5), abs=0.05)
    weight_k = seen.weight_pvk[0, 0]
    assert float(weight_k[:2].norm()) == pytest.approx(1.0, abs=0.06)  # .6 and .8, whatever the axes
    assert float(weight_k[2]) == 0 and bool((seen.edge_vk[0, :2] == (weight_k[:2].abs() > 0.2)).all())


def test_mechanisms_are_those_of_the_programmes_not_of_their_posterior_means():
    """Where x says little, means are pulled together under every perturbation: that is no mechanism."""
    rng = np.random.default_rng(0)
    variance_k = np.array([0.0, 0.6, 0.5])  # of the posterior
    z_nk = rng.normal(size=(12000, 3))
    u_np = np.eye(3)[np.repeat([0, 1, 2], 4000)][:, 1:]
    z_nk[:, 1] += u_np @ [2.0, 0.0]
    z_nk[:, 2] += u_np @ [0.0, 2.0]
    pulled_nk = z_nk - u_np @ [[0.0, 2.0, 0.0], [0.0, 0.0, 2.0]]
    noise_nk = rng.normal(size=z_nk.shape) * np.sqrt(variance_k * (1 - variance_k))
    seen_nk = z_nk - variance_k * pulled_nk + noise_nk  # posterior means, given the perturbation
    turn = block_rotation(torch.tensor(seen_nk), torch.tensor(u_np), 1, variance_k=torch.tensor(variance_k))
    seen = turn.mechanisms
    assert sorted(seen.altered_pv.int().tolist()) == [[0, 1], [1, 0]]
    assert float(seen.log_scale_pv.abs().max()) < 0.06
    assert float(seen.weight_pvk.abs().max()) < 0.06
    np.testing.assert_allclose(seen.shift_pv.abs().amax(1), [2.0, 2.0], atol=0.1)


def test_which_pairs_can_be_turned(build, linear_gaussian):
    assert can_rotate(*build(gates="posterior"))
    for gates in ("open", "closed", "sampled"):
        assert not can_rotate(*build(gates=gates))
    assert not can_rotate(linear_gaussian[0](6, 3), linear_gaussian[1](6, 3))


@pytest.mark.parametrize(
    ("settings", "turns"), [({}, True), ({"gates": "open"}, False), ({"alters": ["shift", "weight"]}, False)]
)
def test_which_pairs_with_blocks_can_be_turned(tiny_screen, settings, turns):
    pair = build_pair("weight-variant-scm", None, tiny_screen.dims(), {"n_hidden": 8, **settings})
    assert can_rotate(pair.model, pair.guide) == turns


def test_blocks_are_held_and_turned(tiny_screen, quick):
    """During the warm start nothing is gated or aligned; then the background is held."""
    sizes = {"n_invariant": 2, "n_responsive": 2, "n_hidden": 8}
    own = {k: v for k, v in quick.items() if k != "n_latents"} | {"epochs": 4, "warm_start": 2, **sizes}
    f = fit("weight-variant-scm", None, tiny_screen, **own)
    assert f.history["stage"].tolist() == ["warm start"] * 2 + ["training"] * 2
    held = f.history[f.history["stage"] == "warm start"]
    for site in ("gate_rate", "gate", "min_effect", "edge", "min_weight", "align"):
        assert (held[f"term_{site}"] == 0).all()
        assert (f.history[f"term_{site}"].iloc[2:] != 0).all()
    assert f.model.background_held and not f.guide.gates_held


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "gaussian"])
def test_turning_the_axes_leaves_the_likelihood_unchanged(build, batch, likelihood):
    model, guide = build(likelihood=likelihood, norm="batch")
    model.eval()
    z_nk = torch.randn(12, 4)
    before = model.measurement(z_nk, batch).log_prob(batch.x_ng)
    map_kk, offset_k = torch.randn(4, 4) + 2 * torch.eye(4), torch.randn(4)
    model.rotate(map_kk, offset_k)
    after = model.measurement(z_nk @ map_kk.T + offset_k, batch).log_prob(batch.x_ng)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_the_guide_takes_over_shifts_and_gates(build):
    _, guide = build(interactions=((0, 1),))
    guide.hold_gates_open(True)
    assert float(torch.sigmoid(guide.gate_logit).min()) > 0.999
    shift_pk = torch.tensor([[3.0, 0.1, 0.0, 0.0], [0.0, -2.5, 0.2, 0.0], [0.0, 0.0, 0.0, 0.3]])
    guide.rotate(Rotation(torch.eye(4), torch.zeros(4), shift_pk))
    guide.hold_gates_open(False)
    assert torch.equal(guide.shift_loc[:3].detach(), shift_pk)
    opened = torch.sigmoid(guide.gate_logit.detach()) > 0.5
    assert torch.equal(opened[:3], shift_pk.abs() > 1) and not bool(opened[3].any())
    assert all(p.requires_grad for p in guide.parameters())


def test_held_gates_do_not_move(tiny_screen, quick):
    """During the warm start gates stay open and their terms have no weight; then they are learned."""
    f = fit("sparse-shift", None, tiny_screen, gates="posterior", **quick | {"epochs": 4, "warm_start": 2})
    assert f.history["stage"].tolist() == ["warm start"] * 2 + ["training"] * 2
    held = f.history[f.history["stage"] == "warm start"]
    for site in ("term_edge_rate", "term_gate"):
        assert (held[site] == 0).all() and (f.history[site].iloc[2:] < 0).all()
    assert all(p.requires_grad for p in f.pair.parameters())
    logit = f.guide.gate_logit.detach()
    assert float(logit.max() - logit.min()) > 1  # no longer the value they were held at


def test_the_turned_pair_encodes_what_it_encoded(tiny_screen, quick):
    """Means of q(z) before and after the turn are one linear map apart."""
    f = fit("sparse-shift", None, tiny_screen, gates="posterior", intervention="ignored", **quick)
    split = random_cells(tiny_screen)
    batches = Minibatches(tiny_screen, split.train, 1000, shuffle=False)
    pair = Pair(f.model, f.guide)
    before, _ = encode(pair.guide, batches)["z"]
    turn = sparse_rotation(before, torch.from_numpy(tiny_screen.u(split.train)))
    f.model.rotate(turn.map_kk, turn.offset_k), f.guide.rotate(turn)
    after, _ = encode(pair.guide, batches)["z"]
    torch.testing.assert_close(after, before @ turn.map_kk.T + turn.offset_k, rtol=1e-3, atol=1e-3)
