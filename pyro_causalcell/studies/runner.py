"""Run the jobs of a study: in parallel, once each, resumable; then write table and figures.

Jobs run on worker processes of this machine, or on a Ray cluster. Both keep the same files, so that a study
that was begun on one may be ended on the other.
"""

import hashlib
import json
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any, Literal, Protocol

import pandas as pd
import torch
from tqdm import tqdm

from pyro_causalcell.errors import CausalCellError

__all__ = [
    "Executor",
    "Job",
    "Paper",
    "chosen_jobs",
    "chosen_methods",
    "differences_table",
    "finished",
    "in_order",
    "markdown",
    "run_jobs",
    "summarise",
    "write_table",
]

Executor = Literal["processes", "ray"]
"""What runs the jobs of a study: processes of this machine, or a Ray cluster."""

RETRIES = 2
"""How often a job is tried again whose worker died."""

Scores = dict[str, Any]
Paper = Mapping[tuple[str, str, str], float]
"""The paper's number for (setting, method, metric)."""


@dataclass(frozen=True)
class Job:
    """One cell of a study's grid: a setting, a method, a seed.

    Attributes:
        study: Name of the study.
        setting: Name of the setting, as the table prints it.
        method: Name of the method.
        seed: Seed of data and training.
        arguments: What the study's function is called with, JSON values only.
    """

    study: str
    setting: str
    method: str
    seed: int
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """File name of the result: readable, and different for other arguments."""
        text = json.dumps(dict(self.arguments), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        words = f"{self.setting}_{self.method}_{self.seed}".lower()
        return "".join(c if c.isalnum() else "-" for c in words) + f"_{digest}"


Work = Callable[[Job, Path], Scores]


def chosen_methods(methods: Sequence[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    """The methods that were asked for; all if None.

    Raises:
        CausalCellError: A method is unknown.
    """
    chosen = tuple(known if methods is None else methods)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise CausalCellError(f"unknown {unknown}; methods are {list(known)}")
    return chosen


def chosen_jobs(
    study: str,
    settings: Sequence[str],
    known_settings: Sequence[str],
    methods: Sequence[str] | None,
    known_methods: Sequence[str],
    seeds: int,
    quick: bool,
) -> list[Job]:
    """Every setting that was asked for, with every method that was, in the order of those known.

    Args:
        study: Name of the study.
        settings: Settings asked for.
        known_settings: All of them.
        methods: Methods asked for; None is all.
        known_methods: All of them, references too.
        seeds: Seeds of each cell, from 0.
        quick: The jobs' only argument.

    Raises:
        CausalCellError: A setting or method is unknown.
    """
    asked = known_methods if methods is None else methods
    unknown = [s for s in settings if s not in known_settings] + [m for m in asked if m not in known_methods]
    if unknown:
        raise CausalCellError(
            f"unknown {unknown}; settings are {list(known_settings)}, methods {list(known_methods)}"
        )
    return [
        Job(study, setting, method, seed, {"quick": quick})
        for setting in settings
        for method in known_methods
        if method in asked
        for seed in range(seeds)
    ]


def in_order(rows: pd.DataFrame, settings: Sequence[str], methods: Sequence[str]) -> pd.DataFrame:
    """Rows of jobs in the order of settings, methods and seeds."""
    order = {"setting": list(settings), "method": list(methods)}
    keys = rows.assign(**{name: rows[name].map(values.index) for name, values in order.items()})
    return rows.loc[keys.sort_values(["setting", "method", "seed"]).index]


def run_jobs(
    jobs: Sequence[Job],
    work: Work,
    out: str | Path,
    *,
    workers: int = 1,
    executor: Executor = "processes",
    progress: bool = True,
) -> pd.DataFrame:
    """Run every job that has no result yet; each result is a JSON file of its own.

    A killed run goes on where it stopped: finished jobs are read, not run again. A worker that dies takes
    only its job with it; the job is tried again, twice at most, after those that wait.

    Ray joins the cluster that ``RAY_ADDRESS`` names, or the one that runs on this machine, or starts one on
    this machine. On other machines the package must be installed, and the working folder and ``out`` must
    be at the same place.

    Args:
        jobs: The grid.
        work: Scores of one job, called with the job and a folder of its own where it may keep what was
            trained; must be importable (it runs in worker processes).
        out: Folder of the study; results go to ``out/jobs``.
        workers: Jobs that run at the same time, each on a process of its own.
        executor: ``"processes"`` of this machine, or ``"ray"``; there a job takes one core of the cluster.
        progress: Show a progress bar.

    Returns:
        One row per job: setting, method, seed, and the scores.

    Raises:
        CausalCellError: There is no worker, Ray is not installed, or some jobs failed: what they said is
            listed, the others are kept.
    """
    if workers < 1:
        raise CausalCellError(f"expected at least 1 worker, found {workers}")
    if executor not in _EXECUTORS:
        raise CausalCellError(f"expected an executor of {list(_EXECUTORS)}, found {executor!r}")
    if torch.distributed.is_torchelastic_launched():
        raise CausalCellError("jobs bring workers of their own; call this without torchrun, with workers=")
    folder = (Path(out) / "jobs").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    todo = [job for job in jobs if not (folder / f"{job.key}.json").exists()]
    failures: dict[str, list[str]] = {}  # what was said -> the jobs that said it
    with tqdm(total=len(jobs), initial=len(jobs) - len(todo), disable=not progress, unit="job") as bar:
        for job, error in _run(todo, work, folder, workers, executor):
            bar.update()
            if error is not None:
                failures.setdefault(error, []).append(job.key)
    if failures:
        said = [
            (keys[0] + (f" and {len(keys) - 1} more" if keys[1:] else ""), e) for e, keys in failures.items()
        ]
        listed = "\n".join(f"{who}: {error}" for who, error in said[:10])
        raise CausalCellError(
            f"{sum(map(len, failures.values()))} of {len(jobs)} jobs failed; run the study again to retry "
            f"them:\n{listed}"
        )
    rows = [json.loads((folder / f"{job.key}.json").read_text()) for job in jobs]
    return pd.DataFrame(rows)


def finished(out: str | Path, **arguments: Any) -> pd.DataFrame:
    """Every job that has a result in a study's folder, of this call or an earlier one.

    Args:
        out: Folder of the study.
        **arguments: Only jobs that were called with these.

    Returns:
        As :func:`run_jobs`, ordered by file name.
    """
    rows = [json.loads(file.read_text()) for file in sorted((Path(out) / "jobs").glob("*.json"))]
    return pd.DataFrame([row for row in rows if arguments.items() <= row["arguments"].items()])


class _Pool(Protocol):
    """Workers that jobs are given to, one each."""

    died: tuple[type[Exception], ...]
    """What a call ends with when its worker is gone."""

    def submit(self, *arguments: Any) -> Future[str | None]:
        """Call :func:`_one` on a free worker."""

    def close(self) -> None:
        """End the workers."""


def _run(
    todo: Sequence[Job], work: Work, folder: Path, workers: int, executor: Executor
) -> Iterator[tuple[Job, str | None]]:
    """Each job as it ends, with what went wrong."""
    if not todo:
        return
    workers = min(workers, len(todo))
    waiting, deaths = deque(todo), Counter[str]()
    running: dict[Future[str | None], Job] = {}
    pool = _EXECUTORS[executor](workers)
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.popleft()
                running[pool.submit(job, work, folder, Path.cwd())] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                if not isinstance(future.exception(), pool.died):
                    yield job, future.result()  # raises where Ctrl-C reached the worker
                elif deaths[job.key] < RETRIES:
                    deaths[job.key] += 1
                    waiting.append(job)
                else:
                    yield job, f"its worker process died {RETRIES + 1} times (out of memory?)"
    finally:
        pool.close()


class _Processes:
    """Processes of this machine.

    Every worker is a pool of its own: a pool loses all its jobs when one of its processes dies.
    """

    died: tuple[type[Exception], ...] = (BrokenProcessPool,)

    def __init__(self, workers: int):
        self.pools = [self._worker() for _ in range(workers)]
        self.calls: list[Future[str | None] | None] = [None] * workers

    def submit(self, *arguments: Any) -> Future[str | None]:
        free = next(w for w, call in enumerate(self.calls) if call is None or call.done())
        try:
            call = self.pools[free].submit(_one, *arguments)
        except BrokenProcessPool:
            self.pools[free] = self._worker()
            call = self.pools[free].submit(_one, *arguments)
        self.calls[free] = call
        return call

    def close(self) -> None:
        for pool in self.pools:
            pool.shutdown(cancel_futures=True)

    @staticmethod
    def _worker() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_end_with_parent)


class _Ray:
    """Workers of a Ray cluster: the one that is joined already, one that runs, or one that is started."""

    def __init__(self, workers: int):
        try:
            import ray
        except ImportError as error:
            raise CausalCellError(
                "the executor 'ray' needs Ray, which is not installed: pip install 'pyro-causalcell[ray]'"
            ) from error
        self.ray, self.joined = ray, ray.is_initialized()
        if not self.joined:
            ray.init()
        errors = ray.exceptions
        self.died: tuple[type[Exception], ...] = (
            errors.WorkerCrashedError,
            errors.NodeDiedError,
            errors.OutOfMemoryError,
        )
        # Ray's own retries are off: they would not be counted
        self.remote = ray.remote(max_retries=0, num_cpus=1)(_one)
        self.calls: list[Any] = []

    def submit(self, *arguments: Any) -> Future[str | None]:
        call = self.remote.remote(*arguments)
        self.calls.append(call)
        future: Future[str | None] = call.future()
        return future

    def close(self) -> None:
        for call in self.calls:  # nothing happens to those that have ended
            self.ray.cancel(call, force=True)
        if not self.joined:
            self.ray.shutdown()


_EXECUTORS: Mapping[str, Callable[[int], _Pool]] = {"processes": _Processes, "ray": _Ray}


def _end_with_parent() -> None:
    """End this worker when the study is killed: it would go on training for nobody."""

    def watch() -> None:
        parent = parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    Thread(target=watch, daemon=True).start()


def _one(job: Job, work: Work, folder: Path, place: Path) -> str | None:
    """Run a job and write its result; returns what went wrong."""
    start = time.perf_counter()
    try:
        os.chdir(place)  # a worker of a cluster starts elsewhere, but jobs may name files
        scores = work(job, folder / job.key)
        row = {"setting": job.setting, "method": job.method, "seed": job.seed, **scores}
        row["arguments"] = dict(job.arguments)
        row["seconds"] = time.perf_counter() - start
        part = folder / f".{job.key}.part"
        part.write_text(json.dumps(row, indent=1))
        os.replace(part, folder / f"{job.key}.json")
    except Exception as error:  # whatever a job may do; not every error can be sent to another process
        return f"{type(error).__name__}: {error}"
    return None


def summarise(study: str, rows: pd.DataFrame, paper: Paper, metrics: Sequence[str]) -> pd.DataFrame:
    """Mean and spread over seeds, with the paper's number beside it.

    Args:
        study: Name of the study.
        rows: One row per job.
        paper: The paper's numbers.
        metrics: Columns of ``rows`` to summarise, in the order of the table.

    Returns:
        Columns study, setting, method, metric, mean, sd (over seeds, ddof 1), n_seeds, paper.
    """
    table = []
    for (setting, method), group in rows.groupby(["setting", "method"], sort=False):
        for metric in metrics:
            column = group[metric] if metric in group else pd.Series(dtype=float)
            values = pd.to_numeric(column, errors="coerce").dropna()
            if len(values):
                number = paper.get((str(setting), str(method), metric))
                mean, sd = float(values.mean()), float(values.std()) if len(values) > 1 else float("nan")
                table.append([study, setting, method, metric, mean, sd, len(values), number])
    columns = ["study", "setting", "method", "metric", "mean", "sd", "n_seeds", "paper"]
    return pd.DataFrame(table, columns=columns)


def markdown(table: pd.DataFrame, labels: Mapping[str, str]) -> str:
    """A Markdown table per setting: methods × metrics, ours ± sd over seeds, the paper's in brackets.

    Args:
        table: What :func:`summarise` gave.
        labels: Metric -> heading.
    """
    parts = []
    for setting, block in table.groupby("setting", sort=False):
        metrics = [m for m in labels if m in set(block["metric"])]
        lines = [
            f"### {setting}",
            "",
            "| method | " + " | ".join(labels[m] for m in metrics) + " | seeds |",
            "|---" * (len(metrics) + 2) + "|",
        ]
        for method, rows in block.groupby("method", sort=False):
            by_metric = rows.set_index("metric")
            cells = [_cell(by_metric.loc[m]) if m in by_metric.index else "–" for m in metrics]
            lines.append(f"| {method} | " + " | ".join(cells) + f" | {int(rows['n_seeds'].max())} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def write_table(
    table: pd.DataFrame, out: Path, labels: Mapping[str, str], note: str, quick: bool, more: str = ""
) -> None:
    """Write ``table.csv``, and the same as a page of tables, ``table.md``.

    Args:
        table: What :func:`summarise` gave.
        out: Folder.
        labels: Metric -> heading.
        note: What a reader of the page has to know first.
        quick: Whether it is the quick size; the page says so.
        more: Further Markdown, below the tables.
    """
    table.to_csv(out / "table.csv", index=False)
    size = "**Quick size: shows that the study runs, not how good the methods are.**\n\n" if quick else ""
    (out / "table.md").write_text(f"{size}{note}\n\n{markdown(table, labels)}{more}")


def _cell(row: pd.Series) -> str:
    digits = 1 if abs(row["mean"]) >= 20 else 3
    text = f"{row['mean']:.{digits}f}"
    if pd.notna(row["sd"]):
        text += f" ± {row['sd']:.{digits}f}"
    return text if pd.isna(row["paper"]) else f"{text} ({row['paper']:g})"


def differences_table(block: pd.DataFrame, title: str, row: str, metrics: Mapping[str, str]) -> str:
    """Paired differences in Markdown, with intervals; bold where they are on the better side of zero.

    Args:
        block: Columns metric, difference, low, high, better, and that of ``row``.
        title: Heading.
        row: Column whose values make the rows.
        metrics: Columns of the table, with their headings.
    """
    lines = [f"\n### {title}\n", f"| {row} | " + " | ".join(metrics.values()) + " |"]
    lines.append("|---" * (len(metrics) + 1) + "|")
    for name, rows in block.groupby(row, sort=False):
        by_metric = rows.set_index("metric")
        cells = [_interval(by_metric.loc[m]) if m in by_metric.index else "–" for m in metrics]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _interval(row: pd.Series) -> str:
    text = f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
    clear = row["better"] and abs(row["difference"]) >= 5e-4  # not a difference of rounding
    return f"**{text}**" if clear else text
