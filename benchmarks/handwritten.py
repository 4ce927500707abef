"""Training losses of three pairs with their default gates, each written by hand in torch for one model.

Networks are the pair's own layers, called as one would write it: log1p of the counts, all inputs of a layer
as one matrix.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Beta
from torch.nn.functional import logsigmoid

from pyro_causalcell.batch import Batch
from pyro_causalcell.distributions import _series_terms, _with_mean
from pyro_causalcell.guides.sparse_shift import SparseShiftGuide
from pyro_causalcell.guides.temporal_scm import TemporalSCMGuide
from pyro_causalcell.guides.weight_variant_scm import WeightVariantSCMGuide
from pyro_causalcell.models.sparse_shift import SparseShift
from pyro_causalcell.models.temporal_scm import LEAST_SCALE, TemporalSCM
from pyro_causalcell.models.weight_variant_scm import WeightVariantSCM
from pyro_causalcell.nets import AdditiveMaps, Decoder, Encoder, JoinedLinear
from pyro_causalcell.penalties import mmd_by_group

__all__ = ["FastNB", "plain_layers", "sparse_shift", "temporal_scm", "weight_variant_scm"]


class FastNB(torch.autograd.Function):
    """log NB as a recorded step takes it: by series, with gradients worked out by hand."""

    @staticmethod
    def forward(ctx: Any, x_ng: Tensor, theta_g: Tensor, log_mean_ng: Tensor) -> Tensor:
        """log NB, shape n, g."""
        terms = _series_terms(x_ng, theta_g, True)
        log_prob_ng, by_log_mean_ng, by_theta_ng = _with_mean(*terms, x_ng, theta_g, log_mean_ng, True)
        ctx.save_for_backward(by_log_mean_ng, by_theta_ng.addcdiv_(by_log_mean_ng, theta_g, value=-1))
        return log_prob_ng

    @staticmethod
    def backward(ctx: Any, grad_ng: Tensor) -> tuple[None, Tensor, Tensor]:
        """Gradients in θ, shape g, and log mean, shape n, g."""
        by_log_mean_ng, by_theta_ng = ctx.saved_tensors
        return None, (grad_ng * by_theta_ng).sum(0), grad_ng * by_log_mean_ng


def sparse_shift(model: SparseShift, guide: SparseShiftGuide, batch: Batch, fast: bool = False) -> Tensor:
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
    loc_nk, scale_nk = _encode(guide.encoder, batch.x_ng, batch.batch_nb, prior_loc_nk)
    z_nk = loc_nk + scale_nk * torch.randn_like(loc_nk)
    logit_ng = _decode(model.decoder, z_nk, batch.batch_nb)

    kl_rate_and_gate = _kl_gates(logit_pk, rate_pk, alpha)
    kl_shift = _kl_normal(shift_loc_pk, shift_scale_pk, tau)
    kl_shift = gate_pk * (kl_shift + model.cost_p.unsqueeze(-1))  # with the cost of an open edge
    kl_z = (scale_nk**2 + (loc_nk - prior_loc_nk) ** 2 + prior_var_nk - 1) / 2 - scale_nk.log()
    log_prob_ng = _log_likelihood(model, logit_ng, batch.x_ng, batch.library_n1, fast)
    per_cell = kl_z.sum(-1) - log_prob_ng.sum(-1)
    loss: Tensor = per_cell.mean() + (kl_rate_and_gate + kl_shift.sum()) / batch.n_total
    return loss


def weight_variant_scm(
    model: WeightVariantSCM, guide: WeightVariantSCMGuide, batch: Batch, fast: bool = False
) -> Tensor:
    """Negative ELBO in nats per cell of the weight-variant pair, cells of one target or none.

    Args:
        model: Its decoder and parameters are used.
        guide: Its encoder and parameters are used.
        batch: A minibatch with control cells.
        fast: Take the likelihood that a recorded step takes, in place of dense ``lgamma``.
    """
    n, n_l = batch.n_cells, model.n_invariant
    gate_pv, open_vk = guide.gate_logit.sigmoid(), guide.edge_logit.sigmoid()
    edge_vk = open_vk * model.allowed_vk
    rate_pv = _rate(gate_pv, float(model.n_targets))
    shift_pv = _normal(guide.shift_loc, guide.shift_spread)
    log_scale_pv = _normal(guide.scale_loc, guide.scale_spread)
    weight_pvk = _normal(guide.weight_loc, guide.weight_spread)
    loc_nk, scale_nk, control_nk = _encoded(guide, batch)
    moved_nv = guide.adjust(batch.u_np @ (gate_pv * shift_pv))
    loc_nk = torch.cat([loc_nk[:, :n_l], loc_nk[:, n_l:] + moved_nv], 1)
    z_nl, z_nv = (_normal(loc_nk[:, part], scale_nk[:, part]) for part in (slice(n_l), slice(n_l, None)))
    z_nk = torch.cat([z_nl, z_nv], 1)

    dose_n1, target_n1 = batch.u_np.max(1, keepdim=True)
    target_n = target_n1.squeeze(1)
    gate_nv, shift_nv, weight_nvk = gate_pv[target_n], shift_pv[target_n], weight_pvk[target_n]
    ratio_nv = torch.exp(-2 * dose_n1 * log_scale_pv[target_n])
    precision_nv = 1 - gate_nv + gate_nv * ratio_nv
    tilted_nv = gate_nv * ratio_nv / precision_nv
    given_nv1, unsure_nv = (dose_n1 * tilted_nv).unsqueeze(-1), dose_n1**2 * tilted_nv * (1 - tilted_nv)
    mean_nvk = given_nv1 * weight_nvk
    caused_nv = (mean_nvk * edge_vk * z_nk.unsqueeze(1)).sum(-1)
    square_nv = (z_nv - caused_nv - given_nv1.squeeze(-1) * shift_nv) ** 2
    moved_nv = (weight_nvk * edge_vk * z_nk.unsqueeze(1)).sum(-1) + shift_nv
    by_edge_nvk = edge_vk * (1 - edge_vk) * (mean_nvk**2 + unsure_nv.unsqueeze(-1) * weight_nvk**2)
    square_nv = square_nv + unsure_nv * moved_nv**2 + (by_edge_nvk * z_nk.unsqueeze(1) ** 2).sum(-1)
    noise_nl = z_nl - z_nl @ model.weight_ll.triu(1).T
    log_scale_nv = batch.u_np @ (gate_pv * log_scale_pv)
    log_p_n = -(noise_nl**2).sum(1) / 2 - (log_scale_nv + precision_nv * square_nv / 2).sum(1)
    log_q_n = -(((z_nk - loc_nk) / scale_nk) ** 2 / 2 + scale_nk.log()).sum(1)

    open_pvk = gate_pv.unsqueeze(-1) * open_vk
    kl = _kl_gates(guide.gate_logit, rate_pv, float(model.n_targets)) + _kl_gate(guide.edge_logit, 0.5).sum()
    kl = kl + (gate_pv * _kl_normal(guide.shift_loc, guide.shift_spread, model.shift_scale)).sum()
    kl = kl + (gate_pv * _kl_normal(guide.scale_loc, guide.scale_spread, 0.5)).sum()
    kl = kl + (open_pvk * _kl_normal(guide.weight_loc, guide.weight_spread, 1.0)).sum()
    kl = kl + model.min_effect**2 / 2 * (model.cells_p @ gate_pv).sum()
    kl = kl + model.min_weight**2 / 2 * ((model.cells_p @ gate_pv.detach()).unsqueeze(1) * edge_vk).sum()
    distance = mmd_by_group(loc_nk[:, :n_l], batch.condition_n, control_nk[:, :n_l])
    log_x_n = _log_x(model, z_nk, batch, fast)
    loss: Tensor = (log_q_n - log_p_n - log_x_n).sum() / n + guide.alpha * distance + kl / batch.n_total
    return loss


def temporal_scm(model: TemporalSCM, guide: TemporalSCMGuide, batch: Batch, fast: bool = False) -> Tensor:
    """Negative ELBO in nats per cell of the temporal pair.

    For cells of one target or none, snapshots one step apart, and a memory that knows all of them.

    Args:
        model: Its decoder, maps, memory and parameters are used; the memory is renewed.
        guide: Its encoder and parameters are used.
        batch: A minibatch with times and control cells.
        fast: Take the likelihood that a recorded step takes, in place of dense ``lgamma``.
    """
    assert batch.time_n is not None
    n, n_l, n_times = batch.n_cells, model.n_invariant, len(model.times_t)
    gate_pv, cut_pv, open_vk = (getattr(guide, f"{name}_logit").sigmoid() for name in ("gate", "cut", "edge"))
    edge_vk = open_vk * model.allowed_vk * (1 - model.own_vk) + model.own_vk
    rate_pv = _rate(gate_pv, float(model.n_targets))
    names = ("shift", "log_scale", "start", "weight")
    normals = {name: (getattr(guide, f"{name}_loc"), getattr(guide, f"{name}_spread")) for name in names}
    shift_pv, log_scale_pv, start_pv, weight_vk = (_normal(*normals[name]) for name in names)
    loc_nk, scale_nk, control_nk = _encoded(guide, batch)
    z_nl, z_nv = (_normal(loc_nk[:, part], scale_nk[:, part]) for part in (slice(n_l), slice(n_l, None)))
    z_nk = torch.cat([z_nl, z_nv], 1)

    time_n = (model.times_t - batch.time_n.unsqueeze(1)).abs().argmin(1)
    place_r, situation_n = torch.unique(batch.condition_n * n_times + time_n, return_inverse=True)
    condition_r, time_r = place_r // n_times, place_r % n_times
    u_rp = torch.eye(model.n_targets + 1, dtype=z_nk.dtype)[condition_r, 1:]
    past_rmk = model.memory_ctmk[condition_r, (time_r - 1).clamp(min=0)]  # as many as are looked at
    start_rk = torch.cat([z_nk.new_zeros(len(place_r), n_l), u_rp @ start_pv], 1)
    torch.randn_like(past_rmk[0])  # pasts of the first snapshot, which has none

    past_rkm = past_rmk.mT.contiguous()
    past_rlm = past_rkm[:, :n_l]
    loc_rlm = _times(model.invariant_weight_ll, past_rlm)
    bent_rlm = _bends(model.invariant_map, past_rlm)
    loc_rlm = loc_rlm + _times(model.invariant_map.size_oib.flatten(1), bent_rlm.flatten(1, 2))
    loc_rml = model.invariant_offset_l + loc_rlm.mT
    part_rkfm = torch.cat([_bends(model.responsive_map, past_rkm), past_rkm.unsqueeze(2)], 2)
    slope_vkf = torch.cat([model.responsive_map.size_oib, weight_vk.unsqueeze(-1)], -1)
    pushed_rvm = _times((edge_vk.unsqueeze(-1) * slope_vkf).flatten(1), part_rkfm.flatten(1, 2))
    pushed_rmv = model.responsive_offset_v + pushed_rvm.mT
    product_rkff = part_rkfm @ part_rkfm.mT / part_rkfm.shape[-1]
    slopes_vkff = slope_vkf.unsqueeze(-1) * slope_vkf.unsqueeze(-2)
    slopes_vkff = (edge_vk * (1 - edge_vk))[..., None, None] * slopes_vkff
    unsure_rv = product_rkff.flatten(1) @ slopes_vkff.flatten(1).T
    dose_rp1 = u_rp.unsqueeze(-1)
    keep_r1v = (1 - dose_rp1 * cut_pv).prod(1, keepdim=True)
    ratio_rpv = torch.exp(-2 * dose_rp1 * log_scale_pv)
    tilted_rpv = gate_pv * ratio_rpv / (1 - gate_pv + gate_pv * ratio_rpv)
    shift_r1v = (dose_rp1 * tilted_rpv * shift_pv).sum(1, keepdim=True)
    shift_var_rv = (dose_rp1**2 * tilted_rpv * (1 - tilted_rpv) * shift_pv**2).sum(1)
    keep_rv, square_rv = keep_r1v.squeeze(1), (pushed_rmv**2).mean(1)
    variance_rv = keep_rv * (square_rv + unsure_rv) - keep_rv**2 * square_rv
    is_start_r1 = time_r.unsqueeze(1) == 0
    slack_rv = torch.where(is_start_r1, 0.0, variance_rv + shift_var_rv)
    loc_rmk = torch.cat([loc_rml, keep_r1v * pushed_rmv + shift_r1v], -1)
    loc_rmk = torch.where(is_start_r1.unsqueeze(1), start_rk.unsqueeze(1), loc_rmk)
    log_scale_l, log_scale_v = (
        torch.logaddexp(part, torch.full_like(part, LEAST_SCALE).log())
        for part in (model.invariant_log_scale_l, model.responsive_log_scale_v)
    )
    log_scale_rv = log_scale_v + u_rp @ (gate_pv * log_scale_pv)
    log_scale_rk = torch.cat([log_scale_l.expand(len(place_r), -1), log_scale_rv], 1)
    log_scale_rk = torch.where(is_start_r1, 0.0, log_scale_rk)
    mean_rk = loc_rmk.mean(1)
    left_rmk = loc_rmk - mean_rk.unsqueeze(1)
    between_rkk = left_rmk.mT @ left_rmk / (left_rmk.shape[1] - 1)
    root_rkk = torch.linalg.cholesky(between_rkk + torch.diag_embed(torch.exp(2 * log_scale_rk)))
    # by situations: inverse roots are few, cells are many
    identity_kk = torch.eye(z_nk.shape[1], dtype=z_nk.dtype).expand_as(root_rkk)
    inverse_rkk = torch.linalg.solve_triangular(root_rkk, identity_kk, upper=False)
    charge_r = (inverse_rkk[:, n_l:, n_l:].square().sum(1) * slack_rv).sum(1) / 2
    charge_r = charge_r + root_rkk.diagonal(dim1=1, dim2=2).log().sum(1)
    noise_nk = (inverse_rkk[situation_n] @ (z_nk - mean_rk[situation_n]).unsqueeze(-1)).squeeze(-1)
    log_p_n = -(noise_nk**2).sum(1) / 2 - charge_r[situation_n]
    log_q_n = -(((z_nk - loc_nk) / scale_nk) ** 2 / 2 + scale_nk.log()).sum(1)
    with torch.no_grad():
        slot_n = torch.randint(model.memory_ctmk.shape[2], (n,))
        model.memory_ctmk[batch.condition_n, time_n, slot_n] = z_nk

    kl = _kl_gates(guide.gate_logit, rate_pv, float(model.n_targets))
    kl = kl + _kl_gate(guide.cut_logit, 0.1).sum() + _kl_gate(guide.edge_logit, 0.5).sum()
    widths = (model.shift_scale, 0.5, model.shift_scale, 1.0)
    weights = (gate_pv, gate_pv, 1.0, open_vk)
    for name, width, weight in zip(names, widths, weights, strict=True):
        kl = kl + (weight * _kl_normal(*normals[name], width)).sum()
    kl = kl + model.min_effect**2 / 2 * (model.cells_p @ gate_pv).sum()
    kl = kl + model.min_weight**2 / 2 * ((model.cells_p @ cut_pv).sum() + model.n_cells * edge_vk.sum())
    group_n = batch.condition_n * n_times + time_n
    distance = mmd_by_group(loc_nk[:, :n_l], group_n, control_nk[:, :n_l], time_n, pool_n=time_n)
    log_x_n = _log_x(model, z_nk, batch, fast)
    loss: Tensor = (log_q_n - log_p_n - log_x_n).sum() / n + guide.alpha * distance + kl / batch.n_total
    return loss


def _times(left_oi: Tensor, x_rim: Tensor) -> Tensor:
    """left @ x of each situation."""
    return torch.bmm(left_oi.expand(len(x_rim), -1, -1), x_rim)


def _bends(maps: AdditiveMaps, x_rim: Tensor) -> Tensor:
    """What bent effects are made of, shape r, i, b, m."""
    slope_ib1, place_ib1 = maps.slope_ib.unsqueeze(-1), maps.place_ib.unsqueeze(-1)
    return torch.tanh(slope_ib1 * (x_rim.unsqueeze(2) - place_ib1))


def _rate(gate_pk: Tensor, alpha: float) -> Tensor:
    """A draw of the rates of gates."""
    draw: Tensor = Beta(1 + gate_pk, alpha + 1 - gate_pk, validate_args=False).rsample()
    return draw


def _normal(loc: Tensor, scale: Tensor) -> Tensor:
    return loc + scale * torch.randn_like(loc)


def _encoded(guide: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Location and scale of the cells, location of their control cells."""
    assert batch.x_ng is not None and batch.control is not None and batch.control.x_ng is not None
    x_ng = torch.cat([batch.x_ng, batch.control.x_ng])
    loc, scale = _encode(guide.encoder, x_ng, torch.cat([batch.batch_nb, batch.control.batch_nb]))
    return loc[: batch.n_cells], scale[: batch.n_cells], loc[batch.n_cells :]


