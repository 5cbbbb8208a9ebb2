"""Thresholds of prediction sets, and the posterior that they belong to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stochbn.caller import warn
from stochbn.conformal import Intervals, LabelSets, QuantileIntervals, Rule, Sets
from stochbn.conformal.base import is_number
from stochbn.posteriors.adaptation import UNUSUAL

if TYPE_CHECKING:
    from stochbn.posteriors.base import Posterior

__all__ = ["AGAIN", "Thresholds", "compare_draws", "dropped", "is_centre", "still_valid", "sums_of_centre"]

AGAIN = "'stochbn conformal --held-out DATA', or stochbn.conformal and posterior.with_sets"
"""How to compute thresholds again, for messages."""
KINDS: Mapping[str, type[Rule]] = {one.kind: one for one in (Sets, LabelSets, Intervals, QuantileIntervals)}
"""The rules that a file can contain, by their names in it."""
LATER: Mapping[str, Any] = {"kind": Sets.kind, "by": None, "groups": []}
"""Fields that old files lack, and their defaults."""


@dataclass(frozen=True, eq=False)
class Thresholds:
    """Prediction sets of a posterior, as ``posterior.thresholds``.

    Attributes:
        sets: turns predictions into sets or intervals, see `stochbn.conformal`.
        examples: the number of held-out examples; None if it is not known.
        draws: the number of draws of their predictions; None if it is not known.
        augment: the augmentation of these draws, as text such as ``"flip"``; None for none.
        temperature: the temperature of the posterior.
        batch_size: the mini-batch size of the posterior's noise.
        centre: weighted sums of the posterior's expected means and variances, which identify its centre.
        by: for sets by group, the column or array of the groups; None for others.
        adapted: whether the posterior was adapted to other data afterwards. Then no coverage is guaranteed.

    Raises:
        TypeError, ValueError: a field is invalid; the message names it.
    """

    sets: Rule
    examples: int | None
    draws: int | None
    augment: str | None
    temperature: float
    batch_size: float | None
    centre: tuple[float, float]
    by: str | None = None
    adapted: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.sets, Rule):
            raise TypeError(
                f"expected sets or intervals of stochbn.conformal, as of lac, got {type(self.sets).__name__}"
            )
        self.sets.check()
        if not isinstance(self.by, str | None) or bool(self.sets.groups) != (self.by is not None):
            raise ValueError("sets by group, and no others, go with the name of their column: by='COLUMN'")
        for name in ("examples", "draws"):
            if (value := getattr(self, name)) is not None and (type(value) is not int or value < 1):
                raise ValueError(f"the {name} of thresholds must be a whole number of at least 1, got {value!r:.40}")
        sized = self.batch_size in (None, math.inf) or is_number(self.batch_size)  # infinite without noise
        if not sized or not all(map(is_number, (self.temperature, *self.centre))) or len(self.centre) != 2:
            raise ValueError(
                "thresholds must have the temperature, batch size and centre of their posterior as numbers"
            )
        if not isinstance(self.augment, str | None) or type(self.adapted) is not bool:
            raise ValueError("thresholds must have augment as a text or None, and tell whether they were adapted")

    @classmethod
    def of(
        cls,
        posterior: Posterior,
        sets: Rule,
        examples: int | None,
        draws: int | None,
        augment: str | None,
        by: str | None = None,
    ) -> Thresholds:
        """Make the thresholds for a posterior in its current state.

        Raises:
            TypeError, ValueError: as the class.
        """
        at = posterior.temperature, posterior.batch_size, sums_of_centre(posterior)
        return cls(sets, examples, draws, augment, *at, by=by)

    def fit(self, posterior: Posterior) -> bool:
        """Whether they belong to a posterior with this noise, centre (to the rounding of its file) and temperature."""
        if (self.temperature, self.batch_size) != (posterior.temperature, posterior.batch_size):
            return False
        return is_centre(self.centre, posterior)

    def after_adapting(self, posterior: Posterior) -> Thresholds:
        """Return the same for the adapted posterior, marked as without guaranteed coverage."""
        return replace(self, centre=sums_of_centre(posterior), adapted=True)

    def unlike(self, draws: int, augment: str | None) -> str:
        """A warning if predictions use other draws than those of the held-out data; empty if not."""
        if self.draws in (None, draws) and self.augment == augment:
            return ""
        options = f"--draws {self.draws}" + (f" --augment {self.augment}" if self.augment else " and no --augment")
        return (
            f"the thresholds of the prediction sets are from predictions with {options}: predict with these, or make "
            "thresholds again with 'stochbn conformal', as the coverage may be another one"
        )

    def caveat(self, posterior: Posterior) -> str:
        """A sentence about coverage that is not guaranteed; empty if the data has not changed."""
        about = posterior.adaptation
        if not self.adapted or about is None:
            return ""
        cause = "The posterior was adapted after the thresholds of its prediction sets were made"
        if about.moved or not about.guarded:
            return f"{cause}, so no coverage can be promised without labels"
        if about.mixed > UNUSUAL:
            return f"{cause}, but no change was found: they hold if there is none, which only labels can tell"
        if getattr(self.sets, "by_class", False):
            return f"{cause}; only the mix of {about.parts[1]} has changed, for which sets by class hold as before"
        return (
            f"{cause}; only the mix of {about.parts[1]} has changed: make them again for the new mix with 'stochbn "
            "conformal --held-out DATA --new-mix', or weights= of stochbn.conformal"
        )

    def tensors(self) -> dict[str, Tensor]:
        """The threshold, float64 ``[]``, ``[K]`` or ``[G]``, for a file."""
        return {"threshold": torch.as_tensor(self.sets.threshold, dtype=torch.float64).cpu()}

    def description(self) -> dict[str, Any]:
        """All other fields, for a file."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "sets"}
        return own | {name: getattr(self.sets, name) for name in self.sets.settings()} | {"kind": self.sets.kind}

    def told(self) -> dict[str, Any]:
        """All fields as JSON, for programs in other languages; an infinite threshold is a string."""
        threshold = torch.as_tensor(self.sets.threshold).tolist()
        return {name: _finite(value) for name, value in {**self.description(), "threshold": threshold}.items()}

    @classmethod
    def from_file(cls, tensors: Mapping[str, Tensor], about: Any) -> Thresholds:
        """Read thresholds from a file.

        Raises:
            TypeError, ValueError: a field is missing or invalid.
        """
        kind = about.get("kind", Sets.kind) if isinstance(about, dict) else Sets.kind
        if not isinstance(kind, str) or kind not in KINDS:
            raise ValueError(f"the kind of thresholds must be one of {', '.join(KINDS)}, got {kind!r:.40}")
        rule, own = KINDS[kind], {f.name for f in fields(cls)} - {"sets"}
        wanted = own | {*rule.settings(), "kind"}
        if not isinstance(about, dict) or not wanted - LATER.keys() <= about.keys() <= wanted:
            raise ValueError(f"thresholds must have {', '.join(sorted(wanted))}, got {about!r:.60}")
        about = {**LATER, **about}
        threshold = tensors.get("threshold")
        if tensors.keys() != {"threshold"} or threshold is None or threshold.dtype != torch.float64:
            raise ValueError("thresholds must have a tensor 'threshold' of float64")
        for name in ("centre", "groups"):
            if not isinstance(about[name], list):
                raise ValueError(f"the {name} of thresholds must be a list, got {about[name]!r:.40}")
            about[name] = tuple(about[name])
        made: Any = rule
        sets = made(
            threshold=threshold if threshold.ndim else threshold.item(),
            **{name: about[name] for name in rule.settings()},
        )
        return cls(sets=sets, **{name: about[name] for name in own})


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def sums_of_centre(posterior: Posterior) -> tuple[float, float]:
    """Weighted sums of the expected means and variances, which identify a centre."""
    expected = posterior.expected.double().cpu()
    weights = 1 + (torch.arange(expected.shape[1], dtype=torch.float64) * ((5**0.5 - 1) / 2)).frac()
    mean, variance = (expected * weights).sum(1).tolist()
    return mean, variance


