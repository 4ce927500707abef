"""fit: numbers that repeat, schedules, guards, engines."""

import math

import anndata as ad
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule, PyroParam

from pyro_causalcell.data import Screen, random_cells
from pyro_causalcell.errors import DataError, PairError, TrainingError
from pyro_causalcell.inference import Fit, fit, training

MODEL = "sparse-shift"
LOSSES = ["train_loss", "validation_loss"]


def _same(a: Fit, b: Fit) -> bool:
    left, right = a.pair.state_dict(), b.pair.state_dict()
    return all(torch.equal(left[kind][k], right[kind][k]) for kind in left for k in left[kind])


# ---------------------------------------------------------------- repeatability


def test_same_seed_same_numbers(tiny_screen, quick):
    first, again = (fit(MODEL, None, tiny_screen, seed=3, **quick) for _ in range(2))
    other = fit(MODEL, None, tiny_screen, seed=4, **quick)
    assert _same(first, again) and not _same(first, other)
    pd.testing.assert_frame_equal(first.history[LOSSES], again.history[LOSSES])
    assert np.array_equal(first.split.validation, again.split.validation)
    assert not np.array_equal(first.split.validation, other.split.validation)
    assert first.seed == 3 and first.settings["seed"] == 3


def test_draws_made_before_the_fit_do_not_matter(tiny_screen, quick):
    first = fit(MODEL, None, tiny_screen, **quick)
    torch.rand(100), np.random.rand(10)
    assert _same(first, fit(MODEL, None, tiny_screen, **quick))


def test_threads_and_denormals_are_given_back(tiny_screen, quick):
    before = torch.get_num_threads()
    fit(MODEL, None, tiny_screen, **quick | {"epochs": 1})
    assert torch.get_num_threads() == before
    assert torch.tensor(1e-40) + 0 != 0


def test_the_screen_is_not_changed(tiny_screen, quick):
    before = tiny_screen.adata.copy()
    fit(MODEL, None, tiny_screen, **quick)
    assert (before.X != tiny_screen.adata.X).nnz == 0
    pd.testing.assert_frame_equal(before.obs, tiny_screen.adata.obs)


# ---------------------------------------------------------------- history and loss


def test_history_has_every_term_and_they_add_up(tiny_screen, quick):
    f = fit(MODEL, None, tiny_screen, gates="posterior", **quick)
    terms = f.history.filter(like="term_")
    assert f.history.index.tolist() == [0, 1, 2] and f.history.index.name == "epoch"
    assert {"term_z", "term_x", "term_gate", "term_shift", "term_edge_rate"} <= set(terms)
    assert {"stage", "lr", "seconds", *LOSSES} <= set(f.history)
    np.testing.assert_allclose(-terms.sum(1), f.history["train_loss"], rtol=1e-6)
    assert np.isfinite(f.history[LOSSES].to_numpy()).all()
    assert not f.pair.model.training and not f.pair.guide.training


def test_loss_falls_and_is_in_nats_per_cell(tiny_screen, quick):
    f = fit(MODEL, None, tiny_screen, **quick | {"epochs": 25, "lr": 1e-2})
    assert f.history["train_loss"].iloc[-1] < f.history["train_loss"].iloc[0] - 2
    assert 20 < f.history["train_loss"].iloc[-1] < 200  # 20 genes of some nats each


def test_validation_uses_the_same_draws_every_epoch(tiny_screen, quick):
    """With a learning rate of zero nothing but draws could move the validation loss."""
    f = fit(MODEL, None, tiny_screen, norm="none", **quick | {"lr": 0.0})
    assert f.history["validation_loss"].nunique() == 1
    assert f.history["train_loss"].nunique() == 3


def test_validation_weights_global_terms_as_training_does(tiny_screen, quick):
    """The same cells on both sides, no noise to speak of: both losses agree."""
    split = random_cells(tiny_screen, validation=0.0)
    both = type(split)(**{**vars(split), "validation": split.train})
    f = fit(MODEL, None, tiny_screen, split=both, gates="open", norm="none", **quick | {"lr": 0.0})
    assert f.history["validation_loss"].iloc[0] == pytest.approx(f.history["train_loss"].mean(), rel=0.01)


