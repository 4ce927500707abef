"""Discrepancy-VAE and SENA: formulas, whose likelihood counts, the discrepancy, planted interventions."""

import itertools

import anndata as ad
import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_causalcell.batch import Batch
from pyro_causalcell.data import Screen, gene_sets, held_out_combinations
from pyro_causalcell.errors import DataError, PairError
from pyro_causalcell.guides.discrepancy_vae import DiscrepancyVAEGuide
from pyro_causalcell.inference import build_pair, fit
from pyro_causalcell.models.discrepancy_vae import DiscrepancyVAE
from pyro_causalcell.predict import effects, graph, predict

CHAIN = torch.tensor([[9.0, 2.0, 0.5], [9.0, 9.0, -1.0], [9.0, 9.0, 9.0]])
"""1 -> 2 with 2, 1 -> 3 with 0.5, 2 -> 3 with -1; what is not above the diagonal does not count."""
TARGET = torch.tensor([[50.0, 0.0, 0.0], [0.0, 0.0, 50.0]])
SETTINGS = {"n_latents": 3, "n_hidden": 4, "likelihood": "gaussian", "mmd_weight": 2.0, "sparsity": 0.1}


def _cells(u_np: torch.Tensor, n_total: int, seed: int = 0) -> Batch:
    n = len(u_np)
    torch.manual_seed(seed)
    return Batch(
        x_ng=torch.randn(n, 4),
        u_np=u_np,
        library_n1=torch.ones(n, 1),
        batch_nb=torch.zeros(n, 0),
        condition_n=u_np.mv(torch.tensor([1.0, 2.0])).long(),
        index_n=torch.arange(n),
        n_total=n_total,
    )


@pytest.fixture
def batch() -> Batch:
    """8 of 16 cells, 4 genes, 2 targets (control, A, B, A+B), each with a control cell."""
    u_np = torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1]]).repeat_interleave(2, 0)
    return _cells(u_np, 16)._replace(control=_cells(torch.zeros(8, 2), 99, seed=1))


def _model(**settings) -> DiscrepancyVAE:
    torch.manual_seed(1)
    model = DiscrepancyVAE(4, 2, **(SETTINGS | settings))
    model.graph_kk.data.copy_(CHAIN)
    model.target_logit.data.copy_(TARGET)
    model.strength_p.data.copy_(torch.tensor([3.0, -2.0]))
    return model


def _sites(model, batch, **data):
    trace = poutine.trace(poutine.condition(model, data=data)).get_trace(batch)
    trace.compute_log_prob()
    return trace.nodes


def test_a_shift_travels_down_the_graph():
    model = _model()
    z_nk = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    expected = torch.tensor([[1, 2, 0.5 - 2], [0, 1, -1], [0, 0, 1]])
    torch.testing.assert_close(model.programmes(z_nk), expected)


def test_shifts_of_targets_add(batch):
    moved_nk = _model().shifts(batch.u_np)
    torch.testing.assert_close(moved_nk[2], torch.tensor([3.0, 0, 0]))
    torch.testing.assert_close(moved_nk[-1], torch.tensor([3.0, 0, -2.0]))
    assert bool((moved_nk[:2] == 0).all())


def test_training_explains_the_control_cells(batch):
    model, z_nk = _model(), torch.randn(8, 3)
    nodes = _sites(model, batch, z=z_nk)
    mean_ng = model.decoder(model.programmes(z_nk), batch.batch_nb)
    log_prob = dist.Normal(mean_ng, model.scale_g).log_prob(batch.control.x_ng).sum()
    torch.testing.assert_close(nodes["x"]["log_prob_sum"], 2 * log_prob)  # 8 of 16 cells
    torch.testing.assert_close(nodes["z"]["log_prob_sum"], 2 * dist.Normal(0.0, 1.0).log_prob(z_nk).sum())
    edges = 2.0 + 0.5 + 1.0
    torch.testing.assert_close(nodes["sparsity"]["log_prob_sum"], torch.tensor(-0.1 * 4 * 16 * edges))
    guide = DiscrepancyVAEGuide(4, n_latents=3, likelihood="gaussian")
    seen = poutine.trace(guide).get_trace(batch).nodes["z"]["fn"].base_dist.loc
    torch.testing.assert_close(seen, guide.encoder(batch.control.x_ng, batch.batch_nb)[0])


