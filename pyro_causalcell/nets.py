"""Networks shared by models and guides. They accept any leading dimensions (particles, cells)."""

import math
from collections.abc import Callable
from itertools import pairwise
from operator import attrgetter
from typing import Any, Literal

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
    "JoinedLinear",
    "MaskedLinear",
    "Network",
    "Norm",
    "encoded_together",
    "straight_through",
    "times",
    "with_interactions",
]

Network = Literal["mlp", "image"]
"""What x is to a network: genes, or the pixels of a square image, flattened (y, x, rgb)."""
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
        n_extra: Width of what lies beside the inputs.
    """

    def __init__(
        self,
        n_in: int,
        n_hidden: int = 128,
        n_layers: int = 2,
        norm: Norm = "none",
        dropout: float = 0.0,
        activation: Activation = "relu",
        n_extra: int = 0,
    ):
        super().__init__()
        self.n_extra = n_extra
        layers: list[nn.Module] = []
        for width in [n_in, *[n_hidden] * (n_layers - 1)]:
            joined = n_extra and not layers
            layers.append(JoinedLinear(n_in, n_extra, n_hidden) if joined else nn.Linear(width, n_hidden))
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

    def forward(self, x: Tensor, *extra: Tensor) -> Tensor:
        """Hidden units of shape (..., n_hidden); BatchNorm sees all leading dimensions as one.

        Args:
            x: Inputs, shape (..., n_in).
            extra: What lies beside them, ``n_extra`` wide in all.

        Raises:
            ValueError: It is not as wide.
        """
        width = sum(part.shape[-1] for part in extra)
        if width != self.n_extra:
            raise ValueError(f"expected {self.n_extra} columns beside the inputs, found {width}")
        given: Any = _rows(x)
        if self.n_extra:
            given = (given, _rows(torch.cat(extra, -1)))
        hidden: Tensor = self.layers(given)
        return hidden.reshape(*x.shape[:-1], hidden.shape[-1])


def _rows(x: Tensor) -> Tensor:
    """All leading dimensions as one."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


