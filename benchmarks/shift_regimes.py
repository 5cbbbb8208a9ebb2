"""The regimes of `shift.py`: which unlabelled examples a network is adapted to, and which others it then predicts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from harm_networks import Data, Examples, as_input
from shift_corruptions import CORRUPTIONS, corrupt
from shift_methods import STREAMS, Subject, seed_of
from torch import Tensor

from stochbn.shift import Monitor

__all__ = ["CLASSES_ALONE", "Cell", "Regime", "Step", "alarms", "regimes"]

EXAMPLES = 128
"""Unlabelled examples to adapt to, where nothing else is said."""
TESTS = 250
"""Test examples of a cell; there are twice as many at severity 5."""
STREAM_BATCH = 32
GROUP = 16
"""Examples in a mini-batch of the alarm."""
REPEATS = 9
"""Cells of a regime that differ in their random examples alone."""
TAIL = 0.6
"""In the long tail each class is so many times as frequent as the one before."""
LIMIT = 40
"""Mini-batches after the change that a monitor's stream has."""
BASIC = ("plain", "plain + temperature", "prediction-time BN", "adapt")
USUAL = (*BASIC, "blend, N = 16", "adapt, no guard")
CLASSES_ALONE = ("two classes", "one class")
"""Regimes in which the mix changes and the look does not."""


@dataclass(frozen=True, eq=False)
class Step:
    """Examples to adapt to, and others to predict, as the network takes them."""

    examples: Tensor
    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Cell:
    """One case of a regime; a stream has several steps."""

    name: str
    steps: Callable[[], Iterator[Step]]


@dataclass(frozen=True)
class Regime:
    """A kind of change.

    Attributes:
        about: in words.
        cells: its cases.
        methods: those that are compared in it; empty is all.
        stream: whether methods see the steps of a cell one after another.
    """

    about: str
    cells: list[Cell]
    methods: tuple[str, ...] = ()
    stream: bool = False


@dataclass(frozen=True)
class Source:
    """Where cells take their examples from: two halves of the test data, so that no example is in both.

    Attributes:
        seen: to adapt to.
        test: to predict.
        unknown: of classes that the network does not know.
        tests: how many to predict in a cell.
    """

    seen: Examples
    test: Examples
    unknown: Examples
    tests: int

    @classmethod
    def of(cls, data: Data, tests: int) -> Source:
        """Halves that are always the same."""
        order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))
        half = len(order) // 2
        return cls(data.test.take(order[:half]), data.test.take(order[half:]), data.other, tests)

    @property
    def classes(self) -> int:
        """K."""
        return int(self.test.y.max()) + 1

    def step(
        self,
        *words: object,
        corruption: str = "clean",
        severity: int = 0,
        examples: int = EXAMPLES,
        shares: Tensor | None = None,
        more: int = 1,
    ) -> Step:
        """Random examples.

        Args:
            words: what the seed is made of.
            corruption: of all images; ``"all"`` is another one for each.
            severity: of the corruption.
            examples: to adapt to.
            shares: ``[K]``, how frequent the classes are, in any unit; None is as in the test data.
            more: how many times the usual number of test examples.
        """
        found = []
        for part, pool, count in (("seen", self.seen, examples), ("test", self.test, more * self.tests)):
            seed = seed_of(part, *words)
            chosen = pool.take(_drawn(pool.y, count, shares, seed))
            found.append((_changed(chosen.x, corruption, severity, seed), chosen.y))
        return Step(found[0][0], *found[1])


def regimes(data: Data, *, thin: int, tests: int = TESTS) -> dict[str, Regime]:
    """All regimes by their names.

    Args:
        data: of the network.
        thin: every so many cells are kept, but for those of severities 1, 3 and 5; above 1 there are no severities 2
            and 4.
        tests: test examples in a cell.
    """
    source = Source.of(data, tests)
    every = list(CORRUPTIONS)
    found: dict[str, Regime] = {}
    for severity in (5, 1, 3) if thin > 1 else (5, 1, 2, 3, 4):
        cells = [_corrupted(source, name, severity) for name in (every if thin < 15 else every[::thin])]
        name = f"severity {severity}"
        methods = () if severity == 5 else BASIC
        found[name] = Regime(f"one corruption, severity {severity}, {EXAMPLES} examples", cells, methods)
    rest = {**_clean(source), **_counts(source, every), **_classes(source, every), **_streams(source, every)}
    if source.classes < 10:
        rest |= _unknown(source, every)
    for name, regime in rest.items():
        found[name] = Regime(regime.about, regime.cells[::thin], regime.methods, regime.stream)
    return found


