"""What users of the package rely on: its names, its light import, and the whole way from a network to numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import stochbn
from conftest import seeded
from stochbn import metrics


def test_the_public_names_exist() -> None:
    assert set(stochbn.__all__) >= {
        "Ensemble", "Factorized", "MCDropout", "Prediction", "Predictive", "fit", "load", "metrics",
    }  # fmt: skip
    assert all(hasattr(stochbn, name) for name in stochbn.__all__)
    assert all(hasattr(metrics, name) for name in ("evaluate", "ood", "entropy_cdf"))
    assert stochbn.__version__


def test_importing_the_library_imports_none_of_the_optional_packages() -> None:
    program = "import sys, json, stochbn; [getattr(stochbn, name) for name in stochbn.__all__]; "
    program += "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    imported = set(json.loads(done.stdout))
    assert {"stochbn", "torch", "safetensors"} <= imported
    optional = {
        "torchmetrics", "datasets", "rich", "typer", "sklearn", "matplotlib", "lightning_fabric", "lightning", "PIL",
        "pandas", "scipy",
    }  # fmt: skip
    assert not imported & optional


class Digits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(12, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(96, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


Data = tuple[nn.Module, DataLoader[tuple[Tensor, ...]], Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def digits() -> Data:
    """A network trained on the digits 0 to 9, its training data, held-out digits, their labels, and noise images."""
    images, targets = load_digits(return_X_y=True)
    x = torch.tensor(np.asarray(images), dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(np.asarray(targets), dtype=torch.long)
    order = torch.randperm(len(x), generator=seeded(1))
    x, y = x[order], y[order]
    train = DataLoader(
        TensorDataset(x[:1200], y[:1200]), batch_size=64, shuffle=True, drop_last=True, generator=seeded(2)
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Digits()
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(8):
            for batch, labels in train:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(batch), labels)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    noise = torch.rand(300, 1, 8, 8, generator=seeded(3))
    return model.eval(), train, x[1200:], y[1200:], noise


def test_from_a_trained_network_to_numbers(digits: Data, tmp_path: Path) -> None:
    model, train, x, y, noise = digits
    state = {name: value.clone() for name, value in model.state_dict().items()}

    posterior = stochbn.fit(model, train, batch_size=16)
    assert dict(posterior.layers) == {"body.1": 12, "body.5": 24, "head.1": 32}
    assert posterior.mini_batches == 18 * 4
    drawn = posterior.draw(7)
    assert {name: tuple(values.shape) for name, values in drawn.items()} == {
        f"{layer}.{kind}": (7, channels)
        for layer, channels in (("body.1", 12), ("body.5", 24), ("head.1", 32))
        for kind in ("running_mean", "running_var")
    }
    posterior.save(tmp_path / "posterior.safetensors")
    loaded = stochbn.load(tmp_path / "posterior.safetensors")

    plain = stochbn.Predictive(model)
    sbn = stochbn.Predictive(model, loaded, draws=30, generator=seeded(4))
    dropout = stochbn.MCDropout(model, draws=30, posterior=None)
    both = stochbn.MCDropout(model, draws=30, posterior=posterior, generator=seeded(5))
    ensemble = stochbn.Ensemble([plain, sbn, both])
    for predictive in (plain, sbn, dropout, both, ensemble):
        known, unknown = predictive(x), predictive(noise)
        torch.testing.assert_close(known.probs.sum(1), torch.ones(len(x)))
        found = metrics.evaluate(known.probs, y)
        assert found["error"] < 8
        assert 0 < found["nll"] < 0.4
        assert 0 < found["brier"] < 0.2
        assert 0 < found["ece"] < 0.2
        detected = metrics.ood(known.entropy, unknown.entropy)
        assert detected["auroc"] > 0.8
        assert detected["aupr"] > 0.6
        _, fractions = metrics.entropy_cdf(known.entropy)
        assert fractions[-1] == 1
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_fitted_centre_is_near_the_running_averages_of_training(digits: Data) -> None:
    """With batches as large as those of training; running averages are an exponential smoothing of the same numbers."""
    model, train, *_ = digits
    posterior = stochbn.fit(model, train, batch_size=None)
    at = 0
    for name, channels in posterior.layers.items():
        mean, var = posterior.expected[:, at : at + channels]
        at += channels
        running_mean = model.get_buffer(f"{name}.running_mean").double()
        running_var = model.get_buffer(f"{name}.running_var").double()
        scale = running_var.sqrt()
        assert ((mean - running_mean) / scale).abs().median() < 0.1
        assert (var / running_var).log().abs().median() < 0.2


def test_smaller_mini_batches_make_the_draws_disagree_more(digits: Data) -> None:
    model, train, x, _, _ = digits
    information = []
    for size in (4, 16, 64):
        posterior = stochbn.fit(model, train, batch_size=size)
        found = stochbn.Predictive(model, posterior, 20, generator=seeded())(x)
        information.append(found.mutual_information.mean().item())
    assert information[0] > 1.5 * information[1] > 1.5 * 1.5 * information[2] > 0
