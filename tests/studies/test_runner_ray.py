"""The runner of studies on a local Ray cluster of two workers."""

import importlib
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyro_causalcell.errors import CausalCellError
from pyro_causalcell.studies.runner import Job, run_jobs

ray = pytest.importorskip("ray")

WORK = """
    import os
    import signal
    import time
    from pathlib import Path


    def work(job, folder):
        here = Path(job.arguments["here"])
        (here / f"{job.method} {os.getpid()}").touch()
        if job.method == "once" and not (here / "died").exists():
            (here / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if job.method == "raises":
            raise ValueError("no such luck")
        deadline = time.monotonic() + 60
        while job.method.startswith("together") and len(list(here.glob("together*"))) < 2:
            assert time.monotonic() < deadline, "the other job does not run"
            time.sleep(0.05)
        return {"score": len(job.method), "ran_in": os.getcwd()}
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the work of the jobs, on a cluster whose workers can import it."""
    here = tmp_path_factory.mktemp("work")
    (here / "work_on_the_cluster.py").write_text(textwrap.dedent(WORK))
    runtime = {"env_vars": {"PYTHONPATH": str(here)}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=runtime)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(here)
        yield here
    ray.shutdown()


def test_a_grid_on_a_cluster(here: Path) -> None:
    work = importlib.import_module("work_on_the_cluster").work
    methods = ["once", "together 1", "together 2", "raises"]
    jobs = [Job("study", "s", method, 0, {"here": str(here)}) for method in methods]
    with pytest.raises(CausalCellError, match="1 of 4 jobs failed") as caught:
        run_jobs(jobs, work, here, workers=2, executor="ray", progress=False)
    assert f"{jobs[3].key}: ValueError: no such luck" in str(caught.value)
    assert len(list(here.glob("once *"))) == 2  # on two workers: the first died
    done = {file: file.read_text() for file in (here / "jobs").glob("*.json")}
    assert {json.loads(text)["method"] for text in done.values()} == {"once", "together 1", "together 2"}
    assert ray.is_initialized()  # the cluster is the caller's

    rows = run_jobs(jobs[:3], work, here, workers=2, progress=False)  # the same table, by the other executor
    assert rows["score"].tolist() == [4, 10, 10]
    assert set(rows["ran_in"]) == {str(Path.cwd())}  # so that jobs may name files as the caller does
    assert all(file.read_text() == text for file, text in done.items())
