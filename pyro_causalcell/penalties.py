"""Penalties that enter a pair as ``pyro.factor``: a few lines each, visible where they are used."""

import pyro
import torch
from torch import Tensor

__all__ = ["beta_sparsity", "edge_cost"]


def edge_cost(name: str, gate_pk: Tensor, cost_p: Tensor) -> None:
    """Charge each open edge a fixed number of nats.

    Args:
        name: Site name of the factor.
        gate_pk: Gates in [0, 1]: draws, or probabilities (then the factor is its expectation).
        cost_p: Nats for one open edge of each target, shape p.
    """
    pyro.factor(name, -(gate_pk * cost_p.unsqueeze(-1)).sum((-2, -1)))


def beta_sparsity(name: str, gate_pk: Tensor, alpha: float) -> None:
    """log Beta(gate; 1, alpha) summed over edges: the sparsity term of sVAE+ with its tied prior.

    Args:
        name: Site name of the factor.
        gate_pk: Gate probabilities, shape p, k.
        alpha: Second shape parameter; the paper recommends the number of targets.

    Source: Lopez et al., CLeaR 2023, Appendix B (psi fixed to the gate's mean).
    """
    alpha_t = torch.as_tensor(alpha, dtype=gate_pk.dtype, device=gate_pk.device)
    log_beta_pk = alpha_t.log() + (alpha_t - 1) * torch.log1p(-gate_pk.clamp(max=1 - 1e-6))
    pyro.factor(name, log_beta_pk.sum((-2, -1)))
