"""The networks and data of `harm.py`: seven small networks that train on one core in about 25 minutes altogether.

Some are well calibrated, and some are too sure of themselves because they were trained for long on data that was not
augmented. Each has training, held-out and test data, and examples of another domain to fit on by mistake. The held-out
part is cut from the training data, and all choices are made on it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad, relu
from torch.utils.data import DataLoader, TensorDataset

from stochbn.augment import Augment, chain, flip, shift
from stochbn.files import read_tensors, write_json, write_tensors
from stochbn.measuring.timing import seconds
from stochbn.paper.trainee import restore, store
from stochbn.paper.training import keep_freed_memory
from stochbn.sources import architectures
from stochbn.sources.named import load

__all__ = ["RECIPES", "Data", "Examples", "Recipe", "trained"]

WEIGHTS = "stochbn.harm/1"
WARM_UP = 0.1
"""The part of training in which the learning rate rises; it then falls to 0, both linearly."""
TABLE = {"features": 30, "informative": 12, "classes": 5, "train": 4000, "held_out": 2000, "test": 10000}
SIDE = 40
"""Height and width of the pictures to segment, in pixels."""
WINDOW = 24
"""Height and width of a digit in them."""


class Examples(NamedTuple):
    """Inputs ``[N, ...]``, pixels as uint8 or numbers as float32, and labels ``[N]`` or dense ``[N, H, W]``."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def take(self, index: Tensor) -> Examples:
        """The examples at these positions."""
        return Examples(self.x[index], self.y[index])

    def first(self, count: int) -> Examples:
        """The first of the examples, at most so many."""
        return Examples(self.x[:count], self.y[:count])

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Consecutive batches of inputs and labels, as the network takes them."""
        for start in range(0, len(self), size):
            yield as_input(self.x[start : start + size]), self.y[start : start + size]

    def by_class(self) -> Examples:
        """Sorted by class, as a folder of pictures is; pictures with dense labels by the digit that covers most."""
        kinds = self.y if self.y.ndim == 1 else torch.stack([(self.y == k).sum((1, 2)) for k in range(1, 11)]).argmax(0)
        return self.take(kinds.argsort(stable=True))

    def loader(self, shuffle: bool) -> DataLoader[tuple[Tensor, ...]]:
        """A DataLoader with batches of 128, shuffled always in the same way or in the order of the examples."""

        def collate(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
            inputs, labels = (torch.stack(column) for column in zip(*rows, strict=True))
            return as_input(inputs), labels

        order = torch.Generator().manual_seed(0)
        return DataLoader(
            TensorDataset(*self),
            batch_size=128,
            shuffle=shuffle,
            generator=order,
            collate_fn=collate,
            drop_last=shuffle,
        )


class Data(NamedTuple):
    """What a network is trained, calibrated and tested on, and examples of another domain."""

    train: Examples
    held_out: Examples
    test: Examples
    other: Examples


@dataclass(frozen=True)
class Recipe:
    """A network, its data and its training, with AdamW.

    Attributes:
        data: makes the data.
        build: makes the network with fresh weights.
        about: the network and its data, in words.
        other: the other domain, in words.
        epochs: passes over the training data.
        rate: the highest learning rate.
        batch_size: examples in a mini-batch of training.
        augment: how training changes its inputs at random; None is not at all.
        swapped: a change of the inputs that training did not make, for networks that are trained without one.
    """

    data: Callable[[], Data]
    build: Callable[[], nn.Module]
    about: str
    other: str
    epochs: int
    rate: float
    batch_size: int = 128
    augment: Augment | None = None
    swapped: Augment | None = None


def as_input(x: Tensor) -> Tensor:
    """Pixels from 0 to 255 as numbers from 0 to 1; numbers as they are."""
    return x.float().div_(255) if x.dtype == torch.uint8 else x


def zero_crop(x: Tensor, generator: torch.Generator) -> Tensor:
    """Flip images ``[N, C, H, W]`` at random, pad them by 4 pixels of zeros, and crop them at random."""
    count, _, height, width = x.shape
    x = torch.where(torch.rand(count, 1, 1, 1, generator=generator) < 0.5, x.flip(-1), x)
    down, right = torch.randint(9, (2, count, 1), generator=generator)
    rows, columns = torch.arange(height) + down, torch.arange(width) + right
    index = torch.arange(count)[:, None, None]
    return pad(x, (4, 4, 4, 4))[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def jitter(x: Tensor, generator: torch.Generator) -> Tensor:
    """Standardised features with normal noise of standard deviation 0.5."""
    return x + 0.5 * torch.randn(x.shape, generator=generator)


class Residual(nn.Module):
    """A block of two 3x3 convolutions beside a shortcut without parameters (He et al., 2016, option A)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride, self.wider = outputs // inputs, outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C_in, H, W]`` to ``[N, C_out, H / stride, W / stride]``."""
        changed = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        kept = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.wider))
        return relu(changed + kept)


