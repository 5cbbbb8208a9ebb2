"""What a fit warns of: data that is unlike training."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import stochbn
from conftest import normal, seeded
from stochbn.augment import flip
from stochbn.fit_diagnosis import Diagnosis

CLASSES = 4


def blobs(n: int, seed: int, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Points of four classes."""
    labels = torch.randint(CLASSES, (n,), generator=seeded(seed))
    centres = normal(CLASSES, 6, seed=77)
    return centres[labels] + normal(n, 6, seed=seed + 1) + shift, labels


def trained(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adam = torch.optim.Adam(network.train().parameters(), 3e-3)
        for x, y in batches:
            adam.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(network(x), y))
            adam.step()
    return network.eval()


@functools.cache
def tabular() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = nn.Sequential(
            nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(),
            nn.Linear(32, CLASSES),
        )  # fmt: skip
    return trained(network, (blobs(64, seed) for seed in range(200)))


def stripes(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of two classes, whose darker half is at the left or at the top, with a bright margin."""
    labels = torch.randint(2, (n,), generator=seeded(seed))
    x = 2 * normal(n, 1, 16, 16, seed=seed + 1)
    x[labels == 0, :, :, :8] -= 0.4
    x[labels == 1, :, :8, :] -= 0.4
    return x + 6, labels


def with_crops(x: Tensor, seed: int) -> Tensor:
    padded = nn.functional.pad(flip()(x, seeded(seed)), (4, 4, 4, 4))
    places = torch.randint(9, (len(x), 2), generator=seeded(seed)).tolist()
    return torch.stack([one[:, a : a + 16, b : b + 16] for one, (a, b) in zip(padded, places, strict=True)])


@functools.cache
def pictures(augmented: bool) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, stride=2),
            nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 2),
        )  # fmt: skip
    data = (stripes(64, seed) for seed in range(150))
    return trained(network, ((with_crops(x, i) if augmented else x, y) for i, (x, y) in enumerate(data)))


def told(network: nn.Module, data: Any, **options: Any) -> list[str]:
    """What a fit warns of; all of it points at this file."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stochbn.fit(network, data, **options)
    assert all(one.filename == __file__ for one in caught)
    return [str(one.message) for one in caught]


def loader(data: tuple[Tensor, Tensor], shuffle: bool, size: int = 64) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*data), size, shuffle=shuffle, generator=seeded())


@pytest.mark.parametrize("kind", ["joint", "factorized", "factorized-log", "empirical"])
@pytest.mark.parametrize("batch_size", [4, 16, 64, None])
def test_nothing_is_said_of_data_as_in_training(kind: str, batch_size: int | None) -> None:
    assert not told(tabular(), loader(blobs(2000, 5000), shuffle=True), kind=kind, batch_size=batch_size)


def test_nothing_is_said_of_pictures_as_in_training() -> None:
    for augmented in (False, True):
        x, y = stripes(1000, 5000)
        assert not told(pictures(augmented), [((with_crops(x, 3) if augmented else x), y)])


