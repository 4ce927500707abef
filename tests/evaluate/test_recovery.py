import numpy as np
import pytest
from sklearn.datasets import make_spd_matrix

from pyro_causalcell.errors import DataError
from pyro_causalcell.evaluate.recovery import matching, recovery, reliability, top_two_graph


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def z(rng):
    return rng.standard_normal((400, 4))


PERMUTED = [2, 0, 3, 1]
SIGNS = np.array([1, -1, -1, 1])


def test_perfect_recovery_is_one(z, rng):
    graph = rng.random((12, 4)) < 0.4
    scores = recovery(z, z, graph_true_pk=graph, graph_est_pk=graph)
    for name, value in scores.items():
        assert value == pytest.approx(1, abs=0.02 if name == "r2_kernel" else 1e-9), name


def test_order_sign_and_scale_of_latents_do_not_matter(z, rng):
    noisy = z + 0.5 * rng.standard_normal(z.shape)
    graph = rng.random((12, 4)) < 0.4
    found = graph ^ (rng.random((12, 4)) < 0.1)
    plain = recovery(z, noisy, graph_true_pk=graph, graph_est_pk=found)
    moved = recovery(
        z, 3 * (SIGNS * noisy)[:, PERMUTED] + 1, graph_true_pk=graph, graph_est_pk=found[:, PERMUTED]
    )
    for name, value in plain.items():
        if "signed" not in name:
            assert moved[name] == pytest.approx(value, abs=1e-8), name
    assert 0.8 < plain["pearson_mcc"] < 0.95


def test_regressions_can_be_fitted_on_other_cells(z, rng):
    learned = rng.standard_normal((600, 4))
    bent = [np.arctan(1.5 * cells) for cells in (learned, z)]
    scores = recovery(z, bent[1], fitted_on=(learned, bent[0]))
    assert scores["r2_linear_held_out"] < 0.95 < 0.97 < scores["r2_kernel_held_out"]
    other = recovery(z, bent[1], fitted_on=(learned, bent[0] @ np.diag([1, 1, 1, -1])))
    assert other["r2_kernel_held_out"] < 0.8  # what was learned there does not hold here
    assert other["r2_kernel"] == scores["r2_kernel"] and not any(
        "held_out" in n for n in recovery(z, bent[1])
    )
    with pytest.raises(DataError, match="the same rows of both"):
        recovery(z, z, fitted_on=(learned, z))
    with pytest.raises(DataError, match=r"expected 4 true and 4 estimated latents.*found 4 and 3"):
        recovery(z, z, fitted_on=(learned, learned[:, :3]))


def test_signed_matching_loses_edges_of_flipped_latents(z, rng):
    graph = rng.random((20, 4)) < 0.4
    flipped = recovery(z, -z, graph_true_pk=graph, graph_est_pk=graph)
    assert flipped["graph_f1"] == 1
    assert flipped["graph_f1_signed_all"] < 0.8


def test_hand_worked_graph(z):
    truth = np.array([[1, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]])
    found = np.array([[0.9, 0.6, 0.1, 0.0], [0.0, 0.7, 0.4, 0.0], [0.0, 0.0, 0.0, 0.0]])
    scores = recovery(z, z, graph_true_pk=truth, graph_est_pk=found, trained_p=np.array([True, True, False]))
    assert scores["graph_precision"] == pytest.approx(2 / 3)
    assert scores["graph_recall"] == pytest.approx(2 / 3)
    assert scores["graph_f1"] == pytest.approx(2 / 3)
    assert scores["graph_precision_signed_all"] == pytest.approx(2 / 3)
    assert scores["graph_recall_signed_all"] == pytest.approx(2 / 7)
    by_number = recovery(z, z, graph_true_pk=truth, graph_est_pk=found, trained_p=np.array([0, 1]))
    assert by_number == scores
    strict = recovery(
        z, z, graph_true_pk=truth, graph_est_pk=found, trained_p=np.array([0, 1]), threshold=0.8
    )
    assert strict["graph_precision"] == 1 and strict["graph_recall"] == pytest.approx(1 / 3)


def test_no_edge_found_scores_zero_without_a_warning(z):
    scores = recovery(z, z, graph_true_pk=np.eye(4), graph_est_pk=np.zeros((4, 4)))
    assert scores["graph_precision"] == scores["graph_recall"] == scores["graph_f1"] == 0


def test_constant_latents_count_as_zero(z):
    dead = z.copy()
    dead[:, 1] = 0.1
    scores = recovery(z, dead)
    assert scores["pearson_mcc"] == pytest.approx(0.75)
    assert scores["spearman_mcc"] == pytest.approx(0.75)
    assert scores["r2_linear"] == pytest.approx(0.75, abs=0.02)
    swapped = recovery(dead, z)
    assert swapped["pearson_mcc"] == pytest.approx(0.75)
    assert swapped["r2_linear"] == swapped["r2_linear_insample"] == pytest.approx(0.75)
    assert recovery(z, np.zeros((400, 4)))["pearson_mcc"] == 0


