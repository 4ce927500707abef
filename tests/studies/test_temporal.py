from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from pyro_causalcell.data import Screen
from pyro_causalcell.errors import CausalCellError
from pyro_causalcell.nets import AdditiveMaps
from pyro_causalcell.simulate import temporal_scm
from pyro_causalcell.studies import temporal
from pyro_causalcell.studies.runner import Job


def test_grid_has_every_method_and_reference_of_each_setting() -> None:
    jobs = temporal.table_jobs(seeds=2)
    names = {*temporal.METHODS, *temporal.REFERENCES}
    assert {job.method for job in jobs} == names
    assert len({job.key for job in jobs}) == len(jobs) == len(temporal.SETTINGS) * len(names) * 2


@pytest.mark.parametrize("wrong", [{"methods": ("VAE",)}, {"settings": ("linear",)}])
def test_unknown_names_are_refused(wrong: dict) -> None:
    with pytest.raises(CausalCellError, match=r"unknown \['(VAE|linear)'\]"):
        temporal.table_jobs(**wrong)


@pytest.fixture(scope="module")
def cells():
    return temporal_scm(
        n_genes=40,
        n_invariant=2,
        n_responsive=3,
        n_perturbations=6,
        n_combinations=0,
        cells_per_snapshot=40,
        truth_draws=5,
        seed=4,
    )


def _truth(cells) -> tuple[np.ndarray, temporal.Structure]:
    """The true programmes in another order, and what is true of them."""
    record = cells.uns["simulation"]
    z_nk = np.column_stack([cells.obsm["z_invariant"], cells.obsm["z_responsive"]])
    place_l, place_v = [1, 0], [2, 0, 1]
    place_k = [*place_l, *(2 + p for p in place_v)]
    weight_vk = record["weight_kk"][2:][place_v][:, place_k]
    said = temporal.Structure(
        record["altered_pv"][:, place_v], record["cut_pv"][:, place_v], weight_vk != 0, weight_vk
    )
    return z_nk[:, place_k], said


def test_the_truth_scores_perfectly_in_any_order(cells) -> None:
    z_nk, said = _truth(cells)
    targets = list(cells.uns["simulation"]["perturbations"])
    scores = temporal._recovered(cells, z_nk, 2, seed=0) | temporal._found(cells, z_nk, 2, said, targets)
    for name in ("mcc_responsive", "r2_responsive", "r2_invariant", "altered_f1", "cuts_f1", "edges_f1"):
        assert scores[name] == pytest.approx(1), name
    assert scores["background_edges_f1"] == 1
    assert scores["self_effect_error"] == pytest.approx(0)
    assert scores["auc_invariant"] < 0.57
    assert scores["leak"] < 0.5


def test_false_claims_and_blocks_are_seen(cells) -> None:
    z_nk, said = _truth(cells)
    targets = list(cells.uns["simulation"]["perturbations"])
    everything = said._replace(edge_vk=np.ones_like(said.edge_vk), weight_vk=said.weight_vk + 0.25)
    scores = temporal._found(cells, z_nk, 2, everything._replace(cut_pv=None), targets)
    true_vv = cells.uns["simulation"]["adjacency_vk"][:, 2:]
    assert scores["edges_f1"] == pytest.approx(2 * true_vv.sum() / (true_vv.sum() + 6))
    assert scores["self_effect_error"] == pytest.approx(0.25)
    assert "cuts_f1" not in scores
    turned_p = temporal._found(cells, z_nk, 2, said._replace(altered_pv=said.altered_pv[::-1]), targets)
    assert turned_p["altered_f1"] < 1
    same = temporal._found(cells, z_nk, 2, said._replace(altered_pv=said.altered_pv[::-1]), targets[::-1])
    assert same["altered_f1"] == 1
    leaking = temporal._recovered(cells, z_nk[:, ::-1], 3, seed=0)
    assert leaking["leak"] == pytest.approx(1)
    assert leaking["auc_invariant"] > 0.7


def test_moments_of_the_true_programmes_show_their_axes() -> None:
    cells = temporal_scm(
        n_genes=40, n_invariant=1, n_responsive=2, n_combinations=0, cells_per_snapshot=250, truth_draws=5
    )
    screen = Screen(cells, control="control", time="time")
    split = temporal.random_cells(screen, 0.1, 0.1)
    z_nk, turn = temporal._turned(temporal.ORACLE, screen, split, 1, seed=0)
    test, said = screen.adata[split.test], temporal._structure_of_moments(turn)
    assert temporal._recovered(test, z_nk, 1, seed=0)["mcc_responsive"] > 0.97
    scores = temporal._found(test, z_nk, 1, said, screen.targets)
    assert scores["altered_f1"] > 0.8
    assert scores["self_effect_error"] < 0.15


def test_bends_count_as_slopes() -> None:
    model = SimpleNamespace(responsive_map=AdditiveMaps(3, 2), n_invariant=1, n_responsive=2)
    assert (temporal._slopes_of_bends(model) == 0).all()
    with torch.no_grad():
        model.responsive_map.slope_ib[1] = 1e-2
        model.responsive_map.size_oib[0, 1, 0] = 50.0  # 50 tanh(z / 100) is z / 2
    slope_vk = temporal._slopes_of_bends(model)
    assert slope_vk[0, 1] == pytest.approx(0.5, abs=1e-3)
    assert np.count_nonzero(slope_vk) == 1


def test_the_quick_study_runs_and_goes_on(tmp_path, monkeypatch) -> None:
    chosen = {"settings": ("linear dynamics",), "seeds": 1, "quick": True, "progress": False}
    chosen["methods"] = ("ours", "paper", temporal.PCA_TURNED)
    table = temporal.run(tmp_path, **chosen)
    by = table.set_index(["method", "metric"])["mean"]
    assert set(by["ours"].index) == set(temporal.METRICS)
    assert set(temporal.METRICS) - set(by["paper"].index) == {"cuts_f1"}
    assert set(temporal.METRICS) - set(by[temporal.PCA_TURNED].index) == {"validation_loss"}
    assert "simulated" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "table.png").stat().st_size > 10_000

    def fail(job: Job, folder: object) -> dict:
        raise AssertionError(f"{job.key} was done already")

    monkeypatch.setattr(temporal, "score_job", fail)
    pd.testing.assert_frame_equal(table, temporal.run(tmp_path, **chosen))
