"""
Calibration and entropy, without and with draws
===============================================

On digits that the network was not trained on: the accuracy for examples of each confidence (on the diagonal for a
calibrated network), and the entropy of digits of known and of unknown classes.

To run it elsewhere, download :download:`digits.py` too, which has the network and its data.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import stochbn

sys.path.append(str(Path.cwd()))
from digits import data, trained, unknown

x, y = data()
model = trained(x[:120], y[:120], epochs=40)
posterior = stochbn.fit(model, [x[:120][torch.randperm(120)] for _ in range(30)])
test, truth = x[300:], y[300:]

figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
edges = torch.tensor([0.2, 0.6, 0.8, 0.9, 0.95, 0.99, 1.0001])
for name, predictor, color in (
    ("plain", stochbn.Predictive(model), "k"),
    ("SBN", stochbn.Predictive(model, posterior), "tab:orange"),
):
    probs = predictor(test).probs
    scores = stochbn.metrics.evaluate(probs, truth)
    confidence, predicted = probs.max(1)
    bins = torch.bucketize(confidence, edges)
    points = [(confidence[bins == b].mean(), (predicted == truth)[bins == b].float().mean()) for b in bins.unique()]
    axes[0].plot(*zip(*points, strict=True), "o-", color=color, label=f"{name}: NLL {scores['nll']:.3f}")
    for examples, style in ((test, "-"), (unknown(), "--")):
        entropies, share = stochbn.metrics.entropy_cdf(predictor(examples).entropy)
        axes[1].plot(entropies, share, style, color=color)
axes[0].plot([0.3, 1], [0.3, 1], color="0.8", zorder=0)
axes[0].set(xlabel="confidence", ylabel="accuracy")
axes[0].legend(fontsize=8)
axes[1].plot([], [], "0.5", ls="-", label="known digits")
axes[1].plot([], [], "0.5", ls="--", label="unknown digits")
axes[1].set(xlabel="entropy (nats)", ylabel="share of examples below")
axes[1].legend(fontsize=8)
plt.show()
