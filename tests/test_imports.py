"""Which part of the package may import which: every part stands above those that it imports."""

from __future__ import annotations

import ast
import graphlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import stochbn

ROOT = Path(stochbn.__file__).parent
LAYERS = (
    ("arrays", "caller", "files", "processes", "schema", "stopping", "tempering", "texts", "undisturbed"),
    ("network",),
    ("augment", "metrics", "sharing", "table_files"),
    ("tasks",),
    ("predictions", "summary"),
    ("conformal",),
    ("dense_masks",),
    ("posteriors", "sources"),
    ("distributed", "execution", "predicted_columns"),
    ("calibration_report", "fit_data", "statistics"),
    ("fit_diagnosis", "shift"),
    ("fitting",),
    ("predictive",),
    ("calibration", "export", "scoring"),
    ("augmentation_choice",),
    ("deploy",),
    ("stochbn",),  # the public names, each imported at its first use
    ("evaluation",),
    ("report",),
    ("measuring",),
    ("paper",),
    ("cli",),
    ("__main__",),
)
"""The parts from the lowest to the highest; those of one line do not import each other."""


def modules() -> dict[str, Path]:
    """Every module by its name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = ["stochbn", *path.relative_to(ROOT).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path, *, functions: bool = True, types: bool = True) -> Iterator[str]:
    """The modules of stochbn that a file imports: with those within functions, and those for types alone."""
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if not functions and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if not types and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "stochbn")
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.module.split(".")[0] == "stochbn":
            names = [f"{node.module}.{alias.name}" for alias in node.names if alias.name != "__version__"]
            yield from (name if name in MODULES else node.module for name in names)


def part(module: str) -> str:
    """The part that a module belongs to: ``stochbn`` is the file of the public names."""
    return module.split(".")[1] if "." in module else module


def test_every_part_has_a_place_among_the_layers() -> None:
    placed = [name for layer in LAYERS for name in layer]
    assert sorted(placed) == sorted({part(module) for module in MODULES})


@pytest.mark.parametrize("name", [name for layer in LAYERS for name in layer if name != "stochbn"])
def test_a_part_imports_only_parts_below_it(name: str) -> None:
    place = {one: i for i, layer in enumerate(LAYERS) for one in layer}
    upward = {
        f"{module} imports {imported}"
        for module, path in MODULES.items()
        if part(module) == name
        for imported in imports(path, types=False)
        if part(imported) != name and place[part(imported)] >= place[name]
    }
    assert not upward


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    graph = {module: set(imports(path, functions=False, types=False)) - {module} for module, path in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_the_experiments_are_imported_by_their_own_commands_alone() -> None:
    importing = {
        module
        for module, path in MODULES.items()
        if part(module) != "paper" and any(part(name) == "paper" for name in imports(path))
    }
    assert importing == {"stochbn.cli.experiments"}


@pytest.mark.parametrize("name", ["checkpoints", "data", "networks"])
def test_modules_that_moved_still_have_their_old_names(name: str) -> None:
    sys.modules.pop(f"stochbn.paper.{name}", None)
    with pytest.warns(UserWarning, match=f"stochbn.paper.{name} is called stochbn.sources"):
        module = importlib.import_module(f"stochbn.paper.{name}")
    assert module.load if name != "networks" else module.build
