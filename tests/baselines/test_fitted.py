from dataclasses import replace

import numpy as np
import pytest

from pyro_causalcell.baselines import (
    ModelPredictor,
    Oracle,
    TimeCellPredictor,
    TimeModelPredictor,
    condition_means,
    log_cp10k,
    training_means,
)
from pyro_causalcell.data import Screen, held_out_combinations, held_out_times
from pyro_causalcell.errors import DataError, PredictionError
from pyro_causalcell.inference import fit
from pyro_causalcell.predict import predict
from pyro_causalcell.simulate import expected_counts, sparse_shift, temporal_scm


@pytest.fixture(scope="module")
def trained(_tiny):
    screen = Screen(_tiny)
    settings = {"epochs": 3, "warm_start": 0, "n_latents": 3, "n_hidden": 16, "device": "cpu"}
    split = held_out_combinations(screen, ["A+B"])
    return fit("sparse-shift", None, screen, split=split, progress=False, **settings)


def test_model_predicts_the_mean_of_its_cells(trained):
    model = ModelPredictor(trained, "mine", n_cells=40, seed=2)
    drawn = predict(trained, ["A+B"], n_cells=40, seed=2).X
    np.testing.assert_allclose(model.predict(["B+A"])[0], log_cp10k(drawn, drawn.sum(1)).mean(0))
    (cells,) = model.cells(["A+B"], n_cells=40, seed=2)
    np.testing.assert_allclose(cells.mean(0), model.predict(["A+B"])[0])


def test_model_starts_from_control_cells(trained, _tiny):
    control = Screen.from_spec(
        trained.screen, _tiny[(_tiny.obs["target"] == "non-targeting").to_numpy()].copy()
    )
    model = ModelPredictor(trained, basal=control, n_cells=40, seed=2)
    drawn = predict(trained, ["A+B"], n_cells=40, basal=control, seed=2).X
    np.testing.assert_allclose(model.predict(["A+B"])[0], log_cp10k(drawn, drawn.sum(1)).mean(0))
    assert not np.allclose(
        model.predict(["A+B"]), ModelPredictor(trained, n_cells=40, seed=2).predict(["A+B"])
    )


def test_model_knows_which_cells_it_has_seen(trained):
    model = ModelPredictor(trained)
    split = trained.split
    np.testing.assert_array_equal(model.seen_rows, np.sort(np.r_[split.train, split.validation]))
    assert len(split.validation) and not np.isin(split.test, model.seen_rows).any()


@pytest.fixture(scope="module")
def simulation():
    """Simulated counts with known truth."""
    return sparse_shift(
        "clean", n_latents=3, n_genes=40, n_interventions=4, cells_per_intervention=300, n_control_cells=100
    )


def test_oracle_is_as_close_as_noise_allows(simulation):
    screen = Screen(simulation, "target", "control")
    oracle = Oracle(screen, expected_counts(simulation), seed=1)
    names = screen.conditions[1:]
    truth = condition_means(screen, np.arange(screen.n_cells), names)
    error_c = np.abs(oracle.predict(names) - truth).mean(1)
    shared = np.abs(training_means(screen, np.arange(screen.n_cells)).perturbed_g - truth).mean(1)
    assert (error_c < 0.05).all() and (error_c < 0.2 * shared).all()
    cells = oracle.cells(names, n_cells=50)
    assert [x_ng.shape for x_ng in cells] == [(50, 40)] * 4


def test_negative_binomial_oracle_has_more_zeros(simulation):
    screen = Screen(simulation, "target", "control")
    names, expected_ng = screen.conditions[1:2], expected_counts(simulation)
    poisson, spread = (
        (Oracle(screen, expected_ng, inverse_dispersion=theta).cells(names, 300)[0] == 0).mean()
        for theta in (None, 0.5)
    )
    assert spread > poisson + 0.1


