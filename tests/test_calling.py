from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import ByName, Twice, Untouched, mixed_up, mlp, normal
from stochbn.network.calling import call, find_logits, length, modes, network_input, split

X = normal(5, 4)
LABELS = torch.zeros(5, dtype=torch.long)


@pytest.mark.parametrize("batch", [X, (X, LABELS), [X, LABELS], (X,), (X, "id", None), [X]])
def test_the_input_is_the_tensor_or_the_first_entry(batch: Any) -> None:
    found = network_input(mlp(), batch)
    assert isinstance(found, Tensor)
    assert torch.equal(found, X)


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_a_mapping_keeps_the_arguments_of_the_network_and_drops_the_rest(kind: Any) -> None:
    found = network_input(ByName(), kind({"labels": LABELS, "features": X, "idx": 3, "scale": None}))
    assert isinstance(found, dict)
    assert set(found) == {"features", "scale"}
    assert torch.equal(found["features"], X)
    assert found["scale"] is None


def test_a_mapping_may_be_the_first_entry_of_a_tuple() -> None:
    found = network_input(ByName(), ({"features": X, "other": 1}, LABELS))
    assert isinstance(found, dict)
    assert list(found) == ["features"]


def test_a_network_that_takes_any_keyword_gets_the_whole_mapping() -> None:
    class TakesAny(nn.Module):
        def forward(self, features: Tensor, **rest: Tensor) -> Tensor:
            return features

    found = network_input(TakesAny(), {"features": X, "labels": LABELS})
    assert isinstance(found, dict)
    assert list(found) == ["features", "labels"]


