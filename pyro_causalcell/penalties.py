"""Penalties that enter a pair as ``pyro.factor``: a few lines each, visible where they are used."""

import math

import pyro
import torch
from torch import Tensor

__all__ = [
    "alignment",
    "beta_sparsity",
    "contrast",
    "edge_cost",
    "mmd_by_group",
    "potentials",
    "sinkhorn_divergence",
    "sliced_wasserstein",
    "transport_cost",
]


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


def alignment(name: str, loc_nl: Tensor, control_nl: Tensor, weight: float) -> None:
    """Charge a cell the squared distance of its invariant programmes from a control cell's; in a guide.

    Call it inside the plate over cells.

    Args:
        name: Site name of the factor.
        loc_nl: Posterior means of the cells.
        control_nl: Those of the control cell that each is compared with.
        weight: Nats for a squared distance of 1 (α).

    Source: cDAG-VAE (submitted to ICLR 2026), equation 8.
    """
    distance_n = (loc_nl - control_nl).square().sum(-1)
    pyro.factor(name, weight * distance_n, has_rsample=True)  # a guide's factor counts as log q: a cost


def contrast(name: str, score_nm: Tensor, group_n: Tensor, weight: float) -> None:
    """Charge a cell for how hard its own past is to tell from those of the cells of its group.

    What is charged is the cross-entropy of the choice, and that of the choice of its cell for each past. On
    average over cells it is the logarithm of their number less a lower bound on what a past and a cell say of
    each other. Call it inside the plate over cells.

    Args:
        name: Site name of the factor.
        score_nm: How likely each cell n is after the past of each cell m: a log density.
        group_n: Group of each cell; cells of a group of their own are charged nothing.
        weight: Nats charged for a nat.

    Source: van den Oord et al., arXiv 1807.03748, equation 4.
    """
    score_nm = score_nm.masked_fill(group_n[:, None] != group_n, -math.inf)
    own_n = score_nm.diagonal(dim1=-2, dim2=-1)
    pyro.factor(name, weight * (own_n - (score_nm.logsumexp(-2) + score_nm.logsumexp(-1)) / 2))


def sliced_wasserstein(loc_nl: Tensor, control_nl: Tensor, group_n: Tensor, n_directions: int = 32) -> Tensor:
    """Squared distance between the cells of each condition and their anchors, matched by optimal transport.

    Along random directions transport is sorting: no pairs are needed, only that each condition has as many
    anchors as cells.

    Args:
        loc_nl: Cells.
        control_nl: As many control cells.
        group_n: Condition of each cell, and of the control cell of the same row.
        n_directions: Random directions, new ones in each call.

    Returns:
        A scalar: the mean over cells and directions of the squared distance, in all l dimensions.

    Source: Bonneel et al., Journal of Mathematical Imaging and Vision 51, 2015, section 3.
    """
    direction_ld = torch.randn(loc_nl.shape[-1], n_directions, device=loc_nl.device)
    direction_ld = direction_ld / direction_ld.norm(dim=0)
    sorted_nd = (_sorted_by_group(a @ direction_ld, group_n) for a in (loc_nl, control_nl))
    return (next(sorted_nd) - next(sorted_nd)).square().mean() * loc_nl.shape[-1]


def _sorted_by_group(value_nd: Tensor, group_n: Tensor) -> Tensor:
    """Groups one after another, each sorted."""
    by_value_nd = value_nd.sort(0).indices
    order_nd = by_value_nd.gather(0, group_n[by_value_nd].sort(dim=0, stable=True).indices)
    return value_nd.gather(0, order_nd)


def transport_cost(x_mk: Tensor, y_sk: Tensor, blur: float) -> Tensor:
    """Half the squared distance of every pair, over the blur of entropic transport, shape (..., m, s)."""
    squares_ms = (x_mk**2).sum(-1).unsqueeze(-1) + (y_sk**2).sum(-1).unsqueeze(-2) - 2 * x_mk @ y_sk.mT
    return squares_ms / (2 * blur)