def test_without_validation_cells_the_training_loss_decides(tiny_screen, quick):
    f = fit(MODEL, None, tiny_screen, split=random_cells(tiny_screen, validation=0.0), **quick)
    assert f.history["validation_loss"].isna().all() and len(f.history) == 3


# ---------------------------------------------------------------- schedules


def test_early_stopping_drops_the_rate_and_restores_the_best_weights(tiny_screen, quick, monkeypatch):
    """A validation loss that is best at the third epoch and never again."""
    losses = iter([5.0, 4.0, 1.0, *[3.0] * 50])
    states = []

    def scripted(self):
        states.append({k: v.clone() for k, v in self.pair.model.state_dict().items()})
        return next(losses)

    monkeypatch.setattr(training.Trainer, "validation_loss", scripted)
    f = fit(
        MODEL, None, tiny_screen, **quick | {"epochs": None, "max_epochs": 40, "patience": 2, "lr_drops": 2}
    )
    rates = f.history["lr"].to_numpy()
    assert len(rates) == 9  # best at 3, then patience of 2 for each rate
    assert (np.flatnonzero(np.diff(rates)) == [4, 6]).all() and (np.diff(rates) <= 0).all()
    best = states[2]
    assert all(torch.equal(best[k], v) for k, v in f.pair.model.state_dict().items())


def test_max_epochs_ends_training(tiny_screen, quick):
    f = fit(MODEL, None, tiny_screen, **quick | {"epochs": None, "max_epochs": 4, "patience": 100})
    assert len(f.history) == 4


def test_fixed_epochs_ignore_patience_and_drop_the_rate_near_the_end(tiny_screen, quick):
    f = fit(MODEL, None, tiny_screen, **quick | {"epochs": 10, "patience": 1, "lr_drops": 1})
    assert len(f.history) == 10
    assert f.history["lr"].iloc[-1] < f.history["lr"].iloc[0] == 5e-3
    assert f.history["lr"].is_monotonic_decreasing


def test_weights_multiply_terms(tiny_screen, quick):
    settings = quick | {"lr": 0.0, "epochs": 1}
    plain = fit(MODEL, None, tiny_screen, **settings)
    heavy = fit(MODEL, None, tiny_screen, weights={"z": 8.0}, **settings)
    assert heavy.history["term_z"][0] == pytest.approx(8 * plain.history["term_z"][0], rel=1e-5)
    assert heavy.history["term_x"][0] == pytest.approx(plain.history["term_x"][0], rel=1e-5)


def test_warmup_raises_the_weight_from_zero(tiny_screen, quick):
    settings = quick | {"lr": 0.0, "epochs": 4, "norm": "none"}
    plain = fit(MODEL, None, tiny_screen, **settings)
    warmed = fit(MODEL, None, tiny_screen, warmup={"z": 2}, **settings)
    share = (warmed.history["term_z"] / plain.history["term_z"]).tolist()
    assert 0.2 < share[0] < 0.4 and 0.65 < share[1] < 0.9  # six batches an epoch: means of 1/12 ... 12/12
    assert share[2:] == pytest.approx([1.0, 1.0], rel=1e-6)


def test_unfinished_warmup_still_returns_trained_weights(tiny_screen, quick):
    f = fit(MODEL, None, tiny_screen, warmup={"z": 50}, **quick)
    frozen = fit(MODEL, None, tiny_screen, **quick | {"lr": 0.0})
    assert not torch.equal(f.model.decoder.output.weight, frozen.model.decoder.output.weight)


def test_best_epoch_is_kept_with_fixed_epochs(tiny_screen, quick, monkeypatch):
    losses, states = iter([2.0, 1.0, 3.0]), []

    def scripted(self):
        states.append({k: v.clone() for k, v in self.pair.model.state_dict().items()})
        return next(losses)

    monkeypatch.setattr(training.Trainer, "validation_loss", scripted)
    f = fit(MODEL, None, tiny_screen, **quick)
    assert all(torch.equal(states[1][k], v) for k, v in f.model.state_dict().items())


