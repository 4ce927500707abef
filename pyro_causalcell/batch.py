"""What passes between the rooms: the tensors of a minibatch, and the sizes of a screen."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "MOST_COLUMNS",
    "Batch",
    "Dims",
    "LaggedMechanisms",
    "Mechanisms",
    "Rotation",
    "carried",
]


class Batch(NamedTuple):
    """The tensors of one minibatch of n cells.

    ==============  =============  ====================================================================
    field           shape          meaning
    ==============  =============  ====================================================================
    ``x_ng``        n, g           counts or log-normalised values; ``None`` asks a model to draw them
    ``u_np``        n, p           design: 1 (or the dose) for each target; control cells are zero
    ``library_n1``  n, 1           total counts
    ``batch_nb``    n, b           batch and covariate columns, one-hot, side by side; b may be 0
    ``condition_n`` n              index of the condition in ``Screen.conditions``; -1 if unknown
    ``index_n``     n              row of each cell among the ``n_total`` cells that are fitted
    ``n_total``     number         cells that are fitted: sets the scale of the cells plate
    ``time_n``      n              time of each cell, where the screen has one
    ``control``     Batch          anchors, for a model that needs them
    ``previous``    Batch          where the screen knows tracks: each cell at its snapshot before, or the
                                   cell itself where there is none
    ``most``        number         targets that a cell of the screen carries at most, where that is known
    ==============  =============  ====================================================================
    """

    x_ng: Tensor | None
    u_np: Tensor
    library_n1: Tensor
    batch_nb: Tensor
    condition_n: Tensor
    index_n: Tensor
    n_total: int
    time_n: Tensor | None = None
    control: "Batch | None" = None
    previous: "Batch | None" = None
    most: int | None = None

    @property
    def n_cells(self) -> int:
        """Cells in this minibatch."""
        return self.u_np.shape[0]

    def to(self, device: torch.device | str) -> "Batch":
        """The same minibatch on another device."""
        fields = self._asdict().items()
        moved: dict[str, Any] = {n: f.to(device) for n, f in fields if isinstance(f, Tensor | Batch)}
        return self._replace(**moved)


def carried(u_np: Tensor, most: int | None = None) -> tuple[Tensor, Tensor]:
    """The targets m that each cell carries, and their doses: what a sum over them takes, not over all p.

    Cells that carry fewer have others, at a dose of 0.

    Args:
        u_np: Design.
        most: Targets that a cell carries at most. None looks, which a step that is recorded must not.

    Returns:
        Places among the targets, n, m, and doses, n, m, 1.
    """
    if most is None:
        most = int((u_np != 0).sum(-1).max()) if u_np.numel() else 0
    target_nm = u_np.abs().topk(min(max(1, most), u_np.shape[-1]), sorted=False).indices
    return target_nm, u_np.gather(-1, target_nm).unsqueeze(-1)


MOST_COLUMNS = 64
"""Columns of a table of embeddings that models see; of wider ones, the leading principal components."""


class Dims(NamedTuple):
    """Sizes of a screen, which models and guides take as plain keyword arguments.

    Attributes:
        n_cells: Cells that are fitted.
        n_genes: Genes.
        n_targets: Perturbation targets, the columns of the design.
        n_batches: Columns of the one-hot batch and covariate matrix.
        target_cells: For each target, the sum of its squared design over the fitted cells: with 0/1
            designs, the number of cells it perturbs.
        n_conditions: Conditions, control first.
        times: Times of the snapshots, sorted; empty where the screen has none.
        n_embedding: Columns of the targets' embeddings, as models see them; 0 where the screen has none.
        longest_gap: Longest time between successive snapshots of a condition (or of a track); None where it
            is not known.
        latest_start: When the last of the conditions (or tracks) was first seen; likewise.
        doses_vary: Whether cells of one condition may differ in their doses.
    """

    n_cells: int
    n_genes: int
    n_targets: int
    n_batches: int
    target_cells: tuple[float, ...]
    n_conditions: int = 0
    times: tuple[float, ...] = ()
    n_embedding: int = 0
    longest_gap: float | None = None
    latest_start: float | None = None
    doses_vary: bool = True


class Mechanisms(NamedTuple):
    """What perturbations seem to change about responsive programmes, as a start for training.

    Attributes:
        altered_pv: Whether a perturbation changes a programme's mechanism.
        edge_vk: Whether a programme (invariant ones first) acts on a responsive one under some perturbation.
        shift_pv: Change of the mean of its noise; zero where nothing is changed, as the others.
        log_scale_pv: Change of the log standard deviation of its noise.
        weight_pvk: Weights of the programmes that act on it, invariant ones first.
    """

    altered_pv: Tensor
    edge_vk: Tensor
    shift_pv: Tensor
    log_scale_pv: Tensor
    weight_pvk: Tensor


class LaggedMechanisms(NamedTuple):
    """How responsive programmes seem to evolve and what perturbations change, as a start for training.

    Attributes:
        altered_pv: Whether a perturbation shifts a programme's innovation or changes its noise.
        shift_pv: Shift of its mean; zero where nothing is altered.
        log_scale_pv: Change of the log of its standard deviation.
        cut_pv: Whether the perturbation cuts the programme off its parents.
        start_pv: Shift at the first snapshot, for models that do not know the onset.
        weight_vk: Effect of a programme, invariant ones first, on a responsive one a step later.
    """

    altered_pv: Tensor
    shift_pv: Tensor
    log_scale_pv: Tensor
    cut_pv: Tensor
    start_pv: Tensor
    weight_vk: Tensor


class Rotation(NamedTuple):
    """New latent axes: ``z_new = z @ map_kk.T + offset_k``.

    Attributes:
        map_kk: Linear map, whitening included.
        offset_k: Offset; control cells (or the typical perturbation) lie at zero.
        shift_pk: Shift of each target in the new axes, in within-perturbation standard deviations.
        mechanisms: Where some programmes are responsive and some invariant: what targets change about the
            responsive ones.
    """

    map_kk: Tensor
    offset_k: Tensor
    shift_pk: Tensor
    mechanisms: Mechanisms | LaggedMechanisms | None = None

    def to(self, device: torch.device) -> "Rotation":
        """The same axes on another device."""
        seen = self.mechanisms
        mechanisms = seen and type(seen)(*(t.to(device) for t in seen))
        return Rotation(
            self.map_kk.to(device), self.offset_k.to(device), self.shift_pk.to(device), mechanisms
        )
