"""The runner of studies: each job once, failures kept apart, and tables that can be worked by hand."""

import importlib
import json
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest

from pyro_causalcell.errors import CausalCellError
from pyro_causalcell.studies import run_study
from pyro_causalcell.studies.runner import Job, finished, markdown, run_jobs, summarise

WORK = """
    import os
    import signal
    from pathlib import Path


    def work(job, folder):
        here = Path(job.arguments["here"])
        with (here / "log").open("a") as log:
            log.write(f"{job.method}{job.seed} {os.getpid()}\\n")
        if job.method == "raises" and not (here / "mended").exists():
            raise ValueError("no such luck")
        if job.method == "dies" and not (here / "mended").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        if job.method == "once" and not (here / "died").exists():
            (here / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"score": 10.0 * job.seed + len(job.method), "kept_in": folder.name, "ran_in": os.getcwd()}
"""


class Session(NamedTuple):
    """Three runs of the same jobs: with jobs that raise or whose worker dies, mended, and all done."""

    jobs: list[Job]
    error: str
    kept: set[str]
    first: list[str]
    second: list[str]
    third: list[str]
    rows: pd.DataFrame
    again: pd.DataFrame


def _session(here: Path) -> Session:
    methods = [("dies", 0), ("a", 0), ("a", 1), ("raises", 0), ("once", 0), ("bb", 1)]
    jobs = [Job("study", "Table 1", method, seed, {"here": str(here)}) for method, seed in methods]
    lengths: list[int] = []

    def read_log() -> list[str]:
        lines = (here / "log").read_text().splitlines()[sum(lengths) :]
        lengths.append(len(lines))
        return lines

    work = importlib.import_module("work_of_the_runner_tests").work
    with pytest.raises(CausalCellError) as caught:
        run_jobs(jobs, work, here, workers=1, progress=False)
    kept = {json.loads(file.read_text())["method"] for file in (here / "jobs").glob("*.json")}
    first = read_log()
    (here / "mended").touch()
    rows = run_jobs(jobs, work, here, workers=2, progress=False)
    second = read_log()
    again = run_jobs(jobs, work, here, workers=1, progress=False)
    return Session(jobs, str(caught.value), kept, first, second, read_log(), rows, again)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    # Worker processes get this process's path, so they can import a module from there.
    here = tmp_path_factory.mktemp("work")
    (here / "work_of_the_runner_tests.py").write_text(textwrap.dedent(WORK))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(here)
        return _session(here)


def _names(log: list[str]) -> list[str]:
    return sorted(line.split()[0] for line in log)


def test_a_killed_worker_takes_only_its_own_job(session: Session) -> None:
    assert _names(session.first) == ["a0", "a1", "bb1", *["dies0"] * 3, *["once0"] * 2, "raises0"]
    assert session.kept == {"a", "bb", "once"}  # the job of a worker that died once was run again
    assert "2 of 6 jobs failed; run the study again" in session.error
    assert f"{session.jobs[0].key}: its worker process died 3 times" in session.error


def _refuse(job: Job, folder: Path) -> dict[str, float]:
    raise ValueError("wrong file" if job.seed else "too short")


def test_what_several_jobs_say_is_told_once(tmp_path: Path) -> None:
    jobs = [Job("s", "a", "m", seed) for seed in range(4)]
    with pytest.raises(CausalCellError) as told:
        run_jobs(jobs, _refuse, tmp_path, progress=False)
    text = str(told.value)
    assert "4 of 4 jobs failed" in text and text.count("wrong file") == 1
    assert f"{jobs[0].key}: ValueError: too short" in text
    assert f"{jobs[1].key} and 2 more: ValueError: wrong file" in text


def test_a_job_that_raises_is_reported(session: Session) -> None:
    assert f"{session.jobs[3].key}: ValueError: no such luck" in session.error
    workers = [line.split() for line in session.first]
    raised = next(pid for name, pid in workers if name == "raises0")
    assert [raised] * 2 == [pid for name, pid in workers if name in ("raises0", "a1")]  # its worker goes on


def test_only_what_is_missing_is_run_again(session: Session) -> None:
    assert _names(session.second) == ["dies0", "raises0"]
    assert len({line.split()[1] for line in session.second}) == 2  # two workers share the jobs
    assert session.third == []
    pd.testing.assert_frame_equal(session.rows, session.again)  # seconds too: read, not measured


def test_rows_come_in_the_order_of_the_jobs(session: Session) -> None:
    rows = session.rows
    assert rows["method"].tolist() == ["dies", "a", "a", "raises", "once", "bb"]
    assert rows["seed"].tolist() == [0, 0, 1, 0, 0, 1] and set(rows["setting"]) == {"Table 1"}
    assert rows["score"].tolist() == [4, 1, 11, 6, 4, 12] and (rows["seconds"] >= 0).all()
    assert rows["kept_in"].tolist() == [job.key for job in session.jobs]
    assert set(rows["ran_in"]) == {str(Path.cwd())}  # so that jobs may name files as the caller does


