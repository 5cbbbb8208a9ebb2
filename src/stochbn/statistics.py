"""Observe the statistics that batch-norm layers see, mini-batch by mini-batch."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Generator, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from stochbn.execution.masks import Masks
from stochbn.execution.ways.channels_last import channels_last_weights
from stochbn.network.calling import Batch, InputsOf, NetworkInput, network_input, refuse_other_axis
from stochbn.network.layers import running_statistics
from stochbn.network.replica import Network, Replica
from stochbn.undisturbed import scope, without_gradients

__all__ = ["NoBatchesError", "Observer", "mini_batches", "observing"]


class NoBatchesError(ValueError):
    """Raised if there is no mini-batch to observe."""


def mini_batches(
    model: nn.Module, batches: Iterable[Batch], batch_size: int | None, inputs: InputsOf = None
) -> Iterator[NetworkInput]:
    """Yield the inputs of the mini-batches to observe.

    Every incoming batch is split into mini-batches of `batch_size` examples, and a smaller remainder is dropped. None
    takes batches as they come, also if their tensors have no common first axis, as with graphs.

    Raises:
        TypeError, ValueError: a `batch_size` that is not a positive whole number, an empty iterable, no incoming
            batch of at least `batch_size` examples, or batches that cannot be split.
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
        taken = network_input(model, batch, inputs)
        if batch_size is None and not taken.shares_axis:
            largest = largest or 1
            yield taken
            continue
        try:
            size = len(taken)
        except ValueError as error:
            raise ValueError(f"{error}; to take such batches as they come, pass batch_size=None") from error
        if size == 0:
            continue
        largest = max(size, largest or 0)
        yield from taken.split(batch_size or size)
    if largest is None:
        raise NoBatchesError(
            "there were no batches to observe: the iterable is empty or already used up; pass a DataLoader, "
            "a list or a fresh generator with at least one batch"
        )
    if batch_size is not None and largest < batch_size:
        raise NoBatchesError(
            f"every incoming batch was smaller than batch_size={batch_size} (the largest has {largest} examples); "
            "pass larger batches, a smaller batch_size, or batch_size=None to take the batches as they come"
        )


@scope
def observing(
    network: Network, training: frozenset[str], random: bool = True, split: bool = False
) -> Generator[Observer, None, None]:
    """A context with an observer of a copy of a network, or of the network itself if it cannot be copied.

    ``SyncBatchNorm`` works as an ordinary batch norm meanwhile, because a mini-batch belongs to one process.

    Args:
        network: the network.
        training: the names of modules that are in training mode; other batch norms are not observed.
        random: whether passes may draw random numbers.
        split: whether mini-batches are parts of larger batches.
    """
    with network.copied(train=True) as replica:
        synchronised = [
            layer
            for layer in replica.model.modules()
            if type(layer) is nn.SyncBatchNorm and "forward" not in vars(layer)
        ]
        for layer in synchronised:
            layer.forward = functools.partial(_BatchNorm.forward, layer)  # type: ignore[method-assign]
        observer = Observer(replica, training, random, split)
        try:
            yield observer
        finally:
            observer.close()
            for layer in synchronised:  # of the network itself, where it cannot be copied
                del layer.forward


