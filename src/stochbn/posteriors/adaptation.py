"""What `stochbn.adapt` concluded about new data, kept in an adapted posterior."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from stochbn.network.layers import listed

__all__ = ["UNUSUAL", "Adaptation"]

UNUSUAL = 0.01
"""The largest p-value that counts as a change."""
LISTED = 3


@dataclass(frozen=True)
class Adaptation:
    """What `stochbn.adapt` concluded from unlabelled examples.

    Attributes:
        examples: their number.
        guarded: whether the effect of a changed mix was subtracted. False if the posterior has no reference.
        look: the p-value of the inputs' look, as `stochbn.shift.Monitor` gives it; 1 without a guard.
        mixed: the p-value of the mix of classes, likewise.
        mix: the mix of the new examples by the adapted network, such as the share of each class; empty without a guard.
        usual: the mix of the reference.
        evidence: the squared distance of each layer's statistics, divided by its expected value without a change.
        parts: the word for one component of the mix, singular and plural, such as ``("class", "classes")``.
        moved: for each layer, the root mean square over channels of the shift of the means, in standard deviations.
            Empty if nothing was moved.
    """

    examples: int
    guarded: bool
    look: float
    mixed: float
    mix: tuple[float, ...]
    usual: tuple[float, ...]
    parts: tuple[str, str]
    evidence: Mapping[str, float]
    moved: Mapping[str, float]

    def __str__(self) -> str:
        examples = f"{self.examples:,} example{'s' if self.examples > 1 else ''}"
        if not self.guarded:
            return f"Adapted to {examples} without a guard: another mix of classes counts as another look."
        most = sorted(self.evidence, key=self.evidence.__getitem__, reverse=True)[:LISTED]
        far = max(self.moved.values(), default=0.0)
        if not self.moved:
            look = (
                f"There is no evidence that the look of the inputs has changed (p = {self.look:.2g}): nothing was moved"
            )
        else:
            sure = "has changed" if self.look <= UNUSUAL else "may have changed"
            look = (
                f"The look of the inputs {sure} (p = {self.look:.2g}), most in {listed(most)}; means were moved "
                f"by up to {far:.2g} standard deviations"
            )
        return f"From {examples}: {look}. {self._mix()}."

    @property
    def distance(self) -> float:
        """The distance between the two mixes, from 0 to 1: half the sum of absolute differences, over the usual sum."""
        apart = sum(abs(a - b) for a, b in zip(self.mix, self.usual, strict=True)) / 2
        return min(1.0, apart / max(sum(self.usual), 1e-12))

    def _mix(self) -> str:
        one, several = self.parts
        if not self.mix:
            return "The task has no mix of classes to compare"
        first = max(range(len(self.mix)), key=lambda k: self.mix[k] - self.usual[k])
        if self.mixed > UNUSUAL:
            return f"The mix of {several} has not been seen to change (p = {self.mixed:.2g})"
        return (
            f"The mix of {several} has changed (p = {self.mixed:.2g}): {self.mix[first]:.2f} of {one} {first}, "
            f"which is {self.usual[first]:.2f} in training"
        )

    def description(self) -> dict[str, Any]:
        """The attributes, for a file."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_description(cls, about: Any) -> Adaptation:
        """Read the description from a file.

        Raises:
            ValueError: a field is missing or invalid.
        """
        names = {f.name for f in fields(cls)}
        if not isinstance(about, dict) or about.keys() != names:
            raise ValueError(f"adaptation must have {', '.join(sorted(names))}, got {about!r:.60}")
        numbers = [about["look"], about["mixed"], about["examples"]]
        for name in ("evidence", "moved"):
            if not isinstance(about[name], dict):
                raise ValueError(f"adaptation's {name} must be a mapping, got {about[name]!r:.60}")
            numbers += about[name].values()
        parts = about["parts"]
        if not isinstance(parts, list | tuple) or [type(one) for one in parts] != [str, str]:
            raise ValueError(f"adaptation's parts must be two names, got {parts!r:.60}")
        for name in ("mix", "usual"):
            if not isinstance(about[name], list | tuple):
                raise ValueError(f"adaptation's {name} must be a list, got {about[name]!r:.60}")
            numbers += about[name]
        if not all(isinstance(one, (int, float)) and abs(one) < 1e300 for one in numbers):
            raise ValueError("adaptation must have finite numbers alone")
        if len(about["mix"]) != len(about["usual"]):
            raise ValueError("adaptation must have two mixes of one length")
        if type(about["examples"]) is not int or about["examples"] < 1 or type(about["guarded"]) is not bool:
            raise ValueError("adaptation must have a number of examples, and tell whether there was a guard")
        if not (0 <= about["look"] <= 1 and 0 <= about["mixed"] <= 1):
            raise ValueError("adaptation must have p-values from 0 to 1")
        return cls(**{**about, **{name: tuple(about[name]) for name in ("mix", "usual", "parts")}})
