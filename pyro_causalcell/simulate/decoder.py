"""What the simulators share: the random decoder, streams of random numbers, and the record of the truth."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any, Literal

import anndata
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_causalcell.errors import DataError

__all__ = [
    "CONTROL",
    "HIDDEN",
    "SLOPE",
    "Decoder",
    "Noise",
    "as_tensor",
    "check_at_least",
    "check_pairs",
    "condition_names",
    "designs",
    "expected_counts",
    "log_library",
    "noise_settings",
    "numbered",
    "observe",
    "random_weights",
    "raw_logits",
    "scaled_decoder",
    "signed",
    "simulation_record",
    "sparse_targets",
    "stream",
    "true_latents",
]

CONTROL = "control"
HIDDEN = 40
SLOPE = 0.2

Noise = Literal["none", "gaussian", "nb", "poisson"]
_NOISE_DEFAULTS: dict[str, dict[str, float]] = {
    "none": {},
    "gaussian": {"noise_sd": 0.2},
    "poisson": {"library_size": 2000.0, "library_log_sd": 0.4},
    "nb": {"library_size": 2000.0, "library_log_sd": 0.4, "inverse_dispersion": 5.0},
}
_MANY_TARGETS_SHARE = 0.5  # perturbations beyond the first few that alter two programmes

# One random stream per purpose, so that a changed setting leaves the other draws alone. Append only.
_STREAMS = (
    *("decoder", "graph", "shift", "latent", "library", "count", "control", "out_of_domain"),
    *("combination", "twin", "genes", "embedding", "truth", "missing"),
)


@dataclass(frozen=True)
class Decoder:
    """The true map from latents to observations, p(x | z).

    A bias-free network with hidden layers of 40 units and LeakyReLU(0.2). Its logits are divided by one
    number, ``logit_scale``. Counts: either ``log rate = logits + log_offset_g`` (released: the constants of a
    softmax over cells), or ``log rate = log library + log softmax over genes``. With ``noise_sd`` the
    observations are real numbers around the logits.

    Attributes:
        weights: one matrix a layer, [in, out] each, float64.
        logit_scale: standard deviation of the raw logits over the simulated data set.
        log_offset_g: what is added to the logits, or None for a softmax over genes.
        inverse_dispersion: negative binomial inverse dispersion, or None for Poisson counts.
        noise_sd: standard deviation of Gaussian noise, 0 for none; None for counts.
    """

    weights: tuple[Tensor, ...]
    logit_scale: float
    log_offset_g: Tensor | None
    inverse_dispersion: float | None
    noise_sd: float | None = None

    @classmethod
    def from_anndata(cls, adata: anndata.AnnData) -> "Decoder":
        """Reads the decoder back from a simulated AnnData.

        Raises:
            DataError: if the data were not made by a simulator with such a decoder, or genes were removed.
        """
        record = simulation_record(adata, "sparse_shift", "latent_scm", "temporal_scm")
        hidden = [as_tensor(record["decoder"][f"hidden_{i}"]) for i in range(len(record["decoder"]))]
        offset = as_tensor(adata.var["log_offset"].to_numpy()) if "log_offset" in adata.var else None
        dispersion, noise_sd = record.get("inverse_dispersion"), record.get("noise_sd")
        return cls(
            weights=(*hidden, as_tensor(adata.varm["decoder_output"]).T),
            logit_scale=float(record["logit_scale"]),
            log_offset_g=offset,
            inverse_dispersion=None if dispersion is None else float(dispersion),
            noise_sd=None if noise_sd is None else float(noise_sd),
        )

    def write(self, adata: anndata.AnnData) -> None:
        """Stores the network where :meth:`from_anndata` finds it; the record must already be in uns."""
        record = adata.uns["simulation"]
        record["logit_scale"] = self.logit_scale
        record["decoder"] = {f"hidden_{i}": weight.numpy() for i, weight in enumerate(self.weights[:-1])}
        adata.varm["decoder_output"] = np.ascontiguousarray(self.weights[-1].T.numpy())
        if self.log_offset_g is not None:
            adata.var["log_offset"] = self.log_offset_g.numpy()

    def output(self, z_nk: Tensor, log_library_n: Tensor) -> Tensor:
        """Log of the expected counts; the expected observations where the noise is Gaussian.

        Args:
            z_nk: latents, any leading shape.
            log_library_n: log library, the leading shape of ``z_nk``; not used when ``log_offset_g`` is set.

        Returns:
            Tensor of the leading shape by genes.
        """
        logits = raw_logits(self.weights, z_nk) / self.logit_scale
        if self.log_offset_g is not None:
            return logits + self.log_offset_g
        return logits.log_softmax(-1) + log_library_n[..., None]

    def counts(self, log_rate_ng: Tensor, rng: np.random.Generator) -> NDArray[np.int32]:
        """Poisson or negative binomial counts around expected ones."""
        mean_ng = log_rate_ng.exp().numpy()
        if self.inverse_dispersion is not None:
            theta = self.inverse_dispersion
            mean_ng = mean_ng * rng.gamma(theta, 1 / theta, mean_ng.shape)
        return rng.poisson(mean_ng).astype(np.int32)


def random_weights(
    rng: np.random.Generator, n_latents: int, n_genes: int, n_layers: int
) -> tuple[Tensor, ...]:
    """One random matrix a layer, the last one to genes, with orthonormal rows: the network is injective.

    Raises:
        DataError: if there are fewer than two layers, or one would be narrower than the one before it.
    """
    check_at_least("decoder_layers", n_layers, 2)
    if n_latents > HIDDEN or n_genes < HIDDEN:
        raise DataError(
            f"expected at most {HIDDEN} latents and at least {HIDDEN} genes, found {n_latents} and "
            f"{n_genes}. The decoder would not be injective: change the number of latents or n_genes."
        )
    weights = []
    for fan_in, fan_out in pairwise((n_latents, *[HIDDEN] * (n_layers - 1), n_genes)):
        q, r = np.linalg.qr(rng.standard_normal((fan_out, fan_in)))
        gain = np.sqrt(2 / (1 + SLOPE**2)) * np.sqrt(2 / (fan_in + fan_out))
        weights.append(as_tensor((q * np.sign(np.diag(r))).T * gain))
    return tuple(weights)


def raw_logits(weights: Sequence[Tensor], z_nk: Tensor) -> Tensor:
    """Output of the network before scaling, [..., genes]."""
    hidden = z_nk
    for weight in weights[:-1]:
        hidden = torch.nn.functional.leaky_relu(hidden @ weight, SLOPE)
    return hidden @ weights[-1]


def expected_counts(adata: anndata.AnnData, rows: NDArray[Any] | None = None) -> NDArray[np.float64]:
    """The true expected counts of simulated cells given their true latents.

    Args:
        adata: result of ``sparse_shift``, ``out_of_domain``, ``latent_scm`` or ``temporal_scm``.
        rows: cell numbers or a boolean mask; all cells if None.

    Returns:
        Array [rows, genes]; the observations without their noise, where the data are no counts.

    Raises:
        DataError: if ``adata`` holds no such simulation.
    """
    decoder = Decoder.from_anndata(adata)
    rows = np.arange(adata.n_obs) if rows is None else np.asarray(rows)
    output_ng = decoder.output(true_latents(adata, rows), log_library(adata, rows))
    return (output_ng.exp() if decoder.noise_sd is None else output_ng).numpy()


def true_latents(adata: anndata.AnnData, rows: NDArray[Any]) -> Tensor:
    """The decoder's input of some cells, [rows, k]."""
    blocks = ("z",) if "z" in adata.obsm else ("z_invariant", "z_responsive")
    return as_tensor(np.hstack([np.asarray(adata.obsm[block])[rows] for block in blocks]))


