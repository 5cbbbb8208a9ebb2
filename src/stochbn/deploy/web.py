"""A service that answers requests with predictions, by FastAPI: alone (uvicorn), or in Ray Serve.

A request is read and preprocessed in a thread of its own, waits for the network in `stochbn.deploy.batching`, and goes
through it with the others that wait. `stochbn.deploy.service` limits it, `stochbn.deploy.telemetry` counts it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib
import io
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from stochbn.deploy.batching import Batcher, FullError, Row
from stochbn.deploy.scorer import Scorer
from stochbn.deploy.service import BodyLimit, Limits, Receive, RefusedError, Scope, Send
from stochbn.deploy.telemetry import Telemetry, prometheus
from stochbn.files import finite
from stochbn.sources.pictures import Preprocessing
from stochbn.tasks.boxes import Placement

try:
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException
except ImportError as error:
    raise ImportError(f"stochbn.deploy.web needs FastAPI ({error}): pip install 'stochbn[serve]'") from error

__all__ = ["application"]

log = logging.getLogger("stochbn.deploy")

PREDICT = "/predict"
READERS = 4
"""Threads that read requests. Decoding pictures and JSON takes turns with the network for the processor."""
PICTURE = (64, 64)
"""Height and width of the picture that a network's own `preprocess` is warmed up with."""
NOT_NUMBERS = (
    '. Numbers go through the network\'s preprocess too: send pictures as {"base64": ...} or {"pixels": [H][W][C]}'
)
EXAMPLE = {
    "description": 'Numbers, or a picture as {"base64": "..."} or as {"pixels": [H][W][C]} with numbers from 0 to 255',
}
BODIES = {
    "application/json": {
        "schema": {
            "type": "object",
            "required": ["inputs"],
            "additionalProperties": False,
            "properties": {"inputs": {"type": "array", "items": EXAMPLE}},
        }
    },
    "multipart/form-data": {
        "schema": {"type": "object", "additionalProperties": {"type": "string", "format": "binary"}}
    },
    "image/*": {"schema": {"type": "string", "format": "binary"}},
}
ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message", "examples"],
            "properties": {
                "code": {"type": "string"},
                "message": {"type": "string"},
                "examples": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"index": {"type": "integer"}, "message": {"type": "string"}},
                    },
                },
            },
        }
    },
}


def application(
    scorer: Mapping[str, Any],
    limits: Limits | None = None,
    *,
    example: Any = None,
    telemetry: Telemetry | None = None,
) -> FastAPI:
    """A service about one network.

    ``POST /predict`` takes examples: JSON ``{"inputs": [...]}``, pictures as files of a form, or one picture as the
    body. It answers ``{"predictions": [...]}``, in the columns of ``stochbn predict``, if it can predict all of them,
    and an error otherwise. ``GET /healthz`` answers 200 once the network is loaded and warm, ``GET /metrics`` is for
    Prometheus and ``GET /shift`` tells what a scorer made with ``monitor=True`` has seen.

    Args:
        scorer: arguments of `stochbn.deploy.Scorer`. The network is loaded when the service starts.
        limits: for requests; None is `Limits()`.
        example: one example, as in a request, to warm up with. None makes one: by the columns or the size of pictures
            that the posterior was fitted with, or a picture for the network's own `preprocess`.
        telemetry: where metrics go; None is `prometheus()`.

    Raises:
        ImportError: FastAPI, prometheus_client or python-multipart is not installed.
        ValueError: when it starts: the network cannot be loaded, or it does not take the example.
    """
    importlib.import_module("python_multipart")  # Starlette needs it for forms, and would say so in a request only
    service = _Service(scorer, limits or Limits(), example, telemetry or prometheus())
    web = FastAPI(title="stochbn", lifespan=service.running)
    failed = {"description": "Every error", "content": {"application/json": {"schema": ERROR}}}
    about: dict[str, Any] = {"responses": {"4XX": failed, "5XX": failed}}
    body = {"requestBody": {"required": True, "content": BODIES}}
    web.add_api_route(PREDICT, service.predict, methods=["POST"], openapi_extra=body, **about)
    web.add_api_route("/healthz", service.healthz, methods=["GET"], **about)
    web.add_api_route("/shift", service.shift, methods=["GET"], **about)
    if service.telemetry.page is not None:
        web.add_api_route("/metrics", service.metrics, methods=["GET"])
    web.add_exception_handler(RefusedError, _refused)
    web.add_exception_handler(HTTPException, _http_error)
    web.add_exception_handler(Exception, _internal_error)
    web.add_middleware(BodyLimit, limit=service.limits.body, seconds=service.limits.seconds)
    web.add_middleware(_Measured, telemetry=service.telemetry)
    return web


