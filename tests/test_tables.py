from __future__ import annotations

from typing import Any

import pytest

from stochbn.paper.published import PUBLISHED, PUBLISHED_DATA, published
from stochbn.report.tables import Table, accuracy, changes, out_of_domain


def score(method: str, sbn: bool, members: int = 1, **changes: Any) -> dict[str, Any]:
    numbers = {"error": 1.234, "nll": 0.05678, "brier": 0.1, "ece": 0.01234, "entropy_known": 0.1239}
    known = {"method": method, "sbn": sbn, "members": members, **numbers}
    return known | {"entropy_unknown": 1.2, "auroc": 0.98765, "aupr": 0.9, "fpr95": 0.1234} | changes


def without_unknown(scores: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in scores.items() if key not in ("entropy_unknown", "auroc", "aupr", "fpr95")}


def test_the_table_of_errors_has_a_row_for_each_method_and_columns_without_and_with_sbn() -> None:
    scores = [
        score("plain", False),
        score("plain", True, error=0.5, nll=0.04, ece=0.5),
        score("Deep Ensembles", False, 6, error=12.0),
        score("Deep Ensembles", True, 6, error=11.0),
        score("Dropout", False, error=100.0),
        score("Dropout", True, error=0.0),
    ]
    table = accuracy(scores, "digits (test)")
    assert table.title.startswith("digits (test)")
    assert len(table.columns) == 7
    assert [list(row) for row in table.rows] == [
        ["plain", "1.23", "0.50", "0.0568", "0.0400", "1.23", "50.00"],
        ["Deep Ensembles (6)", "12.00", "11.00", "0.0568", "0.0568", "1.23", "1.23"],
        ["Dropout", "100.00", "0.00", "0.0568", "0.0568", "1.23", "1.23"],
    ]


def test_methods_without_a_posterior_have_dashes() -> None:
    table = accuracy([score("plain", False), score("Dropout", False), score("Dropout", True)], "x")
    assert [list(row) for row in table.rows] == [
        ["plain", "1.23", "-", "0.0568", "-", "1.23", "-"],
        ["Dropout", "1.23", "1.23", "0.0568", "0.0568", "1.23", "1.23"],
    ]


@pytest.mark.parametrize("network", sorted(PUBLISHED))
def test_published_numbers_stand_in_brackets_behind_the_measured_ones(network: str) -> None:
    scores = [score(method, sbn) for method in PUBLISHED[network] for sbn in (False, True)]
    table = accuracy(scores, "x", published(network, PUBLISHED_DATA[network]))
    assert "published" in table.title
    for row, numbers in zip(table.rows, PUBLISHED[network].values(), strict=True):
        for cells, (key, digits) in zip((row[1:3], row[3:5]), (("error", 2), ("nll", 3)), strict=True):
            for cell, theirs in zip(cells, numbers[key], strict=True):
                assert ("(" in cell) == (theirs is not None)
                if theirs is not None:
                    assert f" ({theirs:.{digits}f}" in cell
        assert not any("(" in cell for cell in row[5:])
    assert published(network, "digits") is None


def test_what_the_published_notebook_printed_stands_beside_the_published_table() -> None:
    scores = [score(method, sbn) for method in PUBLISHED["lenet5"] for sbn in (False, True)]
    table = accuracy(scores, "mnist (test)", published("lenet5", "mnist"))
    rows = {row[0]: row for row in table.rows}
    assert [row[4] for row in rows.values()] == [
        "0.0568 (0.025; 0.0286)", "0.0568 (0.015; 0.0150)", "0.0568 (0.014; 0.0145)",
    ]  # fmt: skip
    assert [row[3] for row in rows.values()] == ["0.0568", "0.0568 (0.016; 0.0157)", "0.0568 (0.014; 0.0142)"]


