"""The weight-variant SCM: mechanisms by enumeration, anchors, alignment, doubles, and a simulated truth."""

import itertools

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from numpy.testing import assert_allclose
from pyro import poutine
from scipy import stats
from sklearn.linear_model import LinearRegression
from torch.testing import assert_close

from pyro_causalcell.batch import Batch, Mechanisms, Rotation, carried
from pyro_causalcell.data import Minibatches, Screen
from pyro_causalcell.errors import PairError
from pyro_causalcell.evaluate import audit, matching, to_inference_data
from pyro_causalcell.guides.weight_variant_scm import WeightVariantSCMGuide
from pyro_causalcell.inference import Fit, Pair, build_pair, elbo_terms, fit
from pyro_causalcell.inference.engine import NotTraceableError, TracedStep
from pyro_causalcell.models.weight_variant_scm import PRESETS, WeightVariantSCM
from pyro_causalcell.predict import effects, graph, latents, mechanism_graph, predict, programme_names
from pyro_causalcell.predict.cells import cell_trace
from pyro_causalcell.simulate import latent_scm

U = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.5, 2.0]])
"""Control, A, B, both, and both at other doses."""
SIZES = {"n_invariant": 1, "n_responsive": 2, "n_hidden": 4, "likelihood": "gaussian", "norm": "none"}
OPEN = {"gates": "open", "edges": "open"}


def _cells(u_np: torch.Tensor, seed: int = 0) -> Batch:
    torch.manual_seed(seed)
    n = len(u_np)
    return Batch(
        x_ng=torch.randn(n, 4),
        u_np=u_np,
        library_n1=torch.ones(n, 1),
        batch_nb=torch.zeros(n, 0),
        condition_n=torch.arange(n),
        index_n=torch.arange(n),
        n_total=n,
    )


@pytest.fixture
def batch() -> Batch:
    """Five cells, four genes, two targets; each cell has a control cell."""
    return _cells(U)._replace(control=_cells(torch.zeros(5, 2), seed=1))


def _model(**settings) -> WeightVariantSCM:
    torch.manual_seed(1)
    model = WeightVariantSCM(4, 2, **(SIZES | settings))
    if not model.anchored:
        model.weight_vk = torch.randn(2, 3)
    return model


def _guide(**settings) -> WeightVariantSCMGuide:
    torch.manual_seed(1)
    return WeightVariantSCMGuide(4, 2, **(SIZES | settings))


def _changes(seed: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "shift": torch.randn(2, 2),
        "log_scale": torch.randn(2, 2) / 2,
        "weight": torch.randn(2, 2, 3),
    }


def _nodes(model, batch, **data):
    trace = poutine.trace(poutine.condition(model, data=data)).get_trace(batch)
    trace.compute_log_prob()
    return trace.nodes


# ---------------------------------------------------------------- mechanisms


def _log_density(model, u_p, z_k, gate_pv, edge_vk, changes) -> float:
    """log p(z_v | z_l, u) for binary gates and edges, from the normal law of (I - Λ)^-1 n."""
    u, gate, edge = (t.double().numpy() for t in (u_p, gate_pv, edge_vk * model.allowed_vk))
    shift, log_scale, weight = (changes[name].double().numpy() for name in ("shift", "log_scale", "weight"))
    base = 0 if model.anchored else model.weight_vk.detach().double().numpy() * edge
    weight_vk = base + sum(u[p] * gate[p][:, None] * edge * weight[p] for p in range(2))
    mean_v = sum(u[p] * gate[p] * shift[p] for p in range(2)) + weight_vk[:, 0] * float(z_k[0])
    sd_v = np.exp(sum(u[p] * gate[p] * log_scale[p] for p in range(2)))
    total_vv = np.linalg.inv(np.eye(2) - weight_vk[:, 1:])
    law = stats.multivariate_normal(total_vv @ mean_v, total_vv * sd_v**2 @ total_vv.T)
    return float(law.logpdf(z_k[1:].numpy()))