class _Linear(nn.Module):
    def __init__(self, weight_kg):
        super().__init__()
        self.weight_kg = weight_kg

    def forward(self, v_nk, batch_nb):
        return v_nk @ self.weight_kg


def test_without_anchors_a_cell_has_the_likelihood_of_its_own_perturbation(batch):
    """A linear decoder of one programme: x | u is Gaussian, and its exact posterior gives it exactly."""
    model = DiscrepancyVAE(4, 2, n_latents=1, likelihood="gaussian")
    guide = DiscrepancyVAEGuide(4, n_latents=1, likelihood="gaussian")
    weight_kg = torch.randn(1, 4)
    model.decoder, model.scale_g = _Linear(weight_kg), torch.full((4,), 0.7)
    alone, w_g = batch._replace(control=None, n_total=8), weight_kg[0]
    moved_n1 = model.shifts(alone.u_np).detach()
    precision = 1 + w_g @ w_g / 0.49
    loc_n1 = (moved_n1 + (alone.x_ng @ w_g).unsqueeze(-1) / 0.49) / precision
    guide.encoder.forward = lambda *_: (loc_n1, precision.rsqrt().expand_as(loc_n1))
    covariance = torch.outer(w_g, w_g) + 0.49 * torch.eye(4)
    expected = dist.MultivariateNormal(moved_n1 @ weight_kg, covariance).log_prob(alone.x_ng).sum()
    q = poutine.trace(guide).get_trace(alone)
    p = poutine.trace(poutine.replay(model, trace=q)).get_trace(alone)
    assert "mmd" not in p.nodes and "sparsity" not in p.nodes
    torch.testing.assert_close(p.log_prob_sum() - q.log_prob_sum(), expected, rtol=1e-4, atol=1e-3)


def test_the_discrepancy_of_all_cells_is_the_mean_over_minibatches():
    """One condition of four cells, all minibatches of two, with any two anchors; no measurement noise."""
    model = _model()
    model.scale_g = torch.full((4,), 1e-6)
    four, z_nk = _cells(torch.tensor([[1.0, 0]] * 4), 16), torch.randn(4, 3)

    def value(cells, anchors):
        anchored = _cells(torch.zeros(len(anchors), 2), 99)
        some = {n: f[list(cells)] for n, f in four._asdict().items() if torch.is_tensor(f)}
        some_cells = four._replace(**some, control=anchored)
        return _sites(model, some_cells, z=z_nk[list(anchors)])["mmd"]["log_prob_sum"].detach()

    pairs = list(itertools.combinations(range(4), 2))
    values = torch.stack([value(cells, anchors) for cells in pairs for anchors in pairs])
    torch.testing.assert_close(values.mean(), value(range(4), range(4)), rtol=1e-4, atol=1e-4)


def test_the_truth_has_no_discrepancy_and_others_have():
    """Cells drawn from the model, 400 of each condition, with their measurement noise."""
    model = _model(mmd_weight=1.0)
    u_np = torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1]]).repeat_interleave(400, 0)
    cells = _cells(u_np, len(u_np))
    with torch.no_grad():
        drawn = cells._replace(x_ng=_sites(model, cells._replace(x_ng=None))["x"]["value"])
        anchored = drawn._replace(control=_cells(torch.zeros(len(u_np), 2), 99))

        def per_cell(other):
            return -float(_sites(other, anchored)["mmd"]["log_prob_sum"]) / len(u_np) / 4

        wrong = _model(mmd_weight=1.0)
        wrong.strength_p.data.copy_(torch.tensor([0.0, 0.0]))
        noiseless = _model(mmd_weight=1.0)
        noiseless.scale_g = torch.full((4,), 1e-6)
        assert abs(per_cell(model)) < 0.002
        assert min(per_cell(wrong), per_cell(noiseless)) > 0.02


