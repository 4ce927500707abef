"""Training: pairs, the ELBO, ``fit``, run folders, warm starts."""

from pyro_causalcell.inference.elbo import SiteWeights, elbo_terms
from pyro_causalcell.inference.fitted import Fit
from pyro_causalcell.inference.pair import Pair, build_pair, check_pair
from pyro_causalcell.inference.training import fit
from pyro_causalcell.inference.warm_start import block_rotation, sparse_rotation

__all__ = [
    "Fit",
    "Pair",
    "SiteWeights",
    "block_rotation",
    "build_pair",
    "check_pair",
    "elbo_terms",
    "fit",
    "sparse_rotation",
]
