"""The temporal SCM: laws of moments, joining snapshots, roll-outs, axes, and a simulated truth."""

import itertools

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from numpy.testing import assert_allclose
from pyro import poutine
from scipy import stats
from torch.testing import assert_close

from pyro_causalcell.batch import Batch, Rotation
from pyro_causalcell.data import Screen
from pyro_causalcell.distributions import PopulationNormal, TransitionMixture
from pyro_causalcell.errors import DataError, PairError, PredictionError
from pyro_causalcell.evaluate import matching
from pyro_causalcell.guides.temporal_scm import TemporalSCMGuide
from pyro_causalcell.inference import Fit, elbo_terms, fit
from pyro_causalcell.inference.engine import EagerStep, TracedStep
from pyro_causalcell.inference.lagged_rotation import _MomentFit, _moments, lagged_rotation
from pyro_causalcell.inference.pair import Pair
from pyro_causalcell.models.temporal_scm import PRESETS, Law, Mechanism, TemporalSCM
from pyro_causalcell.predict import (
    cell_trajectories,
    effects,
    graph,
    lagged_graph,
    latents,
    mechanism_graph,
    predict,
    trajectories,
)
from pyro_causalcell.simulate import temporal_scm

SIZES = {"n_invariant": 1, "n_responsive": 2, "n_hidden": 4, "likelihood": "gaussian", "norm": "none"}
SCREEN = {"n_genes": 4, "n_targets": 2, "n_cells": 6, "n_conditions": 3, "times": (1.0, 2.0, 4.0)}


def _model(**settings) -> TemporalSCM:
    torch.manual_seed(1)
    return TemporalSCM(**(SCREEN | SIZES | settings))


def _guide(**settings) -> TemporalSCMGuide:
    torch.manual_seed(1)
    return TemporalSCMGuide(4, 2, times=SCREEN["times"], **(SIZES | settings))


def _cells(conditions: list[int], times: list[float], seed: int = 0) -> Batch:
    torch.manual_seed(seed)
    n = len(times)
    return Batch(
        x_ng=torch.randn(n, 4),
        u_np=torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])[conditions],
        library_n1=torch.ones(n, 1),
        batch_nb=torch.zeros(n, 0),
        condition_n=torch.tensor(conditions),
        index_n=torch.arange(n),
        n_total=n,
        time_n=torch.tensor(times),
    )


@pytest.fixture
def batch() -> Batch:
    """Six cells: control and A at three times; each has a control cell of its time."""
    times = [1.0, 2.0, 4.0] * 2
    return _cells([0, 0, 0, 1, 1, 1], times)._replace(control=_cells([0] * 6, times, seed=1))


def _bent(model: TemporalSCM) -> TemporalSCM:
    """A model whose effects bend."""
    for maps in (model.invariant_map, model.responsive_map):
        maps.size_oib.data.normal_()
        maps.slope_ib.data.uniform_(0.5, 2.0)
    return model


def _mechanism(seed: int = 3, **parts) -> Mechanism:
    torch.manual_seed(seed)
    drawn = Mechanism(
        gate_pv=torch.ones(2, 2),
        edge_vk=torch.ones(2, 3),
        shift_pv=torch.randn(2, 2),
        log_scale_pv=torch.randn(2, 2) / 2,
        cut_pv=torch.zeros(2, 2),
        start_pv=torch.randn(2, 2),
        weight_vk=torch.randn(2, 3) / 2,
    )
    return drawn._replace(**parts)


def _filled(model: TemporalSCM, seed: int = 5) -> TemporalSCM:
    """A model that remembers, of every condition and snapshot, random pasts."""
    torch.manual_seed(seed)
    model.memory_ctmk.normal_()
    model.filled_ct.fill_(True)
    return model


