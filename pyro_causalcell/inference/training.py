"""``fit``: train a pair by stochastic variational inference."""

import copy
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal, get_args

import pandas as pd
import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from torch import Tensor, nn
from tqdm import tqdm

from pyro_causalcell.batch import Batch, Dims
from pyro_causalcell.data import Anchors, Minibatches, Screen, Split, random_cells
from pyro_causalcell.embeddings import seen_targets, standardised
from pyro_causalcell.errors import CheckpointError, DataError, PairError, TrainingError
from pyro_causalcell.inference.distributed import Ranks, join, local_device
from pyro_causalcell.inference.elbo import SiteWeights, elbo_terms
from pyro_causalcell.inference.engine import Engine, keep_freed_memory
from pyro_causalcell.inference.fitted import (
    CellSummary,
    Fit,
    atomic_torch_save,
    check_plain,
    load_tensors,
    settings_hash,
)
from pyro_causalcell.inference.lagged_rotation import lagged_rotation
from pyro_causalcell.inference.pair import Pair, Source, build_pair, check_pair
from pyro_causalcell.inference.posterior import encode, is_local, sample_sites
from pyro_causalcell.inference.warm_start import block_rotation, can_rotate, sparse_rotation

__all__ = ["MatmulPrecision", "fit", "pick_device"]

MatmulPrecision = Literal["highest", "high", "medium"]
"""See ``torch.set_float32_matmul_precision``."""

CHECK_EVERY = 100
"""Steps between two looks at the losses: more often would make a GPU wait."""
HEAR_EVERY = 20
"""Steps between two moments when several processes ask each other for Ctrl-C: each costs a message."""
LR_DROP = 0.3
"""Factor by which the learning rate drops when the validation ELBO stops improving."""
LAST_LR = 0.01
"""Where the learning rate ends, as a share of its start, when the number of epochs is given."""
REFINE_PARTICLES = 10
"""Draws of each cell's latents while a fit is refined."""
REFINE_LR = 0.75
"""Learning rate at which refinement starts, as a share of training's."""


@dataclass(frozen=True)
class Training:
    """Settings of one training run; see :func:`fit`."""

    epochs: int | None = None
    max_epochs: int = 400
    refine: int = 0
    patience: int = 15
    warm_start: int = 40
    batch_size: int = 256
    lr: float = 2e-3
    lr_drops: int = 3
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = 100.0
    weights: dict[str, float] = field(default_factory=dict)
    warmup: dict[str, int] = field(default_factory=dict)
    elbo: str | None = None
    particles: int = 1
    compile: bool | None = None
    matmul_precision: MatmulPrecision = "highest"
    anchors: Anchors | None = None
    memory_budget_gb: float = 4.0


@dataclass
class Progress:
    """Where training stands. All of it is in the checkpoint."""

    epoch: int = 0
    stage: str = "warm start"
    stage_start: int = 0
    lr: float = 0.0
    drops: int = 0
    best_loss: float = math.inf
    best_epoch: int = -1
    done: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)


