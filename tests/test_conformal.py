"""Prediction sets of classes: the coverage that was asked for, and MAPIE's sets."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from conftest import normal, seeded
from stochbn import conformal

METHODS: dict[str, Any] = {
    "lac": conformal.lac,
    "aps": conformal.aps,
    "raps": lambda *a, **k: conformal.raps(*a, penalty=0.05, free=2, **k),
    "saps": lambda *a, **k: conformal.saps(*a, penalty=0.05, **k),
}


def predictions(count: int, classes: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Probabilities that are too sure, and labels of the true ones."""
    logits = 1.5 * normal(count, classes, seed=seed, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=seeded(seed))[:, 0]
    return (2 * logits).softmax(1), labels


def slow_scores(method: str, probs: Tensor, u: float = 0.0) -> Tensor:
    """The score of each class of one example, by its definition."""
    scores = torch.zeros_like(probs)
    for k in range(len(probs)):
        above = sum(p for p in probs.tolist() if p > probs[k])
        rank = int(1 + sum(p > probs[k] for p in probs.tolist()))
        scores[k] = 1 - probs[k] if method == "lac" else above + (1 - u) * probs[k]
        if method == "saps":
            scores[k] = (1 - u) * probs.max() if rank == 1 else probs.max() + (rank - 1 - u) * 0.05
        scores[k] += 0.05 * max(rank - 2, 0) if method == "raps" else 0
    return scores


@pytest.mark.parametrize("method", METHODS)
@given(n=st.integers(10, 40), seed=st.integers(0, 99), coverage=st.sampled_from([0.3, 0.5, 0.8, 0.9]))
def test_sets_are_those_of_a_slow_loop(method: str, n: int, seed: int, coverage: float) -> None:
    probs, labels = predictions(n, seed=seed)
    scores = sorted(slow_scores(method, p)[k].item() for p, k in zip(probs, labels, strict=True))
    threshold = next(q for q in scores if sum(s <= q for s in scores) >= (n + 1) * coverage - 1e-9)
    sets = METHODS[method](probs, labels, coverage)
    assert sets.threshold == pytest.approx(threshold, abs=1e-12)
    assert sets.scores(probs, labels).sort().values.tolist() == pytest.approx(scores, abs=1e-12)
    new, _ = predictions(9, seed=seed + 1)
    for row, p in zip(sets(new), new, strict=True):
        distance = (slow_scores(method, p) - threshold).abs()
        assert ((row == (slow_scores(method, p) <= threshold)) | (distance < 1e-9)).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("randomised", [False, True])
def test_new_objects_are_covered_as_often_as_asked_for(method: str, randomised: bool) -> None:
    if randomised and method == "lac":
        pytest.skip("it has no random parts")
    held, n, coverage = 0.0, 19, 0.8
    repetitions = 2000
    generator = seeded(5)
    for seed in range(repetitions):
        probs, labels = predictions(n + 1, seed=seed)
        options = {"generator": generator} if randomised else {}
        sets = METHODS[method](probs[:n], labels[:n], coverage, **options)
        held += bool(sets(probs[n:])[0, labels[n]])
    error = math.sqrt(coverage * (1 - coverage) / repetitions)
    assert held / repetitions > coverage - 4 * error
    assert held / repetitions < coverage + 1 / (n + 1) + 4 * error


class Given:
    """What MAPIE takes for a classifier of scikit-learn: its inputs are the probabilities."""

    def __init__(self, classes: int) -> None:
        self.classes_, self.n_features_in_ = np.arange(classes), classes

    def fit(self, x: Any, y: Any) -> Any:
        return self

    def predict(self, x: Any) -> Any:
        return x.argmax(1)

    def predict_proba(self, x: Any) -> Any:
        return x

    def __sklearn_is_fitted__(self) -> bool:
        return True


def mapies(method: str, probs: Tensor, labels: Tensor, new: Tensor, **options: Any) -> tuple[Any, Tensor]:
    """MAPIE's threshold, and its sets."""
    mapie = pytest.importorskip("mapie.classification")
    theirs = mapie.SplitConformalClassifier(Given(6), 0.85, conformity_score=method, prefit=True, random_state=0)
    theirs.conformalize(probs.numpy(), labels.numpy())
    _, sets = theirs.predict_set(new.numpy(), **options)
    (threshold,) = theirs._mapie_classifier.conformity_score_function_.quantiles_
    return float(threshold), torch.from_numpy(sets[:, :, 0]).bool()


def test_least_ambiguous_sets_are_those_of_mapie() -> None:
    (probs, labels), (new, _) = predictions(200), predictions(300, seed=1)
    own = conformal.lac(probs, labels, 0.85)
    threshold, sets = mapies("lac", probs, labels, new)
    assert own.threshold == pytest.approx(threshold)
    assert torch.equal(own(new), sets)


