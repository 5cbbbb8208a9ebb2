"""`stochbn.deploy.application`: requests of every kind, right and wrong, in the process of the test."""

from __future__ import annotations

import asyncio
import base64
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

import stochbn
from conftest import normal
from stochbn.deploy import Limits, Scorer, application
from stochbn.sources import build

MODULE = """
import time
import numpy as np
import torch
from torch import nn

classes = ["bird", "cat", "dog"]
calls = []

class Counted(nn.Sequential):
    def forward(self, x):
        calls.append(len(x))
        return super().forward(x)

def rows():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))

def counted():
    return Counted(*rows())

class Slow(nn.Sequential):
    def forward(self, x):
        if bool((x > 100).any()):
            time.sleep(0.08)
        return super().forward(x)

def slow():
    return Slow(*rows())

class Together(nn.Sequential):
    # examples affect each other
    def forward(self, x):
        return super().forward(x - x.mean(0))

def together():
    return Together(*rows())

class Full(nn.Sequential):
    def forward(self, x):
        if bool((x > 100).any()):
            raise torch.OutOfMemoryError("no memory")
        if bool((x > 10).any()):
            raise KeyError("a fault of the network")
        return super().forward(x)

def full():
    return Full(*rows())
"""
PICTURES = """
import numpy as np
import torch
from torch import nn

classes = ["bird", "cat", "dog"]

def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    return nn.Sequential(*layers)

def preprocess(image):
    pixels = np.asarray(image.convert("RGB").resize((12, 12)), "float32") / 255
    return torch.from_numpy(pixels).permute(2, 0, 1) * 3
"""
FILES = {"weights": None, "posterior": "rows.sbn.safetensors"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with networks and posteriors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name, text in (("webbed", MODULE), ("webbed_pictures", PICTURES)):
        Path(f"{name}.py").write_text(text)
        sys.modules.pop(name, None)
    model = build("webbed:rows", {}).model.train()
    for seed in range(60):
        model(normal(96, 4, seed=seed))
    torch.save(model.state_dict(), "rows.pt")
    stochbn.fit(model.eval(), [normal(96, 4)], 16, reference=[normal(512, 4, seed=99)]).save("rows.sbn.safetensors")
    pictures = build("webbed_pictures:network", {}).model
    stochbn.fit(pictures, [torch.rand(96, 3, 12, 12)], 16, reference=[torch.rand(64, 3, 12, 12)]).save("p.safetensors")


def rows(model: str = "rows", **more: Any) -> dict[str, Any]:
    given = {"model": f"webbed:{model}", "weights": "rows.pt", "posterior": "rows.sbn.safetensors"}
    return {**given, "draws": 16, "tolerance": 0, **more}


PICTURE_SCORER = {"model": "webbed_pictures:network", "posterior": "p.safetensors", "draws": 8, "tolerance": 0}


@contextmanager
def client(scorer: dict[str, Any], **options: Any) -> Iterator[TestClient]:
    with TestClient(application(scorer, **options), raise_server_exceptions=False) as found:
        yield found


def png(seed: int = 0, size: tuple[int, int] = (20, 30)) -> bytes:
    file = io.BytesIO()
    values = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    Image.fromarray(values.to(torch.uint8).numpy()).save(file, "PNG")
    return file.getvalue()


def pixels(encoded: bytes) -> list[Any]:
    image = Image.open(io.BytesIO(encoded))
    found: list[Any] = np.asarray(image).tolist()
    return found


def check_error(answer: Any, status: int, code: str, message: str) -> dict[str, Any]:
    """An error has the same form, whatever is wrong."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    content = answer.json()
    assert list(content) == ["error"]
    error: dict[str, Any] = content["error"]
    assert list(error) == ["code", "message", "examples"]
    assert error["code"] == code
    assert message in error["message"]
    return error


def values(text: str) -> dict[str, float]:
    """The metrics of a page."""
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def test_answers_are_those_of_a_scorer() -> None:
    x = normal(5, 4).tolist()
    with client(rows()) as web:
        assert web.get("/healthz").json() == {"status": "ok"}
        found = web.post("/predict", json={"inputs": x}).json()["predictions"]
        assert web.post("/predict", json={"inputs": []}).json() == {"predictions": []}
    expected = Scorer(**rows()).answer(x)
    assert [list(row) for row in found] == [["class", "probability", "entropy", "mutual_information"]] * 5
    for row, other in zip(found, expected, strict=True):
        assert row["class"] == other["class"]
        assert row["mutual_information"] == pytest.approx(other["mutual_information"], abs=1e-6)


def test_pictures_in_every_form_are_preprocessed_alike() -> None:
    """The network sees what its module's preprocess makes of a picture, and the answer is that of the slow way."""
    one, two = png(1), png(2, (9, 40))
    with client(PICTURE_SCORER) as web:
        form = web.post("/predict", files=[("a", ("1.png", one)), ("b", ("2.png", two))]).json()["predictions"]
        encoded = [{"base64": base64.b64encode(image).decode()} for image in (one, two)]
        assert web.post("/predict", json={"inputs": encoded}).json()["predictions"] == form
        arrays = [{"pixels": pixels(image)} for image in (one, two)]
        assert web.post("/predict", json={"inputs": arrays}).json()["predictions"] == form
        body = web.post("/predict", content=two, headers={"content-type": "image/png"}).json()["predictions"]
    assert body[0]["class"] == form[1]["class"]
    assert body[0]["probability"] == pytest.approx(form[1]["probability"], abs=1e-6)
    built = build("webbed_pictures:network", {})
    assert built.preprocess is not None
    batch = torch.stack([built.preprocess(Image.open(io.BytesIO(image))) for image in (one, two)])
    predictive = stochbn.Predictive(built.model, stochbn.load("p.safetensors"), 8, tolerance=0)
    probs = predictive(batch, generator=torch.Generator().manual_seed(0)).probs
    assert [row["probability"] for row in form] == pytest.approx(probs.amax(1).tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("body", "kind", "status", "code", "message"),
    [
        (b"{", "application/json", 400, "malformed", "the body is no JSON"),
        (b"\xff\xfe{", "application/json", 400, "malformed", "the body is no JSON"),
        (b"[" * 100_000, "application/json", 400, "malformed", "the body is no JSON"),
        (b"1" * 5000, "application/json", 400, "malformed", "the body is no JSON"),
        (b"[]", "application/json", 400, "malformed", "expected"),
        (b'{"inputs": "/etc/passwd"}', "application/json", 400, "malformed", "expected"),
        (b'{"inputs": [], "more": 1}', "application/json", 400, "malformed", "and nothing else"),
        (b"a=1", "application/x-www-form-urlencoded", 415, "unsupported", "send JSON"),
        (b"none", "multipart/form-data; boundary=x", 400, "malformed", ""),
        (b"none", "multipart/form-data", 400, "malformed", ""),
        (b"none", "image/png", 422, "invalid", "cannot be read as an image"),
        (b'{"inputs": [[1, 2, 3]]}', "application/json", 422, "invalid", "does not take"),
        (b'{"inputs": [[NaN, 1, 2, 3]]}', "application/json", 422, "invalid", "holds NaN"),
        (b'{"inputs": ["/etc/passwd"]}', "application/json", 422, "invalid", "no text is opened as a file"),
        (b'{"inputs": [{"path": "/etc/passwd"}]}', "application/json", 422, "invalid", "no file is opened"),
        (b'{"inputs": [{"pixels": [[[1, 2]]]}]}', "application/json", 422, "invalid", "expected [H, W, C]"),
        (b'{"inputs": [{"pixels": [[[1, 2, 256]]]}]}', "application/json", 422, "invalid", "whole numbers"),
        (b'{"inputs": [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]}', "application/json", 413, "too_large", "at most 2"),
        (b" " * 3000, "application/json", 413, "too_large", "longer than 2000 bytes"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(body: bytes, kind: str, status: int, code: str, message: str) -> None:
    limit = 200_000 if len(body) > 4000 else 2000
    with client(rows(), limits=Limits(items=2, body=limit)) as web:
        check_error(web.post("/predict", content=body, headers={"content-type": kind}), status, code, message)
        assert web.post("/predict", json={"inputs": [[0, 0, 0, 0]]}).status_code == 200


def test_other_errors_have_the_same_form() -> None:
    with client(rows()) as web:
        check_error(web.get("/predict"), 405, "method_not_allowed", "")
        check_error(web.get("/none"), 404, "not_found", "")
        check_error(web.get("/shift"), 404, "not_found", "monitor=True")
        error = check_error(web.post("/predict", data={"a": "b"}, files={"c": b"d"}), 400, "malformed", "no file")
        assert error["examples"] == []
    with client(rows("full")) as web:
        check_error(web.post("/predict", json={"inputs": [[200.0, 0, 0, 0]]}), 503, "overloaded", "memory")
        check_error(web.post("/predict", json={"inputs": [[20.0, 0, 0, 0]]}), 500, "internal", "its log says why")


def test_wrong_examples_are_named_and_none_is_predicted() -> None:
    with client(rows()) as web:
        wrong = [[0.0] * 4, [0.0] * 5, [0.0] * 4, "text"]
        error = check_error(web.post("/predict", json={"inputs": wrong}), 422, "invalid", "2 of 4 examples")
        assert [one["index"] for one in error["examples"]] == [1, 3]
        assert values(web.get("/metrics").text)["stochbn_examples_total"] == 0


def test_numbers_for_a_preprocess_of_pictures_are_told_what_to_send() -> None:
    with client(PICTURE_SCORER) as web:
        check_error(web.post("/predict", json={"inputs": [[0.5] * 4]}), 422, "invalid", "send pictures as")


@pytest.mark.parametrize("form", ["base64", "pixels"])
def test_pictures_of_too_many_pixels_are_refused(form: str) -> None:
    image = png(size=(20, 30))
    sent = {"base64": base64.b64encode(image).decode()} if form == "base64" else {"pixels": pixels(image)}
    with client(PICTURE_SCORER, limits=Limits(pixels=599), example={"pixels": [[[0, 0, 0]]]}) as web:
        check_error(web.post("/predict", json={"inputs": [sent]}), 422, "invalid", "600 pixels, where at most 599")


def test_an_answer_that_takes_too_long_is_given_up() -> None:
    with client(rows("slow"), limits=Limits(seconds=1)) as web:
        answer = web.post("/predict", json={"inputs": [[200.0, 0, 0, 0]]})
        check_error(answer, 504, "timed_out", "no answer after 1 seconds")
        assert web.post("/predict", json={"inputs": [[0.0, 0, 0, 0]]}).status_code == 200


def test_the_network_is_warm_before_the_service_is_ready() -> None:
    web = application(rows("counted"))
    check_error(TestClient(web).get("/healthz"), 503, "overloaded", "not loaded yet")
    with TestClient(web) as ready:
        assert ready.get("/healthz").status_code == 200
        assert len(sys.modules["webbed"].calls) > 20
        found = values(ready.get("/metrics").text)
        assert found["stochbn_examples_total"] == found["stochbn_batch_seconds_count"] == 0
    check_error(TestClient(web).get("/healthz"), 503, "overloaded", "or no more")


@pytest.mark.parametrize(
    ("scorer", "example", "message"),
    [
        (rows(), [1.0, 2.0], "does not take the example to warm up with"),
        (rows(), "text", "the example to warm up with holds what is no number"),
        (rows(model="none"), None, "has no 'none'"),
        (rows(posterior="missing"), None, "missing"),
    ],
)
def test_a_service_that_could_not_answer_does_not_start(scorer: dict[str, Any], example: Any, message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message), client(scorer, example=example):
        pass


def test_a_network_of_which_no_example_can_be_made_up_asks_for_one() -> None:
    Path("unknown.py").write_text(PICTURES.replace("def preprocess", "def other"))
    scorer = PICTURE_SCORER | {"model": "unknown:network"}
    with pytest.raises(ValueError, match="pass one as example="), client(scorer):
        pass
    with client(scorer, example={"pixels": [[[0, 0, 0]] * 8] * 8}) as web:
        assert web.post("/predict", content=png(), headers={"content-type": "image/png"}).status_code == 200


def asked(web: FastAPI, requests: list[Any]) -> list[tuple[int, Any]]:
    """Status and content of the answers to requests that come at the same time."""

    async def ask() -> list[tuple[int, Any]]:
        async with web.router.lifespan_context(web):
            transport = httpx.ASGITransport(web, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as http:
                answers = await asyncio.gather(*(http.post("/predict", json={"inputs": one}) for one in requests))
                page = await http.get("/metrics")
                metrics.update(values(page.text))
        return [(answer.status_code, answer.json()) for answer in answers]

    metrics: dict[str, float] = {}
    found = asyncio.run(ask())
    return [*found, (0, metrics)]


def test_two_hundred_requests_at_a_time_get_what_each_alone_would() -> None:
    x = normal(400, 4)
    requests: list[Any] = [x[i : i + 1 + i % 5].tolist() for i in range(200)]
    requests[7], requests[50] = [[1.0]], [[None, 0, 0, 0]]
    scorer = Scorer(**rows())
    *found, (_, metrics) = asked(application(rows(), Limits(waiting=10_000)), requests)
    assert [status for status, _ in found].count(200) == 198
    for number, (inputs, (status, content)) in enumerate(zip(requests, found, strict=True)):
        if number in (7, 50):
            assert status == 422
            continue
        for row, other in zip(content["predictions"], scorer.answer(inputs), strict=True):
            assert row["class"] == other["class"]
            assert row["entropy"] == pytest.approx(other["entropy"], abs=1e-5)
    assert metrics['stochbn_requests_total{status="200"}'] == 198
    assert metrics['stochbn_requests_total{status="422"}'] == 2
    assert metrics["stochbn_request_seconds_count"] == 200
    assert metrics["stochbn_batch_seconds_count"] < 100, "requests share batches"
    assert metrics["stochbn_draws_sum"] == 16 * metrics["stochbn_draws_count"]


def test_requests_beyond_those_that_may_wait_are_told_to_come_again() -> None:
    scorer = rows("slow", draws=4)  # a third of a second for each request
    *found, (_, metrics) = asked(application(scorer, Limits(waiting=3, items=1)), [[[200.0, 0, 0, 0]]] * 20)
    statuses = [status for status, _ in found]
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= 3  # one more if the first is taken before the others come
    assert metrics["stochbn_examples_total"] == statuses.count(200)
    assert {content["error"]["code"] for status, content in found if status == 503} == {"overloaded"}


def test_examples_that_affect_each_other_share_no_batch() -> None:
    scorer = Scorer(**rows("together"))
    x = normal(60, 4)
    requests = [x[i : i + 3].tolist() for i in range(0, 60, 3)]
    *found, (_, metrics) = asked(application(rows("together")), requests)
    for inputs, (status, content) in zip(requests, found, strict=True):
        assert status == 200
        for row, other in zip(content["predictions"], scorer.answer(inputs), strict=True):
            assert row["entropy"] == pytest.approx(other["entropy"], abs=1e-5)
    assert metrics["stochbn_batch_seconds_count"] == len(requests)


def test_metrics_have_the_alarm_once_data_shifts() -> None:
    with client(rows(monitor=True)) as web:
        assert web.get("/shift").json()["batches"] == 0
        web.post("/predict", json={"inputs": normal(32, 4, seed=3).tolist()})
        assert values(web.get("/metrics").text)["stochbn_shift_alarm"] == 0
        for seed in range(12):
            web.post("/predict", json={"inputs": (3 * normal(16, 4, seed=seed) + 2).tolist()})
        found = values(web.get("/metrics").text)
        assert found["stochbn_shift_alarm"] == 1
        assert found["stochbn_shift_evidence"] > 0
        assert web.get("/shift").json()["alarm"]


def test_the_interface_is_described() -> None:
    with client(rows()) as web:
        about = web.get("/openapi.json").json()["paths"]["/predict"]["post"]
    assert set(about["requestBody"]["content"]) == {"application/json", "multipart/form-data", "image/*"}
    assert "error" in about["responses"]["4XX"]["content"]["application/json"]["schema"]["properties"]
