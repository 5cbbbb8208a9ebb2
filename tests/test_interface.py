"""The arguments that say how a network is called and read are the same wherever a network is taken."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import stochbn
from conftest import mlp, normal, settled
from stochbn.interface import Interface, InterfaceOptions, shows_options

TAKERS: dict[str, Callable[..., Any]] = {
    "fit": stochbn.fit,
    "calibrate": stochbn.calibrate,
    "Predictive": stochbn.Predictive,
    "MCDropout": stochbn.MCDropout,
    "Exact": stochbn.Exact,
    "onnx": stochbn.export.onnx,
    "pt2": stochbn.export.pt2,
}


def call(name: str, folder: Path, **options: Any) -> Any:
    """Give a taker its other arguments."""
    model, x = settled(mlp(), 4), normal(24, 4)
    posterior = stochbn.fit(model, [x], 8, "factorized", reference=False)
    given: dict[str, tuple[Any, ...]] = {
        "fit": (model, [x], 8),
        "calibrate": (model, posterior, [(x, torch.arange(24) % 3)]),
        "Exact": (model, [x], 4, 2),
        "onnx": (model, posterior, folder / "x", x),
        "pt2": (model, posterior, folder / "x", x),
    }
    return TAKERS[name](*given.get(name, (model,)), **options)


@pytest.mark.parametrize("name", TAKERS)
def test_signatures_show_every_argument_of_the_interface(name: str) -> None:
    parameters = inspect.signature(TAKERS[name]).parameters
    for option in InterfaceOptions.__annotations__:
        assert parameters[option].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[option].default is None
    assert all(one.kind is not one.VAR_KEYWORD for one in parameters.values())


def test_the_options_that_type_checkers_see_are_those_that_are_taken() -> None:
    taken = [name for name in inspect.signature(Interface.of).parameters if name != "model"]
    assert taken == list(InterfaceOptions.__annotations__)


@pytest.mark.parametrize("name", TAKERS)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tasks": "binary"}, TypeError, "unexpected keyword argument 'tasks'"),
        ({"task": "clustering"}, ValueError, "unknown task 'clustering'"),
        ({"output": "scores"}, ValueError, 'output must be "logits", "probs" or None'),
        ({"class_axis": "last"}, TypeError, "class_axis must be a whole number or None"),
        ({"task": "regression", "class_axis": 1}, ValueError, "has no classes, so class_axis and output do not apply"),
    ],
)
def test_wrong_arguments_are_refused_alike(
    name: str, options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        call(name, tmp_path, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["compile", "settings", "tolerance"])
def test_dropout_takes_no_other_arguments_of_a_predictive(option: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        stochbn.MCDropout(settled(mlp(), 4), **{option: None})  # type: ignore[arg-type]


def test_a_network_names_its_task_unless_one_is_given() -> None:
    model: Any = settled(mlp(), 4)
    model.config = SimpleNamespace(problem_type="multi_label_classification")
    assert Interface.of(model).task.name == "multilabel"
    assert Interface.of(model, task="classification", inputs=2) == Interface.of(settled(mlp(), 4), inputs=2)


def test_options_are_shown_in_the_place_of_those_that_a_function_hands_on() -> None:
    def other(size: int = 3) -> None: ...

    @shows_options(Interface.of, other)
    def function(model: Any, *, seed: int = 0, **options: Any) -> dict[str, Any]:
        return {"seed": seed, **options}

    shown = list(inspect.signature(function).parameters)
    assert shown == ["model", "seed", *InterfaceOptions.__annotations__, "size"]
    assert function(None, size=4) == {"seed": 0, "size": 4}, "calls are as they were"