def test_adaptive_sets_are_those_of_mapie() -> None:
    """MAPIE's scores of held-out examples are always randomised: at its threshold sets are the same, and as large."""
    (probs, labels), (new, truth) = predictions(3000), predictions(3000, seed=1)
    threshold, sets = mapies("aps", probs, labels, new, conformity_score_params={"include_last_label": False})
    own = conformal.Sets("aps", threshold, 6, 0.85)(new)
    empty = ~own.any(1)  # MAPIE leaves no set empty
    own[empty] = torch.nn.functional.one_hot(new[empty].argmax(1), 6).bool()
    assert torch.equal(own, sets)
    _, sets = mapies("aps", probs, labels, new, conformity_score_params={"include_last_label": "randomized"})
    drawn = conformal.aps(probs, labels, 0.85, generator=seeded())(new)
    ours, theirs = conformal.evaluate(drawn, truth), conformal.evaluate(sets, truth)
    assert ours["coverage"] == pytest.approx(theirs["coverage"], abs=0.02)
    assert ours["size"] == pytest.approx(theirs["size"], abs=0.1)


def test_difficult_objects_have_larger_sets_and_a_penalty_keeps_them_small() -> None:
    probs, labels = predictions(2000, classes=50)
    plain, penalised = conformal.aps(probs, labels), conformal.raps(probs, labels, penalty=0.02)
    sizes = plain(probs).sum(1)
    sure = probs.amax(1) > probs.amax(1).median()
    assert sizes[sure].double().mean() < sizes[~sure].double().mean()
    few, many = (conformal.evaluate(sets(probs), labels) for sets in (penalised, plain))
    assert few["size"] < many["size"]
    assert min(few["coverage"], many["coverage"]) >= 0.9


def test_random_steps_of_ranks_are_those_of_the_definition() -> None:
    """Huang et al., 2024, equation 8: u times the largest probability, or it and (rank - 2 + u) penalties."""
    probs, labels = predictions(50)
    drawn = torch.rand(50, 1, generator=seeded(3), dtype=torch.float64)
    sets = conformal.saps(probs, labels, 0.8, penalty=0.05, generator=seeded(3))
    expected = torch.stack([slow_scores("saps", p, u.item())[k] for p, u, k in zip(probs, drawn, labels, strict=True)])
    assert sets.threshold == pytest.approx(expected.sort().values[math.ceil(51 * 0.8) - 1].item())


@pytest.mark.parametrize("method", METHODS)
def test_a_threshold_of_a_group_is_that_of_its_examples_alone(method: str) -> None:
    (probs, labels), (new, _) = predictions(300), predictions(90, seed=1)
    groups, others = ["b", 7, None] * 100, ["b", "7", "elsewhere"] * 30
    found = METHODS[method](probs, labels, 0.8, groups=groups)
    assert found.groups == ("", "7", "b")
    sets = found(new, others)
    for place, first in ((0, 0), (1, 1)):
        alone = METHODS[method](probs[first::3], labels[first::3], 0.8)
        assert found.threshold[found.groups.index(("b", "7")[place])] == alone.threshold
        assert torch.equal(sets[place::3], alone(new[place::3]))
    assert sets[2::3].all(), "nothing is known of a group that was not held out"


def test_by_group_every_group_is_covered_as_often_as_asked_for() -> None:
    """Two binomial errors about the coverage; one threshold for all leaves the difficult group uncovered."""
    generator, coverage = seeded(8), 0.8
    held = {False: torch.zeros(3), True: torch.zeros(3)}
    repetitions, count = 60, 300
    for _ in range(repetitions):
        parts = []
        for _ in range(2):
            group = torch.arange(3 * count) % 3
            logits = torch.randn(3 * count, 4, generator=generator)
            labels = torch.randint(4, (3 * count,), generator=generator)
            logits[range(3 * count), labels] += torch.tensor([3.0, 1.5, 0.5])[group]
            parts.append((logits.softmax(1), labels, group))
        for by_group, shares in held.items():
            own = [part[2] if by_group else None for part in parts]
            sets = conformal.lac(*parts[0][:2], coverage, groups=own[0])(parts[1][0], own[1])
            right = sets[range(3 * count), parts[1][1]].double()
            shares += torch.stack([right[k::3].mean() for k in range(3)]) / repetitions
    error = math.sqrt(2 * coverage * (1 - coverage) / (repetitions * count))  # of thresholds, and of what is tested
    assert held[False].min() < 0.7
    assert ((held[True] > coverage - 2 * error) & (held[True] < coverage + 1 / count + 2 * error)).all()


def test_the_scores_of_sets_are_counted_by_hand() -> None:
    sets = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1]]).bool()
    assert conformal.evaluate(sets, [0, 0, 1, 1]) == {
        "coverage": 0.75, "worst_class_coverage": 0.5, "size": 1.5, "empty": 0.25,
    }  # fmt: skip


