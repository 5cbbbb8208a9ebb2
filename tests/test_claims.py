"""The paper's claims on a run: predictions are those of posteriors made by hand, and numbers are of what is stored."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import stochbn
import stochbn.augment as augment
from stochbn import metrics
from stochbn.files import read_tensors
from stochbn.paper import claims
from stochbn.paper.recipes import PRESETS
from stochbn.paper.runner import PREDICTIONS, fit_posterior, load_parts, predict_all, run
from stochbn.sources import checkpoints
from test_runner import TINY

RECIPE = replace(TINY, train_images=160, held_out=0.1, posterior="factorized-log", unknown="digits:5-9", test_images=60)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(RECIPE, folder)
    seen: list[tuple[int, int]] = []
    claims.predict(folder, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 8) for done in range(9)]
    claims.tabulate(folder)
    return folder


def stored(folder: Path, member: str, method: str) -> dict[str, Tensor]:
    return read_tensors(folder / member / "claims" / f"{method}.safetensors", "stochbn.claims/1")[0]


def of_run(folder: Path, member: str) -> dict[str, Tensor]:
    return read_tensors(folder / member / "predictions.safetensors", PREDICTIONS)[0]


def test_predictions_are_those_of_posteriors_made_by_hand(finished: Path) -> None:
    parts = load_parts(RECIPE)
    model = checkpoints.load(finished / "plain-1" / "network.safetensors").model
    seed = next(RECIPE.schedule(member).seed for member in RECIPE.all_members() if member.name == "plain-1")
    joint = fit_posterior(model, parts["train"], 16, seed, kind="joint", centre="running")
    shifts = augment.shift(1)
    wanted = {
        "joint": stochbn.Predictive(model, joint, RECIPE.draws, tolerance=0),
        "joint-defaults": stochbn.Predictive(model, joint, RECIPE.draws),
        "input": stochbn.Predictive(model, None, 8, tolerance=0, augment=shifts),
    }
    for method, predictive in wanted.items():
        generator = torch.Generator().manual_seed(seed)
        for part in ("known", "unknown"):
            found = stored(finished, "plain-1", method)[part].exp()
            torch.testing.assert_close(
                found, predict_all(predictive, parts[part], generator).probs, rtol=1e-3, atol=1e-4
            )


def test_numbers_are_of_the_stored_predictions(finished: Path) -> None:
    found = json.loads((finished / "claims.json").read_text())
    assert list(found["scores"]) == ["one network", "ensemble of 2", "Dropout"]
    each = [of_run(finished, name) for name in ("plain-0", "plain-1")]
    labels = each[0]["labels"]
    for group, probs in (
        ("one network", [one["sbn.known"].exp() for one in each]),
        ("ensemble of 2", [torch.stack([one["sbn.known"].exp() for one in each]).mean(0)]),
        ("Dropout", [of_run(finished, "dropout-0")["sbn.known"].exp()]),
    ):
        nll = sum(metrics.evaluate(one, labels)["nll"] for one in probs) / len(probs)
        assert found["scores"][group]["SBN"]["nll"] == pytest.approx(nll, rel=1e-6)
    joint = [stored(finished, name, "joint")["known"] for name in ("plain-0", "plain-1")]
    changes = [
        (one["sbn.known"] - other).gather(1, labels[:, None])[:, 0].double()
        for one, other in zip(each, joint, strict=True)
    ]  # of the NLL from SBN to joint
    change = found["changes"]["one network"]["joint - SBN"]
    assert change["nll_change"] == pytest.approx(torch.stack(changes).mean().item(), rel=1e-4, abs=1e-6)
    errors = [one.std().item() / len(labels) ** 0.5 for one in changes]
    assert change["nll_change_se"] == pytest.approx(sum(errors) / 2, rel=1e-4)
    noise = found["changes"]["Dropout"]["SBN - centre alone"]["nll_change"]
    scores = found["scores"]["Dropout"]
    assert noise == pytest.approx(scores["SBN"]["nll"] - scores["centre alone"]["nll"], abs=1e-6)


def test_divergences_are_from_exact_inference(finished: Path) -> None:
    found = json.loads((finished / "claims.json").read_text())["exact"]
    exact, joint = (
        stored(finished, "plain-0", method)["known"].double() for method in ("exact", "joint-observed centre")
    )
    sbn = of_run(finished, "plain-0")["sbn.known"].double()
    each = [(exact.exp() * (exact - other)).sum(1) for other in (sbn, joint)]
    assert found["images"] == len(exact) == 60
    assert found["kl_SBN"] == pytest.approx(each[0].mean().item(), rel=1e-3, abs=1e-7)
    assert found["kl_change"] == pytest.approx((each[0] - each[1]).mean().item(), rel=1e-3, abs=1e-7)


def test_passes_are_those_of_all_networks(finished: Path) -> None:
    rows = (finished / "claims.md").read_text().splitlines()
    passes = {row.split(" | ")[0].removeprefix("| "): row.split(" | ")[1] for row in rows if row.startswith("| ")}
    assert passes["one network: plain"] == passes["one network: centre alone"] == "1"
    assert passes["one network: SBN"] == passes["Dropout: plain"] == "3"
    assert passes["ensemble of 2: joint"] == passes["ensemble of 2: joint, defaults"] == "6"
    assert passes["ensemble of 2: input"] == "16"


def test_passes_of_the_defaults_are_counted(tmp_path: Path, finished: Path) -> None:
    counted = json.loads((finished / "claims.json").read_text())["passes"]
    assert counted == {"SBN": 3, "joint": 3, "joint, defaults": 3, "input": 8}  # 3 draws are too few to stop earlier
    recipe = replace(RECIPE, draws=10, members=1, dropout=None)
    run(recipe, tmp_path / "run")
    claims.predict(tmp_path / "run")
    assert 4 <= claims.tabulate(tmp_path / "run")["passes"]["joint, defaults"] < 10


def test_it_continues_and_writes_the_same_again(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "plain-0" / "claims" / "input.safetensors").unlink()
    (folder / "claims.md").unlink()
    with pytest.raises(FileNotFoundError, match="lacks 'input' of plain-0"):
        claims.tabulate(folder)
    claims.predict(folder)
    claims.tabulate(folder)
    assert (folder / "claims.md").read_bytes() == (finished / "claims.md").read_bytes()


def test_inputs_change_as_training_changed_them() -> None:
    assert claims.settings_of(PRESETS["vgg11"]["paper"])["augment"] == "flip,shift:4"
    assert claims.settings_of(PRESETS["lenet5"]["paper"])["augment"] == "shift:1"
