"""Faults on purpose: latency, thin pipes, errors, dropped connections, short bodies, lost sessions.

Imports nothing of ours. What happens to the n-th matching request depends on (seed, n) alone, never
on time or order of completion, so a failing test can be run again. Set new faults while the server
runs with ``POST /devnet/faults``; that starts counting at 1 again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import re
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pydantic
from aiohttp import web
from pydantic import Field
from pydantic.dataclasses import dataclass as checked_dataclass

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Outcome = Literal["pass", "error", "drop-before", "drop-after"]

_DRAIN_CHUNK = 1 << 18
_VERSIONS_MAX = 64


@checked_dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class Faults:
    """What goes wrong, and how often. The default is nothing, at full speed.

    Attributes:
        latency_s, latency_jitter_s: wait before each answer, plus up to so much more.
        bandwidth: bytes per second in each direction, shared by all transfers; None = no limit.
        error_rate, status: share of requests answered with this status, undone. retry_after: the
            header that goes with 429 and 503.
        drop_rate: share of connections closed without an answer, half of them after the work.
        truncate_rate: share of downloads that end early.
        refuse_logins: so many logins are refused with login_status from now on, right as they are.
        reject_tokens: logins succeed, always with the same token, and no token is accepted.
        swarm_delay_s: how long after an upload Swarm has all its chunks, as file/status tells.
        status_has_total: False: it tells no total, as over a Bee node of version 2.
        expire_every: all sessions end at each n-th request that needs one; 0 = never.
        seed: None draws one. match: regular expression searched in the path.
        directory_race: concurrent changes of one directory lose entries, as the real server does;
            race_window_s is the time between reading and writing a directory's list.
        rename_needs_listing: renaming a directory whose sub-directories this session has not listed
            since it opened the pod ends the connection, as at the real server (here undone).
        rmdir_bug: removing a nested directory edits the wrong list, as the real server does.
        read_failure_rate: share of chunk reads that find nothing. What needs the chunk is "not there",
            and a list or file whose newest version is not found is shown as it was before.
        pods_empty: the list of pods cannot be read: it is empty for whoever asks.
        wipe_pods: a list of pods that could not be read is stored anew, empty, when a pod is opened
            or looked for, and as it was seen when one is made: the others are lost, as they are at
            the real server.
        stale_writes: so is what a directory's list did not show when something in it is changed.
        not_there: pods ("pod") and paths ("pod/a/b") that are not there, with all below them.
        empty_store: it lost all but its accounts. What was there is back when this is taken off;
            both end all sessions, as a restart does.
    """

    latency_s: float = Field(default=0.0, ge=0)
    latency_jitter_s: float = Field(default=0.0, ge=0)
    bandwidth: int | None = Field(default=None, gt=0)
    error_rate: float = Field(default=0.0, ge=0, le=1)
    status: int = Field(default=500, ge=400, le=599)
    drop_rate: float = Field(default=0.0, ge=0, le=1)
    retry_after: str = Field(default="1", max_length=100, pattern=r"^[ -~]*$")
    refuse_logins: int = Field(default=0, ge=0)
    login_status: int = Field(default=401, ge=400, le=599)
    reject_tokens: bool = False
    swarm_delay_s: float = Field(default=0.0, ge=0)
    status_has_total: bool = True
    truncate_rate: float = Field(default=0.0, ge=0, le=1)
    expire_every: int = Field(default=0, ge=0)
    seed: int | None = None
    match: str = ""
    directory_race: bool = False
    race_window_s: float = Field(default=0.02, ge=0)
    rename_needs_listing: bool = False
    rmdir_bug: bool = True
    read_failure_rate: float = Field(default=0.0, ge=0, le=1)
    pods_empty: bool = False
    wipe_pods: bool = False
    stale_writes: bool = False
    not_there: tuple[str, ...] = ()
    empty_store: bool = False

    def __post_init__(self) -> None:
        try:
            re.compile(self.match)
        except re.error as error:
            raise ValueError(f"match: {error}") from error

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> Faults:
        """Raises ValueError, naming the field, for what is unknown or out of range."""
        return pydantic.TypeAdapter(cls).validate_python(dict(options))


@dataclass(frozen=True)
class Plan:
    """What happens to one request. ``truncate_at``: share of the body that is sent, or None."""

    outcome: Outcome = "pass"
    latency_s: float = 0.0
    truncate_at: float | None = None


def plan(faults: Faults, seed: int, n: int) -> Plan:
    """The fate of the ``n``-th matching request: a pure function."""
    rng = random.Random(f"{seed}:{n}")  # noqa: S311 - reproducible on purpose
    jitter, drop, side, error, cut, where = (rng.random() for _ in range(6))
    outcome: Outcome = "pass"
    if drop < faults.drop_rate:
        outcome = "drop-before" if side < 0.5 else "drop-after"
    elif error < faults.error_rate:
        outcome = "error"
    return Plan(
        outcome,
        faults.latency_s + jitter * faults.latency_jitter_s,
        where if cut < faults.truncate_rate else None,
    )


@dataclass
class Note:
    """What is known of one request: set by the log, filled in by middleware and handlers.

    ``silent``: the answer will not be sent, so a handler need not stream it. ``bytes_in`` None: what
    the Content-Length says.
    """

    plan: Plan = field(default_factory=Plan)
    pod: str | None = None
    target: str | None = None
    bytes_in: int | None = None
    bytes_out: int = 0
    dropped: bool = False
    silent: bool = False


class Pipe:
    """One direction of a line that all transfers share. ``wait(n)`` returns when n bytes are over."""

    def __init__(self) -> None:
        self._free_at = 0.0

    async def wait(self, size: int, bandwidth: int | None) -> None:
        if bandwidth is None:
            return
        now = time.monotonic()
        self._free_at = max(self._free_at, now) + size / bandwidth
        await asyncio.sleep(self._free_at - now)


class FaultBox:
    """The faults in force and the counts that decide.

    ``on_expire(n)`` ends all sessions, ``on_store(empty)`` has another store used.
    """

    def __init__(
        self,
        faults: Faults,
        on_expire: Callable[[bool], None],
        on_store: Callable[[bool], None],
    ) -> None:
        self.up, self.down = Pipe(), Pipe()
        self._on_expire = on_expire
        self._on_store = on_store
        self.set(faults)

    def set(self, faults: Faults) -> None:
        self.faults = faults
        self._on_store(faults.empty_store)
        self._reads: Counter[str] = Counter()
        self._logins_to_refuse = faults.refuse_logins
        self.seed = secrets.randbits(32) if faults.seed is None else faults.seed
        self.seen = 0
        self._needing_session = 0
        self._pattern = re.compile(faults.match)

    def next_plan(self, request: web.Request) -> Plan:
        """Count the request if it matches, and say what is to happen to it."""
        if not self._pattern.search(request.path):
            return Plan()
        self.seen += 1
        self._maybe_expire(request)
        return plan(self.faults, self.seed, self.seen)

    def refuses_login(self) -> bool:
        """Count a login; whether it is one of those to refuse."""
        self._logins_to_refuse -= 1
        return self._logins_to_refuse >= 0

    @property
    def is_lying(self) -> bool:
        return self.faults.read_failure_rate > 0 or bool(self.faults.not_there)

    def is_hidden(self, pod: str, path: str = "") -> bool:
        """Whether the path in the pod, the pod itself or a directory above is "not there"."""
        full = f"{pod}{path}".rstrip("/")
        return any(
            full == name or full.startswith(name + "/")
            for name in (given.rstrip("/") for given in self.faults.not_there)
        )

    def finds(self, what: str, chunks: int) -> int | None:
        """Which version of ``what`` is found at its next read: 0 the newest, 1 the one before, ….

        The first of its chunks is a feed's, whose look-up goes back until it finds something. None:
        nothing is found, or not all of the other chunks.
        """
        rate = self.faults.read_failure_rate
        if not rate:
            return 0
        self._reads[what] += 1
        rng = random.Random(f"{self.seed}:{what}:{self._reads[what]}")  # noqa: S311
        back = next((n for n in range(_VERSIONS_MAX) if rng.random() >= rate), None)
        return back if all(rng.random() >= rate for _ in range(chunks - 1)) else None

    def _maybe_expire(self, request: web.Request) -> None:
        if not self.faults.expire_every or not request.path.startswith("/v1/"):
            return
        self._needing_session += 1
        if self._needing_session % self.faults.expire_every == 0:
            rng = random.Random(f"{self.seed}:expire:{self._needing_session}")  # noqa: S311
            self._on_expire(rng.random() < 0.5)


BOX = web.AppKey("faults", FaultBox)
NOTE = web.RequestKey("note", Note)


@web.middleware
async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Carry out the plan. Handlers find it in ``request[NOTE].plan`` (truncation is theirs)."""
    if request.path.startswith("/devnet/"):
        return await handler(request)
    box = request.app[BOX]
    fate = box.next_plan(request)
    request[NOTE].plan = fate
    if fate.latency_s:
        await asyncio.sleep(fate.latency_s)
    if fate.outcome == "drop-before":
        return hang_up(request)
    if fate.outcome == "error":
        return await _error(request, box.faults.status)
    if fate.outcome == "drop-after":
        request[NOTE].silent = True
        await handler(request)
        return hang_up(request)
    return await handler(request)


def hang_up(request: web.Request) -> web.Response:
    """Close the connection at once; the response returned is never sent."""
    request[NOTE].dropped = True
    if request.transport is not None:
        request.transport.abort()
    return web.Response(status=500)


async def _error(request: web.Request, status: int) -> web.Response:
    async for _ in request.content.iter_chunked(_DRAIN_CHUNK):
        pass
    body = {"message": "devnet: injected fault", "code": status}
    return web.json_response(body, status=status, headers=retry_header(request, status))


def retry_header(request: web.Request, status: int) -> dict[str, str]:
    """What goes with an answer of this status."""
    asked = request.app[BOX].faults.retry_after
    return {"Retry-After": asked} if asked and status in (429, 503) else {}


async def show(request: web.Request) -> web.Response:
    """GET /devnet/faults."""
    box = request.app[BOX]
    body = dataclasses.asdict(box.faults) | {"seed": box.seed, "seen": box.seen}
    return web.json_response(body)


async def change(request: web.Request) -> web.Response:
    """POST /devnet/faults: what the JSON object does not name is off."""
    try:
        request.app[BOX].set(Faults.parse(await request.json()))
    except (ValueError, TypeError) as error:
        return web.json_response({"message": str(error)}, status=400)
    return await show(request)