@pytest.mark.parametrize("labelled", [True, False])
def test_data_of_another_domain_is_told_with_what_it_does(labelled: bool) -> None:
    x, y = blobs(1000, 5000, shift=2.0)
    (said,) = told(tabular(), [(x, y)] if labelled else [x])
    assert said.startswith("these mini-batches have other statistics than training, most in '1'")
    wanted = "% of these examples are classified otherwise (mean KL divergence" if labelled else "outputs differ by"
    assert wanted in said
    assert "the data is of another domain" in said
    assert "Draws have the network's own statistics as their centre" in said
    (said,) = told(tabular(), [(x, y)], centre="observed")
    assert 'centre="running" keeps the network\'s own' in said


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (with_crops(stripes(1000, 5000)[0], 3), stripes(1000, 5000)[1], "these mini-batches have other statistics"),
        (3 * stripes(1000, 5000)[0], torch.zeros(1000).long(), "all examples that were read have the label 0"),
        (*stripes(1000, 5000), ""),
    ],
)
def test_the_plain_network_predicts_the_kept_examples_once(
    x: Tensor, y: Tensor, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: list[Tensor | None] = []
    own = Diagnosis._outputs

    def counted(self: Diagnosis, network: Any, draw: Any) -> Tensor | None:
        found: Tensor | None = own(self, network, draw)
        plain.extend([found] if not draw else [])
        return found

    monkeypatch.setattr(Diagnosis, "_outputs", counted)
    said = told(pictures(False), [(x, y)])
    assert [one.startswith(message) for one in said] == ([True] if message else [])
    assert len(plain) == 1


@torch.no_grad()
def test_what_is_said_of_classes_is_what_a_slow_comparison_finds() -> None:
    """With the statistics of mini-batches, whose variances and the variance of whose means are that of all examples."""
    x, y = blobs(256, 5000, shift=2.0)
    (said,) = told(tabular(), [(x, y)])
    plain, other = tabular()(x), x
    pieces = list(torch.split(x, 16))
    for layer in tabular().children():
        if isinstance(layer, nn.BatchNorm1d):
            means = torch.stack([piece.mean(0) for piece in pieces])
            variance = torch.stack([piece.var(0, correction=0) for piece in pieces]).mean(0) + means.var(0)
            other = nn.functional.batch_norm(other, means.mean(0), variance, layer.weight, layer.bias)
            pieces = [nn.functional.batch_norm(p, None, None, layer.weight, layer.bias, True) for p in pieces]
        else:
            other, pieces = layer(other), [layer(piece) for piece in pieces]
    changed = (plain.argmax(1) != other.argmax(1)).double()
    p = plain.log_softmax(1)
    divergence = (p.exp() * (p - other.log_softmax(1))).sum(1)
    share, error = 100 * changed.mean().item(), 100 * (changed.std() / 16).item()
    assert f"with them {share:.1f} \u00b1 {error:.1f} % of these examples are classified otherwise" in said
    mean, error = divergence.mean().item(), (divergence.std() / 16).item()
    assert f"(mean KL divergence {mean:.3f} \u00b1 {error:.3f} nats)" in said


def test_missing_augmentation_is_told_by_name() -> None:
    x, y = stripes(1000, 5000)
    (said,) = told(pictures(True), [(x, y)])
    assert "With random flips and padded crops less than half of that is left" in said
    assert "pass it as augment=" in said
    assert not told(pictures(True), [(x, y)], augment=lambda x, generator: with_crops(x, generator.initial_seed()))


@pytest.mark.parametrize("order", ["sorted", "by pairs of classes"])
def test_a_loader_that_is_not_shuffled_is_told_by_name(order: str) -> None:
    x, y = blobs(2000, 5000)
    places = y.argsort(stable=True) if order == "sorted" else (y // 2).argsort(stable=True)
    (said,) = told(tabular(), loader((x[places], y[places]), shuffle=False))
    assert said.startswith("the data is not shuffled: ")
    assert "pass a DataLoader with shuffle=True" in said
    if order == "sorted":
        assert "% of the mini-batches have one label only" in said
    assert not told(tabular(), loader((x[places], y[places]), shuffle=True))


def test_whole_numbers_that_the_network_takes_are_no_labels() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = tabular()

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            out: Tensor = self.network(x)
            return out

    data = [(blobs(64, 5000 + n)[0], torch.full((64,), n)) for n in range(20)]
    assert not told(Beside().eval(), data, inputs=2)


@pytest.mark.parametrize("form", [lambda y: y[:, None], lambda y: (y > 1).float()])
def test_labels_of_other_forms_show_an_order_too(form: Callable[[Tensor], Tensor]) -> None:
    x, y = blobs(2000, 5000)
    order = y.argsort(stable=True)
    (said,) = told(tabular(), loader((x[order], form(y[order])), shuffle=False))
    assert said.startswith("the data is not shuffled: ")


def test_data_that_begins_with_one_class_alone_is_told() -> None:
    x, y = blobs(4000, 5000)
    order = y.argsort(stable=True)
    (said,) = told(tabular(), loader((x[order], y[order]), shuffle=False), batches=40)
    assert said.startswith("all examples that were read have the label 0")


def test_a_frequent_class_is_no_sign_of_an_order() -> None:
    x, y = blobs(4000, 5000)
    kept = (y == 0) | (torch.arange(4000) % 150 == 0)
    said = told(tabular(), loader((x[kept], y[kept]), shuffle=True))
    assert not any("shuffled" in one for one in said)


class OneNumber(nn.Module):
    """Gives one number for each example, ``[N]``."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tabular()

    def forward(self, x: Tensor) -> Tensor:
        number: Tensor = self.body(x)[:, 0]
        return number


def test_numbers_of_other_data_are_compared_too() -> None:
    with pytest.warns(UserWarning, match="these mini-batches have other statistics than training"):
        stochbn.fit(OneNumber(), [blobs(64, seed, 3.0)[0] for seed in range(20)], reference=False, task="regression")


def test_networks_that_were_hardly_trained_are_not_judged() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        fresh = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))
    assert not told(fresh.eval(), [blobs(400, 1, shift=5)])
    fresh.train()(blobs(64, 2)[0])
    assert not told(fresh.eval(), [blobs(400, 1, shift=5)])


@given(st.integers(0, 2**31), st.integers(2, 40), st.integers(2, 20))
def test_shuffled_labels_are_never_called_unshuffled_by_much(seed: int, classes: int, size: int) -> None:
    labels = torch.randint(classes, (600,), generator=seeded(seed))
    diagnosis = Diagnosis(size)
    for _ in diagnosis.watched([(torch.zeros(300), labels[:300]), (torch.zeros(300), labels[300:])]):
        pass
    assert not diagnosis.unshuffled()
    diagnosis = Diagnosis(size)
    for _ in diagnosis.watched([(torch.zeros(600), labels.sort().values)]):
        pass
    assert diagnosis.unshuffled()


def test_the_network_and_the_global_generator_are_left_alone() -> None:
    network = tabular()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    assert told(network, [blobs(400, 1, shift=5)])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert not network.training


# How much is read


class Counted:
    """Data that knows how many batches were taken of it."""

    def __init__(self, batches: int, size: int = 32) -> None:
        self.taken, self.batches, self.batch_size = 0, batches, size

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Any:
        for seed in range(self.batches):
            self.taken += 1
            yield blobs(self.batch_size, seed)


@pytest.mark.parametrize(("kind", "limit"), [("joint", 512), ("empirical", 512), ("factorized", 5000)])
def test_no_more_is_read_than_is_needed(kind: str, limit: int) -> None:
    data = Counted(5100, 4)
    posterior = stochbn.fit(tabular(), data, 4, kind)
    assert posterior.mini_batches == data.taken == limit
    if kind == "joint":
        assert stochbn.fit(tabular(), Counted(700, 4), 4, max_batches=600).mini_batches == 600
        assert stochbn.fit(tabular(), Counted(700, 4), 4, batches=float("inf")).mini_batches == 700


@pytest.mark.parametrize("batches", [1, 5, 6, 40])
def test_reading_stops_after_as_many_mini_batches(batches: int) -> None:
    data = Counted(20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a single mini-batch
        posterior = stochbn.fit(tabular(), data, 16, batches=batches)
        wanted = stochbn.fit(tabular(), [x[:16] for x, _ in itertools.islice(Counted(20), 1)], 16)
    assert posterior.mini_batches == min(batches, 40)
    assert data.taken == min(-(-batches // 2), 20)
    if batches == 1:
        assert torch.equal(posterior.expected, wanted.expected)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (0, ValueError, "batches must be at least 1, got 0"),
        (2.5, TypeError, r"batches must be a whole number of mini-batches, or math.inf, got 2\.5"),
        (True, TypeError, "batches must be a whole number"),
        ("all", TypeError, "batches must be a whole number"),
    ],
)
def test_numbers_of_mini_batches_that_are_none_are_refused(given: Any, error: type[Exception], message: str) -> None:
    data = Counted(3)
    with pytest.raises(error, match=message):
        stochbn.fit(tabular(), data, 16, batches=given)
    assert not data.taken


def test_data_under_the_old_name_is_taken_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="as data="):
        found = stochbn.fit(tabular(), batches=Counted(3), batch_size=16)  # type: ignore[call-overload]
    assert found.mini_batches == 6


@pytest.mark.parametrize(("data", "totals"), [(Counted(6), {12}), (iter(Counted(6)), {None}), (Counted(300), {512})])
def test_progress_counts_mini_batches(data: Any, totals: set[int | None]) -> None:
    seen: list[tuple[int, int | None]] = []
    progress: Callable[[int, int | None], object] = lambda done, total: seen.append((done, total))  # noqa: E731
    stochbn.fit(tabular(), data, 16, progress=progress)
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert {total for _, total in seen} == totals
    assert len(seen) == (12 if len(totals & {512}) == 0 else 512)


def test_an_unknown_centre_is_refused() -> None:
    with pytest.raises(ValueError, match="centre must be 'running' or 'observed', got 'median'"):
        stochbn.fit(tabular(), Counted(3), 16, centre="median")