def test_more_or_fewer_estimated_latents(z, rng):
    graph = np.eye(4)
    extra = np.column_stack([rng.standard_normal((400, 2)), z])
    found = np.column_stack([np.array([[1, 0, 0, 0], [0, 0, 0, 0]]).T, graph])
    more = recovery(z, extra, graph_true_pk=graph, graph_est_pk=found)
    assert more["pearson_mcc"] == pytest.approx(1)
    assert more["graph_recall"] == 1 and more["graph_precision"] == pytest.approx(4 / 5)
    fewer = recovery(z, z[:, [3]], graph_true_pk=graph, graph_est_pk=graph[:, [3]])
    assert fewer["pearson_mcc"] == pytest.approx(0.25)
    assert fewer["graph_recall"] == pytest.approx(1 / 4) and fewer["graph_precision"] == 1


def test_linear_and_kernel_r2_see_what_mcc_does_not(z, rng):
    mixed = z @ make_spd_matrix(4, random_state=0)
    assert recovery(z, mixed)["r2_linear"] == pytest.approx(1)
    bent = np.column_stack([np.sinh(1.5 * z[:, 0]), z[:, 1] + z[:, 0] ** 2])
    scores = recovery(z[:, :2], bent)
    assert scores["r2_kernel"] > scores["r2_linear"] + 0.1


def test_cross_validated_r2_does_not_reward_noise(rng):
    z, noise = rng.standard_normal((60, 2)), rng.standard_normal((60, 20))
    scores = recovery(z, noise)
    assert scores["r2_linear"] < 0 < scores["r2_linear_insample"]


def test_matching_by_hand(z):
    pairs = matching(z, (SIGNS * z)[:, PERMUTED])
    assert pairs.true_m.tolist() == [0, 1, 2, 3]
    assert pairs.estimated_m.tolist() == [1, 3, 0, 2]
    np.testing.assert_allclose(pairs.correlation_m, SIGNS)
    bent = matching(z, np.exp(3 * z), method="spearman")
    np.testing.assert_allclose(bent.correlation_m, 1)
    assert matching(z, np.exp(3 * z)).correlation_m.max() < 0.9


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"z_est_nk": np.zeros((3, 4))}, r"\(3, 4\)"),
        ({"z_est_nk": np.full((400, 4), np.nan)}, "finite"),
        ({"graph_true_pk": np.eye(4)}, "both graphs"),
        ({"graph_true_pk": np.eye(4), "graph_est_pk": np.eye(5)}, "columns"),
        ({"n_kernel_cells": 3}, "30 cells"),
    ],
)
def test_bad_input(z, change, words):
    with pytest.raises(DataError, match=words):
        recovery(**{"z_true_nk": z, "z_est_nk": z} | change)


def test_top_two_graph():
    shift = np.array([[0.1, -3.0, 2.0], [1.0, 0.0, -0.5]])
    assert top_two_graph(shift).tolist() == [[False, True, True], [True, False, True]]
    assert top_two_graph(shift[:, :1]).tolist() == [[True], [True]]


def test_reliability_by_hand():
    table = reliability(
        np.array([0.0, 0.1, 0.5, 0.9, 1.0, 0.95]), np.array([0, 0, 1, 1, 1, 0]), bins=[0, 0.5, 0.9, 1]
    )
    assert table["n"].tolist() == [3, 1, 2]
    np.testing.assert_allclose(table["mean_probability"], [0.2, 0.9, 0.975])
    np.testing.assert_allclose(table["fraction_true"], [1 / 3, 1, 0.5])
    assert (table["fraction_low"] < table["fraction_true"]).all()


def test_reliability_of_honest_probabilities_covers_the_diagonal(rng):
    p = rng.random(20000)
    table = reliability(p, rng.random(20000) < p, bins=10, interval=0.999)
    assert table["n"].sum() == 20000
    inside = (table["fraction_low"] < table["mean_probability"]) & (
        table["mean_probability"] < table["fraction_high"]
    )
    assert inside.all()


def test_reliability_keeps_empty_bins_and_refuses_non_probabilities():
    table = reliability(np.array([0.95]), np.array([True]), bins=2)
    assert table["n"].tolist() == [0, 1] and np.isnan(table["fraction_true"][0])
    with pytest.raises(DataError, match="probabilities"):
        reliability(np.array([1.5]), np.array([True]))
    with pytest.raises(DataError, match="equal shapes"):
        reliability(np.array([0.5]), np.array([True, False]))
