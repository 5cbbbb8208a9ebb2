"""Accumulators: collect the statistics of mini-batches, in one process or several, and make a posterior from them."""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from stochbn.posteriors.checks import check_whole

if TYPE_CHECKING:
    from typing_extensions import Self

    from stochbn.posteriors.base import Posterior

__all__ = ["Accumulator", "Observation", "Sample"]

Observation = Mapping[str, Tensor]
"""Mean and biased variance at each call of every layer, in the network's order, ``[calls, 2, C]`` in float64.

A layer that was not called has 0 calls, or is missing.
"""

P = TypeVar("P", bound="Posterior")

HASH_BYTES = 16
KEPT = 512
"""How many mini-batches a `Sample` keeps unless it is told."""


class Accumulator(ABC, Generic[P]):
    """Collects what a kind of posterior needs of mini-batches, in limited memory.

    Attributes:
        seen: how many mini-batches were added.
        process: the number of the process that they are added in, if there are several.
        enough: how many to add unless a user says otherwise.

    The arguments of a subclass are options of its kind. They cannot have the names of what this class has.
    """

    enough: int

    def __init__(self) -> None:
        self.seen = 0
        self.process = 0

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuse options that would overwrite what every accumulator has.

        Raises:
            TypeError: an option has the name of an attribute or method of this class.
        """
        super().__init_subclass__(**options)
        taken = inspect.signature(cls).parameters.keys() & {"seen", "process", *dir(Accumulator)}
        if taken:
            raise TypeError(
                f"the option {min(taken)!r} of {cls.__name__} has the name of an attribute of every accumulator; give "
                "it another name"
            )

    def settings(self) -> dict[str, Any]:
        """The options that it was made with, which are those of its kind."""
        return {}

    @property
    @abstractmethod
    def layers(self) -> dict[str, int]:
        """The number of channels of every layer that was called."""

    @abstractmethod
    def update(self, observation: Observation) -> None:
        """Add a mini-batch.

        Raises:
            ValueError: its layers differ from those before.
        """

    @abstractmethod
    def merge(self, other: Self) -> Self:
        """Return a new accumulator with the mini-batches of both. The order of merging does not change the posterior.

        Raises:
            ValueError: their layers or settings differ.
        """

    @abstractmethod
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The contents, for another process: tensors, and values for JSON."""

    @abstractmethod
    def with_state(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Self:
        """Return a new accumulator with the settings of this one and the contents of a `state`."""

    def posterior(self, **about: Any) -> P:
        """Make the posterior of the mini-batches that were added.

        Args:
            about: the attributes of `Posterior`, except `layers` and `mini_batches`.

        Raises:
            ValueError: there are none, or no layer was called.
        """
        if not self.layers:
            raise ValueError("no mini-batch was added in which a layer was called; add some with update")
        return self._posterior(mini_batches=self.seen, layers=self.layers, **about)

    @abstractmethod
    def _posterior(self, **about: Any) -> P:
        """The posterior, with all attributes of `Posterior`."""


class Sample(Accumulator[P]):
    """The statistics of mini-batches themselves: of all, or of a random sample of at most `max_batches`.

    The mini-batches with the smallest hashes of their statistics are kept. This is a uniformly random sample, which
    does not depend on the order of mini-batches, nor on the process that observes them. Equal mini-batches are kept or
    dropped together, except for the last place. While all are kept, rows are in order of arrival, with the processes in
    turn, as if one process had seen them. Once one was dropped, they are in the order of their hashes.

    Of a layer that is called several times in a forward pass, the hash chooses one call.

    Args:
        max_batches: how many mini-batches to keep, at least 2.

    Raises:
        TypeError, ValueError: `max_batches` is not a whole number of at least 2.
    """

    def __init__(self, max_batches: int = KEPT) -> None:
        super().__init__()
        check_whole("max_batches", max_batches, 2)
        self.max_batches = max_batches
        self.enough = max(KEPT, max_batches)
        self._layers: dict[str, int] = {}
        self._rows: list[_Row] = []
        self._by_hash = False

    @property
    def layers(self) -> dict[str, int]:
        """The number of channels of every layer that was called."""
        return dict(self._layers)

    def update(self, observation: Observation) -> None:
        """Add a mini-batch.

        Raises:
            ValueError: other layers were called than before.
        """
        called = {name: calls.float() for name, calls in observation.items() if len(calls)}
        layers = {name: calls.shape[2] for name, calls in called.items()}
        if self.seen:
            self._check_layers(layers)
        else:
            self._layers = layers
        place = self.seen, self.process
        self.seen += 1
        if not layers:
            return
        digest = hashlib.blake2b(digest_size=HASH_BYTES)
        for name in self._layers:
            digest.update(called[name].contiguous().numpy().data)
        number = int.from_bytes(digest.digest(), "big")
        taken = [called[name][number % len(called[name])] for name in self._layers]
        self._rows.append(_Row(place, number, torch.cat(taken, 1)))
        self._drop()

    def merge(self, other: Self) -> Self:
        """Return a new accumulator with the mini-batches of both.

        Raises:
            ValueError: different layers were called in the two, or they keep different numbers of mini-batches.
        """
        if self.settings() != other.settings():
            raise ValueError(f"expected accumulators with equal settings, got {self.settings()} and {other.settings()}")
        if self.seen and other.seen:
            self._check_layers(other._layers)
        merged = self._empty()
        first, second = (self, other) if self.seen else (other, self)
        merged.seen = first.seen + second.seen
        merged._layers = first.layers
        merged._rows = first._rows + second._rows
        merged._by_hash = first._by_hash or second._by_hash
        merged._drop()
        return merged

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The mini-batches that are kept, with their positions and hashes, and the layers."""
        hashes = b"".join(row.hash.to_bytes(HASH_BYTES, "big") for row in self._rows)
        tensors = {
            "places": torch.tensor([row.place for row in self._rows], dtype=torch.int64).view(-1, 2),
            "hashes": torch.tensor(list(hashes), dtype=torch.uint8).view(-1, HASH_BYTES),
            "rows": torch.stack([row.statistics for row in self._rows]) if self._rows else torch.empty(0, 2, 0),
        }
        return tensors, {"seen": self.seen, "layers": list(self._layers.items()), "by_hash": self._by_hash}

    def with_state(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Self:
        """Return a new accumulator with the settings of this one and the contents of a `state`."""
        found = self._empty()
        found.seen, found._by_hash = about["seen"], about["by_hash"]
        found._layers = dict(about["layers"])
        hashes = [int.from_bytes(bytes(row.tolist()), "big") for row in tensors["hashes"]]
        # A clone for each row: a view would keep the memory of dropped rows.
        found._rows = [
            _Row((index, process), number, row.clone())
            for (index, process), number, row in zip(tensors["places"].tolist(), hashes, tensors["rows"], strict=True)
        ]
        return found

    def statistics(self) -> Tensor:
        """Means and biased variances of all layers' channels, concatenated, ``[M, 2, D]`` in float32."""
        rows = sorted(self._rows, key=BY_HASH if self._by_hash else BY_PLACE)
        return torch.stack([row.statistics for row in rows])

    def settings(self) -> dict[str, Any]:
        """The options that it was made with, which are those of its kind."""
        return {"max_batches": self.max_batches}

    def _empty(self) -> Self:
        return type(self)(**self.settings())

    def _check_layers(self, layers: Mapping[str, int]) -> None:
        if odd := self._layers.keys() ^ layers.keys():
            raise ValueError(
                f"batch-norm layer {min(odd)!r} was called for some mini-batches and not for others, so there are no "
                'joint statistics; use kind="factorized"'
            )
        for name, channels in self._layers.items():
            if layers[name] != channels:
                raise ValueError(f"layer {name!r} has {layers[name]} channels here and had {channels} before")

    def _drop(self) -> None:
        """Drop those with the largest hashes, if there are too many."""
        if len(self._rows) <= self.max_batches:
            return
        self._by_hash = True
        self._rows.sort(key=BY_HASH)
        del self._rows[self.max_batches :]


class _Row(NamedTuple):
    """A mini-batch that is kept: its position, its process, its hash and its statistics."""

    place: tuple[int, int]
    hash: int
    statistics: Tensor


BY_HASH, BY_PLACE = attrgetter("hash"), attrgetter("place", "hash")
