"""Posteriors of the experiments' networks; see test_runner.py for those of runs."""

from __future__ import annotations

import torch

import stochbn
from conftest import normal
from stochbn.sources.architectures import batch_norms_of_linear_layers, build


def test_the_ordinary_batch_norm_of_lenet_changes_nothing_for_the_layers_that_are_drawn() -> None:
    """It is behind them, so it does not matter to them that it does not normalise by mini-batches while fitting."""
    torch.manual_seed(0)
    model = build("lenet5", classes=3, size=16)
    batches = [normal(64, 1, 16, 16, seed=seed) for seed in range(4)]
    for batch in batches * 12:
        model.train()(batch)
    hidden = batch_norms_of_linear_layers(model.eval())
    assert hidden == ["10"]
    assert batch_norms_of_linear_layers(build("resnet18", width=0.1)) == []
    every = stochbn.fit(model, batches, kind="factorized")
    rest = stochbn.fit(model, batches, kind="factorized", deterministic=hidden)
    rest.check(model)
    assert dict(rest.skipped) == {"10": "deterministic"}
    assert [*rest.layers, "10"] == list(every.layers)
    for name in ("mean_mean", "mean_variance", "variance_mean", "variance_variance"):
        assert torch.equal(getattr(rest, name), getattr(every, name)[: rest.channels])
