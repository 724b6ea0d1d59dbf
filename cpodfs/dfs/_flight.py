"""One execution for many tasks that want the same thing at the same time (trio).

Imports nothing of ours. A leader that is cancelled does not take the others with it: one of
them becomes the next leader.
"""

from __future__ import annotations

import copy
from collections.abc import Awaitable, Callable, Hashable

import trio


class _Flight:
    def __init__(self) -> None:
        self.landed = trio.Event()
        self.error: Exception | None = None
        self.abandoned = False


class SingleFlight:
    """Invariant: a key is in ``_flights`` exactly while its leader is inside ``work``."""

    def __init__(self) -> None:
        self._flights: dict[Hashable, _Flight] = {}

    async def do(self, key: Hashable, work: Callable[[], Awaitable[None]]) -> None:
        """Run ``work``, or wait for the one under way; its exception is raised in every waiter."""
        while (flight := self._flights.get(key)) is not None:
            await flight.landed.wait()
            if flight.abandoned:
                continue
            if flight.error is not None:
                # A copy, as one exception raised in two tasks would mix their tracebacks.
                raise copy.copy(flight.error)
            return
        await self._lead(key, work)

    async def _lead(self, key: Hashable, work: Callable[[], Awaitable[None]]) -> None:
        flight = self._flights[key] = _Flight()
        flight.abandoned = True
        try:
            await work()
            flight.abandoned = False
        except Exception as exc:
            flight.error = exc
            flight.abandoned = False
            raise
        finally:
            del self._flights[key]
            flight.landed.set()
