"""Survival: how long machines run until they fail, with data that is censored.

Many machines were still running when they were last seen. Time is divided into ten intervals. For each the network
predicts the logit of the hazard: the probability of failing there, if not before. SBN averages the survival curves of
its draws. The data is generated: Weibull failure times, a third of them censored.
Run: python examples/survival.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import stochbn
from stochbn.tasks import make_task

INTERVALS = 10


def machines(count: int) -> tuple[Tensor, Tensor]:
    """Measurements ``[N, 8]`` and labels ``[N, 2]``: the interval, and 1 if the machine failed there."""
    x = torch.randn(count, 8)
    scale = torch.exp(0.8 * x[:, 0] - 0.5 * x[:, 1] * x[:, 2])
    fails = scale * torch.distributions.Weibull(1.0, 1.5).sample((count,))
    last_seen = 3 * torch.rand(count)
    ends = torch.linspace(0.25, 2.25, INTERVALS - 1)  # the last interval has no end
    interval = torch.bucketize(torch.minimum(fails, last_seen), ends)
    return x, torch.stack([interval, (fails <= last_seen).long()], 1)


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Of hazards: a machine survived all intervals before its own, and that one too unless it failed there."""
    interval, failed = labels.unbind(1)
    known = torch.arange(INTERVALS) <= interval[:, None]
    target = nn.functional.one_hot(interval, INTERVALS) * failed[:, None]
    each = nn.functional.binary_cross_entropy_with_logits(logits, target.float(), reduction="none")
    return (each * known).sum(1).mean()


def main() -> dict[str, float]:
    """Train, fit, calibrate, predict, and print a table."""
    torch.manual_seed(0)
    (x, y), held_out, (x_test, y_test) = machines(800), machines(800), machines(2000)
    model = nn.Sequential(
        nn.Linear(8, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(),
        nn.Linear(64, INTERVALS),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(12):
        for batch in torch.randperm(800).split(40):
            loss = negative_log_likelihood(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()

    posterior = stochbn.fit(model, [x], task="survival")
    calibrated = stochbn.calibrate(model, posterior, [held_out], task="survival")
    task = make_task("survival")
    print(f"{'':12} {'NLL':>15} {'concordance':>15} {'integrated Brier':>17}")
    results = {}
    for name, drawn in (("plain", None), ("SBN", posterior), ("calibrated", calibrated)):
        prediction = stochbn.Predictive(model, drawn, task="survival")(x_test)
        found = task.scores([(prediction, y_test)])
        results[name] = found.values["nll"]
        cells = [f"{found.values[key]:.4f} ± {found.errors[key]:.4f}" for key in ("nll", "concordance", "brier")]
        print(f"{name:12} {cells[0]:>15} {cells[1]:>15} {cells[2]:>17}")
    print(calibrated.choice)
    first = stochbn.Predictive(model, calibrated, task="survival")(x_test[:1])
    curve = ", ".join(f"{p:.2f}" for p in first.survival[0].tolist())
    half = first.median_time.item()
    print(f"Half of the machines like the first have failed by the end of interval {half:.0f}: {curve}")
    return results


if __name__ == "__main__":
    main()
