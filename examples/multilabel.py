"""Several labels at once: properties of handwritten digits.

Three labels describe a digit: it is even, it is more than four, it has a closed loop. Each has its own probability. SBN
makes the probabilities less certain where the network guesses. Data: scikit-learn's digits.
Run: python examples/multilabel.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

import stochbn

LOOPS = {0, 6, 8, 9}


def main() -> dict[str, float]:
    """Train, fit, predict, and print a table."""
    torch.manual_seed(0)
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    digit = torch.tensor(data.target)
    y = torch.stack([digit % 2 == 0, digit > 4, torch.tensor([int(d) in LOOPS for d in digit])], 1).float()
    train, test = slice(0, 500), slice(1000, 1797)

    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(144, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(40):
        for batch in torch.randperm(500).split(20):
            loss = nn.functional.binary_cross_entropy_with_logits(model(x[train][batch]), y[train][batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()

    posterior = stochbn.fit(model, [x[train]])
    results = {}
    print(f"{'':8} {'error':>7} {'NLL':>8} {'ECE':>7} {'AUROC':>8}")
    for name, predictor in (
        ("plain", stochbn.Predictive(model, task="multilabel")),
        ("SBN", stochbn.Predictive(model, posterior, task="multilabel")),
    ):
        scores = stochbn.metrics.multilabel(predictor(x[test]).probs, y[test])
        results[name] = scores["nll"]
        print(f"{name:8} {scores['error']:6.2f}% {scores['nll']:8.4f} {scores['ece']:7.4f} {scores['auroc']:8.4f}")
    return results


if __name__ == "__main__":
    main()
