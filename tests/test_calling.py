from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import ByName, mlp, normal
from stochbn.network.calling import NetworkInput, network_input, read_output
from stochbn.tasks import Classification

X = normal(5, 4)
LABELS = torch.zeros(5, dtype=torch.long)


@pytest.mark.parametrize("batch", [X, (X, LABELS), [X, LABELS], (X,), (X, "id", None), [X]])
def test_the_input_is_the_tensor_or_the_first_entry(batch: Any) -> None:
    found = network_input(mlp(), batch)
    assert not found.kwargs
    assert torch.equal(found.args[0], X)


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_a_mapping_keeps_the_arguments_of_the_network_and_drops_the_rest(kind: Any) -> None:
    found = network_input(ByName(), kind({"labels": LABELS, "features": X, "idx": 3, "scale": None})).kwargs
    assert set(found) == {"features", "scale"}
    assert torch.equal(found["features"], X)
    assert found["scale"] is None


def test_a_mapping_may_be_the_first_entry_of_a_tuple() -> None:
    found = network_input(ByName(), ({"features": X, "other": 1}, LABELS)).kwargs
    assert list(found) == ["features"]


def test_a_network_that_takes_any_keyword_gets_the_whole_mapping() -> None:
    class TakesAny(nn.Module):
        def forward(self, features: Tensor, **rest: Tensor) -> Tensor:
            return features

    found = network_input(TakesAny(), {"features": X, "labels": LABELS}).kwargs
    assert list(found) == ["features", "labels"]


def test_a_network_without_parameters_takes_its_input_where_it_is() -> None:
    assert network_input(nn.BatchNorm1d(4, affine=False), X).args[0] is X


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
    pieces = [piece.args[0] for piece in NetworkInput((x,)).split(size)]
    assert len(pieces) == total // size
    for number, piece in enumerate(pieces):
        assert piece.tolist() == [[2 * i, 2 * i + 1] for i in range(number * size, (number + 1) * size)]
    named = [piece.kwargs for piece in NetworkInput((), {"a": x, "b": x[:, 0], "flag": True}).split(size)]
    assert len(named) == len(pieces)
    for whole, piece in zip(named, pieces, strict=True):
        assert torch.equal(whole["a"], piece)
        assert torch.equal(whole["b"], piece[:, 0])
        assert whole["flag"] is True


def test_the_length_is_that_of_the_first_axis() -> None:
    assert len(NetworkInput((X,))) == 5
    assert len(NetworkInput((), {"features": X, "scale": X[:, :1], "flag": 2})) == 5
    assert len(NetworkInput((torch.tensor(2.0), X))) == 5


@pytest.mark.parametrize("inputs", [torch.tensor(1.0), {"a": X, "b": X[:3]}, {"b": torch.tensor(0.0)}])
def test_inputs_without_a_common_batch_axis_are_refused(inputs: Any) -> None:
    with pytest.raises(ValueError, match=r"share a first \(batch\) axis"):
        len(NetworkInput((), inputs) if isinstance(inputs, dict) else NetworkInput((inputs,)))


def test_a_call_with_named_inputs_passes_them_by_name() -> None:
    model = ByName().eval()
    found = NetworkInput((), {"scale": X * 0 + 2, "features": X}).call(model)
    assert torch.equal(found["logits"], model.body(2 * X))


