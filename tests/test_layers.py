from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from conftest import CASES, ChannelsLast, Frozen, FusedActivation, OwnForward, Twice, mlp
from stochbn.network.layers import (
    batch_norms,
    buffer_names,
    listed,
    qualified_names,
    running_statistics,
    undrawable,
    unwrap,
)


def test_every_kind_of_batch_norm_and_its_subclasses_are_found_in_registration_order() -> None:
    model = nn.ModuleDict(
        {
            "last": nn.BatchNorm3d(2),
            "conv": nn.Conv2d(2, 2, 1),
            "block": nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.SyncBatchNorm(4)),
            "fused": FusedActivation(5),
            "own": OwnForward(6),
            "channels_last": ChannelsLast(7),
            "frozen": Frozen(8),
            "plain": nn.BatchNorm2d(9),
        }
    )
    found = {name: layer.num_features for name, layer in batch_norms(model).items()}
    assert list(found.items()) == [
        ("last", 2), ("block.0", 3), ("block.2", 4), ("fused", 5), ("own", 6), ("channels_last", 7), ("frozen", 8),
        ("plain", 9),
    ]  # fmt: skip


def test_other_normalisation_layers_do_not_count() -> None:
    model = nn.Sequential(nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.InstanceNorm1d(3, track_running_stats=True))
    with pytest.raises(ValueError, match="Sequential has no batch-norm layers"):
        batch_norms(model)
    model.append(nn.BatchNorm1d(3))
    assert list(batch_norms(model)) == ["3"]


def test_a_layer_registered_under_two_names_is_listed_once_under_the_first() -> None:
    assert list(batch_norms(Twice())) == ["norm"]


def test_a_network_that_is_itself_a_batch_norm_has_the_plain_buffer_names() -> None:
    layer = nn.BatchNorm1d(3)
    assert batch_norms(layer) == {"": layer}
    assert buffer_names("") == ("running_mean", "running_var")


def test_the_buffer_names_are_those_of_the_state_dict() -> None:
    for case in CASES.values():
        model = case.build()
        state = model.state_dict()
        for name, layer in batch_norms(model).items():
            mean, var = buffer_names(name)
            assert state[mean].data_ptr() == running_statistics(layer)[0].data_ptr()
            assert state[var].data_ptr() == running_statistics(layer)[1].data_ptr()


@pytest.mark.parametrize("missing", ["both", "running_mean", "running_var"])
def test_a_layer_without_running_statistics_is_refused_by_name(missing: str) -> None:
    layer = nn.BatchNorm1d(3, track_running_stats=missing != "both")
    if missing != "both":
        setattr(layer, missing, None)
    with pytest.raises(ValueError, match=r"'1\.0' keeps no running statistics"):
        batch_norms(nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(layer)))


def test_a_lazy_layer_is_refused_until_the_network_has_run() -> None:
    model = nn.Sequential(nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match=r"'0' is lazy and not initialised"):
        batch_norms(model)
    model(torch.randn(4, 3))
    assert batch_norms(model)["0"].num_features == 3


@pytest.mark.parametrize("model", [None, "resnet", {"0.running_mean": torch.zeros(3)}, nn.BatchNorm1d])
def test_what_is_not_a_network_is_refused(model: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        batch_norms(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_traced_network_is_refused() -> None:
    traced = torch.jit.trace(mlp().eval(), torch.zeros(2, 4))  # type: ignore[no-untyped-call]
    with pytest.raises(TypeError, match=r"scripted or traced network.*pass the original module"):
        batch_norms(traced)


# Wrappers


class ModelEma(nn.Module):
    """As timm's: keeps a moving average of a network."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class FabricModule(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._forward_module = nn.DataParallel(module)
        self._original_module = module


FabricModule.__name__ = "_FabricModule"


def compiled(module: nn.Module) -> nn.Module:
    out: nn.Module = torch.compile(module, backend="eager")  # type: ignore[assignment]
    return out


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": compiled,
    "DataParallel": nn.DataParallel,
    "averaged": AveragedModel,
    "moving average": ModelEma,
    "Fabric": FabricModule,
    "several": lambda m: compiled(nn.DataParallel(compiled(m))),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_is_taken_off_and_changes_no_name(wrapper: str) -> None:
    model = mlp()
    wrapped = WRAPPERS[wrapper](model)
    bare = unwrap(wrapped)
    assert unwrap(model) is model
    assert type(bare) is nn.Sequential
    assert list(batch_norms(wrapped)) == list(batch_norms(model)) == ["1", "4"]
    assert list(batch_norms(wrapped).values()) == list(batch_norms(bare).values())
    state = wrapped.state_dict()
    for name, place in qualified_names(wrapped).items():
        assert state[buffer_names(place)[0]].data_ptr() == batch_norms(bare)[name].running_mean.data_ptr()  # type: ignore[union-attr]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_parts_change_no_name(wrapper: str) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.ModuleDict({"body": WRAPPERS[wrapper](mlp())}), nn.BatchNorm1d(3))
    assert list(batch_norms(model)) == ["0", "1.body.1", "1.body.4", "2"]
    assert list(qualified_names(model)) == list(batch_norms(model))
    state = model.state_dict()
    for name, place in qualified_names(model).items():
        layer = batch_norms(model)[name]
        assert state[buffer_names(place)[1]].data_ptr() == running_statistics(layer)[1].data_ptr()


def test_a_networks_own_part_called_module_keeps_its_name() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = mlp()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.module(x).softmax(1)
            return out

    model = Own()
    assert unwrap(model) is model
    assert list(batch_norms(model)) == ["module.1", "module.4"]
    assert qualified_names(model) == {name: name for name in batch_norms(model)}


# Layers that cannot be drawn


class FrozenBatchNorm2d(nn.Module):
    """As torchvision's."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_layers_that_cannot_be_drawn_are_told_with_the_reason() -> None:
    scripted = torch.jit.script(mlp())
    model = nn.Sequential(FrozenBatchNorm2d(4), compiled(nn.Sequential(scripted)), nn.BatchNorm1d(3), nn.LayerNorm(3))
    assert undrawable(model) == {"0": "FrozenBatchNorm", "1.0.1": "scripted", "1.0.4": "scripted"}
    assert undrawable(compiled(model)) == undrawable(model)
    assert list(batch_norms(model)) == ["2"]
    assert undrawable(mlp()) == {}
    with pytest.raises(ValueError, match=r"no batch-norm layers.*its layer '0' cannot be drawn: FrozenBatchNorm"):
        batch_norms(model[:2])


def test_names_are_listed_up_to_some() -> None:
    assert listed(["a", "b"]) == "'a', 'b'"
    assert listed(map(str, range(7))) == "'0', '1', '2', '3', '4' and 2 more"
