from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from stochbn.processes import interrupts_held

pytestmark = pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="signals are blocked on POSIX alone")

CHILD = """
import sys
print("started", flush=True)
sys.stdin.read()
print("ended by itself", flush=True)
"""


def started(held: bool) -> subprocess.Popen[str]:
    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    if not held:
        return start()
    with interrupts_held():
        return start()


@pytest.mark.parametrize("at_once", [True, False])
def test_a_process_that_is_started_within_does_not_see_ctrl_c(at_once: bool) -> None:
    with started(held=True) as process:
        assert process.stdout is not None
        if not at_once:
            assert process.stdout.readline() == "started\n"
        for _ in range(3):
            process.send_signal(signal.SIGINT)
        output, error = process.communicate("")
    assert output.endswith("ended by itself\n")
    assert (process.returncode, error) == (0, "")


def test_a_process_that_is_started_outside_sees_it() -> None:
    with started(held=True), started(held=False) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGINT)
        output, error = process.communicate()
    assert "KeyboardInterrupt" in error
    assert "ended by itself" not in output


def test_ctrl_c_within_comes_at_the_end() -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt), interrupts_held():  # noqa: PT012 (the order is what is tested)
        os.kill(os.getpid(), signal.SIGINT)
        reached = True
    assert reached


OTHERS = """
import os, signal, threading, time
from stochbn.processes import interrupts_held

ended = threading.Event()
others = [threading.Thread(target=ended.wait) for _ in range(3)]
for thread in others:
    thread.start()
try:
    with interrupts_held():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
        print("reached")
except KeyboardInterrupt:
    print("interrupted")
finally:
    ended.set()
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""


def test_ctrl_c_comes_at_the_end_whichever_thread_of_the_process_gets_it() -> None:
    ended = subprocess.run([sys.executable, "-c", OTHERS], capture_output=True, text=True, check=False)
    assert (ended.stdout, ended.stderr) == ("reached\ninterrupted\nTrue\n", "")


FIRST = """
import multiprocessing, signal
from stochbn.processes import interrupts_held

def blocked():
    print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))

if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=blocked)
    with interrupts_held():
        process.start()
    process.join()
"""


def test_the_first_process_of_multiprocessing_does_not_see_ctrl_c_either(tmp_path: Path) -> None:
    """Something that multiprocessing starts before its first process lets signals through."""
    (tmp_path / "first.py").write_text(FIRST)
    ended = subprocess.run([sys.executable, str(tmp_path / "first.py")], capture_output=True, text=True, check=False)
    assert (ended.stdout, ended.stderr) == ("True\n", "")


def test_what_was_blocked_before_stays_so_and_errors_pass() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with interrupts_held():
        with pytest.raises(ZeroDivisionError), interrupts_held():
            raise ZeroDivisionError
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_it_works_in_any_thread() -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with interrupts_held():
                pass
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors
