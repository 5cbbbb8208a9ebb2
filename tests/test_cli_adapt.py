"""Data that changes, at the command line: the reference of a fit, adapt, and what predict does about it."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import stochbn
from conftest import command_output as run
from stochbn.sources import build, load_weights
from test_own_network import told  # noqa: F401 - a fixture

NUMBER = itertools.count()
MODULE = """
import torch
from torch import nn

classes = ["bird", "cat", "dog"]

def network():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3),
    )

class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.norm(torch.relu(self.norm(x))))

def twice():
    return Twice()

def numbers():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1))

def odd():
    return [torch.randn(100, 3, 12, 12, generator=torch.Generator().manual_seed(0)) for _ in range(3)]
"""


def pictures(count: int, seed: int, *, dim: bool = False, classes: int = 3) -> tuple[Any, Any]:
    """Pictures ``[N, 12, 12, 3]`` whose colour is their class; dim ones are as a lamp that is almost out shows them."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    pixels = generator.integers(60, 150, (count, 12, 12, 3)).astype(np.int64)
    pixels[np.arange(count), :, :, labels] += generator.integers(10, 70, (count, 1, 1))
    return (pixels // 3 + 90 if dim else pixels).astype(np.uint8), labels


def folder(name: str, pixels: Any) -> Path:
    """Pictures without folders of classes."""
    path = Path(name)
    path.mkdir()
    for number, one in enumerate(pixels):
        Image.fromarray(one).save(path / f"{number:03}.png")
    return path


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """The options for a trained network; data to fit it to, and unlabelled data that is like it or is not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("STOCHBN_DATA", raising=False)
    name = f"own_drifting_{next(NUMBER)}"
    Path(f"{name}.py").write_text(MODULE)
    pixels, labels = pictures(300, 0)
    np.savez("train.npz", inputs=pixels.transpose(0, 3, 1, 2), labels=labels)
    x, y = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255, torch.from_numpy(labels)
    torch.manual_seed(0)
    model = build(f"{name}:network", {}).model.train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(8):
        for batch in torch.split(torch.randperm(len(x)), 20):
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(model(x[batch]), y[batch]))
            optimizer.step()
    with torch.no_grad():
        for batch in torch.split(torch.randperm(len(x)).repeat(4), 20):
            model(x[batch])
    save_file(model.state_dict(), "w.safetensors")
    for kind, dim in (("like", False), ("dim", True)):
        pixels, labels = pictures(192, 1, dim=dim)
        np.savez(f"{kind}.npz", inputs=pixels.transpose(0, 3, 1, 2), labels=labels)
        np.save(f"{kind}.npy", pixels.transpose(0, 3, 1, 2))
    return "--model", f"{name}:network", "--weights", "w.safetensors"


@pytest.fixture
def fitted(own: tuple[str, ...]) -> tuple[str, ...]:
    """The same, with a posterior beside the weights."""
    run("fit", *own, "--data", "train.npz")
    return own


def of_numbers(own: tuple[str, ...], function: str) -> tuple[str, ...]:
    """The options for a network of numbers, whose running statistics are those of x.npy."""
    x = np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32)
    np.save("x.npy", x)
    reference = own[1].replace("network", function)
    model = build(reference, {}).model.train()
    for _ in range(60):
        model(torch.from_numpy(x))
    save_file(model.state_dict(), "n.safetensors")
    return "--model", reference, "--weights", "n.safetensors"


def network(own: tuple[str, ...], weights: str = "w.safetensors") -> nn.Module:
    model = build(own[1], {}).model
    load_weights(model, weights)
    return model


def error_of(model: nn.Module, data: str) -> float:
    found = np.load(data)
    with torch.no_grad():
        predicted = model(torch.from_numpy(found["inputs"]) / 255).argmax(1)
    return float((predicted != torch.from_numpy(found["labels"])).float().mean())


def test_a_fit_keeps_what_the_output_means(own: tuple[str, ...]) -> None:
    run("fit", *own, "--data", "train.npz")
    reference = stochbn.load("w.sbn.safetensors").reference
    assert reference is not None
    assert reference.usual.tolist() == pytest.approx([1 / 3] * 3, abs=0.05)
    run("fit", *of_numbers(own, "numbers"), "--data", "x.npy", "--task", "regression")
    reference = stochbn.load("n.sbn.safetensors").reference
    assert reference is not None
    assert reference.edges.shape == (1, 9), "of the numbers that it predicts"
    assert reference.task["name"] == "regression"


def test_a_fit_leaves_the_reference_out_or_says_that_there_is_none(own: tuple[str, ...]) -> None:
    assert "no reference" not in run("fit", *own, "--data", "train.npz", "--no-reference")
    assert stochbn.load("w.sbn.safetensors").reference is None
    np.save("few.npy", np.load("train.npz")["inputs"][:40])
    assert "It has no reference for new data: that needs 256 examples" in run("fit", *own, "--data", "few.npy")


def test_a_reference_of_held_out_examples(own: tuple[str, ...]) -> None:
    found = np.load("train.npz")["inputs"]
    np.save("held.npy", found[:300])
    run("fit", *own, "--data", "train.npz", "--reference", "held.npy")
    reference = stochbn.load("w.sbn.safetensors").reference
    assert reference is not None
    assert reference.examples == 300
    with pytest.raises(ValueError, match="cannot be given together"):
        run("fit", *own, "--data", "train.npz", "--reference", "held.npy", "--no-reference")


@pytest.mark.filterwarnings("ignore:these mini-batches have other statistics")
def test_what_new_data_is_compared_with_has_no_random_changes(own: tuple[str, ...]) -> None:
    name = own[1].partition(":")[0]
    with Path(f"{name}.py").open("a") as file:
        file.write("\ndef train_preprocess(x):\n    return 1 - x\n")
    sys.modules.pop(name, None)
    run("fit", *own, "--data", "train.npz", "--out", "changed.sbn.safetensors")
    sys.modules.pop(name)
    Path(f"{name}.py").write_text(MODULE)
    run("fit", *own, "--data", "train.npz")
    changed, plain = (stochbn.load(f"{one}.sbn.safetensors") for one in ("changed", "w"))
    assert changed.reference is not None
    assert plain.reference is not None
    assert not torch.allclose(changed.observed, plain.observed, rtol=0.1)  # type: ignore[arg-type]
    torch.testing.assert_close(changed.reference.centre, plain.reference.centre, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("data", ["dim.npz", "dim.npy", "pictures", "dim.parquet"])
def test_a_posterior_is_adapted_to_unlabelled_data(data: str, fitted: tuple[str, ...]) -> None:
    if data == "pictures":
        folder(data, pictures(192, 1, dim=True)[0])
    if data.endswith(".parquet"):
        files = sorted(folder("pictures", pictures(192, 1, dim=True)[0]).iterdir())
        pyarrow.parquet.write_table(pyarrow.table({"image": [file.read_bytes() for file in files]}), data)
    before = Path("w.sbn.safetensors").read_bytes()
    text = run("adapt", *fitted, "--data", data, "--weights-out", "a.safetensors")
    assert Path("w.sbn.safetensors").read_bytes() == before
    adapted = stochbn.load("w.adapted.sbn.safetensors")
    assert adapted.centre == "adapted"
    assert adapted.adaptation is not None
    assert adapted.adaptation.examples == 192
    assert str(adapted.adaptation) in text
    assert "The look of the inputs has changed" in text
    assert "Saved the posterior as w.adapted.sbn.safetensors." in text
    assert "stochbn predict --model" in text
    assert "--posterior w.adapted.sbn.safetensors" in text
    assert error_of(network(fitted), "dim.npz") > 0.2
    error = error_of(network(fitted, "a.safetensors"), "dim.npz")
    assert error < 0.1
    run("evaluate", *fitted[:2], "--weights", "a.safetensors", "--data", "dim.npz", "--out", "r")
    (row,) = json.loads(Path("r/results.json").read_text())["scores"]
    assert row["error"] == pytest.approx(100 * error)


def test_data_like_the_training_data_leaves_the_network_as_it_is(fitted: tuple[str, ...]) -> None:
    text = run("adapt", *fitted, "--data", "like.npz", "--weights-out", "a.safetensors", "--examples", 100)
    assert "From 100 examples: There is no evidence that the look of the inputs has changed" in text
    before, after = load_file("w.safetensors"), load_file("a.safetensors")
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0.1, atol=0.05)


@pytest.mark.filterwarnings("ignore:this data is not like")
def test_the_network_that_is_written_predicts_as_the_adapted_posterior_without_noise(fitted: tuple[str, ...]) -> None:
    run("adapt", *fitted, "--data", "dim.npz", "--weights-out", "a.safetensors")
    adapted = stochbn.load("w.adapted.sbn.safetensors")
    adapted.rescale(float("inf")).save("still.sbn.safetensors")
    run("predict", *fitted, "--data", "dim.npy", "--posterior", "still.sbn.safetensors", "--out", "one.parquet")
    written = ("--model", fitted[1], "--weights", "a.safetensors")
    stochbn.load("w.sbn.safetensors").recentre(network(fitted, "a.safetensors")).rescale(float("inf")).save(
        "a.sbn.safetensors"
    )
    run("predict", *written, "--data", "dim.npy", "--out", "two.parquet")
    one, two = (pyarrow.parquet.read_table(f"{name}.parquet").to_pydict() for name in ("one", "two"))
    assert one["class"] == two["class"]
    np.testing.assert_allclose(one["probability"], two["probability"], rtol=1e-5)
    with torch.no_grad():
        probs = network(fitted, "a.safetensors")(torch.from_numpy(np.load("dim.npy")) / 255).softmax(1)
    np.testing.assert_allclose(probs.amax(1), one["probability"], rtol=1e-5)


def test_without_a_reference_a_warning_says_so(own: tuple[str, ...]) -> None:
    run("fit", *own, "--data", "train.npz", "--no-reference")
    with pytest.warns(UserWarning, match="has no reference"):
        text = run("adapt", *own, "--data", "dim.npz")
    assert "without a guard" in text


def test_a_network_of_paper_train_is_written_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run("train", "--data", "digits", "--out", "n.safetensors", "--epochs", 1)
    run("fit", "n.safetensors", "--batches", 20)
    text = run("adapt", "n.safetensors", "--weights-out", "m.safetensors", "--examples", 100)
    assert "From 100 examples" in text
    assert stochbn.load("n.adapted.sbn.safetensors").centre == "adapted"
    assert "NLL" in run("evaluate", "m.safetensors")


def test_what_adapt_cannot_do_is_told_before_the_work(
    fitted: tuple[str, ...],
    told: Callable[..., str],  # noqa: F811
) -> None:
    adapt = "adapt", *fitted, "--data", "dim.npz"
    for option in ("--out", "--weights-out"):
        assert "is also an input, which would be lost" in told(*adapt, option, "w.safetensors")
        assert "there is no folder 'nowhere'" in told(*adapt, option, "nowhere/a.safetensors")
    assert "is also an input" in told(*adapt, "--out", "w.sbn.safetensors")
    assert "is also an input" in told(*adapt, "--out", "dim.npz")
    assert "must end in .safetensors" in told(*adapt, "--weights-out", "a.pt")
    assert "name two files" in told(*adapt, "--out", "a.safetensors", "--weights-out", "./a.safetensors")
    assert "name a file for the posterior with --out" in told("adapt", *fitted[:2], "--data", "dim.npz")
    assert "name data with --data" in told("adapt", *fitted)
    np.save("none.npy", np.zeros((0, 3, 12, 12), np.float32))
    assert "holds no examples" in told("adapt", *fitted, "--data", "none.npy")
    np.save("nan.npy", np.full((20, 3, 12, 12), np.nan, np.float32))
    assert "none of 20 examples can be read" in told("adapt", *fitted, "--data", "nan.npy")
    Path("w.sbn.safetensors").unlink()
    assert "there is no posterior" in told(*adapt)
    assert not Path("w.adapted.sbn.safetensors").exists()


def about(path: str) -> Any:
    """What a Parquet file says of itself."""
    return json.loads(pyarrow.parquet.read_schema(path).metadata[b"stochbn"])


def wrong(path: str) -> float:
    """The share of wrong classes in a table of predictions of `pictures`."""
    found = pyarrow.parquet.read_table(path).to_pydict()["class"]
    names = ["bird", "cat", "dog"]
    return float(np.mean([names.index(one) != i % 3 for i, one in enumerate(found)]))


def test_predictions_of_changed_data_end_with_a_warning_that_says_what_to_do(fitted: tuple[str, ...]) -> None:
    with pytest.warns(UserWarning, match="not like the training data") as caught:
        run("predict", *fitted, "--data", "dim.npy", "--out", "p.parquet", "--draws", 4)
    (warning,) = caught
    text = str(warning.message)
    assert "in 192 examples the look of the inputs is unusual (p = " in text
    assert "most in '1'" in text or "most in '4'" in text
    assert "stochbn adapt --model" in text
    assert text.endswith("--data dim.npy")
    found = about("p.parquet")
    assert found["shift"]["p"] <= 0.01
    assert found["shift"]["examples"] == 192
    assert found["adaptation"] is None
    assert (found["draws"], found["seed"]) == (4, 0)


def test_predictions_of_data_like_the_training_data_have_no_warning(fitted: tuple[str, ...]) -> None:
    run("predict", *fitted, "--data", "like.npy", "--out", "p.parquet", "--draws", 4)
    assert about("p.parquet")["shift"]["p"] > 0.01


def test_another_mix_of_classes_is_told_from_another_look(fitted: tuple[str, ...]) -> None:
    pixels, labels = pictures(300, 2)
    np.save("cats.npy", pixels[labels == 1].transpose(0, 3, 1, 2))
    with pytest.warns(UserWarning, match="the mix of classes is unusual .* would not change the network"):
        run("predict", *fitted, "--data", "cats.npy", "--out", "p.parquet", "--draws", 4)


def test_a_posterior_is_adapted_to_the_data_before_its_predictions(fitted: tuple[str, ...]) -> None:
    with pytest.warns(UserWarning, match="not like the training data"):
        run("predict", *fitted, "--data", "dim.npy", "--out", "p.parquet", "--draws", 4)
    text = run("predict", *fitted, "--data", "dim.npy", "--out", "q.parquet", "--draws", 4, "--adapt", 192)
    assert "The posterior was adapted to this data first. From 192 examples: The look of the inputs has" in text
    assert wrong("p.parquet") > 0.2
    assert wrong("q.parquet") < 0.1
    assert about("q.parquet")["adaptation"].startswith("From 192 examples")
    assert about("q.parquet")["shift"] is None
    run("adapt", *fitted, "--data", "dim.npy")
    adapted = "--posterior", "w.adapted.sbn.safetensors"
    run("predict", *fitted, "--data", "dim.npy", "--out", "r.parquet", "--draws", 4, *adapted)
    assert pyarrow.parquet.read_table("r.parquet").equals(pyarrow.parquet.read_table("q.parquet"))


def test_a_run_that_adapts_does_not_go_on_with_the_parts_of_one_that_does_not(
    fitted: tuple[str, ...],
    told: Callable[..., str],  # noqa: F811
) -> None:
    x = np.load("like.npy").astype(np.float32) / 255
    x[-1] = np.nan
    np.save("x.npy", x)
    predict = "predict", *fitted, "--data", "x.npy", "--out", "p.parquet", "--batch", 20, "--part", 20, "--draws", 4
    assert "without --strict" in told(*predict, "--strict")
    assert "of a run with other options" in told(*predict, "--adapt", 100)
    run(*predict)
    assert about("p.parquet")["shift"]["examples"] == 20, "of a forward pass"
    assert "without --strict" in told(*predict, "--strict", "--adapt", 100)
    run(*predict, "--adapt", 100)
    run(*predict[:-6], "--batch", 20, "--part", 20, "--draws", 4, "--adapt", 100, "--out", "q.parquet")
    assert pyarrow.parquet.read_table("p.parquet").equals(pyarrow.parquet.read_table("q.parquet"))


def test_workers_of_ray_cannot_adapt(fitted: tuple[str, ...], told: Callable[..., str]) -> None:  # noqa: F811
    text = told("predict", *fitted, "--data", "dim.npy", "--out", "p.csv", "--engine", "ray", "--adapt", 10)
    assert "--adapt is for --engine local" in text
    assert "run 'stochbn adapt' first" in text


@pytest.mark.filterwarnings("ignore:these mini-batches have other statistics")
def test_what_cannot_be_compared_is_predicted_all_the_same(own: tuple[str, ...]) -> None:
    name = own[1].partition(":")[0]
    twice = of_numbers(own, "twice")
    text = run("fit", *twice, "--data", "x.npy")
    assert "It has no reference for new data" in text
    run("predict", *twice, "--data", "x.npy", "--out", "t.parquet", "--draws", 4)
    assert about("t.parquet")["shift"] is None
    run("fit", *own, "--data", f"{name}:odd", "--out", "o.sbn.safetensors", "--centre", "observed")
    run("predict", *own, "--posterior", "o.sbn.safetensors", "--data", f"{name}:odd", "--out", "o.parquet")
    assert about("o.parquet")["shift"]["examples"] == 250


def test_evaluate_and_its_page_say_that_the_data_has_changed(fitted: tuple[str, ...]) -> None:
    with pytest.warns(UserWarning, match="this data is not like the training data: .* look of the inputs is unusual"):
        run("evaluate", *fitted, "--data", "dim.npz", "--report", "page.html")
    page = Path("page.html").read_text()
    assert "Compared with the training data" in page
    assert "look of the inputs is unusual" in page
    run("adapt", *fitted, "--data", "dim.npy")
    run("evaluate", *fitted, "--data", "dim.npz", "--report", "page.html", "--posterior", "w.adapted.sbn.safetensors")
    page = Path("page.html").read_text()
    assert "guarantee no coverage on this data" in page
    assert "Compared with the training data" not in page
