"""What every latent model of the package must do, whatever its formulas say."""

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger

from pyro_causalcell.batch import Batch
from pyro_causalcell.data import Minibatches, Screen
from pyro_causalcell.errors import PairError
from pyro_causalcell.evaluate import iw_nll, to_inference_data
from pyro_causalcell.inference import Fit, Pair, build_pair, check_pair, elbo_terms, fit
from pyro_causalcell.models import discrepancy_vae, sams_vae, weight_variant_scm
from pyro_causalcell.predict import effects, predict

ONE = {"n_latents": 3}
TWO = {"n_invariant": 1, "n_responsive": 2}
PAIRS = {
    "sams-vae": ("sams-vae", ONE),
    "sams-vae, mean-field": ("sams-vae", ONE | {"mask": "bernoulli", "correlated": False}),
    "cpa-vae": ("sams-vae", ONE | sams_vae.PRESETS["cpa-vae"]),
    "conditional-vae": ("conditional-vae", ONE),
    "discrepancy-vae": ("discrepancy-vae", ONE),
    "sena": ("discrepancy-vae", ONE | {"gene_sets": [[0, 1, 2], [2, 3, 4, 5]]}),
    "weight-variant-scm": ("weight-variant-scm", TWO),
    "weight-variant-scm, paired": ("weight-variant-scm", TWO | {"alignment": "pairs"}),
    "weight-variant-scm, no anchors": ("weight-variant-scm", TWO | weight_variant_scm.PRESETS["dag-vae"]),
    "weight-variant-scm, dense": ("weight-variant-scm", TWO | weight_variant_scm.PRESETS["dense"]),
}
SIZES = {"n_hidden": 8}
LATENTS = {"z": slice(3), "z_invariant": slice(1), "z_responsive": slice(1, 3)}
ACROSS = {"mmd", "align"}
"""Terms that compare cells of a minibatch with each other."""


@pytest.fixture(params=PAIRS)
def named(request) -> tuple[str, dict]:
    return PAIRS[request.param]


def _pair(screen: Screen, named: tuple[str, dict], **settings) -> tuple[Pair, Batch]:
    """A pair, and 32 cells with anchors if it asks for them."""
    torch.manual_seed(1)
    name, own = named
    pair = build_pair(name, None, screen.dims(), SIZES | own | settings)
    needs = pair.model.needs | getattr(pair.guide, "needs", set())
    anchors = "random" if "control" in needs else None
    batch = next(iter(Minibatches(screen, np.arange(0, 384, 12), 32, anchors=anchors)))
    return pair, batch


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "poisson", "gaussian"])
def test_pairs_fit_together_and_equal_stock_pyro(tiny_screen, named, likelihood):
    pair, batch = _pair(tiny_screen, named, likelihood=likelihood)
    check_pair(pair.model, pair.guide, batch)
    torch.manual_seed(0)
    ours = sum(elbo_terms(pair.model, pair.guide, batch).values()).detach()
    torch.manual_seed(0)
    with pyro.validation_enabled(False):
        stock = -TraceMeanField_ELBO().loss(pair.model, pair.guide, batch)
    torch.testing.assert_close(float(ours), stock, rtol=1e-5, atol=1e-2)


class _OwnNoise(Messenger):
    """Each cell keeps its own noise, whatever the minibatch."""

    def __init__(self, noise_nk):
        super().__init__()
        self.noise_nk = noise_nk

    def _pyro_sample(self, msg):
        if msg["name"] in LATENTS and not msg["done"]:
            fn = msg["fn"].base_dist
            msg["value"], msg["done"] = fn.loc + fn.scale * self.noise_nk[:, LATENTS[msg["name"]]], True


def _rows(batch: Batch, rows: torch.Tensor) -> Batch:
    return Batch(*(_rows(f, rows) if isinstance(f, Batch) else _row(f, rows) for f in batch))


def _row(field, rows):
    return field[rows] if torch.is_tensor(field) else field


