"""Simulation-based calibration: does a guide find latents that its own model has drawn?

Cells are simulated from the model's prior, the guide is trained on them, and the true latents are ranked
among draws of the guide. If posteriors are right, ranks are uniform.
"""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pyro
import torch
from numpy.typing import NDArray
from pyro import poutine
from scipy.stats import binom, chisquare
from torch import nn
from tqdm import tqdm

from pyro_causalcell.batch import Batch
from pyro_causalcell.data import Minibatches, Screen, random_cells
from pyro_causalcell.errors import DataError, PairError
from pyro_causalcell.inference.pair import Pair, Source, build_pair
from pyro_causalcell.inference.posterior import is_local, sample_sites
from pyro_causalcell.inference.training import Trainer, Training

__all__ = ["SBC", "design_screen", "ecdf_band", "rank_tests", "sbc"]

Floats = NDArray[np.float64]
QUICK_REPLICATES, QUICK_EPOCHS = 20, 50
LEVEL = 0.05
"""Chance that a right pair is rejected, over all its quantities together."""
LIBRARY = "library_of_design"


@dataclass(frozen=True)
class SBC:
    """Ranks of true latents among posterior draws, and what they say.

    Attributes:
        ranks: One row per replicate, one column per quantity, such as ``z[0]`` or ``shift[1,2]``: how many of
            the posterior draws lie below the truth, 0 to ``n_draws``; ties are broken at random.
        n_draws: Posterior draws of each replicate.
        table: What :func:`rank_tests` gives.
    """

    ranks: pd.DataFrame
    n_draws: int
    table: pd.DataFrame

    @property
    def verdict(self) -> str:
        """Whether any quantity is rejected, and how its posterior is wrong."""
        bad = self.table[self.table["rejected"]]
        if bad.empty:
            return f"uniform: none of {len(self.table)} quantities is rejected"
        said = ", ".join(f"{q} ({f})" for q, f in zip(bad["quantity"][:5], bad["finding"][:5], strict=True))
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        return f"rejected: {len(bad)} of {len(self.table)} quantities: {said}{more}"


def sbc(
    model: Source,
    guide: Source | None,
    screen: Screen,
    *,
    n_replicates: int = 100,
    n_draws: int = 99,
    epochs: int = 200,
    batch_size: int = 64,
    lr: float = 3e-2,
    quick: bool = False,
    workers: int = 1,
    seed: int = 0,
    progress: bool = True,
    **settings: Any,
) -> SBC:
    """Simulation-based calibration of a model and a guide.

    For each replicate: global latents, cells' latents and values are drawn from the model's prior for the
    designs, libraries and batches of a screen; the guide alone is trained on them, with the model held as
    it drew them (its parameters are not what is inferred); then every global latent, and the latents of
    one cell chosen at random, are ranked among ``n_draws`` draws of the guide. A slab counts as gate ×
    value: where a gate is closed nothing can be known of its slab.

    Models, settings and guides are those that ``fit`` takes. An instance of a model keeps its parameters:
    ``sbc(fitted.model, "sparse-shift", screen)`` asks whether a fitted decoder can be inverted.

    Args:
        model: Name, ``"file.py:Class"``, class, or instance.
        guide: Likewise; None takes the guide of the model's name.
        screen: Its design, libraries and batches are used, its values are not. :func:`design_screen` makes a
            small one.
        n_replicates: Replicates. A hundred show an interval that is a third too narrow.
        n_draws: Posterior draws of each.
        epochs: Epochs of training of each. Too few look like an error of the guide: raise them first.
        batch_size: Cells in a minibatch.
        lr: Learning rate.
        quick: At most 20 replicates of 50 epochs, which show that all works, and large errors only.
        workers: Processes.
        seed: Seed of everything.
        progress: Show a progress bar.
        **settings: Arguments of the model's and guide's constructors.

    Raises:
        PairError: The model weighs its prior by a factor, so that draws of its prior are not draws of what
            is fitted; or as for ``fit``.
        DataError: Fewer than two replicates or draws.

    Source: Talts et al., arXiv 1804.06788 (ranks); Modrák et al., Bayesian Analysis 2023 (derived
    quantities).
    """
    if n_replicates < 2 or n_draws < 2:
        raise DataError(f"expected two replicates and draws or more, found {n_replicates} and {n_draws}")
    if quick:
        n_replicates, epochs = min(n_replicates, QUICK_REPLICATES), min(epochs, QUICK_EPOCHS)
    training = Training(epochs=epochs, warm_start=0, batch_size=batch_size, lr=lr)
    job = _Job(model, guide, screen, settings, training, n_draws, seed)
    with torch.random.fork_rng(devices=[]):
        _check_prior(job)
    rows = {}
    with tqdm(total=n_replicates, disable=not progress, unit="replicate") as bar:
        for r, ranks in _run(job, n_replicates, workers):
            rows[r] = ranks
            bar.update()
    ranks = pd.DataFrame([rows[r] for r in range(n_replicates)])
    ranks.index.name = "replicate"
    return SBC(ranks, n_draws, rank_tests(ranks, n_draws, seed=seed))


