"""One self-contained HTML page about a fit, for a lab meeting."""

from pyro_causalcell.report.comparison import write_comparison
from pyro_causalcell.report.write import write_report

__all__ = ["write_comparison", "write_report"]
