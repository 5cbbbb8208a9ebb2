from __future__ import annotations

import csv
import functools
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import typer.main
from typer.testing import CliRunner

import stochbn
import stochbn.__main__
from conftest import make_posterior, seeded
from stochbn import cli
from stochbn.paper import figures, recipes, report, runner, study, training
from stochbn.paper.schedule import Schedule, read_log
from stochbn.processes import ProcessError
from stochbn.sources import checkpoints, named
from stochbn.sources.architectures import build, build_with_uniform_scale
from stochbn.sources.checkpoints import Checkpoint
from test_runner import TINY

COMMANDS: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in an empty folder, know no local data sets and keep caches to themselves."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("STOCHBN_DATA", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def stochbn_(*args: object) -> str:
    """What a command prints that succeeds."""
    result = CliRunner().invoke(cli.app, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "Traceback" not in result.output
    return result.stdout


def words(text: str) -> str:
    """The text without the frames of tables and with single spaces."""
    return " ".join(re.sub(r"[─-╿|]", " ", text).split())


@dataclass(frozen=True)
class Trained:
    """Two plain networks and one with dropout, with posteriors, and what training and fitting the first printed."""

    networks: tuple[Path, Path, Path]
    output: str


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("a folder with a name so long that no line of a terminal holds it " + 30 * "x")
    networks = folder / "a.safetensors", folder / "b.safetensors", folder / "dropout.safetensors"
    output = ""
    for seed, network in enumerate(networks):
        common = "train", "--data", "digits:0-4", "--epochs", 1, "--out", network, "--seed", seed
        text = stochbn_(*common, *(("--dropout", 0.2) if seed == 2 else ()))
        text += stochbn_("fit", network, "--seed", seed)
        output = output or text
    return Trained(networks, output)


@pytest.fixture
def alone(trained: Trained, tmp_path: Path) -> Path:
    """A copy of the first network, without its posterior."""
    return Path(shutil.copy(trained.networks[0], tmp_path / "alone.safetensors"))


def write_images(folder: Path, pixels: Any, labels: list[int], classes: Sequence[str] = "abcde") -> Path:
    """A local data set with the same images for training and testing."""
    folder.mkdir(parents=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(classes))})
    table = datasets.Dataset.from_dict({"image": list(pixels), "label": labels}, features=features)
    for split in ("train", "test"):
        table.to_parquet(str(folder / f"{split}.parquet"))
    return folder


def noise(n: int, *shape: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, (n, *shape), dtype=np.uint8)


# ---------------------------------------------------------------- what each command does


def test_training_and_fitting_leave_a_network_and_its_posterior(trained: Trained) -> None:
    for number, path in enumerate(trained.networks):
        checkpoint = checkpoints.load(path)
        assert checkpoint.data == "digits:0-4"
        assert checkpoint.classes == tuple("01234")
        assert checkpoint.arguments.get("dropout", 0) == (0.2 if number == 2 else 0)
        posterior = stochbn.load(path.with_name(path.name.replace(".safetensors", ".sbn.safetensors")))
        posterior.check(checkpoint.model)
        assert posterior.batch_size == 16
        assert posterior.mini_batches == len(named.load("digits:0-4", "train")) // 16
    assert sorted(path.name for path in trained.networks[0].parent.iterdir()) == [
        "a.safetensors", "a.sbn.safetensors", "a.training.csv", "b.safetensors", "b.sbn.safetensors", "b.training.csv",
        "dropout.safetensors", "dropout.sbn.safetensors", "dropout.training.csv",
    ]  # fmt: skip
    (epoch,) = read_log(trained.networks[0].with_name("a.training.csv"))
    assert epoch.accuracy > 0.5


def test_training_and_fitting_say_what_to_run_next_in_a_line_that_can_be_copied(trained: Trained) -> None:
    network = str(trained.networks[0])
    commands = [shlex.split(line.split("Next: ")[1]) for line in trained.output.splitlines() if "Next: " in line]
    assert commands == [["stochbn", "fit", network], ["stochbn", "evaluate", network]]


def test_the_same_seed_gives_the_same_network_and_posterior(trained: Trained) -> None:
    stochbn_("train", "--data", "digits:0-4", "--epochs", 1, "--out", "again.safetensors", "--seed", 0)
    stochbn_("fit", "again.safetensors", "--seed", 0)
    first, again, other = (
        checkpoints.load(path).model.state_dict()
        for path in (trained.networks[0], "again.safetensors", trained.networks[1])
    )
    assert all(value.equal(again[name]) for name, value in first.items())
    assert not all(value.equal(other[name]) for name, value in first.items())
    posteriors = stochbn.load("again.sbn.safetensors"), stochbn.load(trained.networks[0].with_name("a.sbn.safetensors"))
    drawn = [posterior.draw(2, seeded()) for posterior in posteriors]
    assert all(values.equal(drawn[1][name]) for name, values in drawn[0].items())


