"""Tasks: how a network's output is read, averaged, calibrated, scored and shown, one task in each module.

To write your own task, make a subclass of `Task`, and pass an instance as ``task=``.
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
"""Every task, by name."""


def named(task: Task) -> bool:
    """Whether a task is one of `TASKS`, so that a file can name it."""
    return type(task) is TASKS.get(task.name)


def make_task(
    name: Task | str, place: Any = None, class_axis: int | None = None, output: str | None = None, **fields: Any
) -> Task:
    """Make the task of a name, or a task with other places or axes; `fields` are those that the task has alone.

    >>> import torch
    >>> make_task("binary", "score").raw({"score": torch.tensor([1.5, -2.0])})
    tensor([[ 0.0000,  1.5000],
            [ 0.0000, -2.0000]])

    Raises:
        ValueError: there is no such task, or `class_axis` or `output` is given for a task without classes.
        TypeError: an argument is of the wrong type.
    """
    given = {"place": place, "class_axis": class_axis, "output": output, **fields}
    if isinstance(name, Task):
        return replace(name, **{key: value for key, value in given.items() if value is not None})
    if not isinstance(name, str) or name not in TASKS:
        raise ValueError(f"unknown task {name!r}; there are {', '.join(map(repr, TASKS))}, or a stochbn.Task")
    return TASKS[name](**given)