def design_screen(
    n_targets: int = 4, n_genes: int = 30, cells_per_condition: int = 50, library: float = 2000.0
) -> Screen:
    """A small screen for :func:`sbc`: its cells have a condition and a library, and placeholder values.

    Args:
        n_targets: Perturbations, one target each; control cells beside them.
        n_genes: Genes.
        cells_per_condition: Cells of each condition, control included.
        library: Total count of every cell.
    """
    names = ["non-targeting", *(f"target_{p + 1}" for p in range(n_targets))]
    obs = pd.DataFrame({"target": np.repeat(names, cells_per_condition), LIBRARY: library})
    obs.index = [f"cell_{n}" for n in range(len(obs))]
    var = pd.DataFrame(index=[f"gene_{g}" for g in range(n_genes)])
    return Screen(ad.AnnData(np.ones((len(obs), n_genes), np.float32), obs, var), library=LIBRARY)


# ---------------------------------------------------------------------- replicates


@dataclass(frozen=True)
class _Job:
    """What every replicate starts from."""

    model: Source
    guide: Source | None
    screen: Screen
    settings: Mapping[str, Any]
    training: Training
    n_draws: int
    seed: int

    def pair(self, replicate: int) -> Pair:
        """One model for all replicates, held still, and a new guide."""
        dims = self.screen.dims()
        pyro.set_rng_seed(self.seed)
        pair = build_pair(self.model, self.guide, dims, self.settings)
        pyro.set_rng_seed(self.seed + 1 + replicate)
        fresh = build_pair(self.model, self.guide, dims, self.settings)
        model, guide = (copy.deepcopy(module) for module in (pair.model, fresh.guide))
        return dataclasses.replace(pair, model=_held(model), guide=guide)


def _held(model: nn.Module) -> nn.Module:
    """The model as it drew the cells: parameters do not learn, layers do not learn from batches."""
    model.eval().requires_grad_(False)
    model.train = lambda mode=True: model  # type: ignore[method-assign]
    return model


def _check_prior(job: _Job) -> None:
    """Refuse a model whose prior is not what it draws from."""
    trace = poutine.trace(job.pair(0).model).get_trace(_all_cells(job.screen))
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and type(site["fn"]).__name__ == "Unit":
            if bool((site["fn"].log_prob(site["value"]) != 0).any()):
                raise PairError(
                    f"the model weighs its prior by the factor {name!r}, so draws of its prior are not draws "
                    f"of what is fitted; switch the factor off ({name}=0 where the model has "
                    f"that setting; --settings.{name} 0 on the command line)"
                )


def _all_cells(screen: Screen) -> Batch:
    """Every cell, to be drawn."""
    batches = Minibatches(screen, np.arange(screen.n_cells), screen.n_cells, shuffle=False)
    return next(iter(batches))._replace(x_ng=None)