PROBS, LABELS = predictions(20)
GROUPS: list[Any] = [1, 2] * 10


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: conformal.lac(PROBS, LABELS, 0.99), ValueError, "needs at least 99 held-out examples, got 20"),
        (lambda: conformal.lac(PROBS[:8], LABELS[:8], 0.9), ValueError, "needs at least 9 held-out examples, got 8"),
        (lambda: conformal.lac(PROBS, LABELS, 1.0), ValueError, "coverage must lie between 0 and 1"),
        (lambda: conformal.aps(PROBS.log(), LABELS), ValueError, "negative"),
        (lambda: conformal.aps(PROBS * math.nan, LABELS), ValueError, "NaN"),
        (lambda: conformal.aps(PROBS[:, :, None], LABELS[:, None]), ValueError, r"probabilities \[N, K\]"),
        (lambda: conformal.aps(PROBS, LABELS[:5]), ValueError, "labels of shape"),
        (lambda: conformal.aps(PROBS, LABELS + 6), ValueError, "labels must lie between 0 and 5"),
        (lambda: conformal.raps(PROBS, LABELS, penalty=-1), ValueError, "of at least 0"),
        (lambda: conformal.lac(PROBS, LABELS)(predictions(3, 4)[0]), ValueError, "of 6 classes, as fitted"),
        (lambda: conformal.evaluate(PROBS, LABELS), TypeError, "truth values"),
        (lambda: conformal.saps(PROBS, LABELS, penalty=0), ValueError, "a penalty above 0"),
        (
            lambda: conformal.lac(PROBS, LABELS, groups=["a"] * 19),
            ValueError,
            "a group for each of 20 examples, got 19",
        ),
        (lambda: conformal.lac(PROBS, LABELS, groups="a"), TypeError, "a sequence with the group of each example"),
        (lambda: conformal.lac(PROBS, LABELS, groups=[*GROUPS[:19], 3]), ValueError, "of the group '3', got 1; pass"),
        (lambda: conformal.lac(PROBS, LABELS, groups=GROUPS, by_class=True), ValueError, "together with by_class"),
        (lambda: conformal.lac(PROBS, LABELS, groups=GROUPS)(PROBS), ValueError, "pass groups, the group of each"),
        (lambda: conformal.lac(PROBS, LABELS)(PROBS, GROUPS), ValueError, "are not by group: leave groups out"),
    ],
)
def test_what_cannot_be_is_refused(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_ten_objects_are_enough_for_nine_tenths_but_for_rounding() -> None:
    probs, labels = predictions(9)
    scores = 1 - probs.gather(1, labels[:, None])
    assert conformal.lac(probs, labels, 0.9).threshold == scores.max().item()


@pytest.mark.parametrize("method", ["lac", "aps", "raps"])
def test_weights_keep_the_coverage_where_the_mix_of_classes_has_changed(method: str) -> None:
    generator = seeded(4)
    old, new = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.05, 0.15, 0.8])
    missed = {False: [], True: []}  # type: dict[bool, list[float]]
    for _ in range(40):
        parts = []
        for mix, count in ((old, 800), (new, 1500)):
            labels = torch.multinomial(mix, count, replacement=True, generator=generator)
            logits = torch.randn(count, 3, generator=generator)
            logits[range(count), labels] += torch.tensor([2.5, 1.5, 0.3])[labels]  # the rare class is a difficult one
            parts.append((logits.softmax(1), labels))
        for weighted in missed:
            weights = new / old if weighted else None
            # All classes together sum to 1, a tie that only chance can break.
            drawn = {} if method == "lac" else {"generator": generator}
            sets = getattr(conformal, method)(*parts[0], 0.9, weights=weights, **drawn)
            missed[weighted].append(conformal.evaluate(sets(parts[1][0]), parts[1][1])["coverage"])
    assert np.mean(missed[False]) < 0.87
    assert 0.89 < np.mean(missed[True]) < 0.93


def test_equal_weights_change_nothing_and_wrong_ones_are_refused() -> None:
    probs, labels = normal(200, 4).softmax(1), torch.arange(200) % 4
    plain, weighted = conformal.lac(probs, labels), conformal.lac(probs, labels, weights=torch.full((4,), 3.0))
    assert torch.equal(plain(probs), weighted(probs))
    for wrong in ([1.0, 1.0], [1.0, -1.0, 1.0, 1.0], [0.0] * 4, [math.nan] * 4):
        with pytest.raises(ValueError, match="weight"):
            conformal.lac(probs, labels, weights=wrong)
    for wrong_type in ("abc", {"a": 1}):
        with pytest.raises(TypeError, match="weights must be a number for each class"):
            conformal.lac(probs, labels, weights=wrong_type)
    everything = conformal.lac(probs, labels, weights=[1e6, 1.0, 1.0, 1e-9])
    assert not everything(probs).all()
    with pytest.raises(ValueError, match="no held-out example is of a class"):
        conformal.lac(probs[labels < 3], labels[labels < 3], weights=[0.0, 0.0, 0.0, 1.0])


@pytest.mark.parametrize("method", ["lac", "aps", "raps"])
def test_sets_are_the_same_from_probabilities_of_either_precision(method: str) -> None:
    generator = np.random.default_rng(7)
    logits = np.round(generator.normal(size=(500, 5)) * 3) / 3  # with many ties
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels, small = generator.integers(0, 5, 500), probs.astype(np.float32)
    fit = getattr(conformal, method)
    exact, rounded = fit(probs, labels, 0.8), fit(small, labels, 0.8)
    assert exact.threshold == pytest.approx(rounded.threshold, abs=1e-6)
    assert torch.equal(exact(probs), rounded(small))
    assert torch.equal(exact(probs), exact(small))
