"""Answering the surest examples alone: shares, thresholds and exact intervals against counting one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta

from conftest import normal, seeded
from stochbn.evaluation.methods import Method
from stochbn.metrics import risk_coverage
from stochbn.predictions import entropy
from stochbn.report.answering import SHARES, answered, answering_table, compared_table, surest


def method(name: str = "plain", *, sbn: bool = True, count: int = 200, sure: float = 2.0) -> Method:
    logits = sure * normal(count, 4, seed=1)
    labels = torch.multinomial(logits.softmax(1), 1, generator=seeded(2))[:, 0]
    return Method(name, sbn, 1, logits.softmax(1), labels)


@given(count=st.integers(1, 40), seed=st.integers(0, 50), levels=st.integers(1, 40), share=st.floats(0.05, 1))
def test_shares_are_counted_one_by_one(count: int, seed: int, levels: int, share: float) -> None:
    generator = seeded(seed)
    entropies = torch.randint(levels, (count,), generator=generator).float()  # with ties
    wrong = torch.rand(count, generator=generator) < 0.3
    (found,) = answered(entropies, wrong, [share])
    threshold = sorted(entropies.tolist())[max(round(share * count), 1) - 1]
    pairs = [w for e, w in zip(entropies.tolist(), wrong.tolist(), strict=True) if e <= threshold]
    assert (found.count, found.entropy, found.share) == (len(pairs), threshold, len(pairs) / count)
    assert found.wrong == pytest.approx(sum(pairs) / len(pairs))
    errors = sum(pairs)
    assert found.low == pytest.approx(beta.ppf(0.025, errors, len(pairs) - errors + 1) if errors else 0)
    assert found.high == pytest.approx(beta.ppf(0.975, errors + 1, len(pairs) - errors) if errors < len(pairs) else 1)


def test_the_tables_and_the_sentence_have_these_numbers() -> None:
    one = method()
    entropies, wrong = entropy(one.known), one.known.argmax(1) != one.labels
    table = answering_table(one)
    for row, found in zip(table.rows, answered(entropies, wrong, SHARES), strict=True):
        assert row[0] == f"{100 * found.share:.1f}"
        assert row[2] == f"{found.entropy:.4f}"
        assert row[3] == f"{100 * found.wrong:.2f}"
        assert int(row[1]) + int(row[5]) == 200
    rows = compared_table([one, method(sbn=False, sure=1.0)]).rows
    assert [row[0] for row in rows] == ["SBN", "plain"]
    assert float(rows[0][-1]) == pytest.approx(100 * risk_coverage(entropies, wrong)["aurc"], abs=1e-3)
    (chosen,) = answered(entropies, wrong, [0.8])
    assert (
        f"Answer the surest 80 %, of an entropy of at most {chosen.entropy:.3f} nats: {100 * chosen.wrong:.2f} %"
        in (surest(one))
    )


def test_nothing_to_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="no examples to answer"):
        answered(torch.empty(0), torch.empty(0, dtype=torch.bool))