class UNet(nn.Module):
    """A U-Net of three levels for pictures ``[N, 3, H, W]`` with sides that four divides: logits ``[N, 11, H, W]``."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down = nn.ModuleList([_double(3, width), _double(width, 2 * width), _double(2 * width, 4 * width)])
        self.up = nn.ModuleList([_double(6 * width, 2 * width), _double(3 * width, width)])
        self.head = nn.Conv2d(width, 11, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the background and of ten digits for each place."""
        first = self.down[0](x)
        second = self.down[1](nn.functional.max_pool2d(first, 2))
        third = self.down[2](nn.functional.max_pool2d(second, 2))
        for below, block in zip((second, first), self.up, strict=True):
            third = block(torch.cat([nn.functional.interpolate(third, scale_factor=2), below], 1))
        logits: Tensor = self.head(third)
        return logits


def _double(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with batch norm and ReLU."""
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [nn.Conv2d(width, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def resnet20(classes: int = 10) -> nn.Sequential:
    """The ResNet-20 for CIFAR of He et al. (2016): three stages of three blocks with 16, 32 and 64 channels."""
    widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    blocks = [Residual(inputs, outputs) for inputs, outputs in pairwise(widths)]
    stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def mlp(width: int = 128) -> nn.Sequential:
    """A network for tables with two hidden layers, each with batch norm and ReLU."""
    layers: list[nn.Module] = []
    for inputs in (TABLE["features"], width):
        layers += [nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, TABLE["classes"]))


def _split(every: Examples, held_out: int) -> tuple[Examples, Examples]:
    """Two random parts, always the same: to train on, and to make choices on."""
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
    return every.take(order[held_out:]), every.take(order[:held_out])


@functools.cache
def _images(source: str, split: str) -> Examples:
    print(f"reading {source} ({split})", flush=True)
    images = load(source, split)
    return Examples(images.pixels, images.labels)


def mnist() -> Data:
    """MNIST; the other domain is notMNIST, glyphs of the letters A to J."""
    return Data(*_split(_images("mnist", "train"), 4000), _images("mnist", "test"), _images("notmnist", "test"))


def cifar5() -> Data:
    """The first five classes of CIFAR-10; the other domain is the other five."""
    train, test = (_images("cifar10:0-4", split) for split in ("train", "test"))
    return Data(*_split(train, 2500), test, _images("cifar10:5-9", "train"))


def cifar10() -> Data:
    """CIFAR-10; the other domain is its training images as negatives with half the contrast."""
    train, held_out = _split(_images("cifar10", "train"), 2500)
    test = _images("cifar10", "test").first(5000)
    return Data(train, held_out, test, Examples((255 - train.x) // 2 + 64, train.y))


@functools.cache
def table() -> Data:
    """A made table of five classes that overlap, of which 5 % have a random label; the other domain is it rescaled."""
    from sklearn.datasets import make_classification

    sizes = [TABLE["train"], TABLE["held_out"], TABLE["test"]]
    features, labels = make_classification(
        sum(sizes), TABLE["features"], n_informative=TABLE["informative"], n_redundant=6, n_classes=TABLE["classes"],
        n_clusters_per_class=3, flip_y=0.05, class_sep=1.0, random_state=0,
    )  # fmt: skip
    x = torch.from_numpy(features).float()
    x = (x - x[: sizes[0]].mean(0)) / x[: sizes[0]].std(0)
    train, held_out, test = map(Examples, x.split(sizes), torch.from_numpy(labels).long().split(sizes))
    return Data(train, held_out, test, Examples(1.5 * train.x + 0.5, train.y))


def pictures(digits: Examples, count: int, seed: int, negative: bool = False) -> Examples:
    """Pictures of two digits of random colours in noise, with the class of every place: 0 or 1 + the digit's.

    Args:
        digits: MNIST.
        count: how many pictures to make.
        seed: what is random comes from it.
        negative: dark digits before a bright ground, in place of bright ones before a dark ground.
    """
    generator = torch.Generator().manual_seed(seed)
    edge = (28 - WINDOW) // 2
    ground = torch.rand(count, 3, 1, 1, generator=generator) * 0.4
    x = ground + 0.1 * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    y = torch.zeros(count, SIDE, SIDE, dtype=torch.int64)
    for _ in range(2):
        chosen = torch.randint(len(digits), (count,), generator=generator)
        ink = digits.x[chosen, 0, edge : edge + WINDOW, edge : edge + WINDOW].float() / 255
        colour = ground + 0.15 + 0.45 * torch.rand(count, 3, 1, 1, generator=generator)
        corner = torch.randint(SIDE - WINDOW + 1, (2, count, 1), generator=generator)
        index, span = torch.arange(count)[:, None, None], torch.arange(WINDOW)
        rows, columns = (corner[0] + span)[:, :, None], (corner[1] + span)[:, None, :]
        below = x[index, :, rows, columns].permute(0, 3, 1, 2)
        noise = 0.1 * torch.randn(below.shape, generator=generator)
        x[index, :, rows, columns] = torch.lerp(below, colour + noise, ink[:, None]).permute(0, 2, 3, 1)
        covered = digits.y[chosen][:, None, None] + 1
        y[index, rows, columns] = torch.where(ink > 0.4, covered, y[index, rows, columns])
    pixels = (x.clamp(0, 1) * 255).round().to(torch.uint8)
    return Examples(255 - pixels if negative else pixels, y)


@functools.cache
def segmentation() -> Data:
    """Pictures of MNIST digits in noise with dense labels; the other domain is their negatives."""
    train, held_out = _split(_images("mnist", "train"), 4000)
    return Data(
        pictures(train, 6000, 0),
        pictures(held_out, 400, 1),
        pictures(_images("mnist", "test"), 2000, 2),
        pictures(train, 3000, 3, negative=True),
    )


CROPS = chain(flip(), shift(4))
FIVE = {"classes": 5, "width": 0.25}
RECIPES: dict[str, Recipe] = {
    "LeNet-5": Recipe(
        mnist, lambda: architectures.build("lenet5"), "MNIST", "notMNIST", epochs=2, rate=2e-3, swapped=shift(3)
    ),
    "VGG-11": Recipe(
        cifar5, lambda: architectures.build("vgg11", **FIVE), "CIFAR-10 (JPEG copy), classes 0-4, flips and crops",
        "classes 5-9", epochs=10, rate=4e-3, augment=CROPS,
    ),
    "VGG-11, too sure": Recipe(
        cifar5, lambda: architectures.build("vgg11", **FIVE), "CIFAR-10 (JPEG copy), classes 0-4", "classes 5-9",
        epochs=15, rate=4e-3, swapped=CROPS,
    ),
    "ResNet-18": Recipe(
        cifar5, lambda: architectures.build("resnet18", **FIVE), "CIFAR-10 (JPEG copy), classes 0-4, flips and crops",
        "classes 5-9", epochs=7, rate=4e-3, augment=CROPS,
    ),
    "ResNet-20": Recipe(
        cifar10, resnet20, "CIFAR-10 (JPEG copy), flips and zero-padded crops", "negatives with half the contrast",
        epochs=6, rate=8e-3, augment=zero_crop,
    ),
    "MLP": Recipe(
        table, mlp, "a made table, 5 classes", "features times 1.5, plus 0.5", epochs=60, rate=4e-3, batch_size=64,
        swapped=jitter,
    ),
    "U-Net": Recipe(
        segmentation, UNet, "MNIST digits in noise, dense labels", "negatives", epochs=12, rate=4e-3, batch_size=32,
        swapped=flip(),
    ),
}  # fmt: skip
"""All networks by their names."""


def trained(name: str, folder: Path) -> nn.Module:
    """The trained network of a recipe, in evaluation mode: from its file, or trained now.

    After every epoch the state is stored, so that a training that was stopped goes on from there.
    """
    recipe = RECIPES[name]
    stem = name.lower().replace(", ", "-").replace(" ", "-")
    weights, state = folder / f"{stem}.safetensors", folder / f"{stem}.state.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = recipe.build().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if not weights.exists():
        folder.mkdir(parents=True, exist_ok=True)
        data = recipe.data()
        took = seconds(lambda: _train(model, recipe, data.train, state, name))
        write_tensors(weights, WEIGHTS, model.state_dict(), {})
        write_json(weights.with_suffix(".json"), {"seconds_of_last_start": round(took, 1)})
        state.unlink(missing_ok=True)
    model.load_state_dict(read_tensors(weights, WEIGHTS)[0])
    return model.eval()


def _train(model: nn.Module, recipe: Recipe, train: Examples, state: Path, name: str) -> None:
    keep_freed_memory()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, fused=True)
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    per_epoch = len(train) // recipe.batch_size
    steps = recipe.epochs * per_epoch
    model.train()
    for epoch in range(restore(state, model, optimizer) if state.exists() else 0, recipe.epochs):
        generator = torch.Generator().manual_seed(1 + epoch)
        order = torch.randperm(len(train), generator=generator)[: per_epoch * recipe.batch_size]
        lost = right = 0.0
        for number, index in enumerate(track(order.split(recipe.batch_size), f"{name}, epoch {epoch + 1}")):
            done = (epoch * per_epoch + number + 1) / steps
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate * min(done / WARM_UP, (1 - done) / (1 - WARM_UP))
            inputs, labels = as_input(train.x[index]), train.y[index]
            if recipe.augment is not None:
                inputs = recipe.augment(inputs, generator)
            if inputs.ndim == 4:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=supported):
                logits = model(inputs)
            loss = cross_entropy(logits.float(), labels)
            loss.backward()
            optimizer.step()
            lost += loss.item()
            right += (logits.argmax(1) == labels).double().mean().item()
        print(f"{name}: epoch {epoch + 1}, loss {lost / per_epoch:.4f}, accuracy {right / per_epoch:.4f}", flush=True)
        if not math.isfinite(lost):
            raise ValueError(f"the training of {name} diverged; use a lower learning rate")
        store(state, model, optimizer, epoch + 1)
