from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from PIL import Image
from torch import Tensor

import stochbn
from conftest import seeded
from stochbn.measuring.drawing import save_costs
from stochbn.paper.figures import (
    save_equivalents,
    save_passes,
    save_statistics,
    save_training,
)
from stochbn.paper.redrawing import redraw
from stochbn.paper.schedule import Epoch
from stochbn.posteriors.moments import Moments
from stochbn.report.curves import entropies_of_unknown
from stochbn.report.style import COLORS, save

METHODS = [(name, sbn) for name in ("plain", "Deep Ensembles", "Dropout") for sbn in (False, True)]


def entropies(classes: int = 5, n: int = 40) -> dict[tuple[str, bool], Tensor]:
    return {key: torch.rand(n, generator=seeded(i)) * math.log(classes) for i, key in enumerate(METHODS)}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[matplotlib.figure.Figure]:
    """Every figure that is made in the test."""
    figures: list[matplotlib.figure.Figure] = []

    class Recorded(matplotlib.figure.Figure):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            figures.append(self)

    monkeypatch.setattr(matplotlib.figure, "Figure", Recorded)
    return figures


def assert_png_and_svg(files: list[Path]) -> None:
    png, svg = files
    assert png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(png)
    assert pixels.shape[0] > 200
    assert pixels.shape[1] > 300
    assert len(np.unique(pixels[::3, ::3, :3])) > 5
    assert "<svg" in svg.read_text()
    assert svg.read_text().rstrip().endswith("</svg>")


def curves(figure: matplotlib.figure.Figure) -> dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], str]]:
    (axes,) = figure.axes
    return {
        str(line.get_label()): (np.asarray(line.get_xdata()), np.asarray(line.get_ydata()), str(line.get_linestyle()))
        for line in axes.get_lines()
    }


