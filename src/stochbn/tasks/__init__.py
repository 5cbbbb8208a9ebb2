"""What a network's output means, a module each task: how it is read, averaged, calibrated, scored and shown.

Everything else asks the task. A task of your own is a subclass of `Task`, and an instance of it is what ``task=`` takes
beside a name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from stochbn.tasks.base import Task
from stochbn.tasks.binary import Binary
from stochbn.tasks.classification import Classification
from stochbn.tasks.detection import Detection
from stochbn.tasks.embedding import Embedding
from stochbn.tasks.multilabel import Multilabel
from stochbn.tasks.regression import Regression
from stochbn.tasks.survival import Survival

__all__ = [
    "TASKS",
    "Binary",
    "Classification",
    "Detection",
    "Embedding",
    "Multilabel",
    "Regression",
    "Survival",
    "Task",
    "make_task",
    "named",
]

TASKS: Mapping[str, type[Task]] = {
    task.name: task for task in (Classification, Binary, Multilabel, Regression, Survival, Detection, Embedding)
}
"""Every task by its name."""


def named(task: Task) -> bool:
    """Whether a file can name a task: whether it is one of `TASKS`."""
    return type(task) is TASKS.get(task.name)


def make_task(name: Task | str, place: Any = None, class_axis: int | None = None, output: str | None = None) -> Task:
    """The task of a name, or a task itself with other places or axes.

    >>> import torch
    >>> make_task("binary", "score").raw({"score": torch.tensor([1.5, -2.0])})
    tensor([[ 0.0000,  1.5000],
            [ 0.0000, -2.0000]])

    Raises:
        ValueError: there is no such task, or it has no classes for `class_axis` or `output` to be about.
        TypeError: an argument is of the wrong type.
    """
    given = {"place": place, "class_axis": class_axis, "output": output}
    if isinstance(name, Task):
        return replace(name, **{key: value for key, value in given.items() if value is not None})
    if not isinstance(name, str) or name not in TASKS:
        raise ValueError(f"unknown task {name!r}; there are {', '.join(map(repr, TASKS))}, or a stochbn.Task")
    return TASKS[name](**given)