def test_clip_bounds_the_step_s_gradient(tiny_screen, quick, monkeypatch):
    seen = []
    clip = torch.nn.utils.clip_grad_norm_

    def spy(parameters, max_norm, **kwargs):
        parameters = list(parameters)
        result = clip(parameters, max_norm, **kwargs)
        seen.append(math.sqrt(sum(float((p.grad**2).sum()) for p in parameters if p.grad is not None)))
        return result

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    fit(MODEL, None, tiny_screen, clip=0.5, **quick | {"epochs": 1})
    assert seen and max(seen) <= 0.5 + 1e-4
    n = len(seen)
    fit(MODEL, None, tiny_screen, clip=None, **quick | {"epochs": 1})
    assert len(seen) == n


# ---------------------------------------------------------------- guards


class Faulty(PyroModule):
    """A Poisson model whose term or gradient stops being finite at one step."""

    bad_step = 10**9
    kind = "value"

    def __init__(self, n_genes, n_targets, n_latents=2):
        super().__init__()
        self.needs, self.n_latents, self.step = {"counts"}, n_latents, 0
        self.decoder = torch.nn.Linear(n_latents, n_genes)

    def forward(self, batch):
        if self.training:
            self.step += 1
        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            z = pyro.sample("z", dist.Normal(batch.u_np.new_zeros(self.n_latents), 1.0).to_event(1))
            rate = self.decoder(z).exp()
            if self.step == self.bad_step + 1:  # check_pair took one step
                if self.kind == "value":
                    rate = rate * torch.nan
                else:  # a finite value with a gradient that is not
                    rate = rate + torch.sqrt((rate - rate).abs())
            return pyro.sample("x", dist.Poisson(rate, validate_args=False).to_event(1), obs=batch.x_ng)


class PlainGuide(PyroModule):
    def __init__(self, n_genes, n_latents=2):
        super().__init__()
        self.loc = torch.nn.Linear(n_genes, n_latents)

    def forward(self, batch):
        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            pyro.sample("z", dist.Normal(self.loc(batch.x_ng.log1p()), 0.5).to_event(1))


@pytest.fixture
def plain_quick(quick):
    return {k: v for k, v in quick.items() if k != "n_hidden"}


def test_nan_guard_names_site_epoch_and_batch(tiny_screen, plain_quick, monkeypatch, tmp_path):
    monkeypatch.setattr(Faulty, "bad_step", 9)  # 360 training cells in 6 batches: epoch 1, batch 2
    with pytest.raises(TrainingError, match=r"'x' is not finite at epoch 1, batch 2 .*last good checkpoint"):
        fit(Faulty, PlainGuide, tiny_screen, out=tmp_path / "run", **plain_quick)
    kept = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert kept["progress"]["epoch"] == 1
    assert all(bool(torch.isfinite(v).all()) for v in kept["pair"]["model"].values())


def test_nan_gradient_in_the_last_batch_spoils_no_checkpoint(tiny_screen, plain_quick, monkeypatch, tmp_path):
    monkeypatch.setattr(Faulty, "bad_step", 12)
    monkeypatch.setattr(Faulty, "kind", "gradient")
    with pytest.raises(TrainingError, match=r"decoder.weight' is not finite after epoch 1"):
        fit(Faulty, PlainGuide, tiny_screen, out=tmp_path / "run", **plain_quick)
    kept = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert all(bool(torch.isfinite(v).all()) for v in kept["pair"]["model"].values())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"device": "cuda:99"}, TrainingError, "cannot be used here"),
        ({"device": "abacus"}, TrainingError, "cannot be used here"),
        ({"warm_start": 3}, TrainingError, "more epochs than the warm start"),
        ({"gates": "open", "warm_start": 1}, PairError, "warm_start=0"),
        ({"n_programmes": 3}, PairError, "n_programmes"),
        ({"likelihood": "gaussian"}, DataError, "normalise"),
    ],
)
def test_what_cannot_be_fitted_is_said(tiny_screen, quick, settings, error, message):
    with pytest.raises(error, match=message):
        fit(MODEL, None, tiny_screen, **quick | settings)


