"""Interpretation against planted truth: linear pairs with known weights, sets and doubles of known kind."""

import anndata as ad
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule

from pyro_causalcell import evaluate
from pyro_causalcell.baselines.means import Moments, moments
from pyro_causalcell.data import Screen
from pyro_causalcell.errors import DataError, PredictionError
from pyro_causalcell.evaluate import interaction_classes, programme_signatures
from pyro_causalcell.inference import fit
from pyro_causalcell.simulate import combination_screen

SD = torch.tensor([1.0, 2.0])
KINDS = ["additive", "dominant", "saturated", "suppressed"]


class LinearModel(PyroModule):
    """z ~ Normal(0, SD), x ~ Normal(z W, 1): for normalised values."""

    def __init__(self, n_genes):
        super().__init__()
        self.needs = {"normalised"}
        self.decoder = torch.nn.Linear(2, n_genes)

    def forward(self, batch):
        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            z = pyro.sample("z", dist.Normal(batch.u_np.new_zeros(len(batch.u_np), 2), SD).to_event(1))
            return pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=batch.x_ng)


class CountsModel(LinearModel):
    """The same programmes, with x ~ Poisson(library softmax(z W))."""

    def __init__(self, n_genes):
        super().__init__(n_genes)
        self.needs = {"counts"}

    def forward(self, batch):
        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            z = pyro.sample("z", dist.Normal(batch.u_np.new_zeros(len(batch.u_np), 2), SD).to_event(1))
            mean = batch.library_n1 * self.decoder(z).softmax(-1)
            return pyro.sample("x", dist.Poisson(mean).to_event(1), obs=batch.x_ng)


class LinearGuide(PyroModule):
    """q(z | x) = Normal(x V, 0.1)."""

    def __init__(self, n_genes):
        super().__init__()
        self.encoder = torch.nn.Linear(n_genes, 2)

    def forward(self, batch):
        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            pyro.sample("z", dist.Normal(self.encoder(batch.x_ng), 0.1).to_event(1))


class SequentialGuide(LinearGuide):
    """The second programme's mean adds the draw of the first: what is read must not depend on draws."""

    def forward(self, batch):
        loc = self.encoder(batch.x_ng)
        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            first = pyro.sample("z1", dist.Normal(loc[:, :1], 1.0).to_event(1))
            pyro.sample("z2", dist.Normal(loc[:, 1:] + first, 1.0).to_event(1))


class SequentialModel(LinearModel):
    def forward(self, batch):
        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            prior = dist.Normal(batch.u_np.new_zeros(len(batch.u_np), 1), 1.0).to_event(1)
            z = torch.cat([pyro.sample(name, prior) for name in ("z1", "z2")], -1)
            return pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=batch.x_ng)


