"""Make an ensemble from one trained network: snapshots along a cyclic learning rate."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from stochbn.augment import Augment, Views
from stochbn.execution.masks import Masks
from stochbn.files import check_folder, read_tensors, write_tensors
from stochbn.fitting import fit
from stochbn.network.calling import Batch, InputsOf, network_input
from stochbn.network.copying import put_in_training
from stochbn.network.fingerprint import Fingerprint
from stochbn.network.replica import Network
from stochbn.posteriors import Posterior, load
from stochbn.posteriors.checks import check_whole
from stochbn.predictive.ensemble import Ensemble
from stochbn.predictive.predictive import Predictive, Predictor
from stochbn.undisturbed import undisturbed

__all__ = ["snapshots"]

FORMAT = "stochbn.snapshot/1"
LOWEST = 0.01
"""The learning rate at the end of a cycle, as a fraction of that at its beginning."""


def snapshots(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Callable[[Any, Any], Tensor],
    *,
    count: int = 3,
    epochs: int = 2,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = Adam,
    member: Callable[[nn.Module, Posterior], Predictor] = Predictive,
    batch_size: int | None = 16,
    kind: str = "joint",
    inputs: InputsOf = None,
    augment: Augment | None = None,
    folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Ensemble:
    """Train a network further along a cyclic learning rate, and make an ensemble of its snapshots.

    A copy of the network is trained for `count` cycles. In each cycle, the learning rate falls along a cosine from that
    of the optimizer to a hundredth of it. At the end of a cycle the network is kept, with its own posterior. So each
    member costs `epochs` passes over the data, where a network of a Deep Ensemble costs a whole training. The network
    itself does not change. It can be a member too:
    ``Ensemble([Predictive(model, posterior), *ensemble.members])``.

    Args:
        model: a trained network.
        batches: its training data, read once for each epoch, such as a DataLoader that shuffles: batches of
            ``(input, labels, ...)`` or mappings with ``labels``. If they, or their sampler, have ``set_epoch``, as a
            `torch.utils.data.DistributedSampler` has, it is called with the number of each pass. So a call that
            continues after stored snapshots sees the same order as one that was not stopped.
        loss: what training minimises, as a function of the network's output and the labels, such as
            ``torch.nn.functional.cross_entropy``.
        count: the number of snapshots.
        epochs: passes over `batches` in a cycle.
        optimizer: makes the optimizer of a cycle from the parameters. Its learning rate is the highest one. The default
            is Adam with 1e-3. For other networks, use the optimizer of training with a high learning rate, such as
            ``lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)``.
        member: makes a predictive from a snapshot and its posterior, such as
            ``functools.partial(stochbn.Predictive, augment=images)``.
        batch_size: of the mini-batches that posteriors are fitted to, as for `stochbn.fit`.
        kind: the kind of posterior, as for `stochbn.fit`.
        inputs: what the network takes of a batch, as for `stochbn.fit`.
        augment: the augmentation of mini-batches, in training and in fitting; None if the loader augments.
        folder: where each snapshot and its posterior are written as soon as they are made. A call with the same
            network and settings continues after the snapshots in it.
        seed: the seed of augmentations and dropout masks.
        progress: called after each step with the number of steps done and of all.

    Returns:
        The ensemble, in the order of the cycles.

    Raises:
        TypeError, ValueError: a wrong argument, a network that cannot be copied, batches without labels or that can be
            gone through only once, or a loss that is not finite.
        OSError: the folder cannot be written.

    Source: Huang et al., 2017, "Snapshot ensembles"; Garipov et al., 2018, "Fast geometric ensembling".
    """
    for name, value in (("count", count), ("epochs", epochs)):
        check_whole(name, value, 1)
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise TypeError(f"expected an iterable of batches, such as a DataLoader, got {type(batches).__name__}")
    if isinstance(batches, Iterator):
        raise ValueError("batches can be gone through only once, and training does so for each epoch; pass a list or "
                         "a DataLoader")  # fmt: skip
    place = None if folder is None else Path(folder)
    steps = len(batches) if isinstance(batches, Sized) else sum(1 for _ in batches)
    if not steps:
        raise ValueError("there are no batches to train on: the iterable is empty")
    current = _copy(model)
    about = {"epochs": epochs, "seed": seed, "of": Fingerprint.of(model).description()}
    if place is not None:
        check_folder(place, *(file.name for number in range(count) for file in _files(place, number)))
        place.mkdir(parents=True, exist_ok=True)
    members = []
    for number in range(count):
        files = None if place is None else _files(place, number)
        if files is not None and all(file.exists() for file in files):
            current, posterior = _restored(current, *files, about)
        else:
            done = number * epochs * steps

            def report(step: int, done: int = done) -> None:
                progress(done + step, count * epochs * steps)

            cycle = _Cycle(current, loss, inputs, augment, seed + number, epochs * steps, report)
            first = number * (epochs + 1)
            cycle.train(batches, range(first, first + epochs), optimizer)
            _set_pass(batches, first + epochs)
            posterior = fit(current, batches, batch_size, kind, inputs=inputs, augment=augment, reference=False)
            if files is not None:
                posterior.save(files[1])
                _store(current, files[0], about)
        members.append(member(current, posterior))
        current = _copy(current)
    return Ensemble(members)


class _Cycle:
    """One cycle of the learning rate."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        inputs: InputsOf,
        augment: Augment | None,
        seed: int,
        steps: int,
        report: Callable[[int], None],
    ) -> None:
        self._model, self._loss, self._inputs, self._augment = model, loss, inputs, augment
        self._seed, self._steps, self._report = seed, steps, report

    def train(
        self, batches: Iterable[Batch], passes: Iterable[int], optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    ) -> None:
        """Train the network for one cycle of these passes over the data; it ends in evaluation mode."""
        model, step = self._model, 0
        put_in_training(model)
        optimiser = optimizer([p for p in model.parameters() if p.requires_grad])
        highest = [group["lr"] for group in optimiser.param_groups]
        for number in passes:
            _set_pass(batches, number)
            for batch in batches:
                # A loader may yield fewer or more batches than its length; the rate stays in its range.
                share = LOWEST + (1 - LOWEST) * (1 + math.cos(math.pi * min(step / self._steps, 1))) / 2
                for group, rate in zip(optimiser.param_groups, highest, strict=True):
                    group["lr"] = rate * share
                self._step(batch, optimiser, step)
                step += 1
                self._report(min(step, self._steps))
        model.eval()

    @undisturbed
    def _step(self, batch: Batch, optimiser: Optimizer, step: int) -> None:
        inputs, number = network_input(self._model, batch, self._inputs), 7919 * self._seed + step
        if self._augment is not None:
            views = Views(self._augment, len(inputs.first), number, clean=False)
            inputs = inputs.with_first(lambda x: views(x, 0))
        with torch.inference_mode(False), torch.enable_grad():
            with Masks(number):
                value = self._loss(inputs.call(self._model), _labels(batch, inputs.device))
            if not isinstance(value, Tensor) or value.ndim:
                shown = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"expected a loss that gives a tensor without axes, got {shown}")
            if not bool(value.isfinite()):
                raise ValueError(
                    f"the loss is {value.item()} in step {step + 1} of a cycle; check the data, or pass an optimizer "
                    "with a lower learning rate"
                )
            optimiser.zero_grad()
            torch.autograd.backward(value)
            optimiser.step()
            torch.clear_autocast_cache()  # or the next step, within autocast, would use weights from before this one


