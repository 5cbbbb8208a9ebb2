"""The committed coverage of prediction sets: its page, and what it shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import script

ROOT = Path(__file__).parent.parent
FOUND = json.loads((ROOT / "benchmarks" / "sets.json").read_text())


def test_the_page_has_the_numbers_of_the_results() -> None:
    module = script(ROOT / "benchmarks" / "sets.py")
    page = (ROOT / "benchmarks" / "sets.md").read_text()
    assert module.table(FOUND["rows"]).markdown() in page
    assert module.stream_table(FOUND["streams"]).markdown() in page


PROMISED = [row for row in FOUND["rows"] if row["promised"]]


@pytest.mark.parametrize("row", PROMISED, ids=lambda row: f"{row['data']}, {row['sets']}, {row['of']}")
def test_the_coverage_that_is_promised_was_measured(row: dict[str, float]) -> None:
    assert row["coverage"] > FOUND["coverage"] - 2 * row["error"]


def test_adaptive_sets_keep_their_coverage_on_streams_and_fixed_ones_do_not() -> None:
    for fixed, adaptive in zip(FOUND["streams"][::2], FOUND["streams"][1::2], strict=True):
        assert fixed["last"] < 0.8
        assert abs(adaptive["coverage"] - FOUND["coverage"]) <= adaptive["bound"]
        assert abs(adaptive["last"] - FOUND["coverage"]) < 0.05
