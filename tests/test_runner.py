from __future__ import annotations

import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor, nn

import stochbn
from conftest import fit_factorized, seeded
from stochbn.files import read_tensors
from stochbn.paper import runner
from stochbn.paper.recipes import DEMOS, PRESETS, Member, Recipe
from stochbn.paper.runner import DRAWS, PREDICTIONS, fit_posterior, predict_all, predict_member, run
from stochbn.paper.training import augmented
from stochbn.sources import checkpoints, named
from stochbn.sources.architectures import build
from stochbn.sources.named import Images

TINY = Recipe(
    "lenet5",
    "digits:0-4",
    "digits:5-9",
    epochs=2,
    members=2,
    dropout={"dropout": 0.5},
    draws=3,
    train_images=48,
    test_images=30,
)
NAMES = ("dropout-0", "plain-0", "plain-1")


class StopHereError(Exception):
    """What stops a run that is to be continued."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, str, int, int]]]:
    """A run in this process with one thread, and what it reported."""
    folder, events = tmp_path_factory.mktemp("runs") / "whole", list[tuple[str, str, int, int]]()
    assert torch.get_num_threads() == 1
    run(TINY, folder, progress=lambda *event: events.append(event))
    return folder, events


def predictions(folder: Path, names: Iterable[str] = NAMES) -> dict[str, dict[str, Tensor]]:
    return {name: read_tensors(folder / name / "predictions.safetensors", PREDICTIONS)[0] for name in names}


def probabilities(tensors: dict[str, Tensor]) -> set[str]:
    """The names of what is predicted but for expected entropies."""
    return {name for name in tensors if not name.endswith(".expected_entropy")}


def assert_same_numbers(folder: Path, other: Path, names: Iterable[str] = NAMES) -> None:
    for name, tensors in predictions(folder, names).items():
        theirs = predictions(other)[name]
        assert tensors.keys() == theirs.keys()
        for key, value in tensors.items():
            assert value.equal(theirs[key]), f"{name}: {key}"
        ours, others = (checkpoints.load(f / name / "network.safetensors").model.state_dict() for f in (folder, other))
        assert all(value.equal(others[key]) for key, value in ours.items()), f"{name}: weights"


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(file.relative_to(folder)): (file.stat().st_mtime_ns, file.read_bytes())
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


# ---------------------------------------------------------------- recipes


def test_every_member_has_a_seed_of_its_own_also_under_other_seeds() -> None:
    recipes = [replace(TINY, members=6, seed=seed) for seed in range(4)]
    seeds = [recipe.schedule(member).seed for recipe in recipes for member in recipe.all_members()]
    assert len(seeds) == len(set(seeds)) == 28


def test_members_are_the_plain_networks_and_if_wanted_one_with_dropout() -> None:
    assert {member.name for member in TINY.all_members()} == set(NAMES)
    assert {member.name for member in replace(TINY, dropout=None).all_members()} == {"plain-0", "plain-1"}


def test_members_are_built_for_the_images_and_only_one_with_dropout() -> None:
    images = Images(torch.zeros(4, 3, 20, 20, dtype=torch.uint8), torch.zeros(4).long(), tuple("abcd"), "x")
    recipe = replace(TINY, arguments={"width": 0.5})
    plain = {"classes": 4, "channels": 3, "size": 20, "width": 0.5}
    assert recipe.network_arguments(Member("plain", 1), images) == plain
    assert recipe.network_arguments(Member("dropout", 0), images) == plain | {"dropout": 0.5}


def test_the_schedule_of_a_member_is_that_of_the_recipe() -> None:
    recipe = replace(TINY, epochs=7, batch_size=5, learning_rate=0.125, augment=True, decay="epoch", decrease_from=3)
    for member in recipe.all_members():
        schedule = recipe.schedule(member)
        assert (schedule.epochs, schedule.batch_size, schedule.learning_rate) == (7, 5, 0.125)
        assert schedule.augment
        assert (schedule.decay, schedule.decrease_from) == ("epoch", 3)
        assert (schedule.precision, schedule.compile) == (recipe.precision, recipe.compile)


@pytest.mark.parametrize("recipe", [TINY, *DEMOS.values(), *(r for p in PRESETS.values() for r in p.values())])
def test_recipes_survive_json_and_can_be_built(recipe: Recipe) -> None:
    assert Recipe(**json.loads(json.dumps(recipe.as_dict()))) == recipe
    assert set(recipe.as_dict()) == {field.name for field in fields(Recipe)}
    channels, size = (3, 32) if recipe.data.startswith("cifar") else (1, 28)
    with torch.device("meta"):
        for member in recipe.all_members():
            images = Images(torch.zeros(1, channels, size, size).to(torch.uint8), torch.zeros(1).long(), ("a",), "x")
            model = build(recipe.network, **recipe.network_arguments(member, images))
            assert any(isinstance(m, nn.Dropout) for m in model.modules()) == (member.kind == "dropout")


def test_recipes_of_earlier_runs_name_the_networks_of_today() -> None:
    newer = {"decay", "decrease_from", "uniform_scale", "augment_fit", "drawn"}
    for network, arguments in (("resnet18", {"width": 0.25}), ("vgg11", {"width": 0.5}), ("lenet5", {})):
        recipe = replace(TINY, network=network, arguments=arguments)
        assert Recipe.from_dict(recipe.as_dict()) == recipe
        older = {name: value for name, value in recipe.as_dict().items() if name not in newer}
        read = Recipe.from_dict(older)
        renamed = {"resnet18": {"network": "resnet18-final-bn"}, "vgg11": {"arguments": {"width": 0.5, "bias": False}}}
        assert read == replace(recipe, **renamed.get(network, {}))  # type: ignore[arg-type]
        assert (read.decay, read.uniform_scale) == ("step", False)


@pytest.mark.parametrize(
    "change",
    [{"drawn": "none"}, {"decay": "year"}, {"decrease_from": 2}, {"epochs": 0},
     {"members": 0}, {"draws": 0}, {"statistics_batch": 0}, {"train_images": 0}, {"test_images": -1},
     {"held_out": 1.0}, {"held_out": -0.1}, {"evaluate_on": "held-out"}, {"held_out": 0.1, "evaluate_on": "train"},
     {"batch_size": 1}, {"learning_rate": 0.0}, {"learning_rate": -1.0}],
    ids=str,
)  # fmt: skip
def test_impossible_settings_are_refused_before_a_folder_is_made(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        run(replace(TINY, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- fitting and predicting


@functools.cache
def lenet(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return build("lenet5", classes=5, dropout=dropout).eval()


def part(source: str, split: str, n: int) -> Images:
    return named.load(source, split).take(torch.arange(n))


def test_a_posterior_is_fitted_to_all_images_in_the_order_of_the_seed() -> None:
    images = part("digits:0-4", "train", 70)
    lenet()
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    calls: list[tuple[int, int]] = []
    posteriors = [fit_posterior(lenet(), images, 2, seed, lambda *call: calls.append(call)) for seed in (3, 3, 4)]
    assert torch.random.get_rng_state().equal(state)
    order = torch.randperm(70, generator=seeded(3))
    slow = fit_factorized(lenet(), [images.pixels[order].float() / 255], 2)
    for name in ("mean_mean", "mean_variance", "variance_mean", "variance_variance"):
        torch.testing.assert_close(getattr(posteriors[0], name), getattr(slow, name), rtol=1e-4, atol=1e-7)
        assert getattr(posteriors[0], name).equal(getattr(posteriors[1], name))
        assert not getattr(posteriors[0], name).equal(getattr(posteriors[2], name))
    assert posteriors[0].mini_batches == 35
    assert calls[-1] == (70, 70)


def test_masks_of_dropout_come_from_the_seed_when_a_posterior_is_fitted() -> None:
    images = part("digits:0-4", "train", 64)
    model, found = lenet(0.5), []
    for global_seed, seed in ((1, 5), (2, 5), (2, 6)):
        torch.manual_seed(global_seed)
        found.append(fit_posterior(model, images.shuffled(0), 32, seed=seed).expected[1])
    assert found[0].equal(found[1])
    assert not found[0].equal(found[2])


def test_a_data_set_is_predicted_in_its_order_batch_by_batch() -> None:
    images = named.load("digits:0-4", "test").take(torch.arange(260))
    calls: list[tuple[int, int]] = []
    found = predict_all(stochbn.Predictive(lenet()), images, report=lambda *call: calls.append(call))
    with torch.no_grad():
        torch.testing.assert_close(found.probs, lenet()(images.pixels.float() / 255).softmax(1))
    assert [total for _, total in calls] == [260] * len(calls)
    assert calls[-1] == (260, 260)
    assert len(calls) > 1


def test_a_plain_member_predicts_as_it_is_and_with_sbn() -> None:
    known, unknown = part("digits:0-4", "test", 12), part("digits:5-9", "test", 7)
    posterior = fit_posterior(lenet(), part("digits:0-4", "train", 64), 16)
    found = predict_member(lenet(), posterior, known, unknown, 4, seed=9)
    assert probabilities(found) == {"labels", "plain.known", "plain.unknown", "sbn.known", "sbn.unknown"}
    assert found["labels"].equal(known.labels)
    with torch.no_grad():
        for key, images in (("known", known), ("unknown", unknown)):
            x = images.pixels.float() / 255
            torch.testing.assert_close(found[f"plain.{key}"], lenet()(x).log_softmax(1))
            slow = stochbn.Predictive(lenet(), posterior, 4)(x, generator=seeded(9)).probs.log()
            torch.testing.assert_close(found[f"sbn.{key}"], slow)
            if key == "known":
                expected = stochbn.Predictive(lenet(), posterior, 4)(x, generator=seeded(9)).expected_entropy
                torch.testing.assert_close(found["sbn.known.expected_entropy"], expected)
            assert not torch.allclose(found[f"sbn.{key}"], found[f"plain.{key}"], atol=1e-3)


def test_a_member_with_dropout_keeps_it_on() -> None:
    known = part("digits:0-4", "test", 12)
    posterior = fit_posterior(lenet(0.5), part("digits:0-4", "train", 64), 16)
    found = predict_member(lenet(0.5), posterior, known, None, 4, seed=9)
    x = known.pixels.float() / 255
    for key, given in (("plain", None), ("sbn", posterior)):
        slow = stochbn.MCDropout(lenet(0.5), 4, given)(x, generator=seeded(9)).probs.log()
        torch.testing.assert_close(found[f"{key}.known"], slow)
    with torch.no_grad():
        assert not torch.allclose(found["plain.known"], lenet(0.5)(x).log_softmax(1), atol=1e-3)


def test_without_posterior_or_unknown_data_a_member_predicts_less() -> None:
    known, unknown = part("digits:0-4", "test", 5), part("digits:5-9", "test", 4)
    calls: list[tuple[int, int]] = []
    assert probabilities(predict_member(lenet(), None, known, None, 2, 0)) == {"labels", "plain.known"}
    found = predict_member(lenet(), None, known, unknown, 2, 0, lambda *call: calls.append(call))
    assert probabilities(found) == {"labels", "plain.known", "plain.unknown"}
    assert calls == [(5, 9), (9, 9)]


# ---------------------------------------------------------------- runs


def test_a_run_leaves_every_members_network_posterior_and_predictions(finished: tuple[Path, Any]) -> None:
    folder, _ = finished
    assert {path.name for path in folder.rglob("training*")} == {"training.csv"}, (
        "the state of training was left behind"
    )
    assert not list(folder.rglob(".*")), "temporary files were left behind"
    for name in NAMES:
        checkpoint = checkpoints.load(folder / name / "network.safetensors")
        assert checkpoint.data == "digits:0-4"
        assert checkpoint.classes == tuple("01234")
        assert checkpoint.arguments.get("dropout", 0) == (0.5 if name == "dropout-0" else 0)
        posterior = stochbn.load(folder / name / "network.sbn.safetensors")
        posterior.check(checkpoint.model)
        assert (posterior.batch_size, posterior.mini_batches) == (16, 3)
    for tensors in predictions(folder).values():
        assert probabilities(tensors) == {"labels", "plain.known", "plain.unknown", "sbn.known", "sbn.unknown"}
        for key, value in tensors.items():
            assert len(value) == 30
            if key in probabilities(tensors) - {"labels"}:
                torch.testing.assert_close(value.exp().sum(1), torch.ones(30))


def test_a_run_keeps_every_draw_of_every_member_and_method_in_half_precision(finished: tuple[Path, Any]) -> None:
    folder, _ = finished
    for name, means in predictions(folder).items():
        draws, about = read_tensors(folder / name / "draws.safetensors", DRAWS)
        assert about == {"member": name}
        assert set(draws) == probabilities(means) - {"labels"}
        for key, value in draws.items():
            passes = 1 if key.startswith("plain") and name != "dropout-0" else 3
            assert (value.dtype, value.shape) == (torch.float16, (passes, 30, 5))
            mean = value.double().exp().mean(0)
            torch.testing.assert_close(mean, means[key].double().exp(), rtol=1e-2, atol=1e-3)
    assert not draws["sbn.known"][0].equal(draws["sbn.known"][1])


def test_draws_are_left_out_where_that_is_asked_for_or_where_they_are_large(
    finished: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(TINY, members=1, dropout=None)
    run(recipe, tmp_path / "without", keep_draws=False)
    monkeypatch.setattr(runner, "DRAWS_LIMIT", 2 * 3 * 60 * 5 * 2 - 1)
    run(recipe, tmp_path / "large")
    run(recipe, tmp_path / "asked for", keep_draws=True)
    for name, kept in (("without", False), ("large", False), ("asked for", True)):
        assert (tmp_path / name / "plain-0" / "draws.safetensors").exists() == kept
        assert_same_numbers(tmp_path / name, finished[0], ["plain-0"])


def test_posteriors_are_fitted_on_augmented_images_if_the_recipe_says_so(
    finished: tuple[Path, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run(replace(TINY, members=1, dropout=None, augment_fit=True), folder)
    home = folder / "plain-0"
    model = checkpoints.load(home / "network.safetensors").model
    seed = TINY.schedule(Member("plain", 0)).seed
    train = named.load("digits:0-4", "train").shuffled(0).take(torch.arange(48))
    fitted = stochbn.load(home / "network.sbn.safetensors")
    again = fit_posterior(model, augmented(train, seed), 16, seed).draw(2, seeded())
    for name, value in fitted.draw(2, seeded()).items():
        torch.testing.assert_close(value, again[name])
    unlike = stochbn.load(finished[0] / "plain-0" / "network.sbn.safetensors").draw(2, seeded())
    assert all(not value.equal(unlike[name]) for name, value in fitted.draw(2, seeded()).items())
    observed, _ = read_tensors(home / "statistics.safetensors", runner.STATISTICS)
    together = torch.cat([observed[layer] for layer in fitted.layers], 2).double()
    assert isinstance(fitted, stochbn.Factorized)
    torch.testing.assert_close(together.mean(0)[0], fitted.mean_mean, rtol=1e-4, atol=1e-6)


def test_the_hidden_linear_layer_of_lenet5_keeps_its_running_statistics_if_the_recipe_says_so(
    finished: tuple[Path, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run(replace(TINY, members=1, drawn="convolutions"), folder)
    for name, hidden in (("plain-0", "10"), ("dropout-0", "12")):
        fitted, all_drawn = (stochbn.load(f / name / "network.sbn.safetensors") for f in (folder, finished[0]))
        model = checkpoints.load(folder / name / "network.safetensors").model
        fitted.check(model)
        assert isinstance(model.get_submodule(hidden), nn.BatchNorm1d)
        assert list(fitted.skipped) == [hidden]
        assert list(fitted.layers) == [layer for layer in all_drawn.layers if layer != hidden]
        assert isinstance(fitted, stochbn.Factorized)
        assert isinstance(all_drawn, stochbn.Factorized)
        for key in ("mean_mean", "mean_variance", "variance_mean", "variance_variance"):
            assert getattr(fitted, key).equal(getattr(all_drawn, key)[:70])
    ours, theirs = predictions(folder, ["plain-0"])["plain-0"], predictions(finished[0])["plain-0"]
    assert ours["plain.known"].equal(theirs["plain.known"])
    assert not ours["sbn.known"].equal(theirs["sbn.known"])


def test_a_run_grows_by_members_and_keeps_what_is_there(finished: tuple[Path, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(replace(TINY, members=1, dropout=None), folder)
    before = contents(folder)
    run(TINY, folder)
    assert_same_numbers(folder, finished[0])
    after = contents(folder)
    assert all(after[name] == content for name, content in before.items() if name != "run.json")
    assert json.loads((folder / "run.json").read_text()) == json.loads((finished[0] / "run.json").read_text())
    for change in ({"members": 1}, {"dropout": None}, {"members": 3, "draws": 9}, {"dropout": {"dropout": 0.1}}):
        with pytest.raises(ValueError, match="holds another run"):
            run(replace(TINY, **change), folder)
    assert contents(folder) == after


def test_members_differ(finished: tuple[Path, Any]) -> None:
    found = predictions(finished[0])
    assert not found["plain-0"]["plain.known"].equal(found["plain-1"]["plain.known"])
    assert found["plain-0"]["labels"].equal(found["plain-1"]["labels"])


def test_a_members_predictions_are_those_of_its_network_on_the_test_images(finished: tuple[Path, Any]) -> None:
    folder, _ = finished
    about = json.loads((folder / "run.json").read_text())
    test = named.load("digits:0-4", "test")
    chosen = test.take(torch.randperm(len(test), generator=seeded(0))[:30])
    assert about["data"]["known"]["sha256"] == chosen.fingerprint
    assert predictions(folder)["plain-1"]["labels"].equal(chosen.labels)
    model = checkpoints.load(folder / "plain-1" / "network.safetensors").model
    with torch.no_grad():
        expected = model(chosen.pixels.float() / 255).log_softmax(1)
    torch.testing.assert_close(predictions(folder)["plain-1"]["plain.known"], expected)


def test_a_run_records_recipe_data_and_versions(finished: tuple[Path, Any]) -> None:
    about = json.loads((finished[0] / "run.json").read_text())
    assert Recipe(**about["recipe"]) == TINY
    assert {part: entry["images"] for part, entry in about["data"].items()} == {"train": 48, "known": 30, "unknown": 30}
    assert about["versions"]["stochbn"] == stochbn.__version__
    assert about["versions"]["torch"] == torch.__version__
    assert about["machine"]["cores"] == os.cpu_count()


def test_every_stage_is_reported_up_to_its_end(finished: tuple[Path, list[tuple[str, str, int, int]]]) -> None:
    for name in NAMES:
        for stage in ("train", "fit", "predict"):
            events = [(done, total) for member, at, done, total in finished[1] if (member, at) == (name, stage)]
            assert [done for done, _ in events] == sorted(done for done, _ in events)
            assert len({total for _, total in events}) == 1
            assert events[-1][0] == events[-1][1]


def test_a_finished_run_does_nothing_again(finished: tuple[Path, Any]) -> None:
    folder, _ = finished
    before, events = contents(folder), []
    run(TINY, folder, progress=lambda *event: events.append(event))
    run(TINY, folder, jobs=2, progress=lambda *event: events.append(event))
    assert events == []
    assert contents(folder) == before


def test_the_global_generator_is_left_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(77)
    state = torch.random.get_rng_state()
    run(replace(TINY, epochs=1, members=1, train_images=32, test_images=4), tmp_path / "run")
    assert torch.random.get_rng_state().equal(state)


def test_members_side_by_side_give_the_numbers_of_members_one_after_another(
    finished: tuple[Path, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)  # for two jobs: one thread each, as in this process
    events: list[tuple[str, str, int, int]] = []
    run(replace(TINY, members=1), tmp_path / "run", jobs=2, progress=lambda *event: events.append(event))
    names = "dropout-0", "plain-0"
    assert_same_numbers(tmp_path / "run", finished[0], names)
    assert sorted(events) == sorted(event for event in finished[1] if event[0] in names)


@pytest.mark.parametrize(
    ("member", "stage", "done"),
    [("dropout-0", "train", 3), ("plain-0", "train", 6), ("plain-1", "fit", 48), ("plain-0", "predict", 60)],
)
def test_a_stopped_run_continues_and_ends_with_the_same_numbers(
    member: str, stage: str, done: int, finished: tuple[Path, Any], tmp_path: Path
) -> None:
    def stop(*event: Any) -> None:
        if event[:3] == (member, stage, done):
            raise StopHereError

    folder = tmp_path / "run"
    with pytest.raises(StopHereError):
        run(TINY, folder, progress=stop)
    before = contents(folder)
    events = []
    run(TINY, folder, progress=lambda *event: events.append(event))
    assert_same_numbers(folder, finished[0])
    after = contents(folder)
    for file, content in before.items():
        if "training" not in file:
            assert after[file] == content, f"{file} was made again"
    finished_before = {name for name in NAMES if f"{name}/predictions.safetensors" in before}
    assert not finished_before & {event[0] for event in events}


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
from test_runner import TINY, run
torch.set_num_threads(1)
def kill(*event):
    if event[:3] == ("plain-0", "train", 6):
        os.kill(os.getpid(), signal.SIGKILL)
run(TINY, Path(sys.argv[1]), progress=kill)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL, which this system does not have")
def test_a_killed_run_continues_and_ends_with_the_same_numbers(finished: tuple[Path, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code = KILLED.format(tests=str(Path(__file__).parent))
    killed = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (folder / "plain-0" / "network.safetensors").exists()
    run(TINY, folder)
    assert_same_numbers(folder, finished[0])
    assert {Path(file).name for file in contents(folder) if "training" in file} == {"training.csv"}


INTERRUPTED = """
import multiprocessing.process, os, signal, sys, threading
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_runner import TINY, run
start = multiprocessing.process.BaseProcess.start
def start_and_interrupt(process):
    threading.Timer(0.2, os.killpg, (os.getpgid(0), signal.SIGINT)).start()
    start(process)