class JoinedLinear(nn.Module):
    """A linear layer of two inputs that lie side by side, each with weights of its own.

    As one matrix, the gradient of all of it would be worked out where a part of it learns. It starts with the
    weights that such a layer of one matrix would start with.

    Args:
        n_in: Width of the first input.
        n_extra: Width of what lies beside it.
        n_out: Outputs o.
    """

    def __init__(self, n_in: int, n_extra: int, n_out: int):
        super().__init__()
        both = nn.Linear(n_in + n_extra, n_out)
        self.first = nn.utils.skip_init(nn.Linear, n_in, n_out)
        self.extra = nn.utils.skip_init(nn.Linear, n_extra, n_out, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(both.weight[:, :n_in])
            self.first.bias.copy_(both.bias)
            self.extra.weight.copy_(both.weight[:, n_in:])

    def forward(self, parts: tuple[Tensor, Tensor]) -> Tensor:
        """Outputs, shape (..., o)."""
        output: Tensor = self.first(parts[0]) + self.extra(parts[1])
        return output

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """Weights of one matrix, which older runs have, are taken apart."""
        if f"{prefix}weight" in state_dict:
            weights = state_dict.pop(f"{prefix}weight").split(
                [self.first.in_features, self.extra.in_features], 1
            )
            state_dict[f"{prefix}first.weight"], state_dict[f"{prefix}extra.weight"] = weights
            state_dict[f"{prefix}first.bias"] = state_dict.pop(f"{prefix}bias")
        super()._load_from_state_dict(state_dict, prefix, *rest)


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
        return torch.einsum("...ib,oib->...oi", self.bends(x.unsqueeze(-1)).squeeze(-1), self.size_oib)

    def bends(self, x: Tensor) -> Tensor:
        """What effects are made of, shape (..., i, b, m), for many points m of x (..., i, m)."""
        # expanded, so that gradients are summed over m, where they lie side by side, and then over the rest
        shape = (*x.shape[:-2], *self.slope_ib.shape, 1)
        slope_ib1, place_ib1 = (part.unsqueeze(-1).expand(shape) for part in (self.slope_ib, self.place_ib))
        return torch.tanh(slope_ib1 * (x.unsqueeze(-2) - place_ib1))

    def sum(self, x: Tensor) -> Tensor:
        """The effects of all inputs on each output, shape (..., o, m), for many points m of x (..., i, m)."""
        return times(self.size_oib.flatten(-2), self.bends(x).flatten(-3, -2))


def times(left_oi: Tensor, x: Tensor) -> Tensor:
    """left_oi @ x for x (..., i, m), in its layout: torch would turn x to make one large product of it."""
    return left_oi.expand(*x.shape[:-2], *left_oi.shape) @ x


class Encoder(nn.Module):
    """Observations, batch columns and (where it may see them) interventions -> a diagonal normal.

    Args:
        n_genes: Genes g.
        n_latents: Latents k.
        n_extra: Width of what is appended to the genes: batch columns, design.
        log_input: Take log(1 + x): for counts.
        min_scale: Added to the scale, so that it cannot collapse.
        network: ``"mlp"``, or ``"image"``: g are the pixels (y, x, rgb) of an image, from -1 to 1, and
            residual convolutions read it; they have ``n_hidden / 8`` channels at half the size, and twice as
            many at each halving.
        n_hidden: as in :class:`MLP`.
        n_layers, norm, dropout, activation: as in :class:`MLP`; not of images.
    """

    def __init__(
        self,
        n_genes: int,
        n_latents: int,
        n_extra: int = 0,
        *,
        log_input: bool = True,
        min_scale: float = 1e-3,
        network: Network = "mlp",
        n_hidden: int = 128,
        n_layers: int = 2,
        norm: Norm = "none",
        dropout: float = 0.0,
        activation: Activation = "relu",
    ):
        super().__init__()
        self.log_input, self.min_scale = log_input, min_scale
        self.hidden: MLP | _ImageHidden
        if network == "image":
            self.hidden = _ImageHidden(n_genes, n_extra, n_hidden)
        else:
            self.hidden = MLP(n_genes, n_hidden, n_layers, norm, dropout, activation, n_extra)
        self.loc = nn.Linear(n_hidden, n_latents)
        self.log_scale = nn.Linear(n_hidden, n_latents)

    def forward(self, x_ng: Tensor, *extra: Tensor) -> tuple[Tensor, Tensor]:
        """Location and scale, each n, k."""
        # of whole numbers as exact as log1p, and faster
        hidden = self.hidden((x_ng + 1.0).log_() if self.log_input else x_ng, *extra)
        return self.loc(hidden), self.log_scale(hidden).exp() + self.min_scale

    def overlook_last(self, n_extra: int) -> None:
        """Start blind to the last of what is appended to x."""
        layers = self.hidden.layers if isinstance(self.hidden, MLP) else self.hidden.hidden
        first = layers[0].extra if isinstance(layers[0], JoinedLinear) else layers[0]
        assert isinstance(first, nn.Linear)
        nn.init.zeros_(first.weight.data[:, -n_extra:])

    @torch.no_grad()
    def rotate(self, map_kk: Tensor, offset_k: Tensor) -> None:
        """Let the location be ``loc @ map_kk.T + offset_k`` from now on; scales become their average."""
        variance_k = torch.exp(2 * self.log_scale.bias)
        self.loc.weight.copy_(map_kk @ self.loc.weight)
        self.loc.bias.copy_(map_kk @ self.loc.bias + offset_k)
        self.log_scale.weight.zero_()
        self.log_scale.bias.copy_((map_kk**2 @ variance_k).log() / 2)


def encoded_together(
    encoder: Encoder,
    cells: Batch,
    control: Batch | None,
    beside: Callable[[Batch], Tensor] = attrgetter("batch_nb"),
) -> tuple[Tensor, Tensor, Tensor]:
    """Location and scale of cells, n, k, and location of their control cells, in one pass.

    In passes of their own cells and control cells would be normalised by different statistics in training,
    and by neither of them in evaluation.

    Args:
        encoder: An encoder of x and what lies beside it.
        cells: The cells.
        control: Their control cells; without them the last tensor has no rows.
        beside: What lies beside x, as columns; batch columns unless said otherwise.
    """
    both = [cells] if control is None else [cells, control]
    x_ng = torch.cat([b.x_ng for b in both if b.x_ng is not None])
    loc, scale = encoder(x_ng, torch.cat([beside(b) for b in both]))
    n = cells.n_cells
    return loc[:n], scale[:n], loc[n:]


class Decoder(nn.Module):
    """Latents and batch columns -> one number per gene.

    Args:
        n_latents: Latents k.
        n_genes: Genes g.
        n_batches: Batch and covariate columns b.
        network: as in :class:`Encoder`; an image is drawn by the same convolutions in reverse.
        n_hidden: as in :class:`MLP`.
        n_layers, norm, dropout, activation: as in :class:`MLP`; not of images.
    """

    def __init__(
        self,
        n_latents: int,
        n_genes: int,
        n_batches: int = 0,
        *,
        network: Network = "mlp",
        n_hidden: int = 128,
        n_layers: int = 2,
        norm: Norm = "none",
        dropout: float = 0.0,
        activation: Activation = "relu",
    ):
        super().__init__()
        self.n_latents = n_latents
        self.output: nn.Module
        if network == "image":
            self.hidden = MLP(n_latents + n_batches, n_hidden, 1, activation="silu")
            self.output = _ImageOutput(n_hidden, n_genes)
        else:
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


class _Residual(nn.Module):
    """What two convolutions add to an image; nothing at the start."""

    def __init__(self, channels: int):
        super().__init__()
        last = nn.Conv2d(channels, channels, 3, 1, 1)
        nn.init.zeros_(last.weight)
        self.added = nn.Sequential(nn.SiLU(), nn.Conv2d(channels, channels, 3, 1, 1), nn.SiLU(), last)

    def forward(self, image: Tensor) -> Tensor:
        return image + self.added(image)


class _ImageHidden(nn.Module):
    """Pixels, and what is appended to them -> hidden units: convolutions until the image is 4 pixels wide."""

    def __init__(self, n_pixels: int, n_extra: int, n_hidden: int):
        super().__init__()
        self.size, channels = _halvings(n_pixels, n_hidden)
        self.convolutions = nn.Sequential(
            *(
                nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * old, new, 3, 1, 1), _Residual(new))
                for old, new in pairwise((3, *channels))
            ),
            nn.SiLU(),
        )
        _as_pixels_come(self.convolutions)
        self.hidden = nn.Sequential(nn.Linear(channels[-1] * 16 + n_extra, n_hidden), nn.SiLU())

    def forward(self, x: Tensor, *extra: Tensor) -> Tensor:
        image = x.reshape(-1, self.size, self.size, 3).movedim(-1, 1)
        features = _convolved(self.convolutions, image).flatten(1)
        hidden: Tensor = self.hidden(torch.cat([features, *map(_rows, extra)], 1))
        return hidden.reshape(*x.shape[:-1], hidden.shape[-1])


