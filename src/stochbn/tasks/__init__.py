"""What a network's output means, a module each task: how it is read, averaged, calibrated, scored and shown.

Everything else asks the task. A task of your own is a subclass of `Task`, and an instance of it is what ``task=`` takes
beside a name.
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
    "task_in",
    "task_of",
]

TASKS: Mapping[str, type[Task]] = {
    task.name: task for task in (Classification, Binary, Multilabel, Regression, Survival, Detection, Embedding)
}
"""Every task by its name."""


def named(task: Task) -> bool:
    """Whether a file can name a task: whether it is one of `TASKS`."""
    return type(task) is TASKS.get(task.name)


PROBLEMS: Mapping[str, type[Task]] = {"multi_label_classification": Multilabel, "regression": Regression}
"""The tasks of what the configs of Transformers call a ``problem_type``."""


def task_of(
    model: nn.Module,
    task: Task | str | None = None,
    place: Any = None,
    class_axis: int | None = None,
    output: str | None = None,
) -> Task:
    """The task that is given or, if it is None, the one that the network or its config names.

    A network names its task by an attribute ``task`` that is one, such as `stochbn.tasks.heads.DenseHead`. It is also
    taken where a task of that name is asked for.

    Args:
        model: the network.
        task: a task, or its name; None is the network's own, what ``config.problem_type`` says, or classification.
        place: as for `Task`, and so are the others; they take the place of what a task says.
        class_axis: the axis of the classes in the output.
        output: ``"logits"`` or ``"probs"``.

    Raises:
        TypeError, ValueError: as `make_task`.
    """
    own = getattr(unwrap(model), "task", None)
    if isinstance(own, Task) and (task is None or task == own.name):
        task = own
    if task is None:
        problem = getattr(getattr(unwrap(model), "config", None), "problem_type", None)
        task = (PROBLEMS.get(problem, Classification) if isinstance(problem, str) else Classification).name
    return make_task(task, place, class_axis, output)


def task_in(model: nn.Module, settings: Mapping[str, Any]) -> Task:
    """The task that arguments of a predictive mean for a network: ``task``, ``logits``, ``class_axis`` and ``output``.

    Raises:
        TypeError, ValueError: as `make_task`.
    """
    task, place, axis, output = (settings.get(name) for name in ("task", "logits", "class_axis", "output"))
    return task_of(model, task, place, axis, output)


def make_task(
    name: Task | str, place: Any = None, class_axis: int | None = None, output: str | None = None, **fields: Any
) -> Task:
    """The task of a name, or a task itself with other places or axes; `fields` are those that the task has alone.

    >>> import torch
    >>> make_task("binary", "score").raw({"score": torch.tensor([1.5, -2.0])})
    tensor([[ 0.0000,  1.5000],
            [ 0.0000, -2.0000]])

    Raises:
        ValueError: there is no such task, or it has no classes for `class_axis` or `output` to be about.
        TypeError: an argument is of the wrong type.
    """
    given = {"place": place, "class_axis": class_axis, "output": output, **fields}
    if isinstance(name, Task):
        return replace(name, **{key: value for key, value in given.items() if value is not None})
    if not isinstance(name, str) or name not in TASKS:
        raise ValueError(f"unknown task {name!r}; there are {', '.join(map(repr, TASKS))}, or a stochbn.Task")
    return TASKS[name](**given)
