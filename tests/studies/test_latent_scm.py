import numpy as np
import pandas as pd
import pytest

from pyro_causalcell.errors import CausalCellError
from pyro_causalcell.studies import latent_scm
from pyro_causalcell.studies.runner import Job


def test_grid_has_every_method_and_reference_of_each_setting() -> None:
    jobs = latent_scm.table_jobs(seeds=2)
    names = {*latent_scm.METHODS, *latent_scm.REFERENCES}
    assert len(jobs) == len(latent_scm.SETTINGS) * len(names) * 2
    assert {job.method for job in jobs} == names
    assert len({job.key for job in jobs}) == len(jobs)


@pytest.mark.parametrize("wrong", [{"methods": ("VAE",)}, {"settings": ("sparse",)}])
def test_unknown_names_are_refused(wrong: dict) -> None:
    with pytest.raises(CausalCellError, match=r"unknown \['(VAE|sparse)'\]"):
        latent_scm.table_jobs(**wrong)


def test_the_papers_numbers_belong_to_rows_of_the_study() -> None:
    for setting, method, metric in latent_scm.PAPER:
        assert setting in latent_scm.SETTINGS
        assert method in latent_scm.METHODS
        assert metric in latent_scm.METRICS


def test_the_true_programmes_score_perfectly() -> None:
    adata = latent_scm.simulate.latent_scm(
        n_genes=40, n_train=1000, n_test=600, cells_per_combination=1, seed=1
    )
    train, test = (adata[(adata.obs["split"] == part).to_numpy()].copy() for part in ("train", "test"))
    reference = latent_scm._reference(latent_scm.TRUTH, train, 7, 0)
    truth = reference(train), reference(test)
    scores = latent_scm._recovered(train, test, *truth, seed=0)
    assert scores["mcc_responsive"] == pytest.approx(1)
    for block in ("invariant", "responsive"):  # kernel ridge of 480 and of 1000 cells
        assert 0.98 < scores[f"r2_{block}"] < scores[f"r2_{block}_held_out"]
    assert scores["auc_invariant"] < 0.57  # the background does not know the perturbation
    leaking = latent_scm._recovered(train, test, *(z_nk[:, ::-1] for z_nk in truth), seed=0)
    assert leaking["auc_invariant"] > 0.8  # responsive programmes called invariant


def test_f1_of_a_structure() -> None:
    truth = np.array([[True, False], [True, False]])
    assert latent_scm._f1(truth, truth) == 1
    assert latent_scm._f1(truth, ~truth) == 0
    assert latent_scm._f1(truth, np.ones_like(truth)) == pytest.approx(2 / 3)


def test_the_quick_study_runs_and_goes_on(tmp_path, monkeypatch) -> None:
    chosen = {"settings": ("sparse changes",), "methods": ("ours, true pairs", "PCA, turned"), "seeds": 1}
    table = latent_scm.run(tmp_path, **chosen, quick=True, progress=False)
    by = table.set_index(["method", "metric"])["mean"]
    assert set(by["ours, true pairs"].index) == set(latent_scm.METRICS)
    assert by.between(0, 1).drop("validation_loss", level="metric").all()
    assert "simulated" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "table-1.png").stat().st_size > 10_000

    def fail(job: Job, folder: object) -> dict:
        raise AssertionError(f"{job.key} was done already")

    monkeypatch.setattr(latent_scm, "score_job", fail)
    again = latent_scm.run(tmp_path, **chosen, quick=True, progress=False)
    pd.testing.assert_frame_equal(table, again)
