from __future__ import annotations

import dataclasses
import json
import math
import pickle
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import stochbn
from conftest import CASES, ByName, Case, Unused, convnet, fit_factorized, make_posterior, mlp, normal, seeded, settled
from stochbn.files import write_tensors

VECTORS = ("mean_mean", "mean_variance", "variance_mean", "variance_variance")


def fitted(case: Case) -> stochbn.Factorized:
    return fit_factorized(case.model(), [case.inputs(48)], 8)


# Against a network


def test_a_posterior_fits_the_network_it_was_fitted_to(case: Case) -> None:
    posterior = fitted(case)
    posterior.check(case.model())
    posterior.check(case.build(), weights=False)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Sequential(*list(mlp())[:3]), r"has a layer '4' that Sequential has not \(its batch-norm layers are '1'\)"),
        (mlp(hidden=7), "has 6 channels for layer '1', Sequential has 7"),
        (mlp().append(nn.BatchNorm1d(3)), r"layers that the posterior does not know \('7'\)"),
        (ByName(), "has a layer '1' that ByName has not"),
        (nn.Linear(4, 3), "no batch-norm layers"),
    ],
)
def test_another_network_is_refused_with_the_first_difference(network: nn.Module, message: str) -> None:
    posterior = fitted(CASES["BatchNorm1d [N, C]"])
    with pytest.raises(ValueError, match=message):
        posterior.check(network)


def test_the_message_about_another_network_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="fitted to another network; fit one to this network"):
        fitted(CASES["BatchNorm1d [N, C]"]).check(convnet())


def test_the_same_layer_names_with_other_channels_are_refused_for_every_layer() -> None:
    posterior = make_posterior({"1": 6, "4": 8}, **{key: [1.0] * 14 for key in VECTORS})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="8 channels for layer '4', Sequential has 7"):
        posterior.check(mlp())


def test_a_network_with_other_weights_is_refused_with_what_differs_and_what_to_do() -> None:
    case = CASES["BatchNorm2d"]
    model, other = case.model(), case.model()
    posterior = fitted(case)
    with torch.no_grad():
        other.get_parameter("0.weight").add_(0.01)
    with pytest.raises(ValueError, match=r"layers other than the batch norms differ.*fit again.*check=\"shape\""):
        posterior.check(other)
    posterior.check(other, weights=False)
    other.load_state_dict(model.state_dict())
    posterior.check(other)
    with torch.no_grad():
        other.get_parameter("4.bias")[1] += 0.01
    with pytest.raises(ValueError, match="those of the batch norms alone differ"):
        posterior.check(other)
    with pytest.raises(ValueError, match="those of the batch norms and those of other layers differ"):
        posterior.check(case.model(seed=1))


def test_whatever_is_made_of_a_posterior_knows_the_weights_too(tmp_path: Path) -> None:
    case = CASES["BatchNorm2d"]
    model, posterior = case.model(), fitted(case)
    posterior.save(tmp_path / "p")
    others = [posterior.rescale(3), posterior.recentre(model), dataclasses.replace(posterior, temperature=2.0)]
    for one in (*others, stochbn.load(tmp_path / "p")):
        assert one.fingerprint == posterior.fingerprint
        one.check(model)
        with pytest.raises(ValueError, match="other weights"):
            one.check(case.model(seed=1))


def test_recentring_on_other_weights_is_refused_unless_it_is_wanted() -> None:
    case = CASES["BatchNorm2d"]
    with pytest.raises(ValueError, match="other weights"):
        fitted(case).recentre(case.model(seed=1))
    moved = fitted(case).recentre(case.model(seed=1), weights=False)
    torch.testing.assert_close(moved.mean_mean[:5], case.model(seed=1).get_buffer("1.running_mean").double())


