"""Runs on MNIST and notMNIST, where there are local copies."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import torch

import stochbn
from stochbn import metrics
from stochbn.paper.runner import fit_posterior, predict_all
from stochbn.paper.schedule import Schedule
from stochbn.paper.training import train
from stochbn.sources import named
from stochbn.sources.architectures import lenet5

FOLDER = os.environ.get("STOCHBN_DATA")
pytestmark = pytest.mark.skipif(
    not FOLDER or not all((Path(FOLDER) / name).is_dir() for name in ("mnist", "notmnist")),
    reason="set STOCHBN_DATA to a folder with local copies of mnist and notmnist to run these tests",
)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps the caches of Hugging Face in a folder of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@functools.cache
def images(name: str, split: str) -> named.Images:
    return named.load(name, split)


def test_mnist_has_60000_and_10000_images() -> None:
    for split, count in (("train", 60_000), ("test", 10_000)):
        found = images("mnist", split)
        assert found.pixels.shape == (count, 1, 28, 28)
        assert found.pixels.dtype == torch.uint8
        assert found.labels.bincount().shape == (10,)
        assert found.labels.bincount().min() > 0.08 * count
        assert found.classes == tuple("0123456789")
        assert found.name == f"mnist ({split})"
    assert images("mnist", "train").labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert images("mnist", "test").labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    # The mean and standard deviation of the training pixels that everyone normalises MNIST with.
    pixels = images("mnist", "train").pixels.double() / 255
    assert pixels.mean().item() == pytest.approx(0.1307, abs=1e-4)
    assert pixels.std().item() == pytest.approx(0.3081, abs=1e-4)


def test_notmnist_has_ten_classes_of_letters() -> None:
    found = images("notmnist", "test")
    assert found.shape == (1, 28, 28)
    assert len(found.classes) == 10
    assert found.labels.bincount().shape == (10,)
    assert len(found) >= 1000
    assert images("mnist", "test").fingerprint != found.fingerprint


def test_lenet5_with_sbn_knows_digits_and_is_unsure_of_letters() -> None:
    training = images("mnist", "train").shuffled(0).take(torch.arange(3000))
    known, unknown = (images(name, "test").shuffled(0).take(torch.arange(1000)) for name in ("mnist", "notmnist"))
    model = train(lenet5, training, Schedule(2))
    posterior = fit_posterior(model, training, 16)
    predictive = stochbn.Predictive(model, posterior, draws=10)
    generator = torch.Generator().manual_seed(0)
    on_known, on_unknown = (predict_all(predictive, part, generator) for part in (known, unknown))
    assert metrics.evaluate(on_known.probs, known.labels)["error"] < 8
    assert on_unknown.entropy.mean() > on_known.entropy.mean()
    assert metrics.ood(on_known.entropy, on_unknown.entropy)["auroc"] > 0.6
