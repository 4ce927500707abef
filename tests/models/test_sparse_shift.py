"""The sparse shift family: what each setting assumes, term by term."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_causalcell.batch import Batch
from pyro_causalcell.guides.sparse_shift import SparseShiftGuide
from pyro_causalcell.models.sparse_shift import SparseShift


@pytest.fixture
def batch() -> Batch:
    """8 of 40 cells, 5 genes, 3 targets; cells 6 and 7 carry two targets."""
    torch.manual_seed(0)
    u_np = torch.zeros(8, 3)
    u_np[2:4, 0] = u_np[4:6, 1] = u_np[6:8, 0] = u_np[6:8, 2] = 1.0
    x_ng = torch.poisson(torch.full((8, 5), 4.0))
    return Batch(
        x_ng=x_ng,
        u_np=u_np,
        library_n1=x_ng.sum(1, keepdim=True),
        batch_nb=torch.eye(2)[torch.arange(8) % 2],
        condition_n=torch.zeros(8, dtype=torch.long),
        index_n=torch.arange(8),
        n_total=40,
    )


def _model(**settings) -> SparseShift:
    torch.manual_seed(1)
    defaults = {"n_latents": 4, "n_hidden": 8, "norm": "none", "target_cells": (10.0, 20.0, 5.0)}
    return SparseShift(5, 3, 2, **(defaults | settings))


def _trace(model, batch, **data):
    trace = poutine.trace(poutine.condition(model, data=data)).get_trace(batch)
    trace.compute_log_prob()
    return trace.nodes


EDGES = {
    "edge_rate": torch.full((3, 4), 0.2),
    "gate": torch.tensor([[1.0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]),
    "shift": torch.arange(12.0).reshape(3, 4) - 5,
}


def test_priors_of_the_edges(batch):
    nodes = _trace(_model(alpha=7.0, shift_scale=2.0), batch, **EDGES)
    rate, gate, shift = EDGES["edge_rate"], EDGES["gate"], EDGES["shift"]
    expected = {
        "edge_rate": dist.Beta(1.0, 7.0).log_prob(rate).sum(),
        "gate": dist.Bernoulli(rate).log_prob(gate).sum(),
        "shift": (gate * dist.Normal(0.0, 2.0).log_prob(shift)).sum(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(nodes[name]["log_prob_sum"], value)


def test_cells_sit_at_the_sum_of_their_open_shifts(batch):
    z_nk = torch.randn(8, 4)
    z = _trace(_model(), batch, z=z_nk, **EDGES)["z"]
    loc_nk = batch.u_np @ (EDGES["gate"] * EDGES["shift"])
    torch.testing.assert_close(z["fn"].base_dist.mean, loc_nk)
    torch.testing.assert_close(
        loc_nk[6], EDGES["shift"][0] * EDGES["gate"][0] + EDGES["shift"][2] * EDGES["gate"][2]
    )
    assert bool((loc_nk[:2] == 0).all())
    expected = 5 * dist.Normal(loc_nk, 1.0).log_prob(z_nk).sum()  # 8 of 40 cells
    torch.testing.assert_close(z["log_prob_sum"], expected)


def test_doses_scale_shifts(batch):
    half = batch._replace(u_np=batch.u_np / 2)
    full_loc, half_loc = (_trace(_model(), b, **EDGES)["z"]["fn"].base_dist.mean for b in (batch, half))
    torch.testing.assert_close(half_loc, full_loc / 2)


KINDS = {
    "nb": "NegativeBinomial",
    "zinb": "ZeroInflatedNegativeBinomial",
    "poisson": "Poisson",
    "gaussian": "Normal",
}


def test_measurement_of_each_likelihood(batch):
    z_nk = torch.randn(8, 4)
    for likelihood, kind in KINDS.items():
        model = _model(likelihood=likelihood)
        x = _trace(model, batch, z=z_nk, **EDGES)["x"]["fn"].base_dist
        assert type(x).__name__ == kind and x.mean.shape == (8, 5)
        logit_ng = model.decoder(z_nk, batch.batch_nb)
        if likelihood == "gaussian":
            torch.testing.assert_close(x.mean, logit_ng)
            assert x.scale.shape == (8, 5) and model.needs == {"normalised"}
        else:
            torch.testing.assert_close(x.mean, batch.library_n1 * logit_ng.softmax(-1))
            torch.testing.assert_close(x.mean.sum(1, keepdim=True), batch.library_n1)
            assert model.needs == {"counts"}


def test_batches_enter_the_measurement_and_not_the_latents(batch):
    model, z_nk = _model(), torch.randn(8, 4)
    swapped = batch._replace(batch_nb=batch.batch_nb.flip(-1))
    here, there = (_trace(model, b, z=z_nk, **EDGES) for b in (batch, swapped))
    assert not torch.allclose(here["x"]["log_prob_sum"], there["x"]["log_prob_sum"])
    torch.testing.assert_close(here["z"]["log_prob_sum"], there["z"]["log_prob_sum"])


def test_min_effect_costs_what_the_cells_could_say(batch):
    cost = -_trace(_model(min_effect=0.5), batch, **EDGES)["min_effect"]["log_prob_sum"]
    open_p = EDGES["gate"].sum(1)
    torch.testing.assert_close(cost, (open_p * torch.tensor([10.0, 20.0, 5.0])).sum() * 0.5**2 / 2)
    free = _trace(_model(min_effect=0.0), batch, **EDGES)["min_effect"]["log_prob_sum"]
    assert float(free.detach()) == 0.0


@pytest.mark.parametrize(("gates", "sites"), [("open", {"shift", "z", "x"}), ("closed", {"z", "x"})])
def test_members_of_the_family(batch, gates, sites):
    nodes = _trace(_model(gates=gates), batch)
    latents = {n for n, s in nodes.items() if s["type"] == "sample" and n != "cells"}
    assert latents == sites
    loc_nk = nodes["z"]["fn"].base_dist.mean
    if gates == "closed":
        assert bool((loc_nk == 0).all())
    else:
        torch.testing.assert_close(loc_nk, batch.u_np @ nodes["shift"]["value"])


def test_the_authors_version(batch):
    model = _model(gates="sampled", sparsity="beta", alpha=9.0)
    nodes = _trace(model, batch)
    gate_pk = torch.sigmoid(model.gate_logit)
    torch.testing.assert_close(
        nodes["sparsity"]["log_prob_sum"], dist.Beta(1.0, 9.0).log_prob(gate_pk).sum(), rtol=1e-4, atol=1e-3
    )
    assert bool((nodes["z"]["fn"].base_dist.loc_var == 0).all())
    model.gate_logit = torch.full((3, 4), -30.0)
    assert bool((_trace(model, batch)["z"]["fn"].base_dist.mean == 0).all())


def test_l1_weighs_the_mean_gate_in_every_cell(batch):
    model = _model(gates="sampled", sparsity="l1", alpha=3.0)
    penalty = -_trace(model, batch)["sparsity"]["log_prob_sum"]
    torch.testing.assert_close(penalty, 3.0 * 40 * torch.sigmoid(model.gate_logit).mean())


def test_interactions_shift_cells_that_carry_both(batch):
    model = _model(interactions=((0, 2),))
    edges = {"edge_rate": torch.full((4, 4), 0.2), "gate": torch.ones(4, 4), "shift": torch.zeros(4, 4)}
    edges["shift"][3] = 6.0
    loc_nk = _trace(model, batch, **edges)["z"]["fn"].base_dist.mean
    assert bool((loc_nk[6:] == 6).all()) and bool((loc_nk[:6] == 0).all())
    assert model.cost_p.shape == (4,)
    assert float(model.cost_p[3]) == float(torch.minimum(model.cost_p[0], model.cost_p[2]))


def test_epistasis_masks_what_other_targets_of_the_cell_do(batch):
    model = _model(epistasis=True)
    edges = EDGES | {"gate": torch.ones(3, 4), "epistasis": torch.zeros(3, 4), "saturation": torch.zeros(())}
    edges["epistasis"][2, 0] = 0.75
    nodes = _trace(model, batch, **edges)
    loc_nk = nodes["z"]["fn"].base_dist.mean
    first, third = EDGES["shift"][0], EDGES["shift"][2]
    torch.testing.assert_close(loc_nk[2], first)
    torch.testing.assert_close(loc_nk[6], torch.tensor([0.25, 1, 1, 1]) * first + third)
    cost = dist.Beta(1.0, 3.0).log_prob(torch.tensor(0.75)) + 11 * math.log(3)
    torch.testing.assert_close(nodes["epistasis"]["log_prob_sum"], cost)


@pytest.mark.parametrize("settings", [{"interactions": ((0, 2),)}, {"gates": "closed"}, {"gates": "sampled"}])
def test_epistasis_needs_global_gates_alone(settings):
    with pytest.raises(ValueError, match="epistasis"):
        _model(epistasis=True, **settings)


def test_one_target_and_no_batches():
    torch.manual_seed(0)
    x_ng = torch.ones(3, 5)
    batch = Batch(
        x_ng,
        torch.ones(3, 1),
        torch.full((3, 1), 5.0),
        torch.zeros(3, 0),
        torch.zeros(3).long(),
        torch.arange(3),
        3,
    )
    model = SparseShift(5, 1, n_latents=2, n_hidden=4)
    guide = SparseShiftGuide(5, 1, n_latents=2, n_hidden=4)
    guide(batch)
    assert bool(torch.isfinite(poutine.trace(model).get_trace(batch).log_prob_sum()))


# ---------------------------------------------------------------- guide


def _guide(**settings) -> SparseShiftGuide:
    torch.manual_seed(1)
    defaults = {"n_latents": 4, "n_hidden": 8, "norm": "none"}
    return SparseShiftGuide(5, 3, 2, **(defaults | settings))


def test_beta_posterior_is_the_conjugate_update(batch):
    guide = _guide(alpha=7.0)
    phi_pk = torch.sigmoid(guide.gate_logit)
    beta = poutine.trace(guide).get_trace(batch).nodes["edge_rate"]["fn"].base_dist
    torch.testing.assert_close(beta.concentration1, 1 + phi_pk)
    torch.testing.assert_close(beta.concentration0, 7.0 + 1 - phi_pk)


@pytest.mark.parametrize(("intervention", "sees"), [("ignored", False), ("input", True), ("prior", True)])
def test_what_the_encoder_knows_of_the_intervention(batch, intervention, sees):
    guide = _guide(intervention=intervention, gates="open").eval()
    if intervention == "prior":  # it starts without an opinion
        prior_weight = guide.encoder.hidden.layers[0].extra.weight[:, -4:]
        assert bool((prior_weight == 0).all())
        torch.nn.init.normal_(prior_weight.data)
    guide.shift_loc, guide.shift_scale = torch.full((3, 4), 3.0), torch.full((3, 4), 1e-3)
    relabelled = batch._replace(u_np=batch.u_np.flip(-1) + batch.u_np)
    locs = [poutine.trace(guide).get_trace(b).nodes["z"]["fn"].base_dist.loc for b in (batch, relabelled)]
    assert torch.allclose(*locs, atol=1e-4) != sees


def test_normalised_values_enter_the_encoder_as_they_are(batch):
    counts, values = (
        _guide(likelihood="nb", intervention="ignored"),
        _guide(likelihood="gaussian", intervention="ignored"),
    )
    values.load_state_dict(counts.state_dict())
    logged = batch._replace(x_ng=torch.log1p(batch.x_ng))
    a = poutine.trace(counts).get_trace(batch).nodes["z"]["fn"].base_dist
    b = poutine.trace(values).get_trace(logged).nodes["z"]["fn"].base_dist
    torch.testing.assert_close(a.loc, b.loc)


@pytest.mark.parametrize("gates", ["posterior", "open", "closed", "sampled"])
def test_guide_draws_the_model_s_latents(batch, gates):
    model_sites, guide_sites = (
        {
            n
            for n, s in poutine.trace(side).get_trace(batch).nodes.items()
            if s["type"] == "sample" and not s["is_observed"]
        }
        for side in (_model(gates=gates), _guide(gates=gates))
    )
    assert model_sites == guide_sites


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="norm is"):
        _model(norm="group")