def _corrupted(source: Source, name: str, severity: int, examples: int = EXAMPLES) -> Cell:
    more = 2 if severity == 5 and examples == EXAMPLES else 1
    words = (name, examples)
    return Cell(
        name, lambda: iter([source.step(*words, corruption=name, severity=severity, examples=examples, more=more)])
    )


def _repeated(source: Source, name: str, count: int, **options: object) -> list[Cell]:
    def cell(number: int) -> Cell:
        return Cell(f"{number + 1}", lambda: iter([source.step(name, number, **options)]))  # type: ignore[arg-type]

    return [cell(number) for number in range(count)]


def _clean(source: Source) -> dict[str, Regime]:
    mixed = _repeated(source, "mixed", REPEATS, corruption="all", severity=5)
    return {
        "clean": Regime(f"as in training, {EXAMPLES} examples", _repeated(source, "clean", REPEATS), USUAL),
        "batches of 8": Regime(
            "as in training, 8 examples", _repeated(source, "eight", 2 * REPEATS, examples=8), USUAL
        ),
        "mixed corruptions": Regime("each image has one of the corruptions, severity 5", mixed, USUAL),
    }


def _counts(source: Source, every: list[str]) -> dict[str, Regime]:
    methods = (*BASIC, "blend, N = 16", "Tent", "adapt, prior = 16")
    return {
        f"{count} examples": Regime(
            f"one corruption, severity 5, {count} examples",
            [_corrupted(source, name, 5, count) for name in every],
            methods,
        )
        for count in (8, 32, 512)
    }


