"""Predictive distributions: with drawn statistics, with dropout left on, by exact inference, and of ensembles."""

from stochbn.predictive.dropout import MCDropout
from stochbn.predictive.ensemble import Ensemble
from stochbn.predictive.exact import Exact
from stochbn.predictive.predictive import Predictive, Predictor
from stochbn.predictive.snapshots import snapshots

__all__ = ["Ensemble", "Exact", "MCDropout", "Predictive", "Predictor", "snapshots"]