def test_a_posterior_without_fingerprint_is_checked_by_shape() -> None:
    case = CASES["BatchNorm2d"]
    dataclasses.replace(fitted(case), fingerprint=None).check(case.model(seed=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": {}}, "layers must be a mapping"),
        ({"layers": {"norm": True}}, "whole numbers of channels of at least 1, got True for 'norm'"),
        ({"layers": {3: 3}}, "layers must be a mapping of names"),
        ({"skipped": ("c",)}, "skipped must be a mapping of layers' names to reasons"),
        ({"skipped": {"norm": "not called"}}, "skipped must have no layer that is drawn, got 'norm'"),
        ({"mini_batches": 2.0}, r"mini_batches must be a whole number of at least 1, got 2\.0"),
        ({"fingerprint": "3"}, "fingerprint must be a Fingerprint or None, got str"),
    ],
)
def test_settings_that_no_posterior_has_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(make_posterior(), **changes)


@pytest.mark.parametrize("size", ["a", None, [4], True, 4j])
def test_a_size_that_is_no_number_is_refused(size: Any) -> None:
    with pytest.raises(TypeError, match="batch_size must be a positive number, got"):
        make_posterior().rescale(size)


@pytest.mark.parametrize("n", [2**31, 2**70, 10**400])
def test_a_number_of_draws_out_of_all_bounds_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match="number of draws must be at most 2147483647"):
        make_posterior().draw(n)


# Saving and loading


def equal_bit_for_bit(one: stochbn.Posterior, other: stochbn.Posterior) -> None:
    assert type(one) is type(other)
    for field in dataclasses.fields(one):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        assert type(mine) is type(theirs), field.name
        if isinstance(mine, Tensor):
            assert mine.dtype == theirs.dtype
            assert mine.view(torch.uint8).tolist() == theirs.view(torch.uint8).tolist(), field.name
        else:
            assert mine == theirs, field.name
    assert list(one.layers) == list(other.layers), "the order of the layers is that of the vectors"


@pytest.mark.parametrize("kind", ["factorized", "joint", "empirical"])
def test_a_fitted_posterior_comes_back_bit_for_bit(case: Case, kind: str, tmp_path: Path) -> None:
    posterior = stochbn.fit(case.model(), [case.inputs(48)], 8, kind)
    posterior.save(tmp_path / "posterior")
    loaded = stochbn.load(tmp_path / "posterior")
    equal_bit_for_bit(posterior, loaded)
    before, after = posterior.draw(3, seeded()), loaded.draw(3, seeded())
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


names = st.text(min_size=0, max_size=8)
numbers = st.floats(0, allow_infinity=False)


@given(
    layers=st.dictionaries(names, st.integers(1, 3), min_size=1, max_size=4),
    skipped=st.dictionaries(names, names, max_size=3),
    batch_size=st.none() | st.integers(1, 10**6),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    data=st.data(),
)
def test_any_posterior_comes_back_bit_for_bit(
    layers: dict[str, int], skipped: dict[str, str], batch_size: int | None, dtype: torch.dtype, data: st.DataObject
) -> None:
    skipped = {name: reason for name, reason in skipped.items() if name not in layers}
    size = sum(layers.values())
    vectors = {key: data.draw(st.lists(numbers, min_size=size, max_size=size)) for key in VECTORS}
    vectors["mean_mean"] = [-x for x in vectors["mean_mean"]]
    posterior = make_posterior(layers, batch_size=batch_size, dtype=dtype, skipped=skipped, **vectors)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p.safetensors"
        posterior.save(str(path))
        equal_bit_for_bit(posterior, stochbn.load(str(path)))


def test_a_saved_file_is_a_safetensors_file_that_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    make_posterior().save(path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        assert sorted(file.keys()) == sorted(VECTORS)
    assert metadata["format"] == "stochbn.posterior/3"
    about = json.loads(metadata["about"])
    assert about["batch_size"] == 16
    assert about["mini_batches"] == 7
    assert about["layers"] == [["norm", 3]]


def test_saving_replaces_an_older_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    make_posterior(batch_size=1).save(path)
    make_posterior(batch_size=2).save(path)
    assert stochbn.load(path).batch_size == 2
    assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]