class _Measured:
    """ASGI middleware that counts answered requests for predictions, and their time."""

    def __init__(self, app: Any, telemetry: Telemetry) -> None:
        self.app, self.telemetry = app, telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http" or not scope["path"].endswith(PREDICT):
            await self.app(scope, receive, send)
            return
        start, answered = time.perf_counter(), [500]

        async def told(message: Any) -> None:
            if message["type"] == "http.response.start":
                answered[0] = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, told)
        finally:
            self.telemetry.request(answered[0], time.perf_counter() - start)


class _Service:
    """The routes, and what they share once the service has started."""

    def __init__(self, scorer: Mapping[str, Any], limits: Limits, example: Any, telemetry: Telemetry) -> None:
        self.arguments, self.limits, self.example, self.telemetry = scorer, limits, example, telemetry
        self.scorer: Scorer | None = None

    @contextlib.asynccontextmanager
    async def running(self, web: FastAPI) -> AsyncIterator[None]:
        """Load and warm up; at the end, answer what waits."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(READERS, "stochbn-reading") as self.readers:
            scorer = await loop.run_in_executor(
                self.readers, lambda: Scorer(**{"pixels": self.limits.pixels, **self.arguments})
            )
            if scorer.by is not None:
                raise ValueError(
                    f"the posterior's prediction sets are by {scorer.by!r}, and a request has no groups: make the sets "
                    "again without --by, or call stochbn.deploy.Scorer with that column"
                )
            inputs = await loop.run_in_executor(self.readers, _warm_inputs, scorer, self.example)
            together = await loop.run_in_executor(self.readers, scorer.predictive.mixed, inputs.repeat_interleave(2, 0))
            if together:
                log.warning("every request goes through the network by itself: %s", together)
            self.batcher = Batcher(self._predicted, self.limits.items, self.limits.waiting, not together)
            try:
                await self._warm_up(scorer, inputs, not together)
                yield
            finally:
                self.scorer = None
                await asyncio.to_thread(self.batcher.close)

    async def _warm_up(self, scorer: Scorer, inputs: Tensor, together: bool) -> None:
        """Predict batches of some sizes, in the thread that will; the monitor does not see them."""
        monitor, scorer.monitor = scorer.monitor, None
        self._loaded = scorer
        sizes = (1, 1, 2, 4, 8, 16, self.limits.items) if together else (1, 1)
        try:
            for size in sizes:
                if size <= self.limits.items:
                    await self.batcher(inputs.expand(size, *inputs.shape[1:]).clone())
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"the network does not take the example to warm up with, {list(inputs.shape[1:])}: {error}; pass "
                "another one as example="
            ) from error
        scorer.monitor = monitor
        self.scorer = scorer

    def _predicted(self, inputs: Tensor, placements: Sequence[Placement | None]) -> Sequence[Row]:
        """The rows of a batch; called by the batcher's thread alone."""
        scorer = self._loaded
        start, before = time.perf_counter(), scorer.drawn
        rows = scorer.predict(inputs, placements)
        if self.scorer is not None:
            self.telemetry.batch(len(rows), time.perf_counter() - start, (scorer.drawn - before) / len(rows))
            if scorer.monitor is not None:
                told = scorer.shift()
                self.telemetry.shift(told["alarm"], told["evidence"])
        return rows

    def _ready(self) -> Scorer:
        if self.scorer is None:
            raise RefusedError(503, "the network is not loaded yet, or no more: ask /healthz")
        return self.scorer

    async def predict(self, request: Request) -> Response:
        """Class, probability and uncertainties of every example."""
        scorer = self._ready()
        try:
            return await asyncio.wait_for(self._answer(scorer, request), self.limits.seconds)
        except asyncio.TimeoutError:
            raise RefusedError(504, f"there is no answer after {self.limits.seconds} seconds; send less") from None

    async def _answer(self, scorer: Scorer, request: Request) -> Response:
        loop = asyncio.get_running_loop()
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "multipart/form-data":
            objects = await self._files(request)
        elif kind.startswith("image/"):
            objects = [await request.body()]
        elif kind in ("application/json", ""):
            objects = await loop.run_in_executor(self.readers, _parsed, await request.body())
        else:
            raise RefusedError(415, f"got {kind!r:.60}; send JSON, pictures in a form, or one picture")
        if len(objects) > self.limits.items:
            raise RefusedError(413, f"got {len(objects)} examples, at most {self.limits.items} are taken at a time")
        chunk = await loop.run_in_executor(self.readers, scorer.read, objects)
        plain = bool(scorer.prepared_by) and any(isinstance(one, list) for one in objects)
        _refuse_errors(chunk.errors, NOT_NUMBERS if plain else "")
        if chunk.inputs is None:
            return JSONResponse({"predictions": []})
        try:
            rows = await self.batcher(chunk.inputs, chunk.placements)
        except FullError as error:
            raise RefusedError(503, f"{error}; ask again later") from error
        except torch.OutOfMemoryError as error:
            raise RefusedError(503, "there is too little memory for so many examples; send fewer at a time") from error
        except (RuntimeError, TypeError, ValueError) as error:
            raise RefusedError(422, f"the network does not take these examples: {error}") from error
        _refuse_errors([row["error"] for row in rows])
        return JSONResponse({"predictions": [{k: finite(v) for k, v in row.items() if k != "error"} for row in rows]})

    async def _files(self, request: Request) -> list[Any]:
        async with request.form() as form:
            values = [value for _, value in form.multi_items()]
            if any(isinstance(value, str) for value in values):
                raise RefusedError(400, "the form has a field that is no file; send every picture as a file")
            return [await value.read() for value in values if not isinstance(value, str)]

    async def healthz(self) -> dict[str, str]:
        """Whether the network is loaded and warm."""
        self._ready()
        return {"status": "ok"}

    async def shift(self) -> dict[str, Any]:
        """Whether the examples are still like the training data, and whether the alarm sounds."""
        try:
            return self._ready().shift()
        except ValueError as error:
            raise RefusedError(404, str(error)) from error

    async def metrics(self) -> Response:
        """What Prometheus reads."""
        assert self.telemetry.page is not None
        text, kind = self.telemetry.page()
        return Response(text, media_type=kind)


