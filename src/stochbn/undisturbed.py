"""Calls that leave no modes on their thread, even if an interrupt arrives at any line."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch._C import (
    _get_dispatch_stack_at,
    _get_function_stack_at,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch.utils import _python_dispatch

__all__ = ["scope", "undisturbed", "without_gradients"]

P = ParamSpec("P")
T = TypeVar("T")

_LOCAL = threading.local()
FLAGS = {
    "old_dispatch_mode_flags": "_is_in_torch_dispatch_mode",
    "old_non_infra_dispatch_mode_flags": "_is_in_non_infra_torch_dispatch_mode",
    "old_without_ignore_compile_internals_dispatch_mode_flags": "_is_in_any_mode_without_ignore_compile_internals",
}
"""What a dispatch mode takes back when it ends, and where in torch it puts it."""


class _Before:
    """The modes of this thread before a call, and what has been opened in it."""

    def __init__(self) -> None:
        self._gradients = torch.is_grad_enabled()
        self._inference: Any = None
        self._functions, self._dispatches = _len_torch_function_stack(), _len_torch_dispatch_stack()
        self._opened: list[Generator[Any, None, None]] = []
        scopes: list[list[Generator[Any, None, None]]] = _LOCAL.__dict__.setdefault("scopes", [])
        self._depth = len(scopes)
        scopes.append(self._opened)

    def stop_gradients(self) -> None:
        """Run the call without gradients and outside of inference mode."""
        if torch.is_inference_mode_enabled():
            self._inference = torch._C._InferenceMode(False)
            self._inference.__enter__()
        torch._C._set_grad_enabled(False)

    def restore(self) -> None:
        """Bring all back; it may be asked for again where it was interrupted."""
        while (count := _len_torch_function_stack()) > self._functions:
            _get_function_stack_at(count - 1).__exit__(None, None, None)
        while (count := _len_torch_dispatch_stack()) > self._dispatches:
            _leave(_get_dispatch_stack_at(count - 1))
        for generator in self._opened:  # the outermost first, which ends those in it
            generator.close()
        if self._inference is not None:
            self._inference.__exit__(None, None, None)
        torch._C._set_grad_enabled(self._gradients)
        del _LOCAL.scopes[self._depth :]


def _leave(mode: Any) -> None:
    """End a dispatch mode, also one whose own end an interrupt has cut off after it took what it needs to end."""
    for kept, name in FLAGS.items():
        flags = getattr(mode, kept, None)
        if flags is not None and not flags:
            flags.append(getattr(_python_dispatch, name, False))
    mode.__exit__(None, None, None)


def undisturbed(function: Callable[P, T]) -> Callable[P, T]:
    """Make a function restore the modes of its thread, and close every `scope` that it opened.

    A ``with`` block does not guarantee this, because an interrupt may arrive before its end runs.
    """
    return _leaving(function, gradients=True)


def without_gradients(function: Callable[P, T]) -> Callable[P, T]:
    """As `undisturbed`, and the function runs without gradients and outside of inference mode."""
    return _leaving(function, gradients=False)


def _leaving(function: Callable[P, T], gradients: bool) -> Callable[P, T]:
    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        before = _Before()
        try:
            try:
                if not gradients:
                    before.stop_gradients()
                return function(*args, **kwargs)
            finally:
                before.restore()
        finally:  # again, as an interrupt may have come in between
            before.restore()

    return call


def scope(function: Callable[P, Generator[T, None, None]]) -> Callable[P, AbstractContextManager[T]]:
    """As ``contextlib.contextmanager``, but what an interrupt leaves open ends with the call that it is opened in."""

    @functools.wraps(function)
    def opened(*args: P.args, **kwargs: P.kwargs) -> Generator[T, None, None]:
        generator = function(*args, **kwargs)
        scopes = getattr(_LOCAL, "scopes", None)
        if scopes:
            scopes[-1].append(generator)
        return generator

    return contextmanager(opened)
