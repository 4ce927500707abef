"""A conjugate pair whose guide is exact is uniform; the same with a wrong prior scale is rejected."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from pyro_causalcell.batch import Batch
from pyro_causalcell.data import Screen
from pyro_causalcell.errors import DataError, PairError
from pyro_causalcell.evaluate.sbc import design_screen, ecdf_band, rank_tests, sbc

room = sys.modules[sbc.__module__]  # the package's name "sbc" is the function


class Conjugate(PyroModule):
    """mean ~ N(0, 1), z_n ~ N(0, 1), x_n = (mean, z_n) + N(0, 1): the posterior is known and factorises."""

    needs = {"normalised"}

    def __init__(self, n_genes: int, cost: float = 0.0):
        super().__init__()
        self.cost = cost
        self.unused = PyroParam(torch.zeros(n_genes))

    def forward(self, batch: Batch) -> Tensor:
        mean = pyro.sample("mean", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.factor("cost", self.cost * mean.square().sum())
        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            z_n1 = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            loc_ng = torch.cat([mean.expand_as(z_n1), z_n1], -1)
            x: Tensor = pyro.sample("x", dist.Normal(loc_ng, 1.0).to_event(1), obs=batch.x_ng)
            return x


class ConjugateGuide(PyroModule):
    """The exact posterior where the scale of the cells' prior is 1; the mean's location is learned."""

    def __init__(self, n_cells: int, prior_scale: float = 1.0):
        super().__init__()
        self.scale = (n_cells + 1) ** -0.5
        self.weight = prior_scale**2 / (prior_scale**2 + 1)
        self.loc = PyroParam(torch.zeros(1))

    def forward(self, batch: Batch) -> None:
        pyro.sample("mean", dist.Normal(self.loc, self.scale).to_event(1))
        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            loc_n1 = self.weight * batch.x_ng[:, 1:]
            pyro.sample("z", dist.Normal(loc_n1, self.weight**0.5).to_event(1))


SMALL = design_screen(n_targets=1, n_genes=2, cells_per_condition=8)
SHORT = {"n_draws": 19, "epochs": 30, "lr": 0.3, "progress": False}


def test_an_exact_guide_is_uniform() -> None:
    result = sbc(Conjugate, ConjugateGuide, SMALL, n_replicates=40, **SHORT)
    assert list(result.ranks) == ["mean[0]", "z[0]"] and len(result.ranks) == 40
    assert result.ranks.to_numpy().min() >= 0 and result.ranks.to_numpy().max() <= 19
    assert result.verdict == "uniform: none of 2 quantities is rejected"
    assert (result.table["ecdf_p"] > 0.05).all() and (result.table["symmetry_p"] > 0.05).all()


def test_a_wrong_prior_scale_in_the_guide_is_rejected() -> None:
    result = sbc(Conjugate, ConjugateGuide, SMALL, n_replicates=30, prior_scale=0.3, **SHORT | {"epochs": 2})
    rejected = result.table.set_index("quantity")
    assert rejected.loc["z[0]", "rejected"] and rejected.loc["z[0]", "spread"] > 1.3
    assert rejected.loc["z[0]", "finding"] == "posterior too narrow"
    assert "z[0] (posterior too narrow)" in result.verdict


def test_the_model_stays_as_it_drew_the_cells() -> None:
    model = Conjugate(n_genes=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sbc(model, ConjugateGuide, SMALL, n_replicates=2, **SHORT)
    assert all(p.requires_grad for p in model.parameters()) and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


PAIR = """
import pyro
import pyro.distributions as dist
from pyro.nn import PyroModule, PyroParam
import torch


class Mine(PyroModule):
    needs = {"normalised"}

    def forward(self, batch):
        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=batch.x_ng)


class MineGuide(PyroModule):
    def __init__(self):
        super().__init__()
        self.scale = PyroParam(torch.ones(2))

    def forward(self, batch):
        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            pyro.sample("z", dist.Normal(batch.x_ng / 2, self.scale.abs()).to_event(1))