def test_counts_are_asked_for(gaussian_screen, quick):
    with pytest.raises(DataError, match="(?i)gaussian"):
        fit(MODEL, None, gaussian_screen, **quick)


def test_settings_json_cannot_hold_are_refused_before_training(tiny_screen, plain_quick, tmp_path):
    class Table(Faulty):
        def __init__(self, n_genes, n_targets, table, n_latents=2):
            super().__init__(n_genes, n_targets, n_latents)

    with pytest.raises(PairError, match="setting 'table' is a ndarray.*instance"):
        fit(Table, PlainGuide, tiny_screen, table=np.ones(2), out=tmp_path / "run", **plain_quick)


# ---------------------------------------------------------------- engines


class Mixture(PyroModule):
    """Cells of two kinds: a latent that is summed out, or scored."""

    def __init__(self, n_genes, n_targets):
        super().__init__()
        self.needs, self.n_latents = {"counts"}, 1
        self.log_rate_2g = PyroParam(torch.randn(2, n_genes) * 0.1 + 1.5)

    def forward(self, batch):
        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            kind = pyro.sample("kind", dist.Categorical(torch.full((2,), 0.5)))
            rate = self.log_rate_2g.exp()[kind]
            return pyro.sample("x", dist.Poisson(rate).to_event(1), obs=batch.x_ng)


class KindGuide(PyroModule):
    enumerate: str | None = None

    def __init__(self, n_genes):
        super().__init__()
        self.logit = torch.nn.Linear(n_genes, 2)

    def forward(self, batch):
        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            kind = dist.Categorical(logits=self.logit(batch.x_ng.log1p()))
            pyro.sample("kind", kind, infer={"enumerate": self.enumerate} if self.enumerate else {})


class EnumeratedGuide(KindGuide):
    enumerate = "parallel"


@pytest.fixture
def bare(quick):
    return {k: v for k, v in quick.items() if k not in ("n_hidden", "n_latents")} | {"epochs": 15, "lr": 2e-2}


@pytest.mark.parametrize(
    ("guide", "engine"), [(KindGuide, "TraceGraph_ELBO"), (EnumeratedGuide, "TraceEnum_ELBO")]
)
def test_stock_pyro_takes_over_where_it_must(tiny_screen, bare, guide, engine, monkeypatch):
    engines = []
    needed = training._needed_elbo
    monkeypatch.setattr(training, "_needed_elbo", lambda *a: engines.append(needed(*a)) or engines[-1])
    f = fit(Mixture, guide, tiny_screen, **bare)
    assert type(engines[0]).__name__ == engine
    assert f.history["term_elbo"].iloc[-1] > f.history["term_elbo"].iloc[0] + 0.5


def test_the_default_engine_needs_no_stock_elbo(tiny_screen, quick, monkeypatch):
    monkeypatch.setattr(TraceMeanField_ELBO, "differentiable_loss", None)
    assert "term_z" in fit(MODEL, None, tiny_screen, **quick | {"epochs": 1}).history


def test_any_elbo_can_be_given(tiny_screen, quick):
    once = quick | {"epochs": 1, "lr": 0.0, "norm": "none", "gates": "open"}
    ours = fit(MODEL, None, tiny_screen, **once)
    stock = fit(MODEL, None, tiny_screen, elbo=TraceMeanField_ELBO(), **once)
    assert stock.history["train_loss"][0] == pytest.approx(ours.history["train_loss"][0], rel=1e-5)
    assert stock.training["elbo"] == "TraceMeanField_ELBO"
    enumerated = fit(MODEL, None, tiny_screen, elbo=TraceEnum_ELBO(max_plate_nesting=1), **once)
    assert enumerated.history["train_loss"][0] == pytest.approx(ours.history["train_loss"][0], rel=0.05)
    tighter = fit(MODEL, None, tiny_screen, elbo=RenyiELBO(alpha=0.0, num_particles=4), **once)
    assert tighter.history["train_loss"][0] < ours.history["train_loss"][0]