def test_oracle_needs_counts_of_the_same_cells(simulation):
    screen = Screen(simulation, "target", "control")
    with pytest.raises(DataError, match=r"shape \(1300, 40\); found counts and shape \(5, 40\)"):
        Oracle(screen, np.ones((5, 40)))
    with pytest.raises(DataError, match="no cells of"):
        Oracle(screen, expected_counts(simulation)).predict([f"{screen.targets[0]}+{screen.targets[1]}"])


@pytest.fixture(scope="module")
def evolved():
    """A temporal fit of simulated counts, few genes and one epoch."""
    cells = temporal_scm(
        n_genes=40,
        n_invariant=1,
        n_responsive=2,
        n_perturbations=2,
        n_combinations=0,
        times=(1, 2, 4),
        cells_per_snapshot=20,
        truth_draws=5,
        likelihood="nb",
    )
    screen = Screen(cells, control="control", time="time", allow_empty=True)
    settings = {"n_invariant": 1, "n_responsive": 2, "n_hidden": 8, "epochs": 2, "warm_start": 1}
    split = held_out_times(screen, 4.0)
    return fit("temporal-scm", None, screen, split=split, progress=False, compile=False, **settings), screen


def test_temporal_model_predicts_the_mean_of_its_cells_at_each_time(evolved):
    trained, screen = evolved
    model = TimeModelPredictor(trained, "mine", n_cells=30, seed=2)
    assert isinstance(model, TimeCellPredictor)
    means = model.predict(["P02", "control"], [2.0, 3.5, 4.0])
    assert means.shape == (2, 3, 40)
    drawn = predict(trained, ["P02"], 30, times=[3.5], seed=2).X
    np.testing.assert_allclose(means[0, 1], log_cp10k(drawn, drawn.sum(1)).mean(0))
    cells = model.cells(["P02"], [2.0, 3.5], n_cells=30, seed=2)
    np.testing.assert_allclose(cells[0][1].mean(0), means[0, 1])
    assert not np.isin(np.flatnonzero(screen.time_n == 4), model.seen_rows).any()


def test_predicted_cells_have_the_libraries_around_their_time(evolved):
    trained, screen = evolved
    assert trained.cells.times == [1.0, 2.0]
    rows = trained.split.train[screen.time_n[trained.split.train] == 2]
    np.testing.assert_allclose(trained.cells.library_t[1][50], np.median(screen.library_n[rows]))
    told = replace(trained, cells=replace(trained.cells, library_t=[[10.0] * 101, [1000.0] * 101]))
    drawn = predict(told, ["control"], 2, times=[1.0, 1.5, 2.0]).obs["library"].to_numpy()
    np.testing.assert_allclose(drawn[[0, 1, 4, 5]], [10, 10, 1000, 1000], rtol=1e-6)
    np.testing.assert_allclose(drawn[2:4], 100, rtol=0.002)


def test_temporal_model_starts_from_the_last_snapshot_before(evolved):
    trained, screen = evolved
    control = screen.adata[(screen.condition_n == 0) & (screen.time_n < 4)].copy()
    basal = Screen.from_spec(trained.screen, control)
    model = TimeModelPredictor(trained, n_cells=30, seed=2, basal=basal)
    last = Screen.from_spec(trained.screen, control[control.obs["time"] == 2].copy())
    drawn = predict(trained, ["P01"], 30, basal=last, times=[4.0], seed=2).X
    np.testing.assert_allclose(model.predict(["P01"], [4.0])[0, 0], log_cp10k(drawn, drawn.sum(1)).mean(0))
    with pytest.raises(PredictionError, match="found none before 1"):
        model.predict(["P01"], [0.5])


def test_temporal_predictions_need_a_temporal_model(trained, evolved):
    with pytest.raises(PredictionError, match="or take ModelPredictor"):
        TimeModelPredictor(trained)
    timeless = Screen(evolved[1].adata, control="control", allow_empty=True)
    with pytest.raises(PredictionError, match="basal cells need times"):
        TimeModelPredictor(evolved[0], basal=timeless)
