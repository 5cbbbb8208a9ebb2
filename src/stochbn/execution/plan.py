"""Choose the ways of a call, as a pure function of what is known about the network."""

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
"""Drawn statistics: buffers ``[C]`` by name."""

WAYS = ("pieces", "prefix", "stacked", "channels_last", "bfloat16", "compiled")
"""The faster ways to make passes, by the names of their modules."""


@dataclass(frozen=True)
class Settings:
    """Which faster ways passes may use, and their thresholds. Change these only for measurements and tests.

    >>> sorted(Settings().ways)
    ['bfloat16', 'channels_last', 'compiled', 'pieces', 'prefix', 'stacked']
    >>> Settings(ways=frozenset()).ways  # passes of one draw of all examples, in the network's own type
    frozenset()

    Attributes:
        ways: the names of the faster ways that may be used.
        piece: the wanted size of the largest activation of a pass on a CPU, in bytes. Larger ones do not fit into the
            cache, and the memory allocator returns them to the system after every use.
        cached: up to this size of the largest activation, in bytes, more examples take little more time.
        rows: passes with fewer examples cost about as much as passes with this many.
        weights: with fewer weights of linear layers and convolutions, bfloat16 saves no time.
        bfloat16: whether the processor multiplies bfloat16 numbers; None detects it.
        first: the number of draws of every example before the first check whether more are needed; even, and at least
            4. Two pairs give an estimate of the error, and detect unknown classes as well as more draws.
        step: the number of draws between checks; even.
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
        """Check that numbers of draws are whole pairs.

        Raises:
            ValueError: `first` or `step` is odd or too small.
        """
        for name, least in (("first", 4), ("step", 2)):
            if (value := getattr(self, name)) < least or value % 2:
                raise ValueError(f"{name} must be even, as draws come in pairs, and at least {least}; got {value}")


@dataclass(frozen=True)
class Call:
    """The requirements of a call.

    Attributes:
        task: reads the network's output.
        training: the names of the modules in training mode.
        settings: the allowed ways.
        whole: why all examples must go through the network together, one draw at a time; empty if they need not.
        posterior: the posterior of the draws, as far as verdicts depend on it.
        sample: returns draws to try ways with, always the same.
        exact: whether rounding must be that of float32.
        compile: whether the network may be compiled, which takes seconds to minutes.
        averaged: the number of independent draws whose accuracy is wanted.
        temperature: what logits are divided by.
        augment: the augmentation of the inputs in every draw.
        clean: whether the first draw sees the inputs unchanged.
        seed: the seed of the augmentation.
        masks: returns the seed of the random numbers that passes draw; None if the caller provides the masks.
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
        """The key of a verdict: everything that it depends on."""
        posterior = None if self.posterior is None else weakref.ref(self.posterior)  # a key must keep nothing alive
        about = inputs.kind(), self.task, self.training, posterior, self.settings
        return "verdict", about, torch.is_autocast_enabled("cpu"), network.weights(), network.state()


@dataclass(frozen=True)
class Verdict:
    """What is known about a network for inputs of one kind.

    Attributes:
        followed: the result of tracing a pass.
        refused: the reasons against ways, by name.
    """

    followed: Followed
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """How the passes of a call are made.

    Attributes:
        ways: the names of the faster ways to use.
        together: why examples stay together; empty if they may be separated.
        random: whether passes draw random numbers, or may.
        size: the largest number of examples in a pass; None if nothing is proven about the network, so that all
            examples go together and no way is used.
        least: the smallest number of examples in a pass; fewer are padded with copies of the last.
        rows: the largest number of examples in a pass with different draws; 0: one draw in each pass.
        units: the module calls whose outputs are kept from one draw to the next.
        norms: the number of rows of an example in the input of each batch norm, by name.
        head: the layer that stays in the network's own type when others are in bfloat16.
        exact: the plan to continue with if bfloat16 rounds too much; None without bfloat16.
        refused: the reason against each other way.
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
        """The number of draws of this many examples in one pass: 1, 2 or a multiple of 4.

        >>> Plan(rows=100).draws(20), Plan(rows=100).draws(40), Plan(rows=100).draws(60)
        (4, 2, 1)
        """
        fit = self.rows // max(examples, 1)
        return fit // 4 * 4 if fit >= 4 else max(1, fit // 2 * 2)


def _range(least: int, most: int) -> str:
    return f"{least} examples" if least == most else f"{least} or more examples"


def make_plan(verdict: Verdict, examples: int, settings: Settings, *, cpu: bool, refused: Mapping[str, str]) -> Plan:
    """Make the fastest plan that a verdict allows.

    Args:
        verdict: what is known about the network.
        examples: the number of examples.
        settings: the allowed ways.
        cpu: whether the inputs are on a CPU.
        refused: the reasons against ways in this call, by name.
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
        ways -= {"channels_last"}  # uses the weights of bfloat16
        without = {**given, "bfloat16": "rounding is not small beside the noise of the draws"}
        exact = make_plan(verdict, examples, settings, cpu=cpu, refused=without)
    return Plan(
        ways=ways | ({"stacked"} if rows else set()),  # later passes have fewer examples
        size=size,
        least=least,
        rows=rows,
        units=followed.units if "prefix" in ways else (),
        norms=followed.rows,
        head=followed.last if "bfloat16" in ways else "",
        exact=exact,
        refused=refused,
    )
