"""Time series: which waveform is it, and which others are possible?

The data is generated: sine, square and sawtooth waves with noise. A one-dimensional convolutional network classifies
them. Sets of classes contain the true one in 95 % of series. Run: python examples/time_series.py
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import stochbn


def series(count: int, noise: float) -> tuple[Tensor, Tensor]:
    """Waves ``[N, 1, 64]`` and which they are."""
    labels = torch.randint(3, (count,))
    phase = 2 * math.pi * (torch.rand(count, 1) + torch.linspace(0, 1, 64) * (1.5 + 2 * torch.rand(count, 1)))
    waves = torch.stack([phase.sin(), phase.sin().sign(), (phase / math.pi) % 2 - 1], 1)
    chosen = waves[torch.arange(count), labels]
    return (chosen + noise * torch.randn(count, 64))[:, None], labels


def main() -> dict[str, float]:
    """Train, fit, predict, and print a table."""
    torch.manual_seed(0)
    x, y = series(400, 0.9)
    model = nn.Sequential(
        nn.Conv1d(1, 16, 9, padding=4), nn.BatchNorm1d(16), nn.ReLU(), nn.MaxPool1d(2),
        nn.Conv1d(16, 32, 5, padding=2), nn.BatchNorm1d(32), nn.ReLU(), nn.AdaptiveAvgPool1d(4), nn.Flatten(),
        nn.Linear(128, 3),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(30):
        for batch in torch.randperm(400).split(20):
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()

    posterior = stochbn.fit(model, [x])
    (held_out, truth), (test, labels) = series(500, 0.9), series(2000, 0.9)
    results = {}
    print(f"{'':8} {'error':>7} {'NLL':>8} {'ECE':>7} {'classes in a set':>17} {'coverage':>9}")
    for name, predictor in (("plain", stochbn.Predictive(model)), ("SBN", stochbn.Predictive(model, posterior))):
        prediction = predictor(test)
        scores = stochbn.metrics.evaluate(prediction.probs, labels)
        sets = stochbn.conformal.aps(predictor(held_out).probs, truth, coverage=0.95)(prediction.probs)
        held = stochbn.conformal.evaluate(sets, labels)
        results[name] = scores["nll"]
        print(
            f"{name:8} {scores['error']:6.2f}% {scores['nll']:8.4f} {scores['ece']:7.4f} "
            f"{held['size']:17.2f} {held['coverage']:9.1%}"
        )
    return {**results, "coverage": held["coverage"]}


if __name__ == "__main__":
    main()
