"""Penalties: what each factor adds to the model's log density."""

import pyro.distributions as dist
import torch
from pyro import poutine

from pyro_causalcell.penalties import beta_sparsity, edge_cost


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
