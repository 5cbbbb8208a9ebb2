"""Prediction sets: which digits may a noisy image show?

A network classifies scikit-learn's digits under noise. Prediction sets contain the true digit in 90 % of images, and a
better network has smaller sets. The images that the network was not trained on are split into held-out and test images,
forty times. If test images have more noise than held-out ones, the coverage is not guaranteed.
Run: python examples/conformal.py
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import stochbn

COVERAGE, SPLITS, HELD_OUT = 0.9, 40, 500


def noisy(x: Tensor, noise: float) -> Tensor:
    """Pictures with normal noise on them, its standard deviation in parts of the darkest grey."""
    return x + noise * torch.randn_like(x)


def train(x: Tensor, y: Tensor) -> nn.Module:
    """A small convolutional network for pictures ``[N, 1, 8, 8]``."""
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(15):
        for batch in torch.randperm(len(x)).split(20):
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def main() -> dict[str, float]:
    """Train, fit, predict, and print a table."""
    torch.manual_seed(0)
    data = load_digits()
    order = torch.randperm(len(data.target))
    x = torch.tensor(data.images, dtype=torch.float32)[order, None] / 16
    y = torch.tensor(data.target)[order]
    seen, unseen = slice(0, 600), slice(600, None)
    training, labels = noisy(x[seen], 0.4), y[unseen]
    model = train(training, y[seen])
    posterior = stochbn.fit(model, [training])
    same, noisier = noisy(x[unseen], 0.4), noisy(x[unseen], 0.6)

    splits = [torch.randperm(len(labels)) for _ in range(SPLITS)]
    random = torch.Generator().manual_seed(0)
    methods: dict[str, Callable[[Tensor, Tensor], stochbn.conformal.Sets]] = {
        "lac": lambda probs, labels: stochbn.conformal.lac(probs, labels, COVERAGE),
        "aps": lambda probs, labels: stochbn.conformal.aps(probs, labels, COVERAGE),
        "aps, randomised": lambda probs, labels: stochbn.conformal.aps(probs, labels, COVERAGE, generator=random),
        "raps": lambda probs, labels: stochbn.conformal.raps(probs, labels, COVERAGE, penalty=0.1, free=1),
    }
    results: dict[str, float] = {}
    print(f"{'':6} {'sets':15} {'coverage':>9} {'lowest class':>13} {'classes in a set':>17} {'with more noise':>16}")
    for name, predictor in (("plain", stochbn.Predictive(model)), ("SBN", stochbn.Predictive(model, posterior))):
        probs, others = predictor(same).probs, predictor(noisier).probs
        results[name] = stochbn.metrics.evaluate(probs, labels)["nll"]
        for method, fitted in methods.items():
            found = torch.zeros(4, dtype=torch.float64)
            for split in splits:
                held_out, test = split[:HELD_OUT], split[HELD_OUT:]
                sets = fitted(probs[held_out], labels[held_out])
                scores = stochbn.conformal.evaluate(sets(probs[test]), labels[test])
                shifted = stochbn.conformal.evaluate(sets(others[test]), labels[test])
                found += torch.tensor(
                    [scores["coverage"], scores["worst_class_coverage"], scores["size"], shifted["coverage"]]
                )
            coverage, lowest, size, other = (found / SPLITS).tolist()
            results.setdefault("coverage", coverage)
            print(f"{name:6} {method:15} {coverage:9.1%} {lowest:13.1%} {size:17.2f} {other:16.1%}")
    return results


if __name__ == "__main__":
    main()
