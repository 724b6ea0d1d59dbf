"""What the market's REST endpoints share: errors as JSON, timestamps, waiting for a change.

Imports aiohttp and ``cpodfs.errors``. One event loop owns everything here: no locks. A `Signal`
is fired *after* the state it tells of was changed, and waiters test that state themselves.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

from cpodfs.errors import CpodfsError

log = logging.getLogger("cpodfs.devnet.market")

Json = dict[str, Any]

MAX_HOLD_S = 60.0
"""No request is held open longer than this, whatever it asks for."""

_MICROSECOND = timedelta(microseconds=1)
_last_stamp = datetime.min.replace(tzinfo=UTC)


class Problem(CpodfsError):
    """An answer with an error status and ``{"message": …}``, as yagna gives it.

    ``message`` None: it says nothing more (``null``). ``details``: it is an RFC 7807
    ``application/problem+json`` with these fields instead.
    """

    def __init__(self, status: int, message: str | None, details: Json | None = None) -> None:
        super().__init__(message or "")
        self.status = status
        self.message = message
        self.details = details

    def response(self) -> web.Response:
        if self.details is None:
            return web.json_response({"message": self.message}, status=self.status)
        return web.json_response(
            self.details, status=self.status, content_type="application/problem+json"
        )


class Signal:
    """Something changed: wakes everybody who waits, keeps nothing."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def fire(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def until(self, ready: Callable[[], bool], timeout_s: float) -> bool:
        """Wait for ``ready()``, tested now and at every `fire`; what it said at the end."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            try:
                await asyncio.wait_for(self._event.wait(), left)
            except TimeoutError:
                return ready()
        return True


def stamp() -> str:
    """Now in UTC, ISO 8601 with microseconds; every call gives a later one than the last.

    Clients ask for events *after* a timestamp, so two events may never share one. All stamps
    have the same length: comparing them as text compares their times.
    """
    global _last_stamp  # noqa: PLW0603 - the one clock of the process
    _last_stamp = max(datetime.now(UTC), _last_stamp + _MICROSECOND)
    return iso(_last_stamp)


def iso(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="microseconds")


def hold_s(request: web.Request, default_s: float) -> float:
    """The query's ``timeout`` (seconds), within reason. Raises Problem 400."""
    try:
        asked = float(request.query.get("timeout", default_s))
    except ValueError:
        raise Problem(400, "timeout is not a number of seconds") from None
    return min(max(asked, 0.0), MAX_HOLD_S)


def after_timestamp(request: web.Request) -> str:
    """The query's ``afterTimestamp`` as `stamp` writes it; everything when it is missing."""
    text = request.query.get("afterTimestamp", "")
    if not text:
        return ""
    try:
        moment = datetime.fromisoformat(text.replace(" ", "+"))
    except ValueError:
        raise Problem(400, f"afterTimestamp is no ISO date: {text!r}") from None
    return iso(moment if moment.tzinfo else moment.replace(tzinfo=UTC))


def max_events(request: web.Request, limit: int | None = None) -> int:
    """The query's ``maxEvents``. Raises Problem 400, also beyond the ``limit``."""
    text = request.query.get("maxEvents", "100")
    if not text.isdecimal() or int(text) == 0 or (limit is not None and int(text) > limit):
        raise Problem(
            400, f"Invalid maxEvents [{text}], should be between 1 and {limit or 'more'}."
        )
    return int(text)


async def body_object(request: web.Request) -> Json:
    """The request's JSON object. Raises Problem 400."""
    body = await body_json(request)
    if not isinstance(body, dict):
        raise Problem(400, "a JSON object is expected")
    return body


async def body_json(request: web.Request) -> Any:
    try:
        return await request.json()
    except ValueError:
        raise Problem(400, "the body is not JSON") from None


def text_field(body: Json, name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise Problem(400, f"{name}: a text is expected")
    return value


@web.middleware
async def problems_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except Problem as problem:
        return problem.response()
    except web.HTTPException as answer:
        if answer.status < 400:
            raise
        return web.json_response({"message": answer.reason}, status=answer.status)
    except Exception:
        log.exception("request_failed method=%s path=%s", request.method, request.path)
        return web.json_response({"message": "internal error, see the market's log"}, status=500)
