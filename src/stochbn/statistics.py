"""Observing the statistics that batch-norm layers see, mini-batch by mini-batch, and their moments."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stochbn.calling import Batch, call, length, modes, network_input, split
from stochbn.layers import batch_norms, running_statistics

__all__ = ["Moments", "mini_batches", "observing"]

Observation = dict[str, Tensor]
"""For every layer that was called, ``[calls, 2, C]``: mean and biased variance at each call, float64."""


@dataclass(frozen=True)
class Moments:
    """The number of observations, their mean and their sum of squared deviations from it, in float64."""

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, observations: Tensor) -> Moments:
        """The moments over the first axis of ``[n, ...]``."""
        observations = observations.double()
        mean = observations.mean(0)
        return cls(len(observations), mean, (observations - mean).square().sum(0))

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of observations together.

        The parallel update of Chan, Golub and LeVeque (1983): it serves to add a mini-batch and to join processes.
        """
        count = self.count + other.count
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * (other.count / count),
            self.squares + other.squares + delta.square() * (self.count * other.count / count),
        )

    @property
    def variance(self) -> Tensor:
        """The unbiased variance of the observations; 0 for a single one."""
        return self.squares / max(self.count - 1, 1)


def mini_batches(model: nn.Module, batches: Iterable[Batch], batch_size: int | None) -> Iterator[Any]:
    """The inputs of the mini-batches whose statistics are to be observed.

    Every incoming batch is split into pieces of `batch_size` objects, and its remainder is dropped;
    None takes the batches as they come.

    Raises:
        TypeError, ValueError: a `batch_size` that is not a positive whole number, an empty iterable, or
            no incoming batch of at least `batch_size` objects.
    """
    if batch_size is not None and (not isinstance(batch_size, int) or isinstance(batch_size, bool)):
        raise TypeError(f"batch_size must be a whole number or None, got {batch_size!r}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise TypeError(
            f"expected an iterable of batches, such as a DataLoader, got {type(batches).__name__}; "
            "pass [tensor] to treat one tensor as a single batch"
        )
    largest = None
    for batch in batches:
        inputs = network_input(model, batch)
        size = length(inputs)
        if size == 0:
            continue
        largest = max(size, largest or 0)
        yield from split(inputs, batch_size or size)
    if largest is None:
        raise ValueError(
            "there were no batches to observe: the iterable is empty or already used up; pass a DataLoader, "
            "a list or a fresh generator with at least one batch"
        )
    if batch_size is not None and largest < batch_size:
        raise ValueError(
            f"every incoming batch was smaller than batch_size={batch_size} (the largest has {largest} objects); "
            "pass larger batches, a smaller batch_size, or batch_size=None to take the batches as they come"
        )


@contextmanager
def observing(model: nn.Module) -> Iterator[Callable[[Any], Observation]]:
    """A function that sends one mini-batch through the network and returns the statistics its batch norms saw.

    The network runs in training mode, so that every batch norm normalises by its mini-batch and deeper layers see
    batch-normalised inputs (and dropout, if any, is on, as when the running averages were made). It runs on copies of
    its buffers. Each layer is told to replace its copied running averages by the statistics of the mini-batch, and
    these are read from there: they are what the layer itself computed, whatever the layout of its input and whatever
    else a subclass does. On leaving, also by an exception, modes, momentum and hooks are as before; running averages,
    ``num_batches_tracked`` and all other buffers were never touched, and no gradients are made.

    A layer that is called several times in one forward pass gives one observation per call; one that is never
    called gives none. A layer that does not update its running averages in training mode (a frozen one) has no
    mini-batch statistics: it is left out, with a warning.

    Raises:
        ValueError: from the function, for non-finite activations; on entry, as `batch_norms`.
    """
    layers = batch_norms(model)
    originals = {name: tuple(t.clone() for t in running_statistics(layer)) for name, layer in layers.items()}
    copies: dict[int, Tensor] = {}
    buffers = {
        f"{prefix}.{name}" if prefix else name: copies.setdefault(id(buffer), buffer.clone())
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
    }
    calls: dict[str, list[tuple[Tensor, int]]] = {}
    frozen: set[str] = set()
    checked: set[str] = set()

    def recorder(name: str) -> Callable[..., None]:
        def record(layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            mean, var = running_statistics(layer)
            if name not in checked:
                checked.add(name)
                unchanged = torch.equal(mean, originals[name][0]) and torch.equal(var, originals[name][1])
                if unchanged and not _updates(layer, args, kwargs):
                    frozen.add(name)
                    warnings.warn(
                        f"batch-norm layer {name!r} does not update its running statistics in training mode; "
                        "it is left at its running averages",
                        stacklevel=2,
                    )
            if name not in frozen:
                values = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)).numel() // mean.numel()
                calls.setdefault(name, []).append((torch.stack([mean, var]), values))

        return record

    def observe(inputs: Any) -> Observation:
        calls.clear()
        call(model, buffers, inputs)
        return _collect(calls)

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(modes(model, lambda module: True))
        for name, layer in layers.items():
            stack.callback(setattr, layer, "momentum", layer.momentum)
            layer.momentum = 1.0
            stack.callback(layer.register_forward_hook(recorder(name), with_kwargs=True).remove)
        yield observe


def _updates(layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a layer replaces its running averages when it is called, asked of other ones than it has."""
    statistics = running_statistics(layer)
    before = [t.clone() for t in statistics]
    for t in statistics:
        t.copy_((t == 0).to(t))
    marks = [t.clone() for t in statistics]
    layer.forward(*args, **kwargs)
    changed = not all(torch.equal(t, mark) for t, mark in zip(statistics, marks, strict=True))
    for t, old in zip(statistics, before, strict=True):
        t.copy_(old)
    return changed


def _collect(calls: dict[str, list[tuple[Tensor, int]]]) -> Observation:
    """Bring the recorded statistics to the CPU in one transfer and undo Bessel's correction."""
    if not calls:
        return {}
    flat = torch.cat([statistics.flatten() for made in calls.values() for statistics, _ in made]).cpu().double()
    observation, start = {}, 0
    for name, made in calls.items():
        rows = []
        for statistics, values in made:
            row = flat[start : start + statistics.numel()].view_as(statistics).clone()
            start += statistics.numel()
            if not row.isfinite().all():
                raise ValueError(
                    f"batch-norm layer {name!r} saw non-finite activations (NaN or infinity) in this mini-batch; "
                    "check the input data and the network's weights for NaN and infinity"
                )
            row[1] *= (values - 1) / values
            rows.append(row)
        observation[name] = torch.stack(rows)
    return observation
