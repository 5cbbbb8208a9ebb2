"""Checkpoints as people have them, against what torch loads itself."""

from __future__ import annotations

import argparse
import json
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from stochbn.sources import load_weights


def network(width: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 2))


@pytest.fixture
def state() -> OrderedDict[str, Tensor]:
    torch.manual_seed(3)
    model = network().train()
    with torch.no_grad():
        model(torch.randn(32, 3))
    return OrderedDict(model.state_dict())


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def loaded(path: Path, key: str | None = None) -> tuple[dict[str, Tensor], str]:
    model = network()
    told = load_weights(model, path, key)
    return model.state_dict(), told


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in b if "num_batches" not in k)


@pytest.mark.parametrize("ending", ["w.pt", "last.ckpt", "best.pth.tar", "w.th", "pytorch_model.bin"])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "model.", "_forward_module._orig_mod.", "student.body."]
)
def test_a_prefix_that_all_names_share_is_taken_off(
    state: dict[str, Tensor], tmp_path: Path, ending: str, prefix: str
) -> None:
    path = saved({"state_dict": {prefix + k: v for k, v in state.items()}, "epoch": 4}, tmp_path / ending)
    found, told = loaded(path)
    assert same(found, state)
    assert "under 'state_dict'" in told
    assert (repr(prefix) in told) == bool(prefix)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "net", "weights", "module", "ema", "G"])
def test_the_key_of_the_weights_is_found_and_told(state: dict[str, Tensor], tmp_path: Path, key: str) -> None:
    path = saved({"epoch": 1, key: state, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}, tmp_path / "w.pt")
    found, told = loaded(path)
    assert same(found, state)
    assert repr(key) in told


def test_what_is_no_part_of_the_network_is_left_out_by_name(state: dict[str, Tensor], tmp_path: Path) -> None:
    lightning = {f"net.{k}": v for k, v in state.items()} | {
        "loss_fn.weight": torch.ones(2),
        "val_acc.tp": torch.ones(2),
    }
    found, told = loaded(saved({"state_dict": lightning}, tmp_path / "last.ckpt"))
    assert same(found, state)
    assert "left out: loss_fn.weight, val_acc.tp" in told
    averaged = torch.optim.swa_utils.AveragedModel(network())
    averaged.module.load_state_dict(state)
    found, told = loaded(saved(averaged.state_dict(), tmp_path / "swa.pt"))
    assert same(found, state)
    assert "n_averaged" in told
    profiled = {**state, "total_ops": torch.ones(1), "0.total_params": torch.ones(1)}
    assert same(loaded(saved(profiled, tmp_path / "thop.pt"))[0], state)


def test_a_layer_too_many_is_still_refused_and_the_network_stays(state: dict[str, Tensor], tmp_path: Path) -> None:
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"unexpected: 4\.weight"):
        load_weights(model, saved({**state, "4.weight": torch.ones(2, 2)}, tmp_path / "w.pt"))
    with pytest.raises(ValueError, match=r"0\.weight is \[7, 3\] in the file and \[5, 3\]"):
        load_weights(model, saved(network(7).state_dict(), tmp_path / "w.pt"))
    with pytest.raises(ValueError, match=r"missing: 3\.bias"):
        load_weights(model, saved({k: v for k, v in state.items() if k != "3.bias"}, tmp_path / "w.pt"))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("versions", [True, False])
def test_counts_of_mini_batches_may_be_missing(state: OrderedDict[str, Tensor], tmp_path: Path, versions: bool) -> None:
    old = OrderedDict((k, v) for k, v in state.items() if "num_batches_tracked" not in k)
    if versions:
        old._metadata = network().state_dict()._metadata  # type: ignore[attr-defined]
    assert same(loaded(saved(old, tmp_path / "w.pt"))[0], old)
    assert same(loaded(saved({"net": {f"module.{k}": v for k, v in old.items()}}, tmp_path / "w.pt"))[0], old)


def test_raw_weights_go_before_averaged_ones_which_a_key_chooses(state: dict[str, Tensor], tmp_path: Path) -> None:
    raw = {k: v + 1 for k, v in state.items()}
    for content, averaged in (
        ({"state_dict_ema": state, "state_dict": raw}, "state_dict_ema"),
        ({"model": raw, "ema": {"module": state}}, "ema.module"),
        ({"state_dict": {f"model.{k}": v for k, v in raw.items()} | {f"ema_model.{k}": v for k, v in state.items()}},
         "state_dict.ema_model"),
    ):  # fmt: skip
        path = saved(content, tmp_path / "w.pt")
        with pytest.warns(UserWarning, match="--weights-key"):
            assert same(loaded(path)[0], raw)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert same(loaded(path, averaged)[0], state)
    with pytest.raises(ValueError, match=r"no weights under 'best'; it has .*model"):
        loaded(path, "best")


