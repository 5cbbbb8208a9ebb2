"""Every number with an error in the verdicts on the paper's claims is one of the tables that lie beside them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

RESULTS = Path(__file__).parent.parent / "results"
HEAD = "| claim | LeNet-5 | VGG-11 | ResNet-18 | verdict | why |"
CHANGE = r"[+-]\d+\.\d+ ± \d+\.\d+"


def verdicts() -> list[list[str]]:
    lines = (RESULTS / "README.md").read_text().split(HEAD, 1)[1].splitlines()[2:]
    rows = [line.strip("|").split("|") for line in lines[: lines.index("")]]
    return [[cell.strip() for cell in row] for row in rows]


FOLDERS = {1: "lenet5-paper", 2: "vgg11-paper", 3: "resnet18-paper"}


@pytest.mark.parametrize(("column", "count"), [(1, 18), (2, 18), (3, 12)])
def test_numbers_of_the_verdicts_are_those_of_the_tables(column: int, count: int) -> None:
    tables = (RESULTS / FOLDERS[column] / "results.md").read_text()
    changes = [change for row in verdicts() for change in re.findall(CHANGE, row[column])]
    assert len(changes) == count
    for change in changes:
        assert change in tables, change


@pytest.mark.parametrize(("column", "folder"), FOLDERS.items())
def test_distances_of_the_marginals_are_those_of_the_run(column: int, folder: str) -> None:
    distances = json.loads((RESULTS / folder / "results.json").read_text())["kolmogorov_smirnov"].values()
    both = [distance[part] for distance in distances for part in ("mean", "variance")]
    assert f"{min(both):.3f} to {max(both):.3f}" in verdicts()[-1][column]


def test_every_claim_has_a_verdict_in_bold() -> None:
    rows = verdicts()
    assert len(rows) == 9
    assert all(row[4].startswith("**") and row[5] for row in rows)


@pytest.mark.parametrize("network", ["lenet5", "vgg11"])
def test_distances_from_exact_inference_are_those_of_the_comparison(network: str) -> None:
    table = (RESULTS / f"{network}-posteriors" / "comparison.md").read_text().split("KL to exact", 1)[1]
    rows = dict(re.findall(r"^\| (\w+) \| (0\.\d+ ± 0\.\d+)", table, re.MULTILINE))
    cell = next(row for row in verdicts() if row[0].startswith("The factorised"))[1 if network == "lenet5" else 2]
    shown = re.findall(r"(0\.\d+) ± (0\.\d+)", cell)
    for (mean, deviation), kind in zip(shown, ("factorized", "joint"), strict=True):
        wanted = [float(part) for part in rows[kind].split(" ± ")]
        assert [float(mean), float(deviation)] == pytest.approx(wanted, abs=6e-5)
