"""Draws over the input: every prediction is what a slow loop over augmented inputs gives."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot, pad

import stochbn
from conftest import convnet, normal, seeded, settled
from stochbn import augment
from stochbn.augment import Views
from stochbn.calibration_report import Choice

BOTH = augment.chain(augment.flip(), augment.shift(2))
SHIFT = augment.shift(1)


def noisy(x: Tensor, generator: torch.Generator) -> Tensor:
    """An augmentation of a user's."""
    return x + 0.3 * torch.randn(x.shape, generator=generator).to(x)


TURNS = augment.turns(SHIFT, noisy, SHIFT, BOTH)
NEW = (augment.crop(0.4), augment.colour(0.2), augment.chain(augment.crop(0.6), augment.colour(), augment.flip()))


def images(count: int = 12, size: int = 8) -> Tensor:
    return normal(count, 2, size, size, seed=5)


def network() -> nn.Module:
    return settled(convnet(), 2, 8, 8)


def posterior(model: nn.Module, kind: str = "joint") -> stochbn.Posterior:
    return stochbn.fit(model, [normal(96, 2, 8, 8, seed=7)], 8, kind)


def slow(
    model: nn.Module,
    given: stochbn.Posterior | None,
    fn: augment.Augment,
    x: Tensor,
    draws: int,
    generator: torch.Generator,
    clean: bool = True,
) -> Tensor:
    """The logits of every draw, by a loop over state dicts."""
    views = Views(fn, len(x), int(torch.randint(2**62, (), generator=generator)), clean)
    drawn: Any = given.iter_draws(draws, generator, quasi=True) if given is not None else [{}] * draws
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    logits = []
    for i, draw in enumerate(drawn):
        model.load_state_dict({**kept, **draw})
        with torch.no_grad():
            logits.append(views.undo(model(views(x, i)), x, i))
    model.load_state_dict(kept)
    return torch.stack(logits)


# ---------------------------------------------------------------- the ready augmentations


@given(pixels=st.integers(1, 4), draw=st.integers(0, 40), size=st.integers(5, 9), seed=st.integers(0, 1000))
def test_a_shift_is_a_crop_of_the_reflected_image(pixels: int, draw: int, size: int, seed: int) -> None:
    x = normal(6, 3, size, size + 1)
    moved = augment.shift(pixels).spread(6, seeded(seed)).apply(x, draw)
    padded = pad(x, [pixels] * 4, mode="reflect")
    for image, around in zip(moved, padded, strict=True):
        crops = [
            around[:, top : top + size, left : left + size + 1]
            for top in range(2 * pixels + 1)
            for left in range(2 * pixels + 1)
        ]
        assert any(image.equal(crop) for crop in crops)


@given(
    smallest=st.floats(0.05, 0.95),
    draw=st.integers(0, 40),
    height=st.integers(4, 9),
    width=st.integers(4, 9),
    seed=st.integers(0, 1000),
)
def test_a_crop_is_a_part_of_the_image_at_its_size(
    smallest: float, draw: int, height: int, width: int, seed: int
) -> None:
    """Of a plane, whose bilinear interpolation is exact but near its rim, by the corners of the crop."""
    rows, columns = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    x = torch.stack([rows, columns])[None].expand(6, 2, height, width).contiguous()
    spread = augment.crop(smallest).spread(6, seeded(seed))
    found, boxes = spread.apply(x, draw), spread.boxes(draw).T.tolist()  # type: ignore[attr-defined]
    for image, (top, left, tall, wide) in zip(found, boxes, strict=True):
        assert 0 <= top <= top + tall <= 1 + 1e-9
        assert 0 <= left <= left + wide <= 1 + 1e-9
        assert tall * wide > smallest / augment.images.ASPECT - 1e-9
        assert 3 / 4 - 1e-9 <= wide / tall <= 4 / 3 + 1e-9
        for axis, (start, share, size) in enumerate(((top, tall, height), (left, wide, width))):
            wanted = [min(max(start * size + share * (i + 0.5) - 0.5, 0), size - 1) for i in range(size)]
            line = image[axis, :, 0] if axis == 0 else image[axis, 0]
            assert line.tolist() == pytest.approx(wanted, abs=1e-3)