def test_a_step_follows_the_structural_equation():
    model, mechanism = _model(transition="linear"), _mechanism(cut_pv=torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    z_rmk = torch.randn(1, 5, 3)
    invariant, responsive = model.step(z_rmk, torch.tensor([[1.0, 0.0]]), torch.ones(1), mechanism)
    assert_close(invariant.loc_rmk, 0.5 * z_rmk[..., :1])
    follows_rm = z_rmk @ mechanism.weight_vk[0] + mechanism.shift_pv[0, 0]
    assert_close(responsive.loc_rmk[..., 0], follows_rm)
    assert_close(responsive.loc_rmk[..., 1], mechanism.shift_pv[0, 1].expand(1, 5))  # cut off its parents
    own_v = model.bounded(model.responsive_log_scale_v)
    assert_close(responsive.log_scale_rk[0], own_v + mechanism.log_scale_pv[0])
    assert_close(responsive.precision_rk, torch.exp(-2 * responsive.log_scale_rk))
    assert_close(responsive.slack_rmk, torch.zeros(1, 1, 2))  # its mean over pasts


@pytest.mark.parametrize("join", ["moments", "mixture"])
def test_probabilities_of_gates_and_cuts_give_the_expected_squared_residual(join):
    """Of each past in a mixture; the mean over pasts where only moments are needed."""
    model = _bent(_model(join=join))
    gate, cut, edge = (
        torch.tensor([[0.3, 0.8], [0, 0]]),
        torch.tensor([[0.4, 0.0], [0, 0]]),
        torch.tensor([0.7]),
    )
    edge_vk = torch.ones(2, 3)
    edge_vk[0, 2] = edge
    no_scale = torch.zeros(2, 2)
    mechanism = _mechanism(gate_pv=gate, cut_pv=cut, edge_vk=edge_vk, log_scale_pv=no_scale)
    past, value, u = torch.randn(1, 4, 3), torch.randn(2), torch.tensor([[1.0, 0.0]])
    law = model.step(past, u, torch.ones(1), mechanism)[1]
    expected = 0.0
    for g0, g1, c0, e in itertools.product([0.0, 1.0], repeat=4):
        share = (0.3 if g0 else 0.7) * (0.8 if g1 else 0.2) * (0.4 if c0 else 0.6) * (0.7 if e else 0.3)
        one = edge_vk.clone()
        one[0, 2] = e
        drawn = mechanism._replace(
            gate_pv=torch.tensor([[g0, g1], [0, 0]]), cut_pv=torch.tensor([[c0, 0.0], [0, 0]]), edge_vk=one
        )
        binary = model.step(past, u, torch.ones(1), drawn)[1]
        assert_close(binary.slack_rmk, torch.zeros_like(law.slack_rmk), atol=1e-5, rtol=0)
        expected = expected + share * (value - binary.loc_rmk) ** 2
    found = (value - law.loc_rmk) ** 2 + law.slack_rmk
    if join == "moments":
        found, expected = found.mean(1), expected.mean(1)
    assert_close(found, expected)


def test_transition_mixture_is_a_mixture_of_normals():
    loc_nmk, log_scale_nk = torch.randn(3, 4, 2), torch.randn(3, 2) / 3
    no_slack = torch.zeros(3, 4, 2)
    logits_nm = torch.randn(3, 4)
    mixture = TransitionMixture(loc_nmk, log_scale_nk, torch.exp(-2 * log_scale_nk), no_slack, logits_nm)
    value_nk = torch.randn(3, 2)
    densities = stats.norm.pdf(value_nk[:, None], loc_nmk, log_scale_nk.exp()[:, None]).prod(-1)
    expected = np.log((logits_nm.softmax(-1).numpy() * densities).sum(-1))
    assert_allclose(mixture.log_prob(value_nk), expected, rtol=1e-5)
    draws = mixture.sample((20_000,))
    assert_allclose(draws.mean(0), mixture.mean, atol=0.06)
    assert_allclose(draws.var(0), mixture.variance, rtol=0.06)


def test_population_normal_agrees_with_scipy_and_charges_an_uncertain_mean():
    root = torch.tensor([[1.0, 0.0], [0.6, 0.5]])
    loc, value, slack = torch.tensor([0.2, -1.0]), torch.tensor([1.0, 0.3]), torch.tensor([0.4, 0.1])
    exact = stats.multivariate_normal(loc, root @ root.T).logpdf(value)
    assert float(PopulationNormal(loc, root).log_prob(value)) == pytest.approx(exact, abs=1e-5)
    precision = np.linalg.inv((root @ root.T).numpy())
    charged = float(PopulationNormal(loc, root, slack).log_prob(value))
    assert charged == pytest.approx(exact - (np.diag(precision) * slack.numpy()).sum() / 2, abs=1e-5)
    normal = PopulationNormal(loc, root)
    assert_close(normal.from_noise(normal.noise_of(value)), value)


@pytest.mark.parametrize("join", ["moments", "mixture"])
def test_the_prior_of_a_cell_is_made_of_transitions_of_the_snapshot_before(batch, join):
    """Against the moments, or the mixture, over the remembered cells, computed by hand."""
    model = _filled(_model(join=join, transition="linear", memory=50, gates="open", edges="open")).eval()
    mechanism = _mechanism()
    sites = {
        "shift": mechanism.shift_pv,
        "log_scale": mechanism.log_scale_pv,
        "start": mechanism.start_pv,
        "weight": mechanism.weight_vk,
    }
    z_nl, z_nv = torch.randn(6, 1), torch.randn(6, 2)
    data = sites | {"z_invariant": z_nl, "z_responsive": z_nv}
    trace = poutine.trace(poutine.condition(model, data=data)).get_trace(batch)
    trace.compute_log_prob()
    log_p = sum(trace.nodes[name]["log_prob"] for name in ("z_invariant", "z_responsive"))
    past_mk = model.memory_ctmk[1, 0]  # cell 4: A at time 2; the snapshot before is at time 1
    sd_l = model.bounded(model.invariant_log_scale_l).exp()
    sd_v = (model.bounded(model.responsive_log_scale_v) + mechanism.log_scale_pv[0]).exp()
    loc_mk = torch.cat([0.5 * past_mk[:, :1], past_mk @ mechanism.weight_vk.T + mechanism.shift_pv[0]], 1)
    sd_k, z_k = torch.cat([sd_l, sd_v]).detach().numpy(), torch.cat([z_nl[4], z_nv[4]]).numpy()
    if join == "mixture":
        expected = np.log(stats.norm.pdf(z_k, loc_mk.detach(), sd_k).prod(1).mean())
    else:
        covariance = np.cov(loc_mk.detach().T) + np.diag(sd_k**2)
        expected = stats.multivariate_normal(loc_mk.detach().mean(0), covariance).logpdf(z_k)
    assert float(log_p[4].detach()) == pytest.approx(expected, abs=1e-4)
    at_start = stats.norm.logpdf(torch.cat([z_nl[3], z_nv[3] - mechanism.start_pv[0]])).sum()
    assert float(log_p[3].detach()) == pytest.approx(at_start, abs=1e-4)


def test_noise_does_not_depend_on_how_programmes_lie_in_memory():
    """A compiled step may lay them out otherwise, and would then not be the step that Pyro takes."""
    drawn = []
    for loc_rmk in (torch.zeros(2, 3, 4).mT, torch.zeros(2, 4, 3)):
        torch.manual_seed(0)
        law = Law(loc_rmk, torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2, 4, 3))
        drawn.append(law.draw())
    assert_close(*drawn, rtol=0, atol=0)


