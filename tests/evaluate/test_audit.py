"""Designs that lack something are told so, with the mend; the released simulation passes what it should."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from pyro_causalcell.data import Screen
from pyro_causalcell.errors import DataError
from pyro_causalcell.evaluate import Audit, audit
from pyro_causalcell.evaluate.audit import _cells_needed
from pyro_causalcell.simulate import sparse_shift

SMALL = {"n_latents": 4, "n_genes": 40, "n_interventions": 16, "cells_per_intervention": 100}
IVAE = "sparse shift (iVAE): programmes up to a linear map"
SVAE = "sparse shift (sVAE+): each programme up to order, sign and scale"
BLOCKS = "weight-variant SCM (cDAG-VAE): responsive apart from invariant programmes"
CDAG = "weight-variant SCM (cDAG-VAE): each responsive programme, mechanisms changing sparsely"
RICH = "weight-variant SCM (cDAG-VAE): the richness its theorem asks for"
CITE = "temporal process (CITE-VAE): each responsive programme"


def simulated(**settings) -> tuple[Screen, np.ndarray]:
    adata = sparse_shift("released", **(SMALL | settings))
    screen = Screen(adata, "target", "control" if settings.get("n_control_cells") else None)
    return screen, adata.uns["simulation"]["graph_pk"]


@pytest.fixture(scope="module")
def released() -> tuple[Screen, np.ndarray]:
    return simulated()


def labelled(label_n, seed=0, x_ng=None, **columns) -> Screen:
    """Cells of noise, unless x is given, with the labels of a design."""
    n = len(label_n)
    if x_ng is None:
        x_ng = np.random.default_rng(seed).standard_normal((n, 6))
    obs = pd.DataFrame({"target": label_n, **columns}, index=[f"cell{i}" for i in range(n)])
    adata = ad.AnnData(
        x_ng.astype(np.float32), obs, pd.DataFrame(index=[f"g{i}" for i in range(x_ng.shape[1])])
    )
    names = {name: name for name in columns}
    control = "control" if "control" in set(label_n) else None
    return Screen(adata, "target", control, **names)


def test_the_released_simulation_passes_what_it_should(released):
    screen, graph_pk = released
    found = audit(screen, graph_pk=graph_pk)
    passed = ["cells per perturbation", "independent perturbations", "directions of effect"]
    passed += ["coverage of programmes", "graphical criterion", IVAE, SVAE]
    assert {name: found[name].status for name in passed} == dict.fromkeys(passed, "ok")
    assert found[SVAE].found == "holds" and not any(found[name].mend for name in passed)
    # it has no control cells and one time: the processes with an anchor or with time are not for it
    for name in ("control cells", "time points", BLOCKS, CDAG, RICH, CITE):
        assert found[name].status == "fails" and found[name].mend, name
    assert "sparse-shift process" in found["control cells"].mend
    assert "control cells" in found[CDAG].found and "graphical criterion" not in found[CDAG].found


def test_control_cells_complete_the_sparse_weight_variant_process():
    screen, graph_pk = simulated(n_control_cells=400, cells_per_intervention=200)
    found = audit(screen, graph_pk=graph_pk)
    assert found["control cells"].status == found[BLOCKS].status == found[CDAG].status == "ok"
    few = audit(screen, graph_pk=graph_pk, rows=np.flatnonzero(screen.condition_n > 0)[:-1])
    assert few["control cells"].status == "fails"
    some = np.concatenate([np.flatnonzero(screen.condition_n), np.flatnonzero(screen.condition_n == 0)[:20]])
    assert audit(screen, graph_pk=graph_pk, rows=some)["control cells"].status == "warning"
    assert "more unperturbed cells" in audit(screen, graph_pk=graph_pk, rows=some)["control cells"].mend


def test_without_a_graph_what_needs_one_is_unknown(released):
    found = audit(released[0], 4)
    for name in ("coverage of programmes", "graphical criterion", "isolation", SVAE):
        assert found[name].status == "unknown" and "fit=" in found[name].mend
    assert found["directions of effect"].status == found[IVAE].status == "warning"
    assert "cannot be known yet" in found[SVAE].found and "with reservations" in found[IVAE].found


def test_programmes_that_nothing_moves_are_named():
    screen, graph_pk = simulated(n_targeted_latents=2)
    found = audit(screen, graph_pk=graph_pk)
    coverage = found["coverage of programmes"]
    assert coverage.status == "fails" and "2 of 4; not programme_3, programme_4" in coverage.found
    assert "fit 2 programmes" in coverage.mend
    assert (
        found["directions of effect"].status == "fails"
        and "2 by the graph" in found["directions of effect"].found
    )
    for name in ("graphical criterion", "isolation", IVAE, SVAE):
        assert found[name].status == "fails"


GRAPHS = {
    # every programme alone somewhere
    "isolated": ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], "ok", "ok"),
    # no programme alone, but each pair of perturbations shares one
    "criterion": ([[1, 1, 0], [0, 1, 1], [1, 0, 1]], "ok", "fails"),
    # programmes 1 and 2 always together
    "together": ([[1, 1, 0], [1, 1, 1], [0, 0, 1]], "fails", "fails"),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_graphical_criterion_and_isolation_by_hand(name):
    graph_pk, criterion, isolation = GRAPHS[name]
    found = audit(labelled(np.repeat(["A", "B", "C"], 30)), graph_pk=np.array(graph_pk))
    assert found["coverage of programmes"].status == "ok"
    assert (found["graphical criterion"].status, found["isolation"].status) == (criterion, isolation)
    if name == "together":
        said = found["graphical criterion"].found
        assert "1 of 3" in said and "programme_1 (always with programme_2)" in said
        assert "without those" in found["graphical criterion"].mend


def test_conditions_count_as_they_were_measured():
    """A and B move one programme each, but only A and A+B were measured: B's programme is never alone."""
    screen = labelled(np.repeat(["control", "A", "A+B"], 30))
    found = audit(screen, graph_pk=np.eye(2))
    assert found["isolation"].found.startswith("1 of 2") and "programme_2" in found["isolation"].found
    assert found["graphical criterion"].status == "fails"
    doubled = labelled(np.repeat(["control", "A", "B", "A+B"], 30))
    assert audit(doubled, graph_pk=np.eye(2))["isolation"].status == "ok"


