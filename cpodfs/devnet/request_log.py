"""Every request as one JSON line, and as counters at ``GET /devnet/stats``.

Imports ``faults``. Lines hold no query string, header or body: sharing references and tokens
must not get into a log. Handlers say pod, target and sizes in ``request[NOTE]``; ``status`` 0 means that the connection was dropped without an answer.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from aiohttp import web

from cpodfs.devnet.faults import NOTE, Handler, Note


@dataclass
class _Totals:
    count: int = 0
    errors: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    duration_s: float = 0.0


@dataclass
class _Counters:
    since: float = field(default_factory=time.time)
    endpoints: dict[str, _Totals] = field(default_factory=dict)
    statuses: Counter[int] = field(default_factory=Counter)
    concurrency_max: int = 0


class RequestLog:
    """``path`` None: counters only."""

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else _open_private(path)
        self._counters = _Counters()
        self._in_flight = 0

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def reset(self) -> None:
        self._counters = _Counters()

    def enter(self) -> int:
        """One more request is under way; returns how many are."""
        self._in_flight += 1
        self._counters.concurrency_max = max(self._counters.concurrency_max, self._in_flight)
        return self._in_flight

    def leave(self, request: web.Request, status: int, started: float, concurrency: int) -> None:
        self._in_flight -= 1
        duration = time.monotonic() - started
        endpoint = f"{request.method} {_route(request)}"
        totals = self._counters.endpoints.setdefault(endpoint, _Totals())
        note = request[NOTE]
        bytes_in = (request.content_length or 0) if note.bytes_in is None else note.bytes_in
        totals.count += 1
        totals.errors += not 0 < status < 400
        totals.bytes_in += bytes_in
        totals.bytes_out += note.bytes_out
        totals.duration_s += duration
        self._counters.statuses[status] += 1
        if self._file is None:
            return
        line = {
            "time": round(time.time() - duration, 6),
            "method": request.method,
            "path": _route(request),
            "pod": note.pod,
            "target": note.target,
            "status": status,
            "bytes_in": bytes_in,
            "bytes_out": note.bytes_out,
            "duration_s": round(duration, 6),
            "concurrency": concurrency,
        }
        self._file.write(json.dumps(line) + "\n")

    def stats(self) -> dict[str, Any]:
        """What has happened since the last reset."""
        totals = self._counters.endpoints
        return {
            "since": self._counters.since,
            "requests": sum(one.count for one in totals.values()),
            "in_flight": self._in_flight,
            "concurrency_max": self._counters.concurrency_max,
            "statuses": {str(status): n for status, n in self._counters.statuses.items()},
            "endpoints": {name: vars(one) for name, one in sorted(totals.items())},
        }


LOG = web.AppKey("request_log", RequestLog)


@web.middleware
async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The outermost one: it must see what the others made of the answer."""
    if request.path.startswith("/devnet/"):
        return await handler(request)
    log, started = request.app[LOG], time.monotonic()
    concurrency, status = log.enter(), 0
    note = request[NOTE] = Note()
    try:
        response = await handler(request)
        if not note.dropped:
            status = response.status
            if isinstance(response, web.Response) and isinstance(response.body, bytes):
                note.bytes_out = len(response.body)
        return response
    finally:
        log.leave(request, status, started, concurrency)


async def show(request: web.Request) -> web.Response:
    """GET /devnet/stats."""
    return web.json_response(request.app[LOG].stats())


async def reset(request: web.Request) -> web.Response:
    """POST /devnet/stats/reset: answers with the counters as they were."""
    log = request.app[LOG]
    before = log.stats()
    log.reset()
    return web.json_response(before)


def _route(request: web.Request) -> str:
    resource = request.match_info.route.resource
    return request.path if resource is None else resource.canonical


def _open_private(path: Path) -> IO[str]:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    return os.fdopen(descriptor, "a", buffering=1, encoding="utf-8")
