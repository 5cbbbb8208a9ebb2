"""Calibrated uncertainty for trained, batch-normalised PyTorch networks.

Stochastic Batch Normalization (Atanov et al., 2018, arXiv 1802.04893)::

    posterior = stochbn.fit(model, train_loader)
    predictive = stochbn.Predictive(model, posterior, draws=50)
    prediction = predictive(x)
    prediction.probs, prediction.entropy, prediction.mutual_information
"""

from __future__ import annotations

import importlib
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stochbn import augment, conformal, deploy, export, metrics, shift
    from stochbn.augmentation_choice import choose_augmentation
    from stochbn.calibration import calibrate
    from stochbn.execution import Settings
    from stochbn.fitting import fit
    from stochbn.posteriors import Empirical, Factorized, FactorizedLog, Joint, Posterior, from_pretrained, load
    from stochbn.predictions import Estimate, MultilabelPrediction, Prediction
    from stochbn.predictive import Ensemble, Exact, MCDropout, Predictive, snapshots
    from stochbn.shift import adapt
    from stochbn.tasks import Task

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
    "Task",
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

_HOMES = {
    "stochbn.calibration": ("calibrate",),
    "stochbn.execution": ("Settings",),
    "stochbn.fitting": ("fit",),
    "stochbn.augmentation_choice": ("choose_augmentation",),
    "stochbn.posteriors": ("Empirical", "Factorized", "FactorizedLog", "Joint", "Posterior", "from_pretrained", "load"),
    "stochbn.predictions": ("Estimate", "MultilabelPrediction", "Prediction"),
    "stochbn.predictive": ("Ensemble", "Exact", "MCDropout", "Predictive", "snapshots"),
    "stochbn.shift": ("adapt",),
    "stochbn.tasks": ("Task",),
}
"""The modules of the public names, imported at first use, so that the command line's help starts quickly."""


_LOCK = threading.RLock()
"""Only one thread imports at a time, because two threads could import modules that need each other in a deadlock."""


def __getattr__(name: str) -> Any:
    home = next((home for home, names in _HOMES.items() if name in names), f"stochbn.{name}")
    if not name.isidentifier() or name.startswith("_"):
        raise AttributeError(f"module 'stochbn' has no attribute {name!r}")
    with _LOCK:
        try:
            found = importlib.import_module(home)
        except ModuleNotFoundError as error:
            if error.name != home:
                raise
            raise AttributeError(f"module 'stochbn' has no attribute {name!r}") from error
    if home == f"stochbn.{name}":
        return found
    globals()[name] = value = getattr(found, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
