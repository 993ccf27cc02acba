"""Connections of a scorer server: few at once, none that is silent for long, so that strangers cannot keep callers out."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    from fastapi import FastAPI

MAX_CONNECTIONS = 64  # at once; a further one takes the place of the one that has been silent longest
SILENCE = 10.0  # s that a connection may take to send the head of a request


class BoundedConnection(H11Protocol):
    """A connection that is closed where it sends no whole head of a request within SILENCE, or where its place is needed.

    A connection is idle while no request of it is being answered. Only idle ones give way; where all are busy, a further
    request is answered with 503.
    """

    idle_since = 0.0  # s on the loop's clock
    silence_check: asyncio.TimerHandle | None = None

    @property
    def is_idle(self) -> bool:
        """Return whether no request of this connection is being answered."""
        return not self.transport.is_closing() and (not self.cycle or self.cycle.response_complete)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a place; where there is none, the connection that has been idle longest is closed."""
        connections: list[Any] = list(self.connections)
        idle: list[BoundedConnection] = [c for c in connections if isinstance(c, BoundedConnection) and c.is_idle]
        if idle and len(connections) >= MAX_CONNECTIONS:
            min(idle, key=lambda connection: connection.idle_since).transport.abort()
        super().connection_made(transport)
        self.idle_since = self.loop.time()
        self._close_if_silent()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let the next check go with the connection: a waiting one keeps the connection and its unread bytes in memory."""
        if self.silence_check is not None:
            self.silence_check.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Count the silence from the end of an answer."""
        self.idle_since = self.loop.time()
        super().on_response_complete()

    def _close_if_silent(self) -> None:
        """Close the connection where it has been idle for SILENCE; else look again when it could have been."""
        if self.transport.is_closing():
            return
        left = SILENCE - (self.loop.time() - self.idle_since) if self.is_idle else SILENCE
        if left <= 0:
            self.transport.abort()
        else:
            self.silence_check = self.loop.call_later(left, self._close_if_silent)


def bounded_server(app: FastAPI, log_level: str = "warning") -> uvicorn.Server:
    """Return a web server for an application, with bounded connections; it installs no signal handlers of its own accord."""
    config = uvicorn.Config(
        app,
        http=BoundedConnection,
        ws="none",
        log_level=log_level,
        access_log=False,
        limit_concurrency=MAX_CONNECTIONS + 1,  # one place is being given up while its successor begins
        timeout_graceful_shutdown=5,
    )
    return uvicorn.Server(config)
