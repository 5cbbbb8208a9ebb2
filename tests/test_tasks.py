from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochbn
from conftest import Wrapped, mlp, normal, seeded, settled
from stochbn import Ensemble, Predictive
from stochbn.predictions import Estimate, MultilabelPrediction, Prediction
from stochbn.tasks import TASKS, make_task

X = normal(9, 4, seed=2)


def network(wrap: Callable[[Tensor], Any] = lambda out: out, outputs: int = 3) -> nn.Module:
    return settled(Wrapped(mlp(classes=outputs), wrap), 4)


def fitted(model: nn.Module) -> stochbn.Posterior:
    return stochbn.fit(model, [normal(96, 4, seed=3)], 8)


def outputs(model: nn.Module, posterior: stochbn.Posterior, x: Tensor = X, draws: int = 9) -> list[Any]:
    """Each draw's output, from a copy of the network with its buffers set."""
    made = []
    for draw in posterior.iter_draws(draws, seeded(), quasi=True):
        changed = copy.deepcopy(model).eval()
        for name, values in draw.items():
            changed.get_buffer(name).copy_(values)
        with torch.no_grad():
            made.append(changed(x))
    return made


def entropies(probs: Tensor, axis: int) -> Tensor:
    return -(probs * probs.clamp(min=1e-30).log()).sum(axis)


def close(found: Tensor | None, wanted: Tensor) -> None:
    assert found is not None
    assert found.shape == wanted.shape
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-4, atol=1e-5)


CLASSES: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, Any], int]] = {
    "logits": (lambda out: out, {}, 1),
    "dense": (lambda out: torch.stack([out, out * 2, out.tanh(), -out], 2).view(-1, 3, 2, 2), {"class_axis": 1}, 1),
    "dense, classes last": (lambda out: torch.stack([out, out * 2], 1), {"class_axis": -1}, 2),
    "dense, classes on axis 2": (lambda out: torch.stack([out, out * 2], 1)[..., None], {"class_axis": 2}, 2),
    "probabilities": (lambda out: out.softmax(1), {"output": "probs"}, 1),
    "probabilities, classes last": (
        lambda out: torch.stack([out, out * 2], 1).softmax(2), {"output": "probs", "class_axis": -1}, 2
    ),
}  # fmt: skip


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("form", CLASSES)
def test_classification_is_the_mean_of_slow_probabilities(form: str, temperature: float) -> None:
    wrap, arguments, axis = CLASSES[form]
    model = network(wrap)
    posterior = replace(fitted(model), temperature=temperature)
    every = torch.stack(outputs(model, posterior)).double()
    logits = every.log() if "output" in arguments else every
    probs = (logits / temperature).softmax(axis + 1)
    predictive = Predictive(model, posterior, 9, tolerance=0, **arguments)
    for keep in (False, True):
        found = predictive(X, generator=seeded(), keep_draws=keep)
        assert type(found) is Prediction
        close(found.probs, probs.mean(0))
        close(found.expected_entropy, entropies(probs, axis + 1).mean(0))
        close(found.entropy, entropies(probs.mean(0), axis))
        wanted = (entropies(probs.mean(0), axis) - entropies(probs, axis + 1).mean(0)).clamp(min=0)
        close(found.mutual_information, wanted)
        if keep:
            close(found.log_probs, probs.log())
        else:
            assert found.log_probs is None


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(
    "wrap", [lambda out: out, lambda out: out[:, 0], lambda out: out.squeeze(), lambda out: out[..., None, None]]
)
@pytest.mark.parametrize("form", ["logits", "probs"])
def test_binary_is_the_mean_of_slow_sigmoids(wrap: Callable[[Tensor], Tensor], form: Any, temperature: float) -> None:
    model = network((lambda out: wrap(out).sigmoid()) if form == "probs" else wrap, 1)
    posterior = replace(fitted(model), temperature=temperature)
    every = torch.stack(outputs(model, posterior)).double()
    logits = every.logit() if form == "probs" else every
    second = (logits.flatten(2) if logits.ndim > 2 else logits[..., None]) / temperature
    probs = torch.cat([(-second).sigmoid(), second.sigmoid()], 2).view(9, 9, 2, *every.shape[3:])
    found = Predictive(model, posterior, 9, task="binary", output=form, tolerance=0)(
        X, generator=seeded(), keep_draws=True
    )
    close(found.probs, probs.mean(0))
    close(found.expected_entropy, entropies(probs, 2).mean(0))
    close(found.log_probs, probs.log())


