from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import stochbn
from conftest import command_output as stochbn_
from conftest import mlp, normal, seeded, settled
from stochbn import Predictive
from stochbn.metrics.survival import brier_scores, concordance, kaplan_meier
from stochbn.tasks import make_task
from stochbn.tasks.survival import SurvivalPrediction
from test_own_network import NUMBER, told  # noqa: F401 - a fixture
from test_task_scores import jackknife

X = normal(12, 4, seed=2)
SPANS = 5


def labelled(n: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Intervals and events."""
    generator = seeded(seed)
    return torch.randint(0, SPANS, (n,), generator=generator), torch.randint(0, 2, (n,), generator=generator)


def likelihood(hazards: list[float], time: int, event: int) -> float:
    """Of one example, factor by factor."""
    p = 1.0
    for interval in range(time):
        p *= 1 - hazards[interval]
    return p * (hazards[time] if event else 1 - hazards[time])


# Predictions


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_curves_are_the_mean_of_slow_draws(temperature: float) -> None:
    from dataclasses import replace

    model = settled(mlp(classes=SPANS), 4)
    posterior = replace(stochbn.fit(model, [normal(96, 4, seed=3)], 8), temperature=temperature)
    curves, entropies = [], []
    for draw in posterior.iter_draws(9, seeded(), quasi=True):
        with torch.no_grad():
            hazards = (torch.func.functional_call(model, draw, (X,)).double() / temperature).sigmoid()
        rows = [[likelihood(row, t, 0) for t in range(SPANS)] for row in hazards.tolist()]
        events = [[likelihood(row, t, 1) for t in range(SPANS)] for row in hazards.tolist()]
        curves.append(torch.tensor(rows))
        probs = torch.cat([torch.tensor(events), curves[-1][:, -1:]], 1)
        entropies.append(-(probs * probs.log()).sum(1))
    every = torch.stack(curves)
    found = Predictive(model, posterior, 9, task="survival", tolerance=0, keep_draws=True)(X, generator=seeded())
    assert type(found) is SurvivalPrediction
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(found.survival, every.mean(0), **close)
    torch.testing.assert_close(found.std, every.std(0), **close)
    torch.testing.assert_close(found.draws, every, **close)
    torch.testing.assert_close(found.expected_entropy, torch.stack(entropies).mean(0), **close)
    torch.testing.assert_close(found.probs.sum(1), torch.ones(12), **close)
    for row, curve, hazard in zip(every.mean(0).tolist(), found.survival.tolist(), found.hazard.tolist(), strict=True):
        for t in range(SPANS):
            assert hazard[t] == pytest.approx(1 - row[t] / (row[t - 1] if t else 1.0), abs=1e-4)
        assert curve == sorted(curve, reverse=True)
    times = torch.arange(SPANS + 1.0)
    torch.testing.assert_close(found.expected_time, (found.probs * times).sum(1), **close)


def test_the_median_is_the_interval_that_halves_the_curve() -> None:
    curves = torch.tensor([[0.9, 0.5, 0.1], [0.4, 0.3, 0.2], [0.9, 0.8, 0.7], [0.0, 0.0, 0.0]])
    found = SurvivalPrediction(curves, torch.zeros(4, 3), torch.zeros(4))
    assert found.median_time.tolist() == [1.0, 0.0, torch.inf, 0.0]
    assert found.hazard[3].tolist() == [1.0, 1.0, 1.0]
    assert set(found.columns()) == {
        "median_time", "expected_time", "entropy", "mutual_information",
        *(f"{name}_{t}" for name in ("survival", "std") for t in range(3)),
    }  # fmt: skip


def test_an_ensemble_of_curves_is_the_mixture_of_all_draws() -> None:
    members, every = [], []
    for seed in range(2):
        model = settled(mlp(classes=SPANS), 4, seed=seed)
        member = Predictive(model, stochbn.fit(model, [normal(96, 4)], 8), 9, task="survival", keep_draws=True)
        members.append(member)
    found = stochbn.Ensemble(members)(X, generator=seeded())
    every = found.draws_kept.double()
    torch.testing.assert_close(found.survival.double(), every.mean(0), atol=1e-5, rtol=1e-4)
    within = torch.stack([part.var(0) for part in torch.split(every, 9)]).mean(0)
    between = torch.stack([part.mean(0) for part in torch.split(every, 9)]).var(0, correction=0)
    torch.testing.assert_close(found.variance.double(), within + between, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("shape", [(5,), (5, 2, 2)])
def test_outputs_that_are_no_hazards_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="hazard of each interval"):
        make_task("survival").raw(torch.zeros(shape))


# Labels and calibration


def test_labels_are_read_as_pairs_or_columns() -> None:
    task, (times, events) = make_task("survival"), labelled(6)
    both = torch.stack([times, events], 1)
    for labels in (both, both.float(), (times, events), both.numpy()):
        assert task.labels((X, labels)).equal(both)
        assert task.labels({"x": X, "labels": labels}).equal(both)
    for wrong, message in (
        (both[:, :1], r"expected labels \[N, 2\]"), (both + 0.5, "whole numbers"), (both - 9, "whole numbers"),
        (both * torch.tensor([1, 2]), "events must be 1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            task.labels((X, wrong))
    with pytest.raises(TypeError, match="1 for the event"):
        task.labels((X,))


def test_calibrate_scores_the_likelihood_of_the_mean_over_draws() -> None:
    model, x = settled(mlp(classes=SPANS), 4), normal(60, 4, seed=7)
    times, events = labelled(60)
    labels = torch.stack([times, events], 1)
    posterior = stochbn.fit(model, [normal(96, 4, seed=3)], 8)
    choices: list[Any] = []
    settings: dict[str, Any] = {"task": "survival", "temperature": False, "report": choices.append, "draws": 4}
    stochbn.calibrate(model, posterior, [(x, labels)], batch_sizes=[8], **settings)
    drawn = next(one for one in choices[0].options if one.drawing)
    total = torch.zeros(60, dtype=torch.float64)
    for draw in posterior.iter_draws(4, torch.Generator().manual_seed(0), quasi=True):
        with torch.no_grad():
            hazards = torch.func.functional_call(model, draw, (x,)).double().sigmoid().tolist()
        cases = zip(hazards, times.tolist(), events.tolist(), strict=True)
        total += torch.tensor([likelihood(*case) for case in cases]) / 4
    assert drawn.mean == pytest.approx(-total.log().mean().item(), rel=1e-4)
    with pytest.raises(ValueError, match="predicts 5 intervals"):
        stochbn.calibrate(model, posterior, [(x, labels + torch.tensor([5, 0]))], task="survival")
    with pytest.raises(ValueError, match="score must be one of 'nll'"):
        stochbn.calibrate(model, posterior, [(x, labels)], task="survival", score="brier")


# Scores


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1), st.integers(0, 4)), min_size=2, max_size=12))
def test_concordance_is_that_of_all_pairs(cases: list[tuple[int, int, int]]) -> None:
    right = pairs = 0.0
    for time, event, predicted in cases:
        for other_time, other_event, other in cases:
            if event and (other_time > time or (other_time == time and not other_event)):
                pairs += 1
                right += 1.0 if other > predicted else 0.5 if other == predicted else 0.0
    times, events, predicted_times = (torch.tensor(column) for column in zip(*cases, strict=True))
    index, _ = concordance(predicted_times, times, events)
    assert index == pytest.approx(right / pairs if pairs else float("nan"), nan_ok=True)


def test_the_error_of_concordance_is_that_of_the_jackknife() -> None:
    times, events = labelled(120)
    predicted = times + 2 * normal(120, seed=3)
    _, error = concordance(predicted, times, events)
    wanted = jackknife(lambda mask: concordance(predicted[mask], times[mask], events[mask])[0], 120)
    assert error == pytest.approx(wanted, rel=0.05)


def test_the_brier_score_weighs_by_the_chance_of_being_seen() -> None:
    times, events = labelled(50, 4)
    survival = torch.rand(50, SPANS, generator=seeded(), dtype=torch.float64).sort(1, descending=True).values
    found = brier_scores(survival, times, events)
    for t in range(SPANS):
        for i in range(50):
            happened = events[i] and times[i] <= t
            alive = times[i] > t or (times[i] == t and not events[i])
            # What is known at the end of t, over the chance that it is: of no censoring in earlier intervals.
            chance = 1.0
            for earlier in range(int(times[i]) if happened else t):
                at_risk = [j for j in range(50) if times[j] > earlier or (times[j] == earlier and not events[j])]
                gone = sum(1 for j in at_risk if times[j] == earlier)
                chance *= 1 - gone / len(at_risk)
            wanted = (survival[i, t] ** 2 if happened else (1 - survival[i, t]) ** 2 if alive else 0.0) / chance
            assert found[i, t] == pytest.approx(float(wanted), rel=1e-9)


def test_scores_are_those_of_scikit_survival() -> None:
    """Its release 0.28, given events at k + 0.5 and censoring at k + 0.9 for the interval k."""
    generator = seeded()
    times, events = (torch.randint(0, most, (300,), generator=generator) for most in (6, 2))
    predicted = times + 2 * torch.randn(300, generator=generator)
    survival = torch.rand(300, 6, generator=generator, dtype=torch.float64).sort(1, descending=True).values
    assert concordance(predicted, times, events)[0] == pytest.approx(0.7287180164706919, abs=1e-9)
    wanted = [0.09178086, 0.18320894, 0.23678171, 0.26981385, 0.26730251]
    assert brier_scores(survival, times, events).mean(0)[:5].tolist() == pytest.approx(wanted, abs=1e-7)


def test_without_censoring_the_brier_score_is_the_plain_one() -> None:
    times, events = labelled(30)[0], torch.ones(30, dtype=torch.long)
    survival = torch.rand(30, SPANS, generator=seeded(), dtype=torch.float64)
    alive = (times[:, None] > torch.arange(SPANS)).double()
    torch.testing.assert_close(brier_scores(survival, times, events), (survival - alive).square())
    torch.testing.assert_close(kaplan_meier(times, events, SPANS), alive.mean(0))


def test_censoring_at_random_does_not_change_what_scores_estimate() -> None:
    """True curves of 20,000 examples, a third of them censored at random."""
    generator = seeded()
    hazards = torch.rand(20_000, SPANS, generator=generator, dtype=torch.float64) * 0.5
    survival = (1 - hazards).cumprod(1)
    happens = torch.rand(20_000, SPANS, generator=generator, dtype=torch.float64) < hazards
    event_time = torch.where(happens.any(1), happens.int().argmax(1), SPANS)
    last = torch.randint(1, SPANS + 4, (20_000,), generator=generator).clamp(max=SPANS) - 1
    times, events = torch.minimum(event_time, last), (event_time <= last).long()
    alive = (event_time[:, None] > torch.arange(SPANS)).double()
    wanted, found = (survival - alive).square().mean(0), brier_scores(survival, times, events).mean(0)
    torch.testing.assert_close(found, wanted, atol=0.01, rtol=0)
    torch.testing.assert_close(kaplan_meier(times, events, SPANS), alive.mean(0), atol=0.02, rtol=0)


# Commands

MODULE = """
from torch import nn

def net():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))
"""


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_commands_take_time_and_event_from_two_columns(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    told: Any,  # noqa: F811
) -> None:
    from stochbn.sources import build

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"own_survival_{next(NUMBER)}"
    Path(f"{name}.py").write_text(MODULE)
    x, (times, events) = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32), labelled(300)
    model = settled(build(f"{name}:net", {}).model, 4)
    save_file(model.state_dict(), "w.safetensors")
    rows = [f"{','.join(map(str, row))},{t},{e}" for row, t, e in zip(x, times.tolist(), events.tolist(), strict=True)]
    Path("d.csv").write_text("\n".join(["a,b,c,d,months,died", *rows]))
    common = "--model", f"{name}:net", "--weights", "w.safetensors", "--task", "survival"
    stochbn_("fit", *common, "--data", "d.csv", "--batch-size", 8, "--label", "months", "--label", "died")
    fitted = stochbn.load("w.sbn.safetensors")
    assert fitted.schema is not None
    assert fitted.schema.label == ("months", "died")
    assert fitted.reference is not None
    assert fitted.reference.task["name"] == "survival"
    text = stochbn_("calibrate", *common, "--held-out", "d.csv", "--out", "c.sbn.safetensors")
    assert "300 held-out examples" in text
    text = stochbn_("evaluate", *common, "--data", "d.csv", "--draws", 8, "--out", "r", "--report", "r.html")
    assert "concordance" in text
    found = json.loads(Path("r/results.json").read_text())
    plain = Predictive(model, task="survival")(torch.from_numpy(x))
    task = make_task("survival")
    wanted = task.scores([(plain, torch.stack([times, events], 1))])
    assert found["scores"]["plain"] == pytest.approx(wanted.values, rel=1e-4)
    assert found["errors"]["plain"] == pytest.approx(wanted.errors, rel=1e-3)
    page = Path("r.html").read_text()
    assert "Do as many survive as it says?" in page
    assert "Kaplan-Meier" in page
    assert 'id="least"' not in page
    stochbn_("predict", *common, "--data", "d.csv", "--draws", 8, "--out", "p.csv")
    header = Path("p.csv").read_text().splitlines()[0]
    assert "survival_4" in header
    assert "months" not in header
    assert "at the command line name two columns" in told("evaluate", *common, "--data", "d.csv", "--label", "months")


def test_an_exported_network_gives_curves(tmp_path: Path) -> None:
    model = settled(mlp(classes=SPANS), 4)
    posterior = stochbn.fit(model, [normal(96, 4, seed=3)], 8)
    found = stochbn.export.pt2(model, posterior, tmp_path / "n.pt2", X, draws=4, task="survival")
    assert found.outputs == ("survival", "std", "median_time", "expected_time", "entropy")
