from __future__ import annotations

import functools
import io
import re
import sys
import warnings
from collections.abc import Callable

import pytest

from stochbn.cli import console
from stochbn.report.tables import Table

WIDE = Table(
    "mnist: error and calibration",
    ["method", "error %", "+ SBN", "NLL (nats)", "difference ± s.e.", "mean abs. correlation within"],
    [["plain", "0.57", "0.54", "0.0193", "-0.0013 ± 0.0002", "0.123"], ["Dropout", "0.58", "-", "0.02", "-", "1.5"]],
)


class Terminal:
    """Standard output of an encoding, as the programs that print to it see it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, encoding: str, columns: int) -> None:
        self.bytes = io.BytesIO()
        stream = io.TextIOWrapper(self.bytes, encoding=encoding, write_through=True)
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(console, "out", console._Console())
        console.never_fail_to_encode()

    @property
    def text(self) -> str:
        return self.bytes.getvalue().decode(sys.stdout.encoding)


@pytest.fixture
def make_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], Terminal]:
    """Called in a test, as standard output is another one while fixtures are made."""
    return functools.partial(Terminal, monkeypatch)


def test_a_table_has_its_title_its_columns_and_every_cell_in_a_frame(
    make_terminal: Callable[[str, int], Terminal],
) -> None:
    terminal = make_terminal("utf-8", 200)
    console.show([WIDE])
    lines = terminal.text.splitlines()
    assert lines[0].strip() == WIDE.title
    assert [cell.strip() for cell in re.split("[┃│]", lines[2])[1:-1]] == WIDE.columns
    assert [cell.strip() for cell in lines[4].split("│")[1:-1]] == WIDE.rows[0]


@pytest.mark.parametrize("columns", [200, 100, 80, 72, 60, 40, 20])
def test_no_column_and_no_number_is_lost_however_narrow_the_terminal(
    columns: int, make_terminal: Callable[[str, int], Terminal]
) -> None:
    terminal = make_terminal("utf-8", columns)
    console.show([WIDE])
    for row in WIDE.rows:
        for cell in row:
            assert cell in terminal.text
    flat = " ".join(re.sub("[┃│]", " ", terminal.text).split())
    for word in " ".join(WIDE.columns).split():
        assert word in flat
    assert "…" not in terminal.text


@pytest.mark.parametrize("columns", [100, 90, 80, 70])
def test_a_line_of_a_table_is_no_longer_than_the_terminal(
    columns: int, make_terminal: Callable[[str, int], Terminal]
) -> None:
    terminal = make_terminal("utf-8", columns)
    console.show([WIDE])
    assert max(map(len, terminal.text.splitlines())) <= console.out.width


def test_a_table_that_is_too_wide_is_a_list_of_what_is_in_its_rows(
    make_terminal: Callable[[str, int], Terminal],
) -> None:
    terminal = make_terminal("utf-8", 40)
    console.show([WIDE])
    assert [line.rstrip() for line in terminal.text.splitlines()][:8] == [
        WIDE.title, "method: plain", "  error %: 0.57", "  + SBN: 0.54", "  NLL (nats): 0.0193",
        "  difference ± s.e.: -0.0013 ± 0.0002", "  mean abs. correlation within: 0.123", "method: Dropout",
    ]  # fmt: skip


@pytest.mark.parametrize("columns", [40, 200])
def test_a_terminal_without_other_characters_gets_ascii_that_can_be_read(
    columns: int, make_terminal: Callable[[str, int], Terminal]
) -> None:
    terminal = make_terminal("ascii", columns)
    console.show([WIDE])
    console.say("Saved as naïve[✓].csv … see “notes”")
    with console.progress_bars() as bars:
        console.follow(bars, "naïve")(1, 2)
    with console.status("measuring"):
        pass
    print("╭──╮ │")  # as the frames of the help are
    assert terminal.text.isascii()
    assert "-0.0013 +- 0.0002" in terminal.text
    assert r"Saved as na\xefve[\u2713].csv ... see" in terminal.text
    assert "+--+ |" in terminal.text


def test_what_an_encoding_has_stays(make_terminal: Callable[[str, int], Terminal]) -> None:
    terminal = make_terminal("cp1252", 200)
    console.show([WIDE])
    console.say("naïve ✓")
    assert "-0.0013 ± 0.0002" in terminal.text
    assert r"naïve \u2713" in terminal.text


@pytest.mark.parametrize("name", ["[bold]", "dog [red]", "[/]", "[/INST]", ":smile:", "\\[x]", "नमस्\u200dते", "猫"])
def test_names_are_shown_as_they_are(name: str, make_terminal: Callable[[str, int], Terminal]) -> None:
    terminal = make_terminal("utf-8", 200)
    console.show([Table(name, ["class", name], [[name, "1"]])])
    console.say(f"Saved {name}.", name)
    with console.progress_bars() as bars:
        console.follow(bars, f"loading {name}")(1, 1)
    assert terminal.text.count(name) == 5


def test_names_do_not_control_the_terminal(make_terminal: Callable[[str, int], Terminal]) -> None:
    terminal = make_terminal("utf-8", 200)
    console.show([Table("t", ["class"], [["cat\x1b[2J"], ["two\nlines"], ["\udcff"]])])
    assert r"cat\x1b[2J" in terminal.text
    assert r"two\nlines" in terminal.text
    assert r"\udcff" in terminal.text


@pytest.mark.parametrize("columns", [30, 200])
@pytest.mark.parametrize("sign", ["\x1b]0;title\x07", "\x9b2J", "\u202e", "\u2066", "\u200b", "\x00", "\x08"])
def test_nothing_that_is_shown_acts_on_the_terminal(
    sign: str, columns: int, make_terminal: Callable[[str, int], Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = make_terminal("utf-8", columns)
    monkeypatch.setattr(console, "err", console.out)
    printed: list[str] = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *place: printed.append(message))
    console.show_warnings()
    name = f"a{sign}b"
    console.say(f"Saved {name}.", name)
    console.complain(f"{name} cannot be read")
    for kind in (UserWarning, RuntimeWarning):
        warnings.showwarning(name, kind, "file.py", 1)
    console.show([Table(name, ["class", name], [[name, "1"]])])
    with console.progress_bars() as bars:
        console.follow(bars, f"loading {name}")(1, 1)
    with console.status(name):
        pass
    for shown in (terminal.text, *printed):
        assert sign not in shown
        assert "a\\" in shown


@pytest.mark.parametrize("sign", ["\n", "\r\n", "\u2028", "\x85"])
def test_a_name_of_several_lines_stays_on_one(sign: str, make_terminal: Callable[[str, int], Terminal]) -> None:
    terminal = make_terminal("utf-8", 200)
    console.say(f"Saved a{sign}Error: b.\nNext: c", f"a{sign}Error: b")
    assert len(terminal.text.splitlines()) == 2


def test_a_sentence_is_left_to_the_terminal_to_break(make_terminal: Callable[[str, int], Terminal]) -> None:
    terminal = make_terminal("utf-8", 40)
    command = "stochbn fit " + 30 * "long/" + "network.safetensors"
    console.say(f"Next: {command}", command)
    assert terminal.text == f"Next: {command}\n"


@pytest.mark.parametrize("columns", [50, 200])
@pytest.mark.parametrize(("seconds", "shown"), [(0.25, "took 1 s"), (58.9, "took 59 s"), (3725.0, "took 1:02:05")])
def test_a_bar_ends_with_the_time_taken(
    seconds: float, shown: str, columns: int, make_terminal: Callable[[str, int], Terminal]
) -> None:
    terminal = make_terminal("utf-8", columns)
    now = 0.0
    with console.progress_bars() as bars:
        bars.get_time = lambda: now
        move = console.follow(bars, "work")
        bars.tasks[0].start_time = 0.0
        move(1, 2)
        now = seconds
        move(2, 2)
    assert shown in terminal.text
