"""Predictions stay what they were: probabilities of three seeded networks, from before the passes were rebuilt."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochbn
from stochbn.sources import architectures

FIXTURE = Path(__file__).parent / "fixtures" / "probabilities.json"
KINDS = ("joint", "factorized", "empirical")
NETWORKS: dict[str, dict[str, Any]] = {
    "lenet5": {"channels": 1, "size": 28},
    "vgg11": {"channels": 3, "size": 32, "width": 0.125, "bias": False},
    "resnet18-final-bn": {"channels": 3, "size": 32, "width": 0.125},
}


def images(name: str, n: int, seed: int) -> Tensor:
    shape = (n, NETWORKS[name]["channels"], NETWORKS[name]["size"], NETWORKS[name]["size"])
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def network(name: str) -> nn.Module:
    """A network with weights from a seed and running statistics of random images, and logits that differ."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = architectures.build(name, classes=10, **NETWORKS[name])
    with torch.no_grad():
        for seed in range(20):
            model.train()(images(name, 32, seed))
        head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        head.weight *= 3 / model.eval()(images(name, 32, 0)).std()
    return model


def probabilities(name: str, kind: Any) -> Tensor:
    model = network(name)
    posterior = stochbn.fit(model, [images(name, 64, seed) for seed in range(30, 38)], kind=kind, centre="observed")
    predictive = stochbn.Predictive(model, posterior, draws=12, tolerance=0)
    probs: Tensor = predictive(images(name, 6, 99), generator=torch.Generator().manual_seed(5)).probs
    return probs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_probabilities_are_those_of_the_release_before(name: str, kind: str) -> None:
    wanted = torch.tensor(json.loads(FIXTURE.read_text())[f"{name} {kind}"])
    torch.testing.assert_close(probabilities(name, kind), wanted, rtol=0, atol=1e-5)


if __name__ == "__main__":  # writes the fixture: python tests/test_fixture.py FILE
    made = {f"{name} {kind}": probabilities(name, kind).tolist() for name in NETWORKS for kind in KINDS}
    Path(sys.argv[1]).write_text(json.dumps(made, indent=1) + "\n")
