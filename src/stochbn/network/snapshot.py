"""Snapshots of a network and of what its code reads elsewhere, to detect changes."""

from __future__ import annotations

import dis
import functools
import operator
import types
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Snapshot", "Surroundings"]

_ATOMS = {
    bool, int, float, complex, str, bytes, type(None), type, types.FunctionType, types.BuiltinFunctionType,
    types.MethodType, types.ModuleType, torch.dtype, torch.device, torch.Size, torch.Generator, torch.memory_format,
    torch.layout, slice, range, type(Ellipsis), type(NotImplemented), np.dtype,
}  # fmt: skip


_UNCHANGING = {"typing", "inspect", "re", "pathlib", "datetime", "decimal", "fractions", "uuid"}
"""Modules of the standard library whose objects do not change, such as annotations and signatures."""


class Snapshot(NamedTuple):
    """All parts of a network, down to numbers, tensors and functions, in a fixed order.

    If two snapshots of a network have the same objects in the same places, nothing was assigned in between.

    Attributes:
        leaves: all parts.
        parameters: the parameters.
        tensors: all other tensors.
        opaque: objects that cannot be searched, such as NumPy arrays and objects with slots.
        contents: every mapping, list and similar container, with its keys or entries, and its values.
        empty: the empty containers.
        owners: every object that was searched, with its attributes.
    """

    leaves: list[Any]
    parameters: list[nn.Parameter]
    tensors: list[Tensor]
    opaque: list[Any]
    contents: list[tuple[Any, list[Any], list[Any]]]
    empty: list[Any]
    owners: list[tuple[Any, dict[str, Any]]]

    @classmethod
    def of(cls, root: nn.Module, *, inside: bool = True) -> Snapshot:
        """Take the snapshot of a network.

        Args:
            root: the network.
            inside: whether to search the modules in it too.
        """
        leaves, parameters, tensors, opaque, contents, empty, owners = snapshot = cls([], [], [], [], [], [], [])
        seen = {id(root)}
        owners.append((root, vars(root)))
        waiting: list[Any] = [vars(root)]
        while waiting:
            container = waiting.pop()
            keys, values = [*container], []
            if isinstance(container, dict):
                leaves += keys
                values = [*container.values()]
            contents.append((container, keys, values))
            for value in values or keys:
                kind = type(value)
                sort = _sort(kind)  # type: ignore[arg-type]
                if sort == "atom":
                    leaves.append(value)
                elif sort == "tensor":
                    leaves.append(value)
                    if id(value) not in seen:
                        seen.add(id(value))
                        if isinstance(value, nn.Parameter):
                            parameters.append(value)
                        else:
                            tensors.append(value)
                elif sort == "container":
                    leaves.append(kind)
                    if not value:
                        empty.append(value)
                    elif id(value) not in seen:
                        seen.add(id(value))
                        waiting.append(value)
                else:
                    leaves += kind, value
                    if id(value) in seen or (not inside and isinstance(value, nn.Module)):
                        continue
                    seen.add(id(value))
                    if isinstance(value, functools.partial):
                        waiting.append((value.func, value.args, value.keywords))
                    elif hasattr(value, "__dict__"):
                        owners.append((value, vars(value)))
                        waiting.append(vars(value))
                    else:
                        opaque.append(value)
        return snapshot

    def of_this(self, root: nn.Module) -> bool:
        """Whether a new snapshot of a network would be the same."""
        return self._intact(root) or Snapshot.of(root).same(self)

    def _intact(self, root: nn.Module) -> bool:
        """Whether everything is still in its place. This is quicker, but False if a list was only made again."""
        return (
            self.owners[0][0] is root
            and not any(self.empty)
            and all(vars(owner) is own for owner, own in self.owners)
            and all(
                len(container) == len(keys)
                and all(map(operator.is_, container, keys))
                and (not values or all(map(operator.is_, container.values(), values)))
                for container, keys, values in self.contents
            )
        )

    def same(self, other: Snapshot) -> bool:
        """Whether both have the same objects in the same places."""
        return len(self.leaves) == len(other.leaves) and all(map(operator.is_, self.leaves, other.leaves))

    def versions(self, without: Collection[int] = ()) -> list[int]:
        """The number of writes to each tensor that is not a parameter, except those of some identities."""
        return [t._version for t in self.tensors if id(t) not in without and not t.is_inference()]


