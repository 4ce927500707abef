"""Distributions the generative processes are written with."""

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, Literal, get_args

import pyro.distributions as dist
import torch
from pyro.nn import PyroParam
from torch import Tensor
from torch.distributions import constraints, register_kl
from torch.distributions.utils import broadcast_all
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn.functional import logsigmoid, softplus

__all__ = [
    "Gate",
    "GatedNormal",
    "Likelihood",
    "LinearSCM",
    "MeanFieldGate",
    "NegativeBinomial",
    "PopulationNormal",
    "StraightThroughGate",
    "TransitionMixture",
    "TransportMixture",
    "UncertainMeanNormal",
    "ZeroInflatedNegativeBinomial",
    "measurement",
    "spread",
]

Likelihood = Literal["nb", "zinb", "poisson", "gaussian"]
"""``"nb"``, ``"zinb"`` or ``"poisson"`` for counts, ``"gaussian"`` for log-normalised values. ``"zinb"`` is a
negative binomial of which a share of each gene's counts, the same in all cells, is lost and reads as 0."""

Shape = torch.Size | list[int] | tuple[int, ...]

LEAST_ROWS, MOST_ROWS = 32, 512
"""Counts below are looked up in a table, larger ones are evaluated one by one. In single cells few are: a
short table is enough. It grows where many are."""
AT_ONCE = 65_536
"""Values that are worked on together: what stays in the cache of one processor."""
MANY_PARTICLES = 8
"""Particles of a cell from which on it pays to score them relative to each other."""
SUM_ERROR = 0.01
"""Nats that the rounding of a cell's sums may reach before its genes are scored one by one."""


