"""Networks shared by models and guides. They accept any leading dimensions (particles, cells)."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from pyro_causalcell.distributions import StraightThroughGate

__all__ = [
    "MLP",
    "Activation",
    "Decoder",
    "Encoder",
    "MaskedLinear",
    "Norm",
    "straight_through",
    "with_interactions",
]

Norm = Literal["none", "batch", "layer"]
Activation = Literal["relu", "leaky_relu", "silu"]

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "silu": nn.SiLU,
}


class MLP(nn.Module):
    """Hidden layers: Linear, normalisation, activation, dropout.

    Args:
        n_in: Input width.
        n_hidden: Width of every hidden layer.
        n_layers: Number of hidden layers.
        norm: ``"none"``, ``"batch"`` or ``"layer"`` normalisation after each Linear.
        dropout: Probability of dropping a hidden unit in training.
        activation: ``"relu"``, ``"leaky_relu"`` (slope 0.2) or ``"silu"``.
    """

    def __init__(
        self,
        n_in: int,
        n_hidden: int = 128,
        n_layers: int = 2,
        norm: Norm = "none",
        dropout: float = 0.0,
        activation: Activation = "relu",
    ):
        super().__init__()
        layers: list[nn.Module] = []
        for width in [n_in, *[n_hidden] * (n_layers - 1)]:
            layers.append(nn.Linear(width, n_hidden))
            if norm == "batch":
                layers.append(nn.BatchNorm1d(n_hidden, eps=1e-3))
            elif norm == "layer":
                layers.append(nn.LayerNorm(n_hidden))
            elif norm != "none":
                raise ValueError(f'norm is "none", "batch" or "layer", not {norm!r}')
            layers.append(_ACTIVATIONS[activation]())
            if dropout:
                layers.append(nn.Dropout(dropout))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden units of shape (..., n_hidden); BatchNorm sees all leading dimensions as one."""
        hidden: Tensor = self.layers(x.reshape(-1, x.shape[-1]))
        return hidden.reshape(*x.shape[:-1], hidden.shape[-1])


class MaskedLinear(nn.Linear):
    """A linear layer whose weights are multiplied by a fixed mask.

    Args:
        mask_oi: Multiplier of the weight from input i to output o.
    """

    mask_oi: Tensor

    def __init__(self, mask_oi: Tensor):
        super().__init__(mask_oi.shape[1], mask_oi.shape[0])
        self.register_buffer("mask_oi", mask_oi)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs, shape (..., o)."""
        return nn.functional.linear(x, self.weight * self.mask_oi, self.bias)


class Encoder(nn.Module):
    """Observations, batch columns and (where it may see them) interventions -> a diagonal normal.

    Args:
        n_genes: Genes g.
        n_latents: Latents k.
        n_extra: Width of what is appended to the genes: batch columns, design.
        log_input: Take log(1 + x): for counts.
        min_scale: Added to the scale, so that it cannot collapse.
        n_hidden, n_layers, norm, dropout, activation: as in :class:`MLP`.
    """

    def __init__(
        self,
        n_genes: int,
        n_latents: int,
        n_extra: int = 0,
        *,
        log_input: bool = True,
        min_scale: float = 1e-3,
        n_hidden: int = 128,
        n_layers: int = 2,
        norm: Norm = "none",
        dropout: float = 0.0,
        activation: Activation = "relu",
    ):
        super().__init__()
        self.log_input, self.min_scale = log_input, min_scale
        self.hidden = MLP(n_genes + n_extra, n_hidden, n_layers, norm, dropout, activation)
        self.loc = nn.Linear(n_hidden, n_latents)
        self.log_scale = nn.Linear(n_hidden, n_latents)

    def forward(self, x_ng: Tensor, *extra: Tensor) -> tuple[Tensor, Tensor]:
        """Location and scale, each n, k."""
        inputs = torch.cat([torch.log1p(x_ng) if self.log_input else x_ng, *extra], -1)
        hidden = self.hidden(inputs)
        return self.loc(hidden), self.log_scale(hidden).exp() + self.min_scale

    @torch.no_grad()
    def rotate(self, map_kk: Tensor, offset_k: Tensor) -> None:
        """Let the location be ``loc @ map_kk.T + offset_k`` from now on; scales become their average."""
        variance_k = torch.exp(2 * self.log_scale.bias)
        self.loc.weight.copy_(map_kk @ self.loc.weight)
        self.loc.bias.copy_(map_kk @ self.loc.bias + offset_k)
        self.log_scale.weight.zero_()
        self.log_scale.bias.copy_((map_kk**2 @ variance_k).log() / 2)


class Decoder(nn.Module):
    """Latents and batch columns -> one number per gene.

    Args:
        n_latents: Latents k.
        n_genes: Genes g.
        n_batches: Batch and covariate columns b.
        n_hidden, n_layers, norm, dropout, activation: as in :class:`MLP`.
    """

    def __init__(
        self,
        n_latents: int,
        n_genes: int,
        n_batches: int = 0,
        *,
        n_hidden: int = 128,
        n_layers: int = 2,
        norm: Norm = "none",
        dropout: float = 0.0,
        activation: Activation = "relu",
    ):
        super().__init__()
        self.n_latents = n_latents
        self.hidden = MLP(n_latents + n_batches, n_hidden, n_layers, norm, dropout, activation)
        self.output = nn.Linear(n_hidden, n_genes)

    def forward(self, z_nk: Tensor, batch_nb: Tensor) -> Tensor:
        """Logits, shape (..., n, g)."""
        batch_nb = batch_nb.expand(*z_nk.shape[:-1], batch_nb.shape[-1])
        logits: Tensor = self.output(self.hidden(torch.cat([z_nk, batch_nb], -1)))
        return logits

    @torch.no_grad()
    def rotate(self, map_kk: Tensor, offset_k: Tensor) -> None:
        """Give the same output for ``z @ map_kk.T + offset_k`` that ``z`` gave so far."""
        first = self.hidden.layers[0]
        assert isinstance(first, nn.Linear)
        weight = first.weight[:, : self.n_latents] @ torch.linalg.inv(map_kk)
        first.bias.sub_(weight @ offset_k)
        first.weight[:, : self.n_latents] = weight


def with_interactions(u_np: Tensor, pairs: tuple[tuple[int, int], ...]) -> Tensor:
    """Append one column u_i · u_j to the design for each pair (i, j) of targets."""
    if not pairs:
        return u_np
    first, second = torch.tensor(pairs, device=u_np.device).T
    return torch.cat([u_np, u_np[:, first] * u_np[:, second]], -1)


def straight_through(u_np: Tensor, gate_pk: Tensor, shift_pk: Tensor) -> Tensor:
    """Shift of each cell with one binary gate draw per cell; the gradient is the relaxed draw's.

    Args:
        u_np: Design of the cells.
        gate_pk: Gate probabilities.
        shift_pk: Shifts where the gate is open.

    Returns:
        Shape n, k.

    Source: Lopez et al., CLeaR 2023, released code: one draw for every target that a cell carries.
    """
    cell_m, target_m = u_np.nonzero(as_tuple=True)
    hard_mk = StraightThroughGate(gate_pk[target_m], validate_args=False).rsample()
    shift_mk = u_np[cell_m, target_m].unsqueeze(-1) * hard_mk * shift_pk[target_m]
    return torch.zeros(len(u_np), gate_pk.shape[-1], device=u_np.device).index_add(0, cell_m, shift_mk)
