"""Predicted and counterfactual cells; latents; replicates."""

import numpy as np
import pytest
import torch

from pyro_causalcell.data import Screen
from pyro_causalcell.errors import DataError, PredictionError
from pyro_causalcell.inference import Fit, fit
from pyro_causalcell.inference.fitted import CellSummary
from pyro_causalcell.predict import latents, predict, replicate


def _set(guide, name, index, value):
    values = getattr(guide, name).detach().clone()
    values[index] = value
    setattr(guide, name, values)


def _of(result, condition):
    return result[result.obs["condition"] == condition]


def test_what_comes_back(trained):
    result = predict(trained, ["A", "B+A", "control"], n_cells=60)
    assert result.shape == (180, 15) and result.var_names.tolist() == trained.screen.genes
    assert result.obs["condition"].tolist() == ["A"] * 60 + ["A+B"] * 60 + ["control"] * 60
    assert result.obs_names.is_unique and result.X.dtype == np.float32
    assert (result.X >= 0).all() and (result.X == np.round(result.X)).all()
    about = result.uns["causalcell"]
    assert about["units"] == "counts" and about["basal"] == "prior" and about["predicted"]
    assert result.obsm["X_causalcell"].shape == (180, 3)


def test_combinations_add_in_the_latent_and_interact_where_set(trained):
    result = predict(trained, ["control", "A", "B", "C", "A+B"], n_cells=3000)
    mean = {c: _of(result, c).obsm["X_causalcell"].mean(0) for c in result.obs["condition"].cat.categories}
    expected = {"control": [0, 0, 0], "A": [2, 0, 0], "B": [0, -3, 0], "C": [0, 0, 0], "A+B": [2, -3, 1.5]}
    for condition, centre in expected.items():
        np.testing.assert_allclose(mean[condition], centre, atol=0.1)
    np.testing.assert_allclose(_of(result, "A").obsm["X_causalcell"].std(0), 1.0, atol=0.06)


def test_uncertain_gates_make_two_kinds_of_cells(trained):
    _set(trained.guide, "gate_logit", (2, 2), 0.0)
    _set(trained.guide, "shift_loc", (2, 2), 20.0)
    z_n = predict(trained, ["C"], n_cells=500).obsm["X_causalcell"][:, 2]
    moved = z_n > 10
    assert 0.25 < moved.mean() < 0.75 and ((np.abs(z_n) < 6) | (np.abs(z_n - 20) < 6)).all()


def test_seeds(trained):
    state = torch.get_rng_state()
    first, again, other = (predict(trained, ["A"], n_cells=20, seed=s) for s in (1, 1, 2))
    assert np.array_equal(first.X, again.X) and not np.array_equal(first.X, other.X)
    assert torch.equal(torch.get_rng_state(), state)


def test_units(trained):
    counts = predict(trained, ["A"], n_cells=30)
    logged = predict(trained, ["A"], n_cells=30, units="lognorm")
    totals = np.maximum(counts.X.sum(1, keepdims=True), 1)
    np.testing.assert_allclose(logged.X, np.log1p(counts.X / totals * 1e4), rtol=1e-5)
    assert logged.uns["causalcell"]["units"] == "lognorm"


def test_library_is_given_or_as_in_training(trained, screen):
    given = predict(trained, ["A"], n_cells=400, library=1000.0)
    assert (given.obs["library"] == 1000).all() and abs(given.X.sum(1).mean() - 1000) < 60
    drawn = predict(trained, ["A"], n_cells=2000).obs["library"]
    np.testing.assert_allclose(
        np.quantile(drawn, [0.1, 0.5, 0.9]), np.quantile(screen.library_n, [0.1, 0.5, 0.9]), rtol=0.1
    )


def test_libraries_are_those_of_the_snapshots_around_a_time():
    rank_n = np.array([0.0, 0.5, 1.0])
    early, late = np.linspace(10, 30, 101).tolist(), np.linspace(100, 300, 101).tolist()
    cells = CellSummary(np.linspace(10, 300, 101).tolist(), [[]], [1.0], [0.0, 4.0], [early, late])
    first, last = np.array([10, 20, 30]), np.array([100, 200, 300])
    for time, expected in ((-1, first), (4, last), (9, last)):
        np.testing.assert_allclose(cells.libraries(rank_n, time), expected)
    np.testing.assert_allclose(cells.libraries(rank_n, 1), first**0.75 * last**0.25, rtol=0.005)
    np.testing.assert_allclose(cells.libraries(rank_n), [10, 155, 300])
    older = CellSummary(cells.library, [[]], [1.0])  # runs that were written without times
    np.testing.assert_allclose(older.libraries(rank_n, 1.0), [10, 155, 300])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"conditions": ["AA"]}, DataError, "unknown perturbation target 'AA': did you mean A"),
        ({"conditions": ["A+D"]}, DataError, "unknown perturbation target 'D'"),
        ({"conditions": []}, PredictionError, "conditions"),
        ({"conditions": ["A"], "n_cells": 0}, PredictionError, "at least 1"),
        ({"conditions": ["A"], "units": "tpm"}, PredictionError, "'counts' or 'lognorm', found 'tpm'"),
    ],
)
def test_what_cannot_be_predicted_is_said(trained, arguments, error, message):
    with pytest.raises(error, match=message):
        predict(trained, **arguments)


# ---------------------------------------------------------------- counterfactuals


