"""Axes for programmes that evolve: blocks, lagged effects and changes read off the moments of snapshots."""

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from pyro_causalcell.batch import LaggedMechanisms, Rotation
from pyro_causalcell.inference.warm_start import (
    distinct_designs,
    inverse_root,
    refine,
    rows_of,
    single_precision,
    unchanged_first,
)

__all__ = ["lagged_rotation"]

ALTERED_ABOVE, RESCALED_ABOVE, CUT_ABOVE = 0.4, 0.25, 0.5
"""Shifts and changes of the log standard deviation that count, and the share of the parents' effect cut."""
SHARPEST = 0.15
"""Width of the penalty on shifts at the end: what is much larger costs log(n) / 2, whatever its size."""
CLEAR_CUT = 5.0
"""How many times its expectation the statistic of a test for dependence on the background must be."""
ROUNDS = 5
"""Lagged effects and axes are found in turns: robust regression needs the axes, the axes need the effects."""
STEPS = (500, 900)
"""Gradient steps of all starts, and of the best one."""
MOST_CANDIDATES, CANDIDATES_KEPT, PASSES = 40, 4, 5
"""Cuts that are tried in a pass of the search, how many of them are looked at more closely, and passes."""
SHORT_STEPS, LONG_STEPS = 60, 300
"""Gradient steps of a candidate, and of one that is looked at more closely."""
LEAST_GAIN = 1e-4
"""Nats per cell by which a fit must be better to take the place of another."""
RIDGE = 1e-3
"""Ridge of the regression of means on earlier means, as a share of their sum of squares."""


class _Snapshots(NamedTuple):
    """Moments of the cells of each condition c at each time t; not a number where there are few cells.

    Where it is known when perturbations began to act, steps are those that lead to each snapshot from the one
    before, the first one from then on: how many, and how long each is in units.
    """

    design_cp: np.ndarray
    size_ct: np.ndarray
    mean_ctk: np.ndarray
    covariance_ctkk: np.ndarray
    steps: list[tuple[int, float]] | None

    def later(self) -> np.ndarray:
        """Which conditions were seen after the first snapshot, bool c."""
        known_c: np.ndarray = np.isfinite(self.mean_ctk[:, 1:]).all(-1).any(1)
        return known_c

    def mapped(self, map_jk: np.ndarray) -> "_Snapshots":
        return self._replace(
            mean_ctk=self.mean_ctk @ map_jk.T, covariance_ctkk=map_jk @ self.covariance_ctkk @ map_jk.T
        )


