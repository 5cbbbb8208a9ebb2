"""What commands show: sentences, tables and progress bars, on any terminal.

Nothing that comes from data is read as markup. What the terminal's encoding lacks is written in ASCII, and a table that
is too wide for the terminal is shown as a list, so that no number is cut.
"""

from __future__ import annotations

import codecs
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.table import Column
from rich.table import Table as RichTable
from rich.text import Text

from stochbn.texts import visible

if TYPE_CHECKING:
    from stochbn.report.tables import Table

__all__ = [
    "complain",
    "follow",
    "never_fail_to_encode",
    "progress_bars",
    "readable",
    "say",
    "show",
    "show_warnings",
    "side_by_side",
    "status",
]


class _Console(Console):
    """A console that shows strings as they are, and knows the encoding of the stream that it now writes to."""

    def __init__(self, *, stderr: bool = False, width: int | None = None) -> None:
        super().__init__(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)

    @property
    def encoding(self) -> str:
        """That of standard output or error, which Rich takes to be UTF-8."""
        return (getattr(self.file, "encoding", None) or "utf-8").lower()


out = _Console()
err = _Console(stderr=True)

IN_ASCII = {
    "\u00b1": "+-",
    "\u2013": "-",
    "\u2014": "-",
    "\u2018": "'",
    "\u2019": "'",
    "\u2026": "...",
    "\u2022": "*",
    "\u2264": "<=",
    "\u2265": ">=",
}
"""What is written in place of signs that this program and the ones below it print."""

READABLE = "stochbn.readable"
"""The name of the way to encode what an encoding lacks: `_in_ascii`."""


UNBOUNDED = 10_000
"""The width of tables in files and pipes, which have no lines to break."""


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """What to write in place of characters that an encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_ascii, error.object[error.start : error.end])), error.end


def _ascii(character: str) -> str:
    if character in IN_ASCII:
        return IN_ASCII[character]
    if "\u2500" <= character <= "\u257f":  # the frames of tables, and progress bars
        return "-" if character in "─━╌╍═╴╶╸╺╼╾" else "|" if character in "│┃║╎╏╵╷╹╻╽╿" else "+"
    return character.encode("ascii", "backslashreplace").decode()


codecs.register_error(READABLE, _in_ascii)


def never_fail_to_encode() -> None:
    """Have standard output and error write what their encoding lacks in ASCII, whoever prints it."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=READABLE)


def readable(text: str) -> str:
    """A line of text as the terminal can show it: what would control it is escaped, and so is what its encoding lacks.

    All that commands show goes through here, as names and errors may come from a stranger's file.
    """
    text = visible(text)
    return text.encode(out.encoding, READABLE).decode(out.encoding)


def say(text: str, *bold: object) -> None:
    """Print sentences; a line is left to the terminal to break, so that it can be copied.

    Args:
        text: the sentences.
        bold: names in them that stand out; one with a line break in it stays on its line.
    """
    names = {str(word): readable(str(word)) for word in bold if str(word)}
    for name, word in names.items():
        text = text.replace(name, word)
    shown = Text("\n".join(map(readable, text.split("\n"))))
    shown.highlight_words(list(names.values()), "bold")
    out.print(shown, soft_wrap=True)


def complain(text: str) -> None:
    """Print one line about an error."""
    err.print(Text.assemble(("Error:", "bold red"), " ", _line(text)), soft_wrap=True)


OPTIONS = {"ignore_index": "ignore"}
"""Options of the command line for arguments of Python's that are called otherwise."""
ARGUMENT = re.compile(r"\b(task|logits|class_axis|ignore_index|batch_size|draws|tolerance)=([\"']?)([^\s\"',;)]+)\2")


WORDS = {
    "pass larger batches, a smaller batch_size, or batch_size=None to take the batches as they come": "give more "
    "examples, or a smaller --batch-size",
    ', or pass check="shape" to Predictive or calibrate to use it nevertheless': "",
    ", load the posterior that belongs to these weights": ", or name the posterior that belongs to these weights",
    'pass output="logits"': "leave out --probs",
    'use output="logits"': "leave out --probs",
    'output="logits"': "no --probs",
    'output="probs"': "--probs",
}
"""Advice for Python code, and what the command line has instead."""


