import builtins
import tracemalloc

import numpy as np
import pytest
from scipy.spatial.distance import cdist, pdist
from sklearn.decomposition import PCA

from pyro_causalcell.baselines import log_cp10k
from pyro_causalcell.data import Screen, random_cells
from pyro_causalcell.datasets import papalexi2021
from pyro_causalcell.errors import DataError
from pyro_causalcell.evaluate import (
    DISTANCES,
    PAIRED,
    discrepancy_vae_mmd,
    discrepancy_vae_scores,
    distance_scores,
    e_distance,
    e_distance_with_diagonal,
    linear_mmd,
    median_distance,
    mmd,
    sinkhorn_divergence,
)

X, Y = np.array([[0.0], [1.0]]), np.array([[3.0], [5.0]])  # across 3 5 2 4; within 1 and 2


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_e_distance_by_hand():
    assert e_distance(X, Y) == pytest.approx(2 * 3.5 - 1 - 2)
    assert e_distance_with_diagonal(X, Y) == pytest.approx(2 * 3.5 - 1 / 2 - 2 / 2)


def test_mmd_by_hand():
    def kernel(d):
        return np.mean([np.exp(-(d**2) / (2 * (2 * b) ** 2)) for b in (0.25, 0.5, 1, 2, 4)])

    across = np.mean([kernel(d) for d in (3, 5, 2, 4)])
    assert mmd(X, Y, scale=2.0) == pytest.approx(kernel(1) + kernel(2) - 2 * across)
    assert mmd(X, Y) == mmd(X, Y, scale=1.0)  # the median distance of X alone


def test_legacy_forms_by_hand():
    def kernel(d):
        return sum(np.exp(-(d**2) / (10 * 2.0 ** (i - 5))) for i in range(10))

    across = np.mean([kernel(d) for d in (3, 5, 2, 4)])
    by_hand = (10 + kernel(1)) / 2 + (10 + kernel(2)) / 2 - 2 * across
    assert discrepancy_vae_mmd(X, Y, sigma=10.0) == pytest.approx(by_hand)
    assert linear_mmd(X, Y) == pytest.approx((0.5 - 4) ** 2)


def test_scores_of_the_discrepancy_vae_by_hand():
    """Cells of a set are all alike, so pairing does not matter; 40 cells make one batch of 32."""
    x_ng, y_ng = np.tile([1.0, 3.0], (40, 1)), np.tile([2.0, 2.5], (50, 1))
    found = discrepancy_vae_scores(x_ng, y_ng)
    assert list(found) == list(PAIRED)
    assert found["rel_rmse_paired"] == pytest.approx(np.sqrt((1 + 0.25) / (1 + 9)))
    assert found["r2_paired"] == 0.0  # 1 - (1 + .25) / (.25² + .25²), cut off
    assert found["mmd_paired"] == pytest.approx(discrepancy_vae_mmd(x_ng[:32], y_ng[:32]))
    near = discrepancy_vae_scores(x_ng, x_ng + 0.1)  # the predicted mean takes the place of the truth
    assert near["r2_paired"] == pytest.approx(1 - 2 * 0.1**2 / 2)


def test_scores_of_the_discrepancy_vae_average_over_batches(rng):
    x_ng, y_ng = rng.normal(size=(64, 3)) + 2, rng.normal(size=(64, 3)) + 2
    first, again, few = (discrepancy_vae_scores(x_ng, y_ng[:n], s) for n, s in ((64, 0), (64, 0), (5, 0)))
    assert first == again
    assert few["mmd_paired"] > first["mmd_paired"] > 0  # few cells make one small batch


def test_sinkhorn_between_points_by_hand():
    """All cells of a set in one place: every plan costs the squared distance."""
    pytest.importorskip("ot")
    x_ng, y_ng = np.zeros((3, 2)), np.tile([3.0, 4.0], (3, 1))
    assert sinkhorn_divergence(x_ng, y_ng, scale=1.0) == pytest.approx(25)


