"""What a fit believes about its global latents."""

import numpy as np
import pytest
import torch

from pyro_causalcell.errors import PredictionError
from pyro_causalcell.inference import fit
from pyro_causalcell.predict import global_draws, global_means, graph, programme_names


def _set(guide, name, index, value):
    values = getattr(guide, name).detach().clone()
    values[index] = value
    setattr(guide, name, values)


def test_draws_are_binary_gates_and_spread_shifts(trained):
    _set(trained.guide, "gate_logit", (2), 0.0)  # C: even odds
    draws = global_draws(trained, 400)
    assert set(draws) == {"edge_rate", "gate", "shift"} and draws["gate"].shape == (400, 4, 3)
    assert set(draws["gate"].unique().tolist()) == {0.0, 1.0}
    assert abs(float(draws["gate"][:, 2].mean()) - 0.5) < 0.05
    assert bool((draws["gate"][:, 0, 0] == 1).all())
    shift_s = draws["shift"][:, 0, 0]
    assert abs(float(shift_s.mean()) - 2.0) < 0.02 and abs(float(shift_s.std()) - 0.05) < 0.01


def test_draws_depend_on_their_seed_alone(trained):
    state = torch.get_rng_state()
    first, again, other = (global_draws(trained, 3, seed=s)["shift"] for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_means_round_gates(trained):
    means = global_means(trained)
    assert means["gate"].tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]]
    torch.testing.assert_close(means["shift"], trained.guide.shift_loc.detach())
    phi = torch.sigmoid(trained.guide.gate_logit.detach())
    alpha = trained.guide.alpha
    torch.testing.assert_close(means["edge_rate"], (1 + phi) / (2 + alpha))


def test_graph_lists_every_edge(trained):
    edges = graph(trained)
    assert edges.columns.tolist() == ["perturbation", "programme", "probability", "effect", "effect_sd"]
    assert edges["perturbation"].unique().tolist() == ["A", "B", "C", "A:B"]
    assert edges["programme"].unique().tolist() == ["programme_1", "programme_2", "programme_3"]
    opened = edges[edges["probability"] > 0.5].set_index("perturbation")
    assert opened["programme"].to_dict() == {"A": "programme_1", "B": "programme_2", "A:B": "programme_3"}
    np.testing.assert_allclose(opened["effect"], [2.0, -3.0, 1.5], rtol=1e-5)
    np.testing.assert_allclose(opened["effect_sd"], 0.05, rtol=1e-4)


SMALL = {"n_latents": 2, "n_hidden": 4, "epochs": 1, "warm_start": 0, "progress": False, "device": "cpu"}


@pytest.mark.parametrize("gates", ["open", "sampled"])
def test_graph_of_other_members(screen, gates):
    edges = graph(fit("sparse-shift", None, screen, gates=gates, **SMALL))
    assert len(edges) == 6 and edges["probability"].between(0, 1).all()
    assert (edges["effect_sd"] > 0).all() if gates == "open" else edges["effect_sd"].isna().all()
    if gates == "open":
        assert (edges["probability"] == 1).all()


def test_closed_gates_have_no_graph(screen):
    with pytest.raises(PredictionError, match="no perturbation shifts"):
        graph(fit("sparse-shift", None, screen, gates="closed", **SMALL))


def test_a_user_s_model_is_named_by_its_latents(screen):
    f = fit("template", None, screen, **{k: v for k, v in SMALL.items() if k != "warm_start"})
    assert programme_names(f) == ["programme_1", "programme_2"]
    assert global_draws(f, 2) == {}
