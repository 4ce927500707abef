"""The weight-variant latent SCM: perturbations change mechanisms of programmes; a background is invariant."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import anndata
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_causalcell.errors import DataError
from pyro_causalcell.simulate.decoder import (
    Noise,
    check_at_least,
    check_pairs,
    condition_names,
    designs,
    noise_settings,
    numbered,
    observe,
    random_weights,
    scaled_decoder,
    signed,
    simulation_record,
    sparse_targets,
    stream,
)

__all__ = ["Changes", "Mechanisms", "latent_scm", "rotated_scm"]

Changes = Literal["sparse", "dense"]
Floats = NDArray[np.float64]

_WEIGHTS = (0.4, 1.0)  # sizes of an edge: away from zero, so that an edge can be found
_LOG_VARIANCES = (math.log(0.5), math.log(2.0))
_EDGE_SHARE = 0.5


@dataclass(frozen=True)
class Mechanisms:
    """How the programmes arise in each condition: z = Λ z + n, n ~ Normal(mean, diag(variance)).

    The invariant programmes come first. Λ is strictly upper triangular within the invariant and within the
    responsive block, holds the effects of invariant on responsive programmes, and nothing else: entry
    [i, j] is the effect of programme j on programme i.

    Attributes:
        weight_ckk: Λ of each condition.
        mean_ck: means of the noise.
        variance_ck: variances of the noise.
    """

    weight_ckk: Floats
    mean_ck: Floats
    variance_ck: Floats

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Mechanisms":
        """Those that uns["simulation"] holds."""
        return cls(*(np.asarray(record[name]) for name in ("weight_ckk", "mean_ck", "variance_ck")))

    def total_effects(self) -> Floats:
        """(I - Λ)^-1, which maps noise to programmes, [c, k, k]."""
        return np.asarray(np.linalg.inv(np.eye(self.weight_ckk.shape[-1]) - self.weight_ckk), np.float64)

    def normal_law(self) -> tuple[Floats, Floats]:
        """The law of all programmes in each condition.

        Returns:
            Means [c, k], and roots R [c, k, k] of the precisions, R @ R.T.
        """
        mean_ck = np.einsum("cij,cj->ci", self.total_effects(), self.mean_ck)
        direct_ckk = np.eye(self.weight_ckk.shape[-1]) - self.weight_ckk
        return mean_ck, direct_ckk.mT / np.sqrt(self.variance_ck)[:, None]

    def altered(self) -> NDArray[np.bool_]:
        """Programmes whose mechanism differs from the first condition (control), [c, k]."""
        parts = (self.weight_ckk, self.mean_ck[..., None], self.variance_ck[..., None])
        differs = [~np.isclose(part, part[:1], rtol=0, atol=1e-9).all(-1) for part in parts]
        return np.logical_or.reduce(differs)

    def combined(self, design_cp: NDArray[np.bool_]) -> "Mechanisms":
        """Mechanisms of control (first) and single perturbations to those of any combinations.

        Changes from control add up: those of weights and means, and those of the log variances, so that a
        variance stays positive.
        """

        def summed(part: Floats) -> Floats:
            changes: Floats = np.tensordot(design_cp.astype(np.float64), part[1:] - part[0], 1)
            return part[0] + changes

        return Mechanisms(
            summed(self.weight_ckk), summed(self.mean_ck), np.exp(summed(np.log(self.variance_ck)))
        )


def latent_scm(
    *,
    n_genes: int = 500,
    n_responsive: int = 4,
    n_invariant: int = 7,
    n_perturbations: int = 12,
    n_combinations: int = 6,
    n_train: int = 3000,
    n_test: int = 1000,
    cells_per_combination: int = 100,
    changes: Changes = "sparse",
    effect: float = 2.0,
    likelihood: Noise = "none",
    noise_sd: float | None = None,
    library_size: float | None = None,
    library_log_sd: float | None = None,
    inverse_dispersion: float | None = None,
    decoder_layers: int = 3,
    seed: int = 0,
    decoder_seed: int | None = None,
) -> anndata.AnnData:
    r"""Simulates invariant programmes that drive responsive ones through weights which perturbations set.

    For a cell under perturbation u, with z_l the invariant and z_v the responsive programmes:

    .. math::
        z_l &= \Lambda_{ll} z_l + n_l, && n_l \sim \mathrm{N}(0, I) \\
        z_v &= \Lambda_{vl}(u) z_l + \Lambda_{vv}(u) z_v + n_v, && n_v \sim \mathrm{N}(\mu(u), \beta(u)) \\
        x &= g(z_l, z_v)

    Λ_ll and Λ_vv are strictly upper triangular. Control is the anchor: there Λ_vl = Λ_vv = 0, μ = 0, β = 1,
    so that control cells have independent responsive programmes of unit variance. g is a random injective
    network, its logits divided by one standard deviation over the training cells.

    With ``changes="sparse"`` a perturbation alters the mechanism (incoming weights, mean, variance) of one or
    two responsive programmes and leaves the others as in control; each of the first ``n_responsive``
    perturbations alters one programme alone. The edges it switches on lie in one graph that all
    perturbations share. With ``changes="dense"`` every perturbation alters all mechanisms and the graph is
    complete: then the responsive axes are not identified (see :func:`rotated_scm`).

    In a combination the changes of its perturbations from control add up: those of weights and means, and
    those of the log variances.

    **Twins.** Every cell has a control cell with the same invariant programmes, as if the same background had
    not been perturbed: ``layers["control_twin"]``. Its responsive programmes and its noise are its own. No
    real experiment has such pairs.

    Args:
        n_genes: Observed variables, at least 40.
        n_responsive: Programmes that perturbations act on.
        n_invariant: Background programmes; at most 40 programmes in all.
        n_perturbations: Perturbations besides control.
        n_combinations: Pairs of perturbations, drawn without repeats; their cells are all held out.
        n_train: Training cells, divided evenly over control and the perturbations.
        n_test: Test cells of the same conditions.
        cells_per_combination: Cells of each pair.
        changes: Which mechanisms a perturbation alters.
        effect: Largest shift of an altered programme's mean; the smallest is half of it, the sign is random.
        likelihood: "none" (x = g(z)), "gaussian" (noise around g(z)), or counts: "nb", "poisson", around
            library x softmax of g(z).
        noise_sd: Standard deviation of Gaussian noise, 0.2; a gene without it has one near 1.
        library_size: Median library of count data, 2,000.
        library_log_sd: Standard deviation of the log library of count data, 0.4.
        inverse_dispersion: Of negative binomial counts, 5: variance m + m**2 / inverse_dispersion.
        decoder_layers: Layers of g, the last one included. With more of them it is further from linear.
        seed: Seed of everything but the decoder. More test cells or combinations leave the others alone.
        decoder_seed: Seed of the decoder's weights; ``seed`` if None.

    Returns:
        AnnData with obs["target"] ("control", "perturbation_00", "perturbation_00+perturbation_03"),
        obs["split"] ("train", "test", or "heldout" for combinations), obsm["z_invariant"],
        obsm["z_responsive"], layers["control_twin"], obsm["z_responsive_twin"], and for counts
        obs["library_true"]. uns["simulation"] says that the data are simulated and holds the settings and
        the truth: conditions [c] (control first), design_cp, weight_ckk, mean_ck, variance_ck (as in
        ``Mechanisms``, invariant programmes first), altered_pv (responsive programmes that each
        perturbation alters), graph_vv and graph_vl (edges: does programme or background [., j] act on
        programme [i, .] under some perturbation), and the decoder.

    Raises:
        DataError: if a setting is out of its range or does not belong to the likelihood.

    Source: Identifying unperturbed cellular programs enables accurate single-cell perturbation prediction
    (cDAG-VAE, submitted to ICLR 2026), equations 1 to 3 and appendix C.2. The paper does not print ranges of
    weights, means and variances, nor which mechanisms a perturbation alters; these are choices made here.
    """
    _check_sizes(n_responsive, n_invariant, n_perturbations, n_combinations, n_train, n_test, effect)
    check_at_least("cells_per_combination", cells_per_combination, 1)
    given = {
        "noise_sd": noise_sd,
        "library_size": library_size,
        "library_log_sd": library_log_sd,
        "inverse_dispersion": inverse_dispersion,
    }
    noise = noise_settings(likelihood, given)
    if changes not in get_args(Changes):
        raise DataError(
            f"expected changes of {list(get_args(Changes))}, found {changes!r}. Pass one of these."
        )

    perturbations = numbered("perturbation", n_perturbations)
    graph_vk = _draw_graph(stream(seed, "graph"), n_responsive, n_invariant, changes)
    altered_pv = np.ones((n_perturbations, n_responsive), dtype=bool)
    if changes == "sparse":
        altered_pv = sparse_targets(stream(seed, "graph", 1), n_perturbations, n_responsive)
    singles = _draw_mechanisms(stream(seed, "shift"), graph_vk, altered_pv, effect)
    design_cp = designs(stream(seed, "combination"), n_perturbations, n_combinations)
    mechanisms = singles.combined(design_cp)

    measured = n_perturbations + 1
    condition_of = {
        "train": _evenly(n_train, measured),
        "test": _evenly(n_test, measured),
        "heldout": np.repeat(np.arange(measured, len(design_cp)), cells_per_combination),
    }
    drawn = [
        _draw_programmes(mechanisms, condition_n, n_invariant, stream(seed, "latent", part))
        for part, condition_n in enumerate(condition_of.values())
    ]
    decoder_seed = seed if decoder_seed is None else decoder_seed
    weights = random_weights(
        stream(decoder_seed, "decoder"), n_invariant + n_responsive, n_genes, decoder_layers
    )
    decoder = scaled_decoder(weights, drawn[0].z_nk, n_genes, noise)
    cells = [observe(decoder, z.z_nk, noise, seed, 0, part) for part, z in enumerate(drawn)]
    twins = [observe(decoder, z.twin_nk, noise, seed, 1, part)[0] for part, z in enumerate(drawn)]

    record = {
        "simulated": True,
        "process": "latent_scm",
        "n_genes": n_genes,
        "n_responsive": n_responsive,
        "n_invariant": n_invariant,
        "n_perturbations": n_perturbations,
        "n_combinations": n_combinations,
        "n_train": n_train,
        "n_test": n_test,
        "cells_per_combination": cells_per_combination,
        "changes": changes,
        "effect": effect,
        "likelihood": likelihood,
        "decoder_layers": decoder_layers,
        "seed": seed,
        "decoder_seed": decoder_seed,
        **noise,
        "perturbations": np.array(perturbations, dtype=object),
        "conditions": np.array(condition_names(perturbations, design_cp), dtype=object),
        "design_cp": design_cp,
        "graph_vv": graph_vk[:, n_invariant:],
        "graph_vl": graph_vk[:, :n_invariant],
        **_truth(mechanisms, n_invariant, n_perturbations),
    }
    condition_n = np.concatenate(list(condition_of.values()))
    obs = pd.DataFrame(
        {
            "target": pd.Categorical(record["conditions"][condition_n]),
            "split": pd.Categorical(np.repeat(list(condition_of), [len(c) for c in condition_of.values()])),
        },
        index=numbered("cell", len(condition_n)),
    )
    if "library_size" in noise:
        obs["library_true"] = np.concatenate([np.exp(log_library_n) for _, log_library_n in cells])
    adata = anndata.AnnData(
        X=np.concatenate([x_ng for x_ng, _ in cells]),
        obs=obs,
        var=pd.DataFrame(index=numbered("gene", n_genes)),
        layers={"control_twin": np.concatenate(twins)},
        obsm={
            "z_invariant": np.concatenate([z.z_nk[:, :n_invariant] for z in drawn]),
            "z_responsive": np.concatenate([z.z_nk[:, n_invariant:] for z in drawn]),
            "z_responsive_twin": np.concatenate([z.twin_nk[:, n_invariant:] for z in drawn]),
        },
        uns={"simulation": record},
    )
    decoder.write(adata)
    return adata


def rotated_scm(adata: anndata.AnnData, rotation_vv: Floats) -> anndata.AnnData:
    """The same cells with another truth: responsive axes turned, and a triangular SCM in the new axes.

    Control has independent responsive programmes of unit variance in any orthogonal axes. In the other
    conditions the law of the turned programmes given the invariant ones is Normal with some precision P; its
    factor P = (I - Λ)ᵀ D^-1 (I - Λ), with unit triangular I - Λ, is a weight matrix and noise of the same
    form. The decoder turns the axes back. So p(x | u) is the same: without sparse changes nothing in the data
    prefers the one truth to the other. A combination's mechanisms are no longer sums of those of its parts.

    Args:
        adata: result of :func:`latent_scm`.
        rotation_vv: orthogonal matrix [responsive, responsive]; new z_v = rotation_vv @ z_v.

    Returns:
        AnnData with the same X, whose latents and uns["simulation"] are the other truth. graph_vv and
        graph_vl hold the edges of the new weights.

    Raises:
        DataError: if ``adata`` is not from :func:`latent_scm` or the matrix is not orthogonal.
    """
    record = simulation_record(adata, "latent_scm")
    n_l, n_v = int(record["n_invariant"]), int(record["n_responsive"])
    rotation_vv = np.asarray(rotation_vv, dtype=np.float64)
    eye = np.eye(n_v)
    if rotation_vv.shape != eye.shape or not np.allclose(rotation_vv @ rotation_vv.T, eye, atol=1e-8):
        raise DataError(
            f"expected an orthogonal matrix of {n_v} x {n_v}, found shape {rotation_vv.shape} or columns "
            "that are not orthonormal. Draw one with scipy.stats.ortho_group."
        )
    mechanisms = _rotated(Mechanisms.from_record(record), rotation_vv, n_l)
    turned = adata.copy()
    for name in ("z_responsive", "z_responsive_twin"):
        turned.obsm[name] = adata.obsm[name] @ rotation_vv.T
    first = np.array(record["decoder"]["hidden_0"])
    first[n_l:] = rotation_vv @ first[n_l:]
    on_vk = np.abs(mechanisms.weight_ckk[:, n_l:]).max(0) > 1e-9
    turned.uns["simulation"] = (
        record
        | {"decoder": dict(record["decoder"]) | {"hidden_0": first}}
        | {"graph_vl": on_vk[:, :n_l], "graph_vv": on_vk[:, n_l:]}
        | _truth(mechanisms, n_l, int(record["n_perturbations"]))
    )
    return turned


def _rotated(mechanisms: Mechanisms, rotation_vv: Floats, n_l: int) -> Mechanisms:
    """Turns the responsive block of every condition and factors its precision anew."""
    weight_ckk, mean_ck = mechanisms.weight_ckk.copy(), mechanisms.mean_ck.copy()
    variance_ck = mechanisms.variance_ck.copy()
    for c in range(len(weight_ckk)):
        direct_vv = (np.eye(len(rotation_vv)) - weight_ckk[c, n_l:, n_l:]) @ rotation_vv.T
        precision_vv = direct_vv.T / variance_ck[c, n_l:] @ direct_vv
        lower_vv = np.linalg.cholesky(precision_vv)
        unit_vv = (lower_vv / lower_vv.diagonal()).T  # the new I - Λ_vv
        # z_v given z_l has mean (I - Λ_vv)^-1 (Λ_vl z_l + μ); both terms turn.
        old = np.column_stack([weight_ckk[c, n_l:, :n_l], mean_ck[c, n_l:]])
        new = unit_vv @ np.linalg.solve(direct_vv, old)
        weight_ckk[c, n_l:, :n_l], mean_ck[c, n_l:] = new[:, :-1], new[:, -1]
        weight_ckk[c, n_l:, n_l:] = np.triu(np.eye(len(unit_vv)) - unit_vv, 1)
        variance_ck[c, n_l:] = lower_vv.diagonal() ** -2
    return Mechanisms(weight_ckk, mean_ck, variance_ck)


class _Programmes(NamedTuple):
    """Programmes of cells and of their control twins, invariant ones first."""

    z_nk: Floats
    twin_nk: Floats


def _draw_programmes(
    mechanisms: Mechanisms, condition_n: NDArray[np.int64], n_invariant: int, rng: np.random.Generator
) -> _Programmes:
    n, k = len(condition_n), mechanisms.mean_ck.shape[1]
    noise_nk = mechanisms.mean_ck[condition_n]
    noise_nk = noise_nk + np.sqrt(mechanisms.variance_ck[condition_n]) * rng.standard_normal((n, k))
    z_nk = np.einsum("nij,nj->ni", mechanisms.total_effects()[condition_n], noise_nk)
    own_nv = rng.standard_normal((n, k - n_invariant))
    return _Programmes(z_nk, np.column_stack([z_nk[:, :n_invariant], own_nv]))


def _draw_graph(
    rng: np.random.Generator, n_responsive: int, n_invariant: int, changes: Changes
) -> NDArray[np.bool_]:
    """Edges into responsive programmes, [responsive, all programmes]."""
    share = 1.0 if changes == "dense" else _EDGE_SHARE
    on_vk = rng.random((n_responsive, n_invariant + n_responsive)) < share
    on_vk[:, n_invariant:] = np.triu(on_vk[:, n_invariant:], 1)
    return on_vk


def _draw_mechanisms(
    rng: np.random.Generator, graph_vk: NDArray[np.bool_], altered_pv: NDArray[np.bool_], effect: float
) -> Mechanisms:
    """Mechanisms of control and of each perturbation alone."""
    (n_v, k), n_p = graph_vk.shape, len(altered_pv)
    n_l = k - n_v
    weight_ckk = np.zeros((n_p + 1, k, k))
    background_ll = np.triu(rng.random((n_l, n_l)) < _EDGE_SHARE, 1)
    weight_ckk[:, :n_l, :n_l] = background_ll * signed(rng, _WEIGHTS, (n_l, n_l))
    weight_pvk = graph_vk * signed(rng, _WEIGHTS, (n_p, n_v, k))
    weight_ckk[1:, n_l:] = np.where(altered_pv[..., None], weight_pvk, 0)
    mean_ck, variance_ck = np.zeros((n_p + 1, k)), np.ones((n_p + 1, k))
    mean_ck[1:, n_l:] = np.where(altered_pv, signed(rng, (effect / 2, effect), altered_pv.shape), 0)
    log_variance_pv = rng.uniform(*_LOG_VARIANCES, altered_pv.shape)
    variance_ck[1:, n_l:] = np.exp(np.where(altered_pv, log_variance_pv, 0))
    return Mechanisms(weight_ckk, mean_ck, variance_ck)


def _evenly(n_cells: int, n_conditions: int) -> NDArray[np.int64]:
    """Condition of each cell; the first conditions get the cells left over."""
    return np.sort(np.arange(n_cells, dtype=np.int64) % n_conditions)


def _truth(mechanisms: Mechanisms, n_invariant: int, n_perturbations: int) -> dict[str, Any]:
    return {
        "weight_ckk": mechanisms.weight_ckk,
        "mean_ck": mechanisms.mean_ck,
        "variance_ck": mechanisms.variance_ck,
        "altered_pv": mechanisms.altered()[1 : n_perturbations + 1, n_invariant:],
    }


def _check_sizes(
    n_responsive: int,
    n_invariant: int,
    n_perturbations: int,
    n_combinations: int,
    n_train: int,
    n_test: int,
    effect: float,
) -> None:
    check_at_least("n_responsive", n_responsive, 1)
    check_at_least("n_invariant", n_invariant, 1)
    check_at_least("n_perturbations", n_perturbations, 1)
    check_at_least("n_train", n_train, n_perturbations + 1)
    check_at_least("n_test", n_test, 0)
    check_at_least("effect", effect, 0)
    check_pairs(n_combinations, n_perturbations)