def test_a_cell_looks_at_the_targets_that_it_carries_alone():
    """A thousand targets more that no cell carries change neither density nor gradients."""
    model, z_nk, edge_vk = _model(), torch.randn(5, 3), torch.full((2, 3), 0.5)
    found = []
    for more in (0, 1000):
        u_np = torch.cat([U, torch.zeros(5, more)], 1)
        tables = [torch.full((2, 2), 0.3), *_changes().values()]
        tables = [torch.cat([t, torch.ones(more, *t.shape[1:])]).requires_grad_() for t in tables]
        gate_pv, *changes = tables
        p_z = model.mechanisms(carried(u_np, 2), z_nk[:, :1], gate_pv, edge_vk, *changes)
        log_prob_n = p_z.log_prob(z_nk[:, 1:])
        log_prob_n.sum().backward()
        assert all(bool((t.grad[2:] == 0).all()) for t in tables)
        found.append([log_prob_n.detach(), *(t.grad[:2] for t in tables)])
    assert_close(*found)


def test_the_step_can_be_recorded(batch):
    """Where the number of targets that a cell carries is known, no operation depends on values."""
    pair, known = Pair(_model(), _guide()), batch._replace(most=2)
    assert TracedStep(pair, known, {}).difference(known, {}) < 1e-4
    with pytest.raises(NotTraceableError, match="carried"):
        TracedStep(pair, batch, {})


@pytest.mark.parametrize("anchored", [True, False])
def test_probabilities_give_the_expectation_over_all_gates_and_edges(anchored):
    """Two targets, two responsive programmes, one invariant: 16 gates times 8 possible graphs."""
    model, changes, z_nk = _model(anchored=anchored), _changes(), torch.randn(5, 3)
    gate_pv, edge_vk = torch.rand(2, 2), torch.rand(2, 3) * model.allowed_vk
    found_n = model.mechanisms(carried(U), z_nk[:, :1], gate_pv, edge_vk, *changes.values()).log_prob(
        z_nk[:, 1:]
    )
    possible = model.allowed_vk.bool()
    expected_n = np.zeros(5)
    for bits in itertools.product([0.0, 1.0], repeat=4 + int(possible.sum())):
        gates, edges = torch.tensor(bits[:4]).reshape(2, 2), torch.zeros(2, 3)
        edges[possible] = torch.tensor(bits[4:])
        states, odds = (
            torch.cat([gates.ravel(), edges[possible]]),
            torch.cat([gate_pv.ravel(), edge_vk[possible]]),
        )
        share = float(torch.where(states > 0, odds, 1 - odds).prod())
        for n in range(5):
            expected_n[n] += share * _log_density(model, U[n], z_nk[n], gates, edges, changes)
    assert_allclose(found_n.detach(), expected_n, rtol=1e-4)


@pytest.mark.parametrize("anchored", [True, False])
def test_binary_gates_leave_no_slack(anchored):
    model, changes, z_nk = _model(anchored=anchored), _changes(), torch.randn(5, 3)
    gate_pv, edge_vk = torch.tensor([[1.0, 0], [1, 1]]), torch.tensor([[1.0, 0, 1], [0, 0, 0]])
    p_z = model.mechanisms(carried(U), z_nk[:, :1], gate_pv, edge_vk, *changes.values())
    assert_close(p_z.slack(z_nk[:, 1:]).detach(), torch.zeros(5, 2))
    expected = [_log_density(model, U[n], z_nk[n], gate_pv, edge_vk, changes) for n in range(5)]
    assert_allclose(p_z.log_prob(z_nk[:, 1:]).detach(), expected, rtol=1e-4)
    drawn = model.eval().mechanisms(carried(U), z_nk[:, :1], gate_pv, edge_vk, *changes.values())
    assert drawn.slack is None
    assert_close(drawn.log_prob(z_nk[:, 1:]), p_z.log_prob(z_nk[:, 1:]))


