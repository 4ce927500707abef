"""Sparse rotation: turn the latent axes so that perturbations shift few of them.

Gradient training of gated models stalls in a rotated basis: the latent space is found up to a linear
map, but in the wrong axes, in which every perturbation shifts every latent. Mechanism sparsity says what
the right axes are: those in which the shifts are sparse. They can be found directly.
"""

import numpy as np
import torch
from torch import Tensor, nn

from pyro_causalcell.batch import Rotation

__all__ = ["can_rotate", "sparse_rotation"]


def can_rotate(model: nn.Module, guide: nn.Module) -> bool:
    """Whether a pair can be warm-started: it offers ``rotate`` on both sides, and gates to hold open.

    The model has ``rotate(map_kk, offset_k)``. The guide has ``rotate(rotation)``, ``rotated_site`` (the
    latent whose axes turn), ``gate_sites`` (sites without weight while gates are held) and
    ``hold_gates_open(held)``.
    """
    offers = all(hasattr(guide, name) for name in ("rotate", "rotated_site", "hold_gates_open"))
    return hasattr(model, "rotate") and offers and bool(getattr(guide, "gate_sites", ()))


def sparse_rotation(
    z_nk: Tensor, u_np: Tensor, *, variance_k: Tensor | None = None, n_starts: int = 20, seed: int = 0
) -> Rotation:
    """Find the axes in which the targets' shifts are sparse.

    Shifts are regressed on the design, latents are whitened within perturbations, then the rotation that
    minimises the smoothed L1 norm of the shifts is sought from random starts and their quartimax solutions.

    Args:
        z_nk: Posterior means of the training cells.
        u_np: Their design; control cells are zero.
        variance_k: Average posterior variance of each latent, which the means do not show.
        n_starts: Random starts; the one with the smallest L1 norm is kept.
        seed: Seed of the starts.

    Returns:
        The map, the offset and the shifts in the new axes (float32, on the device of ``z_nk``).

    Source: the sparsity principle is Lachapelle et al., CLeaR 2022; quartimax is Carroll 1953.
    """
    z, u = z_nk.double().cpu().numpy(), u_np.double().cpu().numpy()
    seen_p = u.any(0)
    centre_k, shift_pk, within_kk, is_known = _regress(z, u[:, seen_p])
    if variance_k is not None:
        within_kk = within_kk + np.diag(variance_k.double().cpu().numpy())
    values, vectors = np.linalg.eigh(within_kk)
    whiten_kk = vectors / np.sqrt(np.maximum(values, 1e-8 * values.max())) @ vectors.T
    white_pk = shift_pk @ whiten_kk
    random = np.random.default_rng(seed).standard_normal((n_starts, z.shape[1], z.shape[1]))
    starts = [np.linalg.qr(start)[0] for start in random]
    starts += [_quartimax(white_pk, start) for start in starts]  # often one and the same, not always near
    rotations = [_refine(white_pk, start, is_known) for start in starts]
    rotation_kk = min(rotations, key=lambda r: np.abs(_centred(white_pk @ r, is_known)).sum())
    map_kk = (whiten_kk @ rotation_kk).T
    turned_pk = white_pk @ rotation_kk
    rotated_pk = np.zeros((u.shape[1], z.shape[1]))  # targets that no cell carries stay at zero
    rotated_pk[seen_p] = _centred(turned_pk, is_known)
    centre_k = map_kk @ centre_k + (turned_pk - rotated_pk[seen_p])[0]
    tensors = (torch.as_tensor(a, dtype=torch.float32) for a in (map_kk, -centre_k, rotated_pk))
    return Rotation(*(t.to(z_nk.device) for t in tensors))


def _regress(z: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """Position of control, shift of each target, covariance of what is left; is that position known?

    Control cells tell it, and so do combinations or doses beside single targets. Where nothing does, the
    typical target stands in.
    """
    design = np.column_stack([np.ones(len(u)), u])
    coefficients, _, rank, _ = np.linalg.lstsq(design, z, rcond=None)
    residual = z - design @ coefficients
    within_kk = residual.T @ residual / len(z)
    centre_k, shift_pk = coefficients[0], coefficients[1:]
    is_known = rank == design.shape[1]
    if not is_known:
        median_k = np.median(shift_pk, 0)
        centre_k, shift_pk = centre_k + median_k, shift_pk - median_k
    return centre_k, shift_pk, within_kk, bool(is_known)


def _polar(a: np.ndarray) -> np.ndarray:
    left, _, right = np.linalg.svd(a)
    return left @ right


def _quartimax(m: np.ndarray, rotation: np.ndarray, n_steps: int = 100) -> np.ndarray:
    """Fixed point of the rotation that maximises the sum of fourth powers."""
    for _ in range(n_steps):
        rotation = _polar(m.T @ (m @ rotation) ** 3)
    return rotation


def _centred(y: np.ndarray, is_known: bool) -> np.ndarray:
    """Where control's position is not known, the zero of each axis is where most targets are."""
    return y if is_known else y - np.median(y, 0)


def _refine(m: np.ndarray, rotation: np.ndarray, is_known: bool, n_steps: int = 100) -> np.ndarray:
    """Minimise Σ √(y² + ε²) over rotations by majorisation; each step is an SVD. ε shrinks."""
    for epsilon in (1.0, 0.5, 0.2):
        for _ in range(n_steps):
            y = _centred(m @ rotation, is_known)
            m = y @ rotation.T
            rotation = _polar(m.T @ ((1 / epsilon - 1 / np.sqrt(y**2 + epsilon**2)) * y))
    return rotation
