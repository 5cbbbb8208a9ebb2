"""What predictives return, for every task: see its module in `stochbn.tasks`."""

from stochbn.tasks.answers import Answer, entropy
from stochbn.tasks.classification import Prediction
from stochbn.tasks.multilabel import MultilabelPrediction
from stochbn.tasks.regression import Estimate

__all__ = ["Answer", "Estimate", "MultilabelPrediction", "Prediction", "entropy"]
