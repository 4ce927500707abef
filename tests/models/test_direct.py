"""Effects of targets on single genes that no programme carries (simulated counts)."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from pyro_causalcell.data import Screen, Split, held_out_combinations, held_out_perturbations
from pyro_causalcell.errors import PredictionError
from pyro_causalcell.evaluate import iw_nll, to_inference_data
from pyro_causalcell.inference import Fit, fit
from pyro_causalcell.predict import direct_effects, global_draws, predict

SHARED = slice(0, 10)
"""Genes that A and B raise by a programme of theirs; g10 answers to A alone, g11 to B, g12 to C."""
OWN = {"A": 10, "B": 11, "C": 12}
HELD = "A+C"
FAMILIES = {"sparse-shift": {"n_latents": 2}, "weight-variant-scm": {"n_invariant": 1, "n_responsive": 1}}


@pytest.fixture(scope="module")
def screen() -> Screen:
    rng = np.random.default_rng(0)
    names = ["ctrl", *OWN, "A+B", "B+C", HELD, "D"]
    label_n = np.repeat(names, [300, *[100] * 7])
    log_mean_ng = np.full((len(label_n), 40), 1.0) + 0.2 * rng.standard_normal((len(label_n), 1))
    for n, label in enumerate(label_n):
        targets = label.split("+")
        log_mean_ng[n, SHARED] += 0.8 * sum(target in "AB" for target in targets)
        for target in targets:
            if target in OWN:
                log_mean_ng[n, OWN[target]] += 1.0
    obs = pd.DataFrame({"target": label_n}, index=[f"c{n}" for n in range(len(label_n))])
    genes = pd.DataFrame(index=[f"g{g}" for g in range(40)])
    x_ng = rng.poisson(np.exp(log_mean_ng)).astype(np.float32)
    return Screen(ad.AnnData(x_ng, obs, genes), control="ctrl")


def _fitted(screen: Screen, family: str, split: Split | None = None, **settings: object) -> Fit:
    split = split or held_out_combinations(screen, [HELD], seed=0)
    shared = {"n_hidden": 32, "epochs": 60, "warm_start": 20, "batch_size": 64, "lr": 5e-3, "seed": 0}
    return fit(family, None, screen, split=split, progress=False, **shared, **FAMILIES[family], **settings)


def _rise(run: Fit, condition: str, gene: int) -> float:
    """Log fold change of a gene from those that nothing changes."""
    mean_g = np.asarray(predict(run, [condition], n_cells=1000, seed=1).X.mean(0)).ravel()
    return float(np.log(mean_g[gene] / mean_g[20:].mean()))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gene_of_one_target_rises_in_a_double_that_nobody_measured(screen, family):
    run, plain = _fitted(screen, family, direct=True), _fitted(screen, family)
    for target in "AC":
        assert abs(_rise(run, HELD, OWN[target]) - 1.0) < 0.25
    assert abs(_rise(run, HELD, OWN["B"])) < 0.25
    assert abs(_rise(plain, HELD, OWN["C"]) - 1.0) > 0.4
    rows = run.split.test
    gain = (
        iw_nll(plain, screen, rows, n_particles=50)["nll"] - iw_nll(run, screen, rows, n_particles=50)["nll"]
    )
    assert gain.mean() > 0.3
    posterior = to_inference_data(run, screen, np.arange(4), n_samples=20).posterior["direct"]
    assert posterior.dims == ("chain", "draw", "perturbation", "gene")
    found = direct_effects(run).set_index(["perturbation", "gene"])
    drawn = posterior.mean(("chain", "draw")).to_series()
    centred = drawn - drawn.groupby("perturbation").transform("median")
    assert np.abs(centred - found["effect"]).max() < 4 * found["effect_sd"].max() / np.sqrt(20)
    for target, gene in OWN.items():  # a programme may carry a part of it
        of_g = found["effect"][target]
        assert of_g.idxmax() == f"g{gene}" and of_g.max() > 0.5
        assert of_g[20:].std() < 0.15
    with pytest.raises(PredictionError, match="fit with direct=True"):
        direct_effects(plain)


def test_a_target_without_cells_keeps_the_prior_of_direct_effects(screen):
    run = _fitted(screen, "sparse-shift", held_out_perturbations(screen, ["D"], seed=0), direct=True)
    draws_spg = global_draws(run, 300)["direct"].numpy()
    spread_p = draws_spg.std(0).mean(-1)
    scale = float(run.model.direct.scale.detach())
    d = run.screen.targets.index("D")
    assert 0.7 * scale < spread_p[d] < 1.3 * scale
    assert (np.delete(spread_p, d) < 0.8 * spread_p[d]).all()
