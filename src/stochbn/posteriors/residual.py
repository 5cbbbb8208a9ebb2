"""Residual variances of posteriors, which hold for the noise and the centre that they were fitted with."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from stochbn.caller import warn
from stochbn.posteriors.thresholds import is_centre, sums_of_centre
from stochbn.tasks.residual import Residual

if TYPE_CHECKING:
    from torch import Tensor

    from stochbn.posteriors.base import Posterior

__all__ = ["residual_still_valid", "with_residual"]


def with_residual(posterior: Posterior, parts: Tensor, examples: int) -> Posterior:
    """Return the posterior with a residual variance, see `stochbn.tasks.residual.Residual`."""
    found = Residual(parts, examples, posterior.batch_size, sums_of_centre(posterior))
    return replace(posterior, residual_variance=found)


def residual_still_valid(posterior: Posterior) -> Residual | None:
    """The residual variance of a posterior; None, with a warning, if its noise or centre has changed.

    Raises:
        TypeError: it is not a residual variance.
    """
    found = posterior.residual_variance
    if found is not None and not isinstance(found, Residual):
        raise TypeError(
            f"residual_variance must be a Residual or None, got {type(found).__name__}; see stochbn.calibrate"
        )
    if found is None or (found.batch_size == posterior.batch_size and is_centre(found.centre, posterior)):
        return found
    warn(
        "the residual variance of the posterior does not hold for another noise or centre, and was dropped, so that "
        "total_std is not known: fit it again with 'stochbn calibrate', or stochbn.calibrate(task=\"regression\")"
    )
    return None