"""


def test_processes_do_not_change_the_ranks(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(PAIR)
    asked = {"n_replicates": 2, "n_draws": 9, "epochs": 2, "progress": False, "seed": 4}
    one, two = (sbc(str(file), None, SMALL, workers=n, **asked) for n in (1, 2))
    pd.testing.assert_frame_equal(one.ranks, two.ranks)


def test_a_pair_of_this_package() -> None:
    screen = design_screen(n_targets=2, n_genes=10, cells_per_condition=20)
    settings = {"n_latents": 2, "n_hidden": 8, "min_effect": 0.0}
    result = sbc(
        "sparse-shift", None, screen, n_replicates=2, epochs=3, n_draws=9, progress=False, **settings
    )
    sites = result.ranks.columns.str.partition("[").get_level_values(0)
    assert sites.value_counts().to_dict() == {"edge_rate": 4, "gate": 4, "shift": 4, "z": 2}


def test_quick_mode_is_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "QUICK_REPLICATES", 3)
    result = sbc(Conjugate, ConjugateGuide, SMALL, quick=True, n_draws=4, epochs=1, progress=False)
    assert len(result.ranks) == 3


def test_the_design_of_a_screen_with_batches(tiny_screen: Screen) -> None:
    settings = {"n_latents": 2, "n_hidden": 8, "gates": "open", "min_effect": 0.0}
    asked = {"n_replicates": 2, "epochs": 1, "n_draws": 4, "progress": False}
    result = sbc("sparse-shift", None, tiny_screen, **asked, **settings)
    assert [c for c in result.ranks if c.startswith("shift")] == [
        f"shift[{p},{k}]" for p in range(4) for k in range(2)
    ]


def test_a_prior_that_is_weighed_cannot_be_drawn() -> None:
    with pytest.raises(PairError, match="factor 'cost'"):
        sbc(Conjugate, ConjugateGuide, SMALL, cost=-1.0, progress=False)
    with pytest.raises(DataError, match="two replicates"):
        sbc(Conjugate, ConjugateGuide, SMALL, n_replicates=1, progress=False)


# ---------------------------------------------------------------------- tests of ranks


def places(rng: np.random.Generator, n: int, width: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """Ranks of a standard normal among 99 draws of a posterior of this width and shift."""
    drawn = shift + width * rng.normal(size=(99, n))
    return (drawn < rng.normal(size=n)).sum(0)


def test_p_values_of_uniform_ranks_are_uniform() -> None:
    rng = np.random.default_rng(0)
    ranks = pd.DataFrame(rng.integers(0, 100, (80, 300)), columns=[f"q{i}" for i in range(300)])
    table = rank_tests(ranks, 99)
    for name in ("ecdf_p", "chi2_p", "symmetry_p"):
        for level in (0.05, 0.2, 0.5):
            assert (table[name] <= level).mean() == pytest.approx(level, abs=0.075), name
    assert table["rejected"].sum() <= 1
    assert table["position"].mean() == pytest.approx(0.5, abs=0.01)
    assert table["spread"].mean() == pytest.approx(1.0, abs=0.02)


def test_findings_say_how_a_posterior_is_wrong() -> None:
    rng = np.random.default_rng(1)
    columns = {
        "right": places(rng, 300),
        "narrow": places(rng, 300, width=0.4),
        "wide": places(rng, 300, width=3.0),
        "low": places(rng, 300, shift=-0.8),
        "high": places(rng, 300, shift=0.8),
    }
    table = rank_tests(pd.DataFrame(columns), 99).set_index("quantity")
    assert table["finding"].to_dict() == {
        "right": "",
        "narrow": "posterior too narrow",
        "wide": "posterior too wide",
        "low": "posterior too low",
        "high": "posterior too high",
    }
    # the symmetry test sees bias, and lets a wrong width pass
    assert (table.loc[["right", "narrow", "wide"], "symmetry_p"] > 0.05).all()
    assert (table.loc[["low", "high"], "symmetry_p"] < 0.01).all()


def test_ecdf_band_holds_uniform_ecdfs_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    band = ecdf_band(50, 19, 0.9)
    assert band["place"].tolist() == pytest.approx(np.arange(1, 20) / 20)
    inside = []
    for _ in range(2000):
        counts = np.bincount(rng.integers(0, 20, 50), minlength=20).cumsum()[:-1] / 50
        inside.append(((counts >= band["low"] - 1e-9) & (counts <= band["high"] + 1e-9)).all())
    assert np.mean(inside) == pytest.approx(0.9, abs=0.04)


def test_ranks_out_of_range() -> None:
    with pytest.raises(DataError, match="n_draws=9"):
        rank_tests(pd.DataFrame({"z": [3, 12]}), 9)
