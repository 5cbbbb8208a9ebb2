"""The page of benchmarks/rivals.py: its numbers, and that the committed page has those of the committed file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import script

FOLDER = Path(__file__).parent.parent / "benchmarks"
COMMITTED = sorted(FOLDER.glob("rivals-*.json"))

methods, _, rivals = (script(FOLDER / f"rivals_{name}.py") for name in ("methods", "measure", "report"))


def changes(*values: float, error: float = 1.0) -> list[dict[str, float]]:
    """The differences of several networks, the same in every score."""
    return [
        {f"{key}_change{end}": v for key in rivals.NAMES for end, v in (("", one), ("_se", error))} for one in values
    ]


def row(error: float, passes: float = 1.0, **more: Any) -> dict[str, Any]:
    """A row of the table with one network."""
    scores = dict.fromkeys(rivals.SCORES, 0.5) | {"error": error, "passes": passes, "fitting": 1.0, "chosen": "this"}
    row = {"about": "how", "version": "1.0", "uses": "each", "free": False, "networks": [scores]}
    return row | {"from_plain": changes(0.0), "from_default": changes(0.0)} | more


def test_mean_change_has_the_spread_over_networks_beside_the_paired_error() -> None:
    mean, error, spread = rivals.mean_change(changes(1.0, 3.0, error=0.5), "nll")
    assert (mean, error) == (2.0, 0.5)
    assert spread == pytest.approx(math.sqrt(2))


def test_better_is_lower_but_for_the_auroc_and_takes_two_standard_errors() -> None:
    assert rivals.compared(changes(-3.0)) == {"error": 1, "nll": 1, "calibrated_nll": 1, "auroc": -1}
    assert set(rivals.compared(changes(-1.9)).values()) == {0}


def test_rows_that_this_run_lacks_stay_as_they_were() -> None:
    found = rivals.merged({"a": "old", "b": "old", "gone": "old"}, {"b": "new", "c": "new"}, ["c", "a", "b", "d"])
    assert found == {"c": "new", "a": "old", "b": "new"}
    assert list(found) == ["c", "a", "b"]


def test_verdicts_name_scores_and_costs() -> None:
    rows = {
        methods.PLAIN: row(9.0, from_default=changes(3.0)),
        methods.DEFAULT: row(9.0, passes=4.0),
        "level": row(9.0, passes=4.2),
        "ensemble": row(8.0, passes=3.0, uses="ensemble", from_default=changes(-3.0)),
    }
    lines = rivals.verdicts(rows).splitlines()[2:]
    assert lines == [
        f"- {methods.PLAIN}: better in AUROC, passes; worse in error, NLL, calibrated NLL.",
        "- level: better in nothing; worse in nothing.",
        "- ensemble: better in error, NLL, calibrated NLL, passes; worse in AUROC, fitting.",
    ]


def test_scores_are_percent_and_nats() -> None:
    probs = torch.tensor([[0.75, 0.25]] * 20)
    labels = torch.tensor([0] * 15 + [1] * 5)
    found = rivals.score({"known": probs, "unknown": torch.full((4, 2), 0.5)}, labels)
    assert found["error"] == pytest.approx(25)
    assert found["ece"] == pytest.approx(0, abs=1e-4)
    assert found["auroc"] == 1


def test_what_is_missing_is_named() -> None:
    method = methods.Method("how", methods.plain, ("a_module_that_is_nowhere",), ("a-package",))
    assert "a_module_that_is_nowhere" in methods.missing(method)
    assert not methods.missing(methods.METHODS[methods.PLAIN])


@pytest.mark.parametrize("committed", COMMITTED, ids=lambda path: path.stem)
def test_the_committed_page_has_the_numbers_of_the_committed_file(committed: Path) -> None:
    assert rivals.page(json.loads(committed.read_text())) == committed.with_suffix(".md").read_text()


def test_dropout_is_on_in_every_pass() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Flatten()).eval()
    x = torch.ones(4, 3)
    predict, _ = methods.dropout(methods.Subject([model], *[None] * 3))
    torch.manual_seed(0)
    wanted = torch.stack([torch.nn.functional.dropout(x).softmax(1) for _ in range(methods.MASKS)]).mean(0)
    torch.manual_seed(0)
    torch.testing.assert_close(predict(x), wanted)
