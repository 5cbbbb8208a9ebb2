"""Damaged files through every loader: ``python benchmarks/fuzz.py`` tries 10,000 of them and writes fuzz.md.

Files of every kind that stochbn reads are made, and their bytes changed at random: flipped, cut, repeated, overwritten.
Each is loaded in a process with a limit on its memory and time. A file may load, or be refused by an error that says so
(ValueError, OSError); anything else is a fault, as are a crash, a hang and memory beyond the limit.

A checksum refuses every posterior that was damaged so. "posterior, signed again" are those of someone who changes the
description or a tensor of one and writes the checksum that fits; where such a file loads, draws and predictions are
made with it too, which must be refused or give probabilities that are finite.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import multiprocessing
import random
import resource
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

import stochbn
from stochbn.files import _checksum, read_tensors, write_bytes
from stochbn.posteriors import KINDS
from stochbn.posteriors.saved import FORMAT
from stochbn.report.tables import Table
from stochbn.sources import load_weights, open_objects

MEMORY = 6 * 2**30
"""Bytes of address space beside what the libraries take; files are of some kilobytes."""
SECONDS = 30
REFUSALS = (ValueError, OSError)
SIGNED = "posterior, signed again"


def network() -> nn.Module:
    """A small network, the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def originals(folder: Path) -> dict[str, Path]:
    """A sound file of every kind."""
    model, x = network(), np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stochbn.fit(model, [torch.from_numpy(x)], 8).save(folder / "posterior.safetensors")
    safetensors.torch.save_file(model.state_dict(), folder / "weights.safetensors")
    torch.save(model.state_dict(), folder / "weights.pt")
    np.save(folder / "data.npy", x)
    np.savez(folder / "data.npz", inputs=x, labels=np.arange(40) % 3)
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({**{f"f{i}": x[:, i] for i in range(4)}, "label": np.arange(40) % 3})
    pyarrow.parquet.write_table(table, folder / "data.parquet")
    lines = [",".join(f"{value:.4f}" for value in row) + f",{i % 3}" for i, row in enumerate(x)]
    (folder / "data.csv").write_text("f0,f1,f2,f3,label\n" + "\n".join(lines) + "\n")
    (folder / "images" / "a").mkdir(parents=True)
    Image.fromarray((255 * np.random.default_rng(1).random((12, 10, 3))).astype(np.uint8)).save(
        folder / "images/a/1.png"
    )
    return {path.name: path for path in sorted(folder.iterdir()) if path.is_file()} | {
        "1.png": folder / "images/a/1.png"
    }


def of_every_kind(folder: Path) -> list[tuple[dict[str, Tensor], Any]]:
    """The tensors and the description of a posterior of every kind."""
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32))
    found = []
    for kind in KINDS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stochbn.fit(network(), [x], 8, kind=kind).save(folder / "one")
        found.append(read_tensors(folder / "one", FORMAT))
    (folder / "one").unlink()
    return found


def predict(path: Path) -> None:
    """Load a posterior, draw from it, and predict with it."""
    posterior = stochbn.load(path)
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32))
    posterior.draw(3, torch.Generator().manual_seed(0))
    if not stochbn.Predictive(network(), posterior, draws=4)(x).probs.isfinite().all():
        raise AssertionError("probabilities that are not finite")


def read_all(path: Path) -> None:
    """Go through all examples of data."""
    objects = open_objects(str(path))
    for chunk in objects.chunks(16):
        for error in chunk.errors:
            if error is not None:
                raise ValueError(error)


LOADERS: dict[str, Callable[[Path], object]] = {
    "posterior.safetensors": stochbn.load,
    SIGNED: predict,
    "weights.safetensors": lambda path: load_weights(network(), path),
    "weights.pt": lambda path: load_weights(network(), path),
    "data.npy": read_all,
    "data.npz": read_all,
    "data.parquet": read_all,
    "data.csv": read_all,
    "1.png": lambda path: read_all(path.parent.parent),
}


