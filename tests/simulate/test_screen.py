import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pyro_causalcell.data import Screen, interaction_kind
from pyro_causalcell.datasets import norman2019_subset
from pyro_causalcell.errors import DataError
from pyro_causalcell.simulate import combination_screen, screen_cells

KINDS = ["additive", "dominant", "saturated", "suppressed"]
SMALL = {
    "n_targets": 14,
    "n_doubles": 8,
    "n_genes": 100,
    "cells_per_condition": 20,
    "n_control_cells": 60,
    "truth_draws": 100,
}


@pytest.fixture(scope="module")
def small():
    return combination_screen(**SMALL)


@pytest.fixture(scope="module")
def norman_sized():
    """All targets and doubles of the default, fewer genes and next to no cells."""
    return combination_screen(n_genes=2000, cells_per_condition=1, n_control_cells=1, truth_draws=300)


def truth(adata):
    return adata.uns["simulation"]


def effects(adata):
    """Effects of each double and its parts in log1p CP10k, without the targets' own genes; and its kind."""
    record = truth(adata)
    expression = pd.DataFrame(
        np.log1p(1e4 * record["share_cg"].astype(float)), record["conditions"], adata.var_names
    )
    effect = expression - expression.loc["control"]
    for name, kind in zip(record["conditions"], record["kind_c"], strict=True):
        if kind in KINDS:
            scored = ~adata.var_names.isin(name.split("+"))
            yield kind, *(effect.loc[part].to_numpy()[scored] for part in (*name.split("+"), name))


def test_layout(small):
    assert small.shape == (60 + 22 * 20, 100)
    assert isinstance(small.X, sp.csr_matrix) and np.issubdtype(small.X.dtype, np.integer)
    assert truth(small)["simulated"]
    cells = small.obs["kind"].value_counts()
    assert cells.to_dict() == {"control": 60, "single": 280, **dict.fromkeys(KINDS, 40)}
    assert set(truth(small)["targets"]) <= set(small.var_names)
    screen = Screen(small, "target", "control", allow_empty=True, embeddings=small.uns["target_embeddings"])
    assert len(screen.targets) == 14 and len(screen.conditions) == 23 and screen.is_counts


def test_default_sizes_are_those_of_norman(norman_sized):
    kinds = pd.Series(truth(norman_sized)["kind_c"]).value_counts().to_dict()
    assert kinds == {
        "single": 105,
        "control": 1,
        "additive": 33,
        "dominant": 33,
        "suppressed": 33,
        "saturated": 32,
    }


def test_each_double_is_what_it_says(norman_sized):
    found = [(kind, interaction_kind(*parts)) for kind, *parts in effects(norman_sized)]
    assert len(found) == 131
    assert sum(kind == seen for kind, seen in found) >= 129
    assert {kind for kind, seen in found if kind == seen} == set(KINDS)


def test_residuals_of_each_kind(norman_sized):
    """The same without thresholds in between: what the residual is, on average."""
    share = {kind: [] for kind in KINDS}
    for kind, first, second, double in effects(norman_sized):
        sizes = np.linalg.norm([first, second], axis=1)
        residual = double - first - second
        if kind == "additive":
            share[kind].append(np.linalg.norm(residual) / sizes.sum())
        elif kind == "saturated":  # longer than either, shorter than both together
            share[kind].append(np.linalg.norm(double) / np.linalg.norm(first + second))
            assert np.linalg.norm(double) > 0.95 * sizes.max()
        elif kind == "suppressed":
            share[kind].append(np.linalg.norm(double) / sizes.max())
        else:  # one effect is gone, the other is left
            left = [np.linalg.norm(double - effect) for effect in (first, second)]
            share[kind].append(min(left) / sizes[1 - np.argmin(left)])
    mean = {kind: np.mean(values) for kind, values in share.items()}
    assert mean["additive"] < 0.05
    assert 0.5 < mean["saturated"] < 0.8
    assert mean["suppressed"] < 0.45
    assert mean["dominant"] < 0.35


