"""The distributions against high precision, torch's own, enumeration and sampled moments."""

import itertools
from types import SimpleNamespace

import mpmath
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch.distributions import kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_causalcell import distributions
from pyro_causalcell.distributions import (
    Gate,
    GatedNormal,
    LinearSCM,
    MeanFieldGate,
    NegativeBinomial,
    StraightThroughGate,
    UncertainMeanNormal,
    ZeroInflatedNegativeBinomial,
    measurement,
    spread,
)

MEANS = (1e-8, 1e-3, 1.0, 40.0, 1e4, 1e7)
THETAS = (1e-3, 0.3, 5.0, 200.0, 1e5)
COUNTS = (0, 1, 3, 511, 512, 513, 20_000, 1_000_000)


def _exact(x: float, mean: float, theta: float) -> float:
    """log NB with 50 digits."""
    with mpmath.workdps(50):
        x, mean, theta = (mpmath.mpf(float(a)) for a in (x, mean, theta))
        value = mpmath.loggamma(x + theta) - mpmath.loggamma(theta) - mpmath.loggamma(x + 1)
        value += theta * mpmath.log(theta / (theta + mean)) + x * mpmath.log(mean / (theta + mean))
        return float(value)


def _exact_slopes(x: float, mean: float, theta: float) -> tuple[float, float]:
    """d/d log mean and d/dθ of log NB with 50 digits."""
    with mpmath.workdps(50):
        x, mean, theta = (mpmath.mpf(float(a)) for a in (x, mean, theta))
        by_log_mean = theta * (x - mean) / (theta + mean)
        by_theta = mpmath.digamma(x + theta) - mpmath.digamma(theta)
        by_theta += mpmath.log(theta / (theta + mean)) + (mean - x) / (theta + mean)
        return float(by_log_mean), float(by_theta)


