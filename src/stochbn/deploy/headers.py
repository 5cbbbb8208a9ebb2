"""A limit on how long the headers of a request may take to arrive, for uvicorn, which has none of its own."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

__all__ = ["headers_within"]


def headers_within(seconds: float) -> type[asyncio.Protocol]:
    """The protocol for ``uvicorn.run(application, http=...)`` that closes connections whose headers come too slowly.

    The time begins with the connection, and after an answer with the first byte of the next request. It ends when the
    request line and all headers are there; the body has a limit of its own, see `stochbn.deploy.Limits`.

    Args:
        seconds: for the headers of a request, more than 0.

    Raises:
        ValueError: `seconds` is not above 0.
    """
    if not seconds > 0:
        raise ValueError(f"headers need some time to arrive, got {seconds} seconds")

    class TimedHeaders(AutoHTTPProtocol):  # type: ignore[valid-type,misc]  # one of two classes, by what is installed
        _clock: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._start()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop()
            elif self._clock is None:
                self._start()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def _start(self) -> None:
            self._clock = asyncio.get_running_loop().call_later(seconds, self._close)

        def _stop(self) -> None:
            if self._clock is not None:
                self._clock.cancel()
            self._clock = None

        def _close(self) -> None:
            self.transport.close()

    return TimedHeaders
