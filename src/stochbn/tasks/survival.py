"""Survival: when an event happens, in discrete time, with censored examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from stochbn.metrics.entropies import entropy
from stochbn.network.calling import read_output
from stochbn.tasks.answers import Answer, table_columns
from stochbn.tasks.base import (
    Join,
    Panel,
    Predictions,
    Scores,
    Task,
    floating,
    joined,
    labels_in,
    standard_error,
)
from stochbn.tasks.draw_scores import NLL, DrawScore

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Survival", "SurvivalPrediction"]


@dataclass(frozen=True, eq=False, repr=False)
class SurvivalPrediction(Answer):
    """Prediction of the time of an event for N examples, in T intervals of time numbered from 0.

    Attributes:
        survival: the probability that the event has not happened by the end of each interval, the mean over draws,
            ``[N, T]``.
        variance: its variance over draws, ``[N, T]``.
        expected_entropy: the mean over draws of the entropy of the event's interval, ``[N]`` in nats.
        draws: the survival curve of each draw, ``[S, N, T]``, with ``keep_draws=True``.
        note: why there is no variance over draws, if one pass without draws was made.
    """

    survival: Tensor
    variance: Tensor
    expected_entropy: Tensor
    draws: Tensor | None = None
    note: str = ""

    @property
    def std(self) -> Tensor:
        """The standard deviation of the survival curve over draws, ``[N, T]``."""
        return self.variance.sqrt()

    @property
    def probs(self) -> Tensor:
        """The probability of the event in each interval, and in none of them, ``[N, T + 1]``."""
        return _event_probs(self.survival)

    @property
    def hazard(self) -> Tensor:
        """The probability of the event in each interval, given that it has not happened before, ``[N, T]``.

        It is 1 if the event is certain to have happened before.
        """
        start = torch.nn.functional.pad(self.survival, (1, 0), value=1.0)[:, :-1]
        return 1 - torch.where(start > 0, self.survival / start, 0.0)

    @property
    def median_time(self) -> Tensor:
        """The first interval at whose end survival is at most one half, ``[N]``; infinite if there is none."""
        reached = self.survival <= 0.5
        times = reached.int().argmax(1).to(self.survival)
        return times.where(reached.any(1), torch.inf)

    @property
    def expected_time(self) -> Tensor:
        """The expected number of the event's interval, with T for all later times, ``[N]``."""
        return self.survival.sum(1)

    @property
    def entropy(self) -> Tensor:
        """The entropy of `probs`, the total uncertainty about the interval of the event, ``[N]`` in nats."""
        return entropy(self.probs)

    @property
    def mutual_information(self) -> Tensor:
        """The part of the entropy that is due to the draws (epistemic), ``[N]`` in nats."""
        return (self.entropy - self.expected_entropy).clamp(min=0)

    @property
    def measures(self) -> dict[str, Tensor]:
        """Expected time, entropy and mutual information."""
        names = "expected_time", "entropy", "mutual_information"
        return {name: getattr(self, name) for name in names}

    def columns(self, classes: Sequence[str] = (), top: int = 1) -> dict[str, list[Any]]:
        """Return the prediction as columns of a table, with a row for each example, as ``stochbn predict`` writes them.

        Args:
            classes: has no effect.
            top: has no effect.

        Returns:
            ``median_time``, ``expected_time``, ``entropy``, ``mutual_information``, and ``survival_0``, ``std_0``, ...
            of each interval.
        """
        times = {"median_time": self.median_time, **self.measures}
        return table_columns({**times, "survival": self.survival, "std": self.std})

    @property
    def averages(self) -> tuple[Tensor, ...]:
        """The tensors that are averages over draws."""
        return self.survival, self.variance, self.expected_entropy

    @property
    def draws_kept(self) -> Tensor | None:
        """The survival curve of every draw."""
        return self.draws

    def of(self, averages: Sequence[Tensor], kept: Tensor | None) -> SurvivalPrediction:
        """Return a prediction like this one, with other averages and draws."""
        survival, variance, expected = averages
        return replace(self, survival=survival, variance=variance, expected_entropy=expected, draws=kept)

    def mixed(self, other: SurvivalPrediction, share: float) -> SurvivalPrediction:
        """Return the mixture with another prediction. The difference of the curves adds to the variance over draws."""
        found = super().mixed(other, share)
        between = share * (1 - share) * (other.survival.to(self.survival) - self.survival).square()
        return replace(found, variance=found.variance + between)


