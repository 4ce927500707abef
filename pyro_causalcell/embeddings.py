r"""What a description of the targets says about their effects, so that an unmeasured target has a prediction.

Each target p comes with a row e_p of a table. The effect of a target on a programme is expected to be linear
in its row, and an edge is the more likely the larger the expected effect:

.. math::
    B_{ke} &\sim \mathrm{Normal}(0, \lambda), \qquad a_{pk} = B_k^T (e_p, 1)
        && \text{what the description says} \\
    \gamma_{pk} &\sim \mathrm{Bernoulli}(\pi_{pk}), \quad \pi_{pk} = \mathrm{logit}^{-1}(c_k + d\, a_{pk}^2)
        && \text{is there an effect?} \\
    \mu_{pk} &\sim \mathrm{Normal}(a_{pk} / \pi_{pk}, \tau) && \text{the effect, where there is one}

So a is what is expected of γμ, present or not. λ, τ, c and d are latent as well. A table that says nothing is
found out: λ goes to zero, every a_p to the intercept, and τ to the spread of all effects.

Where a perturbation makes changes of several kinds to few programmes (shifts, noise, cuts), the other
direction tells more: the row is read off what the target changes, as cells are,

.. math::
    e_p \sim \mathrm{Normal}(M^T m_p + b, \sigma)

with m_p all changes of p. To find the m_p of an unseen target is then a sparse problem with as many
equations as columns, not a regression with as many coefficients for every change. A model calls
:func:`described` after it has drawn the changes; a guide owns a :class:`DescriptionGuide`.

In the first direction a model calls :func:`expected_effects`, :func:`expected_gates` and :func:`where_open`
in place of its priors; a guide owns an :class:`EffectMapGuide` and a :class:`GateCurveGuide`, which sample
the same sites. A target without training cells is given its prior there, given the draw of B: a prediction,
as uncertain as the model says.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

from pyro_causalcell.batch import MOST_COLUMNS

__all__ = [
    "DescriptionGuide",
    "EffectMapGuide",
    "GateCurveGuide",
    "Reading",
    "all_changes",
    "described",
    "expected_effects",
    "expected_gates",
    "seen_targets",
    "squared_size",
    "standardised",
    "where_open",
]

LOG_SPREAD = 0.7
"""Prior standard deviation of log λ and log τ around log(scale / 2)."""
LEAST_EFFECT = 0.05
"""Effects below this, in standard deviations of a programme, say nothing about what embeddings explain."""
LEAST_SHARE = 0.3
"""Where an edge is less likely than this, its effect is expected to be smaller than a / π: curves are learnt
from the edges that were found, and give large numbers to divide by where there are few."""
LEAST_NOISE = 1e-3
"""Smallest standard deviation of what changes leave open about a standardised table."""
READ_ROUNDS = 20
"""Turns of the changes of a target and of the spread that each programme's changes seem to have."""
GATE_CURVE = ((-2.0, 2.0), (0.0, 1.0))
"""Prior mean and standard deviation of c, and of log d."""


def standardised(embedding_pe: Tensor, seen_p: Tensor) -> Tensor:
    """A table as models use it: the principal components of its columns, standardised over the seen targets.

    Columns get mean 0 and standard deviation 1 over the targets with training cells; one that is the same for
    all of them says nothing and becomes zero. The table is then turned to its principal axes over these
    targets, which leaves the prior of a linear function as it is and makes its posterior one of independent
    coefficients. Of wide tables the leading components are kept. Seen targets have a mean squared length of 1
    before that, so that λ means the same for every table.

    Args:
        embedding_pe: One row per target, as given.
        seen_p: Whether a target has training cells.

    Returns:
        Shape p, min(e, ``MOST_COLUMNS``).
    """
    table_pe = embedding_pe.double()
    seen_se = table_pe[seen_p]
    sd_e = seen_se.std(0, correction=0)
    varies_e = sd_e > 1e-8 * seen_se.abs().amax(0)
    table_pe = torch.where(varies_e, (table_pe - seen_se.mean(0)) / sd_e.where(varies_e, 1.0), 0.0)
    table_pe = table_pe / math.sqrt(max(int(varies_e.sum()), 1))
    axes_ee = torch.linalg.svd(table_pe[seen_p], full_matrices=True)[2]
    return (table_pe @ axes_ee.T)[:, :MOST_COLUMNS].to(embedding_pe.dtype)


