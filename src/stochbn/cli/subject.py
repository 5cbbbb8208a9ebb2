"""What the commands are about: a network, its data and its posterior, as options name them."""

from __future__ import annotations

import functools
import inspect
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stochbn.cli.console import say
from stochbn.cli.inputs import check_images, default_posterior, load_images
from stochbn.cli.options import Override
from stochbn.cli.own_data import OwnData

if TYPE_CHECKING:
    from torch import nn

    from stochbn.posteriors import Posterior
    from stochbn.sources import LoaderObjects, ParquetObjects, RowObjects
    from stochbn.sources.named import Images
    from stochbn.tasks import Task

__all__ = ["ANEW", "HELD", "SHARED", "Given", "Subject", "about_networks", "needs", "settings_of", "task_given"]


@dataclass(frozen=True)
class Given:
    """The options that all commands about a network share, as they were given."""

    networks: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="NETWORK", help="A network of 'stochbn paper train'; or use --model.", show_default=False
        ),
    ] = None
    model: Annotated[
        str | None,
        Override("--model", help="Your own network: package.module:function, timm:NAME or hf:PATH."),
    ] = None
    model_arg: Annotated[
        list[str] | None,
        Override("--model-arg", help="An argument of this function, as key=value; repeat it for more."),
    ] = None
    weights: Annotated[
        Path | None, Override("--weights", help="Its weights: .safetensors, or a checkpoint (.pt, .pth, .ckpt, .bin).")
    ] = None
    weights_key: Annotated[
        str | None,
        Override(
            "--weights-key",
            help="Which weights of a checkpoint to take: a key, such as model_ema, or a prefix of names.",
        ),
    ] = None
    split: Annotated[str | None, Override("--split", help="Split of the data, if there are several.")] = None
    input: Annotated[
        list[str] | None, Override("--input", help="A column (or array) of inputs; repeat it for more columns.")
    ] = None
    label: Annotated[
        list[str] | None,
        Override("--label", help="The column (or array) of labels; repeat it, in order, for a task with several."),
    ] = None
    key: Annotated[str | None, Override("--key", help="The column (or array) that names the rows.")] = None
    size: Annotated[
        str | None,
        Override("--size", help="Resize and crop images to SIZE or HEIGHTxWIDTH; detection pads them instead."),
    ] = None
    mean: Annotated[
        str | None, Override("--mean", help="Mean to subtract from images in [0, 1]: 0.5 or 0.5,0.4,0.4.")
    ] = None
    std: Annotated[
        str | None, Override("--std", help="Standard deviation to divide images by: 0.5 or 0.2,0.2,0.2.")
    ] = None
    exif: Annotated[
        bool | None,
        Override("--exif/--no-exif", help="Turn photos upright by their EXIF orientation. (default: on)"),
    ] = None
    page: Annotated[
        int | None, Override("--page", min=0, help="Page to take of images with several (TIFF, GIF), from 0.")
    ] = None
    task: Annotated[
        str | None,
        Override(
            "--task",
            help="What the output means: classification (default), binary, multilabel, regression, survival, "
            "detection or embedding.",
        ),
    ] = None
    logits: Annotated[
        str | None, Override("--logits", help="Place of the logits in the output: a key, a field or a position.")
    ] = None
    class_axis: Annotated[int | None, Override("--class-axis", help="Axis of the classes in the output.")] = None
    probs: Annotated[bool, typer.Option("--probs", help="The output is probabilities, after a softmax.")] = False

    @property
    def files(self) -> list[Path]:
        """The files of the networks, which no command writes."""
        return [*(self.networks or ()), *([self.weights] if self.weights is not None else [])]


HELD = ("input", "label", "size", "mean", "std", "exif", "page")
"""Options about data that 'stochbn fit' keeps in the posterior's file, where later commands find them."""
ANEW = ("split",)
"""Options that the next command does not have: it is about other data."""
SHARED = tuple(field.name for field in fields(Given) if field.name != "networks")


