"""Choose between the plain network, a temperature and draws on held-out data."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from stochbn.augment import Augment, check_augment
from stochbn.calibration_report import Choice, Totals, Tried
from stochbn.distributed import Ranks
from stochbn.execution import Call, passes, repeated
from stochbn.interface import Interface, InterfaceOptions, shows_options
from stochbn.network.calling import Batch, NetworkInput, network_input
from stochbn.network.replica import Network
from stochbn.posteriors import Posterior, check_draws
from stochbn.posteriors.checks import check_posterior, positive
from stochbn.posteriors.residual import with_residual
from stochbn.posteriors.thresholds import dropped
from stochbn.tasks import TASKS, Task
from stochbn.tasks.residual import fit_residual
from stochbn.undisturbed import without_gradients

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["calibrate"]

TEMPERATURES = torch.logspace(-2, 2, 29, base=2, dtype=torch.float64)
"""The temperatures to choose from: 0.25 to 4, each 10 % above the last. The best is refined between them."""


@shows_options(Interface.of)
def calibrate(
    model: nn.Module,
    posterior: Posterior,
    held_out: Iterable[Batch],
    *,
    batch_sizes: Iterable[float] | None = None,
    temperature: bool = True,
    draws: int = 8,
    ignore_index: int | None = None,
    check: Literal["weights", "shape"] = "weights",
    augment: Augment | None = None,
    clean: bool = True,
    score: str | None = None,
    progress: Callable[[int], None] = lambda objects: None,
    report: Callable[[Choice], object] = lambda choice: None,
    seed: int = 0,
    group: ProcessGroup | None = None,
    **interface: Unpack[InterfaceOptions],
) -> Posterior:
    """Choose between the plain network, a temperature and draws, on held-out data.

    These options are scored on the same examples, with the same random numbers:

    - the plain network;
    - the plain network with a temperature;
    - draws with the noise of mini-batches of several sizes, about the network's running statistics and about the
      observed ones, each with its own temperature.

    The simplest option within one standard error of the best is chosen. Fewer passes are simpler. A temperature adds no
    pass, so it is preferred to none. If draws do not help, the result is the plain network with a temperature, at one
    pass; ``posterior.choice`` says why. The fitted noise is kept: `calibrate` starts from it when it is called again,
    and ``posterior.fitted()`` returns it.

    For ``task="regression"`` a residual variance is fitted for each option, in place of a temperature. It is the
    variance of an observation beyond that of the draws and of the network (`stochbn.tasks.residual.Residual`). The
    likelihood of the held-out numbers under Normal distributions then decides. From then on predictions have
    ``total_std``.

    `held_out` is read once, and some thousand examples suffice. Every batch takes one pass for the plain network, one
    for the observed statistics without noise, and `draws` passes for each noise about each centre: 82 by default.
    Trials of faster executions take at most 34 examples of the first batch in addition. Memory does not grow with the
    draws. The network is in evaluation mode, so dropout is off.

    Args:
        model: the network.
        posterior: one fitted to it.
        held_out: batches of ``(input, labels)``, or mappings with ``labels``, that the network was **not** trained on.
            On training data the network is right, and no noise always seems best.
        batch_sizes: the noises to choose among, by the size of mini-batches, about the centre of `posterior`: any
            iterable of positive numbers, which is read once, and a size that it repeats is tried once. The plain
            network is among the options where ``math.inf`` is. None is a quarter, a half, one, two and four times the
            posterior's own size about both centres, and ``math.inf``.
        temperature: also choose what logits are divided by, from 0.25 to 4, for each option; otherwise it is the
            posterior's own for all.
        draws: how many quasi-random draws to average; 8 are worth 25 independent ones and more.
        ignore_index: a label of what is not to be counted, such as 255 for the margins of segmentations.
        check: what the posterior must have in common with the network, as for `Predictive`.
        augment: how every draw changes its inputs, as for `Predictive`, which then is to be used with it: noise and
            temperature are chosen for averages over both. Such averages are less sure than those over one alone, so
            choose the temperature too.
        clean: whether the first draw sees the inputs as they are, as for `Predictive`.
        score: what is to be lowest: ``"nll"``, ``"brier"``, or another score of the task, among its `calibrated_by`.
            None is the first of these, ``"nll"`` for all tasks of stochbn.
        progress: called with the number of examples that are done.
        report: called with how the options compare, and how sure the choice is; ``report=print`` shows it in words.
        seed: where the draws come from.
        group: in a job of several processes (ranks), the process group whose ranks calibrate together: each passes its
            own held-out data, and every one gets the posterior that all of it likes best. If one fails, all raise. None
            is this process's data alone.
        interface: `task`, `logits`, `class_axis`, `output` and `inputs`, as for `Predictive`. Labels are whole numbers
            for the task ``"classification"``, ``[N]`` or dense ``[N, ...]``; 0 and 1 for ``"binary"``, also in the
            shape of the output, such as ``[N, 1]``; 0 and 1 for each label for ``"multilabel"``, ``[N, K]``, of which
            each counts as an example; and numbers as the network predicts for ``"regression"``.

    Returns:
        The posterior with the chosen noise, centre and temperature; it saves, loads and predicts with them.

    Raises:
        TypeError, ValueError: a wrong argument, no held-out examples, batches without labels, labels that do not fit
            the network's output, a posterior of another network, `batch_sizes` for one whose own size is not known, or
            an output that is not finite.
    """
    ranks = Ranks.of(group, "calibrated")
    with ranks.failing_together():
        read, inputs = Interface.of(model, **interface)
        _check(model, posterior, draws, read, score, augment, check)
        score = score or read.calibrated_by[0]
        scored = read.draw_score(score, TEMPERATURES)
        sizes = None if batch_sizes is None else _sizes(batch_sizes)
        posterior = replace(dropped(posterior), residual_variance=None)
        base = posterior.fitted() if posterior.choice or posterior.noiseless else posterior
        noises = _noises(model, base, sizes, augment is not None)
        plain = _plain(model, base)
    if ranks.count > 1:
        asked = {"batch_sizes": sizes, "temperature": temperature, "draws": draws, "task": repr(read), "score": score}
        ranks.check_same({**asked, "ignore_index": ignore_index, "seed": seed, "posterior": _described(posterior)})
    tempered = not read.fits_residual
    temperatures = torch.tensor([posterior.temperature], dtype=torch.float64)
    temperatures = torch.cat([TEMPERATURES, temperatures]) if tempered else temperatures
    selectable = augment is None and (sizes is None or math.inf in sizes)
    tried = _tried(noises, draws, temperature, selectable, augment is not None)
    if not tempered:
        tried = [one._replace(temperatures=(0,)) for one in (tried[0], *tried[2:])]
    totals = Totals(1 + len(noises), len(temperatures))
    units, moments = "examples", list[Tensor]()
    network = Network.of(model)
    call = Call(
        read,
        posterior=base,
        sample=lambda count: list(base.iter_draws(count, torch.Generator().manual_seed(0))),
        augment=augment,
        clean=clean,
    )
    passes_of = {one.row: one.passes for one in tried}
    ways = [(way, passes_of[row]) for row, way in enumerate([plain, *noises])]  # of each row of the scores
    plain_call = replace(call, augment=None, posterior=None, whole="there is one pass")
    with ranks.failing_together():
        for number, batch in enumerate(held_out):
            examples, labels = network_input(model, batch, inputs), read.labels(batch)
            if not examples.divisible or not len(examples):
                continue
            network.look()
            units = read.units(labels) if units == "examples" else units
            this = replace(call, seed=seed + ranks.place(number))
            counted = read.counted(labels, ignore_index)
            made = []
            for way, noise in ((plain_call, ways[:1]), (this, ways[1:])):
                given = labels, counted, noise, temperatures, score
                made.append(repeated(functools.partial(_losses, network, examples, way, *given)))
            if tempered:
                totals.add(torch.cat(made), counted.cpu().reshape(len(counted), -1).sum(1))
            else:
                moments.append(torch.cat(made).float())
            progress(totals.units + sum(one.shape[2] for one in moments))
    residuals = list[Tensor]()
    if tempered or not moments:
        totals.share(ranks)
    else:  # ways, moments, examples, numbers, places
        each = ranks.joined({"moments": torch.cat(moments, 2).movedim(2, 0).contiguous()})["moments"].movedim(0, 2)
        fits = list(map(fit_residual, each))
        residuals = [parts for parts, _ in fits]
        totals.add(
            torch.stack([losses for _, losses in fits])[:, None],
            torch.full((each.shape[2],), each.shape[3] * each.shape[4]),
        )
    if not totals.units:
        ignored = f"all {totals.objects} have the label {ignore_index}, which is ignored"
        reason = ignored if totals.objects else "the iterable is empty or already used up"
        raise ValueError(f"there are no held-out examples: {reason}")
    if not totals.total.isfinite().all():
        raise ValueError("the network's output is not finite for some held-out examples; check the input for NaN")
    options = totals.options(tried, temperatures)
    number = totals.choose(tried)
    beyond = "a temperature" if tempered else "the plain network, both with a residual variance,"
    words = scored.name or score, scored.unit
    choice = Choice(score, *words, totals.units, units, options, options[number], beyond)
    _warn_of_ends(choice, temperature and tempered)
    report(choice)
    chosen, _ = ways[tried[number].row]
    found = replace(chosen, temperature=choice.chosen.temperature, choice=str(choice))
    return with_residual(found, residuals[tried[number].row], totals.objects) if residuals else found


def _check(
    model: nn.Module,
    posterior: Posterior,
    draws: int,
    task: Task,
    score: str | None,
    augment: Augment | None,
    check: str,
) -> None:
    """Check the arguments.

    Raises:
        TypeError, ValueError: as `calibrate`.
    """
    check_posterior(posterior, model, check)
    check_draws(draws)
    check_augment(augment)
    if not task.calibrated_by:
        known = ", ".join(repr(name) for name, one in TASKS.items() if one.calibrated_by)
        raise ValueError(
            f"noise is chosen by labels, which {known} have, got task={task.name!r:.40}; choose it with the batch size "
            "of fit"
        )
    if score is not None and score not in task.calibrated_by:
        raise ValueError(f"score must be one of {', '.join(map(repr, task.calibrated_by))}, got {score!r:.40}")


def _sizes(batch_sizes: Iterable[float]) -> list[float]:
    """The sizes of mini-batches to try, each once.

    Raises:
        TypeError, ValueError: they are not positive numbers, or there are none.
    """
    values: Any = batch_sizes.tolist() if isinstance(batch_sizes, Tensor) else batch_sizes
    try:
        each = iter(values)
    except TypeError:  # a number, or a tensor or an array without axes
        each = None
    if each is None or isinstance(values, (str, bytes, Mapping)):
        raise TypeError(f"batch_sizes must be positive numbers, such as [8, 16, math.inf], got {batch_sizes!r:.60}")
    found: dict[float, None] = {}
    for size in each:
        if not isinstance(size, Real) or isinstance(size, bool):
            raise TypeError(f"batch_sizes must be positive numbers, got {size!r:.40} among them")
        number = size if isinstance(size, int) else float(size)
        if not positive(number) and number != math.inf:
            raise ValueError(f"batch_sizes must be positive numbers, got {size!r:.40} among them")
        found[number] = None
    if not found:
        raise ValueError("batch_sizes is empty; name at least one, or leave it out")
    return list(found)


def _noises(model: nn.Module, base: Posterior, batch_sizes: Sequence[float] | None, augmented: bool) -> list[Posterior]:
    """The posteriors to choose among, without the plain network; those about the running statistics come first.

    Raises:
        ValueError: the posterior's own size is not known.
    """
    centres = [base]
    if batch_sizes is None:
        others = (base.centred(model)[0], base.recentre_observed(), base)
        centres = [base if base.centre == one.centre else one for one in others]
        centres = list({one.centre: one for one in centres}.values())
        own = base.batch_size
        if own is None:
            return centres
        batch_sizes = [own / 4, own / 2, own, 2 * own, 4 * own, math.inf]
    noises = [_still(one) if size == math.inf else one.rescale(size) for one in centres for size in batch_sizes]
    return [one for one in noises if augmented or not one.noiseless or one.centre != "running"]


def _plain(model: nn.Module, base: Posterior) -> Posterior:
    """A posterior whose only draw is the network's running statistics."""
    return _still(base.centred(model)[0])


