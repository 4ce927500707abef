"""RENGE: a gene network whose direct and indirect effects appear one after another."""

from collections.abc import Sequence

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, init_to_median
from pyro.nn import PyroModule
from pyro.optim import ClippedAdam
from torch import Tensor

from pyro_causalcell.baselines.temporal import Floats, alone, line_weights, require_after, snapshots
from pyro_causalcell.data import Screen
from pyro_causalcell.data.spec import shown
from pyro_causalcell.errors import DataError

__all__ = ["RENGE"]

_LAST_LR = 0.05  # where the learning rate ends, as a share of its start


class RENGE:
    """RENGE: means over time from a sparse network among genes, for single knock-outs and combinations.

    With x[c] the change of the perturbed genes of condition c, its mean at time t is

        E[c, t] = b[t] + x[c] + sum_k w[t, k] h[c, k],   h[c, 0] = x[c],  h[c, k] = m[c] * (A h[c, k - 1])

    where A[i, j] is the effect of gene j on gene i, m is zero at the perturbed genes (what is knocked out
    stays so), and w[t, k, i] = sigmoid(level[i] + speed t - delay k) says how much of the effects over k
    edges has arrived. A has a Laplace prior and no diagonal; all is fitted to the means of training cells at
    the maximum of the posterior.

    The change x of a target is that of its own gene in the training cells. For a target never seen, its
    mean in control cells is changed by the share that the seen targets change theirs: so the knock-out of any
    measured gene is predicted, from the effects of that gene as a link of other chains.

    Args:
        screen: A screen with times whose targets are among its genes.
        rows: Training cells, control among them.
        seed: Seed.
        n_orders: Longest path k.
        penalty: Nats for an edge of weight 1 (inverse scale of the Laplace prior).
        onset: Time at which perturbations begin.
        n_steps: Steps of the optimiser.
        lr: Its first learning rate.

    Attributes:
        network_gg: A: effect of a change of the gene of the column on the gene of the row.

    Raises:
        DataError: There are no control or no perturbed cells, a target of the training cells is no gene, or
            a snapshot lies before the onset.

    Source: Ishikawa et al., RENGE infers gene regulatory networks using time-series single-cell RNA-seq data
    with CRISPR perturbations, Communications Biology 2023.
    """

    name = "RENGE"

    def __init__(
        self,
        screen: Screen,
        rows: NDArray[np.int64],
        seed: int = 0,
        *,
        n_orders: int = 3,
        penalty: float = 10.0,
        onset: float = 0.0,
        n_steps: int = 1000,
        lr: float = 0.02,
    ):
        self.screen, self.onset = screen, onset
        self.means = means = snapshots(screen, rows)
        if not means.has_control or not means.perturbed:
            raise DataError(
                "RENGE needs control cells and perturbed cells to train on; keep both in training."
            )
        require_after(means.times, onset, self.name)
        self.gene_p = _genes_of_targets(screen)
        self._span = max(float(means.times[-1] - onset), 1e-9)
        self.change_p = self._changes()
        control_tg = means.at([0], means.times.tolist())
        seen_c, seen_t = np.nonzero(means.cells_ct)
        x_cg, clamped_cg = self._knocked([screen.conditions[c] for c in seen_c])
        cells_n1 = means.cells_ct[seen_c, seen_t][:, None]
        within_ng = np.nan_to_num(means.variance_ctg[seen_c, seen_t]) * (cells_n1 - 1)
        variance_g = within_ng.sum(0) / max(int((cells_n1 - 1).sum()), 1)
        model = _Network(_tensor(control_tg), n_orders, penalty)
        data = (
            _tensor(x_cg),
            _tensor(~clamped_cg),
            _tensor(self._scaled(means.times)[seen_t]),
            torch.as_tensor(seen_t),
            _tensor(means.mean_ctg[seen_c, seen_t]),
            _tensor(np.sqrt(variance_g / cells_n1)),
        )
        with alone(seed):
            guide = AutoDelta(model, init_loc_fn=init_to_median)
            optimiser = ClippedAdam({"lr": lr, "lrd": _LAST_LR ** (1 / n_steps)})
            svi = SVI(model, guide, optimiser, Trace_ELBO())
            for _ in range(n_steps):
                svi.step(*data)
        self._fitted = {name: value.detach() for name, value in guide.median().items()}
        self._model = model
        self.network_gg = model.network(self._fitted["network"]).numpy().astype(np.float64)

    def predict(self, conditions: Sequence[str], times: Sequence[float]) -> Floats:
        """Mean expression of each condition at each time, shape (c, t, g), in log1p CP10k.

        Between and beyond the training times the control level goes on along straight lines.

        Raises:
            DataError: A condition names an unknown target, or one that is no gene of the screen.
        """
        x_cg, clamped_cg = self._knocked(conditions)
        base_tg = line_weights(self.means.times, times) @ self._fitted["base"].numpy().astype(np.float64)
        time_t = _tensor(self._scaled(np.asarray(times, dtype=np.float64)))
        c, t = len(conditions), len(times)
        effect_ng = self._model.effect(
            _tensor(np.repeat(x_cg, t, 0)),
            _tensor(np.repeat(~clamped_cg, t, 0)),
            time_t.repeat(c),
            *(self._fitted[name] for name in ("network", "level", "speed", "delay")),
        )
        return np.asarray(base_tg + effect_ng.numpy().astype(np.float64).reshape(c, t, -1))

    def _scaled(self, times: Floats) -> Floats:
        """Time since the onset; 1 at the last training snapshot."""
        return (times - self.onset) / self._span

    def _changes(self) -> Floats:
        """Change of each target's own gene, shape (p,): measured, or the shared share of its control mean."""
        _, control_tg = self.means.course([0])
        control_g, change_p = control_tg.mean(0), np.full(len(self.screen.targets), np.nan)
        for c in self.means.perturbed:
            targets = self.screen.describe().split(self.screen.conditions[c])
            unmeasured = [t for t in targets if self.gene_p[self.screen.targets.index(t)] < 0]
            if unmeasured:
                raise DataError(
                    f"RENGE needs perturbed genes among the genes of the screen, found none for "
                    f"{shown(unmeasured)}; add these genes or leave the conditions out."
                )
            if len(targets) == 1:
                p = self.screen.targets.index(targets[0])
                known, mean_tg = self.means.course([c])
                change_tg = mean_tg - self.means.at([0], known.tolist())
                change_p[p] = change_tg[:, self.gene_p[p]].mean()
        level_p = np.where(self.gene_p < 0, np.nan, control_g[self.gene_p])
        seen_p = np.isfinite(change_p)
        if not seen_p.any():
            raise DataError(
                "RENGE needs a target perturbed alone to know how far targets change; found none."
            )
        share = (change_p[seen_p] @ level_p[seen_p]) / max(float(level_p[seen_p] @ level_p[seen_p]), 1e-12)
        return np.where(seen_p, change_p, share * level_p)

    def _knocked(self, conditions: Sequence[str]) -> tuple[Floats, NDArray[np.bool_]]:
        """Change of the perturbed genes of each condition, and which these are, each (c, g)."""
        u_cp = self.screen.design(conditions) != 0
        lost = [t for p, t in enumerate(self.screen.targets) if u_cp[:, p].any() and self.gene_p[p] < 0]
        if lost:
            raise DataError(f"RENGE predicts knock-outs of measured genes; {shown(lost)} are none.")
        x_cg = np.zeros((len(conditions), self.screen.n_genes))
        clamped_cg = np.zeros(x_cg.shape, dtype=bool)
        for c, p in np.argwhere(u_cp):
            x_cg[c, self.gene_p[p]] = self.change_p[p]
            clamped_cg[c, self.gene_p[p]] = True
        return x_cg, clamped_cg


