"""Made-up results in the shapes that the other rooms return."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr

PERTURBATIONS = ["ATF2", "BRD4", "CAV1", "IFNGR1", "IFNGR2", "IRF1", "JAK2", "MYC", "SMAD4", "STAT1"]
PROGRAMMES = [f"programme_{k}" for k in range(1, 7)]
GENES = [f"GENE{g}" for g in range(40)]
EDGES = {
    ("IFNGR1", "programme_3"): (0.999, -3.1),
    ("IFNGR2", "programme_3"): (0.998, -3.0),
    ("JAK2", "programme_3"): (0.999, -2.8),
    ("STAT1", "programme_3"): (0.999, -3.3),
    ("IRF1", "programme_5"): (0.96, 1.4),
    ("SMAD4", "programme_1"): (0.99, 1.9),
    ("MYC", "programme_1"): (0.97, -1.2),
    ("BRD4", "programme_2"): (0.71, 0.8),
}


@pytest.fixture
def graph():
    rows = [(p, k, *EDGES.get((p, k), (0.01, 0.0)), 0.15) for p in PERTURBATIONS for k in PROGRAMMES]
    return pd.DataFrame(rows, columns=["perturbation", "programme", "probability", "effect", "effect_sd"])


@pytest.fixture
def loadings():
    rng = np.random.default_rng(0)
    values = rng.laplace(0, 0.2, (len(PROGRAMMES), len(GENES)))
    frame = pd.DataFrame(values, index=PROGRAMMES, columns=GENES)
    frame.loc["programme_3", ["GENE1", "GENE2"]] = [5.0, -4.0]
    return frame


@pytest.fixture
def history():
    epoch = np.arange(60)
    return pd.DataFrame(
        {
            "train_loss": 450 + 300 * np.exp(-epoch / 4),
            "validation_loss": 455 + 300 * np.exp(-epoch / 4) + 5 * (epoch / 60) ** 2,
            "term_x": 445 + 300 * np.exp(-epoch / 4),
            "term_z": 6 * (1 - np.exp(-epoch / 10)),
            "term_gate": 0.1 + 0.3 * np.exp(-epoch / 30),
        },
        index=pd.Index(epoch, name="epoch"),
    )


@pytest.fixture
def effects():
    rng = np.random.default_rng(1)
    conditions = sorted({perturbation for perturbation, _ in EDGES})
    shape = (len(conditions), len(GENES))
    mean, half = rng.laplace(0, 0.1, shape), rng.gamma(9, 0.08, shape)
    for c, name in enumerate(conditions):
        if (name, "programme_3") in EDGES:
            mean[c, [1, 2]] = -6.0, 5.0
    over = ("condition", "gene")
    return xr.Dataset(
        {"gene_effect": (over, mean), "gene_low": (over, mean - half), "gene_high": (over, mean + half)},
        coords={"condition": conditions, "gene": GENES},
    )


@pytest.fixture
def checks():
    rng = np.random.default_rng(2)
    mean_g = rng.lognormal(-1, 1.2, len(GENES))
    arrays = {}
    for name, size in (("observed", 300), ("predicted", 250)):
        x_ng = rng.negative_binomial(1.5, 1.5 / (1.5 + mean_g), (size, len(GENES)))
        arrays[f"{name}_total_n"] = x_ng.sum(1)
        arrays[f"{name}_zero_g"] = (x_ng == 0).mean(0)
        arrays[f"{name}_mean_g"] = x_ng.mean(0)
        arrays[f"{name}_variance_g"] = x_ng.var(0)
        arrays[f"{name}_mean_cg"] = np.stack([half.mean(0) for half in np.array_split(x_ng, 2)])
    return arrays


@pytest.fixture
def coverage():
    nominal = [0.5, 0.8, 0.9, 0.95]
    rows = [("single cells", a, a + 0.01) for a in nominal] + [("means", a, 0.9 * a) for a in nominal]
    return pd.DataFrame(rows, columns=["values", "nominal", "observed"])


@pytest.fixture
def likelihood():
    rng = np.random.default_rng(3)
    names = {"nll": rng.normal(320, 40, 200), "pareto_k": rng.normal(0.35, 0.2, 200)}
    names |= {"ess": rng.uniform(20, 150, 200), "mc_se": rng.gamma(2, 0.02, 200)}
    return xr.Dataset({name: ("cell", value) for name, value in names.items()})


@pytest.fixture
def scores():
    rng = np.random.default_rng(4)
    centre = {
        "model": (0.05, 0.8, 0.7),
        "control mean": (0.1, np.nan, -0.1),
        "perturbed mean": (0.08, 0.5, np.nan),
        "matching mean": (0.055, 0.75, 0.65),
        "additive": (0.055, 0.75, 0.65),
        "technical duplicate": (0.045, 0.82, 0.7),
    }
    metrics = ["rmse", "pearson_control", "pearson_perturbed"]
    rows = [
        (method, c, metric, rng.normal(value, 0.005))
        for method, values in centre.items()
        for metric, value in zip(metrics, values, strict=True)
        for c in PERTURBATIONS
    ]
    return pd.DataFrame(rows, columns=["method", "condition", "metric", "value"])
