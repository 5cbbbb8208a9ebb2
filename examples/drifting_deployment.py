"""Data that drifts in a deployment: the alarm sounds, and the network adapts without labels.

A small network classifies scikit-learn's digits in a service that answers requests over HTTP. Then the camera ages: its
images have less contrast and more noise. The monitor of the service sounds the alarm. The posterior is adapted to the
latest examples, which have no labels, and replaces the old one. At the end the adapted network is written as a plain
one, which runs without stochbn. Labels are used only to train and to print errors.
Run: python examples/drifting_deployment.py
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import urllib.request
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

import stochbn
from stochbn.deploy import Scorer

REQUEST = 16
"""Examples in a request."""
RECENT = 256
"""Examples that the service keeps, to adapt to."""


def network() -> nn.Module:
    """The network, which the service builds by its name."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(128, 10),
    )  # fmt: skip


def trained(x: Tensor, y: Tensor) -> nn.Module:
    """The network after training."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(12):
        for batch in torch.randperm(len(x)).split(25):
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def aged(x: Tensor) -> Tensor:
    """What the camera makes of pictures when it is old."""
    return 0.5 * x + 0.3 + 0.05 * torch.randn(x.shape)


class Service:
    """Answers requests, and keeps the latest examples.

    Attributes:
        scorer: what predicts; another one may take its place while requests come.
        recent: the latest examples.
    """

    def __init__(self, scorer: Scorer) -> None:
        self.scorer, self.recent = scorer, deque[Any](maxlen=RECENT)

    def predict(self, inputs: list[Any]) -> list[dict[str, Any]]:
        """Class, probability and uncertainties of every example."""
        self.recent.extend(inputs)
        return self.scorer.answer(inputs)


@contextmanager
def serving(service: Service) -> Iterator[str]:
    """The address of the service, which runs until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(service.scorer.shift())

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            self.reply(service.predict(json.loads(body)["inputs"]))

        def reply(self, answer: Any) -> None:
            content = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Requests are not printed."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def ask(url: str, inputs: Tensor | None = None) -> Any:
    """The service's answer to a request."""
    content = None if inputs is None else json.dumps({"inputs": inputs.tolist()}).encode()
    with urllib.request.urlopen(url, content, timeout=60) as answer:
        return json.loads(answer.read())


def served(url: str, x: Tensor, y: Tensor) -> float:
    """The share of examples that the service classifies wrongly."""
    rows = [row for batch in x.split(REQUEST) for row in ask(f"{url}/predict", batch)]
    return sum(int(row["class"]) != label for row, label in zip(rows, y.tolist(), strict=True)) / len(rows)


def main() -> dict[str, float]:
    """Train, serve, drift, adapt, swap, and write back; print the errors."""
    torch.manual_seed(0)
    sys.path.insert(0, str(Path(__file__).parent))  # where the service finds this network by its name
    digits = load_digits()
    order = torch.randperm(len(digits.target))
    x = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 16
    y = torch.tensor(digits.target)[order]
    model = trained(x[:900], y[:900])
    results: dict[str, float] = {}

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file(model.state_dict(), folder / "w.safetensors")
        posterior = stochbn.fit(model, [x[:900]])
        posterior.save(folder / "w.sbn.safetensors")
        given: dict[str, Any] = {"model": "drifting_deployment:network", "weights": folder / "w.safetensors"}
        service = Service(Scorer(**given, posterior=folder / "w.sbn.safetensors", monitor=True))
        with serving(service) as url:
            results["as in training"] = served(url, x[900:1220], y[900:1220])
            print(f"20 requests as in training: error {results['as in training']:.1%}, {told(url)}")

            results["drifted"] = served(url, aged(x[1220:1476]), y[1220:1476])
            print(f"16 requests of an old camera: error {results['drifted']:.1%}, {told(url)}")
            results["alarm"] = ask(f"{url}/shift")["alarm"]

            recent = torch.tensor(list(service.recent))  # without labels
            adapted = stochbn.adapt(model, posterior, [recent])
            print(adapted.adaptation)
            adapted.save(folder / "adapted.sbn.safetensors")
            service.scorer = Scorer(**given, posterior=folder / "adapted.sbn.safetensors")
            x, y = aged(x[1476:]), y[1476:]
            results["adapted"] = served(url, x, y)
            print(f"{len(x)} more examples of it, with the adapted posterior: error {results['adapted']:.1%}")

        save_file(adapted.write_to(model).state_dict(), folder / "adapted.safetensors")
        plain = network().eval()
        plain.load_state_dict(load_file(folder / "adapted.safetensors"))
    with torch.no_grad():
        results["written back"] = (plain(x).argmax(1) != y).double().mean().item()
    print(f"The same by a plain network with the adapted statistics: error {results['written back']:.1%}")
    return results


def told(url: str) -> str:
    """What the monitor says."""
    shift = ask(f"{url}/shift")
    return f"{'the alarm sounds' if shift['alarm'] else 'no alarm'}. {shift['latest']['says']}"


if __name__ == "__main__":
    main()
