"""Factors of 3DIdent-like films, read from latents that were trained without them.

An object above a plane has a position and a rotation, which interventions set, and a hue, a shape and a
spotlight, which evolve without them. Every job simulates films, trains on some of the sequences, and is
scored on others: a readout of the true factors from the latents is fitted on the training sequences and
applied to the test sequences. All data is simulated, and the scenes are stand-ins for those of the original.

Source: CITE-VAE (arXiv 2605.25581), section 6.1 and Table 1; the scenes of CITRIS (Lippe et al. 2022).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import torch
import xarray as xr
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.linear_model import LinearRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

from pyro_causalcell import evaluate, inference, predict, simulate
from pyro_causalcell.data import Screen, Split
from pyro_causalcell.inference.training import pick_device
from pyro_causalcell.models import sparse_shift, temporal_scm
from pyro_causalcell.nets import MLP, Encoder
from pyro_causalcell.simulate.renderer import FACTORS, SHAPES
from pyro_causalcell.studies.runner import (
    Executor,
    Job,
    Scores,
    chosen_jobs,
    finished,
    in_order,
    run_jobs,
    summarise,
    write_table,
)

__all__ = ["METHODS", "METRICS", "PAPER", "REFERENCES", "run", "table_jobs"]

STUDY = "causal3dident"
SETTING = "3DIdent-like"
Floats = NDArray[np.float64]

NO_CONTRAST: dict[str, Any] = {"contrast": 0.0, "warmup": {}}
METHODS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, no alignment": temporal_scm.PRESETS["no-alignment"],
    "ours, no sparsity": temporal_scm.PRESETS["no-sparsity"],
    "ours, neither": temporal_scm.PRESETS["no-alignment"] | temporal_scm.PRESETS["no-sparsity"],
    "ours, no contrast": NO_CONTRAST,
    "ours, pasts unknown": {"track": None, **NO_CONTRAST},
    "iVAE": sparse_shift.PRESETS["ivae"],
    "VAE": sparse_shift.PRESETS["vae"],
}
"""Settings that make each method. Without tracks the frames of a film are cells whose past is unknown."""
ONE_BLOCK = ("iVAE", "VAE")
"""Methods of the sparse-shift family: their latents are not divided into blocks."""

SUPERVISED, TRUTH = "supervised network", "true factors"
REFERENCES = (SUPERVISED, TRUTH)
"""The encoder trained to name the factors of training images: what can be read with these many. The true
factors, divided into the true blocks: what each block says of the other."""

N_INVARIANT, N_RESPONSIVE = 16, 48
"""Few invariant ones: what persists fills them, and all else has no room there."""
SHARED: dict[str, Any] = {
    "network": "image",
    "likelihood": "gaussian",
    "batch_size": 128,
    "warm_start": 0,
    "compile": False,
    "matmul_precision": "medium",  # twice as fast on processors made for bfloat16
}
TEMPORAL: dict[str, Any] = {
    "n_invariant": N_INVARIANT,
    "n_responsive": N_RESPONSIVE,
    "alpha": 1000.0,  # thousands of pixels weigh on the other side
    "contrast": 1500.0,
    "warmup": {"contrast": 1},
    "batch_size": 256,  # the more pasts to choose from
    "lr": 1e-3,
}
LEARNING_RATE, READOUT_EPOCHS = 2e-3, 20
"""Of networks that are told the factors: the supervised one and readouts."""


class Size(NamedTuple):
    """Sequences to train, validate and score on, pixels along each side, units of networks, and epochs."""

    train: int
    validation: int
    test: int
    pixels: int
    n_hidden: int
    epochs: int


USUAL, FULL, SMALL = (
    Size(10_000, 100, 400, 32, 256, 10),
    Size(40_000, 2000, 2000, 32, 512, 100),
    Size(24, 4, 40, 8, 64, 1),
)
"""A size for one core of a CPU, one for a GPU, and one that only shows that all runs."""
LENGTH = 8
FIRST_SEED = 200
"""Added to a job's seed: films of lower seeds, and of 10,200, were looked at while settings were chosen."""