def fit(
    model: Source | Fit,
    guide: Source | None,
    screen: Screen,
    *,
    split: Split | None = None,
    epochs: int | None = None,
    max_epochs: int = 400,
    refine: int = 0,
    patience: int = 15,
    warm_start: int | None = None,
    batch_size: int = 256,
    lr: float = 2e-3,
    lr_drops: int = 3,
    adam_eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: float | None = 100.0,
    weights: Mapping[str, float] | None = None,
    warmup: Mapping[str, int] | None = None,
    elbo: ELBO | None = None,
    particles: int = 1,
    compile: bool | None = None,
    matmul_precision: MatmulPrecision = "highest",
    anchors: Anchors | None = None,
    memory_budget_gb: float = 4.0,
    out: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    device: str = "auto",
    threads: int | None = 1,
    progress: bool = True,
    **settings: Any,
) -> Fit:
    """Train a model and its guide on a screen.

    Training minimises the negative ELBO in nats per cell with Adam. The validation ELBO is measured
    after every epoch under the same draws. When it has not improved for ``patience`` epochs, the best
    weights return and the learning rate drops to three tenths, ``lr_drops`` times; then training ends with
    the best weights. With a given number of epochs the learning rate falls linearly instead.

    Under ``torchrun`` the processes train one pair together: each takes its share of every minibatch, and
    the first one alone measures the validation ELBO and writes ``out``.

    Args:
        model: Name (``"sparse-shift"``), ``"file.py:Class"``, class, or instance. Or a fit: a copy of its
            pair is trained further, on its split, and keeps its BatchNorm statistics.
        guide: Likewise; None takes the guide of the model's name.
        screen: The cells.
        split: Which cells train and validate; by default a tenth of each condition validates, or those of
            the fit that is trained further.
        epochs: Train this many epochs, whatever the validation ELBO says (the best weights are kept).
            None trains until the validation ELBO stops improving, ``max_epochs`` at most. On few cells prefer
            None: where the validation ELBO is best early, a given number of epochs keeps weights of a
            high learning rate, and means predicted from them are noisy.
        max_epochs: Upper limit when ``epochs`` is None.
        refine: Epochs that follow, by the importance-weighted bound with 10 draws of each cell's latents and
            with BatchNorm's statistics kept. An epoch takes about ten times the decoder; the fit comes closer
            to the likelihood.
        patience: Epochs without a better validation ELBO before the learning rate drops.
        warm_start: Epochs with all gates open before the latent axes are turned to make shifts sparse
            (see ``sparse_rotation``); 0 turns it off. None: 25 for pairs that can be turned, but at most
            four tenths of ``epochs``.
        batch_size: Cells in a minibatch.
        lr: Adam's learning rate.
        lr_drops: How often the learning rate drops before training ends.
        adam_eps: Adam's ε.
        weight_decay: Adam's L2 penalty.
        clip: Largest gradient norm; None does not clip.
        weights: Site name -> multiplier of its ELBO term, for example ``{"z": 8}`` for a β-VAE.
        warmup: Site name -> epochs over which its multiplier grows from 0: KL and gate annealing.
        elbo: Any Pyro ELBO (``TraceEnum_ELBO()``, ``RenyiELBO()``, ...) in place of the default engine.
        particles: Draws of each cell's latents in a step. With more than one the bound is the
            importance-weighted one, closer to the likelihood; a step takes about as many times the decoder.
            See ``refine`` for a last stage of it.
        compile: Record and compile the training step: about twice as fast, after some 20 seconds beside the
            first steps. None does so where training is long enough to repay it; True at once, False never.
            A pair that cannot be recorded trains without it, and a warning says why.
        matmul_precision: Of matrix products in training, as ``torch.set_float32_matmul_precision`` has it:
            ``"highest"`` is float32, ``"high"`` lets GPUs take TF32, ``"medium"`` also lets processors take
            bfloat16 where they have it. Sums stay in float32. With ``"medium"`` the convolutions of images
            are in bfloat16 as well: about twice as fast on processors and cards that have it.
        anchors: Control cell that each cell comes with, for models that ask for one: ``"batch"`` draws one of
            the same batch, ``"random"`` any, ``"twin"`` takes the cell's own from ``Screen(twin=)``. None:
            its own where the screen has them, else one of the same batch.
        memory_budget_gb: Memory the counts may take on the device; larger screens are read by rows.
        out: Run folder. A checkpoint is written there after every epoch, the fit at the end.
        resume: Go on from the checkpoint in ``out`` if there is one.
        seed: Seed of split, initialisation, minibatches and draws.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ...
        threads: CPU threads of torch while training; one is fastest for small nets. None leaves them.
        progress: Show a progress bar.
        **settings: Arguments of the model's and guide's constructors, such as ``n_latents=10``; those of one
            alone as ``**{"model.norm": "none"}``.

    Returns:
        The fit, in evaluation mode, with the weights of the best epoch.

    Raises:
        DataError: The screen does not hold what the model needs (counts, normalised values).
        PairError: Model and guide do not fit each other.
        TrainingError: A setting is not possible, or a term is not finite; the last good checkpoint stays.
        CheckpointError: ``resume`` meets a checkpoint of other settings, data or code.
    """
    if min(particles - 1, refine) < 0 or (elbo is not None and (particles > 1 or refine)):
        raise TrainingError(
            f"particles= (1 or more) and refine= (0 or more) are of the default bound, found {particles} and "
            f"{refine}; leave them out where elbo= is given, and set its own"
        )
    if matmul_precision not in get_args(MatmulPrecision):
        raise TrainingError(
            f"matmul_precision= is one of {get_args(MatmulPrecision)}, found {matmul_precision!r}"
        )
    _seed_all(seed)
    if isinstance(model, Fit):
        pair = _taken_over(model, guide, screen, settings)
        split, warm_start = split or _split_of(model, screen), warm_start or 0
        dims = screen.dims(split.train)
    else:
        split = split or random_cells(screen, seed=seed)
        dims = screen.dims(split.train)
        pair = build_pair(model, guide, dims, settings)
        _describe_targets(pair, dims, screen)
    _check_needs(pair.model, screen)
    training = Training(
        epochs=epochs,
        max_epochs=max_epochs,
        refine=refine,
        patience=patience,
        warm_start=_warm_epochs(warm_start, pair, epochs),
        batch_size=batch_size,
        lr=lr,
        lr_drops=lr_drops,
        adam_eps=adam_eps,
        weight_decay=weight_decay,
        clip=clip,
        weights=dict(weights or {}),
        warmup=dict(warmup or {}),
        elbo=None if elbo is None else type(elbo).__name__,
        particles=particles,
        compile=compile,
        matmul_precision=matmul_precision,
        anchors=_anchors(anchors, pair, screen),
        memory_budget_gb=memory_budget_gb,
    )
    ranks = join()
    with _torch_set(threads, matmul_precision):
        trainer = Trainer(
            pair,
            dims,
            screen,
            split,
            training,
            seed,
            pick_device(local_device(device)),
            elbo,
            out,
            isinstance(model, Fit),
            ranks,
        )
        if resume:
            trainer.resume()
        trainer.run(progress)
    return trainer.result()


