"""The scores of detections, with standard errors over pictures, and the figures of a report about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stochbn.metrics.detection import (
    OVERLAPS,
    average_precision,
    calibrated_losses,
    matched,
    rank_correlation,
    resamples,
)
from stochbn.tasks.base import Join, Panel, Scores, joined, ratio_error, spread_of
from stochbn.tasks.classification import calibration_error, confidence_bins

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from stochbn.tasks.objects import Objects

__all__ = ["evidence_of", "panels", "score"]

BINS = 10
"""Of matched boxes by their standard deviation, with as many boxes each."""

Evidence = Mapping[str, Tensor]


def evidence_of(found: Sequence[Objects], truths: Sequence[Tensor], classes: int, most: int) -> dict[str, Tensor]:
    """What scores are made of, from the detections and the true boxes ``[m, 6]`` of N pictures.

    Args:
        found: the detections of each picture.
        truths: the true boxes of each.
        classes: K.
        most: detections of a picture, at most.

    Returns:
        ``truths`` ``[N, K]``: how many true boxes, without crowds, there are of each class; and of detections, with
        places for `most` of a picture: ``score`` (NaN where there is none), ``label``, ``right`` and ``counts``
        ``[N, most, T]`` as `average_precision` has them; and, relative to the square root of the box's area, ``error``
        and ``std``: the root mean square over the four sides of what they are off (NaN where no box is matched at an
        overlap of 0.5), and of their standard deviations.
    """
    rows = []
    for one, truth in zip(found, truths, strict=True):
        boxes = one.boxes.double().cpu()
        number, crowd = matched(boxes, one.labels.cpu(), truth)
        size = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-9).prod(1).sqrt()
        own = (number[0] >= 0) & ~crowd[0]
        off = torch.full_like(size, torch.nan)
        off[own] = (boxes[own] - truth[number[0, own], :4]).square().mean(1).sqrt() / size[own]
        std = one.box_std.double().cpu().square().mean(1).sqrt() / size
        row = {"score": one.scores.double().cpu(), "label": one.labels.cpu(), "error": off, "std": std}
        row |= {"right": ((number >= 0) & ~crowd).T, "counts": ~crowd.T}
        rows.append({name: _filled(values, most) for name, values in row.items()})
    stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    each = [one[one[:, 5] == 0, 4].long().bincount(minlength=classes) for one in truths]
    return {**stacked, "truths": torch.stack(each)}


def _filled(values: Tensor, most: int) -> Tensor:
    """``[most, ...]``: what there is, and NaN or 0."""
    rest = torch.nan if values.is_floating_point() else 0
    return torch.cat([values, values.new_full((most - len(values), *values.shape[1:]), rest)])


def score(batches: Sequence[Mapping[str, Tensor]], join: Join) -> Scores:
    """The scores of detections.

    ``ap`` and ``ap50`` are COCO's average precision, the mean over overlaps from 0.5 to 0.95 and that at 0.5. A
    detection is a forecast, with its score, that it overlaps a true box of its class by 0.5 or more: ``ece`` and
    ``nll`` (nats) are of these forecasts, and ``calibrated_nll`` is that after the best temperature for other
    pictures. ``box_correlation`` is the rank correlation of the boxes' standard deviations over draws and their
    errors, both relative to the box's size, over detections that are right. Errors are over pictures: of average
    precision and of the correlation by the bootstrap, of which ``resampled`` has the samples.

    Args:
        batches: `evidence_of` each.
        join: as for `stochbn.tasks.Task.scores`.
    """
    found = joined(batches, join)
    truths, there = found["truths"], ~found["score"].isnan()
    if not truths.any():
        raise ValueError("there is nothing to evaluate: no picture has a box of the network's classes")
    count, picture = len(truths), there.nonzero()[:, 0]
    flat = {name: values[there] for name, values in found.items() if name != "truths"}
    weights = resamples(count)
    right, counts = flat["right"].T, flat["counts"].T
    precision = average_precision(flat["score"], flat["label"], picture, right, counts, truths, weights)
    known = ~flat["error"].isnan()
    correlation = rank_correlation(flat["std"][known], flat["error"][known], weights[:, picture[known]])
    samples = {"ap": precision.mean(1), "ap50": precision[:, 0], "box_correlation": correlation}
    values = {name: sample[0].item() for name, sample in samples.items() if not sample[0].isnan()}
    errors = {name: spread_of(samples[name][1:]) for name in values}

    forecast = counts[0]  # those matched with a crowd are neither right nor wrong
    p, hit, of = flat["score"][forecast], right[0][forecast], picture[forecast]
    number = of.bincount(minlength=count).double()
    if len(p):
        each_picture = number.long().tolist()
        parts = zip(torch.split(p, each_picture), torch.split(hit.double(), each_picture), strict=True)
        bins = torch.stack([confidence_bins(*part) for part in parts])
        values["ece"], errors["ece"] = calibration_error(bins, number)
        losses = {"nll": -torch.where(hit, p, 1 - p).clamp(min=torch.finfo(torch.float32).tiny).log()}
        losses["calibrated_nll"] = calibrated_losses(p, hit, of, count)
        for name, each in losses.items():
            sums = of.bincount(each, minlength=count)
            if not sums.isnan().any():
                values[name] = (sums.sum() / number.sum()).item()
                errors[name] = ratio_error(sums / number.clamp(min=1), number)
    evidence = {**flat, "picture": picture, "truths": truths}
    return Scores(values, errors, {}, torch.ones(count), evidence, {"AP": samples["ap"]})


def panels(found: Mapping[str, Evidence]) -> Sequence[Panel]:
    """Precision by recall, how often detections are right, and the errors of boxes by their standard deviation."""

    def precision(axes: Axes, colors: Mapping[str, str]) -> None:
        for method, one in found.items():
            order = one["score"].argsort(descending=True, stable=True)
            right, counts = (one[name][order, 0].double().cumsum(0) for name in ("right", "counts"))
            recall = right / one["truths"].sum()
            axes.plot(recall.tolist(), (right / counts.clamp(min=1)).tolist(), color=colors[method], label=method)
        axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="recall: share of true boxes that are found",
                 ylabel="precision: share of detections that are right")  # fmt: skip
        axes.legend(loc="best", fontsize=8)

    def spread(axes: Axes, colors: Mapping[str, str]) -> None:
        largest = 0.0
        for method, one in found.items():
            known = ~one["error"].isnan()
            std, error = one["std"][known], one["error"][known]
            if not len(std) or not std.any():  # without draws
                continue
            parts = std.argsort().tensor_split(min(BINS, len(std)))
            x, y = ([values[part].square().mean().sqrt().item() for part in parts] for values in (std, error))
            axes.plot(x, y, "o-", ms=4, color=colors[method], label=method)
            largest = max(largest, *x)
        axes.plot([0, largest], [0, largest], ls=":", lw=1, color="#767676")
        axes.set(xlabel="standard deviation of a box's sides / its size", ylabel="error of its sides / its size",
                 xlim=(0, None), ylim=(0, None))  # fmt: skip
        axes.legend(*axes.get_legend_handles_labels(), loc="best", fontsize=8)

    shown = [
        Panel(
            "What does it find?",
            "Of all classes together, the share of detections that are right and of true boxes that are found, if "
            f"detections are taken from the likeliest on; right is an overlap of {OVERLAPS[0]:g} or more with a true "
            "box of the class.",
            precision,
        ),
    ]
    if any(one["std"].any() for one in found.values()):
        shown.append(
            Panel(
                "Are boxes off where draws differ?",
                "The root mean squared error of the sides of right detections in tenths of these, from the smallest to "
                "the largest standard deviation over draws, both relative to the box's size. A curve that rises says "
                "that the deviation tells which boxes are off. It lies above the dotted line, where both are equal, as "
                "draws are only a part of what a box is off by.",
                spread,
            )
        )
    return shown
