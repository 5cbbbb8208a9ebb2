"""What stands at the top of a page: the posterior, how it was chosen, its sets, and what an example costs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import stochbn
from conftest import mlp, normal, settled
from stochbn import conformal
from stochbn.report.chosen import chosen, cost_words, posterior_words


@pytest.fixture
def posterior() -> stochbn.Posterior:
    return stochbn.fit(settled(mlp(), 4), [normal(64, 4, seed=seed) for seed in range(8)], 16)


def test_draws_noise_temperature_and_centre_are_told(posterior: stochbn.Posterior) -> None:
    words = posterior_words(replace(posterior, temperature=1.5), 50, "flip")
    assert words == (
        "joint, 50 draws with the noise of mini-batches of 16, temperature 1.5, about the network's own running "
        "statistics; draws change the input too: flip"
    )
    assert posterior_words(None, 50) == "none: the plain network alone"
    plain = posterior.rescale(math.inf)
    assert posterior_words(plain, 50) == "no noise: the plain network, one pass"
    assert "no noise: the network at the average statistics" in posterior_words(plain.recentre_observed(), 50)
    assert "temperature 1.2, one pass" in posterior_words(replace(plain, temperature=1.2), 50)


def test_the_choice_and_the_sets_are_told(posterior: stochbn.Posterior) -> None:
    probs = normal(90, 3).softmax(1)
    sets = conformal.lac(probs, torch.arange(90) % 3, 0.8, by_class=True)
    one = replace(posterior, choice="Draws are worth it.").with_sets(sets, examples=90)
    found = chosen([one], 50, None, "1 ms")
    assert found["How it was chosen"] == "Draws are worth it."
    assert found["Prediction sets"] == "lac for 80 % in each class, from 90 held-out examples"
    assert found["Cost"] == "1 ms"
    two = chosen([posterior, posterior.rescale(8)], 50, None)
    assert two["Posteriors"].count("joint, 50 draws") == 2
    assert two["How it was chosen"] == "not calibrated: as it was fitted"
    assert "Cost" not in two
    assert chosen([None], 50, None) == {"Posterior": "none: the plain network alone"}
    number = normal(60)
    groups = ["a", "b"] * 30
    rule = conformal.intervals(number, None, number + 1, 0.9, groups=groups)
    assert (
        chosen([posterior.with_sets(rule, by="site")], 50, None)["Prediction sets"] == "residuals for 90 % in each site"
    )


def test_the_cost_is_told_with_and_without_draws() -> None:
    both = cost_words({"plain": 0.5, "SBN": 2.0}, 64, "2 threads of a CPU")
    assert both == (
        "0.5 ms an example without SBN, 2 ms with it (4.0 times as much); predicted 64 at a time on 2 threads of a CPU"
    )
    assert cost_words({"plain": 0.5}, 64, "cuda") == "0.5 ms an example without SBN; predicted 64 at a time on cuda"
