"""A network's interface: what it takes of a batch, and what its output means."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypedDict, TypeVar

from torch import nn

from stochbn.network.calling import InputsOf
from stochbn.network.layers import unwrap
from stochbn.tasks import Classification, Multilabel, Regression, Task, make_task

__all__ = ["Interface", "InterfaceOptions", "shows_options"]

PROBLEMS: Mapping[str, type[Task]] = {"multi_label_classification": Multilabel, "regression": Regression}
"""The tasks of what the configs of Transformers call a ``problem_type``."""

F = TypeVar("F", bound=Callable[..., Any])


class InterfaceOptions(TypedDict, total=False):
    """The keyword arguments of a network's interface; `stochbn.Predictive` says what they mean."""

    task: Task | str | None
    logits: Any
    class_axis: int | None
    output: Literal["logits", "probs"] | None
    inputs: InputsOf


class Interface(NamedTuple):
    """What a network takes of a batch, and what its output means.

    Attributes:
        task: what the output means.
        inputs: what the network takes of a batch, as for `stochbn.Predictive`.
    """

    task: Task
    inputs: InputsOf = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        task: Task | str | None = None,
        logits: Any = None,
        class_axis: int | None = None,
        output: Literal["logits", "probs"] | None = None,
        inputs: InputsOf = None,
    ) -> Interface:
        """The interface that arguments describe; without a `task`, it is the one that the network or its config names.

        A network names its task by an attribute ``task`` that is one, such as `stochbn.tasks.heads.DenseHead`. It is
        also taken where a task of that name is asked for.

        Raises:
            TypeError, ValueError: an unknown argument, a wrong one, or one that does not fit the task.
        """
        own = getattr(unwrap(model), "task", None)
        if isinstance(own, Task) and (task is None or task == own.name):
            task = own
        if task is None:
            problem = getattr(getattr(unwrap(model), "config", None), "problem_type", None)
            task = (PROBLEMS.get(problem, Classification) if isinstance(problem, str) else Classification).name
        return cls(make_task(task, logits, class_axis, output), inputs)

    @classmethod
    def among(cls, model: nn.Module, settings: Mapping[str, Any]) -> Interface:
        """The interface that the arguments of a predictive describe, among others.

        Raises:
            TypeError, ValueError: as `of`.
        """
        return cls.of(model, **{name: settings[name] for name in InterfaceOptions.__annotations__ if name in settings})


def shows_options(*takers: Callable[..., Any]) -> Callable[[F], F]:
    """Show the arguments with defaults of `takers` in a function's signature, in place of its ``**options``."""
    shown = {
        name: one.replace(kind=one.KEYWORD_ONLY)
        for taker in takers
        for name, one in inspect.signature(taker).parameters.items()
        if one.default is not one.empty
    }

    def show(function: F) -> F:
        signature = inspect.signature(function)
        own = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
        function.__signature__ = signature.replace(parameters=[*own, *shown.values()])  # type: ignore[attr-defined]
        return function

    return show