def _run(job: _Job, n_replicates: int, workers: int) -> Iterator[tuple[int, dict[str, int]]]:
    if workers == 1:
        for r in range(n_replicates):
            yield r, _replicate(job, r)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(_replicate, job, r): r for r in range(n_replicates)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _replicate(job: _Job, r: int) -> dict[str, int]:
    """Simulate, train, rank; on one thread, which is fastest for small nets."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _ranks(job, r)
    finally:
        torch.set_num_threads(threads)


def _ranks(job: _Job, r: int) -> dict[str, int]:
    rng = np.random.default_rng([job.seed, r])
    cell = int(rng.integers(job.screen.n_cells))
    with torch.random.fork_rng(devices=[]):
        pair = job.pair(r)
        with torch.no_grad():
            trace = poutine.trace(pair.model).get_trace(_all_cells(job.screen))
        truth = _quantities(trace, cell)
        simulated = _with_values(job.screen, trace.nodes["x"]["value"].numpy())
        _train(pair, simulated, job.training, job.seed + 1 + r)
        one = next(iter(Minibatches(simulated, np.array([cell]), 1, shuffle=False)))
        draws = []
        with torch.no_grad(), pyro.validation_enabled(False):
            for _ in range(job.n_draws):
                draws.append(_quantities(poutine.trace(pair.guide).get_trace(one), 0))
    return {name: _rank(value, [draw[name] for draw in draws], rng) for name, value in truth.items()}


def _train(pair: Pair, screen: Screen, training: Training, seed: int) -> None:
    """Train the guide on all cells, and keep its last weights.

    ``fit`` keeps those of the best epoch. With one draw of the global latents in each step that is the
    luckiest epoch, which is not to be held against the guide.
    """
    split = random_cells(screen, validation=0.0, seed=seed)
    device = torch.device("cpu")
    Trainer(pair, screen.dims(), screen, split, training, seed, device, None, None).run(show=False)
    pair.train(False)


def _quantities(trace: poutine.Trace, cell: int) -> dict[str, float]:
    """Every number of the global latents and of one cell's latents; slabs times their gates."""
    found = {}
    for name, site in sample_sites(trace).items():
        if site["is_observed"] or name == "x":
            continue
        value, gate = site["value"], getattr(_base(site["fn"]), "gate", None)
        value = value if gate is None else value * gate
        array = (value[cell] if is_local(site) else value).numpy()
        for place in np.ndindex(array.shape):
            label = f"{name}[{','.join(map(str, place))}]" if place else name
            found[label] = float(array[place])
    return found


def _base(fn: Any) -> Any:
    return _base(fn.base_dist) if hasattr(fn, "base_dist") else fn


def _with_values(screen: Screen, x_ng: NDArray[Any]) -> Screen:
    """The screen's cells with other values, and the libraries that these were drawn for."""
    obs = screen.adata.obs.assign(**{LIBRARY: screen.library_n})
    adata = ad.AnnData(x_ng.astype(np.float32), obs, pd.DataFrame(index=screen.genes))
    spec = dataclasses.replace(
        screen.describe(), layer=None, library=LIBRARY, gene_symbols=None, allow_empty=True
    )
    return Screen.from_spec(spec, adata)


def _rank(truth: float, draws: list[float], rng: np.random.Generator) -> int:
    """How many draws lie below; the truth takes a random place among equal ones."""
    drawn = np.array(draws)
    return int((drawn < truth).sum() + rng.integers(0, (drawn == truth).sum(), endpoint=True))


# ---------------------------------------------------------------------- tests of ranks


def rank_tests(ranks: pd.DataFrame, n_draws: int, *, seed: int = 0) -> pd.DataFrame:
    """Are the ranks of each quantity uniform?

    Args:
        ranks: One row per replicate, one column per quantity: 0 to ``n_draws``.
        n_draws: Posterior draws of each replicate.
        seed: Seed of the simulated null distributions.

    Returns:
        One row per quantity: ``quantity``; ``position``, the mean place of the truth (½ is right);
        ``spread``, the standard deviation of these places over that of uniform ones (above 1: posteriors too
        narrow); ``ecdf_p``, of the simultaneous test behind :func:`ecdf_band`; ``chi2_p`` of the rank
        histogram; ``symmetry_p``, of the symmetry of the places around ½, which a variational posterior of
        the wrong width may pass and a biased one fails; ``rejected``, by ``ecdf_p`` with Holm's correction
        at 5 % over all quantities; ``finding``, in words, for those that are rejected.

    Raises:
        DataError: There are no ranks, or one is outside 0 to ``n_draws``.

    Source: Säilynoja, Bürkner and Vehtari, Statistics and Computing 2022, section 2.2 (ECDF); Talts et al.,
    arXiv 1804.06788 (χ²); Yao et al., ICML 2018, section 4 (symmetry; its p-value by random signs, which is
    exact, where the two-sample Kolmogorov–Smirnov table takes p and 1 − p as independent).
    """
    values = ranks.to_numpy()
    if not values.size or values.min() < 0 or values.max() > n_draws:
        raise DataError(
            f"expected ranks from 0 to n_draws={n_draws}, found none or others; pass that of the ranks"
        )
    rng = np.random.default_rng(seed)
    n, n_quantities = values.shape
    n_null = max(2000, 40 * n_quantities)
    score = _scores(n, n_draws)
    null = np.sort(_null(score, n, n_draws, n_null, rng))
    walks = np.sort(_excursion(rng.choice(np.array([-1, 1], np.int32), (n_null, n))))
    rows = []
    for name in ranks:
        rank_n = ranks[name].to_numpy()
        place_n = (rank_n + rng.random(n)) / (n_draws + 1)
        found = _score(score, np.bincount(rank_n, minlength=n_draws + 1)[None])[0]
        order = np.argsort(-np.abs(place_n - 0.5))
        excursion = _excursion(np.sign(place_n - 0.5)[order][None])[0]
        rows.append(
            {
                "quantity": name,
                "position": place_n.mean(),
                "spread": place_n.std(ddof=1) * 12**0.5 if n > 1 else np.nan,
                "ecdf_p": (1 + np.searchsorted(null, found, "right")) / (n_null + 1),
                "chi2_p": _chi2(rank_n, n_draws),
                "symmetry_p": (1 + n_null - np.searchsorted(walks, excursion, "left")) / (n_null + 1),
            }
        )
    table = pd.DataFrame(rows)
    table["rejected"] = _holm(table["ecdf_p"].to_numpy()) < LEVEL
    table["finding"] = [_finding(row) if row["rejected"] else "" for _, row in table.iterrows()]
    return table