def test_the_figure_has_the_papers_five_curves_and_the_plain_network_in_two_files(
    tmp_path: Path, drawn: list[Any]
) -> None:
    files = save(entropies_of_unknown(entropies(), classes=5, title="known and unknown"), tmp_path / "entropy-cdf")
    assert [file.name for file in files] == ["entropy-cdf.png", "entropy-cdf.svg"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["entropy-cdf.png", "entropy-cdf.svg"]
    assert_png_and_svg(files)
    (figure,) = drawn
    assert set(curves(figure)) == {
        "plain", "SBN", "Deep Ensembles", "Deep Ensembles + SBN", "Dropout", "Dropout + SBN",
    }  # fmt: skip
    (axes,) = figure.axes
    assert len(axes.get_lines()) == 6
    assert axes.get_title() == "known and unknown"
    assert {text.get_text() for text in axes.get_legend().get_texts()} == set(curves(figure))


@pytest.mark.parametrize("title", ["tested on o\udce9od", "$x^$", "a\x1b[2J", "$a$ and $b$", "é\u202e"])
def test_a_title_may_be_any_name(title: str, tmp_path: Path) -> None:
    assert_png_and_svg(save(entropies_of_unknown(entropies(), classes=5, title=title), tmp_path / "f"))


def test_curves_are_distribution_functions_dashed_with_sbn(tmp_path: Path, drawn: list[Any]) -> None:
    given = entropies()
    given["Dropout", True] = torch.tensor([0.5, 0.25, 0.5, 1.0])
    save(entropies_of_unknown(given, classes=5, title="x"), tmp_path / "f")
    found = curves(drawn[0])
    keys = {"SBN": ("plain", True), "Deep Ensembles + SBN": ("Deep Ensembles", True), "Dropout": ("Dropout", False)}
    for label, key in keys.items():
        x, y, _ = found[label]
        values = given[key].double().numpy()
        for point in np.linspace(0, math.log(5), 57):
            at = y[np.searchsorted(x, point, side="right") - 1]
            assert at == pytest.approx((values <= point).mean())
    np.testing.assert_allclose(found["Dropout + SBN"][0], [0, 0.25, 0.5, 1.0])
    np.testing.assert_allclose(found["Dropout + SBN"][1], [0, 0.25, 0.75, 1.0])
    styles = {label: style for label, (_, _, style) in found.items()}
    assert styles["Deep Ensembles + SBN"] == styles["Dropout + SBN"] == "--"
    assert styles["Deep Ensembles"] == styles["Dropout"] == styles["SBN"] == "-"
    lines = {str(line.get_label()): line for line in drawn[0].axes[0].get_lines()}
    assert lines["Dropout"].get_color() == lines["Dropout + SBN"].get_color() != lines["SBN"].get_color()
    red, green, blue = to_rgb(lines["plain"].get_color())
    assert red == green == blue, "grey"
    assert {line.get_drawstyle() for line in lines.values()} == {"steps-post"}


@pytest.mark.parametrize("classes", [2, 5, 10, 100])
def test_the_axis_ends_at_the_entropy_of_a_uniform_distribution(classes: int, tmp_path: Path, drawn: list[Any]) -> None:
    save(entropies_of_unknown(entropies(classes), classes=classes, title="x"), tmp_path / "f")
    axes = drawn[0].axes[0]
    assert axes.get_xlim() == pytest.approx((0, math.log(classes)))
    assert axes.get_ylim() == (0, 1)
    assert axes.get_xticklabels()[-1].get_text() == f"ln {classes}"
    assert axes.get_xticks()[-1] == pytest.approx(math.log(classes))
    assert "nats" in axes.get_xlabel()


def test_the_same_figure_is_the_same_files(tmp_path: Path) -> None:
    first, second = (save(entropies_of_unknown(entropies(), classes=5, title="x"), tmp_path / name) for name in "ab")
    for ours, theirs in zip(first, second, strict=True):
        assert ours.read_bytes() == theirs.read_bytes()
    other = save(entropies_of_unknown(entropies(n=41), classes=5, title="x"), tmp_path / "c")
    assert all(file.read_bytes() != before.read_bytes() for file, before in zip(other, first, strict=True))


@pytest.mark.parametrize(
    "given",
    [
        {("plain", True): torch.zeros(7)},
        {("Dropout", False): torch.full((7,), math.log(5) * (1 + 1e-7))},
        {("Deep Ensembles", True): torch.tensor([0.3])},
    ],
    ids=["all certain", "all uniform, rounded up", "one object"],
)
def test_curves_at_the_limits_can_be_drawn(given: dict[tuple[str, bool], Tensor], tmp_path: Path) -> None:
    assert_png_and_svg(save(entropies_of_unknown(given, classes=5, title="x"), tmp_path / "f"))


def test_a_file_that_is_there_is_replaced_and_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "f.png").write_text("old")
    assert_png_and_svg(save(entropies_of_unknown(entropies(), classes=5, title="x"), tmp_path / "f"))
    with pytest.raises(OSError):
        save(entropies_of_unknown(entropies(), classes=5, title="x"), tmp_path / "none" / "f")


# ---------------------------------------------------------------- observed and fitted statistics


def observations(layers: dict[str, int], n: int = 60) -> dict[str, Tensor]:
    """Normal means and LogNormal variances: ``[n, 2, C]`` for every layer."""
    source = seeded(1)
    return {
        layer: torch.stack([torch.randn(n, c, generator=source), torch.randn(n, c, generator=source).exp()], 1)
        for layer, c in layers.items()
    }


def fitted(observed: dict[str, Tensor]) -> stochbn.Factorized:
    moments = {layer: Moments.of(rows.double()) for layer, rows in observed.items()}
    return stochbn.Factorized.from_moments(moments, batch_size=16, mini_batches=len(next(iter(observed.values()))))


def test_statistics_are_drawn_as_histograms_with_fitted_densities(tmp_path: Path, drawn: list[Any]) -> None:
    observed = observations({"a": 3, "b": 2, "c": 4, "d": 2, "e": 5})
    posterior = fitted(observed)
    files = save_statistics(tmp_path / "statistics", observed, posterior, layers=3, channels=1)
    assert [file.name for file in files] == ["statistics.png", "statistics.svg"]
    assert_png_and_svg(files)
    rows = [drawn[0].axes[i : i + 2] for i in range(0, 6, 2)]
    assert len(drawn[0].axes) == 6
    for row, layer in zip(rows, ("a", "c", "e"), strict=True):
        assert f"layer {layer}" in row[0].get_ylabel()
        m, v = observed[layer][:, :, 0].double().unbind(1)
        (line,) = row[0].get_lines()
        x, std = np.asarray(line.get_xdata()), m.std().item()
        density = np.exp(-0.5 * ((x - m.mean().item()) / std) ** 2) / (std * math.sqrt(2 * math.pi))
        np.testing.assert_allclose(np.asarray(line.get_ydata()), density, rtol=1e-4)
        s2 = math.log(1 + (v.var() / v.mean() ** 2).item())
        (line,) = row[1].get_lines()
        x, location = np.asarray(line.get_xdata()), math.log(v.mean().item()) - s2 / 2
        density = np.exp(-0.5 * (x - location) ** 2 / s2) / math.sqrt(2 * math.pi * s2)
        np.testing.assert_allclose(np.asarray(line.get_ydata()), density, rtol=1e-4)
        for axes in row:
            assert sum(patch.get_width() * patch.get_height() for patch in axes.patches) == pytest.approx(1)