def test_a_posterior_can_be_fitted_with_other_settings_to_another_place(trained: Trained) -> None:
    before = trained.networks[0].read_bytes()
    stochbn_("fit", trained.networks[0], "--data", "digits:0-1", "--batch-size", 4, "--out", "other.safetensors")
    posterior = stochbn.load("other.safetensors")
    images = len(named.load("digits:0-1", "train"))
    assert (posterior.batch_size, posterior.mini_batches) == (4, images // 4)
    assert trained.networks[0].read_bytes() == before


def test_evaluating_all_kinds_of_networks_shows_every_method(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    text = stochbn_("evaluate", *trained.networks, "--ood", "digits:5-9", "--draws", 3, "--out", "results")
    results = json.loads(Path("results/results.json").read_text())
    assert [(row["method"], row["sbn"], row["members"]) for row in results["scores"]] == [
        ("plain", False, 1), ("plain", True, 1), ("Deep Ensembles", False, 2), ("Deep Ensembles", True, 2),
        ("Dropout", False, 1), ("Dropout", True, 1),
    ]  # fmt: skip
    scores = results["scores"]
    assert all(row["error"] < 20 for row in scores)
    assert all(row["entropy_unknown"] > row["entropy_known"] for row in scores)
    for i, label in enumerate(("plain", "Deep Ensembles (2)", "Dropout")):
        plain, sbn = scores[2 * i : 2 * i + 2]
        cells = [
            f"{score[key]:.{n}f} ± {score[f'{key}_se']:.{n}f}"
            for key, n in (("error", 2), ("nll", 4))
            for score in (plain, sbn)
        ]
        assert f"{label} {' '.join(cells)}" in words(text)
        drawn = "SBN" if label == "plain" else f"{label} + SBN"
        assert f"{drawn} {sbn['entropy_known']:.3f}" in words(text)
    assert "digits:0-4 (test)" in text
    assert "digits:5-9 (test)" in text
    assert (results["data"], results["ood"], results["draws"], results["seed"]) == (
        "digits:0-4 (test)", "digits:5-9 (test)", 3, 0,
    )  # fmt: skip
    assert results["networks"] == [str(path) for path in trained.networks]
    assert Path("results/entropy-cdf.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in Path("results/entropy-cdf.svg").read_text()
    assert "| Deep Ensembles (2) |" in Path("results/results.md").read_text()


def test_evaluation_gives_the_scores_of_the_networks_predictions(trained: Trained) -> None:
    stochbn_("evaluate", *trained.networks[:2], "--draws", 2, "--seed", 4, "--out", "results")
    results = json.loads(Path("results/results.json").read_text())
    known = named.load("digits:0-4", "test")
    x = known.pixels.float() / 255
    with torch.no_grad():
        probs = [checkpoints.load(path).model(x).softmax(1) for path in trained.networks[:2]]
    for row, expected in ((results["scores"][0], probs[0]), (results["scores"][2], (probs[0] + probs[1]) / 2)):
        for key, value in stochbn.metrics.evaluate(expected, known.labels).items():
            assert row[key] == pytest.approx(value, rel=1e-4, abs=1e-6)


def test_evaluation_without_out_writes_nothing(trained: Trained) -> None:
    text = stochbn_("evaluate", trained.networks[0], "--draws", 2)
    assert "SBN" in text
    assert "Deep Ensembles" not in text
    assert not list(Path().iterdir())


def test_a_network_without_a_posterior_is_evaluated_without_sbn_and_that_is_said(alone: Path) -> None:
    text = stochbn_("evaluate", alone, "--ood", "digits:5-9", "--out", "results")
    results = json.loads(Path("results/results.json").read_text())
    assert [(row["method"], row["sbn"]) for row in results["scores"]] == [("plain", False)]
    assert f"without SBN only. Next, fit one: stochbn fit {alone}" in words(text)


def test_posteriors_can_be_named_in_the_order_of_the_networks(trained: Trained, alone: Path) -> None:
    files = [path.with_name(path.name.replace(".safetensors", ".sbn.safetensors")) for path in trained.networks]
    stochbn_("evaluate", alone, trained.networks[1], "--posterior", files[0], "--posterior", files[1], "--draws", 2,
             "--out", "named")  # fmt: skip
    stochbn_("evaluate", *trained.networks[:2], "--draws", 2, "--out", "default")
    named, default = (json.loads(Path(f"{name}/results.json").read_text())["scores"] for name in ("named", "default"))
    assert named == default


def test_any_network_with_dropout_counts_as_dropout(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", noise(20, 32, 32, 3), [i % 5 for i in range(20)])
    arguments = {"classes": 5, "channels": 3, "size": 32, "width": 0.05, "classifier_dropout": 0.5}
    checkpoints.save(
        "v.safetensors", Checkpoint(build("vgg11", **arguments), "vgg11", arguments, str(folder), tuple("abcde"))
    )
    text = stochbn_("evaluate", "v.safetensors", "--draws", 2)
    assert "│ Dropout" in text
    assert "│ SBN" not in text


def test_a_network_can_be_trained_with_every_option_of_a_recipe(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", noise(32, 32, 32, 3), [i % 5 for i in range(32)])
    options: tuple[object, ...] = (
        "--width", 0.05, "--dropout", 0.1, "--classifier-dropout", 0.25, "--no-bias", "--augment",
        "--decay", "epoch", "--decrease-from", 1, "--uniform-scale", "--precision", "bf16-mixed",
    )  # fmt: skip
    given = ("train", "--data", folder, "--network", "vgg11", "--epochs", 3, "--batch-size", 8)
    stochbn_(*given, *options, "--out", "v.safetensors")
    checkpoint = checkpoints.load("v.safetensors")
    shape = {"classes": 5, "channels": 3, "size": 32}
    network = {"width": 0.05, "dropout": 0.1, "classifier_dropout": 0.25, "bias": False}
    assert checkpoint.arguments == shape | network
    expected = training.train(
        functools.partial(build_with_uniform_scale, "vgg11", **checkpoint.arguments),
        named.load(str(folder), "train"),
        Schedule(3, 8, augment=True, precision="bf16-mixed", decay="epoch", decrease_from=1),
    )
    theirs = expected.state_dict()
    assert all(value.equal(theirs[name]) for name, value in checkpoint.model.state_dict().items())


def read_csv(path: str) -> list[dict[str, str]]:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def test_predictions_are_a_csv_with_a_line_for_each_image(trained: Trained) -> None:
    text = stochbn_("predict", trained.networks[0], "--draws", 4, "--out", "p.csv")
    known = named.load("digits:0-4", "test")
    rows = read_csv("p.csv")
    assert len(Path("p.csv").read_text().splitlines()) == len(known) + 1
    assert [row["image"] for row in rows] == [str(i) for i in range(len(known))]
    for row in rows:
        probability, entropy, information = (
            float(row[key]) for key in ("probability", "entropy", "mutual_information")
        )
        assert 0.2 <= probability <= 1 + 1e-6
        assert 0 <= information <= entropy + 1e-5 <= math.log(5) + 2e-5
    right = sum(row["class"] == known.classes[label] for row, label in zip(rows, known.labels.tolist(), strict=True))
    assert right > 0.85 * len(known)
    least_certain = max(rows, key=lambda row: float(row["entropy"]))
    assert least_certain["image"] in words(text).split()
    assert f"Saved {len(known)} predictions" in words(text)


@pytest.mark.filterwarnings("ignore:this data is not like the training data")
def test_predictions_are_those_of_the_library(trained: Trained) -> None:
    stochbn_("predict", trained.networks[0], "--data", "digits:5-9", "--draws", 3, "--seed", 8, "--out", "p.csv")
    unknown = named.load("digits:5-9", "test")
    posterior = stochbn.load(trained.networks[0].with_name("a.sbn.safetensors"))
    predictive = stochbn.Predictive(checkpoints.load(trained.networks[0]).model, posterior, 3)
    batches = [predictive(x, generator=seeded(8)) for x, _ in unknown.batches(250)]  # each sees the draws of the seed
    expected = batches[0].cat(batches)
    rows = read_csv("p.csv")
    for key, values in (
        ("probability", expected.probs.max(1).values),
        ("entropy", expected.entropy),
        ("mutual_information", expected.mutual_information),
    ):
        np.testing.assert_allclose([float(row[key]) for row in rows], values.numpy(), rtol=1e-3, atol=1e-5)
    assert [row["class"] for row in rows] == [str(i) for i in expected.probs.argmax(1).tolist()]


def test_predictions_depend_on_the_seed_and_on_nothing_else(trained: Trained) -> None:
    for name, seed in (("a.csv", 1), ("b.csv", 1), ("c.csv", 2)):
        stochbn_("predict", trained.networks[0], "--data", "digits:0-4", "--draws", 2, "--seed", seed, "--out", name)
    first, second, other = (Path(name).read_bytes() for name in ("a.csv", "b.csv", "c.csv"))
    assert first == second != other


def test_names_with_brackets_are_shown_as_they_are(trained: Trained, tmp_path: Path) -> None:
    network = Path(shutil.copy(trained.networks[0], "net[draft].safetensors"))
    assert "net[draft].sbn.safetensors" in stochbn_("fit", network, "--data", "digits:0-1")
    assert "p[v].csv" in stochbn_("predict", network, "--data", "digits:0-1", "--draws", 1, "--out", "p[v].csv")
    assert "out[x]" in stochbn_("evaluate", network, "--data", "digits", "--data", "digits:0-4", "--draws", 1, "--out",
                                "out[x]")  # fmt: skip


def test_class_names_with_brackets_are_shown_as_they_are(tmp_path: Path) -> None:
    classes = "[bold]", "dog [red]", "[/INST]", "[/]", ":smile:"
    folder = write_images(tmp_path / "images", noise(40, 28, 28), [i % 5 for i in range(40)], classes)
    arguments = {"classes": 5, "channels": 1, "size": 28}
    network = Checkpoint(build("lenet5", **arguments), "lenet5", arguments, str(folder), classes)
    checkpoints.save("n.safetensors", network)
    stochbn_("fit", "n.safetensors")
    text = stochbn_("predict", "n.safetensors", "--draws", 1, "--out", "p.csv")
    predicted = {row["class"] for row in read_csv("p.csv")}
    assert predicted <= set(classes)
    assert any(f" {name} " in text for name in predicted)


@pytest.mark.parametrize("columns", ["40", pytest.param("200", marks=pytest.mark.long)])
def test_a_terminal_that_shows_ascii_alone_gets_every_number(columns: str, trained: Trained) -> None:
    """With a file name that it cannot show."""
    network = Path(shutil.copy(trained.networks[0], "n\u00e9t\u2713.safetensors"))
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "LANG": "C", "TERM": "dumb", "COLUMNS": columns}

    def run(*command: object) -> tuple[int, bytes, bytes]:
        arguments = [sys.executable, "-m", "stochbn", *map(str, command)]
        ended = subprocess.run(arguments, capture_output=True, check=False, env=environment)
        assert ended.stdout.isascii()
        return ended.returncode, ended.stdout, ended.stderr

    code, output, error = run("fit", network)
    assert (code, error) == (0, b"")
    assert rb"n\xe9t\u2713.sbn.safetensors" in output
    code, output, error = run("evaluate", network, "--ood", "digits:5-9", "--draws", 1, "--out", "r")
    assert (code, error) == (0, b"")
    for cell in re.findall(r"-?\d+\.\d+", Path("r/results.md").read_text()):
        assert cell.encode() in output
    code, _, error = run("fit", "none\u2713")
    assert code == 1
    assert rb"there is no file 'none\u2713'" in error


# ---------------------------------------------------------------- runs


@pytest.fixture
def tiny_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(TINY, epochs=1, train_images=32, test_images=20, draws=2)
    monkeypatch.setattr(figures, "save_statistics", lambda *_, **__: [])  # takes long
    monkeypatch.setitem(recipes.DEMOS, "digits", recipe)
    monkeypatch.setitem(recipes.PRESETS, "lenet5", recipes.PRESETS["lenet5"] | {"smoke": recipe})


def test_the_demonstration_leaves_results_figure_and_posteriors_and_says_what_is_next(
    tiny_demo: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [str(Path(stochbn.__main__.__file__)), "demo"])  # as in python -m stochbn
    text = stochbn_("demo", "--jobs", 1)
    folder = Path("demo-digits")
    results = json.loads((folder / "results.json").read_text())
    assert len(results["scores"]) == 6
    assert results["recipe"]["draws"] == 2
    for name in ("dropout-0", "plain-0", "plain-1"):
        posterior = stochbn.load(folder / name / "network.sbn.safetensors")
        posterior.check(checkpoints.load(folder / name / "network.safetensors").model)
    assert (folder / "entropy-cdf.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / "entropy-cdf.svg").read_text()
    assert (folder / "results.md").stat().st_size
    for row in ("plain", "Deep Ensembles (2)", "Dropout"):
        assert row in text
    assert "demo-digits" in text
    (command,) = [shlex.split(line) for line in text.splitlines() if "demo --data mnist" in line]
    assert shutil.which(command[0]), f"{command[0]} is no program"

    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    assert "demo --data mnist" in stochbn_("demo", "--jobs", 1)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")} == before
    (folder / "results.json").unlink()
    stochbn_("report", folder)
    assert json.loads((folder / "results.json").read_text())["scores"] == results["scores"]
    evaluated = stochbn_("evaluate", folder / "plain-0" / "network.safetensors", "--draws", 2)
    assert "SBN" in evaluated


def test_reproducing_an_experiment_changes_its_preset_field_by_field(tiny_demo: None) -> None:
    stochbn_("reproduce", "lenet5", "--preset", "smoke", "--jobs", 1, "--members", 1, "--dropout", 0, "--draws", 1,
             "--unknown", "none", "--seed", 3, "--learning-rate", 0.002, "--statistics-batch", 8, "--out", "run",
             "--no-augment")  # fmt: skip
    about = json.loads(Path("run/run.json").read_text())
    expected = recipes.PRESETS["lenet5"]["smoke"]
    changes = {"members": 1, "dropout": None, "draws": 1, "unknown": None, "seed": 3, "learning_rate": 0.002}
    assert about["recipe"] == {**expected.as_dict(), **changes, "statistics_batch": 8, "augment": False}
    assert [row["method"] for row in json.loads(Path("run/results.json").read_text())["scores"]] == ["plain", "plain"]
    assert stochbn.load("run/plain-0/network.sbn.safetensors").batch_size == 8


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_names_every_option_with_its_meaning(command: str) -> None:
    arguments = [command, "--help"] if command else ["--help"]
    result = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "250", "TERM": "dumb"})
    assert result.exit_code == 0
    shown = words(result.stdout)
    if not command:
        for name, found in COMMANDS.items():
            if found.hidden:
                continue
            assert name in shown
            assert words(found.help.split("\n")[0].removesuffix("."))[:40] in shown
        return
    for parameter in COMMANDS[command].params:
        name = parameter.metavar if parameter.param_type_name == "argument" else parameter.opts[0]
        assert name in shown
        assert parameter.help, f"{name} is not explained"
        plain = words(parameter.help.replace("\\[", "[")).split()
        assert " ".join(plain[:6]) in shown, f"{name}: {parameter.help}"


@pytest.mark.parametrize("columns", [40, 60, 99, 100])
def test_the_help_names_every_option_in_any_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, main: Callable[..., Ended]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for command, found in COMMANDS.items():
        shown = words(main(command, "--help").output)
        for parameter in found.params:
            assert parameter.param_type_name == "argument" or parameter.opts[0] in shown
        assert "…" not in shown


def test_the_experiments_are_under_paper_and_under_their_old_names() -> None:
    under = COMMANDS["paper"].commands
    old = {"train", "fit", "evaluate", "predict", "reproduce", "report", "compare"}
    assert set(under) == old | {"ablate", "augment", "claims", "redraw", "store"}
    for name in sorted(old):
        found = under[name]
        assert found.callback.__wrapped__ is COMMANDS[name].callback.__wrapped__
        assert [parameter.name for parameter in found.params] == [p.name for p in COMMANDS[name].params]
    shown = CliRunner().invoke(cli.app, ["paper"], env={"COLUMNS": "250"}).output
    assert all(name in shown for name in under)


def test_an_experiments_network_is_trained_and_used_under_paper() -> None:
    stochbn_("paper", "train", "--data", "digits:0-1", "--epochs", 1, "--out", "n.safetensors")
    stochbn_("paper", "fit", "n.safetensors")
    assert "SBN" in stochbn_("paper", "evaluate", "n.safetensors", "--draws", 2)
    stochbn_("paper", "predict", "n.safetensors", "--draws", 2, "--out", "p.csv")
    assert read_csv("p.csv")


def test_without_a_command_the_help_is_shown() -> None:
    result = CliRunner().invoke(cli.app, [])
    assert all(name in result.output for name, found in COMMANDS.items() if not found.hidden)
    assert "Traceback" not in result.output


# ---------------------------------------------------------------- errors


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    output: str
    error: str


@pytest.fixture
def main(program: Callable[..., tuple[Any, str, str]]) -> Callable[..., Ended]:
    """Runs the program as its script does."""

    def call(*args: object) -> Ended:
        code, output, error = program(*args)
        if isinstance(code, str):
            return Ended(1, output, f"{error}{code}\n")
        return Ended(code or 0, output, error)

    return call


def assert_told(ended: Ended, *parts: str) -> None:
    """The command failed with one line on stderr that has these parts."""
    assert ended.code == 1, ended
    assert len(ended.error.strip().splitlines()) == 1, ended.error
    assert "Traceback" not in ended.output + ended.error
    for part in parts:
        assert part in ended.error


def test_success_is_exit_code_0_with_nothing_on_stderr(main: Callable[..., Ended]) -> None:
    ended = main("--help")
    assert (ended.code, ended.error) == (0, "")
    assert "Usage" in ended.output


@pytest.mark.parametrize("args", [["fit"], ["train", "--data", "digits"], ["evaluat"], ["fit", "x", "--batchsize", 3],
                                  ["predict", "x", "--out", "y", "--draws", 0]], ids=str)  # fmt: skip
def test_wrong_usage_is_exit_code_2(args: list[object], main: Callable[..., Ended]) -> None:
    ended = main(*args)
    assert ended.code == 2
    assert "Traceback" not in ended.error
    assert ended.error


@pytest.mark.parametrize("command", ["fit", "evaluate", "predict"])
def test_a_missing_network_is_told(command: str, main: Callable[..., Ended]) -> None:
    more = ["--out", "p.csv"] if command == "predict" else []
    assert_told(main(command, "none.safetensors", *more), "there is no file 'none.safetensors'")
    assert not Path("p.csv").exists()


@pytest.mark.parametrize("command", ["fit", "evaluate", "predict"])
def test_a_damaged_network_and_a_posterior_in_its_place_are_told(
    command: str, alone: Path, main: Callable[..., Ended]
) -> None:
    more = ["--out", "p.csv"] if command == "predict" else []
    alone.write_bytes(alone.read_bytes()[:-100])
    assert_told(main(command, alone, *more), "alone.safetensors", "is truncated")
    make_posterior().save(alone)
    assert_told(main(command, alone, *more), "alone.safetensors", "not a stochbn.network file")


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_a_damaged_posterior_and_one_of_another_network_are_told(
    command: str, alone: Path, main: Callable[..., Ended]
) -> None:
    more = ["--out", "p.csv"] if command == "predict" else []
    posterior = alone.with_name("alone.sbn.safetensors")
    make_posterior({"norm": 3}).save(posterior)
    assert_told(main(command, alone, *more), "layer 'norm'", "it was fitted to another network")
    posterior.write_bytes(posterior.read_bytes()[:-10])
    assert_told(main(command, alone, *more), "alone.sbn.safetensors", "is truncated")
    assert_told(main(command, alone, "--posterior", alone, *more), "not a stochbn.posterior file")
    assert_told(main(command, alone, "--posterior", "none", *more), "there is no file 'none'")
    assert not Path("p.csv").exists()


def test_predicting_without_a_posterior_is_told(alone: Path, main: Callable[..., Ended]) -> None:
    assert_told(main("predict", alone, "--out", "p.csv"), "alone.sbn.safetensors")


def test_images_that_the_network_does_not_take_are_told(
    trained: Trained, tmp_path: Path, main: Callable[..., Ended]
) -> None:
    network = trained.networks[0]
    small = write_images(tmp_path / "small", noise(6, 20, 20), [0, 1, 2, 3, 4, 0])
    colour = write_images(tmp_path / "colour", noise(6, 28, 28, 3), [0, 1, 2, 3, 4, 0])
    for folder, shape in ((small, "[1, 20, 20]"), (colour, "[3, 28, 28]")):
        for command in (
            ["fit", network, "--data", folder, "--out", "new.safetensors"],
            ["evaluate", network, "--data", folder],
            ["evaluate", network, "--ood", folder],
            ["predict", network, "--data", folder, "--out", "p.csv"],
        ):
            assert_told(main(*command), shape, "the network takes [1, 28, 28]")
    assert_told(main("evaluate", network, "--data", "digits"), "trained on 0, 1, 2, 3, 4", "NAME:0-4")
    assert_told(main("evaluate", network, "--data", "digits:5-9"), "classes 5, 6, 7, 8, 9")
    assert not Path("p.csv").exists()
    assert not Path("new.safetensors").exists()


def test_images_that_are_not_square_are_told(tmp_path: Path, main: Callable[..., Ended]) -> None:
    folder = write_images(tmp_path / "wide", noise(20, 20, 28), [0] * 20)
    assert_told(main("train", "--data", folder, "--epochs", 1, "--out", "n.safetensors"), "square")
    assert not Path("n.safetensors").exists()


def test_data_that_cannot_be_had_is_told(trained: Trained, main: Callable[..., Ended]) -> None:
    for command in (
        ["train", "--data", "minst", "--out", "n.safetensors"],
        ["fit", trained.networks[0], "--data", "minst"],
        ["evaluate", trained.networks[0], "--ood", "minst"],
        ["predict", trained.networks[0], "--data", "minst", "--out", "p.csv"],
    ):
        assert_told(main(*command), "unknown data set 'minst'")
    assert_told(main("predict", trained.networks[0], "--split", "dev", "--out", "p.csv"), "not 'dev'")
    assert_told(main("train", "--data", "digits:5-12", "--out", "n.safetensors"), "the classes 0 to 9, not 5 to 12")


def test_without_a_connection_it_is_told_what_to_do(
    monkeypatch: pytest.MonkeyPatch, main: Callable[..., Ended]
) -> None:
    def unreachable(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach 'ylecun/mnist' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    for command in (["train", "--data", "mnist", "--out", "n.safetensors"], ["demo", "--data", "mnist"]):
        assert_told(main(*command), "hf download ylecun/mnist", "STOCHBN_DATA")
    assert not Path("demo-mnist").exists()


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read: neither networks nor data nor runs."""

    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("the work began")

    for module, name in ((named, "load"), (checkpoints, "load"), (report, "read_recipe"), (report, "read_run")):
        monkeypatch.setattr(module, name, load)
    monkeypatch.setattr(study, "read_recipe", load)


@pytest.mark.parametrize("command", ["train", "fit", "predict"])
def test_files_that_cannot_be_written_are_told_before_the_work(
    command: str, trained: Trained, tmp_path: Path, no_work: None, main: Callable[..., Ended]
) -> None:
    start = ["train", "--data", "digits"] if command == "train" else [command, trained.networks[0]]
    os.mkfifo(tmp_path / "pipe")
    assert_told(main(*start, "--out", tmp_path / "none" / "file"), "there is no folder", "make it first")
    assert_told(main(*start, "--out", tmp_path), "is a folder; name a file")
    assert_told(main(*start, "--out", tmp_path / "pipe"), "is a pipe, a device or another special file")
    if command == "train":
        (tmp_path / "n.training.csv").mkdir()
        assert_told(main(*start, "--out", tmp_path / "n.safetensors"), "n.training.csv", "is a folder; name a file")


@pytest.mark.parametrize(
    ("command", "file"),
    [
        (["evaluate", "NETWORK", "--out"], "results.json"),
        (["diagnose", "NETWORK", "--out"], "diagnosis.png"),
        (["bench", "NETWORK", "--out"], "cost.svg"),
        (["demo", "--out"], "results.md"),
        (["reproduce", "lenet5", "--out"], "entropy-cdf.svg"),
        (["report", "a", "b", "--out"], "results.md"),
        (["report"], "training.png"),
        (["compare"], "comparison.md"),
    ],
    ids=lambda given: given[0] if isinstance(given, list) else given,
)
def test_folders_that_cannot_be_written_are_told_before_the_work(
    command: list[str], file: str, trained: Trained, tmp_path: Path, no_work: None, main: Callable[..., Ended]
) -> None:
    start = [trained.networks[0] if word == "NETWORK" else word for word in command]
    (tmp_path / "file").write_text("precious")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder" / file).mkdir(parents=True)
    assert_told(main(*start, tmp_path / "file"), "exists and is no folder; name another folder")
    assert_told(main(*start, tmp_path / "pipe"), "exists and is no folder; name another folder")
    assert_told(main(*start, tmp_path / "file" / "new"), "is no folder; name another folder")
    assert_told(main(*start, tmp_path / "folder"), file, "is a folder; name a file")
    if Path("/proc/self").exists():  # where nobody may make a folder
        assert_told(main(*start, "/proc/new"), "the folder '/proc' is not writable")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "pipe"]


@pytest.mark.parametrize("command", ["predict", "bench"])
def test_ctrl_c_ends_a_command_with_a_word_and_without_files(
    command: str, trained: Trained, tmp_path: Path, main: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = stochbn.Predictive._drawn

    def interrupted(*args: Any) -> Iterator[Any]:
        yield from itertools.islice(drawn(*args), 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(stochbn.Predictive, "_drawn", interrupted)
    ended = main(command, trained.networks[0], "--out", tmp_path / "results.csv")
    assert ended.code == 130
    again = " Run it again to continue." if command == "predict" else ""
    assert ended.error.splitlines()[-1] == f"Stopped.{again}"
    assert "Traceback" not in ended.error
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and "cache" not in path.parts]


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o555)
    yield folder
    folder.chmod(0o755)


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_folders_without_permission_are_told(trained: Trained, read_only: Path, main: Callable[..., Ended]) -> None:
    network = trained.networks[0]
    commands: tuple[list[object], ...] = (["train", "--data", "digits"], ["fit", network], ["predict", network])
    for command in commands:
        assert_told(main(*command, "--out", read_only / "file"), "is not writable")
    assert_told(main("evaluate", network, "--out", read_only / "results"), "read-only")
    assert_told(main("demo", "--out", read_only / "run"), "read-only")


def test_a_file_in_the_place_of_a_folder_is_told(trained: Trained, tmp_path: Path, main: Callable[..., Ended]) -> None:
    (tmp_path / "file").write_text("precious")
    assert_told(main("evaluate", trained.networks[0], "--draws", 1, "--out", tmp_path / "file"), "file")
    assert_told(main("demo", "--out", tmp_path / "file"), "name another folder")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("precious")
    assert_told(main("demo", "--out", tmp_path / "folder"), "not empty and not a run folder")
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["train", "--network", "lenet6"], "unknown network 'lenet6'"),
        (["train", "--learning-rate", -1], "a positive learning rate"),
        (["train", "--learning-rate", "nan"], "a positive learning rate"),
        (["train", "--batch-size", 9999], "fewer than one batch of 9999"),
        (["train", "--learning-rate", 1e30, "--epochs", 1], "use a lower learning rate"),
    ],
    ids=str,
)
def test_impossible_training_is_told(args: list[object], part: str, main: Callable[..., Ended]) -> None:
    assert_told(main(*args, "--data", "digits:0-1", "--out", "n.safetensors"), part)
    assert not list(Path().iterdir())


def test_impossible_evaluation_is_told(trained: Trained, main: Callable[..., Ended]) -> None:
    posterior = trained.networks[0].with_name("a.sbn.safetensors")
    networks = trained.networks[:2]
    assert_told(main("evaluate", *networks, "--posterior", posterior), "got 1 posteriors for 2 networks")
    assert_told(main("fit", networks[0], "--batch-size", 10**6, "--out", "x"), "1000000")


def test_impossible_runs_are_told(tiny_demo: None, main: Callable[..., Ended]) -> None:
    assert_told(main("demo", "--data", "imagenet"), "digits or mnist", "'imagenet'")
    assert_told(main("report", "none"), "is no run folder")


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["alexnet"], "alexnet"),
        (["lenet5", "--preset", "huge"], "huge"),
        (["lenet5", "--preset", "smoke", "--epochs", 0], "epochs"),
        (["lenet5", "--preset", "smoke", "--batch-size", 1], "batch size"),
        (["lenet5", "--preset", "smoke", "--learning-rate", 0], "learning rate"),
        (["lenet5", "--preset", "smoke", "--held-out", 1], "held_out"),
        (["lenet5", "--preset", "smoke", "--width", 0.5], "width"),
        (["lenet5", "--preset", "smoke", "--classifier-dropout", 0.5], "classifier_dropout"),
        (["lenet5", "--preset", "smoke", "--precision", "float"], "float"),
    ],
    ids=str,
)
def test_impossible_experiments_are_told_and_claim_no_folder(
    args: list[object], part: str, tiny_demo: None, main: Callable[..., Ended]
) -> None:
    assert_told(main("reproduce", *args, "--jobs", 1, "--out", "run"), part)
    assert not Path("run").exists(), "the folder now belongs to a run that cannot be made"


def test_the_failure_of_a_members_process_is_told(monkeypatch: pytest.MonkeyPatch, main: Callable[..., Ended]) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ProcessError("plain-0 failed: OSError: [Errno 28] No space left on device")

    monkeypatch.setattr(runner, "run", fail)
    assert_told(main("demo"), "plain-0 failed", "[Errno 28] No space left on device")


def test_errors_of_several_lines_are_told_in_one(monkeypatch: pytest.MonkeyPatch, main: Callable[..., Ended]) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("An error occurred while generating the dataset\n\nAll the data files must match\n")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert_told(main("train", "--data", "mnist", "--out", "n.safetensors"), "All the data files must match")


@pytest.mark.parametrize("name", ["typer", "rich"])
def test_a_command_line_that_is_not_installed_says_what_to_install(
    name: str, monkeypatch: pytest.MonkeyPatch, main: Callable[..., Ended]
) -> None:
    monkeypatch.delattr(stochbn, "cli")
    for module in list(sys.modules):
        if module.split(".")[:2] == ["stochbn", "cli"] or module.split(".")[0] == name:
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    assert_told(main("demo"), f"needs {name}", "pip install 'stochbn[cli]'")


@pytest.mark.parametrize("name", ["sklearn", "torchmetrics"])
def test_experiments_that_are_not_installed_say_what_to_install(
    name: str, trained: Trained, monkeypatch: pytest.MonkeyPatch, main: Callable[..., Ended]
) -> None:
    for module in list(sys.modules):
        if module.split(".")[0] == name:
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    assert_told(main("evaluate", trained.networks[0], "--draws", 1), name, "pip install 'stochbn[")


def test_the_module_tells_errors_in_one_line_too(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "broken", noise(4, 28, 28), [0, 1, 2, 3])
    file = folder / "test.parquet"
    file.write_bytes(file.read_bytes()[:-200])
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=False)
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    ended = run([sys.executable, "-m", "stochbn", "train", "--data", folder, "--out", "n"], env=environment)
    assert_told(Ended(ended.returncode, ended.stdout, ended.stderr), "a file may be damaged", str(folder))


# ---------------------------------------------------------------- kinds of posteriors


@pytest.mark.parametrize("kind", ["joint", "empirical", "factorized"])
def test_a_posterior_of_any_kind_is_fitted_and_used(kind: str, alone: Path, main: Callable[..., Ended]) -> None:
    stochbn_("fit", alone, "--kind", kind)
    assert stochbn.load(alone.with_name("alone.sbn.safetensors")).kind == kind
    text = words(stochbn_("evaluate", alone, "--draws", 2))
    assert "NLL" in text
    assert_told(main("fit", alone, "--kind", "gaussian"), "unknown kind 'gaussian'")


def test_a_diagnosis_says_what_to_use_and_draws_it(alone: Path, tmp_path: Path, main: Callable[..., Ended]) -> None:
    text = words(stochbn_("diagnose", alone, "--rescaled", 8, "--out", tmp_path / "diagnosis"))
    assert re.search(r"Use --kind (joint|empirical)|--kind factorized loses little", text)
    assert "Mini-batches of 8: observed over rescaled" in text
    written = tmp_path / "diagnosis" / "diagnosis.md"
    assert len([line for line in written.read_text().splitlines() if line.startswith("| 10 |")]) == 2
    assert written.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert written.with_suffix(".svg").exists()
    assert_told(main("diagnose", alone, "--images", 100), "at least 10 mini-batches, got 6")


@pytest.mark.filterwarnings("ignore:the noise of the smallest")
def test_kinds_of_posteriors_are_compared_on_the_networks_of_a_run(tmp_path: Path, main: Callable[..., Ended]) -> None:
    recipe = replace(TINY, dropout=None, members=1, epochs=1, train_images=96, held_out=0.2, unknown=None, draws=1)
    runner.run(recipe, tmp_path / "run")
    settings = ["--members", 1, "--draws", 2, "--fit-images", 64, "--held-out", 20, "--exact", 10, "--jobs", 1]
    text = words(stochbn_("compare", tmp_path / "run", *settings))
    assert "joint, recentred" in text
    assert "inference was exact too" in text
    written = (tmp_path / "run" / "comparison.md").read_text()
    assert written.startswith("**lenet5 on digits:0-4")
    assert "KL to exact" in written
    assert_told(main("compare", tmp_path / "run", "--members", 2), "has 1 plain networks, 2 were asked for")


def test_a_folder_for_the_tables_of_one_run_is_refused(tmp_path: Path, main: Callable[..., Ended]) -> None:
    assert_told(main("report", tmp_path / "run", "--out", tmp_path / "other"), "--out is for several runs")


def test_help_and_version_need_no_torch() -> None:
    for arguments, told in (
        (["--help"], "Commands:"),
        (["predict", "--help"], "--tolerance"),
        (["--version"], "torch"),
    ):
        code = f"import sys; sys.argv = ['stochbn', *{arguments!r}]; from stochbn.__main__ import main\n"
        code += "try: main()\nexcept SystemExit: pass\nprint('torch' in sys.modules, 'numpy' in sys.modules)"
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert told in found.stdout
        assert found.stdout.splitlines()[-1] == "False False"


def test_every_public_name_is_there_at_first_use() -> None:
    code = "import stochbn\nassert not [n for n in stochbn.__all__ if n not in dir(stochbn)]\n"
    code += "for name in stochbn.__all__: getattr(stochbn, name)\nstochbn.predictions.Estimate\n"
    code += "try: stochbn.nothing\nexcept AttributeError as error: print(error)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "module 'stochbn' has no attribute 'nothing'\n"


def test_names_can_be_used_first_from_many_threads() -> None:
    code = """
import sys, threading
sys.setswitchinterval(1e-5)
import stochbn
names, errors = [*stochbn.__all__], []
begin = threading.Barrier(len(names))
def use(name):
    begin.wait()
    try: getattr(stochbn, name)
    except BaseException as error: errors.append((name, repr(error)))
threads = [threading.Thread(target=use, args=(name,)) for name in names]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not errors, errors
assert not hasattr(stochbn, "a.b") and not hasattr(stochbn, "_nothing")
"""
    for _ in range(3):
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert found.returncode == 0, found.stderr