def _parsed(body: bytes) -> list[Any]:
    """The examples of a JSON body.

    Raises:
        RefusedError: it has another form.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"the body is no JSON: {error}") from error
    if not isinstance(content, dict) or list(content) != ["inputs"] or not isinstance(content["inputs"], list):
        raise RefusedError(400, 'expected {"inputs": [EXAMPLE, ...]} and nothing else')
    return content["inputs"]


def _refuse_errors(errors: Sequence[str | None], advice: str = "") -> None:
    """Refuse a request with examples that cannot be predicted.

    Raises:
        RefusedError: there are some.
    """
    wrong = {index: error for index, error in enumerate(errors) if error is not None}
    if wrong:
        index = next(iter(wrong))
        told = f"{len(wrong)} of {len(errors)} examples cannot be predicted; the first is number {index}, which"
        raise RefusedError(422, f"{told} {wrong[index]}{advice}", wrong)


def _warm_inputs(scorer: Scorer, example: Any) -> Tensor:
    """One example as the network takes it, ``[1, ...]``.

    Raises:
        ValueError: none is known, or it cannot be read.
    """
    if example is None:
        example = _made_up(scorer)
    chunk = scorer.read([example])
    if chunk.inputs is None:
        raise ValueError(f"the example to warm up with {chunk.errors[0]}; pass another one as example=")
    inputs: Tensor = chunk.inputs
    return inputs


def _made_up(scorer: Scorer) -> Any:
    """An example of no content that has the form of a real one, as far as that is known.

    Raises:
        ValueError: it is not.
    """
    from PIL import Image

    if scorer.schema.kind == "rows" and len(scorer.schema.inputs) > 1:
        return [0.0] * len(scorer.schema.inputs)
    size = scorer.preprocess.size if isinstance(scorer.preprocess, Preprocessing) else None
    if size is None and not scorer.prepared_by:
        first = next((module for module in scorer.predictive.model.modules() if list(module.parameters(False))), None)
        if isinstance(first, nn.Linear):
            return [0.0] * first.in_features
        raise ValueError("what an example looks like is not known: pass one as example=, as in a request")
    height, width = size or PICTURE
    file = io.BytesIO()
    Image.new("RGB", (width, height), (127, 127, 127)).save(file, "PNG")
    return {"base64": base64.b64encode(file.getvalue()).decode()}


async def _refused(request: Request, error: Any) -> Response:
    headers = {"retry-after": "1"} if error.status == 503 else None
    return JSONResponse(error.content(), error.status, headers)


async def _http_error(request: Request, error: Any) -> Response:
    return JSONResponse(RefusedError(error.status_code, str(error.detail)).content(), error.status_code, error.headers)


async def _internal_error(request: Request, error: Exception) -> Response:
    return JSONResponse(RefusedError(500, "the service failed; its log says why").content(), 500)
