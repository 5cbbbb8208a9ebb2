"""Choosing how much noise a posterior has, and a temperature, by held-out data."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from stochbn.augment import Augment, check_augment
from stochbn.choice import Choice, Totals
from stochbn.distributed import Ranks
from stochbn.execution import Call, passes, repeated
from stochbn.network.calling import Batch, InputsOf, NetworkInput, network_input
from stochbn.network.replica import Network
from stochbn.posteriors import Posterior, check_draws
from stochbn.predictive.predictive import checks_weights
from stochbn.tasks import make_task
from stochbn.undisturbed import without_gradients

__all__ = ["calibrate", "labels_of"]

TASKS_WITH_LABELS = ("classification", "binary", "multilabel")

TEMPERATURES = torch.logspace(-2, 2, 29, base=2, dtype=torch.float64)
"""The temperatures to choose from: 0.25 to 4, each 10 % above the one before; the best is refined between them."""


def calibrate(
    model: nn.Module,
    posterior: Posterior,
    held_out: Iterable[Batch],
    *,
    batch_sizes: Sequence[float] | None = None,
    temperature: bool = False,
    draws: int = 8,
    task: Literal["classification", "binary", "multilabel"] = "classification",
    ignore_index: int | None = None,
    logits: str | int | None = None,
    class_axis: int | None = None,
    output: Literal["logits", "probs"] | None = None,
    inputs: InputsOf = None,
    check: Literal["weights", "shape"] = "weights",
    augment: Augment | None = None,
    clean: bool = True,
    score: Literal["nll", "brier"] = "nll",
    progress: Callable[[int], None] = lambda objects: None,
    report: Callable[[Choice], object] = lambda choice: None,
    seed: int = 0,
    group: ProcessGroup | None = None,
) -> Posterior:
    """Choose the noise level of a posterior, and if wanted a temperature, by the NLL of held-out data.

    The effective mini-batch size that gives the lowest negative log-likelihood is chosen from a grid, with the same
    random numbers for all of its points. `held_out` is read once, and every batch of it goes through the network
    `draws` times for each point of the grid, and once for no noise: 41 forward passes by default, 48 with `augment`,
    beside trials with at most 34 objects of the first batch, which tell how passes can be made. Some thousand objects
    suffice. Memory does not grow with the draws. The network is in evaluation mode, so the noise
    is chosen with dropout off.

    Args:
        model: the network.
        posterior: one fitted to it.
        held_out: batches of ``(input, labels)``, or mappings with ``labels``, that the network was **not** trained on.
            On training data the network is right, and no noise always seems best.
        batch_sizes: the grid; None is a quarter, a half, one, two and four times the posterior's own, and
            ``math.inf``, no noise.
        temperature: also choose what logits are divided by, from 0.25 to 4, jointly with the noise; otherwise the
            posterior's own stays.
        draws: how many quasi-random draws to average; 8 are worth 25 independent ones and more.
        task: what the output means, as for `Predictive`: ``"classification"`` with whole numbers as labels, ``[N]`` or
            dense ``[N, ...]``; ``"binary"`` with 0 and 1; ``"multilabel"`` with 0 and 1 for each label, ``[N, K]``, of
            which each counts as an object.
        ignore_index: a label of what is not to be counted, such as 255 for the margins of segmentations.
        logits: where the logits are in the network's output, as for `Predictive`.
        class_axis: the axis of the classes in the output; None is axis 1.
        output: ``"probs"`` for a network whose output has been through a softmax.
        inputs: what the network takes of a batch, as for `Predictive`.
        check: what the posterior must have in common with the network, as for `Predictive`.
        augment: how every draw changes its inputs, as for `Predictive`, which then is to be used with it: noise and
            temperature are chosen for averages over both. Such averages are less sure than those over one alone, so
            choose the temperature too.
        clean: whether the first draw sees the inputs as they are, as for `Predictive`.
        score: what is to be lowest, ``"nll"`` or the ``"brier"`` score.
        progress: called with the number of objects that are done.
        report: called with how the options compare, and how sure the choice is; ``report=print`` shows it in words.
        seed: where the draws come from.
        group: in a job of several processes (ranks), the process group whose ranks calibrate together: each passes its
            own held-out data, and every one gets the posterior that all of it likes best. If one fails, all raise. None
            is this process's data alone.

    Returns:
        The posterior with that noise and temperature; it saves, loads and predicts with both.

    Raises:
        TypeError, ValueError: a wrong argument, no held-out objects, batches without labels, labels that do not fit
            the network's output, a posterior of another network or of unknown `batch_size`, or an output that is not
            finite.
    """
    ranks = Ranks.of(group, "calibrated")
    with ranks.failing_together():
        batch_sizes = _checked(model, posterior, batch_sizes, draws, task, score, augment, check)
    if ranks.count > 1:
        asked = {"batch_sizes": batch_sizes, "temperature": temperature, "draws": draws, "task": task, "score": score}
        ranks.check_same({**asked, "ignore_index": ignore_index, "seed": seed, "posterior": _described(posterior)})
    temperatures = TEMPERATURES if temperature else torch.tensor([posterior.temperature], dtype=torch.float64)
    totals = Totals(len(batch_sizes), len(temperatures))
    units = "objects"
    network = Network.of(model)
    call = Call(
        make_task(task, logits, class_axis, output),
        posterior=posterior,
        sample=lambda count: list(posterior.iter_draws(count, torch.Generator().manual_seed(0))),
        augment=augment,
        clean=clean,
    )
    with ranks.failing_together():
        for number, batch in enumerate(held_out):
            objects_in, labels = network_input(model, batch, inputs), labels_of(batch, task)
            if not objects_in.divisible or not len(objects_in):
                continue
            network.look()
            sizes = [
                (posterior.rescale(size), 1 if size == math.inf and augment is None else draws) for size in batch_sizes
            ]
            if labels.ndim > 1:
                units = "labels" if task == "multilabel" else "places"
            this = replace(call, seed=seed + ranks.place(number))
            counted = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
            given = labels, counted, sizes, temperatures, SCORES[score]
            losses = repeated(functools.partial(_losses, network, objects_in, this, *given))
            totals.add(losses, counted.cpu().reshape(len(counted), -1).sum(1))
            progress(totals.units)
    totals.share(ranks)
    if not totals.units:
        ignored = f"all {totals.objects} have the label {ignore_index}, which is ignored"
        reason = ignored if totals.objects else "the iterable is empty or already used up"
        raise ValueError(f"there are no held-out objects: {reason}")
    if not totals.total.isfinite().all():
        raise ValueError("the network's output is not finite for some held-out objects; check the input for NaN")
    best, at = divmod(int(totals.total.argmin()), len(temperatures))
    if batch_sizes[best] == min(batch_sizes) and len(batch_sizes) > 1:
        warnings.warn(
            f"the noise of the smallest mini-batches that were tried, {batch_sizes[best]:g}, is the best: more "
            "may be better still; fit with a smaller batch size, and calibrate again",
            stacklevel=2,
        )
    if temperature and at in (0, len(temperatures) - 1):
        warnings.warn(
            f"the best temperature lies at or beyond the end of the range, {temperatures[at]:g}, as where few held-out "
            "objects are classified wrongly: more of them would tell",
            stacklevel=2,
        )
    options = totals.options(batch_sizes, temperatures)
    report(Choice(score, totals.units, units, options, options[best]))
    return replace(posterior.rescale(batch_sizes[best]), temperature=options[best].temperature)


def _checked(
    model: nn.Module,
    posterior: Posterior,
    batch_sizes: Sequence[float] | None,
    draws: int,
    task: str,
    score: str,
    augment: Augment | None,
    check: str,
) -> list[float]:
    """The grid of batch sizes.

    Raises:
        TypeError, ValueError: as `calibrate`.
    """
    if not isinstance(posterior, Posterior):
        raise TypeError(f"expected a posterior from stochbn.fit or stochbn.load, got {type(posterior).__name__}")
    posterior.check(model, weights=checks_weights(check))
    check_draws(draws)
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(map(repr, SCORES))}, got {score!r:.40}")
    check_augment(augment)
    if task not in TASKS_WITH_LABELS:
        raise ValueError(
            f"noise is chosen by labels, which {', '.join(map(repr, TASKS_WITH_LABELS))} have, got task={task!r:.40}; "
            "for a regression choose it with the batch size of fit, and see stochbn.conformal.intervals"
        )
    if batch_sizes is None:
        own = posterior.batch_size or 1
        batch_sizes = [own / 4, own / 2, own, 2 * own, 4 * own, math.inf]
    if not len(batch_sizes):
        raise ValueError("batch_sizes is empty; name at least one, or leave it out")
    for size in batch_sizes:
        posterior.rescale(size)  # refuses what cannot be, before anything is read
    return list(batch_sizes)


def _described(posterior: Posterior) -> str:
    """A text that is the same for the same posteriors."""
    draw = posterior.draw(1, torch.Generator().manual_seed(0))
    return f"{posterior!r} with a draw of the sum {sum(values.double().sum().item() for values in draw.values())!r}"


@without_gradients
def _losses(
    network: Network,
    inputs: NetworkInput,
    call: Call,
    labels: Tensor,
    counted: Tensor,
    noise: Sequence[tuple[Posterior, int]],
    temperatures: Tensor,
    score: type[_Score],
    whole: str,
) -> Tensor:
    """``[B, T, N]``: the scores of a batch's objects under each noise and temperature, summed over what is counted."""
    losses = []
    labels = labels.where(counted, 0)
    with passes(network, inputs, replace(call, whole=whole)) as made:
        for posterior, draws in noise:
            made.again()
            drawn = posterior.iter_draws(draws, torch.Generator().manual_seed(call.seed), quasi=True)
            total = score(temperatures)
            while block := list(itertools.islice(drawn, made.draws)):
                for raw in made(block):
                    each = torch.stack([torch.zeros_like(raw), raw], 1) if call.task.name == "multilabel" else raw
                    total.add(each, labels)
            scores = total.of_each(labels)
            scores *= counted.to(scores.device)
            losses.append(scores.reshape(*scores.shape[:2], -1).sum(2).cpu())
    return torch.stack(losses)