def _set_pass(batches: Iterable[Batch], number: int) -> None:
    """Call ``set_epoch`` of the batches, or of their sampler, if they have it."""
    for one in (batches, getattr(batches, "sampler", None)):
        if callable(set_epoch := getattr(one, "set_epoch", None)):
            set_epoch(number)
            return


def _labels(batch: Batch, device: torch.device) -> Any:
    """The labels of a batch, on the network's device where they are a tensor."""
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        labels = batch[1]
    elif isinstance(batch, Mapping) and "labels" in batch:
        labels = batch["labels"]
    else:
        raise TypeError(
            f"expected batches of (input, labels) or mappings with 'labels', got a {type(batch).__name__} without them"
        )
    return labels.to(device) if isinstance(labels, Tensor) else labels


def _copy(model: nn.Module) -> nn.Module:
    """A copy of a network with parameters of its own, in evaluation mode."""
    network = Network.of(model)
    replica = network.fresh(own_parameters=True)
    if replica is None:
        raise ValueError(f"snapshots are copies of the network, and {network.known.in_place}")
    return replica.model.eval()


def _files(folder: Path, number: int) -> tuple[Path, Path]:
    """The files of a snapshot: its network's, which is written last, and its posterior's."""
    return folder / f"snapshot-{number}.safetensors", folder / f"snapshot-{number}.sbn.safetensors"


def _store(model: nn.Module, file: Path, about: Mapping[str, Any]) -> None:
    state = model.state_dict()
    odd = next((name for name, value in state.items() if not isinstance(value, Tensor)), None)
    if odd is not None:
        raise TypeError(
            f"the network's state has {odd!r} of type {type(state[odd]).__name__}, and a folder of snapshots holds "
            "tensors alone; leave out folder"
        )
    write_tensors(file, FORMAT, {name: value.detach().cpu().clone() for name, value in state.items()}, about)


def _restored(model: nn.Module, file: Path, posterior: Path, about: Mapping[str, Any]) -> tuple[nn.Module, Posterior]:
    """A snapshot and its posterior from their files."""
    tensors, stored = read_tensors(file, FORMAT)
    if stored != about:
        raise ValueError(
            f"{str(file)!r} is a snapshot of another network, or was made with other epochs or another seed; name "
            "another folder"
        )
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{str(file)!r} does not fit this network: {error}") from error
    return model, load(posterior)