def test_crops_have_the_areas_that_were_asked_for() -> None:
    spread = augment.crop(0.4).spread(4000, seeded())
    areas = spread.boxes(0)[2:].prod(0)  # type: ignore[attr-defined]
    assert areas.mean() == pytest.approx(0.7, abs=0.03)
    assert areas.min() < 0.42
    assert areas.max() > 0.97


@pytest.mark.parametrize("channels", [1, 3])
def test_colours_change_as_a_loop_over_images_changes_them(channels: int) -> None:
    x = normal(50, channels, 6, 5).exp()
    spread = augment.colour(0.2).spread(50, seeded())
    for draw in (0, 3):
        found, numbers = spread.apply(x, draw), spread.numbers(draw).T.tolist()  # type: ignore[attr-defined]
        for image, changed, (contrast, brightness, angle) in zip(x, found, numbers, strict=True):
            for c in range(channels):
                cast = math.cos(2 * math.pi * (angle + c / channels)) if channels > 1 else 0.0
                mean, std = image[c].mean(), image[c].std(correction=0)
                wanted = mean + (image[c] - mean) * (1 + 0.2 * (2 * contrast - 1))
                wanted = wanted + 0.2 * std * (2 * brightness - 1 + cast)
                torch.testing.assert_close(changed[c], wanted, rtol=1e-4, atol=1e-4)


def test_colours_change_alike_whether_images_are_normalised_or_not() -> None:
    x, mean, std = images().sigmoid(), torch.tensor([0.4, 0.6]).view(2, 1, 1), torch.tensor([0.2, 0.5]).view(2, 1, 1)
    one, other = (augment.colour(0.3).spread(12, seeded()) for _ in range(2))
    torch.testing.assert_close(one.apply((x - mean) / std, 2), (other.apply(x, 2) - mean) / std)


@pytest.mark.parametrize("draws", [8, 16, 48])
@pytest.mark.parametrize("fn", [augment.crop(0.5), augment.colour(0.3)], ids=str)
def test_crops_and_colours_are_spread_evenly_over_the_draws_of_an_example(fn: Any, draws: int) -> None:
    ramp = (torch.arange(9.0) + torch.arange(9.0)[:, None]).expand(400, 1, 9, 9).contiguous()
    spread = fn.spread(400, seeded())
    even = torch.stack([spread.apply(ramp, draw)[:, 0, 1, 2] for draw in range(draws)]).mean(0)
    independent = torch.stack([fn(ramp, seeded(draw))[:, 0, 1, 2] for draw in range(draws)]).mean(0)
    assert even.var() < 0.4 * independent.var()


@pytest.mark.parametrize("draws", [8, 16, 48])
def test_the_shifts_of_an_object_are_spread_evenly_over_its_draws(draws: int) -> None:
    """The mean place after some draws varies less than with independent shifts: by the means of a ramp's middle."""
    ramp = torch.arange(9.0).expand(400, 1, 9, 9).contiguous()
    spread = augment.shift(3).spread(400, seeded())
    even = torch.stack([spread.apply(ramp, draw)[:, 0, 4, 4] for draw in range(draws)]).mean(0)
    independent = torch.stack([augment.shift(3)(ramp, seeded(draw))[:, 0, 4, 4] for draw in range(draws)]).mean(0)
    assert even.mean() == pytest.approx(4, abs=0.05)
    assert even.var() < 0.4 * independent.var()


def test_all_shifts_are_as_likely() -> None:
    places = torch.arange(81.0).view(1, 1, 9, 9).expand(4000, 1, 9, 9).contiguous()
    counts = torch.unique(augment.shift(1)(places, seeded())[:, 0, 4, 4], return_counts=True)[1]
    assert len(counts) == 9
    assert (counts.float() / 4000 - 1 / 9).abs().max() < 5 * (1 / 9 * 8 / 9 / 4000) ** 0.5


def test_half_of_the_draws_of_every_object_are_flipped() -> None:
    x = images(20)
    flips = augment.flip().spread(20, seeded())
    flipped = torch.stack([(flips.apply(x, draw) == x.flip(-1)).flatten(1).all(1) for draw in range(8)])
    assert (flipped.sum(0) == 4).all()
    assert flipped[0].any()
    assert not flipped[0].all()
    assert flipped[0].equal(flipped[1]), "the two of a mirrored pair of statistics are alike"
    for draw in range(8):
        assert flips.undo(flips.apply(x, draw), draw).equal(x)