class Trainer:
    """One training run: its state, its epochs, its checkpoints."""

    def __init__(
        self,
        pair: Pair,
        dims: Dims,
        screen: Screen,
        split: Split,
        training: Training,
        seed: int,
        device: torch.device,
        elbo: ELBO | None,
        out: str | Path | None,
        further: bool = False,
        ranks: Ranks | None = None,
    ):
        self.ranks = ranks or Ranks()
        self.further, self.progress = further, Progress(lr=training.lr)
        self.pair, self.dims, self.screen, self.split = pair, dims, screen, split
        self.training, self.seed, self.device = training, seed, device
        self.out = None if out is None else Path(out)
        for module in (pair.model, pair.guide):
            module.to(device)
        self._training_mode()  # an instance may be in evaluation mode, where its guide may draw otherwise
        cells = partial(
            Minibatches,
            screen,
            seed=seed,
            device=device,
            anchors=training.anchors,
            controls=split.train,
        )
        self.batches = cells(
            split.train,
            training.batch_size,
            memory_budget_gb=training.memory_budget_gb,
            part=self.ranks.part,
        )
        left_gb = self.batches.memory_left_gb
        self.validation = (
            cells(split.validation, 1024, shuffle=False, memory_budget_gb=left_gb)
            if len(split.validation)
            else None
        )
        first = next(self.batches.epoch(0))
        self.best_state: dict[str, dict[str, Tensor]] = _copy(pair.state_dict())
        with _same_draws(seed, device):
            check_pair(pair.model, pair.guide, first)
            _check_sites(pair, first, training)
            self.elbo = elbo or _needed_elbo(pair, first)
        pair.load_state_dict(self.best_state)  # the checks moved BatchNorm's statistics
        if self.elbo is not None and (training.particles > 1 or training.refine):
            raise TrainingError(
                f"this pair trains by {type(self.elbo).__name__}: its guide has latents that are enumerated "
                "or without a pathwise gradient, which takes particles=1 and refine=0"
            )
        self.optimizer = torch.optim.Adam(
            list(pair.parameters()),
            lr=training.lr,
            eps=training.adam_eps,
            weight_decay=training.weight_decay,
            fused=True,
        )
        check_plain(pair)
        self.hash = self._hash()  # now, not later: the user may edit the model's file while it trains
        self.interrupts: list[int] = []
        if not training.warm_start:
            self._start_stage("training")
        self.engine = self._stage_engine()

    # -------------------------------------------------------------- epochs

    def run(self, show: bool) -> None:
        """Train until done. Ctrl-C saves what is there and passes on."""
        last = self.training.epochs or self.training.max_epochs
        shown = show and self.ranks.is_first
        bar = tqdm(total=last + self.training.refine, disable=not shown, unit="epoch")
        self.ranks.adopt(self.pair.state_dict())
        try:
            with pyro.validation_enabled(False), bar, _heard_interrupts() as self.interrupts:
                bar.update(self.progress.epoch)
                while not self.progress.done:
                    row = self._epoch()
                    bar.update()
                    bar.set_postfix({k: f"{row[k]:.2f}" for k in ("train_loss", "validation_loss")})
        except KeyboardInterrupt:
            if self.progress.epoch:
                self._save()
            raise
        self._save()
        self.ranks.any(False)  # no process goes on before the run folder is whole

    def _save(self) -> None:
        if self.out is not None and self.ranks.is_first:
            self.result().save(self.out)

    def _epoch(self) -> dict[str, Any]:
        start, state = time.perf_counter(), self.progress
        if state.stage == "warm start":
            self._hold_gates(True)
        terms = self._train_epoch()
        row = {"epoch": state.epoch, "stage": state.stage, "train_loss": -sum(terms.values())}
        row["validation_loss"] = (
            math.nan if self.validation is None else self.ranks.from_first(self.validation_loss)
        )
        row |= {"lr": state.lr, "seconds": time.perf_counter() - start}
        row |= {f"term_{name}": value for name, value in terms.items()}
        state.history.append(row)
        state.epoch += 1
        self._schedule(row)
        self.save_checkpoint()
        return row

    def _train_epoch(self) -> dict[str, float]:
        """One pass over the training cells; returns each term in nats per cell."""
        self._training_mode()
        self.ranks.own_draws(self.seed, self.progress.epoch)
        names: list[str] = []
        kept: list[Tensor] = []
        checked = 0
        parameters = list(self.pair.parameters())
        sizes = self.batches.sizes
        for step, batch in enumerate(self.batches.epoch(self.progress.epoch)):
            weights = self._weights((step + 1) / len(self.batches))
            self.optimizer.zero_grad(set_to_none=True)
            if self._is_interrupted(step):
                raise KeyboardInterrupt
            terms = self._gradients(batch, weights)
            terms = self.ranks.average(parameters, terms, batch.n_cells / sizes[step])
            if self.training.clip is not None:
                nn.utils.clip_grad_norm_(parameters, self.training.clip, foreach=True)
            self.optimizer.step()
            names = list(terms)
            kept.append(torch.stack([t.detach() for t in terms.values()]) / batch.n_total)
            if len(kept) - checked == CHECK_EVERY:
                self._check_finite(names, kept, checked)
                checked = len(kept)
        self._check_finite(names, kept, checked)
        self._check_parameters()
        self.ranks.adopt(self.pair.state_dict())
        means = torch.stack(kept).mean(0).tolist()
        return dict(zip(names, means, strict=True))

    def _is_interrupted(self, step: int) -> bool:
        if self.ranks.count > 1 and step % HEAR_EVERY:
            return False
        return self.ranks.any(bool(self.interrupts))

    def _training_mode(self) -> None:
        """Training further, BatchNorm keeps its statistics: their noise limits how well a decoder fits."""
        self.pair.train(True)
        kept = self.further or self.progress.stage == "refinement"
        for module in (*self.pair.model.modules(), *self.pair.guide.modules()):
            if kept and isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()

    def _gradients(self, batch: Batch, weights: Mapping[str, float]) -> dict[str, Tensor]:
        """Gradients of the loss in nats per cell; returns the terms."""
        if self.elbo is None:
            return self.engine.gradients(batch, weights)
        with SiteWeights(weights):  # loss_and_grads is what every Pyro ELBO has
            loss = self.elbo.loss_and_grads(  # type: ignore[attr-defined]
                self.pair.model, self.pair.guide, batch
            )
        for p in self.pair.parameters():
            if p.grad is not None:
                p.grad /= batch.n_total
        return {"elbo": torch.as_tensor(-loss, device=self.device)}

    def _terms(self, batch: Batch, weights: Mapping[str, float]) -> dict[str, Tensor]:
        if self.elbo is None:
            return elbo_terms(self.pair.model, self.pair.guide, batch, weights, self._particles)
        with SiteWeights(weights):
            loss = self.elbo.loss(self.pair.model, self.pair.guide, batch)  # type: ignore[attr-defined]
        return {"elbo": torch.as_tensor(-loss, device=self.device)}

    def validation_loss(self) -> float:
        """Negative ELBO of the validation cells under fixed draws, in nats per cell.

        Cells are weighted as if there were as many as training cells, so that the share of the global
        terms is the training loss's.
        """
        assert self.validation is not None
        self.pair.train(False)
        total = torch.zeros((), device=self.device)
        weights = self._weights(1.0)
        with torch.no_grad(), _same_draws(self.seed, self.device):
            for batch in self.validation:
                scaled = batch._replace(n_total=self.dims.n_cells)
                terms = self._terms(scaled, weights)
                total += torch.stack(list(terms.values())).sum() * batch.n_cells
        return -float(total) / len(self.split.validation) / self.dims.n_cells

    def _check_finite(self, names: list[str], kept: list[Tensor], checked: int) -> None:
        bad = ~torch.isfinite(torch.stack(kept[checked:]))
        if not bool(bad.any()):
            return
        step = int(bad.any(1).nonzero()[0])
        sites = [name for name, b in zip(names, bad[step].tolist(), strict=True) if b]
        raise TrainingError(
            f"the term of site {sites[0]!r} is not finite at epoch {self.progress.epoch}, batch "
            f"{checked + step} (all bad sites: {sites}). Try a lower lr=, a smaller clip=, or look at the "
            f"model's values there; {self._last_good()}"
        )

    def _check_parameters(self) -> None:
        """A gradient that was not finite in the last step shows in no term yet."""
        modules = {"model": self.pair.model, "guide": self.pair.guide}
        named = ((f"{kind}.{n}", p) for kind, m in modules.items() for n, p in m.named_parameters())
        bad = [name for name, p in named if not bool(torch.isfinite(p).all())]
        if bad:
            raise TrainingError(
                f"parameter {bad[0]!r} is not finite after epoch {self.progress.epoch} (all bad parameters: "
                f"{bad}): a gradient was not. Try a lower lr=, a smaller clip=, or look at the model's "
                f"values there; {self._last_good()}"
            )

    def _last_good(self) -> str:
        if self.out is None:
            return "pass out= to keep checkpoints"
        return (
            f"{self.out} holds the last good checkpoint"
            if self.progress.epoch
            else "there is no checkpoint yet"
        )

    # ------------------------------------------------------------ schedule

    def _weights(self, part: float) -> dict[str, float]:
        """Multipliers of the sites' terms, ``part`` of the way through the epoch."""
        weights = dict(self.training.weights)
        age = self.progress.epoch + part
        for name, epochs in self.training.warmup.items():
            weights[name] = weights.get(name, 1.0) * min(1.0, age / epochs)
        if self.progress.stage == "warm start":
            weights |= dict.fromkeys(self.pair.guide.gate_sites, 0.0)  # type: ignore[arg-type]
        return weights

    def _schedule(self, row: Mapping[str, Any]) -> None:
        """Decide what comes after an epoch: go on, turn the axes, drop the learning rate, or end."""
        state, training = self.progress, self.training
        if state.stage == "warm start":
            if state.epoch >= training.warm_start:
                self._turn_axes()
                self._start_stage("training")
                self.engine = self._stage_engine()
            return
        loss = row["train_loss"] if self.validation is None else row["validation_loss"]
        annealed = state.epoch >= max(training.warmup.values(), default=0)
        if annealed and loss < state.best_loss:
            state.best_loss, state.best_epoch = loss, state.epoch
            self.best_state = _copy(self.pair.state_dict())
        epochs = self._stage_epochs()
        if epochs is not None:
            self._set_lr(self._first_lr() * max(LAST_LR, 1 - self._age() / max(1, epochs)))
        elif annealed and state.epoch - max(state.best_epoch, state.stage_start) >= training.patience:
            state.drops += 1
            self.pair.load_state_dict(self.best_state)
            state.best_epoch = state.epoch
            self._set_lr(training.lr * LR_DROP**state.drops)
        self._end_stage_if_over()

    def _end_stage_if_over(self) -> None:
        """After training comes refinement, where it is asked for."""
        state, training = self.progress, self.training
        if state.stage == "refinement":
            state.done = self._age() >= training.refine
            return
        over = state.epoch >= (training.epochs or training.max_epochs) or state.drops > training.lr_drops
        state.done = over and not (training.refine and state.stage == "training")
        if over and not state.done:
            if state.best_epoch >= 0:
                self.pair.load_state_dict(self.best_state)
            self._start_stage("refinement")
            self.optimizer.state.clear()  # the moments belong to another bound
            self._set_lr(self._first_lr())
            self.engine = self._stage_engine()

    def _stage_epochs(self) -> int | None:
        """Epochs of this stage, if they are given."""
        state, training = self.progress, self.training
        if state.stage == "warm start":
            return training.warm_start
        if state.stage == "refinement":
            return training.refine
        return None if training.epochs is None else training.epochs - state.stage_start

    def _first_lr(self) -> float:
        return self.training.lr * (REFINE_LR if self.progress.stage == "refinement" else 1.0)

    @property
    def _particles(self) -> int:
        asked = self.training.particles
        return max(asked, REFINE_PARTICLES) if self.progress.stage == "refinement" else asked

    def _age(self) -> int:
        return self.progress.epoch - self.progress.stage_start

    def _start_stage(self, stage: str) -> None:
        state = self.progress
        state.stage, state.stage_start, state.best_loss, state.best_epoch = stage, state.epoch, math.inf, -1
        self.best_state = _copy(self.pair.state_dict())

    def _stage_engine(self) -> Engine:
        """A stage has an engine of its own: which parameters learn is part of a recorded step."""
        epochs = self._stage_epochs()
        if epochs is None:  # the least that it takes
            epochs = self.training.patience * (self.training.lr_drops + 1)
        per_epoch = len(self.batches)
        return Engine(
            self.pair, self.training.compile, epochs * per_epoch, self._age() * per_epoch, self._particles
        )

    def _hold_gates(self, held: bool) -> None:
        for side in (self.pair.guide, self.pair.model):
            if hasattr(side, "hold_gates_open"):
                side.hold_gates_open(held)  # type: ignore[operator]

    def _turn_axes(self) -> None:
        """Turn the latent axes to make shifts sparse, and let the gates go."""
        self.pair.train(False)
        sites: Any = self.pair.guide.rotated_site
        sites = (sites,) if isinstance(sites, str) else sites
        ordered = Minibatches(  # one pass: nothing is worth keeping
            self.screen, self.split.train, 4096, shuffle=False, device=self.device, memory_budget_gb=0.0
        )
        with _same_draws(self.seed, self.device):
            moments = encode(self.pair.guide, ordered)
        locs, scales = zip(*(moments[site] for site in sites), strict=True)
        loc_nk, variance_k = torch.cat(locs, -1), (torch.cat(scales, -1) ** 2).mean(0)
        u_dp, design_n = self.screen.designs
        u_np = u_dp[design_n[self.split.train]]
        if len(sites) == 1:
            turn = sparse_rotation(loc_nk, u_np, variance_k=variance_k, seed=self.seed)
        elif "time" in getattr(self.pair.model, "needs", set()):
            time_n = torch.from_numpy(self.screen.time_n[self.split.train])  # type: ignore[index]
            turn = lagged_rotation(
                loc_nk,
                u_np,
                time_n,
                locs[0].shape[-1],
                variance_k=variance_k,
                onset=getattr(self.pair.model, "onset", None),
                seed=self.seed,
            )
        else:
            turn = block_rotation(loc_nk, u_np, locs[0].shape[-1], variance_k=variance_k, seed=self.seed)
        turn = turn.to(self.device)
        self._hold_gates(False)
        self.pair.model.rotate(turn.map_kk, turn.offset_k)  # type: ignore[operator]
        self.pair.guide.rotate(turn)  # type: ignore[operator]
        self.ranks.adopt(self.pair.state_dict())
        self.optimizer.state.clear()  # the moments belong to the old axes

    def _set_lr(self, lr: float) -> None:
        self.progress.lr = lr
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    # ---------------------------------------------------------- checkpoints

    def _hash(self) -> str:
        lengths = ("epochs", "max_epochs", "refine")  # a run may be made longer
        training = {k: v for k, v in asdict(self.training).items() if k not in lengths}
        chosen = {"training": training, "seed": self.seed, "settings": self._settings()}
        rows = [self.split.train.tolist(), self.split.validation.tolist(), self.screen.describe().to_json()]
        if self.screen.embedding_pe is not None:
            rows.append(self.screen.embedding_pe.tolist())
        if self.screen.track_n is not None:
            rows.append(self.screen.track_n.tolist())
        return settings_hash({**chosen, "cells": rows}, self.pair, self.dims)

    def _settings(self) -> list[Any]:
        return [self.pair.model_source, self.pair.model_settings, self.pair.guide_settings]

    def save_checkpoint(self) -> None:
        """Write everything that a resumed run needs, at once or not at all."""
        if self.out is None or not self.ranks.is_first:
            return
        state = {
            "hash": self.hash,
            "progress": asdict(self.progress),
            "pair": self.pair.state_dict(),
            "best": self.best_state,
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            atomic_torch_save(state, self.out / "checkpoint.pt")
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint could not be written to {self.out}: {error}. The last one is untouched: "
                "free space, then go on with resume=True"
            ) from error

    def resume(self) -> None:
        """Take up the checkpoint, if there is one.

        Raises:
            CheckpointError: It is damaged, or of other settings, data or code.
        """
        if self.out is None:
            raise CheckpointError("resume needs the run folder; pass out=")
        file = self.out / "checkpoint.pt"
        lacking = not file.exists()
        if self.ranks.any(lacking):
            if not lacking:
                raise CheckpointError(
                    f"{file} is not seen by all processes; out= must be a folder that all machines share"
                )
            return
        state = load_tensors(file, "cpu")
        if state.get("hash") != self.hash:
            raise CheckpointError(
                f"{file} was written with other settings, data or code; a resumed run must be the same run. "
                "Use the settings of the first run, or another folder"
            )
        self.progress = Progress(**state["progress"])
        self.pair.load_state_dict(state["pair"])
        self.best_state = state["best"]
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if state["rng_cuda"] is not None:
            torch.cuda.set_rng_state(state["rng_cuda"], self.device)
        self.engine = self._stage_engine()
        self._end_stage_if_over()

    def result(self) -> Fit:
        """The fit with the best weights so far."""
        if self.progress.stage == "warm start":
            self._hold_gates(False)
        if self.progress.stage != "warm start" and self.progress.best_epoch >= 0:
            self.pair.load_state_dict(self.best_state)
        self.pair.train(False)
        history = pd.DataFrame(self.progress.history)
        history = history.set_index("epoch") if len(history) else history
        return Fit(
            pair=self.pair,
            dims=self.dims,
            screen=self.screen.describe(),
            cells=CellSummary.of(self.screen, self.split.train),
            split=self.split,
            history=history,
            training=asdict(self.training),
            seed=self.seed,
            finished=self.progress.done,
            path=self.out,
        )


