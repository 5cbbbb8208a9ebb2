"""Limits for requests to a service, by calls as an ASGI server makes them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import MutableMapping
from typing import Any

import pytest

from stochbn.deploy import BodyLimit, Limits

LIMIT = 1000


class Client:
    """A client that sends a body in pieces, and counts how many of them are taken."""

    def __init__(self, pieces: list[bytes], *, declared: bytes | None = None, disconnects: bool = False) -> None:
        self.pieces, self.taken, self.disconnects = pieces, 0, disconnects
        self.answer: list[MutableMapping[str, Any]] = []
        headers = [] if declared is None else [(b"Content-Length", declared)]
        self.scope: dict[str, Any] = {"type": "http", "headers": headers}
        self.seen: list[Any] = []

    async def receive(self) -> MutableMapping[str, Any]:
        if self.taken == len(self.pieces):
            return {"type": "http.disconnect"}
        self.taken += 1
        more = self.taken < len(self.pieces) or self.disconnects
        return {"type": "http.request", "body": self.pieces[self.taken - 1], "more_body": more}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        self.answer.append(message)

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        """The application: reads the body, and then waits for the client to go."""
        self.seen += [await receive(), await receive()]
        await send({"type": "http.response.start", "status": 200, "headers": []})

    def ask(self) -> int:
        asyncio.run(BodyLimit(self.app, LIMIT)(self.scope, self.receive, self.send))
        return int(self.answer[0]["status"])


@pytest.mark.parametrize("pieces", [[b"x" * LIMIT], [b"x" * 100] * 10, [b""], [b"", b"y", b""], [b"x"] * LIMIT])
def test_a_body_within_the_limit_is_passed_on(pieces: list[bytes]) -> None:
    for declared in (None, str(sum(map(len, pieces))).encode()):
        client = Client(pieces, declared=declared)
        assert client.ask() == 200
        assert client.seen[0] == {"type": "http.request", "body": b"".join(pieces), "more_body": False}
        assert client.seen[1]["type"] == "http.disconnect"


@pytest.mark.parametrize("declared", [None, b"5", b"-5", b"none", b"1001"])
def test_a_longer_body_is_refused_before_more_of_it_is_read(declared: bytes | None) -> None:
    client = Client([b"x" * 100] * 1_000_000, declared=declared)
    assert client.ask() == 413
    assert client.taken <= LIMIT / 100 + 1
    assert not client.seen
    error = json.loads(client.answer[1]["body"])["error"]
    assert error["code"] == "too_large"
    assert "longer than 1000 bytes" in error["message"]


def test_of_a_body_that_says_that_it_is_longer_nothing_is_read() -> None:
    client = Client([b"x"] * 10, declared=b"99999999999999999999")
    assert client.ask() == 413
    assert client.taken == 0


def test_a_client_that_goes_does_not_keep_the_service_waiting() -> None:
    client = Client([b"x" * 10], disconnects=True)
    asyncio.run(asyncio.wait_for(BodyLimit(client.app, LIMIT)(client.scope, client.receive, client.send), 10))
    assert client.taken == 1
    assert not client.seen, "half a request is none"


def test_a_body_that_does_not_come_is_given_up() -> None:
    client = Client([b"x"], disconnects=True)

    async def receive() -> MutableMapping[str, Any]:
        if client.taken:
            await asyncio.sleep(60)
        return await client.receive()

    asyncio.run(BodyLimit(client.app, LIMIT, seconds=0.05)(client.scope, receive, client.send))
    assert client.answer[0]["status"] == 408
    assert json.loads(client.answer[1]["body"])["error"]["code"] == "too_slow"
    assert not client.seen


def test_other_messages_are_passed_on() -> None:
    client = Client([b"x" * 5000])
    client.scope = {"type": "lifespan"}
    assert client.ask() == 200
    assert client.seen[0]["body"] == b"x" * 5000


def test_limits_are_set_by_variables() -> None:
    assert Limits.from_environment({}) == Limits()
    found = Limits.from_environment({"STOCHBN_MAX_BODY": "100", "STOCHBN_MAX_PIXELS": "7", "OTHER": "x"})
    assert found == Limits(body=100, pixels=7)


@pytest.mark.parametrize("text", ["", "-1", "1.5", "many", "0", "1e3"])
def test_limits_that_are_none_are_told(text: str) -> None:
    with pytest.raises(ValueError, match=r"STOCHBN_MAX_ITEMS is|limit of items must be at least 1"):
        Limits.from_environment({"STOCHBN_MAX_ITEMS": text})
