"""Small predictors that must always be beaten, other people's predictions, and their comparison."""

from pyro_causalcell.baselines.compare import (
    Comparison,
    Recipe,
    average_conditions,
    compare,
    make_folds,
    score_predictors,
)
from pyro_causalcell.baselines.duplicates import InterpolatedDuplicate, TechnicalDuplicate
from pyro_causalcell.baselines.fitted import ModelPredictor, Oracle
from pyro_causalcell.baselines.gears import GEARS
from pyro_causalcell.baselines.means import (
    TrainingMeans,
    condition_means,
    halves,
    log_cp10k,
    training_means,
)
from pyro_causalcell.baselines.outside import PredictionsFile
from pyro_causalcell.baselines.predictors import (
    Additive,
    Baseline,
    CellPredictor,
    ControlMean,
    MatchingMean,
    PerturbedMean,
    Predictor,
    TimeMatchedMean,
    fit_baselines,
)
from pyro_causalcell.baselines.regressions import (
    ElasticNetOnTargets,
    RidgeOnEmbeddings,
    pca_embedding,
    random_embedding,
)

__all__ = [
    "GEARS",
    "Additive",
    "Baseline",
    "CellPredictor",
    "Comparison",
    "ControlMean",
    "ElasticNetOnTargets",
    "InterpolatedDuplicate",
    "MatchingMean",
    "ModelPredictor",
    "Oracle",
    "PerturbedMean",
    "PredictionsFile",
    "Predictor",
    "Recipe",
    "RidgeOnEmbeddings",
    "TechnicalDuplicate",
    "TimeMatchedMean",
    "TrainingMeans",
    "average_conditions",
    "compare",
    "condition_means",
    "fit_baselines",
    "halves",
    "log_cp10k",
    "make_folds",
    "pca_embedding",
    "random_embedding",
    "score_predictors",
    "training_means",
]