def test_control_is_the_anchor(batch):
    """Whatever is altered, control cells are standard normals; without an anchor they have edges."""
    data = {"gate": torch.ones(2, 2), "edge": torch.ones(2, 3), **_changes()}
    p_z = _nodes(_model(), batch, **data)["z_responsive"]["fn"]
    for part in (p_z.loc[0], p_z.weight_kk[0], p_z.log_scale[0]):
        assert bool((part == 0).all())
    assert_close(p_z.precision[0], torch.ones(2))
    model = _model(anchored=False)
    nodes = _nodes(model, batch, **data)
    p_z, z_l = nodes["z_responsive"]["fn"], nodes["z_invariant"]["value"]
    assert_close(p_z.weight_kk[0], model.weight_vk[:, 1:].triu(1))
    assert_close(p_z.loc[0], model.weight_vk[:, 0] * z_l[0])
    assert bool((p_z.log_scale[0] == 0).all())


def test_changes_of_a_double_add(batch):
    changes = _changes()
    data = {"gate": torch.tensor([[1.0, 1], [0, 1]]), "edge": torch.ones(2, 3), **changes}
    p_z = _nodes(_model(), batch, z_invariant=torch.zeros(5, 1), **data)["z_responsive"]["fn"]
    for part in (p_z.loc, p_z.weight_kk, p_z.log_scale):
        assert_close(part[3], part[1] + part[2])
        assert_close(part[4], 0.5 * part[1] + 2 * part[2])
    assert_close(p_z.loc[1], changes["shift"][0])
    assert_close(p_z.loc[2], changes["shift"][1] * torch.tensor([0.0, 1.0]))
    assert_close(p_z.weight_kk[1], torch.tensor([[0.0, float(changes["weight"][0, 0, 2])], [0.0, 0.0]]))
    assert_close(p_z.log_scale[2], changes["log_scale"][1] * torch.tensor([0.0, 1.0]))


def test_the_background_is_the_same_under_every_perturbation(batch):
    model = _model(n_invariant=2)
    model.weight_ll = torch.tensor([[9.0, 0.5], [9.0, 9.0]])  # only what is above the diagonal counts
    model.free_shift_pl, model.free_log_scale_pl = torch.ones(2, 2), torch.ones(2, 2)
    p_z = model.background(U)
    z_nl = torch.randn(5, 2)
    standard = dist.Normal(0.0, 1.0).log_prob(torch.stack([z_nl[:, 0] - 0.5 * z_nl[:, 1], z_nl[:, 1]], 1))
    assert_close(p_z.log_prob(z_nl), standard.sum(1))
    model.hold_gates_open(True)  # while axes are sought it is free
    freed = model.background(U)
    assert_close(freed.loc[:4, 0], torch.tensor([0.0, 1.0, 1.0, 2.0]))
    assert_close(freed.log_scale[:4, 1], torch.tensor([0.0, 1.0, 1.0, 2.0]))
    model.hold_gates_open(False)
    assert_close(model.background(U).log_prob(z_nl), p_z.log_prob(z_nl))


def test_noise_in_place_of_programmes_is_the_same_model(batch):
    """p(n_v) of the non-centred sites is p(z_v | z_l, u) times the determinant of dz/dn."""
    changes, noise_nv = _changes(), torch.randn(5, 2)
    centred, apart = _model(**OPEN), _model(centred=False, **OPEN)
    data = {"z_invariant": torch.randn(5, 1), **changes}
    by_noise = _nodes(apart, batch, innovation=noise_nv, **data)
    z_nv = centred.mechanisms(
        carried(U), data["z_invariant"], torch.ones(2, 2), centred.allowed_vk, *changes.values()
    ).from_noise(noise_nv)
    by_value = _nodes(centred, batch, z_responsive=z_nv, **data)
    log_det_n = (U @ changes["log_scale"]).sum(1)
    assert_close(by_noise["innovation"]["log_prob"], by_value["z_responsive"]["log_prob"] + log_det_n)
    assert_close(by_noise["x"]["log_prob"], by_value["x"]["log_prob"])


