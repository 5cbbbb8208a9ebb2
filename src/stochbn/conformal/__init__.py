"""Prediction sets and intervals that hold the truth as often as asked for, by held-out data.

This is split conformal prediction. A score says how badly a label, or a number, fits a prediction. Its quantile over
held-out examples is the threshold: what scores no higher is in the set. If held-out and new examples are exchangeable,
sets hold the truth of new examples with at least the coverage asked for, whatever the network::

    sets = stochbn.conformal.aps(predictive(held_out).probs, labels, coverage=0.9)
    sets(predictive(x).probs)                                   # [N, K], true for the classes in each example's set

Each method is a module: `lac`, `aps`, `raps` and `saps` for classes, `crc` for labels and masks, `intervals` and `cqr`
for numbers, and `aci` for a stream whose labels arrive later. Calibrate noise and temperature on other data than these
held-out examples.
"""

from stochbn.conformal.aci import Online, aci
from stochbn.conformal.aps import aps
from stochbn.conformal.base import Rule
from stochbn.conformal.cqr import QuantileIntervals, cqr
from stochbn.conformal.crc import LabelSets, Tally, crc
from stochbn.conformal.evaluation import evaluate
from stochbn.conformal.intervals import Intervals, intervals
from stochbn.conformal.lac import lac
from stochbn.conformal.raps import raps
from stochbn.conformal.saps import saps
from stochbn.conformal.sets import Sets

__all__ = [
    "Intervals",
    "LabelSets",
    "Online",
    "QuantileIntervals",
    "Rule",
    "Sets",
    "Tally",
    "aci",
    "aps",
    "cqr",
    "crc",
    "evaluate",
    "intervals",
    "lac",
    "raps",
    "saps",
]
