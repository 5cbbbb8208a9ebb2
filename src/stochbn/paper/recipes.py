"""What an experiment consists of: network, data, training, members and draws."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from stochbn.paper.schedule import Schedule
from stochbn.sources.architectures import RESNET_BLOCKS, VGG_CONVOLUTIONS, arguments_for
from stochbn.sources.named import Images

__all__ = ["DEMOS", "PRESETS", "Member", "Recipe"]


@dataclass(frozen=True)
class Member:
    """One network to train: a plain one (for SBN and Deep Ensembles) or one with dropout."""

    kind: str
    index: int

    @property
    def name(self) -> str:
        """Its name, and that of its folder: ``plain-0``, ``dropout-0``."""
        return f"{self.kind}-{self.index}"


@dataclass(frozen=True)
class Recipe:
    """One experiment of the paper (Atanov et al., 2018, section 5).

    Attributes:
        network: its name in `stochbn.sources.architectures`.
        data: known classes, as `stochbn.sources.named.load` takes them.
        unknown: unknown classes, likewise; None leaves out everything out of domain.
        epochs: passes over the training data.
        members: the number of plain networks; the first is the one of the row SBN, all are the Deep Ensemble.
        dropout: network arguments that turn its dropout on; None leaves out the network with dropout.
        arguments: further network arguments.
        batch_size: examples in a training mini-batch.
        learning_rate: Adam's, decaying linearly to 0.
        decay: when the learning rate changes: each ``epoch``, as published, or each ``step``.
        decrease_from: how many epochs the learning rate stays as it is first.
        uniform_scale: whether the scale of every batch norm starts from U(0, 1), as published, and not from 1.
        statistics_batch: examples in a mini-batch whose statistics are observed.
        posterior: how the factorised posterior is fitted: by moments of the logarithm of the variance, as published
            (``factorized-log``), or of the variance (``factorized``).
        drawn: which batch norms are drawn: ``all``, or those of ``convolutions`` alone, as published for LeNet-5, whose
            hidden linear layer keeps its running statistics.
        augment_fit: whether these examples are cropped and flipped at random, as published where training does so.
        draws: draws, or dropout passes, of each network at test time.
        seed: what all randomness comes from.
        augment: whether training images are cropped and flipped at random.
        precision: Lightning Fabric's name of the arithmetic in training.
        compile: whether training steps are compiled.
        processes: how many processes train one network together.
        held_out: a random part of the training images that is not trained on: every choice is made with it.
        evaluate_on: ``test`` for the final numbers, or ``held-out`` to choose a setting of the recipe itself.
        train_images: use this many training images only; None is all.
        test_images: likewise for the known and for the unknown test images.
    """

    network: str
    data: str
    unknown: str | None
    epochs: int
    members: int
    dropout: dict[str, float] | None
    arguments: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 16
    learning_rate: float = 1e-3
    statistics_batch: int = 16
    draws: int = 50
    seed: int = 0
    augment: bool = False
    precision: str = "32-true"
    compile: bool = False
    processes: int = 1
    held_out: float = 0.0
    evaluate_on: str = "test"
    train_images: int | None = None
    test_images: int | None = None
    decay: str = "step"
    decrease_from: int = 0
    uniform_scale: bool = False
    augment_fit: bool = False
    drawn: str = "all"
    posterior: str = "factorized"

    def __post_init__(self) -> None:
        least = {"epochs": 1, "members": 1, "statistics_batch": 2, "draws": 1, "train_images": 1, "test_images": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"{name} must be at least {smallest}, got {value}")
        for name, rate in (self.dropout or {}).items():
            if not 0 <= rate < 1:
                raise ValueError(f"{name} must be a rate from 0 to 1, got {rate}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to 2^32 - 1, got {self.seed}")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out must be a fraction from 0 to 1, got {self.held_out}")
        if self.evaluate_on not in ("test", "held-out"):
            raise ValueError(f"evaluate_on must be 'test' or 'held-out', got {self.evaluate_on!r}")
        if self.drawn not in ("all", "convolutions"):
            raise ValueError(f"drawn must be 'all' or 'convolutions', got {self.drawn!r}")
        if self.posterior not in ("factorized", "factorized-log"):
            raise ValueError(f"posterior must be 'factorized' or 'factorized-log', got {self.posterior!r}")
        if self.evaluate_on == "held-out" and not self.held_out:
            raise ValueError("there are no held-out images to evaluate on: set held_out, such as 0.1")
        for member in self.all_members():
            self.schedule(member)  # refuses what no schedule can be

    def as_dict(self) -> dict[str, Any]:
        """Every field, as JSON holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, described: dict[str, Any]) -> Recipe:
        """The recipe with these fields; one that an earlier version did not have was at its default.

        Before the learning rate's decay was a field, ``resnet18`` was today's ``resnet18-final-bn``, and convolutions
        of ``vgg11`` had no biases.

        Raises:
            TypeError, ValueError: there is no such field, or a value is impossible.
        """
        if "decay" not in described:
            if described["network"] == "resnet18":
                described = {**described, "network": "resnet18-final-bn"}
            if described["network"] == "vgg11":
                described = {**described, "arguments": {"bias": False, **described["arguments"]}}
        return cls(**described)

    def all_members(self) -> list[Member]:
        """The networks to train, the one that takes longest (two times `draws` passes) first."""
        dropout = [Member("dropout", 0)] if self.dropout is not None else []
        return [*dropout, *(Member("plain", i) for i in range(self.members))]

    def schedule(self, member: Member) -> Schedule:
        """How a member is trained; every member has a seed of its own."""
        offset = member.index + (500 if member.kind == "dropout" else 0)
        seed = self.seed * 1000 + offset
        return Schedule(
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            seed=seed,
            augment=self.augment,
            precision=self.precision,
            compile=self.compile,
            processes=self.processes,
            decay=self.decay,
            decrease_from=self.decrease_from,
        )

    def network_arguments(self, member: Member, images: Images) -> dict[str, Any]:
        """What a member is built with, for these training images."""
        return arguments_for(images) | self.arguments | (self.dropout or {} if member.kind == "dropout" else {})


