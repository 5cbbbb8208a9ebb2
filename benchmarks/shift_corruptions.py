"""The fifteen corruptions of CIFAR-10-C (Hendrycks and Dietterich, 2019) as functions of batches of images.

Each takes images ``[N, C, H, W]`` from 0 to 1, its constants and a generator, and works for any number of channels and
for sides of up to 32 pixels. The constants are those that were published for CIFAR-10-C. Two things differ from it.
Frost is a procedural texture, as the published one cuts its texture from photographs. What is random comes from a
generator of torch.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn.functional import conv2d, grid_sample, interpolate, pad

__all__ = ["CORRUPTIONS", "Corruption", "corrupt"]

GREY = (0.299, 0.587, 0.114)
"""The weights of red, green and blue in the brightness of a pixel."""
ICE = (0.82, 0.92, 1.0)
"""The colour of frost."""


@dataclass(frozen=True)
class Corruption:
    """A corruption and its constants.

    Attributes:
        apply: images, constants and a generator to images, which may leave the range from 0 to 1.
        constants: of severities 1 to 5.
    """

    apply: Callable[[Tensor, Any, Generator], Tensor]
    constants: tuple[Any, ...]


def corrupt(pixels: Tensor, name: str, severity: int, seed: int = 0) -> Tensor:
    """Corrupt images, and round them to 256 levels as a file of images does.

    Args:
        pixels: ``[N, C, H, W]``, uint8, or numbers from 0 to 1.
        name: one of `CORRUPTIONS`, or ``"clean"``.
        severity: from 1 to 5; 0 is clean.
        seed: equal seeds give equal images.

    Returns:
        ``[N, C, H, W]``, float32 from 0 to 1.
    """
    x = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
    if name == "clean" or severity == 0:
        return x
    if severity not in range(1, 6):
        raise ValueError(f"severity must be a whole number from 0 to 5, got {severity!r}")
    corruption = CORRUPTIONS[name]
    generator = torch.Generator().manual_seed(seed)
    changed = corruption.apply(x, corruption.constants[severity - 1], generator)
    return (changed.clamp(0, 1) * 255).round() / 255


def gaussian_noise(x: Tensor, deviation: float, generator: Generator) -> Tensor:
    """Normal noise of a standard deviation."""
    return x + deviation * torch.randn(x.shape, generator=generator)


def shot_noise(x: Tensor, photons: float, generator: Generator) -> Tensor:
    """Poisson noise of so many photons for white."""
    return torch.poisson(x * photons, generator=generator) / photons


def impulse_noise(x: Tensor, share: float, generator: Generator) -> Tensor:
    """A share of all entries becomes 0 or 1."""
    drawn = torch.rand(x.shape, generator=generator)
    return torch.where(drawn < share, (drawn < share / 2).to(x), x)


def defocus_blur(x: Tensor, constants: tuple[float, float], generator: Generator) -> Tensor:
    """A disk of a radius, itself blurred by three pixels of a normal density."""
    radius, softness = constants
    place = torch.arange(-3.0, 4)
    disk = (place[:, None].square() + place.square() <= radius**2).float()
    soft = _bell(softness, 1)
    kernel = conv2d((disk / disk.sum())[None, None], (soft[:, None] * soft)[None, None], padding=1)
    return conv2d(pad(x, (3, 3, 3, 3), "reflect").flatten(0, 1)[:, None], kernel).view_as(x)


def glass_blur(x: Tensor, constants: tuple[float, int], generator: Generator) -> Tensor:
    """Each pixel becomes a neighbour above or to the left, so many times, between two blurs.

    The published code means to swap pixels, and copies them.
    """
    deviation, times = constants
    x = (_blurred(x, deviation) * 255).floor() / 255
    count, _, height, width = x.shape
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    inner = (rows > 1) & (columns > 1)
    index = torch.arange(count)[:, None, None]
    for _ in range(times):
        up, left = torch.randint(2, (2, count, height, width), generator=generator) * inner
        x = x[index, :, rows - up, columns - left].permute(0, 3, 1, 2)
    return _blurred(x, deviation)


def motion_blur(x: Tensor, constants: tuple[int, float], generator: Generator) -> Tensor:
    """Half a normal density along a line of an angle between -45 and 45 degrees, one for each image."""
    return _moved(x, *constants, 90 * torch.rand(len(x), generator=generator) - 45)


def zoom_blur(x: Tensor, most: float, generator: Generator) -> Tensor:
    """The mean of the image and of itself at all zooms in steps of 0.01 below the largest."""
    zooms = np.arange(1, most, 0.01)
    return (x + sum(_zoomed(x, float(zoom)) for zoom in zooms)) / (len(zooms) + 1)


def snow(x: Tensor, constants: tuple[float, ...], generator: Generator) -> Tensor:
    """Flakes that fall in a slanting line, before an image that is bleached."""
    mean, deviation, zoom, least, radius, length, kept = constants
    count, _, height, width = x.shape
    flakes = _zoomed(mean + deviation * torch.randn(count, 1, height, width, generator=generator), zoom)
    flakes = (torch.where(flakes < least, 0, flakes).clamp(0, 1) * 255).floor() / 255
    flakes = _moved(flakes, int(radius), length, -135 + 90 * torch.rand(count, generator=generator))
    grey = x if x.shape[1] != 3 else (x * torch.tensor(GREY).view(3, 1, 1)).sum(1, keepdim=True)
    bleached = kept * x + (1 - kept) * torch.maximum(x, 1.5 * grey + 0.5)
    return bleached + flakes + flakes.flip(-1, -2)


def frost(x: Tensor, constants: tuple[float, float], generator: Generator) -> Tensor:
    """Bluish veins of ice: the ridges of two plasma fractals, in place of the published cuts from photographs."""
    kept, added = constants
    ridges = [1 - (2 * _plasma(x, decay, generator) - 1).abs() for decay in (1.75, 2.5)]
    ice = 0.25 + 0.75 * (ridges[0] * ridges[1]).sqrt()
    colour = torch.tensor(ICE if x.shape[1] == 3 else (1.0,)).view(-1, 1, 1)
    return kept * x + added * ice * colour


def fog(x: Tensor, constants: tuple[float, float], generator: Generator) -> Tensor:
    """A plasma fractal is added, and all is scaled back to the brightest pixel of the image."""
    amount, decay = constants
    most = x.amax((1, 2, 3), keepdim=True)
    return (x + amount * _plasma(x, decay, generator)) * most / (most + amount)


def brightness(x: Tensor, added: float, generator: Generator) -> Tensor:
    """More value in the sense of HSV, which scales all channels of a pixel alike."""
    value = x.amax(1, keepdim=True)
    brighter = (value + added).clamp(max=1)
    return torch.where(value > 0, x * (brighter / value.clamp(min=1e-6)), brighter)


def contrast(x: Tensor, kept: float, generator: Generator) -> Tensor:
    """A share of the difference from each channel's mean."""
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * kept + mean