class NegativeBinomial(dist.TorchDistribution):
    r"""Negative binomial with a mean and an inverse dispersion.

    .. math:: \mathrm{Var}(x) = m + m^2 / \theta

    Three forms of the log-probability, equal up to rounding. One inverse dispersion per gene: the terms
    that depend on x and θ alone come from tables over counts, T[j, g] = Σ_{i<j} log(θ_g + i), which cost
    a fraction of ``lgamma`` and are not repeated over particles. Any other shape: ``lgamma``. In a step that
    is being recorded, or trained on a GPU: Stirling's series, whose operations are the same for any counts,
    fuse, and never wait for the GPU.

    With its genes as one event (``to_event(1)``), many particles of a cell are scored relative to each other
    where no gradient is wanted: one exponential and one logarithm for each value.

    Args:
        mean: Mean, any shape. Give either ``mean`` or ``log_mean``.
        inverse_dispersion: θ > 0, shape g or any shape that broadcasts with the mean.
        log_mean: Logarithm of the mean; safe where the mean underflows.
    """

    arg_constraints = {"log_mean": constraints.real, "inverse_dispersion": constraints.positive}
    support = constraints.nonnegative_integer

    def __init__(
        self,
        mean: Tensor | None = None,
        inverse_dispersion: Tensor | None = None,
        *,
        log_mean: Tensor | None = None,
        validate_args: bool | None = None,
    ):
        if (mean is None) == (log_mean is None) or inverse_dispersion is None:
            raise ValueError("give inverse_dispersion and exactly one of mean and log_mean")
        self.log_mean: Tensor = mean.log() if log_mean is None else log_mean  # type: ignore[union-attr]
        self.inverse_dispersion = inverse_dispersion
        shape, n_own = self.log_mean.shape, inverse_dispersion.dim()
        if shape[len(shape) - n_own :] != inverse_dispersion.shape:
            shape = torch.broadcast_shapes(shape, inverse_dispersion.shape)  # slow: not for each step
        super().__init__(shape, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """Mean, shape of the distribution."""
        return self.log_mean.exp().expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        """Variance m + m²/θ."""
        return self.mean + self.mean**2 / self.inverse_dispersion

    def expand(self, batch_shape: Shape, _instance: object = None) -> "NegativeBinomial":
        """Expand the mean only, so that per-gene tables stay per gene."""
        log_mean = self.log_mean.expand(batch_shape)
        return NegativeBinomial(
            inverse_dispersion=self.inverse_dispersion, log_mean=log_mean, validate_args=False
        )

    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """Counts: a Gamma rate, then a Poisson count."""
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            theta = self.inverse_dispersion.expand(shape)
            rate = torch._standard_gamma(theta) * (self.mean / self.inverse_dispersion).expand(shape)
            return torch.poisson(rate)

    def log_prob(self, value: Tensor) -> Tensor:
        """log NB(value; mean, θ), shape of the distribution."""
        if self._validate_args:
            self._validate_sample(value)
        result: Tensor = _NBLogProb.apply(value, self.inverse_dispersion, self.log_mean)
        return result

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> dist.TorchDistribution:
        """The same with trailing dimensions as one event; None takes all of them."""
        if reinterpreted_batch_ndims == 1:
            return _CellOfGenes(self, 1)
        return super().to_event(reinterpreted_batch_ndims)  # type: ignore[no-untyped-call]


class _CellOfGenes(dist.Independent):
    """Negative binomial counts of a cell's genes as one event."""

    def log_prob(self, value: Tensor) -> Tensor:
        """log NB summed over genes, shape of the distribution."""
        if not self._has_many_particles_of(value):
            return super().log_prob(value)  # type: ignore[no-untyped-call]
        nb = self.base_dist
        if nb._validate_args:
            nb._validate_sample(value)
        x_ng = value.reshape(-1, value.shape[-1])
        theta_ng = nb.inverse_dispersion.expand(value.shape).reshape(x_ng.shape)
        log_mean_sng = nb.log_mean.reshape(-1, *x_ng.shape)
        return _summed_over_genes(x_ng, theta_ng, log_mean_sng).view(self.batch_shape)

    def _has_many_particles_of(self, value: Tensor) -> bool:
        """Whether a gene of a cell has many means, but one count and θ, and nobody wants gradients."""
        theta, log_mean = self.base_dist.inverse_dispersion, self.base_dist.log_mean
        shape, n_particles = log_mean.shape, log_mean.numel() / max(1, value.numel())
        if shape != self.base_dist.batch_shape or shape[len(shape) - value.dim() :] != value.shape:
            return False
        if theta.dim() > value.dim() or n_particles < MANY_PARTICLES or get_proxy_mode() is not None:
            return False
        return not (torch.is_grad_enabled() and (theta.requires_grad or log_mean.requires_grad))


def _summed_over_genes(x_ng: Tensor, theta_ng: Tensor, log_mean_sng: Tensor) -> Tensor:
    """Σ_g log NB, shape s, n: of the lowest mean m' of each cell's gene among its particles, and the change.

    Cells whose sums could be rounded visibly, or overflow, are scored by the form that loses no digits.
    """
    counts_ng = _sparse_gamma_terms(x_ng, theta_ng)
    lowest_ng = log_mean_sng.amin(0)
    start_n = _with_mean(counts_ng, None, x_ng, theta_ng, lowest_ng, False)[0].sum(-1)
    change_sn, rise_sn = _changes(x_ng, theta_ng, log_mean_sng, lowest_ng)
    found_sn = start_n + change_sn
    bound_sn = (2 * rise_sn - change_sn) * (torch.finfo(rise_sn.dtype).eps / 2)
    uncertain = (~(bound_sn <= SUM_ERROR)).nonzero()
    rows = 1 + (AT_ONCE if x_ng.device.type == "cpu" else log_mean_sng.numel()) // x_ng.shape[1]
    for first in range(0, len(uncertain), rows):
        s_m, n_m = uncertain[first : first + rows].unbind(1)
        given = (x_ng[n_m], theta_ng[n_m], log_mean_sng[s_m, n_m])
        found_sn[s_m, n_m] = _with_mean(counts_ng[n_m], None, *given, False)[0].sum(-1)
    return found_sn


def _changes(
    x_ng: Tensor, theta_ng: Tensor, log_mean_sng: Tensor, lowest_ng: Tensor
) -> tuple[Tensor, Tensor]:
    """Σ_g log NB(x; m) − log NB(x; m'), and the positive part of this difference, each s, n.

    With d = log m − log m' ≥ 0 and b = m' / (m' + θ) it is x d − (x + θ) log(1 + b (exp d − 1)). In a few
    cells and particles at a time, which stay in the cache of a processor.
    """
    n_particles, n_cells, n_genes = log_mean_sng.shape
    share_ng, total_ng = torch.sigmoid(lowest_ng - theta_ng.log()), x_ng + theta_ng
    change_sn, rise_sn = log_mean_sng.new_empty(2, n_particles, n_cells)
    at_once = 4 * AT_ONCE if x_ng.device.type == "cpu" else log_mean_sng.numel()
    s_at_once = min(n_particles, max(1, at_once // n_genes))
    n_at_once = max(1, at_once // (n_genes * s_at_once))
    for n, s in product(range(0, n_cells, n_at_once), range(0, n_particles, s_at_once)):
        here = slice(n, n + n_at_once)
        place = (slice(s, s + s_at_once), here)
        gap_sng = log_mean_sng[place] - lowest_ng[here]
        risen_sng = gap_sng * x_ng[here]
        rise_sn[place] = risen_sng.sum(-1)
        growth_sng = torch.addcmul(-share_ng[here], gap_sng.exp_(), share_ng[here], out=gap_sng).log1p_()
        change_sn[place] = risen_sng.addcmul_(total_ng[here], growth_sng, value=-1).sum(-1)
    return change_sn, rise_sn


class ZeroInflatedNegativeBinomial(dist.TorchDistribution):
    r"""Negative binomial counts that are lost, and read as 0, with a probability π = sigmoid(zero_logit).

    .. math:: p(x) = \pi\, [x = 0] + (1 - \pi)\, \mathrm{NB}(x; m, \theta)

    The negative binomial takes its fastest form, as always; what depends on π alone keeps its shape.

    Args:
        counts: The negative binomial, of the counts that are not lost.
        zero_logit: log π − log(1 − π), shape g or any shape that broadcasts with the counts.

    Source: Lambert, Technometrics 1992; of single cells: Risso et al., Nature Communications 2018.
    """

    arg_constraints = {"zero_logit": constraints.real}
    support = constraints.nonnegative_integer

    def __init__(self, counts: NegativeBinomial, zero_logit: Tensor, validate_args: bool | None = None):
        self.counts, self.zero_logit = counts, zero_logit
        shape = torch.broadcast_shapes(counts.batch_shape, zero_logit.shape)
        super().__init__(shape, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """Mean (1 − π) m, shape of the distribution."""
        return torch.sigmoid(-self.zero_logit) * self.counts.mean

    @property
    def variance(self) -> Tensor:
        """Variance (1 − π) (v + π m²), with v that of the counts that are not lost."""
        lost, mean = torch.sigmoid(self.zero_logit), self.counts.mean
        return torch.sigmoid(-self.zero_logit) * (self.counts.variance + lost * mean**2)

    def expand(self, batch_shape: Shape, _instance: object = None) -> "ZeroInflatedNegativeBinomial":
        """Expand the counts only."""
        return ZeroInflatedNegativeBinomial(self.counts.expand(batch_shape), self.zero_logit, False)

    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """Counts, some of them lost."""
        shape = self._extended_shape(sample_shape)
        with torch.no_grad():
            lost = torch.bernoulli(torch.sigmoid(self.zero_logit).expand(shape))
            return self.counts.expand(shape).sample() * (1 - lost)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value), shape of the distribution.

        With d = log NB − zero_logit it is log π + d, and log π + log(1 + exp d) at 0: nothing cancels there.
        """
        if self._validate_args:
            self._validate_sample(value)
        odds = self.counts.log_prob(value) - self.zero_logit
        # above 40 even double precision cannot tell softplus from its argument
        return torch.where(value == 0, softplus(odds, threshold=40.0), odds) + logsigmoid(self.zero_logit)


class _NBLogProb(torch.autograd.Function):
    """log NB with its gradients in θ and log mean, worked out together: autograd takes twice the passes."""

    @staticmethod
    def forward(ctx, x: Tensor, theta: Tensor, log_mean: Tensor) -> Tensor:  # type: ignore[no-untyped-def]  # noqa: ANN001
        by_theta, wanted = ctx.needs_input_grad[1], any(ctx.needs_input_grad)
        per_gene = theta.dim() == 1 and x.dim() and x.shape[-1] == theta.shape[0]
        if _has_fixed_operations(x, wanted):
            found = _with_mean(*_series_terms(x, theta, by_theta), x, theta, log_mean, wanted)
        elif per_gene and log_mean.shape[-x.dim() :] == x.shape:
            found = _by_table(x, theta, log_mean, wanted, by_theta)
        else:
            found = _with_mean(*_gamma_terms(x, theta, by_theta), x, theta, log_mean, wanted)
        ctx.save_for_backward(x, theta, log_mean, *found[1:])
        return found[0]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor | None, Tensor | None]:  # type: ignore[no-untyped-def]  # noqa: ANN001
        x, theta, log_mean, by_log_odds, by_theta = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # second derivatives are asked for
            log_odds = log_mean - theta.log()
            by_log_odds = x * torch.sigmoid(-log_odds) - theta * torch.sigmoid(log_odds)
            by_theta = torch.digamma(x + theta) - torch.digamma(theta) - softplus(log_odds)
        theta_grad = mean_grad = None
        if wanted[0]:
            theta_grad = _summed_as(grad, by_theta, theta) - _summed_as(grad, by_log_odds, theta) / theta
        if wanted[1]:
            mean_grad = (grad * by_log_odds).sum_to_size(log_mean.shape)
        return None, theta_grad, mean_grad


def _summed_as(grad: Tensor, slope: Tensor, theta: Tensor) -> Tensor:
    """grad · slope, summed to the shape of θ. For a sum over cells a compiler would work it out again."""
    if grad.dim() == 2 and theta.dim() == 1:
        if grad.stride(1) == 0:  # the same for all genes of a cell
            weight_1n, value = grad[:, :1].t(), slope
        else:
            weight_1n, value = grad.new_ones(1, len(grad)), grad * slope
        return (weight_1n @ value).sum_to_size(1, len(theta)).squeeze(0)
    return (grad * slope).sum_to_size(theta.shape)


def _has_fixed_operations(x: Tensor, differentiable: bool) -> bool:
    """Whether counts may not decide what is done: the step is recorded, or no GPU is to be waited for."""
    return get_proxy_mode() is not None or (x.is_cuda and differentiable)


def _with_mean(
    counts: Tensor,
    slopes: Tensor | None,
    x: Tensor,
    theta: Tensor,
    log_mean: Tensor,
    wanted: bool,
    out: Sequence[Tensor | None] = (None, None, None),
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """log NB from its terms in x and θ; its gradients in o and θ. Written to ``out``, where given.

    With o = log m − log θ: log NB = counts − θ softplus(o) − x softplus(−o). Its gradients in o and, with o
    held, in θ are x sigmoid(−o) − θ sigmoid(o) and slopes − softplus(o). One term for each side:
    θ log θ − (x + θ) log(θ + m) would cancel digits where θ or x is large.
    """
    log_odds = log_mean - theta.log()
    below = log_odds.clamp(max=0)
    if not wanted:
        log_sum = log_odds.abs().neg_().exp_().log1p_()
        above = log_odds.neg_().add_(below)
        log_prob = torch.addcmul(counts, x + theta, log_sum, value=-1, out=out[0])
        return log_prob.addcmul_(theta, above).addcmul_(x, below), None, None
    above = below - log_odds
    x_share, theta_share = above.exp(), below.exp()  # sigmoids of −o and o, times 1 + exp(−|o|)
    both = x_share * theta_share
    log_sum = both.log1p()
    # softplus of −o and o, negated; memory at hand is warm
    less_x, less_theta = below.sub_(log_sum), torch.sub(above, log_sum, out=out[2])
    log_prob = torch.addcmul(counts, theta, less_theta, out=out[0]).addcmul_(x, less_x)
    by_log_odds = torch.mul(x_share, x, out=out[1]).addcmul_(theta, theta_share, value=-1).div_(both.add_(1))
    return log_prob, by_log_odds, None if slopes is None else less_theta.add_(slopes)


def _gamma_terms(x: Tensor, theta: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """log Γ(x + θ) − log Γ(θ) − log x!, at the shape of x, not of the particles; its slope in θ if wanted.

    In double precision: the difference is small, its parts are not.
    """
    x, wide = x.double(), theta.double()
    terms = torch.lgamma(x + wide) - torch.lgamma(wide) - torch.lgamma(x + 1)
    slopes = torch.digamma(x + wide) - torch.digamma(wide) if wanted else None
    return terms.to(theta.dtype), None if slopes is None else slopes.to(theta.dtype)


def _sparse_gamma_terms(x_ng: Tensor, theta_ng: Tensor) -> Tensor:
    """The same without slopes; they are 0 where x is 0, as in most genes of a cell."""
    terms_ng = torch.zeros_like(theta_ng)
    place = x_ng.nonzero(as_tuple=True)
    terms_ng[place] = _gamma_terms(x_ng[place], theta_ng[place], False)[0]
    return terms_ng


def _series_terms(x: Tensor, theta: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """The same by Stirling's series at arguments shifted by 4, error below 1e-6.

    The three series are taken as one: what is large in each cancels here on paper, not in single precision.

    Source: Abramowitz and Stegun, equations 6.1.15, 6.1.41 and 6.3.18.
    """
    w, total, one_over_y = theta + 4, x + theta, 1 / (x + 5)
    one_over_w, one_over_s = 1 / w, 1 / (total + 4)
    growth = torch.log1p(x * one_over_w)
    both = (w - 0.5) * growth + x * torch.log1p((theta - 1) * one_over_y)
    # the factors that the shifts leave behind, and y^-4.5 of the series
    square = one_over_y * one_over_y
    factorial = (x + 1) * (x + 4) * square * ((x + 2) * (x + 3) * square) * one_over_y.sqrt()
    factors, above = _product(theta), 1 / _product(total)
    both = both + (factorial * (factors * above)).log() + (5 - math.log(2 * math.pi) / 2)
    counts = both + _rest(one_over_s) - _rest(one_over_w) - _rest(one_over_y)
    if not wanted:
        return counts, None
    behind = _product_slope(total) * above - _product_slope(theta) / factors
    return counts, growth + _rest_slope(one_over_s) - _rest_slope(one_over_w) - behind


def _product(v: Tensor) -> Tensor:
    """v (v + 1) (v + 2) (v + 3)."""
    half = v * (v + 3)
    return half * (half + 2)


def _product_slope(v: Tensor) -> Tensor:
    """Derivative of this product."""
    return (2 * v + 3) * (2 * v * (v + 3) + 2)


def _rest(one_over_w: Tensor) -> Tensor:
    """What Stirling's series adds to (w − ½) log w − w + ½ log 2π."""
    return one_over_w * (1 / 12 - one_over_w * one_over_w * (1 / 360))


def _rest_slope(one_over_w: Tensor) -> Tensor:
    """What the digamma series adds to log w."""
    square = one_over_w * one_over_w
    return -0.5 * one_over_w - square * (1 / 12 - square * (1 / 120))


def _by_table(
    x: Tensor, theta_g: Tensor, log_mean: Tensor, wanted: bool, by_theta: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """log NB and its gradients, with T[j, g] = Σ_{i<j} log((θ_g + i) / (i + 1)) for the terms in x and θ.

    A few rows and particles at a time, so that what is worked on stays in the cache of a processor.
    """
    n_genes = len(theta_g)
    x_ng = x.reshape(-1, n_genes)
    log_mean_sng = log_mean.reshape(-1, *x_ng.shape)
    rows, place_m = _large(x_ng)
    tables = _tables(theta_g, rows, by_theta)
    outputs = [torch.empty_like(log_mean_sng) if want else None for want in (True, wanted, by_theta)]
    genes_g = torch.arange(n_genes, device=x.device, dtype=torch.int32)
    at_once = AT_ONCE if x.device.type == "cpu" else log_mean.numel()  # a GPU wants few, large calls
    n_at_once = max(1, at_once // n_genes)
    for start in range(0, len(x_ng), n_at_once):
        here = slice(start, start + n_at_once)
        block_ng = x_ng[here]
        # flat 32-bit places: gather with its 64-bit index takes twice as long
        at = torch.add(genes_g, block_ng.clamp(max=rows - 1).int(), alpha=n_genes).view(-1)
        looked = [table.index_select(0, at).view(block_ng.shape) for table in tables]
        counts_ng, slopes_ng = looked if by_theta else (looked[0], None)
        s_at_once = max(1, at_once // block_ng.numel())
        for first in range(0, len(log_mean_sng), s_at_once):
            place = (slice(first, first + s_at_once), here)
            out = [None if output is None else output[place] for output in outputs]
            _with_mean(counts_ng, slopes_ng, block_ng, theta_g, log_mean_sng[place], wanted, out)
    if len(place_m):
        gene_m = place_m % n_genes
        exact = _gamma_terms(x_ng.reshape(-1)[place_m], theta_g[gene_m], by_theta)
        for output, table, value_m in zip(outputs[::2], tables, exact, strict=False):
            assert output is not None and value_m is not None
            missing_m = value_m - table.view(rows, n_genes)[-1][gene_m]
            output.flatten(1).index_add_(1, place_m, missing_m.expand(len(output), -1))
    log_prob, *slopes = [None if output is None else output.view(log_mean.shape) for output in outputs]
    assert log_prob is not None
    return log_prob, slopes[0], slopes[1]


def _large(x_ng: Tensor) -> tuple[int, Tensor]:
    """Rows of the table; flat places of the counts that it does not hold.

    Filling a row costs as much as evaluating a fifth of its genes one by one.
    """
    rows, top_g = LEAST_ROWS, x_ng.amax(0) if len(x_ng) else x_ng.new_zeros(x_ng.shape[1])
    while True:
        large_g = (top_g >= rows).nonzero().squeeze(1)  # most genes have none: look at the others alone
        cell_m, gene_m = (x_ng.index_select(1, large_g) >= rows).nonzero(as_tuple=True)
        if rows >= MOST_ROWS or len(cell_m) <= rows * x_ng.shape[1] / 5:
            return rows, cell_m * x_ng.shape[1] + large_g[gene_m]
        rows *= 2


def _tables(theta_g: Tensor, rows: int, by_theta: bool) -> list[Tensor]:
    """T and its slopes in θ, each flattened: sums over the first 0, 1, 2, ... of the steps."""
    j_j1 = torch.arange(rows - 1, device=theta_g.device, dtype=theta_g.dtype).unsqueeze(1)
    steps_jg = theta_g + j_j1
    before = torch.ones(rows, rows - 1, device=theta_g.device, dtype=theta_g.dtype).tril(-1)
    steps = [(steps_jg / (j_j1 + 1)).log()] + ([steps_jg.reciprocal()] if by_theta else [])
    return [(before @ step_jg).view(-1) for step_jg in steps]  # faster than cumsum along the first axis


class Gate(dist.Bernoulli):
    """A Bernoulli that also scores its mean-field probability: log_prob is linear on [0, 1]."""

    support = constraints.unit_interval


class MeanFieldGate(Gate):
    """A Gate whose draw is its probability: exact, and differentiable, under terms that integrate it out."""

    has_rsample = True

    def rsample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """The probability, expanded."""
        return self.probs.expand(self._extended_shape(sample_shape))


class StraightThroughGate(Gate):
    """A Gate that is drawn open or closed, with the gradient of a relaxed draw at temperature 1.

    Source: Jang et al., ICLR 2017 (straight-through Gumbel estimator, for two states).
    """

    has_rsample = True

    def rsample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """0 or 1."""
        noise = torch.rand(self._extended_shape(sample_shape), device=self.probs.device)
        soft = torch.sigmoid(torch.logit(self.probs, eps=1e-6) + torch.logit(noise.clamp(1e-6, 1 - 1e-6)))
        return (soft > 0.5).to(soft) + (soft - soft.detach())


class GatedNormal(dist.Normal):
    """The slab of a spike and slab: a Normal that counts only as far as its gate is open.

    log p(value) = gate · log Normal(value; loc, scale). With binary gates, a closed gate leaves the value
    free and unscored; with mean-field probabilities it is the expectation over the gate.

    Args:
        gate: In [0, 1], any shape.
        loc: Mean, same shape or broadcast.
        scale: Standard deviation, same shape or broadcast.
    """

    arg_constraints = {
        "gate": constraints.unit_interval,
        "loc": constraints.real,
        "scale": constraints.positive,
    }

    def __init__(
        self, gate: Tensor, loc: Tensor | float, scale: Tensor | float, validate_args: bool | None = None
    ):
        self.gate, loc, scale = broadcast_all(gate, loc, scale)
        super().__init__(loc, scale, validate_args=validate_args)

    def expand(self, batch_shape: Shape, _instance: object = None) -> "GatedNormal":
        """Expand all three arguments."""
        gate, loc, scale = (a.expand(batch_shape) for a in (self.gate, self.loc, self.scale))
        return GatedNormal(gate, loc, scale, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Gate times the Normal log-probability."""
        return self.gate * dist.Normal.log_prob(self, value)


class UncertainMeanNormal(dist.TorchDistribution):
    """E over the mean of Normal(mean, 1), where the mean has expectation ``loc`` and variance ``loc_var``.

    log p(z) = log Normal(z; loc, 1) − loc_var / 2, exactly. With gates at their mean-field probabilities
    this integrates them out; with binary gates ``loc_var`` is 0 and it is a plain Normal.

    Args:
        loc: Expected mean, any shape.
        loc_var: Variance of the mean, same shape or broadcast.
    """

    arg_constraints = {"loc": constraints.real, "loc_var": constraints.nonnegative}
    support = constraints.real
    has_rsample = True

    def __init__(self, loc: Tensor, loc_var: Tensor, validate_args: bool | None = None):
        self.loc, self.loc_var = torch.broadcast_tensors(loc, loc_var)
        super().__init__(self.loc.shape, validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """Expected mean."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """One: the variance of the mean scores, it does not spread the draws."""
        return torch.ones_like(self.loc)

    def expand(self, batch_shape: Shape, _instance: object = None) -> "UncertainMeanNormal":
        """Expand both arguments."""
        return UncertainMeanNormal(self.loc.expand(batch_shape), self.loc_var.expand(batch_shape), False)

    def rsample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """Normal(loc, 1)."""
        return self.loc + torch.randn(self._extended_shape(sample_shape), device=self.loc.device)

    def log_prob(self, value: Tensor) -> Tensor:
        """log Normal(value; loc, 1) − loc_var / 2."""
        return dist.Normal(self.loc, 1.0, validate_args=False).log_prob(value) - self.loc_var / 2


class LinearSCM(dist.TorchDistribution):
    r"""Linear structural equations: z = W z + m + s ε, ε ~ Normal(0, 1), W strictly upper triangular.

    A programme's parents have higher indices. The determinant of I − W is 1, so the density is that of the
    noise: no matrix is inverted to score.

    With mean-field probabilities in place of binary gates the log-probability can be an expectation:
    E log p = −½ log 2π − E log s − ½ E[s⁻²] (r² + slack), with r the residual under the weights and means
    given. ``precision`` is E[s⁻²] then, and ``slack`` adds the variance of the residual.

    Args:
        loc: m: means of the noise, and what acts from outside, shape (..., k).
        weight_kk: W: effect of programme [., j] on programme [i, .], shape (..., k, k).
        log_scale: log s, shape (..., k).
        precision: E[s⁻²]; exp(−2 log s) if None.
        slack: Values -> variance of the residual, both (..., k); none if None.
    """

    arg_constraints = {"loc": constraints.real_vector, "log_scale": constraints.real_vector}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        loc: Tensor,
        weight_kk: Tensor,
        log_scale: Tensor,
        precision: Tensor | None = None,
        slack: Callable[[Tensor], Tensor] | None = None,
        validate_args: bool | None = None,
    ):
        self.loc, self.log_scale = torch.broadcast_tensors(loc, log_scale)
        self.weight_kk, self.slack = weight_kk, slack
        self.precision = torch.exp(-2 * log_scale) if precision is None else precision
        super().__init__(self.loc.shape[:-1], self.loc.shape[-1:], validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """Mean of the programmes."""
        return self._solved(self.loc)

    @property
    def variance(self) -> Tensor:
        """Variance of each programme."""
        identity_kk = torch.eye(self.event_shape[0], device=self.loc.device)
        total_kk = torch.linalg.inv(identity_kk - self.weight_kk)
        return (total_kk**2 * torch.exp(2 * self.log_scale).unsqueeze(-2)).sum(-1)

    def expand(self, batch_shape: Shape, _instance: object = None) -> "LinearSCM":
        """Expand loc and scale; weights broadcast."""
        loc, log_scale = (a.expand(*batch_shape, *self.event_shape) for a in (self.loc, self.log_scale))
        return LinearSCM(loc, self.weight_kk, log_scale, self.precision, self.slack, validate_args=False)

    def rsample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """Programmes, solved from their noise."""
        return self.from_noise(torch.randn(self._extended_shape(sample_shape), device=self.loc.device))

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value), or its expectation over mean-field gates."""
        square = (value - self._caused(value) - self.loc) ** 2
        if self.slack is not None:
            square = square + self.slack(value)
        return -(math.log(2 * math.pi) / 2 + self.log_scale + self.precision * square / 2).sum(-1)

    def noise_of(self, value: Tensor) -> Tensor:
        """ε of some programmes."""
        return (value - self._caused(value) - self.loc) * torch.exp(-self.log_scale)

    def from_noise(self, noise: Tensor) -> Tensor:
        """The programmes that arise from ε."""
        return self._solved(self.loc + noise * self.log_scale.exp())

    def _caused(self, value: Tensor) -> Tensor:
        return torch.einsum("...ij,...j->...i", self.weight_kk, value)

    def _solved(self, pushed: Tensor) -> Tensor:
        identity_kk = torch.eye(self.event_shape[0], device=self.loc.device)
        solved = torch.linalg.solve_triangular(
            identity_kk - self.weight_kk, pushed.unsqueeze(-1), upper=True, unitriangular=True
        )
        return solved.squeeze(-1)


class PopulationNormal(dist.TorchDistribution):
    """A multivariate normal with an uncertain mean: log p(z) = log Normal(z; loc, Σ) − ½ Σ_i (Σ⁻¹)_ii v_i.

    That is the expectation of the logarithm over a mean with variances v, where Σ = L Lᵀ.

    Args:
        loc: Expected mean, shape (..., k).
        scale_tril: L, shape (..., k, k).
        slack: v, shape (..., k); without it this is a multivariate normal.
    """

    arg_constraints = {"loc": constraints.real_vector, "scale_tril": constraints.lower_cholesky}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self, loc: Tensor, scale_tril: Tensor, slack: Tensor | None = None, validate_args: bool | None = None
    ):
        self.loc, self.scale_tril, self.slack = loc, scale_tril, slack
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """Expected mean."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Variance of each coordinate."""
        return (self.scale_tril**2).sum(-1).expand(self.loc.shape)

    def expand(self, batch_shape: Shape, _instance: object = None) -> "PopulationNormal":
        """Expand loc; the rest broadcasts."""
        loc = self.loc.expand(*batch_shape, *self.event_shape)
        return PopulationNormal(loc, self.scale_tril, self.slack, validate_args=False)

    def rsample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """loc + L ε."""
        return self.from_noise(torch.randn(self._extended_shape(sample_shape), device=self.loc.device))

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value)."""
        square = (self.noise_of(value) ** 2).sum(-1) + self._slack()
        log_det = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -math.log(2 * math.pi) * self.event_shape[0] / 2 - log_det - square / 2

    def noise_of(self, value: Tensor) -> Tensor:
        """ε of some values."""
        left = (value - self.loc).unsqueeze(-1)
        return torch.linalg.solve_triangular(self.scale_tril, left, upper=False).squeeze(-1)

    def from_noise(self, noise: Tensor) -> Tensor:
        """The values that arise from ε."""
        return self.loc + (self.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)

    def _slack(self) -> Tensor | float:
        if self.slack is None:
            return 0.0
        identity = torch.eye(self.event_shape[0], device=self.loc.device).expand_as(self.scale_tril)
        root = torch.linalg.solve_triangular(self.scale_tril, identity, upper=False)
        return ((root**2).sum(-2) * self.slack).sum(-1)


class TransitionMixture(dist.TorchDistribution):
    r"""A mixture of diagonal normals, one for each possible past m of a cell.

    .. math:: \log p(z) = \log \sum_m w_m \exp \sum_k \left(-\tfrac12 \log 2\pi - \mathrm{E} \log s_k
        - \tfrac12 \mathrm{E}[s_k^{-2}] \left((z_k - l_{mk})^2 + v_{mk}\right)\right)

    Where mechanisms are uncertain each component's logarithm is an expectation over them: v is the variance
    of the component's mean. As log Σ exp is convex, that is a lower bound of the expected log-probability.

    Args:
        loc_nmk: Means of the components, shape (..., m, k).
        log_scale_nk: E log s, shape (..., k).
        precision_nk: E[s⁻²], same shape.
        slack_nmk: v, shape (..., m, k).
        logits_nm: log w, up to a constant; equal weights if None.
    """

    arg_constraints = {"log_scale_nk": constraints.real_vector}
    support = constraints.real_vector

    def __init__(
        self,
        loc_nmk: Tensor,
        log_scale_nk: Tensor,
        precision_nk: Tensor,
        slack_nmk: Tensor,
        logits_nm: Tensor | None = None,
        validate_args: bool | None = None,
    ):
        self.loc_nmk, self.log_scale_nk = loc_nmk, log_scale_nk
        self.precision_nk, self.slack_nmk = precision_nk, slack_nmk
        logits_nm = torch.zeros_like(loc_nmk[..., 0]) if logits_nm is None else logits_nm
        self.log_weight_nm = logits_nm.log_softmax(-1)
        batch_shape = torch.broadcast_shapes(self.log_weight_nm.shape[:-1], loc_nmk.shape[:-2])
        super().__init__(batch_shape, loc_nmk.shape[-1:], validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """Mean of the mixture."""
        return (self.log_weight_nm.exp().unsqueeze(-1) * self.loc_nmk).sum(-2)

    @property
    def variance(self) -> Tensor:
        """Variance of the mixture."""
        weight_nm1 = self.log_weight_nm.exp().unsqueeze(-1)
        between = (weight_nm1 * (self.loc_nmk - self.mean.unsqueeze(-2)) ** 2).sum(-2)
        return between + torch.exp(2 * self.log_scale_nk)

    def expand(self, batch_shape: Shape, _instance: object = None) -> "TransitionMixture":
        """Expand the weights; the rest broadcasts."""
        log_weight_nm = self.log_weight_nm.expand(*batch_shape, self.log_weight_nm.shape[-1])
        parts = (self.loc_nmk, self.log_scale_nk, self.precision_nk, self.slack_nmk)
        return TransitionMixture(*parts, log_weight_nm, validate_args=False)

    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:
        """A past by its weight, then its normal."""
        shape = self._extended_shape(sample_shape)
        past = dist.Categorical(logits=self.log_weight_nm).sample(sample_shape)
        place = past[..., None, None].expand(*shape[:-1], 1, shape[-1])
        loc = self.loc_nmk.expand(*shape[:-1], *self.loc_nmk.shape[-2:]).gather(-2, place).squeeze(-2)
        return loc + self.log_scale_nk.exp() * torch.randn_like(loc)

    def components(self, value: Tensor) -> Tensor:
        """log w_m + log of the component at value, shape (..., m)."""
        square_nmk = (value.unsqueeze(-2) - self.loc_nmk) ** 2 + self.slack_nmk
        nats_nm = (self.precision_nk.unsqueeze(-2) * square_nmk).sum(-1) / 2
        constant_n1 = (math.log(2 * math.pi) / 2 + self.log_scale_nk).sum(-1, keepdim=True)
        return self.log_weight_nm - constant_n1 - nats_nm

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value), or its bound."""
        return self.components(value).logsumexp(-1)


class TransportMixture(TransitionMixture):
    """A mixture whose values come from the components that entropic transport couples them with.

    The logarithm is an expectation over the coupling, log p(z) = Σ_m π_m(z) log p_m(z). A component costs
    half the squared distance from its mean. The coupling takes no part in the gradient.

    Args:
        mixture: The mixture.
        price_nm: Potentials of the components, shape (..., m): they let each be used as much as others.
        blur: Weight of the entropy, a squared distance.
    """

    def __init__(self, mixture: TransitionMixture, price_nm: Tensor, blur: float):
        parts = (mixture.loc_nmk, mixture.log_scale_nk, mixture.precision_nk, mixture.slack_nmk)
        super().__init__(*parts, mixture.log_weight_nm, validate_args=False)
        self.price_nm, self.blur = price_nm.detach(), blur

    def expand(self, batch_shape: Shape, _instance: object = None) -> "TransportMixture":
        """Expand weights and potentials; Pyro's plates do so."""
        price_nm = self.price_nm.expand(*batch_shape, self.price_nm.shape[-1])
        return TransportMixture(super().expand(batch_shape), price_nm, self.blur)

    def priced(self, value: Tensor) -> Tensor:
        """Logarithm of the coupling, up to a constant, shape (..., m)."""
        square_nm = ((value.unsqueeze(-2) - self.loc_nmk) ** 2).sum(-1)
        return self.price_nm - square_nm.detach() / (2 * self.blur)

    def log_prob(self, value: Tensor) -> Tensor:
        """The expected log of the component at value."""
        own_nm = self.components(value) - self.log_weight_nm
        return (self.priced(value).softmax(-1) * own_nm).sum(-1)


def spread(likelihood: Likelihood, n_genes: int, network: str = "mlp") -> tuple[Any, Any, Any]:
    """The parameters that a measurement has beside its mean, for a model to own.

    Args:
        likelihood: Kind of measurement.
        n_genes: Genes g.
        network: What draws the mean. The pixels of an ``"image"``, from -1 to 1, share one standard
            deviation: with one each, those that are nearly constant would outweigh all that moves.

    Returns:
        Inverse dispersions θ_g of ``"nb"`` and ``"zinb"``, standard deviations of ``"gaussian"``, and
        log-odds that a count of ``"zinb"`` is lost; each a PyroParam of shape g, or None for the other kinds.

    Raises:
        ValueError: The likelihood is none of the four.
    """
    if likelihood not in get_args(Likelihood):
        raise ValueError(f"likelihood is one of {list(get_args(Likelihood))}, not {likelihood!r}")
    theta_g, scale_g = (
        PyroParam(torch.full((n,), start), constraint=constraints.positive)
        for n, start in ((n_genes, 5.0), (1, 0.1) if network == "image" else (n_genes, 1.0))
    )
    zero_logit_g = PyroParam(torch.full((n_genes,), -3.0))
    return (
        theta_g if likelihood in ("nb", "zinb") else None,
        scale_g if likelihood == "gaussian" else None,
        zero_logit_g if likelihood == "zinb" else None,
    )


def measurement(
    output_ng: Tensor,
    library_n1: Tensor,
    theta_g: Tensor | None,
    scale_g: Tensor | None,
    zero_logit_g: Tensor | None = None,
) -> dist.TorchDistribution:
    """p(x | z): counts around library × softmax, or a Gaussian around the decoder's output.

    That is the mean of all counts, lost ones included, so that they add up to the library: where a share π of
    a gene's counts is lost, the others have the mean library × softmax / (1 − π).

    Args:
        output_ng: What the decoder says, shape (..., n, g).
        library_n1: Total counts.
        theta_g: Inverse dispersions; None, with ``scale_g`` None, makes Poisson counts.
        scale_g: Standard deviations; with them x is Gaussian.
        zero_logit_g: Log-odds that a count is lost; with them, and ``theta_g``, counts are zero-inflated.
    """
    if scale_g is not None:
        return dist.Normal(output_ng, scale_g)
    log_total = library_n1.log()
    if zero_logit_g is not None:
        log_total = log_total - logsigmoid(-zero_logit_g)
    log_mean_ng = output_ng.log_softmax(-1)
    in_place = not log_mean_ng.requires_grad  # one tensor of all particles less
    log_mean_ng = log_mean_ng.add_(log_total) if in_place else log_mean_ng + log_total
    if theta_g is None:
        return dist.Poisson(log_mean_ng.exp())
    counts = NegativeBinomial(inverse_dispersion=theta_g, log_mean=log_mean_ng)
    return counts if zero_logit_g is None else ZeroInflatedNegativeBinomial(counts, zero_logit_g)


@register_kl(dist.Normal, UncertainMeanNormal)
def _kl_uncertain_mean(q: dist.Normal, p: UncertainMeanNormal) -> Tensor:
    return (q.scale**2 + (q.loc - p.loc) ** 2 + p.loc_var - 1) / 2 - q.scale.log()


@register_kl(dist.Beta, dist.Beta)
def _kl_beta(q: dist.Beta, p: dist.Beta) -> Tensor:
    prior = p._dirichlet.concentration
    for dim, stride in enumerate(prior.stride() if q.batch_shape == p.batch_shape else ()):
        if stride == 0:  # expanded: the same for all
            prior = prior.narrow(dim, 0, 1)
    found: Tensor = _BetaKL.apply(q._dirichlet.concentration, prior)
    return found


class _BetaKL(torch.autograd.Function):
    """KL of Beta distributions by both concentrations of each at once, with its gradients.

    torch takes them apart, eight times over, and works out what cancels in the gradients.
    """

    @staticmethod
    def forward(ctx, q: Tensor, p: Tensor) -> Tensor:  # type: ignore[no-untyped-def]  # noqa: ANN001
        ctx.save_for_backward(q, p)
        total_q, total_p = q.sum(-1, keepdim=True), p.sum(-1, keepdim=True)
        each = torch.lgamma(p) - torch.lgamma(q) + (q - p) * torch.digamma(q)
        both = torch.lgamma(total_q) - torch.lgamma(total_p) - (total_q - total_p) * torch.digamma(total_q)
        return (each.sum(-1, keepdim=True) + both).squeeze(-1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[no-untyped-def]  # noqa: ANN001
        q, p = ctx.saved_tensors
        total_q, total_p = q.sum(-1, keepdim=True), p.sum(-1, keepdim=True)
        by_q = by_p = None
        if ctx.needs_input_grad[0]:
            by_q = (q - p) * torch.polygamma(1, q) - (total_q - total_p) * torch.polygamma(1, total_q)
            by_q = (grad.unsqueeze(-1) * by_q).sum_to_size(q.shape)
        if ctx.needs_input_grad[1]:
            slopes_p, slopes_q = (torch.digamma(c) - torch.digamma(c.sum(-1, keepdim=True)) for c in (p, q))
            by_p = (grad.unsqueeze(-1) * (slopes_p - slopes_q)).sum_to_size(p.shape)
        return by_q, by_p


@register_kl(GatedNormal, GatedNormal)
def _kl_gated(q: GatedNormal, p: GatedNormal) -> Tensor:
    slab = (q.scale**2 + (q.loc - p.loc) ** 2) / (2 * p.scale**2) - 0.5 + p.scale.log() - q.scale.log()
    return q.gate * slab


@register_kl(Gate, Gate)
def _kl_gate(q: Gate, p: Gate) -> Tensor:
    """In logits l: log φ = l + log(1 − φ), and log(1 − φ) = −softplus(l)."""
    logit_p = p.logits if "logits" in vars(p) else torch.logit(p.probs, eps=torch.finfo(p.probs.dtype).eps)
    closed = logsigmoid(-q.logits) - logsigmoid(-logit_p)
    return torch.addcmul(closed, q.probs, q.logits - logit_p)
