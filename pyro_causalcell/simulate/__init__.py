"""Simulators with known truth."""

from pyro_causalcell.simulate.decoder import expected_counts
from pyro_causalcell.simulate.latent_scm import latent_scm, rotated_scm
from pyro_causalcell.simulate.oracle import oracle_nll
from pyro_causalcell.simulate.screen import combination_screen, screen_cells
from pyro_causalcell.simulate.sparse_shift import out_of_domain, sparse_shift

__all__ = [
    "combination_screen",
    "expected_counts",
    "latent_scm",
    "oracle_nll",
    "out_of_domain",
    "rotated_scm",
    "screen_cells",
    "sparse_shift",
]