def test_weights_reach_a_stock_elbo(tiny_screen, quick):
    once = quick | {"epochs": 1, "lr": 0.0, "norm": "none", "gates": "open"}
    ours = fit(MODEL, None, tiny_screen, weights={"z": 5.0}, **once)
    stock = fit(MODEL, None, tiny_screen, weights={"z": 5.0}, elbo=TraceMeanField_ELBO(), **once)
    assert stock.history["train_loss"][0] == pytest.approx(ours.history["train_loss"][0], rel=1e-5)


# ---------------------------------------------------------------- data of other kinds


def test_gaussian_end_to_end(gaussian_screen, quick):
    f = fit(MODEL, None, gaussian_screen, likelihood="gaussian", **quick | {"epochs": 10})
    assert f.history["train_loss"].iloc[-1] < f.history["train_loss"].iloc[0]


def test_a_user_s_linear_gaussian_model_finds_its_likelihood(gaussian_screen, linear_gaussian, plain_quick):
    """Trained by fit, the ELBO closes in on the exact marginal likelihood of its own parameters."""
    settings = plain_quick | {"epochs": 150, "lr": 2e-2, "n_latents": 2, "lr_drops": 1, "batch_size": 120}
    f = fit(
        *linear_gaussian, gaussian_screen, split=random_cells(gaussian_screen, validation=0.0), **settings
    )
    from pyro_causalcell.data import Minibatches

    everything = next(iter(Minibatches(gaussian_screen, np.arange(120), 120, shuffle=False)))
    exact = float(f.model.exact_nll(everything).mean())
    assert exact - 0.15 < f.history["train_loss"].iloc[-20:].mean() < exact + 0.6


def test_counts_read_by_rows_give_the_same_fit(tiny_screen, quick):
    resident = fit(MODEL, None, tiny_screen, **quick)
    assert _same(resident, fit(MODEL, None, tiny_screen, memory_budget_gb=0.0, **quick))


def test_training_validation_and_the_turn_share_one_budget(tiny_screen, quick, monkeypatch):
    """Validation cells take what training cells leave; the pass that turns the axes keeps nothing."""
    made = []

    class Recorded(training.Minibatches):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            made.append(self)

    monkeypatch.setattr(training, "Minibatches", Recorded)
    split = random_cells(tiny_screen)
    budget = 2 * tiny_screen.n_genes * (len(split.train) + len(split.validation) - 1) / 2**30  # int16
    settings = quick | {"epochs": 2, "warm_start": 1}
    fit(MODEL, None, tiny_screen, gates="posterior", memory_budget_gb=budget, **settings)
    assert [cells.is_resident for cells in made] == [True, False, False]


def test_a_screen_without_controls_and_with_doses(tiny_adata, quick):
    perturbed = tiny_adata[tiny_adata.obs["target"] != "non-targeting"].copy()
    perturbed.obs["dose"] = 0.5
    screen = Screen(perturbed, control=None, dose="dose")
    f = fit(MODEL, None, screen, gates="posterior", **quick | {"warm_start": 1})
    assert np.isfinite(f.history["train_loss"]).all() and f.dims.n_batches == 0


# ---------------------------------------------------------------- recovery


def _easy_screen() -> tuple[Screen, np.ndarray]:
    """10 targets, 3 programmes, log-linear counts with plenty of signal."""
    rng = np.random.default_rng(0)
    graph_pk = np.zeros((10, 3))
    for p in range(9):  # the last one does nothing
        graph_pk[p, p % 3] = rng.choice([-1, 1]) * 3.0
    label_n = np.repeat([*[f"T{p}" for p in range(10)], "non-targeting"], [*[120] * 10, 300])
    u_np = np.vstack([np.repeat(np.eye(10), 120, 0), np.zeros((300, 10))])
    z_nk = u_np @ graph_pk + rng.normal(size=(1500, 3))
    x_ng = rng.poisson(np.exp(z_nk @ rng.normal(0, 0.35, (3, 40)) + rng.normal(2, 0.5, 40)))
    obs = pd.DataFrame({"target": label_n}, index=[f"cell{i}" for i in range(1500)])
    var = pd.DataFrame(index=[f"gene{i}" for i in range(40)])
    return Screen(ad.AnnData(x_ng.astype(np.float32), obs, var)), graph_pk != 0


