"""What a fit says about cells and perturbations, measured or not."""

from pyro_causalcell.predict.cells import latents, predict, replicate
from pyro_causalcell.predict.effects import effects
from pyro_causalcell.predict.globals import (
    direct_effects,
    edge_names,
    global_draws,
    global_means,
    graph,
    lagged_graph,
    mechanism_graph,
    programme_names,
)
from pyro_causalcell.predict.trajectories import cell_trajectories, trajectories

__all__ = [
    "cell_trajectories",
    "direct_effects",
    "edge_names",
    "effects",
    "global_draws",
    "global_means",
    "graph",
    "lagged_graph",
    "latents",
    "mechanism_graph",
    "predict",
    "programme_names",
    "replicate",
    "trajectories",
]
