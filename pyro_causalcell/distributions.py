"""Distributions the generative processes are written with."""

import math
from collections.abc import Callable
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
    "UncertainMeanNormal",
    "measurement",
    "spread",
]

Likelihood = Literal["nb", "poisson", "gaussian"]
"""``"nb"`` or ``"poisson"`` for counts, ``"gaussian"`` for log-normalised values."""

Shape = torch.Size | list[int] | tuple[int, ...]

LEAST_ROWS, MOST_ROWS = 32, 512
"""Counts below are looked up in a table, larger ones are evaluated one by one. In single cells few are: a
short table is enough. It grows where many are."""


class NegativeBinomial(dist.TorchDistribution):
    r"""Negative binomial with a mean and an inverse dispersion.

    .. math:: \mathrm{Var}(x) = m + m^2 / \theta

    Three forms of the log-probability, equal up to rounding. One inverse dispersion per gene: the terms
    that depend on x and θ alone come from tables over counts, T[j, g] = Σ_{i<j} log(θ_g + i), which cost
    a fraction of ``lgamma`` and are not repeated over particles. Any other shape: ``lgamma``. In a step that
    is being recorded: Stirling's series, whose operations are the same for any counts and fuse.

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
        shape = torch.broadcast_shapes(self.log_mean.shape, inverse_dispersion.shape)
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
        theta, log_mean = self.inverse_dispersion, self.log_mean
        log_odds = log_mean - theta.log()
        # one term for each side: θ log θ − (x + θ) log(θ + m) would cancel digits where θ or x is large
        counts = self._log_count_terms(value, theta)
        return counts - theta * softplus(log_odds) + value * logsigmoid(log_odds)

    def _log_count_terms(self, x: Tensor, theta: Tensor) -> Tensor:
        """log Γ(x + θ) − log Γ(θ) − log x!, at the shape of x, not of the particles."""
        if get_proxy_mode() is not None:
            return _series_terms(x, theta)
        if theta.dim() == 1 and x.dim() and x.shape[-1] == theta.shape[0]:
            return _TableTerms.apply(x, theta)
        return _gamma_terms(x, theta)


def _gamma_terms(x: Tensor, theta: Tensor) -> Tensor:
    """log Γ(x + θ) − log Γ(θ) − log x! in double precision: the difference is small, its terms are not."""
    x, wide = x.double(), theta.double()
    return (torch.lgamma(x + wide) - torch.lgamma(wide) - torch.lgamma(x + 1)).to(theta.dtype)


def _series_terms(x: Tensor, theta: Tensor) -> Tensor:
    """The same by Stirling's series at arguments shifted by 4, error below 1e-6.

    The three series are taken as one: what is large in each cancels here on paper, not in single precision.

    Source: Abramowitz and Stegun, equations 6.1.15 and 6.1.41.
    """
    y, w = x + 5, theta + 4
    ratio = (1 + x / theta) * (1 + x / (theta + 1)) * (1 + x / (theta + 2)) * (1 + x / (theta + 3))
    both = (w - 0.5) * torch.log1p(x / w) + x * torch.log1p((theta - 1) / y)
    counts = ((x + 1) * (x + 2) * (x + 3) * (x + 4)).log() - 4.5 * y.log() + 5 - math.log(2 * math.pi) / 2
    return both + _rest(w + x) - _rest(w) - ratio.log() + counts - _rest(y)


def _rest(w: Tensor) -> Tensor:
    """What Stirling's series adds to (w − ½) log w − w + ½ log 2π."""
    return (1 / 12 - 1 / (360 * w**2)) / w


def _gamma_slopes(x: Tensor, theta: Tensor) -> Tensor:
    """Derivative of these terms in θ."""
    x, wide = x.double(), theta.double()
    return (torch.digamma(x + wide) - torch.digamma(wide)).to(theta.dtype)


