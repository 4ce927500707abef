"""Small predictors that must always be beaten, other people's predictions, and their comparison."""

from pyro_causalcell.baselines.cellot import CellOT
from pyro_causalcell.baselines.compare import (
    Comparison,
    Recipe,
    average_conditions,
    compare,
    make_folds,
    score_predictors,
)
from pyro_causalcell.baselines.counts import RATES, CountBaseline
from pyro_causalcell.baselines.duplicates import InterpolatedDuplicate, TechnicalDuplicate
from pyro_causalcell.baselines.fitted import ModelPredictor, Oracle, TimeModelPredictor, log_expression
from pyro_causalcell.baselines.gears import GEARS
from pyro_causalcell.baselines.lfads import LFADS
from pyro_causalcell.baselines.means import (
    TrainingMeans,
    condition_means,
    halves,
    log_cp10k,
    training_means,
)
from pyro_causalcell.baselines.outside import PredictionsFile, TimePredictionsFile
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
from pyro_causalcell.baselines.renge import RENGE
from pyro_causalcell.baselines.residuals import WithResiduals
from pyro_causalcell.baselines.scnode import ScNODE
from pyro_causalcell.baselines.temporal import (
    AdditiveInTime,
    DuplicateInTime,
    LinearInTime,
    MeanAtTime,
    NoChange,
    RegressionInTime,
    Snapshots,
    TargetFeatures,
    TimeBaseline,
    TimeCellPredictor,
    TimeMatchedControl,
    TimePredictor,
    snapshots,
)
from pyro_causalcell.baselines.temporal_compare import TimeRecipe, compare_times, time_references

__all__ = [
    "GEARS",
    "LFADS",
    "RATES",
    "RENGE",
    "Additive",
    "AdditiveInTime",
    "Baseline",
    "CellOT",
    "CellPredictor",
    "Comparison",
    "CountBaseline",
    "ControlMean",
    "DuplicateInTime",
    "ElasticNetOnTargets",
    "InterpolatedDuplicate",
    "LinearInTime",
    "MatchingMean",
    "MeanAtTime",
    "ModelPredictor",
    "NoChange",
    "Oracle",
    "PerturbedMean",
    "PredictionsFile",
    "Predictor",
    "Recipe",
    "RegressionInTime",
    "RidgeOnEmbeddings",
    "ScNODE",
    "Snapshots",
    "TargetFeatures",
    "TechnicalDuplicate",
    "TimeBaseline",
    "TimeCellPredictor",
    "TimeMatchedControl",
    "TimeMatchedMean",
    "TimeModelPredictor",
    "TimePredictionsFile",
    "TimePredictor",
    "TimeRecipe",
    "TrainingMeans",
    "WithResiduals",
    "average_conditions",
    "compare",
    "compare_times",
    "condition_means",
    "fit_baselines",
    "halves",
    "log_cp10k",
    "log_expression",
    "make_folds",
    "pca_embedding",
    "random_embedding",
    "score_predictors",
    "snapshots",
    "time_references",
    "training_means",
]
