"""A table: is a tumour malignant, and which cases should a doctor look at?

The network has one logit. If only the most certain predictions are used, fewer of them are wrong.
Data: scikit-learn's breast cancer, 569 patients. Run: python examples/tabular.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn

import stochbn


def main() -> dict[str, float]:
    """Train, fit, calibrate, predict, and print a table."""
    torch.manual_seed(0)
    data = load_breast_cancer()
    order = torch.randperm(569)
    x, y = torch.tensor(data.data, dtype=torch.float32)[order], torch.tensor(data.target)[order]
    x = (x - x[:200].mean(0)) / x[:200].std(0)
    train, held_out, test = slice(0, 200), slice(200, 300), slice(300, 569)

    model = nn.Sequential(
        nn.Linear(30, 64),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Linear(64, 1),
    )
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(30):
        for batch in torch.randperm(200).split(20):
            loss = nn.functional.binary_cross_entropy_with_logits(model(x[train][batch])[:, 0], y[train][batch].float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()

    posterior = stochbn.fit(model, [x[train]])
    calibrated = stochbn.calibrate(model, posterior, [(x[held_out], y[held_out])], task="binary", temperature=True)
    results = {}
    print(f"{'':12} {'error':>7} {'NLL':>8} {'ECE':>7}   error of the most certain 90 %, 70 %")
    for name, predictor in (
        ("plain", stochbn.Predictive(model, task="binary")),
        ("SBN", stochbn.Predictive(model, posterior, task="binary")),
        ("calibrated", stochbn.Predictive(model, calibrated, task="binary")),
    ):
        prediction = predictor(x[test])
        scores = stochbn.metrics.evaluate(prediction.probs, y[test])
        wrong = (prediction.probs.argmax(1) != y[test]).float()
        curve = stochbn.metrics.risk_coverage(prediction.entropy, wrong)["risk"]
        results[name] = scores["nll"]
        print(
            f"{name:12} {scores['error']:6.2f}% {scores['nll']:8.4f} {scores['ece']:7.4f}   "
            f"{curve[int(0.9 * len(wrong)) - 1]:.2%}, {curve[int(0.7 * len(wrong)) - 1]:.2%}"
        )
    return results


if __name__ == "__main__":
    main()
