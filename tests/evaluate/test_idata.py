"""ArviZ gets every group with names, and its own functions work on it."""

import arviz as az
import numpy as np
import pandas as pd
import pytest

from pyro_causalcell.data import Screen
from pyro_causalcell.evaluate import iw_nll, to_inference_data
from pyro_causalcell.inference import Fit, fit
from pyro_causalcell.predict import graph, latents

ROWS = np.array([5, 1, 300, 42])


@pytest.fixture(scope="module")
def idata(small_fit: Fit, small_screen: Screen):
    return to_inference_data(small_fit, small_screen, ROWS, n_samples=200, seed=3)


def test_groups_and_coordinates(idata, small_fit: Fit, small_screen: Screen) -> None:
    posterior, predictive = idata["posterior"], idata["posterior_predictive"]
    assert {"gate", "edge_rate", "shift"} <= set(posterior.data_vars)
    assert posterior["shift"].dims == ("chain", "draw", "perturbation", "programme")
    assert posterior["shift"].shape == (1, 200, 5, 3)
    assert posterior["perturbation"].values.tolist() == ["A", "B", "C", "D", "A:B"]
    assert posterior["programme"].values.tolist() == ["programme_1", "programme_2", "programme_3"]
    cells = small_screen.adata.obs_names[ROWS].tolist()
    for group in (predictive, idata["observed_data"], idata["log_likelihood"]):
        assert group["cell"].values.tolist() == cells
    assert predictive["x"].dims == ("chain", "draw", "cell", "gene")
    assert predictive["gene"].values.tolist() == small_screen.genes
    assert idata["log_likelihood"]["x"].shape == (1, 1, 4)


def test_values(idata, small_fit: Fit, small_screen: Screen) -> None:
    posterior = idata["posterior"]
    np.testing.assert_array_equal(idata["observed_data"]["x"], small_screen.x(ROWS))
    assert set(np.unique(posterior["gate"])) <= {0.0, 1.0}
    edges = graph(small_fit)
    probability = posterior["gate"].mean(("chain", "draw")).to_numpy().ravel()
    assert np.abs(probability - edges["probability"]).max() < 5 * 0.5 / 200**0.5
    z_nk = latents(small_fit, small_screen).obsm["X_causalcell"][ROWS]
    np.testing.assert_allclose(idata["constant_data"]["z_mean"], z_nk, atol=1e-6)
    nll_n = iw_nll(small_fit, small_screen, ROWS, n_particles=200, seed=3)["nll"]
    np.testing.assert_allclose(idata["log_likelihood"]["x"].squeeze(), -nll_n)
    copies = idata["posterior_predictive"]["x"].mean("draw").sum("gene").squeeze()
    assert np.abs(copies / idata["observed_data"]["x"].sum("gene") - 1).max() < 0.5


def test_arviz_summarises_it(idata) -> None:
    table = az.summary(idata, var_names=["shift"], kind="stats")
    assert isinstance(table, pd.DataFrame) and len(table) == 15
    assert "shift[A:B, programme_2]" in table.index
    mean = idata["posterior"]["shift"].sel(perturbation="B", programme="programme_1").mean()
    assert table.loc["shift[B, programme_1]", "mean"] == pytest.approx(float(mean), abs=1e-3)
    assert set(az.summary(idata)["mean"].notna()) == {True}


def test_seed(small_fit: Fit, small_screen: Screen) -> None:
    first, again, other = (
        to_inference_data(small_fit, small_screen, ROWS, n_samples=3, seed=s) for s in (3, 3, 4)
    )
    for group in ("posterior", "posterior_predictive", "log_likelihood"):
        assert first[group].equals(again[group]) and not first[group].equals(other[group])


def test_validation_cells_and_a_fit_without_global_latents(tiny_screen: Screen) -> None:
    settings = {"n_latents": 2, "n_hidden": 8, "epochs": 2, "progress": False, "device": "cpu"}
    closed = fit("sparse-shift", None, tiny_screen, gates="closed", **settings)
    idata = to_inference_data(closed, tiny_screen, n_samples=2)
    assert "posterior" not in idata.groups()
    cells = tiny_screen.adata.obs_names[closed.split.validation].tolist()
    assert idata["observed_data"]["cell"].values.tolist() == cells
