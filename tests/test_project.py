"""Options from stochbn.toml."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import typer.main

from stochbn import cli
from stochbn.cli import project

PROGRAM = typer.main.get_command(cli.app)


def read(tmp_path: Path, text: str) -> dict[str, dict[str, Any]]:
    path = tmp_path / "stochbn.toml"
    path.write_text(text)
    return project.defaults(PROGRAM, path)


def test_keys_at_the_top_are_for_commands_about_a_network_and_tables_go_first(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        'model = "m:f"\nmodel-arg = {width = 2, kind = "x"}\ndraws = 20\nmean = [0.5, 0.25]\nprobs = true\n'
        'input = ["a", "b"]\n[predict]\ndraws = 5\nout = "p.parquet"\nstrict = true\n[bench]\nseed = 3\n',
    )
    shared = {
        "model": "m:f",
        "model_arg": ["width=2", "kind='x'"],
        "mean": "0.5,0.25",
        "probs": True,
        "input": ["a", "b"],
    }
    assert found["fit"] == shared
    assert found["evaluate"] == shared | {"draws": "20"}
    assert found["predict"] == shared | {"draws": "5", "path": "p.parquet", "strict": True}
    assert found["export"] == shared | {"draws": "20"}
    assert found["bench"] == shared | {"seed": "3"}


def test_without_a_file_there_are_no_defaults(tmp_path: Path) -> None:
    assert project.defaults(PROGRAM, tmp_path / "stochbn.toml") == {}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("modell = 1", "'modell' is not an option of fit, calibrate"),
        ("[fits]\ndata = 1", "'fits' is not an option of fit"),
        ("fit = 1", r"'fit' is a command; write its options in a table \[fit\]"),
        ("[fit]\ndraws = 1", "fit has no option 'draws'; it has data, batch-size"),
        ("[fit]\ndata = {a = 1}", "data takes one value"),
        ("[predict]\nstrict = 1", "strict takes true or false"),
        ("seed = true", "seed takes a value, got True"),
        ("model = ", "is not valid TOML"),
    ],
)
def test_what_makes_no_sense_is_told(text: str, part: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=part):
        read(tmp_path, text)


def test_without_a_reader_of_toml_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r"needs Python 3.11, or tomli: pip install tomli"):
        read(tmp_path, "seed = 1")
