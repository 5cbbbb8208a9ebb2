"""Fit a posterior to a network and its training data."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm

from stochbn.augment import Augment, check_augment
from stochbn.distributed import Ranks, refuse_sharded
from stochbn.execution.verify import effects
from stochbn.fit_data import augmented, expected_batches, most_batches
from stochbn.fit_diagnosis import Diagnosis
from stochbn.interface import Interface, InterfaceOptions, shows_options
from stochbn.network.calling import Batch, NetworkInput, refuse_other_axis
from stochbn.network.fingerprint import Fingerprint
from stochbn.network.layers import batch_norms, listed, running_statistics, undrawable
from stochbn.network.replica import Network, named_modules
from stochbn.posteriors import KINDS, Empirical, Factorized, FactorizedLog, Joint, Posterior, make_accumulator
from stochbn.shift.keeping import Keeper
from stochbn.statistics import NoBatchesError, mini_batches, observing
from stochbn.undisturbed import undisturbed

__all__ = ["fit"]

Batches = Iterable[Batch]
Chosen = Iterable[str] | Callable[[str, nn.Module], bool]
"""Layers, given by names, by patterns such as ``head.*``, or by a function of name and layer."""


@overload
def fit(
    model: nn.Module, data: Batches, batch_size: int | None = 16, kind: Literal["joint"] = "joint", **more: Any
) -> Joint: ...


@overload
def fit(
    model: nn.Module, data: Batches, batch_size: int | None = 16, *, kind: Literal["factorized"], **more: Any
) -> Factorized: ...


@overload
def fit(
    model: nn.Module, data: Batches, batch_size: int | None = 16, *, kind: Literal["factorized-log"], **more: Any
) -> FactorizedLog: ...


@overload
def fit(
    model: nn.Module, data: Batches, batch_size: int | None = 16, *, kind: Literal["empirical"], **more: Any
) -> Empirical: ...


@overload
def fit(
    model: nn.Module, data: Batches, batch_size: int | None = 16, kind: str = "joint", **more: Any
) -> Posterior: ...


@shows_options(Interface.of, *(one.accumulator for one in KINDS.values()))
def fit(
    model: nn.Module,
    data: Iterable[Batch] | None = None,
    batch_size: int | None = 16,
    kind: str = "joint",
    *,
    centre: Literal["running", "observed"] = "running",
    deterministic: Chosen = (),
    augment: Augment | None = None,
    group: ProcessGroup | None = None,
    batches: float | None = None,
    progress: Callable[[int, int | None], object] | None = None,
    reference: bool | Iterable[Batch] = True,
    **options: Any,
) -> Posterior:
    """Fit a posterior over the batch-norm statistics of a trained network to mini-batches of its training data.

    Passes run on a copy of the network, which itself does not change. The copy is in training mode, so dropout is on,
    with masks from a generator of the fit's own. Layers that were set to ``eval()`` on their own are in training mode
    too, except those whose own ``train()`` leaves them in evaluation mode. Memory does not grow with the amount of
    data.

    `fit` warns if predictions with the observed statistics differ from the network's own by more than chance. The
    warning says by how much, and names the likely cause: examples that are not augmented as in training, are from
    another domain, or are not shuffled. See `stochbn.fit_diagnosis`.

    Args:
        model: a trained network with batch-norm layers.
        data: training data, such as a DataLoader: an iterable of tensors, of ``(input, ...)`` tuples, or of
            mappings of the network's argument names to tensors. Shuffle it: the examples of a mini-batch should be a
            random sample.
        batch_size: the size of the mini-batches whose statistics are observed: fewer examples, more noise. The paper
            uses 16. Incoming batches are split to this size, **and the remainder of each that is smaller is
            dropped**. None takes the incoming batches as they come.
        kind: ``"joint"``, a Gaussian with the covariance of all layers' statistics; ``"empirical"``, the observed
            statistics themselves, replayed (Teye et al., 2018); ``"factorized"``, the paper's Stochastic Batch
            Normalization, independent for every channel; or ``"factorized-log"``, the same distribution fitted by
            moments of the logarithm of the variance, as in the published experiments. Why joint is the default:
            docs/posteriors.md.
        centre: what draws have as their mean and expected variance. ``"running"``: the running statistics that the
            network works with, so that without noise predictions are the plain network's. ``"observed"``, as in the
            paper: the averages over the observed mini-batches. Layers whose running statistics are not finite,
            have negative variances, or are still the 0 and 1 that they began as, always have the observed ones; a
            warning names them, unless no layer was ever trained.
        deterministic: layers to leave out: they keep their running statistics, while fitting too, so that the layers
            behind them see what they will see in predictions. Names, patterns such as ``"head.*"``, or a function of
            name and layer.
        augment: a function ``fn(x, generator)`` that changes the examples of a mini-batch at random, as training did;
            such as those of `stochbn.augment`. Its generator is the fit's own: equal data give an equal posterior.
        group: in a job of several processes (ranks), the process group whose ranks fit together, such as
            ``torch.distributed.group.WORLD``: each passes its own data, and every one gets the posterior of all. Ranks
            may have different amounts of data, or none; if one fails, all raise. A mini-batch is one rank's also where
            the network has a ``SyncBatchNorm``: for the noise of what it normalised over in training, `batch_size` is
            that of all ranks together. Where ranks take mini-batches of one stream in turn, the posterior is that of
            one process, to rounding, which may change which ones are kept if there are more than `max_batches`; where
            they take others, the directions of kind joint may have other signs and the rows of kind empirical another
            order, so that a seed gives other draws. None is this process's data alone.
        batches: how many mini-batches to observe, of all ranks together; no more data is read then, and
            ``math.inf`` reads all. None is 512 for the kinds joint and empirical, or `max_batches` if that is more, and
            5,000 for the factorized ones, which gives their standard deviations to 1 %.
        progress: called after each mini-batch with the number of mini-batches observed, and of all if the data has a
            length; this rank's.
        reference: also keep what new data is compared with and adapted from, see `stochbn.adapt` and
            `stochbn.shift.Monitor`: some 600 bytes for every channel. True makes it of the first 2,048 examples
            of `data`, without `augment`, in one additional pass in evaluation mode. If `data` is already augmented, or
            if you have held-out examples, pass an iterable of batches instead, with at least 256 examples in total and
            preprocessed as at test time. They should be of the same mix of classes, and need not be labelled. Of their
            inputs 256 MiB are kept at most, which are 440 pictures of 224 pixels. False leaves it out.
        options: of the kind, and of the network's interface:

            - `max_batches`, of joint and empirical: how many mini-batches' statistics to keep at most, a random sample
              of all, chosen by hashes of the statistics; 512 by default. Each takes 8 bytes for every channel (512 of
              them 109 MB for a ResNet-50), and the time to make a joint posterior grows with their square, from some
              thousands on with their cube.
            - `directions`, of joint: how many principal directions to keep at most; None keeps all. What they leave
              out of a statistic's variance becomes noise of its own.
            - `inputs`: what the network takes of a batch, as for `stochbn.Predictive`.
            - `task`, `logits`, `class_axis`, `output`: what the output means, likewise, so that the reference knows
              the mix of classes, of labels or of numbers.

    Returns:
        The posterior. A layer that is called several times in one forward pass gives one observation for each call.
        ``skipped`` lists the layers that keep their running statistics, with the reason: they were left out, are never
        called, cannot update their statistics, or stay in evaluation mode.

    Raises:
        TypeError: an argument is of the wrong type, or the batches are of none of the types above.
        ValueError: the network has no batch norm, or one without running statistics; there are no batches, or none of
            at least `batch_size` examples; a layer saw non-finite activations, or (but for the factorized kinds) was
            not called for all mini-batches; an unknown `kind` or `centre`; `deterministic` fits no layer, or all of
            them.

    Source: Atanov et al., 2018, section 3 (one-pass moments in place of the exponential smoothing).
    """
    if data is None and isinstance(batches, Iterable):
        warnings.warn("pass the data of fit as its second argument, or as data=", DeprecationWarning, stacklevel=2)
        data, batches = batches, None
    ranks = Ranks.of(group)
    frozen: set[str] = set()
    lack: NoBatchesError | None = None
    with ranks.failing_together():
        if centre not in ("running", "observed"):
            raise ValueError(f"centre must be 'running' or 'observed', got {centre!r:.40}")
        read = {name: options.pop(name) for name in InterfaceOptions.__annotations__ if name in options}
        accumulator = make_accumulator(kind, **options)
        accumulator.process = ranks.rank
        limit = most_batches(accumulator, batches)
        layers = batch_norms(model)
        refuse_sharded(model)
        network = Network.of(model)
        chosen = _chosen(layers, undrawable(network.model), deterministic)
        check_augment(augment)
        task, inputs = Interface.of(model, **read)
        if not isinstance(reference, Iterable | bool) or isinstance(reference, Tensor | str):
            raise TypeError(f"reference must be True, False or an iterable of batches, got {type(reference).__name__}")
    same = {"kind": kind, "batch_size": batch_size, **accumulator.settings(), "centre": centre, "batches": limit}
    same |= {"deterministic": chosen, "augment": "given" if augment else None}
    same |= {"reference": reference if isinstance(reference, bool) else "given"}
    ranks.check_same(same)
    synchronised = any(isinstance(layer, nn.SyncBatchNorm) for layer in layers.values())
    if batch_size is None and synchronised and ranks.count > 1 and ranks.rank == 0:
        warnings.warn(
            f"batch_size=None takes the batches of each rank, which have more noise than those of all {ranks.count} "
            "ranks together that SyncBatchNorm normalised over in training; pass their size as batch_size, and batches "
            "of at least as many examples",
            stacklevel=2,
        )
    diagnosis = Diagnosis(batch_size, labelled=inputs is None or inputs == 1)
    with ranks.failing_together():
        network.look()
        fingerprint = Fingerprint.of(model)
        uncalled = {name: torch.empty(0, 2, layer.num_features) for name, layer in layers.items()}
        training, skipped = _modes(network, chosen)
        watched = diagnosis.watched(data) if isinstance(data, Iterable) and not isinstance(data, Tensor) else data
        observations = mini_batches(model, watched, batch_size, inputs)  # type: ignore[arg-type]  # which it refuses
        keeper = Keeper(sum(layer.num_features for layer in layers.values()), ranks)
        if reference is True:
            observations = keeper.watched(observations)
        elif reference is not False:
            keeper.read(mini_batches(model, reference, None, inputs))
        if augment is not None:
            observations = augmented(observations, augment, ranks)
        try:
            first = next(observations)
        except NoBatchesError as error:
            lack = error
        else:
            random = effects(network, first, training)
            own = max(0.0, limit - ranks.rank) / ranks.count  # mini-batches of this rank
            total = expected_batches(data, batch_size, own)

            def update(number: int, mini_batch: NetworkInput, observation: dict[str, Tensor]) -> bool:
                accumulator.update({**uncalled, **observation})
                diagnosis.keep(mini_batch)
                if progress is not None:
                    progress(number + 1, total)
                return number + 1 < own

            if batch_size is not None:
                _refuse_equal_axes(network, first)
            every = itertools.chain([first], observations)
            frozen = _observed(network, training, random, every, ranks, update, batch_size is not None)
    with ranks.failing_together():
        ranks.check_weights(fingerprint)
        accumulator = ranks.merged(accumulator)
    observed = accumulator.layers
    if lack is not None and not accumulator.seen:
        raise lack
    if not observed:
        raise ValueError(
            "no batch-norm layer saw mini-batch statistics: none was called, or all are frozen (they do not update "
            "their running statistics in training mode)"
        )
    skipped |= dict.fromkeys(ranks.union(frozen), "does not update its running statistics while training")
    skipped |= dict.fromkeys((name for name in layers if name not in observed and name not in skipped), "not called")
    if accumulator.seen == 1:
        warnings.warn(
            "only one mini-batch was observed, so the statistics have no spread and every draw is the same; "
            "pass more data or a smaller batch_size",
            stacklevel=2,
        )
    posterior: Posterior = accumulator.posterior(
        batch_size=batch_size,
        dtype=running_statistics(layers[next(iter(observed))])[0].dtype,
        skipped=skipped,
        fingerprint=fingerprint,
    )
    unusable: dict[str, str] = {}
    if centre == "running":
        posterior, unusable = posterior.centred(model, begun=False)
    if reference is not False and not unusable:
        with ranks.failing_together():
            asked = reference is not True
            kept = keeper.reference(network, task, set(posterior.layers), asked)
            posterior = replace(posterior, reference=kept)
    if ranks.rank == 0:
        for text in diagnosis.warnings(network, posterior, training, unusable):
            warnings.warn(text, stacklevel=2)
    return posterior


@undisturbed
def _refuse_equal_axes(network: Network, first: NetworkInput) -> None:
    """If a mini-batch is as long as its second axis, check the axis of examples in outputs with fewer examples."""
    tensor = first.first
    if tensor.ndim != 3 or not first.divisible or not 2 < len(tensor) == tensor.shape[1]:
        return
    fewer = first.take(slice(0, len(tensor) - 1))
    with network.copied() as replica, torch.no_grad():
        try:
            output = fewer.call(replica.model)
        except Exception:  # the network needs a certain number of examples
            return
    refuse_other_axis(output, fewer)


@undisturbed
def _observed(
    network: Network,
    training: frozenset[str],
    random: bool,
    mini_batches: Iterable[NetworkInput],
    ranks: Ranks,
    update: Callable[[int, NetworkInput, dict[str, Tensor]], bool],
    split: bool,
) -> set[str]:
    """Pass the statistics of mini-batches to `update` until it returns False; return the frozen layers."""
    with observing(network, training, random, split) as observe:
        for number, mini_batch in enumerate(mini_batches):
            if not update(number, mini_batch, observe(mini_batch, ranks.place(number))):
                break
    return set(observe.frozen)


def _modes(network: Network, deterministic: Collection[str]) -> tuple[frozenset[str], dict[str, str]]:
    """The names of modules in training mode during a fit, and the reasons why batch norms are not drawn, by name.

    Raises:
        ValueError: no batch norm is left.
    """
    skipped = undrawable(network.model)
    training = set(network.trained())
    modules = {module: name for name, module in named_modules(network.model).items()}
    norms = {name: modules[layer] for name, layer in batch_norms(network.model).items()}
    skipped |= {name: "stays in evaluation mode" for name, place in norms.items() if place not in training}
    skipped |= dict.fromkeys(deterministic, "deterministic")
    training -= {norms[name] for name in deterministic}
    if norms.keys() <= skipped.keys():
        raise ValueError(
            f"every batch-norm layer of {type(network.model).__name__} is deterministic or stays in evaluation mode, "
            "so there are no statistics to draw; leave out fewer of them"
        )
    return frozenset(training), skipped


def _chosen(layers: Mapping[str, _BatchNorm], others: Iterable[str], deterministic: Chosen) -> list[str]:
    """The layers that `deterministic` selects; `others` keep their running statistics anyway.

    Raises:
        TypeError: it is not an iterable of names, and not a function.
        ValueError: a name or pattern matches no layer.
    """
    if callable(deterministic):
        return [name for name, layer in layers.items() if deterministic(name, layer)]
    if isinstance(deterministic, str) or not isinstance(deterministic, Iterable):
        raise TypeError(
            "deterministic must be names or patterns of layers, such as ['head.*'], or a function of name and layer, "
            f"got {deterministic!r:.60}"
        )
    chosen: set[str] = set()
    for pattern in deterministic:
        if not isinstance(pattern, str):
            raise TypeError(f"deterministic must be names or patterns of layers, got {pattern!r:.60} among them")
        names = [*layers, *others]
        fitting = {pattern} & set(names) or {name for name in names if fnmatchcase(name, pattern)}
        if not fitting:
            raise ValueError(
                f"deterministic has {pattern!r:.60}, which fits no batch-norm layer; they are {listed(layers)}"
            )
        chosen |= fitting
    return [name for name in layers if name in chosen]