def elastic_transform(x: Tensor, constants: tuple[float, float, float], generator: Generator) -> Tensor:
    """A random affine map, then a smooth random displacement; all constants are shares of the height."""
    count, _, height, width = x.shape
    strength, smooth, apart = (height * constant for constant in constants)
    centre, side = height // 2, height // 3
    corners = torch.tensor(
        [[centre + side, centre + side], [centre + side, centre - side], [centre - side] * 2]
    ).float()
    moved = corners + apart * (2 * torch.rand(count, 3, 2, generator=generator) - 1)
    affine = torch.linalg.solve(torch.cat([moved, torch.ones(count, 3, 1)], 2), corners.expand(count, 3, 2))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([columns, rows, torch.ones_like(rows)], -1).float()  # x before y, as grid_sample has it
    size = torch.tensor([width, height])
    mapped = places @ affine[:, None]
    x = grid_sample(x, 2 * mapped / (size - 1) - 1, padding_mode="reflection", align_corners=True)
    if not strength:
        return x
    push = 2 * torch.rand(count, 2, height, width, generator=generator) - 1
    push = strength * _blurred(push, smooth, truncate=3, mode="reflect").permute(0, 2, 3, 1)
    return grid_sample(x, (2 * (places[..., :2] + push) + 1) / size - 1, padding_mode="reflection", align_corners=False)


def pixelate(x: Tensor, kept: float, generator: Generator) -> Tensor:
    """Fewer pixels: boxes are averaged, and the result is enlarged."""
    for size in [(int(x.shape[2] * kept), int(x.shape[3] * kept)), x.shape[2:]]:
        x = _boxes(x.shape[2], size[0]) @ x @ _boxes(x.shape[3], size[1]).T
        x = (x * 255).round() / 255
    return x


def jpeg_compression(x: Tensor, quality: int, generator: Generator) -> Tensor:
    """Through a JPEG file of a quality."""
    found = []
    for image in (x * 255).round().byte().permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(image.squeeze()).save(file, "JPEG", quality=quality)
        found.append(torch.from_numpy(np.array(Image.open(file))).view(image.shape))
    return torch.stack(found).permute(0, 3, 1, 2) / 255


