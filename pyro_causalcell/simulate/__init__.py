"""Simulators with known truth."""

from pyro_causalcell.simulate.decoder import expected_counts
from pyro_causalcell.simulate.latent_scm import latent_scm, rotated_scm
from pyro_causalcell.simulate.oracle import oracle_nll
from pyro_causalcell.simulate.renderer import FACTORS, SHAPES, render
from pyro_causalcell.simulate.scenes import BLOCKS, scenes, write_scenes
from pyro_causalcell.simulate.screen import combination_screen, screen_cells
from pyro_causalcell.simulate.sparse_shift import out_of_domain, sparse_shift
from pyro_causalcell.simulate.temporal_scm import linear_snapshots, temporal_cells, temporal_scm

__all__ = [
    "BLOCKS",
    "FACTORS",
    "SHAPES",
    "combination_screen",
    "expected_counts",
    "latent_scm",
    "linear_snapshots",
    "oracle_nll",
    "out_of_domain",
    "render",
    "rotated_scm",
    "scenes",
    "screen_cells",
    "sparse_shift",
    "temporal_cells",
    "temporal_scm",
    "write_scenes",
]
