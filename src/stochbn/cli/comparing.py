"""The scores of a network without and with SBN, by its task, as `evaluate` shows them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from stochbn.augment import Augment
    from stochbn.cli.subject import Subject
    from stochbn.distributed import Ranks
    from stochbn.posteriors import Posterior
    from stochbn.report.tables import Table
    from stochbn.tasks import Task
    from stochbn.tasks.base import Scores

__all__ = ["Compared", "compare", "tabulate"]

BATCH = 100


@dataclass(frozen=True, eq=False)
class Compared:
    """Scores without and with SBN.

    Attributes:
        task: what is scored.
        scores: of each method, by its name.
        change: what SBN changes in the mean loss of an example; None without a posterior.
        change_se: its standard error, paired over examples.
        loss: what the loss is.
    """

    task: Task
    scores: Mapping[str, Scores]
    change: float | None
    change_se: float | None
    loss: str

    def summary(self) -> str:
        """What SBN changes, in a sentence."""
        count = len(self.scores["plain"].losses[self.loss])
        if self.change is None or self.change_se is None:
            return f"{count:,} examples were scored. There was no posterior, so SBN was not evaluated."
        error = f" ± {self.change_se:.4f}" if math.isfinite(self.change_se) else ""
        told = "lowers" if self.change < -2 * self.change_se else "raises" if self.change > 2 * self.change_se else ""
        verb = f"{told} the mean {self.loss}" if told else f"does not change the mean {self.loss} measurably"
        return f"On {count:,} examples SBN {verb} ({self.change:+.4f}{error})."

    def description(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        values, errors = ({name: dict(getattr(one, key)) for name, one in self.scores.items()} for key in PARTS)
        changed = {"change": self.change, "change_se": self.change_se, "loss": self.loss}
        return {"sort": self.task.name, "scores": values, "errors": errors, **changed}


PARTS = "values", "errors"


def compare(
    subject: Subject,
    posterior: Posterior | None,
    data: Any,
    ranks: Ranks,
    *,
    draws: int,
    seed: int,
    augment: Augment | None,
    ignore: int | None,
    progress: Callable[[int, int], object],
    watch: Callable[[str, Any, Tensor], None],
) -> Compared:
    """Score a network without and, where there is a posterior, with SBN.

    `data` is the share of this rank; the scores are those of all ranks' data, the same on every rank. `watch` sees the
    name of the method, the prediction and the labels of every batch.

    Raises:
        ValueError: labels that do not fit the network's output.
    """
    import torch

    from stochbn import Predictive
    from stochbn.tasks.base import ratio_error

    methods: dict[str, Any] = {"plain": Predictive(subject.model, **subject.settings)}
    if posterior is not None:
        methods["SBN"] = Predictive(subject.model, posterior, draws, augment=augment, **subject.settings)
    done, found = 0, {}
    for name, predictive in methods.items():
        generator = torch.Generator().manual_seed(seed)

        def predictions(
            predictive: Any = predictive, generator: Any = generator, name: str = name
        ) -> Iterator[tuple[Any, Tensor]]:
            nonlocal done
            for inputs, labels in data.batches(BATCH):
                prediction = predictive(inputs, generator=generator)
                watch(name, prediction, labels)
                yield prediction, labels
                done += len(labels)
                progress(done, len(methods) * len(data))

        found[name] = subject.task.scores(predictions(), ranks.joined, ignore)
    plain = found["plain"]
    loss = next(name for name in found[list(found)[-1]].losses if name in plain.losses)
    if posterior is None:
        return Compared(subject.task, found, None, None, loss)
    change = found["SBN"].losses[loss] - plain.losses[loss]
    weights = torch.ones_like(change) if plain.weights is None else plain.weights
    mean = ((weights * change).sum() / weights.sum()).item()
    return Compared(subject.task, found, mean, ratio_error(change, weights), loss)


def tabulate(compared: Compared, name: str) -> list[Table]:
    """The scores of data of a name, and what SBN changes."""
    from stochbn.report.tables import Table

    columns = compared.task.score_columns

    def cell(scores: Scores, key: str, digits: int, factor: float) -> str:
        score, error = scores.values.get(key, math.nan), scores.errors.get(key, math.nan)
        if not math.isfinite(score):
            return "-"
        more = f" ± {factor * error:.{digits}f}" if math.isfinite(error) else ""
        return f"{factor * score:.{digits}f}{more}"

    rows = [
        [method, *(cell(scores, *column) for column in columns.values())] for method, scores in compared.scores.items()
    ]
    title = f"{name}; ± standard error" if any(one.errors for one in compared.scores.values()) else name
    tables = [Table(title, ["method", *columns], rows)]
    if compared.change is not None and compared.change_se is not None:
        known_error = math.isfinite(compared.change_se)
        title = f"What SBN changes in the mean {compared.loss}"
        title += ", with its standard error paired over examples" if known_error else ""
        difference = f"{compared.change:+.4f}" + (f" ± {compared.change_se:.4f}" if known_error else "")
        tables.append(Table(title, ["method", "difference"], [["SBN", difference]]))
    return tables
