"""Scores of predictions: for class probabilities (`classification`), and for other tasks (`others`)."""

from stochbn.metrics.classification import (
    BINS,
    calibrated_nll,
    calibrated_nll_of_each,
    checked_predictions,
    checked_probabilities,
    deep_ensemble_equivalent,
    entropy_cdf,
    evaluate,
    nll_of_each,
    ood,
    risk_coverage,
)
from stochbn.metrics.others import (
    class_ece,
    crps_of_each,
    gaussian_nll_of_each,
    multilabel,
    pinball,
    pinball_of_each,
    regression,
)

__all__ = [
    "BINS",
    "calibrated_nll",
    "calibrated_nll_of_each",
    "checked_predictions",
    "checked_probabilities",
    "class_ece",
    "crps_of_each",
    "deep_ensemble_equivalent",
    "entropy_cdf",
    "evaluate",
    "gaussian_nll_of_each",
    "multilabel",
    "nll_of_each",
    "ood",
    "pinball",
    "pinball_of_each",
    "regression",
    "risk_coverage",
]
