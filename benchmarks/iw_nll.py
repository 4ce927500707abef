"""Time of importance-weighted evaluation, against a loop written by hand and a loop over torch's NB.

The VAE of the family scores cells with draws from its guide. Three ways take turns on the same cells:

* hand-written: one cell at a time, its particles in chunks, terms in x and θ taken out of the loop, values
  overwritten in place, ``logaddexp`` over chunks;
* iw_nll: ``Proposal`` with the guide as proposal, as ``iw_nll(n_rounds=0)`` uses it;
* torch: the same pair, with ``torch.distributions.NegativeBinomial``.

Times are CPU time on one thread, after a first round that does not count. ``iw_nll`` takes 16 cells of 1,000
genes at a time; the full size (1,000 cells) takes as many times longer as there are cells.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from step_time import Setting, build
from torch import Tensor

from pyro_causalcell.batch import Batch
from pyro_causalcell.evaluate.likelihood import Proposal
from pyro_causalcell.guides.sparse_shift import SparseShiftGuide
from pyro_causalcell.models.sparse_shift import SparseShift

CHUNK = 250
"""Particles of one cell that the loop written by hand takes at once."""


def hand_written(model: SparseShift, guide: SparseShiftGuide, batch: Batch, n_particles: int) -> Tensor:
    """log p(x) of each cell, for closed gates and NB counts."""
    assert batch.x_ng is not None
    loc_nk, scale_nk = guide.encoder(batch.x_ng, batch.batch_nb, torch.zeros(batch.n_cells, model.n_latents))
    theta_g: Tensor = model.theta_g
    x_ng = batch.x_ng.double()
    wide_g = theta_g.double()
    count_n = torch.lgamma(x_ng + wide_g) - torch.lgamma(wide_g) - torch.lgamma(x_ng + 1)
    count_n = (count_n.sum(1) + (wide_g * wide_g.log()).sum()).float()
    results = []
    for n in range(batch.n_cells):
        x_g, total = batch.x_ng[n], theta_g + batch.x_ng[n]
        log_library, library = batch.library_n1[n].log(), batch.x_ng[n].sum()
        found = torch.tensor(-torch.inf)
        for _ in range(n_particles // CHUNK):
            noise_sk = torch.randn(CHUNK, model.n_latents)
            z_sk = loc_nk[n] + scale_nk[n] * noise_sk
            logit_sg = model.decoder(z_sk, batch.batch_nb[n])
            shift_s1 = log_library - logit_sg.logsumexp(1, keepdim=True)
            linear_s = logit_sg @ x_g + shift_s1.squeeze(1) * library
            log_sum_sg = logit_sg.add_(shift_s1).exp_().add_(theta_g).log_()
            log_weight_s = linear_s - log_sum_sg @ total + count_n[n]
            prior_s = ((noise_sk**2 - z_sk**2) / 2 + scale_nk[n].log()).sum(1)
            found = torch.logaddexp(found, (log_weight_s + prior_s).logsumexp(0))
        results.append(found)
    return torch.stack(results) - np.log(n_particles)


def streamed(model: SparseShift, guide: SparseShiftGuide, batch: Batch, n_particles: int) -> Tensor:
    """The same by ``Proposal``."""
    particles = Proposal(model, guide, batch, batch).particles(n_particles)
    chunks = (weight_sn.logsumexp(0) for weight_sn, _ in particles)
    return torch.stack(list(chunks)).logsumexp(0) - np.log(n_particles)


class ByTorch(SparseShift):
    """The same model with torch's negative binomial."""

    def measurement(self, z_nk: Tensor, batch: Batch) -> dist.TorchDistribution:
        """p(x | z)."""
        log_mean_ng = batch.library_n1.log() + self.decoder(z_nk, batch.batch_nb).log_softmax(-1)
        return dist.NegativeBinomial(self.theta_g, logits=log_mean_ng - self.theta_g.log())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=int, default=16)
    parser.add_argument("--genes", type=int, default=1000)
    parser.add_argument("--particles", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    pyro.enable_validation(False)
    setting = Setting("sparse-shift", given.cells, given.genes, "nb", 100, 15, 128, seed=0)
    model, guide, batch = build(setting, gates="closed")
    by_torch = ByTorch(given.genes, 100, n_latents=15, gates="closed")
    by_torch.load_state_dict(model.state_dict())
    for module in (model, guide, by_torch):
        module.train(False)
        for name, parameter in module.named_parameters():  # nearly even weights: comparable
            if name.startswith(("decoder.output", "encoder.loc", "encoder.log_scale")):
                parameter.data.mul_(0.01)
    ways: dict[str, Callable[[], Tensor]] = {
        "hand-written": lambda: hand_written(model, guide, batch, given.particles),
        "iw_nll": lambda: streamed(model, guide, batch, given.particles),
        "torch": lambda: streamed(by_torch, guide, batch, given.particles),
    }
    times = np.zeros((given.rounds, len(ways)))
    found: dict[str, Tensor] = {}
    with torch.inference_mode(), poutine.block():
        for way in ways.values():
            way()
        for r in range(given.rounds):
            for i, (name, way) in enumerate(ways.items()):
                start = time.process_time()
                found[name] = way()
                times[r, i] = time.process_time() - start
    errors = {name: float((value - found["iw_nll"]).abs().max()) for name, value in found.items()}
    ratios = np.quantile(times / times[:, :1], [0.25, 0.5, 0.75], axis=0)
    size = f"{given.cells} cells x {given.particles} particles x {given.genes} genes"
    print(f"{size}: share of hand-written, median [quartiles] of {given.rounds} rounds")
    for i, name in enumerate(ways):
        per_second = given.cells * given.particles / np.median(times[:, i])
        low, middle, high = ratios[:, i]
        gap = f"largest gap to iw_nll {errors[name]:.2f} nats"
        print(f"  {name:<13} {middle:5.2f} [{low:.2f}, {high:.2f}] {per_second:8.0f} particle-cells/s, {gap}")


if __name__ == "__main__":
    main()