def test_long_gaps_are_made_of_steps_no_longer_than_the_shortest():
    """Two steps of a linear process: means by F², variances by F² + 1; a half step goes half the way."""
    model = _model(transition="linear")
    mechanism = _mechanism(
        weight_vk=torch.tensor([[0.0, 0.5, 0.0], [0.0, 0.0, 0.8]]), shift_pv=torch.zeros(2, 2)
    )
    n = 20_000
    z_nk, cells = torch.ones(n, 3), _cells([0] * n, [4.0] * n)
    data = dict(zip(Mechanism._fields, mechanism, strict=True))
    model.mechanism = lambda: Mechanism(**data)
    later = model.roll_out(z_nk, cells, torch.full((n,), 2.0))
    sd_v = model.bounded(model.responsive_log_scale_v).exp().detach()
    assert_allclose(later.mean(0)[1:], [0.25, 0.64], atol=0.03)
    expected = sd_v**2 * (1 + torch.tensor([0.5, 0.8]) ** 2)
    assert_allclose(later.var(0)[1:], expected, rtol=0.05)
    half = model.roll_out(z_nk, cells, torch.full((n,), 3.5))
    assert_allclose(half.mean(0)[1:], [0.75, 0.9], atol=0.03)
    same = model.roll_out(z_nk, cells, torch.full((n,), 4.0))
    assert_close(same, z_nk)  # no time has passed


@pytest.mark.parametrize("onset", [-1.0, 1.0])
def test_from_the_onset_on_first_snapshots_are_made_by_transitions_too(onset):
    """Two steps of a linear process lead to the first snapshot; at the onset itself nothing has moved."""
    model = _model(transition="linear", times=(1.0, 2.0, 4.0), onset=onset, memory=50_000).eval()
    if onset < 1:
        model.onset_root_kk.data[1, 0] = 0.75  # correlations, of programmes that keep a variance of 1
    mechanism = _mechanism(
        weight_vk=torch.tensor([[0.0, 0.5, 0.0], [0.4, 0.0, 0.8]]),
        log_scale_pv=torch.zeros(2, 2),
        start_pv=torch.zeros(2, 2),
    )
    cells = _cells([0, 1], [1.0, 1.0])
    with torch.no_grad():
        spreads = zip(*(law.spread() for law in model.laws(cells, mechanism)), strict=True)
        mean_ck, sd_ck = (torch.cat(parts, -1) for parts in spreads)
    shift_v = mechanism.shift_pv[0]
    if onset == 1:
        assert_close(mean_ck, torch.zeros(2, 3))
        assert_close(sd_ck, torch.ones(2, 3))
        return
    assert_close(mean_ck[0], torch.zeros(3), atol=0.03, rtol=0)
    assert_close(mean_ck[1, 1:], torch.tensor([1.5, 1.8]) * shift_v, atol=0.03, rtol=0)
    own_v = model.bounded(model.responsive_log_scale_v).exp().detach() ** 2
    expected = 0.5**2 * (0.5**2 + own_v[0]) + own_v[0]
    assert float(sd_ck[0, 1] ** 2) == pytest.approx(float(expected), rel=0.03)
    assert_close(sd_ck[0], sd_ck[1], rtol=0.02, atol=0)


