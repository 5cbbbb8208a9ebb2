"""Build networks by name: from a module of the user, from timm or from Transformers."""

from __future__ import annotations

import ast
import difflib
import importlib
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from stochbn.sources.pictures import Preprocessing, channels_of

__all__ = ["Built", "build", "find", "parse_arguments", "prepared"]

GREY = 114 / 255
"""What pictures are padded with for detectors, as those of the YOLO family are trained."""
HOW = "name a network as package.module:function, timm:NAME or hf:PATH"


@dataclass(frozen=True, eq=False)
class Built:
    """A network, with the preprocessing and classes of its source.

    Attributes:
        model: the network, in evaluation mode.
        preprocess: turns a decoded image (or the tensor of an example) into the network's input; None if there is none.
        classes: the names of its classes, if they are known.
        train_preprocess: the same with the augmentation of training; None if there is none.
        prepared_by: the source of `preprocess`, in words.
    """

    model: nn.Module
    preprocess: Callable[[Any], Any] | None = None
    classes: tuple[str, ...] | None = None
    train_preprocess: Callable[[Any], Any] | None = None
    prepared_by: str = ""


def parse_arguments(given: Iterable[str]) -> dict[str, Any]:
    """Parse arguments of a function from texts ``key=value``, with Python literals or texts as values.

    Raises:
        ValueError: a text is not of this form, or a key is given twice.

    >>> parse_arguments(["width=0.5", "kind=wide", "sizes=(1, 2)"])
    {'width': 0.5, 'kind': 'wide', 'sizes': (1, 2)}
    """
    found: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"{text!r} is no argument; write it as key=value, such as width=0.5")
        if key in found:
            raise ValueError(f"the argument {key!r} is given twice; give it once")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found


def build(reference: str, arguments: Mapping[str, Any], *, weights_follow: bool = False) -> Built:
    """Build a network.

    Args:
        reference: ``package.module:function``: a function or class that returns a network, or a network. The module
            may have ``preprocess``, a function from an image to the network's input, ``train_preprocess``, the same
            with the random changes of training, and ``classes``, names of classes. ``timm:NAME``: a network of timm's.
            ``hf:PATH``: what Transformers saved in a folder, or on the Hub.
        arguments: keyword arguments of the function.
        weights_follow: whether weights will be loaded into it; without them, one of timm's needs ``pretrained=True``.

    Raises:
        ValueError: it cannot be found or built; the message says what to do.
    """
    kind, colon, name = reference.partition(":")
    if not colon or not kind or not name:
        raise ValueError(f"{reference!r} names no network; {HOW}")
    if kind == "timm":
        return _timm(name, arguments, weights_follow)
    if kind == "hf":
        return _transformers(name, arguments)
    module, found = find(reference, "network")
    model = found
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise ValueError(f"{reference!r} is of type {type(found).__name__}; expected a function or a network")
        model = _called(reference, found, arguments)
    elif arguments:
        raise ValueError(f"{reference!r} is a network and takes no arguments; name a function, or drop --model-arg")
    if not isinstance(model, nn.Module):
        raise ValueError(f"{reference!r} returned {type(model).__name__}, not a torch.nn.Module; return the network")
    classes = getattr(module, "classes", None)
    if classes is not None and (isinstance(classes, str) or not all(isinstance(name, str) for name in classes)):
        raise ValueError(f"'classes' of {module.__name__!r} must be a list of names")
    functions = {name: getattr(module, name, None) for name in ("preprocess", "train_preprocess")}
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise ValueError(f"{name!r} of {module.__name__!r} must be a function of an image")
    by = f"preprocess of {module.__name__}" if functions["preprocess"] is not None else ""
    return Built(model.eval(), classes=None if classes is None else tuple(classes), prepared_by=by, **functions)


def prepared(
    built: Built,
    size: tuple[int, int] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    *,
    whole: bool = False,
) -> Built:
    """The same with a preprocess: by these numbers where any are given, else its own, else what images need alone.

    Where its own is a `Preprocessing`, as of timm, it keeps what is not given. With `whole`, pictures that are brought
    to a size are padded, so that no box is cut.

    Raises:
        ValueError: as `Preprocessing`.
    """
    channels = channels_of(built.model)
    if size is not None or mean is not None or std is not None:
        own = built.preprocess if isinstance(built.preprocess, Preprocessing) else Preprocessing(channels=channels)
        if whole and size is not None and not own.squash:
            own = replace(own, pad=GREY if own.pad is None else own.pad, crop=1.0)
        return replace(built, preprocess=replace(own, size=size or own.size, mean=mean or own.mean, std=std or own.std))
    if built.preprocess is not None:
        return built
    return replace(built, preprocess=Preprocessing(channels=channels))