def _grid() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Counts and log means of all combinations, shape n, g, and one θ per gene g."""
    rows = list(itertools.product(MEANS, COUNTS))
    log_mean_n1 = torch.tensor([m for m, _ in rows]).log().unsqueeze(1)
    x_n1 = torch.tensor([float(x) for _, x in rows]).unsqueeze(1)
    theta_g = torch.tensor(THETAS)
    shape = (len(rows), len(theta_g))
    return x_n1.expand(shape).contiguous(), log_mean_n1.expand(shape).contiguous(), theta_g


@pytest.fixture(params=["table", "lgamma", "series"])
def form(request, monkeypatch) -> str:
    """Which form of the negative binomial is in use; the series is what a recorded step takes."""
    if request.param == "series":
        monkeypatch.setattr(distributions, "get_proxy_mode", lambda: "recording")
    return request.param


def test_nb_value_over_extremes(form):
    x_ng, log_mean_ng, theta_g = _grid()
    theta = theta_g.expand(len(x_ng), -1) if form == "lgamma" else theta_g
    found_ng = NegativeBinomial(inverse_dispersion=theta, log_mean=log_mean_ng).log_prob(x_ng).numpy()
    true_means = log_mean_ng.double().exp().numpy()
    expected_ng = np.vectorize(_exact)(x_ng.numpy(), true_means, theta_g.double().numpy())
    error = np.abs(found_ng - expected_ng) / np.maximum(1, np.abs(expected_ng))
    assert error[x_ng.numpy() <= 513].max() < 2e-6
    assert error.max() < 1e-3  # a millionth of the counts' own rounding, in float32


def test_nb_gradients_over_extremes(form):
    x_ng, log_mean_ng, theta_g = _grid()
    log_mean_ng.requires_grad_()
    theta = theta_g.expand(len(x_ng), -1).contiguous().requires_grad_()
    for row in range(len(x_ng)):  # row by row, so that each θ gets its own gradient in both forms
        given = theta[row : row + 1] if form == "lgamma" else theta[row]
        nb = NegativeBinomial(inverse_dispersion=given, log_mean=log_mean_ng[row : row + 1])
        nb.log_prob(x_ng[row : row + 1]).sum().backward()
    means = log_mean_ng.detach().double().exp().numpy()
    by_log_mean, by_theta = np.vectorize(_exact_slopes)(x_ng.numpy(), means, theta_g.double().numpy())
    np.testing.assert_allclose(log_mean_ng.grad, by_log_mean, rtol=2e-5, atol=1e-6)
    by_log_theta, found = by_theta * theta_g.numpy(), (theta.grad * theta_g).numpy()
    assert (np.abs(found - by_log_theta) < 1e-3 + 1e-4 * np.abs(by_log_theta) + 1e-6 * x_ng.numpy()).all()


def test_nb_equals_torch_and_both_forms_agree():
    generator = torch.Generator().manual_seed(0)
    x_ng = torch.poisson(torch.rand(50, 30, generator=generator) * 20, generator=generator).double()
    values = []
    for form in ("table", "lgamma", "torch"):
        log_mean = torch.linspace(-3, 4, 1500, dtype=torch.double).reshape(50, 30).requires_grad_()
        theta = torch.linspace(0.1, 30, 30, dtype=torch.double).requires_grad_()
        if form == "torch":
            nb = dist.NegativeBinomial(theta, logits=log_mean - theta.log())
        else:
            given = theta if form == "table" else theta.unsqueeze(0)
            nb = NegativeBinomial(inverse_dispersion=given, log_mean=log_mean)
        log_prob = nb.log_prob(x_ng)
        weights = torch.linspace(0.5, 2, 1500, dtype=torch.double).reshape(50, 30)
        values.append((log_prob, *torch.autograd.grad((weights * log_prob).sum(), [log_mean, theta])))
    for other in values[1:]:
        for a, b in zip(values[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mean", [3.0, 60.0, 2000.0])
def test_nb_table_grows_with_the_counts(mean):
    """Few, many and only large counts: short table, longer table, longest table and single terms."""
    torch.manual_seed(0)
    x_ng = torch.poisson(torch.full((300, 4), mean, dtype=torch.double))
    theta_g = torch.tensor([0.2, 1.0, 5.0, 80.0], dtype=torch.double)
    results = []
    for per_gene in (True, False):
        theta = theta_g.clone().requires_grad_()
        given = theta if per_gene else theta.unsqueeze(0)
        nb = NegativeBinomial(inverse_dispersion=given, log_mean=torch.full_like(x_ng, mean).log())
        log_prob = nb.log_prob(x_ng)
        results.append((log_prob, *torch.autograd.grad(log_prob.sum(), theta)))
    for table, lgamma in zip(*results, strict=True):
        torch.testing.assert_close(table, lgamma, rtol=1e-9, atol=1e-9)


def test_nb_passes_gradcheck():
    x_ng = torch.tensor([[0.0, 600.0, 3.0], [2.0, 1.0, 0.0]], dtype=torch.double)
    log_mean = torch.randn(4, 2, 3, dtype=torch.double, requires_grad=True)
    theta = torch.tensor([0.4, 7.0, 2.0], dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda m, t: NegativeBinomial(inverse_dispersion=t, log_mean=m).log_prob(x_ng), (log_mean, theta)
    )


@pytest.mark.parametrize("recorded", [False, True])
def test_nb_count_terms_are_not_repeated_over_particles(monkeypatch, recorded):
    """Terms in x and θ alone keep the shape of x, also after a plate has expanded the distribution."""
    shapes = []
    with_mean = distributions._with_mean

    def spy(counts, slopes, x, theta, *rest):
        shapes.append((tuple(theta.shape), tuple(counts.shape)))
        return with_mean(counts, slopes, x, theta, *rest)

    monkeypatch.setattr(distributions, "_with_mean", spy)
    monkeypatch.setattr(distributions, "get_proxy_mode", lambda: "recording" if recorded else None)
    x_ng, theta_g = torch.ones(4, 3), torch.tensor([1.0, 2.0, 3.0])
    nb = NegativeBinomial(inverse_dispersion=theta_g, log_mean=torch.zeros(7, 4, 3))
    assert nb.to_event(1).log_prob(x_ng).shape == (7, 4)
    one = NegativeBinomial(inverse_dispersion=theta_g, log_mean=torch.zeros(4, 3))
    expanded = one.expand(torch.Size((7, 4, 3)))
    assert expanded.batch_shape == (7, 4, 3) and expanded.inverse_dispersion.shape == (3,)
    torch.testing.assert_close(expanded.log_prob(x_ng), one.log_prob(x_ng).expand(7, 4, 3))
    assert set(shapes) == {((3,), (4, 3))}


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_nb_does_not_depend_on_how_many_values_are_worked_on_together(monkeypatch, at_once):
    """Blocks of cells, or of particles, with counts beyond the table in some of them."""
    monkeypatch.setattr(distributions, "AT_ONCE", at_once)
    x_ng = torch.tensor([[0.0, 600.0, 3.0], [2.0, 1.0, 40.0], [5.0, 0.0, 0.0]], dtype=torch.double)
    results = []
    for shape in ((3, 3), (5, 3, 3), (2, 5, 3, 3)):
        torch.manual_seed(0)
        log_mean = torch.randn(shape, dtype=torch.double, requires_grad=True)
        theta = torch.tensor([0.4, 7.0, 2.0], dtype=torch.double, requires_grad=True)
        for given in (theta, theta.unsqueeze(0)):  # by table, by lgamma
            log_prob = NegativeBinomial(inverse_dispersion=given, log_mean=log_mean).log_prob(x_ng)
            weighted = (log_prob * torch.linspace(1, 2, log_prob.numel()).view(shape)).sum()
            results.append((log_prob, *torch.autograd.grad(weighted, [log_mean, theta])))
    for table, lgamma in zip(results[::2], results[1::2], strict=True):
        for a, b in zip(table, lgamma, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def _many_particles(depth: float, theta: float, spread: float) -> tuple[torch.Tensor, ...]:
    """Counts of 3 cells, their θ, and log means of 40 particles of each, of 300 genes."""
    torch.manual_seed(0)
    theta_g = theta * torch.exp(0.5 * torch.randn(300))
    log_mean_g = np.log(depth) + (2 * torch.randn(300)).log_softmax(-1)
    x_ng = NegativeBinomial(inverse_dispersion=theta_g, log_mean=log_mean_g.expand(3, -1)).sample()
    return x_ng, theta_g, log_mean_g + spread * torch.randn(40, 3, 300)


def _gene_by_gene(x: torch.Tensor, theta: torch.Tensor, log_mean: torch.Tensor) -> torch.Tensor:
    """The sum over genes in double precision."""
    nb = NegativeBinomial(inverse_dispersion=theta.double(), log_mean=log_mean.double())
    return nb.log_prob(x.double()).sum(-1)


def _count_exact_calls(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of the log means that are scored gene by gene."""
    shapes = []
    with_mean = distributions._with_mean

    def spy(counts, slopes, x, theta, log_mean, *rest):
        shapes.append(tuple(log_mean.shape))
        return with_mean(counts, slopes, x, theta, log_mean, *rest)

    monkeypatch.setattr(distributions, "_with_mean", spy)
    return shapes


