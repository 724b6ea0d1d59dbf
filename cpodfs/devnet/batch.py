"""A batch of an activity: its commands, what their results keep, and who listens to it.

Imports `rest`. It is what yagna's exe-unit makes of a batch (exe-unit/src/state.rs, output.rs): the
results lose nothing; the event stream remembers nothing. A reader gets what is said from the moment
on that its call has reached the provider, and each piece of output decoded by itself.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from cpodfs.devnet.rest import Json, Problem, Signal, stamp

MAX_BEHIND = 16
"""Events that a reader may have before it; one more, and its stream breaks off."""
MAX_CAPTURE = 64 << 20
"""Bytes of each stream of a command that its result keeps. The real one has no limit but memory."""
MAX_COMMANDS = 10_000
COMMANDS = ("sign", "deploy", "start", "run", "transfer", "terminate")


class CommandFailed(Exception):
    """A command's failure; ``code`` is the return code that its `finished` event says."""

    def __init__(self, message: str, code: int = -1) -> None:
        super().__init__(message)
        self.code = code


class Capture:
    """One stream of one command: what its result keeps of it, and what of it is an event.

    ``mode`` is as in the command: ``{"stream": {"limit": n}}`` or ``{"atEnd": {"head": n}}``, where
    ``tail`` and ``headTail`` keep other ends, and ``format: bin`` gives bytes as numbers; None: it
    is thrown away, as of a command that says nothing of it.
    """

    def __init__(self, mode: Json | None) -> None:
        options = next(iter(mode.values()), None) if mode else None
        options = options if isinstance(options, dict) else {}
        self._streams = mode is not None and "stream" in mode
        self._binary = options.get("format") == "bin"
        self._head, self._tail = bytearray(), bytearray()
        self._keep_head, self._keep_tail = _kept(mode, options)

    def add(self, data: bytes) -> str | list[int] | None:
        """Keep what is to be kept of a piece of output; what is said of it at once."""
        said = data[: self._keep_head - len(self._head)]
        self._head += said
        if self._keep_tail:
            self._tail += data
            # Not at every call: each time moves all that is kept.
            if len(self._tail) > 2 * self._keep_tail + (1 << 16):
                del self._tail[: -self._keep_tail]
        if not self._streams or not said:
            return None
        return list(said) if self._binary else said.decode(errors="replace")

    def value(self) -> str | list[int] | None:
        """The result's field. Bytes that are not UTF-8 as a whole are one character each."""
        data = bytes(self._head)
        if self._keep_tail:
            data += bytes(self._tail[-self._keep_tail :])
        if not data:
            return None
        if self._binary:
            return list(data)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return data.decode("latin-1")