class Observer:
    """Sends mini-batches through a network, and returns the statistics that its batch norms saw.

    The network is in training mode, so every batch norm normalises by its mini-batch, deeper layers see normalised
    inputs, and dropout is on. With a momentum of 1, each layer replaces its running statistics by those of the
    mini-batch, which are read from there. So they are what the layer itself computed, for any layout of its input.
    Bessel's correction, with which PyTorch stores the variance, is undone. If a layer's running statistics do not
    follow its momentum, the statistics of its input are observed instead.

    A layer that is called several times in one forward pass gives one observation for each call, and a layer that is
    never called gives none. A layer that cannot update its running statistics in training mode is left out, with a
    warning.

    On a CPU the weights of convolutions are put into channels-last layout, which is faster, if the statistics of the
    first mini-batch stay the same to rounding. This check takes one more pass over it. It is skipped if passes draw
    random numbers. These come from a generator for each mini-batch, so the same mini-batches give the same statistics.

    Args:
        replica: the network to run, which is changed.
        training: the names of modules that are in training mode; other batch norms are not observed.
        random: whether passes may draw random numbers; if not, this is checked in the first pass.
        split: whether mini-batches are parts of larger batches, so that the first axis must be that of the examples.

    Attributes:
        frozen: the layers that were called and do not update their running statistics in training mode.

    Raises:
        ValueError: from a call, for non-finite activations, or for a layer that computes its own statistics and does
            not have its channels on axis 1.
    """

    def __init__(self, replica: Replica, training: frozenset[str], random: bool = True, split: bool = False) -> None:
        self.frozen: list[str] = []
        self._split = split
        self._replica, self._random = replica, random
        replica.modes(training)
        self._layers = {name: layer for name, layer in replica.norms.items() if layer.training}
        self._handles = []
        for name, layer in self._layers.items():
            for statistic in running_statistics(layer):  # values that are not finite would stay: 0 times NaN is NaN
                statistic.detach().nan_to_num_(1.0, 1.0, 1.0)
            layer.momentum = 1.0
            hook = functools.partial(self._record, name)
            self._handles.append(layer.register_forward_hook(hook, with_kwargs=True))
        self._sources: dict[str, str] = {}
        self._calls: dict[str, list[tuple[Tensor, float]]] = {}
        self._counted = _Counted()
        self._masks = Masks(0)
        self._partial = False
        self._asking = False
        self._first = True

    @without_gradients
    def __call__(self, inputs: NetworkInput, number: int) -> dict[str, Tensor]:
        """Observe one mini-batch: return mean and biased variance at each call of every layer, ``[calls, 2, C]``.

        Args:
            inputs: the mini-batch.
            number: the number of mini-batches before it, which seeds its random numbers.
        """
        self._masks.restart(number)
        if not self._first:
            return self._passed(inputs)
        observation = self._passed(inputs)
        self._first = False
        weights = channels_last_weights(self._replica) if inputs.on_cpu and not self._masks.used else {}
        if weights:
            self._replica.exchange(weights)
            try:
                same = _agree(observation, self._passed(inputs))
            except Exception:  # such as from view() on a tensor in channels-last layout
                same = False
            if not same:
                self._replica.restore()
        return observation

    def close(self) -> None:
        """Remove the hooks, and restore the network's own weights."""
        for handle in self._handles:
            handle.remove()
        self._replica.restore()

    def _passed(self, inputs: NetworkInput) -> dict[str, Tensor]:
        self._calls.clear()
        watched = self._random or self._first or self._masks.used
        with self._masks if watched else nullcontext(), self._counted if self._partial else nullcontext():
            output = inputs.call(self._replica.model)
        if self._first and self._split:
            refuse_other_axis(output, inputs)
        return _collect(self._calls)

    def _record(self, name: str, layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._asking:  # a layer within the one that is asked
            return
        if name not in self._sources:
            self._asking = True
            try:
                with self._counted:
                    self._sources[name] = _source(layer, args, kwargs)
            finally:
                self._asking = False
            if self._sources[name] == "frozen":
                self.frozen.append(name)
                warnings.warn(
                    f"batch-norm layer {name!r} does not update its running statistics in training mode; "
                    "it is left at its running averages",
                    stacklevel=2,
                )
        source = self._sources[name]
        if source == "frozen":
            return
        mean, var = running_statistics(layer)
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        numbers = self._counted.pop(mean, x.numel())
        self._partial |= numbers != x.numel()
        values = numbers // mean.numel()
        factor = (values - 1) / values
        if source == "input":
            if x.ndim < 2 or x.shape[1] != len(mean):
                raise ValueError(
                    f"batch-norm layer {name!r} ({type(layer).__name__}) updates its running averages in a way of "
                    f"its own and takes inputs of shape {list(x.shape)}, so its statistics cannot be observed; "
                    "expected averages that follow the layer's momentum, or channels on axis 1"
                )
            var, mean = torch.var_mean(x, [axis for axis in range(x.ndim) if axis != 1], correction=0)
            factor = 1.0
        if var.dtype == torch.float16 and not var.isfinite().all() and bool(x.isfinite().all()):
            raise ValueError(
                f"batch-norm layer {name!r} saw activations that fit float16, and a variance that does not (65504): "
                "use the network in float32 or bfloat16, model.float() or model.bfloat16(), here and for predictions"
            )
        self._calls.setdefault(name, []).append((torch.stack([mean, var]), factor))


class _Counted(TorchFunctionMode):
    """Records how many numbers were last normalised with a running mean; a layer may normalise a part of its input."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers: dict[int, int] = {}

    def pop(self, running_mean: Tensor, default: int) -> int:
        return self._numbers.pop(id(running_mean), default)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("batch_norm", "native_batch_norm"):
            x, *others = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            self._numbers |= {id(other): x.numel() for other in others}
        return func(*args, **kwargs)


def _agree(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether statistics are equal up to rounding, relative to the standard deviation of the activations."""
    if first.keys() != second.keys() or any(len(first[name]) != len(second[name]) for name in first):
        return False
    for name, rows in first.items():
        scale = rows[:, 1].mean(1, keepdim=True)
        apart = (rows - second[name]).abs()
        if (apart[:, 0] > 1e-4 * scale.sqrt()).any() or (apart[:, 1] > 1e-4 * (scale + rows[:, 1])).any():
            return False
    return True


def _source(layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Find out where to read a layer's statistics, by calling it again with two settings of its running statistics.

    ``averages`` if it replaces both by the same values, ``frozen`` if it changes neither, otherwise ``input``.
    """

    def copied(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else value

    before = [statistic.clone() for statistic in running_statistics(layer)]
    marks, after = (0.25, 0.75), []
    for mark in marks:
        for statistic in running_statistics(layer):
            statistic.fill_(mark)
        layer.forward(*map(copied, args), **{name: copied(value) for name, value in kwargs.items()})
        after.append(torch.stack(running_statistics(layer)))
    for statistic, old in zip(running_statistics(layer), before, strict=True):
        statistic.copy_(old)
    if torch.equal(*after):
        return "averages"
    return "frozen" if all(bool((a == mark).all()) for a, mark in zip(after, marks, strict=True)) else "input"


def _collect(calls: dict[str, list[tuple[Tensor, float]]]) -> dict[str, Tensor]:
    """Bring the recorded statistics to the CPU in one transfer, the variances times their factors."""
    if not calls:
        return {}
    flat = torch.cat([statistics.flatten() for made in calls.values() for statistics, _ in made]).cpu().double()
    finite = bool(flat.isfinite().all())
    observation, start = {}, 0
    for name, made in calls.items():
        rows = []
        for statistics, factor in made:
            row = flat[start : start + statistics.numel()].view_as(statistics).clone()
            start += statistics.numel()
            if not finite and not row.isfinite().all():
                raise ValueError(
                    f"batch-norm layer {name!r} saw non-finite activations (NaN or infinity) in this mini-batch; "
                    "check the input data and the network's weights for NaN and infinity"
                )
            row[1] *= factor
            rows.append(row)
        observation[name] = torch.stack(rows)
    return observation