def test_a_network_that_writes_to_its_input_leaves_that_of_the_caller() -> None:
    class Writing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2)

    x = X.clone()
    assert torch.equal(NetworkInput((x,)).call(Writing()), 2 * X)
    assert torch.equal(x, X)


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
        network_input(model, inputs).call(model)
    assert type(caught.value) is error
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("device is full"), KeyError("k"), NotImplementedError("n")])
def test_other_errors_of_the_network_pass_unchanged(error: Exception) -> None:
    class Raising(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise error

    with pytest.raises(type(error)) as caught:
        NetworkInput((X,)).call(Raising())
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
    assert read_output(output, place) is L


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
        (normal(5, 1), None, ValueError, r"K >= 2.*\[5, 1\].*one logit"),
        (normal(5), None, ValueError, r"K >= 2.*\[5\]"),
        (normal(5, 1, 4, 4), None, ValueError, r"\[5, 1, 4, 4\]"),
    ],
)
def test_an_output_without_logits_is_refused(
    output: Any, place: str | int | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Classification(place).raw(output)


# What the network takes of a batch


@pytest.mark.parametrize("batch", [(X, 2 * X, LABELS), [X, 2 * X]])
def test_leading_entries_can_be_positional_arguments(batch: Any) -> None:
    found = network_input(mlp(), batch, 2)
    assert [tensor.tolist() for tensor in found.args] == [X.tolist(), (2 * X).tolist()]
    assert len(found) == 5


@pytest.mark.parametrize(
    ("function", "args", "kwargs"),
    [
        (lambda b: b["x"], 1, []),
        (lambda b: (b["x"], b["y"]), 2, []),
        (lambda b: {"x": b["x"], "n": 3}, 0, ["x", "n"]),
    ],
)
def test_a_function_can_say_what_the_network_takes(function: Any, args: int, kwargs: list[str]) -> None:
    found = network_input(mlp(), {"x": X, "y": X, "label": LABELS}, function)
    assert (len(found.args), list(found.kwargs)) == (args, kwargs)


@pytest.mark.parametrize(
    ("inputs", "batch", "error", "message"),
    [
        (0, (X,), ValueError, "at least 1"),
        (3, (X, X), ValueError, "at least 3 entries.*2 entries"),
        (1, X, ValueError, "at least 1 entries.*a Tensor"),
        (True, (X,), TypeError, "number of leading entries or a function"),
        ("x", (X,), TypeError, "number of leading entries or a function"),
        (lambda b: None, (X,), TypeError, "got NoneType"),
        (lambda b: ("a",), (X,), TypeError, "without any tensor"),
    ],
)
def test_what_says_nothing_of_the_input_is_refused(
    inputs: Any, batch: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        network_input(mlp(), batch, inputs)


def test_inputs_are_of_one_kind_if_they_differ_in_their_objects_only() -> None:
    kind = NetworkInput((X,), {"flag": True, "scale": 1.5}).kind()
    assert NetworkInput((X[:2] + 1,), {"flag": True, "scale": 1.5}).kind() == kind
    for other in (
        NetworkInput((X,), {"flag": False, "scale": 1.5}),
        NetworkInput((X,), {"flag": True, "scale": 2.0}),
        NetworkInput((X.double(),), {"flag": True, "scale": 1.5}),
        NetworkInput((X[:, :3],), {"flag": True, "scale": 1.5}),
        NetworkInput((X,), {"flag": 1, "scale": 1.5}),
        NetworkInput((), {"x": X, "flag": True, "scale": 1.5}),
        NetworkInput((X,), {"flag": object(), "scale": 1.5}),
    ):
        assert other.kind() != kind


def test_objects_can_be_taken_apart_where_all_tensors_are_arguments_with_one_first_axis() -> None:
    assert NetworkInput((X,), {"y": LABELS, "flag": 1}).divisible
    assert not NetworkInput((X,), {"y": LABELS[:2]}).divisible
    assert not NetworkInput((X, torch.tensor(1.0))).divisible
    assert not NetworkInput((X, [LABELS])).divisible
    assert not NetworkInput((3,)).divisible


def test_objects_are_joined_argument_by_argument() -> None:
    joined = NetworkInput((X,), {"y": LABELS, "flag": 1}).join(NetworkInput((X[:2],), {"y": LABELS[:2], "flag": 2}))
    assert len(joined) == 7
    assert joined.kwargs["flag"] == 2
    with pytest.raises(ValueError, match="same arguments"):
        NetworkInput((X,)).join(NetworkInput((), {"x": X}))
    with pytest.raises(ValueError, match="do not fit into a mini-batch"):
        NetworkInput((X,)).join(NetworkInput((X[:, :2],)))