def test_counts_are_compared_as_log_normalised_values():
    model = DiscrepancyVAE(4, 2, likelihood="nb")
    x_ng, library_n1 = torch.tensor([[3.0, 0, 0, 1]]), torch.tensor([[2000.0]])
    expected = torch.tensor([[16.0, 1, 1, 6]]).log()
    torch.testing.assert_close(model.compared(x_ng, library_n1), expected)


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "poisson", "gaussian"])
def test_draws_follow_the_measurement_and_so_does_their_gradient(likelihood):
    """Against a difference of many draws; counts of about 1, where their shape matters most."""
    torch.manual_seed(0)
    model = DiscrepancyVAE(4, 2, likelihood=likelihood, n_latents=1)
    model.decoder = _Linear(torch.tensor([[1.0, 0.5, -0.5, -1.0]]))
    cells = _cells(torch.zeros(200_000, 2), 1)._replace(library_n1=torch.full((200_000, 1), 4.0))

    def mean_g(z):
        return model.drawn(z.expand(200_000, 1), cells).mean(0)

    z = torch.tensor(0.3, requires_grad=True)
    slope_g = torch.stack([torch.autograd.grad(m, z, retain_graph=True)[0] for m in mean_g(z)])
    with torch.no_grad():
        measured = model.measurement(z.expand(200_000, 1), cells).sample()
        torch.testing.assert_close(
            mean_g(z), model.compared(measured, cells.library_n1).mean(0), rtol=0.01, atol=0.02
        )
        drawn = model.drawn(z.expand(200_000, 1), cells)
        torch.testing.assert_close(
            (drawn == 0).float().mean(0), (measured == 0).float().mean(0), rtol=0, atol=0.01
        )
        difference_g = (mean_g(z + 0.25) - mean_g(z - 0.25)) / 0.5
    torch.testing.assert_close(slope_g, difference_g, rtol=0.05, atol=0.08)


def test_draws_follow_the_share_of_lost_counts():
    """Their gradient in it, against a difference of many draws."""
    torch.manual_seed(0)
    model = DiscrepancyVAE(4, 2, likelihood="zinb", n_latents=1)
    model.decoder = _Linear(torch.tensor([[1.0, 0.5, -0.5, -1.0]]))
    cells = _cells(torch.zeros(400_000, 2), 1)._replace(library_n1=torch.full((400_000, 1), 40.0))

    def mean_g(logit):
        model.zero_logit_g.data.fill_(logit)
        return model.drawn(torch.ones(400_000, 1), cells).mean(0)

    slope_g = torch.autograd.grad(mean_g(0.0).sum(), model.zero_logit_g)[0]
    with torch.no_grad():
        difference_g = mean_g(0.25) - mean_g(-0.25)
    torch.testing.assert_close(slope_g, 2 * difference_g, rtol=0.05, atol=0.03)


def test_screens_without_controls_are_refused(tiny_adata):
    perturbed = tiny_adata[(tiny_adata.obs["target"] != "non-targeting").to_numpy()].copy()
    screen = Screen(perturbed, control=None)
    with pytest.raises(DataError, match="control cells"):
        fit("discrepancy-vae", None, screen, epochs=1, progress=False)


# ------------------------------------------------------------------ planted interventions


@pytest.fixture(scope="module")
def planted() -> tuple[Screen, np.ndarray]:
    """Simulated: a chain of 3 programmes, 12 genes, 150 cells of A, B, C and A+C; their mean x."""
    rng = np.random.default_rng(0)
    total_kk = np.linalg.inv(np.eye(3) - np.diag([1.0, 1.0], 1))
    load_kg = rng.normal(size=(3, 12)) / np.sqrt(3)
    names = ["non-targeting", "non-targeting", "A", "B", "C", "A+C"]
    shift_ck = 3 * np.array([[name in c.split("+") for name in "ABC"] for c in names])
    label_n = np.repeat(names, 150)
    z_nk = rng.normal(size=(900, 3)) + np.repeat(shift_ck, 150, 0)
    x_ng = z_nk @ total_kk @ load_kg + 0.3 * rng.normal(size=(900, 12))
    obs = pd.DataFrame({"target": label_n}, index=[f"cell{i}" for i in range(900)])
    var = pd.DataFrame(index=[f"g{i}" for i in range(12)])
    return Screen(ad.AnnData(x_ng.astype(np.float32), obs, var)), shift_ck[2:] @ total_kk @ load_kg