class Surroundings:
    """What the code of a network's classes reads outside of the network: class attributes, globals, closures.

    PyTorch's own classes and functions are assumed not to change. Functions are searched if the classes' methods, or
    functions of these, name them.

    Args:
        root: the network.
        snapshot: its snapshot.
    """

    def __init__(self, root: nn.Module | None, snapshot: Snapshot) -> None:
        kinds = {type(value) for value in (root, *snapshot.leaves) if type(value) not in _ATOMS}
        self._classes = [cls for cls in {c for kind in kinds for c in kind.__mro__} if not _is_library(cls)]
        self._spaces: list[tuple[Mapping[str, Any], list[str]]] = [(vars(cls), [*vars(cls)]) for cls in self._classes]
        self._cells: list[types.CellType] = []
        waiting: list[Any] = [value for value in snapshot.leaves if isinstance(value, types.FunctionType)]
        waiting += [value for cls in self._classes for value in vars(cls).values()]
        globals_: dict[int, tuple[Mapping[str, Any], dict[str, None]]] = {}
        seen: set[int] = set()
        while waiting:
            function = _function(waiting.pop())
            if function is None or id(function) in seen or _is_library(function):
                continue
            seen.add(id(function))
            self._cells += function.__closure__ or ()
            space, names = function.__globals__, _names(function.__code__)
            globals_.setdefault(id(space), (space, {}))[1].update(dict.fromkeys(names))
            waiting += map(space.get, names)
        self._spaces += [(space, [*names]) for space, names in globals_.values()]
        self._written: set[int] = set()
        self._values: list[Any] = []
        self._entries: dict[int, list[Any]] = {}
        self._values, self._entries = self._read()
        self._lengths = [len(vars(cls)) for cls in self._classes]

    def same(self) -> bool:
        """Whether nothing has changed, except what passes write to."""
        return [len(vars(cls)) for cls in self._classes] == self._lengths and self._changed(
            *self._read()
        ) <= self._written

    def settle(self) -> None:
        """Record what a call has changed. From now on these logs, counters and caches do not count."""
        values, entries = self._read()
        self._written |= self._changed(values, entries)
        self._values, self._entries = values, entries

    def _read(self) -> tuple[list[Any], dict[int, list[Any]]]:
        """Everything that is named, and the contents of each mapping, list or set, by its place."""
        values = [value for space, names in self._spaces for value in map(space.get, names)]
        values += map(_content, self._cells)
        places: Collection[int] = self._entries
        if not _identical(values, self._values):
            places = [place for place, value in enumerate(values) if type(value) in (dict, list, set)]
        return values, {place: _entries(values[place]) for place in places}

    def _changed(self, values: list[Any], entries: dict[int, list[Any]]) -> set[int]:
        """The places of differences; entries of a mapping count as the place of the mapping."""
        changed = {place for place in entries if not _identical(entries[place], self._entries.get(place, []))}
        if not _identical(values, self._values):
            changed |= {place for place, value in enumerate(values) if value is not self._values[place]}
        return changed


def _identical(first: list[Any], second: list[Any]) -> bool:
    """Whether two lists hold the same objects."""
    return len(first) == len(second) and all(map(operator.is_, first, second))


def _entries(container: Any) -> list[Any]:
    """The keys and values of a mapping, or the entries of a list and the like, if these are few."""
    if len(container) > LISTED:
        return []
    return [*container, *container.values()] if isinstance(container, dict) else [*container]


@functools.lru_cache(maxsize=1024)
def _sort(kind: type) -> str:
    """How a snapshot treats values of a type."""
    if kind in _ATOMS or getattr(kind, "ABOUT_A_NETWORK", False) or issubclass(kind, np.generic):
        return "atom"
    if kind.__module__ in _UNCHANGING:
        return "atom"
    if issubclass(kind, Tensor):
        return "tensor"
    return "container" if issubclass(kind, (dict, list, tuple, set, frozenset, deque)) else "other"


LISTED = 64
"""The largest mapping, list or set outside of a network whose entries are compared one by one."""


def _function(value: Any) -> types.FunctionType | None:
    """The Python function of a function, method, property or static method."""
    for attribute in ("__func__", "fget", "func", "__wrapped__"):
        value = getattr(value, attribute, value) if not isinstance(value, types.FunctionType) else value
    return value if isinstance(value, types.FunctionType) else None


def _is_library(value: Any) -> bool:
    module = str(getattr(value, "__module__", "")).partition(".")[0]
    return module in ("torch", "builtins", "collections", "numpy", "typing", "abc", "random", "functools")


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """The names of globals that a function's code, and that of functions in it, reads."""
    own = (i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    inner = (name for const in code.co_consts if isinstance(const, types.CodeType) for name in _names(const))
    return tuple(dict.fromkeys((*own, *inner)))


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