def lagged_rotation(
    z_nk: Tensor,
    u_np: Tensor | sparse.csr_matrix,
    time_n: Tensor,
    n_invariant: int,
    *,
    variance_k: Tensor,
    onset: float | None = None,
    n_starts: int = 12,
    seed: int = 0,
) -> Rotation:
    """Find axes of which some are untouched by perturbations, while few mechanisms of the rest change.

    Invariant programmes are those whose law under every perturbation is control's at the same time. For the
    others a linear temporal SCM is fitted to the moments of the snapshots: from one snapshot of a condition
    to the next, mean and covariance follow m' = F(u) m + b + s(u) and C' = F(u) C F(u)ᵀ + Q(u). The axes are
    part of the fit, as are shifts, changes of noise, cuts and lagged effects, which a penalty keeps few. What
    the background contributes to a responsive programme would be open if no perturbation cut the programme
    off its parents.

    The fit starts from the regression of differences from control, d' = F d + s, with an intercept for each
    condition, turned until the shifts are sparse. Gradient descent seldom finds a cut that it overlooked, as
    the axes then hold a share of the background in its place. So cuts are tried one by one afterwards, each
    with the axes that it asks for, and kept where they improve the fit.

    Args:
        z_nk: Posterior means of the training cells.
        u_np: Their design, dense or sparse; control cells are zero.
        time_n: Their times.
        n_invariant: Invariant programmes l.
        variance_k: Average posterior variance of each latent, which the means do not show.
        onset: When perturbations began to act, not after the first snapshot; None if it is not known.
        n_starts: Starts of the fit; the best one is kept.
        seed: Seed of the starts.

    Returns:
        The map, the offset, the shifts of all programmes, and the lagged mechanisms. Control cells have
        standard deviations of 1 at the first snapshot, and means of 0 at the onset, or else there.
    """
    z = z_nk.double().cpu().numpy()
    extra_kk = np.diag(variance_k.double().cpu().numpy())
    seen = _moments(z, u_np, time_n.cpu().numpy(), extra_kk, onset)
    centre_k = seen.mean_ctk[0, 0].copy()
    seen = seen._replace(mean_ctk=seen.mean_ctk - centre_k)
    whiten_kk = inverse_root(seen.covariance_ctkk[0, 0])
    map_kk = _blocks(seen.mapped(whiten_kk), n_invariant).T @ whiten_kk
    found = _MomentFit.best(seen.mapped(map_kk), n_invariant, n_starts, np.random.default_rng(seed))
    map_kk = found.map_kk() @ map_kk
    seen = seen.mapped(map_kk)
    sd_k = np.sqrt(np.diagonal(seen.covariance_ctkk[0, 0]))
    map_kk, sd_v = map_kk / sd_k[:, None], sd_k[n_invariant:]
    start_cv = (seen.mean_ctk[1:, 0] - seen.mean_ctk[0, 0])[:, n_invariant:] / sd_v
    shift_pv, cut_pv = found["shift_pv"] / sd_v, found.cut() > CUT_ABOVE
    log_scale_pv = found["log_scale_pv"]
    altered_pv = (np.abs(shift_pv) > ALTERED_ABOVE) | (np.abs(log_scale_pv) > RESCALED_ABOVE)
    mechanisms = LaggedMechanisms(
        torch.as_tensor(altered_pv),
        single_precision(np.where(altered_pv, shift_pv, 0.0)),
        single_precision(np.where(altered_pv, log_scale_pv, 0.0)),
        torch.as_tensor(cut_pv),
        single_precision(_by_target(seen.design_cp[1:], start_cv)),
        single_precision(found["weight_vk"] * sd_k / sd_v[:, None]),
    )
    shift_pk = np.pad(shift_pv, ((0, 0), (n_invariant, 0)))
    offset_k = -map_kk @ centre_k - found["origin_k"] / sd_k
    axes = (single_precision(part) for part in (map_kk, offset_k, shift_pk))
    return Rotation(next(axes), next(axes), next(axes), mechanisms).to(z_nk.device)


def _moments(
    z: np.ndarray,
    u_np: Tensor | sparse.csr_matrix,
    time_n: np.ndarray,
    extra_kk: np.ndarray,
    onset: float | None,
) -> _Snapshots:
    """Moments of every condition at every time, control first."""
    u_cp, condition_n = distinct_designs(u_np)
    times, time_index_n = np.unique(time_n, return_inverse=True)
    k, shape = len(extra_kk), (u_cp.shape[0], len(times))
    size_ct = np.zeros(shape)
    mean_ctk, covariance_ctkk = np.full((*shape, k), np.nan), np.full((*shape, k, k), np.nan)
    rows_by_snapshot = rows_of(condition_n * len(times) + time_index_n, size_ct.size)
    for (c, t), rows in zip(np.ndindex(shape), rows_by_snapshot, strict=True):
        cells = z[rows]
        size_ct[c, t] = len(cells)
        if len(cells) > k:
            mean_ctk[c, t], covariance_ctkk[c, t] = cells.mean(0), np.cov(cells.T) + extra_kk
    steps = None if onset is None else _steps([onset, *times.tolist()], np.diff(times).min())
    return _Snapshots(u_cp.toarray(), size_ct, mean_ctk, covariance_ctkk, steps)


