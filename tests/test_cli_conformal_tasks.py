"""Prediction sets of every task and group at the command line: conformal, predict and evaluate agree with Python."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import stochbn
from conftest import command_output as run
from stochbn import Predictive, cli, conformal
from stochbn.conformal.cqr import normal_quantiles
from stochbn.sources import open_objects
from stochbn.sources.columns import Columns
from test_own_network import told  # noqa: F401 - a fixture
from test_own_tasks import PLACES, TRUTH, X, module, network, options  # noqa: F401 - a fixture

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of these networks, which have learnt nothing

FILE = "w.sbn.safetensors"
GROUPS = np.array(["north", "south", "south"] * 20)


def predicted(given: tuple[str, ...], x: Any, **settings: Any) -> Any:
    predictive = Predictive(network(given), stochbn.load(FILE), 8, **settings)
    return predictive(torch.from_numpy(x), generator=torch.Generator().manual_seed(0))


def rows(name: str) -> list[dict[str, Any]]:
    with Path(name).open(newline="") as file:
        return list(csv.DictReader(file))


def coverage_rows() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(Path("r/results.json").read_text())["sets"]
    return found


def refused(*args: object) -> str:
    result = CliRunner().invoke(cli.app, [str(arg) for arg in args])
    assert result.exit_code != 0
    return " ".join((str(result.exception) + result.output).split())


@pytest.mark.parametrize("method", ["normalized", "absolute", "cqr"])
def test_numbers_get_intervals(method: str, module: str) -> None:  # noqa: F811
    given = options(module, "Pair", X)
    targets = 2 * X[:, :1]
    np.savez("test.npz", inputs=X, labels=targets)
    task = *given, "--task", "regression"
    chosen = () if method == "normalized" else ("--method", method)
    said = run("conformal", *task, "--held-out", "test.npz", "--coverage", 0.8, "--draws", 8, *chosen)
    assert "Intervals of 80 % from 60 held-out examples" in said
    prediction = predicted(given, X, task="regression")
    std = prediction.total_std
    rule: Any
    if method == "cqr":
        rule = conformal.cqr(*normal_quantiles(prediction.mean, std, 0.8), targets, 0.8)
    else:
        rule = conformal.intervals(prediction.mean, std if method == "normalized" else None, targets, 0.8)
    low, high = rule.of(prediction)
    run("predict", *task, "--data", "test.npz", "--out", "p.csv", "--draws", 8)
    found = [(float(row["low"]), float(row["high"])) for row in rows("p.csv")]
    assert np.allclose(found, torch.stack([low, high], -1)[:, 0], rtol=1e-4, atol=1e-4)
    said = run("evaluate", *task, "--data", "test.npz", "--draws", 8, "--out", "r")
    assert "Prediction intervals for 80 %" in said
    held = ((low <= torch.from_numpy(targets)) & (torch.from_numpy(targets) <= high)).double().mean()
    assert coverage_rows()[0]["coverage"] == pytest.approx(held.item())
    assert coverage_rows()[0]["size"] == pytest.approx((high - low).mean().item(), rel=1e-4)


def test_a_network_without_deviations_gets_intervals_of_one_width(module: str) -> None:  # noqa: F811
    given = options(module, "one", X)
    stochbn.load(FILE).rescale(math.inf).save(FILE)
    np.savez("test.npz", inputs=X, labels=2 * X[:, 0])
    task = *given, "--task", "regression", "--held-out", "test.npz"
    assert "take --method absolute, for intervals of one width" in refused("conformal", *task)
    run("conformal", *task, "--method", "absolute")
    thresholds = stochbn.load(FILE).thresholds
    assert thresholds is not None
    assert isinstance(thresholds.sets, conformal.Intervals)
    assert not thresholds.sets.scaled


def test_labels_get_sets_that_hold_a_share_of_the_true_ones(module: str) -> None:  # noqa: F811
    given = options(module, "labels", X)
    truth = (X[:, :3] > 0.3).astype(np.int64)
    np.savez("test.npz", inputs=X, labels=truth)
    task = *given, "--task", "multilabel"
    said = run("conformal", *task, "--held-out", "test.npz", "--coverage", 0.7, "--draws", 8)
    none = int((truth.sum(1) == 0).sum())
    assert f"from {60 - none} held-out examples; {none} others have none and do not count" in said
    prediction = predicted(given, X, task="multilabel")
    sets = conformal.crc(prediction.probs, truth, 0.7)(prediction.probs)
    run("predict", *task, "--data", "test.npz", "--out", "p.csv", "--draws", 8)
    found = [json.loads(row["set"]) for row in rows("p.csv")]
    assert found == [[str(k) for k in range(3) if row[k]] for row in sets.tolist()]
    said = run("evaluate", *task, "--data", "test.npz", "--draws", 8, "--out", "r")
    assert "Prediction sets for 70 % of what is true" in said
    everything, *each = coverage_rows()
    shares = [
        (s & t).sum().item() / t.sum().item() for s, t in zip(sets, torch.from_numpy(truth > 0), strict=True) if t.any()
    ]
    assert everything["coverage"] == pytest.approx(np.mean(shares))
    for k, row in enumerate(each):
        assert row["of"] == str(k)
        assert row["examples"] == truth[:, k].sum()
        assert row["coverage"] == pytest.approx(sets[truth[:, k] > 0, k].double().mean().item())


@pytest.mark.parametrize("mask", [None, 1])
def test_places_get_pictures_of_their_sets(mask: int | None, module: str) -> None:  # noqa: F811
    given = options(module, "places", PLACES)
    truth = np.where(np.random.default_rng(3).random(TRUTH.shape) < 0.2, 255, TRUTH)
    np.savez("test.npz", inputs=PLACES, labels=truth)
    common = *given, "--dense", "--ignore", 255, "--draws", 8
    chosen = () if mask is None else ("--mask", mask)
    run("conformal", *common, "--held-out", "test.npz", "--coverage", 0.8, *chosen)
    prediction = predicted(given, PLACES)
    rule = conformal.crc(prediction.probs, truth, 0.8, mask=mask, ignore_index=255)
    sets = rule(prediction.probs)
    np.save("new.npy", PLACES)
    predict = "--draws", 8, "--masks", "masks"
    run("predict", *given, "--data", "new.npy", "--out", "p.csv", *predict)
    for i, row in enumerate(rows("p.csv")):
        picture = np.array(Image.open(f"masks/{row['mask']}.set.png"))
        wanted = sets[i].sum(0) if mask is None else 255 * sets[i].int()
        assert np.array_equal(picture, wanted)
        size = sets[i].double().sum(0).mean() if mask is None else sets[i].double().mean()
        assert float(row["set_size"]) == pytest.approx(size.item())
    said = run("evaluate", *common, "--data", "test.npz", "--out", "r")
    assert "Prediction sets for 80 % of " in said
    shares = []
    for one, true in zip(sets, truth, strict=True):
        held = one.numpy() if mask is not None else np.take_along_axis(one.numpy(), true[None] % 255, 0)[0]
        shares.append(held[true == mask if mask is not None else true != 255].mean())
    everything, *each = coverage_rows()
    assert everything["coverage"] == pytest.approx(np.mean(shares))
    assert len(each) == (3 if mask is None else 0)
    assert everything["low"] < everything["coverage"] < everything["high"]


def table(name: str, x: Any, labels: Any, groups: Any) -> None:
    columns = {f"x{i}": x[:, i] for i in range(4)} | {"label": labels, "site": groups}
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.table(columns), name)
    elif name.endswith(".npz"):
        np.savez(name, inputs=x, labels=labels, site=groups)
    else:
        with Path(name).open("w", newline="") as file:
            csv.writer(file).writerows([list(columns), *zip(*columns.values(), strict=True)])


@pytest.mark.parametrize("ending", ["csv", "parquet", "npz"])
def test_by_a_column_each_group_has_its_own_threshold(ending: str, module: str) -> None:  # noqa: F811
    given = options(module, "labels", X)
    labels = X[:, :3].argmax(1)
    table(f"test.{ending}", X, labels, GROUPS)
    inputs = ("--input", "inputs") if ending == "npz" else tuple(w for i in range(4) for w in ("--input", f"x{i}"))
    held = "--held-out", f"test.{ending}", "--coverage", 0.7, "--draws", 8
    said = run("conformal", *given, *inputs, *held, "--by", "site")
    assert "Sets of 70 % for each of 2 groups, from 60 held-out examples, at least 20 of a group" in said
    thresholds = stochbn.load(FILE).thresholds
    assert thresholds is not None
    assert (thresholds.by, thresholds.sets.groups) == ("site", ("north", "south"))
    probs = predicted(given, X).probs
    sets = conformal.lac(probs, labels, 0.7, groups=GROUPS)
    others = np.array(["north", "elsewhere"] * 30)
    table(f"new.{ending}", X, labels, others)
    run("predict", *given, *inputs, "--data", f"new.{ending}", "--out", "p.csv", "--draws", 8)
    expected = sets(probs, others)
    assert [json.loads(row["set"]) for row in rows("p.csv")] == [
        [str(k) for k in range(3) if row[k]] for row in expected.tolist()
    ]
    assert expected[1::2].all()
    said = run("evaluate", *given, *inputs, "--data", f"test.{ending}", "--draws", 8, "--out", "r")
    assert "Prediction sets for 70 % of each site, by lac" in said
    found = {row["of"]: row for row in coverage_rows()}
    own = sets(predicted(given, X, tolerance=0).probs, GROUPS)
    for name in ("north", "south"):
        chosen = torch.from_numpy(name == GROUPS)
        share = own[chosen, torch.from_numpy(labels)[chosen]].double().mean().item()
        assert found[f"site {name}"]["coverage"] == pytest.approx(share)
    bare = "bare.npz" if ending == "npz" else "bare.parquet"
    if ending == "npz":
        np.savez(bare, inputs=X)
    else:
        pyarrow.parquet.write_table(pyarrow.table({f"x{i}": X[:, i] for i in range(4)}), bare)
    assert "has no column 'site'" in refused("predict", *given, *inputs, "--data", bare, "--out", "q.csv")


def test_groups_of_pictures_are_in_their_metadata(module: str) -> None:  # noqa: F811
    Path("photos").mkdir()
    lines = [("file_name", "label", "site")]
    for i in range(12):
        Image.fromarray(np.full((8, 8), 20 * i, np.uint8)).save(f"photos/{i}.png")
        lines.append((f"{i}.png", str(i % 2), "ab"[i % 2]))
    with Path("photos/metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    opened: Any = open_objects("photos", columns=Columns(group="site"))
    names = [Path(opened.rows.key(i)).stem for i in range(12)]
    assert opened.groups == ["ab"[int(name) % 2] for name in names]
    assert opened.shuffled(3).groups == [opened.groups[i] for i in opened.shuffled(3).order.tolist()]
    (chunk,) = opened.shuffled(3).chunks(12)
    assert chunk.groups == opened.shuffled(3).groups
    with pytest.raises(ValueError, match=r"metadata.csv of .* has no column 'place'"):
        open_objects("photos", columns=Columns(group="place"))
    Path("photos/metadata.csv").unlink()
    with pytest.raises(ValueError, match="groups of pictures are in a file"):
        open_objects("photos", columns=Columns(group="site"))


def test_a_service_needs_the_column_of_the_groups(module: str) -> None:  # noqa: F811
    given = options(module, "labels", X)
    labels = X[:, :3].argmax(1)
    table("test.npz", X, labels, GROUPS)
    run("conformal", *given, "--held-out", "test.npz", "--coverage", 0.7, "--draws", 8, "--by", "site")
    scorer = stochbn.deploy.Scorer(given[1], "w.safetensors", FILE, draws=8)
    probs = predicted(given, X).probs
    expected = conformal.lac(probs, labels, 0.7, groups=GROUPS)(probs, GROUPS)
    found = scorer({"x": X, "site": GROUPS})
    assert found["set"].tolist() == [[str(k) for k in range(3) if row[k]] for row in expected.tolist()]
    assert set(found) > {"x", "site"}
    with pytest.raises(ValueError, match="are by 'site', which this data does not have"):
        scorer.answer([X[0].tolist()])


def test_too_few_of_a_group_are_refused_before_any_prediction(module: str) -> None:  # noqa: F811
    given = options(module, "labels", X)
    table("test.npz", X, X[:, :3].argmax(1), np.array(["a"] * 55 + ["b"] * 5))
    before = Path(FILE).read_bytes()
    said = refused("conformal", *given, "--held-out", "test.npz", "--by", "site")
    assert "needs at least 9 held-out examples of the group 'b', got 5" in said
    assert Path(FILE).read_bytes() == before
