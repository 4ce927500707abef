"""Figures: functions of tables and arrays that return a matplotlib Figure and change no global state."""

from pyro_causalcell.plot.blocks import block_maps
from pyro_causalcell.plot.calibration import coverage, pit, predictive_statistics, risk_coverage, sbc_ranks
from pyro_causalcell.plot.checks import pareto_k, predictive_checks, reliability
from pyro_causalcell.plot.comparison import calibrated_scores, compare_methods, study_table
from pyro_causalcell.plot.effects import effect_intervals
from pyro_causalcell.plot.graph import graph_heatmap, order_graph, top_genes
from pyro_causalcell.plot.interpret import interaction_map, signature_heatmap
from pyro_causalcell.plot.over_time import (
    effects_over_time,
    lagged_graph,
    time_embedding,
    trajectories,
)
from pyro_causalcell.plot.style import DIVERGING, OKABE_ITO, style
from pyro_causalcell.plot.training import training_curve

__all__ = [
    "DIVERGING",
    "OKABE_ITO",
    "block_maps",
    "calibrated_scores",
    "compare_methods",
    "coverage",
    "effect_intervals",
    "effects_over_time",
    "graph_heatmap",
    "interaction_map",
    "lagged_graph",
    "order_graph",
    "pareto_k",
    "pit",
    "predictive_checks",
    "predictive_statistics",
    "reliability",
    "risk_coverage",
    "sbc_ranks",
    "signature_heatmap",
    "study_table",
    "style",
    "time_embedding",
    "top_genes",
    "training_curve",
    "trajectories",
]