def test_every_finished_job_of_a_folder(session: Session) -> None:
    here = session.jobs[0].arguments["here"]
    rows = finished(here, here=here)
    assert sorted(rows["score"]) == sorted(session.rows["score"])
    assert finished(here, here="elsewhere").empty


def test_no_worker(tmp_path: Path) -> None:
    with pytest.raises(CausalCellError, match="at least 1 worker, found 0"):
        run_jobs([], print, tmp_path, workers=0)


def test_unknown_executor(tmp_path: Path) -> None:
    with pytest.raises(CausalCellError, match=r"executor of \['processes', 'ray'\], found 'slurm'"):
        run_jobs([], print, tmp_path, executor="slurm")  # type: ignore[arg-type]


def test_ray_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(CausalCellError, match=r"pip install 'pyro-causalcell\[ray\]'"):
        run_jobs([Job("study", "s", "m", 0)], print, tmp_path, executor="ray", progress=False)


def test_not_under_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a run")
    with pytest.raises(CausalCellError, match="without torchrun"):
        run_jobs([], print, tmp_path)


def test_other_arguments_are_another_job(tmp_path: Path) -> None:
    job = Job("study", "Table 1: p = 5", "sVAE+ (ours)", 0, {"a": 1, "b": [2]})
    same = Job("study", "Table 1: p = 5", "sVAE+ (ours)", 0, {"b": [2], "a": 1})
    other = Job("study", "Table 1: p = 5", "sVAE+ (ours)", 0, {"a": 1, "b": [3]})
    assert job.key == same.key != other.key
    assert job.key.startswith("table-1--p---5-svae---ours--0_")


ROWS = pd.DataFrame(
    {
        "setting": ["s1", "s1", "s1", "s2"],
        "method": ["ours", "ours", "VAE", "ours"],
        "seed": [0, 1, 0, 0],
        "mcc": [0.5, 0.7, 0.4, 0.9],
        "nll": [300.0, None, 310.04, 30.0],
        "note": ["x", "y", "z", "w"],
    }
)
PAPER = {("s1", "VAE", "mcc"): 0.46, ("s1", "ours", "nll"): 315.43}


def test_summary_by_hand() -> None:
    table = summarise("study", ROWS, PAPER, ["mcc", "nll", "absent"])
    assert list(table.columns) == [
        *("study", "setting", "method", "metric", "mean", "sd", "n_seeds", "paper")
    ]
    by_name = table.set_index(["setting", "method", "metric"])
    assert len(table) == 6 and set(table["study"]) == {"study"}
    ours = by_name.loc[("s1", "ours", "mcc")]
    assert ours["mean"] == pytest.approx(0.6) and ours["sd"] == pytest.approx(0.02**0.5)
    assert ours["n_seeds"] == 2 and pd.isna(ours["paper"])
    nll = by_name.loc[("s1", "ours", "nll")]  # one seed has no value: it does not count
    assert nll["mean"] == 300 and pd.isna(nll["sd"]) and nll["n_seeds"] == 1 and nll["paper"] == 315.43
    assert by_name.loc[("s1", "VAE", "mcc"), "paper"] == 0.46


def test_markdown_by_hand() -> None:
    text = markdown(summarise("study", ROWS, PAPER, ["mcc", "nll"]), {"nll": "NLL", "mcc": "MCC"})
    assert text == textwrap.dedent(
        """\
        ### s1

        | method | NLL | MCC | seeds |
        |---|---|---|---|
        | ours | 300.0 (315.43) | 0.600 ± 0.141 | 2 |
        | VAE | 310.0 | 0.400 (0.46) | 1 |

        ### s2

        | method | NLL | MCC | seeds |
        |---|---|---|---|
        | ours | 30.0 | 0.900 | 1 |
        """
    )


def test_a_metric_that_a_method_lacks_is_a_dash() -> None:
    table = summarise("study", ROWS.assign(f1=[0.1, 0.3, None, None]), {}, ["mcc", "f1"])
    text = markdown(table, {"mcc": "MCC", "f1": "F1"})
    assert "| VAE | 0.400 | – | 1 |" in text


def test_unknown_study(tmp_path: Path) -> None:
    with pytest.raises(CausalCellError, match="no study 'svae'; there are .*sparse-shift"):
        run_study("svae", tmp_path)
    with pytest.raises(CausalCellError, match=r"sparse-shift has no setting \['data'\]; it takes \['tables'"):
        run_study("sparse-shift", tmp_path, data="norman.h5ad")
