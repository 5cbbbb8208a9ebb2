from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import stochbn
from conftest import Wrapped, mlp, normal, seeded, settled
from conftest import command_output as stochbn_
from stochbn import Estimate, Predictive, metrics
from stochbn.calibration_report import Choice
from stochbn.tasks import Regression
from stochbn.tasks.residual import Moments, Residual, fit_residual
from test_own_network import NUMBER, told  # noqa: F401 - a fixture
from test_task_scores import in_batches, jackknife

X = normal(12, 4, seed=2)
FORMS: dict[str, Callable[[Tensor], Any]] = {
    "[N]": lambda out: out[:, 0],
    "[N, D]": lambda out: out * torch.tensor([1.0, 50.0]),
    "dense": lambda out: torch.stack([out, -out, out * 2], 2),
    "with log-variances": lambda out: (out[:, :1], out[:, 1:].tanh()),
}


def network(form: str = "[N, D]") -> nn.Module:
    return settled(Wrapped(mlp(classes=2), FORMS[form]), 4)


def observed(model: nn.Module, x: Tensor, seed: int, noise: float = 1.5) -> Tensor:
    """Numbers about what the network says, with a noise of their own (in units of it)."""
    with torch.no_grad():
        out = model(x)
    mean = out[0] if isinstance(out, tuple) else out
    spread = mean.std([axis for axis in range(mean.ndim) if axis != 1], keepdim=True) * noise
    found: Tensor = mean + spread * normal(*mean.shape, seed=seed)
    return found


def calibrated(form: str, n: int = 600, **options: Any) -> tuple[nn.Module, stochbn.Posterior]:
    model = network(form)
    posterior = stochbn.fit(model, [normal(96, 4, seed=3)], 8)
    x = normal(n, 4, seed=11)
    held_out = list(zip(torch.split(x, 200), torch.split(observed(model, x, 12), 200), strict=True))
    return model, stochbn.calibrate(model, posterior, held_out, task="regression", draws=4, **options)


# What is not known is not said


@pytest.mark.parametrize("form", FORMS)
def test_the_spread_of_an_observation_is_not_known_before_it_is_fitted(form: str) -> None:
    model = network(form)
    found = Predictive(model, stochbn.fit(model, [normal(96, 4)], 8), 9, task="regression")(X)
    if form == "with log-variances":
        assert found.total_std.equal((found.variance + found.noise_variance).sqrt())
        assert "total_std is None" not in repr(found)
    else:
        assert found.total_std is None
        assert "total_std is None, as neither the network nor a calibration says" in repr(found)
        assert len(found.averages) == 3
        with pytest.raises(TypeError, match=r"standard deviations are None.*calibrate"):
            metrics.regression(found.mean, found.total_std, found.mean)
    if form != "dense":
        assert any("total_std" in name for name in found.columns()) == (form == "with log-variances")


def test_a_mixture_knows_the_spread_that_all_members_know() -> None:
    model, posterior = calibrated("[N, D]")
    known = Predictive(model, posterior, task="regression")
    unknown = Predictive(model, stochbn.fit(model, [normal(96, 4)], 8), 9, task="regression")
    assert stochbn.Ensemble([known, unknown])(X).total_std is None
    assert "total_std is None" in repr(stochbn.Ensemble([unknown, known])(X))
    both = stochbn.Ensemble([known, known])(X)
    torch.testing.assert_close(both.total_std, known(X).total_std)
    other = Estimate(*(values + 2 for values in known(X).averages))
    found = known(X).mixed(other, 0.25)
    total = known(X).total_variance
    wanted = 0.75 * total + 0.25 * (total + 2) + 0.25 * 0.75 * 4
    torch.testing.assert_close(found.total_variance, wanted)


