from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

uvicorn: Any = pytest.importorskip("uvicorn")

WHOLE = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"


async def answer(scope: Any, receive: Any, send: Any) -> None:
    body = b""
    while (message := await receive())["type"] == "http.request":
        body += message["body"]
        if not message["more_body"]:
            break
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
    await send({"type": "http.response.body", "body": b"%4d" % len(body)})


@pytest.fixture(params=["h11", "httptools"])
def port(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A service whose headers have half a second, with each of uvicorn's two ways to read HTTP."""
    import importlib

    from stochbn.deploy import headers

    name = {"h11": "H11Protocol", "httptools": "HttpToolsProtocol"}[request.param]
    module = pytest.importorskip(f"uvicorn.protocols.http.{request.param}_impl")
    monkeypatch.setattr(
        importlib.import_module("uvicorn.protocols.http.auto"), "AutoHTTPProtocol", getattr(module, name)
    )
    made = importlib.reload(headers).headers_within(0.5)
    config = uvicorn.Config(answer, port=0, http=made, log_level="error", lifespan="off", timeout_keep_alive=60)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


def connected(port: int) -> contextlib.closing[socket.socket]:
    client = socket.create_connection(("127.0.0.1", port), timeout=30)
    return contextlib.closing(client)


def read(client: socket.socket) -> bytes:
    found = b""
    while not found.endswith((b"   0", b"   5")) and (part := client.recv(1000)):
        found += part
    return found


def test_a_head_that_does_not_end_closes_the_connection(port: int) -> None:
    with connected(port) as client:
        client.sendall(WHOLE[:20])
        assert read(client) == b""
    with connected(port) as client:  # nor may it come byte by byte
        for byte in WHOLE[:-1] * 3:
            try:
                client.sendall(bytes([byte]))
            except OSError:
                break
            time.sleep(0.05)
        else:
            pytest.fail("the connection was kept")


def test_whole_requests_are_answered_and_only_the_next_head_has_to_be_fast(port: int) -> None:
    with connected(port) as client:
        for _ in range(2):
            client.sendall(WHOLE)
            assert b"200" in read(client)
            time.sleep(1.0)  # an idle connection is uvicorn's own concern
        client.sendall(WHOLE[:20])
        assert read(client) == b""


def test_a_body_may_take_longer(port: int) -> None:
    with connected(port) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 5\r\n\r\nab")
        time.sleep(1.0)
        client.sendall(b"cde")
        assert read(client).endswith(b"   5")


def test_headers_without_time_are_refused() -> None:
    from stochbn.deploy.headers import headers_within

    with pytest.raises(ValueError, match="need some time"):
        headers_within(0)
