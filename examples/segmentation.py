"""Segmentation of a large image in tiles, with a map of the uncertainty.

The images are generated: discs and squares on noise. The network takes tiles of 32 x 32. An image of 96 x 96 is
predicted in overlapping tiles, whose probabilities are averaged. The edges of the shapes have the label 255, which is
ignored. Run: python examples/segmentation.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import stochbn

TILE, STEP = 32, 16


def picture(size: int, shapes: int) -> tuple[Tensor, Tensor]:
    """A picture ``[1, S, S]`` and its labels ``[S, S]``: 0 background, 1 discs, 2 squares, 255 at their margins."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    labels = torch.zeros(size, size, dtype=torch.long)
    for number in range(shapes):
        centre, radius = torch.randint(size, (2,)), int(torch.randint(4, 8, ()))
        across, down = (rows - centre[0]).abs(), (columns - centre[1]).abs()
        distance = (across**2 + down**2).sqrt() if number % 2 else torch.maximum(across, down)
        labels[distance <= radius] = 1 if number % 2 else 2
        labels[(distance - radius).abs() < 0.7] = 255
    shade = torch.where(labels == 0, 0.0, 0.7)
    return (shade + 0.35 * torch.randn(size, size))[None], labels


def tiles(x: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
    """The overlapping tiles of a picture ``[1, S, S]``, and where they are."""
    places = [
        (row, column)
        for row in range(0, x.shape[1] - TILE + 1, STEP)
        for column in range(0, x.shape[2] - TILE + 1, STEP)
    ]
    return torch.stack([x[:, row : row + TILE, column : column + TILE] for row, column in places]), places


def blended(probs: Tensor, places: list[tuple[int, int]], size: int) -> Tensor:
    """Probabilities ``[K, S, S]`` of a picture from those of its tiles ``[T, K, 32, 32]``, whose middle counts most."""
    ramp = 1 - (torch.arange(TILE) - (TILE - 1) / 2).abs() / TILE
    weight = ramp[:, None] * ramp
    total, weights = torch.zeros(probs.shape[1], size, size), torch.zeros(size, size)
    for tile, (row, column) in zip(probs, places, strict=True):
        total[:, row : row + TILE, column : column + TILE] += weight * tile
        weights[row : row + TILE, column : column + TILE] += weight
    return total / weights


def main() -> dict[str, float]:
    """Train, fit, predict a large picture in tiles, and print a table."""
    torch.manual_seed(0)
    train = [picture(TILE, 3) for _ in range(64)]
    x, y = torch.stack([one for one, _ in train]), torch.stack([labels for _, labels in train])
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=2, dilation=2), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=4, dilation=4), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 3, 1),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(25):
        for batch in torch.randperm(len(x)).split(8):
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch], ignore_index=255)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()

    posterior = stochbn.fit(model, [x], batch_size=8)
    large, truth = picture(96, 14)
    pieces, places = tiles(large)
    results = {}
    print(f"{'':8} {'error':>7} {'NLL':>8} {'ECE':>7}   entropy where right, and where wrong (nats)")
    for name, predictor in (("plain", stochbn.Predictive(model)), ("SBN", stochbn.Predictive(model, posterior))):
        probs = blended(predictor(pieces).probs, places, 96)[None]
        scores = stochbn.metrics.evaluate(probs, truth[None], ignore_index=255)
        entropy = torch.special.entr(probs[0]).sum(0)
        wrong = (probs[0].argmax(0) != truth) & (truth != 255)
        results[name] = scores["nll"]
        print(
            f"{name:8} {scores['error']:6.2f}% {scores['nll']:8.4f} {scores['ece']:7.4f}   "
            f"{entropy[~wrong & (truth != 255)].mean():.3f}, {entropy[wrong].mean():.3f}"
        )
    return results


if __name__ == "__main__":
    main()
