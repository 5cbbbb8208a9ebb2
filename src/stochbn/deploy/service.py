"""What every service needs, whatever it is made with: limits for requests, and one form of errors."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["BodyLimit", "Limits", "Message", "Receive", "RefusedError", "Scope", "Send"]

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

CODES = {
    400: "malformed",
    404: "not_found",
    405: "method_not_allowed",
    408: "too_slow",
    413: "too_large",
    415: "unsupported",
    422: "invalid",
    503: "overloaded",
    504: "timed_out",
}
"""What errors are called, by their status; all others are ``internal``."""


@dataclass(frozen=True)
class Limits:
    """How large a request to a service may be, and how long it may take.

    Attributes:
        body: bytes of its body.
        items: examples in it, and in a batch that several requests share.
        pixels: pixels of an image in it; see `stochbn.deploy.Scorer`.
        seconds: for its body to arrive, and then again for its answer.
        waiting: examples of all requests that may wait for the network.

    Raises:
        ValueError: a limit is less than 1.
    """

    body: int = 16 * 2**20
    items: int = 64
    pixels: int = 2**22
    seconds: int = 30
    waiting: int = 1024

    def __post_init__(self) -> None:
        for one in fields(self):
            if getattr(self, one.name) < 1:
                raise ValueError(f"the limit of {one.name} must be at least 1, got {getattr(self, one.name)}")

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] = os.environ) -> Limits:
        """The limits, with those that the environment sets: ``STOCHBN_MAX_BODY``, ``STOCHBN_MAX_ITEMS`` and so on.

        Raises:
            ValueError: one is no whole number, or less than 1.

        >>> Limits.from_environment({"STOCHBN_MAX_ITEMS": "8"}).items
        8
        """
        found = {one.name: variables.get(f"STOCHBN_MAX_{one.name.upper()}") for one in fields(cls)}
        for name, text in found.items():
            if text is not None and not text.isdecimal():
                raise ValueError(f"STOCHBN_MAX_{name.upper()} is {text!r}; expected a whole number of at least 1")
        return cls(**{name: int(text) for name, text in found.items() if text is not None})


class RefusedError(Exception):
    """A request that is answered by an error.

    Args:
        status: of HTTP.
        message: what is wrong, and what to do.
        examples: what is wrong with single examples, by their positions in the request.
    """

    def __init__(self, status: int, message: str, examples: Mapping[int, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.examples = status, message, examples or {}

    def content(self) -> dict[str, Any]:
        """The body of the answer, the same for every error.

        >>> RefusedError(422, "one example cannot be read", {3: "is empty"}).content()["error"]["examples"]
        [{'index': 3, 'message': 'is empty'}]
        """
        examples = [{"index": index, "message": message} for index, message in self.examples.items()]
        code = CODES.get(self.status, "internal")
        return {"error": {"code": code, "message": self.message, "examples": examples}}


class BodyLimit:
    """ASGI middleware that reads bodies up to a limit of length and time: it answers 413 and 408 to others.

    It reads no more of a body than the limit, and works for bodies without a Content-Length too. A body is in memory as
    a whole before the application sees it: each request that is being answered takes up to the limit. The application
    does not see a request whose client leaves before its end::

        web.add_middleware(BodyLimit, limit=16 * 2**20)

    Args:
        app: the application.
        limit: bytes.
        seconds: for the whole body to arrive; None waits without an end.
    """

    def __init__(self, app: Application, limit: int, seconds: float | None = None) -> None:
        self.app, self.limit, self.seconds = app, limit, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            if _declared(scope) > self.limit:
                raise self._too_long()
            body = await asyncio.wait_for(self._body(receive), self.seconds)
        except RefusedError as refused:
            await _refuse(send, refused)
            return
        except asyncio.TimeoutError:
            told = f"the body took longer than {self.seconds:g} seconds; send fewer examples at a time"
            await _refuse(send, RefusedError(408, told))
            return
        if body is None:
            return
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> Message:
            return next(messages, None) or await receive()

        await self.app(scope, replay, send)

    async def _body(self, receive: Receive) -> bytes | None:
        """The body, or None if the client has gone.

        Raises:
            RefusedError: it is too long.
        """
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self.limit:
                raise self._too_long()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_long(self) -> RefusedError:
        return RefusedError(413, f"the body is longer than {self.limit} bytes; send fewer examples at a time")


def _declared(scope: Scope) -> int:
    """The Content-Length, or 0 where there is none that can be read: what comes is counted anyway."""
    headers: Sequence[tuple[bytes, bytes]] = scope.get("headers", ())
    found = [value for name, value in headers if name.lower() == b"content-length"]
    return max((int(value) for value in found if value.isdigit()), default=0)


async def _refuse(send: Send, refused: RefusedError) -> None:
    text = json.dumps(refused.content()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(text)).encode()),
               (b"connection", b"close")]  # fmt: skip
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": text})
