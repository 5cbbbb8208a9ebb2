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
    from stochbn.tasks.base import Change, Scores

__all__ = ["Compared", "compare", "tabulate"]

BATCH = 100


@dataclass(frozen=True, eq=False)
class Compared:
    """Scores without and with SBN.

    Attributes:
        task: what is scored.
        scores: of each method, by its name.
        changed: what SBN changes; None without a posterior.
    """

    task: Task
    scores: Mapping[str, Scores]
    changed: Change | None

    def summary(self) -> str:
        """What SBN changes, in a sentence."""
        one, count = self.changed, self.scores["plain"].examples
        if one is None:
            return f"{count:,} examples were scored. There was no posterior, so SBN was not evaluated."
        error = f" ± {one.error:.4f}" if math.isfinite(one.error) else ""
        told = "lowers" if one.change < -2 * one.error else "raises" if one.change > 2 * one.error else ""
        verb = f"{told} the {one.what}" if told else f"does not change the {one.what} measurably"
        return f"On {count:,} examples SBN {verb} ({one.change:+.4f}{error})."

    def description(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        values, errors = ({name: dict(getattr(one, key)) for name, one in self.scores.items()} for key in PARTS)
        one = self.changed
        changed = {"change": one and one.change, "change_se": one and one.error, "loss": one and one.name}
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
    watch: Callable[[str, Any, Any, Tensor], None],
) -> Compared:
    """Score a network without and, where there is a posterior, with SBN.

    `data` is the share of this rank; the scores are those of all ranks' data, the same on every rank. `watch` sees the
    name of the method, the inputs, the prediction and the labels of every batch.

    Raises:
        ValueError: labels that do not fit the network's output.
    """
    import torch

    from stochbn import Predictive

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
                watch(name, inputs, prediction, labels)
                yield prediction, labels
                done += len(labels)
                progress(done, len(methods) * len(data))

        found[name] = subject.task.scores(predictions(), ranks.joined, ignore)
    changed = None if posterior is None else found["plain"].change(found["SBN"])
    return Compared(subject.task, found, changed)


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
    one = compared.changed
    if one is not None:
        known = math.isfinite(one.error)
        title = f"What SBN changes in the {one.what}" + (
            ", with its standard error paired over examples" if known else ""
        )
        difference = f"{one.change:+.4f}" + (f" ± {one.error:.4f}" if known else "")
        tables.append(Table(title, ["method", "difference"], [["SBN", difference]]))
    return tables