def pair(model, guide, screen, seed=0):
    """A fit whose decoder and encoder are then set by hand."""
    trained = fit(model, guide, screen, epochs=1, warm_start=0, progress=False, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in (trained.model.decoder, trained.guide.encoder):
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
            layer.bias.fill_(0.3)
    return trained


@pytest.fixture(scope="module")
def normalised(_tiny):
    adata = _tiny.copy()
    adata.layers["log"] = np.log1p(adata.X.toarray())
    return Screen(adata, layer="log")


@pytest.fixture(scope="module")
def linear(normalised):
    return pair(LinearModel, LinearGuide, normalised)


# ---------------------------------------------------------------- signatures


def test_signatures_of_a_linear_decoder_are_its_weights(linear):
    """Two standard deviations times the weight; in units of the gene's own sd, sqrt(1 + sum (sd w)²)."""
    found = programme_signatures(linear, n_cells=4000)
    effect_kg = (SD[:, None] * linear.model.decoder.weight.T).detach().numpy()
    np.testing.assert_allclose(found["change"], 2 * effect_kg, rtol=0.05)
    np.testing.assert_allclose(
        found["standardised"], 2 * effect_kg / np.sqrt(1 + (effect_kg**2).sum(0)), rtol=0.08
    )
    assert found.attrs["change_units"] == "as the training data"
    assert list(found["programme"].values) == ["programme_1", "programme_2"]


def test_signatures_of_counts_are_in_log1p_cp10k(tiny_screen):
    trained = pair(CountsModel, LinearGuide, tiny_screen)
    found = programme_signatures(trained, n_cells=4000)
    weight, bias = trained.model.decoder.weight.detach().numpy(), 0.3
    z_nk = np.random.default_rng(0).normal(size=(20000, 2)) * SD.numpy()

    def expected(k, end):
        moved = z_nk.copy()
        moved[:, k] = end
        share = np.exp(moved @ weight.T + bias)
        return np.log1p(1e4 * share / share.sum(1, keepdims=True)).mean(0)

    for k, sd in enumerate(SD.numpy()):
        np.testing.assert_allclose(found["change"][k], expected(k, sd) - expected(k, -sd), atol=0.15)
    assert found.attrs["change_units"] == "log1p CP10k"


def test_signatures_are_of_the_control_state(small_fit):
    """Whoever lends libraries and batches, the cells drawn are not perturbed."""
    seen = []
    handle = small_fit.model.register_forward_pre_hook(lambda _, given: seen.append(given[0].u_np))
    programme_signatures(small_fit, n_cells=8)
    handle.remove()
    assert seen and not any(u_np.any() for u_np in seen)


def test_signatures_repeat_and_ask_for_cells(small_fit):
    first, second = (programme_signatures(small_fit, n_cells=16, seed=1) for _ in range(2))
    assert first.identical(second) and first["standardised"].shape == (3, 20)
    with pytest.raises(PredictionError, match="at least 2"):
        programme_signatures(small_fit, n_cells=1)


# ---------------------------------------------------------------- attributions


def test_attributions_of_a_linear_encoder(linear, normalised):
    """Input minus baseline, times the weight; the baseline is the mean control cell."""
    pytest.importorskip("captum")
    found = evaluate.encoder_attributions(linear, normalised, n_cells=10_000, n_steps=5)
    x_ng = normalised.x(np.arange(normalised.n_cells))
    away_ng = x_ng - x_ng[normalised.condition_n == 0].mean(0)
    weight_kg = linear.guide.encoder.weight.detach().numpy()
    np.testing.assert_allclose(found["attribution"], away_ng.mean(0) * weight_kg, atol=1e-4)
    np.testing.assert_allclose(found["magnitude"], np.abs(away_ng).mean(0) * np.abs(weight_kg), atol=1e-4)


def test_attributions_add_up_to_the_change_of_the_output(small_fit, small_screen):
    """Completeness, for an encoder with hidden layers that sees interventions and batches."""
    pytest.importorskip("captum")
    found = evaluate.encoder_attributions(small_fit, small_screen, n_cells=200)
    change_k = found["output_change"].values
    assert np.abs(change_k).max() > 0.02
    np.testing.assert_allclose(found["attribution"].sum("gene"), change_k, atol=5e-3)
    again = evaluate.encoder_attributions(small_fit, small_screen, n_cells=200)
    assert found.identical(again)


def test_attributions_do_not_depend_on_draws(normalised):
    pytest.importorskip("captum")
    trained = pair(SequentialModel, SequentialGuide, normalised)
    found = evaluate.encoder_attributions(trained, normalised, n_cells=10_000, n_steps=5)
    first_g, second_g = trained.guide.encoder.weight.detach().numpy()
    x_ng = normalised.x(np.arange(normalised.n_cells))
    away_g = (x_ng - x_ng[normalised.condition_n == 0].mean(0)).mean(0)
    np.testing.assert_allclose(found["attribution"][1], away_g * (first_g + second_g), atol=1e-4)


def test_attributions_need_control_cells(linear, normalised):
    pytest.importorskip("captum")
    perturbed = normalised.adata[normalised.condition_n != 0].copy()
    with pytest.raises(DataError, match="no control cells"):
        evaluate.encoder_attributions(linear, Screen.from_spec(linear.screen, perturbed))


# ---------------------------------------------------------------- gene sets


@pytest.fixture
def signatures():
    """100 genes; the first twelve rise with programme k1 and fall with k2, nothing is planted in k3."""
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.normal(size=(3, 100)), ["k1", "k2", "k3"], [f"G{g}" for g in range(100)])
    table.loc["k1", table.columns[:12]] += 2.5
    table.loc["k2", table.columns[:12]] -= 2.5
    return table


