"""What of SBN does what: every method predicts as its posterior made by hand does, and tables are of what is stored."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import stochbn
from stochbn import metrics
from stochbn.files import read_tensors
from stochbn.paper.ablation import ablate, methods_of, tabulate
from stochbn.paper.recipes import PRESETS
from stochbn.paper.runner import PREDICTIONS, fit_posterior, load_parts, predict_all, run
from stochbn.posteriors import FactorizedLog
from stochbn.sources import architectures, checkpoints
from test_runner import TINY

RECIPE = replace(TINY, train_images=160, unknown="digits:5-9", test_images=60)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(RECIPE, folder)
    seen: list[tuple[int, int]] = []
    ablate(folder, images=40, progress=lambda done, total: seen.append((done, total)))
    total = RECIPE.members * len(methods_of(RECIPE))
    assert seen == [(done, total) for done in range(total + 1)]
    return folder


def stored(folder: Path, member: str, method: str) -> dict[str, Tensor]:
    file = folder / member / "ablation" / f"{method.replace(', ', '-')}.safetensors"
    return read_tensors(file, "stochbn.ablation/1")[0]


def test_predictions_are_those_of_posteriors_made_by_hand(finished: Path) -> None:
    parts = load_parts(RECIPE)
    model = checkpoints.load(finished / "plain-1" / "network.safetensors").model
    seed = next(RECIPE.schedule(member).seed for member in RECIPE.all_members() if member.name == "plain-1")
    shuffled = parts["train"].shuffled(seed)
    linear = architectures.batch_norms_of_linear_layers(model)
    logarithmic = fit_posterior(model, shuffled, 16, seed, kind="factorized-log")
    assert isinstance(logarithmic, FactorizedLog)
    joint = fit_posterior(model, shuffled, 16, seed, kind="joint")
    wanted = {
        "centre of moments, no noise": fit_posterior(model, shuffled, 16, seed).rescale(math.inf),
        "median, no noise": logarithmic.median(),
        "factorized-log": logarithmic,
        "joint, about running statistics": joint.recentre(model),
        "joint, noise of 4": joint.rescale(4),
        "joint, convolutions alone": fit_posterior(model, shuffled, 16, seed, kind="joint", deterministic=linear),
    }
    for method, posterior in wanted.items():
        draws = 1 if posterior.batch_size == math.inf else RECIPE.draws
        generator = torch.Generator().manual_seed(seed)
        predictive = stochbn.Predictive(model, posterior, draws, tolerance=0)
        for part in ("known", "unknown"):
            images = parts[part].take(torch.arange(40))
            found = stored(finished, "plain-1", method)[part].exp()
            torch.testing.assert_close(found, predict_all(predictive, images, generator).probs, rtol=1e-3, atol=1e-4)


def test_tables_are_of_the_stored_predictions(finished: Path) -> None:
    found = json.loads((finished / "ablation.json").read_text())
    assert found["objects"] == 40
    names = ["plain-0", "plain-1"]
    labels = read_tensors(finished / "plain-0" / "predictions.safetensors", PREDICTIONS)[0]["labels"][:40]
    plain = [read_tensors(finished / n / "predictions.safetensors", PREDICTIONS)[0]["plain.known"][:40] for n in names]
    drawn = [stored(finished, name, "factorized")["known"] for name in names]
    single = found["scores"]["single networks"]["factorized"]
    losses = [-logs.gather(1, labels[:, None])[:, 0].double() for logs in drawn]
    before = [-logs.gather(1, labels[:, None])[:, 0].double() for logs in plain]
    assert single["nll"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    change = (torch.stack(losses) - torch.stack(before)).mean(0)
    assert single["nll_change"] == pytest.approx(change.mean().item(), rel=1e-4)
    assert single["nll_change_se"] == pytest.approx(change.std().item() / 40**0.5, rel=1e-4)
    ensemble = torch.stack(drawn).exp().mean(0)
    assert found["scores"]["ensemble of 2"]["factorized"]["nll"] == pytest.approx(
        metrics.evaluate(ensemble, labels)["nll"], rel=1e-6
    )
    assert set(found["scores"]) == {"single networks", "ensemble of 2"}
    assert (finished / "ablation.md").read_text().count("| joint, noise of 64 |") == 2


def test_a_method_that_changes_nothing_has_no_change(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    found = json.loads((folder / "ablation.json").read_text())["scores"]["single networks"]["plain"]
    assert found["nll_change"] == found["nll_change_se"] == 0


def test_it_continues_and_writes_the_same_again(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "plain-0" / "ablation" / "joint.safetensors").unlink()
    (folder / "ablation.json").unlink()
    ablate(folder, images=40)
    (folder / "ablation.md").unlink()
    tabulate(folder, images=40)
    for name in ("ablation.json", "ablation.md"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes()


def test_fewer_networks_and_other_images_are_told_apart(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (table,) = ablate(folder, members=1, images=40)
    assert table.title.endswith("one network")
    with pytest.raises(ValueError, match="made with other settings"):
        ablate(folder)
    with pytest.raises(ValueError, match="has 2 plain networks, 3 were asked for"):
        ablate(folder, members=3)
    (folder / "plain-1" / "ablation.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"ablation\.safetensors' is of an earlier version"):
        ablate(folder, images=40)
    (folder / "plain-1" / "ablation.safetensors").unlink()
    (folder / "plain-1" / "predictions.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        ablate(folder, images=40)


def test_augmented_training_has_posteriors_fitted_on_augmented_images() -> None:
    names = set(methods_of(PRESETS["vgg11"]["paper"]))
    assert "joint, fitted on augmented" in names
    assert not any("augmented" in name for name in methods_of(PRESETS["lenet5"]["paper"]))
    assert not any("convolutions" in name for name in names)