@pytest.mark.parametrize(
    ("labels", "rank", "status"),
    [
        (["control", "A", "B", "C"], 3, "ok"),
        (["A", "B", "C"], 2, "fails"),  # one of them is the reference
        (["control", "A", "B", "A+B"], 2, "fails"),
    ],
)
def test_independent_perturbations(labels, rank, status):
    check = audit(labelled(np.repeat(labels, 20)), 3)["independent perturbations"]
    assert check.found.startswith(f"{rank} beside") and check.status == status
    if status == "fails":
        assert check.mend == "perturb 1 more targets, or fit at most 2 programmes"


def test_perturbations_without_effect_are_seen_in_the_cells(released):
    screen = released[0]
    found = audit(screen, 4)
    adata = screen.adata.copy()
    adata.obs["target"] = np.random.default_rng(0).permutation(adata.obs["target"])
    none = audit(Screen(adata, "target", None), 4)
    assert none["directions of effect"].status == none[IVAE].status == "fails"
    assert none["directions of effect"].found.startswith("0 above noise")
    assert "fit at most 1 programmes" in none["directions of effect"].mend
    assert found["directions of effect"].status == "warning"


def test_batches_are_no_effects():
    """Two batches far apart, and perturbations that were not spread evenly over them."""
    rng = np.random.default_rng(0)
    label_n = np.repeat(["control", "A", "B", "C"], 200)
    batch_n = np.where(rng.random(800) < np.repeat([0.5, 0.2, 0.8, 0.4], 200), "b1", "b2")
    x_ng = rng.standard_normal((800, 6)) + 5.0 * (batch_n == "b1")[:, None]
    ignored = audit(labelled(label_n, x_ng=x_ng), 1)["directions of effect"].found
    known = audit(labelled(label_n, x_ng=x_ng, batch=batch_n), 1)["directions of effect"].found
    assert ignored.startswith("1 above noise") and known.startswith("0 above noise")


def gaussian(n_environments: int, change: str) -> Screen:
    """Two programmes seen in six genes; environments change means, or noise too, or everything."""
    rng = np.random.default_rng(0)
    parts, labels = [], []
    loading = rng.standard_normal((2, 6))
    for e in range(n_environments):
        mean = rng.normal(0, 1.5, 2) if change != "one mean" else np.array([rng.normal(0, 1.5), 0.0])
        scale = np.diag(rng.uniform(0.4, 2, 2)) if change in ("noise", "weights") else np.eye(2)
        if change == "weights":
            scale[1, 0] = rng.normal(0, 1)
        parts.append((rng.standard_normal((400, 2)) @ scale.T + mean) @ loading)
        labels += [f"E{e:02d}"] * 400 if e else ["control"] * 400
    x_ng = np.concatenate(parts)
    return labelled(np.array(labels), x_ng=x_ng + 0.05 * rng.standard_normal(x_ng.shape))