def _steps(times: list[float], unit: float) -> list[tuple[int, float]]:
    """Equal steps between successive times, no longer than a unit: how many, and their length in units."""
    gaps = [(later - time) / unit for time, later in pairwise(times)]
    numbers = [math.ceil(gap - 1e-3) for gap in gaps]
    return [(number, gap / max(number, 1)) for number, gap in zip(numbers, gaps, strict=True)]


def _blocks(seen: _Snapshots, n_invariant: int) -> np.ndarray:
    """Orthogonal axes in columns, those first that are as in control at the same time."""
    moved = (seen.mean_ctk - seen.mean_ctk[0])[1:]
    excess = (seen.covariance_ctkk - seen.covariance_ctkk[0])[1:]
    known = np.isfinite(moved).all(-1)
    if not known.any():  # control alone: any axes will do
        return np.eye(moved.shape[-1])
    return unchanged_first(moved[known], excess[known], seen.size_ct[1:][known], n_invariant)


def _by_target(design_cp: np.ndarray, value_cv: np.ndarray) -> np.ndarray:
    """What each target adds, where combinations add up."""
    by_target_pv: np.ndarray = np.linalg.lstsq(design_cp, np.nan_to_num(value_cv), rcond=None)[0]
    return by_target_pv


def _lagged(moved_ctv: np.ndarray) -> np.ndarray:
    """F of d' = F d + s by least squares with an intercept for each condition.

    A condition that cuts parents does not follow it: in each row, conditions are weighed down by what they
    leave.
    """
    n_v = moved_ctv.shape[2]
    before, after = moved_ctv[:, :-1], moved_ctv[:, 1:]
    known_ct = np.isfinite(before).all(-1) & np.isfinite(after).all(-1)
    known_ct &= known_ct.sum(1, keepdims=True) > 1  # with one transition the intercept takes it all
    before, after = (_less_mean(part, known_ct) for part in (before, after))
    gram_cvv, cross_cvv = np.einsum("ctj,ctk->cjk", before, before), np.einsum("cti,ctk->cik", after, before)
    weight_cv = np.ones_like(moved_ctv[:, 0])
    lagged_vv = 0.5 * np.eye(n_v)
    for _ in range(20 if known_ct.any() else 0):
        for v in range(n_v):
            gram_vv = np.tensordot(weight_cv[:, v], gram_cvv, 1)
            ridge = RIDGE * np.trace(gram_vv)
            cross_v = np.tensordot(weight_cv[:, v], cross_cvv[:, v], 1) + 0.5 * ridge * np.eye(n_v)[v]
            lagged_vv[v] = np.linalg.solve(gram_vv + ridge * np.eye(n_v), cross_v)
        left_cv = np.sqrt(((after - before @ lagged_vv.T) ** 2).sum(1))
        weight_cv = 1 / (left_cv + np.median(left_cv[known_ct.any(1)], 0) + 1e-9)
    return lagged_vv


def _less_mean(value_ctv: np.ndarray, known_ct: np.ndarray) -> np.ndarray:
    """Differences from the mean over time; zero where something is not known."""
    known_ct1 = known_ct[..., None]
    value_ctv = np.where(known_ct1, value_ctv, 0.0)
    mean_c1v = value_ctv.sum(1, keepdims=True) / np.maximum(known_ct1.sum(1, keepdims=True), 1)
    return np.where(known_ct1, value_ctv - mean_c1v, 0.0)


def _innovations(moved_ctv: np.ndarray, lagged_vv: np.ndarray) -> np.ndarray:
    """s of each condition: the mean over its transitions; where there is none, its first difference."""
    left_ctv = moved_ctv[:, 1:] - moved_ctv[:, :-1] @ lagged_vv.T
    known_ct1 = np.isfinite(left_ctv).all(-1)[..., None]
    mean_cv = np.where(known_ct1, left_ctv, 0.0).sum(1) / np.maximum(known_ct1.sum(1), 1)
    return np.where(known_ct1.any(1), mean_cv, np.nan_to_num(moved_ctv[:, 0]))


