"""
The statistics of mini-batches, and the distribution fitted to them
===================================================================

Every mini-batch has a mean and a variance for each channel. Over mini-batches, the mean is close to a Normal variable,
and the variance to a LogNormal one. The paper fits one such pair to each channel, independently
(``kind="factorized"``). The default (``"joint"``) also fits their correlations.

To run it elsewhere, download :download:`digits.py` too, which has the network and its data.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import stochbn

sys.path.append(str(Path.cwd()))
from digits import data, trained

x, y = data()
model = trained(x[:300], y[:300])
batches = [x[:300][torch.randperm(300)] for _ in range(30)]
seen = stochbn.fit(model, batches, kind="empirical").draw(500)
drawn = stochbn.fit(model, batches, kind="factorized").draw(5000)

# %%
# The first two plots compare observed and drawn statistics of one channel of the first layer. The third shows the means
# of two channels. They are correlated, which the factorised distribution leaves out.

figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
for axis, name, label in zip(axes, ("running_mean", "running_var"), ("mean", "variance"), strict=False):
    axis.hist(seen[f"1.{name}"][:, 0], bins=30, density=True, alpha=0.5, label="mini-batches")
    axis.hist(drawn[f"1.{name}"][:, 0], bins=60, density=True, histtype="step", color="k", label="fitted")
    axis.set(xlabel=f"{label} of channel 1", yticks=[])
axes[0].legend(fontsize=8)
joint = stochbn.fit(model, batches, kind="joint").draw(500)
for statistics, label, color in (
    (seen, "mini-batches", "tab:blue"),
    (drawn, "factorized", "0.6"),
    (joint, "joint", "tab:orange"),
):
    axes[2].plot(statistics["1.running_mean"][:500, 0], statistics["1.running_mean"][:500, 3], ".", ms=2, alpha=0.6,
                 color=color, label=label)  # fmt: skip
axes[2].set(xlabel="mean of channel 1", ylabel="mean of channel 4")
axes[2].legend(fontsize=8, markerscale=4)
plt.show()
