"""Scores of each task with their errors, against the definitions and the jackknife."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import stochbn
from conftest import mlp, normal, seeded, settled
from stochbn import Prediction, metrics
from stochbn.calibration_report import Choice
from stochbn.predictions import Estimate, MultilabelPrediction
from stochbn.tasks import Classification, Embedding, Multilabel, Regression, make_task
from stochbn.tasks.base import Task, ratio_error, standard_error
from stochbn.tasks.draw_scores import DrawScore


def jackknife(score: Any, n: int) -> float:
    """The standard error of a score of the examples in a mask."""
    each = torch.tensor([score(torch.arange(n) != i) for i in range(n)], dtype=torch.float64)
    return float(((n - 1) / n * (each - each.mean()).square().sum()).sqrt())


def in_batches(prediction: Any, labels: Tensor, size: int = 7) -> Iterator[tuple[Any, Tensor]]:
    for index in torch.split(torch.arange(len(labels)), size):
        yield prediction.of([values[index] for values in prediction.averages], None), labels[index]


def test_scores_of_dense_classes_are_those_of_all_places_with_errors_over_examples() -> None:
    probs, labels = normal(40, 3, 2, 2, seed=1).softmax(1), torch.randint(0, 3, (40, 2, 2), generator=seeded())
    labels[:5, 0] = 255
    found = Classification().scores(in_batches(Prediction(probs, torch.zeros(40, 2, 2)), labels), ignore=255)
    assert found.values == pytest.approx(metrics.evaluate(probs, labels, ignore_index=255), rel=1e-6)
    for name in found.values:

        def score(mask: Tensor, name: str = name) -> float:
            return metrics.evaluate(probs[mask], labels[mask], ignore_index=255)[name]

        assert found.errors[name] == pytest.approx(jackknife(score, 40), rel=0.05)
    each = [metrics.evaluate(p[None], t[None], ignore_index=255)["nll"] for p, t in zip(probs, labels, strict=True)]
    torch.testing.assert_close(found.losses["NLL"], torch.tensor(each, dtype=torch.float64))


def test_scores_of_labels_have_errors_over_examples() -> None:
    probs = normal(60, 3, seed=2).sigmoid()
    labels = (torch.rand(60, 3, generator=seeded()) < probs).long()
    labels[:, 2] = 0  # has no AUROC
    found = Multilabel().scores(in_batches(MultilabelPrediction(probs, torch.zeros(60)), labels))
    assert found.values == pytest.approx(metrics.multilabel(probs, labels), rel=1e-6)
    for name in found.values:

        def score(mask: Tensor, name: str = name) -> float:
            return metrics.multilabel(probs[mask], labels[mask])[name]

        assert found.errors[name] == pytest.approx(jackknife(score, 60), rel=0.05)


def test_numbers_without_a_spread_are_scored_by_their_squares() -> None:
    mean, truth = normal(50, 2, seed=3), normal(50, 2, seed=4)
    zero = torch.zeros(50, 2)
    found = Regression().scores(in_batches(Estimate(mean, zero, zero), truth))
    assert list(found.losses) == ["squared error"]
    assert found.values["rmse"] == pytest.approx((mean - truth).square().mean().sqrt().item())
    assert found.errors["rmse"] == pytest.approx(
        jackknife(lambda mask: (mean - truth)[mask].square().mean().sqrt().item(), 50), rel=0.05
    )


def test_what_a_task_cannot_score_is_refused() -> None:
    with pytest.raises(ValueError, match="'embedding' has no scores"):
        Embedding().scores([])
    with pytest.raises(ValueError, match="numbers have no label that could be ignored"):
        Regression().scores([(Estimate(torch.ones(2), torch.ones(2), torch.ones(2)), torch.ones(2))], ignore=3)
    with pytest.raises(ValueError, match="the data has no batches"):
        Regression().scores([])
    with pytest.raises(ValueError, match="no place has a label that counts"):
        Classification().scores([(Prediction(torch.full((2, 2), 0.5), torch.zeros(2)), torch.tensor([9, 9]))], ignore=9)


def test_the_error_of_a_ratio_is_that_of_the_jackknife() -> None:
    values, weights = normal(80).double(), torch.rand(80, generator=seeded(), dtype=torch.float64)
    wanted = jackknife(lambda mask: ((weights * values)[mask].sum() / weights[mask].sum()).item(), 80)
    assert ratio_error(values, weights) == pytest.approx(wanted, rel=0.05)
    assert ratio_error(values, torch.ones(80)) == pytest.approx(standard_error(values))


# A task of the user's own


@dataclass(frozen=True)
class Ordinal(Classification):
    """Classes in an order, each with the logit of being above the one before: ``[N, K - 1]``."""

    name: ClassVar[str] = "ordinal"

    def raw(self, output: Any) -> Tensor:
        above = output.cummin(1).values.sigmoid()
        ones, zeros = torch.ones_like(above[:, :1]), torch.zeros_like(above[:, :1])
        log: Tensor = (torch.cat([ones, above], 1) - torch.cat([above, zeros], 1)).clamp(min=1e-9).log()
        return log


def test_a_task_of_ones_own_serves_everywhere(tmp_path: Any) -> None:
    model = settled(mlp(classes=3), 4)
    x, labels = normal(300, 4, seed=5), torch.randint(0, 4, (300,), generator=seeded())
    task = Ordinal()
    with pytest.warns(UserWarning, match="Ordinal is no task of stochbn's own"):
        posterior = stochbn.fit(model, [x], 8, task=task, reference=[x])
    posterior.save(tmp_path / "p.safetensors")
    assert stochbn.load(tmp_path / "p.safetensors").reference is not None
    stochbn.shift.Monitor(posterior).update(model, x[:32])
    found = stochbn.Predictive(model, posterior, 9, task=task, tolerance=0)(x, generator=seeded())
    each = []
    for draw in posterior.iter_draws(9, seeded(), quasi=True):
        with torch.no_grad():
            each.append(torch.func.functional_call(model, draw, (x,)))
    above = torch.stack(each).cummin(2).values.sigmoid()
    ends = torch.nn.functional.pad(above, (1, 0), value=1.0) - torch.nn.functional.pad(above, (0, 1))
    torch.testing.assert_close(found.probs, ends.mean(0), atol=1e-5, rtol=1e-4)
    calibrated = stochbn.calibrate(model, posterior, [(x, labels)], task=task, draws=2)
    assert calibrated.choice
    assert found.columns()["class"]


class RankedProbability(DrawScore):
    """The ranked probability score: squared distances of cumulative probabilities, at each temperature."""

    name = "RPS"

    def add(self, logits: Tensor, labels: Tensor) -> None:
        each = torch.stack([(logits / t).softmax(1) for t in self.temperatures.tolist()]).double()
        self.total = each if self.total is None else self.total + each
        self.draws += 1

    def of_each(self, labels: Tensor) -> Tensor:
        assert self.total is not None
        truth = torch.nn.functional.one_hot(labels, self.total.shape[2])
        return ((self.total / self.draws - truth).cumsum(2) ** 2).sum(2)


class Nameless(RankedProbability):
    name = ""


@dataclass(frozen=True)
class Ranked(Ordinal):
    """Ordered classes that are calibrated by a score of their own."""

    calibrated_by: ClassVar[tuple[str, ...]] = ("rps", "nameless", "nll")

    def draw_score(self, name: str, temperatures: Tensor) -> DrawScore:
        own = {"rps": RankedProbability, "nameless": Nameless}
        return own[name](temperatures) if name in own else super().draw_score(name, temperatures)


def test_a_task_is_calibrated_by_a_score_of_its_own_and_by_its_first_unless_told() -> None:
    model = settled(mlp(classes=3), 4)
    x, labels = normal(300, 4, seed=5), torch.randint(0, 4, (300,), generator=seeded())
    with pytest.warns(UserWarning, match="is no task of stochbn's own"):
        posterior = stochbn.fit(model, [x], 8, task=Ranked(), reference=[x])
    choices: list[Choice] = []

    def calibrated(**options: Any) -> stochbn.Posterior:
        return stochbn.calibrate(
            model, posterior, [(x, labels)], task=Ranked(), draws=2, report=choices.append, **options
        )

    found = calibrated()
    probs = stochbn.Predictive(model, task=Ranked())(x).probs.double()
    wanted = ((probs - torch.nn.functional.one_hot(labels, 4)).cumsum(1) ** 2).sum(1).mean().item()
    assert choices[0].score == "rps"
    assert choices[0].options[0].mean == pytest.approx(wanted, rel=1e-5)
    assert "the RPS by" in str(choices[0])
    assert found.choice == str(choices[0])
    calibrated(score="nameless")
    assert str(choices[1]) == str(choices[0]).replace("RPS", "nameless")
    calibrated(score="nll")
    assert "the NLL by" in str(choices[2])
    assert " nats" in str(choices[2])
    with pytest.raises(ValueError, match="score must be one of 'rps', 'nameless', 'nll', got 'brier'"):
        calibrated(score="brier")


def test_arguments_take_the_place_of_what_a_task_says() -> None:
    task: Task = make_task(Classification("a", 1), class_axis=2)
    assert (task.place, task.class_axis) == ("a", 2)
    described: Mapping[str, Any] = task.description()
    assert make_task(**described) == task
    with pytest.raises(ValueError, match="no classes"):
        make_task(Regression(), output="probs")
