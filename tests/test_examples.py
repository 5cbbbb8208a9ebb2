"""The examples run, and what they print is better than chance."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import script

EXAMPLES = Path(__file__).parent.parent / "examples"
CHANCE = {
    "conformal": 2.303, "detection": 0.693, "regression": 3.0, "multilabel": 0.693, "segmentation": 1.0986,
    "survival": 1.9, "tabular": 0.693, "time_series": 1.0986,
}  # fmt: skip
"""The NLL (nats) of one who guesses, or for the regression of a network that is far too sure."""


def loaded(name: str) -> Any:
    """The module of an example."""
    return script(EXAMPLES / f"{name}.py")


@pytest.mark.parametrize("name", CHANCE)
@pytest.mark.filterwarnings("ignore")
def test_an_example_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    results = loaded(name).main()
    printed = capsys.readouterr().out
    assert "SBN" in printed
    assert max(results["plain"], results["SBN"]) < CHANCE[name]
    assert results.get("coverage", 0.9) > 0.75


def test_a_deployment_that_drifts_is_adapted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    results = loaded("drifting_deployment").main()
    printed = capsys.readouterr().out
    assert "no alarm" in printed
    assert "the alarm sounds" in printed
    assert "The look of the inputs has changed" in printed
    assert results["alarm"]
    assert results["as in training"] < 0.06
    assert results["drifted"] > 0.2
    assert results["adapted"] < results["drifted"] / 2
    assert results["written back"] < results["drifted"] / 2


def test_every_example_is_tested() -> None:
    elsewhere = {
        "fastapi_service",
        "ray_serve",
        "onnx_pictures",
    }  # of tests/test_serving.py and tests/test_own_network.py
    assert {path.stem for path in EXAMPLES.glob("*.py")} == CHANCE.keys() | elsewhere | {"drifting_deployment"}