def log_library(adata: anndata.AnnData, rows: NDArray[Any]) -> Tensor:
    """The log of the true library of some cells, [rows]; zeros where the data are no counts."""
    if "library_true" not in adata.obs:
        return as_tensor(np.zeros(adata.n_obs)[rows])
    return as_tensor(np.log(adata.obs["library_true"].to_numpy()[rows]))


def simulation_record(adata: anndata.AnnData, *processes: str) -> dict[str, Any]:
    """The settings and truth that one of these processes left in uns["simulation"].

    Raises:
        DataError: if there is none, or if genes were removed since.
    """
    record = adata.uns.get("simulation")
    if not isinstance(record, Mapping) or record.get("process") not in processes:
        made_by = " or ".join(f"simulate.{process}" for process in processes)
        raise DataError(
            f"expected data made by {made_by}, found no such truth in uns['simulation']. "
            "Pass the AnnData the simulator returned, or the file it was written to."
        )
    if adata.n_vars != int(record["n_genes"]):
        raise DataError(
            f"expected the {int(record['n_genes'])} simulated genes, found {adata.n_vars}. "
            "The true model needs all of them: pass the AnnData before genes were selected."
        )
    return dict(record)


def stream(seed: int, purpose: str, *part: int) -> np.random.Generator:
    """The random numbers of one purpose, and of one part of it."""
    key = (_STREAMS.index(purpose), *part)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def as_tensor(array: Any) -> Tensor:
    """A float64 tensor that owns its memory."""
    return torch.as_tensor(np.array(array, dtype=np.float64))


def numbered(prefix: str, n: int) -> list[str]:
    """prefix_00, prefix_01 and so on, all of one length."""
    width = max(2, len(str(n - 1)))
    return [f"{prefix}_{i:0{width}d}" for i in range(n)]


