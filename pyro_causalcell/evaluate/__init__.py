"""How good a fit is: likelihood with diagnostics, recovery of a truth, predictive checks, ArviZ."""

from pyro_causalcell.evaluate.checks import check, check_gene_means, posterior_predictive_checks
from pyro_causalcell.evaluate.idata import to_inference_data
from pyro_causalcell.evaluate.likelihood import interventional_nll, iw_nll
from pyro_causalcell.evaluate.recovery import Matching, matching, recovery, reliability, top_two_graph, udr

__all__ = [
    "Matching",
    "check",
    "check_gene_means",
    "interventional_nll",
    "iw_nll",
    "matching",
    "posterior_predictive_checks",
    "recovery",
    "reliability",
    "to_inference_data",
    "top_two_graph",
    "udr",
]