@dataclass(frozen=True)
class Survival(Task):
    """Task of networks with logits ``[N, T]`` of the hazard: the probability of an event that has not happened before.

    A label has two numbers. The first is an interval, from 0 to T - 1. The second is 1 if the event happened in this
    interval, or 0 if the example was last seen at its end, without the event (censored). ``torch.bucketize(times,
    ends)`` turns times into intervals.

    Source: Brown, 1975, "On the use of indicator variables for studying the time-dependence of parameters in a
    response-time model"; for networks, Gensheimer and Narasimhan, 2019.
    """

    name: ClassVar[str] = "survival"
    outputs: ClassVar[tuple[str, ...]] = ("survival", "std", "median_time", "expected_time", "entropy")
    has_classes: ClassVar[bool] = False
    spread: ClassVar[bool] = True
    part: ClassVar[tuple[str, str]] = ("interval", "intervals of the event")
    uncertainty: ClassVar[tuple[str, ...]] = ("entropy",)
    calibrated_by: ClassVar[tuple[str, ...]] = ("nll",)
    labels_expected: ClassVar[str] = "[N, 2]: the interval, from 0, and 1 for the event or 0 for censored"
    score_columns: ClassVar[Mapping[str, tuple[str, int, float]]] = {
        "NLL": ("nll", 4, 1),
        "concordance": ("concordance", 4, 1),
        "integrated Brier": ("brier", 4, 1),
    }

    def raw(self, output: Any) -> Tensor:
        """The logits ``[N, T]``."""
        found = floating(read_output(output, self.place), "logits of hazards")
        if found.ndim != 2:
            raise ValueError(f"expected logits of the hazard of each interval, [N, T], found shape {list(found.shape)}")
        return found

    def values(self, raw: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Survival curves, and the entropies of the interval of the event."""
        survival = _log_survival(raw / temperature).exp()
        return survival, entropy(_event_probs(survival), 2)

    def prediction(
        self, mean: Tensor, second: Tensor, variance: Tensor | None, kept: Tensor | None
    ) -> SurvivalPrediction:
        """The mean curve, with its variance over draws."""
        return SurvivalPrediction(mean, torch.zeros_like(mean) if variance is None else variance, second, kept)

    def mix(self, raw: Tensor) -> Tensor:
        """The probabilities of the event in each interval, and in none, ``[N, T + 1]``."""
        return _event_probs(_log_survival(raw).exp())

    def labels(self, batch: Any) -> Tensor:
        """Intervals and events ``[N, 2]``, whole numbers, of a tensor or a pair of tensors ``[N]``."""
        pair = batch.get("labels") if hasattr(batch, "get") else batch[1] if len(batch) > 1 else None
        if isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(one, Tensor) for one in pair):
            found: Tensor | None = torch.stack([one.double() for one in pair], -1)
        else:
            found = labels_in(batch)
        if found is None or found.is_complex():
            raise TypeError(f"expected batches as (input, labels) or mappings with 'labels', {self.labels_expected}")
        return _checked(found)

    def counted(self, labels: Tensor, ignore: int | None) -> Tensor:
        """Every example, ``[N]``."""
        if ignore is not None:
            raise ValueError("times have no label that could be ignored: leave out of the data what does not count")
        return torch.ones(len(labels), dtype=torch.bool)

    def units(self, labels: Tensor) -> str:
        """Examples."""
        return "examples"

    def draw_score(self, name: str, temperatures: Tensor) -> DrawScore:
        """The negative log-likelihood ``"nll"``: of the mean over draws of the probability of interval and event."""
        return _SurvivalNLL(temperatures) if name == "nll" else super().draw_score(name, temperatures)

    def scores(self, predictions: Predictions, join: Join = dict, ignore: int | None = None) -> Scores:
        """Negative log-likelihood, Harrell's concordance of expected times, and the integrated Brier score.

        The last is weighted by the inverse probability of being seen, and its error takes these weights as known.
        """
        from stochbn.metrics.survival import brier_scores, concordance

        batches = []
        for prediction, given in predictions:
            labels = _checked(given)
            _check_intervals(labels, prediction.survival.shape[1])
            self.counted(labels, ignore)
            batches.append({"survival": prediction.survival.double().cpu(), "labels": labels.cpu()})
        survival, labels = joined(batches, join).values()
        times, events = labels.unbind(1)
        losses = -_log_likelihood(survival, times, events)
        brier = brier_scores(survival, times, events)
        each = brier.mean(1)
        index, error = concordance(survival.sum(1), times, events)
        values = {"nll": losses.mean().item(), "concordance": index, "brier": each.mean().item()}
        errors = {"nll": standard_error(losses), "concordance": error, "brier": standard_error(each)}
        return Scores(
            values, errors, {"NLL": losses}, evidence={"survival": survival, "labels": labels, "brier": brier}
        )

    def panels(self, scores: Mapping[str, Scores]) -> Sequence[Panel]:
        """Mean curves against the share that survived (Kaplan-Meier), and the Brier score by interval."""
        from stochbn.metrics.survival import kaplan_meier

        def curves(axes: Axes, colors: Mapping[str, str]) -> None:
            for number, (method, one) in enumerate(scores.items()):
                survival, labels = one.evidence["survival"], one.evidence["labels"]
                intervals = range(1, survival.shape[1] + 1)
                if not number:
                    seen = kaplan_meier(labels[:, 0], labels[:, 1], survival.shape[1])
                    axes.step(
                        [0, *intervals], [1.0, *seen.tolist()], where="post", color="#767676", ls=":", label="seen"
                    )
                axes.plot([0, *intervals], [1.0, *survival.mean(0).tolist()], color=colors[method], label=method)
            axes.set(xlabel="intervals survived", ylabel="share without the event", ylim=(0, 1.02))
            axes.legend(loc="best", fontsize=8)

        def brier(axes: Axes, colors: Mapping[str, str]) -> None:
            for method, one in scores.items():
                each = one.evidence["brier"]
                axes.plot(range(each.shape[1]), each.mean(0).tolist(), ".-", color=colors[method], label=method)
            axes.set(xlabel="interval", ylabel="Brier score")
            axes.set_ylim(bottom=0)
            axes.legend(loc="best", fontsize=8)

        return [
            Panel(
                "Do as many survive as it says?",
                "The mean of the predicted survival curves, and the Kaplan-Meier estimate of the share that survived.",
                curves,
            ),
            Panel(
                "When is it wrong?",
                "The Brier score at the end of each interval, weighted by the inverse probability of being seen: lower "
                "is better, and a forecast of one half for all examples has 0.25.",
                brier,
            ),
        ]


class _SurvivalNLL(NLL):
    """The negative log-likelihood of intervals and events, of logits of hazards ``[N, T]``."""

    def log_likelihoods(self, logits: Tensor, labels: Tensor) -> Tensor:
        """``[T, N]``, float64."""
        _check_intervals(labels, logits.shape[1])
        times, events = labels.to(logits.device).unbind(1)
        each = []
        for t in self.temperatures.tolist():
            tempered = logits.double() / t
            survived = _log_survival(tempered).gather(1, times[:, None])[:, 0]
            last = tempered.gather(1, times[:, None])[:, 0]
            # The logit is the logarithm of the hazard over its complement, which is the last factor of survival.
            each.append(survived + last.where(events > 0, 0.0))
        return torch.stack(each)


def _log_survival(logits: Tensor) -> Tensor:
    """``[..., T]``: the logarithm of the probability of no event up to the end of each interval."""
    return -torch.nn.functional.softplus(logits).cumsum(-1)


def _event_probs(survival: Tensor) -> Tensor:
    """``[..., T + 1]``: the probability of the event in each interval, and in none, from that of none by its end."""
    start = torch.nn.functional.pad(survival, (1, 0), value=1.0)
    return torch.cat([start[..., :-1] - start[..., 1:], survival[..., -1:]], -1)


def _log_likelihood(survival: Tensor, times: Tensor, events: Tensor) -> Tensor:
    """``[N]``: the logarithm of the probability of what was seen; that of 0 is the smallest float32 number's."""
    start = torch.nn.functional.pad(survival, (1, 0), value=1.0)
    before, after = (start.gather(1, place[:, None])[:, 0] for place in (times, times + 1))
    return torch.where(events > 0, before - after, after).clamp(min=torch.finfo(torch.float32).tiny).log()


def _checked(labels: Tensor) -> Tensor:
    """Labels ``[N, 2]`` as whole numbers.

    Raises:
        ValueError: they are no intervals and events.
    """
    if labels.ndim != 2 or labels.shape[1] != 2:
        raise ValueError(
            f"expected labels [N, 2], the interval and 1 for the event or 0 for censored, got {list(labels.shape)}; at "
            "the command line name two columns, --label TIME --label EVENT"
        )
    whole = labels.long()
    if not (whole == labels).all() or (whole[:, 0] < 0).any():
        raise ValueError(
            "intervals must be whole numbers from 0 on: torch.bucketize(times, ends) gives them, of the times at which "
            "intervals end"
        )
    if not ((whole[:, 1] == 0) | (whole[:, 1] == 1)).all():
        raise ValueError("events must be 1, or 0 for censored")
    return whole


def _check_intervals(labels: Tensor, count: int) -> None:
    """Refuse intervals that the network does not predict.

    Raises:
        ValueError: there are some.
    """
    if len(labels) and int(labels[:, 0].max()) >= count:
        raise ValueError(
            f"the network predicts {count} intervals, numbered from 0 to {count - 1}, and a label has interval "
            f"{int(labels[:, 0].max())}; give an example that was seen longer the last interval, and 0 for censored"
        )
