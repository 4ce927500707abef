"""Zero-inflated counts, from the fit to its predictions: simulated counts of which a known share is lost."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from pyro_causalcell.data import Screen, Split, random_cells
from pyro_causalcell.evaluate import compare_likelihoods, iw_nll, posterior_predictive_checks
from pyro_causalcell.inference import Fit, fit
from pyro_causalcell.predict import predict

LOST = np.repeat([0.4, 0.15, 0.0], [5, 5, 10])
"""Share of each gene's counts that is lost in the inflated screen."""
KINDS = ("nb", "zinb")


def _screen(lost_g: np.ndarray) -> Screen:
    """Simulated: 900 cells of three perturbations and control, 20 genes of about 10 counts, θ = 4."""
    rng = np.random.default_rng(0)
    label_n = rng.choice(["non-targeting", "A", "B", "C"], 900)
    z_nk = 2.5 * np.array([[name == label for name in "ABC"] for label in label_n]) + rng.normal(
        size=(900, 3)
    )
    mean_ng = np.exp(z_nk @ rng.normal(0, 0.3, (3, 20)) + rng.normal(2.3, 0.4, 20))
    x_ng = rng.poisson(mean_ng * rng.gamma(4.0, 1 / 4, mean_ng.shape))
    x_ng = x_ng * (rng.random(x_ng.shape) >= lost_g)
    obs = pd.DataFrame({"target": label_n}, index=[f"cell{i}" for i in range(900)])
    return Screen(ad.AnnData(x_ng.astype(np.float32), obs, pd.DataFrame(index=[f"g{i}" for i in range(20)])))


def _fits(screen: Screen, split: Split) -> dict[str, Fit]:
    settings = {"n_latents": 3, "n_hidden": 16, "warm_start": 0}
    training = {"epochs": 100, "batch_size": 210, "lr": 4e-2, "progress": False, "device": "cpu"}
    return {
        kind: fit("sparse-shift", None, screen, split=split, likelihood=kind, **settings, **training)
        for kind in KINDS
    }


@pytest.fixture(scope="module", params=["inflated", "plain"])
def fitted(request) -> tuple[str, Screen, Split, dict[str, Fit]]:
    """A screen with and one without lost counts, its cells apart, and a fit of each kind."""
    screen = _screen(LOST if request.param == "inflated" else 0 * LOST)
    split = random_cells(screen, validation=0.1, test=0.2)
    return request.param, screen, split, _fits(screen, split)


def test_the_lost_share_of_each_gene_is_found(fitted):
    name, _, _, fits = fitted
    found_g = torch.sigmoid(fits["zinb"].model.zero_logit_g).detach().numpy()
    lost_g = LOST if name == "inflated" else 0 * LOST
    np.testing.assert_allclose(found_g, lost_g, atol=0.08)
    assert found_g[lost_g == 0].max() < 0.02
    assert np.abs(found_g - lost_g).mean() < 0.03
    assert fits["nb"].model.zero_logit_g is None


def test_unseen_cells_are_likelier_where_counts_are_lost_and_no_less_likely_elsewhere(fitted):
    name, screen, split, fits = fitted
    scores = {kind: iw_nll(fits[kind], screen, split.test, n_particles=200) for kind in KINDS}
    assert all(np.isfinite(score["nll"]).all() for score in scores.values())
    gap_n = (scores["nb"]["nll"] - scores["zinb"]["nll"]).to_numpy()
    if name == "inflated":
        assert gap_n.mean() > 3 * gap_n.std() / np.sqrt(len(gap_n))
        assert compare_likelihoods(scores).index[0] == "zinb"
    else:
        assert abs(gap_n.mean()) < 0.2  # of 60 nats


def test_a_zero_inflated_fit_is_kept_and_predicts(fitted, tmp_path):
    _, screen, _, fits = fitted
    fits["zinb"].save(tmp_path / "run")
    read = Fit.load(tmp_path / "run")
    torch.testing.assert_close(read.model.zero_logit_g, fits["zinb"].model.zero_logit_g)
    cells, again = (predict(f, ["A"], 400, seed=1) for f in (fits["zinb"], read))
    np.testing.assert_array_equal(cells.X, again.X)
    assert (cells.X == cells.X.round()).all()
    measured_ng = screen.adata.X[screen.adata.obs["target"] == "A"]
    zeros_g, expected_g = (cells.X == 0).mean(0), (measured_ng == 0).mean(0)
    np.testing.assert_allclose(zeros_g, expected_g, atol=0.15)
    assert np.abs(zeros_g - expected_g).mean() < 0.05
    total = cells.X.sum(1) / cells.obs["library"]  # the counts that are kept make up for the lost ones
    assert total.mean() == pytest.approx(1, abs=0.05)


def test_checks_of_zeros_tell_the_kinds_apart(fitted):
    """The share of zeros of the genes whose counts are lost: between that of the draws, or not."""
    name, screen, split, fits = fitted
    outside = {}
    for kind in KINDS:
        zeros = posterior_predictive_checks(
            fits[kind], screen, split.test, by=None, statistic="gene_zero_fraction", n_samples=40
        )
        table = zeros.table().iloc[:10]
        outside[kind] = int((table["observed"] > table["high"]).sum())
    assert outside["zinb"] <= 3
    assert outside["nb"] >= 4 if name == "inflated" else outside["nb"] <= 3


def test_compiled_training_is_the_eager_training(tiny_screen, quick):
    settings = quick | {
        "likelihood": "zinb",
        "n_latents": 2,
        "n_hidden": 4,
        "gates": "open",
        "batch_size": 90,
    }
    eager, compiled = (fit("sparse-shift", None, tiny_screen, compile=c, **settings) for c in (False, True))
    found, expected = compiled.history["train_loss"], eager.history["train_loss"]
    assert found.to_numpy() == pytest.approx(expected.to_numpy(), rel=1e-3)
