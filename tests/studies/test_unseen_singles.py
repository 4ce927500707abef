import numpy as np
import pytest

from pyro_causalcell.errors import CausalCellError
from pyro_causalcell.studies import unseen_singles


def test_grid_has_every_method_in_each_setting() -> None:
    jobs = unseen_singles.table_jobs(seeds=2)
    names = {*unseen_singles.METHODS, *unseen_singles.REFERENCES}
    assert {job.method for job in jobs} == names
    assert len({job.key for job in jobs}) == len(jobs) == len(unseen_singles.SETTINGS) * len(names) * 2
    with pytest.raises(CausalCellError, match=r"unknown \['vae'\]"):
        unseen_singles.table_jobs(methods=("vae",))


def test_the_quick_study_runs_and_goes_on(tmp_path) -> None:
    table = unseen_singles.run(tmp_path, methods=("sparse-shift",), seeds=1, quick=True, progress=False)
    by = table.set_index(["setting", "method", "metric"])["mean"].sort_index()
    for setting in unseen_singles.SETTINGS:
        own = by[setting, "sparse-shift"]
        assert own[[name for name in own.index if "coverage" in name]].between(0, 1).all()
        assert ("perturbed mean", "pearson_vs_mean") not in by[setting].index  # it has none
        assert by[setting, "measured cells", "l2"] > 0
    # What does not look at the embeddings is the same in both settings.
    np.testing.assert_allclose(*(by[s, "perturbed mean", "l2"] for s in unseen_singles.SETTINGS))
    assert "simulated" in (tmp_path / "table.md").read_text()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "jobs").glob("*.json")}
    unseen_singles.run(tmp_path, methods=("sparse-shift",), seeds=1, quick=True, progress=False)
    assert {path: path.stat().st_mtime_ns for path in done} == done
