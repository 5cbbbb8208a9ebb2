"""Prediction sets that go with a posterior: into its file, through adapt, and not beyond another calibration."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochbn
from conftest import mlp, normal, seeded, settled
from stochbn import conformal
from stochbn.conformal import Sets
from stochbn.files import read_tensors, write_tensors
from stochbn.posteriors.saved import FORMAT
from stochbn.posteriors.thresholds import Thresholds

NEW = normal(30, 3, seed=9).softmax(1)
SETS: dict[str, Callable[[Tensor, Tensor], Sets]] = {
    "lac": lambda probs, labels: conformal.lac(probs, labels, 0.8),
    "aps by class": lambda probs, labels: conformal.aps(probs, labels, 0.8, by_class=True),
    "raps": lambda probs, labels: conformal.raps(probs, labels, 0.8, penalty=0.02, free=1),
    "weighted": lambda probs, labels: conformal.lac(probs, labels, 0.8, weights=[1e6, 1.0, 1.0]),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).train()
    for _ in range(100):
        model(torch.randn(64, 4))
    return model.eval()


def data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    x = normal(count, 4, seed=seed)
    return x, x[:, :3].argmax(1)


def held(seed: int = 1) -> tuple[Tensor, Tensor]:
    x, labels = data(90, seed)
    return network()(x).softmax(1).detach(), labels


@pytest.fixture
def posterior() -> stochbn.Posterior:
    x, _ = data(600, 0)
    fitted = stochbn.fit(network(), list(torch.split(x, 50)), batch_size=16)
    return fitted.with_sets(SETS["lac"](*held()), examples=90, draws=20)


def rejoined(posterior: stochbn.Posterior, path: Path) -> stochbn.Posterior:
    posterior.save(path)
    return stochbn.load(path)


# By class


def test_a_threshold_of_a_class_is_that_of_its_examples_alone() -> None:
    probs, labels = held()
    for method in (conformal.lac, conformal.aps, conformal.raps):
        found = method(probs, labels, 0.8, by_class=True)
        assert isinstance(found.threshold, Tensor)
        for k in range(3):
            alone = method(probs[labels == k], labels[labels == k], 0.8)
            assert found.threshold[k] == alone.threshold
        assert torch.equal(found(NEW)[:, 1], method(probs[labels == 1], labels[labels == 1], 0.8)(NEW)[:, 1])


def test_by_class_every_class_is_covered_as_often_as_asked_for() -> None:
    generator, covered = seeded(3), torch.zeros(2, 3, dtype=torch.float64)
    repetitions, coverage = 300, 0.75
    for _ in range(repetitions):
        parts = []
        for count in (200, 400):
            labels = torch.randint(3, (count,), generator=generator)
            logits = torch.randn(count, 3, generator=generator)
            logits[range(count), labels] += torch.tensor([3.0, 1.5, 0.2])[labels]
            parts.append((logits.softmax(1), labels))
        for row, by_class in enumerate((False, True)):
            sets = conformal.lac(*parts[0], coverage, by_class=by_class)(parts[1][0])
            right = sets[range(400), parts[1][1]].double()
            covered[row] += torch.stack([right[parts[1][1] == k].mean() for k in range(3)]) / repetitions
    assert covered[0].min() < 0.65  # one threshold for all leaves the difficult class uncovered
    assert ((covered[1] > coverage - 0.01) & (covered[1] < coverage + 0.03)).all()


def test_by_class_each_class_needs_enough_examples_and_no_weights() -> None:
    probs, labels = held()
    keep = (labels != 2) | (torch.arange(90) < 10)
    few = int((labels[keep] == 2).sum())
    with pytest.raises(ValueError, match=f"at least 9 held-out examples of class 2, got {few}; pass more"):
        conformal.lac(probs[keep], labels[keep], 0.9, by_class=True)
    with pytest.raises(ValueError, match="the mix of classes does not matter"):
        conformal.lac(probs, labels, 0.8, by_class=True, weights=[1.0, 1.0, 1.0])


# In a file


@pytest.mark.parametrize("kind", SETS)
def test_sets_come_back_from_a_file(kind: str, posterior: stochbn.Posterior, tmp_path: Path) -> None:
    sets = SETS[kind](*held())
    stored = posterior.with_sets(sets, examples=90, draws=20, augment="flip")
    found = rejoined(stored, tmp_path / "p.safetensors").thresholds
    assert found is not None
    assert torch.equal(found.sets(NEW), sets(NEW))
    assert torch.equal(torch.as_tensor(found.sets.threshold), torch.as_tensor(sets.threshold))
    assert (found.examples, found.draws, found.augment, found.adapted) == (90, 20, "flip", False)
    assert isinstance(found.sets, Sets)
    assert replace(found.sets, threshold=0.0) == replace(sets, threshold=0.0)


def test_a_posterior_without_noise_has_thresholds_too(posterior: stochbn.Posterior, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="were dropped"):
        plain = posterior.rescale(math.inf)
    sets = SETS["lac"](*held())
    found = rejoined(plain.with_sets(sets), tmp_path / "p.safetensors").thresholds
    assert found is not None
    assert torch.equal(found.sets(NEW), sets(NEW))


def test_every_rule_comes_back_from_a_file(posterior: stochbn.Posterior, tmp_path: Path) -> None:
    x, truth = normal(60, seed=2), normal(60, seed=3)
    groups = ["a", "b"] * 30
    rules: list[tuple[Any, str | None]] = [
        (conformal.saps(*held(), 0.8, penalty=0.2), None),
        (conformal.lac(*held(), 0.8, groups=["a", "b", ""] * 30), "hospital"),
        (conformal.intervals(x, x.abs() + 1, truth, 0.8), None),
        (conformal.intervals(x, None, truth, 0.8, groups=groups), "hospital"),
        (conformal.cqr(x - 1, x + 1, truth, 0.8), None),
        (conformal.crc(held()[0], held()[1], 0.8, mask=1), None),
        (conformal.crc(held()[0], held()[1], 0.8, groups=["a", "b", "c"] * 30), "hospital"),
    ]
    for rule, by in rules:
        found = rejoined(posterior.with_sets(rule, by=by), tmp_path / "p.safetensors").thresholds
        assert found is not None
        assert type(found.sets) is type(rule)
        assert found.by == by
        assert torch.equal(torch.as_tensor(found.sets.threshold), torch.as_tensor(rule.threshold))
        assert replace(found.sets, threshold=0.0) == replace(rule, threshold=0.0)  # type: ignore[type-var]
        if by is not None:
            with pytest.raises(ValueError, match="sets by group, and no others, go with the name of their column"):
                posterior.with_sets(rule)


def test_thresholds_of_files_before_groups_open(posterior: stochbn.Posterior, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    posterior.save(path)
    tensors, about = read_tensors(path, FORMAT)
    for name in ("kind", "by", "groups"):
        del about["thresholds"][name]
    write_tensors(path, FORMAT, tensors, about)
    found, expected = stochbn.load(path).thresholds, posterior.thresholds
    assert found is not None
    assert expected is not None
    assert found.sets == expected.sets


def test_a_file_without_thresholds_opens(posterior: stochbn.Posterior, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    replace(posterior, thresholds=None).save(path)
    tensors, about = read_tensors(path, FORMAT)
    assert about.pop("thresholds") is None
    write_tensors(path, FORMAT, tensors, about)
    assert stochbn.load(path).thresholds is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("coverage", 1.5, "the coverage of sets must lie between 0 and 1, got 1.5"),
        ("method", "other", "the method of sets must be"),
        ("classes", 1, "at least 2, got 1"),
        ("penalty", -1.0, "the penalty of sets must be at least 0"),
        ("free", -1, "free ranks"),
        ("by_class", True, "must have a threshold for each class"),
        ("examples", 0, "the examples of thresholds must be a whole number"),
        ("draws", "x", "the draws of thresholds must be a whole number"),
        ("augment", 3, "augment as a text"),
        ("adapted", 1, "tell whether they were adapted"),
        ("spare", 1, "thresholds must have adapted, augment"),
        ("kind", "other", "the kind of thresholds must be one of sets, labels, intervals, quantiles, got 'other'"),
        ("groups", "a", "the groups of thresholds must be a list"),
        ("groups", ["a"], "must have one for each group"),
        ("by", "site", "go with the name of their column"),
    ],
)
def test_thresholds_of_a_file_that_cannot_be_are_refused(
    name: str, value: Any, message: str, posterior: stochbn.Posterior, tmp_path: Path
) -> None:
    path = tmp_path / "p.safetensors"
    posterior.save(path)
    tensors, about = read_tensors(path, FORMAT)
    about["thresholds"][name] = value
    write_tensors(path, FORMAT, tensors, about)
    with pytest.raises(ValueError, match=f"is not a usable posterior: .*{message}"):
        stochbn.load(path)


@pytest.mark.parametrize("threshold", [None, torch.tensor(math.nan).double(), torch.zeros(2).double(), torch.zeros(3)])
def test_a_threshold_of_a_file_that_cannot_be_is_refused(
    threshold: Tensor | None, posterior: stochbn.Posterior, tmp_path: Path
) -> None:
    path = tmp_path / "p.safetensors"
    posterior.save(path)
    tensors, about = read_tensors(path, FORMAT)
    del tensors["thresholds.threshold"]
    if threshold is not None:
        tensors["thresholds.threshold"] = threshold
    write_tensors(path, FORMAT, tensors, about)
    with pytest.raises(ValueError, match="threshold"):
        stochbn.load(path)


def test_sets_that_are_random_or_no_sets_are_refused(posterior: stochbn.Posterior) -> None:
    with pytest.raises(ValueError, match="a generator cannot be stored: fit them without generator="):
        posterior.with_sets(conformal.aps(*held(), 0.8, generator=seeded()))
    with pytest.raises(TypeError, match="as of lac, got float"):
        posterior.with_sets(0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got float; see posterior"):
        replace(posterior, thresholds=0.5)  # type: ignore[arg-type]


# When the posterior changes


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.rescale(8),
        lambda p: p.rescale(math.inf),
        lambda p: p.recentre_observed(),
        lambda p: replace(p, temperature=2.0),
        lambda p: stochbn.calibrate(network(), p, [data(200, 4)]),
    ],
    ids=["noise", "no noise", "centre", "temperature", "calibrate"],
)
def test_another_posterior_drops_them_and_says_how_to_make_them_again(
    change: Callable[[stochbn.Posterior], stochbn.Posterior], posterior: stochbn.Posterior
) -> None:
    with pytest.warns(UserWarning, match="were dropped; make them again with 'stochbn conformal") as found:
        assert change(posterior).thresholds is None
    assert sum("were dropped" in str(one.message) for one in found) == 1
    assert posterior.thresholds is not None


def test_what_changes_no_prediction_keeps_them(posterior: stochbn.Posterior) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for same in (posterior.rescale(16), posterior.recentre(network()), replace(posterior, choice="because")):
            assert same.thresholds is posterior.thresholds


def of_adaptation(posterior: stochbn.Posterior, **changes: Any) -> str:
    """The caveat, where `adapt` had found something else."""
    assert posterior.thresholds is not None
    assert posterior.adaptation is not None
    changed = replace(posterior, adaptation=replace(posterior.adaptation, **changes))
    return posterior.thresholds.caveat(changed)


def test_adapting_keeps_and_marks_them(posterior: stochbn.Posterior, tmp_path: Path) -> None:
    x, _ = data(200, 5)
    adapted = rejoined(stochbn.adapt(network(), posterior, [3 * x + 2]), tmp_path / "p.safetensors")
    kept, before = adapted.thresholds, posterior.thresholds
    assert kept is not None
    assert before is not None
    assert kept.adapted
    assert not before.adapted
    assert torch.equal(kept.sets(NEW), before.sets(NEW))
    assert adapted.adaptation is not None
    assert adapted.adaptation.moved
    assert before.caveat(posterior) == ""
    assert "no coverage can be promised without labels" in kept.caveat(adapted)
    same_look: dict[str, Any] = {"moved": {}, "guarded": True}
    assert "no change was found" in of_adaptation(adapted, mixed=0.5, **same_look)
    assert "only the mix of classes has changed: make them again" in of_adaptation(adapted, mixed=0.001, **same_look)
    again = adapted.with_sets(kept.sets)  # of labelled examples of the new data
    assert again.thresholds is not None
    assert not again.thresholds.adapted
    assert again.thresholds.caveat(again) == ""


def test_sets_by_class_hold_where_the_mix_alone_has_changed(posterior: stochbn.Posterior) -> None:
    x, _ = data(200, 5)
    by_class = posterior.with_sets(SETS["aps by class"](*held()))
    adapted = stochbn.adapt(network(), by_class, [3 * x + 2])
    words = of_adaptation(adapted, moved={}, guarded=True, mixed=0.001)
    assert words.endswith("for which sets by class hold as before")


def test_a_stream_marks_them_too(posterior: stochbn.Posterior) -> None:
    adapted = stochbn.shift.Adapter(network(), posterior).update(data(60, 6)[0])
    assert isinstance(adapted.thresholds, Thresholds)
    assert adapted.thresholds.adapted


def test_thresholds_of_another_centre_are_dropped() -> None:
    model = settled(mlp(), 4)
    batches = [normal(512, 4, seed=9)]
    posterior = stochbn.fit(model, batches, 8)
    probs = stochbn.Predictive(model, posterior, 8)(normal(300, 4, seed=3)).probs
    sets = stochbn.conformal.lac(probs, probs.argmax(1), 0.9)
    kept = posterior.with_sets(sets)
    assert kept.recentre(model).thresholds is not None, "the same statistics"
    changed = copy.deepcopy(model)
    means = next(m.running_mean for m in changed.modules() if isinstance(m, nn.BatchNorm1d))
    assert means is not None
    means.add_(1.5)
    with pytest.warns(UserWarning, match="were dropped"):
        assert kept.recentre(changed).thresholds is None
    observed = posterior.recentre_observed().with_sets(sets)
    with pytest.warns(UserWarning, match="were dropped"):
        assert stochbn.adapt(model, observed, batches).thresholds is None


def test_other_draws_than_those_of_the_thresholds_are_told() -> None:
    model = settled(mlp(), 4)
    posterior = stochbn.fit(model, [normal(512, 4, seed=9)], 8)
    probs = stochbn.Predictive(model, posterior, 8)(normal(300, 4, seed=3)).probs
    sets = stochbn.conformal.lac(probs, probs.argmax(1), 0.9)
    thresholds = posterior.with_sets(sets, draws=50).thresholds
    assert thresholds is not None
    assert not thresholds.unlike(50, None)
    assert "--draws 50 and no --augment: predict with these" in thresholds.unlike(4, None)
    assert "predict with these" in thresholds.unlike(50, "flip")


def test_sets_are_kept_with_a_posterior_without_noise(tmp_path: Path) -> None:
    model = network()
    posterior = stochbn.fit(model, [data(320, 5)[0]], 8).rescale(math.inf)
    posterior.with_sets(SETS["lac"](*held())).save(tmp_path / "p.safetensors")
    loaded = stochbn.load(tmp_path / "p.safetensors")
    assert loaded.thresholds is not None
    assert loaded.thresholds.batch_size == math.inf
    assert loaded.thresholds.sets(NEW).equal(SETS["lac"](*held())(NEW))
