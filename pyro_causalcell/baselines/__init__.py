"""Small predictors that must always be beaten, and the scores of predicted means."""

from pyro_causalcell.baselines.compare import (
    average_conditions,
    compare_means,
    other_genes,
    pearson_of_effects,
    rmse,
)
from pyro_causalcell.baselines.means import (
    TrainingMeans,
    condition_means,
    log_cp10k,
    technical_duplicate,
    training_means,
)
from pyro_causalcell.baselines.predictors import (
    Additive,
    Baseline,
    ControlMean,
    MatchingMean,
    PerturbedMean,
    fit_baselines,
)

__all__ = [
    "Additive",
    "Baseline",
    "ControlMean",
    "MatchingMean",
    "PerturbedMean",
    "TrainingMeans",
    "average_conditions",
    "compare_means",
    "condition_means",
    "fit_baselines",
    "log_cp10k",
    "other_genes",
    "pearson_of_effects",
    "rmse",
    "technical_duplicate",
    "training_means",
]