def about_networks(*, several: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of `Given`, which it gets as its first argument."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        shared = inspect.signature(Given, eval_str=True).parameters
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        first = shared["networks"]
        if not several:
            argument = first.annotation.__metadata__[0]
            first = first.replace(annotation=Annotated[Path | None, argument])
        parameters = [first, *own, *(shared[name] for name in SHARED)]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        parameters.append(context)

        @functools.wraps(command)
        def wrapper(**arguments: Any) -> None:
            from stochbn.distributed import RanksError

            networks = arguments.pop("networks")
            shared = {name: arguments.pop(name) for name in SHARED}
            given = Given(networks=[networks] if isinstance(networks, Path) else networks, **shared)
            _check_one_way(given, arguments.pop("context"))
            try:
                command(given, **arguments)
            except RanksError:
                raise
            except (RuntimeError, TypeError) as error:  # a user's network may not take the data
                if given.networks:
                    raise
                raise ValueError(f"{given.model}: {error}") from error
            except (ArithmeticError, AssertionError, AttributeError, LookupError) as error:
                if given.networks or not _raised_outside(error):
                    raise
                raise ValueError(f"{given.model}: {type(error).__name__}: {error}") from error

        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapper

    return decorate


def _raised_outside(error: BaseException) -> bool:
    """Whether an error began in code that is not this package's."""
    frames = traceback.extract_tb(error.__traceback__)
    return not Path(frames[-1].filename).is_relative_to(Path(__file__).parents[1])


@dataclass(frozen=True, eq=False)
class Subject:
    """A network, and how data is brought to it.

    Attributes:
        model: the network.
        name: what it is called.
        data: what it was trained on, if that is known.
        classes: the names of its classes; none if they are not known.
        settings: arguments of predictives: ``task``, ``logits``, ``class_axis`` and ``output``.
        dropout: whether dropout stays on; None: if there is any.
        open: opens data, of a split.
        open_parquet: opens Parquet files as a stream that other processes can share; None: it takes none.
        posterior: where its posterior is if nothing else is said.
        augments: whether data that is loaded for training is changed at random by the network's own module.
        fitted: the posterior whose data the subject's data is held to, and its file.
        preprocess: from a picture to the network's input, if there is such.
    """

    model: nn.Module
    name: str
    data: str | None
    classes: tuple[str, ...]
    settings: dict[str, Any]
    dropout: bool | None
    open: Callable[..., Images | RowObjects | LoaderObjects]
    open_parquet: Callable[[str, str, str | None], ParquetObjects] | None
    posterior: Path | None
    augments: bool = False
    fitted: tuple[Path, Posterior] | None = None
    preprocess: Callable[[Any], Any] | None = None

    @property
    def task(self) -> Task:
        """What the network's output means."""
        from stochbn.interface import Interface

        return Interface.among(self.model, self.settings).task

    @classmethod
    def of(cls, given: Given, network: Path | None = None, held: Path | None = None) -> Subject:
        """The network that is given: by a file that 'stochbn paper train' wrote, or the user's own.

        Args:
            given: the options about it.
            network: the file, if it is one of 'stochbn paper train'.
            held: a posterior whose data the network's data is held to.
        """
        return cls._trained(given, network) if network is not None else cls._own(given, held)

    @classmethod
    def all_of(cls, given: Given, held: Path | None = None) -> list[Subject]:
        """All networks that are given."""
        return [cls.of(given, network) for network in given.networks] if given.networks else [cls.of(given, None, held)]

    @classmethod
    def one(cls, given: Given) -> Subject:
        """The only network that is given, for a command that makes a posterior."""
        (subject,) = cls.all_of(given)
        return subject

    @classmethod
    def held(cls, given: Given, posterior: Path | None) -> Subject:
        """The only network that is given, with data as that of its posterior was: the named one, or the default's."""
        (subject,) = cls.all_of(given, held_by(given, posterior))
        return subject

    @classmethod
    def _trained(cls, given: Given, network: Path) -> Subject:
        from stochbn.sources import checkpoints

        checkpoint = checkpoints.load(network)

        def opened(
            source: str, need: str, labelled: bool = False, group: str | None = None, ignore: int | None = None
        ) -> Images:
            if group is not None:
                raise ValueError(f"{source} has pictures and labels alone, and no column {group!r}")
            images = load_images(source, given.split or need)
            check_images(checkpoint, images, labelled)
            return images

        return cls(
            model=checkpoint.model,
            name=checkpoint.network,
            data=checkpoint.data,
            classes=checkpoint.classes,
            settings=settings_of(given),
            dropout=None,
            open=opened,
            open_parquet=None,
            posterior=default_posterior(network),
        )

    @classmethod
    def _own(cls, given: Given, held_by: Path | None) -> Subject:
        from stochbn.interface import Interface
        from stochbn.posteriors import load
        from stochbn.sources import build, load_weights, parse_arguments
        from stochbn.tasks import Classification, Detection

        assert given.model is not None
        built = build(given.model, parse_arguments(given.model_arg or ()), weights_follow=given.weights is not None)
        if given.weights is not None:
            told = load_weights(built.model, given.weights, given.weights_key)
            if told:
                say(f"{given.weights}: {told}.", given.weights)
        settings = settings_of(given)
        task = Interface.among(built.model, settings).task
        if given.task is None and task.name != Classification.name:
            settings["task"] = task.name
            say(f"{given.model}: --task {task.name}, as the network says.")
        fitted = None if held_by is None else (held_by, load(held_by))
        held = None if fitted is None else fitted[1].schema
        data = OwnData(given, built, held, whole=isinstance(task, Detection))
        return cls(
            model=built.model,
            name=given.model,
            data=None,
            classes=built.classes or (),
            settings=settings,
            dropout=False,
            open=data.open,
            open_parquet=data.open_parquet,
            posterior=default_posterior(given.weights) if given.weights is not None else None,
            augments=built.train_preprocess is not None,
            fitted=fitted,
            preprocess=data.built.preprocess,
        )

    def load(
        self,
        source: str | None,
        need: str,
        option: str = "--data",
        *,
        labelled: bool = False,
        group: str | None = None,
        ignore: int | None = None,
    ) -> Any:
        """Open data, or what the network was trained on; needs it ``train``, ``test`` or ``held-out``.

        What is needed as a ``reference`` is that of ``train``, shown as at test time. Of `labelled` data for a task of
        one class an example, labels get the numbers of the fit's classes, and are checked unless some are to `ignore`.
        The group is the column that prediction sets are by.

        Raises:
            ValueError: none is named and none is known.
        """
        source = source or (self.data if option == "--data" else None)
        if source is None:
            raise ValueError(needs(option))
        return self.open(source, need, labelled and self.task.one_class, group, ignore)

    def find_posterior(self, path: Path | None) -> Posterior | None:
        """The posterior in a file or, if none is named, in the default place, if there is one."""
        from stochbn.posteriors import load

        if path is None:
            path = self.posterior
            if path is None or not path.exists():
                return None
        return self.fitted[1] if self.fitted is not None and self.fitted[0] == path else load(path)

    def need_posterior(self, path: Path | None) -> Posterior:
        """The posterior.

        Raises:
            FileNotFoundError: there is none.
        """
        found = self.find_posterior(path)
        if found is None:
            beside = f" {str(self.posterior)!r}" if self.posterior is not None else ""
            raise FileNotFoundError(
                f"there is no posterior{beside}: run 'stochbn fit' on the network first, or name one with --posterior"
            )
        return found


def held_by(given: Given, posterior: Path | None) -> Path | None:
    """The file of the posterior whose data later data is held to: the named one, or the default one if it is there."""
    if posterior is not None:
        return posterior if posterior.exists() else None  # that it is missing is told where it is needed
    beside = default_posterior(given.weights) if given.weights is not None else None
    return beside if beside is not None and beside.exists() else None


def needs(option: str) -> str:
    """What to do where an option is missing that this network cannot do without."""
    from stochbn.sources.opening import KINDS

    if option == "--out":
        return "name a file for the posterior with --out: there is no file of weights to write it beside"
    return f"name data with {option}: {KINDS}"


def _check_one_way(given: Given, context: typer.Context) -> None:
    source = context.get_parameter_source("model")
    if given.networks and source is not None and source.name == "COMMANDLINE":  # one in a project file gives way
        raise ValueError("name a network that 'stochbn paper train' wrote, or your own with --model, not both")
    if not given.networks and given.model is None:
        if given.weights is not None:
            raise ValueError("--weights needs --model, which builds the network that they are for")
        raise typer.BadParameter("name a network: --model package.module:function, or a file of 'stochbn paper train'")


def settings_of(given: Given) -> dict[str, Any]:
    """The arguments of predictives that are given.

    Raises:
        ValueError: there is no such task, or they do not fit each other.
    """
    place: Any = given.logits
    if place is not None and place.lstrip("-").isdigit():
        place = int(place)
    found = {
        "task": given.task,
        "logits": place,
        "class_axis": given.class_axis,
        "output": "probs" if given.probs else None,
    }
    _task_of(found)
    return {name: value for name, value in found.items() if value is not None}


def task_given(given: Given) -> Task:
    """The task that options name.

    Raises:
        TypeError, ValueError: there is no such task, or options do not fit each other.
    """
    return _task_of(settings_of(given))


def _task_of(settings: Mapping[str, Any]) -> Task:
    """The task of the arguments of predictives."""
    from stochbn.tasks import Classification, make_task

    place, axis, output = (settings.get(name) for name in ("logits", "class_axis", "output"))
    return make_task(settings.get("task") or Classification.name, place, axis, output)