def test_several_networks_that_fit_are_not_guessed_among(state: dict[str, Tensor], tmp_path: Path) -> None:
    two = {f"student.{k}": v for k, v in state.items()} | {f"teacher.{k}": v + 1 for k, v in state.items()}
    path = saved(two, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"'student', 'teacher': choose with --weights-key"):
        loaded(path)
    assert same(loaded(path, "student")[0], state)


def test_a_network_within_a_loss_is_no_candidate(state: dict[str, Tensor], tmp_path: Path) -> None:
    both = {f"net.{k}": v for k, v in state.items()} | {f"loss_net.{k}": v + 1 for k, v in state.items()}
    assert same(loaded(saved(both, tmp_path / "w.pt"))[0], state)


class Tied(nn.Module):
    """Two names for one weight, and a state of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.counted = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"counted": self.counted}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.counted = state["counted"]


def test_tied_weights_and_extra_states_are_the_networks_own(tmp_path: Path) -> None:
    model = Tied()
    safetensors.torch.save_file({"first.weight": model.first.weight.detach().clone()}, tmp_path / "w.safetensors")
    partly = Tied()
    with pytest.raises(ValueError, match="_extra_state"):  # torch refuses a file without it too
        load_weights(partly, tmp_path / "w.safetensors")
    model.counted = 7
    load_weights(partly, saved({"model": model.state_dict()}, tmp_path / "w.pt"))
    assert partly.counted == 7
    assert torch.equal(partly.second.weight, model.first.weight)


def test_safetensors_without_the_second_name_of_a_weight(tmp_path: Path) -> None:
    first, again = (nn.Linear(4, 4, bias=False) for _ in range(2))
    safetensors.torch.save_model(nn.ModuleList([first, first]), str(tmp_path / "t.safetensors"))
    load_weights(nn.ModuleDict({"0": again, "1": again}), tmp_path / "t.safetensors")
    assert torch.equal(again.weight, first.weight)


class Renamed(nn.Module):
    """A network that reads the names of an older release."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)
        self.register_load_state_dict_pre_hook(self._rename)  # type: ignore[no-untyped-call]

    @staticmethod
    def _rename(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for name in ("weight", "bias"):
            if f"{prefix}fc.{name}" in state:
                state[f"{prefix}head.{name}"] = state.pop(f"{prefix}fc.{name}")


def test_load_hooks_and_parametrisations_decide_as_in_torch(tmp_path: Path) -> None:
    old = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.zeros(2)}
    model = Renamed()
    load_weights(model, saved({"state_dict": old}, tmp_path / "w.pt"))
    assert torch.equal(model.head.weight, torch.ones(2, 3))
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    before = nn.utils.weight_norm(nn.Linear(3, 2))  # weight_g and weight_v, which torch renames
    load_weights(normed, saved(before.state_dict(), tmp_path / "n.pt"))
    assert torch.allclose(normed.weight, before.weight)


def test_the_network_may_have_a_prefix_that_the_file_lacks(state: dict[str, Tensor], tmp_path: Path) -> None:
    model = nn.ModuleDict({"net": network()})
    told = load_weights(model, saved(state, tmp_path / "w.pt"))
    assert same(model["net"].state_dict(), state)
    assert "with the prefix 'net.'" in told


@pytest.mark.parametrize("zipped", [True, False])
def test_more_than_tensors_is_named_with_how_to_save_without(
    state: dict[str, Tensor], tmp_path: Path, zipped: bool
) -> None:
    for more, name in (
        (np.float32(0.5), "numpy"),
        (np.ones(2), "numpy"),
        (argparse.Namespace(lr=1), "argparse.Namespace"),
        (Path("x"), "pathlib"),
    ):
        path = tmp_path / "w.pt"
        torch.save({"state_dict": state, "more": more}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=name) as caught:
            loaded(path)
        assert "torch.save({'state_dict'" in str(caught.value)
        assert "\x1b" not in str(caught.value)
        assert "weights_only" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_files_that_hold_code_or_nothing_are_told_as_that(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(3, 2)).save(str(tmp_path / "jit.pt"))  # type: ignore[no-untyped-call]
    with pytest.raises(ValueError, match="TorchScript archive, which holds code") as caught:
        loaded(tmp_path / "jit.pt")
    assert "weights_only" not in str(caught.value)
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match=r"torch\.save did not write it"):
        loaded(tmp_path / "text.pt")
    with pytest.raises(ValueError, match=r"also holds torch\.nn\.modules"):
        loaded(saved(network(), tmp_path / "whole.pt"))


def test_files_in_parts_are_put_together_by_their_index(state: dict[str, Tensor], tmp_path: Path) -> None:
    names = list(state)
    index = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    for part in set(index.values()):
        safetensors.torch.save_file({n: state[n] for n in names if index[n] == part}, tmp_path / part)
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    assert same(loaded(path)[0], state)
    assert same(loaded(tmp_path)[0], state)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-1\.safetensors.*bring all parts"):
        loaded(path)
    path.write_text(json.dumps({"weight_map": dict.fromkeys(names, "../w.safetensors")}))
    with pytest.raises(ValueError, match="not beside it"):
        loaded(path)