class _TableTerms(torch.autograd.Function):
    """log Γ(x_ng + θ_g) − log Γ(θ_g) − log x_ng! by tables over counts; gradient in θ alone."""

    @staticmethod
    def forward(ctx, x_ng: Tensor, theta_g: Tensor) -> Tensor:  # type: ignore[no-untyped-def]  # noqa: ANN001
        n_genes = theta_g.shape[0]
        flat = x_ng.reshape(-1)
        rows, big = _split(flat, n_genes)
        j_j1 = torch.arange(rows - 1, device=x_ng.device, dtype=theta_g.dtype).unsqueeze(1)
        steps_jg = theta_g + j_j1
        genes_g = torch.arange(n_genes, device=x_ng.device, dtype=torch.int32)
        # flat 32-bit places: gather with its 64-bit index takes twice as long
        at = (x_ng.clamp(max=rows - 1).int() * n_genes + genes_g).reshape(-1)
        terms = _sums((steps_jg / (j_j1 + 1)).log()).index_select(0, at)
        terms[big] = _gamma_terms(flat[big], theta_g[big % n_genes])
        if ctx.needs_input_grad[1]:
            slopes = _sums(steps_jg.reciprocal()).index_select(0, at)
            slopes[big] = _gamma_slopes(flat[big], theta_g[big % n_genes])
            ctx.save_for_backward(slopes.view(x_ng.shape), x_ng, theta_g)
        return terms.view(x_ng.shape)

    @staticmethod
    def backward(ctx, grad_ng: Tensor) -> tuple[None, Tensor]:  # type: ignore[no-untyped-def]  # noqa: ANN001
        slope_ng, x_ng, theta_g = ctx.saved_tensors
        if torch.is_grad_enabled():  # second derivatives are asked for: the table has none
            slope_ng = torch.digamma(x_ng + theta_g) - torch.digamma(theta_g)
        return None, (grad_ng * slope_ng).reshape(-1, theta_g.shape[0]).sum(0)


def _split(flat: Tensor, n_genes: int) -> tuple[int, Tensor]:
    """Rows of the table, and where the counts are that it does not hold.

    Filling a row costs as much as evaluating a fifth of its genes one by one.
    """
    rows = LEAST_ROWS
    big = (flat >= rows).nonzero().squeeze(1)
    while rows < MOST_ROWS and len(big) > rows * n_genes / 5:
        rows *= 2
        big = (flat >= rows).nonzero().squeeze(1)
    return rows, big


def _sums(steps_jg: Tensor) -> Tensor:
    """Sums of the first 0, 1, 2, ... rows, flattened."""
    return torch.cat([torch.zeros_like(steps_jg[:1]), steps_jg.cumsum(0)]).view(-1)


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


def spread(likelihood: Likelihood, n_genes: int) -> tuple[Any, Any]:
    """The parameters that a measurement has beside its mean, for a model to own.

    Args:
        likelihood: Kind of measurement.
        n_genes: Genes g.

    Returns:
        Inverse dispersions θ_g of ``"nb"`` and standard deviations of ``"gaussian"``, each a PyroParam of
        shape g, or None for the other kinds.

    Raises:
        ValueError: The likelihood is none of the three.
    """
    if likelihood not in get_args(Likelihood):
        raise ValueError(f"likelihood is one of {list(get_args(Likelihood))}, not {likelihood!r}")
    theta_g, scale_g = (
        PyroParam(torch.full((n_genes,), start), constraint=constraints.positive) for start in (5.0, 1.0)
    )
    return theta_g if likelihood == "nb" else None, scale_g if likelihood == "gaussian" else None


def measurement(
    output_ng: Tensor, library_n1: Tensor, theta_g: Tensor | None, scale_g: Tensor | None
) -> dist.TorchDistribution:
    """p(x | z): counts around library × softmax, or a Gaussian around the decoder's output.

    Args:
        output_ng: What the decoder says, shape (..., n, g).
        library_n1: Total counts.
        theta_g: Inverse dispersions; None, with ``scale_g`` None, makes Poisson counts.
        scale_g: Standard deviations; with them x is Gaussian.
    """
    if scale_g is not None:
        return dist.Normal(output_ng, scale_g)
    log_mean_ng = library_n1.log() + output_ng.log_softmax(-1)
    if theta_g is None:
        return dist.Poisson(log_mean_ng.exp())
    return NegativeBinomial(inverse_dispersion=theta_g, log_mean=log_mean_ng)


@register_kl(dist.Normal, UncertainMeanNormal)
def _kl_uncertain_mean(q: dist.Normal, p: UncertainMeanNormal) -> Tensor:
    return (q.scale**2 + (q.loc - p.loc) ** 2 + p.loc_var - 1) / 2 - q.scale.log()


@register_kl(GatedNormal, GatedNormal)
def _kl_gated(q: GatedNormal, p: GatedNormal) -> Tensor:
    slab = (q.scale**2 + (q.loc - p.loc) ** 2) / (2 * p.scale**2) - 0.5 + p.scale.log() - q.scale.log()
    return q.gate * slab


@register_kl(Gate, Gate)
def _kl_gate(q: Gate, p: Gate) -> Tensor:
    return -q.entropy() - p.log_prob(q.probs)  # log p is linear: its mean is its value at the mean
