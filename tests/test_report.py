from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stochbn
from conftest import fit_factorized, normal, seeded
from stochbn import metrics
from stochbn.evaluation.methods import Method, methods, score
from stochbn.files import read_tensors
from stochbn.measuring import goodness
from stochbn.paper import figures, report
from stochbn.paper.report import write_run, write_seeds
from stochbn.paper.runner import PREDICTIONS, run
from stochbn.report.results import write
from stochbn.report.tables import Table
from stochbn.sources import named
from stochbn.sources.architectures import build
from test_runner import TINY

SIX = [(name, sbn) for name in ("plain", "Deep Ensembles", "Dropout") for sbn in (False, True)]
RECIPE = replace(TINY, epochs=1, train_images=64, test_images=40)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Finished runs of the same recipe with the seeds 0 and 1."""
    folders = tmp_path_factory.mktemp("runs") / "0", tmp_path_factory.mktemp("runs") / "1"
    for seed, folder in enumerate(folders):
        run(replace(RECIPE, seed=seed), folder)
    return folders


@pytest.fixture(scope="module")
def reported(runs: tuple[Path, Path]) -> tuple[Path, list[Table]]:
    """The first run with its report, and the tables."""
    return runs[0], write_run(runs[0])


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def log_probs(n: int, seed: int, classes: int = 4) -> Tensor:
    return (2 * normal(n, classes, seed=seed)).log_softmax(1)


def member(seed: int, *, sbn: bool = True, unknown: bool = True) -> dict[str, Tensor]:
    found = {"labels": torch.arange(9) % 4}
    for i, kind in enumerate(("plain", "sbn") if sbn else ("plain",)):
        found[f"{kind}.known"] = log_probs(9, 10 * seed + 2 * i)
        if unknown:
            found[f"{kind}.unknown"] = log_probs(7, 10 * seed + 2 * i + 1)
    return found


def by_name(found: Sequence[Method]) -> dict[tuple[str, bool], Method]:
    return {(method.name, method.sbn): method for method in found}


# ---------------------------------------------------------------- methods and their scores


def test_methods_are_the_papers_three_without_and_with_sbn() -> None:
    plain, dropout = [member(i) for i in range(3)], [member(7)]
    found = by_name(methods(plain, dropout))
    assert list(found) == SIX
    assert [method.members for method in found.values()] == [1, 1, 3, 3, 1, 1]
    for (name, sbn), method in found.items():
        kind = "sbn" if sbn else "plain"
        group = {"plain": plain[:1], "Deep Ensembles": plain, "Dropout": dropout}[name]
        for part, probs in (("known", method.known), ("unknown", method.unknown)):
            assert probs is not None
            slow = sum(m[f"{kind}.{part}"].exp() for m in group) / len(group)
            torch.testing.assert_close(probs, slow)
        assert method.labels.equal(plain[0]["labels"])


def test_an_ensemble_averages_probabilities_and_not_their_logarithms() -> None:
    certain = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).log()
    members = [{"labels": torch.zeros(1).long(), "plain.known": row[None]} for row in certain]
    ensemble = by_name(methods(members, []))["Deep Ensembles", False]
    torch.testing.assert_close(ensemble.known, torch.tensor([[0.5, 0.5]]))


def test_what_is_missing_leaves_methods_out() -> None:
    assert list(by_name(methods([member(0)], []))) == [("plain", False), ("plain", True)]
    assert list(by_name(methods([member(0, sbn=False)], []))) == [("plain", False)]
    assert list(by_name(methods([], [member(0)]))) == [("Dropout", False), ("Dropout", True)]
    found = by_name(methods([member(0), member(1, sbn=False)], []))
    assert list(found) == [("plain", False), ("plain", True), ("Deep Ensembles", False)]
    assert by_name(methods([member(0, unknown=False)], []))["plain", True].unknown is None
    assert [m.members for m in methods([], [member(0), member(1)])] == [2, 2]


def slow_scores(known: Tensor, labels: Tensor, unknown: Tensor) -> dict[str, float]:
    p, q, y = known.double().numpy(), unknown.double().numpy(), labels.numpy()
    rows = np.arange(len(y))
    entropy_known, entropy_unknown = (-(t * np.log(t)).sum(1) for t in (p, q))
    higher = entropy_unknown[:, None] > entropy_known[None]
    ties = entropy_unknown[:, None] == entropy_known[None]
    threshold = np.sort(entropy_unknown)[::-1][math.ceil(0.95 * len(q)) - 1]
    return {
        "error": 100 * (p.argmax(1) != y).mean(),
        "nll": -np.log(p[rows, y]).mean(),
        "brier": ((p - np.eye(p.shape[1])[y]) ** 2).sum(1).mean(),
        "entropy_known": entropy_known.mean(),
        "entropy_unknown": entropy_unknown.mean(),
        "auroc": (higher + 0.5 * ties).mean(),
        "fpr95": (entropy_known >= threshold).mean(),
    }


def test_scores_are_errors_calibration_entropies_and_detection() -> None:
    method = methods([member(i) for i in range(3)], [])[3]
    assert method.unknown is not None
    found = method.scores()
    assert (found["method"], found["sbn"], found["members"]) == ("Deep Ensembles", True, 3)
    for key, value in slow_scores(method.known, method.labels, method.unknown).items():
        assert found[key] == pytest.approx(value, rel=1e-5), key
    assert "auroc" not in replace(method, unknown=None).scores()


def test_what_sbn_changes_is_scored_against_the_same_method_without() -> None:
    found = methods([member(i) for i in range(3)], [member(7)])
    by_key = {(row["method"], row["sbn"]): row for row in score(found)}
    for (name, sbn), row in by_key.items():
        assert ("nll_change" in row) == sbn
        if sbn:
            plain = by_key[name, False]
            for key in ("error", "nll", "entropy_unknown", "auroc"):
                assert row[f"{key}_change"] == pytest.approx(row[key] - plain[key], abs=1e-6), key
                assert row[f"{key}_change_se"] > 0
    assert not any("nll_change" in row for row in score([m for m in found if m.sbn]))


def test_few_errors_have_no_best_temperature() -> None:
    labels = torch.arange(200) % 4
    sure = (6 * torch.nn.functional.one_hot(labels, 4) + 0.1 * normal(200, 4)).softmax(1)
    for errors, known in ((9, False), (10, True)):
        probs = sure.clone()
        probs[:errors] = probs[:errors].roll(1, 1)
        scores = Method("plain", False, 1, probs, labels).scores()
        assert scores["error"] == pytest.approx(100 * errors / 200)
        assert ("calibrated_nll" in scores) == ("temperature" in scores) == known


def test_the_best_temperature_of_a_method_is_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[Any] = []
    best = metrics.calibrated_nll_of_each

    def search(*given: Any) -> Tensor:
        searched.append(given)
        return best(*given)

    monkeypatch.setattr(metrics, "calibrated_nll_of_each", search)
    labels = torch.arange(20) % 4
    found = [Method("plain", sbn, 1, normal(20, 4, seed=int(sbn)).softmax(1), labels) for sbn in (False, True)]
    scores = score(found)
    assert len(searched) == 2
    change = scores[1]["calibrated_nll"] - scores[0]["calibrated_nll"]
    assert scores[1]["calibrated_nll_change"] == pytest.approx(change)


# ---------------------------------------------------------------- runs


def test_a_run_has_all_three_methods_without_and_with_sbn_in_results_and_tables(
    reported: tuple[Path, list[Table]],
) -> None:
    folder, (accuracy, out_of_domain, changed) = reported
    results = json.loads((folder / "results.json").read_text())
    assert [(row["method"], row["sbn"]) for row in results["scores"]] == SIX
    assert [row["members"] for row in results["scores"]] == [1, 1, 2, 2, 1, 1]
    assert [row[0] for row in accuracy.rows] == ["plain", "Deep Ensembles (2)", "Dropout"]
    assert all(cell not in ("", "-") for row in accuracy.rows for cell in row)
    assert len(out_of_domain.rows) == 6
    assert "digits:0-4 (test)" in accuracy.title
    assert "digits:5-9 (test)" in out_of_domain.title
    assert "published" not in accuracy.title, "the published numbers are from other data"
    text = (folder / "results.md").read_text()
    assert text == f"{accuracy.markdown()}\n\n{out_of_domain.markdown()}\n\n{changed.markdown()}\n"
    assert [row[0] for row in changed.rows] == ["plain", "Deep Ensembles (2)", "Dropout"]
    assert all("±" in cell for row in changed.rows for cell in row[4:])
    wrong = {row["method"]: row["error"] * 64 / 100 for row in results["scores"] if row["sbn"]}
    for row, errors in zip(changed.rows, wrong.values(), strict=True):
        assert "±" in row[3] if errors > 15 else row[3] == "-" or errors >= 8  # the plain ones are nearly as many
    for name in ("entropy-cdf.png", "entropy-cdf.svg", "statistics.png", "statistics.svg", "training.png"):
        assert (folder / name).stat().st_size > 5000
    assert (folder / "entropy-cdf.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / "entropy-cdf.svg").read_text()


def test_results_are_what_the_metrics_give_on_the_stored_predictions_combined_by_hand(
    reported: tuple[Path, list[Table]],
) -> None:
    folder, _ = reported
    results = json.loads((folder / "results.json").read_text())
    stored = {
        name: read_tensors(folder / name / "predictions.safetensors", PREDICTIONS)[0]
        for name in ("plain-0", "plain-1", "dropout-0")
    }
    groups = {"plain": ["plain-0"], "Deep Ensembles": ["plain-0", "plain-1"], "Dropout": ["dropout-0"]}
    labels = stored["plain-0"]["labels"]
    for row in results["scores"]:
        kind = "sbn" if row["sbn"] else "plain"
        known, unknown = (
            torch.stack([stored[name][f"{kind}.{part}"].exp() for name in groups[row["method"]]]).mean(0)
            for part in ("known", "unknown")
        )
        expected: dict[str, float] = slow_scores(known, labels, unknown)
        expected |= metrics.evaluate(known, labels)
        if (known.argmax(1) != labels).sum() >= 10:
            calibrated = metrics.calibrated_nll(known, labels)
            expected |= {"calibrated_nll": calibrated["nll"], "temperature": calibrated["temperature"]}
        expected |= metrics.ood(torch.special.entr(known).sum(1), torch.special.entr(unknown).sum(1))
        assert set(expected) | {"method", "sbn", "members", "objects"} == {
            key for key in row if "_change" not in key and not key.endswith("_se")
        }
        for key, value in expected.items():
            assert row[key] == pytest.approx(value, rel=1e-5, abs=1e-7), key


def test_results_record_the_run(reported: tuple[Path, list[Table]]) -> None:
    folder, _ = reported
    results = json.loads((folder / "results.json").read_text())
    about = json.loads((folder / "run.json").read_text())
    assert {key: results[key] for key in about} == about
    assert set(results["seconds"]) == {"plain-0", "plain-1", "dropout-0"}
    posterior = stochbn.load(folder / "plain-0" / "network.sbn.safetensors")
    assert set(results["kolmogorov_smirnov"]) == set(posterior.layers)


def test_a_report_needs_no_network_and_gives_the_same_files_again(
    reported: tuple[Path, list[Table]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(reported[0], tmp_path)
    names = ("results.json", "results.md", "entropy-cdf.png", "entropy-cdf.svg", "statistics.png", "statistics.svg",
             "training.png", "training.svg")  # fmt: skip
    before = {name: (folder / name).read_bytes() for name in names}
    for name in names:
        (folder / name).unlink()
    for network in folder.rglob("network.safetensors"):
        network.unlink()

    def forward(*_: Any, **__: Any) -> Any:
        raise AssertionError("a network was run")

    monkeypatch.setattr(nn.Module, "__call__", forward)
    write_run(folder)
    assert {name: (folder / name).read_bytes() for name in names} == before


def test_a_run_without_unknown_data_has_one_table_and_no_entropy_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "save_statistics", lambda *_, **__: [])  # takes long
    recipe = replace(RECIPE, unknown=None, dropout=None, members=1, train_images=32, test_images=10)
    run(recipe, tmp_path / "run")
    shown = write_run(tmp_path / "run")
    assert len(shown) == 2
    assert [row[0] for row in shown[0].rows] == ["plain"]
    assert not list((tmp_path / "run").glob("entropy-cdf*"))


def test_folders_that_are_no_finished_run_are_refused(runs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no run folder: it has no"):
        write_run(tmp_path)
    folder = copied(runs[0], tmp_path)
    predictions = folder / "plain-1" / "predictions.safetensors"
    content = predictions.read_bytes()
    predictions.write_bytes(content[:-10])
    with pytest.raises(ValueError, match=r"predictions\.safetensors' is truncated"):
        write_run(folder)
    predictions.unlink()
    with pytest.raises(FileNotFoundError, match=r"plain-1/predictions\.safetensors"):
        write_run(folder)
    (folder / "run.json").write_text("{")
    with pytest.raises(ValueError):
        write_run(folder)


def test_methods_of_any_kind_are_written_with_their_settings(tmp_path: Path) -> None:
    found = methods([member(0), member(1)], [])
    shown = write(tmp_path, {"draws": 7}, found, "known data", "unknown data", "a title")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["draws"] == 7
    assert results["scores"] == score(found)
    assert len(shown) == 3
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "entropy-cdf.png", "entropy-cdf.svg", "results.json", "results.md",
    ]  # fmt: skip


def test_a_single_network_without_a_posterior_can_be_written(tmp_path: Path) -> None:
    shown = write(tmp_path, {}, methods([member(0, sbn=False)], []), "known data", "unknown data", "a title")
    assert [len(table.rows) for table in shown] == [1, 1]
    assert "| plain |" in (tmp_path / "results.md").read_text()


def test_results_cannot_be_written_where_there_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        write(tmp_path / "none", {}, methods([member(0)], []), "known", None, "x")


# ---------------------------------------------------------------- several seeds


def test_several_seeds_give_means_and_standard_deviations(runs: tuple[Path, Path], tmp_path: Path) -> None:
    shown = write_seeds(runs, tmp_path)
    each = [score(report.read_run(folder)[1]) for folder in runs]
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(row["method"], row["sbn"]) for row in results["scores"]] == SIX
    for row, first, second in zip(results["scores"], *each, strict=True):
        assert row["members"] == first["members"]
        for key in ("error", "nll", "brier", "ece", "entropy_known", "entropy_unknown", "auroc", "aupr", "fpr95"):
            assert row[key][0] == pytest.approx((first[key] + second[key]) / 2)
            assert row[key][1] == pytest.approx(statistics.stdev([first[key], second[key]]))
        if row["sbn"]:
            both = [first["nll_change"], second["nll_change"]]
            assert row["nll_change"] == pytest.approx(statistics.mean(both))
            assert row["nll_change_se"] == pytest.approx(abs(both[0] - both[1]) / 2), "that of a mean of two"
    assert results["recipe"]["seed"] == [0, 1]
    assert all("±" in cell for table in shown[:2] for row in table.rows for cell in row[1:])
    assert all("±" in cell for row in shown[2].rows for cell in row[4:]), "few errors have no calibrated NLL"
    assert (tmp_path / "results.md").read_text() == "\n\n".join(table.markdown() for table in shown) + "\n"


def test_runs_that_cannot_be_averaged_are_refused(runs: tuple[Path, Path], tmp_path: Path) -> None:
    folder = copied(runs[1], tmp_path)
    about = json.loads((folder / "run.json").read_text())
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ValueError, match="two different seeds"):
        write_seeds([runs[0], runs[0]], out)
    with pytest.raises(ValueError, match="two different seeds"):
        write_seeds([runs[0]], out)
    (folder / "run.json").write_text(json.dumps(about | {"recipe": about["recipe"] | {"draws": 9}}))
    with pytest.raises(ValueError, match="differ in more than their seeds"):
        write_seeds([runs[0], folder], out)
    changed = about["data"] | {"known": about["data"]["known"] | {"sha256": "0"}}
    (folder / "run.json").write_text(json.dumps(about | {"data": changed}))
    with pytest.raises(ValueError, match="different data"):
        write_seeds([runs[0], folder], out)
    with pytest.raises(FileNotFoundError):
        write_seeds([runs[0], tmp_path / "none"], out)
    assert list(out.iterdir()) == []


# ---------------------------------------------------------------- goodness of fit


def slow_distance(values: Tensor, location: float, scale: float) -> float:
    """The largest difference between an empirical and a normal distribution function."""
    ordered = sorted(values.tolist())
    n, largest = len(ordered), 0.0
    for i, value in enumerate(ordered):
        normal_below = 0.5 * (1 + math.erf((value - location) / (scale * math.sqrt(2))))
        largest = max(largest, abs(i / n - normal_below), abs((i + 1) / n - normal_below))
    return largest


def some_network() -> nn.Module:
    torch.manual_seed(0)
    return build("lenet5", classes=5)


def test_observed_statistics_are_those_the_posterior_is_fitted_to() -> None:
    images, model = named.load("digits:0-4", "train").take(torch.arange(70)), some_network()
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    observed = goodness.observe(model, images, 16, seed=5)
    assert torch.random.get_rng_state().equal(state)
    order = torch.randperm(70, generator=seeded(5))
    posterior = fit_factorized(model, [images.pixels[order].float() / 255], 16)
    assert list(observed) == list(posterior.layers)
    together = torch.cat(list(observed.values()), 2).double()
    assert together.shape == (4, 2, 570)
    torch.testing.assert_close(together.mean(0)[0], posterior.mean_mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(together.mean(0)[1], posterior.variance_mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(together.var(0)[1], posterior.variance_variance, rtol=1e-3, atol=1e-9)


def test_distances_are_those_of_kolmogorov_and_smirnov_averaged_over_channels() -> None:
    images, model = named.load("digits:0-4", "train").take(torch.arange(90)), some_network()
    observed = goodness.observe(model, images, 3)
    order = torch.randperm(90, generator=seeded(0))
    posterior = fit_factorized(model, [images.pixels[order].float() / 255], 3)
    found, start = goodness.distances(observed, posterior), 0
    for layer, channels in list(posterior.layers.items())[:2]:
        means, variances = [], []
        for c in range(channels):
            at = start + c
            m, v = posterior.variance_mean[at].item(), posterior.variance_variance[at].item()
            s2 = math.log(1 + v / m**2)
            mean = posterior.mean_mean[at].item(), math.sqrt(posterior.mean_variance[at].item())
            means.append(slow_distance(observed[layer][:, 0, c], *mean))
            log_variance = math.log(m) - s2 / 2, math.sqrt(s2)
            variances.append(slow_distance(observed[layer][:, 1, c].double().log(), *log_variance))
        start += channels
        assert found[layer]["mean"] == pytest.approx(np.mean(means), rel=1e-3)
        assert found[layer]["variance"] == pytest.approx(np.mean(variances), rel=1e-3)


def posterior_of(observed: Tensor) -> stochbn.Factorized:
    """With the moments of the statistics ``[M, 2, C]`` of one layer."""
    mean, variance = observed.double().mean(0), observed.double().var(0)
    return stochbn.Factorized(
        layers={"norm": observed.shape[2]}, mean_mean=mean[0], mean_variance=variance[0], variance_mean=mean[1],
        variance_variance=variance[1], batch_size=16, mini_batches=len(observed),
    )  # fmt: skip


def test_statistics_that_follow_the_fitted_distribution_are_close_to_it_and_others_are_not() -> None:
    source = seeded(2)
    shape = 400, 3
    close = torch.stack([torch.randn(shape, generator=source), torch.randn(shape, generator=source).exp()], 1)
    far = (close > 0.9).float() + 0.1
    for observed, low, high in ((close, 0.0, 0.08), (far, 0.2, 1.0)):
        for distance in goodness.distances({"norm": observed}, posterior_of(observed))["norm"].values():
            assert low <= distance <= high


def test_channels_that_never_vary_do_not_count() -> None:
    observed = torch.stack([torch.randn(50, 2, generator=seeded(3)), torch.rand(50, 2, generator=seeded(4)) + 0.5], 1)
    dead = torch.cat([observed, torch.tensor([1.0, 0.0]).view(1, 2, 1).expand(50, 2, 1)], 2)
    without, with_dead = (goodness.distances({"norm": rows}, posterior_of(rows)) for rows in (observed, dead))
    assert with_dead["norm"] == pytest.approx(without["norm"])
    constant = dead[:, :, 2:]
    assert goodness.distances({"norm": constant}, posterior_of(constant)) == {"norm": {"mean": 0.0, "variance": 0.0}}


def test_the_statistics_of_a_run_can_be_read(runs: tuple[Path, Path]) -> None:
    observed, posterior = report.read_statistics(runs[0])
    assert set(observed) == set(posterior.layers)
    for layer, rows in observed.items():
        assert rows.shape == (4, 2, posterior.layers[layer])
    together = torch.cat([observed[layer] for layer in posterior.layers], 2).double()
    torch.testing.assert_close(together.mean(0)[0], posterior.mean_mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(together.var(0)[0], posterior.mean_variance, rtol=1e-3, atol=1e-7)


# ---------------------------------------------------------------- diagnosis


def mini_batches_of(shared: float, skew: float = 0.0) -> dict[str, Tensor]:
    """Statistics ``[300, 2, C]`` of two layers: independent but for a part that all have in common."""
    source = seeded(4)
    noise = torch.randn(300, 2, 12, generator=source) + shared * torch.randn(300, 1, 1, generator=source)
    means, logs = noise.unbind(1)
    means = means + skew * means.exp()
    both = torch.stack([0.1 * means, (0.1 * logs).exp()], 1)
    return {"a": both[:, :, :4], "b": both[:, :, 4:]}


def test_independent_normal_statistics_are_left_to_the_factorised_form() -> None:
    found = goodness.diagnose(mini_batches_of(0))
    assert found.correlations.max() < 1.5 * found.chance
    assert "--kind factorized" in found.advice[-1]
    assert found.shares.sum().item() == pytest.approx(1)


def test_statistics_that_move_together_call_for_the_joint_form() -> None:
    observed = mini_batches_of(2)
    found = goodness.diagnose(observed)
    assert "--kind joint" in found.advice[-1]
    assert found.shares[0] > 0.6
    rows = [np.concatenate([o[:, 0].numpy(), o[:, 1].log().numpy()], axis=1) for o in observed.values()]
    slow = np.abs(np.corrcoef(np.concatenate(rows, axis=1), rowvar=False))
    between, within = slow[:8, 8:].mean(), (slow[:8, :8].sum() - 8) / (8 * 7)
    assert found.correlations[0, 1].item() == pytest.approx(between, rel=1e-4)
    assert found.correlations[0, 0].item() == pytest.approx(within, rel=1e-4)


def test_marginals_that_do_not_fit_call_for_replay() -> None:
    found = goodness.diagnose(mini_batches_of(0, skew=3))
    assert "--kind empirical" in found.advice[-1]
    assert "poorly" in found.advice[0]


def test_too_few_or_ragged_mini_batches_are_not_diagnosed() -> None:
    observed = mini_batches_of(0)
    with pytest.raises(ValueError, match="at least 10 mini-batches, got 9"):
        goodness.diagnose({layer: rows[:9] for layer, rows in observed.items()})
    with pytest.raises(ValueError, match="as many observations of every layer"):
        goodness.diagnose(observed | {"b": observed["b"][:20]})