@pytest.mark.parametrize("objects", [1, 2, 9, 40])
def test_a_network_that_squeezes_its_output_may_stop_early(objects: int) -> None:
    model = network(lambda out: 9 * out.squeeze(), 1)
    predictive = Predictive(model, fitted(model), 50, task="binary")
    x = 2 * normal(objects, 4, seed=objects)
    if objects == 1:
        with pytest.raises(ValueError, match="expected one logit for each example"):
            predictive(x)
    else:
        assert predictive(x, generator=seeded()).probs.shape == (objects, 2)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("form", ["logits", "probs", "classes last"])
def test_multilabel_is_the_mean_of_slow_sigmoids(form: str, temperature: float) -> None:
    arguments: dict[str, Any] = {"output": "probs"} if form == "probs" else {}
    axis = 1
    wrap: Callable[[Tensor], Tensor] = (lambda out: out.sigmoid()) if form == "probs" else (lambda out: out)
    if form == "classes last":
        wrap, arguments, axis = (lambda out: torch.stack([out, out * 2], 1)), {"class_axis": -1}, 2
    model = network(wrap)
    posterior = replace(fitted(model), temperature=temperature)
    every = torch.stack(outputs(model, posterior)).double()
    probs = ((every.logit() if form == "probs" else every) / temperature).sigmoid()
    found = Predictive(model, posterior, 9, task="multilabel", tolerance=0, keep_draws=True, **arguments)(
        X, generator=seeded()
    )
    assert type(found) is MultilabelPrediction
    close(found.probs, probs.mean(0))
    close(found.log_probs, probs.log())
    close(found.expected_entropy, (entropies(probs, axis + 1) + entropies(1 - probs, axis + 1)).mean(0))
    mean = probs.mean(0)
    close(found.entropy, entropies(mean, axis) + entropies(1 - mean, axis))


NUMBERS: dict[str, Callable[[Tensor], Any]] = {
    "[N]": lambda out: out[:, 0],
    "[N, D]": lambda out: out,
    "dense": lambda out: torch.stack([out, -out, out * 2], 2),
    "with log-variances": lambda out: (out, out.tanh()),
    "with log-variances, [N]": lambda out: (out[:, 0], out[:, 1]),
    "named": lambda out: {"log_variance": out.tanh(), "mean": out},
}


@pytest.mark.parametrize("task", ["regression", "embedding"])
@pytest.mark.parametrize("form", NUMBERS)
def test_numbers_have_the_mean_and_variance_of_slow_draws(form: str, task: Any) -> None:
    model = network(NUMBERS[form])
    posterior = fitted(model)
    places: Any = ("mean", "log_variance") if task == "regression" else "mean"
    predictive = Predictive(model, posterior, 9, task=task, keep_draws=True, logits=places if form == "named" else None)
    made = outputs(model, posterior)
    made = [(out["mean"], out["log_variance"]) if form == "named" else out for out in made]
    pairs = isinstance(made[0], tuple)
    every = torch.stack([out[0] if pairs else out for out in made]).double()
    found = predictive(X, generator=seeded())
    assert type(found) is Estimate
    close(found.mean, every.mean(0))
    close(found.variance, every.var(0))
    close(found.std, every.std(0))
    close(found.draws, every)
    noise = torch.zeros_like(every)
    if pairs and task == "regression":
        noise = torch.stack([out[1] for out in made]).double().exp()
    close(found.noise_variance, noise.mean(0))
    if noise.any():
        close(found.total_std, (every.var(0) + noise.mean(0)).sqrt())
    else:
        assert found.total_std is None


@pytest.mark.parametrize("task", ["regression", "embedding"])
def test_numbers_that_stop_early_have_the_variance_of_the_draws_they_got(task: Any) -> None:
    model, x = network(), torch.linspace(0.1, 4, 40)[:, None] * normal(40, 4, seed=6)
    posterior = fitted(model)
    every = torch.stack(outputs(model, posterior, x, 50)).double()
    tolerance = float((every.var(0).sum(1) / 32).sqrt().median())  # half of the examples are done after some 12
    found = Predictive(model, posterior, 50, task=task, tolerance=tolerance)(x, generator=seeded())
    counts = set()
    for i in range(len(x)):
        fits = [
            count
            for count in range(4, 51, 2)
            if torch.allclose(found.mean[i].double(), every[:count, i].mean(0), atol=1e-4)
            and torch.allclose(found.variance[i].double(), every[:count, i].var(0), rtol=1e-3, atol=1e-5)
        ]
        assert fits
        counts.add(fits[0])
    assert len(counts) > 1


