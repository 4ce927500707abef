"""Every pair stays ordinary Pyro: stock SVI, Predictive, trace, condition, render_model, ELBO modules."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.inspect import get_model_relations

from pyro_causalcell.guides.template import TemplateGuide
from pyro_causalcell.inference import check_pair, fit
from pyro_causalcell.models.template import TemplateModel

PAIRS = ["posterior", "open", "closed", "sampled", "template", "linear"]


@pytest.fixture(params=PAIRS)
def pair(request, build, linear_gaussian):
    torch.manual_seed(0)
    if request.param == "template":
        return TemplateModel(6, 3, n_latents=4), TemplateGuide(6, n_latents=4, n_hidden=8)
    if request.param == "linear":
        return tuple(cls(6, 3) for cls in linear_gaussian)
    return build(gates=request.param)


def _parameters(pair):
    return {f"{i}.{n}": p.detach().clone() for i, side in enumerate(pair) for n, p in side.named_parameters()}


def test_five_lines_of_stock_svi_train_it(pair, batch):
    model, guide = pair
    before = _parameters(pair)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.01}), TraceMeanField_ELBO())
    losses = [svi.step(batch) for _ in range(60)]
    after = _parameters(pair)
    still = [n for n in before if torch.equal(before[n], after[n])]
    # no data reach the decoder's columns of nothing: everything else moves
    assert not still, f"stock SVI leaves {still} untrained"
    assert sum(losses[-10:]) < sum(losses[:10])


def test_stock_svi_leaves_no_parameters_behind(build, batch):
    """Two pairs in one process share nothing, although their parameters have the same names."""
    first, second = build(), build()
    SVI(*first, pyro.optim.Adam({"lr": 0.05}), TraceMeanField_ELBO()).step(batch)
    before = _parameters(second)
    poutine.trace(second[0]).get_trace(batch), poutine.trace(second[1]).get_trace(batch)
    after = _parameters(second)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert not list(pyro.get_param_store().keys())


@pytest.mark.parametrize(
    "elbo",
    [
        Trace_ELBO(),
        TraceGraph_ELBO(),
        TraceMeanField_ELBO(),
        TraceEnum_ELBO(strict_enumeration_warning=False),
        RenyiELBO(alpha=0.5),
    ],
    ids=lambda e: type(e).__name__,
)
def test_other_elbos_take_it(pair, batch, elbo):
    model, guide = pair
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.001}), elbo)
    assert torch.isfinite(torch.tensor(svi.step(batch)))
    assert torch.isfinite(torch.tensor(svi.evaluate_loss(batch)))


def test_elbo_module_and_torch_optimiser(pair, batch):
    elbo = TraceMeanField_ELBO()(*pair)
    optimiser = torch.optim.Adam(elbo.parameters(), lr=0.01)
    losses = []
    for _ in range(40):
        optimiser.zero_grad()
        loss = elbo(batch)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < sum(losses[:10])


def test_the_prior_draws_cells(pair, batch):
    model, _ = pair
    unseen = batch._replace(x_ng=None)
    trace = poutine.trace(model).get_trace(unseen)
    assert trace.nodes["x"]["value"].shape == (12, 6) and not trace.nodes["x"]["is_observed"]
    assert trace.nodes["z"]["value"].shape[0] == 12
    assert bool(torch.isfinite(trace.log_prob_sum()))
    draws = Predictive(model, num_samples=3)(unseen)
    assert draws["x"].shape == (3, 12, 6)


def test_predictive_with_the_guide(pair, batch):
    model, guide = pair
    model.eval(), guide.eval()
    draws = Predictive(model, guide=guide, num_samples=4, return_sites=["x", "z"])(batch)
    assert draws["x"].shape == (4, 12, 6) and draws["z"].shape[:2] == (4, 12)


def test_condition_holds_what_it_is_given(build, batch):
    model, _ = build(gates="posterior")
    model.eval()
    gate_pk, shift_pk = torch.zeros(3, 4), torch.full((3, 4), 100.0)
    gate_pk[0, 1] = 1.0
    fixed = poutine.condition(model, data={"gate": gate_pk, "shift": shift_pk})
    z = poutine.trace(fixed).get_trace(batch._replace(x_ng=None)).nodes["z"]
    loc_nk = z["fn"].base_dist.mean
    torch.testing.assert_close(loc_nk, batch.u_np @ (gate_pk * shift_pk))
    assert bool((loc_nk[:2] == 0).all())  # control cells


def test_evaluation_mode_draws_binary_gates(build, batch):
    _, guide = build(gates="posterior")
    guide.gate_logit = torch.zeros(3, 4)
    trained = poutine.trace(guide).get_trace(batch).nodes["gate"]["value"]
    torch.testing.assert_close(trained.detach(), torch.full((3, 4), 0.5))
    guide.eval()
    drawn = poutine.trace(guide).get_trace(batch).nodes["gate"]["value"]
    assert set(drawn.unique().tolist()) == {0.0, 1.0}


def test_the_model_s_graph(build, batch):
    model, _ = build(gates="posterior")
    relations = get_model_relations(model, (batch,))
    parents = relations["sample_sample"]
    assert set(parents["x"]) - {"x"} == {"z"}
    assert {"gate", "shift"} <= set(parents["z"]) and "edge_rate" in parents["gate"]
    assert set(relations["plate_sample"]["cells"]) == {"z", "x"}
    assert "x" in relations["observed"]


def test_render_model_draws_it(build, batch):
    pytest.importorskip("graphviz")
    assert "cells" in pyro.render_model(build()[0], (batch,)).source


def test_a_pair_trained_by_stock_svi_equals_fit_s_loss(build, batch):
    """The number stock Pyro reports for a trained pair is the one fit reports: nats of the whole screen."""
    model, guide = build(gates="open", norm="none")
    from pyro_causalcell.inference import elbo_terms

    torch.manual_seed(0)
    stock = TraceMeanField_ELBO().loss(model, guide, batch)
    torch.manual_seed(0)
    ours = -sum(elbo_terms(model, guide, batch).values()).item()
    assert stock == pytest.approx(ours, rel=1e-5)


# ---------------------------------------------------------------- templates


def test_the_templates_fit_by_name(tiny_screen):
    f = fit(
        "template",
        None,
        tiny_screen,
        n_latents=3,
        n_hidden=16,
        epochs=15,
        lr=1e-2,
        progress=False,
        device="cpu",
    )
    assert f.history["train_loss"].iloc[-1] < f.history["train_loss"].iloc[0] - 1


def test_the_templates_are_a_sound_pair(batch):
    check_pair(TemplateModel(6, 3, n_latents=4), TemplateGuide(6, n_latents=4), batch)


def test_copied_templates_fit_by_file(tiny_screen, tmp_path):
    import inspect
    import shutil

    for cls, name in ((TemplateModel, "my_model.py"), (TemplateGuide, "my_guide.py")):
        shutil.copy(inspect.getsourcefile(cls), tmp_path / name)
    sources = (f"{tmp_path}/my_model.py:TemplateModel", f"{tmp_path}/my_guide.py:TemplateGuide")
    f = fit(
        *sources,
        tiny_screen,
        n_latents=3,
        n_hidden=8,
        epochs=1,
        progress=False,
        device="cpu",
        out=tmp_path / "run",
    )
    assert (tmp_path / "run" / "my_model.py").exists() and f.model.n_latents == 3


def test_the_template_s_mean_is_library_times_softmax(batch):
    model = TemplateModel(6, 3, n_latents=2)
    x = poutine.trace(model).get_trace(batch).nodes["x"]["fn"].base_dist
    assert isinstance(x, dist.Poisson)
    torch.testing.assert_close(x.rate.sum(-1, keepdim=True), batch.library_n1)
