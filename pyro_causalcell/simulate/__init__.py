"""Simulators with known truth."""

from pyro_causalcell.simulate.oracle import oracle_nll
from pyro_causalcell.simulate.sparse_shift import expected_counts, out_of_domain, sparse_shift

__all__ = ["expected_counts", "oracle_nll", "out_of_domain", "sparse_shift"]