def find(reference: str, what: str) -> tuple[ModuleType, Any]:
    """A module and what it has under a name, from ``package.module:name``; the current folder is searched too.

    Raises:
        ValueError: there is no such module or name, or importing it fails.
    """
    place, _, name = reference.partition(":")
    if (here := str(Path.cwd())) not in sys.path:  # a script's folder is searched, that of a user is not
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(place)
    except ModuleNotFoundError as error:
        missing = str(error.name)
        if place == missing or place.startswith(f"{missing}."):
            raise ValueError(
                f"there is no module {missing!r} for the {what} {reference!r}: run from the folder that holds it, or "
                "install it"
            ) from error
        raise ValueError(f"importing {place!r} failed: it needs {missing!r}, which is not installed") from error
    except Exception as error:  # a user's module may raise anything
        raise ValueError(f"importing {place!r} failed: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        names = [n for n in vars(module) if not n.startswith("_")]
        there = ", ".join(names[:12]) or "no public names"
        raise ValueError(f"the module {place!r} has no {name!r}{_near(name, names)}; it has {there}")
    return module, getattr(module, name)


def _near(name: str, known: Iterable[str]) -> str:
    """Names that are nearly the same, as advice."""
    near = difflib.get_close_matches(name, list(known), 3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _called(reference: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    try:
        return function(**arguments)
    except Exception as error:  # a user's function may raise anything
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        told = f"{type(error).__name__}: {error}"
        raise ValueError(f"{reference!r} cannot be built with ({given}): {told}; see --model-arg") from error


def _timm(name: str, arguments: Mapping[str, Any], weights_follow: bool) -> Built:
    try:
        timm = importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise ValueError(f"'timm:{name}' needs timm, which is not installed: pip install timm") from error
    if not weights_follow and not arguments.get("pretrained"):
        raise ValueError(
            f"'timm:{name}' would have random weights: name a file with --weights, or give --model-arg pretrained=True"
        )
    known: list[str] = getattr(timm, "list_models", list)()
    if known and "/" not in name and ":" not in name and name.split(".")[0] not in known:
        raise ValueError(f"timm has no network {name!r}{_near(name, known)}")
    model: nn.Module = _called(f"timm:{name}", lambda **given: timm.create_model(name, **given), arguments)
    config = timm.data.resolve_model_data_config(model)
    _, *size = config["input_size"]
    if (mode := config.get("crop_mode") or "center") not in ("center", "squash"):
        raise ValueError(
            f"'timm:{name}' crops pictures in the way {mode!r}, which is not known; use a module of your own"
        )
    crop = config.get("crop_pct") or 0.875
    square = len({math.floor(side / crop) for side in size}) == 1  # timm resizes others bilinearly, whatever it says
    interpolation = config.get("interpolation") or "bilinear"
    preprocess = Preprocessing(
        (size[0], size[1]),
        tuple(config["mean"]),
        tuple(config["std"]),
        channels_of(model),
        crop,
        interpolation if square or mode == "squash" else "bilinear",
        squash=mode == "squash",
    )
    return Built(model.eval(), preprocess, prepared_by=f"timm's data config of {name}")


def _transformers(name: str, arguments: Mapping[str, Any]) -> Built:
    try:
        transformers = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise ValueError(f"'hf:{name}' needs Transformers, which is not installed: pip install transformers") from error

    def loaded(**given: Any) -> Any:
        config = transformers.AutoConfig.from_pretrained(name)
        (kind, *_) = config.architectures or [None]
        if kind is None:
            raise ValueError("its config.json names no architecture")
        return getattr(transformers, kind).from_pretrained(name, **given)

    model: nn.Module = _called(f"hf:{name}", loaded, arguments)
    names = getattr(model.config, "id2label", None)
    classes = tuple(str(names[i]) for i in sorted(names)) if names else None
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError, ImportError):  # a network of other things than images, or without a description
        return Built(model.eval(), None, classes)

    def preprocess(image: Any) -> Any:
        return processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]

    return Built(model.eval(), preprocess, classes, prepared_by="the network's own image processor")
