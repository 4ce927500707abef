"""Baselines with a likelihood: negative binomial counts around rates of the training cells."""

from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, xlogy

from pyro_causalcell.data import Minibatches, Screen
from pyro_causalcell.errors import DataError

__all__ = ["RATES", "CountBaseline", "Rates"]

Rates = Literal["control", "perturbed", "matching", "additive"]
RATES: tuple[Rates, ...] = get_args(Rates)
"""What the rates of a condition may be, see :class:`CountBaseline`."""
_THETAS = np.geomspace(0.05, 200, 30)  # inverse dispersions that are tried
_ROWS = 1024


class CountBaseline:
    """Counts of a condition around library × rate, negative binomial, with rates of the training cells alone.

    There are four of them, one for each of :data:`RATES`; they share totals and dispersions.

    A gene's rate in a condition is its share of all counts there. One more cell, of the mean of all perturbed
    cells, is added to each condition, so that no rate is zero. The rates of a combination are those of
    ``"control"``, of all ``"perturbed"`` cells, the mean of its targets' (``"matching"``), or those where the
    log ratios of its targets to control add up (``"additive"``, rescaled to the sum of control's rates). A
    target that was not measured alone has the perturbed rates. A gene's dispersion is that of highest
    likelihood over the training cells, each around its own condition.

    Args:
        screen: Counts.
        rows: Its training cells.

    Raises:
        DataError: The screen holds no counts, or no control or no perturbed cell trains.
    """

    def __init__(self, screen: Screen, rows: NDArray[np.int64]):
        self.screen = screen
        if not screen.is_counts:
            raise DataError("a likelihood of counts needs counts; open the screen with layer= of its counts.")
        code_n = screen.condition_n[rows]
        if (code_n == 0).all() or (code_n > 0).all():
            raise DataError("rates need control and perturbed cells to train on, found one of the two alone.")
        total_cg = np.zeros((len(screen.conditions), screen.n_genes))
        for x_ng, _, chunk_n in self._cells(rows):
            np.add.at(total_cg, chunk_n, x_ng)
        library_c = np.bincount(code_n, screen.library_n[rows], len(total_cg))
        perturbed_g = total_cg[1:].sum(0) + 1e-6
        perturbed_g /= library_c[1:].sum()
        cell = np.median(screen.library_n[rows])
        self.perturbed_g = perturbed_g
        self.rate_cg = (total_cg + cell * perturbed_g) / (library_c + cell)[:, None]
        self.seen = {screen.conditions[c] for c in np.unique(code_n)}
        self.theta_g = self._most_likely(rows)

    def nll(self, rows: NDArray[np.int64], rates: Rates) -> NDArray[np.float64]:
        """Negative log-likelihood of the counts of each cell given its library, in nats, shape (n,)."""
        rate_cg = np.stack([self.rate(name, rates) for name in self.screen.conditions])
        parts = []
        for x_ng, library_n1, code_n in self._cells(rows):
            parts.append(-_log_nb(x_ng, library_n1 * rate_cg[code_n], self.theta_g).sum(1))
        return np.concatenate(parts)

    def rate(self, condition: str, rates: Rates) -> NDArray[np.float64]:
        """Expected share of each gene in a cell's counts, shape (g,)."""
        targets = self.screen.describe().split(self.screen.canonical(condition))
        control_g = self.rate_cg[0]
        if rates == "control" or not targets:
            return control_g
        if rates == "perturbed":
            return self.perturbed_g
        alone_tg = np.array(
            [
                self.rate_cg[self.screen.conditions.index(t)] if t in self.seen else self.perturbed_g
                for t in targets
            ]
        )
        if rates == "matching" or len(targets) == 1:
            mean_g: NDArray[np.float64] = alone_tg.mean(0)
            return mean_g
        combined_g: NDArray[np.float64] = control_g * (alone_tg / control_g).prod(0)
        return combined_g * (control_g.sum() / combined_g.sum())

    def _most_likely(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        score_tg = np.zeros((len(_THETAS), self.screen.n_genes))
        for x_ng, library_n1, code_n in self._cells(rows):
            mean_ng = library_n1 * self.rate_cg[code_n]
            score_tg += np.stack([_log_nb(x_ng, mean_ng, theta).sum(0) for theta in _THETAS])
        best_g: NDArray[np.float64] = _THETAS[score_tg.argmax(0)]
        return best_g

    def _cells(
        self, rows: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]]:
        """Counts, totals and conditions of some cells, chunk by chunk."""
        for batch in Minibatches(self.screen, rows, _ROWS, shuffle=False):
            assert batch.x_ng is not None
            yield batch.x_ng.double().numpy(), batch.library_n1.double().numpy(), batch.condition_n.numpy()


def _log_nb(
    x_ng: NDArray[np.float64], mean_ng: NDArray[np.float64], theta: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Log-probability of counts of this mean and variance mean + mean² / theta."""
    gammas_ng = gammaln(x_ng + theta) - gammaln(theta) - gammaln(x_ng + 1)
    value_ng: NDArray[np.float64] = (
        gammas_ng - theta * np.log1p(mean_ng / theta) + xlogy(x_ng, mean_ng / (theta + mean_ng))
    )
    return value_ng
