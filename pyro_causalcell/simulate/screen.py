"""A counts screen of single and double perturbations whose interactions follow from the latent mechanism."""

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, NamedTuple, get_args

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from pyro_causalcell.datasets import norman2019_subset
from pyro_causalcell.errors import DataError
from pyro_causalcell.simulate.decoder import (
    CONTROL,
    check_at_least,
    numbered,
    simulation_record,
    stream,
)

__all__ = ["Kind", "combination_screen", "screen_cells"]

Kind = Literal["additive", "dominant", "suppressed", "saturated"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Floats = NDArray[np.float64]

# Roles of the targets of a module, in turn. A module is a regulator programme and the programme it drives.
_ROLES = ("regulator", "regulator", "driver", "dominator", "suppressor", "regulator", "driver")
_WEAK = 0.2  # shift of a suppressor, as a share of the others'
_DRIVEN_SD = 0.5  # noise of a driven programme; the rest of its variance comes from its regulator
_BACKGROUND_WEIGHT = 0.3  # background programmes on regulators
_LIMIT = 1.5  # largest activity of a programme, in standard deviations of a regulator
_DRIVEN_GENES, _DRIVEN_SD_LOADING = 0.1, 0.5  # share of genes, and sd of their loadings
_REGULATOR_GENES, _REGULATOR_SD_LOADING = 0.01, 0.1
_BACKGROUND_GENES, _BACKGROUND_SD_LOADING = 0.3, 0.15
_OWN_EFFECT = 1.0  # log fold change of a target's own gene
_OWN_LOADING = 0.3  # of the programme that a target moves on the target's own gene
_GENE_JITTER = 0.3  # spread of the log mean of a gene that copies a real one
_LEAST_OVERDISPERSION = 0.02
_BLOCK = 2048  # cells held dense at a time


@dataclass(frozen=True)
class _Mechanism:
    """The latent mechanism of all targets.

    Programmes [k]: background first, then the regulators of the modules, then the programmes they drive.

    Attributes:
        weight_kk: effect of programme j on programme i, [i, j], in control.
        sd_k: noise of each programme.
        shift_pk: shift of each target.
        cut_pk: programmes whose incoming edges a target cuts.
        role_p: role of each target.
        module_p: module of each target.
    """

    weight_kk: Floats
    sd_k: Floats
    shift_pk: Floats
    cut_pk: NDArray[np.bool_]
    role_p: NDArray[Any]
    module_p: NDArray[np.int64]

    def programmes(self, noise_nk: Floats, u_p: NDArray[np.bool_]) -> Floats:
        """Programmes of cells that carry the targets u_p, [n, k]."""
        kept_k = 1.0 - self.cut_pk[u_p].max(0, initial=False)
        weight_kk = self.weight_kk * kept_k[:, None]
        pushed_nk = noise_nk * self.sd_k + self.shift_pk[u_p].sum(0)
        z_nk: Floats = np.linalg.solve(np.eye(len(weight_kk)) - weight_kk, pushed_nk.T).T
        return z_nk

    def kind(self, first: int, second: int) -> Kind | None:
        """What the mechanism makes of two targets; None where it is none of the four."""
        if self.module_p[first] != self.module_p[second]:
            return "additive"
        roles = {str(self.role_p[first]), str(self.role_p[second])}
        if roles <= {"regulator", "driver"}:
            return "saturated"
        if roles == {"regulator", "dominator"}:
            return "dominant"
        return "suppressed" if roles == {"regulator", "suppressor"} else None


class _Genes(NamedTuple):
    """Share of the library in control and inverse dispersion of each gene."""

    share_g: Floats
    theta_g: Floats
    log_library: tuple[float, float]  # mean, sd


class _Decoder(NamedTuple):
    """Programmes and design to the expected share of each gene."""

    log_base_g: Floats
    loading_kg: Floats
    own_gene_p: NDArray[np.int64]

    def share(self, z_nk: Floats, u_p: NDArray[np.bool_]) -> Floats:
        log_ng = self.log_base_g + _LIMIT * np.tanh(z_nk / _LIMIT) @ self.loading_kg
        log_ng[:, self.own_gene_p[u_p]] += _OWN_EFFECT
        log_ng -= log_ng.max(1, keepdims=True)
        share_ng: Floats = np.exp(log_ng, out=log_ng)
        share_ng /= share_ng.sum(1, keepdims=True)
        return share_ng


def combination_screen(
    *,
    n_targets: int = 105,
    n_doubles: int = 131,
    n_genes: int = 5000,
    cells_per_condition: int = 410,
    n_control_cells: int = 8000,
    n_background: int = 5,
    effect: float = 2.0,
    controls: anndata.AnnData | None = None,
    layer: str | None = None,
    library: str | None = None,
    n_embedding: int = 32,
    embedding_noise: float = 0.2,
    truth_draws: int = 400,
    seed: int = 0,
) -> anndata.AnnData:
    """Simulates counts of single and double perturbations, whose interactions follow from the mechanism.

    **Programmes.** Background programmes vary from cell to cell and feed the regulators. Each module has a
    regulator programme with few genes of its own, which drives a programme with many. A programme's activity
    a = L tanh(z / L) is bounded. The expected share of a gene is a softmax of its base, its loadings times
    the activities, and one more on the log scale for the gene of a target that is perturbed.

    **Targets.** Seven to a module: three shift its regulator, two the driven programme directly, in the same
    direction. A dominator cuts the edge from the regulator and shifts the driven programme the other way. A
    suppressor cuts the edge and shifts it a fifth as far. A cut is seen in single cells without a second
    perturbation: the regulator no longer moves the driven programme.

    ==========  ======================================  =================================================
    kind        the two targets                         why
    ==========  ======================================  =================================================
    additive    of different modules                    they share no programme
    saturated   both push one driven programme up (or   its activity is bounded
                both down)
    dominant    one shifts a regulator, the other is    the path of the first is cut, the second's effect
                its module's dominator                  is left
    suppressed  one shifts a regulator, the other is    the path of the first is cut, and little is left
                its module's suppressor
    ==========  ======================================  =================================================

    There are as many doubles of each kind, up to one. They are drawn without repeats from the pairs of their
    kind.

    **Genes.** Means and negative binomial dispersions are fitted to real control cells, gene by gene, and so
    is the log-normal library. If more genes are asked for than the control cells have, the fitted ones are
    drawn again, with a log mean that is jittered by 0.3. The variance that the programmes give to control
    cells is taken off the dispersions, so that simulated control cells have the means and variances of the
    real ones, as far as the dispersion is not below 0.02.

    Counts are drawn in blocks and kept sparse: memory is that of the non-zero counts.

    Args:
        n_targets: Targets, all measured alone.
        n_doubles: Pairs that are measured.
        n_genes: Genes, at least as many as targets: each target is one of them.
        cells_per_condition: Cells of each single and each double.
        n_control_cells: Unperturbed cells.
        n_background: Background programmes.
        effect: Mean shift of a programme, in standard deviations of a regulator; sizes vary by 30 %.
        controls: Real control cells; those of ``datasets.norman2019_subset`` if None.
        layer: Layer of ``controls`` with counts; X if None.
        library: obs column of ``controls`` with total counts over all genes, where these are a part of them;
            the sum of these genes if None.
        n_embedding: Length of the embedding of a target.
        embedding_noise: Noise of the informative embeddings, relative to their standard deviation.
        truth_draws: Latent draws behind each expected share. All conditions use the same draws.
        seed: Seed of every draw.

    Returns:
        AnnData of counts (CSR) with obs["target"] ("control", "A", "A+B"), obs["kind"] ("control", "single"
        or the kind of double), obs["library_true"], obsm["z"] (programmes), and two splits into "train" and
        "heldout":
        obs["split_no_doubles"] holds out all doubles, obs["split_half_doubles"] half of each kind.
        uns["target_embeddings"] describes targets by what they do, in a random basis and with noise;
        uns["random_embeddings"] says nothing. Both are tables for ``Screen(embeddings=)``.
        uns["simulation"] says that the data are simulated and holds the settings and the truth: conditions
        [c], kind_c, share_cg (expected share of each gene in a cell's total, averaged over cells), targets
        [p], role_p, module_p, shift_pk, cut_pk, weight_kk, sd_k, loading_kg, log_base_g, theta_g and
        activity_limit.

    Raises:
        DataError: if a setting is out of its range, the control cells hold no counts, or the targets have
            fewer pairs of a kind than asked for.

    Source: the mechanism is this package's own. Sizes are those of Norman et al. 2019, Science 365, 786-793,
    as used by later work (105 singles, 131 doubles, 5,000 genes, about 105,000 cells); the kinds are among
    those described there.
    """
    _check(n_targets, n_genes, cells_per_condition, n_control_cells, n_background, n_embedding, truth_draws)
    check_at_least("n_doubles", n_doubles, 0)
    check_at_least("effect", effect, 0)
    check_at_least("embedding_noise", embedding_noise, 0)
    fitted = _default_genes() if controls is None else _fit_genes(controls, layer, library)
    genes = _resampled(fitted, n_genes, stream(seed, "genes"))

    mechanism = _draw_mechanism(stream(seed, "graph"), n_targets, n_background, effect)
    doubles = _draw_doubles(stream(seed, "combination"), mechanism, n_doubles)
    draws_sk = stream(seed, "truth").standard_normal((truth_draws, len(mechanism.sd_k)))
    decoder, theta_g = _draw_decoder(stream(seed, "decoder"), mechanism, genes, draws_sk)

    gene_names = np.array(numbered("gene", n_genes), dtype=object)
    targets = list(gene_names[decoder.own_gene_p])
    design_cp = _designs(n_targets, [pair for pair, _ in doubles])
    conditions = np.array(
        ["+".join(sorted(targets[p] for p in np.flatnonzero(row))) or CONTROL for row in design_cp],
        dtype=object,
    )
    kind_c = np.array([CONTROL, *["single"] * n_targets, *(kind for _, kind in doubles)], dtype=object)
    share_cg = np.stack(
        [
            decoder.share(mechanism.programmes(draws_sk, u_p), u_p).mean(0, dtype=np.float64)
            for u_p in design_cp
        ]
    )

    cells_c = np.full(len(design_cp), cells_per_condition)
    cells_c[0] = n_control_cells
    condition_n = np.repeat(np.arange(len(design_cp)), cells_c)
    mean, sd = genes.log_library
    library_n = np.exp(mean + sd * stream(seed, "library").standard_normal(len(condition_n)))
    counts_ng, z_nk = _draw_cells(mechanism, decoder, theta_g, design_cp, condition_n, library_n, seed)

    held_out = {
        "split_no_doubles": np.isin(kind_c, KINDS),
        "split_half_doubles": _half_held_out(stream(seed, "combination", 1), kind_c),
    }
    split = {name: np.where(held_c, "heldout", "train") for name, held_c in held_out.items()}
    obs = pd.DataFrame(
        {"target": pd.Categorical(conditions[condition_n]), "kind": pd.Categorical(kind_c[condition_n])}
        | {name: pd.Categorical(part_c[condition_n]) for name, part_c in split.items()}
        | {"library_true": library_n},
        index=numbered("cell", len(condition_n)),
    )
    record: dict[str, Any] = {
        "simulated": True,
        "process": "combination_screen",
        "n_targets": n_targets,
        "n_doubles": n_doubles,
        "n_genes": n_genes,
        "cells_per_condition": cells_per_condition,
        "n_control_cells": n_control_cells,
        "n_background": n_background,
        "effect": effect,
        "truth_draws": truth_draws,
        "seed": seed,
        "activity_limit": _LIMIT,
        "conditions": conditions,
        "kind_c": kind_c,
        "design_cp": design_cp,
        "share_cg": share_cg.astype(np.float32),
        "targets": np.array(targets, dtype=object),
        "role_p": mechanism.role_p,
        "module_p": mechanism.module_p,
        "shift_pk": mechanism.shift_pk,
        "cut_pk": mechanism.cut_pk,
        "weight_kk": mechanism.weight_kk,
        "sd_k": mechanism.sd_k,
        "loading_kg": decoder.loading_kg.astype(np.float32),
        "log_base_g": decoder.log_base_g,
        "theta_g": theta_g,
    }
    rng = stream(seed, "embedding")
    informative = _embeddings(rng, mechanism, targets, n_embedding, embedding_noise)
    random = pd.DataFrame(rng.standard_normal(informative.shape), targets, informative.columns)
    return anndata.AnnData(
        X=counts_ng,
        obs=obs,
        obsm={"z": z_nk},
        var=pd.DataFrame(index=gene_names.astype(str)),
        uns={"simulation": record, "target_embeddings": informative, "random_embeddings": random},
    )


def screen_cells(adata: anndata.AnnData, condition: str, n_cells: int, seed: int = 0) -> NDArray[np.int32]:
    """New cells of any condition from the process that made a screen: what a perfect model would predict.

    Libraries are drawn from those of the screen.

    Args:
        adata: What :func:`combination_screen` made.
        condition: "control", or targets of the screen joined by "+", measured or not.
        n_cells: Cells.
        seed: Seed of the draws; they are independent of those of the screen's own cells.

    Returns:
        Counts, shape (cells, genes).

    Raises:
        DataError: The data are not of :func:`combination_screen`, or a target is unknown.
    """
    record = simulation_record(adata, "combination_screen")
    names = [str(name) for name in record["targets"]]
    asked = [] if condition == CONTROL else condition.split("+")
    unknown = sorted(set(asked) - set(names))
    if unknown:
        raise DataError(
            f"expected targets of the simulation, found {unknown}; they are {names[:5]} and others."
        )
    fields = ("weight_kk", "sd_k", "shift_pk", "cut_pk", "role_p", "module_p")
    mechanism = _Mechanism(*(np.asarray(record[name]) for name in fields))
    own_gene_p = adata.var_names.get_indexer(names)
    decoder = _Decoder(record["log_base_g"], np.asarray(record["loading_kg"], dtype=np.float64), own_gene_p)
    library_n = np.random.default_rng(seed).choice(adata.obs["library_true"].to_numpy(), n_cells)
    u_1p = np.isin(names, asked)[None]
    condition_n = np.zeros(n_cells, dtype=np.int64)
    own_seed = int(np.random.SeedSequence([int(record["seed"]), seed]).generate_state(1)[0])
    counts_ng, _ = _draw_cells(mechanism, decoder, record["theta_g"], u_1p, condition_n, library_n, own_seed)
    return counts_ng.toarray()


# ---------------------------------------------------------------------- genes


def _default_genes() -> _Genes:
    adata = norman2019_subset()
    is_control = (adata.obs["perturbation"] == CONTROL).to_numpy()
    return _fit_genes(adata[is_control].copy(), "counts", "ncounts")


def _fit_genes(controls: anndata.AnnData, layer: str | None, library: str | None) -> _Genes:
    """Shares and dispersions by the method of moments.

    A gene without counts gets half a count. A gene whose counts vary less than Poisson ones, or that has too
    few to tell, gets the dispersion of all genes together.
    """
    x_ng = controls.X if layer is None else controls.layers[layer]
    x_ng = np.asarray(x_ng.todense() if sp.issparse(x_ng) else x_ng, dtype=np.float64)
    if not (np.isfinite(x_ng).all() and (x_ng >= 0).all() and (x_ng == np.round(x_ng)).all() and x_ng.any()):
        raise DataError(
            "expected control cells with counts, found values that are none (or zeros only). "
            "Pass layer=, the layer with counts."
        )
    total_n = x_ng.sum(1) if library is None else controls.obs[library].to_numpy(dtype=np.float64)
    if len(x_ng) < 2 or not (total_n > 0).all():
        raise DataError(
            f"expected at least two control cells with counts each, found {len(x_ng)} cells, "
            f"{int((total_n <= 0).sum())} of them empty. Remove empty cells, or pass library=."
        )
    share_g = np.maximum(x_ng.sum(0), 0.5) / total_n.sum()
    expected_ng = total_n[:, None] * share_g
    excess_g = ((x_ng - expected_ng) ** 2 - expected_ng).sum(0)
    square_g = (expected_ng**2).sum(0)
    pooled = max(float(excess_g.sum() / square_g.sum()), _LEAST_OVERDISPERSION)
    enough_g = (excess_g > 0) & (x_ng.sum(0) >= 20)
    overdispersion_g = np.where(enough_g, excess_g / square_g, pooled)
    log_total_n = np.log(total_n)
    return _Genes(
        share_g,
        1 / np.maximum(overdispersion_g, _LEAST_OVERDISPERSION),
        (float(log_total_n.mean()), float(log_total_n.std())),
    )


def _resampled(fitted: _Genes, n_genes: int, rng: np.random.Generator) -> _Genes:
    """As many genes as asked for; their shares of the library are made to sum to one."""
    n_fitted = len(fitted.share_g)
    order = rng.permutation(n_fitted)[:n_genes]
    copies = rng.integers(n_fitted, size=n_genes - len(order))
    jitter = np.exp(_GENE_JITTER * rng.standard_normal(len(copies)) - _GENE_JITTER**2 / 2)
    share_g = np.append(fitted.share_g[order], fitted.share_g[copies] * jitter)
    mean, sd = fitted.log_library
    part = float(share_g.sum())
    theta_g = np.append(fitted.theta_g[order], fitted.theta_g[copies])
    return _Genes(share_g / part, theta_g, (mean + math.log(part), sd))


# ---------------------------------------------------------------------- mechanism


def _draw_mechanism(rng: np.random.Generator, n_targets: int, n_background: int, effect: float) -> _Mechanism:
    n_modules = -(-n_targets // len(_ROLES))
    regulator_m = n_background + np.arange(n_modules)
    driven_m = regulator_m + n_modules
    k = n_background + 2 * n_modules
    weight_kk = np.zeros((k, k))
    background = rng.standard_normal((n_modules, n_background)) / np.sqrt(max(n_background, 1))
    weight_kk[regulator_m, :n_background] = _BACKGROUND_WEIGHT * background
    weight_kk[driven_m, regulator_m] = 1.0
    sd_k = np.ones(k)
    sd_k[driven_m] = _DRIVEN_SD

    # Which target has which role says nothing about its number.
    place_p = rng.permutation(n_targets)
    module_p, role_p = place_p // len(_ROLES), np.array(_ROLES, dtype=object)[place_p % len(_ROLES)]
    size_p = effect * rng.uniform(0.7, 1.3, n_targets) * rng.choice([-1.0, 1.0], n_modules)[module_p]
    factor_p = np.array([{"dominator": -1.0, "suppressor": _WEAK}.get(role, 1.0) for role in role_p])
    shift_pk, cut_pk = np.zeros((n_targets, k)), np.zeros((n_targets, k), dtype=bool)
    moved_p = np.where(role_p == "regulator", regulator_m[module_p], driven_m[module_p])
    shift_pk[np.arange(n_targets), moved_p] = size_p * factor_p
    cut_pk[np.arange(n_targets), driven_m[module_p]] = np.isin(role_p, ["dominator", "suppressor"])
    return _Mechanism(weight_kk, sd_k, shift_pk, cut_pk, role_p, module_p)


def _draw_doubles(
    rng: np.random.Generator, mechanism: _Mechanism, n_doubles: int
) -> list[tuple[tuple[int, int], Kind]]:
    pairs: dict[Kind, list[tuple[int, int]]] = {kind: [] for kind in KINDS}
    for first, second in combinations(range(len(mechanism.role_p)), 2):
        kind = mechanism.kind(first, second)
        if kind is not None:
            pairs[kind].append((first, second))
    doubles: list[tuple[tuple[int, int], Kind]] = []
    for i, kind in enumerate(KINDS):
        wanted = (n_doubles + len(KINDS) - 1 - i) // len(KINDS)
        if wanted > len(pairs[kind]):
            raise DataError(
                f"expected {wanted} {kind} pairs for {n_doubles} doubles, found {len(pairs[kind])} among "
                f"{len(mechanism.role_p)} targets. Ask for fewer doubles or more targets."
            )
        chosen = rng.choice(len(pairs[kind]), wanted, replace=False)
        doubles += [(pairs[kind][j], kind) for j in sorted(chosen)]
    return doubles


def _designs(n_targets: int, pairs: list[tuple[int, int]]) -> NDArray[np.bool_]:
    """Control, singles and doubles, [c, p]."""
    design_cp = np.zeros((1 + n_targets + len(pairs), n_targets), dtype=bool)
    design_cp[1 : n_targets + 1] = np.eye(n_targets, dtype=bool)
    for row_p, pair in zip(design_cp[n_targets + 1 :], pairs, strict=True):
        row_p[list(pair)] = True
    return design_cp


def _half_held_out(rng: np.random.Generator, kind_c: NDArray[Any]) -> NDArray[np.bool_]:
    held_c = np.zeros(len(kind_c), dtype=bool)
    for kind in KINDS:
        of_kind = rng.permutation(np.flatnonzero(kind_c == kind))
        held_c[of_kind[: (len(of_kind) + 1) // 2]] = True
    return held_c


def _embeddings(
    rng: np.random.Generator, mechanism: _Mechanism, targets: list[str], n_embedding: int, noise: float
) -> pd.DataFrame:
    """What each target does (shifts and cuts), seen through a random linear map, with noise."""
    does_pf = np.column_stack([mechanism.shift_pk, mechanism.cut_pk])
    map_fe = rng.standard_normal((does_pf.shape[1], n_embedding)) / np.sqrt(n_embedding)
    signal_pe = does_pf @ map_fe
    noisy_pe = signal_pe + noise * signal_pe.std() * rng.standard_normal(signal_pe.shape)
    return pd.DataFrame(noisy_pe, index=targets, columns=numbered("dimension", n_embedding))


# ---------------------------------------------------------------------- counts


def _draw_decoder(
    rng: np.random.Generator, mechanism: _Mechanism, genes: _Genes, draws_sk: Floats
) -> tuple[_Decoder, Floats]:
    """Loadings, a base that keeps the control means, and dispersions less what the programmes explain."""
    k, n_genes, n_targets = len(mechanism.sd_k), len(genes.share_g), len(mechanism.role_p)
    n_modules = int(mechanism.module_p.max()) + 1
    n_background = k - 2 * n_modules
    blocks = (n_background, n_modules, n_modules)
    share_k = np.repeat([_BACKGROUND_GENES, _REGULATOR_GENES, _DRIVEN_GENES], blocks)
    sd_k = np.repeat([_BACKGROUND_SD_LOADING, _REGULATOR_SD_LOADING, _DRIVEN_SD_LOADING], blocks)
    loaded_kg = rng.random((k, n_genes)) < share_k[:, None]
    loading_kg = np.where(loaded_kg, sd_k[:, None] * rng.standard_normal((k, n_genes)), 0.0)
    own_gene_p = np.sort(rng.permutation(n_genes)[:n_targets])
    moved_p = np.abs(mechanism.shift_pk).argmax(1)
    loading_kg[moved_p, own_gene_p] = _OWN_LOADING

    nobody_p = np.zeros(n_targets, dtype=bool)
    z_sk = mechanism.programmes(draws_sk, nobody_p)
    log_base_g = np.log(genes.share_g)
    for _ in range(3):  # the softmax couples the genes a little, so one correction is not quite enough
        share_sg = _Decoder(log_base_g, loading_kg, own_gene_p).share(z_sk, nobody_p)
        log_base_g = log_base_g + np.log(genes.share_g / share_sg.mean(0))
    explained_g = (share_sg.std(0) / share_sg.mean(0)) ** 2
    overdispersion_g = (1 / genes.theta_g - explained_g) / (1 + explained_g)
    theta_g = 1 / np.maximum(overdispersion_g, _LEAST_OVERDISPERSION)
    return _Decoder(log_base_g, loading_kg, own_gene_p), theta_g


def _draw_cells(
    mechanism: _Mechanism,
    decoder: _Decoder,
    theta_g: Floats,
    design_cp: NDArray[np.bool_],
    condition_n: NDArray[np.int64],
    library_n: Floats,
    seed: int,
) -> tuple[sp.csr_matrix, Floats]:
    """Counts [n, g] and programmes [n, k], a block of cells at a time; conditions have their own streams."""
    blocks, programmes = [], []
    for c, u_p in enumerate(design_cp):
        rows = np.flatnonzero(condition_n == c)
        latent_rng, count_rng = stream(seed, "latent", c), stream(seed, "count", c)
        for first in range(0, len(rows), _BLOCK):
            library_b = library_n[rows[first : first + _BLOCK]]
            noise_bk = latent_rng.standard_normal((len(library_b), len(mechanism.sd_k)))
            z_bk = mechanism.programmes(noise_bk, u_p)
            mean_bg = decoder.share(z_bk, u_p)
            mean_bg *= library_b[:, None]
            mean_bg *= count_rng.standard_gamma(theta_g, mean_bg.shape) / theta_g
            blocks.append(sp.csr_matrix(count_rng.poisson(mean_bg).astype(np.int32)))
            programmes.append(z_bk)
    return sp.vstack(blocks, format="csr"), np.concatenate(programmes)


def _check(
    n_targets: int,
    n_genes: int,
    cells_per_condition: int,
    n_control_cells: int,
    n_background: int,
    n_embedding: int,
    truth_draws: int,
) -> None:
    check_at_least("n_targets", n_targets, 1)
    check_at_least("n_genes", n_genes, n_targets)
    check_at_least("cells_per_condition", cells_per_condition, 1)
    check_at_least("n_control_cells", n_control_cells, 1)
    check_at_least("n_background", n_background, 0)
    check_at_least("n_embedding", n_embedding, 1)
    check_at_least("truth_draws", truth_draws, 2)
