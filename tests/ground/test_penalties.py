"""Penalties: what each factor adds to the model's log density."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.testing import assert_close

from pyro_causalcell.penalties import (
    alignment,
    beta_sparsity,
    contrast,
    edge_cost,
    mmd_by_group,
    potentials,
    sinkhorn_divergence,
    sliced_wasserstein,
    transport_cost,
)


def _factor(penalty, *arguments) -> torch.Tensor:
    trace = poutine.trace(lambda: penalty("site", *arguments)).get_trace()
    return trace.log_prob_sum()


def test_edge_cost_charges_each_open_edge():
    gate_pk = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 1.0]])
    torch.testing.assert_close(
        _factor(edge_cost, gate_pk, torch.tensor([10.0, 3.0])), torch.tensor(-(1.5 * 10 + 2 * 3))
    )


def test_beta_sparsity_is_the_beta_density_of_the_gates():
    gate_pk = torch.rand(3, 4).clamp(0.01, 0.99)
    expected = dist.Beta(1.0, 25.0).log_prob(gate_pk).sum()
    torch.testing.assert_close(_factor(beta_sparsity, gate_pk, 25.0), expected)


def test_beta_sparsity_is_finite_and_pulls_gates_down_at_the_ends():
    gate_pk = torch.tensor([[0.0, 0.5, 1.0]], requires_grad=True)
    value = _factor(beta_sparsity, gate_pk, 25.0)
    value.backward()
    assert bool(torch.isfinite(value)) and bool((gate_pk.grad[0, :2] < 0).all())


def test_alpha_of_one_asks_for_nothing():
    torch.testing.assert_close(_factor(beta_sparsity, torch.rand(3, 4), 1.0), torch.tensor(0.0))


def test_particles_get_one_penalty_each():
    gate_spk = torch.rand(5, 2, 3)
    trace = poutine.trace(lambda: edge_cost("site", gate_spk, torch.ones(2))).get_trace()
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["site"]["log_prob"], -gate_spk.sum((1, 2)))


def test_alignment_charges_squared_distances():
    loc_nl, control_nl = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    torch.testing.assert_close(_factor(alignment, loc_nl, control_nl, 0.5), torch.tensor(0.5 * (5 + 9)))


def test_contrast_charges_the_choice_among_the_pasts_of_a_group():
    score_nm = torch.tensor([[2.0, 1.0, 9.0], [0.0, 3.0, 9.0], [9.0, 9.0, 5.0]])
    pairs = score_nm[:2, :2]  # the third cell has nobody to be confused with
    right = pairs.log_softmax(1).diagonal() + pairs.log_softmax(0).diagonal()
    with pyro.plate("cells", 3):
        charged = _factor(contrast, score_nm, torch.tensor([0, 0, 4]), 10.0)
    torch.testing.assert_close(charged, 5 * right.sum())


def test_sliced_wasserstein_sorts_within_groups():
    generator = torch.Generator().manual_seed(0)
    loc_n1, control_n1 = (torch.randn(40, 1, generator=generator) for _ in range(2))
    group_n = torch.arange(40) % 4
    groups = [group_n == group for group in range(4)]
    sorted_pairs = [(loc_n1[g].sort(0).values - control_n1[g].sort(0).values).square() for g in groups]
    torch.testing.assert_close(
        sliced_wasserstein(loc_n1, control_n1, group_n), torch.cat(sorted_pairs).mean()
    )


def test_sliced_wasserstein_of_a_shift_is_its_squared_length():
    loc_nl = torch.randn(60, 3, generator=torch.Generator().manual_seed(1))
    group_n = torch.arange(60) // 20
    control_nl = torch.cat([loc_nl[rows].flip(0) for rows in torch.arange(60).split(20)])
    assert sliced_wasserstein(loc_nl, control_nl, group_n) == 0
    moved = sliced_wasserstein(loc_nl + torch.tensor([1.0, 2.0, 0.0]), control_nl, group_n, 20_000)
    torch.testing.assert_close(moved, torch.tensor(5.0), rtol=0.05, atol=0)


def test_mmd_by_group_is_the_u_statistic_of_each_group():
    generator = torch.Generator().manual_seed(1)
    x_nk = torch.randn(9, 2, generator=generator)
    y_mk = torch.randn(7, 2, generator=generator) + 1
    group_n = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1])

    def kernel(a, b):
        return torch.exp(-((a - b) ** 2).sum() / (2 * 3.0 * 2))

    def u_statistic(x, y):
        within_x = sum(kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j)
        within_y = sum(kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j)
        across = sum(kernel(a, b) for a in x for b in y)
        n, m = len(x), len(y)
        return within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * across / (n * m)

    expected = (4 * u_statistic(x_nk[:4], y_mk) + 5 * u_statistic(x_nk[4:], y_mk)) / 9
    torch.testing.assert_close(mmd_by_group(x_nk, group_n, y_mk, scales=(3.0,)), expected)
    group_m = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    expected = (4 * u_statistic(x_nk[:4], y_mk[:3]) + 5 * u_statistic(x_nk[4:], y_mk[3:])) / 9
    torch.testing.assert_close(mmd_by_group(x_nk, group_n, y_mk, group_m, (3.0,)), expected)


def test_mmd_counts_cells_without_company_as_zero():
    x_nk, group_n = torch.zeros(3, 2), torch.tensor([0, 1, 2])
    assert mmd_by_group(x_nk, group_n, torch.ones(5, 2)) == 0


def test_entropic_transport_agrees_with_pot():
    torch.manual_seed(0)
    ot = pytest.importorskip("ot")
    x_mk, y_sk = torch.randn(6, 2).double(), 1 + torch.randn(5, 2).double()
    cost_ms = transport_cost(x_mk, y_sk, 0.5)
    assert_close(cost_ms, torch.cdist(x_mk, y_sk) ** 2)
    f_m, g_s = potentials(cost_ms, 300)
    plan_ms = (f_m[:, None] + g_s - cost_ms).exp() / 30
    expected = ot.sinkhorn(torch.ones(6).double() / 6, torch.ones(5).double() / 5, cost_ms, 1.0)
    assert_close(plan_ms, expected, atol=1e-6, rtol=1e-4)


def test_unbalanced_transport_agrees_with_pot():
    torch.manual_seed(0)
    ot = pytest.importorskip("ot")
    cost_ms = transport_cost(torch.randn(6, 2).double(), 1 + torch.randn(5, 2).double(), 0.5)
    f_m, g_s = potentials(cost_ms, 300, unbalanced=2.0)
    plan_ms = (f_m[:, None] + g_s - cost_ms).exp() / 30
    weights = torch.ones(6).double() / 6, torch.ones(5).double() / 5
    expected = ot.unbalanced.sinkhorn_unbalanced(*weights, cost_ms, 1.0, (2.0, torch.inf), numItermax=3000)
    assert_close(plan_ms, expected, atol=1e-6, rtol=1e-4)


def test_unbalanced_transport_sees_that_some_grow():
    """Two groups of as many points; nine of ten points that they move to lie near the second."""
    torch.manual_seed(0)
    near_m1 = torch.tensor([-3.0] * 10 + [3.0] * 10)[:, None] + 0.1 * torch.randn(20, 1)
    near_s1 = torch.tensor([-3.0] * 2 + [3.0] * 18)[:, None] + 0.1 * torch.randn(20, 1)
    cost_ms = transport_cost(near_m1, near_s1, 0.5)

    def used_by_the_second(unbalanced: float | None) -> float:
        f_m, g_s = potentials(cost_ms, 300, unbalanced)
        plan_ms = (f_m[:, None] + g_s - cost_ms).exp() / 400
        assert_close(plan_ms.sum(0), torch.full((20,), 0.05), atol=1e-4, rtol=1e-3)  # all are reached
        return float(plan_ms[10:].sum())

    assert used_by_the_second(None) == pytest.approx(0.5, abs=0.01)
    assert used_by_the_second(1.0) == pytest.approx(0.9, abs=0.01)


def test_sinkhorn_divergence_is_zero_for_the_same_points_and_pulls_others_together():
    torch.manual_seed(0)
    x_mk = torch.randn(2, 8, 3)
    assert_close(sinkhorn_divergence(x_mk, x_mk.flip(1), 0.5), torch.zeros(2), atol=1e-4, rtol=0)
    far_mk = (x_mk + 3).requires_grad_()
    divergence_r = sinkhorn_divergence(far_mk, x_mk, 0.5)
    assert_close(divergence_r, torch.full((2,), 27.0), atol=0.1, rtol=0)  # |shift|^2 / 2 / blur
    (slope_rmk,) = torch.autograd.grad(divergence_r.sum(), far_mk)
    assert_close(slope_rmk.sum(1), torch.full((2, 3), 6.0), atol=0.1, rtol=0)
