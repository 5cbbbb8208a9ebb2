"""The predictions that predictives return, one class for each task, from the modules of `stochbn.tasks`."""

from stochbn.metrics.entropies import entropy
from stochbn.tasks.answers import Answer
from stochbn.tasks.classification import Prediction
from stochbn.tasks.multilabel import MultilabelPrediction
from stochbn.tasks.regression import Estimate

__all__ = ["Answer", "Estimate", "MultilabelPrediction", "Prediction", "entropy"]
