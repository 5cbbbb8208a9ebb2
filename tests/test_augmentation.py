"""What draws over the input add on a run: predictions are those made by hand, and tables are of what is stored."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import stochbn
from stochbn import augment, metrics
from stochbn.files import read_tensors
from stochbn.paper.augmentation import (
    CHOSEN,
    METHODS,
    SNAPSHOT_METHODS,
    Settings,
    draw_over_inputs,
    tabulate,
)
from stochbn.paper.redrawing import redraw
from stochbn.paper.runner import PREDICTIONS, fit_posterior, load_parts, run
from stochbn.paper.snapshotting import Cycles, Shuffled
from stochbn.sources import checkpoints
from test_runner import TINY

FORMAT = "stochbn.augmentation/1"
RECIPE = replace(TINY, dropout=None, members=3, train_images=200, held_out=0.2, unknown="digits:5-9", test_images=60)
CYCLES = Cycles(count=2, epochs=1)
SETTINGS = Settings(
    "shift:1", members=2, counts=(2, 4), fit_images=128, held_out=30, images=40, candidates="shift:1|flip",
    snapshots=CYCLES,
)  # fmt: skip
EVERY = (*METHODS, CHOSEN, *SNAPSHOT_METHODS)
pytestmark = pytest.mark.filterwarnings("ignore:the")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(RECIPE, folder)
    seen: list[tuple[int, int]] = []
    draw_over_inputs(folder, SETTINGS, progress=lambda done, total: seen.append((done, total)))
    total = 2 * len(EVERY) + 1
    assert seen == [(done, total) for done in range(total + 1)]
    return folder


def stored(folder: Path, member: str, method: str) -> dict[str, Tensor]:
    return read_tensors(
        folder / member / "augmentation" / f"{method.replace(', ', '-')}.safetensors", "stochbn.augmentation/1"
    )[0]


def test_predictions_are_those_made_by_hand(finished: Path) -> None:
    parts = load_parts(RECIPE)
    model = checkpoints.load(finished / "plain-1" / "network.safetensors").model
    seed = next(RECIPE.schedule(member).seed for member in RECIPE.all_members() if member.name == "plain-1")
    train = parts["train"].shuffled(seed).take(torch.arange(128))
    held_out = parts["held-out"].take(torch.arange(30))
    shift = augment.shift(1)
    clean = fit_posterior(model, train, 16, seed, kind="joint")
    shifted = fit_posterior(model, train, 16, seed, kind="joint", augment=shift)
    none = shifted.recentre(model).rescale(math.inf)
    settings = {"temperature": True, "augment": shift, "seed": seed}
    best = stochbn.calibrate(model, shifted, held_out.batches(250), **settings)  # type: ignore[arg-type]
    for method, posterior in {"statistics": clean, "input": none, "both": shifted, "both, calibrated": best}.items():
        drawn = None if method == "statistics" else shift
        predictive = stochbn.Predictive(model, posterior, 4, tolerance=0, augment=drawn)
        (inputs, _), *_ = parts["known"].take(torch.arange(40)).batches(40)
        logs = predictive(inputs, generator=torch.Generator().manual_seed(seed), keep_draws=True).log_probs
        for count in (2, 4):
            found = stored(finished, "plain-1", method)[f"{count}.known"].exp()
            torch.testing.assert_close(found, logs[:count].exp().mean(0), rtol=1e-3, atol=1e-4)


def test_snapshots_and_chosen_augmentations_are_those_made_by_hand(finished: Path) -> None:
    parts = load_parts(RECIPE)
    model = checkpoints.load(finished / "plain-1" / "network.safetensors").model
    seed = next(RECIPE.schedule(member).seed for member in RECIPE.all_members() if member.name == "plain-1")
    (inputs, _), *_ = parts["known"].take(torch.arange(40)).batches(40)
    data = Shuffled(parts["train"], RECIPE.batch_size, 1000 * seed)
    ensemble = stochbn.snapshots(model, data, cross_entropy, count=2, epochs=1, seed=seed)
    plain = torch.stack([stochbn.Predictive(one.model)(inputs).probs for one in ensemble.members]).mean(0)  # type: ignore[attr-defined]
    found = stored(finished, "plain-1", "snapshots, input")["1.known"].exp()
    torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(stored(finished, "plain-1", "snapshots, both")["1.known"].exp(), plain, atol=1e-3)
    held_out = list(parts["held-out"].take(torch.arange(30)).batches(250))
    flip, shift = augment.flip(), augment.shift(1)
    turns = stochbn.choose_augmentation(model, None, held_out, [shift, flip], draws=15, seed=seed)
    _, about = read_tensors(
        finished / "plain-1" / "augmentation" / "input-chosen-calibrated.safetensors", "stochbn.augmentation/1"
    )
    assert about["augmentations"] == list(map(repr, turns.augmentations))
    rows = json.loads((finished / "augmentation.json").read_text())
    assert rows["trainings"]["snapshots, both, 4 each"] == 1 + 2 / RECIPE.epochs
    assert rows["passes"]["snapshots, both, 4 each"] == 8
    assert rows["chosen"][CHOSEN][1]["augmentations"] == about["augmentations"]


def test_without_noise_and_augmentation_a_draw_is_the_plain_network(finished: Path) -> None:
    """The first draw of the input is the clean one, so two draws differ from it by half of what the second sees."""
    plain = read_tensors(finished / "plain-0" / "predictions.safetensors", PREDICTIONS)[0]["plain.known"][:40].exp()
    two = stored(finished, "plain-0", "input")["2.known"].exp()
    second = 2 * two - plain
    assert (second > -1e-4).all()
    torch.testing.assert_close(second.sum(1), torch.ones(40), rtol=1e-4, atol=1e-4)


def test_tables_are_of_the_stored_predictions(finished: Path) -> None:
    found = json.loads((finished / "augmentation.json").read_text())
    labels = read_tensors(finished / "plain-0" / "predictions.safetensors", PREDICTIONS)[0]["labels"][:40]
    for name, method, count in (("input, 4", "input", 4), ("both, calibrated, 2", "both, calibrated", 2)):
        rows = [stored(finished, f"plain-{i}", method)[f"{count}.known"].exp() for i in (0, 1)]
        assert [row["nll"] for row in found["methods"][name]] == pytest.approx(
            [metrics.evaluate(probs, labels)["nll"] for probs in rows], rel=1e-6
        )
        assert found["passes"][name] == count
    pair = [stored(finished, f"plain-{i}", "input")["4.known"].exp() for i in (0, 1)]
    mixed = torch.stack(pair).mean(0)
    assert found["methods"]["ensemble of 2, input, 4 each"][0]["nll"] == pytest.approx(
        metrics.evaluate(mixed, labels)["nll"], rel=1e-6
    )
    changes = [
        metrics.nll_of_each(stored(finished, f"plain-{i}", "both")["4.known"].exp(), labels)
        - metrics.nll_of_each(stored(finished, f"plain-{i}", "input")["4.known"].exp(), labels)
        for i in (0, 1)
    ]
    change = torch.stack(changes).mean(0)
    assert found["statistics_add"]["4"]["as_it_is_nll"] == pytest.approx(change.mean().item())
    assert found["statistics_add"]["4"]["as_it_is_nll_se"] == pytest.approx(change.std().item() / 40**0.5)
    assert all(one["batch_size"] == "inf" for one in found["chosen"]["input, calibrated"])
    assert (finished / "augmentation.png").stat().st_size > 5000


def test_the_figure_is_drawn_again_from_its_numbers(finished: Path, tmp_path: Path) -> None:
    shutil.copy(finished / "augmentation.json", tmp_path)
    png, _ = redraw(tmp_path)
    assert png.read_bytes() == (finished / "augmentation.png").read_bytes()


def test_it_continues_and_refuses_other_settings(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "plain-0" / "augmentation" / "both.safetensors").unlink()
    (folder / "augmentation.md").unlink()
    draw_over_inputs(folder, SETTINGS)
    (folder / "augmentation.json").unlink()
    tabulate(folder, SETTINGS)
    for name in ("augmentation.json", "augmentation.md"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes()
    with pytest.raises(ValueError, match="other settings"):
        draw_over_inputs(folder, replace(SETTINGS, images=30))
    with pytest.raises(ValueError, match="has 3 plain networks, 4 were asked for"):
        draw_over_inputs(folder, replace(SETTINGS, members=4))


def test_settings_that_cannot_be_are_refused() -> None:
    for changes, message in (
        ({"augment": "rotate:3"}, "unknown augmentation 'rotate:3'"),
        ({"counts": (8, 4)}, "counts must rise"),
        ({"counts": ()}, "counts must be at least 1"),
        ({"images": 0}, "images must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(SETTINGS, **changes)


def test_a_run_that_held_nothing_out_is_refused(tmp_path: Path) -> None:
    run(replace(RECIPE, held_out=0.0, members=1, unknown=None), tmp_path / "run")
    with pytest.raises(ValueError, match="make one with --held-out"):
        draw_over_inputs(tmp_path / "run", replace(SETTINGS, members=1))


@pytest.mark.parametrize("text", ["", "flip:3", "shift", "shift:0", "shift:-1", "shift:4;flip", "Flip"])
def test_descriptions_of_no_augmentation_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected flip, shift:PIXELS"):
        augment.named(text)


def test_descriptions_name_augmentations() -> None:
    assert repr(augment.named("flip")) == "flip()"
    assert repr(augment.named(" shift:3 , flip")) == "chain(shift(3), flip())"
