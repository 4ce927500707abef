"""Networks shared by models and guides. They accept any leading dimensions (particles, cells)."""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from pyro_causalcell.batch import Batch
from pyro_causalcell.distributions import StraightThroughGate

__all__ = [
    "MLP",
    "Activation",
    "AdditiveMaps",
    "Decoder",
    "Encoder",
    "ImageDecoder",
    "ImageEncoder",
    "MaskedLinear",
    "Norm",
    "encoded_together",
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


class AdditiveMaps(nn.Module):
    """How the effect of each input on each output bends: Σ_b c_oib tanh(s_ib (x_i - d_ib)), 0 at the start.

    Args:
        n_in: Inputs i.
        n_out: Outputs o.
        n_bends: Bends b of each effect; 0 for none.
    """

    def __init__(self, n_in: int, n_out: int, n_bends: int = 4):
        super().__init__()
        self.slope_ib = nn.Parameter(torch.ones(n_in, n_bends))
        self.place_ib = nn.Parameter(torch.linspace(-1.5, 1.5, n_bends).expand(n_in, -1).clone())
        self.size_oib = nn.Parameter(torch.zeros(n_out, n_in, n_bends))

    def forward(self, x: Tensor) -> Tensor:
        """The effect of each input on each output, shape (..., o, i)."""
        bent_ib = torch.tanh(self.slope_ib * (x.unsqueeze(-1) - self.place_ib))
        return torch.einsum("...ib,oib->...oi", bent_ib, self.size_oib)


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


def encoded_together(encoder: Encoder, cells: Batch, control: Batch | None) -> tuple[Tensor, Tensor, Tensor]:
    """Location and scale of cells, n, k, and location of their control cells, in one pass.

    In passes of their own cells and control cells would be normalised by different statistics in training,
    and by neither of them in evaluation.

    Args:
        encoder: An encoder of x and batch columns.
        cells: The cells.
        control: Their control cells; without them the last tensor has no rows.
    """
    both = [cells] if control is None else [cells, control]
    x_ng = torch.cat([b.x_ng for b in both if b.x_ng is not None])
    loc, scale = encoder(x_ng, torch.cat([b.batch_nb for b in both]))
    n = cells.n_cells
    return loc[:n], scale[:n], loc[n:]


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


class ImageEncoder(nn.Module):
    """Images -> a diagonal normal: convolutions that halve the image until it is 4 pixels wide.

    Args:
        n_latents: Latents k.
        size: Pixels along each side: 8, 16, 32, 64, ....
        width: Channels at half the size; they double with each halving. A multiple of 8.
        n_hidden: Width of the hidden layer behind the convolutions.
        min_scale: Added to the scale, so that it cannot collapse.
    """

    def __init__(
        self, n_latents: int, size: int = 32, *, width: int = 32, n_hidden: int = 256, min_scale: float = 1e-3
    ):
        super().__init__()
        self.min_scale = min_scale
        channels = _channels(size, width)
        blocks = [_convolution(old, new, 2) for old, new in pairwise((3, *channels))]
        self.convolutions = nn.Sequential(
            *(
                nn.Sequential(block, _convolution(new, new))
                for block, new in zip(blocks, channels, strict=True)
            )
        )
        self.hidden = nn.Sequential(nn.Linear(channels[-1] * 16, n_hidden), nn.SiLU())
        self.loc = nn.Linear(n_hidden, n_latents)
        self.log_scale = nn.Linear(n_hidden, n_latents)

    def forward(self, x_nyxc: Tensor) -> tuple[Tensor, Tensor]:
        """Location and scale, each (..., k), of images (..., y, x, rgb) with values from 0 to 1."""
        flat = x_nyxc.flatten(0, -4) if x_nyxc.dim() > 3 else x_nyxc[None]
        hidden = self.hidden(self.convolutions(flat.movedim(-1, 1)).flatten(1))
        hidden = hidden.reshape(*x_nyxc.shape[:-3], hidden.shape[-1])
        return self.loc(hidden), self.log_scale(hidden).exp() + self.min_scale


class ImageDecoder(nn.Module):
    """Latents -> images: the mirror image of :class:`ImageEncoder`.

    Args:
        n_latents: Latents k.
        size, width, n_hidden: as in :class:`ImageEncoder`.
    """

    def __init__(self, n_latents: int, size: int = 32, *, width: int = 32, n_hidden: int = 256):
        super().__init__()
        channels = _channels(size, width)[::-1]
        self.first = (channels[0], 4, 4)
        self.hidden = nn.Sequential(
            nn.Linear(n_latents, n_hidden), nn.SiLU(), nn.Linear(n_hidden, channels[0] * 16), nn.SiLU()
        )
        self.convolutions = nn.Sequential(
            *(
                nn.Sequential(nn.Upsample(scale_factor=2), _convolution(old, new))
                for old, new in pairwise((*channels, channels[-1]))
            ),
            nn.Conv2d(channels[-1], 3, 3, padding=1),
        )

    def forward(self, z_nk: Tensor) -> Tensor:
        """Images (..., y, x, rgb) of any value: their sigmoid lies between 0 and 1."""
        hidden = self.hidden(z_nk.reshape(-1, z_nk.shape[-1])).unflatten(1, self.first)
        image: Tensor = self.convolutions(hidden).movedim(1, -1)
        return image.reshape(*z_nk.shape[:-1], *image.shape[1:])


def _channels(size: int, width: int) -> list[int]:
    """Channels at every halving from ``size`` down to 4 pixels."""
    halvings = size.bit_length() - 3
    if halvings < 1 or 4 * 2**halvings != size or width % 8:
        raise ValueError(f"size is 8, 16, 32, ... and width a multiple of 8, not {size} and {width}")
    return [width * 2**i for i in range(halvings)]


def _convolution(n_in: int, n_out: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, stride, 1), nn.GroupNorm(8, n_out), nn.SiLU())
