"""Importance-weighted likelihood of held-out cells, whether to trust it, and comparison of models by it."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import arviz as az
import numpy as np
import pandas as pd
import pyro
import torch
import xarray as xr
from pyro import distributions as dist
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor
from tqdm import tqdm

from pyro_causalcell.batch import Batch
from pyro_causalcell.data import Minibatches, Screen
from pyro_causalcell.errors import DataError, PredictionError
from pyro_causalcell.inference import Fit
from pyro_causalcell.inference.engine import keep_freed_memory
from pyro_causalcell.inference.posterior import is_local, sample_sites
from pyro_causalcell.predict import global_means

__all__ = ["Proposal", "compare_likelihoods", "interventional_nll", "iw_nll"]

Program = Callable[[Batch], object]

BYTES_PER_VALUE = 4 * 6
"""Memory of one gene of one particle: six float32 tensors live at once."""
STUDENT_DF = 10.0
"""Degrees of freedom of the fitted proposal: its tails cover those of the posterior."""
ROUND_PARTICLES = 500
"""Particles of one round of fitting."""
PRIOR_PARTICLES = 20.0
"""Effective particles at which old and new moments weigh the same."""
PARTICLES_AT_ONCE = 1000
"""Particles of a cell that are drawn together, where they fit the budget."""
SCORED_AT_ONCE = 250
"""Particles of a cell that a processor scores together: they share the terms without particles."""
VALUES_AT_ONCE = 4_000_000
"""Particles × cells × genes that each thread of a processor scores at once: more leave its cache, with fewer
the calls of the model cost more than the values."""
BAD_SHARE = 0.01
"""Share of cells with bad Pareto k above which a model is not ranked."""
ADVICE = "use more particles, more rounds (n_rounds) for the proposal, or a better guide"
COMPARISON = [
    "rank",
    "elpd",
    "se",
    "elpd_per_cell",
    "elpd_diff",
    "dse",
    "dse_clusters",
    "mc_se",
    "bad_k",
    "ranked",
    "reason",
]
"""Columns of a comparison."""


def iw_nll(
    fit: Fit,
    screen: Screen,
    rows: np.ndarray | None = None,
    *,
    n_particles: int = 1000,
    n_rounds: int = 2,
    memory_budget_gb: float = 0.5,
    seed: int = 0,
    progress: bool = False,
) -> xr.Dataset:
    """Importance-weighted negative log-likelihood of each cell.

    −log 1/T Σ_t p(x, z_t | u) / q(z_t | x, u), with the global latents at their posterior means (gates
    rounded). q starts at the guide and is fitted to each cell's posterior in a few rounds (see
    :class:`Proposal`); ``n_rounds=0`` takes the guide itself, as the paper does. Particles are drawn in
    chunks that fit the memory budget; the weights alone are kept, for Pareto smoothing.

    Args:
        fit: The fit.
        screen: The cells, through the fit's names (``Screen.from_spec(fit.screen, adata)``).
        rows: Which cells; None is all.
        n_particles: Particles T.
        n_rounds: Rounds in which the proposal is fitted; 0 uses the guide.
        memory_budget_gb: Memory that a chunk of particles × cells × genes may take, in GiB.
        seed: Seed of the particles. Results do not depend on the budget beyond rounding and draws.
        progress: Show a progress bar.

    Returns:
        Variables over ``cell``: ``nll`` (nats), ``pareto_k`` (below 0.7 the estimate can be trusted),
        ``ess`` (effective particles), ``mc_se`` (standard error of nll, nats).

    Source: Burda et al., ICLR 2016; Vehtari et al., JMLR 2024 (Pareto smoothing).
    """
    rows = np.arange(screen.n_cells) if rows is None else np.asarray(rows)
    fixed = global_means(fit)
    model, guide = (poutine.condition(m, data=fixed) for m in (fit.model, fit.guide))
    n_chunk = _cells_per_chunk(screen.n_genes, n_particles, fit.device, memory_budget_gb)
    batches = Minibatches(screen, rows, n_chunk, shuffle=False, device=fit.device)
    parts = []
    with torch.random.fork_rng(devices=[fit.device] if fit.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for batch in tqdm(batches, disable=not progress, unit="batch"):
            proposal = Proposal(model, guide, batch, batch, memory_budget_gb)
            proposal.fit(n_rounds)
            parts.append(_summary([weights for weights, _ in proposal.particles(n_particles)]))
    return _dataset(screen, rows, np.concatenate(parts, 1), n_particles, seed)


def compare_likelihoods(scores: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """Which model gives unseen cells the higher likelihood, and how sure that is.

    The table of ``arviz.compare``, for importance-weighted likelihoods. Cells share a perturbation, so the
    standard error of a difference is given twice: over cells, and over perturbations as clusters; trust
    the larger. A model whose importance weights are bad is not ranked, whatever its number: the estimate
    may be off by more than the difference. It is bad if Pareto k is above min(1 − 1/log10 T, 0.7) in more
    than one cell of a hundred, T being the particles, or if leaving those cells out would turn the order
    round.

    Args:
        scores: Name of each model -> what :func:`iw_nll` or :func:`interventional_nll` gave, for the same
            cells (their order is free).

    Returns:
        One row per model, best first, those that are not ranked last:

        - ``rank``: 0 is best; missing where not ranked.
        - ``elpd``, ``se``: sum of the cells' log-likelihoods in nats, and its standard error over cells.
        - ``elpd_per_cell``: the same per cell.
        - ``elpd_diff``, ``dse``, ``dse_clusters``: how far below the best, in nats, with the standard errors
          of the paired difference over cells and over perturbations; missing where not ranked.
        - ``mc_se``: Monte Carlo standard error of ``elpd``.
        - ``bad_k``: share of cells whose Pareto k is bad or unknown.
        - ``ranked``, ``reason``: whether the model takes part, and if not, why and what to do.

    Raises:
        DataError: There are fewer than two models, or they were not scored on the same cells and values.

    Source: Vehtari et al., Statistics and Computing 2017 (paired differences); Vehtari et al., JMLR 2024
    (limit of Pareto k); Cameron and Miller, Journal of Human Resources 2015 (clusters).
    """
    _check_comparable(scores)
    first = next(iter(scores.values()))
    aligned = {name: table.sel(cell=first["cell"]) for name, table in scores.items()}
    elpd_n = {name: -table["nll"].to_numpy() for name, table in aligned.items()}
    good_n = {name: _good_k(table) for name, table in aligned.items()}
    condition_n = pd.factorize(first["condition"].to_numpy())[0]
    reason = {name: _unreliable(good_n[name], aligned[name].attrs["n_particles"]) for name in scores}
    reliable = [name for name in scores if not reason[name]]
    best = max(reliable, key=lambda name: elpd_n[name].sum(), default="")
    gap_n = {name: elpd_n[best] - elpd_n[name] for name in reliable}
    for name in reliable:
        if gap_n[name][good_n[best] & good_n[name]].sum() < 0:
            reason[name] = f"cells of bad Pareto k decide its order against {best}; {ADVICE}"
    if best and all(reason[name] for name in scores if name != best):
        reason[best] = "no other model can be ranked, so there is nothing to rank it against"
    rows = {}
    for name, table in aligned.items():
        n, elpd = len(elpd_n[name]), elpd_n[name].sum()
        rows[name] = {
            "elpd": elpd,
            "se": math.sqrt(n * elpd_n[name].var()),
            "elpd_per_cell": elpd / n,
            "mc_se": float(np.sqrt((table["mc_se"].to_numpy() ** 2).sum())),
            "bad_k": float(1 - good_n[name].mean()),
            "ranked": not reason[name],
            "reason": reason[name],
        }
        if not reason[name]:
            rows[name] |= {
                "elpd_diff": gap_n[name].sum(),
                "dse": math.sqrt(n * gap_n[name].var()),
                "dse_clusters": _cluster_se(gap_n[name], condition_n),
            }
    result = pd.DataFrame.from_dict(rows, orient="index").reindex(columns=COMPARISON[1:])
    result = result.sort_values(["ranked", "elpd"], ascending=False, kind="stable")
    result.insert(0, "rank", pd.array(np.arange(len(result)), dtype="Int64"))
    result.loc[~result["ranked"], "rank"] = pd.NA
    return result


def _check_comparable(scores: Mapping[str, xr.Dataset]) -> None:
    if len(scores) < 2:
        raise DataError(f"expected the likelihoods of at least 2 models, found {list(scores)}.")
    (first_name, first), *others = scores.items()
    cells = set(first["cell"].to_numpy())
    for name, table in others:
        differing = cells ^ set(table["cell"].to_numpy())
        if differing or table.sizes["cell"] != first.sizes["cell"]:
            raise DataError(
                f"expected the same cells for every model, found {len(differing)} that only one of "
                f"{first_name!r} and {name!r} was scored on. Score both with the same rows."
            )
        values = [(t.attrs.get("x"), t.attrs.get("n_genes")) for t in (first, table)]
        if values[0] != values[1]:
            raise DataError(
                f"expected likelihoods of the same values, found {first_name!r} scored on {values[0][0]} "
                f"with {values[0][1]} genes and {name!r} on {values[1][0]} with {values[1][1]}. Likelihoods "
                "of other units or genes cannot be compared."
            )


def _good_k(table: xr.Dataset) -> np.ndarray:
    """Cells whose Pareto k is known and small enough for the number of particles."""
    n_particles = table.attrs["n_particles"]
    if n_particles <= 10:
        return np.zeros(table.sizes["cell"], dtype=bool)
    return table["pareto_k"].to_numpy() <= min(1 - 1 / math.log10(n_particles), 0.7)


def _unreliable(good_n: np.ndarray, n_particles: int) -> str:
    """Why a model cannot be ranked; empty if it can."""
    share = 1 - good_n.mean()
    if share <= BAD_SHARE:
        return ""
    return f"Pareto k is bad in {share:.1%} of cells at {n_particles} particles; {ADVICE}"


def _cluster_se(gap_n: np.ndarray, cluster_n: np.ndarray) -> float:
    """Standard error of a sum whose terms are dependent within clusters."""
    sum_c = np.bincount(cluster_n, gap_n - gap_n.mean())
    n_clusters = len(sum_c)
    return math.sqrt((sum_c**2).sum() * n_clusters / (n_clusters - 1)) if n_clusters > 1 else math.nan


class Proposal:
    """Where the particles of some cells come from: the guide, or a Student fitted to its weighted particles.

    A mean-field guide leaves out the correlations of a cell's latents, which makes weights uneven. A few
    rounds of particles correct location and covariance; the draws that are scored are fresh, so the
    estimate of p(x) stays unbiased.

    Args:
        model, guide: Programs whose global latents are fixed (by ``poutine.condition``).
        model_batch, guide_batch: The cells, as each of them is to see them.
        memory_budget_gb: Memory that particles × cells × genes may take at once, in GiB.

    Source: adaptive importance sampling, Cappé et al., Statistics and Computing 2008.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        model_batch: Batch,
        guide_batch: Batch,
        memory_budget_gb: float = 0.5,
    ):
        self.model, self.guide, self.model_batch, self.guide_batch = model, guide, model_batch, guide_batch
        keep_freed_memory()
        n_genes = 1 if model_batch.x_ng is None else model_batch.x_ng.shape[-1]
        at_once = _values_at_once(model_batch.u_np.device, memory_budget_gb)
        self.piece = max(1, at_once // (model_batch.n_cells * n_genes))
        sites = sample_sites(poutine.trace(guide).get_trace(guide_batch))
        local = [s for s in sites.values() if is_local(s) and not s["is_observed"]]
        self.widths = {s["name"]: s["fn"].event_shape[-1] for s in local}
        fitting = int(memory_budget_gb * 2**30 / BYTES_PER_VALUE)
        n_values = model_batch.n_cells * sum(self.widths.values()) ** 2  # of the Student's covariance
        self.step = max(1, min(PARTICLES_AT_ONCE, fitting // n_values))
        self.loc_nk = torch.cat([s["fn"].mean for s in local], -1)
        self.cov_nkk = torch.diag_embed(torch.cat([s["fn"].variance for s in local], -1))
        self.fitted = False

    def fit(self, n_rounds: int) -> None:
        """Move location and covariance towards the posterior's, ``n_rounds`` times."""
        for _ in range(n_rounds):
            log_weight_sn, z_snk = self._student(ROUND_PARTICLES)
            weight_sn = log_weight_sn.softmax(0)
            trust_n = 1 / (weight_sn**2).sum(0)
            trust_n = (trust_n / (trust_n + PRIOR_PARTICLES)).unsqueeze(-1)
            mean_nk = torch.einsum("sn,snk->nk", weight_sn, z_snk)
            centred = z_snk - mean_nk
            seen_nkk = torch.einsum("sn,snk,snl->nkl", weight_sn, centred, centred)
            gap_nk = mean_nk - self.loc_nk
            between = trust_n * (1 - trust_n)
            self.cov_nkk = (
                trust_n.unsqueeze(-1) * seen_nkk
                + (1 - trust_n).unsqueeze(-1) * self.cov_nkk
                + between.unsqueeze(-1) * gap_nk.unsqueeze(-1) * gap_nk.unsqueeze(-2)
            )
            self.loc_nk = self.loc_nk + trust_n * gap_nk
        self.fitted = self.fitted or n_rounds > 0

    def particles(self, n_particles: int) -> Iterator[tuple[Tensor, Tensor]]:
        """log p(x, z_s | u) − log q(z_s | x, u) [s, n] and the draws [s, n, k], some particles at a time."""
        for start in range(0, n_particles, self.step):
            size = min(self.step, n_particles - start)
            yield self._student(size) if self.fitted else self._guided(size)

    def _guided(self, n: int) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), pyro.validation_enabled(False):
            trace = poutine.trace(pyro.plate("particles", n, dim=-2)(self.guide)).get_trace(self.guide_batch)
            sites = [site for site in sample_sites(trace).values() if is_local(site)]
            log_q_sn = _total([site["fn"].log_prob(site["value"]) for site in sites])
            drawn = {name: trace.nodes[name]["value"] for name in self.widths}
            log_weight_sn = self._log_joint(drawn, n) - log_q_sn
        return log_weight_sn, torch.cat(list(drawn.values()), -1)

    def _student(self, n: int) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), pyro.validation_enabled(False):
            jitter_kk = 1e-6 * torch.eye(self.cov_nkk.shape[-1]).to(self.cov_nkk)
            tril_nkk = torch.linalg.cholesky(self.cov_nkk + jitter_kk)
            q = dist.MultivariateStudentT(self.loc_nk.new_tensor(STUDENT_DF), self.loc_nk, tril_nkk)
            weights, draws = [], []
            for start in range(0, n, self.step):
                z_snk = q.sample(torch.Size([min(self.step, n - start)]))
                drawn = dict(zip(self.widths, z_snk.split(list(self.widths.values()), -1), strict=True))
                weights.append(self._log_joint(drawn, len(z_snk)) - q.log_prob(z_snk))
                draws.append(z_snk)
        return torch.cat(weights), torch.cat(draws)

    def _log_joint(self, drawn: dict[str, Tensor], n: int) -> Tensor:
        """log p(x, z_s | u) [s, n], some particles at a time."""
        parts = []
        for start in range(0, n, self.piece):
            some = {name: value[start : start + self.piece] for name, value in drawn.items()}
            with _CellScores(some) as scores, pyro.plate("particles", min(self.piece, n - start), dim=-2):
                self.model(self.model_batch)
            parts.append(_total(scores.terms))
        return torch.cat(parts)


class _ReplacePrior(Messenger):
    """Give a site of the model a Normal prior of unit variance around another mean.

    Args:
        site: Name of the latent.
        loc_k: The mean.
    """

    def __init__(self, site: str, loc_k: Tensor):
        super().__init__()
        self.site, self.loc_k = site, loc_k

    def _pyro_sample(self, msg: Message) -> None:
        if msg["name"] == self.site:
            msg["fn"] = dist.Normal(self.loc_k, 1.0).to_event(1)


class _CellScores(Messenger):
    """Give values to some latents and keep log p of the cells' sites, without plate scales.

    A trace would also keep what lies between.

    Args:
        values: Site name -> value.
    """

    def __init__(self, values: Mapping[str, Tensor]):
        super().__init__()
        self.values = values
        self.terms: list[Tensor] = []

    def _pyro_sample(self, msg: Message) -> None:
        value = self.values.get(str(msg["name"]))
        if value is not None:
            msg["value"], msg["done"] = value, True

    def _pyro_post_sample(self, msg: Message) -> None:
        if is_local(msg) and type(msg["fn"]).__name__ != "_Subsample":
            self.terms.append(msg["fn"].log_prob(msg["value"]))


def _total(terms: Sequence[Tensor]) -> Tensor:
    """Sum over sites, shape s, n."""
    return torch.stack(torch.broadcast_tensors(*terms)).sum(0)


def _dataset(
    screen: Screen, rows: np.ndarray, columns: np.ndarray, n_particles: int, seed: int
) -> xr.Dataset:
    names = ["nll", "pareto_k", "ess", "mc_se"]
    cells = screen.adata.obs_names.to_numpy()[rows].astype(str)
    return xr.Dataset(
        {name: ("cell", column) for name, column in zip(names, columns, strict=True)},
        coords={"cell": cells, "condition": ("cell", _condition_names(screen, rows))},
        attrs={
            "n_particles": n_particles,
            "units": "nats per cell",
            "seed": seed,
            "x": screen.describe().layer or "X",
            "n_genes": screen.n_genes,
        },
    )


def _summary(chunks: Sequence[Tensor]) -> np.ndarray:
    """NLL, Pareto k, effective sample size and standard error of each cell, shape 4, n."""
    log_weight_sn = torch.cat(list(chunks)).double().cpu().numpy()
    n_particles, n_cells = log_weight_sn.shape
    top_n = log_weight_sn.max(0)
    weight_sn = np.exp(log_weight_sn - top_n)
    nll_n = -(np.log(weight_sn.mean(0)) + top_n)
    ess_n = weight_sn.sum(0) ** 2 / (weight_sn**2).sum(0)
    if n_particles == 1:  # nothing to compare it with
        return np.stack([nll_n, np.full(n_cells, np.nan), ess_n, np.full(n_cells, np.nan)])
    se_n = weight_sn.std(0) / weight_sn.mean(0) / math.sqrt(n_particles)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # high k is returned, and judged by the caller
        _, k_n = az.psislw(log_weight_sn.T.copy())
    return np.stack([nll_n, np.asarray(k_n), ess_n, se_n])


def _values_at_once(device: torch.device, memory_budget_gb: float) -> int:
    """Particles × cells × genes that are scored together: what fits the budget, and a processor's cache."""
    fitting = int(memory_budget_gb * 2**30 / BYTES_PER_VALUE)
    return min(fitting, VALUES_AT_ONCE * torch.get_num_threads()) if device.type == "cpu" else fitting


def _cells_per_chunk(n_genes: int, n_particles: int, device: torch.device, memory_budget_gb: float) -> int:
    """Cells that are scored together with enough particles of each."""
    together = min(n_particles, SCORED_AT_ONCE if device.type == "cpu" else PARTICLES_AT_ONCE)
    return max(1, min(4096, _values_at_once(device, memory_budget_gb) // (n_genes * together)))


def _condition_names(screen: Screen, rows: np.ndarray) -> list[str]:
    index = screen.condition_n[rows]
    return [screen.conditions[i] if i >= 0 else "unknown" for i in index]


def interventional_nll(
    fit: Fit,
    screen: Screen,
    *,
    protocol: Literal["clean", "paper"] = "clean",
    site: str = "z",
    n_particles: int = 1000,
    n_rounds: int = 6,
    n_updates: int = 1,
    max_scored: int | None = None,
    adapt: bool = True,
    memory_budget_gb: float = 0.5,
    seed: int = 0,
) -> xr.Dataset:
    """Likelihood of cells of perturbations that were never trained, after fitting their shift alone.

    Encoder, decoder and dispersions stay as they are, all gates are open. The ELBO's best shift of a
    perturbation is the mean of its cells' posterior means; ``n_updates`` EM steps with importance weights
    then move it towards the maximum of the likelihood.

    Args:
        fit: The fit.
        screen: The held-out cells; every condition gets a shift of its own.
        protocol: ``"clean"`` fits the shift on half of each condition's cells and scores the other half.
            ``"paper"`` fits and scores the same cells, with the ELBO's shift.
        site: The latent whose prior mean is fitted.
        n_particles: Particles of the score.
        n_rounds: Rounds in which the proposal of the clean protocol is fitted; the paper's uses the guide.
        n_updates: EM steps of the clean protocol.
        max_scored: Cells of each condition that are scored at most; None is all.
        adapt: False keeps the prior of control cells, as the paper does for models that ignore
            interventions (VAE).
        memory_budget_gb: As in :func:`iw_nll`.
        seed: Seed of halves and particles.

    Returns:
        As :func:`iw_nll`, for the scored cells, and ``latent`` (cell, programme): their posterior means.
        ``attrs["interventional_nll"]`` is the mean over conditions of the mean over their cells.

    Raises:
        PredictionError: The model's perturbations do not shift one latent, so that there is none to fit.

    Source: Lopez et al., CLeaR 2023, section 4.1 and Appendix D.1, equation 18.
    """
    if not hasattr(fit.model, "n_latents"):
        raise PredictionError(
            f"a new perturbation's shift of {site!r} cannot be fitted to {type(fit.model).__name__}: its "
            "perturbations change more than one latent's mean. Use iw_nll on perturbations that were trained"
        )
    rng = np.random.default_rng(seed)
    parts, scored, latents = [], [], []
    fit.pair.train(False)
    with torch.random.fork_rng(devices=[fit.device] if fit.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for c in np.unique(screen.condition_n):
            rows = np.flatnonzero(screen.condition_n == c)
            halves = np.array_split(rng.permutation(rows), 2) if protocol == "clean" else (rows, rows)
            scored_rows = halves[1][:max_scored]
            target = _NewTarget(fit, site, 0 if protocol == "paper" else n_rounds, memory_budget_gb)
            if adapt:
                target.learn(screen, halves[0], n_updates if protocol == "clean" else 0)
            parts.append(target.score(screen, scored_rows, n_particles))
            latents.append(target.encode(next(iter(target.batches(screen, scored_rows, len(scored_rows))))))
            scored.append(scored_rows)
    result = _dataset(screen, np.concatenate(scored), np.concatenate(parts, 1), n_particles, seed)
    result["latent"] = (("cell", "programme"), torch.cat(latents).cpu().numpy())
    means = result["nll"].groupby("condition").mean()
    result.attrs |= {"protocol": protocol, "interventional_nll": float(means.mean())}
    return result


class _NewTarget:
    """A perturbation that was not trained: its shift is learned, everything else stays.

    The model sees the shift as the prior mean of the latent; the guide sees it in the slot of its first
    target, whose gates are opened.
    """

    def __init__(self, fit: Fit, site: str, n_rounds: int, memory_budget_gb: float):
        self.fit, self.site, self.n_rounds, self.memory_budget_gb = fit, site, n_rounds, memory_budget_gb
        model: Any = fit.model
        self.shift_k = torch.zeros(model.n_latents, device=fit.device)
        self.fixed = global_means(fit)

    def learn(self, screen: Screen, rows: np.ndarray, n_updates: int) -> None:
        """The ELBO's shift, then EM steps."""
        cells = next(iter(self.batches(screen, rows, len(rows))))
        for _ in range(2):  # the second pass encodes with the shift in sight
            self.shift_k = self.encode(cells).mean(0)
        for _ in range(n_updates):
            chunks = list(self._weights(cells, ROUND_PARTICLES, n_rounds=2))
            log_weight_sn, z_snk = torch.cat([w for w, _ in chunks]), torch.cat([z for _, z in chunks])
            self.shift_k = (log_weight_sn.softmax(0).unsqueeze(-1) * z_snk).sum(0).mean(0)

    def encode(self, batch: Batch) -> Tensor:
        """Posterior means of the latent, shape n, k."""
        guide = poutine.condition(self.fit.guide, data=self._guide_values())
        with torch.no_grad():
            mean_nk: Tensor = poutine.trace(guide).get_trace(self._in_slot(batch)).nodes[self.site]["fn"].mean
        return mean_nk

    def score(self, screen: Screen, rows: np.ndarray, n_particles: int) -> np.ndarray:
        """Summary of the cells' importance weights, shape 4, n."""
        n_chunk = _cells_per_chunk(screen.n_genes, n_particles, self.fit.device, self.memory_budget_gb)
        batches = self.batches(screen, rows, n_chunk)
        chunks = (self._weights(batch, n_particles, self.n_rounds) for batch in batches)
        return np.concatenate([_summary([weights for weights, _ in c]) for c in chunks], 1)

    def batches(self, screen: Screen, rows: np.ndarray, size: int) -> Minibatches:
        """Some cells, in order."""
        return Minibatches(screen, rows, size, shuffle=False, device=self.fit.device)

    def _weights(self, batch: Batch, n_particles: int, n_rounds: int) -> Iterator[tuple[Tensor, Tensor]]:
        prior = _ReplacePrior(self.site, self.shift_k)
        model = poutine.condition(prior(self.fit.model), data=self.fixed)
        guide = poutine.condition(self.fit.guide, data=self._guide_values())
        unperturbed = batch._replace(u_np=torch.zeros_like(self._in_slot(batch).u_np))
        in_slot = self._in_slot(batch)
        proposal = Proposal(model, guide, unperturbed, in_slot, self.memory_budget_gb)
        proposal.fit(n_rounds)
        return proposal.particles(n_particles)

    def _guide_values(self) -> dict[str, Tensor]:
        values = dict(self.fixed)
        if "shift" in values:
            values["shift"] = torch.cat([self.shift_k.unsqueeze(0), values["shift"][1:]])
        if "gate" in values:
            values["gate"] = torch.cat([torch.ones_like(values["gate"][:1]), values["gate"][1:]])
        return values

    def _in_slot(self, batch: Batch) -> Batch:
        u_np = torch.zeros(batch.n_cells, self.fit.dims.n_targets, device=self.fit.device)
        u_np[:, 0] = 1.0
        return batch._replace(u_np=u_np)
