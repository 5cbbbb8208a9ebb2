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


# Drawing

DRAWS = 20_000


@pytest.fixture(scope="module")
def drawn() -> dict[str, Tensor]:
    return make_posterior().draw(DRAWS, seeded(3))


def test_drawn_means_have_the_mean_and_variance_of_the_posterior(drawn: dict[str, Tensor]) -> None:
    posterior, means = make_posterior(), drawn["norm.running_mean"]
    sigma = posterior.mean_variance.sqrt()
    assert ((means.mean(0) - posterior.mean_mean).abs() < 5 * sigma / DRAWS**0.5).all()
    error = posterior.mean_variance * (2 / DRAWS) ** 0.5
    assert ((means.var(0) - posterior.mean_variance).abs() < 5 * error).all()


def test_drawn_variances_have_the_mean_and_variance_of_the_posterior(drawn: dict[str, Tensor]) -> None:
    posterior, variances = make_posterior(), drawn["norm.running_var"]
    error = (posterior.variance_variance / DRAWS).sqrt()
    assert ((variances.mean(0) - posterior.variance_mean).abs() < 5 * error).all()
    w = 1 + posterior.variance_variance / posterior.variance_mean.square()
    excess = w**4 + 2 * w**3 + 3 * w**2 - 6  # of a LogNormal's kurtosis
    error = posterior.variance_variance * ((2 + excess) / DRAWS).sqrt()
    assert ((variances.var(0) - posterior.variance_variance).abs() < 5 * error).all()


def test_means_are_normal_and_variances_lognormal(drawn: dict[str, Tensor]) -> None:
    """Kolmogorov's distance to the closed-form distribution function, at a level of about 1e-4."""
    posterior = make_posterior()
    s2 = torch.log1p(posterior.variance_variance / posterior.variance_mean.square())
    for values, center, spread in (
        (drawn["norm.running_mean"], posterior.mean_mean, posterior.mean_variance.sqrt()),
        (drawn["norm.running_var"].log(), posterior.variance_mean.log() - s2 / 2, s2.sqrt()),
    ):
        cdf = torch.special.ndtr(((values - center) / spread).sort(0).values)
        steps = torch.arange(DRAWS, dtype=torch.float64)[:, None] / DRAWS
        distance = torch.maximum((cdf - steps).abs(), (cdf - steps - 1 / DRAWS).abs()).max()
        assert distance < 2.2 / DRAWS**0.5


def test_all_channels_means_and_variances_are_independent_of_each_other(drawn: dict[str, Tensor]) -> None:
    columns = torch.cat([drawn["norm.running_mean"], drawn["norm.running_var"].log()], dim=1)
    correlation = torch.corrcoef(columns.T) - torch.eye(6, dtype=torch.float64)
    assert correlation.abs().max() < 5 / DRAWS**0.5
    successive = torch.corrcoef(torch.cat([columns[:-1], columns[1:]], dim=1).T)[:6, 6:]
    assert successive.abs().max() < 5 / DRAWS**0.5


def test_draws_have_the_names_shapes_and_type_of_the_networks_buffers(case: Case) -> None:
    for dtype in (torch.float32, torch.float64):
        model = case.model().to(dtype)
        state = model.state_dict()
        drawn = fit_factorized(model, [case.inputs(24, dtype=dtype)], 8).draw(5, seeded())
        assert drawn
        for name, values in drawn.items():
            assert name.endswith(("running_mean", "running_var"))
            assert values.shape == (5, *state[name].shape)
            assert values.dtype == dtype
            assert values.isfinite().all()


def test_every_observed_layer_is_drawn_and_no_skipped_one() -> None:
    drawn = fitted(CASES["never called"]).draw(2)
    assert sorted(drawn) == ["norm.running_mean", "norm.running_var"]


def test_every_layer_is_drawn_around_its_own_moments() -> None:
    posterior = make_posterior(
        {"a": 1, "b": 2}, mean_mean=[1, 10, 100], mean_variance=[1e-6] * 3, variance_mean=[2, 20, 200],
        variance_variance=[1e-6] * 3,
    )  # fmt: skip
    drawn = posterior.draw(3, seeded())
    wanted = {"a.running_mean": [1.0], "a.running_var": [2.0], "b.running_mean": [10.0, 100.0]}
    for name, values in {**wanted, "b.running_var": [20.0, 200.0]}.items():
        assert (drawn[name] - torch.tensor(values)).abs().max() < 0.01


