"""Effects and their intervals."""

import numpy as np
import pytest
import torch

from pyro_causalcell.errors import DataError, PredictionError
from pyro_causalcell.inference import fit
from pyro_causalcell.predict import effects

QUICK = {"n_samples": 40, "n_cells": 40}


def _set(guide, name, index, value):
    values = getattr(guide, name).detach().clone()
    values[index] = value
    setattr(guide, name, values)


def test_dimensions_and_names(trained):
    result = effects(trained, **QUICK)
    assert result["condition"].values.tolist() == ["A", "A+B", "B", "C"]
    assert result["gene_effect"].dims == ("condition", "gene") and result.sizes["gene"] == 15
    assert result["programme"].values.tolist() == ["programme_1", "programme_2", "programme_3"]
    assert result.attrs["gene_units"] == "log2 fold change" and result.attrs["interval"] == 0.9


def test_programme_effects_are_the_shifts(trained):
    result = effects(trained, ["A", "B", "C", "B+A", "A+C"], **QUICK)
    expected = [[2, 0, 0], [0, -3, 0], [0, 0, 0], [2, -3, 1.5], [2, 0, 0]]
    np.testing.assert_allclose(result["programme_effect"], expected, atol=0.05)
    assert result["condition"].values.tolist() == ["A", "B", "C", "A+B", "A+C"]


def test_closed_gates_have_no_effect_on_any_gene(trained):
    silent = effects(trained, ["C", "control"], **QUICK)
    for name in ("gene_effect", "gene_low", "gene_high", "programme_effect"):
        np.testing.assert_allclose(silent[name], 0.0, atol=1e-5)
    assert float(np.abs(effects(trained, ["A"], **QUICK)["gene_effect"]).max()) > 0.1


def test_intervals_cover_what_the_posterior_says(trained):
    trained.guide.shift_scale = torch.full((4, 3), 0.3)
    wide = effects(trained, ["A"], n_samples=150, n_cells=2, interval=0.9).sel(
        condition="A", programme="programme_1"
    )
    assert float(wide["programme_low"]) == pytest.approx(2 - 1.645 * 0.3, abs=0.15)
    assert float(wide["programme_high"]) == pytest.approx(2 + 1.645 * 0.3, abs=0.15)
    narrow = effects(trained, ["A"], n_samples=150, n_cells=2, interval=0.5).sel(condition="A")
    full = effects(trained, ["A"], n_samples=150, n_cells=2, interval=0.9).sel(condition="A")
    assert bool(
        (narrow["gene_high"] - narrow["gene_low"] <= full["gene_high"] - full["gene_low"] + 1e-6).all()
    )
    assert bool(
        (full["gene_low"] <= full["gene_effect"]).all() and (full["gene_effect"] <= full["gene_high"]).all()
    )


def test_an_uncertain_gate_widens_its_interval_to_zero(trained):
    _set(trained.guide, "gate_logit", (0, 0), 0.0)
    result = effects(trained, ["A"], n_samples=100, n_cells=4).sel(condition="A", programme="programme_1")
    assert abs(float(result["programme_low"])) < 1e-5 and float(result["programme_high"]) > 1.9
    assert 0.6 < float(result["programme_effect"]) < 1.4


def test_gene_effects_equal_the_change_of_predicted_means(trained):
    from pyro_causalcell.predict import predict

    result = effects(trained, ["A"], n_samples=50, n_cells=200).sel(condition="A")["gene_effect"].values
    cells = predict(trained, ["control", "A"], n_cells=6000, library=1000.0)
    means = [cells[cells.obs["condition"] == c].X.mean(0) for c in ("control", "A")]
    np.testing.assert_allclose(np.log2(means[1] / means[0]), result, atol=0.15)


def test_seeds(trained):
    first, again, other = (effects(trained, ["A"], seed=s, n_samples=5, n_cells=5) for s in (1, 1, 2))
    assert first.equals(again) and not first.equals(other)


def test_differences_for_normalised_values(gaussian_fit):
    f, screen = gaussian_fit
    result = effects(f, ["A"], **QUICK)
    assert result.attrs["gene_units"] == "difference of normalised values"
    assert np.isfinite(result["gene_effect"]).all()


@pytest.mark.parametrize("settings", [{"n_samples": 0}, {"n_cells": 0}, {"interval": 1.0}, {"interval": 90}])
def test_settings_out_of_range_are_refused(trained, settings):
    with pytest.raises(PredictionError, match="at least 1, and interval between 0 and 1"):
        effects(trained, ["A"], **settings)


def test_unknown_targets_are_refused(trained):
    with pytest.raises(DataError, match="'Q'"):
        effects(trained, ["Q"])


def test_closed_members_have_effects_of_zero(screen):
    f = fit(
        "sparse-shift",
        None,
        screen,
        gates="closed",
        n_latents=2,
        n_hidden=4,
        epochs=1,
        progress=False,
        device="cpu",
    )
    np.testing.assert_allclose(effects(f, ["A"], **QUICK)["gene_effect"], 0.0, atol=1e-5)