def test_a_failing_save_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.safetensors"
    make_posterior().save(path)
    old = path.read_bytes()

    def full_disk(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full_disk)
        with pytest.raises(OSError, match="No space left"):
            make_posterior(batch_size=99).save(path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_saving_to_a_missing_folder_fails(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        make_posterior().save(tmp_path / "missing" / "p.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "p.safetensors"
    make_posterior({"a": 2, "b": 1}, skipped={"c": "not called"}).save(path)
    return path


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file '.*nothing\.safetensors'"):
        stochbn.load(tmp_path / "nothing.safetensors")
    with pytest.raises(FileNotFoundError):
        stochbn.load(tmp_path)


def test_a_file_truncated_anywhere_is_refused(saved: Path) -> None:
    content = saved.read_bytes()
    for length in range(0, len(content), 7):
        saved.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"p\.safetensors' is truncated, corrupt or not a safetensors file"):
            stochbn.load(saved)
    saved.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="truncated"):
        stochbn.load(saved)


def test_a_file_with_bytes_added_is_refused(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes() + b"\0" * 8)
    with pytest.raises(ValueError, match="corrupt"):
        stochbn.load(saved)


def test_any_flipped_byte_of_the_payload_is_noticed_by_the_checksum(saved: Path) -> None:
    content = saved.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    assert len(content) - start == 4 * 3 * 8
    for position in range(start, len(content)):
        for flip in (0x01, 0x80):
            broken = bytearray(content)
            broken[position] ^= flip
            saved.write_bytes(broken)
            with pytest.raises(ValueError, match="corrupt: its checksum does not match"):
                stochbn.load(saved)


def attempt(path: Path) -> stochbn.Posterior | str:
    try:
        return stochbn.load(path)
    except ValueError as error:
        return str(error)


def test_no_flipped_byte_of_the_header_makes_another_posterior(saved: Path) -> None:
    content, posterior = saved.read_bytes(), stochbn.load(saved)
    refused = 0
    start = 8 + struct.unpack("<Q", content[:8])[0]
    for position in range(start):
        broken = bytearray(content)
        broken[position] ^= 1 << position % 8
        saved.write_bytes(broken)
        found = attempt(saved)
        if isinstance(found, str):
            assert str(saved) in found
            refused += 1
        else:
            equal_bit_for_bit(posterior, found)
    assert refused > 0.9 * start


def rewritten(path: Path, **changes: str) -> None:
    """Write the file anew with other metadata, the checksum left as it is."""
    with safetensors.safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = {**file.metadata(), **changes}
    path.write_bytes(safetensors.torch.save(tensors, metadata))


def test_changed_settings_are_noticed_by_the_checksum(saved: Path) -> None:
    about = {"kind": "factorized", "layers": [["a", 1], ["b", 2]], "batch_size": 16, "mini_batches": 7,
             "dtype": "float64", "skipped": ["c"]}  # fmt: skip
    rewritten(saved, about=json.dumps(about))
    with pytest.raises(ValueError, match="corrupt"):
        stochbn.load(saved)


@pytest.mark.parametrize("version", ["4", "10", "0", "", "1.1"])
def test_another_version_is_named(saved: Path, version: str) -> None:
    rewritten(saved, format=f"stochbn.posterior/{version}")
    with pytest.raises(
        ValueError, match=f"of version '{version}', this release of stochbn reads version '3' or '2' or '1'"
    ):
        stochbn.load(saved)


def test_a_safetensors_file_of_another_kind_is_refused(saved: Path) -> None:
    rewritten(saved, format="stochbn.checkpoint/1")
    with pytest.raises(ValueError, match=r"not a stochbn\.posterior file \(its format is 'stochbn\.checkpoint'\)"):
        stochbn.load(saved)
    safetensors.torch.save_file(mlp().state_dict(), saved)
    with pytest.raises(ValueError, match=r"is a safetensors file, but not a stochbn\.posterior file"):
        stochbn.load(saved)


ABOUT: dict[str, Any] = {
    "kind": "factorized", "layers": [["norm", 3]], "batch_size": 16, "mini_batches": 7, "dtype": "float32",
    "skipped": {"c": "not called"}, "temperature": 1.0, "fingerprint": None,
}  # fmt: skip
TOO_LARGE: list[Any] = [True, 3.5, math.inf, 10**30, -1, 0, "3", None, [3]]
ODD_SKIPPED: list[Any] = [None, 5, "c", ["c"], {"c": 5}, {"c": None}]
ODD_FINGERPRINTS: list[Any] = [5, [], {}, {"norms": []}, {"norms": [], "others": [[1, 2]]}, {"norms": [], "others": 3}]
PART: list[Any] = [12, 3.5, 1.0, 1.0, 1.0, 1.0, 1.0]


def written(path: Path, format: str = "stochbn.posterior/2", **changes: Any) -> Path:
    tensors = {key: getattr(make_posterior(), key) for key in VECTORS if key not in changes}
    about = {name: value for name, value in {**ABOUT, **changes}.items() if value != "left out"}
    write_tensors(path, format, tensors, about)
    return path


def test_a_temperature_may_be_a_whole_number_that_tensors_cannot_hold() -> None:
    model = mlp()
    posterior = stochbn.fit(model, [normal(40, 4)], 8)
    prediction = stochbn.Predictive(model, dataclasses.replace(posterior, temperature=2**64), draws=2)(normal(3, 4))
    torch.testing.assert_close(prediction.probs, torch.full_like(prediction.probs, 1 / prediction.probs.shape[1]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("kind", value) for value in ("full", None, ["joint"], 3)),
        *(("layers", value) for value in ([["norm", 4]], [["norm"]], None, 5, [], {"norm": 3}, "norm", [[3, 3]])),
        *(("layers", value) for value in ([["a", 5], ["b", -2]], [["norm", 3], ["norm", 3]], [["norm", 3, 3]])),
        *(("layers", [["norm", value]]) for value in TOO_LARGE),
        *(("mini_batches", value) for value in TOO_LARGE),
        *(("batch_size", value) for value in (True, -1, 0, "16", [16], math.nan, 10**400, -math.inf)),
        *(("temperature", value) for value in (True, -1, 0, "1", None, math.nan, math.inf, 10**400)),
        *(("dtype", value) for value in ("no_such_type", "load", "int64", 5, None, "float8_e5m2", "nn")),
        *(("skipped", value) for value in ODD_SKIPPED),
        ("skipped", {"norm": "not called"}),
        *(("fingerprint", value) for value in ODD_FINGERPRINTS),
        *(
            ("fingerprint", {"norms": [PART], "others": [PART, others]})
            for others in (
                [-1, *PART[1:]],
                [True, *PART[1:]],
                [3.5, *PART[1:]],
                [12, -1.0, *PART[2:]],
                [*PART[:6], math.nan],
                [*PART[:6], math.inf],
                [*PART[:6], "1"],
                [*PART[:6], 10**400],
            )
        ),
        ("unheard_of", 3),
    ],
)
def test_a_file_with_unusable_settings_is_refused_by_name_though_its_checksum_is_right(
    field: str, value: Any, tmp_path: Path
) -> None:
    path = written(tmp_path / "p.safetensors")
    stochbn.load(path)
    written(path, **{field: value})
    # A number of channels that tensors do not have is told by the tensor.
    named = "mean_mean" if value == [["norm", 4]] else field
    with pytest.raises(ValueError, match=rf"p\.safetensors' is not a usable posterior: .*{named}"):
        stochbn.load(path)