if __name__ == "__main__":
    multiprocessing.process.BaseProcess.start = start_and_interrupt
    {call}
"""


def interrupted(call: str, tmp_path: Path) -> str:
    """What a program prints on standard error whose whole process group is interrupted as its processes start."""
    (tmp_path / "program.py").write_text(INTERRUPTED.format(tests=str(Path(__file__).parent), call=call))
    command = [sys.executable, str(tmp_path / "program.py")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True, timeout=200)
    assert ended.returncode == -signal.SIGINT, ended.stderr
    return ended.stderr


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups, which this system does not have")
def test_processes_that_are_interrupted_as_they_start_say_nothing(tmp_path: Path) -> None:
    error = interrupted(f"run(TINY, Path({str(tmp_path / 'run')!r}), jobs=2)", tmp_path)
    assert error.count("Traceback") == 1, error
    assert error.splitlines()[-1] == "KeyboardInterrupt"


def test_a_run_without_dropout_and_unknown_data_has_only_the_rest(tmp_path: Path) -> None:
    recipe = replace(TINY, dropout=None, unknown=None, members=1, epochs=1, train_images=32, test_images=5)
    run(recipe, tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()} == {"plain-0"}
    tensors, _ = read_tensors(tmp_path / "run" / "plain-0" / "predictions.safetensors", PREDICTIONS)
    assert probabilities(tensors) == {"labels", "plain.known", "sbn.known"}
    assert set(json.loads((tmp_path / "run" / "run.json").read_text())["data"]) == {"train", "known"}


def test_choices_can_be_made_on_a_part_of_the_training_images(tmp_path: Path) -> None:
    recipe = replace(TINY, dropout=None, unknown=None, members=1, epochs=1, train_images=None, test_images=None)
    recipe = replace(recipe, data="digits:0-1", held_out=0.2, draws=1)
    whole = len(named.load("digits:0-1", "train"))
    entries = {}
    for evaluate_on in ("test", "held-out"):
        run(replace(recipe, evaluate_on=evaluate_on), tmp_path / evaluate_on)
        entries[evaluate_on] = json.loads((tmp_path / evaluate_on / "run.json").read_text())["data"]
        assert entries[evaluate_on]["held-out"]["images"] == round(0.2 * whole)
        assert entries[evaluate_on]["train"]["images"] == whole - round(0.2 * whole)
    assert entries["held-out"]["known"] == entries["held-out"]["held-out"]
    assert entries["test"]["known"]["sha256"] == named.load("digits:0-1", "test").fingerprint


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "change",
    [{"epochs": 3}, {"seed": 1}, {"draws": 4}, {"members": 1}, {"learning_rate": 1e-4}, {"unknown": "digits:6-9"},
     {"dropout": {"dropout": 0.25}}, {"train_images": 32}],
    ids=str,
)  # fmt: skip
def test_a_folder_of_a_run_with_other_settings_is_refused_with_the_difference(
    change: dict[str, Any], finished: tuple[Path, Any]
) -> None:
    folder, _ = finished
    before = contents(folder)
    (field, value), = change.items()  # fmt: skip
    with pytest.raises(ValueError, match="holds another run") as caught:
        run(replace(TINY, **change), folder)
    assert f"{field} is {getattr(TINY, field)!r} there and {value!r} here" in str(caught.value)
    assert all(f"{name} is" not in str(caught.value) for name in ("network", "statistics_batch", "augment"))
    assert contents(folder) == before


@pytest.fixture
def folder_of_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local copy of some digits as Parquet files."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "some-digits"
    folder.mkdir()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("01"))})
    for split in ("train", "test"):
        images = named.load("digits:0-1", split).take(torch.arange(32))
        rows = {"image": list(images.pixels[:, 0].numpy()), "label": images.labels.tolist()}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{split}.parquet"))
    return folder


def test_other_data_under_the_same_name_is_refused(folder_of_digits: Path, tmp_path: Path) -> None:
    recipe = replace(TINY, data=str(folder_of_digits), unknown=None, dropout=None, members=1, epochs=1)
    run(recipe, tmp_path / "run")
    run(recipe, tmp_path / "run")
    table = datasets.Dataset.from_parquet(str(folder_of_digits / "train.parquet"), cache_dir=str(tmp_path / "other"))
    table.select([1, 0, *range(2, 32)]).to_parquet(str(folder_of_digits / "train.parquet"))
    with pytest.raises(ValueError, match=r"holds another run: train is .* there and .* here\. Name another folder"):
        run(recipe, tmp_path / "run")


def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="is not empty and not a run folder; name another folder"):
        run(TINY, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(FileExistsError, match="exists and is no folder; name another folder"):
        run(TINY, tmp_path / "thesis.tex")


@pytest.mark.parametrize(
    ("taken", "what"), [("results.json", "a folder; name a file"), ("plain-0", "no folder; name another folder")]
)
def test_a_run_whose_files_could_not_be_written_is_refused_before_data_is_loaded(
    taken: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("data was loaded")

    monkeypatch.setattr(named, "load", load)
    (tmp_path / "run.json").write_text("{}")
    if taken == "plain-0":
        (tmp_path / taken).write_text("precious")
    else:
        (tmp_path / taken).mkdir()
    with pytest.raises(OSError, match=what):
        run(TINY, tmp_path)


@pytest.mark.parametrize("text", ['{"name": "another program\'s"}', "[]", "", "{"])
def test_a_folder_with_a_run_json_of_something_else_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match="another folder"):
        run(TINY, tmp_path)
    assert (tmp_path / "run.json").read_text() == text


def test_an_empty_folder_and_a_missing_one_with_missing_parents_are_used(tmp_path: Path) -> None:
    recipe = replace(TINY, unknown=None, dropout=None, members=1, epochs=1, train_images=32, test_images=2, draws=1)
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "a" / "b"):
        run(recipe, folder)
        assert (folder / "plain-0" / "predictions.safetensors").exists()


def test_unknown_data_and_zero_jobs_are_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    with pytest.raises(named.DataError, match="unknown data set 'minst'"):
        run(replace(TINY, unknown="minst"), tmp_path / "run")
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        run(TINY, tmp_path / "run", jobs=0)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- members that fail


@pytest.fixture
def nearly_finished(tmp_path: Path) -> tuple[Recipe, Path]:
    """A run of two members, of which plain-1 has only its network."""
    recipe = replace(TINY, dropout=None, epochs=1, train_images=32, test_images=4)
    run(recipe, tmp_path / "run")
    for file in (tmp_path / "run" / "plain-1").iterdir():
        if file.name != "network.safetensors":
            file.unlink()
    return recipe, tmp_path / "run"


def test_the_error_of_a_members_process_is_told_with_its_name(nearly_finished: tuple[Recipe, Path]) -> None:
    recipe, folder = nearly_finished
    network = folder / "plain-1" / "network.safetensors"
    network.write_bytes(network.read_bytes()[:1000])
    with pytest.raises(RuntimeError, match=r"plain-1 failed.*network\.safetensors' is truncated"):
        run(recipe, folder, jobs=2)
    assert multiprocessing.active_children() == []


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL, which this system does not have")
def test_a_members_process_that_dies_is_told_and_the_run_can_continue(nearly_finished: tuple[Recipe, Path]) -> None:
    recipe, folder = nearly_finished

    def kill(*_: Any) -> None:
        for process in multiprocessing.active_children():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)

    with pytest.raises(RuntimeError, match="plain-1 ended with exit code -9"):
        run(recipe, folder, jobs=2, progress=kill)
    assert multiprocessing.active_children() == []
    run(recipe, folder)
    assert (folder / "plain-1" / "predictions.safetensors").exists()


def test_the_processes_of_members_end_when_the_run_is_stopped(nearly_finished: tuple[Recipe, Path]) -> None:
    recipe, folder = nearly_finished
    alive = []

    def stop(*_: Any) -> None:
        alive.extend(multiprocessing.active_children())
        raise StopHereError

    with pytest.raises(StopHereError):
        run(recipe, folder, jobs=2, progress=stop)
    assert len(alive) == 1
    assert multiprocessing.active_children() == []
