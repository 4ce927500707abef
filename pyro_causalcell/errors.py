"""Errors a user can act on. Each message says what was expected, what was found, and the fix."""

__all__ = ["CausalCellError", "CheckpointError", "DataError", "PairError", "PredictionError", "TrainingError"]


class CausalCellError(Exception):
    """Base of every error this package raises on purpose. The command line turns it into exit code 2."""


class DataError(CausalCellError):
    """The data, or the names of its columns, cannot be used as asked."""


class PairError(CausalCellError):
    """A model and a guide do not fit each other or the data."""


class TrainingError(CausalCellError):
    """Training cannot go on: a loss that is not finite, for example."""


class CheckpointError(CausalCellError):
    """A run folder is missing, damaged, of a newer version, or of another model."""


class PredictionError(CausalCellError):
    """A prediction was asked for that the fit cannot give."""