def pick_device(device: str) -> torch.device:
    """``"auto"`` is the first GPU, or the CPU.

    Raises:
        TrainingError: The device does not exist here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise TrainingError(f"device {device!r} cannot be used here: {error}; pass device='auto'") from error


def _taken_over(first: Fit, guide: Source | None, screen: Screen, settings: Mapping[str, Any]) -> Pair:
    """A copy of a fit's pair, to be trained further."""
    if guide is not None or settings:
        raise PairError(
            f"a fit brings its guide and its settings; leave out guide= and {sorted(settings)}, or pass the "
            "model's name to begin anew"
        )
    spec = screen.describe()
    for name in ("genes", "targets", "batch_names"):
        if getattr(spec, name) != getattr(first.screen, name):
            raise PairError(
                f"the screen's {name} differ from those that the fit was trained on; open it by "
                "Screen.from_spec(fit.screen, adata)"
            )
    return replace(first.pair, model=copy.deepcopy(first.model), guide=copy.deepcopy(first.guide))


def _describe_targets(pair: Pair, dims: Dims, screen: Screen) -> None:
    """Give the targets' embeddings to the sides that take them."""
    if screen.embedding_pe is None:
        return
    sides: list[Any] = [side for side in (pair.model, pair.guide) if hasattr(side, "embedding_pe")]
    unseen = [t for t, n in zip(screen.targets, screen.dims().target_cells, strict=True) if not n]
    if unseen and not sides:
        raise PairError(
            f"{type(pair.model).__name__} takes no embeddings with these settings, so it cannot predict the "
            f"unseen targets {unseen}; leave out unseen=, or take another model, such as sparse-shift"
        )
    seen_p = seen_targets(dims.n_targets, dims.target_cells)
    embedding_pe = standardised(torch.from_numpy(screen.embedding_pe), seen_p)
    for side in sides:
        side.embedding_pe = embedding_pe.clone()


