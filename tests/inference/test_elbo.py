"""The one-handler ELBO: stock Pyro's number and gradient, exact gates, plate scaling, a closed form."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from torch.distributions import constraints

from pyro_causalcell.batch import Batch
from pyro_causalcell.errors import PairError
from pyro_causalcell.inference import SiteWeights, elbo_terms

GATES = ["posterior", "open", "closed", "sampled"]
LIKELIHOODS = ["nb", "zinb", "poisson", "gaussian"]


def _both(model, guide, batch, weights=None) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """ELBO and its gradients, by the one handler and by stock Pyro, under the same draws."""
    modules = torch.nn.ModuleDict({"model": model, "guide": guide})
    results = []
    for stock in (False, True):
        torch.manual_seed(7)
        if stock:
            with SiteWeights(weights or {}), pyro.validation_enabled(False):
                value = -TraceMeanField_ELBO().differentiable_loss(model, guide, batch)
        else:
            value = sum(elbo_terms(model, guide, batch, weights).values())
        modules.zero_grad(set_to_none=True)
        value.backward()
        results.append((value, {n: p.grad for n, p in modules.named_parameters() if p.grad is not None}))
    return results


def _assert_equal(results) -> None:
    (value, gradients), (stock_value, stock_gradients) = results
    torch.testing.assert_close(value, stock_value, rtol=1e-5, atol=1e-4)
    assert gradients.keys() == stock_gradients.keys() and gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, stock_gradients[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("gates", GATES)
def test_equals_stock_in_value_and_gradient(build, batch, gates, likelihood):
    _assert_equal(_both(*build(gates=gates, likelihood=likelihood), batch))


@pytest.mark.parametrize(
    ("guide", "settings"),
    [
        ({"intervention": "ignored"}, {}),
        ({"intervention": "input"}, {}),
        ({"intervention": "prior"}, {"interactions": ((1, 2), (0, 1))}),
        ({}, {"epistasis": True}),
        ({}, {"gates": "sampled", "sparsity": "l1"}),
        ({}, {"norm": "batch"}),
    ],
)
def test_equals_stock_for_other_settings(build, batch, guide, settings):
    _assert_equal(_both(*build(guide, **settings), batch))


def test_equals_stock_under_weights_and_in_evaluation_mode(build, batch):
    model, guide = build()
    _assert_equal(
        _both(model, guide, batch, {"z": 8.0, "gate": 0.25, "edge_rate": torch.tensor(0.5), "x": 2.0})
    )
    zero = dict.fromkeys(("gate", "edge_rate", "min_effect", "shift"), 0.0)
    terms = elbo_terms(model, guide, batch, zero)
    assert all(float(terms[name].detach()) == 0.0 for name in zero if name in terms)
    model.eval(), guide.eval()  # gates are drawn: no gradient reaches them, the rest is the same
    _assert_equal(_both(model, guide, batch))


class _Rich(pyro.nn.PyroModule):
    """Nested plates, masks, scales, a deterministic site, factors, an unregistered KL, a Delta."""

    def __init__(self, as_guide: bool):
        super().__init__()
        self.as_guide = as_guide
        self.a = pyro.nn.PyroParam(torch.tensor([0.3, -0.2, 0.9]))
        self.b = pyro.nn.PyroParam(torch.tensor(0.4), constraint=constraints.positive)

    def forward(self, batch: Batch):
        a, b, guide = self.a, self.b, self.as_guide
        n = batch.n_cells
        cells = pyro.plate("cells", batch.n_total, subsample=batch.index_n, dim=-1)
        rate = pyro.sample(
            "rate", dist.LogNormal(a[0], b) if guide else dist.Gamma(2.0, 1.0 + b)
        )  # no KL known
        point = pyro.sample("point", dist.Delta(a[1]) if guide else dist.Normal(0.0, 1.0 + b))
        corner = (
            dist.Normal(a, b).to_event(1) if guide else dist.MultivariateNormal(a, torch.eye(3) * (1 + b))
        )
        pyro.sample("corner", corner)
        with pyro.plate("sets", 3, dim=-2), poutine.scale(scale=0.5):
            w = pyro.sample("w", dist.Normal(a.unsqueeze(-1), b))
            with cells:
                mask = (torch.arange(n) % 3 > 0).expand(3, n)
                with poutine.mask(mask=mask):
                    v = pyro.sample("v", dist.Normal(w + (0.1 if guide else 0.0), b))
        with cells:
            pyro.sample("t", dist.LogNormal(a[2], b) if guide else dist.LogNormal(0.0, 1.0 + b))
            if not guide:
                mean = pyro.deterministic("mean", v.sum(0) + rate + point)
                with poutine.mask(mask=False):
                    pyro.sample("ignored", dist.Normal(mean, 1.0), obs=torch.zeros(n))
                pyro.sample("x", dist.Normal(mean, 1.0), obs=batch.x_ng[:, 0])
                pyro.factor("push", -b * mean.tanh())
        if guide:
            pyro.factor("pull", (rate * b).sin(), has_rsample=True)
            pyro.sample("aside", dist.Normal(b, 2.0), infer={"is_auxiliary": True})


def test_equals_stock_with_plates_masks_scales_factors_and_fallbacks(batch):
    _assert_equal(_both(_Rich(False), _Rich(True), batch))
    _assert_equal(_both(_Rich(False), _Rich(True), batch, {"v": 3.0, "push": 0.5, "rate": 0.1}))


def test_scale_of_one_side_is_treated_as_stock_does(batch, linear_gaussian):
    model, guide = (cls(6, 3) for cls in linear_gaussian)
    results = []
    for scaled_model, scaled_guide in ((True, False), (False, True)):
        values = []
        for stock in (False, True):
            torch.manual_seed(7)
            m = poutine.scale(model, scale=3.0) if scaled_model else model
            g = poutine.scale(guide, scale=3.0) if scaled_guide else guide
            if stock:
                values.append(-TraceMeanField_ELBO().differentiable_loss(m, g, batch))
            else:
                values.append(sum(elbo_terms(m, g, batch).values()))
        torch.testing.assert_close(*values)
        results.append(float(values[0].detach()))
    assert results[0] != results[1]


def test_a_site_the_guide_lacks_is_named(batch, linear_gaussian):
    model = linear_gaussian[0](6, 3)
    with pytest.raises(PairError, match="'z'"):
        elbo_terms(model, lambda batch: None, batch)


def test_a_conditioned_latent_keeps_its_value(batch, linear_gaussian):
    model, guide = (cls(6, 3) for cls in linear_gaussian)
    z_nk = torch.full((12, 2), 0.3)
    terms = elbo_terms(poutine.condition(model, data={"z": z_nk}), guide, batch)
    trace = poutine.trace(poutine.condition(model, data={"z": z_nk})).get_trace(batch)
    trace.compute_log_prob()
    torch.testing.assert_close(terms["x"], trace.nodes["x"]["log_prob_sum"])
    torch.testing.assert_close(terms["z"], trace.nodes["z"]["log_prob_sum"])


# ---------------------------------------------------------------- gates, integrated out


@torch.no_grad()
def test_gates_equal_full_enumeration(build, batch):
    """−KL of z given gate probabilities = the average over all binary gates, weighted by q(γ)."""
    model, guide = build({"intervention": "ignored"}, min_effect=0.3)
    model.double(), guide.double()
    batch = Batch(*[f.double() if torch.is_tensor(f) and f.is_floating_point() else f for f in batch])
    batch = batch._replace(u_np=batch.u_np * torch.tensor([1.0, 2.0, 0.5], dtype=torch.double))
    guide.gate_logit = torch.randn(3, 4, dtype=torch.double)
    fixed = {
        "edge_rate": torch.full((3, 4), 0.1, dtype=torch.double),
        "shift": torch.randn(3, 4, dtype=torch.double),
    }

    def terms(gate_pk=None):
        data = fixed if gate_pk is None else fixed | {"gate": gate_pk}
        sides = (poutine.condition(side, data=data) for side in (model, guide))
        torch.manual_seed(3)
        return elbo_terms(*sides, batch)

    phi_pk = torch.sigmoid(guide.gate_logit).detach()
    expected, expected_cost, expected_prior = 0.0, 0.0, 0.0
    for k in range(4):  # programmes are independent, so each column is enumerated on its own
        for gates in itertools.product([0.0, 1.0], repeat=3):
            gate_p = torch.tensor(gates, dtype=torch.double)
            weight = float((phi_pk[:, k] ** gate_p * (1 - phi_pk[:, k]) ** (1 - gate_p)).prod())
            loc_n = batch.u_np @ (gate_p * fixed["shift"][:, k])
            q_loc, q_scale = guide.encoder(batch.x_ng, batch.batch_nb)
            q = dist.Normal(q_loc[:, k], q_scale[:, k])
            kl = torch.distributions.kl_divergence(q, dist.Normal(loc_n, torch.ones_like(loc_n))).sum()
            expected -= weight * float(kl) * 5  # 12 of 60 cells
            expected_cost -= weight * float(gate_p @ model.cost_p)
            q_gate, p_gate = dist.Bernoulli(phi_pk[:, k]), dist.Bernoulli(fixed["edge_rate"][:, k])
            expected_prior += weight * float((p_gate.log_prob(gate_p) - q_gate.log_prob(gate_p)).sum())
    found = terms()
    assert float(found["z"]) == pytest.approx(expected, rel=1e-9, abs=1e-6)
    assert float(found["min_effect"]) == pytest.approx(expected_cost, rel=1e-9, abs=1e-6)
    assert float(found["gate"]) == pytest.approx(expected_prior, rel=1e-9, abs=1e-6)


@torch.no_grad()
def test_free_gate_probabilities_are_scored_by_the_variance_they_give(build, batch):
    model, guide = build({"intervention": "ignored"})
    guide.shift_loc = torch.full((3, 4), 4.0)

    def z_term(logit):
        guide.gate_logit = torch.full((3, 4), logit)
        torch.manual_seed(0)
        return float(elbo_terms(model, guide, batch)["z"])

    closed, half, opened = z_term(-20.0), z_term(0.0), z_term(20.0)
    assert half < max(closed, opened) - 10  # an undecided gate is no way to soften a wrong shift


# ---------------------------------------------------------------- plates and closed forms


@pytest.mark.parametrize("gates", ["posterior", "open", "closed"])
def test_full_batch_is_the_mean_over_minibatches(build, batch, gates):
    """Catches plate scaling: every subset of the cells estimates the ELBO of all cells."""
    model, guide = build(gates=gates)
    full = batch._replace(n_total=12, index_n=torch.arange(12))

    noise = {"z": torch.randn(12, 4), "shift": torch.randn(3, 4)}

    def value(rows):
        part = Batch(*[f[rows] if torch.is_tensor(f) else f for f in full])
        torch.manual_seed(0)  # for q(edge_rate), which comes first
        with OwnNoise(noise | {"z": noise["z"][rows]}):
            terms = elbo_terms(model, guide, part)
        return sum(terms.values())

    parts = [value(rows) for rows in torch.arange(12).reshape(3, 4)]
    torch.testing.assert_close(torch.stack(parts).mean(), value(torch.arange(12)), rtol=1e-5, atol=1e-4)


class OwnNoise(Messenger):
    """Draws of normal sites come from given noise: each cell keeps its own, whatever the minibatch."""

    def __init__(self, noise):
        super().__init__()
        self.noise = noise

    def _pyro_sample(self, msg):
        if msg["name"] in self.noise and not msg["done"]:
            fn = msg["fn"].base_dist
            msg["value"], msg["done"] = fn.loc + fn.scale * self.noise[msg["name"]], True


def test_exact_posterior_gives_the_exact_marginal_likelihood(batch, linear_gaussian):
    """pPCA in closed form: under the true posterior the ELBO is log p(x), with one latent even per draw."""
    model = linear_gaussian[0](6, 3, n_latents=1)
    full = batch._replace(n_total=12, index_n=torch.arange(12))

    def posterior(part):
        w_g, s2 = model.loading_kg[0], model.scale**2
        precision = 1 + (w_g @ w_g) / s2
        loc = (part.u_np @ model.shift_pk + (part.x_ng @ w_g).unsqueeze(-1) / s2) / precision
        with pyro.plate("cells", part.n_total, subsample=part.index_n):
            pyro.sample("z", dist.Normal(loc, precision.rsqrt()).to_event(1))

    draws = torch.stack([sum(elbo_terms(model, posterior, full).values()) for _ in range(500)]).detach()
    expected = -model.exact_nll(full).sum()
    assert abs(float(draws.mean() - expected)) < 4 * float(draws.std()) / 500**0.5
    guide_trace = poutine.trace(posterior).get_trace(full)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(full)
    torch.testing.assert_close(
        model_trace.log_prob_sum() - guide_trace.log_prob_sum(), expected, rtol=1e-4, atol=1e-2
    )


def test_importance_weighted_bound_rises_to_the_exact_value(batch, linear_gaussian):
    torch.manual_seed(0)
    model, guide = (cls(6, 3) for cls in linear_gaussian)
    full = batch._replace(n_total=12, index_n=torch.arange(12), x_ng=batch.x_ng / 4)
    optimizer = torch.optim.Adam([*guide.parameters()], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        (-sum(elbo_terms(model, guide, full).values())).backward()
        optimizer.step()
    exact = -float(model.exact_nll(full).sum())
    bounds = []
    with torch.no_grad():
        for particles, repeats in ((1, 400), (10, 100), (1000, 10)):
            elbo = RenyiELBO(alpha=0, num_particles=particles, vectorize_particles=True, max_plate_nesting=1)
            bounds.append(-sum(elbo.loss(model, guide, full) for _ in range(repeats)) / repeats)
    assert bounds[0] < bounds[1] < bounds[2] < exact + 0.5


# ---------------------------------------------------------------- several particles


def test_several_particles_are_stocks_importance_weighted_bound(batch, linear_gaussian):
    """On all cells; a subsample is scaled after its weights are averaged, where stock scales them before."""
    model, guide = (cls(6, 3) for cls in linear_gaussian)
    given = batch._replace(n_total=12, index_n=torch.arange(12))
    elbo = RenyiELBO(alpha=0, num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    modules, found = torch.nn.ModuleList([model, guide]), []
    for ours in (True, False):
        torch.manual_seed(4)
        modules.zero_grad(set_to_none=True)
        if ours:
            terms = elbo_terms(model, guide, given, n_particles=5)
            assert terms.keys() == {"cells"}
            terms["cells"].backward()
            value = float(terms["cells"].detach())
        else:
            value = -elbo.loss_and_grads(model, guide, given)
            for p in modules.parameters():
                p.grad.neg_()
        found.append((value, [p.grad for p in modules.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    torch.manual_seed(4)
    with torch.no_grad():
        scaled = elbo_terms(model, guide, given._replace(n_total=60), n_particles=5)["cells"]
    assert float(scaled) == pytest.approx(5 * found[0][0], rel=1e-5)


@pytest.mark.parametrize("gates", ["posterior", "open", "closed"])
def test_more_particles_come_closer_and_leave_the_global_terms(build, batch, gates):
    model, guide = build(gates=gates)
    bounds = {}
    with torch.no_grad():
        for particles in (1, 4, 64):
            torch.manual_seed(0)
            draws = [elbo_terms(model, guide, batch, n_particles=particles) for _ in range(40)]
            bounds[particles] = sum(sum(t.values()) for t in draws) / 40
    assert bounds[1] < bounds[4] < bounds[64]
    globals_ = {"gate", "shift", "edge_rate", "min_effect"} & set(elbo_terms(model, guide, batch))
    assert draws[0].keys() == {*globals_, "cells"}


def test_a_penalty_counts_as_its_mean(batch, linear_gaussian):
    guide = linear_gaussian[1](6, 3, n_latents=3)

    def penalised(given):
        with pyro.plate("cells", given.n_total, subsample=given.index_n):
            z_nk = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.factor("penalty", -(z_nk**2).sum(-1))

    with torch.no_grad():
        q_z = poutine.trace(guide).get_trace(batch).nodes["z"]["fn"]
        torch.manual_seed(2)
        terms = elbo_terms(penalised, guide, batch, n_particles=7)
        torch.manual_seed(2)
        z_snk = q_z.expand((7, 12)).rsample()
    assert float(terms["penalty"]) == pytest.approx(float(-5 * (z_snk**2).sum(-1).mean(0).sum()), rel=1e-5)