@given(n=st.integers(1, 6), m=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_draws_are_reproducible_and_a_prefix_of_more_draws(n: int, m: int, seed: int) -> None:
    posterior = make_posterior()
    few, more = posterior.draw(n, seeded(seed)), posterior.draw(n + m, seeded(seed))
    source = seeded(seed)
    first, rest = posterior.draw(n, source), posterior.draw(m, source)
    one_by_one = list(posterior.iter_draws(n, seeded(seed)))
    assert len(one_by_one) == n
    for name, values in more.items():
        assert torch.equal(few[name], values[:n])
        assert torch.equal(torch.cat([first[name], rest[name]]), values)
        assert torch.equal(torch.stack([row[name] for row in one_by_one]), values[:n])
        assert not torch.equal(values[0], values[1])


def test_another_seed_draws_something_else() -> None:
    posterior = make_posterior()
    assert not torch.equal(
        posterior.draw(1, seeded(1))["norm.running_mean"], posterior.draw(1, seeded(2))["norm.running_mean"]
    )


def test_the_global_generator_is_left_alone_when_one_is_given_and_used_when_none_is() -> None:
    posterior = make_posterior()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        state = torch.get_rng_state()
        posterior.draw(3, seeded())
        assert torch.equal(torch.get_rng_state(), state)
        first = posterior.draw(3)["norm.running_var"]
        assert not torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(5)
        assert torch.equal(posterior.draw(3)["norm.running_var"], first)


@given(
    mean=st.floats(0, 1e6),
    ratio=st.floats(0, 1e6),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_variances_are_never_negative_and_always_finite(
    mean: float, ratio: float, seed: int, dtype: torch.dtype
) -> None:
    """n values that are not negative have a variance of at most n times the square of their mean."""
    posterior = make_posterior(
        {"n": 1},
        mean_mean=[0],
        mean_variance=[0],
        variance_mean=[mean],
        variance_variance=[ratio * mean * mean],
        dtype=dtype,
    )
    values = posterior.draw(20, seeded(seed))["n.running_var"]
    assert (values >= 0).all()
    assert values.isfinite().all()
    if mean == 0:
        assert not values.any()


@pytest.mark.parametrize("mean", [1e-30, 1e-100, 1e-170, 1e-300])
def test_tiny_variances_are_drawn_in_their_own_scale(mean: float) -> None:
    """Their square is no longer a number of float64."""
    spread = (0.1 * mean) * (0.1 * mean)
    posterior = make_posterior(
        {"n": 1}, mean_mean=[0], mean_variance=[0], variance_mean=[mean], variance_variance=[spread]
    )
    values = posterior.draw(20, seeded())["n.running_var"] / mean
    assert ((values > 0.5) & (values < 2)).all()


def test_dead_channels_are_drawn_as_exactly_zero_and_others_are_not() -> None:
    posterior = make_posterior(
        mean_mean=[0, 0, 1], mean_variance=[0, 0, 1], variance_mean=[0, 2, 2], variance_variance=[0, 1, 0]
    )
    drawn = posterior.draw(50, seeded())
    assert torch.equal(drawn["norm.running_var"][:, 0], torch.zeros(50, dtype=torch.float64))
    assert torch.equal(drawn["norm.running_mean"][:, :2], torch.zeros(50, 2, dtype=torch.float64))
    assert len(set(drawn["norm.running_var"][:, 1].tolist())) == 50
    assert torch.equal(drawn["norm.running_var"][:, 2], torch.full((50,), 2.0, dtype=torch.float64))
    assert len(set(drawn["norm.running_mean"][:, 2].tolist())) == 50


def test_dead_channels_of_a_real_network_are_drawn_as_zero() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.BatchNorm1d(3))
    model.get_parameter("0.weight").data[1] = 0
    model.get_parameter("0.bias").data[1] = -1
    drawn = fit_factorized(model, [normal(64, 4)], 8).draw(9, seeded())
    for values in drawn.values():
        assert not values[:, 1].any()
        assert len(set(values[:, 0].tolist())) == 9


@pytest.mark.parametrize(
    ("n", "error", "message"),
    [
        (0, ValueError, "at least 1, got 0"),
        (-1, ValueError, "at least 1, got -1"),
        (2.0, TypeError, r"whole number, got 2\.0"),
        ("3", TypeError, "whole number"),
        (True, TypeError, "whole number"),
        (None, TypeError, "whole number"),
    ],
)
def test_a_number_of_draws_that_is_none_is_refused(n: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_posterior().draw(n)
    with pytest.raises(error, match=message):
        next(make_posterior().iter_draws(n))


@pytest.mark.parametrize("key", VECTORS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_moments_that_no_distribution_has_are_refused(key: str, bad: float) -> None:
    values = {key: [0.5, bad, 0.5]}
    if key == "mean_mean" and bad == -1:
        assert make_posterior(mean_mean=values[key]).mean_mean[1] == -1
        return
    with pytest.raises(ValueError, match=f"{key} must be finite"):
        make_posterior(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("key", VECTORS)
def test_moments_of_the_wrong_length_are_refused(key: str) -> None:
    values = {key: [0.5, 0.5]}
    with pytest.raises(ValueError, match=f"{key} must be float64 \\[3\\] for 3 channels"):
        make_posterior(**values)  # type: ignore[arg-type]


# Against a network


def test_a_posterior_fits_the_network_it_was_fitted_to(case: Case) -> None:
    posterior = fitted(case)
    posterior.check(case.model())
    posterior.check(case.build())


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
    skipped=st.lists(names, max_size=3),
    batch_size=st.none() | st.integers(1, 10**6),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    data=st.data(),
)
def test_any_posterior_comes_back_bit_for_bit(
    layers: dict[str, int], skipped: list[str], batch_size: int | None, dtype: torch.dtype, data: st.DataObject
) -> None:
    size = sum(layers.values())
    vectors = {key: data.draw(st.lists(numbers, min_size=size, max_size=size)) for key in VECTORS}
    vectors["mean_mean"] = [-x for x in vectors["mean_mean"]]
    posterior = make_posterior(layers, batch_size=batch_size, dtype=dtype, skipped=tuple(skipped), **vectors)
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
    assert metadata["format"] == "stochbn.posterior/1"
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
    make_posterior({"a": 2, "b": 1}, skipped=("c",)).save(path)
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


@pytest.mark.parametrize("version", ["2", "10", "0", "", "1.1"])
def test_another_version_is_named(saved: Path, version: str) -> None:
    rewritten(saved, format=f"stochbn.posterior/{version}")
    with pytest.raises(ValueError, match=f"of version '{version}', this release of stochbn reads version '1'"):
        stochbn.load(saved)


def test_a_safetensors_file_of_another_kind_is_refused(saved: Path) -> None:
    rewritten(saved, format="stochbn.checkpoint/1")
    with pytest.raises(ValueError, match=r"not a stochbn\.posterior file \(its format is 'stochbn\.checkpoint'\)"):
        stochbn.load(saved)
    safetensors.torch.save_file(mlp().state_dict(), saved)
    with pytest.raises(ValueError, match=r"is a safetensors file, but not a stochbn\.posterior file"):
        stochbn.load(saved)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "full"},
        {"layers": [["norm", 4]]},
        {"layers": [["norm"]]},
        {"layers": None},
        {"layers": [["a", 5], ["b", -2]]},
        {"dtype": "no_such_type"},
        {"dtype": "load"},
        {"dtype": "int64"},
        {"dtype": 5},
        {"skipped": None},
    ],
)
def test_a_file_with_unusable_settings_is_refused_though_its_checksum_is_right(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    posterior, path = make_posterior(), tmp_path / "p.safetensors"
    about = {"kind": "factorized", "layers": [["norm", 3]], "batch_size": 16, "mini_batches": 7, "dtype": "float32",
             "skipped": []}  # fmt: skip
    tensors = {key: getattr(posterior, key) for key in VECTORS}
    write_tensors(path, "stochbn.posterior/1", tensors, about)
    stochbn.load(path)
    write_tensors(path, "stochbn.posterior/1", tensors, {**about, **changes})
    with pytest.raises(ValueError, match="is not a usable posterior"):
        stochbn.load(path)


@pytest.mark.parametrize("missing", ["kind", "layers", "batch_size", "mini_batches", "dtype", "skipped", *VECTORS])
def test_a_file_without_one_of_its_parts_is_refused(missing: str, tmp_path: Path) -> None:
    posterior, path = make_posterior(), tmp_path / "p.safetensors"
    about = {"kind": "factorized", "layers": [["norm", 3]], "batch_size": 16, "mini_batches": 7, "dtype": "float32",
             "skipped": []}  # fmt: skip
    tensors = {key: getattr(posterior, key) for key in VECTORS if key != missing}
    write_tensors(path, "stochbn.posterior/1", tensors, {k: v for k, v in about.items() if k != missing})
    with pytest.raises(ValueError, match=f"is not a usable posterior.*{missing}"):
        stochbn.load(path)


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
    assert stochbn.load(saved).skipped == ("c",)


def test_a_loaded_posterior_of_another_network_is_refused_by_the_predictive(saved: Path) -> None:
    loaded = stochbn.load(saved)
    with pytest.raises(ValueError, match="fitted to another network"):
        stochbn.Predictive(settled(Unused(), 4), loaded)