def _split_of(first: Fit, screen: Screen) -> Split:
    if first.split.train.max(initial=0) >= screen.n_cells:
        raise PairError(f"the fit's split has more cells than the screen's {screen.n_cells}; pass split=")
    return first.split


def _check_needs(model: nn.Module, screen: Screen) -> None:
    needs: set[str] = getattr(model, "needs", set())
    if "time" in needs and screen.time_n is None:
        raise DataError("this model follows cells over time; pass the column of times as time=")
    if "counts" in needs:
        screen.require_counts()
    if "normalised" in needs:
        screen.require_normalised()


def _anchors(asked: Anchors | None, pair: Pair, screen: Screen) -> Anchors | None:
    if not any("control" in getattr(side, "needs", set()) for side in (pair.model, pair.guide)):
        return None
    return asked or ("twin" if screen.has_twins else "batch")


def _check_sites(pair: Pair, batch: Batch, training: Training) -> None:
    """Refuse weights of sites that do not exist, and what the importance-weighted bound cannot do."""
    named = {**training.weights, **training.warmup}
    several = training.particles > 1 or training.refine > 0
    if not named and not several:
        return
    traces = [poutine.trace(program).get_trace(batch) for program in (pair.model, pair.guide)]
    sites = {name: site for trace in traces for name, site in sample_sites(trace).items()}
    strange = sorted(named.keys() - sites.keys())
    if strange:
        raise PairError(f"weights= and warmup= take sites of the pair ({sorted(sites)}), found {strange}")
    if not several:
        return
    asked = f"particles={training.particles}, refine={training.refine}"
    local = {name: site for name, site in sites.items() if is_local(site)}
    weighed = named if training.particles > 1 else training.weights  # refinement follows the warm-up
    joined = sorted(weighed.keys() & local.keys())
    if joined:
        raise TrainingError(
            f"weights= and warmup= of the cells' sites {joined} need particles=1 and refine=0, found "
            f"{asked}: the importance-weighted bound has one term for all of them"
        )
    nested = sorted(name for name, site in local.items() if len(site["cond_indep_stack"]) > 1)
    if nested:
        raise TrainingError(
            f"sites {nested} are in another plate beside the cells', which {asked} does not allow: declare "
            "its dimension by to_event, or train with particles=1 and refine=0"
        )