def test_layout_and_type_of_the_images_stay() -> None:
    for x in (images().contiguous(memory_format=torch.channels_last), images().bfloat16(), images().half()):
        for fn in (BOTH, *NEW):
            moved = fn(x, seeded())
            assert moved.dtype == x.dtype
            assert moved.stride() == x.stride()


def test_pixels_in_whole_numbers_are_cropped_to_whole_numbers() -> None:
    x = torch.randint(0, 256, (12, 3, 8, 8), generator=seeded()).to(torch.uint8)
    found = augment.crop(0.5)(x, seeded(1))
    assert found.dtype == torch.uint8
    assert found.equal(augment.crop(0.5)(x.float(), seeded(1)).round().to(torch.uint8))
    with pytest.raises(ValueError, match="floating point"):
        augment.colour()(x, seeded())


@pytest.mark.parametrize("fn", [augment.shift(2), augment.flip(), BOTH, noisy, TURNS, *NEW])
def test_what_a_draw_sees_depends_on_the_seed_and_its_number(fn: augment.Augment) -> None:
    x = images()
    first, second = Views(fn, 12, 3), Views(fn, 12, 3)
    assert first(x, 5).equal(second(x, 5))
    assert first(x, 0).equal(x)
    assert not Views(fn, 12, 3, clean=False)(x, 0).equal(x)
    assert not first(x, 5).equal(first(x, 2))
    assert not first(x, 5).equal(Views(fn, 12, 4)(x, 5))


def test_objects_that_are_left_go_on_as_they_began() -> None:
    x, mask = images(), torch.arange(12) % 3 == 0
    for fn in (BOTH, *NEW):
        views = Views(fn, 12, 3)
        whole = views(x, 6)
        views.keep(mask)
        torch.testing.assert_close(views(x[mask], 6), whole[mask])


def test_in_turns_every_augmentation_has_its_own_draws_in_order() -> None:
    x, generator = images(), seeded(7)
    views = TURNS.spread(12, generator)
    again = seeded(7)
    alone = [Views(fn, 12, int(torch.randint(2**62, (), generator=again)), clean=False) for fn in TURNS.augmentations]
    wanted = [alone[0](x, 0), alone[1](x, 0), alone[0](x, 1), alone[3](x, 0), alone[0](x, 2), alone[1](x, 1)]
    for draw, view in enumerate(wanted):
        assert views.apply(x, draw).equal(view), draw
    mask = torch.arange(12) % 3 == 0
    views.keep(mask)
    for draw in (0, 2, 3):
        assert views.apply(x[mask], draw).equal(wanted[draw][mask]), draw


def test_augmentations_in_turn_are_named_with_bars_between() -> None:
    turns = augment.named("flip, shift:2 | shift:1|flip,shift:2|flip , shift:2")
    assert isinstance(turns, augment.turns)
    assert [repr(one) for one in turns.augmentations] == [
        "chain(flip(), shift(2))",
        "shift(1)",
        "chain(flip(), shift(2))",
        "chain(flip(), shift(2))",
    ]
    assert turns.augmentations[0] is turns.augmentations[2]
    assert str(augment.named("crop:0.5, colour:.1|flip")) == "crop:0.5,colour:0.1|flip"
    for wrong in ("flip|", "|", "flip|turn", "crop", "crop:0", "crop:1", "crop:1.5", "colour:-0.1", "crop:nan"):
        with pytest.raises(ValueError, match="unknown augmentation"):
            augment.named(wrong)