class _Score(ABC):
    """The score of mean probabilities, made of draws one by one, at several temperatures of their logits."""

    def __init__(self, temperatures: Tensor) -> None:
        self.temperatures = temperatures
        self.total: Tensor | None = None
        self.draws = 0

    @abstractmethod
    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add a draw ``[N, K, ...]``."""

    @abstractmethod
    def of_each(self, labels: Tensor) -> Tensor:
        """``[T, N, ...]``, float64: of each object (and place), under each temperature."""


class _NLL(_Score):
    """The negative log-likelihood."""

    def add(self, logits: Tensor, labels: Tensor) -> None:
        each = _log_likelihoods(logits, labels, self.temperatures)
        self.total = each if self.total is None else torch.logaddexp(self.total, each)
        self.draws += 1

    def of_each(self, labels: Tensor) -> Tensor:
        assert self.total is not None
        # The likelihood of 0 that probabilities may have is that of the smallest float32 number, as for the metrics.
        return (math.log(self.draws) - self.total).clamp(max=-math.log(torch.finfo(torch.float32).tiny))


class _Brier(_Score):
    """The Brier score: the squared distance of the probabilities from those of certainty of the label."""

    def add(self, logits: Tensor, labels: Tensor) -> None:
        _check_labels(logits, labels)
        if logits.dtype.itemsize < 4:
            logits = logits.float()
        each = torch.stack([(logits / t).softmax(1) for t in self.temperatures.tolist()])
        self.total = each if self.total is None else self.total + each
        self.draws += 1

    def of_each(self, labels: Tensor) -> Tensor:
        assert self.total is not None
        probs = self.total.double() / self.draws
        chosen = labels.to(probs.device)[None, :, None].long().expand(len(probs), *[-1] * (labels.ndim + 1))
        right = probs.gather(2, chosen)
        return probs.square().sum(2) - 2 * right[:, :, 0] + 1


SCORES: dict[str, type[_Score]] = {"nll": _NLL, "brier": _Brier}
"""What noise and temperature can be chosen by."""


def labels_of(batch: Batch, task: str) -> Tensor:
    """The labels in a batch, whole numbers."""
    labels: Any = None
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        labels = batch[1]
    elif hasattr(batch, "get"):
        labels = batch.get("labels")
    if isinstance(labels, Tensor) and task != "classification" and not labels.is_complex():
        whole = labels.long()
        if (whole == labels).all():  # losses of these tasks take them as floating-point numbers
            return whole
    if (
        not isinstance(labels, Tensor)
        or labels.is_floating_point()
        or labels.is_complex()
        or labels.dtype == torch.bool
    ):
        found = f"{labels.dtype} labels" if isinstance(labels, Tensor) else f"a {type(batch).__name__} without them"
        raise TypeError(
            "expected held-out batches as (input, labels) or mappings with 'labels', whole numbers from 0 to K - 1; "
            f"got {found}"
        )
    return labels


def _log_likelihoods(logits: Tensor, labels: Tensor, temperatures: Tensor) -> Tensor:
    """``[T, N, ...]``, float64: the log-probability of each label under each temperature."""
    _check_labels(logits, labels)
    labels = labels.to(logits.device)[:, None].long()
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    return torch.stack([(logits / t).log_softmax(1).gather(1, labels)[:, 0] for t in temperatures.tolist()]).double()


def _check_labels(logits: Tensor, labels: Tensor) -> None:
    """Refuse labels that do not fit logits."""
    if labels.shape != logits[:, 0].shape:
        raise ValueError(
            f"expected labels {list(logits[:, 0].shape)} for the network's logits {list(logits.shape)}, got "
            f"{list(labels.shape)}"
        )
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(
            f"labels must lie between 0 and {logits.shape[1] - 1} for {logits.shape[1]} classes, found "
            f"{labels.min().item()} to {labels.max().item()}"
        )
