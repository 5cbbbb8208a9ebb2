"""Weights from a file: which tensors of a checkpoint are the network's, as the network's own strict load decides."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stochbn.schema import listing

__all__ = ["load_weights"]

ENDINGS = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".th", ".pkl", ".t7", ".model", ".checkpoint")
"""Endings of files that ``torch.save`` writes."""
KINDS = ".safetensors, .pt, .pth, .bin, .ckpt, .pth.tar, .th, or the .index.json of files in several parts"
IN_FOLDER = ("model.safetensors.index.json", "pytorch_model.bin.index.json", "model.safetensors", "pytorch_model.bin")
"""What a folder is looked through for."""
USUAL = ("state_dict", "model", "model_state_dict", "model_state", "net", "weights", "module", "ema")
"""The usual keys of a state dict in a checkpoint, the first that fits goes first."""
PREFIXES = ("model.", "net.", "module.", "network.", "backbone.", "encoder.")
AVERAGED = re.compile(r"ema|avg|averag|swa|shadow|mean_teacher", re.IGNORECASE)
"""What keys and prefixes of averaged weights are called."""
COUNT = "num_batches_tracked"
NO_PART = re.compile(
    r"n_averaged$|(.*\.)?total_(ops|params)$|(.*[._])?(loss|criterion|metric|accuracy|acc|auroc|f1|confmat)\w*\.", re.I
)
"""Entries of a checkpoint that are no part of a network's outputs: counters, weights of losses, states of metrics."""
DEPTH = 4
SHOWN = 4
"""How many names a message shows, of more."""


@dataclass(frozen=True)
class _Place:
    """A mapping in a checkpoint that has tensors, and how the network's names are made of its own.

    Attributes:
        key: where it is, with dots between keys; empty at the top.
        state: all of its entries.
        prefix: what is taken off the names.
        added: what is put before them.
    """

    key: str
    state: Mapping[str, Any]
    prefix: str = ""
    added: str = ""

    @property
    def name(self) -> str:
        """What ``--weights-key`` calls it."""
        return ".".join(filter(None, (self.key, self.prefix.removesuffix("."))))

    @property
    def shown(self) -> str:
        """What messages call it."""
        return repr(self.name) if self.name else "no key or prefix"

    @property
    def averaged(self) -> bool:
        """Whether it is called as averaged weights are."""
        return AVERAGED.search(self.name) is not None

    def entries(self, own: Iterable[str]) -> tuple[OrderedDict[str, Any], list[str]]:
        """The entries under the names that the network has, with the versions of its layers, and what is left out."""
        found: OrderedDict[str, Any] = OrderedDict()
        left, needed = [], set(own)
        for name, value in self.state.items():
            new = self.added + name.removeprefix(self.prefix)
            if name.startswith(self.prefix) and (new in needed or not NO_PART.match(new)):
                found[new] = value
            else:
                left.append(name)
        stem = self.prefix.removesuffix(".")
        versions = getattr(self.state, "_metadata", None) or {}
        versions = {k.removeprefix(stem).removeprefix("."): v for k, v in versions.items() if k.startswith(stem)}
        if versions:
            found._metadata = OrderedDict((self.added + k, v) for k, v in versions.items())  # type: ignore[attr-defined]
        return found, left


def load_weights(model: nn.Module, path: str | os.PathLike[str], key: str | None = None) -> str:
    """Load weights into a network, all of them; the network's own ``load_state_dict(strict=True)`` decides what fits.

    A state dict may be in a checkpoint under a key, and its names may have a prefix that those of the network lack.
    Where raw and averaged weights fit, the raw ones are taken, with a warning. Nothing in the file is executed. If
    nothing fits, the network stays as it was.

    Args:
        model: the network.
        path: safetensors, what ``torch.save`` wrote, or the index of such files in parts; or a folder with one of them.
        key: where the weights are in a checkpoint: a key, keys with dots between, or the prefix of their names.

    Returns:
        What was taken and what was left out, in a sentence; empty if the file has the network's own names alone.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or does not hold exactly the network's tensors; the message says what to do.
    """
    path = _file(Path(path))
    content = _read(path)
    places = list(_places(content, model))
    if not places:
        raise ValueError(
            f"{str(path)!r} holds no state dict; save one with torch.save(model.state_dict(), ...) or "
            "safetensors.torch.save_file"
        )
    if key is not None:
        places = [p for p in places if key.strip(".") in (p.name, p.key, p.prefix.strip("."))]
        if not places:
            names = dict.fromkeys(p.name for p in _places(content, model) if p.name)
            raise ValueError(f"{str(path)!r} has no weights under {key!r}; it has {listing(names, SHOWN) or 'no keys'}")
    before = {name: value.detach().clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    fitting = [place for place in places if _fits(model, place)]
    if not fitting:
        told = _misfit(model, places)
        _restore(model, before)
        raise ValueError(f"{str(path)!r} does not fit the network; {told}")
    chosen = next((place for place in fitting if not place.averaged), fitting[0])
    others = [place for place in fitting if place is not chosen and _differ(model, chosen, place)]
    if others and key is None:
        several = listing([place.shown for place in (chosen, *others)], SHOWN)
        if any(
            not p.averaged and (p.key == chosen.key or chosen.key.split(".")[0] not in ("", *USUAL)) for p in others
        ):
            _restore(model, before)
            raise ValueError(f"{str(path)!r} has several networks that fit, under {several}: choose with --weights-key")
        warnings.warn(
            f"{str(path)!r} has weights that fit under {several}: took those under {chosen.shown}; --weights-key "
            "chooses others",
            stacklevel=2,
        )
    if fitting[-1] is not chosen:
        _fits(model, chosen)
    return _told(model, chosen)


def _file(path: Path) -> Path:
    if path.is_dir():
        found = next((path / name for name in IN_FOLDER if (path / name).is_file()), None)
        if found is None:
            raise ValueError(f"the folder {str(path)!r} has none of {', '.join(IN_FOLDER)}; name a file of weights")
        return found
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r} with weights")
    return path


