"""Epistasis that is learnt from some doubles and expected in others (simulated counts)."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from pyro_causalcell.data import Screen, held_out_combinations
from pyro_causalcell.evaluate import to_inference_data
from pyro_causalcell.inference import Fit, fit
from pyro_causalcell.predict import graph, predict

UP, OTHER = slice(0, 10), slice(10, 20)
"""Genes that A1, A2 and A3 raise, unless Q is there too; genes that B raises."""
CONDITIONS = ["A1", "A2", "A3", "B", "Q", "A1+Q", "A2+Q", "A1+B", "A3+Q", "A3+B"]
HELD = ["A3+Q", "A3+B"]


@pytest.fixture(scope="module")
def screen() -> Screen:
    rng = np.random.default_rng(0)
    label_n = np.repeat(["ctrl", *CONDITIONS], [300, *[100] * len(CONDITIONS)])
    log_mean_ng = np.full((len(label_n), 40), 1.0) + 0.2 * rng.standard_normal((len(label_n), 1))
    for n, label in enumerate(label_n):
        targets = label.split("+")
        log_mean_ng[n, UP] += 1.2 * (label.startswith("A") and "Q" not in targets)
        log_mean_ng[n, OTHER] += 1.2 * ("B" in targets)
        log_mean_ng[n, 20:30] -= 0.6 * ("Q" in targets)
    return _screen(rng, label_n, log_mean_ng)


def _screen(rng: np.random.Generator, label_n: np.ndarray, log_mean_ng: np.ndarray) -> Screen:
    obs = pd.DataFrame({"target": label_n}, index=[f"c{n}" for n in range(len(label_n))])
    genes = pd.DataFrame(index=[f"g{g}" for g in range(log_mean_ng.shape[1])])
    return Screen(ad.AnnData(rng.poisson(np.exp(log_mean_ng)).astype(np.float32), obs, genes), control="ctrl")


FAMILIES = {"sparse-shift": {"n_latents": 4}, "weight-variant-scm": {"n_invariant": 1, "n_responsive": 3}}


def _fitted(family: str, screen: Screen, held: list[str], **settings: object) -> Fit:
    split = held_out_combinations(screen, held, seed=0)
    shared = {"n_hidden": 32, "epochs": 80, "warm_start": 30, "batch_size": 64, "lr": 5e-3, "seed": 0}
    own = FAMILIES[family]
    return fit(family, None, screen, split=split, progress=False, **shared, **own, **settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_masks_in_one_double_is_expected_to_mask_in_another(screen, family):
    run, plain = _fitted(family, screen, HELD, epistasis=True), _fitted(family, screen, HELD)
    measured = {name: _rise(screen.adata[screen.adata.obs["target"] == name]) for name in [*HELD, "A3"]}
    assert measured["A3+Q"] < 0.1 < 1.0 < measured["A3+B"]
    missed = {
        label: {name: abs(_rise(predict(of, [name], n_cells=500, seed=1)) - measured[name]) for name in HELD}
        for label, of in (("epistasis", run), ("plain", plain))
    }
    assert missed["epistasis"]["A3+Q"] < 0.5 * missed["plain"]["A3+Q"]
    assert missed["epistasis"]["A3+B"] < 0.25
    edges = graph(run).set_index(["perturbation", "programme"])
    raised = (edges["probability"] * edges["effect"].abs()).loc["A3"].idxmax()
    share = edges["masks"].xs(raised, level="programme")
    assert share["Q"] > 0.6 and share[["A1", "A2", "A3", "B"]].max() < 0.2
    assert "masks" not in graph(plain) and not graph(plain).attrs
    posterior = to_inference_data(run, screen, np.arange(4), n_samples=2).posterior
    last = {"sparse-shift": "programme", "weight-variant-scm": "responsive"}[family]
    assert posterior["epistasis"].dims == ("chain", "draw", "perturbation", last)
    assert float(posterior["epistasis"].sel({"perturbation": "Q", last: raised}).mean()) > 0.6


@pytest.mark.parametrize("family", FAMILIES)
def test_what_saturates_in_one_programme_is_expected_to_in_another(family):
    """Two targets of a letter raise its genes no further than one; C1+C2 is not measured."""
    letters = {"A": UP, "B": OTHER, "C": slice(20, 30)}
    singles = ["A1", "A2", "B1", "B2", "C1", "C2"]
    label_n = np.repeat(["ctrl", *singles, "A1+A2", "B1+B2", "A1+B1", "A2+C1", "C1+C2"], [300, *[100] * 11])
    rng = np.random.default_rng(1)
    log_mean_ng = np.full((len(label_n), 40), 1.0) + 0.2 * rng.standard_normal((len(label_n), 1))
    for n, label in enumerate(label_n):
        for letter, genes in letters.items():
            log_mean_ng[n, genes] += 1.2 * (letter in label)
    screen = _screen(rng, label_n, log_mean_ng)
    run = _fitted(family, screen, ["C1+C2"], epistasis=True)
    assert graph(run).attrs["saturation"] > 0.3
    rise = _rises(run, letters["C"])
    assert rise["C1+C2"] < rise["C1"] + 0.35
    if family == "sparse-shift":  # the decoder alone goes on as before where it has seen nothing
        plain = _rises(_fitted(family, screen, ["C1+C2"]), letters["C"])
        assert rise["C1+C2"] - rise["C1"] < 0.75 * (plain["C1+C2"] - plain["C1"])


def _rises(run: Fit, genes: slice) -> dict[str, float]:
    return {name: _rise(predict(run, [name], n_cells=500, seed=1), genes) for name in ("C1", "C1+C2")}


def _rise(cells: ad.AnnData, genes: slice = UP) -> float:
    """Log fold change of genes, those that A raises, from those that nothing changes."""
    mean_g = np.asarray(cells.X.mean(0)).ravel()
    return float(np.log(mean_g[genes]).mean() - np.log(mean_g[30:]).mean())
