"""Calibrated uncertainty for trained, batch-normalised PyTorch networks.

Stochastic Batch Normalization (Atanov et al., 2018, arXiv 1802.04893)::

    posterior = stochbn.fit(model, train_loader)
    predictive = stochbn.Predictive(model, posterior, draws=50)
    prediction = predictive(x)
    prediction.probs, prediction.entropy, prediction.mutual_information
"""

from stochbn import augment, conformal, deploy, export, metrics, shift
from stochbn.calibration import calibrate
from stochbn.execution import Settings
from stochbn.fitting import fit
from stochbn.policy import choose_augmentation
from stochbn.posteriors import Empirical, Factorized, FactorizedLog, Joint, Posterior, load
from stochbn.predictions import Estimate, MultilabelPrediction, Prediction
from stochbn.predictive import Ensemble, Exact, MCDropout, Predictive, snapshots
from stochbn.sharing import from_pretrained
from stochbn.shift import adapt

__all__ = [
    "Empirical",
    "Ensemble",
    "Estimate",
    "Exact",
    "Factorized",
    "FactorizedLog",
    "Joint",
    "MCDropout",
    "MultilabelPrediction",
    "Posterior",
    "Prediction",
    "Predictive",
    "Settings",
    "adapt",
    "augment",
    "calibrate",
    "choose_augmentation",
    "conformal",
    "deploy",
    "export",
    "fit",
    "from_pretrained",
    "load",
    "metrics",
    "shift",
    "snapshots",
]

__version__ = "0.1.0"
