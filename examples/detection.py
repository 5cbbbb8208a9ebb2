"""Detection: a small network with a dense head, whose boxes and scores are averaged before they are suppressed.

For each of 64 places of a picture the network gives a box and the probabilities of two classes, as the YOLO family
does. Data is made: noisy pictures with discs and squares. With a folder, it saves the test pictures, their boxes in
COCO's form, the weights and the posterior, for the command line.
Run: python examples/detection.py [FOLDER]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import stochbn
from stochbn.tasks import Detection
from stochbn.tasks.boxes import padded

SIDE, STRIDE = 64, 8
classes = ["disc", "square"]


class Shapes(nn.Module):
    """From pictures ``[N, 3, 64, 64]`` to centre, width, height and class probabilities ``[N, 4 + K, 64]``."""

    def __init__(self) -> None:
        super().__init__()

        def block(inside: int, outside: int) -> list[nn.Module]:
            return [nn.Conv2d(inside, outside, 3, 2, 1), nn.BatchNorm2d(outside), nn.ReLU()]

        self.body = nn.Sequential(*block(3, 16), *block(16, 32), *block(32, 48), nn.Conv2d(48, 48, 3, 1, 1))
        self.head = nn.Sequential(nn.BatchNorm2d(48), nn.ReLU(), nn.Conv2d(48, 4 + len(classes), 1))

    def forward(self, x: Tensor) -> Tensor:
        """What each place finds."""
        found = self.head(self.body(x)).flatten(2)
        steps = torch.arange(0, SIDE, STRIDE, device=x.device) + STRIDE / 2
        places = torch.stack(torch.meshgrid(steps, steps, indexing="xy")).flatten(1)
        centre, size = places + STRIDE * found[:, :2].tanh(), 4 * STRIDE * found[:, 2:4].sigmoid()
        return torch.cat([centre, size, found[:, 4:].sigmoid()], 1)


def build() -> nn.Module:
    """The network, for ``--model detection:build``."""
    return Shapes()


def pictures(count: int) -> tuple[Tensor, Tensor]:
    """Pictures, and their true boxes ``[N, M, 6]``: left, top, right, bottom, class, and 1 for a crowd."""
    x, boxes = 0.6 * torch.rand(count, 3, SIDE, SIDE), []
    down, right = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    for picture in x:
        rows = []
        for _ in range(int(torch.randint(0, 4, ()))):
            half, kind = float(5 + 6 * torch.rand(())), int(torch.randint(2, ()))
            a, b = (half + (SIDE - 2 * half) * torch.rand(2)).tolist()
            far = (right + 0.5 - a).abs(), (down + 0.5 - b).abs()
            inside = (far[0] ** 2 + far[1] ** 2 < half**2) if kind == 0 else torch.maximum(*far) < half
            picture[:, inside] = 0.4 * picture[:, inside] + 0.3 + 0.4 * torch.rand(3)[:, None]
            rows.append([a - half, b - half, a + half, b + half, kind, 0.0])
        boxes.append(torch.tensor(rows).view(-1, 6))
    return x, padded(boxes)


def loss_of(found: Tensor, labels: Tensor) -> Tensor:
    """A place is to find the shape whose centre lies in it: its class by the log-loss, its box by the distance."""
    sides, kinds = labels[:, :, :4].float(), labels[:, :, 4]
    centre, size = (sides[:, :, :2] + sides[:, :, 2:]) / 2, sides[:, :, 2:] - sides[:, :, :2]
    picture, row = (~kinds.isnan()).nonzero(as_tuple=True)
    place = ((centre[picture, row] / STRIDE).long() * torch.tensor([1, SIDE // STRIDE])).sum(1)
    target = torch.zeros_like(found[:, 4:])
    target[picture, kinds[picture, row].long(), place] = 1
    boxes = torch.cat([centre, size], 2)[picture, row]
    of_boxes = (found[picture, :4, place] - boxes).abs().mean()
    return 50 * nn.functional.binary_cross_entropy(found[:, 4:], target) + of_boxes / STRIDE


def save(folder: Path, x: Tensor, labels: Tensor, model: nn.Module) -> None:
    """Pictures, ``boxes.json`` in COCO's form, and weights."""
    from PIL import Image

    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for i, (picture, rows) in enumerate(zip(x, labels, strict=True)):
        name = f"{i:04}.png"
        Image.fromarray((255 * picture).byte().movedim(0, 2).numpy()).save(folder / "pictures" / name)
        images.append({"id": i, "file_name": name, "height": SIDE, "width": SIDE})
        for a, b, c, d, kind, crowd in rows[~rows[:, 0].isnan()].tolist():
            box = {"bbox": [a, b, c - a, d - b], "category_id": int(kind), "iscrowd": int(crowd)}
            annotations.append({"id": len(annotations), "image_id": i, **box})
    categories = [{"id": i, "name": name} for i, name in enumerate(classes)]
    told = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "boxes.json").write_text(json.dumps(told))
    torch.save(model.state_dict(), folder / "w.pt")


def main(folder: Path | None = None) -> dict[str, float]:
    """Train, fit, predict, and print a table."""
    torch.manual_seed(0)
    (x, y), (x_test, y_test) = pictures(500), pictures(200)
    model, steps = build(), 500
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        batch = torch.randint(len(x), (20,))
        loss = loss_of(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()

    task = Detection()
    posterior = stochbn.fit(model, [x], task=task)
    columns = {
        "AP50 %": ("ap50", 100),
        "ECE %": ("ece", 100),
        "NLL": ("nll", 1),
        "box correlation": ("box_correlation", 1),
    }
    print(f"{'':6}", *(f"{title:>16}" for title in columns))
    results = {}
    for name, drawn in (("plain", None), ("SBN", posterior)):
        prediction = stochbn.Predictive(model, drawn, task=task)(x_test)
        found = task.scores([(prediction, y_test)])
        cells = [
            f"{factor * found.values[key]:.3f} ± {factor * found.errors[key]:.3f}" if key in found.values else "-"
            for key, factor in columns.values()
        ]
        print(f"{name:6}", *(f"{cell:>16}" for cell in cells))
        results[name] = found.values["nll"]
    first = next(one for one in prediction.objects if len(one))
    for kind, score, box, std in zip(first.labels[:3], first.scores, first.boxes, first.box_std, strict=False):
        sides = ", ".join(f"{side:.1f} ± {spread:.1f}" for side, spread in zip(box.tolist(), std.tolist(), strict=True))
        print(f"{classes[int(kind)]}, {100 * float(score):.0f} %: {sides}")
    if folder is not None:
        save(folder, x_test, y_test, model)
        posterior.save(folder / "w.sbn.safetensors")
    return results


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
