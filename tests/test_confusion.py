"""Confusions of classes against counting one by one."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import seeded
from stochbn.report.confusion import LARGEST, class_table, confusion_table, confusions, matrix_of


@given(count=st.integers(1, 60), classes=st.integers(2, 6), seed=st.integers(0, 50))
def test_confusions_are_counted_one_by_one(count: int, classes: int, seed: int) -> None:
    generator = seeded(seed)
    probs = torch.rand(count, classes, generator=generator).softmax(1)
    labels = torch.randint(classes, (count,), generator=generator)
    counts = confusions(probs, labels)
    chosen = probs.argmax(1).tolist()
    names = [f"class {k}" for k in range(classes)]
    table = {str(row[0]): row for row in class_table(probs, labels, names).rows}
    for k in range(classes):
        for other in range(classes):
            pairs = zip(labels.tolist(), chosen, strict=True)
            assert counts[k, other] == sum(pair == (k, other) for pair in pairs)
        of_class, predicted = labels.tolist().count(k), chosen.count(k)
        assert (f"class {k}" in table) == bool(of_class or predicted)
        if of_class:
            wrong = sum(c != k for label, c in zip(labels.tolist(), chosen, strict=True) if label == k)
            assert table[f"class {k}"][1:3] == [str(of_class), f"{100 * wrong / of_class:.1f}"]
        if predicted:
            sure = [p.max().item() for p, c in zip(probs, chosen, strict=True) if c == k]
            assert table[f"class {k}"][5] == f"{100 * sum(sure) / len(sure):.1f}"


def test_the_most_frequent_confusions_come_first() -> None:
    counts = torch.tensor([[5, 3, 0], [1, 4, 0], [0, 2, 0]])
    found = confusion_table(counts, ["cat", "dog", "fox"])
    assert found is not None
    assert [row[:2] for row in found.rows] == [
        ["cat, taken for dog", "3"], ["fox, taken for dog", "2"], ["dog, taken for cat", "1"],
    ]  # fmt: skip
    assert found.rows[0][2:] == ["37.5", "50.0"]
    assert confusion_table(torch.eye(3).long(), ["cat", "dog", "fox"]) is None


def test_a_matrix_is_for_few_classes_and_shades_shares_of_a_class() -> None:
    found = matrix_of(torch.tensor([[3, 1], [0, 0]]), ["cat", "dog"])
    assert found is not None
    assert (found.shade(0, 0), found.shade(0, 1), found.shade(1, 0)) == (0.75, 0.25, 0)
    many = torch.eye(LARGEST + 1).long()
    assert matrix_of(many, [str(k) for k in range(LARGEST + 1)]) is None
