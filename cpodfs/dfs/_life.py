"""Waiting for an answer that takes minutes, but only from a server that is alive.

Imports nothing of ours. A frozen server, or a line that has silently gone, looks like a slow answer:
so another, cheap question is asked beside it now and then.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

_T = TypeVar("_T")
UNASKED = 1 / 6
"""The share of the time allowed for silence in which nothing is asked."""


class Silent(Exception):
    """The server answers nothing at all any more."""


async def while_alive(
    work: Callable[[], Awaitable[_T]],
    is_alive: Callable[[float], Awaitable[bool]],
    silence_s: float,
) -> _T:
    """What ``work`` returns or raises. Raises Silent when ``is_alive(seconds)``, which gets so long
    for its answer, has had none for ``silence_s``."""
    result: list[_T] = []
    error: Exception | None = None

    async def watch() -> None:
        nonlocal error
        while True:
            await trio.sleep(silence_s * UNASKED)
            if not await is_alive(silence_s * (1 - UNASKED)):
                error = Silent()
                nursery.cancel_scope.cancel()
                return

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        try:
            result.append(await work())
        except Exception as failure:  # noqa: BLE001 - raised below, as it is and in no group
            error = failure
        nursery.cancel_scope.cancel()
    if result:
        return result[0]
    assert error is not None
    raise error