def test_full_batch_is_the_mean_over_minibatches(tiny_screen, named):
    """Catches plate scaling. Discrepancies, averages over pairs of cells, have tests of their own."""
    pair, batch = _pair(tiny_screen, named, norm="none")
    noise_nk = torch.randn(32, 3)

    def value(rows):
        torch.manual_seed(0)  # for the draws of all cells, which come first
        with _OwnNoise(noise_nk[rows]):
            terms = elbo_terms(pair.model, pair.guide, _rows(batch, rows))
        return torch.stack([term for name, term in terms.items() if name not in ACROSS]).sum().detach()

    parts = torch.stack([value(rows) for rows in torch.arange(32).reshape(4, 8)])
    torch.testing.assert_close(parts.mean(), value(torch.arange(32)), rtol=1e-5, atol=1e-2)


def test_several_particles_give_a_tighter_bound(tiny_screen, named):
    pair, batch = _pair(tiny_screen, named, norm="none")
    bounds = []
    for n_particles in (1, 64):
        torch.manual_seed(0)
        terms = elbo_terms(pair.model, pair.guide, batch, n_particles=n_particles)
        bounds.append(sum(terms[name] for name in ("cells", "x", *LATENTS) if name in terms))
    assert bounds[1] > bounds[0]


@pytest.fixture(params=PAIRS)
def trained(request, tiny_screen, tmp_path) -> Fit:
    name, own = PAIRS[request.param]
    training = {"epochs": 2, "batch_size": 64, "progress": False, "device": "cpu", "out": tmp_path / "run"}
    return fit(name, None, tiny_screen, **SIZES, **own, **training)


def test_a_fit_is_used_like_any_other(trained, tiny_screen):
    """Prediction, effects, likelihood, ArviZ, and the same numbers from disk; no anchors are at hand."""
    controls = Screen.from_spec(
        trained.screen, tiny_screen.adata[tiny_screen.condition_n == 0].copy(), unknown="error"
    )
    read = Fit.load(trained.path)
    for basal in (None, controls):
        cells, again = (predict(f, ["A+B", "C+D"], 6, basal=basal) for f in (trained, read))
        assert cells.shape == (12, 20) and np.isfinite(cells.X).all()
        np.testing.assert_array_equal(cells.X, again.X)
        np.testing.assert_array_equal(cells.obsm["X_causalcell"], again.obsm["X_causalcell"])
    found = effects(trained, ["A", "A+B"], n_samples=3, n_cells=8)
    assert np.isfinite(found["gene_effect"]).all() and found.sizes["programme"] == 3
    rows = np.arange(12)
    scores = iw_nll(trained, tiny_screen, rows, n_particles=50)
    assert np.isfinite(scores["nll"]).all()
    groups = to_inference_data(trained, tiny_screen, rows, n_samples=2)
    assert groups.posterior_predictive["x"].shape == (1, 2, 12, 20)


def test_unknown_likelihoods_are_refused(tiny_screen, named):
    with pytest.raises(PairError, match="takes likelihood= one of"):
        build_pair(named[0], None, tiny_screen.dims(), {"likelihood": "zip", **named[1]})


@pytest.mark.parametrize("module", [sams_vae, discrepancy_vae])
def test_presets_are_arguments_of_fit(tiny_adata, module):
    tiny_adata.layers["log"] = np.log1p(tiny_adata.X.toarray())
    screens = {"nb": Screen(tiny_adata), "gaussian": Screen(tiny_adata, layer="log")}
    name = module.__name__.rpartition(".")[2].replace("_", "-")
    for preset in module.PRESETS.values():
        screen = screens[preset.get("likelihood", "nb")]
        small = {"epochs": 1, "n_latents": 3, "n_hidden": 8, "progress": False, "device": "cpu"}
        trained = fit(name, None, screen, **(preset | small))
        assert np.isfinite(trained.history["train_loss"]).all()