def test_dropout_does_not_take_what_was_fitted_without_it() -> None:
    model = settled(nn.Sequential(nn.Linear(4, 9), nn.BatchNorm1d(9), nn.Dropout(0.5), nn.Linear(9, 1)), 4)
    x = normal(100, 4)
    fitted = stochbn.fit(model, [x], 8)
    posterior = stochbn.calibrate(model, fitted, [(x, normal(100, 1))], task="regression", draws=2)
    assert Predictive(model, posterior, task="regression")(x).total_std is not None
    assert stochbn.MCDropout(model, 5, posterior, task="regression")(x).total_std is None


# The fit


def test_without_draws_the_residual_variance_is_the_mean_squared_error() -> None:
    moments = torch.zeros(4, 90, 3, 1, dtype=torch.float64)
    moments[3] = normal(90, 3, 1).double() * torch.tensor([1e-4, 1.0, 1e5])[:, None]
    parts, losses = fit_residual(moments)
    squares = moments[3].square().mean((0, 2))
    torch.testing.assert_close(parts[2], squares, rtol=1e-5, atol=0)
    wanted = (moments[3].square()[..., 0] / squares + (2 * math.pi * squares).log()).sum(1) / 2
    torch.testing.assert_close(losses, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("true", [(4.0, 1.0, 0.0), (0.0, 1.0, 2.0), (2.0, 3.0, 0.5), (1.0, 0.3, 0.0)])
def test_the_parts_are_found_again(true: tuple[float, float, float]) -> None:
    generator = seeded()
    draws, noise = (torch.rand(40_000, 1, 1, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    total = true[0] * draws + true[1] * noise + true[2]
    truth = total.sqrt() * torch.randn(40_000, 1, 1, generator=generator, dtype=torch.float64)
    parts, _ = fit_residual(torch.stack([torch.zeros_like(draws), draws, noise, truth]))
    assert parts[:, 0].tolist() == pytest.approx(true, abs=0.12)


def test_no_other_parts_have_a_higher_likelihood() -> None:
    generator = seeded(3)
    draws, noise = torch.rand(2, 200, 1, 1, generator=generator, dtype=torch.float64)
    truth = (draws + 0.4).sqrt() * torch.randn(200, 1, 1, generator=generator, dtype=torch.float64)
    parts, losses = fit_residual(torch.stack([torch.zeros_like(draws), draws, noise, truth]))

    def loss(a: float, c: float, b: float) -> float:
        variance = a * draws + c * noise + b
        return float(((truth.square() / variance + (2 * math.pi * variance).log()) / 2).sum())

    best = min(
        loss(a, c, b) for a in np.linspace(0, 3, 31) for c in np.linspace(0, 2, 21) for b in np.linspace(0.01, 1, 31)
    )
    assert float(losses.sum()) <= best + 1e-6
    assert float(losses.sum()) == pytest.approx(loss(*parts[:, 0].tolist()), rel=1e-9)


def test_moments_are_those_of_all_draws() -> None:
    every = normal(7, 9, 2, 3, 2, seed=4)  # draws, examples, mean and log-variance, numbers, places
    score = Moments(torch.ones(1))
    for raw in every:
        score.add(raw, torch.empty(0))
    truth = normal(9, 3, 2, seed=5)
    mean, variance, noise, targets = score.of_each(truth)
    torch.testing.assert_close(mean, every[:, :, 0].double().mean(0))
    torch.testing.assert_close(variance, every[:, :, 0].double().var(0))
    torch.testing.assert_close(noise, every[:, :, 1].double().exp().mean(0))
    torch.testing.assert_close(targets, truth.double())
    assert Moments(torch.ones(1)).temperatures.tolist() == [1.0]


# Calibration


@pytest.mark.parametrize("form", FORMS)
def test_intervals_hold_the_truth_as_often_as_they_say(form: str) -> None:
    model, posterior = calibrated(form, n=2000)
    x = normal(4000, 4, seed=21)
    found = Predictive(model, posterior, task="regression")(x)
    truth = observed(model, x, 22)
    off = ((truth - found.mean) / found.total_std).abs().double().reshape(4000, -1)
    for level in (0.5, 0.8, 0.9, 0.95):
        half = torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64))
        for column in off.T[:2]:  # of each number on its own
            share = (column <= half).double().mean().item()
            error = (level * (1 - level) * (1 / 4000 + 1 / 2000)) ** 0.5
            assert abs(share - level) < 3.5 * error


def test_draws_are_chosen_where_their_spread_tells_the_error() -> None:
    model = network("[N]")
    posterior = stochbn.fit(model, [normal(96, 4, seed=3)], 8)
    x = normal(3000, 4, seed=11)
    drawn = Predictive(model, posterior, 50, task="regression", tolerance=0)(x, generator=seeded())
    y = drawn.mean + 3 * drawn.std * normal(3000, seed=12)
    choices: list[Choice] = []
    chosen = stochbn.calibrate(
        model, posterior, [(x, y)], task="regression", report=choices.append, batch_sizes=[8, math.inf]
    )
    assert not chosen.noiseless
    assert chosen.residual_variance is not None
    assert float(chosen.residual_variance.parts[0, 0]) > 4
    assert "beyond the plain network, both with a residual variance" in chosen.choice
    assert choices[0].chosen.drawing
    plain, found = choices[0].options
    assert found.more < -4 * found.error
    assert plain.mean == pytest.approx(
        (math.log(2 * math.pi) + (y - Predictive(model, task="regression")(x).mean).square().mean().log().item() + 1)
        / 2,
        rel=1e-4,
    )


def test_noise_that_draws_know_nothing_of_leaves_the_plain_network() -> None:
    model, posterior = calibrated("[N]")
    assert posterior.noiseless
    assert posterior.choice.startswith("The plain network does as well as drawing")
    found = Predictive(model, posterior, task="regression")(X)
    with torch.no_grad():
        torch.testing.assert_close(found.mean, model(X))
    assert "one pass without draws" in found.note


def test_what_cannot_be_fitted_is_refused() -> None:
    model = network()
    posterior = stochbn.fit(model, [normal(96, 4)], 8)
    x, y = normal(40, 4), normal(40, 2)
    wrong: list[tuple[Any, str]] = [
        ((x[:9], y[:9]), "needs at least 20 held-out examples, got 9"),
        ((x, y[:, :1]), r"expected targets \[40, 2\]"),
        ((x, y / 0), "NaN or infinity"),
    ]
    for batch, message in wrong:
        with pytest.raises(ValueError, match=message):
            stochbn.calibrate(model, posterior, [batch], task="regression", draws=2)
    with pytest.raises(ValueError, match="no label that could be ignored"):
        stochbn.calibrate(model, posterior, [(x, y)], task="regression", ignore_index=3)
    with pytest.raises(ValueError, match="no held-out examples"):
        stochbn.calibrate(model, posterior, [], task="regression")
    _, fitted = calibrated("[N, D]")
    with pytest.raises(ValueError, match="fitted to 2 numbers for each example"):
        Regression(residual=fitted.residual_variance).prediction(X[:, :1], X[:, :0, None], X[:, :1], None)


# Files, and what drops it


def test_it_is_kept_in_the_file_and_dropped_with_another_noise(tmp_path: Path) -> None:
    model, posterior = calibrated("[N, D]", batch_sizes=[8])
    posterior.save(tmp_path / "p.safetensors")
    loaded = stochbn.load(tmp_path / "p.safetensors")
    assert loaded.residual_variance is not None
    assert posterior.residual_variance is not None
    assert loaded.residual_variance.parts.equal(posterior.residual_variance.parts)
    first, second = (Predictive(model, one, 9, task="regression")(X, generator=seeded()) for one in (posterior, loaded))
    assert first.total_std.equal(second.total_std)
    changes: list[Callable[[Any], Any]] = [
        lambda p: p.rescale(16), lambda p: p.recentre_observed(), lambda p: p.rescale(math.inf),
    ]  # fmt: skip
    for change in changes:
        with pytest.warns(UserWarning, match="residual variance .* was dropped") as caught:
            changed = change(loaded)
        assert caught[0].filename == __file__
        assert changed.residual_variance is None
        assert Predictive(model, changed, 9, task="regression")(X).total_std is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert replace(loaded, temperature=2.0).residual_variance is not None
        assert loaded.fitted().residual_variance is None
        x = normal(100, 4)
        again = stochbn.calibrate(
            model, loaded, [(x, observed(model, x, 5))], task="regression", batch_sizes=[8], draws=2
        )
    assert again.residual_variance is not None


def test_an_adapted_posterior_says_that_it_is_of_other_data() -> None:
    model, posterior = calibrated("[N]")
    assert posterior.residual_variance is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = stochbn.adapt(model, posterior, [2 * normal(64, 4) + 1])
    assert adapted.residual_variance is not None
    assert adapted.residual_variance.adapted
    assert adapted.residual_variance.parts.equal(posterior.residual_variance.parts)
    found = Predictive(model, adapted, task="regression")(X)
    assert "total_std is that of other data" in repr(found)
    assert "adapted after its residual variance was fitted" in Regression().caveat(adapted, ["total_std"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": torch.ones(2, 3, dtype=torch.float64)}, r"float64 \[3, D\]"),
        ({"parts": -torch.ones(3, 1, dtype=torch.float64)}, "not negative"),
        ({"examples": 0}, "number of examples"),
        ({"centre": (0.0, math.inf)}, "two numbers"),
        ({"batch_size": -3}, "positive or None"),
    ],
)
def test_what_no_residual_variance_has_is_refused(change: dict[str, Any], message: str) -> None:
    usual: dict[str, Any] = {"parts": torch.ones(3, 1, dtype=torch.float64), "examples": 9, "batch_size": 8.0}
    usual |= {"centre": (0.0, 1.0), "adapted": False}
    found = Residual(**usual)
    about = {**found.description(), "centre": list(found.centre)}
    assert Residual.from_file(found.tensors(), about).description() == found.description()
    with pytest.raises(ValueError, match=message):
        Residual(**{**usual, **change})
    with pytest.raises(ValueError, match="must have parts"):
        Residual.from_file({}, about)


# Scores


def test_scores_are_those_of_slow_loops_with_errors_over_examples() -> None:
    mean, std, truth = normal(60, 2, seed=1), normal(60, 2, seed=2).exp(), normal(60, 2, seed=3)
    zeros = torch.zeros(60, 2)
    found = Regression().scores(in_batches(Estimate(mean, zeros, zeros, std.square()), truth))
    usual = metrics.regression(mean, std, truth)
    assert {name: found.values[name] for name in usual if name != "coverage"} == pytest.approx(
        {name: value for name, value in usual.items() if name != "coverage"}, rel=1e-5
    )
    assert found.values["coverage_90"] == usual["coverage"]
    quantiles = {
        p: mean + std * float(torch.special.ndtri(torch.tensor(p)))
        for p in (0.25, 0.75, 0.1, 0.9, 0.05, 0.95, 0.025, 0.975)
    }
    pinball = [metrics.pinball(values, truth, p) for p, values in quantiles.items()]
    assert found.values["pinball"] == pytest.approx(sum(pinball) / 8, rel=1e-5)
    for name in ("rmse", "mae", "nll", "crps", "width"):

        def score(mask: Tensor, name: str = name) -> float:
            return metrics.regression(mean[mask], std[mask], truth[mask])[name]

        assert found.errors[name] == pytest.approx(jackknife(score, 60), rel=0.05)
    for level in (0.5, 0.8, 0.95):
        inside = metrics.regression(mean, std, truth, coverage=level)["coverage"]
        assert found.values[f"coverage_{100 * level:g}"] == inside
    assert list(found.losses) == ["NLL", "squared error"]


def test_the_crps_is_the_integral_of_squared_differences() -> None:
    mean, std, truth = torch.tensor([0.3]), torch.tensor([0.7]), torch.tensor([1.1])
    grid = torch.linspace(-20, 20, 400_001, dtype=torch.float64)
    below = torch.special.ndtr((grid - mean) / std)
    wanted = torch.trapezoid((below - (grid >= truth).double()).square(), grid)
    assert metrics.crps_of_each(mean, std, truth).item() == pytest.approx(wanted.item(), abs=1e-4)


# Commands and exports

MODULE = """
from torch import nn

def net():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
"""


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_commands_say_what_is_not_known_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stochbn.sources import build

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"own_regression_{next(NUMBER)}"
    Path(f"{name}.py").write_text(MODULE)
    model = settled(build(f"{name}:net", {}).model, 4)
    save_file(model.state_dict(), "w.safetensors")
    x = normal(200, 4)
    np.savez("d.npz", inputs=x.numpy(), labels=observed(model, x, 5).numpy())
    common = "--model", f"{name}:net", "--weights", "w.safetensors", "--task", "regression"
    assert "stochbn calibrate" in stochbn_("fit", *common, "--data", "d.npz", "--batch-size", 8)
    unknown = "total_std is None, as neither the network nor a calibration says"
    for command in (("evaluate",), ("predict", "--out", "p.csv")):
        text = " ".join(stochbn_(command[0], *common, "--data", "d.npz", "--draws", 8, *command[1:]).split())
        assert unknown in text
        assert "'stochbn calibrate'" in text
    assert Path("p.csv").read_text().splitlines()[0] == "row,mean,std,error"
    text = stochbn_("calibrate", *common, "--held-out", "d.npz")
    assert "residual standard deviation" in text
    assert "temperature" not in text.split("Saved the posterior")[1].split("Next")[0]
    text = stochbn_("evaluate", *common, "--data", "d.npz", "--out", "r", "--report", "r.html")
    assert unknown not in " ".join(text.split())
    scores = json.loads(Path("r/results.json").read_text())
    assert scores["scores"]["SBN"]["coverage_90"] == pytest.approx(0.9, abs=0.07)
    assert scores["errors"]["SBN"]["coverage_90"] == pytest.approx((0.09 / 200) ** 0.5, rel=0.4)
    assert scores["loss"] == "squared error"
    page = Path("r.html").read_text()
    for title in ("How far is it off?", "Is it off where it says so?", "Do its intervals hold the truth"):
        assert title in page
    assert unknown not in " ".join(stochbn_("predict", *common, "--data", "d.npz", "--out", "q.csv").split())
    assert Path("q.csv").read_text().splitlines()[0] == "row,mean,std,total_std,error"


@pytest.mark.parametrize("form", ["[N]", "[N, D]", "with log-variances"])
def test_an_exported_network_gives_what_is_known(form: str, tmp_path: Path) -> None:
    model, posterior = calibrated(form, batch_sizes=[8])
    found = stochbn.export.pt2(model, posterior, tmp_path / "n.pt2", X, draws=4, task="regression")
    assert found.outputs == ("mean", "std", "total_std")
    outputs = torch.export.load(tmp_path / "n.pt2").module()(X)
    draws = list(posterior.iter_draws(4, torch.Generator().manual_seed(0), quasi=True))
    with torch.no_grad():
        made = [torch.func.functional_call(model, draw, (X,)) for draw in draws]
    mean = torch.stack([one[0] if isinstance(one, tuple) else one for one in made]).double()
    noise = torch.stack([one[1] for one in made]).double().exp().mean(0) if isinstance(made[0], tuple) else 0
    assert posterior.residual_variance is not None
    a, c, b = posterior.residual_variance.parts if form != "[N]" else posterior.residual_variance.parts[:, 0]
    wanted = (a * mean.var(0) + c * noise + b).sqrt()
    torch.testing.assert_close(outputs["total_std"].double(), wanted, rtol=1e-3, atol=1e-5)
    plain = stochbn.export.pt2(model, posterior.fitted(), tmp_path / "p.pt2", X, draws=4, task="regression")
    assert ("total_std" in plain.outputs) == (form == "with log-variances")
