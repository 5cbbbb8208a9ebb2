"""The residual variance of observed numbers, beyond that of draws and network, fitted on held-out data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stochbn.tasks.draw_scores import DrawScore

__all__ = ["LEAST", "PLACES", "Moments", "Residual", "fit_residual"]

LEAST = 20
"""The smallest number of held-out examples for a residual variance."""
PLACES = 32
"""The number of pixels of a dense output that are used; chosen at random, the same for all examples."""
SMALLEST = 1e-10
"""The smallest variance, as a share of the mean squared error."""


@dataclass(frozen=True, eq=False)
class Residual:
    """Variance of an observation about the mean over draws, as ``posterior.residual_variance``.

    It is ``a v + c n + b``, with the variance v over draws, and n, the mean of the network's own variances.

    Attributes:
        parts: a, c and b for each of the D numbers on axis 1 of the network's output, not negative, ``[3, D]`` in
            float64.
        examples: the number of held-out examples that they were fitted to.
        batch_size: the mini-batch size of the posterior's noise at that time.
        centre: sums that identify the posterior's centre at that time.
        adapted: whether the posterior was adapted to other data afterwards.

    Raises:
        ValueError: a field is invalid; the message names it.
    """

    parts: Tensor
    examples: int
    batch_size: float | None
    centre: tuple[float, float]
    adapted: bool = False

    def __post_init__(self) -> None:
        parts = self.parts
        if not isinstance(parts, Tensor) or parts.dtype != torch.float64 or parts.ndim != 2 or len(parts) != 3:
            raise ValueError("the parts of a residual variance must be float64 [3, D]")
        if not parts.numel() or not bool(parts.isfinite().all()) or bool((parts < 0).any()):
            raise ValueError("the parts of a residual variance must be finite and not negative")
        if type(self.examples) is not int or self.examples < 1 or type(self.adapted) is not bool:
            raise ValueError("a residual variance must have a number of examples, and tell whether it was adapted")
        size = self.batch_size
        if len(self.centre) != 2 or not all(isinstance(one, float) and math.isfinite(one) for one in self.centre):
            raise ValueError(f"the centre of a residual variance must be two numbers, got {self.centre!r:.40}")
        if size is not None and (isinstance(size, bool) or not isinstance(size, (int, float)) or not size > 0):
            raise ValueError(f"the batch size of a residual variance must be positive or None, got {size!r:.40}")

    def total(self, draws: Tensor, noise: Tensor | None) -> Tensor:
        """Compute the variance of an observation, of the shape of `draws`.

        Args:
            draws: the variance over draws, ``[N]`` or ``[N, D, ...]``.
            noise: the network's own variance, of the same shape; None if there is none.

        Raises:
            ValueError: the number of predictions differs from the D that it was fitted to.
        """
        count = self.parts.shape[1]
        if (draws.shape[1] if draws.ndim > 1 else 1) != count:
            raise ValueError(
                f"the residual variance was fitted to {count} numbers for each example, and the network gives "
                f"{list(draws.shape)}: calibrate again"
            )
        a, c, b = self.parts.to(draws).reshape(3, *([1, count] if draws.ndim > 1 else [1]), *[1] * (draws.ndim - 2))
        found: Tensor = a * draws + b
        return found if noise is None else found + c * noise

    def after_adapting(self, centre: tuple[float, float]) -> Residual:
        """Return the same for the adapted posterior with these sums, marked as fitted on other data."""
        return replace(self, centre=centre, adapted=True)

    def tensors(self) -> dict[str, Tensor]:
        """`parts`, for a file."""
        return {"parts": self.parts.cpu().contiguous()}

    def description(self) -> dict[str, Any]:
        """All other fields, for a file."""
        return {name: getattr(self, name) for name in ("examples", "batch_size", "centre", "adapted")}

    @classmethod
    def from_file(cls, tensors: Mapping[str, Tensor], about: Any) -> Residual:
        """Read it from a file.

        Raises:
            ValueError: a field is missing or invalid.
        """
        wanted = {"examples", "batch_size", "centre", "adapted"}
        if not isinstance(about, dict) or about.keys() != wanted or tensors.keys() != {"parts"}:
            raise ValueError(f"a residual variance must have parts, {', '.join(sorted(wanted))}, got {about!r:.60}")
        if not isinstance(about["centre"], list):
            raise ValueError(f"the centre of a residual variance must be two numbers, got {about['centre']!r:.40}")
        return cls(tensors["parts"], **{**about, "centre": tuple(about["centre"])})


class Moments(DrawScore):
    """Mean and variance over draws, the mean of the network's own variances, and the true numbers.

    `fit_residual` fits a residual variance to these.
    """

    name = "NLL"
    unit = "nats"

    def __init__(self, temperatures: Tensor) -> None:
        super().__init__(temperatures)
        self._squares: Tensor | None = None

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add the numbers (and log-variances) ``[N, 1 or 2, ...]`` of a draw."""
        values = logits.double()
        if values.shape[1] == 2:
            values = torch.stack([values[:, 0], values[:, 1].exp()], 1)
        self.draws += 1
        if self.total is None or self._squares is None:
            self.total, self._squares = values, torch.zeros_like(values[:, 0])
            return
        change = values - self.total
        self.total = self.total + change / self.draws
        self._squares = self._squares + change[:, 0] * (values[:, 0] - self.total[:, 0])

    def of_each(self, labels: Tensor) -> Tensor:
        """Means, variances over draws and of the network, and true numbers of P pixels, ``[4, N, D, P]`` in float64.

        Raises:
            ValueError: the numbers of true values and predictions differ, or some are not finite.
        """
        assert self.total is not None
        assert self._squares is not None
        mean, variance = self.total[:, 0], self._squares / max(self.draws - 1, 1)
        noise = self.total[:, 1] if self.total.shape[1] == 2 else torch.zeros_like(mean)
        if labels.numel() != mean.numel():
            raise ValueError(f"expected targets {list(mean.shape)}, as the network predicts, got {list(labels.shape)}")
        truth = labels.to(mean).reshape(mean.shape)
        if not truth.isfinite().all():
            raise ValueError("held-out targets have NaN or infinity; leave such examples out")
        numbers = mean.shape[1] if mean.ndim > 1 else 1
        found = torch.stack([mean, variance, noise, truth]).reshape(4, len(mean), numbers, -1)
        places = found.shape[3]
        if places > PLACES:
            found = found[
                ..., torch.randperm(places, generator=torch.Generator().manual_seed(0))[:PLACES].to(mean.device)
            ]
        return found.cpu()