def ecdf_band(
    n_replicates: int, n_draws: int, level: float = 0.95, *, n_null: int = 4000, seed: int = 0
) -> pd.DataFrame:
    """Where the ECDF of uniform ranks stays, at all places at once.

    Args:
        n_replicates: Ranks.
        n_draws: Posterior draws behind each.
        level: Probability that a uniform ECDF stays inside everywhere.
        n_null: Simulated ECDFs that set the width.
        seed: Their seed.

    Returns:
        ``place`` (j / (n_draws + 1)), ``low`` and ``high``: shares of ranks below j.

    Source: Säilynoja, Bürkner and Vehtari, Statistics and Computing 2022, equations 7–11.
    """
    rng = np.random.default_rng(seed)
    null = _null(_scores(n_replicates, n_draws), n_replicates, n_draws, n_null, rng)
    gamma = np.quantile(null, 1 - level)
    place_j = np.arange(1, n_draws + 1) / (n_draws + 1)
    low, high = (binom.ppf(p, n_replicates, place_j) / n_replicates for p in (gamma / 2, 1 - gamma / 2))
    return pd.DataFrame({"place": place_j, "low": low, "high": high})


def _scores(n: int, n_draws: int) -> Floats:
    """Two-sided binomial tail of k of n ranks below place j, [k, j]."""
    k = np.arange(n + 1)[:, None]
    place_j = np.arange(1, n_draws + 1) / (n_draws + 1)
    tails: Floats = 2 * np.minimum(binom.cdf(k, n, place_j), binom.sf(k - 1, n, place_j))
    return tails


def _score(score: Floats, histogram: NDArray[Any]) -> Floats:
    """The least tail along each ECDF; histograms of ranks are rows."""
    below = histogram.cumsum(1)[:, :-1]
    least: Floats = score[below, np.arange(below.shape[1])].min(1)
    return least


def _null(score: Floats, n: int, n_draws: int, n_null: int, rng: np.random.Generator) -> Floats:
    return _score(score, rng.multinomial(n, np.full(n_draws + 1, 1 / (n_draws + 1)), n_null))


def _excursion(signs: NDArray[Any]) -> Floats:
    """Largest |difference| between the ECDFs of p and 1 − p, in ranks; signs from the tails inwards."""
    furthest: Floats = np.abs(signs.cumsum(1)).max(1).astype(np.float64)
    return furthest


def _chi2(rank_n: NDArray[Any], n_draws: int) -> float:
    """As many equal bins as leave five expected ranks in each."""
    divisors = [b for b in range(1, n_draws + 2) if (n_draws + 1) % b == 0]
    n_bins = max(b for b in divisors if b == 1 or len(rank_n) >= 5 * b)
    if n_bins == 1:
        return float("nan")
    counts = np.bincount(rank_n * n_bins // (n_draws + 1), minlength=n_bins)
    return float(chisquare(counts).pvalue)


def _holm(p: Floats) -> Floats:
    order = np.argsort(p)
    adjusted = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    result = np.empty_like(adjusted)
    result[order] = adjusted
    return result


def _finding(row: pd.Series) -> str:
    if row["symmetry_p"] < LEVEL:
        return "posterior too low" if row["position"] > 0.5 else "posterior too high"
    return "posterior too narrow" if row["spread"] > 1 else "posterior too wide"
