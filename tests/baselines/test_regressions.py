import anndata as ad
import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import Ridge

from pyro_causalcell.baselines import (
    ElasticNetOnTargets,
    RidgeOnEmbeddings,
    condition_means,
    pca_embedding,
    random_embedding,
    training_means,
)
from pyro_causalcell.data import Screen
from pyro_causalcell.errors import DataError


@pytest.fixture
def means(tiny_screen):
    return training_means(tiny_screen, np.arange(tiny_screen.n_cells))


def _without(screen, *names):
    index = [screen.conditions.index(name) for name in names]
    return training_means(screen, np.flatnonzero(~np.isin(screen.condition_n, index)))


def test_an_embedding_that_knows_predicts_what_was_never_seen(tiny_screen):
    # A and C do the same, and the table says so; D does nothing.
    table = pd.DataFrame({"up": [1.0, 0, 1, 0], "down": [0.0, 1, 0, 0]}, index=list("ABCD"))
    trained = _without(tiny_screen, "C")
    truth = condition_means(tiny_screen, np.arange(tiny_screen.n_cells), ["C"])
    error = np.abs(RidgeOnEmbeddings(trained, table).predict(["C"]) - truth).mean()
    assert error < 0.5 * np.abs(trained.perturbed_g - truth).mean()


def test_ridge_is_that_of_scikit_learn(tiny_screen, means):
    table = random_embedding(tiny_screen.targets, seed=1, n_dimensions=2)
    fitted = RidgeOnEmbeddings(means, table)
    alpha = fitted.regression[-1].alpha_
    scale = fitted.regression[0]
    x = scale.transform(tiny_screen.design(list(means.seen)) @ table.to_numpy())
    weight = np.array(list(means.cells.values()))
    direct = Ridge(alpha).fit(x, np.stack(list(means.seen.values())), sample_weight=weight)
    asked = scale.transform(tiny_screen.design(["A+C"]) @ table.to_numpy())
    np.testing.assert_allclose(fitted.predict(["C+A"]), direct.predict(asked), rtol=1e-6)


def test_an_embedding_without_information_leaves_the_shared_response(means):
    nothing = pd.DataFrame(np.zeros((4, 2)), index=list("ABCD"))
    found = RidgeOnEmbeddings(means, nothing).predict(["A", "B+D"])
    np.testing.assert_allclose(found, np.tile(means.perturbed_g, (2, 1)))


def test_pca_embedding_is_how_the_targets_own_gene_moves(tiny_adata):
    tiny_adata.var_names = ["A", *tiny_adata.var_names[1:]]
    screen = Screen(tiny_adata)
    means = training_means(screen, np.arange(screen.n_cells))
    table = pca_embedding(means)
    centred_cg = np.stack(list(means.seen.values()))
    centred_cg = centred_cg - centred_cg.mean(0)
    # All components kept: the length of a gene's embedding is that of its column of means.
    assert np.linalg.norm(table.loc["A"]) == pytest.approx(np.linalg.norm(centred_cg[:, 0]))
    assert (table.loc[["B", "C", "D"]] == 0).all(axis=None)  # no genes of the screen


def test_random_embedding_depends_on_the_seed_alone():
    first, again, other = (random_embedding(["A", "B"], seed) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(first, again)
    assert not np.allclose(first, other)


def _sparse_screen():
    """Normalised values around 3: target t raises gene t alone, by 2; A+B raises both."""
    rng = np.random.default_rng(0)
    label_n = np.repeat(["ctrl", "A", "B", "C", "D", "A+B"], 40)
    x_ng = rng.normal(3, 0.3, (len(label_n), 10))
    for g, target in enumerate("ABCD"):
        x_ng[[target in label.split("+") for label in label_n], g] += 2
    obs = pd.DataFrame({"target": label_n}, index=[f"c{n}" for n in range(len(label_n))])
    return Screen(ad.AnnData(x_ng, obs, pd.DataFrame(index=[f"g{g}" for g in range(10)])), control="ctrl")


def test_elastic_net_finds_sparse_effects_and_adds_them_up():
    screen = _sparse_screen()
    net = ElasticNetOnTargets(_without(screen, "A+B"))
    coefficient_gp = net.regression.coef_
    assert (np.abs(coefficient_gp[4:]) < 0.1).all()
    assert (np.diag(coefficient_gp[:4]) > 1).all()
    a, b, both = net.predict(["A", "B", "B+A"])
    np.testing.assert_allclose(both, a + b - net.regression.intercept_, atol=1e-6)
    truth = condition_means(screen, np.arange(screen.n_cells), ["A+B"])[0]
    assert np.abs(both - truth).mean() < 0.3 * np.abs(net.means.perturbed_g - truth).mean()


def test_elastic_net_gives_an_unseen_target_what_is_shared(tiny_screen):
    net = ElasticNetOnTargets(_without(tiny_screen, "D"))
    np.testing.assert_allclose(net.predict(["D"])[0], net.regression.intercept_)


def test_control_is_predicted_by_control(means):
    for fitted in (ElasticNetOnTargets(means), RidgeOnEmbeddings(means, pca_embedding(means))):
        np.testing.assert_array_equal(fitted.predict(["non-targeting"])[0], means.control_g)


def test_errors_name_targets_and_numbers(tiny_screen, means):
    with pytest.raises(DataError, match="none for 2: C, D"):
        RidgeOnEmbeddings(means, pd.DataFrame(np.ones((2, 1)), index=["A", "B"]))
    with pytest.raises(DataError, match="finite embeddings"):
        RidgeOnEmbeddings(means, pd.DataFrame(np.full((4, 1), np.nan), index=list("ABCD")))
    few = _without(tiny_screen, "A", "B", "A+B")
    with pytest.raises(DataError, match="needs 3 perturbed training conditions, found 2"):
        ElasticNetOnTargets(few)
