"""What a fit says about cells and perturbations, measured or not."""

from pyro_causalcell.predict.cells import latents, predict, replicate
from pyro_causalcell.predict.effects import effects
from pyro_causalcell.predict.globals import (
    edge_names,
    global_draws,
    global_means,
    graph,
    mechanism_graph,
    programme_names,
)

__all__ = [
    "edge_names",
    "effects",
    "global_draws",
    "global_means",
    "graph",
    "latents",
    "mechanism_graph",
    "predict",
    "programme_names",
    "replicate",
]