def test_weights_of_low_rank(batch):
    model, loading_pr = _model(rank=1, **OPEN), torch.tensor([[2.0], [-3.0]])
    model.basis_rvk = torch.ones(1, 2, 3)
    data = {"shift": torch.zeros(2, 2), "log_scale": torch.zeros(2, 2), "z_invariant": torch.ones(5, 1)}
    nodes = _nodes(model, batch, loading=loading_pr, **data)
    assert "weight" not in nodes
    p_z = nodes["z_responsive"]["fn"]
    assert_close(p_z.loc[:, 0].detach(), torch.tensor([0.0, 2.0, -3.0, -1.0, 1.0 - 6.0]))
    assert_close(p_z.weight_kk[1].detach(), torch.tensor([[0.0, 2.0], [0.0, 0.0]]))
    assert_close(nodes["loading"]["log_prob_sum"], dist.Normal(0.0, 1.0).log_prob(loading_pr).sum())


def test_priors_and_costs_of_gates_and_edges(batch):
    """A gate costs what the cells of its target could say, an edge what those it can act in could."""
    model = _model(target_cells=(100.0, 50.0), min_effect=0.4, min_weight=0.2)
    gate_pv, edge_vk = torch.tensor([[1.0, 0], [1, 1]]), torch.ones(2, 3)
    changes = _changes()
    nodes = _nodes(model, batch, gate_rate=torch.full((2, 2), 0.3), gate=gate_pv, edge=edge_vk, **changes)
    expected = {
        "gate_rate": dist.Beta(1.0, 2.0).log_prob(torch.full((2, 2), 0.3)).sum(),
        "gate": dist.Bernoulli(0.3).log_prob(gate_pv).sum(),
        "min_effect": torch.tensor(-(100.0 + 2 * 50.0) * 0.16 / 2),
        "edge": 6 * torch.tensor(0.5).log(),
        "min_weight": torch.tensor(-(2 * 150.0 + 50.0) * 0.04 / 2),  # two edges are possible, and one
        "shift": (gate_pv * dist.Normal(0.0, 2.0).log_prob(changes["shift"])).sum(),
        "log_scale": (gate_pv * dist.Normal(0.0, 0.5).log_prob(changes["log_scale"])).sum(),
    }
    possible_pvk = gate_pv.unsqueeze(-1) * model.allowed_vk
    expected["weight"] = (possible_pvk * dist.Normal(0.0, 1.0).log_prob(changes["weight"])).sum()
    for name, value in expected.items():
        assert_close(nodes[name]["log_prob_sum"], value, msg=name)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"centred": False}, "needs gates='open' and edges='open'"),
        ({"alters": ["mean"]}, "alters holds some of"),
        ({"n_latents": 3}, "n_latents"),
    ],
)
def test_settings_that_do_not_exist_are_refused(tiny_screen, settings, match):
    with pytest.raises(PairError, match=match):
        build_pair("weight-variant-scm", None, tiny_screen.dims(), settings)


# ---------------------------------------------------------------- guide


def _align(guide, batch, seed=0) -> float:
    torch.manual_seed(seed)
    return float(_nodes(guide, batch)["align"]["log_prob_sum"].detach())


def _locs(guide, batch) -> torch.Tensor:
    return guide.encoder(batch.x_ng, batch.batch_nb)[0][:, : guide.n_invariant].detach()


def test_pairs_are_charged_their_squared_distance(batch):
    guide = _guide(alignment="pairs", alpha=7.0)
    gap = (_locs(guide, batch) - _locs(guide, batch.control)).square().sum()
    assert_allclose(_align(guide, batch), 7.0 * float(gap), rtol=1e-5)