METRICS = {
    "r2_responsive": "R² responsive",
    "r2_invariant": "R² invariant",
    "r2_all": "R² all",
    "spearman_responsive": "Spearman responsive",
    "spearman_invariant": "Spearman invariant",
    "spearman_all": "Spearman all",
    "linear_responsive": "R² responsive, linear",
    "linear_invariant": "R² invariant, linear",
    "linear_all": "R² all, linear",
    "raw_r2_responsive": "R² responsive, raw angles",
    "raw_r2_invariant": "R² invariant, raw angles",
    "raw_r2_all": "R² all, raw angles",
    "raw_spearman_responsive": "Spearman responsive, raw angles",
    "raw_spearman_invariant": "Spearman invariant, raw angles",
    "raw_spearman_all": "Spearman all, raw angles",
    "leak_responsive": "R² responsive from z_l",
    "leak_invariant": "R² invariant from z_v",
    "auc_invariant": "AUC of u from z_l",
    **{f"r2_{factor}": f"R² {factor}" for factor in FACTORS},
}
"""Columns of the table, with their headings. Responsive factors are read from z_v, invariant ones from z_l,
all of them from both, and so are single factors (the last ten). The readout is a network with three hidden
layers but where the heading says linear. Lower is better for both leaks and the AUC."""

_PAPER = {"responsive": (0.959, 0.997), "invariant": (0.998, 0.988), "all": (0.989, 0.991)}
PAPER = {
    (SETTING, "ours", f"{reading}{score}_{block}"): number
    for block, numbers in _PAPER.items()
    for score, number in zip(("r2", "spearman"), numbers, strict=True)
    for reading in ("", "raw_")
}
"""Table 1 of the paper, on images of the original scenes. How it reads angles is not said."""

RESPONSIVE = FACTORS[:5]
"""Position and rotation. The spotlight does not follow the object here: else its angle would respond too."""
_TURNS = FACTORS[3:9]
_COLUMNS = {
    **{name: (i,) for i, name in enumerate(FACTORS[:3])},
    **{name: (3 + i, 9 + i) for i, name in enumerate(_TURNS)},
    "shape": tuple(range(15, 15 + len(SHAPES))),
}
_N_ANSWERS = 15 + len(SHAPES)
_RAW = {name: i for i, name in enumerate(FACTORS[:3])}
_RAW |= {name: _N_ANSWERS + i for i, name in enumerate(FACTORS[3:])}


def table_jobs(
    *, seeds: int = 3, methods: tuple[str, ...] | None = None, full: bool = False, quick: bool = False
) -> list[Job]:
    """The grid of the study.

    Args:
        seeds: Seeds of simulation and training, from 0.
        methods: Which of :data:`METHODS` and :data:`REFERENCES`; None is all.
        full: 40,000 training films in place of 10,000, and wider networks: for a GPU.
        quick: A few tiny films: shows that all of it runs, not how good it is.

    Raises:
        CausalCellError: A method is unknown.
    """
    jobs = chosen_jobs(STUDY, (SETTING,), (SETTING,), methods, [*METHODS, *REFERENCES], seeds, quick)
    return [replace(job, arguments={"quick": quick, "full": full}) for job in jobs]


