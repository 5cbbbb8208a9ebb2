"""Processes that are started to share the work."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

__all__ = ["ProcessError", "interrupts_held"]


class ProcessError(RuntimeError):
    """The work of another process failed; the message says how to go on."""


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
    resource_tracker.ensure_running()  # which multiprocessing else starts within, and lets signals through with it
    noted: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    # The mask is this thread's alone: another one may get the signal, and Python then interrupts the main thread.
    catches = handler is not None and threading.current_thread() is threading.main_thread()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        if catches:
            signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))
        yield
    finally:
        if catches:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if noted:
            signal.raise_signal(signal.SIGINT)