def test_kinds_follow_from_roles_and_modules(norman_sized):
    record = truth(norman_sized)
    index = {name: p for p, name in enumerate(record["targets"])}
    for name, kind in zip(record["conditions"], record["kind_c"], strict=True):
        if kind not in KINDS:
            continue
        first, second = (index[target] for target in name.split("+"))
        same = record["module_p"][first] == record["module_p"][second]
        assert same == (kind != "additive")
        cuts = record["cut_pk"][[first, second]].any()
        if kind != "additive":
            assert cuts == (kind in ("dominant", "suppressed"))


def test_expected_shares_are_the_means_of_the_cells():
    adata = combination_screen(
        **SMALL | {"cells_per_condition": 1500, "n_control_cells": 3000, "n_doubles": 4}
    )
    for c, name in enumerate(truth(adata)["conditions"]):
        rows = np.flatnonzero(adata.obs["target"] == name)
        observed = np.asarray(adata.X[rows].sum(0)).ravel() / adata.obs["library_true"].iloc[rows].sum()
        expected = truth(adata)["share_cg"][c]
        assert np.linalg.norm(observed - expected) < 0.1 * np.linalg.norm(expected)
    np.testing.assert_allclose(truth(adata)["share_cg"].sum(1), 1, rtol=1e-5)


def test_new_cells_of_a_screen_come_from_the_same_process():
    adata = combination_screen(**SMALL | {"cells_per_condition": 400, "n_control_cells": 400})
    rng = np.random.default_rng(0)
    for name in rng.choice(truth(adata)["conditions"], 4, replace=False):
        old = adata.X[(adata.obs["target"] == name).to_numpy()].toarray().astype(float)
        new = screen_cells(adata, name, 400, seed=1).astype(float)
        old, new = (np.log1p(1e4 * x / x.sum(1, keepdims=True)) for x in (old, new))
        z_g = (new.mean(0) - old.mean(0)) / np.sqrt((new.var(0) + old.var(0) + 1e-9) / 400)
        assert 0.7 < z_g.std() < 1.3 and not np.array_equal(old, new)
    pair = "+".join(sorted(truth(adata)["targets"][[0, 5]]))
    assert screen_cells(adata, pair, 3).shape == (3, 100)  # whether it was measured or not
    np.testing.assert_array_equal(screen_cells(adata, pair, 3, 7), screen_cells(adata, pair, 3, 7))
    with pytest.raises(DataError, match=r"targets of the simulation, found \['nobody'\]"):
        screen_cells(adata, "nobody", 3)


def test_a_cut_shows_in_single_cells():
    """Where a target cuts the edge, the regulator no longer moves the programme it drives."""
    adata = combination_screen(**SMALL | {"cells_per_condition": 800, "n_doubles": 0})
    record = truth(adata)
    edges = [(i, j) for i, j in np.argwhere(record["weight_kk"] == 1.0)]
    assert len(edges) == 2
    for p, role in enumerate(record["role_p"]):
        driven, regulator = edges[record["module_p"][p]]
        z = adata.obsm["z"][adata.obs["target"] == record["targets"][p]]
        correlation = np.corrcoef(z[:, regulator], z[:, driven])[0, 1]
        if role in ("dominator", "suppressor"):
            assert abs(correlation) < 0.12
            assert np.flatnonzero(record["cut_pk"][p]).tolist() == [driven]
        else:
            assert correlation > 0.85
            assert not record["cut_pk"][p].any()
        np.testing.assert_allclose(
            z[:, driven].mean(),
            record["shift_pk"][p, driven] + (role == "regulator") * record["shift_pk"][p, regulator],
            atol=0.15,
        )