@pytest.mark.parametrize("depth", [300.0, 10_000.0, 50_000.0])
@pytest.mark.parametrize("theta", [0.01, 5.0, 1e4])
@pytest.mark.parametrize("spread", [0.1, 0.5])
def test_nb_particles_are_scored_relative_to_each_other(monkeypatch, depth, theta, spread):
    x_ng, theta_g, log_mean_sng = _many_particles(depth, theta, spread)
    expected_sn = _gene_by_gene(x_ng, theta_g, log_mean_sng)
    shapes = _count_exact_calls(monkeypatch)
    found_sn = NegativeBinomial(inverse_dispersion=theta_g, log_mean=log_mean_sng).to_event(1).log_prob(x_ng)
    torch.testing.assert_close(found_sn.double(), expected_sn, rtol=0, atol=0.01)
    assert shapes[0] == (3, 300) and sum(n for n, _ in shapes[1:]) <= 12  # the lowest means, a tenth of 120


def test_nb_particles_far_apart_keep_their_digits(monkeypatch):
    """Sums that would be rounded by nats, and ratios of means that overflow, take the form gene by gene."""
    pairs = list(itertools.product(COUNTS, THETAS))
    x_1g = torch.tensor([[float(x) for x, _ in pairs]])
    theta_g = torch.tensor([theta for _, theta in pairs])
    log_mean_s = torch.cat([torch.tensor(MEANS).log(), torch.tensor([-100.0, -40.0, 0.5, 30.0, 60.0])])
    log_mean_s1g = log_mean_s.view(-1, 1, 1).expand(-1, 1, len(pairs))
    shapes = _count_exact_calls(monkeypatch)
    nb = NegativeBinomial(inverse_dispersion=theta_g, log_mean=log_mean_s1g).to_event(1)
    found_s1 = nb.log_prob(x_1g)
    assert shapes[0] == (1, len(pairs)) and sum(n for n, _ in shapes[1:]) >= 9
    expected_s1 = _gene_by_gene(x_1g, theta_g, log_mean_s1g)
    torch.testing.assert_close(found_s1.double(), expected_s1, rtol=2e-6, atol=0.01)


@pytest.mark.parametrize("at_once", [1, 1000, 100_000])
def test_nb_particles_do_not_depend_on_how_many_are_worked_on_together(monkeypatch, at_once):
    x_ng, theta_g, log_mean_sng = _many_particles(1e6, 1.0, 0.3)  # deep: some are scored gene by gene
    expected_sn = _gene_by_gene(x_ng, theta_g, log_mean_sng)
    monkeypatch.setattr(distributions, "AT_ONCE", at_once)
    nb = NegativeBinomial(inverse_dispersion=theta_g, log_mean=log_mean_sng).to_event(1)
    torch.testing.assert_close(nb.log_prob(x_ng).double(), expected_sn, rtol=0, atol=0.02)


def test_nb_particles_of_any_shape():
    x_ng, theta_g, log_mean_sng = _many_particles(300.0, 2.0, 0.2)
    x_ng, theta_g, log_mean_sng = x_ng[:, :7], theta_g[:7], log_mean_sng[..., :7]
    expected_sn = _gene_by_gene(x_ng, theta_g, log_mean_sng).float()
    for theta in (theta_g, theta_g.unsqueeze(0), theta_g.expand(3, -1)):
        nb = NegativeBinomial(inverse_dispersion=theta, log_mean=log_mean_sng)
        torch.testing.assert_close(nb.to_event(1).log_prob(x_ng), expected_sn)
    nb = NegativeBinomial(inverse_dispersion=theta_g, log_mean=log_mean_sng.view(5, 8, 3, 7))
    torch.testing.assert_close(nb.to_event(1).log_prob(x_ng), expected_sn.view(5, 8, 3))
    torch.testing.assert_close(nb.to_event().log_prob(x_ng), expected_sn.sum())
    one = NegativeBinomial(inverse_dispersion=theta_g, log_mean=log_mean_sng[:, 0]).to_event(1)
    torch.testing.assert_close(one.log_prob(x_ng[0]), expected_sn[:, 0])
    expanded = one.expand(torch.Size((3, 40)))
    assert expanded.batch_shape == (3, 40) and expanded.event_shape == (7,)
    torch.testing.assert_close(expanded.log_prob(x_ng[0]), expected_sn[:, 0].expand(3, -1))