def _encode(encoder: Encoder, x_ng: Tensor, *extra: Tensor) -> tuple[Tensor, Tensor]:
    """Location and scale of z."""
    hidden = _hidden(encoder.hidden, torch.log1p(x_ng) if encoder.log_input else x_ng, *extra)
    return encoder.loc(hidden), encoder.log_scale(hidden).exp() + encoder.min_scale


def _decode(decoder: Decoder, *parts: Tensor) -> Tensor:
    """Logits of the genes."""
    logit_ng: Tensor = decoder.output(_hidden(decoder.hidden, *parts))
    return logit_ng


def _hidden(net: Any, *parts: Tensor) -> Tensor:
    """Hidden units, of one input."""
    first, *others = net.layers
    if isinstance(first, JoinedLinear):
        weight, bias = torch.cat([first.first.weight, first.extra.weight], 1), first.first.bias
    else:
        weight, bias = first.weight, first.bias
    hidden = nn.functional.linear(torch.cat(parts, -1), weight, bias)
    for layer in others:
        hidden = layer(hidden)
    return hidden


def plain_layers(guide: nn.Module) -> nn.Module:
    """A copy of a guide, the first layer of its encoder a plain one: so is it written by hand."""
    guide = copy.deepcopy(guide)
    layers: Any = guide.encoder.hidden.layers  # type: ignore[union-attr]
    if isinstance(layers[0], JoinedLinear):
        weight_oi = torch.cat([layers[0].first.weight, layers[0].extra.weight], 1)
        plain = nn.Linear(weight_oi.shape[1], weight_oi.shape[0])
        plain.weight.data, plain.bias.data = weight_oi.data, layers[0].first.bias.data
        layers[0] = plain
    return guide