def test_gates_of_an_easy_simulation_are_found():
    screen, true_pk = _easy_screen()
    f = fit(
        MODEL,
        None,
        screen,
        gates="posterior",
        n_latents=3,
        n_hidden=32,
        epochs=60,
        warm_start=30,
        batch_size=128,
        lr=5e-3,
        progress=False,
        device="cpu",
    )
    found_pk = (torch.sigmoid(f.guide.gate_logit) > 0.5).numpy()
    overlap_kk = true_pk.astype(int).T @ found_pk.astype(int)
    columns = overlap_kk.argmax(1)
    assert sorted(columns.tolist()) == [0, 1, 2]
    assert (found_pk[:, columns] == true_pk).mean() > 0.9
    assert not found_pk[9].any()


@pytest.mark.gpu
def test_fit_on_a_gpu(tiny_screen, quick, tmp_path):
    f = fit(
        MODEL,
        None,
        tiny_screen,
        out=tmp_path / "run",
        gates="posterior",
        **quick | {"device": "cuda", "warm_start": 1},
    )
    assert f.device.type == "cuda" and np.isfinite(f.history["train_loss"]).all()
    again = fit(
        MODEL,
        None,
        tiny_screen,
        out=tmp_path / "run",
        resume=True,
        gates="posterior",
        **quick | {"device": "cuda", "warm_start": 1},
    )
    assert again.device.type == "cuda"
    assert Fit.load(tmp_path / "run").device.type == "cpu"


# ---------------------------------------------------------------- several particles


def _training_only(settings: dict) -> dict:
    return {k: v for k, v in settings.items() if k not in ("n_latents", "n_hidden")}


def test_particles_are_checked(tiny_screen, quick):
    with pytest.raises(TrainingError, match="found 0"):
        fit(MODEL, None, tiny_screen, particles=0, **quick)
    with pytest.raises(TrainingError, match="set its own"):
        fit(MODEL, None, tiny_screen, particles=2, elbo=RenyiELBO(num_particles=2), **quick)
    with pytest.raises(TrainingError, match=r"'z'.*particles=1"):
        fit(MODEL, None, tiny_screen, particles=2, warmup={"z": 2}, **quick)


def test_refinement_follows_training_with_statistics_kept(tiny_screen, quick):
    settings = quick | {"epochs": 6, "warm_start": 2, "warmup": {"z": 3}}
    first = fit(MODEL, None, tiny_screen, **settings)
    refined = fit(MODEL, None, tiny_screen, refine=4, **settings)
    stages = refined.history["stage"]
    assert list(stages) == ["warm start"] * 2 + ["training"] * 4 + ["refinement"] * 4
    columns = ["train_loss", "validation_loss"]
    assert first.history[columns].equals(refined.history.loc[:5, columns])
    last = refined.history[stages == "refinement"]
    assert "term_cells" in last and last["term_cells"].notna().all()
    assert last["lr"].is_monotonic_decreasing
    assert last["lr"].iloc[0] == pytest.approx(training.REFINE_LR * first.training["lr"])
    assert last["validation_loss"].min() < first.history["validation_loss"].min()
    kept = [
        {k: v for k, v in f.pair.state_dict()["guide"].items() if "running" in k} for f in (first, refined)
    ]
    assert kept[0] and all(torch.equal(v, kept[1][k]) for k, v in kept[0].items())


def test_refinement_follows_early_stopping_and_can_be_asked_for_later(tiny_screen, quick, tmp_path):
    settings = quick | {"epochs": None, "max_epochs": 30, "patience": 1, "lr_drops": 0, "out": tmp_path}
    at_once = fit(MODEL, None, tiny_screen, refine=3, **settings | {"out": None})
    first = fit(MODEL, None, tiny_screen, **settings)
    assert first.finished and set(first.history["stage"]) == {"training"}
    later = fit(MODEL, None, tiny_screen, refine=3, resume=True, **settings)
    assert list(later.history["stage"].iloc[-3:]) == ["refinement"] * 3
    assert _same(at_once, later)
    again = fit(MODEL, None, tiny_screen, refine=3, resume=True, **settings)
    assert _same(again, later) and len(again.history) == len(later.history)