def _noise(seen: _Snapshots, lagged_vv: np.ndarray) -> np.ndarray:
    """Covariance of the innovations of control's responsive programmes, kept positive."""
    n_v = len(lagged_vv)
    control_tvv = seen.covariance_ctkk[0][:, -n_v:, -n_v:]
    noise_tvv = control_tvv[1:] - lagged_vv @ control_tvv[:-1] @ lagged_vv.T
    values, vectors = np.linalg.eigh(np.nanmean(noise_tvv, 0))
    noise_vv: np.ndarray = vectors * np.maximum(values, 0.1 * values.max()) @ vectors.T
    return noise_vv


def _turn(
    shift_pv: np.ndarray, noise_vv: np.ndarray, rng: np.random.Generator, n_starts: int = 20
) -> np.ndarray:
    """Axes in rows in which innovations are independent and their shifts sparsest."""
    n_v, whiten_vv = len(noise_vv), inverse_root(noise_vv)
    if not len(shift_pv):
        return whiten_vv
    white_pv = shift_pv @ whiten_vv
    starts = [np.linalg.qr(rng.standard_normal((n_v, n_v)))[0] for _ in range(n_starts)]
    turns = [refine(white_pv, start, True) for start in starts]
    axes_vv = (whiten_vv @ min(turns, key=lambda r: np.abs(white_pv @ r).sum())).T
    unit_vv: np.ndarray = axes_vv / np.linalg.norm(axes_vv, axis=1, keepdims=True)
    return unit_vv


def _background(seen: _Snapshots, shift_pv: np.ndarray, n_invariant: int) -> np.ndarray:
    """What of the background has been counted to each responsive programme, v, l.

    A programme that a perturbation cuts off its parents is independent of the background; what it still
    follows from the background then was counted to it.
    """
    n_v = shift_pv.shape[1]
    largest_p1 = np.abs(shift_pv).max(1, keepdims=True, initial=1.0)
    own_pv = np.abs(shift_pv) > 0.35 * largest_p1
    slope_vl, clearest_v = np.zeros((n_v, n_invariant)), np.full(n_v, CLEAR_CUT * n_invariant)
    for c, design_p in enumerate(seen.design_cp):
        known_t = np.isfinite(seen.mean_ctk[c]).all(-1)
        n_cells = seen.size_ct[c, known_t].sum()
        for v in np.flatnonzero(design_p @ own_pv) if n_cells else ():
            covariance_kk = np.tensordot(
                seen.size_ct[c, known_t] / n_cells, seen.covariance_ctkk[c, known_t], 1
            )
            own_ll, both_l = (
                covariance_kk[:n_invariant, :n_invariant],
                covariance_kk[n_invariant + v, :n_invariant],
            )
            slope_l = np.linalg.solve(own_ll, both_l)
            explained = both_l @ slope_l
            statistic = (
                n_cells * explained / max(covariance_kk[n_invariant + v, n_invariant + v] - explained, 1e-9)
            )
            if statistic > clearest_v[v]:
                slope_vl[v], clearest_v[v] = slope_l, statistic
    return slope_vl


