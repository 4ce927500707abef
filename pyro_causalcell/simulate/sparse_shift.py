"""The sparse-shift count simulator: interventions that each move a few latent programmes of a cell."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import anndata
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from pyro_causalcell.errors import DataError
from pyro_causalcell.simulate.decoder import (
    CONTROL,
    Decoder,
    as_tensor,
    check_at_least,
    numbered,
    random_weights,
    raw_logits,
    simulation_record,
    stream,
)

__all__ = ["Preset", "out_of_domain", "sparse_shift"]

Preset = Literal["released", "paper", "clean"]

_EFFECT_SD = 0.5
_GENE_TOTAL = 1e6  # released: expected total of every gene over all perturbed cells
_PAPER_LIBRARY = 1e5
_CLEAN_LIBRARY = 2000.0
_CLEAN_LOG_SD = 0.4
_DECODER_LAYERS = 4  # three hidden ones, as the paper says


def sparse_shift(
    preset: Preset = "released",
    *,
    n_latents: int = 15,
    n_genes: int = 100,
    n_interventions: int = 100,
    n_train: int | None = None,
    cells_per_intervention: int = 500,
    n_control_cells: int = 0,
    effect: float = 5.0,
    sparsity: float | None = None,
    n_targeted_latents: int | None = None,
    library_size: float | None = None,
    library_log_sd: float | None = None,
    inverse_dispersion: float | None = None,
    seed: int = 0,
    decoder_seed: int | None = None,
) -> anndata.AnnData:
    """Simulates counts from interventions that each shift a few latent programmes.

    Each intervention a has targets and a shift mu_a. A cell has z ~ Normal(mu_a, I), and counts whose
    expectation is a fixed random network of z. The presets differ in three choices:

    =========  ==============  ===================================  =========================================
    preset     targets         expected counts                      library
    =========  ==============  ===================================  =========================================
    released   1 to 3 draws,   1e6 x softmax over the perturbed     follows from z; counts per cell shrink as
               repeats allowed cells, one gene at a time            more cells are simulated
    paper      1 to 3 latents  library x softmax over genes         1e5 for every cell
    clean      1 to 3 latents  library x softmax over genes         log-normal, median 2000, log-sd 0.4
    =========  ==============  ===================================  =========================================

    In all presets the logits are divided by one standard deviation, taken over the perturbed cells and all
    genes. The paper does not mention this step; its code does it. No preset has control cells: ask for them
    with ``n_control_cells``. They have no shift, belong to the train split, and change nothing about the
    other cells.

    Args:
        preset: "released" (what the authors' code does), "paper" (as printed) or "clean".
        n_latents: number of latents k, at most 40.
        n_genes: number of genes g, at least 40.
        n_interventions: number of interventions p.
        n_train: interventions of the train split, the first ones; 80 % of them if None.
        cells_per_intervention: cells of each intervention.
        n_control_cells: unperturbed cells, named "control".
        effect: mean size of a shift, in standard deviations of a latent; the sign is random, the sd 0.5.
        sparsity: fraction of the targetable latents that an intervention moves, without repeats; the number
            is rounded up or down at random so that the fraction holds on average, and is at least one. None
            gives the one to three targets of the preset.
        n_targeted_latents: only the first so many latents are ever targeted; all if None.
        library_size: median library; "clean" only.
        library_log_sd: standard deviation of the log library; "clean" only.
        inverse_dispersion: draw negative binomial counts with variance m + m**2 / inverse_dispersion instead
            of Poisson counts; "clean" only.
        seed: seed of everything but the decoder.
        decoder_seed: seed of the decoder's weights; ``seed`` if None.

    Returns:
        AnnData with integer counts in X and the truth beside them: obs["target"], obs["split"] ("train" or
        "heldout"), obs["library_true"] (expected total count), obsm["z"], varm["decoder_output"] and
        uns["simulation"]: simulated, preset, settings, interventions (names), shift_pk, graph_pk and decoder.

    Raises:
        DataError: if a setting is out of its range or does not belong to the preset.

    Source: Lopez et al., Learning causal representations of single cells via sparse mechanism shift
    modeling, 2023, appendix C; the preset "released" follows their published code.
    """
    n_train = round(0.8 * n_interventions) if n_train is None else n_train
    _check_settings(preset, n_latents, n_interventions, n_train, cells_per_intervention, n_control_cells)
    _check_interventions(n_latents, effect, sparsity, n_targeted_latents)
    _check_clean_only(preset, library_size, library_log_sd, inverse_dispersion)

    names = numbered("intervention", n_interventions)
    graph_pk = _draw_graph(
        stream(seed, "graph"), n_interventions, n_latents, sparsity, n_targeted_latents, preset == "released"
    )
    shift_pk = _draw_shifts(stream(seed, "shift"), graph_pk, effect)
    row_n = np.repeat(np.arange(n_interventions), cells_per_intervention)
    z_nk = shift_pk[row_n] + stream(seed, "latent").standard_normal((row_n.size, n_latents))

    decoder_seed = seed if decoder_seed is None else decoder_seed
    weights = random_weights(stream(decoder_seed, "decoder"), n_latents, n_genes, _DECODER_LAYERS)
    decoder = _scaled_decoder(weights, z_nk, preset, inverse_dispersion)
    median = library_size or (_CLEAN_LIBRARY if preset == "clean" else _PAPER_LIBRARY)
    log_sd = (_CLEAN_LOG_SD if library_log_sd is None else library_log_sd) if preset == "clean" else 0.0
    cells = _draw_cells(decoder, z_nk, median, log_sd, stream(seed, "library"), stream(seed, "count"))
    target_n = np.array(names, dtype=object)[row_n]
    split_n = np.where(row_n < n_train, "train", "heldout").astype(object)
    if n_control_cells:
        rng = stream(seed, "control")
        controls = _draw_cells(
            decoder, rng.standard_normal((n_control_cells, n_latents)), median, log_sd, rng, rng
        )
        cells = cells.followed_by(controls)
        target_n = np.append(target_n, np.full(n_control_cells, CONTROL, dtype=object))
        split_n = np.append(split_n, np.full(n_control_cells, "train", dtype=object))

    settings: dict[str, Any] = {
        "simulated": True,
        "preset": preset,
        "n_latents": n_latents,
        "n_genes": n_genes,
        "n_train": n_train,
        "cells_per_intervention": cells_per_intervention,
        "effect": effect,
        "sparsity": sparsity,
        "n_targeted_latents": n_targeted_latents,
        "library_size": None if preset == "released" else median,
        "library_log_sd": log_sd if preset == "clean" else None,
        "inverse_dispersion": inverse_dispersion,
        "seed": seed,
        "decoder_seed": decoder_seed,
    }
    return _assemble(cells, target_n, split_n, names, shift_pk, graph_pk, decoder, settings)


def out_of_domain(
    adata: anndata.AnnData,
    *,
    effect: float | None = None,
    sparsity: float | None = None,
    n_interventions: int = 20,
    cells_per_intervention: int | None = None,
    seed: int = 0,
) -> anndata.AnnData:
    """Simulates new held-out interventions with the decoder, its scale and its constants kept fixed.

    Args:
        adata: result of :func:`sparse_shift`.
        effect: mean size of the new shifts; that of ``adata`` if None.
        sparsity: fraction of latents the new interventions move; the rule of ``adata`` if None.
        n_interventions: number of new interventions, named "ood_00" and so on.
        cells_per_intervention: cells of each; that of ``adata`` if None.
        seed: seed of the new interventions and cells.

    Returns:
        AnnData as :func:`sparse_shift` makes it, all of it in the "heldout" split. The truth in
        uns["simulation"] is that of the new interventions.

    Raises:
        DataError: if ``adata`` holds no simulation, or a setting is out of its range.

    Source: the protocol of tables 7 and 8 of Lopez et al. 2023, without drawing a new decoder.
    """
    record = simulation_record(adata, "sparse_shift")
    decoder = Decoder.from_anndata(adata)
    preset = record["preset"]
    n_latents = int(record["n_latents"])
    effect = float(record["effect"]) if effect is None else effect
    sparsity = record.get("sparsity") if sparsity is None else sparsity
    targetable = record.get("n_targeted_latents")
    per = int(record["cells_per_intervention"]) if cells_per_intervention is None else cells_per_intervention
    _check_interventions(n_latents, effect, sparsity, targetable)
    check_at_least("n_interventions", n_interventions, 1)
    check_at_least("cells_per_intervention", per, 1)

    rng = stream(seed, "out_of_domain")
    names = numbered("ood", n_interventions)
    graph_pk = _draw_graph(rng, n_interventions, n_latents, sparsity, targetable, preset == "released")
    shift_pk = _draw_shifts(rng, graph_pk, effect)
    row_n = np.repeat(np.arange(n_interventions), per)
    z_nk = shift_pk[row_n] + rng.standard_normal((row_n.size, n_latents))
    median = float(record.get("library_size", 1.0))
    cells = _draw_cells(decoder, z_nk, median, float(record.get("library_log_sd", 0.0)), rng, rng)
    kept = {key: record[key] for key in record if key not in ("shift_pk", "graph_pk", "decoder")}
    settings = kept | {
        "n_train": 0,
        "cells_per_intervention": per,
        "effect": effect,
        "sparsity": sparsity,
        "seed": seed,
    }
    target_n = np.array(names, dtype=object)[row_n]
    split_n = np.full(row_n.size, "heldout", dtype=object)
    new = _assemble(cells, target_n, split_n, names, shift_pk, graph_pk, decoder, settings)
    new.var_names = adata.var_names.copy()
    return new


@dataclass(frozen=True)
class _Cells:
    """Simulated cells: counts, latents and expected totals."""

    x_ng: NDArray[np.int32]
    z_nk: NDArray[np.float64]
    library_n: NDArray[np.float64]

    def followed_by(self, other: "_Cells") -> "_Cells":
        return _Cells(
            np.concatenate([self.x_ng, other.x_ng]),
            np.concatenate([self.z_nk, other.z_nk]),
            np.concatenate([self.library_n, other.library_n]),
        )


def _draw_graph(
    rng: np.random.Generator,
    n_interventions: int,
    n_latents: int,
    sparsity: float | None,
    n_targeted_latents: int | None,
    repeats: bool,
) -> NDArray[np.bool_]:
    """Which latents each intervention moves, [interventions, latents]."""
    targetable = n_latents if n_targeted_latents is None else int(n_targeted_latents)
    graph_pk = np.zeros((n_interventions, n_latents), dtype=bool)
    for targets_k in graph_pk:
        if sparsity is None:
            n_targets = int(rng.integers(1, 4))
        else:
            n_targets = max(1, int(np.floor(sparsity * targetable + rng.random())))
        if repeats and sparsity is None:
            targets_k[rng.integers(targetable, size=n_targets)] = True
        else:
            targets_k[rng.choice(targetable, size=min(n_targets, targetable), replace=False)] = True
    return graph_pk


def _draw_shifts(rng: np.random.Generator, graph_pk: NDArray[np.bool_], effect: float) -> NDArray[np.float64]:
    size_pk = np.abs(rng.normal(effect, _EFFECT_SD, graph_pk.shape))
    return np.where(graph_pk, size_pk * rng.choice([-1.0, 1.0], graph_pk.shape), 0.0)


def _scaled_decoder(
    weights: tuple[Tensor, ...], z_nk: NDArray[np.float64], preset: Preset, inverse_dispersion: float | None
) -> Decoder:
    """Fixes the scale of the logits, and the constants of the softmax over cells, from the drawn latents."""
    logits = raw_logits(weights, as_tensor(z_nk))
    scale = float(logits.std())
    offset_g = np.log(_GENE_TOTAL) - (logits / scale).logsumexp(0) if preset == "released" else None
    return Decoder(weights, scale, offset_g, inverse_dispersion)


def _draw_cells(
    decoder: Decoder,
    z_nk: NDArray[np.float64],
    median: float,
    log_sd: float,
    library_rng: np.random.Generator,
    count_rng: np.random.Generator,
) -> _Cells:
    log_library_n = np.log(median) + log_sd * library_rng.standard_normal(len(z_nk))
    log_rate_ng = decoder.output(as_tensor(z_nk), as_tensor(log_library_n))
    return _Cells(decoder.counts(log_rate_ng, count_rng), z_nk, log_rate_ng.exp().sum(1).numpy())


def _assemble(
    cells: _Cells,
    target_n: NDArray[Any],
    split_n: NDArray[Any],
    names: list[str],
    shift_pk: NDArray[np.float64],
    graph_pk: NDArray[np.bool_],
    decoder: Decoder,
    settings: dict[str, Any],
) -> anndata.AnnData:
    n_cells, n_genes = cells.x_ng.shape
    obs = pd.DataFrame(
        {
            "target": pd.Categorical(target_n),
            "split": pd.Categorical(split_n),
            "library_true": cells.library_n,
        },
        index=[f"cell_{i:0{len(str(n_cells - 1))}d}" for i in range(n_cells)],
    )
    var = pd.DataFrame(index=[f"gene_{i:0{len(str(n_genes - 1))}d}" for i in range(n_genes)])
    record = {key: value for key, value in settings.items() if value is not None} | {
        "process": "sparse_shift",
        "interventions": np.array(names, dtype=object),
        "n_interventions": len(names),
        "shift_pk": shift_pk,
        "graph_pk": graph_pk,
    }
    uns = {"simulation": record}
    adata = anndata.AnnData(X=cells.x_ng, obs=obs, var=var, obsm={"z": cells.z_nk}, uns=uns)
    decoder.write(adata)
    return adata


def _check_settings(
    preset: str,
    n_latents: int,
    n_interventions: int,
    n_train: int,
    cells_per_intervention: int,
    n_control_cells: int,
) -> None:
    if preset not in get_args(Preset):
        raise DataError(
            f"expected a preset of {list(get_args(Preset))}, found {preset!r}. Pass one of these."
        )
    check_at_least("n_latents", n_latents, 1)
    check_at_least("n_interventions", n_interventions, 1)
    check_at_least("cells_per_intervention", cells_per_intervention, 1)
    check_at_least("n_control_cells", n_control_cells, 0)
    if not 0 <= n_train <= n_interventions:
        raise DataError(
            f"expected n_train between 0 and n_interventions = {n_interventions}, found {n_train}. "
            "Pass a smaller n_train, or leave it out for 80 %."
        )


def _check_interventions(
    n_latents: int, effect: float, sparsity: float | None, n_targeted_latents: int | None
) -> None:
    if effect < 0:
        raise DataError(
            f"expected effect of at least 0, found {effect}. The sign of a shift is drawn anyway."
        )
    if sparsity is not None and not 0 < sparsity <= 1:
        raise DataError(
            f"expected sparsity in (0, 1], found {sparsity}. "
            "It is the fraction of latents an intervention moves."
        )
    if n_targeted_latents is not None and not 1 <= n_targeted_latents <= n_latents:
        raise DataError(
            f"expected n_targeted_latents between 1 and n_latents = {n_latents}, found {n_targeted_latents}. "
            "Pass a number in this range, or leave it out to target all."
        )


def _check_clean_only(preset: str, *settings: float | None) -> None:
    names = ("library_size", "library_log_sd", "inverse_dispersion")
    given = [name for name, value in zip(names, settings, strict=True) if value is not None]
    if given and preset != "clean":
        raise DataError(
            f"expected {', '.join(given)} only with preset='clean', found preset={preset!r}. "
            "Leave it out, or use preset='clean'."
        )
    for name, value in zip(names, settings, strict=True):
        if value is not None and (value < 0 or (value == 0 and name != "library_log_sd")):
            raise DataError(f"expected {name} to be positive, found {value}. Pass a positive number.")