def _kept(mode: Json | None, options: Json) -> tuple[int, int]:
    """How many bytes of the beginning and of the end of a stream are wanted."""
    if mode is None:
        return 0, 0
    for key in ("limit",) if "stream" in mode else ("head", "tail", "headTail"):
        limit = options.get(key)
        if isinstance(limit, int) and limit >= 0:
            limit = min(limit, MAX_CAPTURE)
            head = {"tail": 0, "headTail": -(-limit // 2)}.get(key, limit)
            return head, limit - head
    return MAX_CAPTURE, 0


class Reader:
    """An open event stream at the provider, and the events that are on their way to the requestor.

    ``delay_s``: how long they take. ``ended``: nothing will follow. ``lagged``: it had more than
    `MAX_BEHIND` events before it that it did not take, and gets no more.
    """

    def __init__(self, delay_s: float) -> None:
        self.ended = False
        self.lagged = False
        self._delay_s = delay_s
        self._on_way: deque[tuple[float, Json]] = deque()
        self._changed = Signal()

    def put(self, event: Json) -> None:
        now = time.monotonic()
        arrived = 0
        for due, _event in self._on_way:
            arrived += due <= now
            if due > now or arrived >= MAX_BEHIND:
                break
        if arrived >= MAX_BEHIND:
            self.lagged = True
        if not self.lagged:
            self._on_way.append((now + self._delay_s, event))
        self._changed.fire()

    def end(self) -> None:
        self.ended = True
        self._changed.fire()

    async def arrived(self, timeout_s: float) -> list[Json]:
        """The events that are here by now, the first of them waited for; none in time: none."""
        found = await self._changed.until(
            lambda: bool(self._on_way) or self.lagged or self.ended, timeout_s
        )
        if not found or not self._on_way:
            return []
        left_s = self._on_way[0][0] - time.monotonic()
        if left_s > 0:
            await asyncio.sleep(left_s)
        now = time.monotonic()
        events = [self._on_way.popleft()[1]]
        while self._on_way and self._on_way[0][0] <= now:
            events.append(self._on_way.popleft()[1])
        return events


@dataclass
class Batch:
    """Commands that were sent together, their results so far, and whoever reads along."""

    commands: list[tuple[str, Json]]
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    results: list[Json] = field(default_factory=list)
    changed: Signal = field(default_factory=Signal)
    finished: bool = False
    readers: set[Reader] = field(default_factory=set)

    def emit(self, index: int, kind: Json) -> None:
        event = {"batch_id": self.id, "index": index, "timestamp": stamp()[:-6], "kind": kind}
        for reader in self.readers:
            reader.put(event)

    def add_result(self, index: int, failure: CommandFailed | None, **streams: Any) -> None:
        """Record a command's end, and say so."""
        message = str(failure) if failure else None
        self.results.append(
            {
                "index": index,
                "eventDate": stamp(),
                "result": "Error" if failure else "Ok",
                "stdout": streams.get("stdout"),
                "stderr": streams.get("stderr"),
                "message": message,
                "isBatchFinished": failure is not None or index == len(self.commands) - 1,
            }
        )
        self.finished = self.results[-1]["isBatchFinished"]
        self.changed.fire()
        code = failure.code if failure else 0
        self.emit(index, {"finished": {"return_code": code, "message": message}})

    def end(self) -> None:
        """No command of it will run any more; what was not done has no result."""
        self.finished = True
        self.changed.fire()
        for reader in self.readers:
            reader.end()

    async def results_after(self, timeout_s: float) -> list[Json]:
        """All results once the last command is done, or else those that there are in time.

        A command that failed before is not the last one: then it takes all the time.
        """
        await self.changed.until(lambda: len(self.results) == len(self.commands), timeout_s)
        return list(self.results)


def parse_script(text: str) -> list[tuple[str, Json]]:
    """A batch as it comes: a JSON list of one-key objects. Raises Problem 400."""
    try:
        script = json.loads(text)
    except ValueError:
        raise Problem(400, "Bad request: the script is not JSON") from None
    if not isinstance(script, list) or len(script) > MAX_COMMANDS:
        raise Problem(400, f"Bad request: a script is a list of up to {MAX_COMMANDS} commands")
    return [_command(entry) for entry in script]


def _command(entry: Any) -> tuple[str, Json]:
    if not isinstance(entry, dict) or len(entry) != 1:
        raise Problem(400, "Bad request: a command is an object with one key, its name")
    name, body = next(iter(entry.items()))
    body = body if isinstance(body, dict) else {}
    if name not in COMMANDS:
        known = ", ".join(f"`{known}`" for known in COMMANDS)
        raise Problem(400, f"Bad request: unknown variant `{name}`, expected one of {known}")
    for field_name in {"transfer": ("from", "to"), "run": ("entry_point",)}.get(name, ()):
        if not isinstance(body.get(field_name), str):
            raise Problem(400, f"Bad request: {name}: missing field `{field_name}`")
    if not isinstance(body.get("args", []), list | dict):
        raise Problem(400, f"Bad request: {name}: args is not a list")
    return name, body