def test_early_classification_has_the_means_of_the_draws_each_object_got() -> None:
    model, x = network(), normal(40, 4, seed=6)
    posterior = fitted(model)
    found = Predictive(model, posterior, 50, tolerance=0.05)(x, generator=seeded())
    every = torch.stack(outputs(model, posterior, x, 50)).double().softmax(2)
    for i in range(len(x)):
        assert any(
            torch.allclose(found.probs[i].double(), every[:count, i].mean(0), atol=1e-5)
            and torch.allclose(found.expected_entropy[i].double(), entropies(every[:count, i], 1).mean(), atol=1e-5)
            for count in range(4, 51, 2)
        )


# Refusals and warnings

REFUSED: dict[str, tuple[Callable[[Tensor], Any], dict[str, Any], type[Exception], str]] = {
    "probabilities": (lambda out: out.softmax(1), {}, ValueError, "are probabilities"),
    "no probabilities": (lambda out: out, {"output": "probs"}, ValueError, "do not sum to 1"),
    "another axis": (lambda out: out, {"class_axis": 2}, ValueError, "on axis 2"),
    "the objects' axis": (lambda out: out, {"class_axis": 0}, ValueError, "on axis 0"),
    "the objects' axis from the end": (lambda out: out, {"class_axis": -2}, ValueError, "on axis -2"),
    "one class": (lambda out: out[:, :1], {}, ValueError, "K >= 2"),
    "whole numbers": (lambda out: out.argmax(1, keepdim=True), {}, TypeError, "floating-point"),
    "nothing there": (lambda out: {"a": out}, {}, ValueError, "has nothing at 'logits'"),
    "many logits": (lambda out: out, {"task": "binary"}, ValueError, "expected one logit"),
    "no sigmoids": (lambda out: out[:, :1] * 9, {"task": "binary", "output": "probs"}, ValueError, "from 0 to 1"),
    "no labels": (lambda out: out * 9, {"task": "multilabel", "output": "probs"}, ValueError, "from 0 to 1"),
    "other log-variances": (
        lambda out: {"m": out, "v": out[:, :1]}, {"task": "regression", "logits": ("m", "v")}, ValueError, "one shape"
    ),
    "no numbers": (lambda out: out > 0, {"task": "embedding"}, TypeError, "floating-point"),
    "infinite": (lambda out: out / 0, {}, ValueError, "not finite"),
}  # fmt: skip


@pytest.mark.parametrize("draws", [1, 9])
@pytest.mark.parametrize("what", REFUSED)
def test_outputs_that_a_task_cannot_read_are_refused(what: str, draws: int) -> None:
    wrap, arguments, error, message = REFUSED[what]
    model = network(wrap)
    with pytest.raises(error, match=message):
        Predictive(model, fitted(model), draws, **arguments)(X)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("guess",), ValueError, "unknown task"),
        ((3,), ValueError, "unknown task"),
        (("classification", None, "1"), TypeError, "whole number"),
        (("classification", None, True), TypeError, "whole number"),
        (("classification", None, None, "odds"), ValueError, "output must be"),
        (("regression", None, 1), ValueError, "no classes"),
        (("embedding", None, None, "probs"), ValueError, "no classes"),
        (("embedding", ("a", "b")), ValueError, "regression"),
        (("regression", ("a", "b", "c")), ValueError, "two places"),
    ],
)
def test_tasks_that_cannot_be_are_refused(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_task(*arguments)


WARNED: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, Any], str]] = {
    "sigmoids": (lambda out: out.sigmoid(), {}, "get a softmax"),
    "binary sigmoids": (lambda out: out[:, :1].sigmoid(), {"task": "binary"}, "get a sigmoid"),
    "sigmoids of labels": (lambda out: out.sigmoid(), {"task": "multilabel"}, "get a sigmoid"),
    "sequences": (lambda out: torch.stack([out, out], 1), {}, "axis 1 is taken"),
}
X_LARGE = normal(24, 4, seed=2)


@pytest.mark.parametrize("draws", [1, 9])
@pytest.mark.parametrize("what", WARNED)
def test_outputs_that_look_like_others_warn_the_caller_once(what: str, draws: int) -> None:
    wrap, arguments, message = WARNED[what]
    model = network(wrap)
    posterior = fitted(model)
    with pytest.warns(UserWarning, match=message) as caught:
        Predictive(model, posterior, draws, **arguments)(X_LARGE)
    assert [w.filename for w in caught] == [__file__]