def _bell(deviation: float, radius: int) -> Tensor:
    """``[2 radius + 1]``: a normal density that sums to 1."""
    density = torch.exp(-torch.arange(-radius, radius + 1.0).square() / (2 * deviation**2))
    return density / density.sum()


def _blurred(x: Tensor, deviation: float, truncate: float = 4, mode: str = "replicate") -> Tensor:
    """A normal blur."""
    radius = int(truncate * deviation + 0.5)
    if not radius:
        return x
    bell = _bell(deviation, radius)
    flat = pad(x, (radius,) * 4, mode).flatten(0, 1)[:, None]
    return conv2d(conv2d(flat, bell.view(1, 1, -1, 1)), bell.view(1, 1, 1, -1)).view_as(x)


def _moved(x: Tensor, radius: int, deviation: float, degrees: Tensor) -> Tensor:
    """The mean over ``2 radius + 1`` whole pixels along a line, by half a normal density; one angle for each image."""
    count, _, height, width = x.shape
    steps = torch.arange(2 * radius + 1.0)
    weights = torch.exp(-steps.square() / (2 * deviation**2))
    angle = torch.deg2rad(degrees)[:, None]
    right, down = ((steps * part - 0.5).ceil().long() for part in (angle.cos(), angle.sin()))
    index, found = torch.arange(count)[:, None, None], torch.zeros_like(x)
    for step, weight in enumerate((weights / weights.sum()).tolist()):
        rows = (torch.arange(height) + down[:, step, None]).clamp(0, height - 1)
        columns = (torch.arange(width) + right[:, step, None]).clamp(0, width - 1)
        found += weight * x[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return found


def _zoomed(x: Tensor, zoom: float) -> Tensor:
    """The middle of an image, enlarged to the size of the image."""
    height, width = x.shape[2:]
    cut = math.ceil(height / zoom), math.ceil(width / zoom)
    top, left = (height - cut[0]) // 2, (width - cut[1]) // 2
    middle = x[:, :, top : top + cut[0], left : left + cut[1]]
    size = [round(side * zoom) for side in cut]
    large = interpolate(middle, size=size, mode="bilinear", align_corners=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return large[:, :, top : top + height, left : left + width]


def _plasma(x: Tensor, decay: float, generator: Generator) -> Tensor:
    """``[N, 1, H, W]`` from 0 to 1: fractals by the diamond-square algorithm on a torus (Fournier et al., 1982)."""
    count, _, height, width = x.shape
    side = 2 ** math.ceil(math.log2(max(height, width)))
    field, step, spread = torch.zeros(count, side, side), side, 100.0

    def jittered(mean: Tensor) -> Tensor:
        return mean + spread**2 * (2 * torch.rand(mean.shape, generator=generator) - 1)

    while step >= 2:
        half = step // 2
        corner = field[:, ::step, ::step]
        across = corner + corner.roll(-1, 1)
        field[:, half::step, half::step] = jittered((across + across.roll(-1, 2)) / 4)
        middle = field[:, half::step, half::step]
        ends = corner + corner.roll(-1, 2) + middle + middle.roll(1, 1)
        field[:, ::step, half::step] = jittered(ends / 4)
        ends = corner + corner.roll(-1, 1) + middle + middle.roll(1, 2)
        field[:, half::step, ::step] = jittered(ends / 4)
        step, spread = half, spread / decay
    field -= field.amin((1, 2), keepdim=True)
    return (field / field.amax((1, 2), keepdim=True))[:, None, :height, :width]


def _boxes(before: int, after: int) -> Tensor:
    """``[after, before]``: the mean of the pixels whose centre lies in each new pixel, or the one that it lies in."""
    scale = before / after
    centres = (torch.arange(after, dtype=torch.float64)[:, None] + 0.5) * scale
    apart = (torch.arange(before, dtype=torch.float64) + 0.5 - centres) / max(scale, 1)
    inside = ((apart > -0.5) & (apart <= 0.5)).float()
    return inside / inside.sum(1, keepdim=True)


CORRUPTIONS: Mapping[str, Corruption] = {
    "gaussian_noise": Corruption(gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": Corruption(shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": Corruption(impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": Corruption(defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "glass_blur": Corruption(glass_blur, ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))),
    "motion_blur": Corruption(motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": Corruption(zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),
    "snow": Corruption(
        snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "frost": Corruption(frost, ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
    "fog": Corruption(fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": Corruption(brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": Corruption(contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": Corruption(
        elastic_transform, ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))
    ),
    "pixelate": Corruption(pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": Corruption(jpeg_compression, (80, 65, 58, 50, 40)),
}
"""All fifteen, by their published names."""
