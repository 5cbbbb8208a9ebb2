"""What every evaluation needs: the share of each rank, what a prediction costs, and a posterior's settings."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from stochbn.cli.subject import Subject
    from stochbn.distributed import Ranks
    from stochbn.posteriors import Posterior

__all__ = ["Share", "cost", "described"]

COSTED = 64
"""Examples in a prediction whose time is measured."""


class Share:
    """The share of the examples of a data set that is this rank's.

    Args:
        whole: all of them.
        ranks: the ranks that share them.

    Attributes:
        objects: those of this rank.

    Raises:
        ValueError: there is not one batch for each rank.
    """

    def __init__(self, whole: Any, ranks: Ranks) -> None:
        from stochbn.evaluation.predicting import PREDICT_BATCH

        self.objects, self._ranks = whole, ranks
        if ranks.count == 1:
            return
        if len(whole) < ranks.count:
            raise ValueError(f"{whole.name} has {len(whole)} examples for {ranks.count} ranks; start fewer")
        shard = ranks.rank, ranks.count, min(PREDICT_BATCH, len(whole) // ranks.count)
        self.objects, self._positions = whole.shard(*shard), whole.shard_positions(*shard)
        if not len(self._positions):  # of a user's own loader
            raise ValueError(f"{whole.name} gives fewer batches than the {ranks.count} ranks; start fewer")

    def joined(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the ranks have of their examples, ``[n, ...]``, as one process has it: in the order of all examples."""
        if self._ranks.count == 1:
            return tensors
        joined = self._ranks.joined({**tensors, "positions": self._positions})
        order = joined.pop("positions").argsort()
        return {name: values[order] for name, values in joined.items()}


def cost(subject: Subject, posterior: Posterior | None, data: Any, draws: int, changes: Any) -> str:
    """What a prediction costs, as 'stochbn predict' makes it, in words."""
    import torch

    from stochbn import Predictive
    from stochbn.measuring.timing import median_seconds
    from stochbn.report.chosen import cost_words
    from stochbn.schema import counted

    inputs, labels = next(iter(data.batches(COSTED)))
    inputs, count = (
        (inputs[:COSTED], min(COSTED, len(labels))) if isinstance(inputs, torch.Tensor) else (inputs, len(labels))
    )
    works: dict[str, Any] = {"plain": Predictive(subject.model, **subject.settings)}
    if posterior is not None:
        works["SBN"] = Predictive(subject.model, posterior, draws, augment=changes, **subject.settings)
    seconds = median_seconds({name: functools.partial(one, inputs) for name, one in works.items()}, 3)
    device = next(subject.model.parameters()).device.type
    place = device if device != "cpu" else f"{counted(torch.get_num_threads(), 'threads')} of a CPU"
    return cost_words({name: 1000 * one / count for name, one in seconds.items()}, count, place)


def described(posterior: Posterior) -> dict[str, Any]:
    """A posterior's settings as JSON, which has no infinity."""
    size = "inf" if posterior.batch_size == math.inf else posterior.batch_size
    about = {"kind": posterior.kind, "batch_size": size, "temperature": posterior.temperature}
    return {**about, "centre": posterior.centre, "choice": posterior.choice}
