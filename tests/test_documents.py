"""The numbers in the documents are those of the committed results."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import stochbn
from conftest import script

ROOT = Path(__file__).parent.parent
NAMES = (
    "README",
    "results/README",
    "benchmarks/README",
    "docs/posteriors",
    "docs/augmentation",
    "docs/export",
    "docs/shift",
    "docs/coming-from",
    "docs/unknown-classes",
    "docs/howto/deploy",
)
DOCUMENTS = [ROOT / f"{name}.md" for name in NAMES]


def first_screen() -> str:
    """The README's first table: when drawing helps."""
    text = (ROOT / "README.md").read_text()
    start = text.index("| your network |")
    return text[start : text.index("\n\n", start)]


def table_rows(text: str) -> set[str]:
    """The rows with a number that has a decimal point."""
    return {line for line in text.splitlines() if line.startswith("| ") and re.search(r"\d\.\d", line)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_row_of_numbers_stands_in_a_measured_result(document: Path) -> None:
    measured = [ROOT / "results/claims.md", *ROOT.glob("results/*/*.md"), *ROOT.glob("benchmarks/*.md")]
    rows = set().union(*(table_rows(path.read_text()) for path in measured if path not in DOCUMENTS))
    shown = table_rows(document.read_text().replace(first_screen(), ""))
    assert shown, "the document shows no numbers"
    assert shown <= rows, f"not measured: {shown - rows}"


def test_every_number_of_the_first_table_stands_in_a_page_of_measurements() -> None:
    made = ("results/claims.md", "results/lenet5-paper/results.md", "benchmarks/harm.md")
    pages = (*made, "results/README.md", "docs/augmentation.md", "benchmarks/README.md", "README.md")
    measured = "".join((ROOT / page).read_text() for page in pages).replace(first_screen(), "", 1)
    numbers = re.findall(r"[-+]?\d+\.\d{3,}(?: \u00b1 \d+\.\d+)?", first_screen())
    assert len(numbers) >= 6
    assert all(number in measured for number in numbers)


@pytest.mark.parametrize("results", sorted(ROOT.glob("results/*/results.json")), ids=lambda path: path.parent.name)
def test_tables_of_the_results_come_from_their_numbers(results: Path) -> None:
    from stochbn.paper.report import tabulate_run
    from stochbn.report.results import tabulate

    about = json.loads(results.read_text())
    if "recipe" in about:
        tables = tabulate_run(about, about["scores"])
    else:
        tables = tabulate(about["scores"], about["data"], about["ood"])
    assert "\n\n".join(table.markdown() for table in tables) + "\n" == results.with_name("results.md").read_text()


def test_python_in_the_readme_uses_public_names_that_exist() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "stochbn":
                assert node.attr in stochbn.__all__


@pytest.mark.filterwarnings("ignore:these mini-batches have other statistics")
def test_the_code_of_quick_start_and_guide_runs_and_prints_what_they_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    shown = 0
    torch.manual_seed(0)
    for page in ("quickstart.md", "guide.md"):
        text = (ROOT / "docs" / page).read_text()
        for code, output in re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", text, flags=re.DOTALL):
            if code.startswith("# skip"):
                continue
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(code, names)
            if output:
                assert printed.getvalue() == output
                shown += 1
    assert shown > 8


def test_readme_names_only_commands_that_exist() -> None:
    import typer.main

    from stochbn.cli import app

    names = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    used = set(re.findall(r"^    stochbn (\w+)", (ROOT / "README.md").read_text(), flags=re.MULTILINE))
    assert used
    assert used <= names


def test_the_page_of_other_networks_is_that_of_the_committed_results() -> None:
    module = script(ROOT / "benchmarks" / "networks.py")
    assert (ROOT / "docs" / "networks.md").read_text() == module.document()


OTHERS = {".venv", ".venv-interop", ".venv-oldest", ".venv-310", "build", "gallery", "runs"}
PAGES = [path.relative_to(ROOT) for path in ROOT.rglob("*.md") if not OTHERS & set(path.relative_to(ROOT).parts)]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_to_files_that_are_there(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        if not re.match(r"[a-z]+:|#", link) and "gallery/" not in link:  # whose pictures are drawn with the site
            assert (ROOT / page.parent / link.partition("#")[0]).exists(), link
