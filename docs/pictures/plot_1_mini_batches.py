"""
How the mini-batch changes a prediction
=======================================

In training, batch norm normalises an example with the statistics of its mini-batch. So the prediction for a digit
depends on the digits beside it. The figure shows the probabilities that 40 mini-batches of 16 give to three digits. For
a clear digit they agree, for an ambiguous one they do not. In evaluation mode this is switched off, and there is one
prediction for each digit. stochbn draws statistics like those of mini-batches, and averages the predictions.

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
model = trained(x[:300], y[:300])
exact = stochbn.Exact(model, [x[:300][torch.randperm(300)] for _ in range(3)], draws=40)

# %%
# The clearest and the least clear digit of the known classes, and a digit of an unknown class.

test = x[300:]
entropy = stochbn.Predictive(model)(test).entropy
others = unknown()
shown = torch.stack([test[entropy.argmin()], test[entropy.argmax()], others[0]])
probs = exact(shown, keep_draws=True).log_probs.exp()
plain = stochbn.Predictive(model)(shown).probs

figure, axes = plt.subplots(2, 3, figsize=(9, 5.2), height_ratios=[1, 1.6], layout="constrained")
for column, name in enumerate(("clear", "ambiguous", "unknown: none of 0 to 4")):
    axes[0, column].imshow(shown[column, 0], cmap="gray_r")
    axes[0, column].set_axis_off()
    axes[0, column].set_title(name)
    for draw in probs[:, column]:
        axes[1, column].plot(draw, color="tab:blue", alpha=0.25, lw=1)
    axes[1, column].plot([], [], color="tab:blue", label="with a mini-batch")
    axes[1, column].plot(plain[column], "ko", label="evaluation mode")
    axes[1, column].set(xticks=range(5), ylim=(-0.03, 1.03), xlabel="class")
axes[1, 0].set_ylabel("probability")
axes[1, 0].legend(fontsize=8, loc="center right")
plt.show()
