"""Adaptive conformal inference: sets for a stream that drifts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import normal, seeded
from stochbn import conformal


def drifting(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A stream of probabilities that becomes more difficult as it goes on, and labels."""
    generator = seeded(seed)
    labels = torch.randint(5, (count,), generator=generator)
    logits = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    logits[range(count), labels] += torch.linspace(4, 0.5, count).double()
    return (2 * logits).softmax(1), labels


def held_out() -> tuple[Tensor, Tensor]:
    probs, labels = drifting(40_000, seed=1)
    return probs[:400], labels[:400]


@pytest.mark.parametrize("method", ["lac", "aps", "intervals", "cqr"])
def test_the_coverage_holds_over_time_on_a_stream_that_drifts(method: str) -> None:
    """The bound of proposition 4.1 holds; the sets of the beginning do not hold their coverage."""
    coverage, rate, count = 0.9, 0.02, 4000
    rule: Any
    if method in ("lac", "aps"):
        known: tuple[Any, ...] = held_out()
        stream: tuple[Any, ...] = drifting(count)
        rule = getattr(conformal, method)(*known, coverage)
        fixed = rule(stream[0])[range(count), stream[1]]
    else:
        mean, std, truth = torch.zeros(count), torch.ones(count), normal(count) * torch.linspace(1, 5, count)
        known, stream = (mean[:400], std[:400], normal(400, seed=3)), (mean, std, truth)
        if method == "cqr":
            known, stream = ((m - s, m + s, y) for m, s, y in (known, stream))
        rule = (conformal.intervals if method == "intervals" else conformal.cqr)(*known, coverage)
        low, high = rule(*stream[:2])
        fixed = (low <= truth) & (truth <= high)
    if method != "aps":  # whose sets grow by themselves where the network becomes unsure
        assert fixed[-1000:].double().mean() < 0.75
    online = conformal.aci(rule, *known, rate=rate)
    held = online.update(*stream)
    bound = (1 + rate) / (rate * count)
    assert abs(online.coverage - coverage) <= bound
    error = 2 * math.sqrt(coverage * (1 - coverage) / 1000)
    assert abs(held[-1000:].double().mean() - coverage) < error + (1 + rate) / (rate * 1000)
    assert online.examples == count
    assert online.held == int(held.sum())


def test_it_is_the_slow_loop_of_the_paper() -> None:
    probs, labels = drifting(300)
    sets = conformal.lac(*held_out(), 0.8)
    online = conformal.aci(sets, *held_out(), rate=0.05, window=50)
    scores = [1 - p[k].item() for p, k in zip(*held_out(), strict=True)][-50:]
    alpha = 0.2
    for row, label in zip(probs, labels.tolist(), strict=True):
        place = math.ceil((len(scores) + 1) * (1 - alpha) - 1e-9)
        threshold = math.inf if place > len(scores) else -math.inf if place < 1 else sorted(scores)[place - 1]
        assert online.threshold == threshold
        assert torch.equal(online(row[None])[0], 1 - row <= threshold + 1e-6)
        own = 1 - row[label].item()
        held = bool(online.update(row[None], [label])[0])
        assert held == (own <= threshold + 1e-6)
        alpha += 0.05 * (0.2 - (not held))
        scores = [*scores[1:], own]
        assert online.level == pytest.approx(alpha)


def test_after_misses_sets_are_everything_and_after_hits_nothing() -> None:
    sets = conformal.lac(*held_out(), 0.5)
    online = conformal.aci(sets, *held_out(), rate=0.9)
    surprise, usual = torch.tensor([[1.0, 0, 0, 0, 0]]), [1]
    online.update(surprise.repeat(2, 1), 2 * usual)
    assert online.level < 0
    assert online(surprise).all()
    online.update(surprise.repeat(4, 1), [0] * 4)
    assert online.level > 1
    assert not online(surprise).any()
    assert "50 % asked for" in repr(online)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: conformal.aci(0.5), TypeError, "sets or intervals of stochbn.conformal, got float"),  # type: ignore[arg-type]
        (lambda: conformal.aci(conformal.lac(*held_out(), by_class=True), *held_out()), ValueError, "one threshold"),
        (lambda: conformal.aci(conformal.lac(*held_out()), *held_out(), rate=0), ValueError, "rate must lie"),
        (lambda: conformal.aci(conformal.lac(*held_out()), *held_out(), window=0), ValueError, "window must be"),
    ],
)
def test_what_cannot_be_is_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
