"""The commands that are named as the next ones can be typed as they are."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer.main

from stochbn import cli, conformal
from stochbn.cli.drift import alarm
from stochbn.cli.following import after_adapting, after_calibrating, after_evaluating, after_fitting, command
from stochbn.cli.subject import Given
from stochbn.posteriors import Posterior
from stochbn.posteriors.thresholds import Thresholds
from stochbn.report.words import made_worse
from stochbn.shift import Reading

OWN = Given(
    model="my net:build", model_arg=["width=2", "kind='x'"], weights=Path("a folder/w.pt"), size="32", split="train",
    label=["kind"], class_axis=0, probs=True,
)  # fmt: skip
TRAINED = Given(networks=[Path("a.safetensors"), Path("b c.safetensors")])
A_POSTERIOR: Any = SimpleNamespace(batch_size=16, noiseless=False, choice="")
CALIBRATED: Any = SimpleNamespace(batch_size=16, noiseless=False, choice="Drawing is worth its passes.")
QUIET: Any = SimpleNamespace(batch_size=float("inf"), noiseless=True, choice="")


def commands(text: str) -> list[list[str]]:
    """The commands in what was said, each on a line of its own or after a colon."""
    return [shlex.split(line[line.index("stochbn ") :])[1:] for line in text.splitlines() if "stochbn " in line]


def parsed(words: list[str]) -> dict[str, Any]:
    """The parameters of a command as the command line reads them; there is an error where it cannot.

    Paths are words here, and several values a list, whatever the versions of Typer and click make of them.
    """
    program: Any = typer.main.get_command(cli.app)
    name, *arguments = words
    found: dict[str, Any] = program.commands[name].make_context(name, arguments).params
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in found.items()}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}


def worse(change: float) -> list[str]:
    plain = {"method": "plain", "sbn": False, "members": 1}
    return made_worse([plain, {**plain, "sbn": True, "nll_change": change, "nll_change_se": 0.001}])


def test_a_command_has_the_options_that_were_given_but_the_split() -> None:
    (words,) = commands(command("evaluate", OWN, data="TEST-DATA", posterior=None))
    found = parsed(words)
    for field in ("model", "model_arg", "weights", "size", "label", "class_axis", "probs"):
        given = getattr(OWN, field)
        assert found[field] == (str(given) if isinstance(given, Path) else given), field
    assert found["data"] == "TEST-DATA"
    assert "--split" not in words


@pytest.mark.parametrize("given", [OWN, Given(networks=[Path("b c.safetensors")])])
@pytest.mark.parametrize("named", [False, True])
def test_what_follows_a_fit_can_be_typed(given: Given, named: bool) -> None:
    path = Path("p q.safetensors")
    for words in commands(after_fitting(given, None if named else path, path, "flip,shift:4")):
        assert parsed(words)["augment"] == "flip,shift:4"
        assert ("--posterior" in words) == named


@pytest.mark.parametrize("given", [OWN, Given(networks=[Path("b c.safetensors")])])
def test_what_follows_an_adaptation_can_be_typed(given: Given) -> None:
    predict, evaluate = map(parsed, commands(after_adapting(given, "new photos", Path("p q.safetensors"))))
    assert [predict["posterior"]] == [str(path) for path in evaluate["posteriors"]] == ["p q.safetensors"]
    assert (predict["data"], predict["split"]) == ("new photos", given.split)
    assert (evaluate["data"], evaluate["split"]) == ("LABELLED-NEW-DATA", None)


def test_sets_are_made_again_after_an_adaptation_as_they_were_made() -> None:
    probs, labels = torch.full((60, 3), 1 / 3), torch.arange(60) % 3

    def again(rule: Any, given: Given = OWN, **about: Any) -> Any:
        made = {"draws": 50, "augment": None, "by": None, **about}
        sets = Thresholds(rule, 60, made["draws"], made["augment"], 1.0, None, (0.0, 0.0), by=made["by"])
        return parsed(commands(after_adapting(given, "new", Path("p.safetensors"), sets))[2])

    plain = again(conformal.lac(probs, labels))
    assert (plain["coverage"], plain["by"], plain["method"], plain["dense"]) == (0.9, None, None, False)
    other = again(conformal.raps(probs, labels, 0.8, by_class=True), draws=8, augment="flip")
    assert (other["coverage"], other["by"], other["method"]) == (0.8, "class", "raps")
    assert (other["draws"], other["augment"]) == (8, "flip")
    grouped = conformal.lac(probs, labels, groups=["a", "b"] * 30)
    assert again(grouped, by="hospital")["by"] == "hospital"
    tally = conformal.Tally(3, 1)
    tally.add(torch.rand(60, 3, 2, 2).softmax(1), torch.ones(60, 2, 2, dtype=torch.long))
    dense = again(tally.sets(0.9))
    assert (dense["dense"], dense["mask"], dense["method"]) == (True, 1, None)
    numbers = dataclasses.replace(OWN, task="regression", class_axis=None, probs=False)
    for rule, method in (
        (conformal.intervals(probs, None, probs), "absolute"),
        (conformal.intervals(probs, probs, probs), None),
        (conformal.cqr(probs - 1, probs + 1, probs), "cqr"),
    ):
        assert again(rule, numbers)["method"] == method


def test_a_file_of_boxes_is_about_its_own_pictures_alone() -> None:
    given = dataclasses.replace(OWN, task="detection", label=["val.json"], class_axis=None, probs=False)
    assert "--label" not in command("predict", given, data="NEW")
    assert "--label BOXES.json" in command("evaluate", given, data="TEST")


def test_the_alarm_names_a_command_that_can_be_typed() -> None:
    reading = Reading(
        examples=20, p=0.002, look=0.001, mixed=0.5, layers={"a": 3.0, "b": 1.0}, mix=(), each=torch.ones(20)
    )
    text = alarm(OWN, reading, "new photos", Path("p q.safetensors"))
    assert text is not None
    assert "the look of the inputs is unusual (p = 0.001), most in 'a', 'b'" in text
    (words,) = commands(text[text.index("stochbn ") :])
    found = parsed(words)
    assert (found["data"], found["split"], found["posterior"]) == ("new photos", "train", "p q.safetensors")
    mixed = alarm(OWN, dataclasses.replace(reading, look=0.5, mixed=0.001), None, None)
    assert mixed is not None
    assert "the mix of classes is unusual" in mixed
    assert alarm(OWN, dataclasses.replace(reading, p=0.02), None, None) is None


def test_an_evaluation_that_found_the_nll_worse_says_what_mends_it() -> None:
    posteriors: list[Posterior | None] = [A_POSTERIOR, A_POSTERIOR]
    text = after_evaluating(TRAINED, worse(0.01), posteriors, [None, Path("p.safetensors")], None)
    assert "SBN made the NLL of a single network worse on this data, by 0.0100 ± 0.0010 nats" in text
    first, second = commands(text)
    assert parsed(first)["networks"] == "a.safetensors"
    assert parsed(second)["networks"] == "b c.safetensors"
    assert first[0] == second[0] == "calibrate"
    assert parsed(second)["posterior"] == "p.safetensors"


@pytest.mark.parametrize("change", [-0.01, 0.0015])
def test_an_evaluation_that_found_it_better_or_cannot_tell_goes_on_to_predict(change: float) -> None:
    (words,) = commands(after_evaluating(OWN, worse(change), [A_POSTERIOR], [None], None))
    assert words[0] == "predict"
    assert Path(parsed(words)["path"]) == Path("predictions.csv")


def test_a_network_without_labels_that_is_worse_is_to_be_fitted_with_less_noise() -> None:
    given = Given(model="m:f", task="embedding")
    (words,) = commands(after_evaluating(given, worse(0.01), [A_POSTERIOR], [Path("p.safetensors")], None))
    found = parsed(words)
    assert (words[0], found["batch_size"], found["path"]) == ("fit", 64, "p.safetensors")


def test_networks_without_a_posterior_are_to_be_fitted() -> None:
    text = after_evaluating(TRAINED, [], [A_POSTERIOR, None], [None, None], None)
    (words,) = commands(text)
    assert words == ["fit", "b c.safetensors"]
    both = after_evaluating(TRAINED, worse(0.01), [A_POSTERIOR, None], [None, None], None)
    assert [(name, network) for name, network, *_ in commands(both)] == [
        ("fit", "b c.safetensors"), ("calibrate", "a.safetensors"),
    ]  # fmt: skip


def test_after_a_fit_of_an_embedding_there_is_nothing_to_calibrate() -> None:
    (words,) = commands(after_fitting(Given(model="m:f", task="embedding"), None, Path("p.safetensors"), None))
    assert words[0] == "predict"


def test_after_a_fit_of_a_regression_its_residual_variance_is_to_be_fitted() -> None:
    text = after_fitting(Given(model="m:f", task="regression"), None, Path("p.safetensors"), None)
    assert "fit the variance of an observation" in text
    assert [words[0] for words in commands(text)] == ["calibrate", "evaluate"]


def test_a_posterior_without_noise_is_to_be_calibrated_and_never_to_have_less() -> None:
    text = after_evaluating(OWN, worse(0.01), [QUIET], [None], None, ignore=255)
    (words,) = commands(text)
    assert words[0] == "calibrate"
    assert parsed(words)["ignore"] == 255
    given = Given(model="m:f", task="embedding")
    text = after_evaluating(given, worse(0.01), [QUIET], [Path("p.safetensors")], None)
    assert not commands(text)
    assert "has no noise, so its centre is what differs" in text


def test_a_posterior_that_was_calibrated_is_not_told_to_be_again_on_the_same_data() -> None:
    text = after_evaluating(OWN, worse(0.01), [CALIBRATED], [None], None)
    assert not commands(text)
    assert "was chosen by held-out data already, so this data differs from that" in text
    (words,) = commands(after_evaluating(TRAINED, worse(0.01), [CALIBRATED, A_POSTERIOR], [None, None], None))
    assert words[:2] == ["calibrate", "b c.safetensors"]


def test_what_follows_the_calibration_of_places_says_that_there_are_such() -> None:
    (words,) = commands(after_calibrating(OWN, None, Path("p"), None, dense=True, ignore=255))
    found = parsed(words)
    assert (found["dense"], found["ignore"]) == (True, 255)
