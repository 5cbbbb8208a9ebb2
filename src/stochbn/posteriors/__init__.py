"""Distributions over the statistics of all batch-norm layers of a network: a module a kind."""

from __future__ import annotations

import os

import torch

from stochbn.files import read_tensors
from stochbn.posteriors.accumulators import Accumulator
from stochbn.posteriors.base import FORMAT, TINY, Posterior, check_draws
from stochbn.posteriors.empirical import Empirical
from stochbn.posteriors.factorized import Factorized
from stochbn.posteriors.joint import Joint

__all__ = ["KINDS", "TINY", "Accumulator", "Empirical", "Factorized", "Joint", "Posterior", "check_draws", "load"]

KINDS: dict[str, type[Posterior]] = {cls.kind: cls for cls in (Factorized, Joint, Empirical)}
"""Every kind of posterior by its name."""


def load(path: str | os.PathLike[str]) -> Posterior:
    """Load a posterior that was saved with its ``save``; nothing in the file is executed.

    Names and shapes are checked against a network where the two first meet, in `Predictive`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, corrupt, not a posterior, or of another format version; the message says which.
    """
    tensors, about = read_tensors(path, FORMAT)
    try:
        if about["kind"] not in KINDS:
            known = ", ".join(map(repr, KINDS))
            raise ValueError(f"its kind is {about['kind']!r}, this release of stochbn knows {known}")
        kind = KINDS[about.pop("kind")]
        about |= {"layers": dict(about["layers"]), "skipped": tuple(about["skipped"])}
        about |= {"dtype": getattr(torch, about["dtype"]), **{name: tensors[name] for name in kind._tensors()}}
        return kind(**about)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is not a usable posterior: {error}") from error
