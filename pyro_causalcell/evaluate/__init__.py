"""How good a fit is: likelihood with diagnostics, recovery of a truth, predictive checks, ArviZ."""

from pyro_causalcell.evaluate.likelihood import interventional_nll, iw_nll
from pyro_causalcell.evaluate.recovery import Matching, matching, recovery, reliability, top_two_graph, udr

__all__ = [
    "Matching",
    "interventional_nll",
    "iw_nll",
    "matching",
    "recovery",
    "reliability",
    "top_two_graph",
    "udr",
]
