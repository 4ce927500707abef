"""Penalties that enter a pair as ``pyro.factor``: a few lines each, visible where they are used."""

import pyro
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

__all__ = ["alignment", "beta_sparsity", "edge_cost", "matched", "mmd_by_group"]


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


def matched(loc_nl: Tensor, control_nl: Tensor, group_n: Tensor) -> Tensor:
    """The control cells in the order in which, group by group, they lie nearest to the cells.

    The assignment that minimises the summed squared distance: the mean of what is left is the squared
    2-Wasserstein distance of the two sets of cells.

    Args:
        loc_nl: Posterior means of the cells.
        control_nl: Those of as many control cells.
        group_n: Condition of each cell; controls are assigned among the cells of one condition.

    Returns:
        Rows of ``control_nl``, shape n, l.
    """
    cost_nn = torch.cdist(loc_nl.detach(), control_nl.detach()).square().cpu()
    order_n = torch.arange(len(loc_nl))
    for group in group_n.unique():
        place_m = (group_n == group).nonzero().squeeze(1).cpu()
        cell_m, anchor_m = linear_sum_assignment(cost_nn[place_m][:, place_m].numpy())
        order_n[place_m[cell_m]] = place_m[anchor_m]
    return control_nl[order_n.to(control_nl.device)]


def mmd_by_group(
    x_nk: Tensor,
    group_n: Tensor,
    y_mk: Tensor,
    group_m: Tensor | None = None,
    scales: tuple[float, ...] = (0.25, 1.0, 4.0),
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

    Returns:
        A scalar.

    Source: Gretton et al., Journal of Machine Learning Research 13, 2012, equation 3.
    """
    own_nn = (group_n[:, None] == group_n).float().fill_diagonal_(0.0)
    if group_m is None:
        group_m = group_n.new_zeros(len(y_mk))
        cross_nm = x_nk.new_ones(len(x_nk), len(y_mk))
    else:
        cross_nm = (group_n[:, None] == group_m).float()
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
