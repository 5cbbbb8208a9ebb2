"""Pages about labels and about places: their numbers against counting one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import command_output as run
from conftest import normal, seeded
from stochbn.predictions import entropy
from stochbn.report.labels import SeenLabels
from stochbn.report.places import CELLS, SeenPlaces
from test_own_network import told  # noqa: F401 - a fixture
from test_own_tasks import PLACES, TRUTH, X, module, options  # noqa: F401 - a fixture


def test_labels_are_counted_one_by_one() -> None:
    probs, truth = normal(60, 3).sigmoid(), (normal(60, 3, seed=1) > 0).long()
    seen = SeenLabels(["a", "b", "c"])
    for part in torch.split(torch.arange(60), 25):
        seen.add("plain", probs[part], truth[part])
    (answering, classes), curves, (said,) = seen.finish()
    given, true = probs >= 0.5, truth > 0
    row = classes.tables[0].rows[1]
    right = (given & true)[:, 1].sum().item()
    assert row[:5] == [
        "b", str(true[:, 1].sum().item()), str(given[:, 1].sum().item()),
        f"{100 * right / given[:, 1].sum().item():.1f}", f"{100 * right / true[:, 1].sum().item():.1f}",
    ]  # fmt: skip
    half = next(row for row in answering.tables[1].rows if row[0] == "0.5")
    assert half[1] == f"{100 * (given & true).sum().item() / given.sum().item():.1f}"
    assert half[2] == f"{100 * (given & true).sum().item() / true.sum().item():.1f}"
    assert half[3] == f"{given.sum(1).double().mean().item():.2f}"
    wrong = (given != true).any(1)
    assert f"{100 * wrong.double().mean().item():.2f} % have a wrong label" in said
    sums = entropy(probs) + entropy(1 - probs)
    surest = wrong[sums <= sums.sort().values[47]]
    assert f"{100 * surest.double().mean().item():.2f} % (95 %" in said
    assert len(curves) == 2


@pytest.mark.parametrize("ignore", [None, 2])
def test_places_are_counted_one_by_one(ignore: int | None) -> None:
    probs = (2 * normal(10, 3, 6, 5)).softmax(1)
    truth = torch.randint(3, (10, 6, 5), generator=seeded(4))
    seen = SeenPlaces(["a", "b", "c"], ignore)
    seen.add("plain", probs[:4], truth[:4])
    seen.add("plain", probs[4:], truth[4:])
    (answering, classes), _, (said,) = seen.finish()
    counted = torch.ones_like(truth, dtype=torch.bool) if ignore is None else truth != ignore
    predicted = probs.argmax(1)
    wrong = (predicted != truth)[counted]
    assert f"Of all places {100 * wrong.double().mean().item():.2f} % are wrong" in said
    assert classes.matrix is not None
    for k in range(3):
        for other in range(3):
            expected = ((truth == k) & (predicted == other) & counted).sum()
            assert classes.matrix.counts[k][other] == expected
    both = ((truth == 0) & (predicted == 0) & counted).sum().item()
    either = (((truth == 0) | (predicted == 0)) & counted).sum().item()
    assert classes.tables[0].rows[0][2] == f"{100 * both / either:.1f}"
    unsure = entropy(probs)[counted].double()
    for row in answering.tables[0].rows:
        highest = float(row[1])
        step = torch.tensor(3.0).log().item() / CELLS
        inside = unsure < highest + 1e-4
        assert abs(100 * inside.double().mean() - float(row[0])) < 100 * 2 / len(unsure) + 100 * step
        assert abs(100 * wrong[inside].double().mean() - float(row[2])) < 100 * 2 / inside.sum()
    each = torch.stack([((p != t) & c).sum() / c.sum() for p, t, c in zip(predicted, truth, counted, strict=True)])
    assert answering.tables[1].rows[0][3].startswith(f"{100 * each.mean().item():.2f} ±")


@pytest.mark.filterwarnings("ignore::UserWarning")  # of these networks, which have learnt nothing
@pytest.mark.parametrize("task", ["labels", "places"])
def test_evaluate_writes_a_page_about_labels_and_places(task: str, module: str) -> None:  # noqa: F811
    x, truth = (X, (X[:, :3] > 0).astype(np.int64)) if task == "labels" else (PLACES, TRUTH)
    given = options(module, task, x)
    np.savez("test.npz", inputs=x, labels=truth)
    asked = ("--task", "multilabel") if task == "labels" else ("--dense",)
    said = run("evaluate", *given, *asked, "--data", "test.npz", "--draws", 8, "--report", "page.html")
    assert "The report is page.html" in said
    page = Path("page.html").read_text()
    assert "When to answer" in page
    assert ("By label" if task == "labels" else "IoU") in page
    assert "8 draws with the noise of mini-batches of 4" in page
    assert "ms an example without SBN" in page
    assert page.count("<figure") == 2
    assert 'id="least"' not in page
