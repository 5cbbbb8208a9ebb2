"""The command that makes the thresholds of prediction sets by held-out data: conformal."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stochbn.cli.console import follow, progress_bars, say
from stochbn.cli.following import command
from stochbn.cli.inputs import default_posterior
from stochbn.cli.options import Augmentation, Draws, Override, PosteriorFile, Seed
from stochbn.cli.subject import Given, Subject, about_networks, needs, task_given
from stochbn.files import check_file

if TYPE_CHECKING:
    from torch import Tensor

    from stochbn.conformal import Sets
    from stochbn.posteriors import Posterior

__all__ = ["conformal"]

BATCH = 250


@dataclass(frozen=True)
class _Asked:
    """What sets are to be made: see `conformal`."""

    coverage: float
    by_class: bool
    method: str
    weights: Tensor | None

    def sets(self, probs: Tensor, labels: Tensor) -> Sets:
        """The sets of held-out predictions ``[N, K]``."""
        from stochbn import conformal

        kinds: Any = {"lac": conformal.lac, "aps": conformal.aps, "raps": conformal.raps}
        sets: Sets = kinds[self.method](probs, labels, self.coverage, weights=self.weights, by_class=self.by_class)
        return sets

    def check(self, labels: Tensor, classes: int) -> None:
        """Refuse too few labels before any prediction.

        Args:
            labels: ``[N]``.
            classes: how many there are; 0 if that is not known.
        """
        import torch

        if labels.ndim != 1 or not len(labels):
            raise ValueError(f"expected one label for each held-out example, got labels {list(labels.shape)}")
        count = max(classes, int(labels.max()) + 1, 2)
        weights = None if self.weights is None else torch.ones(count)
        replace(self, weights=weights).sets(torch.full((len(labels), count), 1 / count), labels)


@about_networks()
def conformal(
    given: Given,
    held_out: Annotated[
        str | None,
        Override(
            "--held-out",
            help="Labelled data, named like --data, that is neither training data nor that of 'stochbn calibrate'.",
        ),
    ] = None,
    coverage: Annotated[float, typer.Option(help="How often sets are to hold the true class.")] = 0.9,
    by: Annotated[
        str | None,
        Override("--by", help="class: a threshold for each class, so that the coverage holds in every class."),
    ] = None,
    method: Annotated[
        str, typer.Option(help="lac (the smallest sets), aps or raps (larger sets for difficult examples).")
    ] = "lac",
    new_mix: Annotated[
        bool,
        typer.Option(
            "--new-mix",
            help="Weight classes by the mix that 'stochbn adapt' found, if the look of the inputs has not changed.",
        ),
    ] = False,
    posterior: PosteriorFile = None,
    draws: Draws = 50,
    augment: Augmentation = None,
    path: Annotated[
        Path | None, Override("--out", help="File for the new posterior. (default: the old one's, which it replaces)")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Choose thresholds of prediction sets by held-out data, for classification; write them into the posterior's file.

    'stochbn predict' then has a column 'set' with the classes that an example may be of, and 'stochbn evaluate' shows
    how often sets hold the truth. Predict with the same --draws and --augment. The thresholds hold for data like the
    held-out data, and for this posterior: 'stochbn calibrate' drops them.
    """
    from stochbn.augment import named
    from stochbn.predictive import Predictive

    if not 0 < coverage < 1:
        raise ValueError(f"--coverage must lie between 0 and 1, such as 0.9, got {coverage:g}")
    if by not in (None, "class"):
        raise ValueError(f"--by must be class, or be left out for one threshold, got {by!r}")
    if method not in ("lac", "aps", "raps"):
        raise ValueError(f"--method must be lac, aps or raps, got {method!r}")
    if new_mix and by is not None:
        raise ValueError("--new-mix and --by class cannot be given together: sets by class hold for every mix")
    changes = named(augment) if augment is not None else None
    beside = given.networks[0] if given.networks else given.weights
    target = path or posterior or (default_posterior(beside) if beside is not None else None)
    if target is None:
        raise ValueError(needs("--out"))
    check_file(target, [*given.files, held_out])
    task = task_given(given)
    if not task.one_class:
        raise ValueError(
            f"prediction sets are for --task classification and binary, got --task {task.name}; intervals for numbers "
            "come from held-out data with stochbn.conformal.intervals"
        )
    subject = Subject.held(given, posterior)
    fitted = subject.need_posterior(posterior)
    weights = _weights(fitted) if new_mix else None
    objects = subject.load(held_out, "held-out", "--held-out", labelled=True)
    asked = _Asked(coverage, by is not None, method, weights)
    asked.check(objects.labels, len(subject.classes))
    predictive = Predictive(subject.model, fitted, draws, augment=changes, **subject.settings)
    probs, labels = _predicted(predictive, objects, seed)
    sets = asked.sets(probs, labels)
    new = fitted.with_sets(sets, examples=len(labels), draws=draws, augment=augment)
    new.save(target)
    named_file = None if beside is not None and target == default_posterior(beside) else target
    say(f"{_told(sets, labels)}\nSaved the posterior with them as {target}.", target)
    options: dict[str, Any] = {"posterior": named_file, "augment": augment, "draws": None if draws == 50 else draws}
    evaluate = command("evaluate", given, data=None if given.networks else "TEST-DATA", **options)
    say(f"Next: {command('predict', given, data='NEW-DATA', out='predictions.csv', **options)}\nOr: {evaluate}")


