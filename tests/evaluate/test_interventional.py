"""Held-out perturbations: what is fitted, what is scored, and that a learned shift is worth nats."""

import anndata as ad
import numpy as np
import pytest

from pyro_causalcell import simulate
from pyro_causalcell.data import Screen
from pyro_causalcell.errors import PredictionError
from pyro_causalcell.evaluate import interventional_nll
from pyro_causalcell.inference import Fit, fit

SETTINGS = {"n_latents": 3, "n_hidden": 16, "epochs": 30, "warm_start": 0, "lr": 1e-2, "batch_size": 64}
SETTINGS |= {"progress": False, "device": "cpu"}
NEW = ["C", "D"]


def _trained(adata: ad.AnnData, **more) -> Fit:
    """A fit that never saw C, which acts as A does, nor D, which does nothing."""
    seen = adata[~adata.obs["target"].isin(NEW)].copy()
    return fit("sparse-shift", None, Screen(seen), **SETTINGS | more)


def _held(adata: ad.AnnData, drop: int = 0) -> Screen:
    """The cells of C and D; the first few of D left out on request."""
    new = np.flatnonzero(adata.obs["target"].isin(NEW))
    new = np.setdiff1d(new, np.flatnonzero(adata.obs["target"] == "D")[:drop])
    return Screen(adata[new].copy(), control=None)


@pytest.fixture(scope="module")
def opened(_tiny: ad.AnnData) -> Fit:
    return _trained(_tiny, gates="open")


def test_clean_halves_are_disjoint_and_of_each_condition(opened: Fit, tiny_adata: ad.AnnData) -> None:
    held = _held(tiny_adata)
    before = interventional_nll(opened, held, n_particles=20)
    assert before["condition"].to_series().value_counts().to_dict() == {"C": 30, "D": 30}
    # A cell that is scored has no say in the shift: other cells' values stay what they were.
    cell = str(before["cell"][0].item())
    tiny_adata.X = tiny_adata.X.toarray()
    row = tiny_adata.obs_names.get_loc(cell)
    tiny_adata.X[row] = tiny_adata.X[row, ::-1] * 7 + 3
    after = interventional_nll(opened, _held(tiny_adata), n_particles=20)
    assert after["cell"].equals(before["cell"])
    changed = ~np.isclose(after["nll"], before["nll"], rtol=1e-4)
    assert before["cell"].values[changed].tolist() == [cell]


def test_the_paper_scores_the_cells_that_it_fits(opened: Fit, tiny_adata: ad.AnnData) -> None:
    held = _held(tiny_adata)
    before = interventional_nll(opened, held, protocol="paper", n_particles=20)
    assert sorted(before["cell"].values) == sorted(held.adata.obs_names)
    cell = str(before["cell"][0].item())
    tiny_adata.X = tiny_adata.X.toarray()
    row = tiny_adata.obs_names.get_loc(cell)
    tiny_adata.X[row] = tiny_adata.X[row, ::-1] * 7 + 3
    after = interventional_nll(opened, _held(tiny_adata), protocol="paper", n_particles=20)
    same = before["condition"] == before["condition"][0]
    assert not np.isclose(after["nll"], before["nll"], rtol=1e-6)[same].any()
    np.testing.assert_allclose(after["nll"][~same], before["nll"][~same], rtol=1e-4)


def test_conditions_count_alike_and_scored_cells_can_be_fewer(opened: Fit, tiny_adata: ad.AnnData) -> None:
    held = _held(tiny_adata, drop=40)
    result = interventional_nll(opened, held, protocol="paper", n_particles=5)
    means = result["nll"].groupby("condition").mean()
    assert result["condition"].to_series().value_counts().to_dict() == {"C": 60, "D": 20}
    assert result.attrs["interventional_nll"] == pytest.approx(float(means.mean()))
    assert result.attrs["interventional_nll"] != pytest.approx(float(result["nll"].mean()), abs=1e-3)
    assert result.attrs["protocol"] == "paper" and result["latent"].shape == (80, 3)
    few = interventional_nll(opened, held, n_particles=5, max_scored=7)
    assert few["condition"].to_series().value_counts().to_dict() == {"C": 7, "D": 7}


@pytest.fixture(scope="module")
def simulated() -> ad.AnnData:
    """600 cells x 40 genes; two of ten interventions are held out, and both move the first latent far."""
    sizes = {"n_latents": 3, "n_genes": 40, "n_interventions": 10, "cells_per_intervention": 60}
    return simulate.sparse_shift(preset="clean", effect=4.0, sparsity=0.4, **sizes)


@pytest.mark.parametrize("gates", ["closed", "sampled", "open", "posterior"])
def test_a_learned_shift_is_worth_nats(simulated: ad.AnnData, gates: str) -> None:
    trained, held = (
        Screen(simulated[(simulated.obs["split"] == part).to_numpy()].copy(), control=None)
        for part in ("train", "heldout")
    )
    f = fit("sparse-shift", None, trained, gates=gates, **SETTINGS)
    paper = interventional_nll(f, held, protocol="paper", n_particles=50)
    assert np.isfinite(paper["nll"]).all() and paper.sizes["cell"] == 120
    adapted, still = (
        interventional_nll(f, held, n_particles=100, adapt=adapt).attrs["interventional_nll"]
        for adapt in (True, False)
    )
    assert adapted < still - 0.3


def test_a_model_without_one_shifted_latent_is_refused(tiny_adata: ad.AnnData) -> None:
    blocks = {"n_invariant": 2, "n_responsive": 2, "n_hidden": 8, "epochs": 1, "warm_start": 0}
    fitted = fit("weight-variant-scm", None, Screen(tiny_adata), **blocks, progress=False, device="cpu")
    with pytest.raises(PredictionError, match="WeightVariantSCM.*Use iw_nll"):
        interventional_nll(fitted, _held(tiny_adata), n_particles=5)
