from __future__ import annotations

import functools
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochbn
from conftest import Untouched, convnet, normal, seeded, settled
from stochbn import Predictive, Settings

EXACT = Settings(bfloat16=False)


def made() -> tuple[nn.Module, stochbn.Posterior, Tensor]:
    model = settled(convnet(), 2, 6, 5).eval()
    return model, stochbn.fit(model, [normal(64, 2, 6, 5, seed=9)], 8), normal(12, 2, 6, 5, seed=4)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each time that code is made; it is not optimised, which takes long."""
    made: list[int] = []

    def backend(graph: Any, examples: list[Any]) -> Any:
        made.append(len(examples))
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    return made


def test_compiled_passes_give_the_same_predictions(counted: list[int]) -> None:
    model, posterior, x = made()
    before = Untouched(model)
    for augment in (None, stochbn.augment.flip()):
        compiled = Predictive(model, posterior, 12, tolerance=0, compile=True, settings=EXACT, augment=augment)
        plain = Predictive(model, posterior, 12, tolerance=0, settings=Settings(ways=frozenset()), augment=augment)
        for count in (12, 5, 1):
            both = [one(x[:count], generator=seeded(1)).probs for one in (compiled, plain)]
            torch.testing.assert_close(*both, rtol=1e-4, atol=1e-6)
    before.check()


def test_notes_on_the_network_are_no_change_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = functools.partial(torch.compile, backend="eager")

    def noting(model: nn.Module) -> Any:
        compiled = compile_(model)
        model._compile_kwargs = {}  # type: ignore[assignment]  # as Lightning does from its import on
        return compiled

    monkeypatch.setattr(torch, "compile", noting)
    model, posterior, x = made()
    explained = Predictive(model, posterior, 8, compile=True, settings=EXACT)
    explained(x)
    assert "compiled: taken" in explained.explain(x)
    assert "shares its parameters." in explained.explain(x)


def test_it_is_compiled_once_for_all_draws_and_numbers_of_examples(counted: list[int]) -> None:
    model, posterior, x = made()
    predictive = Predictive(model, posterior, 12, compile=True, tolerance=0, settings=EXACT)
    for count in (12, 7, 3, 1, 9):
        predictive(x[:count])
    assert len(counted) == 1


def test_training_on_and_python_state_are_seen(counted: list[int]) -> None:
    class Scaling(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body, self.factor = body, 1.0

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.body(x) * self.factor
            return out

    body, _, x = made()
    model = Scaling(body).eval()
    posterior = stochbn.fit(model, [normal(64, 2, 6, 5, seed=9)], 8)
    compiled = Predictive(model, posterior, 8, compile=True, check="shape", settings=EXACT)
    plain = Predictive(model, posterior, 8, check="shape", settings=Settings(ways=frozenset()))
    compiled(x)
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)
    torch.testing.assert_close(compiled(x, generator=seeded(1)).probs, plain(x, generator=seeded(1)).probs)
    model.factor = 3.0
    torch.testing.assert_close(compiled(x, generator=seeded(1)).probs, plain(x, generator=seeded(1)).probs)


def test_where_compiling_fails_passes_are_made_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(graph: Any, examples: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    model, posterior, x = made()
    compiled = Predictive(model, posterior, 8, compile=True, settings=EXACT)
    with pytest.warns(UserWarning, match="torch.compile failed.*made without it") as warned:
        found = compiled(x, generator=seeded(1)).probs
    assert warned[0].filename == __file__
    torch.testing.assert_close(found, Predictive(model, posterior, 8, settings=EXACT)(x, generator=seeded(1)).probs)
    assert compiled(x).probs.isfinite().all(), "and says so once"


def test_the_networks_own_errors_stay_its_own(counted: list[int]) -> None:
    model, posterior, _ = made()
    compiled = Predictive(model, posterior, 8, compile=True, settings=EXACT)
    with pytest.raises(RuntimeError, match="failed on an input of shape"):
        compiled(normal(4, 3, 6, 5))


def test_threads_share_a_compiled_predictive(counted: list[int]) -> None:
    model, posterior, x = made()
    compiled = Predictive(model, posterior, 8, compile=True, settings=EXACT)
    wanted = compiled(x, generator=seeded(1)).probs
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(compiled(x, generator=seeded(1)).probs)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for one in found:
        torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-6)


def test_it_is_not_taken_where_bfloat16_is_or_nobody_asks() -> None:
    model, posterior, x = made()
    low = Predictive(model, posterior, 8, compile=True, settings=Settings(bfloat16=True, weights=0))
    assert "compiled: not taken: it is no faster than bfloat16" in low.explain(x)
    assert "compiled: not taken: it is for long jobs" in Predictive(model, posterior, 8).explain(x)


def test_a_network_that_passes_change_is_not_compiled(counted: list[int]) -> None:
    class Counting(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body, self.passes = body, 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            out: Tensor = self.body(x) * self.passes
            return out

    body, _, x = made()
    model = Counting(body).eval()
    posterior = stochbn.fit(model, [normal(64, 2, 6, 5, seed=9)], 8)
    compiled = Predictive(model, posterior, 12, compile=True, settings=EXACT)
    plain = Predictive(model, posterior, 12, settings=Settings(ways=frozenset()))
    torch.testing.assert_close(compiled(x, generator=seeded(1)).probs, plain(x, generator=seeded(1)).probs)
    assert not counted
    assert "compiled: not taken: passes change the network" in compiled.explain(x)


@pytest.mark.long
def test_optimised_code_gives_the_same_predictions() -> None:
    torch._dynamo.reset()
    model, posterior, x = made()
    compiled = Predictive(model, posterior, 12, compile=True, settings=EXACT)
    plain = Predictive(model, posterior, 12, settings=Settings(ways=frozenset()))
    for count in (12, 5, 1):
        both = [one(x[:count], generator=seeded(1)).probs for one in (compiled, plain)]
        torch.testing.assert_close(*both, rtol=1e-4, atol=1e-6)
    assert "shares its parameters." in compiled.explain(x), "compiling is no change of the network"
    assert "compiled: taken" in compiled.explain(x)
