"""Tasks: how a network's output is read, averaged, calibrated, scored and shown, one task in each module.

To write your own task, make a subclass of `Task`, and pass an instance as ``task=``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from stochbn.network.layers import unwrap
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
    "task_of",
]

TASKS: Mapping[str, type[Task]] = {
    task.name: task for task in (Classification, Binary, Multilabel, Regression, Survival, Detection, Embedding)
}
"""Every task, by name."""


def named(task: Task) -> bool:
    """Whether a task is one of `TASKS`, so that a file can name it."""
    return type(task) is TASKS.get(task.name)


PROBLEMS: Mapping[str, type[Task]] = {"multi_label_classification": Multilabel, "regression": Regression}
"""The tasks by the ``problem_type`` of configs of Transformers."""


def task_of(
    model: nn.Module,
    task: Task | str | None = None,
    place: Any = None,
    class_axis: int | None = None,
    output: str | None = None,
) -> Task:
    """Return the task that is given or, if it is None, the one that the network's config names.

    Args:
        model: the network.
        task: a task, or its name; None is the task of ``config.problem_type``, or classification.
        place: as for `Task`, like the arguments below; they override the fields of a task.
        class_axis: the axis of the classes in the output.
        output: ``"logits"`` or ``"probs"``.

    Raises:
        TypeError, ValueError: as `make_task`.
    """
    if task is None:
        problem = getattr(getattr(unwrap(model), "config", None), "problem_type", None)
        task = (PROBLEMS.get(problem, Classification) if isinstance(problem, str) else Classification).name
    return make_task(task, place, class_axis, output)


def make_task(name: Task | str, place: Any = None, class_axis: int | None = None, output: str | None = None) -> Task:
    """Make the task of a name, or a task with other places or axes.

    >>> import torch
    >>> make_task("binary", "score").raw({"score": torch.tensor([1.5, -2.0])})
    tensor([[ 0.0000,  1.5000],
            [ 0.0000, -2.0000]])

    Raises:
        ValueError: there is no such task, or `class_axis` or `output` is given for a task without classes.
        TypeError: an argument is of the wrong type.
    """
    given = {"place": place, "class_axis": class_axis, "output": output}
    if isinstance(name, Task):
        return replace(name, **{key: value for key, value in given.items() if value is not None})
    if not isinstance(name, str) or name not in TASKS:
        raise ValueError(f"unknown task {name!r}; there are {', '.join(map(repr, TASKS))}, or a stochbn.Task")
    return TASKS[name](**given)