def test_a_planted_set_is_found_and_random_ones_are_not(signatures):
    pytest.importorskip("gseapy")
    rng = np.random.default_rng(1)
    sets = {f"random{i}": list(rng.choice(signatures.columns[12:], 12, replace=False)) for i in range(10)}
    sets |= {"planted": [*signatures.columns[:12], "unmeasured"], "few": ["G1", "G2"]}
    found = evaluate.enrichment(signatures, sets)
    assert list(dict.fromkeys(found["programme"])) == ["k1", "k2", "k3"]
    assert len(found) == 3 * 11 and "few" not in set(found["gene_set"])
    sure = found[found["fdr"] < 0.05]
    assert set(zip(sure["programme"], sure["gene_set"], strict=True)) == {
        ("k1", "planted"),
        ("k2", "planted"),
    }
    up, down = sure["score"]
    assert up > 1.5 and down < -1.5
    row = sure.iloc[0]
    assert row["n_genes"] == 12 and set(row["leading_genes"].split()) <= set(signatures.columns[:12])
    pd.testing.assert_frame_equal(found, evaluate.enrichment(signatures, sets))


def test_a_programme_without_genes_is_in_no_set(signatures):
    pytest.importorskip("gseapy")
    signatures.loc["k2"] = 0.0
    found = evaluate.enrichment(signatures, {"planted": signatures.columns[:12]}).set_index("programme")
    assert found.loc["k2", "p_value"] == 1 and np.isnan(found.loc["k2", "score"])
    assert found.loc["k1", "fdr"] < 0.05


def test_sets_of_other_names_are_refused(signatures):
    with pytest.raises(
        DataError, match=r"overlap of 2 sets is 0.*called G0, G1, G2, .*sets g0: .* same case"
    ):
        evaluate.enrichment(signatures, {"a": [f"g{i}" for i in range(9)], "b": ["x"]})
    with pytest.raises(DataError, match="not all"):
        evaluate.enrichment(signatures, {"everything": signatures.columns})


# ---------------------------------------------------------------- doubles


def true_moments(record):
    """Means of the simulated conditions without noise."""
    mean_cg = np.log1p(1e4 * record["share_cg"].astype(float))
    return Moments(mean_cg, np.zeros_like(mean_cg), np.full(len(mean_cg), 100))


@pytest.fixture(scope="module")
def simulated():
    sizes = {"n_targets": 28, "n_doubles": 24, "n_genes": 800, "cells_per_condition": 150}
    adata = combination_screen(**sizes, n_control_cells=1000, truth_draws=200)
    return Screen(adata, "target", "control", allow_empty=True)


def test_kinds_of_simulated_doubles_from_their_true_effects(simulated):
    record = simulated.adata.uns["simulation"]
    conditions = list(record["conditions"])
    found = interaction_classes(simulated.describe(), conditions, true_moments(record))
    assert len(found) == 24 and list(found["double"]) == conditions[-24:]
    kind = dict(zip(conditions, record["kind_c"], strict=True))
    assert (found["kind"] == found["double"].map(kind)).mean() >= 0.95
    assert set(found["kind"]) >= set(KINDS)


def test_kinds_of_measured_doubles_need_the_noise_taken_off(simulated):
    record = simulated.adata.uns["simulation"]
    kind = {simulated.canonical(c): k for c, k in zip(record["conditions"], record["kind_c"], strict=True)}
    measured = moments(simulated, np.arange(simulated.n_cells))
    found = interaction_classes(simulated.describe(), simulated.conditions, measured)
    right = found["kind"] == found["double"].map(kind)
    assert right.mean() >= 0.75
    assert right[found["agreement"] > 0.95].mean() > 0.95
    blind = measured._replace(variance_cg=np.zeros_like(measured.variance_cg))
    naive = interaction_classes(simulated.describe(), simulated.conditions, blind)
    assert (naive["kind"] == naive["double"].map(kind)).mean() < 0.5


def test_lengths_do_not_grow_with_noise():
    """Effects of length 2, 2 and sqrt(8), seen through noise of length 3 each: right on average."""
    rng = np.random.default_rng(0)
    n_genes, n_cells = 400, 10
    effect_4g = np.zeros((4, n_genes))
    effect_4g[1, 0] = effect_4g[2, 1] = effect_4g[3, 0] = effect_4g[3, 1] = 2.0
    labels = ["control", "A", "B", "A+B"]
    adata = ad.AnnData(np.ones((4, n_genes)), pd.DataFrame({"target": labels}, list("wxyz")))
    spec = Screen(adata, "target", "control").describe()
    squares = []
    for _ in range(60):
        noise_4g = 3 / np.sqrt(n_genes) * rng.normal(size=(4, n_genes))
        variance_4g = np.full((4, n_genes), 9 / n_genes * n_cells)
        seen = Moments(effect_4g + noise_4g, variance_4g, np.full(4, n_cells))
        (row,) = interaction_classes(spec, labels, seen).to_dict("records")
        squares.append([row[f"size_{part}"] ** 2 for part in ("first", "second", "double")])
    np.testing.assert_allclose(np.mean(squares, 0), [4, 4, 8], rtol=0.15)