def test_a_network_with_one_layer_of_one_channel_can_be_drawn(tmp_path: Path) -> None:
    observed = observations({"only": 1})
    assert_png_and_svg(save_statistics(tmp_path / "statistics", observed, fitted(observed)))


def test_channels_that_never_vary_are_passed_over(tmp_path: Path, drawn: list[Any]) -> None:
    observed = observations({"a": 4, "dead": 2})
    observed["a"][:, 0, 1], observed["a"][:, 1, 1] = 2.0, 0.0
    observed["dead"][:] = 0.0
    assert_png_and_svg(save_statistics(tmp_path / "statistics", observed, fitted(observed), layers=2, channels=2))
    titles = [axes.get_title() for axes in drawn[0].axes]
    assert titles[:4] == ["channel 0: mean", "channel 0: log-variance", "channel 2: mean", "channel 2: log-variance"]
    assert titles[4:] == [""] * 4


def test_a_channel_whose_variance_is_zero_in_one_mini_batch_does_not_stop_the_figure(tmp_path: Path) -> None:
    observed = observations({"a": 2})
    observed["a"][7, 1, 0] = 0.0
    assert_png_and_svg(save_statistics(tmp_path / "statistics", observed, fitted(observed)))


def test_the_same_statistics_are_the_same_files(tmp_path: Path) -> None:
    observed = observations({"a": 2})
    first, second = (save_statistics(tmp_path / name, observed, fitted(observed)) for name in "ab")
    for ours, theirs in zip(first, second, strict=True):
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_single_network_is_drawn_with_and_without_sbn(tmp_path: Path, drawn: list[Any]) -> None:
    entropies = {("plain", False): torch.tensor([0.1, 0.5]), ("plain", True): torch.tensor([0.2, 0.6])}
    save(entropies_of_unknown(entropies, classes=5, title="One network"), tmp_path / "figure")
    assert set(curves(drawn[0])) == {"plain", "SBN"}


def log(n: int, *, held_out: bool = True) -> list[Epoch]:
    scores = (0.7, 0.8) if held_out else (None, None)
    return [Epoch(i + 1, 1e-3, 1 / (i + 1), 1 - 1 / (i + 2), *scores) for i in range(n)]


def test_the_log_of_training_is_drawn_for_every_network(tmp_path: Path, drawn: list[Any]) -> None:
    logs = {"plain-0": log(4), "dropout-0": log(3, held_out=False)}
    assert_png_and_svg(save_training(tmp_path / "training", logs))
    loss, accuracy = drawn[0].axes
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["plain-0", "dropout-0"]
    assert [len(axes.get_lines()) for axes in (loss, accuracy)] == [3, 3], "two in training, one held-out"
    np.testing.assert_allclose(loss.get_lines()[0].get_ydata(), [1, 1 / 2, 1 / 3, 1 / 4])
    np.testing.assert_allclose(accuracy.get_lines()[1].get_ydata(), [0.8] * 4)
    assert "nats" in loss.get_ylabel()


# ---------------------------------------------------------------- cost, calibrated NLL, and drawing them again


def cost_of(units: dict[str, float], worth: dict[str, float]) -> dict[str, Any]:
    return {"units": {"textbook": 1.0, **units}, "variance": 0.01, "worth": worth}