@pytest.mark.parametrize("about", [None, [], 5, "kind"])
def test_a_description_that_is_no_mapping_is_refused(about: Any, tmp_path: Path) -> None:
    write_tensors(tmp_path / "p", "stochbn.posterior/2", {}, about)
    with pytest.raises(ValueError, match=r"p' is not a usable posterior: its description is no mapping"):
        stochbn.load(tmp_path / "p")


@pytest.mark.parametrize(
    "missing", ["kind", "layers", "batch_size", "mini_batches", "dtype", "skipped", "fingerprint", *VECTORS]
)
def test_a_file_without_one_of_its_parts_is_refused(missing: str, tmp_path: Path) -> None:
    path = written(tmp_path / "p.safetensors", **{missing: "left out"})
    with pytest.raises(ValueError, match=f"is not a usable posterior.*{missing}"):
        stochbn.load(path)


def older(path: Path, **changes: Any) -> Path:
    """A file as the first release wrote it."""
    return written(path, "stochbn.posterior/1", **{"skipped": ["c"], "fingerprint": "left out", **changes})


def test_a_file_of_the_format_before_is_read_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="without a fingerprint of the weights") as caught:
        posterior = stochbn.load(older(tmp_path / "p"))
    assert [str(w.filename) for w in caught] == [__file__], "the warning should point at the caller"
    assert posterior.fingerprint is None
    assert dict(posterior.skipped) == {"c": "not recorded"}
    assert torch.equal(posterior.expected, make_posterior().expected)
    posterior.save(tmp_path / "q")
    equal_bit_for_bit(stochbn.load(tmp_path / "q"), posterior)


