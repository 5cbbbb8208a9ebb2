"""Posteriors of the experiments' networks; see test_runner.py for those of runs."""

from __future__ import annotations

import pytest
import torch

import stochbn
from conftest import normal, seeded
from stochbn.paper.fitting import undrawn
from stochbn.paper.networks import batch_norms_of_linear_layers, build


def fitted(kind: str) -> tuple[torch.nn.Module, stochbn.Posterior]:
    torch.manual_seed(0)
    model = build("lenet5", classes=3, size=16).eval()
    return model, stochbn.fit(model, [normal(64, 1, 16, 16, seed=seed) for seed in range(4)], kind=kind)


def test_the_other_layers_are_distributed_as_before_and_those_left_out_are_not_drawn() -> None:
    model, posterior = fitted("factorized")
    hidden = batch_norms_of_linear_layers(model)
    assert hidden == ["10"]
    assert batch_norms_of_linear_layers(build("resnet18", width=0.1)) == []
    rest = undrawn(posterior, hidden)
    rest.check(model)
    ours, theirs = (p.draw(20_000, seeded()) for p in (rest, posterior))
    assert set(theirs) - set(ours) == {"10.running_mean", "10.running_var"}
    for name, values in ours.items():
        torch.testing.assert_close(values.mean(0), theirs[name].mean(0), rtol=0.02, atol=0.02)
        torch.testing.assert_close(values.std(0), theirs[name].std(0), rtol=0.05, atol=1e-3)


def test_only_known_layers_of_a_factorised_posterior_can_be_left_out() -> None:
    _, posterior = fitted("factorized")
    with pytest.raises(ValueError, match="the posterior has no layer '9'; it has 1, 5, 10"):
        undrawn(posterior, ["10", "9"])
    _, joint = fitted("joint")
    with pytest.raises(ValueError, match="not of one of the kind joint"):
        undrawn(joint, ["10"])