def test_refinement_is_refused_where_it_cannot_be(tiny_screen, quick, bare):
    with pytest.raises(TrainingError, match="found 1 and -1"):
        fit(MODEL, None, tiny_screen, refine=-1, **quick)
    with pytest.raises(TrainingError, match=r"'z'.*refine=0"):
        fit(MODEL, None, tiny_screen, refine=2, weights={"z": 2.0}, **quick)
    with pytest.raises(TrainingError, match="TraceGraph_ELBO.*refine=0"):
        fit(Mixture, KindGuide, tiny_screen, refine=2, **bare)


class GenesInAPlate(PyroModule):
    """Normalised values with a plate where an event dimension would do."""

    def __init__(self, n_genes: int):
        super().__init__()
        self.needs, self.n_genes = {"normalised"}, n_genes

    def forward(self, batch):
        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            z_nk = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.plate("genes", self.n_genes, dim=-2):
                pyro.sample("x", dist.Normal(z_nk.sum(-1), 1.0), obs=batch.x_ng.T)


def test_particles_need_the_cells_plate_alone(gaussian_screen, linear_gaussian, quick):
    settings = _training_only(quick)
    guide = linear_gaussian[1]
    fit(GenesInAPlate, guide, gaussian_screen, **settings)
    with pytest.raises(TrainingError, match=r"\['x'\].*to_event"):
        fit(GenesInAPlate, guide, gaussian_screen, particles=5, **settings)


# ---------------------------------------------------------------- training further


def test_a_fit_can_be_trained_further(tiny_screen, quick, tmp_path):
    first = fit(MODEL, None, tiny_screen, **quick | {"epochs": 15})
    before = {k: v.clone() for k, v in first.model.state_dict().items()}
    again = fit(first, None, tiny_screen, particles=4, out=tmp_path / "run", **_training_only(quick))
    assert "term_cells" in again.history and "term_z" not in again.history
    assert again.history["validation_loss"].min() < first.history["validation_loss"].min()
    assert np.array_equal(again.split.train, first.split.train)
    assert all(torch.equal(before[k], v) for k, v in first.model.state_dict().items())
    kept = {k: v for k, v in again.model.state_dict().items() if "running" in k}
    assert kept and all(torch.equal(before[k], v) for k, v in kept.items())
    assert _same(again, Fit.load(tmp_path / "run"))  # it knows where its classes are


def test_training_further_needs_the_same_screen(tiny_screen, tiny_adata, quick):
    first = fit(MODEL, None, tiny_screen, **quick)
    further = _training_only(quick)
    with pytest.raises(PairError, match="leave out.*n_latents"):
        fit(first, None, tiny_screen, n_latents=4, **further)
    with pytest.raises(PairError, match="genes differ.*from_spec"):
        fit(first, None, Screen(tiny_adata[:, :-1].copy()), **further)
    with pytest.raises(PairError, match="pass split="):
        fit(first, None, Screen(tiny_adata[:350].copy(), batch="batch"), **further)


# ---------------------------------------------------------------- settings of one of the two


def test_settings_of_the_model_or_the_guide_alone(tiny_screen, quick):
    f = fit(MODEL, None, tiny_screen, n_layers=1, **{"model.n_layers": 3}, **quick | {"epochs": 1})
    assert (
        f.settings["model"]["settings"]["n_layers"] == 3 and f.settings["guide"]["settings"]["n_layers"] == 1
    )
    for name in ("model.n_layer", "guide.likelihod", "modell.n_layers", "model.n_genes"):
        with pytest.raises(PairError, match=f"has a setting '{name}'"):
            fit(MODEL, None, tiny_screen, **{name: 3}, **quick)
