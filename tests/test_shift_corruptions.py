"""The corruptions of benchmarks/shift.py do what CIFAR-10-C's do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import script

FILE = Path(__file__).parent.parent / "benchmarks" / "shift_corruptions.py"
RANDOM = ("gaussian_noise", "shot_noise", "impulse_noise", "glass_blur", "motion_blur", "snow", "frost", "fog")
GROWING = {"gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "zoom_blur", "snow", "fog", "brightness"}
GROWING |= {"contrast", "pixelate"}

shift = script(FILE)
NAMES = list(shift.CORRUPTIONS)


def pictures(channels: int = 3, side: int = 32) -> Tensor:
    """Smooth random images, uint8."""
    coarse = torch.rand(16, channels, 7, 7, generator=torch.Generator().manual_seed(0))
    return (torch.nn.functional.interpolate(coarse, size=side, mode="bicubic").clamp(0, 1) * 255).byte()


def distance(name: str, severity: int) -> float:
    clean = pictures()
    changed: Tensor = shift.corrupt(clean, name, severity)
    return float((changed - clean.float() / 255).square().mean().sqrt())


def test_there_are_fifteen_of_five_severities() -> None:
    assert len(NAMES) == 15
    assert all(len(one.constants) == 5 for one in shift.CORRUPTIONS.values())


@pytest.mark.parametrize("shape", [(3, 32), (1, 28), (1, 32)])
@pytest.mark.parametrize("name", NAMES)
def test_images_keep_their_shape_and_range(name: str, shape: tuple[int, int]) -> None:
    clean = pictures(*shape)
    for severity in (1, 5):
        changed = shift.corrupt(clean, name, severity)
        assert changed.shape == clean.shape
        assert changed.dtype == torch.float32
        assert changed.min() >= 0
        assert changed.max() <= 1
        assert torch.equal((changed * 255).round() / 255, changed)


@pytest.mark.parametrize("name", NAMES)
def test_images_are_changed(name: str) -> None:
    assert distance(name, 3) > 0.003


@pytest.mark.parametrize("name", sorted(GROWING))
def test_a_higher_severity_is_further_from_the_clean_image(name: str) -> None:
    distances = [distance(name, severity) for severity in range(1, 6)]
    assert distances == sorted(distances)


@pytest.mark.parametrize("name", NAMES)
def test_equal_seeds_give_equal_images(name: str) -> None:
    clean = pictures()
    assert torch.equal(shift.corrupt(clean, name, 3, 1), shift.corrupt(clean, name, 3, 1))
    if name in RANDOM:
        assert not torch.equal(shift.corrupt(clean, name, 3, 1), shift.corrupt(clean, name, 3, 2))


def test_the_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    for name in NAMES:
        shift.corrupt(pictures(), name, 2)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("severity", range(1, 6))
def test_noise_has_the_published_strength(severity: int) -> None:
    grey = torch.full((8, 3, 32, 32), 0.5)
    normal = shift.corrupt(grey, "gaussian_noise", severity)
    assert normal.std().item() == pytest.approx((0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1], rel=0.03)
    shot = shift.corrupt(grey, "shot_noise", severity)
    assert shot.std().item() == pytest.approx((0.5 / (500, 250, 100, 75, 50)[severity - 1]) ** 0.5, rel=0.03)
    impulses = shift.corrupt(grey, "impulse_noise", severity)
    share = ((impulses == 0) | (impulses == 1)).float().mean().item()
    assert share == pytest.approx((0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1], abs=0.006)


def test_contrast_and_brightness_have_the_published_strength() -> None:
    clean = pictures().float() / 255
    contrast = shift.corrupt(clean, "contrast", 5)
    assert contrast.std((2, 3)).mean().item() == pytest.approx(0.15 * clean.std((2, 3)).mean().item(), rel=0.02)
    dark = torch.full((1, 3, 32, 32), 0.4)
    assert shift.corrupt(dark, "brightness", 4).mean().item() == pytest.approx(0.6, abs=0.003)


@pytest.mark.parametrize("name", ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "elastic_transform"])
def test_blurs_and_maps_leave_a_plain_image_as_it_is(name: str) -> None:
    grey = torch.full((2, 1, 28, 28), 128, dtype=torch.uint8)
    for severity in range(1, 6):
        assert (shift.corrupt(grey, name, severity) - 128 / 255).abs().max() < 0.005


def test_clean_and_severity_0_are_the_image_itself() -> None:
    clean = pictures()
    assert torch.equal(shift.corrupt(clean, "clean", 5), clean.float() / 255)
    assert torch.equal(shift.corrupt(clean, "fog", 0), clean.float() / 255)


def test_a_wrong_severity_is_refused() -> None:
    with pytest.raises(ValueError, match="from 0 to 5"):
        shift.corrupt(pictures(), "fog", 6)
