"""A kind of posterior is one module and its entry in `KINDS`: one that is added here can all that the others can."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import stochbn
from conftest import mlp, normal, settled
from posterior_contract import PosteriorContract, same
from stochbn.evaluation.predicting import predict_member
from stochbn.posteriors import KINDS
from stochbn.posteriors.empirical import Empirical, Replayed
from stochbn.sources import LoaderObjects


class Shrinking(Replayed):
    """Mini-batches whose noise is to be `shrink` times as large."""

    def __init__(self, max_batches: int = 512, shrink: float = 1.0) -> None:
        super().__init__(max_batches)
        if not 0 < shrink <= 1:
            raise ValueError(f"shrink must be above 0 and at most 1, got {shrink!r}")
        self.shrink = shrink

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "shrink": self.shrink}

    def _posterior(self, **about: Any) -> Empirical:
        found = Shrunken.from_statistics(self.statistics(), shrink=self.shrink, **about)
        return found if self.shrink == 1 else found._scaled(self.shrink**2)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Shrunken(Empirical):
    """Replay of statistics that were moved towards their mean."""

    kind = "shrunken"
    accumulator = Shrinking
    shrink: float = 1.0


@pytest.fixture(autouse=True)
def _known() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cast(dict[str, Any], KINDS), "shrunken", Shrunken)
        yield


class TestShrunken(PosteriorContract):
    kind = "shrunken"
    replays = True


def test_fit_hands_a_kind_its_options_and_leaves_them_out_for_the_others() -> None:
    model, data = settled(mlp(), 4), [normal(240, 4)]
    options: dict[str, Any] = {"centre": "observed", "shrink": 0.5, "max_batches": 40}
    half = stochbn.fit(model, data, 8, "shrunken", **options)
    every = stochbn.fit(model, data, 8, "empirical", **options)
    assert isinstance(half, Shrunken)
    assert half.shrink == 0.5
    torch.testing.assert_close(half.variance_of_means, every.variance_of_means / 4, rtol=1e-4, atol=1e-9)
    assert half.mini_batches == every.mini_batches == 30


def test_a_kind_checks_its_options_and_no_kind_takes_unknown_ones() -> None:
    model, data = settled(mlp(), 4), [normal(240, 4)]
    with pytest.raises(ValueError, match="shrink must be above 0 and at most 1, got 2"):
        stochbn.fit(model, data, 8, "shrunken", shrink=2)
    for kind in KINDS:
        with pytest.raises(TypeError, match="unexpected keyword argument 'shrnk'"):
            stochbn.fit(model, data, 8, kind, shrnk=0.5)


def test_an_option_named_rank_keeps_its_value() -> None:
    class Ranked(Shrinking):
        def __init__(self, rank: int = 3) -> None:
            super().__init__()
            self.rank = rank

        def settings(self) -> dict[str, Any]:
            return {"rank": self.rank}

        def _posterior(self, **about: Any) -> Empirical:
            assert self.rank == 7
            return super()._posterior(**about)

    class WithRank(Shrunken):
        kind = "ranked"
        accumulator = Ranked  # type: ignore[assignment]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cast(dict[str, Any], KINDS), "ranked", WithRank)
        assert isinstance(stochbn.fit(settled(mlp(), 4), [normal(240, 4)], 8, "ranked", rank=7), Shrunken)


@pytest.mark.parametrize("name", ["seen", "process", "update", "layers"])
def test_options_that_every_accumulator_has_are_refused_where_the_kind_is_defined(name: str) -> None:
    def init(self: Any, **options: Any) -> None:
        raise AssertionError

    init.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(one, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=1) for one in ("self", name)]
    )
    with pytest.raises(TypeError, match=f"the option '{name}' of Odd has the name of an attribute"):
        type("Odd", (Shrinking,), {"__init__": init})


def test_a_kind_with_medians_is_also_evaluated_at_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = settled(mlp(), 4), normal(240, 4)
    posterior = stochbn.fit(model, [x], 8, "shrunken")
    known = LoaderObjects("known", [(x[:20], torch.arange(20) % 3)])
    assert posterior.median() is None
    assert "median.known" not in predict_member(model, posterior, known, None, 2, 0)
    monkeypatch.setattr(Shrunken, "median", lambda self: self.rescale(math.inf))
    found = predict_member(model, posterior, known, None, 2, 0)
    torch.testing.assert_close(found["median.known"], found["plain.known"], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found["median.known"], found["sbn.known"])


def test_what_a_kind_was_told_is_in_its_file_and_goes_through_calibration_and_predictions(tmp_path: Path) -> None:
    model, x = settled(mlp(), 4), normal(240, 4)
    posterior = stochbn.fit(model, [x], 8, "shrunken", shrink=0.5)
    posterior.save(tmp_path / "p")
    loaded = stochbn.load(tmp_path / "p")
    same(loaded, posterior)
    chosen = stochbn.calibrate(model, loaded, [(x, torch.arange(240) % 3)])
    assert isinstance(chosen, Shrunken)
    assert chosen.shrink == 0.5
    assert stochbn.Predictive(model, chosen)(x[:5]).probs.shape == (5, 3)