def test_planted_interventions_are_matched_and_the_unseen_double_follows(planted):
    screen, truth_cg = planted
    split = held_out_combinations(screen, ["A+C"])
    settings = {"n_latents": 3, "n_hidden": 32, "likelihood": "gaussian"}
    training = {"epochs": 80, "batch_size": 128, "lr": 1e-2, "warmup": {"mmd": 20}, "progress": False}
    trained = fit("discrepancy-vae", None, screen, split=split, device="cpu", **settings, **training)
    names = ["A", "B", "C", "A+C"]
    found = effects(trained, names, n_samples=1, n_cells=500)["gene_effect"].to_numpy()
    error_c = np.linalg.norm(found - truth_cg, axis=1) / np.linalg.norm(truth_cg, axis=1)
    assert (error_c[:3] < 0.35).all() and error_c[3] < 0.5  # no change at all would be 1
    controls = Screen.from_spec(trained.screen, screen.adata[screen.condition_n == 0].copy())
    cells = predict(trained, ["control", "A+C"], 200, basal=controls)
    moved_nk = np.subtract(*cells.obsm["X_causalcell"].reshape(2, 200, 3))
    np.testing.assert_allclose(moved_nk, moved_nk[:1].repeat(200, 0), atol=1e-4)  # each cell by the same
    edges = graph(trained)
    sums = edges.groupby("perturbation")["probability"].sum()
    np.testing.assert_allclose(sums, 1, atol=1e-3)
    assert np.isfinite(edges["effect"]).all()


# ------------------------------------------------------------------ SENA


def test_a_unit_sees_its_gene_set_and_little_else():
    guide = DiscrepancyVAEGuide(4, 2, gene_sets=[[0, 1], [2]], leak=0.0)
    layer = guide.encoder.hidden.layers[0]  # of 4 genes and 2 batch columns
    assert layer.first.weight.shape == (2, 4) and len(guide.encoder.hidden.layers) == 2
    reached = (layer(tuple(torch.eye(6).split([4, 2], 1))) - layer.first.bias != 0).tolist()
    assert reached == [
        [True, False],
        [True, False],
        [False, True],
        [False, False],
        [True, True],
        [True, True],
    ]
    leaky = DiscrepancyVAEGuide(4, gene_sets=[[0, 1], [2]], leak=0.25).encoder.hidden.layers[0]
    torch.testing.assert_close((leaky(torch.eye(4)) - leaky.bias)[3], 0.25 * leaky.weight[:, 3])


@pytest.mark.parametrize("bad", [[0, 4], [-1], []])
def test_gene_sets_that_do_not_fit_are_refused(tiny_screen, bad):
    dims = tiny_screen.dims()._replace(n_genes=4)
    with pytest.raises(PairError, match=r"gene set 1 must hold columns from 0 to 3"):
        build_pair("discrepancy-vae", None, dims, {"gene_sets": [[0], bad]})


def test_a_gmt_file_makes_the_layer(tiny_screen, tmp_path):
    path = tmp_path / "sets.gmt"
    path.write_text("low\t\tgene0\tgene1\tgene2\nhigh\t\tgene5\tgene6\tgene7\n")
    sets = gene_sets(path, tiny_screen.genes, min_genes=3)
    pair = build_pair("discrepancy-vae", None, tiny_screen.dims(), {"gene_sets": list(sets.values())})
    mask_sg = pair.guide.encoder.hidden.layers[0].first.mask_oi
    names = np.array(tiny_screen.genes)
    assert [list(names[row == 1]) for row in mask_sg] == [
        ["gene0", "gene1", "gene2"],
        ["gene5", "gene6", "gene7"],
    ]