def test_between_two_snapshots_cells_are_led_to_the_later_one():
    """Halfway, half of what transitions miss of the later snapshot is made up for; just before it, all."""
    model = _filled(_model(n_sources=128))
    model.memory_ctmk[0, 2] = 3 * model.memory_ctmk[0, 2] + 5
    model.eval()
    mechanism = _mechanism()

    def spreads(time: float, leads: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        model.filled_ct[0] = torch.tensor([True, False, leads])
        with torch.no_grad():
            laws = model.laws(_cells([0], [time]), mechanism)
        mean_k, scale_k = (
            torch.cat(parts, -1)[0] for parts in zip(*(law.spread() for law in laws), strict=True)
        )
        return mean_k, scale_k

    seen_mk = model.memory_ctmk[0, 2]
    missed_k = seen_mk.mean(0) - spreads(4.0)[0]  # at a snapshot the law is the transition's
    assert missed_k.abs().min() > 2
    halfway = [spreads(2.5, leads)[0] for leads in (True, False)]
    assert_close(halfway[0] - halfway[1], missed_k / 2, rtol=0.1, atol=0.3)  # draws on the way
    mean_k, scale_k = spreads(3.99)
    assert_close(mean_k, seen_mk.mean(0), rtol=0.02, atol=0.1)
    assert_close(scale_k, seen_mk.std(0), rtol=0.05, atol=0.05)
    model.train()
    assert_close(spreads(2.5), spreads(2.5, leads=False))


def test_elbo_is_the_mean_over_minibatches(batch):
    """Full-batch terms of the data equal those of two halves: nothing is scaled wrongly."""
    model, guide = _filled(_model(likelihood="gaussian")), _guide(alignment="none")
    model.eval()
    guide.eval()
    whole = elbo_terms(model, guide, batch)
    assert {"z_invariant", "z_responsive", "x", "shift", "weight", "edge", "cut"} <= set(whole)
    torch.manual_seed(0)
    moments = poutine.trace(guide).get_trace(batch).nodes
    fixed = {name: moments[name]["fn"].mean for name in ("z_invariant", "z_responsive")}
    sites = ("gate_rate", "gate", "cut", "edge", "shift", "log_scale", "start", "weight")
    draws = {name: moments[name]["value"] for name in sites}

    def scored(index: list[int]) -> float:
        part = batch._replace(
            **{
                f: getattr(batch, f)[index]
                for f in ("x_ng", "u_np", "library_n1", "batch_nb", "condition_n", "time_n")
            },
            index_n=torch.tensor(index),
            control=None,
        )
        data = draws | {name: value[index] for name, value in fixed.items()}
        trace = poutine.trace(poutine.condition(model, data=data)).get_trace(part)
        trace.compute_log_prob()
        return float(
            sum(trace.nodes[name]["log_prob_sum"].detach() for name in ("x", "z_invariant", "z_responsive"))
        )

    assert scored(list(range(6))) == pytest.approx((scored([0, 1, 2]) + scored([3, 4, 5])) / 2, rel=0.01)


@pytest.mark.parametrize("n_cells", [6, 12])
@pytest.mark.parametrize(
    "settings",
    [{}, PRESETS["paper"], {"times": (0.0, 1.0, 1.5, 2.0)}, {"transition": "ode"}, {"onset": -1.0}],
)
def test_steps_of_training_can_be_recorded(n_cells, settings):
    """Gradients and memory are Pyro's, with fewer cells than places and with more, as the memory fills."""
    own = {name: value for name, value in settings.items() if name not in ("alignment", "alpha")}
    shared = {name: own[name] for name in ("gates", "edges", "graph", "onset") if name in own}
    times = own.setdefault("times", (1.0, 2.0, 3.0))
    model = _bent(_model(n_conditions=2, doses_vary=False, **own))
    torch.manual_seed(1)
    guide = TemporalSCMGuide(4, 2, alignment="none", **(SIZES | shared | {"times": times}))
    pair = Pair(model, guide)
    pair.train(True)

    def batch(seed: int) -> Batch:
        drawn = _cells([0, 1] * (n_cells // 2), list(times[:3]) * (n_cells // 3), seed)
        return drawn._replace(n_total=12)

    with pyro.validation_enabled(False):
        traced = TracedStep(pair, batch(0), {})
        for seed in range(2):
            assert traced.difference(batch(seed), {}) < 1e-4
            before = {name: value.clone() for name, value in model.named_buffers()}
            torch.manual_seed(seed)
            traced(batch(seed), {})
            recorded = model.memory_ctmk.clone()
            for name, value in model.named_buffers():
                value.copy_(before[name])
            torch.manual_seed(seed)
            for parameter in pair.parameters():
                parameter.grad = None
            EagerStep(pair)(batch(seed), {})
            assert_close(model.memory_ctmk, recorded, rtol=1e-4, atol=1e-5)
    assert model.filled_ct[:, :3].any()


def test_the_law_of_a_cell_does_not_depend_on_how_many_there_are():
    """Cells one by one, or every condition at every time once: the same terms."""
    model = _filled(_model(times=(1.0, 2.0, 3.0), longest_gap=1.0))
    guide, cells = _guide(alignment="none"), _cells([0, 0, 0, 1, 1, 1] * 2, [1.0, 2.0, 3.0] * 4)
    assert cells.n_cells > model.filled_ct.numel()
    found = []
    for doses_vary in (False, True):
        model.doses_vary = doses_vary
        model.memory_ctmk.copy_(torch.linspace(-1, 1, model.memory_ctmk.numel()).view_as(model.memory_ctmk))
        torch.manual_seed(0)
        terms = elbo_terms(model, guide, cells)
        found.append([float(terms[name].detach()) for name in ("z_invariant", "z_responsive", "x")])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_steps_without_perturbations_can_be_recorded():
    """A plain time course: what has a row for each target is empty."""
    times = (1.0, 2.0, 3.0)
    model = _model(n_targets=0, n_conditions=1, doses_vary=False, times=times)
    torch.manual_seed(1)
    pair = Pair(model, TemporalSCMGuide(4, 0, times=times, alignment="none", sees_time=True, **SIZES))
    pair.train(True)
    cells = _cells([0] * 6, list(times) * 2)._replace(u_np=torch.zeros(6, 0))
    with pyro.validation_enabled(False):
        assert TracedStep(pair, cells, {}).difference(cells, {}) < 1e-4


def test_steps_with_embeddings_can_be_recorded():
    times, sizes = (1.0, 2.0, 3.0), {"n_embedding": 2, "target_cells": (4.0, 4.0)}
    model = _model(times=times, doses_vary=False, **sizes)
    torch.manual_seed(1)
    guide = TemporalSCMGuide(4, 2, times=times, alignment="none", **SIZES, **sizes)
    for side in (model, guide):
        side.embedding_pe.copy_(torch.tensor([[0.5, -1.0], [-0.5, 1.0]]))
    pair, cells = Pair(model, guide), _cells([0, 1, 2] * 3, [1.0] * 3 + [2.0] * 3 + [3.0] * 3)
    pair.train(True)
    with pyro.validation_enabled(False):
        assert TracedStep(pair, cells, {}).difference(cells, {}) < 1e-4


def test_what_is_drawn_in_vain_is_drawn_by_a_recording_too():
    """While axes are sought no mechanism is used; without its draws the other draws would be others."""
    model, guide = _filled(_model()), _guide(alignment="none")
    pair, cells = Pair(model, guide), _cells([0, 0, 1, 1], [1.0, 2.0, 1.0, 2.0])
    pair.train(True)
    for side in (model, guide):
        side.hold_gates_open(True)
    with pyro.validation_enabled(False):
        traced = TracedStep(pair, cells, {})
    (output,) = traced.graph.graph.find_nodes(op="output")
    calls = [node for node in traced.graph.graph.nodes if node.op == "call_function"]
    draws = [c for c in calls if torch.Tag.nondeterministic_seeded in getattr(c.target, "tags", ())]
    assert len(draws) > 6 and set(draws) <= set(output.args[0])
    assert traced.difference(cells, {}) < 1e-4


@pytest.mark.parametrize("join", ["transport", "sinkhorn"])
def test_joins_by_transport_pull_the_transitions_to_the_cells(join):
    """Pasts at 0 and cells at 2: the gradient of the offset of a programme points upwards."""
    model = _filled(_model(join=join, n_sources=8, gates="open"))
    guide = _guide(alignment="none", gates="open")
    model.memory_ctmk[:, 0] *= 0.1
    model.memory_ctmk[:, 1] = 2 + 0.1 * model.memory_ctmk[:, 1]
    guide.encoder.loc.weight.data.zero_()
    guide.encoder.loc.bias.data.fill_(2.0)
    terms = elbo_terms(model, guide, _cells([0] * 4, [2.0] * 4))
    assert ("missed" in terms) == (join == "sinkhorn")
    name = "missed" if join == "sinkhorn" else "z_responsive"
    slope_v = torch.autograd.grad(terms[name], model.responsive_offset_v_unconstrained)[0]
    assert (slope_v > 0.5).all()
    model.eval()
    guide.eval()
    assert "missed" not in elbo_terms(model, guide, _cells([0] * 4, [2.0] * 4))


def test_unbalanced_transport_lets_pasts_die_out():
    """Half the pasts are where no cell is: made to go to the cells, they pull; let go, they do not."""

    def pull(unbalanced: float | None) -> float:
        model = _filled(_model(join="transport", n_sources=8, gates="open", unbalanced=unbalanced))
        guide = _guide(alignment="none", gates="open")
        model.memory_ctmk[:, 0] = 0.1 * model.memory_ctmk[:, 0]
        model.memory_ctmk[:, 0, ::2] -= 6
        model.memory_ctmk[:, 1] = 0.1 * model.memory_ctmk[:, 1]
        guide.encoder.loc.weight.data.zero_()
        guide.encoder.loc.bias.data.zero_()
        terms = elbo_terms(model, guide, _cells([0] * 4, [2.0] * 4))
        (slope_l,) = torch.autograd.grad(terms["z_invariant"], model.invariant_offset_l_unconstrained)
        return float(slope_l.abs().mean())

    torch.manual_seed(0)
    assert pull(1.0) < 0.5 * pull(None)
    for join, unbalanced in (("transport", 0.0), ("transport", "much"), ("mixture", 1.0)):
        with pytest.raises(ValueError, match="unbalanced above 0"):
            _model(join=join, unbalanced=unbalanced)


def test_an_ode_lets_programmes_act_within_a_step():
    """A linear one: where exp((W - 1) h) leads; a straight step cannot pass an effect on to a third."""
    model = _model(transition="ode")
    weight_vk = torch.tensor([[0.8, 0.0, 0.0], [0.0, 0.9, 0.0]])  # z_l on the first, it on the second
    mechanism = _mechanism(weight_vk=weight_vk, cut_pv=torch.zeros(2, 2))
    z_rmk = torch.tensor([[[1.0, 0.0, 0.0], [0.5, -1.0, 2.0]]])
    field_kk = torch.cat([torch.tensor([[0.5, 0.0, 0.0]]), weight_vk]) - torch.eye(3)
    for length in (1.0, 0.4):
        laws = model.step(z_rmk, torch.zeros(1, 2), torch.full((1,), length), mechanism)
        found_mk = torch.cat([law.loc_rmk for law in laws], -1)[0].detach()
        assert_close(found_mk, z_rmk[0] @ torch.linalg.matrix_exp(length * field_kk).T, atol=4e-3, rtol=0)
        assert found_mk[0, 2] > 0.02


@pytest.mark.slow
def test_a_compiled_fit_is_the_eager_fit(simulated):
    train = simulated[simulated.obs["split"] == "train"].copy()
    screen = Screen(train, "target", "control", time="time")
    short = SETTINGS | {"epochs": 4, "warm_start": None, "likelihood": "gaussian"}
    eager, compiled = (
        fit("temporal-scm", None, screen, **(short | {"compile": c})).history["train_loss"]
        for c in (False, True)
    )
    assert compiled.to_numpy() == pytest.approx(eager.to_numpy(), rel=0.01)


def test_memory_holds_what_was_drawn_of_each_snapshot(batch):
    model, guide = _model(memory=4), _guide(alignment="none")
    assert not model.filled_ct.any()
    elbo_terms(model, guide, batch)
    assert model.filled_ct[:2].all() and not model.filled_ct[2].any()
    assert (model.memory_ctmk[1, 2] == model.memory_ctmk[1, 2, 0]).all()  # one cell of A at time 4 so far
    before = model.memory_ctmk.clone()
    model.eval()
    guide.eval()
    elbo_terms(model, guide, batch)
    assert_close(model.memory_ctmk, before)


def _linear_cells(
    seed: int = 0, times: tuple[int, ...] = (1, 2, 3, 4)
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Latents of a linear process with one background and two responsive programmes, and its truth.

    Perturbations act from time 0 on.
    """
    rng = np.random.default_rng(seed)
    weight_vk = np.array([[0.3, 0.6, 0.0], [0.0, -0.5, 0.5]])
    shift_cv = np.array([[0, 0], [2, 0], [0, 2], [-1.5, 0], [0, -1.5]])
    cut_cv = np.array([[0, 0], [0, 0], [0, 0], [1, 0], [0, 1]])
    z, u, time_n = [], [], []
    for c, time in itertools.product(range(5), times):
        cells = rng.standard_normal((1000, 3))
        for step in range(20 + time):
            push = (1 - cut_cv[c]) * (cells @ weight_vk.T) if step >= 20 else cells @ weight_vk.T
            shift = shift_cv[c] if step >= 20 else 0
            noise = rng.standard_normal((1000, 3)) * [0.6, 0.7, 0.7]
            cells = np.column_stack([0.8 * cells[:, 0], push + shift]) + noise
        z.append(cells)
        u.append(np.tile(np.eye(5)[c, 1:], (1000, 1)))
        time_n.append(np.full(1000, float(time)))
    truth = {"weight_vv": weight_vk[:, 1:], "shift_pv": shift_cv[1:], "cut_pv": cut_cv[1:] > 0}
    return np.concatenate(z), np.concatenate(u), np.concatenate(time_n), truth


@pytest.mark.parametrize("onset", [None, 0.0])
def test_axes_lagged_effects_shifts_and_cuts_are_read_off_unpaired_snapshots(onset):
    z_nk, u_np, time_n, truth = _linear_cells()
    mixed = z_nk @ np.random.default_rng(1).standard_normal((3, 3)).T + 2.0
    turn = _turn(mixed, u_np, time_n, onset)
    found = mixed @ turn.map_kk.numpy().T + turn.offset_k.numpy()
    match_kk = np.corrcoef(z_nk.T, found.T)[:3, 3:]
    assert abs(match_kk[0, 0]) > 0.99
    place = np.abs(match_kk[1:, 1:]).argmax(1)
    assert sorted(place) == [0, 1]
    sign, rows = np.sign(match_kk[1:, 1:][[0, 1], place]), 1 + place
    assert (np.abs(match_kk[[1, 2], rows]) > 0.98).all()
    control = (u_np.sum(1) == 0) & (time_n == 1)
    assert_allclose(found[control].mean(0), 0, atol=1e-4 if onset is None else 0.1)
    assert_allclose(found[control].std(0), 1, atol=0.01)
    seen = turn.mechanisms
    sd = z_nk[control][:, 1:].std(0)
    weight_vv = seen.weight_vk.numpy()[place][:, rows] * np.outer(sign, sign) * np.outer(sd, 1 / sd)
    assert_allclose(weight_vv, truth["weight_vv"], atol=0.12)
    assert (seen.cut_pv.numpy()[:, place] == truth["cut_pv"]).all()
    assert_allclose(seen.shift_pv.numpy()[:, place] * sign * sd, truth["shift_pv"], atol=0.3)


def _turn(z_nk: np.ndarray, u_np: np.ndarray, time_n: np.ndarray, onset: float | None) -> Rotation:
    arrays = (torch.tensor(part) for part in (z_nk, u_np, time_n))
    return lagged_rotation(*arrays, 1, variance_k=torch.full((3,), 1e-4), onset=onset)


def test_near_the_end_of_responses_the_onset_tells_the_axes():
    """Latents whose means are a little off in each snapshot mislead steps from one snapshot to the next."""
    z_nk, u_np, time_n, _ = _linear_cells(times=(3, 4, 5))
    place_n = np.unique(np.column_stack([u_np, time_n]), axis=0, return_inverse=True)[1]
    off_nk = 0.1 * np.random.default_rng(0).standard_normal((place_n.max() + 1, 3))[place_n]
    worst = {}
    for onset in (0.0, None):
        turn = _turn(z_nk + off_nk, u_np, time_n, onset)
        found = z_nk @ turn.map_kk.numpy().T
        worst[onset] = np.abs(matching(z_nk[:, 1:], found[:, 1:]).correlation_m).min()
        assert onset is None or turn.mechanisms.cut_pv.sum() == 2
    assert worst[0.0] > 0.98 and worst[None] < 0.95


def test_a_cut_that_descent_overlooked_is_tried():
    """Its programme holds a share of the background, and the logit of the cut is where no gradient is."""
    z_nk, u_np, time_n, truth = _linear_cells()
    seen = _moments(z_nk, torch.tensor(u_np), time_n, np.zeros((3, 3)), None)
    lagged_vv, shift_pv = truth["weight_vv"], truth["shift_pv"].astype(float)
    start = _MomentFit.start(np.eye(2), np.array([[0.5], [0.0]]), lagged_vv, shift_pv)
    start["cut_logit_pv"] = np.where(truth["cut_pv"], 3.0, -3.0)
    start["cut_logit_pv"][2, 0] = -8.0
    overlooked = start.polished(seen, 300)
    assert not overlooked.cut()[2, 0] > 0.5
    assert (2, 0) in overlooked.uncut(seen)
    unseen = seen._replace(mean_ctk=seen.mean_ctk.copy(), design_cp=seen.design_cp.copy())
    unseen.design_cp[3, 1] = 1  # target 2 is only there together with target 1, and never seen later
    unseen.mean_ctk[3, 1:] = np.nan
    assert {p for p, _ in overlooked.uncut(unseen)} == {0, 1}
    found = overlooked.with_cuts(seen)
    assert ((found.cut() > 0.5) == truth["cut_pv"]).all()
    assert found.loss < overlooked.loss - 1e-3
    assert abs(found["background_vl"][0, 0]) < 0.1 < abs(overlooked["background_vl"][0, 0])


@pytest.fixture(scope="module")
def simulated():
    return temporal_scm(
        n_genes=80, n_invariant=2, n_responsive=3, n_perturbations=6, cells_per_snapshot=60, seed=2
    )


SETTINGS = {
    "n_invariant": 2,
    "n_responsive": 3,
    "likelihood": "gaussian",
    "n_hidden": 64,
    "epochs": 30,
    "warm_start": 15,
    "lr": 5e-3,
    "progress": False,
    "compile": False,
}


@pytest.fixture(scope="module")
def trained(simulated) -> Fit:
    train = simulated[simulated.obs["split"] == "train"].copy()
    return fit("temporal-scm", None, Screen(train, "target", "control", time="time"), **SETTINGS)


def test_a_fit_recovers_responsive_programmes(trained, simulated):
    screen = Screen.from_spec(trained.screen, simulated[simulated.obs["split"] == "train"].copy())
    found = latents(trained, screen).obsm["X_causalcell"]
    match = matching(screen.adata.obsm["z_responsive"], found[:, 2:])
    assert np.abs(match.correlation_m).mean() > 0.8


def test_saved_fits_predict_the_same(trained, tmp_path):
    again = Fit.load(trained.save(tmp_path / "run"))
    first, second = (predict(f, ["P01", "P01+P02"], 20, times=[2, 4.5], seed=1) for f in (trained, again))
    assert_allclose(first.X, second.X)
    assert first.obs.groupby(["condition", "time"], observed=True).size().tolist() == [20] * 4


def test_cells_evolve_from_their_own_snapshot(trained, simulated):
    start = simulated[(simulated.obs["target"] == "control") & (simulated.obs["time"] == 2)].copy()
    basal = Screen.from_spec(trained.screen, start)
    cells = predict(trained, ["P01"], 40, times=[2, 4], basal=basal)
    assert set(cells.obs["basal_cell"]) <= set(start.obs_names)
    with pytest.raises(PredictionError, match="choose basal cells of an earlier snapshot"):
        predict(trained, ["P01"], 40, times=[1], basal=basal)
    paths = cell_trajectories(trained, basal, [0, 1], ["control", "P01"], n_samples=20)
    assert dict(paths.sizes) == {"cell": 2, "condition": 2, "time": 3, "programme": 5}
    assert_allclose(
        paths["mean"].sel(time=2.0, condition="P01"),
        paths["mean"].sel(time=2.0, condition="control"),
        atol=1e-5,
    )
    spread = (paths["high"] - paths["low"]).mean("programme")
    assert (spread.sel(time=4.0) > spread.sel(time=2.0)).all()  # the longer the way, the less is known


def test_trajectories_and_effects_agree(trained):
    paths = trajectories(trained, ["P01", "P01+P02"], n_samples=8)
    assert dict(paths.sizes) == {"condition": 2, "time": 4, "programme": 5}
    assert ((paths["low"] <= paths["mean"]) & (paths["mean"] <= paths["high"])).all()
    assert (paths["cell_sd"] > 0).all()
    early, late = (effects(trained, ["P01"], n_samples=5, time=t)["programme_effect"] for t in (1, 4))
    assert not np.allclose(early, late)


def test_graphs(trained):
    lagged = lagged_graph(trained)
    assert len(lagged) == 3 * 5
    own = lagged[lagged["parent"] == lagged["programme"]]
    assert (own["probability"] == 1).all()
    assert len(graph(trained)) == 6 * 3
    with pytest.raises(PredictionError, match="no weights between programmes under each perturbation"):
        mechanism_graph(trained)


@pytest.mark.parametrize("preset", ["independent-pairs", "transport", "sinkhorn", "paper", "no-sparsity"])
def test_presets_train(simulated, preset):
    train = simulated[simulated.obs["split"] == "train"].copy()
    screen = Screen(train, "target", "control", time="time")
    settings = SETTINGS | {"epochs": 2, "warm_start": None} | PRESETS[preset]
    short = fit("temporal-scm", None, screen, **settings)
    assert np.isfinite(short.history["train_loss"]).all()
    if preset == "paper":
        assert set(lagged_graph(short)["programme"]) == {"responsive_1", "responsive_2", "responsive_3"}
        assert len(lagged_graph(short)) == 3 * 2 + 3


def test_missing_snapshots_and_control_alone(simulated):
    train = simulated[simulated.obs["split"] == "train"]
    gone = (train.obs["target"] == "P03") & train.obs["time"].isin([2, 3])
    short = SETTINGS | {"epochs": 3, "warm_start": 2}
    partial = fit(
        "temporal-scm", None, Screen(train[~gone].copy(), "target", "control", time="time"), **short
    )
    assert np.isfinite(predict(partial, ["P03"], 5, times=[3]).X).all()
    alone = Screen(train[train.obs["target"] == "control"].copy(), "target", "control", time="time")
    course = fit("temporal-scm", None, alone, **(short | {"warm_start": None}))
    assert predict(course, ["control"], 5, times=[2.5]).n_obs == 5


def test_what_the_user_is_told(simulated):
    train = simulated[simulated.obs["split"] == "train"].copy()
    with pytest.raises(PairError, match="pass the column of times as time="):
        fit("temporal-scm", None, Screen(train, "target", "control"), **SETTINGS)
    once = Screen(train[train.obs["time"] == 1].copy(), "target", "control", time="time")
    with pytest.raises(PairError, match="two snapshots at least"):
        fit("temporal-scm", None, once, **SETTINGS)
    course = Screen(train, "target", "control", time="time")
    for onset in (2.0, float("nan"), "soon"):
        with pytest.raises(PairError, match=f"not after the first snapshot, at 1.0, found {onset!r}"):
            fit("temporal-scm", None, course, onset=onset, **SETTINGS)
    lonely = train[~((train.obs["target"] == "control") & (train.obs["time"] == 3))].copy()
    with pytest.raises(DataError, match="found none in time 3"):
        fit("temporal-scm", None, Screen(lonely, "target", "control", time="time"), **SETTINGS)


@pytest.mark.parametrize(
    ("labels", "times"),
    [(["D2", "day 4"], [2, 4]), (["72h", "96 hours"], [72, 96]), (["0", "1.5"], [0, 1.5])],
)
def test_times_as_text(labels, times, simulated):
    cells = simulated[:2].copy()
    cells.obs = pd.DataFrame({"target": ["control", "P01"], "time": labels}, index=cells.obs_names)
    assert_allclose(Screen(cells, "target", "control", time="time", allow_empty=True).time_n, times)


@pytest.mark.parametrize("labels", [["D2", "72h"], ["early", "late"], ["D2", "3"]])
def test_times_that_cannot_be_read(labels, simulated):
    cells = simulated[:2].copy()
    cells.obs = pd.DataFrame({"target": ["control", "P01"], "time": labels}, index=cells.obs_names)
    with pytest.raises(DataError, match="one unit for all such as 'D2' or '72h'"):
        Screen(cells, "target", "control", time="time", allow_empty=True)


def test_a_target_without_cells_is_predicted_from_its_embedding(simulated):
    """True shifts as embeddings, of five seen targets: what the unseen one does is the least sure."""
    train = simulated[(simulated.obs["split"] == "train") & (simulated.obs["target"] != "P02")].copy()
    record = simulated.uns["simulation"]
    table = pd.DataFrame(record["shift_pv"], index=[str(name) for name in record["perturbations"]])
    screen = Screen(train, "target", "control", time="time", embeddings=table, unseen=["P02"])
    described = fit("temporal-scm", None, screen, **(SETTINGS | {"gates": "open", "warm_start": None}))
    paths = trajectories(described, list(table.index), n_samples=60)
    width = (
        (paths["high"] - paths["low"])
        .sel(programme=[f"responsive_{i}" for i in (1, 2, 3)])
        .mean(["time", "programme"])
    )
    assert float(width.sel(condition="P02")) > 1.15 * float(width.drop_sel(condition="P02").max())
    assert described.model.embedding_pe.abs().sum() > 0
    assert predict(described, ["P02", "P01+P02"], 10, times=[3]).n_obs == 20


def test_cells_and_control_cells_share_one_pass_of_the_encoder(batch):
    """Passes of their own would leave batch normalisation with statistics that neither of them has."""
    guide = _guide(norm="batch")
    seen = []
    guide.encoder.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    guide(batch)
    assert seen == [2 * batch.n_cells]


def test_an_encoder_that_sees_time_tells_cells_with_the_same_counts_apart(batch):
    same = batch._replace(x_ng=torch.zeros_like(batch.x_ng), previous=batch._replace(time_n=batch.time_n - 1))

    def encoded(**settings) -> torch.Tensor:
        return poutine.trace(_guide(**settings)).get_trace(same).nodes["z_invariant"]["fn"].base_dist.loc

    assert encoded().std(0).max() < 1e-6
    loc_nl = encoded(sees_time=True)
    assert_close(loc_nl[:3], loc_nl[3:])  # the same three times
    assert (loc_nl[0] - loc_nl[1]).abs().min() > 1e-3
    early_nb = _guide(sees_time=True).beside(same.previous)
    assert_close(early_nb[:3, -1], torch.tensor([-1 / 3, 0.0, 2 / 3]))