def seen_targets(n_targets: int, target_cells: tuple[float, ...]) -> Tensor:
    """Whether each target has training cells, bool p; all have where the numbers are not known (``()``)."""
    return torch.tensor(target_cells or [1.0] * n_targets) > 0


def expected_effects(
    name: str, embedding_pe: Tensor, shape: tuple[int, ...], scale: float
) -> tuple[Tensor, Tensor]:
    """p(λ, τ) p(B) in a model: what the embeddings say of effects, and how far effects lie from it.

    Args:
        name: Site of the effects; the sites here are ``<name>_log_scales`` (log λ, log τ) and ``<name>_map``
            (one row of B for each effect, the intercept last).
        embedding_pe: Standardised embeddings.
        shape: Shape of one target's effects.
        scale: Prior standard deviation that the effects would have without embeddings.

    Returns:
        Expected effects, shape p, ``*shape``, and τ, a scalar.
    """
    n_effects, n_features = math.prod(shape), embedding_pe.shape[1] + 1
    start = embedding_pe.new_full((2,), math.log(scale / 2))
    log_scales = pyro.sample(f"{name}_log_scales", dist.Normal(start, LOG_SPREAD).to_event(1))  # p(λ, τ)
    sd_f = torch.cat([log_scales[:1].exp().expand(n_features - 1), log_scales.new_tensor([scale])])
    normal = dist.Normal(sd_f.new_zeros(n_effects, n_features), sd_f)
    map_df = pyro.sample(f"{name}_map", normal.to_event(2))  # p(B | λ)
    return _mapped(embedding_pe, map_df, shape), log_scales[1].exp()


def expected_gates(name: str, square_pk: Tensor) -> Tensor:
    """p(c, d) in a model: logits of the gates, c_k + d a².

    Args:
        name: Site of the gates; the site here is ``<name>_curve`` (c of each programme, log d last).
        square_pk: Squared expected effects a².
    """
    mean, sd = _curve_prior(square_pk.shape[1]).to(square_pk.device)
    return _curve(pyro.sample(f"{name}_curve", dist.Normal(mean, sd).to_event(1)), square_pk)


def where_open(expected: Tensor, logit_pk: Tensor) -> Tensor:
    """Effects where their gates are open, a / π, of effects expected whether or not they are there.

    Args:
        expected: Expected effects a, shape p, k, ...
        logit_pk: Logits of their gates.
    """
    share_pk = torch.sigmoid(logit_pk).clamp(min=LEAST_SHARE)
    return expected / share_pk.reshape(*share_pk.shape, *[1] * (expected.dim() - 2))


def squared_size(expected: Sequence[Tensor], like_pv: Tensor) -> Tensor:
    """Squared size of a change of several parts, shape p, v: squares summed over parts and further axes.

    Args:
        expected: Expected effects, each p, v, ...
        like_pv: Any tensor of the result's shape.
    """
    square_pv = torch.zeros_like(like_pv)
    for effect in expected:
        square_pv = square_pv + effect.reshape(*like_pv.shape, -1).square().sum(-1)
    return square_pv


