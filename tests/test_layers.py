from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from conftest import CASES, ChannelsLast, Frozen, FusedActivation, OwnForward, Twice, mlp
from stochbn.network.layers import batch_norms, buffer_names, running_statistics


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