def test_a_file_of_the_second_format_has_the_observed_centre(tmp_path: Path) -> None:
    absent = dict.fromkeys(("centre", "fitted_size", "choice"), "left out")
    posterior = stochbn.load(written(tmp_path / "p", "stochbn.posterior/2", **absent))
    assert (posterior.centre, posterior.fitted_size, posterior.choice) == ("observed", 16, "")
    assert torch.equal(posterior.expected, make_posterior().expected)
    still = stochbn.load(written(tmp_path / "p", "stochbn.posterior/2", batch_size=math.inf, **absent))
    with pytest.raises(ValueError, match="it had is not known"):
        still.rescale(16)


@pytest.mark.parametrize("value", [None, 5, "c", [5], {"c": "not called"}, ["norm"]])
def test_odd_layers_in_a_file_of_the_format_before_are_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a usable posterior: skipped must"):
        stochbn.load(older(tmp_path / "p", skipped=value))


@pytest.mark.filterwarnings("ignore:.*without a fingerprint")
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_a_file_of_the_format_before_has_wrappers_taken_off_its_names(prefix: str, tmp_path: Path) -> None:
    posterior = stochbn.load(older(tmp_path / "p", layers=[[f"{prefix}norm", 3]], skipped=[f"{prefix}c"]))
    assert (list(posterior.layers), list(posterior.skipped)) == (["norm"], ["c"])
    kept = stochbn.load(older(tmp_path / "p", layers=[[f"{prefix}norm", 2], ["head", 1]]))
    assert list(kept.layers) == [f"{prefix}norm", "head"]


class Malicious:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_loading_executes_nothing(tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark, attack, archive = tmp_path / "executed", tmp_path / "attack", tmp_path / "archive"
    attack.write_bytes(pickle.dumps(Malicious(mark)))
    torch.save(Malicious(mark), archive)
    for path in (attack, archive):
        with pytest.raises(ValueError, match="not a safetensors file"):
            stochbn.load(path)
    assert not mark.exists()
    pickle.loads(attack.read_bytes())
    assert mark.exists(), "the attack would have worked"

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("something was unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    assert list(stochbn.load(saved).skipped) == ["c"]


def test_a_loaded_posterior_of_another_network_is_refused_by_the_predictive(saved: Path) -> None:
    loaded = stochbn.load(saved)
    with pytest.raises(ValueError, match="fitted to another network"):
        stochbn.Predictive(settled(Unused(), 4), loaded)
