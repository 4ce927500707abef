"""Targets without training cells, in every family that takes embeddings (simulated counts)."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from pyro import poutine

from pyro_causalcell.data import Minibatches, Screen, held_out_perturbations
from pyro_causalcell.errors import DataError, PairError
from pyro_causalcell.inference import Fit, build_pair, check_pair, elbo_terms, fit
from pyro_causalcell.predict import effects, predict

TARGETS = [f"T{i}" for i in range(10)]
UP = TARGETS[:5]
"""These raise genes 0 to 4; the others raise genes 5 to 9."""
FAMILIES = {
    "sparse-shift": ("sparse-shift", {"n_latents": 3}),
    "ivae": ("sparse-shift", {"n_latents": 3, "gates": "open"}),
    "sams-vae": ("sams-vae", {"n_latents": 3}),
    "sams-vae, mean-field": ("sams-vae", {"n_latents": 3, "correlated": False}),
    "cpa-vae": ("sams-vae", {"n_latents": 3, "mask": "none"}),
    "weight-variant-scm": ("weight-variant-scm", {"n_invariant": 1, "n_responsive": 2}),
    "weight-variant-scm, low rank": ("weight-variant-scm", {"n_invariant": 1, "n_responsive": 2, "rank": 2}),
    "weight-variant-scm, dense": (
        "weight-variant-scm",
        {"n_invariant": 1, "n_responsive": 2, "gates": "open", "edges": "open"},
    ),
}


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    rng = np.random.default_rng(1)
    group = np.array([[1.0, 0.0] if t in UP else [0.0, 1.0] for t in [*TARGETS, "NEW"]])
    return pd.DataFrame(group + 0.1 * rng.standard_normal(group.shape), [*TARGETS, "NEW"], ["up", "down"])


@pytest.fixture(scope="module")
def adata() -> ad.AnnData:
    rng = np.random.default_rng(0)
    label_n = np.repeat(["ctrl", *TARGETS], [80, *[40] * 10])
    log_mean_ng = np.full((len(label_n), 20), 1.5)
    for n, label in enumerate(label_n):
        if label != "ctrl":
            log_mean_ng[n, : 5 if label in UP else 10] += 1.0
            log_mean_ng[n, : 0 if label in UP else 5] -= 1.0
    x_ng = rng.poisson(np.exp(log_mean_ng + 0.2 * rng.standard_normal((len(label_n), 1))))
    obs = pd.DataFrame({"target": label_n}, index=[f"c{n}" for n in range(len(label_n))])
    return ad.AnnData(x_ng.astype(np.float32), obs, pd.DataFrame(index=[f"g{g}" for g in range(20)]))


@pytest.fixture(scope="module")
def screen(adata, table) -> Screen:
    return Screen(adata, control="ctrl", embeddings=table, unseen="NEW")


@pytest.fixture(params=FAMILIES)
def family(request) -> tuple[str, dict]:
    return FAMILIES[request.param]


def _pair(screen, family, **settings):
    torch.manual_seed(0)
    name, own = family
    pair = build_pair(name, None, screen.dims(), {"n_hidden": 8} | own | settings)
    for side in (pair.model, pair.guide):
        side.embedding_pe.normal_()
    asked = "control" in getattr(pair.guide, "needs", set())
    batches = Minibatches(screen, np.arange(0, screen.n_cells, 8), 60, anchors="random" if asked else None)
    return pair, next(iter(batches))


def test_model_and_guide_fit_together(screen, family):
    pair, batch = _pair(screen, family)
    check_pair(pair.model, pair.guide, batch)


def test_an_unseen_target_adds_nothing_to_the_bound(screen, family):
    """Its posterior is its prior: the terms of gates and changes do not change when its parameters do."""
    pair, batch = _pair(screen, family)
    pair.guide.embedding_pe.copy_(pair.model.embedding_pe)
    new = screen.targets.index("NEW")

    def terms():
        torch.manual_seed(3)
        return {n: float(t.detach()) for n, t in elbo_terms(pair.model, pair.guide, batch).items()}

    before = terms()
    with torch.no_grad():
        for name, value in pair.guide.named_parameters():
            if len(value) == screen.dims().n_targets and value.dim() > 1 and "encoder" not in name:
                value[new] += 1.0
    assert terms() == before


def test_changes_of_an_unseen_target_have_their_prior(screen, family):
    pair, batch = _pair(screen, family)
    pair.guide.embedding_pe.copy_(pair.model.embedding_pe)
    new = screen.targets.index("NEW")
    guided = poutine.trace(pair.guide).get_trace(batch)
    model = poutine.trace(poutine.replay(pair.model, trace=guided)).get_trace(batch)
    asked = [name for name in ("shift", "log_scale", "weight", "loading") if name in guided.nodes]
    assert asked
    for name in asked:
        posterior, prior = (trace.nodes[name]["fn"].base_dist for trace in (guided, model))
        for part in ("loc", "scale"):
            torch.testing.assert_close(getattr(posterior, part)[new], getattr(prior, part)[new])


def test_without_embeddings_the_sites_are_as_they_were(adata, family):
    name, own = family
    pair = build_pair(name, None, Screen(adata, control="ctrl").dims(), {"n_hidden": 8} | own)
    names = {*pair.model.state_dict(), *pair.guide.state_dict()}
    assert not any("map" in n or "curve" in n or "embedding" in n for n in names)


@pytest.fixture(scope="module")
def fitted(screen) -> Fit:
    split = held_out_perturbations(screen, ["T0", "T5"], seed=0)
    return fit(
        "sparse-shift",
        None,
        screen,
        split=split,
        n_latents=3,
        n_hidden=32,
        epochs=60,
        batch_size=64,
        seed=0,
        progress=False,
    )


def test_unseen_targets_do_what_their_neighbours_do(fitted):
    asked = ["T0", "T5", "NEW", "T1", "T6"]
    found = effects(fitted, asked, n_samples=60, n_cells=20)
    raised_c = found.gene_effect[:, :5].mean("gene") - found.gene_effect[:, 5:10].mean("gene")
    for name, sign in zip(asked, [1, -1, -1, 1, -1], strict=True):
        assert sign * float(raised_c.sel(condition=name)) > 0.7, name
    width_c = (found.gene_high - found.gene_low).mean("gene")
    assert float(width_c[:3].min()) > 1.3 * float(width_c[3:].max())


def test_combinations_with_an_unseen_target_and_a_saved_fit(fitted, tmp_path):
    again = Fit.load(fitted.save(tmp_path / "run"))
    names = ["NEW", "T1+NEW"]
    first, second = (predict(f, names, n_cells=30, seed=1) for f in (fitted, again))
    np.testing.assert_array_equal(first.X, second.X)
    assert again.dims.n_embedding == 2 and set(first.obs["condition"]) == {"NEW", "NEW+T1"}


def test_a_table_without_information_says_so(adata, table):
    rng = np.random.default_rng(0)
    noise = pd.DataFrame(rng.standard_normal((11, 2)), table.index, table.columns)
    screen = Screen(adata, control="ctrl", embeddings=noise)
    split = held_out_perturbations(screen, ["T0", "T5"], seed=0)
    blind = fit(
        "sparse-shift", None, screen, split=split, n_latents=3, n_hidden=32, epochs=60, batch_size=64,
        seed=0, progress=False,
    )  # fmt: skip
    found = effects(blind, ["T0", "T5"], n_samples=60, n_cells=20)
    inside = (found.gene_low < 0) & (found.gene_high > 0)
    assert float(inside.mean()) > 0.8


def test_mistakes_are_told(adata, table, screen):
    with pytest.raises(DataError, match=r"embeddings= for the unseen targets NEW"):
        Screen(adata, control="ctrl", unseen=["NEW"])
    with pytest.raises(DataError, match=r"none for 1: NEW.*Add those rows"):
        Screen(adata, control="ctrl", embeddings=table.drop("NEW"), unseen=["NEW"])
    with pytest.raises(DataError, match="single targets in unseen=, found NEW"):
        Screen(adata, control="ctrl", embeddings=table, unseen=["NEW+T1"])
    with pytest.raises(DataError, match="several for T1"):
        Screen(adata, control="ctrl", embeddings=pd.concat([table, table.loc[["T1"]]]))
    with pytest.raises(DataError, match="columns of numbers as embeddings, found word"):
        Screen(adata, control="ctrl", embeddings=table.assign(word="x"))
    with pytest.raises(PairError, match=r"cannot predict the unseen targets \['NEW'\]"):
        fit("conditional-vae", None, screen, epochs=1, progress=False)
    with pytest.raises(PairError, match="embeddings describe targets, not interactions"):
        fit("sparse-shift", None, screen, interactions=((0, 1),), epochs=1, progress=False)


def test_held_out_targets_without_embeddings_are_warned_of(adata):
    screen = Screen(adata, control="ctrl")
    split = held_out_perturbations(screen, ["T0"], seed=0)
    plain = fit("sparse-shift", None, screen, split=split, n_latents=2, n_hidden=4, epochs=1, progress=False)
    with pytest.warns(UserWarning, match="no training cell carries T0, .* its prior"):
        predict(plain, ["T0+T1"], n_cells=2)
    with pytest.warns(UserWarning, match="no training cell carries T0"):
        effects(plain, ["T0"], n_samples=1, n_cells=2)
    predict(plain, ["T1"], n_cells=2)  # without a warning, which would be an error here
    with pytest.raises(DataError, match="To predict one that no cell carries, fit with embeddings"):
        predict(plain, ["NEW"])
