"""Distributions over the statistics of all batch-norm layers of a network, one kind in each module.

`stochbn.fit` adds mini-batches to an accumulator, which makes the posterior. If several processes observe mini-batches,
each has its own accumulator. Merged in any order, they make the posterior of all::

    accumulator = KINDS["joint"].accumulator(max_batches=512)
    accumulator.update({"bn1": statistics})           # [calls, 2, C], for every mini-batch
    posterior = accumulator.merge(other).posterior(batch_size=16)
"""

from __future__ import annotations

import inspect
from typing import Any

from stochbn.posteriors.accumulators import Accumulator
from stochbn.posteriors.base import TINY, Posterior
from stochbn.posteriors.checks import check_draws
from stochbn.posteriors.empirical import Empirical
from stochbn.posteriors.factorized import Factorized
from stochbn.posteriors.factorized_log import FactorizedLog
from stochbn.posteriors.joint import Joint
from stochbn.posteriors.saved import from_pretrained, load

__all__ = [
    "KINDS",
    "TINY",
    "Accumulator",
    "Empirical",
    "Factorized",
    "FactorizedLog",
    "Joint",
    "Posterior",
    "check_draws",
    "from_pretrained",
    "load",
    "make_accumulator",
]

KINDS: dict[str, type[Posterior]] = {cls.kind: cls for cls in (Factorized, FactorizedLog, Joint, Empirical)}
"""Every kind of posterior by its name."""


def make_accumulator(kind: str, **options: Any) -> Accumulator[Any]:
    """What mini-batches are added to for a posterior of a kind.

    Args:
        kind: a name in `KINDS`.
        options: of this kind, or of others, which are ignored: so one call serves several kinds.

    Raises:
        TypeError, ValueError: there is no such kind or option, or the kind cannot have this value of it.
    """
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; there are {', '.join(map(repr, KINDS))}")
    known = {name: inspect.signature(one.accumulator).parameters for name, one in KINDS.items()}
    if odd := options.keys() - {option for each in known.values() for option in each}:
        raise TypeError(f"fit() got an unexpected keyword argument {min(odd)!r}")
    return KINDS[kind].accumulator(**{name: value for name, value in options.items() if name in known[kind]})
