"""CellOT: optimal transport maps from control to perturbed cells, as gradients of convex networks."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from torch import Tensor, nn

from pyro_causalcell.baselines.means import draw_cells, expression
from pyro_causalcell.baselines.temporal import Floats, alone, snapshots
from pyro_causalcell.data import Screen
from pyro_causalcell.data.spec import shown
from pyro_causalcell.errors import DataError, PredictionError

__all__ = ["CellOT"]

_INNER = 4  # steps of the map for each step of its opponent
_MEAN_CELLS = 500
_LAST_LR = 0.05  # where the learning rate ends, as a share of its start


class CellOT:
    """CellOT: for each condition at each time, the cheapest map from control cells of that time to its cells.

    The map is the gradient of an input-convex network g, trained against a second one f,

        min_f max_g  E_perturbed[f(y)] + E_control[<x, grad g(x)> - f(grad g(x))],

    in principal components of the training cells; what lies outside these stays as it is. Each network
    starts from the map that matches means and covariances. All are trained side by side. It predicts the
    condition and the time that a map was trained for, and nothing else: neither unseen conditions nor unseen
    times. Control is predicted by its own cells.

    Args:
        screen: A screen with times.
        rows: Training cells; every perturbed condition needs control cells at its times.
        seed: Seed.
        n_components: Principal components.
        n_hidden: Width of the two hidden layers.
        n_steps: Steps of f; g makes four for each.
        batch_size: Cells on each side.
        lr: First learning rate.

    Raises:
        DataError: There are no perturbed cells, or no control cells at a time of theirs.

    Source: Bunne et al., Learning single-cell perturbation responses using neural optimal transport, Nature
    Methods 2023; Makkuva et al., Optimal transport mapping via input convex neural networks, ICML 2020;
    Bunne, Krause and Cuturi, Supervised training of conditional Monge maps, NeurIPS 2022 (start).
    """

    name = "CellOT"

    def __init__(
        self,
        screen: Screen,
        rows: NDArray[np.int64],
        seed: int = 0,
        *,
        n_components: int = 20,
        n_hidden: int = 64,
        n_steps: int = 200,
        batch_size: int = 64,
        lr: float = 1e-2,
    ):
        self.screen = screen
        self.means = means = snapshots(screen, rows)
        self.pairs = [(int(c), int(t)) for c, t in np.argwhere(means.cells_ct) if c > 0]
        without = sorted({float(means.times[t]) for _, t in self.pairs if not means.cells_ct[0, t]})
        if not self.pairs or without:
            raise DataError(
                "CellOT needs perturbed cells, and control cells at each of their times; found "
                f"{len(self.pairs)} perturbed snapshots, and no control at {without}."
            )
        x_ng = expression(screen, means.rows)
        self.pca = PCA(min(n_components, *x_ng.shape), random_state=seed)
        x_nd = self.pca.fit_transform(x_ng)
        self._scale = float(x_nd.std()) or 1.0
        x_nd = torch.from_numpy(x_nd / self._scale).float()
        groups = {
            (int(c), int(t)): np.searchsorted(means.rows, means.cells(c, t))
            for c, t in np.argwhere(means.cells_ct)
        }
        sides = [(groups[0, t], groups[c, t]) for c, t in self.pairs]
        with alone(seed):
            shape = (len(self.pairs), x_nd.shape[1], n_hidden)
            self._map, opponent = _Convex(*shape), _Convex(*shape)
            for b, (control, perturbed) in enumerate(sides):
                self._map.match(b, x_nd[control], x_nd[perturbed])
                opponent.match(b, x_nd[perturbed], x_nd[control])
            rng = np.random.default_rng(seed)

            def batches() -> tuple[Tensor, Tensor]:
                drawn = [[rng.choice(side, batch_size) for side in pair] for pair in sides]
                x_bnd, y_bnd = (x_nd[np.stack(rows)] for rows in zip(*drawn, strict=True))
                return x_bnd, y_bnd

            _train(self._map, opponent, batches, n_steps, lr)

    def predict(self, conditions: Sequence[str], times: Sequence[float]) -> Floats:
        """Mean of mapped control cells, shape (c, t, g), in log1p CP10k.

        Raises:
            DataError: A condition names an unknown target.
            PredictionError: There is no map for a condition at a time.
        """
        cells = self.cells(conditions, times, _MEAN_CELLS)
        return np.array([[x_ng.mean(0) for x_ng in of_condition] for of_condition in cells])

    def cells(
        self, conditions: Sequence[str], times: Sequence[float], n_cells: int, seed: int = 0
    ) -> list[list[Floats]]:
        """Control cells of each time, mapped: one list per condition, one array per time."""
        asked = [[self._place(name, time) for time in times] for name in conditions]
        missing = [
            f"{name} at {time:g}"
            for name, places in zip(conditions, asked, strict=True)
            for time, place in zip(times, places, strict=True)
            if place is None
        ]
        if missing:
            raise PredictionError(
                "CellOT maps control cells to the conditions and times it was trained on, and has no map "
                f"for {shown(missing, 5)}; compare it on held-out cells of seen ones (random_cells)."
            )
        return [[self._mapped(*place, n_cells, seed) for place in places if place] for places in asked]

    def _place(self, condition: str, time: float) -> tuple[int, int] | None:
        """Indices of a condition and a time that can be predicted."""
        c = self.means.find(condition)
        here = np.flatnonzero(self.means.times.astype(np.float32) == np.float32(time))
        if c is None or not len(here) or not self.means.cells_ct[c, here[0]]:
            return None
        return c, int(here[0])

    def _mapped(self, c: int, t: int, n_cells: int, seed: int) -> Floats:
        x_ng = draw_cells(self.screen, self.means.cells(0, t), n_cells, seed)
        if c == 0:
            return x_ng
        x_nd = self.pca.transform(x_ng)
        b = self.pairs.index((c, t))
        start_bnd = torch.from_numpy(x_nd / self._scale).float().expand(len(self.pairs), -1, -1)
        moved_nd = self._map.gradient(start_bnd)[b].detach().double().numpy() * self._scale
        return np.asarray(x_ng + (moved_nd - x_nd) @ self.pca.components_)


class _Convex(nn.Module):
    """Functions that are convex in their input, b of them side by side.

    phi(x) = |S x|^2 / 2 + l x + v softplus(V softplus(W x + a) + U x + e) with v, V >= 0.

    Source: Amos, Xu and Kolter, Input convex neural networks, ICML 2017.
    """

    def __init__(self, n_maps: int, n_inputs: int, n_hidden: int):
        super().__init__()
        b, d, h = n_maps, n_inputs, n_hidden
        self.square = nn.Parameter(torch.eye(d).repeat(b, 1, 1))
        self.linear = nn.Parameter(torch.zeros(b, 1, d))
        self.first = nn.Parameter(torch.randn(b, d, h) / math.sqrt(d))
        self.first_bias = nn.Parameter(torch.zeros(b, 1, h))
        self.between = nn.Parameter(torch.randn(b, h, h) - math.log(h) - 2)  # softplus of it is a weight
        self.skip = nn.Parameter(torch.randn(b, d, h) / math.sqrt(d))
        self.skip_bias = nn.Parameter(torch.zeros(b, 1, h))
        self.last = nn.Parameter(torch.full((b, h, 1), -math.log(h) - 3.0))

    @torch.no_grad()
    def match(self, b: int, x_nd: Tensor, y_md: Tensor) -> None:
        """Let the gradient of function b give x the mean and covariance of y, hidden layers aside."""
        root_dd, inverse_dd = _roots(_covariance(x_nd))
        between_dd, _ = _roots(root_dd @ _covariance(y_md) @ root_dd)
        map_dd = inverse_dd @ between_dd @ inverse_dd
        self.square[b] = _roots(map_dd)[0]
        self.linear[b, 0] = y_md.mean(0) - x_nd.mean(0) @ map_dd

    def forward(self, x_bnd: Tensor) -> Tensor:
        """Values, shape (b, n)."""
        softplus = nn.functional.softplus
        hidden = softplus(x_bnd @ self.first + self.first_bias)
        hidden = softplus(hidden @ softplus(self.between) + x_bnd @ self.skip + self.skip_bias)
        quadratic = ((x_bnd @ self.square) ** 2 / 2 + self.linear * x_bnd).sum(-1)
        value_bn: Tensor = quadratic + (hidden @ softplus(self.last)).squeeze(-1)
        return value_bn

    def gradient(self, x_bnd: Tensor, create_graph: bool = False) -> Tensor:
        """Where each cell is mapped to, shape (b, n, d)."""
        x_bnd = x_bnd.detach().requires_grad_()
        (moved_bnd,) = torch.autograd.grad(self(x_bnd).sum(), x_bnd, create_graph=create_graph)
        return moved_bnd


def _covariance(x_nd: Tensor) -> Tensor:
    """Covariance of cells, plus a hundredth of the mean variance: few cells leave it singular."""
    covariance_dd = torch.cov(x_nd.T).reshape(x_nd.shape[1], -1)
    return covariance_dd + torch.eye(len(covariance_dd)) * (
        0.01 * covariance_dd.trace() / len(covariance_dd) + 1e-6
    )


def _roots(positive_dd: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root of a positive definite matrix, and its inverse."""
    value_d, vector_dd = torch.linalg.eigh((positive_dd + positive_dd.T) / 2)
    root_d = value_d.clamp(min=1e-8).sqrt()
    return (vector_dd * root_d) @ vector_dd.T, (vector_dd / root_d) @ vector_dd.T


def _train(
    maps: _Convex,
    opponent: _Convex,
    batches: Callable[[], tuple[Tensor, Tensor]],
    n_steps: int,
    lr: float,
) -> None:
    """The minimax problem of :class:`CellOT`, for all pairs at once: their losses share no parameters."""
    adams = [torch.optim.Adam(net.parameters(), lr=lr, betas=(0.5, 0.9)) for net in (maps, opponent)]
    decays = [torch.optim.lr_scheduler.ExponentialLR(adam, _LAST_LR ** (1 / n_steps)) for adam in adams]
    for _ in range(n_steps):
        for _ in range(_INNER):
            x_bnd, y_bnd = batches()
            moved_bnd = maps.gradient(x_bnd, create_graph=True)
            loss = (opponent(moved_bnd) - (x_bnd * moved_bnd).sum(-1)).mean(1).sum()
            _step(adams[0], loss)
        moved_bnd = maps.gradient(x_bnd)
        _step(adams[1], (opponent(y_bnd) - opponent(moved_bnd)).mean(1).sum())
        for decay in decays:
            decay.step()


def _step(adam: torch.optim.Optimizer, loss: Tensor) -> None:
    adam.zero_grad()
    loss.backward()
    adam.step()