def test_a_network_without_parameters_takes_its_input_where_it_is() -> None:
    assert network_input(nn.BatchNorm1d(4, affine=False), X) is X


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ((), ValueError, "empty tuple"),
        ([], ValueError, "empty tuple"),
        ("path.png", TypeError, "batch of type str"),
        (None, TypeError, "batch of type NoneType"),
        (X.numpy(), TypeError, "batch of type ndarray"),
        ({"image": X}, TypeError, r"entries \['image'\].*ByName.*'features', 'scale'"),
        ({"features": X.numpy(), "labels": LABELS}, TypeError, "none of which is a tensor argument"),
        ({}, TypeError, "none of which is a tensor argument"),
    ],
)
def test_a_batch_of_another_type_is_refused(batch: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        network_input(ByName(), batch)


@given(total=st.integers(0, 40), size=st.integers(1, 12))
def test_splitting_keeps_the_order_and_drops_the_remainder(total: int, size: int) -> None:
    x = torch.arange(2 * total).reshape(total, 2)
    pieces = list(split(x, size))
    assert len(pieces) == total // size
    for number, piece in enumerate(pieces):
        assert isinstance(piece, Tensor)
        assert piece.tolist() == [[2 * i, 2 * i + 1] for i in range(number * size, (number + 1) * size)]
    named = list(split({"a": x, "b": x[:, 0], "flag": True}, size))
    assert len(named) == len(pieces)
    for whole, piece in zip(named, pieces, strict=True):
        assert isinstance(whole, dict)
        assert isinstance(piece, Tensor)
        assert torch.equal(whole["a"], piece)
        assert torch.equal(whole["b"], piece[:, 0])
        assert whole["flag"] is True


def test_the_length_is_that_of_the_first_axis() -> None:
    assert length(X) == 5
    assert length({"features": X, "scale": X[:, :1], "flag": 2}) == 5


@pytest.mark.parametrize("inputs", [torch.tensor(1.0), {"a": X, "b": X[:3]}, {"a": X, "b": torch.tensor(0.0)}])
def test_inputs_without_a_common_batch_axis_are_refused(inputs: Any) -> None:
    with pytest.raises(ValueError, match=r"share a first \(batch\) axis"):
        length(inputs)


def test_modes_are_set_one_by_one_and_come_back_after_an_exception() -> None:
    class Stubborn(nn.Linear):
        def train(self, mode: bool = True) -> Any:
            raise AssertionError("train() must not be called")

    model = nn.Sequential(Stubborn(2, 2), nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2), nn.ReLU()))
    mixed_up(model)
    before = Untouched(model)
    assert len(set(before.flags)) == 2
    with modes(model, lambda module: isinstance(module, nn.Dropout)):
        assert [m.training for m in model.modules()] == [isinstance(m, nn.Dropout) for m in model.modules()]
    before.check()

    def fail() -> None:
        with modes(model, lambda module: True):
            assert all(m.training for m in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    before.check()


def test_a_call_uses_the_given_buffers_for_this_once() -> None:
    layer = nn.BatchNorm1d(4, eps=0.0).eval()
    before = Untouched(layer)
    mean, var = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([4.0, 1.0, 9.0, 0.25])
    found = call(layer, {"running_mean": mean, "running_var": var}, X)
    torch.testing.assert_close(found, (X - mean) / var.sqrt())
    before.check()
    torch.testing.assert_close(layer(X), X)


def test_a_call_leaves_a_layer_that_is_registered_under_two_names_as_it_was() -> None:
    model = Twice().eval()
    before = Untouched(model)
    buffers = {name: buffer + 1 for name, buffer in model.named_buffers()}
    found = call(model, buffers, X)
    before.check()
    model.load_state_dict(
        {**model.state_dict(), **{n.replace("norm", "alias"): b for n, b in buffers.items()}, **buffers}
    )
    torch.testing.assert_close(found, model(X))


def test_a_call_with_named_inputs_passes_them_by_name() -> None:
    model = ByName().eval()
    found = call(model, {}, {"scale": X * 0 + 2, "features": X})
    assert torch.equal(found["logits"], model.body(2 * X))


@pytest.mark.parametrize(
    ("model", "inputs", "error", "message"),
    [
        (mlp(), normal(2, 7), RuntimeError, r"Sequential failed on an input of shape \[2, 7\]"),
        (nn.BatchNorm2d(4), normal(2, 4), ValueError, r"BatchNorm2d failed on an input of shape \[2, 4\].*4D"),
        (ByName(), {"features": normal(2, 7)}, RuntimeError, r"ByName failed.*\{'features': \[2, 7\]\}"),
    ],
)
def test_a_wrong_input_shape_is_named(model: nn.Module, inputs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        call(model, {}, inputs)
    assert type(caught.value) is error
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("device is full"), KeyError("k"), NotImplementedError("n")])
def test_other_errors_of_the_network_pass_unchanged(error: Exception) -> None:
    class Raising(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise error

    with pytest.raises(type(error)) as caught:
        call(Raising(), {}, X)
    assert caught.value is error


Pair = namedtuple("Pair", ["features", "scores"])
Named = namedtuple("Named", ["features", "logits"])


@dataclass
class Output:
    loss: Tensor | None
    logits: Tensor


L = normal(5, 3, seed=1)
OTHER = normal(5, 3, seed=2)


@pytest.mark.parametrize(
    ("output", "place"),
    [
        (L, None),
        ((L, OTHER), None),
        ([L], None),
        ({"logits": L, "out": OTHER}, None),
        ({"aux": OTHER, "out": L}, None),
        (UserDict({"logits": L}), None),
        (Output(None, L), None),
        (Named(OTHER, L), None),
        (Pair(L, OTHER), None),
        ({"logits": OTHER, "main": L}, "main"),
        (Output(L, OTHER), "loss"),
        (Pair(OTHER, L), "scores"),
        (Pair(OTHER, L), 1),
        ((OTHER, L), 1),
        ((OTHER, OTHER, L), -1),
        ((L, OTHER), 0),
    ],
)
def test_logits_are_found_in_every_form_of_output(output: Any, place: str | int | None) -> None:
    assert find_logits(output, place) is L


@pytest.mark.parametrize(
    ("output", "place", "error", "message"),
    [
        ({"scores": L}, None, ValueError, r"dict with the entries \['scores'\] and has nothing at 'logits'"),
        ({"logits": L}, "scores", ValueError, "has nothing at 'scores'"),
        ({"logits": L}, 0, ValueError, "has nothing at 0"),
        ((L, OTHER), 2, ValueError, "has nothing at 2"),
        ((L, OTHER), -3, ValueError, "has nothing at -3"),
        ((), None, ValueError, "has nothing at 'logits'"),
        (None, None, ValueError, "NoneType"),
        (L, "logits", ValueError, "Tensor"),
        (L, "shape", ValueError, "has nothing at 'shape'"),
        (L, 0, ValueError, "has nothing at 0"),
        (LABELS, None, TypeError, "floating-point.*int64"),
        ({"logits": "cat"}, None, TypeError, "floating-point.*str"),
        (((L,), OTHER), None, TypeError, "floating-point.*tuple"),
        (normal(5, 1), None, ValueError, r"K >= 2.*\[5, 1\].*one-logit"),
        (normal(5), None, ValueError, r"K >= 2.*\[5\]"),
        (normal(5, 1, 4, 4), None, ValueError, r"\[5, 1, 4, 4\]"),
    ],
)
def test_an_output_without_logits_is_refused(
    output: Any, place: str | int | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        find_logits(output, place)