def is_centre(sums: tuple[float, float], posterior: Posterior) -> bool:
    """Whether sums belong to a posterior's centre, to the rounding of its file."""
    pairs = zip(sums, sums_of_centre(posterior), strict=True)
    return all(math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-12) for one, other in pairs)


def still_valid(posterior: Posterior) -> Thresholds | None:
    """The thresholds of a posterior; None, with a warning, if its noise, centre or temperature has changed.

    Raises:
        TypeError: they are not thresholds.
    """
    found = posterior.thresholds
    if found is not None and not isinstance(found, Thresholds):
        raise TypeError(f"thresholds must be Thresholds or None, got {type(found).__name__}; see posterior.with_sets")
    if found is None or found.fit(posterior):
        return found
    _warn()
    return None


def compare_draws(posterior: Posterior | None, draws: int, augment: str | None) -> None:
    """Warn if predictions with a posterior's sets use other draws than its thresholds."""
    found = None if posterior is None else posterior.thresholds
    if posterior is None or found is None:
        return
    alike = posterior.noiseless and augment is None  # all draws are
    if about := found.unlike(found.draws or draws if alike else draws, augment):
        warn(about)


def dropped(posterior: Posterior) -> Posterior:
    """Return the posterior without thresholds, with a warning if it had any."""
    if posterior.thresholds is None:
        return posterior
    _warn()
    return replace(posterior, thresholds=None)


def _warn() -> None:
    warn(
        "the thresholds of the posterior's prediction sets do not hold for another noise, centre or temperature, and "
        f"were dropped; make them again with {AGAIN}"
    )
