from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from conftest import CASES, Case, normal, settled
from stochbn.network.fingerprint import SAMPLED, WHOLE, Fingerprint, Part
from stochbn.sources.architectures import build

SAME: dict[str, Callable[[Any], Any]] = {
    "a copy": lambda m: m,
    "in evaluation mode": lambda m: m.eval(),
    "half": lambda m: m.half(),
    "half and back": lambda m: m.half().float(),
    "bfloat16": lambda m: m.bfloat16(),
    "bfloat16 and back": lambda m: m.bfloat16().float(),
    "half, then bfloat16": lambda m: m.half().bfloat16(),
    "double": lambda m: m.double(),
    "half in part": lambda m: (m[0].half(), m)[1],
    "bfloat16 in part and back": lambda m: (m[0].bfloat16().float(), m)[1],
    "channels last": lambda m: m.to(memory_format=torch.channels_last),
    "frozen": lambda m: m.requires_grad_(False),
    "DataParallel": nn.DataParallel,
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "averaged": AveragedModel,
}


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return settled(build("resnet18", channels=1, size=16, width=0.25), 1, 16, 16)


@pytest.mark.parametrize("change", SAME)
def test_a_network_is_the_same_however_it_is_stored(change: str, network: nn.Module) -> None:
    changed = SAME[change](copy.deepcopy(network))
    for one, other in ((network, changed), (changed, network)):
        assert Fingerprint.of(one).difference(Fingerprint.of(other)) is None


def test_running_statistics_do_not_count(network: nn.Module) -> None:
    other = copy.deepcopy(network)
    other.train()(normal(8, 1, 16, 16))
    assert Fingerprint.of(other) == Fingerprint.of(network)


def test_every_network_is_itself_and_no_other(case: Case) -> None:
    found = Fingerprint.of(case.model())
    assert found.difference(Fingerprint.of(case.model())) is None
    assert found.difference(Fingerprint.of(case.model(seed=1)))


def test_what_differs_is_told() -> None:
    model = CASES["BatchNorm2d"].model()
    before = Fingerprint.of(model)
    for name, told in (
        ("4.weight", "those of the batch norms alone"),
        ("0.bias", "those of the batch norms and those of other layers"),
    ):
        model.get_parameter(name).data[0] *= 1.01
        assert before.difference(Fingerprint.of(model)) == told
    model.get_parameter("4.weight").data[0] /= 1.01
    assert "other than the batch norms" in str(before.difference(Fingerprint.of(model)))


def test_one_small_step_of_training_is_noticed(network: nn.Module) -> None:
    other = copy.deepcopy(network).train()
    optimizer = torch.optim.SGD(other.parameters(), lr=1e-3)
    other(normal(8, 1, 16, 16)).logsumexp(1).sum().backward()
    optimizer.step()
    told = Fingerprint.of(network).difference(Fingerprint.of(other))
    assert told == "those of the batch norms and those of other layers"


@given(entries=st.integers(1, 3 * WHOLE), at=st.floats(0, 0.999), seed=st.integers(0, 1000))
def test_any_entry_of_a_small_parameter_and_the_order_of_entries_count(entries: int, at: float, seed: int) -> None:
    parameter = normal(entries, seed=seed)
    part, place = Part.of([parameter]), int(at * entries)
    assert [sums.entries for sums in part.parameters] == [entries]
    changed = parameter.clone()
    changed[place] += 1
    step = 1 if entries <= WHOLE else math.ceil(entries / SAMPLED)
    assert Part.of([changed]).same(part) == (place % step > 0)
    if entries > 1:
        assert not Part.of([parameter.flip(0)]).same(part)
        assert not Part.of([parameter[1:]]).same(part)


def slow_sums(parameter: Tensor) -> list[float]:
    """The sums of a parameter that is looked at whole, entry by entry."""
    values = parameter.flatten().tolist()
    sums = []
    for types in ((), (torch.float32,), (torch.float16,), (torch.bfloat16,), (torch.float16, torch.bfloat16)):
        total = 0.0
        for i, value in enumerate(values):
            rounded = torch.tensor(value, dtype=torch.float64).float() if types else torch.tensor(value)
            for dtype in types:
                rounded = rounded.to(dtype)
            total += (1 + i * ((5**0.5 - 1) / 2) % 1) * (value if not types else rounded.item())
        sums.append(total)
    return sums


def test_the_sums_are_those_of_a_slow_loop() -> None:
    parameters = [normal(7, seed=1), normal(3, 4, seed=2, dtype=torch.float64)]
    for sums, parameter in zip(Part.of(parameters).parameters, parameters, strict=True):
        assert sums.rounded == pytest.approx(slow_sums(parameter), rel=1e-12)
        assert sums.size == pytest.approx(slow_sums(parameter.abs())[0], rel=1e-12)


def test_numbers_out_of_the_range_of_half_precision_are_compared_too() -> None:
    parameter = torch.tensor([1e9, -1e30, 1e-30, math.inf, 1.0])
    part = Part.of([parameter])
    assert all(map(math.isfinite, part.parameters[0].rounded))
    assert part.same(Part.of([parameter.clone()]))
    assert part.same(Part.of([parameter.bfloat16()]))


def test_parameters_that_are_no_real_numbers_and_empty_ones_are_left_out() -> None:
    whole = torch.arange(5)
    assert Part.of([whole, torch.empty(0), torch.empty(3, device="meta")]) == Part.of([])
    assert Part.of([]).same(Part.of([]))


def test_it_survives_a_file(network: nn.Module) -> None:
    found = Fingerprint.of(network)
    assert Fingerprint.from_description(json.loads(json.dumps(found.description()))) == found


@pytest.mark.parametrize(
    "description",
    [None, [], {"norms": []}, {"norms": [[1] * 7], "others": [[1] * 6]}, {"norms": [1] * 7, "others": []}],
)
def test_what_describes_none_is_refused(description: Any) -> None:
    with pytest.raises(ValueError, match="fingerprint must have"):
        Fingerprint.from_description(description)
