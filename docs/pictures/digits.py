"""The network and data of the figures."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn


def data() -> tuple[Tensor, Tensor]:
    """The digits 0 to 4 as images ``[N, 1, 8, 8]``, and their labels."""
    digits = load_digits()
    known = digits.target < 5
    return torch.tensor(digits.images[known], dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target[known])


def unknown() -> Tensor:
    """The digits 5 to 9, which the network has never seen."""
    digits = load_digits()
    return torch.tensor(digits.images[digits.target > 4], dtype=torch.float32)[:, None] / 16


def trained(x: Tensor, y: Tensor, epochs: int = 25) -> nn.Module:
    """A network with two batch norms, trained on ``x`` and ``y``; one thread, so that results repeat."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(288, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 5),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(16):
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()
