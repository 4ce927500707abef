"""Made-up results in the shapes that the other rooms return, and a browser to open pages in."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib.figure import Figure

from pyro_causalcell.evaluate.calibration import Calibration, aurc, risk_coverage

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
def signatures(loadings):
    over = ("programme", "gene")
    return xr.Dataset(
        {"change": (over, loadings.to_numpy() / 2), "standardised": (over, loadings.to_numpy())},
        coords={"programme": PROGRAMMES, "gene": GENES},
        attrs={"change_units": "log1p CP10k"},
    )


@pytest.fixture
def doubles():
    """A measured and a predicted row of three doubles; of the last, a single was not measured."""
    names = ["ATF2+MYC", "IRF1+JAK2", "BRD4+CAV1"]
    rows = [(name, *name.split("+"), source) for name in names for source in ("measured", "predicted")]
    table = pd.DataFrame(rows, columns=["double", "first", "second", "source"])
    table["kind"] = ["additive", "additive", "dominant", "additive", "unknown", "saturated"]
    table["residual_share"] = [0.1, 0.05, 0.45, 0.1, np.nan, 0.3]
    table["size_ratio"] = [1.4, 1.5, 1.0, 1.1, np.nan, 1.2]
    return table.assign(agreement=0.95)


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
def check_table():
    """Statistics of all cells and of two conditions; the dispersion of all cells is too high."""
    groups = {"all cells": 400, "A": 40, "B": 360}
    rows = [
        (group, statistic, n, observed, 0.5, 0.4, 0.6, p)
        for group, n in groups.items()
        for statistic, observed, p in (("zero_fraction", 0.5, 0.4), ("dispersion", 0.9, 0.0))
    ]
    columns = ["condition", "statistic", "n_cells", "observed", "replicate_mean", "low", "high", "p_value"]
    return pd.DataFrame(rows, columns=columns)


@pytest.fixture
def measured():
    """The calibration of a model that is right, but for the low genes, whose intervals are too narrow."""
    rng = np.random.default_rng(5)
    names, covered = ["low", "high", "all"], [0.8, 0.9, 0.85]
    classes = pd.DataFrame({"gene_class": names, "n_genes": [20, 20, 40]})
    for level in (50, 80, 90, 95):
        classes[f"coverage_{level}"] = [level / 90 * share for share in covered]
    classes = classes.assign(se_90=0.005, genes_inside=[0.1, 1.0, 0.55], crps=0.3, interval_score=2.0)
    edges = np.linspace(0, 1, 21)
    pit = [
        pd.DataFrame({"gene_class": n, "low": edges[:-1], "high": edges[1:], "density": 1.0}) for n in names
    ]
    error, uncertainty = rng.gamma(3, 0.1, 10), rng.gamma(3, 0.1, 10)
    risk = risk_coverage(error, uncertainty)
    return Calibration(
        classes=classes,
        pit=pd.concat(pit, ignore_index=True),
        genes=pd.DataFrame({"gene": GENES}),
        conditions=pd.DataFrame({"condition": PERTURBATIONS, "error": error, "uncertainty": uncertainty}),
        risk=risk,
        energy_score=1.0,
        spearman=0.41,
        aurc=aurc(risk),
        n_cells=900,
        n_samples=100,
    )


@pytest.fixture
def sbc_folder(tmp_path):
    """What ``pyro-causalcell sbc`` writes for the default pair."""
    rng = np.random.default_rng(6)
    names = ["edge_rate[0,0]", "gate[0,0]", "shift[0,0]", "z[0]"]
    folder = tmp_path / "sbc"
    folder.mkdir()
    ranks = pd.DataFrame(rng.integers(0, 100, (30, len(names))), columns=names)
    ranks.to_csv(folder / "ranks.csv", index=False)
    table = pd.DataFrame({"quantity": names, "position": 0.5, "spread": 1.2, "ecdf_p": 0.01})
    table = table.assign(chi2_p=0.1, symmetry_p=0.2, rejected=[False, False, True, False], finding="")
    table.loc[2, "finding"] = "posterior too narrow"
    table.to_csv(folder / "sbc.csv", index=False)
    figure = Figure()
    figure.subplots().plot([0, 1])
    figure.savefig(folder / "sbc.png")
    return folder


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


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
QUIET = ("--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe")


class Browser:
    """One page, driven through the DevTools protocol on pipes 3 and 4.

    Args:
        profile: Empty folder for the browser's files.
    """

    def __init__(self, profile: Path):
        read_theirs, self._write = os.pipe()
        self._read, write_theirs = os.pipe()

        def hand_over() -> None:  # the browser expects its ends at these numbers
            there, back = os.dup(read_theirs), os.dup(write_theirs)
            os.dup2(there, 3)
            os.dup2(back, 4)

        self._process = subprocess.Popen(
            [BROWSER, *FLAGS, *QUIET, f"--user-data-dir={profile}"],
            preexec_fn=hand_over,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_theirs)
        os.close(write_theirs)
        self._buffer, self._count, self._session = b"", 0, None
        self.console: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def open(self, path: Path, width: int = 1280, height: int = 900) -> None:
        """Open a file in a window of that size, and wait until it is loaded."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.send("Page.navigate", url=path.as_uri())
        while self._message().get("method") != "Page.loadEventFired":
            pass

    def run(self, script: str) -> object:
        """The value of a JavaScript expression."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key: a letter, Tab, Enter or Backspace."""
        text = {"Tab": "", "Enter": "\r", "Backspace": ""}.get(key, key)
        code = {"Tab": 9, "Enter": 13, "Backspace": 8}.get(key, ord(key[0].upper()))
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, text=text, windowsVirtualKeyCode=code)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def send(self, method: str, **params: object) -> dict:
        """Call a method of the protocol and return its result."""
        self._count += 1
        request = {"id": self._count, "method": method, "params": params}
        if self._session:
            request["sessionId"] = self._session
        os.write(self._write, json.dumps(request).encode() + b"\0")
        while (answer := self._message()).get("id") != self._count:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _message(self) -> dict:
        while b"\0" not in self._buffer:
            part = os.read(self._read, 1 << 16)
            assert part, "the browser has gone"
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        method = message.get("method")
        if method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.console.append(text.decode())
        return message


@pytest.fixture
def browser(tmp_path):
    """A headless browser; tests that ask for it are skipped where none is installed."""
    if BROWSER is None:
        pytest.skip("needs a browser")
    with Browser(tmp_path / "profile") as opened:
        yield opened
