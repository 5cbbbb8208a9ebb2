"""Limits for requests to a service, and a middleware that refuses bodies that are too long."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["BodyLimit", "Limits"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


@dataclass(frozen=True)
class Limits:
    """How large a request to a service may be.

    Attributes:
        body: bytes of its body.
        items: examples in it.
        pixels: pixels of an image in it; see `stochbn.deploy.Scorer`.

    Raises:
        ValueError: a limit is less than 1.
    """

    body: int = 16 * 2**20
    items: int = 64
    pixels: int = 2**22

    def __post_init__(self) -> None:
        for one in fields(self):
            if getattr(self, one.name) < 1:
                raise ValueError(f"the limit of {one.name} must be at least 1, got {getattr(self, one.name)}")

    @classmethod
    def from_environment(cls, variables: Mapping[str, str] = os.environ) -> Limits:
        """The limits, with those that ``STOCHBN_MAX_BODY``, ``STOCHBN_MAX_ITEMS`` and ``STOCHBN_MAX_PIXELS`` set.

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


class BodyLimit:
    """ASGI middleware that answers 413 to a request with a longer body, and reads no more of it than the limit.

    Works for bodies without a Content-Length too. A body is in memory as a whole before the application sees it: each
    request that is being answered takes up to the limit::

        web.add_middleware(BodyLimit, limit=16 * 2**20)

    Args:
        app: the application.
        limit: bytes.
    """

    def __init__(self, app: Application, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = None if _declared(scope) > self.limit else await self._body(receive)
        if body is None:
            await _refuse(send, self.limit)
            return
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> Message:
            return next(messages, None) or await receive()

        await self.app(scope, replay, send)

    async def _body(self, receive: Receive) -> bytes | None:
        """The body, or None if it is too long."""
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > self.limit:
                return None
            if not message.get("more_body", False):  # nor is there more where the client has gone
                return bytes(body)


def _declared(scope: Mapping[str, Any]) -> int:
    """The Content-Length, or 0 where there is none that can be read: what comes is counted anyway."""
    found = [value for name, value in scope.get("headers", ()) if name.lower() == b"content-length"]
    return max((int(value) for value in found if value.isdigit()), default=0)


async def _refuse(send: Send, limit: int) -> None:
    text = f'{{"detail": "the body is longer than {limit} bytes; send fewer examples at a time"}}'.encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(text)).encode()),
               (b"connection", b"close")]  # fmt: skip
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": text})