def test_what_sbn_changes_stands_beside_it_with_its_standard_error() -> None:
    changed: dict[str, Any] = {
        "nll_change": -0.01678,
        "nll_change_se": 0.0021,
        "error_change": 0.054,
        "error_change_se": 0.106,
    }
    changed |= {"calibrated_nll": 0.05, "calibrated_nll_change": -0.002, "calibrated_nll_change_se": 0.001}
    changed |= {"auroc_change": 0.01234, "auroc_change_se": 0.0005}
    scores = [
        score("plain", False, calibrated_nll=0.052),
        score("plain", True, **changed),
        score("Dropout", False, calibrated_nll=0.06),
    ]
    table = accuracy(scores, "x")
    assert table.columns[5] == "difference ± s.e."
    assert [row[5] for row in table.rows] == ["-0.0168 ± 0.0021", "-"]
    assert all(len(row) == len(table.columns) == 8 for row in table.rows)
    second = changes(scores, "x")
    assert [list(row) for row in second.rows] == [
        ["plain", "0.0520", "0.0500", "-0.0020 ± 0.0010", "+0.05 ± 0.11", "+0.0123 ± 0.0005"]
    ]
    assert list(second.columns) == ["method", "calibrated NLL", "+ SBN", "difference", "error, points", "AUROC"]


def test_without_published_numbers_there_are_no_brackets() -> None:
    table = accuracy([score("plain", False), score("plain", True)], "x")
    assert "(" not in table.title + "".join("".join(row) for row in table.rows)


def test_numbers_over_seeds_are_means_with_deviations() -> None:
    scores = score("plain", False, error=(1.0, 0.25), nll=(0.5, 0.0625), ece=(0.02, 0.01), auroc=(0.9, 0.05),
                   fpr95=(0.5, 0.25), entropy_known=(0.1, 0.01), entropy_unknown=(1.0, 0.5))  # fmt: skip
    assert list(accuracy([scores], "x").rows[0]) == [
        "plain", "1.00 ± 0.25", "-", "0.5000 ± 0.0625", "-", "2.00 ± 1.00", "-",
    ]  # fmt: skip
    row = out_of_domain([scores], "x").rows[0]
    assert list(row[1:]) == ["0.100 ± 0.010", "1.000 ± 0.500", "0.9000 ± 0.0500", "50.0 ± 25.0"]


def test_the_out_of_domain_table_has_a_row_for_each_method_without_and_with_sbn() -> None:
    scores = [
        score(m, sbn, n) for m, n in (("plain", 1), ("Deep Ensembles", 3), ("Dropout", 1)) for sbn in (False, True)
    ]
    table = out_of_domain(scores, "notmnist (test)")
    assert table.title.startswith("notmnist (test)")
    assert len({row[0] for row in table.rows}) == 6
    assert [row[0] for row in table.rows] == [
        "plain", "SBN", "Deep Ensembles (3)", "Deep Ensembles (3) + SBN", "Dropout", "Dropout + SBN",
    ]  # fmt: skip
    assert {tuple(row[1:]) for row in table.rows} == {("0.124", "1.200", "0.9877", "12.3")}


def test_methods_without_unknown_data_are_left_out_of_the_out_of_domain_table() -> None:
    scores = [without_unknown(score("plain", False)), score("plain", True)]
    assert [row[0] for row in out_of_domain(scores, "x").rows] == ["SBN"]


def test_markdown_is_a_title_a_head_a_rule_and_a_line_for_each_row() -> None:
    table = Table("A title", ["method", "x", "y"], [["a", "1", "2"], ["b", "3", "4"]])
    assert table.markdown().splitlines() == [
        "**A title**", "", "| method | x | y |", "| --- | ---: | ---: |", "| a | 1 | 2 |", "| b | 3 | 4 |",
    ]  # fmt: skip


def test_a_bar_or_a_line_break_in_a_cell_does_not_end_it() -> None:
    table = Table("title", ["method", "a|b"], [["cat | dog", "1"], ["two\nlines", "2"]])
    assert table.markdown().splitlines()[2:] == [
        r"| method | a\|b |", "| --- | ---: |", r"| cat \| dog | 1 |", "| two lines | 2 |",
    ]  # fmt: skip
