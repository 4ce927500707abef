"""The study of 3DIdent-like films: readings of a known truth, and that all of it runs."""

import json

import numpy as np
import pandas as pd
import pytest

from pyro_causalcell.errors import CausalCellError
from pyro_causalcell.simulate.renderer import FACTORS
from pyro_causalcell.studies import causal3dident as study
from pyro_causalcell.studies.runner import Job

SIZE = study.Size(150, 4, 100, 8, 64, 1)


def test_grid_has_every_method_and_reference() -> None:
    jobs = study.table_jobs(seeds=2)
    assert {job.method for job in jobs} == {*study.METHODS, *study.REFERENCES}
    assert len({job.key for job in jobs}) == len(jobs) == 20
    with pytest.raises(CausalCellError, match=r"unknown \['CNN'\]"):
        study.table_jobs(methods=("CNN",))


def test_sequences_stay_whole() -> None:
    split = study.by_sequence(study.SMALL, 0)
    parts = [split.train, split.validation, split.test]
    assert [len(part) for part in parts] == [192, 32, 320]
    sequences = [set(part // study.LENGTH) for part in parts]
    assert not (sequences[0] & sequences[1] or sequences[0] & sequences[2])


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    return study.films(tmp_path_factory.mktemp("scenes"), SIZE, seed=0)


@pytest.fixture(scope="module")
def factors_nf(films):
    return films["factors"].values.reshape(-1, len(FACTORS))


def test_frames_are_cells_of_their_condition_and_time(films) -> None:
    adata = study.as_cells(films, study.pixels(films))
    assert adata.shape == (254 * 8, 192)
    at = 5 * 8 + 3
    assert adata.obs["time"].iloc[at] == 3 and adata.obs["sequence"].iloc[at] == 5
    assert adata.obs["target"].iloc[at] == films["condition"].values[5]
    image = films["image"].values[5, 3].ravel() / 255
    np.testing.assert_allclose(adata.X[at], 2 * image - 1, atol=1e-5)


def test_films_are_drawn_once(tmp_path) -> None:
    first = study.films(tmp_path, study.SMALL, 0)
    (file,) = tmp_path.iterdir()
    changed = file.stat().st_mtime_ns
    assert study.films(tmp_path, study.SMALL, 0).identical(first)
    assert file.stat().st_mtime_ns == changed


def test_true_blocks_are_read_perfectly_and_tell_little_of_each_other(films, factors_nf) -> None:
    blocks = study._true_blocks(study.answers(factors_nf))
    assert [block.shape[1] for block in blocks] == [15, 7]
    split = study.by_sequence(SIZE, 0)
    scores = study._scores(blocks, factors_nf, split, films["condition"].values, seed=0)
    for block in ("responsive", "invariant", "all"):
        assert scores[f"linear_{block}"] == pytest.approx(1)
        assert scores[f"r2_{block}"] > 0.97
        assert scores[f"spearman_{block}"] > 0.97
    assert scores["leak_responsive"] < 0.6
    assert scores["leak_invariant"] < 0.6
    assert scores["auc_invariant"] < 0.65
    assert set(scores) == set(study.METRICS)
    swapped = study._scores(blocks[::-1], factors_nf, split, films["condition"].values, seed=0)
    assert swapped["leak_responsive"] > 0.97
    assert swapped["r2_responsive"] == pytest.approx(scores["leak_responsive"], abs=0.15)
    assert swapped["auc_invariant"] > 0.6


def test_an_angle_has_no_cut_but_in_the_raw_reading(factors_nf) -> None:
    """Sine and cosine say the angle exactly, but no smooth function of them is the number from 0 to 2 pi."""
    split = study.by_sequence(SIZE, 0)
    turn_n = factors_nf[:, FACTORS.index("hue_back")]
    row = study.readings(np.stack([np.sin(turn_n), np.cos(turn_n)], 1), factors_nf, split, 0).loc["hue_back"]
    assert row["linear"] == pytest.approx(1)
    assert row["r2"] > 0.99
    assert row["raw_r2"] < row["r2"] - 0.005
    nothing = study.readings(np.random.default_rng(0).normal(size=(len(turn_n), 2)), factors_nf, split, 0)
    assert nothing["linear"].max() < 0.05
    assert nothing["spearman"].abs().max() < 0.2


def test_scores_by_hand() -> None:
    truth_na = np.array([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
    found_na = np.array([[0.0, 1.0], [2.0, 1.0], [1.0, 2.0]])
    assert study._r2(truth_na, found_na) == pytest.approx(1 - 3 / 2)
    assert study._spearman(truth_na, found_na) == pytest.approx(0.5)
    assert study._spearman(truth_na, 0 * found_na) == 0


def test_the_quick_study_runs_and_goes_on(tmp_path) -> None:
    chosen = {"seeds": 1, "quick": True, "progress": False}
    chosen["methods"] = ("ours", "VAE", study.SUPERVISED)
    table = study.run(tmp_path, **chosen)
    by = table.set_index(["method", "metric"])
    for method in ("ours", study.SUPERVISED):
        assert set(by.loc[method].index) == set(study.METRICS)
    blocks = {name for name in study.METRICS if not name.endswith("_all")} - {f"r2_{f}" for f in FACTORS}
    assert not blocks & set(by.loc["VAE"].index)
    assert by.loc[("ours", "raw_r2_invariant"), "paper"] == 0.998
    assert by.loc[("ours", "spearman_all"), "paper"] == 0.991
    page = (tmp_path / "table.md").read_text()
    assert "simulated" in page and "Quick size" in page
    assert len(pd.read_csv(tmp_path / "rows.csv")) == 3
    assert len(list((tmp_path / "scenes").glob("*.nc"))) == 1
    jobs = {path: path.stat().st_mtime_ns for path in (tmp_path / "jobs").glob("*.json")}
    study.run(tmp_path, **chosen)
    assert jobs == {path: path.stat().st_mtime_ns for path in (tmp_path / "jobs").glob("*.json")}
    assert {json.loads(path.read_text())["seed"] for path in jobs} == {0}


def test_without_tracks_no_past_is_given(tmp_path, monkeypatch) -> None:
    seen = {}

    def remembered(model, guide, screen, **settings):
        seen[screen.previous_n is not None] = settings
        raise RuntimeError("enough")

    monkeypatch.setattr(study.inference, "fit", remembered)
    for method in ("ours", "ours, pasts unknown"):
        job = Job(study.STUDY, study.SETTING, method, 0, {"quick": True, "full": False})
        with pytest.raises(RuntimeError, match="enough"):
            study.score_job(job, tmp_path / "jobs" / method)
    assert set(seen) == {True, False}
    assert "track" not in seen[False]
