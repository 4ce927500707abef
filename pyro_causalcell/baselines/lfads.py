"""LFADS: a recurrent generator of counts, trained on cells joined at random into sequences."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule
from pyro.optim import ClippedAdam
from torch import Tensor, nn

from pyro_causalcell.baselines.means import log_cp10k
from pyro_causalcell.baselines.temporal import (
    Floats,
    TargetFeatures,
    alone,
    line_weights,
    require_after,
    require_course,
    snapshots,
)
from pyro_causalcell.data import Screen

__all__ = ["LFADS"]

_STEPS = 12  # of the generator, from onset to the last training time
_MEAN_CELLS = 500
_LAST_LR = 0.05  # where the learning rate ends, as a share of its start


class LFADS:
    """LFADS: a sequential VAE whose generator is a recurrent network with Poisson rates.

        z ~ Normal(0, 1),  h[0] = tanh(W z),  h[s] = GRU(u, h[s - 1]),  f[s] = F h[s]
        x[t] ~ Poisson(library[t] exp(R f[t] + r))

    The generator makes equal steps from the onset to the last training time, and goes on beyond it; its
    factors f are read at any time on straight lines between steps. Its input u is the features of the
    condition (``TargetFeatures``) in place of the inferred inputs of the original. A second recurrent network
    reads a sequence and gives q(z | x).

    Sequences need paired cells, and snapshots have none: in each minibatch random cells of the snapshots of a
    condition are joined. So the sequences tell nothing of the course of single cells, only of populations.

    Args:
        screen: A screen of counts with times.
        rows: Training cells, control among them, of two times at least.
        seed: Seed.
        embedding: Table with one row per target, for perturbations that are never seen; None gives each
            target a column of its own.
        onset: Time at which perturbations begin.
        n_latents: Width of z.
        n_factors: Width of f.
        n_hidden: Width of the recurrent networks.
        n_steps: Steps of the optimiser.
        batch_size: Sequences in a minibatch.
        lr: First learning rate.

    Raises:
        DataError: The screen holds no counts, there are no control cells, fewer than two times, or a snapshot
            lies before the onset.

    Source: Pandarinath et al., Inferring single-trial neural population dynamics using sequential
    auto-encoders, Nature Methods 2018.
    """

    name = "LFADS"

    def __init__(
        self,
        screen: Screen,
        rows: NDArray[np.int64],
        seed: int = 0,
        *,
        embedding: pd.DataFrame | None = None,
        onset: float = 0.0,
        n_latents: int = 16,
        n_factors: int = 16,
        n_hidden: int = 64,
        n_steps: int = 500,
        batch_size: int = 64,
        lr: float = 1e-2,
    ):
        screen.require_counts()
        self.screen, self.onset = screen, onset
        self.means = means = snapshots(screen, rows)
        require_course(means, onset, self.name)
        self.features = TargetFeatures(screen, rows, embedding)
        self._grid = np.linspace(onset, means.times[-1], _STEPS + 1)
        counts_ng = screen.x(means.rows)
        library_n = screen.library_n[means.rows]
        share_g = (counts_ng.sum(0) + 1) / (library_n.sum() + len(counts_ng))
        with alone(seed):
            sizes = (self.features.n_features, n_latents, n_factors, n_hidden)
            self._model = _Generator(torch.from_numpy(np.log(share_g)).float(), *sizes)
            guide = _Reader(screen.n_genes, n_latents, n_hidden)
            optimiser = ClippedAdam({"lr": lr, "lrd": _LAST_LR ** (1 / n_steps), "clip_norm": 10.0})
            svi = SVI(self._model, guide, optimiser, Trace_ELBO())
            joined = _Joined(self, counts_ng, library_n, np.random.default_rng(seed))
            for _ in range(n_steps):
                svi.step(joined.draw(batch_size))

    def predict(self, conditions: Sequence[str], times: Sequence[float]) -> Floats:
        """Mean of predicted cells, shape (c, t, g), in log1p CP10k.

        Raises:
            DataError: A time lies before the onset, or a condition names an unknown target.
            PredictionError: A target was never seen, and there is no embedding.
        """
        cells = self.cells(conditions, times, _MEAN_CELLS)
        return np.array([[x_ng.mean(0) for x_ng in of_condition] for of_condition in cells])

    @torch.no_grad()
    def cells(
        self, conditions: Sequence[str], times: Sequence[float], n_cells: int, seed: int = 0
    ) -> list[list[Floats]]:
        """Generated cells with libraries of training cells: one list per condition, one array per time."""
        self.features.require_known(conditions, self.name)
        require_after(times, self.onset, self.name)
        rng = np.random.default_rng(seed)
        library_n = self.screen.library_n[rng.choice(self.means.rows, n_cells)]
        z_nk = torch.from_numpy(rng.standard_normal((n_cells, self._model.n_latents))).float()
        n_steps = int(np.ceil((max(times) - self.onset) / (self._grid[1] - self._grid[0]) - 1e-6))
        weight_ts = self.weights(times, max(n_steps, _STEPS))
        drawn = []
        for u_e in self.features(conditions):
            u_ne = torch.from_numpy(u_e).float().expand(n_cells, -1)
            log_rate_ntg = self._model.log_rate(z_nk, u_ne, weight_ts)
            rate_tng = log_rate_ntg.exp().double().numpy().transpose(1, 0, 2) * library_n[:, None]
            drawn.append([log_cp10k(rng.poisson(rate_ng), library_n) for rate_ng in rate_tng])
        return drawn

    def weights(self, times: Sequence[float] | Floats, n_steps: int = _STEPS) -> Tensor:
        """Weights of the generator's states at times, (t, n_steps + 1)."""
        step = self._grid[1] - self._grid[0]
        grid = self.onset + step * np.arange(n_steps + 1)
        return torch.from_numpy(line_weights(grid, list(times))).float()