class _ImageOutput(nn.Module):
    """Hidden units -> pixels of any value."""

    def __init__(self, n_hidden: int, n_pixels: int):
        super().__init__()
        _, channels = _halvings(n_pixels, n_hidden)
        channels = channels[::-1]
        self.first = (channels[0], 4, 4)
        self.hidden = nn.Linear(n_hidden, channels[0] * 16)
        self.convolutions = nn.Sequential(
            _Residual(channels[0]),
            *(
                nn.Sequential(nn.Conv2d(old, 4 * new, 1), nn.PixelShuffle(2), _Residual(new), _Residual(new))
                for old, new in pairwise(channels)
            ),
            nn.SiLU(),
            nn.Conv2d(channels[-1], 12, 3, 1, 1),
            nn.PixelShuffle(2),  # the last doubling costs no convolution at full size
        )
        _as_pixels_come(self.convolutions)

    def forward(self, hidden: Tensor) -> Tensor:
        flat = self.hidden(hidden.reshape(-1, hidden.shape[-1])).unflatten(1, self.first)
        image = _convolved(self.convolutions, flat.contiguous(memory_format=torch.channels_last))
        pixels: Tensor = image.movedim(1, -1).flatten(1)
        return pixels.reshape(*hidden.shape[:-1], pixels.shape[-1])


def _convolved(convolutions: nn.Module, image: Tensor) -> Tensor:
    """Convolutions of an image; in bfloat16 where "medium" precision is asked for and the device has it."""
    low = torch.get_float32_matmul_precision() == "medium" and _has_bfloat16(image.device)
    with torch.autocast(image.device.type, torch.bfloat16, enabled=low):
        convolved: Tensor = convolutions(image)
    return convolved.float()


def _has_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies in bfloat16 itself: others imitate it, far slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # older versions of torch
        return False
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def _halvings(n_pixels: int, n_hidden: int) -> tuple[int, list[int]]:
    """Size of a square image of three colours, and channels at every halving down to 4 pixels."""
    size = math.isqrt(n_pixels // 3)
    halvings = size.bit_length() - 3
    if halvings < 1 or 4 * 2**halvings != size or 3 * size**2 != n_pixels:
        raise ValueError(
            f"an image has 3 * size**2 pixels, where size is 8, 16, 32, ..., not {n_pixels}; pass "
            'network="mlp" for genes'
        )
    if n_hidden % 64:
        raise ValueError(f"n_hidden is a multiple of 64 for images, not {n_hidden}")
    return size, [n_hidden // 8 * 2**i for i in range(halvings)]


def _as_pixels_come(convolutions: nn.Module) -> None:
    """Keep weights in the order of pixels, colours last: twice as fast."""
    for part in convolutions.modules():
        if isinstance(part, nn.Conv2d):
            part.weight.data = part.weight.data.contiguous(memory_format=torch.channels_last)
