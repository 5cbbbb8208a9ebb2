"""Networks, slow reference implementations and checks that the tests share."""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import stochbn

pytest.register_assert_rewrite("posterior_contract")
torch.set_num_threads(1)
os.environ.pop("COLUMNS", None)  # which a console keeps from its import on: tests set it themselves
settings.register_profile("stochbn", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("stochbn")


def command_output(*args: object) -> str:
    """What a command prints that succeeds, on one line."""
    from typer.testing import CliRunner

    from stochbn import cli

    result = CliRunner().invoke(cli.app, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Any, str, str]]:
    """Runs the program as its script does: the code that it ends with, what it prints, and its errors."""
    import stochbn.__main__

    def call(*args: object) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["stochbn", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            stochbn.__main__.main()
        return caught.value.code, *capsys.readouterr()

    return call


def script(path: Path) -> types.ModuleType:
    """The module of a script outside of the library, such as a benchmark."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # its dataclasses look there for their own module
    spec.loader.exec_module(module)
    return module


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


class FusedActivation(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: the output is no longer normalised."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu() * 3 + 1


class OwnForward(nn.BatchNorm2d):
    """Calls the functional form itself, and forgets num_batches_tracked."""

    def forward(self, x: Tensor) -> Tensor:
        momentum = 0.0 if self.momentum is None else self.momentum
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, momentum, self.eps
        )


class ChannelsLast(nn.BatchNorm2d):
    """Takes [N, H, W, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Frozen(nn.BatchNorm2d):
    """Always normalises by its running averages."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class Permute(nn.Module):
    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.axes)


class Twice(nn.Module):
    """Calls one layer twice in a forward pass, and has it registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.alias = self.norm
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.alias(torch.tanh(self.first(self.norm(x))) * 2 + 1))
        return out


class Unused(nn.Module):
    """Has a batch norm that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.BatchNorm1d(5)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(x))
        return out


class ByName(nn.Module):
    """Takes named arguments, as networks of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, features: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        return {"hidden": features, "logits": self.body(features if scale is None else features * scale)}


class Remembering(nn.Module):
    """Has buffers of its own that change in training mode, in place and by assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5))
        self.old_style = nn.utils.spectral_norm(nn.Linear(5, 5))
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("last", torch.zeros(5))

    calls: Tensor
    last: Tensor

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.old_style(self.project(x)))
        if self.training:
            self.calls += 1
            self.last = hidden.mean(0)
        out: Tensor = self.head(hidden)
        return out


class Wrapped(nn.Module):
    """A network whose output is put into another form."""

    def __init__(self, network: nn.Module, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.network = network
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.network(x))


class Counter:
    """Counts for a network and all copies of it together."""

    def __init__(self) -> None:
        self.value = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Counter:
        return self


class Failing(nn.Module):
    """Raises after a number of forward passes of it and all its copies, when its first layers ran."""

    def __init__(self, network: nn.Module, after: int) -> None:
        super().__init__()
        self.network = network
        self.passes = Counter()
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x)
        self.passes.value += 1
        if self.passes.value > self.after:
            raise KeyError("the network's own error")
        return out


def mlp(inputs: int = 4, hidden: int = 6, classes: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden + 1),
        nn.BatchNorm1d(hidden + 1),
        nn.ReLU(),
        nn.Linear(hidden + 1, classes),
    )


def convnet(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 5, 3),
        norm(5),
        nn.ReLU(),
        nn.Conv2d(5, 4, 2),
        norm(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def sequence_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 3, 2), nn.BatchNorm1d(3), nn.Flatten(),
        nn.Linear(9, 3),
    )  # fmt: skip


def volume_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(1, 3, 2), nn.BatchNorm3d(3), nn.ReLU(), nn.Conv3d(3, 2, 2), nn.BatchNorm3d(2), nn.Flatten(),
        nn.Linear(16, 3),
    )  # fmt: skip


def dropout_net(rate: float = 0.5) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(rate), nn.Linear(8, 3))


def dense_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1))


def channels_last_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 5, 3), Permute(0, 2, 3, 1), ChannelsLast(5), Permute(0, 3, 1, 2), nn.ReLU(), nn.Conv2d(5, 4, 2),
        nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def settled(model: nn.Module, *shape: int, seed: int = 0) -> nn.Module:
    """The network in evaluation mode with random weights and running averages from batches like ``normal(n, *shape)``.

    The batches differ from those that the tests then use, and the affine weights are not 1 and 0.
    """
    source = seeded(seed + 1000)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=source, dtype=torch.float64).to(parameter)
            if name.endswith("bias") or parameter.ndim > 1:
                parameter.copy_(noise * 0.7)
            else:
                parameter.copy_(1 + 0.3 * noise)
        dtype = next(model.parameters()).dtype
        model.train()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for step in range(5):
                x = 1.5 * normal(24, *shape, seed=seed + 500 + step, dtype=dtype) + 0.5
                model(x)
    return model.eval()


@dataclass(frozen=True)
class Case:
    """A network, and the shape of one example of its input."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    channel_axis: Mapping[str, int]

    def model(self, seed: int = 0) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return settled(self.build(), *self.shape, seed=seed)

    def inputs(self, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        return normal(n, *self.shape, seed=seed, dtype=dtype)


IMAGE = (2, 6, 5)
CASES: dict[str, Case] = {
    "BatchNorm1d [N, C]": Case(mlp, (4,), {}),
    "BatchNorm1d [N, C, L]": Case(sequence_net, (2, 6), {}),
    "BatchNorm2d": Case(convnet, IMAGE, {}),
    "BatchNorm3d": Case(volume_net, (1, 4, 4, 4), {}),
    "SyncBatchNorm": Case(lambda: convnet(nn.SyncBatchNorm), IMAGE, {}),
    "fused activation": Case(lambda: convnet(FusedActivation), IMAGE, {}),
    "forward of its own": Case(lambda: convnet(OwnForward), IMAGE, {}),
    "channels last": Case(channels_last_net, IMAGE, {"2": -1}),
    "not affine": Case(lambda: convnet(lambda c: nn.BatchNorm2d(c, affine=False)), IMAGE, {}),
    "cumulative average": Case(lambda: convnet(lambda c: nn.BatchNorm2d(c, momentum=None)), IMAGE, {}),
    "called twice, two names": Case(Twice, (4,), {}),
    "never called": Case(Unused, (4,), {}),
    "other changing buffers": Case(Remembering, (4,), {}),
    "dense output": Case(dense_net, IMAGE, {}),
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    """Every kind of network in turn."""
    return CASES[request.param]


def slow_statistics(
    model: nn.Module, batches: Iterable[Tensor], channel_axis: Mapping[str, int] | None = None
) -> dict[str, Tensor]:
    """Float64 ``[n, 2, C]`` for every called layer: mean and biased variance of its input, written out."""
    model = copy.deepcopy(model).train()
    rows: dict[str, list[Tensor]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm):
            axis = (channel_axis or {}).get(name, 1)

            def note(module: nn.Module, args: tuple[Tensor, ...], name: str = name, axis: int = axis) -> None:
                x = args[0].detach().double().movedim(axis, 0).flatten(1)
                rows.setdefault(name, []).append(torch.stack([x.mean(1), x.var(1, unbiased=False)]))

            layer.register_forward_pre_hook(note)
    with torch.no_grad():
        for batch in batches:
            model(batch)
    return {name: torch.stack(found) for name, found in rows.items()}


def fit_factorized(model: nn.Module, batches: Iterable[Any], batch_size: int | None = 16) -> stochbn.Factorized:
    """The paper's posterior."""
    return stochbn.fit(model, batches, batch_size, kind="factorized", centre="observed")


def slow_probs(
    model: nn.Module, posterior: stochbn.Posterior, draws: int, seed: int, x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean probabilities, mean entropy and every draw's probabilities: a copy of the network with its buffers set."""
    model = copy.deepcopy(model).eval()
    buffers = dict(model.named_buffers(remove_duplicate=False))
    drawn = list(posterior.iter_draws(draws, seeded(seed), quasi=True))
    probs = []
    for s in range(draws):
        for name, values in drawn[s].items():
            buffers[name].copy_(values)
        with torch.no_grad():
            probs.append(model(x.clone()).double().softmax(1))
    every = torch.stack(probs)
    return every.mean(0), slow_entropy(every, axis=2).mean(0), every


def slow_entropy(probs: Tensor, axis: int = 1) -> Tensor:
    logs = torch.where(probs > 0, probs, torch.ones_like(probs)).log()
    return -(probs * logs).sum(axis)


def per_layer(posterior: stochbn.Factorized) -> dict[str, dict[str, Tensor]]:
    """The vectors of a posterior, by layer."""
    sizes = list(posterior.layers.values())
    vectors = {
        key: getattr(posterior, key).split(sizes)
        for key in ("mean_mean", "mean_variance", "variance_mean", "variance_variance")
    }
    return {layer: {key: vectors[key][i] for key in vectors} for i, layer in enumerate(posterior.layers)}


def make_posterior(
    layers: Mapping[str, int] | None = None,
    *,
    mean_mean: Iterable[float] = (0.5, -1.0, 2.0),
    mean_variance: Iterable[float] = (0.04, 0.01, 0.25),
    variance_mean: Iterable[float] = (1.0, 0.3, 4.0),
    variance_variance: Iterable[float] = (0.09, 0.0025, 4.0),
    dtype: torch.dtype = torch.float64,
    batch_size: int | None = 16,
    skipped: Mapping[str, str] | None = None,
) -> stochbn.Factorized:
    """A posterior with the given moments."""
    return stochbn.Factorized(
        layers={"norm": 3} if layers is None else layers,
        mean_mean=torch.tensor([*mean_mean], dtype=torch.float64),
        mean_variance=torch.tensor([*mean_variance], dtype=torch.float64),
        variance_mean=torch.tensor([*variance_mean], dtype=torch.float64),
        variance_variance=torch.tensor([*variance_variance], dtype=torch.float64),
        batch_size=batch_size,
        mini_batches=7,
        dtype=dtype,
        skipped=skipped or {},
    )


def spreadless(model: nn.Module) -> stochbn.Factorized:
    """A posterior at the running averages of a network, with no spread."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)}
    means, variances = [], []
    for layer in layers.values():
        assert layer.running_mean is not None
        assert layer.running_var is not None
        means.append(layer.running_mean.double())
        variances.append(layer.running_var.double())
    mean, variance = torch.cat(means), torch.cat(variances)
    return stochbn.Factorized(
        layers={name: layer.num_features for name, layer in layers.items()},
        mean_mean=mean,
        mean_variance=torch.zeros_like(mean),
        variance_mean=variance,
        variance_variance=torch.zeros_like(variance),
        batch_size=None,
        mini_batches=2,
        dtype=next(iter(layers.values())).running_mean.dtype,  # type: ignore[union-attr]
    )


class Untouched:
    """Remembers a network whole; ``check`` fails when anything of it is no longer as it was."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors = {
            name: (tensor, tensor.detach().clone())
            for name, tensor in [
                *model.named_parameters(remove_duplicate=False),
                *model.named_buffers(remove_duplicate=False),
            ]
        }
        self.gradients = {
            name: (p.grad, None if p.grad is None else p.grad.clone(), p.requires_grad)
            for name, p in model.named_parameters()
        }
        self.flags = [m.training for m in model.modules()]
        self.momenta = [getattr(m, "momentum", "none") for m in model.modules()]
        self.hooks = self._hooks()

    def _hooks(self) -> list[tuple[str, list[Any]]]:
        return [
            (key, list(value.items()))
            for module in self.model.modules()
            for key, value in sorted(vars(module).items())
            if "hooks" in key and isinstance(value, dict)
        ]

    def check(self) -> None:
        now = {
            **dict(self.model.named_parameters(remove_duplicate=False)),
            **dict(self.model.named_buffers(remove_duplicate=False)),
        }
        assert list(now) == list(self.tensors)
        for name, (tensor, values) in self.tensors.items():
            assert now[name] is tensor, f"{name} is another object"
            assert torch.equal(tensor, values), f"{name} has other values"
        for name, p in self.model.named_parameters():
            gradient, values_before, required = self.gradients[name]
            assert p.grad is gradient
            assert p.requires_grad == required
            if gradient is not None:
                assert values_before is not None
                assert torch.equal(gradient, values_before)
        assert [m.training for m in self.model.modules()] == self.flags
        assert [getattr(m, "momentum", "none") for m in self.model.modules()] == self.momenta
        assert self._hooks() == self.hooks


def mixed_up(model: nn.Module) -> nn.Module:
    """The network with train flags that alternate, gradients, hooks, and a frozen parameter."""
    for number, module in enumerate(model.modules()):
        module.training = number % 3 == 1
        module.register_forward_hook(lambda *_: None)
        module.register_forward_pre_hook(lambda *_: None)
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 0.25) if number % 2 else None
    next(model.parameters()).requires_grad_(False)
    return model


def count_lines(call: Callable[[], Any], stop: int | None, error: type[BaseException], *others: str) -> int:
    """Run a call, and raise at the line of that number among the package's own and other files'; how many it had."""
    lines = 0

    def trace(frame: types.FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        name = frame.f_code.co_filename
        if "/src/stochbn/" not in name and not name.endswith(others):
            return None
        if event == "line":
            lines += 1
            if lines == stop:
                raise error
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(previous)
    return lines
