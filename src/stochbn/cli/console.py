"""What commands show: the two consoles, and progress bars."""

from __future__ import annotations

import os
from collections.abc import Callable

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

__all__ = ["err", "follow", "out", "progress_bars", "side_by_side"]

out = Console()
err = Console(stderr=True)


class _RateColumn(ProgressColumn):
    """Steps per second, in the unit of the bar."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} {task.fields['unit']}/s", style="progress.data.speed")


def progress_bars() -> Progress:
    """Progress bars with rate and time left; their tasks name a unit."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), _RateColumn())
    return Progress(*columns, TimeRemainingColumn(), console=out)


def follow(bars: Progress, description: str) -> Callable[[int, int], None]:
    """A new bar, as the function that moves it."""
    task = bars.add_task(escape(description), total=None, unit="img", visible=False)
    return lambda done, total: bars.update(task, completed=done, total=total, visible=True)


def side_by_side(tasks: int) -> int:
    """How many tasks to do at once by default: one for each core, or one after another on an accelerator."""
    import torch

    return 1 if torch.accelerator.is_available() else min(tasks, os.cpu_count() or 1)