def _predicted(predictive: Any, objects: Any, seed: int) -> tuple[Tensor, Tensor]:
    """Probabilities ``[N, K]`` and labels ``[N]`` of held-out data; every batch sees the draws of the seed."""
    import torch

    parts: list[Tensor] = []
    truth: list[Tensor] = []
    done = 0
    with progress_bars() as bars:
        move = follow(bars, "predicting")
        for inputs, labels in objects.batches(BATCH):
            parts.append(predictive(inputs, generator=torch.Generator().manual_seed(seed)).probs.cpu())
            truth.append(labels.cpu())
            if parts[-1].ndim != 2:
                raise ValueError(
                    f"expected one prediction for each example, got probabilities {list(parts[-1].shape)}: there are "
                    "no sets of dense predictions, whose places are not exchangeable"
                )
            done += len(labels)
            move(done, len(objects))
    if not parts:
        raise ValueError("there are no held-out examples to make sets by")
    return torch.cat(parts), torch.cat(truth)


def _weights(posterior: Posterior) -> Tensor:
    """How many times as frequent each class is in what a posterior was adapted to, ``[K]``.

    Raises:
        ValueError: it was not adapted, the look of the inputs has changed too, or the mix is not known.
    """
    import torch

    about = posterior.adaptation
    if about is None:
        raise ValueError("--new-mix is for a posterior of 'stochbn adapt': name its file with --posterior")
    if about.moved or not about.guarded or not about.mix:
        raise ValueError(
            "--new-mix is for data of which the mix of classes alone has changed, and 'stochbn adapt' did not find "
            f"that ({about}); label some of the new data, and name it with --held-out"
        )
    if not all(about.usual):
        raise ValueError("--new-mix needs every class in the reference: fit with a --reference of all classes")
    return torch.tensor(about.mix, dtype=torch.float64) / torch.tensor(about.usual, dtype=torch.float64)


def _told(sets: Sets, labels: Tensor) -> str:
    """What the thresholds are, and how far the coverage of such thresholds varies."""
    from scipy.stats import beta

    percent = f"{100 * sets.coverage:g} %"
    count = f"{len(labels):,} held-out examples"
    if sets.by_class:
        least = int(labels.bincount(minlength=sets.classes).min())
        return (
            f"Sets of {percent} for each of {sets.classes} classes, from {count}, at least {least} of a class "
            f"({_varies(least, sets.coverage, beta)} in such a class)."
        )
    if not isinstance(sets.threshold, float):
        return f"Sets of {percent} for the new mix of classes, an estimate, from {count}."
    return f"Sets of {percent} from {count} ({_varies(len(labels), sets.coverage, beta)})."


def _varies(count: int, coverage: float, beta: Any) -> str:
    """Between what the coverage of a threshold from so many examples lies in 95 % of cases, for scores without ties.

    Source: Vovk, 2012, "Conditional validity of inductive conformal predictors": it has a beta distribution.
    """
    import math

    place = math.ceil((count + 1) * coverage - 1e-9)
    low, high = beta.ppf([0.025, 0.975], place, count + 1 - place)
    return f"on new data like it 95 % of such thresholds cover {100 * low:.1f} to {100 * high:.1f} %"
