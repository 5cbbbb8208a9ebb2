"""Start processes that share the work, and end them on Ctrl-C."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

__all__ = ["ProcessError", "interrupts_held", "side_by_side"]


class ProcessError(RuntimeError):
    """Raised if the work of another process failed; the message says how to continue."""


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


def side_by_side(
    work: Callable[..., None], tasks: Mapping[str, tuple[Any, ...]], jobs: int, progress: Callable[..., None]
) -> None:
    """Run every task in its own process, several at a time, each with an equal share of the cores.

    Args:
        work: a function of a module, called in the process with the arguments of a task and a function that reports
            progress.
        tasks: arguments that can be pickled, by the name of the task.
        jobs: the number of processes at a time.
        progress: called in this process with what a process reports.

    Raises:
        ProcessError: a process raised an error or ended; the others are then ended too.
    """
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // jobs)
    waiting = list(tasks)
    running: dict[Connection, tuple[str, Any]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(work, tasks[name], threads, theirs), daemon=True)
                with interrupts_held():
                    process.start()
                    running[ours] = name, process
                theirs.close()
            for pipe in wait(list(running)):
                assert isinstance(pipe, Connection)
                name, process = running[pipe]
                try:
                    event = pipe.recv()
                except EOFError:
                    process.join()
                    del running[pipe]
                    if process.exitcode:
                        raise ProcessError(
                            f"the process of {name} ended with exit code {process.exitcode} (a negative one is a "
                            "signal, as when memory runs out); run again to continue, with fewer jobs if so"
                        ) from None
                    continue
                if isinstance(event, str):
                    raise ProcessError(f"{name} failed, run again to continue after mending this: {event}")
                progress(*event)
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()


def _work(work: Callable[..., None], arguments: tuple[Any, ...], threads: int, pipe: Connection) -> None:
    """A process. Once the process that started it is gone, its next report ends it too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent ends its children
    torch.set_num_threads(threads)
    try:
        work(*arguments, lambda *event: pipe.send(event))
    except BrokenPipeError:
        raise SystemExit(1) from None
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