def _first(
    seen: _Snapshots, moved_ctv: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Axes in rows to start from, and, in those of the blocks, lagged effects and shifts."""
    n_v = moved_ctv.shape[2]
    if seen.steps is not None:  # where programmes end tells sparse shifts well enough
        lagged_vv = 0.5 * np.eye(n_v)
        shift_pv = 0.5 * _by_target(seen.design_cp[1:], _last(moved_ctv))
        return _turn(shift_pv, np.eye(n_v), rng), lagged_vv, shift_pv
    turn_vv = np.eye(n_v)
    for _ in range(ROUNDS):
        back_vv = np.linalg.inv(turn_vv)
        lagged_vv = back_vv @ _lagged(moved_ctv @ turn_vv.T) @ turn_vv
        shift_pv = _by_target(seen.design_cp[1:], _innovations(moved_ctv, lagged_vv))
        turn_vv = _turn(shift_pv, _noise(seen, lagged_vv), rng)
    return turn_vv, lagged_vv, shift_pv


def _last(moved_ctv: np.ndarray) -> np.ndarray:
    """Values of each condition at its last snapshot that is known; zero where there is none."""
    known_ct = np.isfinite(moved_ctv).all(-1)
    last_c = known_ct.shape[1] - 1 - known_ct[:, ::-1].argmax(1)
    last_cv: np.ndarray = np.nan_to_num(moved_ctv[np.arange(len(last_c)), last_c])
    return last_cv


class _MomentFit(dict[str, np.ndarray]):
    """Parameters of the linear temporal SCM that moments are fitted with."""

    loss: float = np.inf

    @classmethod
    def best(
        cls, seen: _Snapshots, n_invariant: int, n_starts: int, rng: np.random.Generator
    ) -> "_MomentFit":
        """The best of several starts."""
        moved_ctv = (seen.mean_ctk - seen.mean_ctk[0])[1:, :, n_invariant:]
        turn_vv, lagged_vv, shift_pv = _first(seen, moved_ctv, rng)
        fits = []
        for start in range(n_starts):
            if start:
                turn_vv = (
                    turn_vv @ np.linalg.qr(np.eye(len(turn_vv)) + 0.4 * rng.standard_normal(turn_vv.shape))[0]
                )
            turned = cls.start(turn_vv, np.zeros((len(turn_vv), n_invariant)), lagged_vv, shift_pv)
            background_vl = -_background(seen.mapped(turned.map_kk()), turned["shift_pv"], n_invariant)
            first = cls.start(turn_vv, background_vl, lagged_vv, shift_pv)
            fits.append(first.fitted(seen, STEPS[0], sum(STEPS)))
        return min(fits, key=_loss).fitted(seen, STEPS[1], sum(STEPS), STEPS[0]).with_cuts(seen)

    def with_cuts(self, seen: _Snapshots) -> "_MomentFit":
        """The fit after cuts that it lacks were tried, and those were kept that improve it."""
        best = self
        for _ in range(PASSES):
            tried = [best.with_cut(seen, p, v).polished(seen, SHORT_STEPS) for p, v in best.uncut(seen)]
            close = [fit.polished(seen, LONG_STEPS) for fit in sorted(tried, key=_loss)[:CANDIDATES_KEPT]]
            if not min(map(_loss, close), default=np.inf) < best.loss - LEAST_GAIN:
                return best
            best = min(close, key=_loss)
        return best

    def uncut(self, seen: _Snapshots) -> list[tuple[int, int]]:
        """Targets and programmes that they move without a cut so far, those moved furthest first."""
        n_l = self["background_vl"].shape[1]
        mean_ctv = seen.mapped(self.map_kk()).mean_ctk[..., n_l:]
        moved_ctv = np.nan_to_num(mean_ctv - mean_ctv[0])[1:, 1:]
        ends_cv = moved_ctv.min(1, initial=0.0), moved_ctv.max(1, initial=0.0)
        size_pv = np.maximum(*(np.abs(_by_target(seen.design_cp[1:], end_cv)) for end_cv in ends_cv))
        size_pv[~(seen.design_cp[seen.later()] > 0).any(0)] = 0.0
        places = np.argwhere((size_pv > ALTERED_ABOVE) & (self.cut() < CUT_ABOVE))
        furthest = np.argsort(-size_pv[tuple(places.T)])[:MOST_CANDIDATES]
        return [(int(p), int(v)) for p, v in places[furthest]]

    def with_cut(self, seen: _Snapshots, p: int, v: int) -> "_MomentFit":
        """The same parameters, but p cuts v, and the axis of v is independent of the background under p."""
        n_v, n_l = self["background_vl"].shape
        carries_c = (seen.design_cp[:, p] > 0) & seen.later()
        alone_c = carries_c & (seen.design_cp.astype(bool).sum(1) == 1)
        here = seen.mapped(self.map_kk())
        rows = (alone_c if alone_c.any() else carries_c), slice(1, None)
        covariance_kk = np.nanmean(here.covariance_ctkk[rows], (0, 1))
        slope_l = np.linalg.solve(covariance_kk[:n_l, :n_l], covariance_kk[:n_l, n_l + v])
        change_kk = np.eye(n_l + n_v)
        change_kk[n_l + v, :n_l] = -slope_l
        weight_kk = np.pad(self["weight_ll"], ((0, n_v), (0, n_v)))
        weight_kk[n_l:] = self["weight_vk"]
        fit = _MomentFit({name: value.copy() for name, value in self.items()})
        fit["background_vl"][v] -= slope_l
        fit["weight_vk"] = (change_kk @ weight_kk @ np.linalg.inv(change_kk))[n_l:]
        fit["offset_k"] = change_kk @ self["offset_k"]
        mean_k = change_kk @ np.nanmean(here.mean_ctk[rows], (0, 1))
        variance_kk = change_kk @ covariance_kk @ change_kk.T
        fit["shift_pv"][p, v] = mean_k[n_l + v]
        fit["log_scale_pv"][p, v] = np.log(variance_kk[n_l + v, n_l + v]) / 2 - self["log_scale_k"][n_l + v]
        fit["cut_logit_pv"][p, v] = 3.0
        return fit

    def polished(self, seen: _Snapshots, n_steps: int) -> "_MomentFit":
        """The parameters after some of the last gradient steps of a run, where the penalty is sharp."""
        return self.fitted(seen, n_steps, sum(STEPS), sum(STEPS) - STEPS[0])

    @classmethod
    def start(
        cls, turn_vv: np.ndarray, background_vl: np.ndarray, lagged_vv: np.ndarray, shift_pv: np.ndarray
    ) -> "_MomentFit":
        """Lagged effects and shifts are given in the axes of the blocks."""
        n_v, n_l = background_vl.shape
        shift_pv = shift_pv @ turn_vv.T
        return cls(
            turn_vv=turn_vv,
            background_vl=background_vl,
            weight_vk=np.pad(turn_vv @ lagged_vv @ np.linalg.inv(turn_vv), ((0, 0), (n_l, 0))),
            weight_ll=0.7 * np.eye(n_l),
            origin_k=np.zeros(n_l + n_v),
            offset_k=np.zeros(n_l + n_v),
            log_scale_k=np.full(n_l + n_v, -0.3),
            shift_pv=shift_pv,
            log_scale_pv=np.zeros_like(shift_pv),
            cut_logit_pv=np.full_like(shift_pv, -1.0),
        )

    def map_kk(self) -> np.ndarray:
        """From the axes of the blocks to those of the fit."""
        map_kk: np.ndarray = _map({name: torch.as_tensor(value) for name, value in self.items()}).numpy()
        return map_kk

    def cut(self) -> np.ndarray:
        """Share of the parents' effect that a perturbation takes away."""
        cut_pv: np.ndarray = 1 / (1 + np.exp(-self["cut_logit_pv"]))
        return cut_pv

    def fitted(
        self, seen: _Snapshots, n_steps: int, n_total: int, n_before: int = 0, lr: float = 0.03
    ) -> "_MomentFit":
        """The parameters after some of the gradient steps of a run; the penalty sharpens over the run."""
        place = _Transitions.of(seen) if seen.steps is None else _Paths.of(seen)
        part = {name: torch.tensor(value, requires_grad=True) for name, value in self.items()}
        optimizer = torch.optim.Adam(part.values(), lr=lr)
        loss = torch.zeros(())
        for step in range(n_before, n_before + n_steps):
            share = step / n_total
            optimizer.param_groups[0]["lr"] = lr * min(1.0, 2 * (1 - share)) + 1e-4
            width = max(SHARPEST, 0.6 * (1 - share / 0.6))
            loss = place.misfit(part) + _penalty(part, width, place.size_r.sum())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        fit = _MomentFit({name: value.detach().numpy() for name, value in part.items()})
        fit.loss = float(loss.detach())
        return fit


class _Transitions(NamedTuple):
    """Moments before and after each transition r between successive snapshots of a condition."""

    u_rp: Tensor
    size_r: Tensor
    mean_rk: Tensor
    covariance_rkk: Tensor
    later_mean_rk: Tensor
    later_covariance_rkk: Tensor

    @classmethod
    def of(cls, seen: _Snapshots) -> "_Transitions":
        known_ct = np.isfinite(seen.mean_ctk).all(-1)
        c, t = (known_ct[:, :-1] & known_ct[:, 1:]).nonzero()
        moments = (seen.mean_ctk, seen.covariance_ctkk)
        parts = [seen.design_cp[c], seen.size_ct[c, t + 1]]
        parts += [moment[c, t + after] for after in (0, 1) for moment in moments]
        return cls(*map(torch.as_tensor, parts))

    def misfit(self, part: dict[str, Tensor]) -> Tensor:
        """Nats per cell of the normal laws that the parameters predict, in the axes of the blocks."""
        map_kk, step = _map(part), _Step.under(part, self.u_rp)
        moments = step(self.mean_rk @ map_kk.T, map_kk @ self.covariance_rkk @ map_kk.T)
        later = self.later_mean_rk @ map_kk.T, map_kk @ self.later_covariance_rkk @ map_kk.T
        return _per_cell(_nats(*moments, *later), self.size_r, part)


class _Paths(NamedTuple):
    """Moments of all snapshots r that were measured, and the steps that lead to them from the onset."""

    u_cp: Tensor
    steps: list[tuple[int, float]]
    known_ct: Tensor
    size_r: Tensor
    mean_rk: Tensor
    covariance_rkk: Tensor
    origin_kk: Tensor

    @classmethod
    def of(cls, seen: _Snapshots) -> "_Paths":
        assert seen.steps is not None
        known_ct = np.isfinite(seen.mean_ctk).all(-1)
        parts = [moment[known_ct] for moment in (seen.size_ct, seen.mean_ctk, seen.covariance_ctkk)]
        tensors = map(torch.as_tensor, [known_ct, *parts, seen.covariance_ctkk[0, 0]])
        return cls(torch.as_tensor(seen.design_cp), seen.steps, *tensors)

    def misfit(self, part: dict[str, Tensor]) -> Tensor:
        """Nats per cell of the normal laws that the parameters predict, in the axes of the blocks."""
        map_kk, step = _map(part), _Step.under(part, self.u_cp)
        n_c = len(self.u_cp)
        mean_ck = part["origin_k"].expand(n_c, -1)
        covariance_ckk = (map_kk @ self.origin_kk @ map_kk.T).expand(n_c, -1, -1)
        means, covariances = [], []
        for number, length in self.steps:
            for _ in range(number):
                mean_ck, covariance_ckk = step(mean_ck, covariance_ckk, length)
            means.append(mean_ck)
            covariances.append(covariance_ckk)
        mean_rk, covariance_rkk = (torch.stack(rolled, 1)[self.known_ct] for rolled in (means, covariances))
        found = self.mean_rk @ map_kk.T, map_kk @ self.covariance_rkk @ map_kk.T
        return _per_cell(_nats(mean_rk, covariance_rkk, *found), self.size_r, part)


class _Step(NamedTuple):
    """What a unit of time does to programmes under each design r: their target, and noise."""

    weight_rkk: Tensor
    offset_rk: Tensor
    noise_rk: Tensor

    @classmethod
    def under(cls, part: dict[str, Tensor], u_rp: Tensor) -> "_Step":
        n_v, n_l = part["background_vl"].shape
        n_r = len(u_rp)
        keep_rv = (1 - u_rp.unsqueeze(-1) * part["cut_logit_pv"].sigmoid()).prod(1)
        keep_rk = torch.cat([keep_rv.new_ones(n_r, n_l), keep_rv], 1)
        own_lk = torch.nn.functional.pad(part["weight_ll"], (0, n_v))
        weight_rkk = keep_rk.unsqueeze(-1) * torch.cat([own_lk, part["weight_vk"]])
        shift_rk = torch.nn.functional.pad(u_rp @ part["shift_pv"], (n_l, 0))
        log_scale_rk = torch.nn.functional.pad(u_rp @ part["log_scale_pv"], (n_l, 0))
        noise_rk = torch.exp(2 * (part["log_scale_k"] + log_scale_rk))
        return cls(weight_rkk, keep_rk * part["offset_k"] + shift_rk, noise_rk)

    def __call__(self, mean_rk: Tensor, covariance_rkk: Tensor, length: float = 1.0) -> tuple[Tensor, Tensor]:
        """Moments after a step of a length."""
        identity_kk = torch.eye(mean_rk.shape[-1], dtype=mean_rk.dtype)
        weight_rkk = identity_kk + length * (self.weight_rkk - identity_kk)
        mean_rk = (weight_rkk @ mean_rk.unsqueeze(-1)).squeeze(-1) + length * self.offset_rk
        spread_rkk = weight_rkk @ covariance_rkk @ weight_rkk.mT
        return mean_rk, spread_rkk + torch.diag_embed(length * self.noise_rk)


def _map(part: dict[str, Tensor]) -> Tensor:
    """From the axes of the blocks to those of the fit."""
    n_v, n_l = part["background_vl"].shape
    first_lk = torch.eye(n_l, n_l + n_v, dtype=torch.float64)
    return torch.cat([first_lk, torch.cat([part["background_vl"], part["turn_vv"]], 1)])


def _nats(mean_rk: Tensor, covariance_rkk: Tensor, seen_mean_rk: Tensor, seen_rkk: Tensor) -> Tensor:
    """Cross-entropy of the normals of given moments, for cells of other moments, less a constant."""
    root_rkk = torch.linalg.cholesky(covariance_rkk)
    left_rk1 = (seen_mean_rk - mean_rk).unsqueeze(-1)
    seen_root_rkk = torch.linalg.cholesky(seen_rkk)
    white = torch.linalg.solve_triangular(root_rkk, torch.cat([seen_root_rkk, left_rk1], -1), upper=False)
    return root_rkk.diagonal(dim1=-2, dim2=-1).log().sum(-1) + (white**2).sum((-1, -2)) / 2


def _per_cell(nats_r: Tensor, size_r: Tensor, part: dict[str, Tensor]) -> Tensor:
    """The mean over cells, in the axes of the blocks."""
    return (size_r * nats_r).sum() / size_r.sum() - torch.linalg.slogdet(part["turn_vv"])[1]


def _penalty(part: dict[str, Tensor], width: float, n_cells: Tensor) -> Tensor:
    """About log(n) / 2 nats for each shift, change of noise and lagged effect, twice that for a cut."""
    n_v, n_l = part["background_vl"].shape
    others_vk = 1 - torch.nn.functional.pad(torch.eye(n_v, dtype=torch.float64), (n_l, 0))
    counted = sum(_counted(part[name], width).sum() for name in ("shift_pv", "log_scale_pv"))
    counted = counted + 2 * part["cut_logit_pv"].sigmoid().sum()
    counted = counted + (others_vk * _counted(part["weight_vk"], width / 2)).sum()
    return n_cells.log() / 2 * counted / n_cells


def _loss(fit: _MomentFit) -> float:
    return fit.loss


def _counted(value: Tensor, width: float) -> Tensor:
    """1 for what is much larger than the width, 0 for what is much smaller."""
    square = value**2
    return square / (square + width**2)