def test_every_dot_of_the_cost_says_how_many_draws_it_is_and_lines_never_fold_back(
    tmp_path: Path, drawn: list[Any]
) -> None:
    units = {"quasi 4": 4.6, "quasi 8": 4.5, "quasi 16": 7.0, "draws 8": 3.2, "draws 16": 2.8, "draws 100": 6.0}
    worth = {"quasi 4": 10.0, "quasi 8": 20.0, "quasi 16": 50.0, "draws 8": 19.0, "draws 16": 19.0, "draws 100": 90.0}
    save_costs(tmp_path / "cost", {"network": cost_of(units, worth)})
    (axes,) = drawn[0].axes
    texts = {text.get_text() for text in axes.texts}
    assert {"4", "8", "16", "8, 16", "100"} <= texts
    for line in axes.get_lines():
        if len(line.get_xdata()) > 2 and line.get_linestyle() != "None":
            x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
            assert (np.diff(x) > 0).all()
            assert (np.diff(y) < 0).all()
    dots = [line for line in axes.get_lines() if line.get_linestyle() == "None"]
    assert sorted(x for line in dots for x in line.get_xdata()) == sorted(units.values())


def test_a_calibrated_nll_has_the_error_of_its_difference_and_is_filled_if_that_can_be_told(
    tmp_path: Path, drawn: list[Any]
) -> None:
    nlls = {"plain": [0.2, 0.3, 0.25], "better": [0.1, 0.21, 0.149], "level": [0.1, 0.45, 0.2]}
    save_equivalents(tmp_path / "f", nlls, [0.25, 0.2], title="t")
    (axes,) = drawn[0].axes
    fills = {
        str(line.get_ydata()[0]): line.get_markerfacecolor() for line in axes.get_lines() if line.get_marker() == "o"
    }
    assert fills["level"] == "white"
    assert fills["better"] == COLORS["SBN"] != fills["plain"] == COLORS["plain"]
    bars = axes.containers[1].get_children()[-1].get_segments()[0][:, 0]
    differences = np.array(nlls["better"]) - nlls["plain"]
    assert bars[1] - bars[0] == pytest.approx(2 * differences.std(ddof=1) / np.sqrt(3))


def test_with_one_network_no_difference_is_told(tmp_path: Path, drawn: list[Any]) -> None:
    save_passes(tmp_path / "f", {"plain": [(1, [0.3])], "input": [(4, [0.1]), (2, [0.2])]}, title="t")
    (axes,) = drawn[0].axes
    assert any("one network" in text.get_text() for text in drawn[0].texts)
    line = next(line for line in axes.get_lines() if len(line.get_xdata()) == 2)
    assert list(line.get_xdata()) == [2, 4]
    assert line.get_markerfacecolor() == "white"


def test_figures_of_stored_results_are_drawn_again_from_their_numbers(tmp_path: Path) -> None:
    stored = Path(__file__).parent.parent / "results" / "lenet5-cost"
    for file in stored.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    png, _ = redraw(tmp_path)
    with Image.open(png) as ours, Image.open(stored / png.name) as committed:
        if ours.info["Software"] != committed.info["Software"]:
            pytest.skip(f"drawn by {committed.info['Software']}: other versions lay text out elsewhere")
        assert ours.size == committed.size
        difference = np.subtract(ours.convert("RGB"), committed.convert("RGB"), dtype=float)
        assert np.abs(difference).mean() < 0.01 * 255, "the committed figure is another"


def test_folders_without_numbers_or_with_damaged_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none of cost\.json"):
        redraw(tmp_path)
    (tmp_path / "cost.json").write_text('{"found": [{}]}')
    with pytest.raises(ValueError, match="damaged or of another version"):
        redraw(tmp_path)


def test_a_method_has_the_same_colour_in_every_figure(tmp_path: Path, drawn: list[Any]) -> None:
    save(entropies_of_unknown(entropies(), classes=5, title="x"), tmp_path / "e")
    save_equivalents(tmp_path / "f", {"plain": [0.2, 0.3]}, [0.25, 0.2], title="t")
    first, second = (figure.axes[0] for figure in drawn)
    colors = {line.get_label(): line.get_color() for line in first.get_lines()}
    assert colors["plain"] == COLORS["plain"] == next(c for c in second.containers)[0].get_color()
    assert colors["Deep Ensembles"] == COLORS["Deep Ensembles"] == second.get_lines()[0].get_color()