@pytest.mark.parametrize(
    ("change", "directions"), [("one mean", 1), ("means", 2), ("noise", 4), ("weights", 5)]
)
def test_rank_of_natural_parameters(change, directions):
    """Of two programmes: a mean, two means, means and variances, and the covariance as well."""
    found = audit(gaussian(12, change), 2)
    noise, weights = found["environments, changing noise"], found["environments, changing weights"]
    assert f"differ in {directions} directions" in noise.found
    assert noise.status == ("warning" if directions >= 4 else "fails")
    assert weights.status == ("warning" if directions >= 5 else "fails")
    assert noise.needed == "5 environments that differ in 4 directions"
    assert weights.needed == "6 environments that differ in 5 directions"


def test_too_few_environments_say_how_many_are_missing():
    found = audit(gaussian(4, "weights"), 2)["environments, changing weights"]
    assert (
        found.status == "fails"
        and found.mend == "add 2 perturbations, or fit at most 1 responsive programmes"
    )


def test_cells_needed_by_hand():
    # ((1.960 + 1.282) / 0.5)² = 42.03 beside a reference without error
    assert _cells_needed(1) == 43
    # 1 / (1/42.03 - 1/100) = 72.5 beside one hundred cells; never beside forty
    assert _cells_needed(1, 100) == 73 and _cells_needed(1, 40) == np.inf


def test_small_perturbations_are_named():
    labels = np.repeat(["control", "A", "B", "C"], [1000, 200, 200, 30])
    check = audit(labelled(labels), 2)["cells per perturbation"]
    assert check.status == "warning" and "too few in 1 of 3: C (30)" in check.found and check.mend
    none = audit(labelled(np.repeat(["control", "A", "B"], [1000, 20, 20])), 2)["cells per perturbation"]
    assert none.status == "fails"
    few = audit(labelled(np.repeat(["control", "A", "B"], [20, 200, 200])), 2)["cells per perturbation"]
    assert few.status == "fails" and "so few controls" in few.needed


@pytest.mark.parametrize(
    ("times", "status", "words"),
    [
        ([0, 2] * 60, "ok", "2"),
        ([0, 2, 2, 2] * 30, "warning", "no control at 0"),
        ([1] * 120, "fails", "not at two neighbouring ones: A, B"),
    ],
)
def test_times(times, status, words):
    labels = ["control", "control", "A", "A", "B", "B"] * 20
    if status == "warning":
        labels = ["A", "control", "A", "B"] * 30
    check = audit(labelled(np.array(labels), time=np.array(times, dtype=float)), 2)["time points"]
    assert check.status == status and words in check.found


def test_a_fit_gives_an_estimate(small_fit, small_screen):
    found = audit(small_screen, fit=small_fit)
    for name in ("coverage of programmes", "graphical criterion", "isolation"):
        assert found[name].status in ("warning", "fails") and "the fit's own graph" in found[name].found
    assert f"{len(small_fit.split.train):,} cells" in found.title and found.title.startswith("3 programmes")
    with pytest.raises(DataError, match="fitted screen"):
        audit(labelled(np.repeat(["A", "B"], 20)), fit=small_fit)


def test_printed_and_tabulated(released):
    screen, graph_pk = released
    found = audit(screen, graph_pk=graph_pk)
    assert isinstance(found, Audit)
    text, table = str(found), found.to_frame()
    assert max(len(line) for line in text.splitlines()) <= 100
    assert list(table) == ["kind", "name", "status", "found", "needed", "mend"]
    assert table["kind"].drop_duplicates().tolist() == ["check", "guarantee", "assumption"]
    assert set(table["status"]) <= {"ok", "warning", "fails", "unknown"}
    for name in table["name"]:
        assert name in text
    bad = table[table["kind"].ne("assumption") & table["status"].ne("ok")]
    assert (bad["mend"] != "").all()  # whatever does not hold comes with its mend
    assert (table.loc[table["kind"] == "assumption", "status"] == "unknown").all()
    assert str(audit(screen, graph_pk=graph_pk)) == text
    with pytest.raises(KeyError, match="none of"):
        found["luck"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "n_latents"),
        ({"n_latents": 0}, "n_latents"),
        ({"graph_pk": np.eye(3)}, "16 targets x n programmes"),
        ({"graph_pk": np.ones((16, 3)), "n_latents": 4}, "16 targets x 4 programmes"),
        ({"n_latents": 2, "rows": np.arange(0)}, "perturbed cells"),
    ],
)
def test_bad_input(released, settings, words):
    with pytest.raises(DataError, match=words):
        audit(released[0], **settings)
