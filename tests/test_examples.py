"""The examples run, and what they print is better than chance."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
CHANCE = {
    "conformal": 2.303, "regression": 3.0, "multilabel": 0.693, "segmentation": 1.0986, "tabular": 0.693,
    "time_series": 1.0986,
}  # fmt: skip
"""The NLL (nats) of one who guesses, or for the regression of a network that is far too sure."""


@pytest.mark.parametrize("name", CHANCE)
@pytest.mark.filterwarnings("ignore")
def test_an_example_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    results = module.main()
    printed = capsys.readouterr().out
    assert "SBN" in printed
    assert max(results["plain"], results["SBN"]) < CHANCE[name]
    assert results.get("coverage", 0.9) > 0.75


def test_every_example_is_tested() -> None:
    services = {"fastapi_service", "ray_serve"}  # of tests/test_serving.py
    assert {path.stem for path in EXAMPLES.glob("*.py")} == CHANCE.keys() | services
