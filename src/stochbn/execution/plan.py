"""Which ways the passes of a call take: a pure function of what is known."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stochbn.augment import Augment
from stochbn.execution.follow import Followed
from stochbn.execution.watch import Unit
from stochbn.execution.ways import compiled
from stochbn.network.calling import NetworkInput
from stochbn.network.replica import Network
from stochbn.posteriors import Posterior
from stochbn.tasks import Task

__all__ = ["WAYS", "Call", "Draw", "Plan", "Settings", "Verdict", "make_plan"]

Draw = Mapping[str, Tensor]
"""Drawn statistics: buffers ``[C]`` by their names."""

WAYS = ("pieces", "prefix", "stacked", "channels_last", "bfloat16", "compiled")
"""The faster ways of making passes, by the names of their modules."""


@dataclass(frozen=True)
class Settings:
    """What passes may do, and the sizes that their ways go by. The defaults serve all but measurements and tests.

    >>> sorted(Settings().ways)
    ['bfloat16', 'channels_last', 'compiled', 'pieces', 'prefix', 'stacked']
    >>> Settings(ways=frozenset()).ways  # passes of one draw of all examples, in the network's own type
    frozenset()

    Attributes:
        ways: the faster ways that may be taken, by their names.
        piece: bytes that the largest activation of a pass on a CPU should have. Larger ones fall out of the cache, and
            the memory allocator hands them back to the system after every use.
        cached: bytes of the largest activation up to which a pass takes little longer for more examples.
        rows: examples in a pass below which a pass costs about as much as one of so many.
        weights: weights of linear layers and convolutions below which a pass takes no less time in bfloat16.
        bfloat16: whether the processor multiplies bfloat16 numbers; None asks it.
        first: draws of every example before it is asked which have enough, even and at least 4. With two pairs the
            error is known, and unknown classes are detected as well as with more.
        step: draws from one such question to the next, even.
    """

    ways: frozenset[str] = frozenset(WAYS)
    piece: int = 8 * 2**20
    cached: int = 2**18
    rows: int = 16
    weights: int = 2**17
    bfloat16: bool | None = None
    first: int = 4
    step: int = 2

    def __post_init__(self) -> None:
        """Refuse numbers of draws that are no whole pairs.

        Raises:
            ValueError: `first` or `step` is odd or too small.
        """
        for name, least in (("first", 4), ("step", 2)):
            if (value := getattr(self, name)) < least or value % 2:
                raise ValueError(f"{name} must be even, as draws come in pairs, and at least {least}; got {value}")


@dataclass(frozen=True)
class Call:
    """What a call asks of its passes.

    Attributes:
        task: what it reads from the network's output.
        training: names of the modules in training mode.
        settings: what passes may do.
        whole: why the examples go through the network together, one draw a pass; empty if a plan may say otherwise.
        posterior: what draws are from, as far as verdicts depend on it.
        sample: gives some draws to try ways with, the same every time.
        exact: no way may round more than float32 does.
        compile: whether the network may be compiled, which takes some seconds to minutes.
        averaged: how many independent draws the mean over draws is to be worth.
        temperature: what logits are divided by.
        augment: a random change of the inputs, another one in every draw.
        clean: whether the first draw sees the inputs as they are.
        seed: where these changes come from.
        masks: gives the seed of the random numbers that passes draw; None if the caller has masks around them.
    """

    task: Task
    training: frozenset[str] = frozenset()
    settings: Settings = field(default_factory=Settings)
    whole: str = ""
    posterior: Posterior | None = None
    sample: Callable[[int], Sequence[Draw]] = lambda count: [{}] * count
    exact: bool = True
    compile: bool = False
    averaged: int = 50
    temperature: float = 1.0
    augment: Augment | None = None
    clean: bool = True
    seed: int = 0
    masks: Callable[[], int] | None = lambda: 0

    def key(self, network: Network, inputs: NetworkInput) -> Hashable:
        """What a verdict depends on."""
        posterior = None if self.posterior is None else weakref.ref(self.posterior)  # a key keeps nothing alive
        about = inputs.kind(), self.task, self.training, posterior, self.settings
        return "verdict", about, torch.is_autocast_enabled("cpu"), network.weights(), network.state()


@dataclass(frozen=True)
class Verdict:
    """What is known of a network for inputs of one kind.

    Attributes:
        followed: what a pass has shown.
        refused: why a way must not be taken, by its name.
    """

    followed: Followed
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """How the passes of a call are made.

    Attributes:
        ways: the faster ways that are taken.
        together: why examples stay together; empty if they may be taken apart.
        random: whether passes draw random numbers, or may.
        size: how many examples go through the network together at most; None where nothing is proven of the network,
            so that all do and no way is taken.
        least: the fewest examples that go through it together; fewer are padded by repeating the last one.
        rows: how many examples may go through the network together under different draws; 0 for one draw a pass.
        units: the calls of modules whose outputs are kept from one draw to the next.
        norms: for each batch norm, by its name, how many rows of its input an example has.
        head: the layer that stays in the network's own type where others are in bfloat16.
        exact: the plan to go on with where bfloat16 rounds too much; None if it is not taken.
        refused: why each other way is not taken.
    """

    ways: frozenset[str] = frozenset()
    together: str = ""
    random: bool = False
    size: int | None = None
    least: int = 1
    rows: int = 0
    units: tuple[Unit, ...] = ()
    norms: Mapping[str, int] = field(default_factory=dict)
    head: str = ""
    exact: Plan | None = None
    refused: Mapping[str, str] = field(default_factory=dict)

    def draws(self, examples: int) -> int:
        """How many draws of so many examples to make in one pass: 1, 2 or a multiple of 4.

        >>> Plan(rows=100).draws(20), Plan(rows=100).draws(40), Plan(rows=100).draws(60)
        (4, 2, 1)
        """
        fit = self.rows // max(examples, 1)
        return fit // 4 * 4 if fit >= 4 else max(1, fit // 2 * 2)


def _range(least: int, most: int) -> str:
    return f"{least} examples" if least == most else f"{least} or more examples"


def make_plan(verdict: Verdict, examples: int, settings: Settings, *, cpu: bool, refused: Mapping[str, str]) -> Plan:
    """The fastest plan that a verdict allows.

    Args:
        verdict: what is known of the network.
        examples: the number of examples.
        settings: what passes may do.
        cpu: whether the inputs are on a CPU.
        refused: why ways are not for this call, by their names.
    """
    followed = verdict.followed
    given = refused
    refused = {**{way: "it is switched off" for way in WAYS if way not in settings.ways}, **given, **verdict.refused}
    if followed.dependent or followed.in_place:
        in_place = f"passes run on the network itself, as {followed.in_place}" if followed.in_place else ""
        together = in_place or followed.dependent
        stays = dict.fromkeys(WAYS, f"examples stay together: {together}")
        return Plan(together=together, random=followed.random, refused=stays)
    least, most = followed.sizes.low, followed.sizes.high
    if "bfloat16" not in refused:
        refused.setdefault("compiled", "it is no faster than bfloat16")
    if "compiled" not in refused:
        least = max(least, compiled.LEAST)
        refused |= dict.fromkeys(("prefix", "stacked"), "the network is compiled as a whole")
    if least > max(settings.rows, examples // 4):
        together = f"what the network does is proven for {_range(least, most)} alone"
        return Plan(together=together, refused=dict.fromkeys(WAYS, f"examples stay together: {together}"))
    size = examples
    activation = followed.activation / (2 if "bfloat16" not in refused else 1)
    if "pieces" not in refused:
        pieces = max(1, round(examples * activation / settings.piece)) if cpu else 1
        size = max(math.ceil(examples / pieces), least)
        if pieces == 1:
            refused["pieces"] = "all examples fit into the cache together" if cpu else "it is for CPUs"
    rows = 0
    if "stacked" not in refused:
        fit = int(settings.piece / max(activation, 1))
        rows = max(size // 3, min(settings.rows, fit), min(int(settings.cached / max(activation, 1)), 1024))
        rows = min(rows, most)
        if rows // max(size, 1) < 2:
            refused["stacked"] = f"one draw of {size} examples makes full use of the processor"
    ways = frozenset(way for way in WAYS if way not in refused)
    exact = None
    if "bfloat16" in ways:
        ways -= {"channels_last"}  # whose weights are those of bfloat16
        without = {**given, "bfloat16": "rounding is not small beside the noise of the draws"}
        exact = make_plan(verdict, examples, settings, cpu=cpu, refused=without)
    return Plan(
        ways=ways | ({"stacked"} if rows else set()),  # fewer examples are left later on
        size=size,
        least=least,
        rows=rows,
        units=followed.units if "prefix" in ways else (),
        norms=followed.rows,
        head=followed.last if "bfloat16" in ways else "",
        exact=exact,
        refused=refused,
    )
