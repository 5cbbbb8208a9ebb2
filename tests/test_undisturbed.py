from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import stochbn
from conftest import Untouched, count_lines, mlp, normal, seeded, settled
from stochbn.execution.masks import Masks
from stochbn.network.replica import Network
from stochbn.undisturbed import scope, undisturbed, without_gradients

DATA = [normal(48, 4, seed=3)]


def network(kind: str) -> nn.Sequential:
    """A network with dropout, which is run in place where it holds a lock, that cannot be copied."""
    model = nn.Sequential(*settled(mlp(), 4).children(), nn.Dropout(0.3)).train()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(20):
            model(DATA[0])
    model.eval()
    if kind == "in place":
        model.lock = threading.Lock()  # type: ignore[assignment]
    return model


def calls(model: nn.Module) -> dict[str, Callable[[], Any]]:
    posterior, x = stochbn.fit(model, DATA, 8), normal(12, 4)
    predictive, dropped = stochbn.Predictive(model, posterior), stochbn.MCDropout(model, 9, posterior)
    exact, labels = stochbn.Exact(model, DATA, 8, draws=3), torch.arange(12) % 3
    return {
        "fit": lambda: stochbn.fit(model, DATA, 8).expected,
        "predict": lambda: predictive(x, generator=seeded()).probs,
        "begin and predict": lambda: stochbn.Predictive(model, posterior)(x, generator=seeded()).probs,
        "dropout": lambda: dropped(x, generator=seeded()).probs,
        "exact": lambda: exact(x).probs,
        "calibrate": lambda: stochbn.calibrate(model, posterior, [(x, labels)], draws=2).expected,
    }


def interrupted(call: Callable[[], Any], stop: int | None) -> int:
    """Run a call, interrupted at the line of that number among the package's own and contextlib's; how many it had."""
    return count_lines(call, stop, KeyboardInterrupt, "contextlib.py")


def modes() -> tuple[int, int, bool, bool]:
    stacks = torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()
    return *stacks, torch.is_grad_enabled(), torch.is_inference_mode_enabled()


@pytest.mark.parametrize("within", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["copied", "in place"])
@pytest.mark.parametrize("name", ["fit", "predict", "begin and predict", "dropout", "exact", "calibrate"])
def test_an_interrupt_at_any_line_leaves_nothing_on_the_thread(name: str, kind: str, within: Any) -> None:
    model = network(kind)
    every = calls(model)  # whose predictives keep what is known of the network
    call = every[name]
    wanted = call()
    before, numbers = Untouched(model), torch.get_rng_state()
    kept = []  # errors that are kept, as in an interactive session, keep frames alive
    with within():
        start = modes()
        lines = interrupted(call, None)
        for stop in sorted(random.Random(1).sample(range(1, lines), 16)):
            try:
                interrupted(call, stop)
            except KeyboardInterrupt as error:
                kept.append(error)
            assert modes() == start
            before.check()
            assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
            assert torch.equal(torch.get_rng_state(), numbers)
            assert _free_for_others(model)
            assert Network.of(model)._borrower is None
        torch.testing.assert_close(call(), wanted)
    assert len(kept) == 16
    assert modes() == (0, 0, True, False)


def _free_for_others(model: nn.Module) -> bool:
    lock, found = Network.of(model)._in_use, []

    def ask() -> None:
        found.append(lock.acquire(blocking=False))
        if found[0]:
            lock.release()

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return found[0]


class Mode(TorchFunctionMode):
    """Does nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_what_a_function_leaves_is_taken_back_and_what_was_there_stays() -> None:
    closed = []

    @scope
    def opened(name: str) -> Generator[str, None, None]:
        try:
            yield name
        finally:
            closed.append(name)

    @undisturbed
    def leaving() -> None:
        for mode in (Masks(0), Mode()):
            mode.__enter__()  # type: ignore[no-untyped-call]
        torch.set_grad_enabled(False)
        opened("outer").__enter__()
        opened("inner").__enter__()
        raise KeyError

    with Mode(), Masks(1):
        before = modes()
        with pytest.raises(KeyError):
            leaving()
        assert modes() == before
        assert closed == ["outer", "inner"]
    assert modes() == (0, 0, True, False)


def test_gradients_and_inference_mode_are_off_within_and_as_before_after() -> None:
    @without_gradients
    def double(x: Tensor) -> tuple[bool, bool, Tensor]:
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), 2 * x

    weight = nn.Parameter(torch.ones(3))
    for within in (contextlib.nullcontext, torch.no_grad, torch.inference_mode, torch.enable_grad):
        with within():
            before = modes()
            gradients, inference, doubled = double(weight)
            assert (gradients, inference, doubled.requires_grad, doubled.is_inference()) == (False,) * 4
            assert modes() == before
    assert double.__name__ == "double"


def test_what_is_opened_outside_of_such_a_call_is_an_ordinary_context() -> None:
    @scope
    def opened() -> Generator[int, None, None]:
        yield 3

    with opened() as number:
        assert number == 3


@pytest.mark.parametrize("taken", [1, 2, 3])
def test_a_mode_that_an_interrupt_has_cut_off_in_its_own_end_is_ended(taken: int) -> None:
    @undisturbed
    def interrupted() -> None:
        mode: Any = Masks(0)
        mode.__enter__()
        flags = [name for name in vars(mode) if name.startswith("old_") and name.endswith("flags")]
        for name in flags[:taken]:
            getattr(mode, name).pop()
        raise KeyboardInterrupt

    before = torch._C._len_torch_dispatch_stack()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch._C._len_torch_dispatch_stack() == before
    torch.manual_seed(0)
    wanted = torch.rand(2)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(2), wanted)