def check_at_least(name: str, value: float, least: float) -> None:
    """Refuses a setting below its least value."""
    if value < least:
        raise DataError(f"expected {name} of at least {least}, found {value}. Pass a larger {name}.")


def signed(
    rng: np.random.Generator, sizes: tuple[float, float], shape: tuple[int, ...]
) -> NDArray[np.float64]:
    """Numbers of a size in the range, with a random sign."""
    return rng.uniform(*sizes, shape) * rng.choice([-1.0, 1.0], shape)


def sparse_targets(rng: np.random.Generator, n_perturbations: int, n_responsive: int) -> NDArray[np.bool_]:
    """One or two programmes for each perturbation, one for each of the first few, [p, v]."""
    altered_pv = np.zeros((n_perturbations, n_responsive), dtype=bool)
    for p, altered_v in enumerate(altered_pv):
        altered_v[p % n_responsive] = True
        if p >= n_responsive and rng.random() < _MANY_TARGETS_SHARE:
            altered_v[rng.integers(n_responsive)] = True
    return altered_pv


def designs(rng: np.random.Generator, n_perturbations: int, n_combinations: int) -> NDArray[np.bool_]:
    """Control, the perturbations, and random pairs of them, [conditions, perturbations]."""
    pairs = list(combinations(range(n_perturbations), 2))
    design_cp = np.zeros((1 + n_perturbations + n_combinations, n_perturbations), dtype=bool)
    design_cp[1 : n_perturbations + 1] = np.eye(n_perturbations, dtype=bool)
    for row_p, i in zip(
        design_cp[n_perturbations + 1 :], sorted(rng.permutation(len(pairs))[:n_combinations]), strict=True
    ):
        row_p[list(pairs[i])] = True
    return design_cp


def condition_names(perturbations: list[str], design_cp: NDArray[np.bool_]) -> list[str]:
    """control, or the perturbations of a condition joined by "+"."""
    return ["+".join(perturbations[p] for p in np.flatnonzero(row)) or CONTROL for row in design_cp]


def noise_settings(likelihood: str, given: dict[str, float | None]) -> dict[str, float]:
    """The settings of a likelihood, its defaults where none is given."""
    if likelihood not in _NOISE_DEFAULTS:
        raise DataError(
            f"expected a likelihood of {list(_NOISE_DEFAULTS)}, found {likelihood!r}. Pass one of these."
        )
    settings = dict(_NOISE_DEFAULTS[likelihood])
    for name, value in given.items():
        if value is None:
            continue
        if name not in settings:
            able = [key for key, names in _NOISE_DEFAULTS.items() if name in names]
            raise DataError(
                f"expected {name} only with a likelihood that has it, found likelihood={likelihood!r}. "
                f"Leave it out, or use one of {able}."
            )
        if value < 0 or (value == 0 and name != "library_log_sd"):
            raise DataError(f"expected {name} to be positive, found {value}. Pass a positive number.")
        settings[name] = float(value)
    return settings if likelihood != "none" else {"noise_sd": 0.0}


def scaled_decoder(
    weights: tuple[Any, ...], z_nk: NDArray[np.float64], n_genes: int, noise: dict[str, float]
) -> Decoder:
    """The decoder that the settings of a likelihood ask for, its logits scaled on these cells."""
    scale = float(raw_logits(weights, as_tensor(z_nk)).std())
    offset_g = None if "library_size" in noise else as_tensor(np.zeros(n_genes))
    return Decoder(weights, scale, offset_g, noise.get("inverse_dispersion"), noise.get("noise_sd"))


def observe(
    decoder: Decoder, z_nk: NDArray[np.float64], noise: Mapping[str, float], seed: int, *part: int
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Observations of cells, and their log library (zeros where they are no counts)."""
    log_library_n = np.zeros(len(z_nk))
    if "library_size" in noise:
        spread_n = stream(seed, "library", *part).standard_normal(len(z_nk))
        log_library_n = math.log(noise["library_size"]) + noise["library_log_sd"] * spread_n
    output_ng = decoder.output(as_tensor(z_nk), as_tensor(log_library_n))
    rng = stream(seed, "count", *part)
    if decoder.noise_sd is None:
        return decoder.counts(output_ng, rng), log_library_n
    return output_ng.numpy() + decoder.noise_sd * rng.standard_normal(output_ng.shape), log_library_n


def check_pairs(n_combinations: int, n_perturbations: int) -> None:
    """Refuses more combinations than there are pairs of perturbations."""
    pairs = math.comb(n_perturbations, 2)
    if not 0 <= n_combinations <= pairs:
        raise DataError(
            f"expected n_combinations between 0 and {pairs}, the pairs of {n_perturbations} perturbations, "
            f"found {n_combinations}. Pass a number in this range."
        )