@pytest.mark.parametrize("alignment", ["mmd", "sliced"])
def test_conditions_are_charged_their_distance_from_control(alignment):
    """Nothing where the encoder sees no difference on average, much where it does; in nats per cell."""
    u_np = torch.tensor([[1.0, 0.0]]).repeat(200, 1)
    near = _cells(u_np)._replace(condition_n=torch.ones(200).long(), control=_cells(u_np * 0, seed=1))
    far = near._replace(x_ng=near.x_ng + 20)
    guide = _guide(alignment=alignment, alpha=3.0)
    assert abs(_align(guide, near)) < 0.1 * _align(guide, far)
    assert_allclose(_align(_guide(alignment=alignment, alpha=6.0), far), 2 * _align(guide, far), rtol=1e-4)
    ours = elbo_terms(_model(), guide, far)["align"]
    assert ours < 0  # a cost


def test_without_alignment_no_anchors_are_asked_for(batch):
    guide = _guide(alignment="none")
    assert "align" not in _nodes(guide, batch) and guide.needs == set()
    aligned = _guide()
    assert aligned.needs == {"control"} and "align" not in _nodes(aligned, batch._replace(control=None))


@pytest.mark.parametrize("intervention", ["ignored", "input", "prior"])
def test_the_encoder_of_the_background_never_sees_the_perturbation(batch, intervention):
    guide = _guide(intervention=intervention).eval()
    guide.gate_logit, guide.shift_loc = torch.full((2, 2), 30.0), torch.full((2, 2), 3.0)
    if intervention != "ignored":
        torch.nn.init.ones_(guide.adjust.weight)
    here, there = (_nodes(guide, b) for b in (batch, batch._replace(u_np=1 - U)))
    locs = {
        name: [nodes[name]["fn"].base_dist.loc for nodes in (here, there)] for name in here if "z_" in name
    }
    assert torch.equal(*locs["z_invariant"])
    assert torch.equal(*locs["z_responsive"]) == (intervention == "ignored")


def test_the_guide_takes_over_mechanisms():
    guide = _guide()
    seen = Mechanisms(
        torch.tensor([[True, False], [False, True]]),
        torch.tensor([[True, False, True], [False, False, False]]),
        **{f"{name}_{'pvk' if name == 'weight' else 'pv'}": value for name, value in _changes().items()},
    )
    guide.hold_gates_open(True)
    assert float(torch.sigmoid(guide.gate_logit).min()) > 0.999 and not guide.edge_logit.requires_grad
    guide.hold_gates_open(False)
    guide.rotate(Rotation(torch.eye(3), torch.zeros(3), torch.zeros(2, 3), seen))
    assert torch.equal(guide.gate_logit > 0, seen.altered_pv) and torch.equal(
        guide.edge_logit > 0, seen.edge_vk
    )
    assert torch.equal(guide.shift_loc, seen.shift_pv) and torch.equal(guide.scale_loc, seen.log_scale_pv)
    assert torch.equal(guide.weight_loc, seen.weight_pvk)


# ---------------------------------------------------------------- fits

QUICK = {"n_invariant": 2, "n_responsive": 2, "n_hidden": 8, "epochs": 2, "progress": False, "device": "cpu"}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_arguments_of_fit(tiny_screen, preset):
    trained = fit("weight-variant-scm", None, tiny_screen, **(PRESETS[preset] | QUICK))
    assert np.isfinite(trained.history["train_loss"]).all()
    cells = predict(trained, ["A+B"], 5)
    assert np.isfinite(cells.X).all()


TRAINING = {"likelihood": "gaussian", "n_hidden": 32, "epochs": 40, "batch_size": 128, "lr": 5e-3}


@pytest.fixture(scope="module")
def simulated():
    """A simulated screen with two invariant and two responsive programmes, and one held-out double."""
    return latent_scm(
        n_genes=60,
        n_responsive=2,
        n_invariant=2,
        n_perturbations=6,
        n_combinations=1,
        cells_per_combination=200,
        n_train=1500,
        n_test=400,
    )


@pytest.fixture(scope="module")
def screen(simulated) -> Screen:
    return Screen(simulated[simulated.obs["split"] == "train"].copy(), "target", "control")