def _classes(source: Source, every: list[str]) -> dict[str, Regime]:
    count = source.classes

    def of(name: str, words: object, weights: dict[int, float], other: float = 0.0, corruption: str = "clean") -> Cell:
        shares = torch.full((count,), other)
        for index, weight in weights.items():
            shares[index] = weight
        severity = 0 if corruption == "clean" else 5
        return Cell(
            name, lambda: iter([source.step(words, name, corruption=corruption, severity=severity, shares=shares)])
        )

    pairs = list(itertools.combinations(range(count), 2))
    pairs.sort(key=lambda pair: (pair[1] - pair[0], pair))
    tails = [torch.randperm(count, generator=torch.Generator().manual_seed(k)).tolist() for k in range(REPEATS)]
    alone = [of(f"{a}, {b}", "pair", {a: 1, b: 1}) for a, b in pairs]
    kinds = [every[(k // 3 + 5 * (k % 3)) % len(every)] for k in range(len(pairs))]  # all of them in each third
    under = [
        of(f"{a}, {b}: {kind}", "pair", {a: 1, b: 1}, 0.0, kind) for (a, b), kind in zip(pairs, kinds, strict=True)
    ]
    return {
        "two classes": Regime("two classes alone, clean", alone, USUAL),
        "two classes, severity 5": Regime("two classes alone, one corruption", under, (*USUAL, "Tent")),
        "one class": Regime("one class alone, clean", [of(f"{a}", "one", {a: 1}) for a in range(count)], USUAL),
        "long tail": Regime(
            f"each class {TAIL:g} times as frequent as the one before, clean",
            [of(f"{k + 1}", "tail", {a: TAIL**place for place, a in enumerate(t)}) for k, t in enumerate(tails)],
            USUAL,
        ),
        "two frequent classes": Regime(
            "two classes five times as frequent, clean",
            [of(f"{a}, {b}", "frequent", {a: 5, b: 5}, 1.0) for a, b in pairs[:REPEATS]],
            USUAL,
        ),
    }


def _streams(whole: Source, every: list[str]) -> dict[str, Regime]:
    source = replace(whole, tests=max(16, whole.tests // 5))

    def in_order(number: int) -> Cell:
        def steps() -> Iterator[Step]:
            order = torch.randperm(source.classes, generator=torch.Generator().manual_seed(number))
            for index, place in itertools.product(order.tolist(), range(3)):
                shares = torch.zeros(source.classes)
                shares[index] = 1
                yield source.step("sorted", number, index, place, examples=STREAM_BATCH, shares=shares)

        return Cell(f"{number + 1}", steps)

    def drifting(name: str) -> Cell:
        def steps() -> Iterator[Step]:
            for severity, place in itertools.product(range(6), range(3)):
                yield source.step("drift", severity, place, corruption=name, severity=severity, examples=STREAM_BATCH)

        return Cell(name, steps)

    return {
        "sorted stream": Regime(
            f"batches of {STREAM_BATCH}, sorted by class, clean", [in_order(k) for k in range(3)], STREAMS, True
        ),
        "slow drift": Regime(
            f"batches of {STREAM_BATCH}, severity 0 to 5", [drifting(name) for name in every[1::3]], STREAMS, True
        ),
    }


def _unknown(source: Source, every: list[str]) -> dict[str, Regime]:
    def cell(number: int, corruption: str, severity: int) -> Cell:
        def steps() -> Iterator[Step]:
            step = source.step("unknown", number, corruption=corruption, severity=severity)
            seed = seed_of("unknown", number)
            chosen = source.unknown.take(_drawn(source.unknown.y, EXAMPLES // 2, None, seed))
            unknown = _changed(chosen.x, corruption, severity, seed)
            yield Step(torch.cat([step.examples[: EXAMPLES // 2], unknown]), step.inputs, step.labels)

        return Cell(f"{number + 1}", steps)

    half = "unknown classes make half of the examples to adapt to"
    return {
        "unknown classes": Regime(f"{half}, clean", [cell(k, "clean", 0) for k in range(REPEATS)], USUAL),
        "unknown classes, severity 5": Regime(
            f"{half}, one corruption", [cell(k, name, 5) for k, name in enumerate(every)], USUAL
        ),
    }


def _drawn(labels: Tensor, count: int, shares: Tensor | None, seed: int) -> Tensor:
    """Positions of random examples, none twice."""
    weights = torch.ones(len(labels)) if shares is None else shares[labels] / labels.bincount()[labels]
    count = min(count, int((weights > 0).sum()))
    return weights.multinomial(count, generator=torch.Generator().manual_seed(seed))


def _changed(pixels: Tensor, corruption: str, severity: int, seed: int) -> Tensor:
    if corruption != "all":
        return corrupt(pixels, corruption, severity, seed)
    kinds = torch.arange(len(pixels)) % len(CORRUPTIONS)
    found = as_input(pixels).clone()
    for kind, name in enumerate(CORRUPTIONS):
        found[kinds == kind] = corrupt(pixels[kinds == kind], name, severity, seed + kind)
    return found


def alarms(subject: Subject, data: Data, groups: int) -> dict[str, object]:
    """What monitors say of mini-batches of test examples: as they are, and at severity 3.

    Args:
        subject: the network.
        data: its data.
        groups: mini-batches of each corruption; of clean ones there are as many as the test data gives.
    """
    order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))  # MNIST is sorted by writers
    parts = [data.test.x[chosen] for chosen in order.split(GROUP) if len(chosen) == GROUP]
    clean_groups = parts[: max(groups, 20) * 40]
    monitor = Monitor(subject.posterior)
    sounded = 0
    clean: list[tuple[float, float]] = []
    for pixels in clean_groups:
        reading = monitor.update(subject.model, as_input(pixels))
        clean.append((reading.p, _log_distance(reading.layers)))
        if reading.alarm:
            sounded += 1
            monitor.reset()
    shifted: dict[str, list[tuple[float, float]]] = {}
    delays: dict[str, int] = {}
    for name in CORRUPTIONS:
        monitor, readings, delay = Monitor(subject.posterior), [], 0
        chosen = torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed_of("alarm", name)))
        for number in range(5):
            monitor.update(subject.model, as_input(parts[int(chosen[number])]))
        for number in range(LIMIT):
            if number >= groups and delay:
                break
            pixels = parts[int(chosen[(5 + number) % len(parts)])]
            reading = monitor.update(subject.model, corrupt(pixels, name, 3, number))
            if number < groups:
                readings.append((reading.p, _log_distance(reading.layers)))
            if reading.alarm and not delay:
                delay = number + 1
        shifted[name], delays[name] = readings, delay
    return {"clean": clean, "shifted": shifted, "delays": delays, "false_alarms_of_monitor": sounded}


def _log_distance(layers: Mapping[str, float]) -> float:
    """The mean logarithm over layers of how many times their usual distance they are away."""
    values = torch.tensor(list(layers.values()))
    return float(values.clamp(min=1e-30).log().mean())
