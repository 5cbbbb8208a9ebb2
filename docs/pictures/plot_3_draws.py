"""
Draws for one ambiguous digit, and how many are needed
======================================================

A prediction is the mean of the network's probabilities over draws of the statistics. Quasi-random draws are spread
evenly, so their mean converges faster than that of independent draws. Sampling stops for an example as soon as its mean
is accurate enough.

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
posterior = stochbn.fit(model, [x[:300][torch.randperm(300)] for _ in range(30)])
test = x[300:]
digit = test[stochbn.Predictive(model)(test).entropy.argmax()][None]

# %%
# The probability of the most likely class in each draw, and the running mean of independent and of quasi-random draws.

predictive = stochbn.Predictive(model, posterior, 512, keep_draws=True)
every = predictive(digit, generator=torch.Generator().manual_seed(1)).log_probs.exp()[:, 0]
k = every.mean(0).argmax()
copy = stochbn.Predictive(model, posterior, 64, keep_draws=True)
counts = torch.arange(1, 65)
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", width_ratios=[1, 1.6])
axes[0].hist(every[:, k], bins=30, color="tab:blue")
axes[0].axvline(stochbn.Predictive(model)(digit).probs[0, k].item(), color="k", label="plain network")
axes[0].axvline(every[:, k].mean().item(), color="tab:red", label="mean of draws")
axes[0].set(xlabel=f"probability of class {k}", ylabel="draws")
axes[0].legend(fontsize=8)
for seed in range(6):
    generator = torch.Generator().manual_seed(seed)
    quasi = copy(digit, generator=generator).log_probs.exp()[:, 0, k]
    shuffled = every[torch.randperm(512, generator=generator)[:64], k]
    axes[1].plot(counts, shuffled.cumsum(0) / counts, color="0.7", lw=1, label=None if seed else "independent draws")
    axes[1].plot(
        counts, quasi.cumsum(0) / counts, color="tab:orange", lw=1, label=None if seed else "quasi-random draws"
    )
axes[1].axhline(every[:, k].mean().item(), color="tab:red", lw=1)
axes[1].set(xlabel="draws averaged", ylabel="mean probability", xscale="log")
axes[1].legend(fontsize=8)
plt.show()
