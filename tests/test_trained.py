"""Which modules are in evaluation mode when the network is trained."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import Untouched, mlp, settled
from stochbn.network.replica import Network, named_modules


def kept_in_evaluation(model: nn.Module) -> set[nn.Module]:
    """The modules that are in evaluation mode when the network is trained."""
    training = Network.of(model).trained()
    return {module for name, module in named_modules(model).items() if name not in training}


class NormEval(nn.BatchNorm1d):
    """As chemprop and others freeze a layer."""

    def train(self, mode: bool = True) -> NormEval:
        return super().train(False)


class Backbone(nn.Module):
    """As mmdetection's backbones: the network's own train() puts its batch norms into evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = mlp(), nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        for module in self.body.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
        self.body[0].requires_grad_(not mode)
        return self


class Merging(nn.Linear):
    """As LoRA's layers: train() changes weights."""

    def train(self, mode: bool = True) -> Merging:
        if mode != self.training:
            self.weight.data += 1 if mode else -1
        return super().train(mode)


def disabled_train(self: Any, mode: bool = True) -> Any:
    return self


def test_a_layer_whose_train_leaves_it_in_evaluation_mode_is_found() -> None:
    model = nn.Sequential(NormEval(4), nn.BatchNorm1d(4)).eval()
    assert kept_in_evaluation(model) == {model[0]}


@pytest.mark.parametrize("training", [True, False])
def test_layers_that_the_networks_train_leaves_in_evaluation_mode_are_found_and_nothing_changes(training: bool) -> None:
    model = settled(Backbone(), 4)
    nn.Module.train(model, training)
    before = Untouched(model)
    assert kept_in_evaluation(model) == {model.body[1], model.body[4]}  # type: ignore[index]
    before.check()


def test_a_train_that_changes_weights_is_called_on_a_copy() -> None:
    model = nn.Sequential(Merging(3, 4), nn.BatchNorm1d(4)).eval()
    before = Untouched(model)
    assert kept_in_evaluation(model) == set()
    before.check()


@pytest.mark.parametrize("bound", [True, False])
def test_a_part_whose_train_was_replaced_stays_as_it_is(bound: bool) -> None:
    model = nn.Sequential(mlp(), nn.BatchNorm1d(3)).eval()
    body = model[0]
    body.train = types.MethodType(disabled_train, body) if bound else lambda mode=True: body  # type: ignore[method-assign]
    assert kept_in_evaluation(model) == set(body.modules())


def test_all_of_a_network_that_cannot_be_copied_is_in_training_mode() -> None:
    class Stubborn(NormEval):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("not to be copied")

    assert not kept_in_evaluation(nn.Sequential(Stubborn(3), NormEval(3)).eval())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_parts_stay_in_evaluation_mode() -> None:
    model = nn.Sequential(torch.jit.script(mlp().eval()), nn.BatchNorm1d(3))
    assert kept_in_evaluation(model) == set(model[0].modules())
    assert not kept_in_evaluation(mlp())