class _Sequences(NamedTuple):
    """Cells joined over time; a missing snapshot has weight zero."""

    x_ntg: Tensor
    library_nt: Tensor
    measured_nt: Tensor
    u_ne: Tensor
    weight_ts: Tensor


class _Joined:
    """Draws cells of successive snapshots of a condition, each at random."""

    def __init__(
        self, lfads: LFADS, counts_ng: NDArray[np.float32], library_n: Floats, rng: np.random.Generator
    ):
        means = lfads.means
        self.x_ng, self.library_n, self.rng = counts_ng, library_n, rng
        self.seen = np.flatnonzero(means.cells_ct.any(1))
        self.cells_ct = means.cells_ct[self.seen]
        # Cells in the order of condition and time: those of a pair stand in one stretch.
        stretches = [means.cells(int(c), t) for c in self.seen for t in range(len(means.times))]
        self.order = np.searchsorted(means.rows, np.concatenate(stretches))
        self.first_ct = (np.cumsum(self.cells_ct) - self.cells_ct.ravel()).reshape(self.cells_ct.shape)
        self.u_ce = lfads.features([means.screen.conditions[c] for c in self.seen])
        self.weight_ts = lfads.weights(means.times)

    def draw(self, n: int) -> _Sequences:
        """A minibatch, conditions equally often."""
        c_n = self.rng.integers(len(self.seen), size=n)
        measured_nt = self.cells_ct[c_n] > 0
        place_nt = self.first_ct[c_n] + self.rng.integers(np.maximum(self.cells_ct[c_n], 1))
        cell_nt = self.order[np.where(measured_nt, place_nt, 0)]
        return _Sequences(
            torch.from_numpy(self.x_ng[cell_nt]).float(),
            torch.from_numpy(self.library_n[cell_nt]).float(),
            torch.from_numpy(measured_nt),
            torch.from_numpy(self.u_ce[c_n]).float(),
            self.weight_ts,
        )


class _Generator(PyroModule):
    """p(x, z): see :class:`LFADS`."""

    def __init__(self, log_share_g: Tensor, n_features: int, n_latents: int, n_factors: int, n_hidden: int):
        super().__init__()
        self.n_latents = n_latents
        self.start = nn.Linear(n_latents, n_hidden)
        # Without perturbations there are no features; the cell then takes a constant.
        self.cell = nn.GRUCell(n_features + 1, n_hidden)
        self.factors = nn.Linear(n_hidden, n_factors, bias=False)
        self.rates = nn.Linear(n_factors, len(log_share_g))
        with torch.no_grad():
            self.rates.bias.copy_(log_share_g)

    def log_rate(self, z_nk: Tensor, u_ne: Tensor, weight_ts: Tensor) -> Tensor:
        """Log of the share of each gene in a cell's counts at each time, (n, t, g)."""
        hidden = torch.tanh(self.start(z_nk))
        inputs = torch.cat([u_ne, u_ne.new_ones(len(u_ne), 1)], -1)
        states = [hidden]
        for _ in range(weight_ts.shape[1] - 1):
            hidden = self.cell(inputs, hidden)
            states.append(hidden)
        factor_nsf = self.factors(torch.stack(states, 1))
        log_rate_ntg: Tensor = self.rates(weight_ts @ factor_nsf)
        return log_rate_ntg

    def forward(self, batch: _Sequences) -> None:
        with pyro.plate("sequences", len(batch.x_ntg)):
            z_nk = pyro.sample("z", dist.Normal(0.0, 1.0).expand([self.n_latents]).to_event(1))
            log_rate_ntg = self.log_rate(z_nk, batch.u_ne, batch.weight_ts)
            rate_ntg = batch.library_nt[..., None] * log_rate_ntg.clamp(max=0.0).exp()
            counts = dist.Poisson(rate_ntg).mask(batch.measured_nt[..., None]).to_event(2)
            pyro.sample("x", counts, obs=batch.x_ntg)


class _Reader(PyroModule):
    """q(z | x): a recurrent network over the snapshots of a sequence."""

    def __init__(self, n_genes: int, n_latents: int, n_hidden: int):
        super().__init__()
        self.project = nn.Linear(n_genes, n_hidden)
        self.cell = nn.GRU(n_hidden, n_hidden, batch_first=True)
        self.loc = nn.Linear(n_hidden, n_latents)
        self.log_scale = nn.Linear(n_hidden, n_latents)

    def forward(self, batch: _Sequences) -> None:
        scaled_ntg = torch.log1p(1e4 * batch.x_ntg / batch.library_nt[..., None].clamp(min=1.0))
        projected_nth = torch.tanh(self.project(scaled_ntg)) * batch.measured_nt[..., None]
        _, last_1nh = self.cell(projected_nth)
        scale_nk = self.log_scale(last_1nh[0]).clamp(-6.0, 3.0).exp()
        with pyro.plate("sequences", len(batch.x_ntg)):
            pyro.sample("z", dist.Normal(self.loc(last_1nh[0]), scale_nk).to_event(1))