class EffectMapGuide(PyroModule):
    r"""q(λ, τ) q(B | effects): Bayesian ridge regression of what the guide finds on the embeddings.

    .. math::
        y_{pk} = \mathrm{E}[\gamma_{pk} \mu_{pk}] = B_k^T (e_p, 1) + \epsilon_{pk}, \qquad
        B_k \sim \mathrm{Normal}(0, \rho \sigma_k^2), \quad
        \epsilon_{pk} \sim \mathrm{Normal}(0, \sigma_k^2)

    over the targets with training cells; the constant has a flat prior. ρ is the one that best predicts each
    target from the others, over all programmes together: with few targets a programme alone tells too little
    of it. So a table without information is given none. What is not there counts as a zero: an effect that
    the embeddings predict and nobody finds speaks against them. In the axes of :func:`standardised` the
    posterior of B has independent coefficients.

    Args:
        name: As in :func:`expected_effects`.
        seen_p: Whether a target has training cells.

    Source: Allen, Technometrics 16, 1974 (the error of predicting each from the others, in closed form).
    """

    seen_p: Tensor

    def __init__(self, name: str, seen_p: Tensor):
        super().__init__()
        self.site = name
        self.register_buffer("seen_p", seen_p)
        self.log_scales_loc = PyroParam(torch.zeros(2))
        self.log_scales_sd = PyroParam(torch.full((2,), 0.1), constraint=constraints.positive)

    def forward(
        self, embedding_pe: Tensor, open_p: Tensor, loc_p: Tensor, scale_p: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Samples q(λ, τ) and q(B); the prior takes the place of what was never measured.

        Args:
            embedding_pe: Standardised embeddings.
            open_p: Probability that each effect is there, shape p, ...
            loc_p: Mean of each effect where it is there.
            scale_p: Its standard deviation.

        Returns:
            Mean and standard deviation of the effects, those of unseen targets from their embeddings; and
            the expected effects of all targets.
        """
        normal = dist.Normal(self.log_scales_loc, self.log_scales_sd)
        log_scales = pyro.sample(f"{self.site}_log_scales", normal.to_event(1))  # q(λ, τ)
        with torch.no_grad():  # the regression follows the effects; they do not follow it
            mean_df, sd_df = _regression(embedding_pe, (open_p * loc_p).flatten(1), self.seen_p)
        map_df = pyro.sample(f"{self.site}_map", dist.Normal(mean_df, sd_df).to_event(2))  # q(B)
        expected_p = _mapped(embedding_pe, map_df, loc_p.shape[1:])
        seen_p = self.seen_p.reshape(-1, *[1] * (loc_p.dim() - 1))
        loc_p = torch.where(seen_p, loc_p, expected_p)
        return loc_p, torch.where(seen_p, scale_p, log_scales[1].exp()), expected_p


class GateCurveGuide(PyroModule):
    """q(c, d), and gates of unseen targets from their expected effects.

    Args:
        name: As in :func:`expected_gates`.
        n_programmes: Programmes k.
        seen_p: Whether a target has training cells.
    """

    seen_p: Tensor

    def __init__(self, name: str, n_programmes: int, seen_p: Tensor):
        super().__init__()
        self.site = name
        self.register_buffer("seen_p", seen_p)
        self.curve_loc = PyroParam(_curve_prior(n_programmes)[0])
        self.curve_sd = PyroParam(torch.full((n_programmes + 1,), 0.1), constraint=constraints.positive)

    def forward(self, square_pk: Tensor, logit_pk: Tensor) -> Tensor:
        """Samples q(c, d); logits of the gates, those of unseen targets from what is expected of them."""
        curve = pyro.sample(f"{self.site}_curve", dist.Normal(self.curve_loc, self.curve_sd).to_event(1))
        return torch.where(self.seen_p.unsqueeze(-1), logit_pk, _curve(curve, square_pk))

    def where_open(self, loc_p: Tensor, logit_pk: Tensor) -> Tensor:
        """Effects where their gates are open: those of seen targets as they are."""
        seen_p = self.seen_p.reshape(-1, *[1] * (loc_p.dim() - 1))
        return torch.where(seen_p, loc_p, where_open(loc_p, logit_pk))


def all_changes(
    open_pv: Tensor, shift_pv: Tensor, log_scale_pv: Tensor, cut_pv: Tensor, start_pv: Tensor | None = None
) -> Tensor:
    """All that each target changes, kind by kind, p, f: what its row is read off.

    Args:
        open_pv: Whether a mechanism is changed, or how probably.
        shift_pv: Shift of the innovation where it is.
        log_scale_pv: Change of its log standard deviation where it is.
        cut_pv: Whether the programme is cut off its parents.
        start_pv: Shifts at the first snapshot, if there are any.
    """
    kinds = [open_pv * shift_pv, open_pv * log_scale_pv, cut_pv]
    return torch.cat(kinds if start_pv is None else [*kinds, start_pv], -1)


def described(embedding_pe: Tensor, change_pf: Tensor, known_p: Tensor) -> None:
    """p(σ) p(M) p(e | m) in a model: the table, read off what each target changes.

    Args:
        embedding_pe: Standardised embeddings.
        change_pf: All that each target changes, zero where it changes nothing; see :func:`all_changes`.
        known_p: Targets whose rows count.
    """
    unit = embedding_pe.new_tensor(embedding_pe.shape[1]).rsqrt()  # rows have a mean squared length of 1
    log_noise = pyro.sample("table_log_noise", dist.Normal(unit.log(), 1.0))  # p(σ)
    normal = dist.Normal(embedding_pe.new_zeros(change_pf.shape[1] + 1, len(embedding_pe.T)), unit)
    map_fe = pyro.sample("table_map", normal.to_event(2))  # p(M)
    rows = dist.Normal(change_pf @ map_fe[:-1] + map_fe[-1], log_noise.exp())
    pyro.sample("table", rows.mask(known_p.unsqueeze(-1)).to_event(2), obs=embedding_pe)  # p(e | m)


class Reading(NamedTuple):
    r"""q(σ) q(M): what the seen targets say of how rows follow from changes.

    Changes are counted from those of a typical target, the median of the seen ones, in units of their root
    mean square.

    Attributes:
        map_fe: Mean of M for changes in these units.
        log_noise: log σ.
        doubt_ff: Covariance of the coefficients of a column, in units of σ².
        base_f, unit_f, mean_f: The typical change, the unit, and the mean of the seen targets in units.
        used_f: Whether any seen target changes it.
    """

    map_fe: Tensor
    log_noise: Tensor
    doubt_ff: Tensor
    base_f: Tensor
    unit_f: Tensor
    mean_f: Tensor
    used_f: Tensor

    @classmethod
    def of(cls, embedding_pe: Tensor, change_pf: Tensor, seen_p: Tensor) -> "Reading":
        """Bayesian ridge regression of the rows of seen targets on their changes.

        The ratio of prior and noise is the one that best predicts each row from the other targets'.
        """
        weight_p1 = seen_p.unsqueeze(1).to(torch.float64)
        n_seen, row_pe, change_pf = weight_p1.sum(), weight_p1 * embedding_pe.double(), change_pf.double()
        base_f = _typical(change_pf.masked_fill(~seen_p.unsqueeze(1), torch.nan))
        unit_f = (weight_p1 * (change_pf - base_f) ** 2).sum(0).div(n_seen).sqrt()
        used_f = unit_f > LEAST_EFFECT
        in_units_pf = weight_p1 * torch.where(used_f, (change_pf - base_f) / unit_f, 0.0)
        mean_f = in_units_pf.sum(0) / n_seen
        in_units_pf = weight_p1 * (in_units_pf - mean_f)
        gram_ff, moment_fe = in_units_pf.T @ in_units_pf, in_units_pf.T @ row_pe
        identity_ff = torch.eye(len(gram_ff), dtype=gram_ff.dtype, device=gram_ff.device)
        ratio_r11 = torch.logspace(-3, 3, 13, device=gram_ff.device, dtype=gram_ff.dtype)[:, None, None]
        doubt_rff = torch.linalg.inv_ex(gram_ff + identity_ff / ratio_r11)[0]
        spare_rp = 1 - weight_p1.squeeze(1) / n_seen - ((in_units_pf @ doubt_rff) * in_units_pf).sum(-1)
        missed_rpe = (row_pe - in_units_pf @ (doubt_rff @ moment_fe)) / spare_rp.unsqueeze(-1)
        error_r = (missed_rpe**2).sum((1, 2))
        # no index: a recorded step cannot look its number up
        best_r = (error_r == error_r.min()).to(error_r)
        best_r = best_r / best_r.sum()
        doubt_ff = (best_r[:, None, None] * doubt_rff).sum(0)
        noise_r = (spare_rp.unsqueeze(-1) * missed_rpe**2).sum((1, 2)) / (n_seen * row_pe.shape[1])
        log_noise = ((best_r * noise_r).sum() + LEAST_NOISE**2).log() / 2
        return cls(doubt_ff @ moment_fe, log_noise, doubt_ff, base_f, unit_f, mean_f, used_f)

    def changes(self, row_ue: Tensor, n_parts: int) -> tuple[Tensor, Tensor]:
        r"""q(m) of targets without cells: mean and standard deviation of each change, both u, f.

        .. math::
            m_{pf} \sim \mathrm{Normal}(0, w_{pv(f)}), \qquad
            q(m_p) \propto \exp \mathrm{E}_{q(M)} \log p(e_p \mid m_p, M)\, p(m_p)

        The changes of a programme v, one of each part, share the w that makes the row most probable. Most go
        to zero: few programmes explain the row.

        Args:
            row_ue: Their rows of the standardised table.
            n_parts: Kinds of changes, each of which has one for every programme.

        Source: Tipping, Journal of Machine Learning Research 1, 2001 (sparse Bayesian learning).
        """
        told_ff = self.map_fe @ self.map_fe.T / (2 * self.log_noise).exp() + row_ue.shape[1] * self.doubt_ff
        told_ff = told_ff * self.used_f * self.used_f.unsqueeze(1)
        pull_uf = row_ue.double() @ self.map_fe.T / (2 * self.log_noise).exp() + told_ff @ self.mean_f
        n_used_v = self.used_f.view(n_parts, -1).sum(0).clamp(min=1)
        spread_uv = torch.ones_like(pull_uf[:, : len(n_used_v)])
        for _ in range(READ_ROUNDS):
            prior_uff = torch.diag_embed(1 / spread_uv.clamp(min=1e-8).repeat(1, n_parts))
            covariance_uff = torch.linalg.inv_ex(told_ff + prior_uff)[0]
            mean_uf = (covariance_uff @ pull_uf.unsqueeze(-1)).squeeze(-1)
            variance_uf = covariance_uff.diagonal(dim1=-2, dim2=-1)
            square_uf = self.used_f * (mean_uf**2 + variance_uf)
            spread_uv = square_uf.unflatten(1, (n_parts, -1)).sum(1) / n_used_v
        sd_uf = (self.unit_f * variance_uf.sqrt()).clamp(min=LEAST_EFFECT)
        found = self.base_f + self.used_f * self.unit_f * mean_uf, sd_uf
        return found[0].to(row_ue.dtype), found[1].to(row_ue.dtype)


class DescriptionGuide(PyroModule):
    """q(σ) q(M) from the changes of the seen targets; see :class:`Reading`.

    Args:
        seen_p: Whether a target has training cells.
    """

    seen_p: Tensor

    def __init__(self, seen_p: Tensor):
        super().__init__()
        self.register_buffer("seen_p", seen_p)

    def forward(self, embedding_pe: Tensor, change_pf: Tensor) -> Reading:
        """Samples q(σ) and q(M), for changes as they are.

        Args:
            embedding_pe: Standardised embeddings.
            change_pf: Expected changes of each target.
        """
        with torch.no_grad():  # the regression follows the changes; they do not follow it
            found = Reading.of(embedding_pe, change_pf, self.seen_p)
        unit_f1 = torch.where(found.used_f, found.unit_f, 1.0).unsqueeze(1)
        map_fe, origin_f = found.map_fe / unit_f1, found.base_f + found.unit_f * found.mean_f
        noise = found.log_noise.exp()
        sd_f1 = noise * found.doubt_ff.diagonal().sqrt().unsqueeze(1) / unit_f1
        mean_fe = torch.cat([map_fe, -(origin_f @ map_fe).unsqueeze(0)])
        sd_fe = torch.cat([sd_f1, noise.reshape(1, 1) / self.seen_p.sum().sqrt()]).expand_as(mean_fe)
        log_noise, mean_fe, sd_fe = (
            part.to(embedding_pe.dtype) for part in (found.log_noise, mean_fe, sd_fe)
        )
        pyro.sample("table_log_noise", dist.Normal(log_noise, 0.1))  # q(σ)
        pyro.sample("table_map", dist.Normal(mean_fe, sd_fe).to_event(2))  # q(M)
        return found


def _typical(change_pf: Tensor) -> Tensor:
    """Median of the rows that are not nan; of the two in the middle the smaller change."""
    lower_f, upper_f = change_pf.nanmedian(0).values, -(-change_pf).nanmedian(0).values
    return torch.where(lower_f.abs() < upper_f.abs(), lower_f, upper_f)


def _regression(embedding_pe: Tensor, effect_pd: Tensor, seen_p: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior means and standard deviations of B, the constant last, each d, e+1.

    Columns of the seen rows are orthogonal and have mean 0, so each coefficient is a regression of its own.
    """
    seen_p1 = seen_p.unsqueeze(1).to(embedding_pe.dtype)
    n_seen = seen_p1.sum()
    mean_d = (seen_p1 * effect_pd).sum(0) / n_seen
    centred_pd = seen_p1 * (effect_pd - mean_d)
    seen_pe = seen_p1 * embedding_pe
    size_e = (seen_pe**2).sum(0)
    moment_de = centred_pd.T @ seen_pe
    precision_e = size_e + 1 / _ratio(seen_pe, centred_pd, n_seen)
    # what is left, and what the prior takes of the coefficients
    square_d = (centred_pd**2).sum(0) - (moment_de**2 / precision_e).sum(1)
    noise_d1 = (square_d.clamp(min=0) / n_seen + LEAST_EFFECT**2).sqrt().unsqueeze(1)
    mean_df = torch.cat([moment_de / precision_e, mean_d.unsqueeze(1)], 1)
    spread_f = torch.cat([precision_e.rsqrt(), n_seen.rsqrt().unsqueeze(0)])
    return mean_df, noise_d1 * spread_f


def _ratio(seen_pe: Tensor, centred_pd: Tensor, n_seen: Tensor) -> Tensor:
    """The ρ with the smallest error of seen targets, each predicted from the others; other rows are zero."""
    size_e, moment_ed = (seen_pe**2).sum(0), seen_pe.T @ centred_pd
    ratio_r = torch.logspace(-3, 3, 13, device=size_e.device, dtype=size_e.dtype)
    errors = []
    for ratio in ratio_r:
        shrunk_pe = seen_pe / (size_e + 1 / ratio)
        leverage_p = 1 / n_seen + (shrunk_pe * seen_pe).sum(1)
        missed_pd = (centred_pd - shrunk_pe @ moment_ed) / (1 - leverage_p).unsqueeze(1)
        errors.append((missed_pd**2).sum())
    error_r = torch.stack(errors)
    # no index: a recorded step cannot look its number up
    return torch.where(error_r == error_r.min(), ratio_r, torch.inf).min()


def _mapped(embedding_pe: Tensor, map_df: Tensor, shape: tuple[int, ...]) -> Tensor:
    linear_pd = embedding_pe @ map_df[:, :-1].T + map_df[:, -1]
    return linear_pd.reshape(len(embedding_pe), *shape)


def _curve_prior(n_programmes: int) -> Tensor:
    """Prior means and standard deviations of c of each programme and of log d, shape 2, k+1."""
    return torch.tensor([*[GATE_CURVE[0]] * n_programmes, GATE_CURVE[1]]).T.contiguous()


def _curve(curve: Tensor, square_pk: Tensor) -> Tensor:
    return curve[:-1] + curve[-1].exp() * square_pk