def test_control_cells_look_like_the_real_ones():
    real = norman2019_subset()
    real = real[(real.obs["perturbation"] == "control").to_numpy()]
    x = real.layers["counts"].toarray()
    adata = combination_screen(
        **SMALL | {"n_genes": 120, "n_control_cells": 6000, "cells_per_condition": 1, "n_doubles": 0}
    )
    simulated = adata.X[:6000].toarray()
    # The same genes, in another order: compare the sorted means, variances and zeros of genes with counts.
    for statistic in (lambda v: v.mean(0), lambda v: v.var(0), lambda v: 1 + (v > 0).mean(0)):
        ours, theirs = np.sort(statistic(simulated))[-40:], np.sort(statistic(x))[-40:]
        assert np.abs(np.log(ours / theirs)).mean() < 0.25
    log_total = np.log(real.obs["ncounts"].to_numpy(dtype=float))
    log_library = np.log(adata.obs["library_true"])
    assert log_library.std() == pytest.approx(log_total.std(), rel=0.05)


def test_own_control_cells():
    rng = np.random.default_rng(0)
    mean_g = np.geomspace(0.5, 20, 50)
    x = rng.poisson(mean_g * rng.gamma(4.0, 1 / 4, (2000, 50)))
    adata = combination_screen(
        **SMALL | {"n_genes": 50, "n_control_cells": 4000, "cells_per_condition": 1, "n_doubles": 0},
        controls=anndata.AnnData(x.astype(np.float32)),
    )
    simulated = adata.X[:4000].toarray()
    np.testing.assert_allclose(np.sort(simulated.mean(0)), np.sort(x.mean(0)), rtol=0.12)
    # Not every gene: where programmes alone give more variance than the real cells have, that is left.
    ratio = np.sort(simulated.var(0)) / np.sort(x.var(0))
    assert np.abs(np.log(ratio)).mean() < 0.12


def test_splits(small):
    obs = small.obs
    double = ~obs["kind"].isin(["control", "single"])
    assert np.array_equal(obs["split_no_doubles"] == "heldout", double)
    held = obs["split_half_doubles"] == "heldout"
    assert not (held & ~double).any()
    for kind in KINDS:
        names = obs.loc[obs["kind"] == kind, "target"].astype(str)
        out = set(names[held[names.index]])
        assert len(out) == 1 and len(set(names) - out) == 1


def test_embeddings_say_what_targets_do(norman_sized):
    record = truth(norman_sized)
    pairs = {"target_embeddings": [], "random_embeddings": []}
    alike = np.corrcoef(np.hstack([record["shift_pk"], 1.0 * record["cut_pk"]]))
    upper = np.triu_indices(105, 1)
    for name in pairs:
        table = norman_sized.uns[name]
        assert list(table.index) == list(record["targets"]) and table.shape == (105, 32)
        pairs[name] = np.corrcoef(np.corrcoef(table)[upper], alike[upper])[0, 1]
    assert pairs["target_embeddings"] > 0.3 > 0.1 > abs(pairs["random_embeddings"])


def test_seeds_and_files(small, tmp_path):
    assert (combination_screen(**SMALL).X != small.X).nnz == 0
    assert (combination_screen(**SMALL, seed=1).X != small.X).nnz > 0
    small.write_h5ad(tmp_path / "sim.h5ad")
    back = anndata.read_h5ad(tmp_path / "sim.h5ad")
    assert list(truth(back)["conditions"]) == list(truth(small)["conditions"])
    pd.testing.assert_frame_equal(back.uns["target_embeddings"], small.uns["target_embeddings"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_doubles": 80}, "fewer doubles or more targets"),
        ({"n_genes": 13}, "n_genes"),
        ({"n_control_cells": 0}, "n_control_cells"),
        ({"controls": anndata.AnnData(np.full((3, 4), 0.5))}, "layer="),
        ({"controls": anndata.AnnData(np.array([[0.0, 0.0], [1.0, 2.0]]))}, "empty"),
    ],
)
def test_bad_settings_say_what_is_wrong(settings, words):
    with pytest.raises(DataError, match=words):
        combination_screen(**SMALL | settings)
