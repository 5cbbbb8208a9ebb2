"""Predict images with an exported file, without stochbn. Its metadata has the classes and the preprocessing.

stochbn export --model mynet:build --weights w.pt --data photos/test --size 224 --out net.onnx
python examples/onnx_pictures.py net.onnx photo.jpg other.jpg
"""

import json
import math
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def prepared(path: str, size, mean, std, channels, crop, interpolation, squash, pad, exif):  # type: ignore[no-untyped-def]
    """A picture as the network takes it, ``[C, H, W]``."""
    image = Image.open(path)
    image = (ImageOps.exif_transpose(image) if exif else image).convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])
    cover = [math.floor(side / crop) for side in size]
    ratio = min(image.height / cover[0], image.width / cover[1])
    half = 1e-9 if cover[0] == cover[1] else 0.5  # squares are rounded down, as torchvision does
    tall, wide = cover if squash else (int(image.height / ratio + half), int(image.width / ratio + half))
    if pad is not None:  # the whole picture, within a grey frame
        ratio = min(size[0] / image.height, size[1] / image.width)
        tall, wide = max(round(image.height * ratio), 1), max(round(image.width * ratio), 1)
    image = image.resize((wide, tall), Image.Resampling[interpolation.upper()])
    if pad is None:
        left, top = round((wide - size[1]) / 2), round((tall - size[0]) / 2)
        pixels = np.asarray(image.crop((left, top, left + size[1], top + size[0])), np.float32).reshape(*size, channels)
    else:
        left, top = (size[1] - wide) // 2, (size[0] - tall) // 2
        pixels = np.full((*size, channels), 255 * pad, np.float32)
        pixels[top : top + tall, left : left + wide] = np.asarray(image, np.float32).reshape(tall, wide, channels)
    return ((pixels / 255 - (mean or 0)) / (std or 1)).transpose(2, 0, 1).astype(np.float32)


def main(file: str, *paths: str) -> list[tuple[str, float, float]]:
    """Class, probability and entropy of each picture."""
    session = onnxruntime.InferenceSession(file)
    about = {key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items() if "[" in text}
    x = np.stack([prepared(path, **about["stochbn.preprocess"]) for path in paths])
    probs, entropy = session.run(["probs", "entropy"], {session.get_inputs()[0].name: x})
    names = about.get("stochbn.classes") or list(range(probs.shape[1]))
    return [(names[p.argmax()], float(p.max()), float(h)) for p, h in zip(probs, entropy, strict=True)]


if __name__ == "__main__":
    for path, found in zip(sys.argv[2:], main(*sys.argv[1:]), strict=True):
        print(path, *found)
