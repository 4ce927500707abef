"""ArviZ gets every group with names, and its own functions work on it."""

from pathlib import Path

import anndata as ad
import arviz as az
import numpy as np
import pandas as pd
import pytest
import xarray as xr

from pyro_causalcell.data import Screen
from pyro_causalcell.errors import DataError
from pyro_causalcell.evaluate import draws, iw_nll, to_inference_data
from pyro_causalcell.inference import Fit, fit
from pyro_causalcell.predict import graph, latents

QUICK = {"n_latents": 2, "n_hidden": 8, "epochs": 2, "warm_start": 0, "progress": False, "device": "cpu"}
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
    assert idata["prior"]["shift"].dims == posterior["shift"].dims
    assert idata["prior_predictive"]["x"].dims == predictive["x"].dims
    conditions = np.array(small_screen.conditions)[small_screen.condition_n[ROWS]].tolist()
    for name in ("posterior_predictive", "prior_predictive", "observed_data", "constant_data"):
        assert idata[name]["condition"].values.tolist() == conditions
    np.testing.assert_array_equal(idata["constant_data"]["library"], small_screen.library_n[ROWS])


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


def test_prior_is_the_models(idata) -> None:
    prior = idata["prior"]
    rate = 1 / (1 + 4)  # Beta(1, number of targets)
    assert float(prior["edge_rate"].mean()) == pytest.approx(rate, abs=0.02)
    assert float(prior["gate"].mean()) == pytest.approx(rate, abs=0.03)
    assert float(prior["shift"].std()) == pytest.approx(3.0, rel=0.05)


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_what_is_streamed_to_disk_is_what_memory_holds(
    small_fit: Fit, small_screen: Screen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(draws, "CHUNK_BYTES", 4 * 6 * 20 * 3)  # three of seven cells at a time
    asked = {"rows": np.arange(7), "n_samples": 6, "seed": 2}
    memory = to_inference_data(small_fit, small_screen, **asked)
    path = tmp_path / f"E{suffix}"
    disk = to_inference_data(small_fit, small_screen, **asked, out=path)
    assert set(disk.groups()) == set(memory.groups())
    for name in memory.groups():
        for variable, values in memory[name].variables.items():
            np.testing.assert_array_equal(values, disk[name][variable], f"{name} {variable}")
            assert values.dims == disk[name][variable].dims
    assert disk["posterior_predictive"]["x"].encoding["preferred_chunks"]["cell"] == 3
    with pytest.raises(DataError, match="found .*E"):
        to_inference_data(small_fit, small_screen, **asked, out=path)


def test_out_must_say_its_format(small_fit: Fit, small_screen: Screen, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="end in .nc .* or .zarr"):
        to_inference_data(small_fit, small_screen, out=tmp_path / "E.h5")
    assert list(tmp_path.iterdir()) == []


def test_times_are_coordinates(tiny_adata: ad.AnnData) -> None:
    tiny_adata.obs["hour"] = np.arange(400) % 3 * 1.0
    screen = Screen(tiny_adata, time="hour")
    trained = fit("sparse-shift", None, screen, **QUICK)
    idata = to_inference_data(trained, screen, ROWS, n_samples=2)
    assert idata["posterior_predictive"]["time"].values.tolist() == (ROWS % 3).tolist()


def test_the_newer_container(
    small_fit: Fit, small_screen: Screen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(az, "InferenceData")  # as from ArviZ 1 on
    for out in (None, tmp_path / "E.nc"):
        tree = to_inference_data(small_fit, small_screen, ROWS, n_samples=2, out=out)
        assert isinstance(tree, xr.DataTree)
        assert tree["posterior_predictive"]["x"].shape == (1, 2, 4, 20)


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
    closed = fit("sparse-shift", None, tiny_screen, gates="closed", **QUICK)
    idata = to_inference_data(closed, tiny_screen, n_samples=2)
    assert not {"posterior", "prior"} & set(idata.groups())
    cells = tiny_screen.adata.obs_names[closed.split.validation].tolist()
    assert idata["observed_data"]["cell"].values.tolist() == cells