def test_bad_augmentations_are_refused() -> None:
    with pytest.raises(TypeError, match="turns takes functions"):
        augment.turns("flip")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="at least one"):
        augment.turns()
    for pixels in (0, -1, 1.5, True, "4"):
        with pytest.raises(ValueError, match="pixels must be a whole number"):
            augment.shift(pixels)  # type: ignore[arg-type]
    for share in (0, 1, -0.5, True, "0.5", float("nan")):
        with pytest.raises(ValueError, match="smallest must be a number between 0 and 1"):
            augment.crop(share)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="strength must be a number between 0 and 1"):
            augment.colour(share)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"crop is for images \[N, C, H, W\]"):
        augment.crop()(normal(2, 4), seeded())
    with pytest.raises(ValueError, match="larger images than 3x3"):
        augment.shift(3)(normal(2, 1, 3, 3), seeded())
    with pytest.raises(ValueError, match=r"images \[N, C, H, W\]"):
        augment.flip()(normal(2, 4), seeded())
    with pytest.raises(TypeError, match=r"chain takes the augmentations of stochbn\.augment"):
        augment.chain(noisy)
    with pytest.raises(TypeError, match="at least one"):
        augment.chain()
    model = network()
    wrong: Any
    for wrong, error in (
        (lambda x, generator: x[:-1], "a batch like the one it gets"),
        (lambda x, generator: x.double(), "a batch like the one it gets"),
        (lambda x, generator: None, "must give a tensor"),
    ):
        with pytest.raises((TypeError, ValueError), match=error):
            stochbn.Predictive(model, posterior(model), augment=wrong)(images())
    with pytest.raises(TypeError, match="augment must be a function"):
        stochbn.Predictive(model, augment="flip")  # type: ignore[arg-type]


# ---------------------------------------------------------------- predictions


@pytest.mark.parametrize("kind", ["joint", "factorized", None])
@pytest.mark.parametrize("fn", [BOTH, noisy, TURNS, NEW[2]])
@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("count", [3, 12])
def test_predictions_are_those_of_a_slow_loop(kind: str | None, fn: augment.Augment, clean: bool, count: int) -> None:
    model, x = network(), images(count)
    given = None if kind is None else posterior(model, kind)
    predictive = stochbn.Predictive(model, given, 16, tolerance=0, augment=fn, clean=clean)
    prediction = predictive(x, generator=seeded(2), keep_draws=True)
    wanted = slow(model, given, fn, x, 16, seeded(2), clean).log_softmax(2)
    torch.testing.assert_close(prediction.log_probs, wanted, rtol=1e-4, atol=1e-5)
    assert not wanted[1].allclose(wanted[2], atol=1e-3)
    again = predictive(x, generator=seeded(2))
    torch.testing.assert_close(again.probs, prediction.probs, rtol=1e-5, atol=1e-6)


def test_objects_that_are_done_early_are_within_the_tolerance() -> None:
    model, x = network(), images(200)
    given = posterior(model)
    seen: list[int] = []

    def counted(x: Tensor, generator: torch.Generator) -> Tensor:
        seen.append(len(x))
        return noisy(x, generator)

    found = stochbn.Predictive(model, given, 50, augment=counted, tolerance=0.1)(x, generator=seeded(1)).probs
    assert 3 * 200 <= sum(seen) < 19 * 200, "beside the clean draw"
    truth = stochbn.Predictive(model, given, 2000, augment=noisy, tolerance=0)(x, generator=seeded(2)).probs
    errors = (found - truth).square().sum(1).sqrt()
    assert errors.square().mean().sqrt() < 0.1


@pytest.mark.parametrize("kind", ["joint", "factorized"])
def test_each_draw_over_the_input_counts_as_one(kind: str) -> None:
    """Quasi-random statistics are worth more than independent ones; an augmentation's noise is not."""
    model, x, seen = network(), images(), []

    def counted(x: Tensor, generator: torch.Generator) -> Tensor:
        seen.append(len(x))
        return noisy(x, generator)

    predictive = stochbn.Predictive(model, posterior(model, kind), 24, tolerance=1e-9, augment=counted, clean=False)
    predictive(x, generator=seeded())
    assert sum(seen) == 24 * len(x)