@pytest.fixture(scope="module")
def trained(screen, tmp_path_factory) -> Fit:
    out = tmp_path_factory.mktemp("scm") / "run"
    return fit("weight-variant-scm", None, screen, **(QUICK | TRAINING), out=out)


def _recovered(run: Fit, simulated) -> dict[str, float]:
    """Matched correlation of z_v, and R² of z_l from z_l and of the true z_v from z_l, on test cells."""
    cells = simulated[simulated.obs["split"] == "test"].copy()
    z_nk = latents(run, Screen.from_spec(run.screen, cells)).obsm["X_causalcell"]
    truth = {name: cells.obsm[name] for name in ("z_invariant", "z_responsive")}

    def r2(x_nk, y_nk):
        return LinearRegression().fit(x_nk, y_nk).score(x_nk, y_nk)

    return {
        "mcc": float(np.abs(matching(truth["z_responsive"], z_nk[:, 2:]).correlation_m).mean()),
        "background": r2(z_nk[:, :2], truth["z_invariant"]),
        "leak": r2(z_nk[:, :2], truth["z_responsive"]),
    }


def test_a_simulated_truth_is_found(trained, simulated):
    """.99, .97 and .01 in this run."""
    found = _recovered(trained, simulated)
    assert found["mcc"] > 0.9 and found["background"] > 0.85 and found["leak"] < 0.15


def test_without_sparsity_and_alignment_it_is_not(screen, simulated):
    """.49, .32 and .59 in this run: blocks mix and axes are arbitrary."""
    dense = PRESETS["dense"] | PRESETS["dag-vae"]
    found = _recovered(fit("weight-variant-scm", None, screen, **(QUICK | TRAINING | dense)), simulated)
    assert found["mcc"] < 0.8 and found["leak"] > 0.3


def test_graphs_name_the_programmes_that_perturbations_act_on(trained, simulated):
    names = programme_names(trained)
    assert names == ["invariant_1", "invariant_2", "responsive_1", "responsive_2"]
    edges = graph(trained)
    assert len(edges) == 12 and set(edges["programme"]) == set(names[2:])
    altered_pv = (edges["probability"].to_numpy() > 0.5).reshape(6, 2)
    truth_pv = simulated.uns["simulation"]["altered_pv"]
    order = max(([0, 1], [1, 0]), key=lambda order: (altered_pv == truth_pv[:, order]).sum())
    assert altered_pv[truth_pv[:, order]].all() and altered_pv.sum() <= 10  # 9 in this run, 6 are true
    inner = mechanism_graph(trained)
    assert inner.columns.tolist() == [
        "perturbation",
        "parent",
        "programme",
        "probability",
        "weight",
        "weight_sd",
    ]
    assert len(inner) == 6 * 5  # two invariant parents of each, and one possible edge between the two
    assert not ((inner["parent"] == "responsive_1") | (inner["parent"] == inner["programme"])).any()
    row = inner.iloc[2]  # the first perturbation on responsive_1, from responsive_2
    assert row[["perturbation", "parent", "programme"]].tolist() == ["perturbation_00", names[3], names[2]]
    guide = trained.guide
    assert_allclose(row["weight"], guide.weight_loc[0, 0, 3].detach(), rtol=1e-6)
    both = torch.sigmoid(guide.gate_logit[0, 0]) * torch.sigmoid(guide.edge_logit[0, 3])
    assert_allclose(row["probability"], both.detach(), rtol=1e-5)


