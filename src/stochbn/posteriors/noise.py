"""Standard normal numbers: independent, in antithetic pairs, or from Sobol points."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["SOBOL", "TOGETHER", "normals", "sobol"]

SOBOL = 64
"""The number of leading directions with Sobol points; for the others antithetic pairs suffice."""
TOGETHER = 8
"""The number of quasi-random draws made at a time. Reading the directions only once saves most of the time."""


def normals(size: int, generator: torch.Generator | None, device: torch.device, antithetic: bool) -> Iterator[Tensor]:
    """Yield standard normal ``[1, size]`` in float64, without end, or `TOGETHER` rows in antithetic pairs.

    Independent draws take no more from the generator than they need, so that the next call continues them.
    """
    while True:
        rows = TOGETHER // 2 if antithetic else 1
        z = torch.randn(rows, size, generator=generator, device=device, dtype=torch.float64)
        yield torch.stack([z, -z], 1).view(TOGETHER, size) if antithetic else z


def sobol(dimensions: int, generator: torch.Generator | None, device: torch.device) -> Iterator[Tensor]:
    """Yield standard normal points of a scrambled Sobol sequence without end, ``[TOGETHER, dimensions]`` in float64."""
    seed = int(torch.randint(2**31, (), generator=generator, device=device).item())
    engine = _Scrambled(dimensions, scramble=True, seed=seed)  # type: ignore[no-untyped-call]
    while True:
        # Multiples of 2^-30 include 0, whose normal quantile is infinite, so the middle of each interval is taken.
        yield torch.special.ndtri(engine.draw(TOGETHER, dtype=torch.float64) + 2.0**-31).to(device)


class _Scrambled(torch.quasirandom.SobolEngine):
    """PyTorch's scrambled Sobol sequence, with a scrambling that takes a fifth of the time.

    Scrambling multiplies the bits of the direction numbers by random lower triangular matrices, modulo 2. PyTorch's own
    would take much of a prediction with a small network. Bits are written from the most significant one.
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
    """The bits of the direction numbers without scrambling, ``[dimensions, 30, 30]``."""
    engine = torch.quasirandom.SobolEngine(dimensions)  # type: ignore[no-untyped-call]
    return (engine.sobolstate[:, :, None] >> torch.arange(engine.MAXBIT - 1, -1, -1) & 1).float()
