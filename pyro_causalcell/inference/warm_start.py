"""Sparse rotation: turn the latent axes so that perturbations shift few of them.

Gradient training of gated models stalls in a rotated basis: the latent space is found up to a linear
map, but in the wrong axes, in which every perturbation shifts every latent. Mechanism sparsity says what
the right axes are: those in which the shifts are sparse. They can be found directly.
"""

from itertools import combinations

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import lsqr
from torch import Tensor, nn

from pyro_causalcell.batch import Mechanisms, Rotation

__all__ = ["block_rotation", "can_rotate", "sparse_rotation"]

ALTERED_ABOVE = 0.2
"""A mechanism counts as altered where what its change explains (nats per cell) exceeds this share of the
largest change of the target: what a rotation leaves behind is proportional to what it left."""
LEAST_GAIN = 0.05
"""Nats per cell below which no mechanism counts as altered."""
CLEAR_CHANGE = 0.1
"""Nats per cell of a change that counts half when changed programmes are counted."""
LEAST_WEIGHT = 0.3
"""Root mean square weight, over the mechanisms that are altered, below which an edge starts closed."""
RIDGE = 0.02
"""Ridge of the regression of a programme on its possible parents, as a share of the cells."""


def can_rotate(model: nn.Module, guide: nn.Module) -> bool:
    """Whether a pair can be warm-started: it offers ``rotate`` on both sides, and gates to hold open.

    The model has ``rotate(map_kk, offset_k)``. The guide has ``rotate(rotation)``, ``rotated_site`` (the
    latent whose axes turn, or two: invariant and responsive programmes), ``gate_sites`` (sites without weight
    while gates are held) and ``hold_gates_open(held)``, which the model may have as well.
    """
    offers = all(hasattr(guide, name) for name in ("rotate", "rotated_site", "hold_gates_open"))
    return hasattr(model, "rotate") and offers and bool(getattr(guide, "gate_sites", ()))


def sparse_rotation(
    z_nk: Tensor,
    u_np: Tensor | sparse.csr_matrix,
    *,
    variance_k: Tensor | None = None,
    n_starts: int = 20,
    seed: int = 0,
) -> Rotation:
    """Find the axes in which the targets' shifts are sparse.

    Shifts are regressed on the design, latents are whitened within perturbations, then the rotation that
    minimises the smoothed L1 norm of the shifts is sought from random starts and their quartimax solutions.

    Args:
        z_nk: Posterior means of the training cells.
        u_np: Their design, dense or sparse; control cells are zero.
        variance_k: Average posterior variance of each latent, which the means do not show.
        n_starts: Random starts; the one with the smallest L1 norm is kept.
        seed: Seed of the starts.

    Returns:
        The map, the offset and the shifts in the new axes (float32, on the device of ``z_nk``).

    Source: the sparsity principle is Lachapelle et al., CLeaR 2022; quartimax is Carroll 1953.
    """
    z = z_nk.double().cpu().numpy()
    u_dp, design_n = distinct_designs(u_np)
    seen_p = u_dp.getnnz(0) > 0
    centre_k, shift_pk, within_kk, is_known = _regress(z, u_dp[:, seen_p], design_n)
    if variance_k is not None:
        within_kk = within_kk + np.diag(variance_k.double().cpu().numpy())
    whiten_kk = inverse_root(within_kk)
    white_pk = shift_pk @ whiten_kk
    random = np.random.default_rng(seed).standard_normal((n_starts, z.shape[1], z.shape[1]))
    starts = [np.linalg.qr(start)[0] for start in random]
    starts += [_quartimax(white_pk, start) for start in starts]  # often one and the same, not always near
    rotations = [refine(white_pk, start, is_known) for start in starts]
    rotation_kk = min(rotations, key=lambda r: np.abs(_centred(white_pk @ r, is_known)).sum())
    map_kk = (whiten_kk @ rotation_kk).T
    turned_pk = white_pk @ rotation_kk
    rotated_pk = np.zeros((u_dp.shape[1], z.shape[1]))  # targets that no cell carries stay at zero
    rotated_pk[seen_p] = _centred(turned_pk, is_known)
    centre_k = map_kk @ centre_k + (turned_pk - rotated_pk[seen_p])[0]
    return Rotation(single_precision(map_kk), single_precision(-centre_k), single_precision(rotated_pk)).to(
        z_nk.device
    )


