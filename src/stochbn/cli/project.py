"""The project file ``stochbn.toml``: options that need not be repeated with every command.

A key is an option without its dashes. Keys at the top are for all commands in `COMMANDS` that have such an option. Keys
in a table named after a command are for this command, and override those at the top. Options on the command line
override both::

    model = "package.module:function"
    weights = "w.safetensors"
    model-arg = {width = 2}

    [fit]
    data = "photos/train"
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["COMMANDS", "FILE", "check_new", "defaults", "write"]

FILE = "stochbn.toml"
COMMANDS = ("fit", "calibrate", "conformal", "diagnose", "evaluate", "predict", "adapt", "export", "bench")
"""The commands that keys at the top are for."""

Options = dict[str, Any]


def defaults(program: Any, path: Path) -> dict[str, Options]:
    """The options of each command as a project file has them, under the names of the commands' parameters.

    Args:
        program: the group of all commands.
        path: the file; if there is none, there are no defaults.

    Raises:
        ValueError: it cannot be read, or has an unknown key or an invalid value.
    """
    if not path.is_file():
        return {}
    content = _read(path)
    shared = {key: value for key, value in content.items() if key not in program.commands}
    found: dict[str, Options] = {}
    for name in COMMANDS:
        known = _options(program.commands[name])
        found[name] = {
            known[key].name: _value(path, key, value, known[key]) for key, value in shared.items() if key in known
        }
    unknown = [key for key in shared if not any(key in _options(program.commands[name]) for name in COMMANDS)]
    if unknown:
        raise ValueError(f"{str(path)!r}: {unknown[0]!r} is not an option of {', '.join(COMMANDS)}, and not a command")
    for name in content.keys() - shared.keys():
        known = _options(program.commands[name])
        if not isinstance(content[name], Mapping):
            raise ValueError(f"{str(path)!r}: {name!r} is a command; write its options in a table [{name}]")
        for key, value in content[name].items():
            if key not in known:
                raise ValueError(f"{str(path)!r}: {name} has no option {key!r}; it has {', '.join(known) or 'none'}")
            found.setdefault(name, {})[known[key].name] = _value(path, key, value, known[key])
    return found


def check_new(path: Path) -> None:
    """Refuse to write over a project file.

    Raises:
        FileExistsError: there is one.
    """
    if path.exists():
        raise FileExistsError(f"{str(path)!r} exists already; add the options to it, or remove it for --save-options")


def write(path: Path, given: Mapping[str, Any]) -> None:
    """Write options that were given into a project file, for all commands about a network.

    Args:
        path: the file.
        given: the options, under the names of the commands' parameters; None and False were not given.
    """
    from stochbn.files import write_bytes

    check_new(path)
    lines = []
    for name, value in given.items():
        if value is None or value is False or value == []:
            continue
        shown = value if isinstance(value, (bool, int, float)) else value if isinstance(value, list) else str(value)
        lines.append(f"{name.replace('_', '-')} = {json.dumps(shown)}\n")
    write_bytes(path, "".join(lines).encode())


def _read(path: Path) -> dict[str, Any]:
    try:
        toml = importlib.import_module("tomllib")
    except ModuleNotFoundError:  # Python 3.10
        try:
            toml = importlib.import_module("tomli")
        except ModuleNotFoundError as error:
            raise ValueError(f"{str(path)!r} needs Python 3.11, or tomli: pip install tomli") from error
    try:
        content: dict[str, Any] = toml.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not valid TOML: {error}") from error
    return content


def _options(command: Any) -> dict[str, Any]:
    """The options of a command by their names without dashes."""
    return {
        parameter.opts[0].removeprefix("--"): parameter
        for parameter in command.params
        if parameter.param_type_name == "option" and parameter.opts[0] != "--help"
    }


def _value(path: Path, key: str, value: Any, option: Any) -> Any:
    """A value as the command line would pass it."""
    if isinstance(value, Mapping) and option.multiple:
        return [f"{name}={entry!r}" for name, entry in value.items()]
    if isinstance(value, list) and option.multiple:
        return [str(entry) for entry in value]
    if isinstance(value, list) and all(isinstance(entry, (int, float)) for entry in value):
        return ",".join(map(str, value))
    if isinstance(value, (Mapping, list)):
        raise ValueError(f"{str(path)!r}: {key} takes one value, got {value!r}")
    if isinstance(value, bool) != bool(option.is_flag):
        raise ValueError(
            f"{str(path)!r}: {key} takes {'true or false' if option.is_flag else 'a value'}, got {value!r}"
        )
    return [str(value)] if option.multiple else value if option.is_flag else str(value)