def test_sinkhorn_by_an_independent_iteration(rng):
    pytest.importorskip("ot")
    x_ng, y_ng, epsilon = rng.standard_normal((12, 2)), rng.standard_normal((12, 2)) + 1, 0.8

    def cost(a, b):
        c = cdist(a, b, "sqeuclidean")
        k, u = np.exp(-c / epsilon), np.ones(len(a))
        for _ in range(2000):
            v = 1 / (k.T @ u / len(a))
            u = 1 / (k @ v / len(b))
        return epsilon * (np.log(u).mean() + np.log(v).mean())  # the dual value at the optimum

    by_hand = cost(x_ng, y_ng) - (cost(x_ng, x_ng) + cost(y_ng, y_ng)) / 2
    found = sinkhorn_divergence(x_ng, y_ng, scale=np.sqrt(epsilon))
    assert found == pytest.approx(by_hand, abs=1e-5)


def test_sinkhorn_without_pot_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without_pot(name, *args, **kwargs):
        if name == "ot":
            raise ModuleNotFoundError("No module named 'ot'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pot)
    with pytest.raises(ImportError, match=r"pip install 'pyro-causalcell\[transport\]'"):
        sinkhorn_divergence(X, Y)


def test_unbiased_forms_average_to_zero_and_legacy_forms_do_not(rng):
    pairs = [(rng.standard_normal((12, 3)), rng.standard_normal((12, 3))) for _ in range(300)]
    for unbiased in (e_distance, lambda x, y: mmd(x, y, scale=2.0)):
        values = [unbiased(x, y) for x, y in pairs]
        assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(300)
        assert min(values) < 0
    for biased in (e_distance_with_diagonal, discrepancy_vae_mmd, linear_mmd):
        assert min(biased(x, y) for x, y in pairs) > 0


def test_distances_see_what_means_do_not(rng):
    """Equal means, other spread: the linear kernel of a mean is blind."""
    x_ng = rng.standard_normal((300, 2))
    y_ng = 2 * (x_ng - x_ng.mean(0)) + x_ng.mean(0)
    assert linear_mmd(x_ng, y_ng) == pytest.approx(0, abs=1e-20)
    half = e_distance(x_ng[:150], x_ng[150:])
    assert e_distance(x_ng, y_ng) > 10 * abs(half)
    assert mmd(x_ng, y_ng) > 10 * abs(mmd(x_ng[:150], x_ng[150:]))


def test_all_cells_of_the_larger_set_count(rng):
    x_ng, y_ng = rng.standard_normal((30, 2)), rng.standard_normal((700, 2)) + 1
    by_hand = 2 * cdist(x_ng, y_ng).mean() - pdist(x_ng).mean() - pdist(y_ng).mean()
    assert e_distance(x_ng, y_ng) == pytest.approx(by_hand) == e_distance(y_ng, x_ng)


def test_many_cells_go_chunk_by_chunk(rng):
    x_ng, y_ng = rng.standard_normal((1100, 3)), rng.standard_normal((1300, 3)) + 0.2
    tracemalloc.start()
    found = e_distance_with_diagonal(x_ng, y_ng)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    by_hand = 2 * cdist(x_ng, y_ng).mean() - cdist(x_ng, x_ng).mean() - cdist(y_ng, y_ng).mean()
    assert found == pytest.approx(by_hand)
    assert peak < 1100 * 1300 * 8 * 1.2  # two matrices of 512 x 1300, not two of 1100 x 1300


def test_median_distance(rng):
    x_ng = rng.standard_normal((50, 4))
    assert median_distance(x_ng) == pytest.approx(np.median(pdist(x_ng)))
    many = rng.standard_normal((3000, 4))
    assert median_distance(many, seed=1) == pytest.approx(np.median(pdist(many)), rel=0.03)
    with pytest.raises(DataError, match="expected cells that differ"):
        median_distance(np.zeros((5, 2)))


def test_wrong_cells_are_refused(rng):
    x_ng = rng.standard_normal((5, 3))
    for wrong in (x_ng[:1], x_ng[:, :2], x_ng[0]):
        with pytest.raises(DataError, match="same columns"):
            e_distance(x_ng, wrong)
    with pytest.raises(DataError, match="NaN or infinity"):
        mmd(x_ng, np.full((5, 3), np.nan))


def test_scores_condition_by_condition(rng):
    true_cells = [rng.standard_normal((40, 3)), rng.standard_normal((30, 3)) + 2]
    predicted = [rng.standard_normal((40, 3)), rng.standard_normal((35, 3))]
    scores = distance_scores(true_cells, predicted, ["e_distance", "mmd"], seed=4)
    assert list(scores) == ["e_distance", "mmd"]
    assert scores["e_distance"][1] == e_distance(true_cells[1], predicted[1])
    assert scores["mmd"][1] == mmd(true_cells[1], predicted[1])
    assert all(value_c[0] < 0.1 * value_c[1] for value_c in scores.values())
    with pytest.raises(DataError, match="unknown distances"):
        distance_scores(true_cells, predicted, ["euclid"])
    with pytest.raises(DataError, match="expected predicted cells of 2 conditions, found 1"):
        distance_scores(true_cells, predicted[:1])


def test_every_listed_distance_can_be_asked_for(rng):
    pytest.importorskip("ot")
    cells = [rng.standard_normal((20, 2))]
    assert list(distance_scores(cells, cells, list(DISTANCES))) == list(DISTANCES)


# ---------------------------------------------------------------- cheats are exposed


@pytest.mark.parametrize(
    "cheat",
    [
        lambda x_ng: np.tile(x_ng.mean(0), (len(x_ng), 1)),
        lambda x_ng: np.expm1(x_ng),
        lambda x_ng: x_ng.mean(0) + 3 * (x_ng - x_ng.mean(0)),
    ],
    ids=["every cell is the mean", "counts instead of log", "three times the spread"],
)
@pytest.mark.parametrize("distance", [e_distance, mmd, sinkhorn_divergence])
def test_wrong_cells_are_far_from_the_truth(rng, cheat, distance):
    """Simulated cells of one condition; another draw of the same is near."""
    if distance is sinkhorn_divergence:
        pytest.importorskip("ot")
    cells_ng, again_ng = np.log1p(rng.poisson(3.0, (2, 200, 10)))
    near = abs(distance(cells_ng, again_ng))
    assert distance(cells_ng, cheat(again_ng)) > 2 * near


# ---------------------------------------------------------------- a real screen


@pytest.fixture(scope="module")
def papalexi():
    """Embedded subset of Papalexi et al. 2021: components of training cells, and cells of each condition."""
    screen = Screen(papalexi2021())
    split = random_cells(screen, seed=0)
    rows = np.random.default_rng(0).choice(split.train, 3000, replace=False)
    x_ng = log_cp10k(screen.x(rows), screen.library_n[rows])
    z_nd = PCA(20, random_state=0).fit_transform(x_ng)
    cells = {c: z_nd[screen.condition_n[rows] == i] for i, c in enumerate(screen.conditions)}
    return {name: z for name, z in cells.items() if len(z) >= 30}


def test_e_distance_ranks_papalexi2021_as_a_direct_computation_does(papalexi):
    control = papalexi["control"]
    names = [name for name in papalexi if name != "control"]
    assert len(names) > 10
    found, direct = [], []
    for name in names:
        x = papalexi[name]
        norm = np.linalg.norm
        across = np.mean([norm(a - control, axis=1).mean() for a in x])
        within = [sum(norm(a - z, axis=1).sum() for a in z) / (len(z) * (len(z) - 1)) for z in (x, control)]
        direct.append(2 * across - sum(within))
        found.append(e_distance(x, control))
    assert found == pytest.approx(direct, abs=1e-9)
    ranked = [names[i] for i in np.argsort(found)[::-1]]
    assert ranked == [names[i] for i in np.argsort(direct)[::-1]]
    # what Papalexi et al. report: the IFN-gamma pathway is what changes these cells most
    assert set(ranked[:4]) <= {"IFNGR1", "IFNGR2", "JAK2", "STAT1", "IRF1"}
