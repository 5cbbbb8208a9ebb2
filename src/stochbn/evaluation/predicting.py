"""What a network predicts for data in memory: as it is, and with SBN."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stochbn.augment import Augment
from stochbn.posteriors import Posterior
from stochbn.predictions import Prediction
from stochbn.predictive import MCDropout, Predictive, Predictor
from stochbn.sources.objects import Objects

__all__ = ["PREDICT_BATCH", "Report", "has_dropout", "on_accelerator", "predict_all", "predict_member"]

PREDICT_BATCH = 100
"""Examples in a call."""
Report = Callable[[int, int], None]
"""Called with how much of how much is done."""


def predict_member(
    model: nn.Module,
    posterior: Posterior | None,
    known: Objects,
    unknown: Objects | None,
    draws: int,
    seed: int,
    report: Report = lambda done, total: None,
    *,
    keep_draws: bool = False,
    dropout: bool | None = None,
    augment: Augment | None = None,
    **settings: Any,
) -> dict[str, Tensor]:
    """Log-probabilities of one network's methods: as it is, and with SBN where there is a posterior.

    A network with dropout keeps it on, unless `dropout` says otherwise. With `augment`, draws with SBN change their
    inputs too. `settings` are arguments of the predictives.

    Returns:
        ``labels`` ``[N]`` of the known examples, and ``[N, K]`` log-probabilities under ``plain.known``,
        ``plain.unknown``, ``sbn.known`` and ``sbn.unknown``; for a posterior with a `median`, such as factorized-log,
        also ``median.known`` and ``median.unknown``, with every statistic at its median. Those of known examples also
        have ``.expected_entropy`` ``[N]`` in nats, the mean over draws, as ``sbn.known.expected_entropy``. With
        `keep_draws` also those of every draw, as ``sbn.known.draws``: ``[S, N, K]`` in float16; a plain network without
        dropout has one.
    """
    # Every draw is made, so that all methods take as many.
    dropout = has_dropout(model) if dropout is None else dropout
    kind: Callable[..., Predictor] = MCDropout if dropout else functools.partial(Predictive, tolerance=0)
    kind = functools.partial(kind, **settings)
    predictors = {"plain": kind(model, posterior=None, draws=draws)}
    if posterior is not None:
        predictors["sbn"] = kind(model, posterior=posterior, draws=draws, augment=augment)
        if (median := posterior.median()) is not None:
            predictors["median"] = kind(model, posterior=median, draws=draws if dropout else 1)
    parts = {"known": known} | ({"unknown": unknown} if unknown is not None else {})
    total = len(predictors) * sum(map(len, parts.values()))
    tensors, before = {"labels": known.labels}, 0
    for method, predictor in predictors.items():
        for part, images in parts.items():
            prediction = predict_all(
                predictor,
                images,
                torch.Generator().manual_seed(seed),
                lambda done, _, before=before: report(before + done, total),  # type: ignore[misc]
                keep_draws=keep_draws,
            )
            before += len(images)
            tensors[f"{method}.{part}"] = prediction.probs.log().cpu()
            if part == "known":
                tensors[f"{method}.{part}.expected_entropy"] = prediction.expected_entropy.cpu()
            if prediction.log_probs is not None:
                tensors[f"{method}.{part}.draws"] = prediction.log_probs.half().cpu()
    return tensors


def has_dropout(model: nn.Module) -> bool:
    """Whether a network was built with dropout."""
    return any(isinstance(module, nn.Dropout) for module in model.modules())


def on_accelerator(model: nn.Module) -> nn.Module:
    """The network, moved to the accelerator if there is one."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return model if accelerator is None else model.to(accelerator)


def predict_all(
    predictor: Predictor,
    images: Objects,
    generator: torch.Generator | None = None,
    report: Report = lambda done, total: None,
    *,
    keep_draws: bool | None = None,
) -> Prediction:
    """Predict a data set batch by batch; `report` is called with the number of images done and of all.

    `keep_draws` is as for a `Predictor`, whose own setting None leaves.
    """
    predictions = []
    done = 0
    for inputs, labels in images.batches(PREDICT_BATCH):
        predictions.append(predictor(inputs, generator=generator, keep_draws=keep_draws))
        done += len(labels)
        report(done, len(images))
    joined: Prediction = Prediction.cat(predictions)
    return joined