def fit_residual(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Fit the residual variance by maximum likelihood, for Normal distributions about the means.

    Args:
        moments: see `Moments`, ``[4, N, D, P]``.

    Returns:
        The parts a, c and b of `Residual`, ``[3, D]``; and the negative log-likelihood of each example, summed over its
        numbers, ``[N]`` in nats.

    Raises:
        ValueError: there are too few examples.
    """
    mean, draws, noise, truth = moments.double()
    if len(mean) < LEAST:
        raise ValueError(f"a residual variance needs at least {LEAST} held-out examples, got {len(mean)}")
    squares = (truth - mean).square()
    scale = squares.mean((0, 2)).clamp(min=torch.finfo(torch.float32).tiny)[:, None]  # [D, 1]
    known = torch.stack([draws, noise, scale.expand_as(draws)])  # [3, N, D, P], with factors about 1
    used = torch.stack([draws.amax((0, 2)) > 0, noise.amax((0, 2)) > 0, torch.ones(draws.shape[1], dtype=torch.bool)])

    def losses(logs: Tensor) -> Tensor:
        factors = torch.where(used, logs.exp(), 0.0)[:, None, :, None]
        variance = (factors * known).sum(0) + SMALLEST * scale
        each: Tensor = (squares / variance + variance.log() + math.log(2 * math.pi)) / 2
        return each

    logs = torch.zeros(3, draws.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logs], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = losses(logs).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        parts = torch.where(used, logs.exp(), torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)[:, None])
        parts[2] = (parts[2] + SMALLEST) * scale[:, 0]
        return parts, losses(logs).sum((1, 2))