@pytest.mark.parametrize("name", ["classification", "binary", "multilabel"])
def test_what_is_said_to_be_logits_does_not_warn(name: Any) -> None:
    model = network(lambda out: (out[:, :1] if name == "binary" else out).sigmoid())
    posterior = fitted(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Predictive(model, posterior, 9, task=name, output="logits")(X_LARGE)


# Ensembles


def mixture(members: Sequence[Predictive], x: Tensor) -> list[Tensor]:
    """All draws of all members."""
    found = []
    for member in members:
        assert member.posterior is not None
        found.append(torch.stack(outputs(member.model, member.posterior, x)).double())
    return found


class Seeded:
    """A member whose draws are always the same."""

    def __init__(self, member: Predictive) -> None:
        self.member = member

    def __call__(self, x: Any, *, generator: torch.Generator | None = None, keep_draws: bool | None = None) -> Any:
        return self.member(x, generator=seeded(), keep_draws=keep_draws)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("task", [task for task in TASKS if task != "detection"])
def test_an_ensemble_is_the_mixture_of_all_draws(task: Any, keep: bool) -> None:
    members = []
    for seed in range(3):
        model = settled(mlp(classes=1 if task == "binary" else 3), 4, seed=seed)
        members.append(Predictive(model, fitted(model), 9, task=task, tolerance=0, keep_draws=keep))
    found = Ensemble([Seeded(member) for member in members])(X)
    every = torch.cat(mixture(members, X))
    if task in ("regression", "embedding"):
        close(found.mean, every.mean(0))
        within = torch.stack([draws.var(0) for draws in torch.split(every, 9)]).mean(0)
        between = torch.stack([draws.mean(0) for draws in torch.split(every, 9)]).var(0, correction=0)
        close(found.variance, within + between)
        close(found.noise_variance, torch.zeros_like(every[0]))
        kept = every
    elif task == "survival":
        kept = (1 - every.sigmoid()).cumprod(2)
        close(found.survival, kept.mean(0))
    elif task == "multilabel":
        probs = every.sigmoid()
        close(found.probs, probs.mean(0))
        close(found.expected_entropy, (entropies(probs, 2) + entropies(1 - probs, 2)).mean(0))
        kept = probs.log()
    else:
        probs = every.softmax(2) if task == "classification" else torch.cat([(-every).sigmoid(), every.sigmoid()], 2)
        close(found.probs, probs.mean(0))
        close(found.expected_entropy, entropies(probs, 2).mean(0))
        kept = probs.log()
    if keep:
        close(found.draws_kept, kept)
    else:
        assert found.draws_kept is None


def test_members_of_other_tasks_or_classes_are_refused() -> None:
    model = network()
    first, second = Predictive(model), Predictive(model, task="regression")
    with pytest.raises(ValueError, match="another task"):
        Ensemble([first, second])(X)
    with pytest.raises(ValueError, match="must predict the same classes"):
        Ensemble([first, Predictive(network(outputs=4))])(X)


@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_saturated_sigmoids_are_probabilities(task: Any) -> None:
    raw = make_task(task, output="probs").raw(torch.tensor([[1.0], [0.0], [0.5]]))
    probs = raw.softmax(1)[:, 1:] if task == "binary" else raw.sigmoid()
    torch.testing.assert_close(probs, torch.tensor([[1.0], [0.0], [0.5]]), atol=1e-6, rtol=0)
    assert make_task(task, output="probs").raw(torch.tensor([[1.5]])).isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_probabilities_in_half_precision_are_refused_too(dtype: torch.dtype) -> None:
    probs = normal(40, 50).softmax(1).to(dtype)
    assert (probs.float().sum(1) - 1).abs().max() > 1e-4
    task = make_task("classification")
    with pytest.raises(ValueError, match="are probabilities"):
        task.check(task.raw(probs))


@pytest.mark.parametrize(
    ("shape", "likely"),
    [((2, 64, 96, 21), True), ((2, 64, 64, 21), True), ((2, 21, 64, 96), False), ((2, 21, 64, 64), False)],
)
def test_classes_that_may_be_on_the_last_axis_are_warned_of(shape: tuple[int, ...], likely: bool) -> None:
    task = make_task("classification")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        task.check(task.raw(normal(*shape)))
    assert any("class_axis=-1 if the classes are on the last axis" in str(one.message) for one in caught) == likely