@torch.no_grad()
def potentials(cost_ms: Tensor, n_steps: int = 30, unbalanced: float | None = None) -> tuple[Tensor, Tensor]:
    """Dual potentials f and g of entropic transport between two sets of points of equal weights.

    The plan is exp(f + g - cost) / (m s).

    Args:
        cost_ms: Costs over the blur, shape (..., m, s).
        unbalanced: Price, over the blur, of a nat by which the first points are not used each alike; None
            demands that they are. The second points are all reached.
        n_steps: Sinkhorn's steps; their number is fixed, so that a step of training can be recorded.

    Returns:
        f, shape (..., m), and g, shape (..., s).

    Source: Peyré and Cuturi, Computational optimal transport, 2019, section 4.4 (log domain); unbalanced:
    Chizat et al., Mathematics of Computation 87, 2018.
    """
    damping = 1.0 if unbalanced is None else unbalanced / (1 + unbalanced)
    g_s = torch.zeros_like(cost_ms[..., 0, :])
    n_m, n_s = cost_ms.shape[-2:]
    for _ in range(n_steps):
        f_m = damping * (math.log(n_s) - (g_s.unsqueeze(-2) - cost_ms).logsumexp(-1))
        g_s = math.log(n_m) - (f_m.unsqueeze(-1) - cost_ms).logsumexp(-2)
    return f_m, g_s


def sinkhorn_divergence(x_mk: Tensor, y_sk: Tensor, blur: float) -> Tensor:
    """Sinkhorn divergence between sets of points, lower is better: 0 where they are the same, shape (...).

    In units of the blur. The plans take no part in the gradient, which they need not near the optimum.

    Args:
        x_mk: Points, shape (..., m, k).
        y_sk: Points, shape (..., s, k).
        blur: Weight of the entropy, a squared distance.

    Source: Feydy et al., AISTATS 2019, equation 3.
    """

    def cost(a_mk: Tensor, b_sk: Tensor) -> Tensor:
        cost_ms = transport_cost(a_mk, b_sk, blur)
        f_m, g_s = potentials(cost_ms)
        plan_ms = (f_m.unsqueeze(-1) + g_s.unsqueeze(-2) - cost_ms.detach()).exp()
        # the plan's entropy is a part of the cost, without a gradient
        entropy = (f_m.mean(-1) + g_s.mean(-1)) - (plan_ms * cost_ms.detach()).mean((-2, -1))
        return (plan_ms * cost_ms).mean((-2, -1)) + entropy

    return cost(x_mk, y_sk) - (cost(x_mk, x_mk) + cost(y_sk, y_sk)) / 2


def mmd_by_group(
    x_nk: Tensor,
    group_n: Tensor,
    y_mk: Tensor,
    group_m: Tensor | None = None,
    scales: tuple[float, ...] = (0.25, 1.0, 4.0),
    pool_n: Tensor | None = None,
) -> Tensor:
    """Squared maximum mean discrepancy between the cells of each group, averaged over the cells of x.

    The unbiased estimate: it may be negative. Cells whose group has less than two cells on either side
    count as zero.

    Args:
        x_nk: Cells.
        group_n: Group of each.
        y_mk: Cells they are compared with.
        group_m: Group of each; None compares every group with all of y.
        scales: Squared bandwidths of the Gaussian kernels that are averaged, in units of the number of
            dimensions k, for coordinates of unit variance.
        pool_n: Which group of y the group of each cell of x is compared with; the one of the same number if
            None.

    Returns:
        A scalar.

    Source: Gretton et al., Journal of Machine Learning Research 13, 2012, equation 3.
    """
    own_nn = (group_n[:, None] == group_n).float().fill_diagonal_(0.0)
    if group_m is None:
        group_m = group_n.new_zeros(len(y_mk))
        cross_nm = x_nk.new_ones(len(x_nk), len(y_mk))
    else:
        pool_n = group_n if pool_n is None else pool_n
        cross_nm = (pool_n[:, None] == group_m).float()
    own_mm = (group_m[:, None] == group_m).float().fill_diagonal_(0.0)
    within_n = _mean_where(_kernel(x_nk, x_nk, scales), own_nn)
    across_n = _mean_where(_kernel(x_nk, y_mk, scales), cross_nm)
    within_m = _mean_where(_kernel(y_mk, y_mk, scales), own_mm)
    value_n = within_n - 2 * across_n + _mean_where(within_m.expand_as(cross_nm), cross_nm)
    enough_n = (own_nn.sum(1) > 0) & (cross_nm.sum(1) > 1)
    return torch.where(enough_n, value_n, 0.0).mean()


def _mean_where(value_nm: Tensor, chosen_nm: Tensor) -> Tensor:
    return (value_nm * chosen_nm).sum(1) / chosen_nm.sum(1).clamp(min=1.0)


def _kernel(x_nk: Tensor, y_mk: Tensor, scales: tuple[float, ...]) -> Tensor:
    squares_nm = (x_nk**2).sum(1)[:, None] + (y_mk**2).sum(1) - 2 * x_nk @ y_mk.T
    widths = (s * x_nk.shape[1] for s in scales)
    return torch.stack([torch.exp(-squares_nm / (2 * w)) for w in widths]).mean(0)
