"""The table of the published protocol in the documents is what the preset `paper` sets."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from stochbn.paper.published import PRINTED, PUBLISHED
from stochbn.paper.recipes import PRESETS, Recipe

DOCUMENT = Path(__file__).parent.parent / "docs" / "protocol.md"


def rows_after(head: str) -> list[list[str]]:
    """The cells of the table that begins with this head."""
    lines = DOCUMENT.read_text().split(head, 1)[1].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


HEAD = "| point | as published | how sure | lenet5 | vgg11 | resnet18 |"


def settings(column: int) -> dict[str, Any]:
    """What the table sets for a network."""
    cells = [row[column] for row in rows_after(HEAD)]
    pairs = [re.fullmatch(r"(\w+)=(.*)", text) for cell in cells for text in re.findall(r"`([^`]*)`", cell)]
    named = [(match[1], ast.literal_eval(match[2])) for match in pairs if match]
    assert len(dict(named)) == len(named) == len(pairs), "a setting stands there twice, or is none"
    return dict(named)


@pytest.mark.parametrize(("column", "network"), [(3, "lenet5"), (4, "vgg11"), (5, "resnet18")])
def test_the_preset_of_the_paper_is_the_protocol_in_every_field(column: int, network: str) -> None:
    recipe = PRESETS[network]["paper"]
    written = settings(column)
    assert set(written) == {field.name for field in fields(Recipe)}
    assert written == recipe.as_dict()


def test_every_point_says_how_sure_it_is() -> None:
    for row in rows_after(HEAD):
        assert len(row) == 6
        assert re.search("known|inferred|unknown", row[2]), row


@pytest.mark.parametrize("network", sorted(set(PRESETS) - {"lenet5", "vgg11", "resnet18", "resnet18-final-bn"}))
def test_the_other_depths_have_the_protocol_of_their_family(network: str) -> None:
    family = PRESETS["vgg11" if network.startswith("vgg") else "resnet18"]["paper"]
    assert PRESETS[network]["paper"].as_dict() == {**family.as_dict(), "network": network}


def test_a_layout_that_was_not_published_has_no_published_protocol() -> None:
    assert "paper" not in PRESETS["resnet18-final-bn"]


def test_the_two_published_sets_of_numbers_are_those_of_the_tables() -> None:
    names = {"one network": "plain", "Deep Ensembles": "Deep Ensembles", "Dropout": "Dropout"}
    rows = rows_after("| NLL of LeNet-5 | table, no SBN | table, SBN | notebook, no SBN | notebook, SBN |")
    assert [row[0] for row in rows] == list(names)
    for name, *cells in rows:
        method = names[name]
        expected = [*PUBLISHED["lenet5"][method]["nll"], *PRINTED["lenet5"][method]]
        assert [None if cell == "-" else float(cell) for cell in cells] == expected
