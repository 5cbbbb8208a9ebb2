from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import stochbn
from conftest import mlp, normal, seeded, settled
from stochbn import cli
from stochbn.measuring import cost, timing
from stochbn.sources import architectures, checkpoints, named


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = named.load("digits:0-4", "train")
    arguments = architectures.arguments_for(images)
    model = architectures.build("lenet5", **arguments)
    file = tmp_path_factory.mktemp("network") / "network.safetensors"
    checkpoints.save(file, checkpoints.Checkpoint(model, "lenet5", arguments, images.name, images.classes))
    return file


def test_a_network_is_measured_and_the_results_written(network: Path, tmp_path: Path) -> None:
    arguments = ["bench", str(network), "--batch", "20", "--data", "digits:0-4", "--reference", "40"]
    result = CliRunner().invoke(
        cli.app, [*arguments, "--repetitions", "3", "--out", str(tmp_path / "out")], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"cost.json", "cost.md", "cost.png", "cost.svg"}
    (found,) = json.loads((tmp_path / "out" / "cost.json").read_text())["found"]
    assert found["batch"] == 20
    assert found["units"]["unit"] == 1
    assert all(value > 0 for value in found["units"].values())
    assert all(value > 0 for value in found["nll"].values())
    assert found["per_draw"] == pytest.approx(found["units"]["every"] / 16)
    curve = [(found["units"][f"draws {n}"], found["worth"][f"draws {n}"]) for n in cost.BUDGETS]
    reached = cost._reached([(units, worth or math.inf) for units, worth in curve], 50.0)
    assert found["to_50"] == (None if reached == math.inf else pytest.approx(reached))
    assert found["memory"] > 0
    assert found["textbook_50"] == pytest.approx(50 * found["units"]["textbook"])
    assert "lenet5, batch 20" in (tmp_path / "out" / "cost.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "digits:0-4", "--batch", "20", "--batch", "100000"], "fewer than a batch of 100000"),
        (["--data", "digits:0-4", "--out", "{file}"], "exists"),
        (["--data", "{large}"], "the network takes"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_measuring(
    arguments: list[str], message: str, network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "measure_trained", lambda *_, **__: pytest.fail("measured"))
    places = {"file": tmp_path / "file", "large": tmp_path / "large"}
    places["file"].write_text("something")
    for i in range(2):
        (places["large"] / "test" / str(i)).mkdir(parents=True)
        Image.new("L", (32, 32)).save(places["large"] / "test" / str(i) / "0.png")
    with pytest.raises((ValueError, OSError), match=message):
        CliRunner().invoke(
            cli.app, ["bench", str(network), *(a.format(**places) for a in arguments)], catch_exceptions=False
        )


def test_moments_are_the_mean_and_the_variance_of_what_is_given() -> None:
    values = 1000 + normal(40, 3, 2)
    mean, variance = timing.moments(iter(values))
    torch.testing.assert_close(mean, values.double().mean(0))
    torch.testing.assert_close(variance, values.double().var(0))


def test_works_are_called_in_turn_and_once_more_to_warm_up() -> None:
    called: list[str] = []
    took = timing.median_seconds({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, 3)
    assert called == ["a", "b"] * 4
    assert took.keys() == {"a", "b"}


def test_a_batch_larger_than_the_data_is_refused(network: Path) -> None:
    with pytest.raises(ValueError, match="fewer than a batch of 100000"):
        cost.measure_trained(network, 100_000, source="digits:0-4")


@pytest.mark.parametrize(
    ("curve", "wanted"),
    [
        ([(1.0, 10.0), (2.0, 40.0), (4.0, 90.0)], 2 * 2 ** (math.log(50 / 40) / math.log(90 / 40))),
        ([(1.0, 10.0), (3.0, 50.0)], 3.0),
        ([(2.0, 60.0), (3.0, 70.0)], 2.0),
        ([(1.0, 10.0), (2.0, 20.0)], math.inf),
    ],
)
def test_the_cost_of_an_accuracy_is_read_off_between_points(curve: list[tuple[float, float]], wanted: float) -> None:
    assert cost._reached(curve, 50.0) == pytest.approx(wanted)


def test_a_call_is_worth_the_variance_of_a_draw_over_its_own_error() -> None:
    model, x = settled(mlp(), 4).eval(), normal(5, 4)
    meter = cost.Meter(model, [normal(48, 4, seed=9)], x, {}, seed=3)
    few = meter.predictive(4, tolerance=0)
    worth, variance = meter.errors({"few": few}, 30, 2)
    buffers = dict(model.named_buffers())
    probs = []
    for draw in meter.posterior.iter_draws(30, seeded(10_003)):
        for name, values in draw.items():
            buffers[name].copy_(values)
        probs.append(stochbn.Predictive(model)(x).probs.double())
    each = torch.stack(probs)
    assert variance == pytest.approx(each.var(0).sum(1).mean().item())
    errors = [(few(x, generator=seeded(4 + i)).probs - each.mean(0)).square().sum(1).mean().item() for i in range(2)]
    own = variance / 30
    assert worth["few"] == pytest.approx(variance / max(own, sum(errors) / 2 - own), rel=1e-4)