def _kl_gates(logit_pk: Tensor, rate_pk: Tensor, alpha: float) -> Tensor:
    """KL of gates and their rates, summed."""
    gate_pk = logit_pk.sigmoid()
    a_pk, b_pk = 1 + gate_pk, alpha + 1 - gate_pk
    total = a_pk.new_tensor(alpha + 2.0)
    kl_rate = torch.lgamma(total) - torch.lgamma(a_pk) - torch.lgamma(b_pk) - math.log(alpha)
    kl_rate = kl_rate + gate_pk * a_pk.digamma() + (1 - gate_pk) * b_pk.digamma()
    kl_rate = kl_rate - torch.digamma(total)
    kl_gate = gate_pk * (logsigmoid(logit_pk) - rate_pk.log())
    kl_gate = kl_gate + (1 - gate_pk) * (logsigmoid(-logit_pk) - torch.log1p(-rate_pk))
    return (kl_rate + kl_gate).sum()


def _kl_gate(logit: Tensor, rate: float) -> Tensor:
    """KL of gates whose prior rate is fixed."""
    gate = logit.sigmoid()
    closed = (1 - gate) * (logsigmoid(-logit) - math.log(1 - rate))
    return gate * (logsigmoid(logit) - math.log(rate)) + closed


def _kl_normal(loc: Tensor, scale: Tensor, width: float) -> Tensor:
    """KL of a normal from one around 0."""
    return (scale**2 + loc**2) / (2 * width**2) - (scale / width).log() - 0.5


