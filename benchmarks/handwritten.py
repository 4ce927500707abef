"""The sparse shift pair's training loss, written by hand in torch for this one model."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Beta
from torch.nn.functional import logsigmoid

from pyro_causalcell.batch import Batch
from pyro_causalcell.distributions import _series_terms, _with_mean
from pyro_causalcell.guides.sparse_shift import SparseShiftGuide
from pyro_causalcell.models.sparse_shift import SparseShift

__all__ = ["FastNB", "hand_written"]


class FastNB(torch.autograd.Function):
    """log NB as a recorded step takes it: by series, with gradients worked out by hand."""

    @staticmethod
    def forward(ctx: Any, x_ng: Tensor, theta_g: Tensor, log_mean_ng: Tensor) -> Tensor:
        """log NB, shape n, g."""
        terms = _series_terms(x_ng, theta_g, True)
        log_prob_ng, by_log_mean_ng, by_theta_ng = _with_mean(*terms, x_ng, theta_g, log_mean_ng, True)
        ctx.save_for_backward(by_log_mean_ng, by_theta_ng)
        return log_prob_ng

    @staticmethod
    def backward(ctx: Any, grad_ng: Tensor) -> tuple[None, Tensor, Tensor]:
        """Gradients in θ, shape g, and log mean, shape n, g."""
        by_log_mean_ng, by_theta_ng = ctx.saved_tensors
        return None, (grad_ng * by_theta_ng).sum(0), grad_ng * by_log_mean_ng


def hand_written(model: SparseShift, guide: SparseShiftGuide, batch: Batch, fast: bool = False) -> Tensor:
    """Negative ELBO in nats per cell, without Pyro: one draw, every KL and gate expectation analytic.

    Args:
        model: Its decoder and parameters are used.
        guide: Its encoder and parameters are used.
        batch: A minibatch.
        fast: Take the likelihood that a recorded step takes, in place of dense ``lgamma``.
    """
    assert batch.x_ng is not None
    alpha, tau = model.alpha, model.shift_scale
    logit_pk: Tensor = guide.gate_logit
    shift_loc_pk: Tensor = guide.shift_loc
    shift_scale_pk: Tensor = guide.shift_scale_unconstrained.exp()
    gate_pk = logit_pk.sigmoid()
    a_pk, b_pk = 1 + gate_pk, alpha + 1 - gate_pk
    rate_pk = Beta(a_pk, b_pk, validate_args=False).rsample()
    shift_pk = shift_loc_pk + shift_scale_pk * torch.randn_like(shift_loc_pk)

    prior_loc_nk = batch.u_np @ (gate_pk * shift_pk)
    prior_var_nk = batch.u_np**2 @ (gate_pk * (1 - gate_pk) * shift_pk**2)
    loc_nk, scale_nk = guide.encoder(batch.x_ng, batch.batch_nb, prior_loc_nk)
    z_nk = loc_nk + scale_nk * torch.randn_like(loc_nk)
    logit_ng = model.decoder(z_nk, batch.batch_nb)

    total = a_pk.new_tensor(alpha + 2.0)
    kl_rate = torch.lgamma(total) - torch.lgamma(a_pk) - torch.lgamma(b_pk) - math.log(alpha)
    kl_rate = kl_rate + gate_pk * a_pk.digamma() + (1 - gate_pk) * b_pk.digamma()
    kl_rate = kl_rate - torch.digamma(total)
    kl_gate = gate_pk * (logsigmoid(logit_pk) - rate_pk.log())
    kl_gate = kl_gate + (1 - gate_pk) * (logsigmoid(-logit_pk) - torch.log1p(-rate_pk))
    kl_shift = (shift_scale_pk**2 + shift_loc_pk**2) / (2 * tau**2) - (shift_scale_pk / tau).log() - 0.5
    kl_shift = gate_pk * (kl_shift + model.cost_p.unsqueeze(-1))  # with the cost of an open edge
    kl_z = (scale_nk**2 + (loc_nk - prior_loc_nk) ** 2 + prior_var_nk - 1) / 2 - scale_nk.log()
    log_prob_ng = _log_likelihood(model, logit_ng, batch.x_ng, batch.library_n1, fast)
    per_cell = kl_z.sum(-1) - log_prob_ng.sum(-1)
    loss: Tensor = per_cell.mean() + (kl_rate + kl_gate + kl_shift).sum() / batch.n_total
    return loss


def _log_likelihood(
    model: SparseShift, logit_ng: Tensor, x_ng: Tensor, library_n1: Tensor, fast: bool
) -> Tensor:
    """log p(x | z), shape n, g."""
    if model.likelihood == "gaussian":
        log_scale_g: Tensor = model.scale_g_unconstrained
        residual_ng = (x_ng - logit_ng) * (-log_scale_g).exp()
        return -0.5 * residual_ng**2 - log_scale_g - 0.5 * math.log(2 * math.pi)
    log_mean_ng = library_n1.log() + logit_ng.log_softmax(-1)
    if model.likelihood == "poisson":
        return x_ng * log_mean_ng - log_mean_ng.exp() - torch.lgamma(x_ng + 1)
    log_theta_g: Tensor = model.theta_g_unconstrained
    theta_g = log_theta_g.exp()
    if fast:
        log_prob_ng: Tensor = FastNB.apply(x_ng, theta_g, log_mean_ng)
        return log_prob_ng
    log_sum_ng = (theta_g + log_mean_ng.exp()).log()
    counts_ng = torch.lgamma(x_ng + theta_g) - torch.lgamma(theta_g) - torch.lgamma(x_ng + 1)
    return counts_ng + theta_g * (log_theta_g - log_sum_ng) + x_ng * (log_mean_ng - log_sum_ng)
