"""Amortised guide of the Discrepancy-VAE; with gene sets, that of SENA."""

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule

from pyro_causalcell.batch import Batch
from pyro_causalcell.distributions import Likelihood
from pyro_causalcell.nets import MLP, Activation, Encoder, JoinedLinear, MaskedLinear, Norm

__all__ = ["DiscrepancyVAEGuide"]


class DiscrepancyVAEGuide(PyroModule):
    r"""q(z | x): an encoder, trained on control cells alone.

    With ``gene_sets`` the first layer of the encoder has one unit for each set of genes, as SENA has it:

    .. math::
        h_{ns} = \textstyle\sum_g W_{sg} M_{sg}\, x_{ng} + c_s, \qquad
        M_{sg} = 1 \text{ if } g \in s, \text{ else } \lambda

    It is then the only hidden layer, so that z is a sum over gene sets.

    Args:
        n_genes, n_batches: Sizes of the screen.
        n_latents, likelihood: As in the model.
        gene_sets: Columns of the genes of each set; ``data.gene_sets`` reads them from a GMT file.
        leak: λ: multiplier of genes outside a set; 0 shuts them out.
        n_hidden, n_layers: of the encoder; the gene sets take their place.
        norm, dropout, activation: of the encoder.

    Source: Zhang et al., NeurIPS 2023, section 5; SENA: de la Fuente et al., ICLR 2025, section 3.
    """

    def __init__(
        self,
        n_genes: int,
        n_batches: int = 0,
        *,
        n_latents: int = 10,
        likelihood: Likelihood = "nb",
        gene_sets: Sequence[Sequence[int]] = (),
        leak: float = 0.1,
        n_hidden: int = 128,
        n_layers: int = 1,
        norm: Norm = "none",
        dropout: float = 0.0,
        activation: Activation = "leaky_relu",
    ):
        super().__init__()
        self.encoder = Encoder(
            n_genes,
            n_latents,
            n_batches,
            log_input=likelihood != "gaussian",
            n_hidden=len(gene_sets) or n_hidden,
            n_layers=1 if gene_sets else n_layers,
            norm=norm,
            dropout=dropout,
            activation=activation,
        )
        if gene_sets:
            mask_sg = torch.full((len(gene_sets), n_genes), leak)
            for s, genes in enumerate(gene_sets):
                if not genes or min(genes) < 0 or max(genes) >= n_genes:
                    raise ValueError(f"gene set {s} must hold columns from 0 to {n_genes - 1}, found {genes}")
                mask_sg[s, list(genes)] = 1.0
            assert isinstance(self.encoder.hidden, MLP)
            layers = self.encoder.hidden.layers
            if isinstance(layers[0], JoinedLinear):  # batch columns belong to no set
                layers[0].first = MaskedLinear(mask_sg)
            else:
                layers[0] = MaskedLinear(mask_sg)

    def forward(self, batch: Batch) -> None:
        """q(z | x) of the control cell in training, of the cell itself elsewhere."""
        cells = batch.control or batch
        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            loc_nk, scale_nk = self.encoder(cells.x_ng, cells.batch_nb)
            pyro.sample("z", dist.Normal(loc_nk, scale_nk).to_event(1))