class _Network(PyroModule):
    """p(means | network): see :class:`RENGE`."""

    def __init__(self, control_tg: Tensor, n_orders: int, penalty: float):
        super().__init__()
        self.control_tg, self.n_orders, self.penalty = control_tg, n_orders, penalty
        self.off_diagonal_gg = 1 - torch.eye(control_tg.shape[1])

    def network(self, weight_gg: Tensor) -> Tensor:
        """A: no gene acts on itself."""
        return weight_gg * self.off_diagonal_gg

    def effect(
        self,
        x_ng: Tensor,
        free_ng: Tensor,
        time_n: Tensor,
        weight_gg: Tensor,
        level_g: Tensor,
        speed: Tensor,
        delay: Tensor,
    ) -> Tensor:
        """What knock-outs x change, n conditions each at its time, (n, g)."""
        a_gg = self.network(weight_gg)
        total_ng = reached_ng = x_ng
        for k in range(1, self.n_orders + 1):
            reached_ng = free_ng * (reached_ng @ a_gg.T)
            arrived_ng = torch.sigmoid(level_g + speed * time_n[:, None] - delay * k)
            total_ng = total_ng + arrived_ng * reached_ng
        return total_ng

    def forward(
        self,
        x_ng: Tensor,
        free_ng: Tensor,
        time_n: Tensor,
        place_n: Tensor,
        mean_ng: Tensor,
        error_ng: Tensor,
    ) -> None:
        n_genes = x_ng.shape[1]
        weight_gg = pyro.sample(
            "network", dist.Laplace(0.0, 1 / self.penalty).expand([n_genes, n_genes]).to_event(2)
        )
        level_g = pyro.sample("level", dist.Normal(0.0, 1.0).expand([n_genes]).to_event(1))
        speed = pyro.sample("speed", dist.LogNormal(1.0, 1.0))
        delay = pyro.sample("delay", dist.LogNormal(0.0, 1.0))
        base_tg = pyro.sample("base", dist.Normal(self.control_tg, 1.0).to_event(2))
        misfit = pyro.sample("misfit", dist.LogNormal(-3.0, 1.0))
        effect_ng = self.effect(x_ng, free_ng, time_n, weight_gg, level_g, speed, delay)
        with pyro.plate("means", len(x_ng)):
            scale_ng = (error_ng**2 + misfit**2).sqrt()
            pyro.sample("mean", dist.Normal(base_tg[place_n] + effect_ng, scale_ng).to_event(1), obs=mean_ng)


def _genes_of_targets(screen: Screen) -> NDArray[np.int64]:
    """Index of each target's own gene, shape (p,); -1 where it is not measured."""
    place = {gene: g for g, gene in enumerate(screen.genes)}
    return np.array([place.get(target, -1) for target in screen.targets], dtype=np.int64)


def _tensor(values: NDArray[np.generic]) -> Tensor:
    return torch.as_tensor(np.asarray(values, dtype=np.float32))