def test_own_condition_reproduces_the_cells_latents(trained, screen, predict_adata):
    own = Screen.from_spec(trained.screen, predict_adata[predict_adata.obs["target"] == "A"].copy())
    result = predict(trained, ["A"], n_cells=300, basal=own)
    assert result.uns["causalcell"]["basal"] == "cells"
    assert set(result.obs["basal_cell"]) <= set(own.adata.obs_names)
    posterior = latents(trained, own)[result.obs["basal_cell"].to_numpy()]
    gap = (result.obsm["X_causalcell"] - posterior.obsm["X_causalcell"]) / posterior.obsm["X_causalcell_sd"]
    assert abs(gap.mean()) < 0.15 and 0.8 < gap.std() < 1.25  # draws from the cells' own posteriors


def test_another_condition_moves_each_cell_by_the_shift_alone(trained, predict_adata):
    control = Screen.from_spec(
        trained.screen, predict_adata[predict_adata.obs["target"] == "non-targeting"].copy()
    )
    trained.guide.shift_scale = torch.full((4, 3), 1e-6)
    here, there, both = (
        predict(trained, [c], n_cells=100, basal=control, seed=3) for c in ("control", "A", "A+B")
    )
    assert here.obs["basal_cell"].tolist() == there.obs["basal_cell"].tolist()
    moved = there.obsm["X_causalcell"] - here.obsm["X_causalcell"]
    np.testing.assert_allclose(moved, np.tile([2.0, 0, 0], (100, 1)), atol=1e-4)
    both_moved = both.obsm["X_causalcell"] - here.obsm["X_causalcell"]
    np.testing.assert_allclose(both_moved, np.tile([2.0, -3.0, 1.5], (100, 1)), atol=1e-4)
    assert (there.obs["library"].to_numpy() == here.obs["library"].to_numpy()).all()


# ---------------------------------------------------------------- latents


def test_latents_keep_cells_and_names(trained, screen):
    result = latents(trained, screen)
    assert result.obs_names.tolist() == screen.adata.obs_names.tolist()
    assert result.obs["target"].tolist() == screen.adata.obs["target"].tolist()
    assert result.obsm["X_causalcell"].shape == result.obsm["X_causalcell_sd"].shape == (300, 3)
    assert (result.obsm["X_causalcell_sd"] > 0).all()
    assert result.uns["causalcell"]["programmes"] == ["programme_1", "programme_2", "programme_3"]


def test_latents_of_a_cell_do_not_depend_on_the_others_or_on_draws(trained, screen, predict_adata):
    _set(trained.guide, "gate_logit", slice(None), 0.0)  # as unsure as can be
    _set(trained.guide, "shift_loc", slice(None), 5.0)
    whole = latents(trained, screen)
    part = latents(trained, Screen.from_spec(trained.screen, predict_adata[100:140].copy()))
    np.testing.assert_allclose(
        part.obsm["X_causalcell"], whole.obsm["X_causalcell"][100:140], rtol=1e-4, atol=1e-4
    )
    trained.seed, seed = trained.seed + 1, trained.seed
    again = latents(trained, screen)
    trained.seed = seed
    np.testing.assert_array_equal(again.obsm["X_causalcell"], whole.obsm["X_causalcell"])


def test_replicates_are_copies_of_measured_cells(trained, screen):
    rows = np.arange(0, 300, 7)
    copies = replicate(trained, screen, rows, n_samples=30, seed=1)
    assert copies.shape == (30, len(rows), 15) and np.array_equal(
        copies, replicate(trained, screen, rows, 30, 1)
    )
    assert np.corrcoef(copies.sum(2).mean(0), screen.library_n[rows])[0, 1] > 0.9
    measured = screen.x(rows).mean(0)
    assert np.corrcoef(copies.mean((0, 1)), measured)[0, 1] > 0.8


# ---------------------------------------------------------------- round trips


def test_a_loaded_fit_predicts_the_same(trained, screen, tmp_path):
    loaded = Fit.load(trained.save(tmp_path / "run"))
    for f, g in ((trained, loaded),):
        assert np.array_equal(predict(f, ["A+B"], n_cells=9).X, predict(g, ["A+B"], n_cells=9).X)
        a, b = latents(f, screen), latents(g, screen)
        assert np.array_equal(a.obsm["X_causalcell"], b.obsm["X_causalcell"])


def test_gaussian_end_to_end(gaussian_fit):
    f, screen = gaussian_fit
    result = predict(f, ["A", "control"], n_cells=400)
    assert result.uns["causalcell"]["units"] == "as trained" and (result.X != np.round(result.X)).any()
    measured = screen.x(np.flatnonzero(screen.condition_n == 0)).mean(0)
    assert np.abs(_of(result, "control").X.mean(0) - measured).mean() < 0.45
    assert latents(f, screen).obsm["X_causalcell"].shape == (300, 3)
    with pytest.raises(PredictionError, match="normalised values"):
        predict(f, ["A"], units="counts")


def test_a_user_s_model_predicts(screen):
    f = fit("template", None, screen, n_latents=2, n_hidden=8, epochs=2, progress=False, device="cpu")
    assert predict(f, ["A+C"], n_cells=5).obsm["X_causalcell"].shape == (5, 2)
    assert latents(f, screen).obsm["X_causalcell"].shape == (300, 2)


@pytest.mark.gpu
def test_predict_on_a_gpu(screen, tmp_path):
    settings = {
        "n_latents": 2,
        "n_hidden": 8,
        "epochs": 2,
        "warm_start": 1,
        "gates": "posterior",
        "progress": False,
    }
    f = fit("sparse-shift", None, screen, device="cuda", **settings)
    assert predict(f, ["A+B"], n_cells=7).shape == (7, 15)
    assert predict(f, ["A"], n_cells=7, basal=screen).shape == (7, 15)
    assert latents(f, screen).n_obs == 300