def block_rotation(
    z_nk: Tensor,
    u_np: Tensor | sparse.csr_matrix,
    n_invariant: int,
    *,
    variance_k: Tensor,
    n_starts: int = 20,
    seed: int = 0,
) -> Rotation:
    """Find axes of which some are the same under all perturbations, and the rest change sparsely.

    In the axes in which control cells are standard normal, a programme that no perturbation touches has
    mean 0 and variance 1 in every condition and no correlation with others that depends on it. The
    directions that deviate least from that are the invariant programmes. The others, independent of them
    in control, are turned so that in few conditions few of them leave the standard normal: what a
    perturbation does not change has no parents and stays there. Then the mechanism of each programme is
    read off by regression, and programmes are ordered so that parents come last.

    Args:
        z_nk: Posterior means of the training cells.
        u_np: Their design, dense or sparse; control cells are zero.
        n_invariant: Invariant programmes l.
        variance_k: Average posterior variance of each latent, which the means do not show.
        n_starts: Random starts of the turn of the responsive block.
        seed: Seed of the starts.

    Returns:
        The map, the offset, the shifts of all programmes, and the mechanisms.
    """
    z = z_nk.double().cpu().numpy()
    extra_kk = np.diag(variance_k.double().cpu().numpy())
    u_dp, design_n = distinct_designs(u_np)
    has_control = u_dp[0].nnz == 0
    origin = z[design_n == 0] if has_control else z
    centre_k = origin.mean(0)
    whiten_kk = inverse_root(np.cov(origin.T) + extra_kk)
    white = (z - centre_k) @ whiten_kk
    extra_kk = whiten_kk @ extra_kk @ whiten_kk
    means, excesses, sizes = [], [], []
    for rows in rows_of(design_n, u_dp.shape[0])[1:] if has_control else []:
        cells = white[rows]
        if len(cells) > len(extra_kk):
            means.append(cells.mean(0))
            excesses.append(np.cov(cells.T) + extra_kk - np.eye(len(extra_kk)))
            sizes.append(len(cells))
    blocks_kk = unchanged_first(np.array(means), np.array(excesses), np.array(sizes), n_invariant)
    map_kk = (whiten_kk @ blocks_kk).T
    turned_ckk = np.einsum("ki,ckl,lj->cij", blocks_kk, np.array(excesses), blocks_kk) + np.eye(len(map_kk))
    turn_vv = _few_changes(
        (np.array(means) @ blocks_kk)[:, n_invariant:],
        turned_ckk[:, n_invariant:, n_invariant:],
        np.random.default_rng(seed),
        n_starts,
    )
    axes_kk = blocks_kk.copy()
    axes_kk[:, n_invariant:] = blocks_kk[:, n_invariant:] @ turn_vv.T
    order_v, mechanisms = _mechanisms(
        white @ axes_kk, u_dp[design_n], n_invariant, axes_kk.T @ extra_kk @ axes_kk
    )
    turn_vv = turn_vv[order_v]
    map_kk[n_invariant:] = turn_vv @ map_kk[n_invariant:]
    shift_pk = np.zeros((u_dp.shape[1], len(map_kk)))
    shift_pk[:, n_invariant:] = mechanisms[2]
    altered_pv, edge_vk, *changes = mechanisms
    seen = Mechanisms(torch.as_tensor(altered_pv), torch.as_tensor(edge_vk), *map(single_precision, changes))
    turn = Rotation(
        single_precision(map_kk), single_precision(-map_kk @ centre_k), single_precision(shift_pk), seen
    )
    return turn.to(z_nk.device)