def _still(posterior: Posterior) -> Posterior:
    """A posterior without noise, also if its mini-batch size is not known."""
    known = posterior.fitted_size is not None
    return posterior.rescale(math.inf) if known else replace(posterior, batch_size=math.inf)


def _tried(noises: Sequence[Posterior], draws: int, temperature: bool, plain: bool, augmented: bool) -> list[Tried]:
    """The options: the plain network, the plain network with a temperature, and each of these posteriors."""
    every = tuple(range(len(TEMPERATURES)))
    own = (len(TEMPERATURES),)  # the posterior's
    one = (int((TEMPERATURES.log().abs()).argmin()),) if temperature else own
    tried = [
        Tried("", math.inf, 1, 0, one, plain),
        Tried("", math.inf, 1, 0, every, plain and temperature),
    ]
    for row, noise in enumerate(noises, start=1):
        passes = 1 if noise.noiseless and not augmented else draws
        size = math.nan if noise.batch_size is None else noise.batch_size
        tried.append(Tried(noise.centre, size, passes, row, every if temperature else own))
    return tried


def _warn_of_ends(choice: Choice, temperature: bool) -> None:
    """Warn if the best noise or temperature is at an end of the range that was tried."""
    sizes = [one.batch_size for one in choice.options if one.drawing]
    if len(sizes) > 1 and choice.chosen.batch_size == min(sizes):
        warnings.warn(
            f"the noise of the smallest mini-batches that were tried, {min(sizes):g}, is the best: more "
            "may be better still; fit with a smaller batch size, and calibrate again",
            stacklevel=3,
        )
    ends = TEMPERATURES[0].item(), TEMPERATURES[-1].item()
    if temperature and choice.chosen.temperature in ends:
        few = choice.chosen.temperature < 1
        warnings.warn(
            f"the best temperature lies at or beyond the end of the range, {choice.chosen.temperature:g}"
            f"{', as where few held-out examples are classified wrongly: more of them would tell' if few else ''}",
            stacklevel=3,
        )


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
    score: str,
    whole: str,
) -> Tensor:
    """The scores of a batch's examples under each noise and temperature, ``[B, T, N]``, summed over what is counted.

    For a task that fits a residual variance: the moments that it is fitted to, ``[B, 4, N, D, P]``.
    """
    losses, task = [], call.task
    labels = labels if bool(counted.all()) else labels.where(counted, 0)
    with passes(network, inputs, replace(call, whole=whole)) as made:
        for posterior, draws in noise:
            made.again()
            drawn = posterior.iter_draws(draws, torch.Generator().manual_seed(call.seed), quasi=True)
            total = task.draw_score(score, temperatures)
            while block := list(itertools.islice(drawn, made.draws)):
                for raw in made(block):
                    each, truth = task.paired(raw, labels)
                    _, mask = task.paired(raw, counted)
                    total.add(each, truth)
            scores = total.of_each(truth)
            if not task.fits_residual:
                scores = (scores * mask.to(scores.device)).reshape(*scores.shape[:2], -1).sum(2)
            losses.append(scores.cpu())
    return torch.stack(losses) if losses else torch.empty(0, len(temperatures), len(labels), dtype=torch.float64)
