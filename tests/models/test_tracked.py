"""The temporal SCM where the past of a cell is known, and on images."""

import math

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from pyro import poutine
from torch.distributions import Normal

from pyro_causalcell.batch import Batch
from pyro_causalcell.data import Screen, Split
from pyro_causalcell.errors import CheckpointError
from pyro_causalcell.guides.temporal_scm import TemporalSCMGuide
from pyro_causalcell.inference import elbo_terms, fit
from pyro_causalcell.models.temporal_scm import Law, TemporalSCM
from pyro_causalcell.predict import latents, predict

SIZES = {"n_invariant": 1, "n_responsive": 2, "likelihood": "gaussian", "norm": "none", "n_hidden": 4}


def _batch(times: list[float], seed: int) -> Batch:
    torch.manual_seed(seed)
    n = len(times)
    return Batch(
        x_ng=torch.randn(n, 4),
        u_np=torch.tensor([[0.0], [1.0]]).repeat(n // 2, 1),
        library_n1=torch.ones(n, 1),
        batch_nb=torch.zeros(n, 0),
        condition_n=torch.tensor([0, 1] * (n // 2)),
        index_n=torch.arange(n),
        n_total=n,
        time_n=torch.tensor(times),
    )


@pytest.fixture
def batch() -> Batch:
    """Two cells at three times, and where they come from."""
    cells = _batch([0.0, 0.0, 1.0, 1.0, 2.0, 2.0], 0)
    return cells._replace(previous=_batch([0.0, 0.0, 0.0, 0.0, 1.0, 1.0], 1))


@pytest.fixture
def pair() -> tuple[TemporalSCM, TemporalSCMGuide]:
    torch.manual_seed(2)
    sizes = {"n_genes": 4, "n_targets": 1, "times": (0.0, 1.0, 2.0)}
    settings = SIZES | {"gates": "open", "edges": "open"}
    model = TemporalSCM(**sizes, **settings, n_conditions=2, n_cells=6, transition="linear")
    return model, TemporalSCMGuide(**sizes, **settings, alignment="none")


def test_tracks_have_no_onset(batch):
    model = TemporalSCM(n_genes=4, n_targets=1, times=(0.0, 1.0, 2.0), onset=0.0, n_conditions=2, **SIZES)
    with pytest.raises(ValueError, match="leave out onset= or track="):
        poutine.trace(model).get_trace(batch)


def test_contrast_needs_tracks_and_a_weight(batch):
    settings = SIZES | {"n_genes": 4, "n_targets": 1, "times": (0.0, 1.0, 2.0), "n_conditions": 6}
    with pytest.raises(ValueError, match="contrast as a number from 0 on, found 'much'"):
        TemporalSCM(**settings, contrast="much")
    model = TemporalSCM(**settings, contrast=1.0)
    with pytest.raises(ValueError, match="track="):
        poutine.trace(model).get_trace(batch._replace(previous=None))
    charged_n = poutine.trace(model).get_trace(batch).nodes["contrast"]["fn"].log_factor
    assert bool((charged_n[:2] == 0).all()) and bool((charged_n[2:] < 0).all())  # the first have no past
    alone = batch._replace(condition_n=torch.arange(6))
    charged_n = poutine.trace(model).get_trace(alone).nodes["contrast"]["fn"].log_factor
    assert bool((charged_n == 0).all())  # nobody of their condition to be confused with
    model.axes_sought = True
    assert "contrast" not in poutine.trace(model).get_trace(batch)  # nothing has a past then
    model.axes_sought = False
    model.eval()
    assert "contrast" not in poutine.trace(model).get_trace(batch)  # the bound is scored without it


def test_a_law_tells_how_likely_each_cell_is(batch):
    law = Law(torch.randn(3, 1, 2), torch.randn(3, 2), torch.ones(3, 2), torch.zeros(3, 1, 2))
    z_nk = torch.randn(5, 2)
    expected_nr = Normal(law.loc_rmk.squeeze(1), law.log_scale_rk.exp()).log_prob(z_nk.unsqueeze(1)).sum(-1)
    torch.testing.assert_close(law.likely(z_nk), expected_nr + math.log(2 * math.pi))


@pytest.mark.parametrize("join", ["moments", "mixture"])
def test_programmes_follow_from_their_own_past(pair, batch, join):
    model, guide = pair
    model.join = join
    torch.manual_seed(0)
    drawn = poutine.trace(guide).get_trace(batch)
    trace = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(batch)
    value = {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "sample"}
    z_nl, z_nv, past_nk = value["z_invariant"], value["z_responsive"], value["z_past"]
    is_start_n1 = (batch.time_n == 0).unsqueeze(-1)
    expected_nl = model.invariant_offset_l + past_nk[:, :1] @ model.invariant_weight_ll.T
    shift_nv = batch.u_np @ value["shift"]
    expected_nv = model.responsive_offset_v + past_nk @ value["weight"].T + shift_nv
    expected_nl = torch.where(is_start_n1, 0.0, expected_nl)
    expected_nv = torch.where(is_start_n1, batch.u_np @ value["start"], expected_nv)
    scale_l, scale_v = (
        model.bounded(part).exp() for part in (model.invariant_log_scale_l, model.responsive_log_scale_v)
    )
    scale_nv = scale_v * torch.exp(batch.u_np @ value["log_scale"])
    scale_nl, scale_nv = (
        torch.where(is_start_n1, 1.0, s) for s in (scale_l.expand_as(expected_nl), scale_nv)
    )
    for name, z, loc, scale in (
        ("z_invariant", z_nl, expected_nl, scale_nl),
        ("z_responsive", z_nv, expected_nv, scale_nv),
    ):
        wanted_n = torch.distributions.Normal(loc, scale).log_prob(z).sum(-1)
        site = trace.nodes[name]
        torch.testing.assert_close(site["fn"].log_prob(z), wanted_n, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_particles", [1, 3])
def test_the_draw_of_the_past_costs_nothing(pair, batch, n_particles):
    terms = elbo_terms(*pair, batch, n_particles=n_particles)
    assert all(torch.isfinite(term) for term in terms.values())
    assert float(terms.get("z_past", 0.0)) == 0.0


def test_gradients_reach_the_encoder_through_the_past(pair, batch):
    """Only cells at the start are encoded as cells here, and their own term is cut off."""
    model, guide = pair
    seen = []
    guide.encoder.register_forward_hook(lambda _, inputs, outputs: seen.append((inputs[0], outputs[0])))
    terms = elbo_terms(model, guide, batch)
    loc_nk = next(loc for x, loc in seen if x is batch.previous.x_ng)
    (gradient_nk,) = torch.autograd.grad(terms["z_invariant"], loc_nk)
    assert (gradient_nk[2:, 0] != 0).all()
    assert (gradient_nk[:2] == 0).all()  # nothing was before the first


def _walks(n_tracks: int = 250, n_times: int = 4, seed: int = 0) -> ad.AnnData:
    """Simulated: two independent programmes, .9 and -.5 of what they were, one of them set off by A."""
    rng = np.random.default_rng(seed)
    own_k, is_a = np.array([0.9, -0.5]), np.arange(n_tracks) % 2
    z_tnk = [rng.standard_normal((n_tracks, 2))]
    for _ in range(n_times - 1):
        noise_nk = np.sqrt(1 - own_k**2) * rng.standard_normal((n_tracks, 2))
        z_tnk.append(own_k * z_tnk[-1] + noise_nk + 2 * is_a[:, None] * np.array([0, 1]))
    z_nk = np.stack(z_tnk, 1).reshape(-1, 2)
    x_ng = z_nk @ rng.standard_normal((2, 12)) + 0.1 * rng.standard_normal((len(z_nk), 12))
    obs = pd.DataFrame(
        {
            "target": np.repeat(np.where(is_a, "A", "control"), n_times),
            "time": np.tile(np.arange(n_times), n_tracks),
            "cell": np.repeat(np.arange(n_tracks), n_times),
        }
    ).set_index(pd.Index([f"c{n}" for n in range(len(z_nk))]))
    return ad.AnnData(x_ng.astype(np.float32), obs=obs)


def test_what_a_stationary_background_keeps_is_found_only_with_tracks():
    """From snapshots alone nothing says how fast a stationary background forgets."""
    found = {}
    for track in ("cell", None):
        screen = Screen(_walks(), control="control", time="time", track=track)
        trained = fit(
            "temporal-scm",
            None,
            screen,
            epochs=15,
            batch_size=100,
            lr=2e-2,
            warm_start=0,
            compile=False,
            progress=False,
            transition="linear",
            **SIZES | {"n_responsive": 1, "n_hidden": 32},
        )
        found[track] = float(trained.model.invariant_weight_ll.detach())
        cells = predict(trained, ["A"], times=[3.0], n_cells=5)
        assert cells.n_obs == 5
    assert found["cell"] == pytest.approx(0.9, abs=0.1)
    assert abs(found[None] - 0.9) > 0.15


def _kept_and_drawn_anew(n_tracks: int = 200, n_times: int = 6) -> ad.AnnData:
    """Tracks: one coordinate is kept, nearly, and one is drawn anew at each time."""
    rng = np.random.default_rng(0)
    kept, anew = rng.normal(size=(n_tracks, 1)), rng.normal(size=(n_tracks, n_times))
    kept = (kept + 0.1 * rng.normal(size=(n_tracks, n_times))).ravel()
    x_ng = np.stack([kept, anew.ravel()], 1) @ np.array([[1.0, 1, 0, 0, 1, 0], [1, -1, 1, 1, 1, -1]])
    obs = pd.DataFrame(
        {
            "target": np.repeat(np.where(np.arange(n_tracks) % 2, "A", "control"), n_times),
            "time": np.tile(np.arange(n_times), n_tracks),
            "cell": np.repeat(np.arange(n_tracks), n_times),
            "kept": kept,
        },
        index=[f"c{n}" for n in range(n_tracks * n_times)],
    )
    return ad.AnnData((x_ng + 0.1 * rng.normal(size=x_ng.shape)).astype(np.float32), obs=obs)


def test_contrast_puts_what_tells_the_past_into_the_background():
    adata = _kept_and_drawn_anew()
    screen = Screen(adata, control="control", time="time", track="cell")
    found = {}
    for contrast in (0.0, 10.0):
        settings = SIZES | {"n_responsive": 1, "n_hidden": 32, "alignment": "none", "gates": "open"}
        settings |= {"epochs": 15, "batch_size": 100, "lr": 1e-2, "warm_start": 0, "compile": False}
        settings |= {"seed": 1, "progress": False}
        trained = fit("temporal-scm", None, screen, contrast=contrast, **settings)
        z_n = latents(trained, screen).obsm["X_causalcell"][:, 0]
        found[contrast] = abs(np.corrcoef(z_n, adata.obs["kept"])[0, 1])
    assert found[10.0] > 0.98
    assert found[0.0] < 0.5  # other seeds have .93 and .94


@pytest.mark.parametrize("training", [{"weights": {"z_invariant": 2.0}}, {"refine": 1}])
def test_images_train_and_are_drawn(training):
    rng = np.random.default_rng(0)
    obs = pd.DataFrame(
        {
            "target": np.repeat(["A", "control"] * 4, 3),
            "time": np.tile(np.arange(3), 8),
            "film": np.repeat(np.arange(8), 3),
        },
        index=[f"c{n}" for n in range(24)],
    )
    screen = Screen(
        ad.AnnData(rng.normal(size=(24, 192)).astype(np.float32), obs=obs),
        control="control",
        time="time",
        track="film",
    )
    settings = SIZES | {"n_hidden": 64, "network": "image"}
    trained = fit(
        "temporal-scm",
        None,
        screen,
        epochs=2,
        warm_start=0,
        compile=False,
        progress=False,
        **settings,
        **training,
    )
    assert np.isfinite(trained.history["validation_loss"]).all()
    assert predict(trained, ["A"], times=[2.0], n_cells=3).shape == (3, 192)


def test_a_run_goes_on_with_its_own_tracks_alone(tmp_path):
    rng = np.random.default_rng(0)
    obs = pd.DataFrame(
        {
            "target": np.tile(["control", "A"], 20),
            "time": np.repeat([0, 1], 20),
            "cell": np.tile(np.arange(20), 2),
            "other": np.r_[np.arange(20), np.roll(np.arange(20), 2)],
        },
        index=[f"c{n}" for n in range(40)],
    )
    adata = ad.AnnData(rng.normal(size=(40, 6)).astype(np.float32), obs)
    nothing = np.empty(0, dtype=np.int64)
    split = Split("all", np.arange(40), nothing, nothing, 0, {"n_cells": 40})

    def train(track: str):
        screen = Screen(adata, control="control", time="time", track=track)
        settings = SIZES | {"warm_start": 0, "epochs": 2, "alignment": "none", "batch_size": 16}
        settings |= {"out": tmp_path / "run", "split": split, "resume": True, "progress": False}
        return fit("temporal-scm", None, screen, **settings)

    train("cell")
    train("cell")
    with pytest.raises(CheckpointError, match="other settings, data or code"):
        train("other")
