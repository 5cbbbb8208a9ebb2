"""What an experiment consists of: network, data, training, members and draws."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from stochbn.paper.data import Images
from stochbn.paper.training import Schedule

__all__ = ["DEMOS", "Member", "Recipe"]


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
        network: its name in `stochbn.paper.networks`.
        data: known classes, as `stochbn.paper.data.load` takes them.
        unknown: unknown classes, likewise.
        epochs: passes over the training data.
        members: the number of plain networks; the first is the one of the row SBN, all are the Deep Ensemble.
        dropout: network arguments that turn its dropout on.
        arguments: further network arguments.
        batch_size: objects in a training mini-batch.
        learning_rate: Adam's, decaying linearly to 0.
        statistics_batch: objects in a mini-batch whose statistics are observed.
        draws: draws, or dropout passes, of each network at test time.
        seed: what all randomness comes from.
        train_images: use this many training images only; None is all.
        test_images: likewise for the known and for the unknown test images.
    """

    network: str
    data: str
    unknown: str
    epochs: int
    members: int
    dropout: dict[str, float]
    arguments: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 16
    learning_rate: float = 1e-3
    statistics_batch: int = 16
    draws: int = 50
    seed: int = 0
    train_images: int | None = None
    test_images: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "members", "statistics_batch", "draws", "train_images", "test_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def as_dict(self) -> dict[str, Any]:
        """Every field, as JSON holds it."""
        return asdict(self)

    def all_members(self) -> list[Member]:
        """The networks to train."""
        return [*(Member("plain", i) for i in range(self.members)), Member("dropout", 0)]

    def schedule(self, member: Member) -> Schedule:
        """How a member is trained; every member has a seed of its own."""
        offset = member.index + (500 if member.kind == "dropout" else 0)
        return Schedule(self.epochs, self.batch_size, self.learning_rate, self.seed * 1000 + offset)

    def network_arguments(self, member: Member, images: Images) -> dict[str, Any]:
        """What a member is built with, for these training images."""
        channels, size, _ = images.shape
        common = {"classes": len(images.classes), "channels": channels, "size": size, **self.arguments}
        return common | (self.dropout if member.kind == "dropout" else {})


DEMOS = {
    "digits": Recipe("lenet5", "digits:0-4", "digits:5-9", epochs=12, members=3, dropout={"dropout": 0.5}),
    "mnist": Recipe("lenet5", "mnist", "notmnist", epochs=5, members=3, dropout={"dropout": 0.5}),
}
"""What ``stochbn demo`` runs, by the name of its data."""