def _log_x(model: Any, z_nk: Tensor, batch: Batch, fast: bool) -> Tensor:
    """log p(x | z) of each cell."""
    assert batch.x_ng is not None
    logit_ng = _decode(model.decoder, z_nk, batch.batch_nb)
    return _log_likelihood(model, logit_ng, batch.x_ng, batch.library_n1, fast).sum(-1)


def _log_likelihood(model: Any, logit_ng: Tensor, x_ng: Tensor, library_n1: Tensor, fast: bool) -> Tensor:
    """log p(x | z), shape n, g."""
    if model.scale_g is not None:
        log_scale_g: Tensor = model.scale_g_unconstrained
        residual_ng = (x_ng - logit_ng) * (-log_scale_g).exp()
        return -0.5 * residual_ng**2 - log_scale_g - 0.5 * math.log(2 * math.pi)
    log_mean_ng = library_n1.log() + logit_ng.log_softmax(-1)
    if model.theta_g is None:
        return x_ng * log_mean_ng - log_mean_ng.exp() - torch.lgamma(x_ng + 1)
    if model.zero_logit_g is None:
        return _log_nb(model, log_mean_ng, x_ng, fast)
    log_lost_g, log_kept_g = logsigmoid(model.zero_logit_g), logsigmoid(-model.zero_logit_g)
    kept_ng = log_kept_g + _log_nb(model, log_mean_ng - log_kept_g, x_ng, fast)
    return torch.where(x_ng == 0, torch.logaddexp(log_lost_g, kept_ng), kept_ng)


def _log_nb(model: Any, log_mean_ng: Tensor, x_ng: Tensor, fast: bool) -> Tensor:
    """log NB, shape n, g."""
    log_theta_g: Tensor = model.theta_g_unconstrained
    theta_g = log_theta_g.exp()
    if fast:
        log_prob_ng: Tensor = FastNB.apply(x_ng, theta_g, log_mean_ng)
        return log_prob_ng
    log_sum_ng = (theta_g + log_mean_ng.exp()).log()
    counts_ng = torch.lgamma(x_ng + theta_g) - torch.lgamma(theta_g) - torch.lgamma(x_ng + 1)
    return counts_ng + theta_g * (log_theta_g - log_sum_ng) + x_ng * (log_mean_ng - log_sum_ng)