def unchanged_first(
    mean_ck: np.ndarray, excess_ckk: np.ndarray, size_c: np.ndarray, n_invariant: int, n_steps: int = 30
) -> np.ndarray:
    """Orthogonal axes of which the first few have the same joint law in all conditions.

    Minimises Σ n (‖P m‖² + ‖P (C − I) P‖² / 2) over projections P: to second order, twice the divergence of
    their law from control's. Covariance with the other axes may change: that is what an edge does. Each step
    is an eigenproblem.
    """
    weight_c = size_c / size_c.sum()
    shifted_kk = np.einsum("c,ci,cj->ij", weight_c, mean_ck, mean_ck)
    _, axes_kk = np.linalg.eigh(shifted_kk)
    for _ in range(n_steps):
        first_kl = axes_kk[:, :n_invariant]
        spread_ckl = excess_ckk @ first_kl
        _, axes_kk = np.linalg.eigh(shifted_kk + np.einsum("c,cil,cjl->ij", weight_c, spread_ckl, spread_ckl))
    return axes_kk


def _few_changes(
    mean_cv: np.ndarray, covariance_cvv: np.ndarray, rng: np.random.Generator, n_starts: int
) -> np.ndarray:
    """The rotation after which fewest programmes of fewest conditions deviate from the standard normal."""
    n_v = mean_cv.shape[1]
    starts = [np.eye(n_v), *(np.linalg.qr(rng.standard_normal((n_v, n_v)))[0] for _ in range(n_starts))]
    turned = [_by_planes(mean_cv, covariance_cvv, start) for start in starts]
    return min(turned, key=lambda found: found[0])[1]


def _by_planes(
    mean_cv: np.ndarray,
    covariance_cvv: np.ndarray,
    turn_vv: np.ndarray,
    n_sweeps: int = 10,
    n_angles: int = 90,
) -> tuple[float, np.ndarray]:
    """Turns one plane after the other to its best angle, until none helps; returns the deviation left."""
    mean_cv = mean_cv @ turn_vv.T
    covariance_cvv = turn_vv @ covariance_cvv @ turn_vv.T
    angle_a1 = np.linspace(0, np.pi, n_angles, endpoint=False)[:, None]
    cos_a1, sin_a1 = np.cos(angle_a1), np.sin(angle_a1)
    for _ in range(n_sweeps):
        moved = False
        for i, j in combinations(range(len(turn_vv)), 2):
            own_c, other_c, both_c = (covariance_cvv[:, a, b] for a, b in ((i, i), (j, j), (i, j)))
            mixed_ac = 2 * cos_a1 * sin_a1 * both_c
            deviation_a = _deviation(
                cos_a1 * mean_cv[:, i] + sin_a1 * mean_cv[:, j],
                cos_a1**2 * own_c + sin_a1**2 * other_c + mixed_ac,
            )
            deviation_a += _deviation(
                cos_a1 * mean_cv[:, j] - sin_a1 * mean_cv[:, i],
                cos_a1**2 * other_c + sin_a1**2 * own_c - mixed_ac,
            )
            best = int(deviation_a.argmin())
            if deviation_a[best] < deviation_a[0] - 1e-9:
                plane_vv = np.eye(len(turn_vv))
                plane_vv[[i, i, j, j], [i, j, i, j]] = [
                    cos_a1[best, 0],
                    sin_a1[best, 0],
                    -sin_a1[best, 0],
                    cos_a1[best, 0],
                ]
                mean_cv, turn_vv = mean_cv @ plane_vv.T, plane_vv @ turn_vv
                covariance_cvv = plane_vv @ covariance_cvv @ plane_vv.T
                moved = True
        if not moved:
            break
    return float(_deviation(mean_cv.T, np.diagonal(covariance_cvv, axis1=1, axis2=2).T).sum()), turn_vv