def test_the_first_draw_is_of_the_clean_input() -> None:
    model, x = network(), images()

    def nothing(x: Tensor, generator: torch.Generator) -> Tensor:
        return torch.zeros_like(x)

    logits = stochbn.Predictive(model, None, 8, augment=nothing, tolerance=0)(x, keep_draws=True).log_probs
    with torch.no_grad():
        torch.testing.assert_close(logits[0], model(x).log_softmax(1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits[1], model(torch.zeros_like(x)).log_softmax(1), rtol=1e-4, atol=1e-5)


def test_without_augmentation_nothing_changes() -> None:
    model, x = network(), images()
    given = posterior(model)
    before, after = seeded(3), seeded(3)
    stochbn.Predictive(model, given, 8)(x, generator=before)
    list(given.iter_draws(8, after, quasi=True))
    assert before.get_state().equal(after.get_state())


class Dense(nn.Module):
    """A logit for each class at each place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.last = nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.norm(self.first(x)).relu())
        return result


def mirrored(x: Tensor, generator: torch.Generator) -> Tensor:
    return x.flip(-1)


mirrored.inverse = lambda values, generator: values.flip(-1)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "fn",
    [
        augment.flip(),
        mirrored,
        augment.turns(mirrored, augment.flip()),
        augment.chain(augment.flip(), augment.colour()),
    ],
)
def test_dense_outputs_are_moved_back(fn: augment.Augment) -> None:
    model, x = settled(Dense(), 2, 8, 8), images()
    given = posterior(model)
    prediction = stochbn.Predictive(model, given, 8, tolerance=0, augment=fn)(x, generator=seeded(2))
    wanted = slow(model, given, fn, x, 8, seeded(2)).softmax(2).mean(0)
    torch.testing.assert_close(prediction.probs, wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        back = model(x.flip(-1)).flip(-1)
    views = Views(mirrored, 12, 0)
    torch.testing.assert_close(views.undo(model(views(x, 1)), x, 1), back)


def test_dense_outputs_without_a_way_back_are_refused() -> None:
    model = settled(Dense(), 2, 8, 8)
    for fn in (noisy, augment.shift(1), BOTH, augment.crop()):
        with pytest.raises(ValueError, match="inverse"):
            stochbn.Predictive(model, posterior(model), 8, augment=fn)(images())


def test_objects_that_affect_each_other_are_augmented_too() -> None:
    class Ranked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.inner(x)
            return logits - logits.mean(0)

    model, x = Ranked().eval(), images()
    given = posterior(model)
    predictive = stochbn.Predictive(model, given, 8, augment=BOTH)
    prediction = predictive(x, generator=seeded(2))
    wanted = slow(model, given, BOTH, x, 8, seeded(2)).softmax(2).mean(0)
    torch.testing.assert_close(prediction.probs, wanted, rtol=1e-4, atol=1e-5)
    assert "together" in predictive.explain(x)


def test_dropout_and_ensembles_take_augmentations() -> None:
    model = settled(nn.Sequential(*convnet(), nn.Dropout(0.3)), 2, 8, 8)
    dropped = stochbn.MCDropout(model, 8, posterior(model), augment=BOTH)
    one = dropped(images(), generator=seeded(1), keep_draws=True)
    assert one.log_probs.shape[0] == 8
    assert not one.log_probs[0].allclose(one.log_probs[1])
    torch.testing.assert_close(dropped(images(), generator=seeded(1)).probs, one.probs)
    plain = stochbn.Predictive(network(), None, 8, augment=BOTH)
    assert stochbn.Ensemble([plain, plain])(images()).probs.sum(1).allclose(torch.ones(12))


def test_the_first_argument_is_augmented() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor, offset: Tensor) -> Tensor:
            logits: Tensor = self.inner(x)
            return logits + offset

    model, x, offset = Two().eval(), images(), normal(12, 1)
    predictive = stochbn.Predictive(model, None, 8, augment=noisy, tolerance=0, inputs=2)
    inner = stochbn.Predictive(model.inner, None, 8, augment=noisy, tolerance=0)
    found = predictive((x, offset), generator=seeded(4)).probs
    torch.testing.assert_close(found, inner(x, generator=seeded(4)).probs, rtol=1e-4, atol=1e-5)


def test_what_comes_before_the_first_batch_norm_is_not_kept() -> None:
    model = network()
    explained = stochbn.Predictive(model, posterior(model), augment=BOTH).explain(images())
    assert "prefix: not taken: every draw sees the inputs in another way" in explained


# ---------------------------------------------------------------- fitting and calibrating


def test_statistics_are_those_of_augmented_mini_batches() -> None:
    model, x = network(), normal(40, 2, 8, 8, seed=7)

    def doubled(x: Tensor, generator: torch.Generator) -> Tensor:
        return 2 * x

    by_hand = stochbn.fit(model, [2 * x], 8, kind="factorized", centre="observed")
    found = stochbn.fit(model, [x], 8, kind="factorized", centre="observed", augment=doubled)
    torch.testing.assert_close(found.mean_mean, by_hand.mean_mean)
    torch.testing.assert_close(found.variance_variance, by_hand.variance_variance)
    first, second = (stochbn.fit(model, [x], 8, kind="factorized", centre="observed", augment=BOTH) for _ in range(2))
    assert first.mean_mean.equal(second.mean_mean)
    assert not first.mean_mean.allclose(stochbn.fit(model, [x], 8, kind="factorized", centre="observed").mean_mean)


def test_every_mini_batch_is_augmented_in_another_way() -> None:
    model, x = network(), normal(8, 2, 8, 8, seed=7)
    same = stochbn.fit(model, [x] * 4, 8, kind="factorized", augment=noisy)
    assert (same.mean_variance > 0).any()


@pytest.mark.parametrize("score", ["nll", "brier"])
@pytest.mark.parametrize("fn", [None, BOTH])
def test_noise_and_temperature_are_the_best_of_a_slow_grid(score: str, fn: augment.Augment | None) -> None:
    model, x = network(), images(60)
    given = posterior(model)
    labels = torch.multinomial(model(x).detach().mul(0.7).softmax(1), 1, generator=seeded())[:, 0]
    sizes = [2.0, 8.0, math.inf]
    done: list[int] = []
    choices: list[Choice] = []
    stochbn.calibrate(
        model, given, [(x, labels)], batch_sizes=sizes, augment=fn, score=score,
        progress=done.append, report=choices.append,
    )  # fmt: skip
    assert done == [60]
    losses: dict[tuple[float, float], float] = {}
    for size in sizes:
        views = Views(fn, 60, 0) if fn is not None else None
        logits = []
        kept = {name: value.clone() for name, value in model.state_dict().items()}
        for i, draw in enumerate(given.rescale(size).iter_draws(8, seeded(0), quasi=True)):
            model.load_state_dict({**kept, **draw})
            with torch.no_grad():
                logits.append(model(x if views is None else views(x, i)))
        model.load_state_dict(kept)
        for temperature in torch.logspace(-2, 2, 29, base=2).tolist():
            probs = (torch.stack(logits).double() / temperature).softmax(2).mean(0)
            brier = (probs - one_hot(labels, probs.shape[1])).square().sum(1).mean().item()
            nll = cross_entropy(probs.log(), labels).item()
            losses[size, temperature] = nll if score == "nll" else brier
    drawn = [one for one in choices[0].options if one.centre]
    assert len(drawn) == (2 if fn is None else 3)  # without augmentation, no noise is the plain network
    for one in drawn:
        best = min(loss for (size, _), loss in losses.items() if size == one.batch_size)
        assert one.mean == pytest.approx(best, rel=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_calibrating_with_augmentation_takes_96_passes() -> None:
    model = network()
    objects: list[int] = []

    def counted(x: Tensor, generator: torch.Generator) -> Tensor:
        objects.append(len(x))
        return noisy(x, generator)

    given = posterior(model)
    labels = torch.arange(64) % 3

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for seed in range(6):
            if seed == 5:
                objects.clear()  # what is tried with a first batch is over
            yield normal(64, 2, 8, 8, seed=seed), labels

    stochbn.calibrate(model, given, batches(), augment=counted, clean=False, temperature=True)
    assert sum(objects) == 96 * 64, "five noises and none, about two centres, eight draws each"


def test_what_cannot_be_calibrated_by_is_refused() -> None:
    model = network()
    given = posterior(model)
    labelled = [(images(), torch.zeros(12, dtype=torch.int64))]
    with pytest.raises(ValueError, match="score must be one of 'nll', 'brier'"):
        stochbn.calibrate(model, given, labelled, score="accuracy")
    with pytest.raises(TypeError, match="augment must be a function"):
        stochbn.calibrate(model, given, labelled, augment=3)  # type: ignore[arg-type]