def _warm_epochs(asked: int | None, pair: Pair, epochs: int | None) -> int:
    able = can_rotate(pair.model, pair.guide)
    if asked and not able:
        raise PairError(
            f"{type(pair.model).__name__} and {type(pair.guide).__name__} cannot be warm-started: with these "
            "settings they have no gates to open; pass warm_start=0"
        )
    if asked is None:
        asked = 25 if able else 0
        asked = asked if epochs is None else min(asked, int(0.4 * epochs))
    if epochs is not None and asked >= epochs:
        raise TrainingError(
            f"expected more epochs than the warm start takes, found epochs={epochs}, warm_start={asked}; "
            "the gates are learned after it. Lower warm_start="
        )
    return asked


def _needed_elbo(pair: Pair, batch: Batch) -> ELBO | None:
    """Stock Pyro where a guide's latent is enumerated or has no pathwise gradient; None where not."""
    trace = poutine.trace(pair.guide).get_trace(batch)
    sites = [s for s in trace.nodes.values() if s["type"] == "sample" and not s["is_observed"]]
    sites = [s for s in sites if type(s["fn"]).__name__ != "_Subsample"]
    if any(s["infer"].get("enumerate") for s in sites):
        return TraceEnum_ELBO(max_plate_nesting=1)
    return None if all(s["fn"].has_rsample for s in sites) else TraceGraph_ELBO()


def _copy(state: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    return {kind: {k: v.detach().clone() for k, v in part.items()} for kind, part in state.items()}


def _seed_all(seed: int) -> None:
    pyro.set_rng_seed(seed)


@contextmanager
def _same_draws(seed: int, device: torch.device) -> Iterator[None]:
    """Draws that depend on the seed alone and leave the outer stream untouched."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def _heard_interrupts() -> Iterator[list[int]]:
    """Ctrl-C is noted, and answered between two steps, where no callback can swallow it.

    A second one stops at once.
    """
    heard: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield heard
        return

    def hear(number: int, _: FrameType | None) -> None:
        if heard:
            raise KeyboardInterrupt
        heard.append(number)

    before = signal.signal(signal.SIGINT, hear)
    try:
        yield heard
    finally:
        signal.signal(signal.SIGINT, before or signal.default_int_handler)


@contextmanager
def _torch_set(threads: int | None, precision: MatmulPrecision) -> Iterator[None]:
    before, precision_before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    if threads is not None:
        torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    torch.set_flush_denormal(True)  # tiny moments of dead units would slow every step several times
    keep_freed_memory()
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_float32_matmul_precision(precision_before)
        torch.set_num_threads(before)
