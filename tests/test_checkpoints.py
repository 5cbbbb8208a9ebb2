from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import make_posterior, normal, settled
from stochbn.files import read_tensors, write_tensors
from stochbn.sources import checkpoints
from stochbn.sources.architectures import build
from stochbn.sources.checkpoints import Checkpoint

ARGUMENTS: dict[str, dict[str, Any]] = {
    "lenet5": {"classes": 3, "channels": 1, "size": 16},
    "vgg11": {"classes": 4, "channels": 3, "size": 32, "width": 0.05, "dropout": 0.1, "classifier_dropout": 0.5},
    "resnet18-final-bn": {"classes": 5, "channels": 2, "size": 8, "width": 0.05},
    "resnet18": {"classes": 5, "channels": 2, "size": 8, "width": 0.05},
}


def checkpoint(network: str = "lenet5", seed: int = 0, **more: Any) -> Checkpoint:
    arguments = ARGUMENTS[network] | more
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = settled(build(network, **arguments), arguments["channels"], arguments["size"], arguments["size"])
    names = tuple(f"class {i}" for i in range(arguments["classes"]))
    return Checkpoint(model, network, arguments, "digits:0-2", names)


@pytest.mark.parametrize("network", ARGUMENTS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_network_comes_back_bit_for_bit(network: str, dropout: float, tmp_path: Path) -> None:
    saved = checkpoint(network, dropout=dropout)
    checkpoints.save(tmp_path / "n.safetensors", saved)
    loaded = checkpoints.load(tmp_path / "n.safetensors")
    ours, theirs = saved.model.state_dict(), loaded.model.state_dict()
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert theirs[name].dtype == value.dtype
        assert theirs[name].equal(value), name
    assert (loaded.network, loaded.arguments, loaded.data) == (saved.network, saved.arguments, saved.data)
    assert loaded.classes == saved.classes
    assert not any(module.training for module in loaded.model.modules())
    x = normal(5, saved.arguments["channels"], saved.arguments["size"], saved.arguments["size"])
    with torch.no_grad():
        assert loaded.model(x).equal(saved.model(x))


@pytest.mark.parametrize(("width", "share"), [(0.05, 0.6), (0.25, 0.35)])
def test_a_network_may_be_kept_in_less_space(width: float, share: float, tmp_path: Path) -> None:
    saved = checkpoint("vgg11", width=width)
    checkpoints.save(tmp_path / "n.safetensors", saved)
    checkpoints.save(tmp_path / "small.safetensors", saved, small=True)
    whole, small = ((tmp_path / name).stat().st_size for name in ("n.safetensors", "small.safetensors"))
    assert small < share * whole
    ours, theirs = saved.model.state_dict(), checkpoints.load(tmp_path / "small.safetensors").model.state_dict()
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert theirs[name].dtype == value.dtype
        if value.ndim > 1 and value.numel() >= checkpoints.LARGE:
            steps = (theirs[name] - value).flatten(1).abs().amax(1) / (value.flatten(1).abs().amax(1) / 63)
            assert 0.3 < steps.max() < 0.501  # rounded to the nearest of 127 numbers for each output channel
            assert theirs[name][0].unique().numel() <= 127
        else:
            torch.testing.assert_close(theirs[name], value, rtol=1e-3 if value.ndim > 1 else 0, atol=1e-7)


def test_a_channel_of_zeros_stays_one_in_less_space(tmp_path: Path) -> None:
    saved = checkpoint("vgg11", width=0.25)
    with torch.no_grad():
        next(value for value in saved.model.parameters() if value.numel() >= checkpoints.LARGE)[3] = 0
    checkpoints.save(tmp_path / "n.safetensors", saved, small=True)
    large = [value for value in checkpoints.load(tmp_path / "n.safetensors").model.parameters() if value.numel() >= 5e4]
    assert large[0][3].equal(torch.zeros_like(large[0][3]))
    assert large[0][4].abs().sum() > 0


@pytest.mark.parametrize("damage", [
    lambda codes, scales: (codes[: len(codes) // 2], scales),
    lambda codes, scales: (codes[:-1], scales),
    lambda codes, scales: (torch.cat([codes, codes[:1]]), scales),
    lambda codes, scales: (codes.float(), scales),
    lambda codes, scales: (codes, scales[:1]),
    lambda codes, scales: (codes, scales[:, 0]),
    lambda codes, scales: (codes, scales.T.contiguous()),
    lambda codes, scales: (codes, scales.int()),
    lambda codes, scales: (codes, -scales),
    lambda codes, scales: (codes, 0 * scales),
    lambda codes, scales: (codes, scales * torch.inf),
    lambda codes, scales: (codes, scales * torch.nan),
    lambda codes, scales: (None, scales),
], ids=["half the codes", "a byte less", "a byte more", "codes of floats", "one scale", "flat scales", "a row",
        "whole scales", "negative scales", "scales of 0", "infinite scales", "scales of NaN", "no codes"])  # fmt: skip
def test_codes_and_scales_that_do_not_fit_are_refused(damage: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "n.safetensors"
    checkpoints.save(path, checkpoint("vgg11", width=0.25), small=True)
    tensors, described = read_tensors(path, checkpoints.FORMAT)
    key = next(name for name in tensors if name.startswith(checkpoints.SCALE))
    name = key.removeprefix(checkpoints.SCALE)
    codes, scales = damage(tensors.pop(name), tensors.pop(key))
    write_tensors(
        path, checkpoints.FORMAT, tensors | {key: scales} | ({} if codes is None else {name: codes}), described
    )
    with pytest.raises(ValueError, match=rf"does not hold a network of this release: .*{name}'"):
        checkpoints.load(path)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("kind", ["large", "small", "flat"])
def test_what_is_not_finite_is_not_rounded(value: float, kind: str, tmp_path: Path) -> None:
    saved = checkpoint("vgg11", width=0.25)
    chosen = {
        ("flat" if one.ndim < 2 else "large" if one.numel() >= checkpoints.LARGE else "small"): one
        for one in saved.model.parameters()
    }[kind]
    with torch.no_grad():
        chosen[(0,) * chosen.ndim] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        checkpoints.save(tmp_path / "n.safetensors", saved, small=True)
    assert not list(tmp_path.iterdir())


def test_a_weight_that_half_precision_cannot_hold_is_refused(tmp_path: Path) -> None:
    saved = checkpoint()
    with torch.no_grad():
        next(one for one in saved.model.parameters() if one.ndim > 1)[0, 0] = -70000
    with pytest.raises(ValueError, match="of size 70000; half precision ends at 65504"):
        checkpoints.save(tmp_path / "n.safetensors", saved, small=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("network", "older"), [("resnet18-final-bn", "resnet18"), ("vgg11", "vgg11")])
def test_networks_of_earlier_versions_are_told_by_their_weights(network: str, older: str, tmp_path: Path) -> None:
    bias = {"bias": False} if network == "vgg11" else {}
    saved = checkpoint(network, **bias)
    described = about(network=older, arguments=ARGUMENTS[network], classes=list(saved.classes))
    write_tensors(tmp_path / "n.safetensors", "stochbn.network/1", saved.model.state_dict(), described)
    loaded = checkpoints.load(tmp_path / "n.safetensors")
    assert (loaded.network, loaded.arguments) == (network, ARGUMENTS[network] | bias)
    x = normal(5, saved.arguments["channels"], saved.arguments["size"], saved.arguments["size"])
    with torch.no_grad():
        assert loaded.model(x).equal(saved.model(x))


@given(classes=st.lists(st.text(max_size=5), min_size=3, max_size=3), data=st.text(max_size=20))
@settings(max_examples=10)
def test_names_of_any_kind_come_back(classes: list[str], data: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("names") / "n.safetensors"
    saved = checkpoint()
    checkpoints.save(path, Checkpoint(saved.model, "lenet5", saved.arguments, data, tuple(classes)))
    loaded = checkpoints.load(path)
    assert (loaded.classes, loaded.data) == (tuple(classes), data)


def test_saving_leaves_one_file_and_the_network_alone(tmp_path: Path) -> None:
    saved = checkpoint()
    before = {name: value.clone() for name, value in saved.model.state_dict().items()}
    for _ in range(2):
        checkpoints.save(tmp_path / "n.safetensors", saved)
    assert [file.name for file in tmp_path.iterdir()] == ["n.safetensors"]
    assert all(value.equal(before[name]) for name, value in saved.model.state_dict().items())


def test_a_posterior_is_no_network(tmp_path: Path) -> None:
    make_posterior().save(tmp_path / "p.safetensors")
    with pytest.raises(ValueError, match=r"p\.safetensors' is a safetensors file, but not a stochbn\.network file"):
        checkpoints.load(tmp_path / "p.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_network_is_refused(share: float, tmp_path: Path) -> None:
    path = tmp_path / "n.safetensors"
    checkpoints.save(path, checkpoint())
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"n\.safetensors' is truncated, corrupt or not a safetensors file"):
        checkpoints.load(path)


@pytest.mark.parametrize("position", [0.3, 0.6, 0.99])
def test_a_network_with_a_wrong_byte_is_refused(position: float, tmp_path: Path) -> None:
    path = tmp_path / "n.safetensors"
    checkpoints.save(path, checkpoint())
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is corrupt: its checksum does not match"):
        checkpoints.load(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match="there is no file"):
            checkpoints.load(path)


def about(**changes: Any) -> dict[str, Any]:
    return {"network": "lenet5", "arguments": ARGUMENTS["lenet5"], "data": "digits", "classes": list("abc")} | changes


@pytest.mark.parametrize(
    "described",
    [
        about(network="lenet6"),
        about(arguments={**ARGUMENTS["lenet5"], "size": 20}),
        about(arguments={**ARGUMENTS["lenet5"], "depth": 3}),
        about(arguments={**ARGUMENTS["lenet5"], "size": 3}),
        {key: value for key, value in about().items() if key != "network"},
        {key: value for key, value in about().items() if key != "data"},
        {key: value for key, value in about().items() if key != "classes"},
        ["lenet5"],
        about(classes=None),
        about(classes=3),
        about(classes="abc"),
        about(classes=[0, 1, 2]),
        about(classes=["a", "b"]),
        about(data=None),
    ],
    ids=["unknown network", "other shapes", "unknown argument", "too small", "no network", "no data", "no classes",
         "a list", "classes of None", "a number of classes", "classes in a word", "classes that are numbers",
         "too few classes", "data of None"],
)  # fmt: skip
def test_a_description_that_does_not_fit_is_refused(described: Any, tmp_path: Path) -> None:
    path = tmp_path / "n.safetensors"
    checkpoints.save(path, checkpoint())
    write_tensors(path, "stochbn.network/1", checkpoint().model.state_dict(), described)
    with pytest.raises(ValueError, match=r"n\.safetensors' does not hold a network of this release"):
        checkpoints.load(path)


def test_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "n.safetensors"
    write_tensors(path, "stochbn.network/99", checkpoint().model.state_dict(), about())
    with pytest.raises(ValueError, match="version '99'"):
        checkpoints.load(path)


def test_a_network_cannot_be_saved_where_there_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        checkpoints.save(tmp_path / "none" / "n.safetensors", checkpoint())
