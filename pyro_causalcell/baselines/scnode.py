"""scNODE: cells of a first snapshot that flow through a latent neural ordinary differential equation."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pyro_causalcell.baselines.means import draw_cells, expression
from pyro_causalcell.baselines.temporal import (
    Floats,
    TargetFeatures,
    alone,
    require_after,
    require_course,
    snapshots,
)
from pyro_causalcell.data import Screen
from pyro_causalcell.errors import DataError

__all__ = ["ScNODE"]

_KL = 1e-2  # weight of the VAE's divergence, per gene
_BLUR = 0.1  # entropy of the transport plan, per dimension of standardised cells
_SINKHORN_STEPS = 50
_STEPS = 8  # of the solver, from onset to the last training time
_GROUPS = 4  # conditions in a step
_MEAN_CELLS = 500


class ScNODE:
    """scNODE: a VAE, a neural ODE between its latents, and optimal transport to every snapshot.

    Cells of the first snapshot of control are encoded, z(onset) ~ q(z | x), flow along dz/dt = f(z, u) and
    are decoded at each time. First the VAE is trained on all training cells; then all parts together on

        OT(decoded, measured) + latent_weight OT(z(t), encoded measured) + the VAE's loss,

    where OT is the debiased entropic transport cost (Sinkhorn) over the cells of a condition at a time. The
    original has no perturbations; here f also sees the features u of the condition (``TargetFeatures``),
    zeros for control. Predicted cells are decoded means, without the noise of measuring, as in the original.

    Args:
        screen: A screen with times.
        rows: Training cells, control among them, of two times at least.
        seed: Seed.
        embedding: Table with one row per target, for perturbations that are never seen; None gives each
            target a column of its own.
        onset: Time at which perturbations begin, and trajectories start: the cells of the first control
            snapshot stand for those of that time.
        n_latents: Latents k.
        n_hidden: Width of the hidden layers.
        latent_weight: Weight of transport between latents.
        n_pretraining: Steps of the VAE alone.
        n_steps: Steps of all parts.
        batch_size: Cells of a condition at a time.
        lr: Learning rate.

    Raises:
        DataError: torchdiffeq or POT is not installed, there are no control cells, fewer than two times, or a
            snapshot lies before the onset.

    Source: Zhang et al., scNODE: generative model for temporal single cell transcriptomic data prediction,
    Bioinformatics 2024.
    """

    name = "scNODE"

    def __init__(
        self,
        screen: Screen,
        rows: NDArray[np.int64],
        seed: int = 0,
        *,
        embedding: pd.DataFrame | None = None,
        onset: float = 0.0,
        n_latents: int = 16,
        n_hidden: int = 64,
        latent_weight: float = 0.1,
        n_pretraining: int = 300,
        n_steps: int = 300,
        batch_size: int = 64,
        lr: float = 2e-3,
    ):
        _odeint()
        self.screen, self.onset, self.batch_size = screen, onset, batch_size
        self.means = means = snapshots(screen, rows)
        require_course(means, onset, self.name)
        self.features = TargetFeatures(screen, rows, embedding)
        self._span = float(means.times[-1] - onset)
        self._x_ng = expression(screen, means.rows).astype(np.float32)
        self._mean_g, spread_g = self._x_ng.mean(0), self._x_ng.std(0)
        self._scale_g = np.where(spread_g > 0, spread_g, 1.0).astype(np.float32)
        self._x_ng = (self._x_ng - self._mean_g) / self._scale_g
        self._cells = {
            (int(c), int(t)): np.searchsorted(means.rows, means.cells(c, t))
            for c, t in np.argwhere(means.cells_ct)
        }
        self._start = min(t for c, t in self._cells if c == 0)
        with alone(seed):
            self._net = _Flow(screen.n_genes, self.features.n_features, n_latents, n_hidden)
            self._train(n_pretraining, n_steps, latent_weight, lr, np.random.default_rng(seed))
        del self._x_ng

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
        """Where control cells of the first snapshot come to: one list per condition, one array per time."""
        self.features.require_known(conditions, self.name)
        require_after(times, self.onset, self.name)
        start_ng = draw_cells(self.screen, self.means.cells(0, self._start), n_cells, seed)
        start = torch.as_tensor((start_ng - self._mean_g) / self._scale_g, dtype=torch.float32)
        with alone(seed):
            z_nk = self._net.encode(start)[0].rsample()
        u_ce = torch.as_tensor(self.features(conditions), dtype=torch.float32)
        order, place = np.unique(np.asarray(times, dtype=np.float64), return_inverse=True)
        z_tcnk = self._net.flow(z_nk.expand(len(conditions), *z_nk.shape), u_ce, self._scaled(order))
        x_tcng = self._net.decoder(z_tcnk).numpy().astype(np.float64) * self._scale_g + self._mean_g
        return [[x_tcng[t, c] for t in place] for c in range(len(conditions))]

    def _scaled(self, times: Floats) -> Tensor:
        """Time since the onset; 1 at the last training snapshot."""
        return torch.as_tensor((times - self.onset) / self._span, dtype=torch.float32)

    def _train(
        self, n_pretraining: int, n_steps: int, latent_weight: float, lr: float, rng: np.random.Generator
    ) -> None:
        x_ng = torch.from_numpy(self._x_ng)
        adam = torch.optim.Adam(self._net.parameters(), lr=lr)
        for step in range(n_pretraining + n_steps):
            some = rng.integers(len(x_ng), size=4 * self.batch_size)
            loss = self._net.vae_loss(x_ng[some])
            if step >= n_pretraining:
                loss = loss + self._transport_loss(x_ng, latent_weight, rng)
            adam.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self._net.parameters(), 10.0)
            adam.step()

    def _transport_loss(self, x_ng: Tensor, latent_weight: float, rng: np.random.Generator) -> Tensor:
        """Transport from the flow of some conditions to their snapshots, in genes and in latents."""
        known = sorted({c for c, _ in self._cells})
        chosen = rng.choice(known, min(_GROUPS, len(known)), replace=False).tolist()
        n_times = len(self.means.times)
        pairs = [(i, t) for i, c in enumerate(chosen) for t in range(n_times) if (c, t) in self._cells]
        start = rng.choice(self._cells[0, self._start], (len(chosen), self.batch_size))
        z_cnk = self._net.encode(x_ng[start])[0].rsample()
        u_ce = torch.as_tensor(
            self.features([self.screen.conditions[c] for c in chosen]), dtype=torch.float32
        )
        z_tcnk = self._net.flow(z_cnk, u_ce, self._scaled(self.means.times))
        z_bnk = torch.stack([z_tcnk[t, i] for i, t in pairs])
        drawn = [rng.choice(self._cells[chosen[i], t], self.batch_size) for i, t in pairs]
        measured_bng = x_ng[np.stack(drawn)]
        encoded_bnk = self._net.encode(measured_bng)[0].rsample()
        in_genes = transport(self._net.decoder(z_bnk), measured_bng)
        return in_genes + latent_weight * transport(z_bnk, encoded_bnk)


class _Flow(nn.Module):
    """Encoder, decoder and vector field; cells are standardised."""

    def __init__(self, n_genes: int, n_features: int, n_latents: int, n_hidden: int):
        super().__init__()
        self.n_latents = n_latents
        self.encoder = _mlp(n_genes, n_hidden, 2 * n_latents)
        self.decoder = _mlp(n_latents, n_hidden, n_genes)
        self.field = _mlp(n_latents + n_features, n_hidden, n_latents)

    def encode(self, x_ng: Tensor) -> tuple[torch.distributions.Normal, Tensor]:
        """q(z | x), and its divergence from the standard normal prior of each cell."""
        loc, log_scale = self.encoder(x_ng).chunk(2, -1)
        scale = log_scale.clamp(-6.0, 3.0).exp()
        divergence = 0.5 * (loc**2 + scale**2 - 1) - scale.log()
        return torch.distributions.Normal(loc, scale), divergence.sum(-1)

    def vae_loss(self, x_ng: Tensor) -> Tensor:
        """Mean squared error of a gene, and the weighted divergence."""
        q, divergence_n = self.encode(x_ng)
        return (self.decoder(q.rsample()) - x_ng).square().mean() + _KL * divergence_n.mean() / x_ng.shape[-1]

    def flow(self, z_cnk: Tensor, u_ce: Tensor, time_t: Tensor) -> Tensor:
        """Latents at rising scaled times, from those at 0; shape (t, c, n, k)."""
        odeint = _odeint()
        u_cne = u_ce[:, None].expand(*z_cnk.shape[:-1], u_ce.shape[-1])

        def field(_: Tensor, z: Tensor) -> Tensor:
            return self.field(torch.cat([z, u_cne], -1))

        later_t = time_t[time_t > 0]
        if not len(later_t):
            return z_cnk[None]
        grid = torch.cat([later_t.new_zeros(1), later_t])
        options = {"step_size": 1 / _STEPS, "interp": "cubic"}
        z_tcnk: Tensor = odeint(field, z_cnk, grid, method="rk4", options=options)
        return z_tcnk if time_t[0] == 0 else z_tcnk[1:]


def _mlp(n_in: int, n_hidden: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(n_in, n_hidden),
        nn.SiLU(),
        nn.Linear(n_hidden, n_hidden),
        nn.SiLU(),
        nn.Linear(n_hidden, n_out),
    )


def _odeint() -> Any:
    try:
        import ot  # noqa: F401
        from torchdiffeq import odeint
    except ImportError as error:
        raise DataError(
            "scNODE needs torchdiffeq and POT, the extra temporal: pip install 'pyro-causalcell[temporal]'"
        ) from error
    return odeint


def transport(x_bnd: Tensor, y_bnd: Tensor) -> Tensor:
    """Debiased entropic transport cost per dimension, up to a constant of y; the mean over pairs b.

    Source: Feydy et al., AISTATS 2019, equation 3.
    """
    import ot

    def cost(a_bnd: Tensor, b_bnd: Tensor) -> Tensor:
        squares_bnm = a_bnd.square().sum(-1)[:, :, None] + b_bnd.square().sum(-1)[:, None]
        cost_bnm = (squares_bnm - 2 * a_bnd @ b_bnd.mT) / a_bnd.shape[-1]
        found = ot.solve_batch(
            cost_bnm, reg=_BLUR, reg_type="kl", method="log_sinkhorn", max_iter=_SINKHORN_STEPS, tol=1e-4
        )
        value_b: Tensor = found.value
        return value_b

    return (cost(x_bnd, y_bnd) - cost(x_bnd, x_bnd) / 2).mean()
