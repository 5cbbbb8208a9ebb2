"""Processes that are started to share the work."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["interrupts_held"]


@contextmanager
def interrupts_held() -> Iterator[None]:
    """For the start of a process: Ctrl-C reaches this one when the block ends, and the started one never.

    Ctrl-C in a terminal goes to every process there. One that is started within the block does not see it from its
    first moment on, as a blocked signal is inherited, so that it prints no trace; who started it has to end it. On
    Windows, where signals cannot be blocked, nothing changes.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
