"""What a method leaves of measured means, as random effects of targets."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.special import softmax
from scipy.stats import multivariate_normal

from pyro_causalcell.baselines import Additive, ControlMean, WithResiduals, condition_means, training_means
from pyro_causalcell.baselines.compare import check_unseen
from pyro_causalcell.baselines.residuals import SPREADS, random_effects
from pyro_causalcell.data import Screen, held_out_combinations
from pyro_causalcell.errors import DataError


class MeansAlone:
    """Predicts what it is told."""

    name = "told"

    def __init__(self, means):
        self.means = means

    def predict(self, conditions):
        return np.stack([self.means[name] for name in conditions])


def test_effects_are_those_of_the_joint_posterior():
    """Against a dense Gaussian posterior at each spread, averaged by its evidence."""
    rng = np.random.default_rng(0)
    u_cp = np.vstack([np.zeros(6), np.eye(6), rng.random((5, 6)) < 0.4])
    cells_c, noise_g = rng.integers(20, 200, 12), np.array([0.5, 2.0])
    y_cg = 0.3 + u_cp @ rng.normal(0, [0.5, 0.05], (6, 2))
    y_cg += rng.normal(size=(12, 2)) * np.sqrt(noise_g / cells_c[:, None])
    common_g, effect_pg = random_effects(y_cg, noise_g, cells_c, u_cp)
    design = np.column_stack([np.ones(12), u_cp])
    for g in range(2):
        evidence, means = [], []
        for ratio in SPREADS:
            prior = np.diag([1e4, *np.full(6, ratio * noise_g[g])])
            marginal = design @ prior @ design.T + np.diag(noise_g[g] / cells_c)
            evidence.append(multivariate_normal.logpdf(y_cg[:, g], np.zeros(12), marginal))
            means.append(prior @ design.T @ np.linalg.solve(marginal, y_cg[:, g]))
        expected = softmax(evidence) @ np.array(means)
        np.testing.assert_allclose([common_g[g], *effect_pg[:, g]], expected, atol=1e-4)


def test_noise_is_shrunk_away_and_effects_are_kept():
    rng = np.random.default_rng(1)
    u_cp = np.vstack([np.zeros(40), np.eye(40)])
    cells_c, noise_g = np.full(41, 100), np.ones(200)
    noise_cg = rng.normal(0, 0.1, (41, 200))
    _, effect_pg = random_effects(noise_cg, noise_g, cells_c, u_cp)
    assert (effect_pg**2).mean() < 0.1 * 0.01
    strong_pg = rng.normal(0, 1, (40, 200))
    _, effect_pg = random_effects(noise_cg + u_cp @ strong_pg, noise_g, cells_c, u_cp)
    assert ((effect_pg - strong_pg) ** 2).mean() < 0.025


@pytest.fixture(scope="module")
def screen():
    """Simulated counts: A lowers gene 0, B raises gene 1; both together do both."""
    rng = np.random.default_rng(3)
    rate = {"control": np.full(30, 5.0), "C": np.full(30, 5.0)}
    rate["A"] = rate["control"] * np.r_[0.4, np.ones(29)]
    rate["B"] = rate["control"] * np.r_[1.0, 4.0, np.ones(28)]
    rate["A+B"] = rate["A"] * rate["B"] / 5
    x_ng = np.concatenate([rng.poisson(rate_g, (300, 30)) for rate_g in rate.values()])
    obs = pd.DataFrame({"target": np.repeat(list(rate), 300)}, index=[f"c{n}" for n in range(1500)])
    adata = ad.AnnData(x_ng.astype(np.float32), obs, pd.DataFrame(index=[f"g{g}" for g in range(30)]))
    return Screen(adata, control="control")


def test_a_double_gets_what_its_singles_show(screen):
    split = held_out_combinations(screen, ["A+B"], validation=0.0)
    means = training_means(screen, split.train)
    bare = ControlMean(means)
    method = WithResiduals(bare, screen, split.train)
    assert method.name == "control mean, with residuals"
    truth_g = condition_means(screen, split.test, ["A+B"])[0]
    error_g, bare_g = method.predict(["A+B"])[0] - truth_g, bare.predict(["A+B"])[0] - truth_g
    assert np.abs(error_g[:2]).max() < 0.3 < 0.7 < np.abs(bare_g[:2]).min()
    additive_g = Additive(means).predict(["A+B"])[0] - truth_g
    assert np.linalg.norm(error_g[2:]) < 0.9 * np.linalg.norm(additive_g[2:])
    np.testing.assert_allclose(method.predict(["control"]), bare.predict(["control"]), atol=0.1)


def test_cells_have_the_corrected_mean_and_keep_their_zeros(screen):
    everything = np.arange(screen.n_cells)
    means = training_means(screen, everything)

    class Measured(MeansAlone):
        def cells(self, conditions, n_cells, seed=0):
            return [x_ng[:n_cells] for x_ng in (cells[name] for name in conditions)]

    rng = np.random.default_rng(4)
    cells = {name: rng.poisson(1.0, (50, 30)).astype(float) for name in screen.conditions}
    method = WithResiduals(Measured({name: x_ng.mean(0) for name, x_ng in cells.items()}), screen, everything)
    (moved_ng,) = method.cells(["A"], 50)
    np.testing.assert_allclose(moved_ng.mean(0), method.predict(["A"])[0])
    np.testing.assert_array_equal(moved_ng == 0, cells["A"] == 0)
    gap = {m: np.abs(m.predict(["A"])[0] - means.seen["A"]).mean() for m in (method, method.method)}
    assert gap[method] < 0.3 * gap[method.method]


def test_normalised_values_are_moved(screen):
    values = screen.adata.copy()
    values.X = np.log1p(values.X) - 1.0
    normalised = Screen(values, control="control")
    control = {name: np.full(30, -0.5) for name in normalised.conditions}
    method = WithResiduals(MeansAlone(control), normalised, np.arange(normalised.n_cells))
    x_ng = np.random.default_rng(5).normal(-0.5, 1, (20, 30))
    moved_ng = method.moved(x_ng, control["A"], "A")
    np.testing.assert_allclose(moved_ng - x_ng, np.broadcast_to(method.predict(["A"]) + 0.5, (20, 30)))


def test_what_residuals_need(screen):
    means = {name: np.ones(30) for name in screen.conditions}
    control = np.flatnonzero(screen.condition_n == 0)
    with pytest.raises(DataError, match="perturbed conditions of two training cells or more"):
        WithResiduals(MeansAlone(means), screen, control)
    method = WithResiduals(MeansAlone(means), screen, np.arange(screen.n_cells))
    with pytest.raises(DataError, match="told predicts means alone"):
        method.cells(["A"], 5)
    with pytest.raises(DataError, match="held-out"):
        check_unseen(method, held_out_combinations(screen, ["A+B"]))