def _line(text: str) -> str:
    """A message as one line, with options in place of the arguments that Python code has.

    >>> _line('leave out task="binary", or\\npass class_axis=-1; see output="probs"')
    'leave out --task binary, or pass --class-axis -1; see --probs'
    """
    for given, words in WORDS.items():
        text = text.replace(given, words)
    text = ARGUMENT.sub(lambda found: f"--{OPTIONS.get(found[1], found[1]).replace('_', '-')} {found[3]}", text)
    return readable(" ".join(text.split()))


def show_warnings() -> None:
    """Print warnings for users as one line each, without the place in the code that they come from."""
    usual = warnings.showwarning

    def shown(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if not issubclass(category, UserWarning):
            usual(readable(" ".join(str(message).split())), category, *place, **more)
        elif not out.quiet:
            err.print(Text.assemble(("Warning:", "bold yellow"), " ", _line(str(message))), soft_wrap=True)

    warnings.showwarning = shown


def show(tables: Iterable[Table]) -> None:
    """Print tables: each as such where the terminal is wide enough for all of its cells, otherwise as a list."""
    if out.quiet:
        return
    wide = out if out.is_terminal or "COLUMNS" in os.environ else _Console(width=UNBOUNDED)
    for table in tables:
        columns = [readable(name) for name in table.columns]
        rows = [[readable(cell) for cell in row] for row in table.rows]
        title = Text(readable(table.title), "bold")
        widths = _widths(columns, rows, wide.width - 1 - 3 * len(columns))
        if widths is None:
            out.print(title, soft_wrap=True)
            for first, *others in rows:
                out.print(Text(f"{columns[0]}: {first}"), soft_wrap=True)
                for name, cell in zip(columns[1:], others, strict=True):
                    out.print(Text(f"  {name}: {cell}"), soft_wrap=True)
            continue
        wide.print(title, soft_wrap=True)
        shown = RichTable()
        for i, (name, width) in enumerate(zip(columns, widths, strict=True)):
            shown.add_column(name, justify="right" if i else "left", width=width)
        for row in rows:
            shown.add_row(*row)
        wide.print(shown)


def _widths(columns: list[str], rows: list[list[str]], room: int) -> list[int] | None:
    """The widths of a table's columns, in which only their names may be broken, between words; None if they lack room.

    Args:
        columns: their names.
        rows: their cells.
        room: how many characters of a line are left for them.
    """
    cells = [max((cell_len(row[i]) for row in rows), default=0) for i in range(len(columns))]
    widths = [max(cell, max(map(cell_len, name.split()))) for cell, name in zip(cells, columns, strict=True)]
    if sum(widths) > room:
        return None
    for i, name in enumerate(columns):  # names stay on one line as long as there is room
        widths[i] += min(max(cell_len(name) - widths[i], 0), room - sum(widths))
    return widths


def status(text: str) -> Status:
    """A line that moves while something is done."""
    return out.status(Text(readable(text)), spinner="line" if out.options.ascii_only else "dots")


class _RateColumn(ProgressColumn):
    """Steps per second, in the unit of the bar."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} {task.fields['unit']}/s", style="progress.data.speed")


class _TimeColumn(TimeRemainingColumn):
    """The time left and, at the end, the time taken."""

    def render(self, task: Task) -> Text:
        if task.finished_time is None:
            return super().render(task)
        # In whole seconds: a piped output has no numbers with decimals but those of its results.
        taken = math.ceil(task.finished_time)
        hours, seconds = divmod(taken, 3600)
        shown = f"{taken} s" if taken < 60 else f"{hours}:{seconds // 60:02}:{seconds % 60:02}"
        return Text(f"took {shown}", style="progress.elapsed")


def progress_bars() -> Progress:
    """Progress bars with rate and time left or, at the end, taken; their tasks name a unit."""
    description = TextColumn("{task.description}", markup=False, table_column=Column(overflow="fold"))
    if out.width < 80:
        return Progress(description, TaskProgressColumn(), _TimeColumn(), console=out)
    return Progress(description, BarColumn(), TaskProgressColumn(), _RateColumn(), _TimeColumn(), console=out)


def follow(bars: Progress, description: str, unit: str = "img") -> Callable[[int, int], None]:
    """A new bar, as the function that moves it; it is shown from its first move on."""
    task = bars.add_task(readable(description), total=None, unit=unit, visible=False)
    return lambda done, total: bars.update(task, completed=done, total=total, visible=True)


def side_by_side(tasks: int) -> int:
    """How many tasks to do at once by default: one for each core, or one after another on an accelerator."""
    import torch

    return 1 if torch.accelerator.is_available() else min(tasks, os.cpu_count() or 1)