def mutated(content: bytes, chance: random.Random) -> bytes:
    """The bytes, changed in one to four places."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        place, length = chance.randrange(len(data)), chance.choice((1, 2, 4, 8, 64))
        what = chance.randrange(6)
        if what == 0:
            data[place] ^= 1 << chance.randrange(8)
        elif what == 1:
            del data[place : place + length]
        elif what == 2:
            data[place:place] = data[place : place + length]
        elif what == 3:
            data[place : place + length] = chance.choice((b"\x00", b"\xff", b"9"))[:1] * length
        elif what == 4:
            data = data[:place]
        else:
            data[place : place + length] = chance.randbytes(length)
        data = data or bytearray(b"\x00")
    return bytes(data)


ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 7, 1.5, -0.0, 1e-320, 1e308, math.nan, math.inf, 2**31, 2**64, 10**400, "", "\ud800",
    "bn", "0", "1", "float64", "float8_e4m3fn", "joint", "empirical", "factorized", "x" * 10_000, [], {}, [[]],
    [["1", 6]], [["1", 2**31 - 1]], {"1": "why"}, [[["1"]]],
)  # fmt: skip
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool, torch.complex64)


def changed_value(value: Any, chance: random.Random, whole: float = 0.02) -> Any:
    """A JSON-able value with another value, or nothing, somewhere in it; of this chance, another value altogether."""
    if not isinstance(value, (dict, list)) or not value or chance.random() < whole:
        if isinstance(value, (int, float)) and chance.randrange(2):
            return value * chance.choice((-1, 0.5, 2, 1e-200, 1e200))
        return chance.choice(ODD)
    changed = dict(value) if isinstance(value, dict) else dict(enumerate(value))
    key = chance.choice(list(changed))
    what = chance.randrange(8)
    if what == 0:
        del changed[key]
    elif what == 1:
        changed[chance.choice(("new", "temperature", "mean", 99))] = chance.choice((*ODD, changed[key]))
    elif what == 2:
        other = chance.choice(list(changed))
        changed[key], changed[other] = changed[other], changed[key]
    else:
        changed[key] = changed_value(changed[key], chance, 0.2)
    return changed if isinstance(value, dict) else list(changed.values())


def changed_tensor(tensor: Tensor, chance: random.Random) -> Tensor:
    """A tensor with other numbers, or of another shape or type."""
    what = chance.randrange(5)
    if what == 0:
        return tensor.to(chance.choice(DTYPES))
    if what == 1:
        return tensor[: chance.randrange(len(tensor) + 1)] if tensor.ndim else tensor[None]
    if what == 2:
        shapes = (
            tensor[None],
            tensor.flatten(),
            tensor.transpose(0, -1) if tensor.ndim else tensor,
            tensor[None].repeat(2, *[1] * tensor.ndim),
        )
        return chance.choice(shapes)
    if not tensor.is_floating_point():
        return tensor.double()
    number = chance.choice((math.nan, math.inf, -1.0, 0.0, 1e-40, 1e-300, 0.5, 1e4, 1e19, 1e30, 3e38, 1e300))
    changed = tensor.double().flatten()
    if what == 3 or not len(changed):
        changed = torch.full_like(changed, number)
    else:
        changed[chance.randrange(len(changed))] = number
    return changed.view(tensor.shape).to(tensor.dtype)


def signed_again(posterior: tuple[dict[str, Tensor], Any], chance: random.Random) -> bytes:
    """A posterior's file, changed in one or two places and with the checksum of what it then holds."""
    tensors, about = dict(posterior[0]), posterior[1]
    for _ in range(chance.randint(1, 2)):
        name = chance.choice(list(tensors)) if tensors else ""
        what = chance.randrange(8)
        if what == 0 and tensors:
            del tensors[name]
        elif what == 1 and tensors:
            tensors[chance.choice(("new", *tensors))] = tensors[name]
        elif what < 4 and tensors:
            tensors[name] = changed_tensor(tensors[name], chance)
        else:
            about = changed_value(about, chance)
    text = json.dumps(about)
    if chance.randrange(10) == 0:
        text = mutated(text.encode(), chance).decode(errors="replace")
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    metadata = {"format": FORMAT, "about": text, "sha256": _checksum(tensors, text)}
    return safetensors.torch.save(tensors, metadata)


def work(pipe: Connection, folder: str) -> None:
    """Load the files that come through a pipe, and say what became of each."""
    warnings.simplefilter("ignore")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    sys.stderr = open("/dev/null", "w")  # noqa: PTH123, SIM115 - of decoders that complain there
    while True:
        name, path = pipe.recv()
        signal.alarm(SECONDS)
        try:
            LOADERS[name](Path(path))
            outcome = "loaded"
        except REFUSALS as error:
            outcome = "refused" if str(error).strip() else f"fault: an empty {type(error).__name__}"
        except BaseException as error:
            outcome = f"fault: {type(error).__name__}: {str(error)[:150]}"
        signal.alarm(0)
        pipe.send(outcome)


def main() -> None:
    """Try the files, print and write what became of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000, help="mutated files (default: 10,000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for fuzz.md")
    options = parser.parse_args()
    torch.set_num_threads(1)  # threads of its pool would be missing in a process that is forked
    chance = random.Random(options.seed)
    outcomes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    faults: list[str] = []
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as temporary:
        files = originals(Path(temporary))
        contents = {name: path.read_bytes() for name, path in files.items()}
        posteriors = of_every_kind(Path(temporary))
        files[SIGNED] = Path(temporary) / "signed.safetensors"

        def start() -> tuple[Connection, multiprocessing.process.BaseProcess]:
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, temporary), daemon=True)
            process.start()
            theirs.close()
            return ours, process

        pipe, process = start()
        names = sorted(files)
        for number in range(options.files):
            name = names[number % len(names)]
            if name == SIGNED:
                changed = signed_again(chance.choice(posteriors), chance)
            else:
                changed = mutated(contents[name], chance)
            files[name].write_bytes(changed)
            pipe.send((name, str(files[name])))
            try:
                outcome = pipe.recv() if pipe.poll(2 * SECONDS) else "fault: hang"
            except EOFError:
                process.join()
                outcome = f"fault: the process ended with {process.exitcode}"
            if outcome.startswith("fault"):
                faults.append(f"{name}, file {number}: {outcome}")
                kept = options.out / f"fuzz-{number}-{files[name].name}"
                if len(faults) <= 5:
                    kept.write_bytes(changed)
                if not process.is_alive() or "hang" in outcome:
                    process.kill()
                    pipe, process = start()
            outcomes[name][outcome.partition(":")[0]] += 1
        process.kill()
    body = [[name, *(str(outcomes[name][key]) for key in ("loaded", "refused", "fault"))] for name in sorted(outcomes)]
    table = Table(f"{options.files} damaged files, seed {options.seed}", ["file", "loaded", "refused", "faults"], body)
    text = table.markdown() + "".join(f"\n- {fault}" for fault in faults)
    write_bytes(options.out / "fuzz.md", f"{text}\n".encode())
    print(text)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
