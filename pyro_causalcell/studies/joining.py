"""Unpaired snapshots: what each way of joining them makes of the lagged effects between programmes.

Four programmes, nine conditions, four snapshots of different cells, everything linear and the programmes
observed, so that nothing but the joining is tested. All data is simulated.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch import Tensor

from pyro_causalcell.distributions import PopulationNormal, TransitionMixture, TransportMixture
from pyro_causalcell.penalties import potentials, sinkhorn_divergence, transport_cost
from pyro_causalcell.simulate import linear_snapshots
from pyro_causalcell.studies.runner import Executor, Job, Scores, run_jobs, summarise, write_table

__all__ = ["METHODS", "run"]

STUDY = "joining"
EDGES = ((1, 0), (2, 1), (3, 0))
"""Lagged effects that are there: of the second programme on the first, ..."""
Snapshots = dict[tuple[str, float], np.ndarray]


def independent_pairs(cells: Snapshots, seed: int = 0) -> np.ndarray:
    """Regression on a random cell of the snapshot before, as the CITE-VAE paper pairs cells."""
    rng = np.random.default_rng(seed)
    return _regressed(cells, lambda before, after: (before[rng.permutation(len(before))], after))


def optimal_transport(cells: Snapshots) -> np.ndarray:
    """Regression on the cell that optimal transport pairs a cell with, after centring."""

    def paired(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        cost = cdist(before - before.mean(0), after - after.mean(0), "sqeuclidean")
        rows, columns = linear_sum_assignment(cost)
        return before[rows], after[columns]

    return _regressed(cells, paired)


def entropic_transport(cells: Snapshots, blur: float = 0.3) -> np.ndarray:
    """Regression on a cell drawn from those that entropic transport couples a cell with, after centring."""
    generator = torch.Generator().manual_seed(0)

    def paired(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        before_mk, after_sk = (torch.from_numpy(part - part.mean(0)) for part in (before, after))
        cost_ms = transport_cost(before_mk, after_sk, blur)
        f_m, g_s = potentials(cost_ms, 100)
        plan_ms = (f_m[:, None] + g_s - cost_ms).exp()
        return before[plan_ms.T.multinomial(1, generator=generator).squeeze(1)], after

    return _regressed(cells, paired)


def population_means(cells: Snapshots) -> np.ndarray:
    """Regression of means on the means of the snapshot before."""
    return _regressed(cells, lambda before, after: (before.mean(0)[None], after.mean(0)[None]))


def population_prior(
    cells: Snapshots, law: Callable[[Tensor, Tensor, Tensor], Tensor], steps: int = 600, n_cells: int = 256
) -> np.ndarray:
    """Maximum likelihood where the past of a cell is any cell of the snapshot before, each as likely."""
    torch.manual_seed(0)
    conditions = sorted({condition for condition, _ in cells})
    starts, pairs = _starts(cells), [tuple(map(torch.tensor, pair)) for pair in _steps(cells)]
    n = pairs[0][0].shape[1]
    weight_kk, log_sd_k = torch.zeros(n, n, requires_grad=True), torch.zeros(n, requires_grad=True)
    shift_ck = torch.zeros(len(conditions), n, requires_grad=True)
    optimizer = torch.optim.Adam([weight_kk, log_sd_k, shift_ck], lr=0.02)
    for _ in range(steps):
        loss = torch.zeros(())
        for place in torch.randperm(len(pairs))[:9]:
            before, after = (part[torch.randperm(len(part))[:n_cells]] for part in pairs[place])
            shift_k = shift_ck[conditions.index(starts[place][0])]
            loss = loss - law(before @ weight_kk.T + shift_k, log_sd_k, after).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weight_kk.detach().numpy()


def mixture(loc_mk: Tensor, log_sd_k: Tensor, z_nk: Tensor) -> Tensor:
    """log p(z): the mixture of the transitions of all pasts m."""
    parts = (loc_mk, log_sd_k, torch.exp(-2 * log_sd_k), torch.zeros_like(loc_mk))
    return TransitionMixture(*parts).log_prob(z_nk)


def moved_transport(loc_mk: Tensor, log_sd_k: Tensor, z_nk: Tensor, blur: float = 0.3) -> Tensor:
    """log p(z) where entropic transport couples cells with where the pasts have moved, as both change."""
    parts = (loc_mk, log_sd_k, torch.exp(-2 * log_sd_k), torch.zeros_like(loc_mk))
    price_m, _ = potentials(transport_cost(loc_mk.detach(), z_nk, blur))
    return TransportMixture(TransitionMixture(*parts), price_m, blur).log_prob(z_nk)


def sinkhorn(loc_mk: Tensor, log_sd_k: Tensor, z_nk: Tensor, blur: float = 0.3) -> Tensor:
    """Minus the Sinkhorn divergence of the cells from draws of their transitions."""
    drawn_mk = loc_mk + log_sd_k.exp() * torch.randn_like(loc_mk)
    return -sinkhorn_divergence(drawn_mk, z_nk, blur)


def moments(loc_mk: Tensor, log_sd_k: Tensor, z_nk: Tensor) -> Tensor:
    """log p(z): the normal with the moments of those transitions, the default of ``temporal-scm``."""
    covariance_kk = loc_mk.T.cov() + torch.diag(torch.exp(2 * log_sd_k))
    return PopulationNormal(loc_mk.mean(0), torch.linalg.cholesky(covariance_kk)).log_prob(z_nk)


def _starts(cells: Snapshots) -> list[tuple[str, float]]:
    """Condition and time of every snapshot that another one of its condition follows."""
    return [(c, t) for c, t in sorted(cells) if (c, t + 1) in cells]


def _steps(cells: Snapshots) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(cells[c, t], cells[c, t + 1]) for c, t in _starts(cells)]


def _regressed(
    cells: Snapshots, paired: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
    """Effects of the earlier on the later, with an intercept for each condition."""
    pairs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for (condition, _), step in zip(_starts(cells), _steps(cells), strict=True):
        pairs.setdefault(condition, []).append(paired(*step))
    joined = [[np.concatenate(side) for side in zip(*group, strict=True)] for group in pairs.values()]
    before, after = (
        np.concatenate([part - part.mean(0) for part in side]) for side in zip(*joined, strict=True)
    )
    return np.linalg.lstsq(before, after, rcond=None)[0].T


METHODS: dict[str, Callable[..., np.ndarray]] = {
    "independent pairs": independent_pairs,
    "optimal transport": optimal_transport,
    "optimal transport, entropic": entropic_transport,
    "population means": population_means,
    "population prior, mixture": partial(population_prior, law=mixture),
    "population prior, moments": partial(population_prior, law=moments),
    "transport to moved cells": partial(population_prior, law=moved_transport, n_cells=128),
    "Sinkhorn divergence": partial(population_prior, law=sinkhorn, n_cells=128),
}
"""Ways of joining snapshots -> matrix of effects of programmes (columns) on programmes (rows)."""


METRICS = {f"self_{i + 1}": f"{i + 1} → {i + 1}" for i in range(4)} | {
    f"{j + 1}_on_{i + 1}": f"{j + 1} → {i + 1}" for i, j in EDGES
}
"""Effects that are reported -> headings."""

NOTE = (
    "Simulated data: linear, programmes observed, 9 conditions x 4 snapshots x 600 unpaired cells. Every "
    "effect of a programme on one a step later that is not zero, mean ± standard deviation over simulations."
)


def run(
    out: str | Path,
    *,
    seeds: int = 5,
    workers: int = 1,
    executor: Executor = "processes",
    quick: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Run the study, or go on with it.

    Args:
        out: Folder of results: ``jobs/``, ``rows.csv``, ``table.csv``, ``table.md``.
        seeds: Simulations.
        workers: Fits that run side by side.
        executor: What runs them, see :func:`run_jobs`.
        quick: Few gradient steps and one simulation: shows that the study runs, nothing more.
        progress: Show a progress bar.

    Returns:
        The table: what each way of joining finds of the effects that are there, the truth first.
    """
    arguments = {"steps": 5 if quick else 600}
    jobs = [
        Job(STUDY, "linear", method, seed, arguments)
        for method in ("truth", *METHODS)
        for seed in range(1 if quick else seeds)
    ]
    rows = run_jobs(jobs, score_job, out, workers=workers, executor=executor, progress=progress)
    rows.drop(columns="arguments").to_csv(Path(out) / "rows.csv", index=False)
    table = summarise(STUDY, rows, {}, list(METRICS))
    write_table(table, Path(out), METRICS, NOTE, quick)
    return table


def score_job(job: Job, folder: Path) -> Scores:
    """Effects that one way of joining finds in one simulation."""
    torch.set_num_threads(1)
    adata = linear_snapshots(effect=2.0, seed=job.seed)
    x = adata.X.astype(np.float32)
    groups = adata.obs.groupby(["target", "time"], observed=True).indices
    cells = {key: x[rows] for key, rows in groups.items()}
    weight_kk = np.asarray(adata.uns["simulation"]["weight_kk"])
    if job.method != "truth":
        method = METHODS[job.method]
        own = {"steps": job.arguments["steps"]} if isinstance(method, partial) else {}
        weight_kk = method(cells, **own)
    found = {f"self_{i + 1}": float(weight_kk[i, i]) for i in range(4)}
    return found | {f"{j + 1}_on_{i + 1}": float(weight_kk[i, j]) for i, j in EDGES}
