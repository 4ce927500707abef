"""Template of a guide. Copy it beside your model; ``fit("my_model.py:...", "my_guide.py:...", ...)``."""

import pyro
import pyro.distributions as dist
from pyro.nn import PyroModule

from pyro_causalcell.batch import Batch
from pyro_causalcell.nets import Encoder

__all__ = ["TemplateGuide"]


class TemplateGuide(PyroModule):
    """q(z | x): an encoder gives each cell a diagonal normal.

    Args:
        n_genes: Size of the screen.
        n_latents: As in the model; ``fit(..., n_latents=5)`` sets both.
        n_hidden: Width of the encoder's two hidden layers.
    """

    def __init__(self, n_genes: int, *, n_latents: int = 10, n_hidden: int = 128):
        super().__init__()
        self.encoder = Encoder(n_genes, n_latents, n_hidden=n_hidden)  # takes log(1 + x) itself

    def forward(self, batch: Batch) -> None:
        """Draw every latent of the model, under its name and inside the same plates."""
        # Latents of the whole screen go here: pyro.sample("name", a distribution with PyroParam arguments).

        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            loc_nk, scale_nk = self.encoder(batch.x_ng)
            pyro.sample("z", dist.Normal(loc_nk, scale_nk).to_event(1))  # q(z | x)
