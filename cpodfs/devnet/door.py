"""The way into the market's daemon: it can be away for a while, or not answer for a while.

Imports `rest`. Only the daemon's side is gone then, as with a yagna that is killed and started
anew, or stopped: providers, activities and agreements, which the same process plays, go on.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable

from aiohttp import web
from aiohttp.typedefs import Handler

from cpodfs.devnet.rest import Signal, log

CONTROLS = "/devnet/"
_ANSWER_S = 0.1
"""How long the request that sends the daemon away has to be answered."""


class Door:
    """``forget`` is called while the daemon is away: what it has only in memory."""

    def __init__(self, forget: Callable[[], None]) -> None:
        self._forget = forget
        self._runner: web.AppRunner | None = None
        self._site: web.SockSite | None = None
        self._socket: socket.socket | None = None
        self._frozen_until = 0.0
        self._changed = Signal()
        self._coming_back: asyncio.Task[None] | None = None

    @property
    def is_away(self) -> bool:
        """Whether whatever still comes through an old connection comes too late."""
        return self._site is None

    async def open(self, runner: web.AppRunner, bound: socket.socket) -> None:
        """Accept connections on a bound socket until the runner's cleanup."""
        self._runner, self._socket = runner, bound
        self._site = web.SockSite(runner, bound)
        await self._site.start()

    async def leave(self, away_s: float) -> None:
        """Refuse connections from now on, break off those that there are; back in ``away_s``."""
        if self._site is None or self._coming_back is not None:
            return
        assert self._socket is not None
        address = self._socket.getsockname()
        await self._site.stop()
        self._site = None
        # Bound and not listening: connections are refused, and nobody else gets the port.
        kept = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(address)
        log.warning("daemon_away seconds=%g", away_s)
        self._coming_back = asyncio.create_task(self._come_back(kept, away_s))

    async def _come_back(self, kept: socket.socket, away_s: float) -> None:
        try:
            await asyncio.sleep(min(_ANSWER_S, away_s))
            self._forget()
            assert self._runner is not None
            assert self._runner.server is not None
            for connection in self._runner.server.connections:
                if connection.transport is not None:
                    connection.transport.abort()
            await asyncio.sleep(max(0.0, away_s - _ANSWER_S))
            await self.open(self._runner, kept)
            log.warning("daemon_back")
        except BaseException:
            kept.close()
            raise
        finally:
            self._coming_back = None

    async def close(self) -> None:
        """Do not come back."""
        if self._coming_back is not None:
            self._coming_back.cancel()
            await asyncio.wait([self._coming_back])

    def freeze(self, seconds: float) -> None:
        """Answer nothing for so long; 0: answer again."""
        self._frozen_until = time.monotonic() + seconds
        self._changed.fire()

    async def thawed(self) -> None:
        """Wait until it is answered again."""
        while (left_s := self._frozen_until - time.monotonic()) > 0:
            await self._changed.until(lambda: time.monotonic() >= self._frozen_until, left_s)


DOOR: web.AppKey[Door] = web.AppKey("door")


@web.middleware
async def hold(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Neither begin nor answer a request while the daemon is frozen; its controls work."""
    if request.path.startswith(CONTROLS):
        return await handler(request)
    door = request.app[DOOR]
    if door.is_away and request.transport is not None:
        request.transport.abort()
        raise ConnectionResetError
    await door.thawed()
    try:
        return await handler(request)
    finally:
        await door.thawed()