def _deviation(mean_ac: np.ndarray, variance_ac: np.ndarray) -> np.ndarray:
    """Conditions in which a normal law is not the standard one: nearly 1 for each that clearly is not."""
    variance_ac = np.maximum(variance_ac, 1e-3)
    nats_ac = (mean_ac**2 + variance_ac - 1 - np.log(variance_ac)) / 2
    counted_a: np.ndarray = (nats_ac / (nats_ac + CLEAR_CHANGE)).sum(-1)
    return counted_a


def _mechanisms(
    z: np.ndarray, u_np: sparse.csr_matrix, n_invariant: int, extra_kk: np.ndarray
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """An order of the responsive programmes in which parents come last, and the mechanisms in it.

    A mechanism of control is a standard normal. What a target makes of a programme is regressed on all other
    programmes over the cells that carry the target, alone where there are enough of them; it counts where
    it explains much more. ``extra_kk`` is the covariance that posterior means do not show.
    """
    n_v, n_p = z.shape[1] - n_invariant, u_np.shape[1]
    by_target, is_alone_n = u_np.tocsc(), u_np.getnnz(1) == 1
    gain_pv, strength_vk = np.zeros((n_p, n_v)), np.zeros((n_v, z.shape[1]))
    fits = {}
    for p in range(n_p):
        rows = by_target[:, p].indices
        if is_alone_n[rows].sum() > 2 * z.shape[1]:  # what another target does is not this one's
            rows = rows[is_alone_n[rows]]
        cells = z[rows]
        if len(cells) <= 2 * z.shape[1]:
            continue
        mean_k, covariance_kk = cells.mean(0), np.cov(cells.T) + extra_kk
        square_k = mean_k**2 + covariance_kk.diagonal()
        for v in range(n_v):
            fits[p, v] = _, _, sd = _regressed(mean_k, covariance_kk, n_invariant + v)
            gain_pv[p, v] = square_k[n_invariant + v] / 2 - 0.5 - np.log(sd)
    n_cells_p = u_np.getnnz(0)
    most_p1 = gain_pv.max(1, keepdims=True)
    altered_pv = gain_pv > np.maximum(ALTERED_ABOVE * most_p1, LEAST_GAIN)
    for p, v in zip(*altered_pv.nonzero(), strict=True):
        strength_vk[v] += fits[p, v][1] ** 2 * n_cells_p[p]
    order_v = parents_last(strength_vk[:, n_invariant:])
    place_k = np.r_[np.arange(n_invariant), n_invariant + order_v]
    shift_pv, log_scale_pv = np.zeros((n_p, n_v)), np.zeros((n_p, n_v))
    weight_pvk = np.zeros((n_p, n_v, z.shape[1]))
    for row, v in enumerate(order_v):
        for p in altered_pv[:, v].nonzero()[0]:
            shift_pv[p, row], weight_k, sd = fits[p, v]
            log_scale_pv[p, row], weight_pvk[p, row] = np.log(sd), weight_k[place_k]
    altered_pv, strength_vk = altered_pv[:, order_v], strength_vk[order_v][:, place_k]
    mean_square_vk = strength_vk / np.maximum(n_cells_p @ altered_pv, 1)[:, None]
    edge_vk = mean_square_vk > LEAST_WEIGHT**2
    return order_v, (altered_pv, edge_vk, shift_pv, log_scale_pv, weight_pvk)


def _regressed(mean_k: np.ndarray, covariance_kk: np.ndarray, column: int) -> tuple[float, np.ndarray, float]:
    """Intercept, weights and residual standard deviation of one programme on the others."""
    others = np.delete(np.arange(len(mean_k)), column)
    gram = covariance_kk[np.ix_(others, others)] + RIDGE * np.eye(len(others))
    weight_k = np.zeros(len(mean_k))
    weight_k[others] = np.linalg.solve(gram, covariance_kk[others, column])
    contrast_k = -weight_k
    contrast_k[column] = 1.0
    sd = np.sqrt(contrast_k @ covariance_kk @ contrast_k)
    return float(contrast_k @ mean_k), weight_k, float(sd + 1e-3)


def parents_last(strength_vv: np.ndarray) -> np.ndarray:
    """An order in which little of the strength of [., parent] -> [programme, .] points backwards."""
    left, order = list(range(len(strength_vv))), []
    while left:
        root = min(left, key=lambda v: strength_vv[v, left].sum() - strength_vv[left, v].sum())
        order.append(root)
        left.remove(root)
    return np.array(order[::-1])


def single_precision(values: np.ndarray) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32)