def test_nb_particles_keep_their_gradient_and_their_validation():
    x_ng, theta_g, log_mean_sng = _many_particles(300.0, 2.0, 0.2)
    grads = []
    for in_one_event in (True, False):
        theta, log_mean = theta_g.clone().requires_grad_(), log_mean_sng.clone().requires_grad_()
        nb = NegativeBinomial(inverse_dispersion=theta, log_mean=log_mean)
        log_prob = nb.to_event(1).log_prob(x_ng) if in_one_event else nb.log_prob(x_ng).sum(-1)
        grads.append(torch.autograd.grad(log_prob.square().sum(), [theta, log_mean]))
    for event, single in zip(*grads, strict=True):
        torch.testing.assert_close(event, single)
    nb = NegativeBinomial(inverse_dispersion=theta_g, log_mean=log_mean_sng, validate_args=True).to_event(1)
    with pytest.raises(ValueError, match="support"):
        nb.log_prob(x_ng - 0.5)


ZERO_LOGITS = (-30.0, -4.0, 0.0, 4.0, 30.0)


def _exact_zinb(x: float, log_mean: float, theta: float, logit: float) -> tuple[float, float, float, float]:
    """log ZINB and its slopes in log mean, θ and the logit, with 50 digits."""
    with mpmath.workdps(50):
        x, mean, theta = (
            mpmath.mpf(float(x)),
            mpmath.exp(mpmath.mpf(float(log_mean))),
            mpmath.mpf(float(theta)),
        )
        lost = 1 / (1 + mpmath.exp(-mpmath.mpf(float(logit))))
        log_nb = mpmath.loggamma(x + theta) - mpmath.loggamma(theta) - mpmath.loggamma(x + 1)
        log_nb += theta * mpmath.log(theta / (theta + mean)) + x * mpmath.log(mean / (theta + mean))
        by_theta = mpmath.digamma(x + theta) - mpmath.digamma(theta)
        by_theta += mpmath.log(theta / (theta + mean)) + (mean - x) / (theta + mean)
        by_log_mean = theta * (x - mean) / (theta + mean)
        kept = (1 - lost) * mpmath.exp(log_nb)
        total = kept + (lost if x == 0 else 0)
        share = kept / total
        slopes = (share * by_log_mean, share * by_theta, 1 - share - lost)
        return tuple(float(value) for value in (mpmath.log(total), *slopes))


@pytest.fixture(scope="module")
def zinb_grid() -> tuple[torch.Tensor, ...]:
    """Counts and log means of all combinations, n, g; θ and logits of each gene; exact values and slopes."""
    rows = list(itertools.product((1e-8, 1e-3, 1.0, 40.0, 1e4, 1e8), (0, 1, 600, 1_000_000)))
    columns = list(itertools.product((1e-3, 0.3, 5.0, 1e5), ZERO_LOGITS))
    log_mean_n1 = torch.tensor([mean for mean, _ in rows]).log().unsqueeze(1)
    x_n1 = torch.tensor([float(x) for _, x in rows]).unsqueeze(1)
    theta_g, logit_g = (torch.tensor(values) for values in zip(*columns, strict=True))
    exact = np.vectorize(_exact_zinb)(*(a.numpy() for a in (x_n1, log_mean_n1, theta_g, logit_g)))
    shape = (len(rows), len(columns))
    return x_n1.expand(shape).contiguous(), log_mean_n1.expand(shape).contiguous(), theta_g, logit_g, exact


def _zinb(theta: torch.Tensor, log_mean: torch.Tensor, logit: torch.Tensor) -> ZeroInflatedNegativeBinomial:
    counts = NegativeBinomial(inverse_dispersion=theta, log_mean=log_mean)
    return ZeroInflatedNegativeBinomial(counts, logit)


def test_zinb_value_over_extremes(form, zinb_grid):
    x_ng, log_mean_ng, theta_g, logit_g, (expected_ng, *_) = zinb_grid
    theta = theta_g.expand(len(x_ng), -1) if form == "lgamma" else theta_g
    found_ng = _zinb(theta, log_mean_ng, logit_g).log_prob(x_ng).numpy()
    error = np.abs(found_ng - expected_ng) / np.maximum(1, np.abs(expected_ng))
    assert error[x_ng.numpy() <= 600].max() < 5e-6
    assert error.max() < 1e-3