def test_doubles_without_their_parts_are_unknown():
    labels = ["control", "A", "A+B", "A+B+C"]
    adata = ad.AnnData(np.ones((4, 3)), pd.DataFrame({"target": labels}, list("wxyz")))
    spec = Screen(adata, "target", "control").describe()
    mean_cg = np.random.default_rng(0).normal(size=(4, 3))
    found = interaction_classes(spec, labels, Moments(mean_cg, np.ones((4, 3)), np.full(4, 9)))
    assert list(found["double"]) == ["A+B"] and found["kind"].item() == "unknown"
    assert np.isnan(found["residual_share"].item())
    with pytest.raises(DataError, match=r"expected means of shape \(4, 3\), found \(4, 2\)"):
        interaction_classes(spec, labels, Moments(mean_cg[:, :2], np.ones((4, 2)), np.full(4, 9)))


def test_the_perturbed_genes_do_not_count():
    names = ["A", "B", "other", "more"]
    adata = ad.AnnData(np.ones((4, 4)), pd.DataFrame({"target": ["control", "A", "B", "A+B"]}, list("wxyz")))
    adata.var_names = names
    spec = Screen(adata, "target", "control").describe()
    mean_cg = np.array([[0, 0, 0, 0], [9, 0, 1, 0], [0, 9, 0, 1], [0, 0, 1, 1]], dtype=float)
    found = interaction_classes(
        spec, ["control", "A", "B", "B+A"], Moments(mean_cg, 0 * mean_cg, np.full(4, 9))
    )
    assert found["kind"].item() == "additive" and found["double"].item() == "A+B"


def test_measured_and_predicted_kinds_of_a_fit(small_fit, small_screen):
    found = evaluate.classify_doubles(small_fit, small_screen, n_cells=200)
    assert list(found["source"]) == ["measured", "predicted"] and set(found["double"]) == {"A+B"}
    assert found["kind"].notna().all() and np.isfinite(found["residual_share"]).all()
    assert {"programmes_first", "programmes_shared", "programmes_pair"} <= set(found)
    alone = evaluate.classify_doubles(small_fit, None, ["D+C", "B+A"], n_cells=50)
    assert list(alone["double"]) == ["C+D", "A+B"] and set(alone["source"]) == {"predicted"}
    unseen = evaluate.classify_doubles(small_fit, small_screen, ["C+D"], n_cells=50)
    assert dict(zip(unseen["source"], unseen["kind"] == "unknown", strict=True)) == {
        "measured": True,
        "predicted": False,
    }


def test_programmes_of_the_targets_are_those_of_the_graph(small_fit):
    guide = small_fit.guide
    kept = guide.gate_logit.detach().clone()
    logit_pk = torch.full_like(kept, -30.0)
    logit_pk[0, :2] = logit_pk[1, 1] = logit_pk[4, 2] = 30.0  # A: 1 and 2, B: 2, A with B: 3
    with torch.no_grad():
        guide.gate_logit.copy_(logit_pk)
        (row,) = evaluate.classify_doubles(small_fit, n_cells=20).to_dict("records")
        guide.gate_logit.copy_(kept)
    assert row["programmes_first"] == "programme_1 programme_2"
    assert (row["programmes_second"], row["programmes_shared"]) == ("programme_2", "programme_2")
    assert row["programmes_pair"] == "programme_3"


def test_fits_without_gates_have_no_programmes_to_share(linear):
    assert not any(name.startswith("programmes") for name in evaluate.classify_doubles(linear, n_cells=20))


@pytest.mark.parametrize(
    ("doubles", "words"), [(["A"], "found A"), (["A+B+C"], "found A"), ([], "found none"), (["A+X"], "'X'")]
)
def test_what_is_no_double_is_refused(small_fit, doubles, words):
    with pytest.raises(DataError, match=words):
        evaluate.classify_doubles(small_fit, None, doubles)
