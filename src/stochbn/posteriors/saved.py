"""Save and load posteriors, in the current file format and earlier ones."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stochbn.files import read_versions, write_tensors
from stochbn.network.fingerprint import Fingerprint
from stochbn.posteriors.adaptation import Adaptation
from stochbn.posteriors.reference import Reference
from stochbn.posteriors.thresholds import Thresholds
from stochbn.schema import Schema
from stochbn.sharing import download
from stochbn.tasks.residual import Residual

if TYPE_CHECKING:
    from stochbn.posteriors.base import Posterior

__all__ = ["FORMAT", "from_pretrained", "load", "save"]

FORMAT = "stochbn.posterior/3"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""The types of running statistics that a file can have."""
SECOND = "stochbn.posterior/2"
"""The second format: the centre is the observed one, and a posterior without noise has lost its noise."""
FIRST = "stochbn.posterior/1"
"""The format before that: `skipped` is a list without reasons, and there is no fingerprint."""
PARTS: Mapping[str, Any] = {"reference": Reference, "thresholds": Thresholds, "residual_variance": Residual}
"""Fields with tensors of their own in a file."""
DESCRIBED: Mapping[str, Any] = {"adaptation": Adaptation, "schema": Schema, "fingerprint": Fingerprint}
"""Fields with a description in a file, and no tensors."""
LATER = (*PARTS, "adaptation", "schema")
"""Fields that files of the present format have not always had."""
OPTIONAL = {
    FORMAT: {"temperature", *LATER},
    SECOND: {"temperature", "centre", "fitted_size", "choice", *LATER},
    FIRST: {"temperature", "centre", "fitted_size", "choice", "fingerprint", *LATER},
}
"""Fields that a file of each format may lack, and then has at their defaults."""


def save(posterior: Posterior, path: str | os.PathLike[str]) -> None:
    """Save a posterior as safetensors, as a whole or not at all, with the format's version and all settings.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = posterior._tensors()
    about = {f.name: getattr(posterior, f.name) for f in fields(posterior) if f.name not in tensors}
    about |= {"kind": posterior.kind, "layers": list(posterior.layers.items()), "skipped": dict(posterior.skipped)}
    about["dtype"] = str(posterior.dtype).removeprefix("torch.")
    held = {name: getattr(posterior, name) for name in tensors}
    if about.pop("observed") is not None:
        held["observed"] = posterior.observed
    for name in (*PARTS, *DESCRIBED):
        if (part := about[name]) is not None:
            about[name] = part.description()
            held |= {f"{name}.{key}": tensor for key, tensor in part.tensors().items()} if name in PARTS else {}
    write_tensors(path, FORMAT, held, about)


def load(path: str | os.PathLike[str]) -> Posterior:
    """Load a posterior that was saved with its ``save``. Nothing in the file is executed.

    `Predictive` checks names, shapes and weights against the network. Files of the first format have no fingerprint of
    the weights, and loading them warns. Files of the first two formats have draws about the observed statistics, see
    ``Posterior.recentre``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, corrupt, not a posterior, or of another format version; the message says which.
    """
    tensors, about, format = read_versions(path, FORMAT, SECOND, FIRST)
    try:
        posterior = _posterior(tensors, about, format)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is not a usable posterior: {error}") from error
    if format == FIRST:
        warnings.warn(
            f"{str(path)!r} is of a format without a fingerprint of the weights that the posterior was fitted with, so "
            "a network with other weights is not noticed; fit again and save to have one",
            stacklevel=2,
        )
    return posterior


def from_pretrained(
    repository: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
) -> Posterior:
    """Load a posterior from the Hugging Face Hub or a local folder. Nothing in it is executed.

    Args:
        repository: ``owner/name`` on the Hub, or a folder with a file ``posterior.sbn.safetensors``. A folder that
            exists takes precedence.
        revision: a branch, tag or commit of the repository.
        token: for private repositories; None takes the one that ``hf auth login`` has stored.

    Raises:
        ImportError: the posterior is on the Hub, and huggingface_hub is not installed.
        FileNotFoundError: there is no such folder or repository, or no posterior in it, or no connection.
        ValueError: the file is not a usable posterior; the message says why.
    """
    return load(download(repository, revision, token))


def _posterior(tensors: Mapping[str, Tensor], about: Any, format: str) -> Posterior:
    """The posterior in a file; a ValueError names the first invalid field."""
    if not isinstance(about, dict):
        raise ValueError(f"its description is no mapping, but {about!r:.60}")
    if not isinstance(about.get("kind"), str):
        raise ValueError(f"its kind must be a name, got {about.get('kind')!r:.60}")
    if about["kind"] not in _kinds():
        known = ", ".join(map(repr, _kinds()))
        raise ValueError(f"its kind is {about['kind']!r:.60}, this release of stochbn knows {known}")
    kind = _kinds()[about["kind"]]
    names = {field.name for field in fields(kind)} - set(kind._tensors()) - {"observed"}
    required = names - OPTIONAL[format]
    for name in (*required, *kind._tensors()):
        if name not in about and name not in tensors:
            raise ValueError(f"it has no {name}")
    if odd := about.keys() - names - {"kind"}:
        raise ValueError(f"it has {min(odd)!r:.60}, which a posterior of its kind has not")
    settings: dict[str, Any] = {name: value for name, value in about.items() if name != "kind"}
    settings |= {name: tensors[name] for name in (*kind._tensors(), "observed") if name in tensors}
    settings["layers"] = _layers(about["layers"])
    for name, part in PARTS.items():
        if about.get(name) is not None:
            own = {full.removeprefix(f"{name}."): t for full, t in tensors.items() if full.startswith(f"{name}.")}
            settings[name] = part.from_file(own, about[name])
    for name, part in DESCRIBED.items():
        if about.get(name) is not None:
            settings[name] = part.from_description(about[name])
    settings["dtype"] = _dtype(about["dtype"])
    if format == FIRST:
        settings["skipped"] = _without_reasons(about["skipped"])
        settings["layers"], settings["skipped"] = map(_unwrapped, (settings["layers"], settings["skipped"]))
    return kind(**settings)


def _layers(pairs: Any) -> dict[str, Any]:
    """Layers and their channels, in order; `Posterior` checks the numbers."""
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs
    ):
        raise ValueError(f"layers must be pairs of a name and a number of channels, got {pairs!r:.60}")
    layers = dict(pairs)
    if len(layers) < len(pairs):
        raise ValueError("layers must have different names")
    return layers


def _dtype(name: Any) -> torch.dtype:
    known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"dtype must be one of {', '.join(known)}, got {name!r:.60}")
    return known[name]


def _without_reasons(names: Any) -> dict[str, str]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"skipped must be names of layers, got {names!r:.60}")
    return dict.fromkeys(names, "not recorded")


def _unwrapped(named: dict[str, Any]) -> dict[str, Any]:
    """Remove the prefix of a wrapper from all names, as old posteriors of wrapped networks have it."""
    for prefix in ("module.", "_orig_mod."):
        if named and all(name.startswith(prefix) for name in named):
            return {name.removeprefix(prefix): value for name, value in named.items()}
    return named


def _kinds() -> dict[str, type[Posterior]]:
    from stochbn.posteriors import KINDS  # which has this module's `load`

    return KINDS