def test_zinb_gradients_over_extremes(form, zinb_grid):
    x_ng, log_mean_ng, theta_g, logit_g, (_, *expected) = zinb_grid
    given = [log_mean_ng, theta_g.expand(x_ng.shape), logit_g.expand(x_ng.shape)]
    log_mean, theta, logit = (values.clone().requires_grad_() for values in given)
    for n in range(len(x_ng)):  # row by row, so that each θ and logit gets its own gradient in every form
        rows = slice(n, n + 1) if form == "lgamma" else n
        _zinb(theta[rows], log_mean[n : n + 1], logit[rows]).log_prob(x_ng[n : n + 1]).sum().backward()
    by_log_mean, by_theta, by_logit = expected
    np.testing.assert_allclose(log_mean.grad, by_log_mean, rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(logit.grad, by_logit, rtol=2e-5, atol=2e-6)
    by_log_theta, found = by_theta * theta_g.numpy(), (theta.grad * theta_g).numpy()
    assert (np.abs(found - by_log_theta) < 1e-3 + 1e-4 * np.abs(by_log_theta) + 1e-6 * x_ng.numpy()).all()


def test_zinb_equals_pyro_and_passes_gradcheck():
    x_ng = torch.tensor([[0.0, 600.0, 3.0], [2.0, 0.0, 0.0]], dtype=torch.double)
    log_mean = torch.randn(4, 2, 3, dtype=torch.double, requires_grad=True)
    theta = torch.tensor([0.4, 7.0, 2.0], dtype=torch.double, requires_grad=True)
    logit = torch.tensor([-2.0, 0.5, 3.0], dtype=torch.double, requires_grad=True)
    inputs = (theta, log_mean, logit)
    theirs = dist.ZeroInflatedNegativeBinomial(theta, logits=log_mean - theta.log(), gate_logits=logit)
    found = []
    for log_prob in (_zinb(*inputs).log_prob(x_ng), theirs.log_prob(x_ng)):
        found.append((log_prob, *torch.autograd.grad(log_prob.square().sum(), inputs)))
    torch.testing.assert_close(*found)
    torch.testing.assert_close(_zinb(*inputs).mean, theirs.mean)
    torch.testing.assert_close(_zinb(*inputs).variance, theirs.variance)
    assert torch.autograd.gradcheck(lambda *given: _zinb(*given).log_prob(x_ng), inputs)


def test_zinb_draws_have_their_share_of_zeros_and_their_moments():
    torch.manual_seed(0)
    zinb = _zinb(torch.tensor([0.5, 3.0]), torch.tensor([0.0, 3.0]), torch.tensor([-1.0, 1.0]))
    x_sg = zinb.sample((40_000,))
    assert x_sg.shape == (40_000, 2) and bool((x_sg == x_sg.round()).all())
    share_g = zinb.log_prob(torch.zeros(2)).exp()
    torch.testing.assert_close((x_sg == 0).float().mean(0), share_g, rtol=0, atol=0.01)
    torch.testing.assert_close(x_sg.mean(0), zinb.mean, rtol=0.05, atol=0)
    torch.testing.assert_close(x_sg.var(0), zinb.variance, rtol=0.1, atol=0)
    all_n1 = torch.arange(3000.0).unsqueeze(1)
    torch.testing.assert_close(zinb.log_prob(all_n1).exp().sum(0), torch.ones(2), rtol=1e-5, atol=0)
    wide = zinb.expand(torch.Size((5, 2)))
    assert wide.batch_shape == (5, 2) and wide.sample((3,)).shape == (3, 5, 2)
    torch.testing.assert_close(wide.log_prob(x_sg[:5]), zinb.log_prob(x_sg[:5]))
    assert wide.to_event(1).log_prob(x_sg[:5]).shape == (5,)
    with pytest.raises(ValueError, match="support"):
        ZeroInflatedNegativeBinomial(zinb.counts, zinb.zero_logit, True).log_prob(torch.tensor([0.5, 1.0]))


def test_zinb_terms_of_parameters_are_not_repeated_over_particles(monkeypatch):
    shapes = []
    with_mean, logsigmoid = distributions._with_mean, distributions.logsigmoid

    def of_counts(counts, slopes, x, theta, *rest):
        shapes.append((tuple(theta.shape), tuple(counts.shape)))
        return with_mean(counts, slopes, x, theta, *rest)

    def of_logits(logit):
        shapes.append(tuple(logit.shape))
        return logsigmoid(logit)

    monkeypatch.setattr(distributions, "_with_mean", of_counts)
    monkeypatch.setattr(distributions, "logsigmoid", of_logits)
    zinb = _zinb(torch.ones(3), torch.zeros(4, 3), torch.zeros(3)).expand(torch.Size((7, 4, 3)))
    assert zinb.to_event(1).log_prob(torch.ones(4, 3)).shape == (7, 4)
    assert shapes == [((3,), (4, 3)), (3,)]


class _NoWaiting(TorchDispatchMode):
    """Refuse what makes a processor wait for what a GPU has worked out."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in {"nonzero", "_local_scalar_dense", "item", "masked_select"}
        return func(*args, **(kwargs or {}))


def test_nb_is_trained_on_a_gpu_without_waiting_for_it(monkeypatch):
    counts = SimpleNamespace(is_cuda=True)
    assert distributions._has_fixed_operations(counts, differentiable=True)
    assert not distributions._has_fixed_operations(counts, differentiable=False)
    assert not distributions._has_fixed_operations(torch.ones(1), differentiable=True)
    x_ng, theta_g = torch.tensor([[0.0, 700.0], [3.0, 1.0]]), torch.tensor([0.5, 4.0], requires_grad=True)
    log_mean_ng = torch.zeros(2, 2, requires_grad=True)
    nb = NegativeBinomial(inverse_dispersion=theta_g, log_mean=log_mean_ng, validate_args=False).to_event(1)
    with _NoWaiting(), pytest.raises(AssertionError):
        nb.log_prob(x_ng)  # on a processor, counts beyond the table are looked for
    monkeypatch.setattr(distributions, "_has_fixed_operations", lambda *given: True)
    with _NoWaiting():
        nb.log_prob(x_ng).sum().backward()
    assert bool(theta_g.grad.isfinite().all()) and bool(log_mean_ng.grad.isfinite().all())


def test_nb_moments_of_draws():
    torch.manual_seed(0)
    mean_g, theta_g = torch.tensor([0.5, 8.0, 300.0]), torch.tensor([0.3, 2.0, 50.0])
    nb = NegativeBinomial(mean_g, theta_g)
    x_sg = nb.sample((40_000,))
    assert x_sg.shape == (40_000, 3) and bool((x_sg == x_sg.round()).all()) and not x_sg.requires_grad
    torch.testing.assert_close(x_sg.mean(0), nb.mean, rtol=0.05, atol=0.0)
    torch.testing.assert_close(x_sg.var(0), nb.variance, rtol=0.1, atol=0.0)
    torch.testing.assert_close(nb.variance, mean_g + mean_g**2 / theta_g)
    assert nb.expand(torch.Size((5, 3))).sample((2,)).shape == (2, 5, 3)


def test_nb_sums_to_one():
    x_n1 = torch.arange(3000.0).unsqueeze(1)
    nb = NegativeBinomial(torch.tensor([0.2, 3.0, 40.0]), torch.tensor([0.5, 1.0, 9.0]))
    torch.testing.assert_close(nb.log_prob(x_n1.expand(-1, 3)).exp().sum(0), torch.ones(3), rtol=1e-5, atol=0)


def test_nb_refuses_what_it_cannot_use():
    one = torch.ones(2)
    with pytest.raises(ValueError, match="exactly one of mean and log_mean"):
        NegativeBinomial(one, one, log_mean=one)
    with pytest.raises(ValueError, match="inverse_dispersion"):
        NegativeBinomial(one)
    with pytest.raises(ValueError, match="inverse_dispersion"):
        NegativeBinomial(one, -one, validate_args=True)
    with pytest.raises(ValueError, match="log_mean"):
        NegativeBinomial(-one, one, validate_args=True)
    with pytest.raises(ValueError, match="value"):
        NegativeBinomial(one, one, validate_args=True).log_prob(torch.tensor([0.5, 1.0]))


def test_nb_second_derivatives_know_the_table():
    x_ng = torch.tensor([[0.0, 600.0, 3.0], [2.0, 1.0, 0.0]], dtype=torch.double)
    log_mean = torch.randn(2, 3, dtype=torch.double, requires_grad=True)
    theta = torch.tensor([0.4, 7.0, 2.0], dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda m, t: NegativeBinomial(inverse_dispersion=t, log_mean=m).log_prob(x_ng), (log_mean, theta)
    )


# ---------------------------------------------------------------- gates and normals


def test_uncertain_mean_normal_is_the_exact_expectation_over_gates():
    """E over independent binary gates of log N(z; Σ u γ μ, 1), by full enumeration."""
    torch.manual_seed(0)
    u_p, mu_p, phi_p = torch.tensor([1.0, 2.0, 0.0, 0.5]), torch.randn(4), torch.rand(4)
    z = torch.tensor(0.7)
    expected = torch.zeros(())
    for gates in itertools.product([0.0, 1.0], repeat=4):
        gate_p = torch.tensor(gates)
        weight = (phi_p**gate_p * (1 - phi_p) ** (1 - gate_p)).prod()
        expected = expected + weight * dist.Normal(u_p @ (gate_p * mu_p), 1.0).log_prob(z)
    found = UncertainMeanNormal(u_p @ (phi_p * mu_p), u_p**2 @ (phi_p * (1 - phi_p) * mu_p**2)).log_prob(z)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_uncertain_mean_normal_kl_is_the_average_of_its_own_log_probabilities():
    """The registered KL equals the integral of log q − log p (Gauss-Hermite quadrature)."""
    q = dist.Normal(torch.tensor([0.3, -1.0]), torch.tensor([0.5, 1.7]))
    p = UncertainMeanNormal(torch.tensor([1.0, 0.0]), torch.tensor([0.8, 0.0]))
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    z_s2 = q.loc + q.scale * torch.tensor(nodes, dtype=torch.float32).unsqueeze(1)
    gap = (q.log_prob(z_s2) - p.log_prob(z_s2)).double().numpy()
    np.testing.assert_allclose(kl_divergence(q, p), weights @ gap / weights.sum(), rtol=1e-5)
    plain = kl_divergence(q, dist.Normal(p.loc, 1.0))
    torch.testing.assert_close(kl_divergence(q, p)[1], plain[1])  # no variance: a plain normal


def test_uncertain_mean_normal_shapes_draws_and_device_of_gradients():
    torch.manual_seed(0)
    loc = torch.tensor([1.0, -2.0], requires_grad=True)
    p = UncertainMeanNormal(loc, torch.tensor(0.5)).expand(torch.Size((3, 2)))
    assert p.batch_shape == (3, 2) and p.to_event(1).event_shape == (2,)
    draw = p.rsample((20_000,))
    torch.testing.assert_close(draw.mean((0, 1)), loc.detach(), atol=0.03, rtol=0)
    torch.testing.assert_close(draw.var((0, 1)), torch.ones(2), atol=0.05, rtol=0)
    draw.mean().backward()
    torch.testing.assert_close(loc.grad, torch.full((2,), 0.5))


def test_mean_field_gate_draws_its_probability_with_a_gradient():
    logit = torch.tensor([-1.0, 0.0, 3.0], requires_grad=True)
    gate = MeanFieldGate(logits=logit)
    draw = gate.rsample((4,))
    torch.testing.assert_close(draw, torch.sigmoid(logit).expand(4, 3))
    assert gate.has_rsample and not Gate(logits=logit).has_rsample
    draw.sum().backward()
    assert bool((logit.grad > 0).all())
    binary = Gate(logits=logit.detach()).sample((100,))
    assert set(binary.unique().tolist()) <= {0.0, 1.0}


def test_gate_log_prob_is_linear_between_closed_and_open():
    gate = Gate(torch.tensor([0.2, 0.9]))
    part = torch.tensor([0.3, 0.75])
    ends = part * gate.log_prob(torch.ones(2)) + (1 - part) * gate.log_prob(torch.zeros(2))
    torch.testing.assert_close(gate.log_prob(part), ends)
    with pytest.raises(ValueError, match="value"):
        Gate(torch.tensor([0.2]), validate_args=True).log_prob(torch.tensor([1.5]))


@pytest.mark.parametrize("q_class", [Gate, MeanFieldGate, StraightThroughGate])
def test_gate_kl_is_the_bernoulli_kl(q_class):
    q, p = torch.tensor([0.01, 0.5, 0.99]), torch.tensor([0.3, 0.05, 0.6])
    expected = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    torch.testing.assert_close(kl_divergence(q_class(q), Gate(p)), expected)


def test_straight_through_gate_is_binary_with_the_gradient_of_a_relaxed_draw():
    logit = torch.tensor([-1.0, 0.0, 3.0], requires_grad=True)
    torch.manual_seed(0)
    draw = StraightThroughGate(logits=logit).rsample((20_000,))
    assert set(draw.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(draw.mean(0), torch.sigmoid(logit), atol=0.02, rtol=0)
    (draw * torch.arange(3)).sum().backward()
    torch.manual_seed(0)
    relaxed = logit.detach() + torch.logit(torch.rand(20_000, 3))
    slope = torch.sigmoid(relaxed) * torch.sigmoid(-relaxed)
    torch.testing.assert_close(logit.grad, slope.sum(0) * torch.arange(3), rtol=1e-3, atol=0.1)


def test_measurements_around_a_decoder():
    output_ng, library_n1 = torch.randn(5, 3), torch.full((5, 1), 40.0)
    counts = {"nb": NegativeBinomial, "zinb": ZeroInflatedNegativeBinomial, "poisson": dist.Poisson}
    for likelihood, kind in counts.items():
        given = [None if part is None else part.init_value for part in spread(likelihood, 3)]
        x = measurement(output_ng, library_n1, *given)
        assert isinstance(x, kind)
        torch.testing.assert_close(x.mean, 40 * output_ng.softmax(-1))  # of all counts, lost ones included
        learned = measurement(output_ng.clone().requires_grad_(), library_n1, *given)
        assert torch.equal(learned.mean, x.mean) and learned.mean.requires_grad
    _, scale_g, _ = spread("gaussian", 3)
    x = measurement(output_ng, library_n1, None, scale_g.init_value)
    torch.testing.assert_close(x.mean, output_ng)
    assert scale_g.init_value.shape == (3,)
    _, shared_1, _ = spread("gaussian", 3, "image")  # a flat ground would outweigh what stands on it
    assert shared_1.init_value.shape == (1,)
    with pytest.raises(ValueError, match="likelihood is one of"):
        spread("zip", 3)


def test_gated_normal_scores_by_its_gate():
    gate, loc, scale = torch.tensor([0.0, 0.4, 1.0]), torch.tensor(1.0), torch.tensor(2.0)
    p = GatedNormal(gate, loc, scale)
    value = torch.tensor([5.0, -1.0, 0.5])
    torch.testing.assert_close(p.log_prob(value), gate * dist.Normal(loc, scale).log_prob(value))
    q = GatedNormal(gate, torch.tensor([0.1, -2.0, 3.0]), torch.tensor([0.2, 1.0, 0.5]))
    plain = kl_divergence(dist.Normal(q.loc, q.scale), dist.Normal(p.loc, p.scale))
    torch.testing.assert_close(kl_divergence(q, p), gate * plain)
    wide = p.expand(torch.Size((2, 3)))
    assert wide.gate.shape == wide.loc.shape == wide.rsample().shape == (2, 3)
    with pytest.raises(ValueError, match="gate"):
        GatedNormal(torch.tensor([1.2]), 0.0, 1.0, validate_args=True)


def _scm() -> LinearSCM:
    """Four cells with mechanisms of their own, three programmes."""
    torch.manual_seed(0)
    return LinearSCM(torch.randn(4, 3), torch.randn(4, 3, 3).triu(1), torch.randn(4, 3) / 2)


def _normal_law(scm: LinearSCM, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of one cell: (I - W)^-1 m and (I - W)^-1 diag(s^2) (I - W)^-T."""
    total_kk = np.linalg.inv(np.eye(3) - scm.weight_kk[n].double().numpy())
    variance_k = np.exp(2 * scm.log_scale[n].double().numpy())
    return total_kk @ scm.loc[n].double().numpy(), total_kk * variance_k @ total_kk.T


def test_linear_scm_has_the_density_of_its_normal_law():
    scm = _scm()
    z_nk = scm.sample()
    assert scm.batch_shape == (4,) and scm.event_shape == (3,)
    for n in range(4):
        mean_k, covariance_kk = _normal_law(scm, n)
        expected = stats.multivariate_normal(mean_k, covariance_kk).logpdf(z_nk[n].numpy())
        np.testing.assert_allclose(scm.log_prob(z_nk)[n], expected, rtol=1e-5)
        np.testing.assert_allclose(scm.mean[n], mean_k, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(scm.variance[n], np.diag(covariance_kk), rtol=1e-5)
    first = LinearSCM(scm.loc[0], scm.weight_kk[0], scm.log_scale[0]).expand(torch.Size((4,)))
    assert first.batch_shape == (4,) and first.sample((2,)).shape == (2, 4, 3)
    torch.testing.assert_close(first.log_prob(z_nk)[0], scm.log_prob(z_nk)[0])


def test_linear_scm_draws_follow_the_law():
    scm = _scm()
    scm.loc.requires_grad_()
    z_snk = scm.rsample((40_000,))
    for n in range(4):
        mean_k, covariance_kk = _normal_law(_scm(), n)
        sd_k = np.sqrt(np.diag(covariance_kk))
        drawn_sk = z_snk[:, n].detach().numpy()
        np.testing.assert_allclose(drawn_sk.mean(0) / sd_k, mean_k / sd_k, atol=0.03)
        np.testing.assert_allclose(
            np.cov(drawn_sk.T) / np.outer(sd_k, sd_k), covariance_kk / np.outer(sd_k, sd_k), atol=0.03
        )
    z_snk.mean(0).sum().backward()
    assert bool((scm.loc.grad != 0).all())


def test_linear_scm_expects_over_undecided_scales_and_residuals():
    """-½ log 2π - log s - ½ E[s^-2] (r² + slack), with E[s^-2] and the slack given."""
    loc, weight_kk = torch.tensor([0.5, -1.0]), torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    scm = LinearSCM(loc, weight_kk, torch.tensor([0.1, -0.2]), torch.tensor([1.5, 3.0]), lambda z: z**2)
    z = torch.tensor([2.0, 0.25])
    square = np.array([(2.0 - 0.5 - 2 * 0.25) ** 2 + 4.0, (0.25 + 1.0) ** 2 + 0.0625])
    expected = -(np.log(2 * np.pi) / 2 + np.array([0.1, -0.2]) + np.array([1.5, 3.0]) * square / 2).sum()
    np.testing.assert_allclose(scm.log_prob(z), expected, rtol=1e-6)


def test_noise_makes_the_programmes_that_it_came_from():
    """By hand: the last programme first, then its children."""
    weight_kk = torch.tensor([[0.0, 1.0, -1.0], [0.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
    scm = LinearSCM(torch.tensor([1.0, -2.0, 0.5]), weight_kk, torch.tensor([0.5, 2.0, 1.0]).log())
    noise_nk = torch.tensor([[0.0, 0.0, 0.0], [1.0, -1.0, 2.0]])
    last, middle = torch.tensor([0.5, 2.5]), torch.tensor([-1.0, 1.0])  # 0.5 + 1·2; -2 + 2·(-1) + 2·2.5
    first = torch.tensor([-0.5, 0.0])  # 1 + 0.5·1 + 1·1 - 1·2.5
    value_nk = torch.stack([first, middle, last], 1)
    torch.testing.assert_close(scm.from_noise(noise_nk), value_nk)
    torch.testing.assert_close(scm.noise_of(value_nk), noise_nk)
    torch.testing.assert_close(scm.from_noise(torch.zeros(3)), scm.mean)


@pytest.mark.gpu
def test_nb_on_a_gpu_equals_the_cpu():
    x_ng, log_mean_ng, theta_g = _grid()
    cpu = NegativeBinomial(inverse_dispersion=theta_g, log_mean=log_mean_ng).log_prob(x_ng)
    nb = NegativeBinomial(inverse_dispersion=theta_g.cuda(), log_mean=log_mean_ng.cuda())
    torch.testing.assert_close(nb.log_prob(x_ng.cuda()).cpu(), cpu, rtol=1e-4, atol=1e-3)
    assert nb.sample().is_cuda


@pytest.mark.parametrize(
    ("of_q", "of_p", "expanded"),
    [
        ((3, 4), (3, 4), None),
        ((3, 4), (), (3, 4)),
        ((3, 4), (), None),
        ((2, 1), (5,), None),
        ((4,), (4,), (3, 4)),
    ],
)
def test_kl_of_betas_is_that_of_torch_with_both_derivatives(of_q, of_p, expanded):
    shapes = (of_q, of_q, of_p, of_p)
    given = [(torch.rand(shape).double() * 3 + 0.3).requires_grad_() for shape in shapes]

    def kl(a, b, c, d, beta=dist.Beta):
        prior = beta(c, d)
        return kl_divergence(beta(a, b), prior.expand(expanded) if expanded else prior)

    expected = kl(*given, beta=torch.distributions.Beta)
    torch.testing.assert_close(kl(*given), expected)
    assert torch.autograd.gradcheck(kl, given) and torch.autograd.gradgradcheck(kl, given)