def test_a_double_keeps_the_noise_of_control_cells(trained, simulated):
    """Abduction takes z_l and the noise of control cells; action gives the double's mechanisms to them."""
    cells = simulated[(simulated.obs["split"] == "test") & (simulated.obs["target"] == "control")].copy()
    basal = Screen.from_spec(trained.screen, cells, unknown="error")
    double = simulated.uns["simulation"]["conditions"][-1]
    seen, moved = (
        predict(trained, [name], 100, basal=basal).obsm["X_causalcell"] for name in ("control", double)
    )
    assert_allclose(moved[:, :2], seen[:, :2], atol=1e-5)  # the background stays
    assert np.abs(moved[:, 2:] - seen[:, 2:]).max() > 1
    batch = Batch(
        None,
        torch.from_numpy(trained.screen.design([double])).repeat(5, 1),
        torch.ones(5, 1),
        torch.zeros(5, 0),
        torch.zeros(5).long(),
        torch.arange(5),
        5,
    )
    draw = {
        "gate": torch.ones(6, 2),
        "edge": torch.ones(2, 4),
        "shift": torch.full((6, 2), 2.0),
        "log_scale": torch.full((6, 2), np.log(3.0)),
        "weight": torch.full((6, 2, 4), 0.5),
    }
    factual = next(iter(Minibatches(basal, np.arange(5), 5, shuffle=False)))
    drawn = _site_values(trained, batch._replace(library_n1=factual.library_n1), draw, factual)
    control = _site_values(trained, factual, draw, factual)
    z_l, noise = control["z_invariant"], control["z_responsive"]
    second = 4.0 + z_l.sum(1) + 9.0 * noise[:, 1]  # two targets: mean 2 + 2, weights .5 + .5, scale 3 · 3
    first = 4.0 + z_l.sum(1) + second + 9.0 * noise[:, 0]
    assert_close(drawn["z_invariant"], z_l)
    assert_close(drawn["z_responsive"], torch.stack([first, second], 1), rtol=1e-4, atol=1e-4)


def _site_values(run: Fit, batch: Batch, draw, factual: Batch) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    nodes = cell_trace(run, batch, draw, factual).nodes
    return {name: nodes[name]["value"].detach() for name in ("z_invariant", "z_responsive")}


def test_an_unseen_double_is_predicted(trained, simulated):
    """Nearer to the measured mean of the held-out double than control cells are."""
    double = simulated.uns["simulation"]["conditions"][-1]
    truth = simulated[simulated.obs["target"] == double].X.mean(0)
    control = simulated[simulated.obs["target"] == "control"]
    basal = Screen.from_spec(trained.screen, control.copy(), unknown="error")
    predicted = predict(trained, [double], 200, basal=basal).X.mean(0)
    assert np.linalg.norm(predicted - truth) < 0.5 * np.linalg.norm(control.X.mean(0) - truth)


def test_names_reach_arviz_effects_and_the_audit(trained, screen):
    names = programme_names(trained)
    found = effects(trained, n_samples=3, n_cells=64)
    assert found["programme"].values.tolist() == names
    assert float(abs(found["programme_effect"].sel(programme=names[:2])).max()) < 1e-5  # the same cells
    groups = to_inference_data(trained, screen, np.arange(6), n_samples=2)
    posterior = groups["posterior"]
    assert posterior["shift"].dims[2:] == ("perturbation", "responsive")
    assert posterior["weight"].dims[2:] == ("perturbation", "responsive", "programme")
    assert posterior["edge"].dims[2:] == ("responsive", "programme")
    assert posterior["responsive"].values.tolist() == names[2:]
    assert groups["prior"]["gate"].shape == (1, 2, 6, 2)
    assert "2 of 2" in audit(screen, fit=trained)["coverage of programmes"].found


def test_a_run_reads_back(trained, simulated):
    read = Fit.load(trained.path)
    pd.testing.assert_frame_equal(mechanism_graph(read), mechanism_graph(trained))
    double = simulated.uns["simulation"]["conditions"][-1]
    np.testing.assert_array_equal(*(predict(f, [double], 10).X for f in (trained, read)))


def test_cells_and_control_cells_share_one_pass_of_the_encoder(batch):
    """Passes of their own would leave batch normalisation with statistics that neither of them has."""
    guide = _guide(norm="batch")
    seen = []
    guide.encoder.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    guide(batch)
    assert seen == [2 * batch.n_cells]
