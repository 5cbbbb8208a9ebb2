"""Standard normal numbers: independent ones, antithetic pairs, and points that are spread evenly."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["SOBOL", "TOGETHER", "normals", "sobol"]

SOBOL = 64
"""Leading directions that quasi-random draws are spread along; pairs of opposite noise serve the others well enough."""
TOGETHER = 8
"""Quasi-random draws that are made at a time: reading the directions once for all of them saves most of the time."""


def normals(size: int, generator: torch.Generator | None, device: torch.device, antithetic: bool) -> Iterator[Tensor]:
    """Standard normal ``[1, size]`` in float64, without end, or `TOGETHER` rows of which odd ones negate those before.

    Independent draws take from the generator what they need and no more, so that the next call continues them.
    """
    while True:
        rows = TOGETHER // 2 if antithetic else 1
        z = torch.randn(rows, size, generator=generator, device=device, dtype=torch.float64)
        yield torch.stack([z, -z], 1).view(TOGETHER, size) if antithetic else z


def sobol(dimensions: int, generator: torch.Generator | None, device: torch.device) -> Iterator[Tensor]:
    """Standard normal points ``[TOGETHER, dimensions]`` in float64, without end, from a scrambled Sobol sequence."""
    seed = int(torch.randint(2**31, (), generator=generator, device=device).item())
    engine = _Scrambled(dimensions, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
    while True:
        # Multiples of 2^-30, of which 0 would be infinitely far out: the middle of each interval instead.
        yield torch.special.ndtri(engine.draw(TOGETHER, dtype=torch.float64) + 2.0**-31).to(device)


class _Scrambled(torch.quasirandom.SobolEngine):
    """PyTorch's scrambled Sobol sequence, of which the scrambling takes a fifth of the time.

    It multiplies the directions' bits by random lower triangular matrices, modulo 2, and is an eighth of a prediction
    with a small network. Bits are written from the most significant one.
    """

    def _scramble(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        powers = 2 ** torch.arange(self.MAXBIT)
        self.shift = torch.randint(2, (self.dimension, self.MAXBIT), generator=generator) @ powers
        shape = self.dimension, self.MAXBIT, self.MAXBIT
        lower = torch.randint(2, shape, generator=generator, dtype=torch.float32).tril_()
        lower.diagonal(0, -2, -1).fill_(1)
        bits = torch.bmm(_bits(self.dimension), lower.transpose(1, 2)).int() & 1
        self.sobolstate.copy_(bits.double() @ powers.flip(0).double())


@functools.cache
def _bits(dimensions: int) -> Tensor:
    """``[dimensions, 30, 30]``: the bits of the direction numbers of the sequence without scrambling."""
    engine = torch.quasirandom.SobolEngine(dimensions)  # type: ignore[no-untyped-call]
    return (engine.sobolstate[:, :, None] >> torch.arange(engine.MAXBIT - 1, -1, -1) & 1).float()