_PUBLISHED: dict[str, Any] = {"decay": "epoch", "uniform_scale": True, "posterior": "factorized-log"}
_CIFAR: dict[str, Any] = {"data": "cifar10:0-4", "unknown": "cifar10:5-9", "augment": True}
_LENET = Recipe("lenet5", "mnist", "notmnist", epochs=8, members=6, dropout={"dropout": 0.5})
_VGG = Recipe(
    "vgg11",
    **_CIFAR,
    epochs=10,
    members=3,
    dropout={"dropout": 0.05, "classifier_dropout": 0.2},
    arguments={"width": 0.5},
    test_images=2000,
)
_RESNET = Recipe(
    "resnet18",
    **_CIFAR,
    epochs=8,
    batch_size=64,
    members=3,
    dropout=None,
    arguments={"width": 0.25},
    test_images=2000,
)
_PAPER: dict[str, Any] = {"epochs": 200, "batch_size": 16, "members": 12, "arguments": {}, "test_images": None}
_SMOKE: dict[str, Any] = {"epochs": 1, "members": 2, "draws": 4, "train_images": 256, "test_images": 64}
_SMALL: dict[str, Any] = {"arguments": {"width": 0.125}, "batch_size": 32, **_SMOKE}


def _presets(recipe: Recipe) -> dict[str, Recipe]:
    """The presets of a network for CIFAR, whose reduced one this is."""
    return {
        "paper": replace(recipe, **_PAPER, **_PUBLISHED, augment_fit=True),
        "reduced": recipe,
        "smoke": replace(recipe, **_SMALL),
    }


PRESETS: dict[str, dict[str, Recipe]] = {
    "lenet5": {
        "paper": replace(_LENET, epochs=50, **_PUBLISHED, drawn="convolutions"),
        "reduced": _LENET,
        "smoke": replace(_LENET, data="digits:0-4", unknown="digits:5-9", **_SMOKE),
    },
    **{f"vgg{depth}": _presets(replace(_VGG, network=f"vgg{depth}")) for depth in VGG_CONVOLUTIONS},
    **{f"resnet{depth}": _presets(replace(_RESNET, network=f"resnet{depth}")) for depth in RESNET_BLOCKS},
    "resnet18-final-bn": {
        "reduced": replace(_RESNET, network="resnet18-final-bn"),
        "smoke": replace(_RESNET, network="resnet18-final-bn", **_SMALL),
    },
}
"""What ``stochbn paper reproduce`` runs. ``paper`` is the published protocol, point by point in ``docs/protocol.md``.
``reduced`` takes about an hour on two CPU cores and ``smoke`` less than a minute; both are ours: the learning rate
changes at every step, batch norm's scale starts from 1, every batch norm is drawn, and posteriors are fitted on images
as they are."""

DEMOS = {
    "digits": replace(_LENET, data="digits:0-4", unknown="digits:5-9", epochs=12, members=3),
    "mnist": replace(_LENET, epochs=5, members=3, draws=20),
}
"""What ``stochbn demo`` runs, by the name of its data."""
