"""Run the jobs of a study: in parallel, once each, resumable; then write table and figures."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from pyro_causalcell.errors import CausalCellError

__all__ = ["Job", "Paper", "markdown", "run_jobs", "summarise"]

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


def run_jobs(
    jobs: Sequence[Job],
    work: Callable[[Job], Scores],
    out: str | Path,
    *,
    workers: int = 1,
    progress: bool = True,
) -> pd.DataFrame:
    """Run every job that has no result yet; each result is a JSON file of its own.

    A killed run goes on where it stopped: finished jobs are read, not run again. A worker that dies takes
    only its job with it; the job is tried again by the next call.

    Args:
        jobs: The grid.
        work: Scores of one job; must be importable (it runs in worker processes).
        out: Folder of the study; results go to ``out/jobs``.
        workers: Worker processes.
        progress: Show a progress bar.

    Returns:
        One row per job: setting, method, seed, and the scores.

    Raises:
        CausalCellError: Some jobs failed; what they said is listed, the others are kept.
    """
    folder = Path(out) / "jobs"
    folder.mkdir(parents=True, exist_ok=True)
    todo = [job for job in jobs if not (folder / f"{job.key}.json").exists()]
    failures: list[str] = []
    with tqdm(total=len(jobs), initial=len(jobs) - len(todo), disable=not progress, unit="job") as bar:
        while todo:
            lost = _run_pool(todo, work, folder, workers, failures, bar)
            if len(lost) == len(todo):  # a pool that dies before it finishes anything will not get better
                failures += [f"{job.key}: its worker process died" for job in lost]
                break
            todo = lost
    if failures:
        listed = "\n".join(failures[:10])
        raise CausalCellError(
            f"{len(failures)} of {len(jobs)} jobs failed; run the study again to retry them:\n{listed}"
        )
    rows = [json.loads((folder / f"{job.key}.json").read_text()) for job in jobs]
    return pd.DataFrame(rows)


def _run_pool(
    todo: list[Job],
    work: Callable[[Job], Scores],
    folder: Path,
    workers: int,
    failures: list[str],
    bar: Any,
) -> list[Job]:
    """Run jobs in a fresh pool; returns those lost to a worker that died."""
    lost = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(_one, job, work, folder): job for job in todo}
        for future in as_completed(futures):
            job = futures[future]
            try:
                future.result()
                bar.update()
            except BrokenProcessPool:
                lost.append(job)
            except Exception as error:
                failures.append(f"{job.key}: {type(error).__name__}: {error}")
    return lost


def _one(job: Job, work: Callable[[Job], Scores], folder: Path) -> None:
    start = time.perf_counter()
    scores = work(job)
    row = {"setting": job.setting, "method": job.method, "seed": job.seed, **scores}
    row["seconds"] = time.perf_counter() - start
    part = folder / f".{job.key}.part"
    part.write_text(json.dumps(row, indent=1))
    os.replace(part, folder / f"{job.key}.json")


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
            values = pd.to_numeric(group[metric], errors="coerce").dropna() if metric in group else []
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


def _cell(row: pd.Series) -> str:
    digits = 1 if abs(row["mean"]) >= 20 else 3
    text = f"{row['mean']:.{digits}f}"
    if pd.notna(row["sd"]):
        text += f" ± {row['sd']:.{digits}f}"
    return text if pd.isna(row["paper"]) else f"{text} ({row['paper']:g})"