def run(
    out: str | Path = "causal3dident-study",
    *,
    methods: tuple[str, ...] | None = None,
    seeds: int = 3,
    workers: int = 1,
    executor: Executor = "processes",
    full: bool = False,
    quick: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Run the study, or go on with it, and write ``rows.csv``, ``table.csv`` and ``table.md``.

    The films are kept in ``scenes`` of the folder, a file for each seed.

    Args:
        out: Folder of results; finished jobs in it are not run again.
        methods: See :func:`table_jobs`.
        seeds: Likewise.
        workers: Fits that run side by side.
        executor: What runs them, see :func:`run_jobs`.
        full: See :func:`table_jobs`.
        quick: See :func:`table_jobs`.
        progress: Show a progress bar.

    Returns:
        The table: study, setting, method, metric, mean, sd, n_seeds, paper.
    """
    out = Path(out)
    jobs = table_jobs(seeds=seeds, methods=methods, full=full, quick=quick)
    run_jobs(jobs, score_job, out, workers=workers, executor=executor, progress=progress)
    rows = in_order(finished(out, quick=quick, full=full), (SETTING,), [*METHODS, *REFERENCES])
    rows.drop(columns="arguments").to_csv(out / "rows.csv", index=False)
    table = summarise(STUDY, rows, PAPER, list(METRICS))
    note = (
        "All data is simulated, and the scenes are 3DIdent-like, not the original ones. Mean ± sd over "
        "seeds; in brackets the paper's number on its own images. Readouts are fitted on training sequences "
        "and scored on test sequences. Angles are read as sine and cosine; where the heading says raw, "
        "as numbers from 0 to 2 π, though 0 and 2 π are the same angle."
    )
    write_table(table, out, METRICS, note, quick)
    return table


def score_job(job: Job, folder: Path) -> Scores:
    """Simulate (or read what was simulated), train (or go on with it), score."""
    size = SMALL if job.arguments["quick"] else FULL if job.arguments["full"] else USUAL
    settings = {**SHARED, "n_hidden": size.n_hidden, "epochs": size.epochs}
    data = films(folder.parent.parent / "scenes", size, job.seed)
    split = by_sequence(size, job.seed)
    factors_nf, x_ng = factors(data), pixels(data)
    blocks: tuple[Floats | None, Floats]
    if job.method == TRUTH:
        blocks = _true_blocks(answers(factors_nf))
    elif job.method == SUPERVISED:
        blocks = _true_blocks(named_by_encoder(x_ng, factors_nf, split, size, job.seed))
    else:
        blocks = _latents(job, folder, as_cells(data, x_ng), split, settings)
    return _scores(blocks, factors_nf, split, data["condition"].values, job.seed)


def films(folder: Path, size: Size, seed: int) -> xr.Dataset:
    """Films of a seed: simulated at the first call, read at later ones."""
    n_sequences = size.train + size.validation + size.test
    path = folder / f"{n_sequences}-films-{size.pixels}-pixels-seed-{FIRST_SEED + seed}.nc"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        drawn = simulate.scenes(n_sequences, length=LENGTH, size=size.pixels, seed=FIRST_SEED + seed)
        simulate.write_scenes(drawn, path)
    return xr.load_dataset(path, engine="h5netcdf")


def by_sequence(size: Size, seed: int) -> Split:
    """Whole sequences to train, validate and score on."""
    ends = LENGTH * np.cumsum([size.train, size.validation, size.test])
    train, validation, test = np.split(np.arange(ends[-1]), ends[:-1])
    return Split("sequences", train, validation, test, seed, {"n_cells": int(ends[-1])})


def pixels(data: xr.Dataset) -> NDArray[np.float32]:
    """Images as rows (y, x, rgb), [n, g], from -1 to 1."""
    x_ng: NDArray[np.float32] = data["image"].values.astype(np.float32) / 127.5 - 1
    return x_ng.reshape(-1, int(np.prod(x_ng.shape[2:])))


def factors(data: xr.Dataset) -> Floats:
    """True factors of every frame, [n, f]."""
    factors_nf: Floats = data["factors"].values.reshape(-1, len(FACTORS))
    return factors_nf


def as_cells(data: xr.Dataset, x_ng: NDArray[np.float32]) -> ad.AnnData:
    """Every frame as a cell: its condition, time and sequence are columns of obs."""
    n_sequences, n_times = data.sizes["sequence"], data.sizes["time"]
    obs = pd.DataFrame(
        {
            "target": np.repeat(data["condition"].values.astype(str), n_times),
            "time": np.tile(np.arange(n_times), n_sequences),
            "sequence": np.repeat(np.arange(n_sequences), n_times),
        },
        index=[f"frame{n}" for n in range(n_sequences * n_times)],
    )
    return ad.AnnData(x_ng, obs=obs)


def answers(factors_nf: Floats) -> Floats:
    """Positions, sines and cosines of angles, and which shape it is, [n, 22]."""
    turn_na, shape_n = factors_nf[:, 3:9], factors_nf[:, 9].astype(int)
    return np.concatenate(
        [factors_nf[:, :3], np.sin(turn_na), np.cos(turn_na), np.eye(len(SHAPES))[shape_n]], 1
    )


def _true_blocks(answer_na: Floats) -> tuple[Floats, Floats]:
    """Invariant and responsive columns of answers."""
    responsive = [column for name in RESPONSIVE for column in _COLUMNS[name]]
    return np.delete(answer_na, responsive, 1), answer_na[:, responsive]


def _latents(
    job: Job, folder: Path, adata: ad.AnnData, split: Split, settings: dict[str, Any]
) -> tuple[Floats | None, Floats]:
    """Posterior means of the invariant and responsive block; None and all where there are no blocks."""
    one_block = job.method in ONE_BLOCK
    settings = settings | ({"n_latents": N_INVARIANT + N_RESPONSIVE} if one_block else TEMPORAL)
    settings |= METHODS[job.method]
    track = settings.pop("track", "sequence")
    screen = Screen(adata, control="control", time="time", track=None if one_block else track)
    fit = inference.fit(
        "sparse-shift" if one_block else "temporal-scm",
        None,
        screen,
        split=split,
        out=folder,
        resume=True,
        seed=job.seed,
        progress=False,
        **settings,
    )
    z_nk = predict.latents(fit, Screen.from_spec(fit.screen, adata)).obsm["X_causalcell"].astype(np.float64)
    return (None, z_nk) if one_block else (z_nk[:, :N_INVARIANT], z_nk[:, N_INVARIANT:])


def named_by_encoder(
    x_ng: NDArray[np.float32], factors_nf: Floats, split: Split, size: Size, seed: int
) -> Floats:
    """What an encoder says of images once it has learned the factors of the training ones, [n, 22]."""
    torch.manual_seed(seed)
    encoder = Encoder(x_ng.shape[1], _N_ANSWERS, log_input=False, network="image", n_hidden=size.n_hidden)
    net = nn.Sequential(encoder.hidden, encoder.loc)
    return _learned(net, x_ng, answers(factors_nf), split.train, size.epochs)


def _learned(
    net: nn.Module,
    x_nd: NDArray[np.floating],
    answer_na: Floats,
    known: NDArray[np.int64],
    epochs: int,
) -> Floats:
    """What a network says of all rows once it has learned the answers of the known ones, [n, a]."""
    scaler = StandardScaler().fit(answer_na[known])
    device = pick_device("auto")
    net.to(device)
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    batch = 128
    steps = epochs * -(-len(known) // batch)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps)
    input_nd = torch.from_numpy(np.float32(x_nd))
    target_na = torch.from_numpy(np.float32(scaler.transform(answer_na)))
    for _ in range(epochs):
        for rows in torch.from_numpy(known)[torch.randperm(len(known))].split(batch):
            loss = (net(input_nd[rows].to(device)) - target_na[rows].to(device)).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            rate.step()
    with torch.no_grad():
        said_na = torch.cat([net(part.to(device)).cpu() for part in input_nd.split(1000)])
    named_na: Floats = scaler.inverse_transform(said_na.double().numpy())
    return named_na


def _scores(
    blocks: tuple[Floats | None, Floats],
    factors_nf: Floats,
    split: Split,
    condition_s: NDArray[Any],
    seed: int,
) -> Scores:
    """Readings of blocks of factors from blocks of latents."""
    z_nl, z_nv = blocks
    z_nk = z_nv if z_nl is None else np.concatenate([z_nl, z_nv], 1)
    whole = readings(z_nk, factors_nf, split, seed)
    invariant = [name for name in FACTORS if name not in RESPONSIVE]
    scores: Scores = _named(whole, list(FACTORS), "all")
    scores |= {f"r2_{name}": float(whole.loc[name, "r2"]) for name in FACTORS}
    if z_nl is None:
        return scores
    from_l, from_v = (readings(z, factors_nf, split, seed) for z in (z_nl, z_nv))
    scores |= _named(from_v, list(RESPONSIVE), "responsive") | _named(from_l, invariant, "invariant")
    scores["leak_responsive"] = float(from_l.loc[list(RESPONSIVE), "r2"].mean())
    scores["leak_invariant"] = float(from_v.loc[invariant, "r2"].mean())
    last = split.test[LENGTH - 1 :: LENGTH]  # one frame a film: others of it would tell its condition
    scores["auc_invariant"] = evaluate.perturbation_auc(
        z_nl[last], condition_s[last // LENGTH].astype(str), seed=seed
    )
    return scores


def _named(table: pd.DataFrame, factors: list[str], block: str) -> Scores:
    means = table.loc[factors].mean()
    return {f"{score}_{block}": float(means[score]) for score in table.columns}


def readings(z_nk: Floats, factors_nf: Floats, split: Split, seed: int) -> pd.DataFrame:
    """How well each factor is read from latents of test sequences, by readouts fitted on training sequences.

    Args:
        z_nk: Latents [n, k].
        factors_nf: True factors [n, f].
        split: Rows to fit and to score on.
        seed: Seed of the network, which has 512 units in each layer.

    Returns:
        A row for each factor; higher is better in all columns. ``r2`` and ``spearman``: by a network with
        three hidden layers, of sine and cosine of angles and of the shape as seven yes-or-no questions. The
        R² of a factor takes squares of all its columns together; the rank correlation is a mean over them
        (of the likeliest shape). ``linear``: that R² by linear regression. ``raw_r2`` and ``raw_spearman``:
        the network's, of the angle from 0 to 2 π, and of the number of the shape.
    """
    truth_na = np.concatenate([answers(factors_nf), factors_nf[:, 3:]], 1)
    test_na = truth_na[split.test]
    torch.manual_seed(seed)
    scaled_nk = StandardScaler().fit(z_nk[split.train]).transform(z_nk)
    net = nn.Sequential(MLP(z_nk.shape[1], 512, 3, activation="silu"), nn.Linear(512, truth_na.shape[1]))
    found = {
        "network": _learned(net, scaled_nk, truth_na, split.train, READOUT_EPOCHS),
        "linear": LinearRegression().fit(scaled_nk[split.train], truth_na[split.train]).predict(scaled_nk),
    }
    found = {name: found_na[split.test] for name, found_na in found.items()}
    rows = {}
    for factor in FACTORS:
        columns, raw = list(_COLUMNS[factor]), [_RAW[factor]]
        ranked_na = found["network"][:, columns]
        if factor == "shape":
            ranked_na = np.eye(len(SHAPES))[ranked_na.argmax(1)]
        rows[factor] = {
            "r2": _r2(test_na[:, columns], found["network"][:, columns]),
            "spearman": _spearman(test_na[:, columns], ranked_na),
            "linear": _r2(test_na[:, columns], found["linear"][:, columns]),
            "raw_r2": _r2(test_na[:, raw], found["network"][:, raw]),
            "raw_spearman": _spearman(test_na[:, raw], found["network"][:, raw]),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def _r2(truth_na: Floats, found_na: Floats) -> float:
    """R² of columns together."""
    left, whole = (truth_na - found_na) ** 2, (truth_na - truth_na.mean(0)) ** 2
    return float(1 - left.sum() / whole.sum())


def _spearman(truth_na: Floats, found_na: Floats) -> float:
    """Mean rank correlation of columns that vary in truth; 0 for those that vary in truth alone."""
    values = []
    for truth_n, found_n in zip(truth_na.T, found_na.T, strict=True):
        if np.ptp(truth_n) > 0:
            ranks = rankdata(truth_n), rankdata(found_n)
            values.append(float(np.corrcoef(*ranks)[0, 1]) if np.ptp(found_n) > 0 else 0.0)
    return float(np.mean(values))