def inverse_root(covariance_kk: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance_kk)
    root_kk: np.ndarray = vectors / np.sqrt(np.maximum(values, 1e-8 * values.max())) @ vectors.T
    return root_kk


def distinct_designs(u_np: Tensor | sparse.csr_matrix) -> tuple[sparse.csr_matrix, np.ndarray]:
    """The distinct rows of a design, and which of them each cell has.

    Control is first, where there is any; the others come as they first appear.
    """
    design = sparse.csr_matrix(u_np.cpu().numpy() if isinstance(u_np, Tensor) else u_np, dtype=np.float64)
    design.sum_duplicates()  # sorts columns: equal rows have sums that are equal to the last digit
    design.eliminate_zeros()
    rng = np.random.default_rng(0)
    weight_p = rng.uniform(1, 2, design.shape[1]) + 1j * rng.uniform(1, 2, design.shape[1])
    sum_d, first_d, design_n = np.unique(design @ weight_p, return_index=True, return_inverse=True)
    order_d = np.lexsort([first_d, sum_d != 0])
    return design[first_d[order_d]], np.argsort(order_d)[design_n]


def rows_of(group_n: np.ndarray, n_groups: int) -> list[np.ndarray]:
    """Rows of each group."""
    ends = np.cumsum(np.bincount(group_n, minlength=n_groups))
    return np.split(np.argsort(group_n, kind="stable"), ends[:-1])


def _regress(
    z: np.ndarray, u_dp: sparse.csr_matrix, design_n: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """Position of control, shift of each target, covariance of what is left; is that position known?

    Control cells tell it, and so do combinations or doses beside single targets. Where nothing does, the
    typical target stands in. Cells of one design are one row of the regression, weighted by their number.
    """
    size_d = np.bincount(design_n)
    root_d = np.sqrt(size_d)
    mean_dk = np.array([np.bincount(design_n, column) for column in z.T]).T / size_d[:, None]
    design = sparse.hstack([np.ones((len(size_d), 1)), u_dp], format="csr")
    weighted = sparse.diags(root_d) @ design
    columns = [_least_squares(weighted, root_d * mean_d) for mean_d in mean_dk.T]
    coefficients = np.column_stack(columns)
    residual = z - (design @ coefficients)[design_n]
    within_kk = residual.T @ residual / len(z)
    centre_k, shift_pk = coefficients[0], coefficients[1:]
    intercept = np.eye(1, design.shape[1])[0]
    is_known = np.abs(design.T @ _least_squares(design.T, intercept) - intercept).max() < 1e-6
    if not is_known:
        median_k = np.median(shift_pk, 0)
        centre_k, shift_pk = centre_k + median_k, shift_pk - median_k
    return centre_k, shift_pk, within_kk, bool(is_known)


def _least_squares(matrix: sparse.csr_matrix, value: np.ndarray) -> np.ndarray:
    """The shortest solution of a sparse problem."""
    found: np.ndarray = lsqr(matrix, value, atol=1e-12, btol=1e-12, conlim=0, iter_lim=10_000)[0]
    return found


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


def refine(m: np.ndarray, rotation: np.ndarray, is_known: bool, n_steps: int = 100) -> np.ndarray:
    """Minimise Σ √(y² + ε²) over rotations by majorisation; each step is an SVD. ε shrinks."""
    for epsilon in (1.0, 0.5, 0.2):
        for _ in range(n_steps):
            y = _centred(m @ rotation, is_known)
            m = y @ rotation.T
            rotation = _polar(m.T @ ((1 / epsilon - 1 / np.sqrt(y**2 + epsilon**2)) * y))
    return rotation