def _read(path: Path) -> dict[str, Any]:
    if path.name.endswith(".index.json"):
        return _read_parts(path)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return dict(load_file(path))
        except Exception as error:  # safetensors' own kind, which is no public name everywhere
            raise ValueError(f"{str(path)!r} is no safetensors file that can be read: {error}") from error
    if path.suffix not in ENDINGS:
        raise ValueError(f"{str(path)!r} ends in {path.suffix!r}; expected {KINDS}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch.load, about other ways to call it
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files, and files that hold more than tensors
        raise ValueError(f"{str(path)!r} cannot be read as tensors alone{_cause(path, error)}") from error
    if isinstance(found, (list, tuple)):  # as of torch.save((model.state_dict(), optimizer.state_dict()), ...)
        return {str(i): value for i, value in enumerate(found)}
    return found if isinstance(found, dict) else {}


def _cause(path: Path, error: Exception) -> str:
    """What a file holds besides tensors, and how to save it without."""
    try:
        others = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # of files in the format of before, and of damaged ones
        others = re.findall(r"GLOBAL (\S+)", str(error))
    if "TorchScript" in str(error):
        return ": it is a TorchScript archive, which holds code; save the state_dict() of the network it was made of"
    if not others:
        lines = [line for line in str(error).splitlines() if len(line) > len("unknown")]
        first = lines[0] if lines else "torch.save did not write it"
        return f", and nothing else is loaded: {first:.160}; save the network's state_dict()"
    what = ", ".join(dict.fromkeys(name for name in others if not name.startswith("numpy.dtype"))) or "numpy.dtype"
    kind = " (a number or array of numpy's: write float(x), or torch.from_numpy(x))" if "numpy" in what else ""
    return (
        f": it also holds {what}{kind}, which loading would have to run code for. Where it was made, save the tensors "
        "alone, torch.save({'state_dict': model.state_dict()}, 'weights.pt'), with settings as plain numbers, texts "
        "and dicts (vars(args) for a Namespace)"
    )


def _read_parts(path: Path) -> dict[str, Any]:
    """The tensors of files in several parts, which an index names."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in index.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is no index of weights: it has no 'weight_map' of names to files") from error
    found: dict[str, Any] = {}
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{str(path)!r} names {name!r}, which is not beside it; keep the parts in one folder")
        if not (path.parent / name).is_file():
            raise FileNotFoundError(f"{str(path)!r} names {name!r}, which is not there; bring all parts together")
        part = _read(path.parent / name)
        found |= {key: value for key, value in part.items() if index.get(key, name) == name}
    if lacking := sorted(set(index) - set(found)):
        raise ValueError(
            f"{str(path)!r} names {listing(lacking, SHOWN)}, which no part holds; a part may be of another save"
        )
    return found


def _places(content: Mapping[str, Any], model: nn.Module) -> Iterator[_Place]:
    """Where the weights may be, the most usual place first: by keys, and in each by prefixes."""
    own = list(model.state_dict())
    nested = sorted(_mappings(content), key=lambda found: _rank(found[0]))
    for key, state in nested:
        yield _Place(key, state)
    for key, state in nested:
        prefixes = {name[: -len(one)] for one in own[:1] for name in state if name.endswith(f".{one}")}
        first, *_ = state
        parts = first.split(".")
        shared = [".".join(parts[:i]) + "." for i in range(1, len(parts))]
        prefixes |= {p for p in shared if all(name.startswith(p) or NO_PART.match(name) for name in state)}
        prefixes = {prefix for prefix in prefixes if not NO_PART.match(prefix)}
        for prefix in sorted(prefixes, key=lambda p: (AVERAGED.search(p) is not None, p not in PREFIXES, len(p), p)):
            yield _Place(key, state, prefix)
        first = own[0].split(".")[0] + "." if own else ""
        if first and all(name.startswith(first) for name in own):
            yield _Place(key, state, added=first)


def _mappings(content: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """All mappings of names that have tensors, by their keys."""
    if not isinstance(content, Mapping) or not content or depth > DEPTH:
        return
    if not all(isinstance(name, str) for name in content):
        return
    if any(isinstance(value, Tensor) for value in content.values()):
        yield key, content
    for name, value in content.items():
        yield from _mappings(value, f"{key}.{name}" if key else name, depth + 1)


def _rank(key: str) -> tuple[int, int, int]:
    """The place of a key among the usual ones; averaged weights come last."""
    names = key.split(".") if key else []
    place = min((USUAL.index(name) for name in names if name in USUAL), default=len(USUAL) if names else -1)
    return int(AVERAGED.search(key) is not None), place, len(names)


def _fits(model: nn.Module, place: _Place) -> bool:
    """Whether the network takes these entries, all of them and no others; it then has them."""
    own = model.state_dict(keep_vars=True)
    state, _ = place.entries(own)
    renamed = place.prefix or place.added
    if not state or (renamed and not own.keys() & state.keys()):
        return False
    for attempt in (state, _completed(own, state)):
        try:
            model.load_state_dict(attempt)
        except Exception:  # names and shapes that differ; a network's own way to load may raise anything
            continue
        return True
    return False


def _completed(own: Mapping[str, Any], state: OrderedDict[str, Any]) -> OrderedDict[str, Any]:
    """With what a file may lack: counts of mini-batches, and tensors that the network has under two names."""
    found = state.copy()
    for name in own.keys() - state.keys():
        if name.endswith(COUNT):
            found[name] = own[name]
        elif isinstance(own[name], Tensor) and own[name].numel():
            same = next((k for k in own.keys() & state.keys() if _shared(own[k], own[name])), None)
            found |= {} if same is None else {name: state[same]}
    if hasattr(state, "_metadata"):
        found._metadata = state._metadata  # type: ignore[attr-defined]
    return found


def _shared(a: Any, b: Tensor) -> bool:
    return isinstance(a, Tensor) and (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())


def _restore(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    now = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, value in before.items():
            if isinstance(now.get(name), Tensor):
                now[name].copy_(value)


def _differ(model: nn.Module, chosen: _Place, other: _Place) -> bool:
    """Whether two places hold different numbers."""
    own = model.state_dict()
    first, second = chosen.entries(own)[0], other.entries(own)[0]
    pairs = [(first[k], second[k]) for k in first.keys() & second.keys() if isinstance(first[k], Tensor)]
    return not all(torch.equal(a, b) for a, b in pairs)


def _misfit(model: nn.Module, places: list[_Place]) -> str:
    """What the nearest of some places lacks, or has besides."""
    own = model.state_dict(keep_vars=True)
    nearest = min(places, key=lambda place: (len(own.keys() ^ place.entries(own)[0].keys()), len(place.name)))
    state = _completed(own, nearest.entries(own)[0])
    under = f"under {nearest.name!r}: " if nearest.name else ""
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        keys = [place.key for place in places if place.key and place.key != nearest.key]
        more = f" (it also has {listing(dict.fromkeys(keys), SHOWN)})" if keys else ""
        told = [
            f"{text}: {listing(them, SHOWN)}"
            for text, them in (("missing", missing), ("unexpected", unexpected))
            if them
        ]
        return f"{under}{'; '.join(told)}; check --model and --model-arg{more}"
    wrong = [k for k in own if isinstance(state[k], Tensor) and own[k].shape != state[k].shape]
    if wrong:
        shapes = f"{wrong[0]} is {list(state[wrong[0]].shape)} in the file and {list(own[wrong[0]].shape)}"
        return f"{under}{shapes} in the network ({len(wrong)} such); check --model-arg"
    try:
        model.load_state_dict(state)
    except Exception as error:  # the network's own way to load may raise anything
        return f"{under}{' '.join(str(error).split())}"
    return f"{under}check --model and --model-arg"


def _told(model: nn.Module, place: _Place) -> str:
    """What was taken of a checkpoint."""
    parts = [f"under {place.key!r}"] if place.key else []
    parts += [f"without the prefix {place.prefix!r} of their names"] if place.prefix else []
    parts += [f"with the prefix {place.added!r} before their names"] if place.added else []
    _, left = place.entries(model.state_dict())
    told = f"weights {', '.join(parts)}" if parts else ""
    return f"{told or 'weights'}; left out: {listing(left, SHOWN)}" if left else told
