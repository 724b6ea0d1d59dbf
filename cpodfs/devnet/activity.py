"""An activity: one container of a provider, its batches of commands, what it uses and costs.

Imports `container`, `gftp`, `provider`, `rest`. Commands run one after another, in the order of
their batches; a batch ends at its first failure. An activity's state only moves forward, and
`Activity.end` is the one way out: afterwards no process of it exists and its folder is gone.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import json
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from cpodfs.devnet.container import Container, ContainerError
from cpodfs.devnet.misbehave import Misbehaviour
from cpodfs.devnet.provider import Provider
from cpodfs.devnet.rest import Json, Problem, Signal, log, stamp
from cpodfs.devnet.transfer import Transfers

MAX_CAPTURE = 4 << 20
"""Bytes of each stream of a command that its result keeps; the rest is dropped and said so."""
MAX_EVENTS = 1024
"""Stream events that a batch keeps for a reader that is behind or comes back."""
SLOW_READER_S = 30.0
"""How long a program waits for a reader that is far behind, before the reader misses something."""
MAX_BATCHES = 64
MAX_COMMANDS = 10_000

NEW, DEPLOYED, READY, TERMINATED = "New", "Deployed", "Ready", "Terminated"


class CommandFailed(Exception):
    """A command's failure; ``code`` is the return code that its `finished` event says."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class Capture:
    """One stream of one command: what its result will say, and its text for events.

    ``mode`` is as in the command: ``{"stream": {…}}`` or ``{"atEnd": {"head": n, …}}``; the
    options ``head``, ``tail`` and ``headTail`` say how many bytes are kept, and of which end.
    """

    def __init__(self, mode: Json) -> None:
        options = next(iter(mode.values()), None)
        options = options if isinstance(options, dict) else {}
        self.streams = "atEnd" not in mode
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._binary = options.get("format") == "bin"
        self._head, self._tail = bytearray(), bytearray()
        self._keep_head, self._keep_tail = _kept(options)
        self._limited = self._keep_head != MAX_CAPTURE
        self._total = 0

    def add(self, data: bytes) -> None:
        self._total += len(data)
        room = self._keep_head - len(self._head)
        self._head += data[:room]
        if self._keep_tail:
            self._tail += data[room:]
            # Not at every call: each time moves all that is kept.
            if len(self._tail) > 2 * self._keep_tail + (1 << 16):
                del self._tail[: -self._keep_tail]

    def value(self) -> str | list[int] | None:
        """The result's field: text, or bytes as numbers for ``format: bin``, None for nothing."""
        data = bytes(self._head)
        if self._keep_tail:
            data += bytes(self._tail[-self._keep_tail :])
        if self._binary:
            return list(data)
        text = data.decode(errors="replace")
        if self._total > len(data) and not self._limited:
            text += f"\n[{self._total - len(data)} bytes dropped]"
        return text or None


def _kept(options: Json) -> tuple[int, int]:
    """How many bytes of the beginning and of the end of a stream are wanted."""
    for key in ("head", "tail", "headTail"):
        limit = options.get(key)
        if isinstance(limit, int) and limit >= 0:
            limit = min(limit, MAX_CAPTURE)
            head = {"head": limit, "tail": 0}.get(key, limit // 2)
            return head, limit - head
    return MAX_CAPTURE, 0


@dataclass
class Batch:
    """Commands that were sent together, their results so far, and the events of a stream."""

    commands: list[tuple[str, Json]]
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    results: list[Json] = field(default_factory=list)
    events: deque[tuple[int, Json]] = field(default_factory=lambda: deque(maxlen=MAX_EVENTS))
    """(number, event), numbers rising from 1."""
    emitted: int = 0
    delivered: int = 0
    """How many results the last poll was given: the next one is held until there are more."""
    changed: Signal = field(default_factory=Signal)
    finished: bool = False
    readers: dict[object, int] = field(default_factory=dict)
    """For each open event stream, the number of the last event that it has sent."""
    read: Signal = field(default_factory=Signal)

    async def room(self) -> None:
        """Wait while an open stream is half of what is kept behind."""
        limit = MAX_EVENTS // 2
        await self.read.until(
            lambda: all(self.emitted - sent < limit for sent in self.readers.values()),
            SLOW_READER_S,
        )

    def emit(self, index: int, kind: Json) -> None:
        self.emitted += 1
        event = {"batch_id": self.id, "index": index, "timestamp": stamp()[:-6], "kind": kind}
        self.events.append((self.emitted, event))
        self.changed.fire()

    def add_result(self, index: int, *, ok: bool, message: str | None, **streams: Any) -> None:
        last = not ok or index == len(self.commands) - 1
        self.results.append(
            {
                "index": index,
                "eventDate": stamp(),
                "result": "Ok" if ok else "Error",
                "stdout": streams.get("stdout"),
                "stderr": streams.get("stderr"),
                "message": message,
                "isBatchFinished": last,
            }
        )
        self.finished = last
        self.changed.fire()


def parse_script(text: str) -> list[tuple[str, Json]]:
    """A batch as it comes: a JSON list of one-key objects. Raises Problem 400."""
    try:
        script = json.loads(text)
    except ValueError:
        raise Problem(400, "the script is not JSON") from None
    if not isinstance(script, list) or not script or len(script) > MAX_COMMANDS:
        raise Problem(400, f"a script is a list of 1 to {MAX_COMMANDS} commands")
    commands = []
    for entry in script:
        if not isinstance(entry, dict) or len(entry) != 1:
            raise Problem(400, "a command is an object with one key, its name")
        name, body = next(iter(entry.items()))
        commands.append((str(name), body if isinstance(body, dict) else {}))
    return commands


class Activity:
    """See the module. ``on_change`` is called whenever state or usage are worth booking."""

    def __init__(
        self,
        provider: Provider,
        container: Container,
        transfers: Transfers,
        *,
        key: str,
        misbehave: Misbehaviour,
        on_change: Callable[[Activity], None],
        on_vanish: Callable[[], None],
    ) -> None:
        self.id = key
        self.state = NEW
        self.reason: str | None = None
        self.batches: dict[str, Batch] = {}
        self._provider = provider
        self._container = container
        self._transfers = transfers
        self._misbehave = misbehave
        self._on_change = on_change
        self._on_vanish = on_vanish
        self._begun = time.monotonic()
        self._ended: float | None = None
        self._waiting: deque[Batch] = deque()
        self._sent = Signal()
        self._runner: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        await asyncio.to_thread(self._container.create)
        self._container.start()
        self._runner = asyncio.create_task(self._work(), name=f"activity {self.id}")

    @property
    def cpu_s(self) -> float:
        return self._container.cpu_s

    @property
    def duration_s(self) -> float:
        return (self._ended or time.monotonic()) - self._begun

    @property
    def usage(self) -> list[float]:
        """In the order of the offer's usage vector: processor seconds, seconds of existence."""
        return [self.cpu_s, self.duration_s]

    @property
    def cost(self) -> Decimal:
        return self._provider.spec.cost(self.cpu_s, self.duration_s)

    def send(self, commands: list[tuple[str, Json]]) -> Batch:
        """Queue a batch. Raises Problem when the activity is over or has too many."""
        if self.state == TERMINATED:
            raise Problem(410, f"activity {self.id} is terminated")
        if len(self.batches) >= MAX_BATCHES:
            self._forget_finished()
        batch = Batch(commands)
        self.batches[batch.id] = batch
        self._waiting.append(batch)
        self._sent.fire()
        return batch

    def _forget_finished(self) -> None:
        for key in [key for key, batch in self.batches.items() if batch.finished]:
            del self.batches[key]
        if len(self.batches) >= MAX_BATCHES:
            raise Problem(429, "too many batches are waiting")

    async def end(self, reason: str | None = None) -> None:
        """Stop everything, kill every process, remove the folder; all that is done at return.

        May be called again, at the same time too. Called by a command of the activity itself,
        it does not return: the command is cancelled like everything else.
        """
        if self._ending is None:
            self._ending = asyncio.create_task(self._end(reason))
        await asyncio.shield(self._ending)

    async def _end(self, reason: str | None) -> None:
        self.state, self.reason, self._ended = TERMINATED, reason, time.monotonic()
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.wait([self._runner])
        for batch in self.batches.values():
            if not batch.finished:
                self._finish(batch, len(batch.results), CommandFailed(reason or "activity ended"))
        self._on_change(self)
        await asyncio.to_thread(self._container.remove)

    def _set_state(self, state: str) -> None:
        self.state = state
        self._on_change(self)

    async def _work(self) -> None:
        while self.state != TERMINATED:
            await self._sent.until(lambda: bool(self._waiting), 3600.0)
            while self._waiting and self.state != TERMINATED:
                await self._run_batch(self._waiting.popleft())

    async def _run_batch(self, batch: Batch) -> None:
        for index, (name, body) in enumerate(batch.commands):
            captures = {
                stream: Capture(_capture_mode(body, stream)) for stream in ("stdout", "stderr")
            }
            batch.emit(index, {"started": {"command": {name: body}}})
            failure: CommandFailed | None = None
            try:
                await self._run_command(name, body, batch, index, captures)
            except CommandFailed as error:
                failure = error
            except Exception as error:  # noqa: BLE001 - a fault of ours is the command's failure
                log.exception("command_broke activity=%s command=%s", self.id, name)
                failure = CommandFailed(f"the provider failed: {error!r}")
            self._finish(batch, index, failure, captures)
            if name == "terminate" and failure is None:
                await self.end("terminated by the requestor")
            if batch.finished:
                return

    def _finish(
        self,
        batch: Batch,
        index: int,
        failure: CommandFailed | None,
        captures: dict[str, Capture] | None = None,
    ) -> None:
        captures = captures or {}
        for name, capture in captures.items():
            left = capture.decoder.decode(b"", True) if capture.streams else capture.value()
            if left:
                batch.emit(index, {name: left})
        message = str(failure) if failure else None
        code = failure.code if failure else 0
        batch.add_result(
            index,
            ok=failure is None,
            message=message,
            **{name: capture.value() for name, capture in captures.items()},
        )
        batch.emit(index, {"finished": {"return_code": code, "message": message}})

    async def _run_command(
        self, name: str, body: Json, batch: Batch, index: int, captures: dict[str, Capture]
    ) -> None:
        match name:
            case "deploy":
                self._expect(name, NEW)
                self._set_state(DEPLOYED)
            case "start":
                self._expect(name, DEPLOYED)
                self._set_state(READY)
            case "transfer":
                self._expect(name, DEPLOYED, READY)
                await self._transfer(body, lambda kind: batch.emit(index, {"progress": kind}))
            case "run":
                self._expect(name, READY)
                await self._run(body, batch, index, captures)
            case "terminate":
                self._expect(name, NEW, DEPLOYED, READY)
            case _:
                raise CommandFailed(f"unknown command: {name}")

    def _expect(self, command: str, *states: str) -> None:
        if self.state not in states:
            raise CommandFailed(f"{command}: not possible in state {self.state}")

    async def _transfer(self, body: Json, on_progress: Callable[[Json], None]) -> None:
        source, target = body.get("from"), body.get("to")
        if not isinstance(source, str) or not isinstance(target, str):
            raise CommandFailed("transfer: from and to are URLs")
        report = on_progress if body.get("progress") else None
        limits = [self._provider.spec.bandwidth, self._misbehave.transfer_bandwidth]
        bandwidth = min((limit for limit in limits if limit), default=None)
        try:
            await self._transfers.transfer(self._container, source, target, bandwidth, report)
        except ContainerError as error:
            raise CommandFailed(f"transfer failed: {error}") from None

    async def _run(
        self, body: Json, batch: Batch, index: int, captures: dict[str, Capture]
    ) -> None:
        entry_point, args = body.get("entry_point"), body.get("args", [])
        if not isinstance(entry_point, str) or not isinstance(args, list):
            raise CommandFailed("run: entry_point is a text and args a list")
        if self._provider.draws(self._misbehave.lose_activity):
            await self.end("the provider lost this activity")
        if self._provider.draws(self._misbehave.vanish):
            self._on_vanish()
        if self._provider.draws(self._misbehave.fail_command):
            raise CommandFailed("command exited with code 1 (injected)")

        async def on_output(stream: str, data: bytes) -> None:
            capture = captures[stream]
            capture.add(data)
            if capture.streams and (text := capture.decoder.decode(data)):
                batch.emit(index, {stream: text})
                await batch.room()

        begun = time.monotonic()
        try:
            code = await self._container.run([entry_point, *map(str, args)], on_output)
        except ContainerError as error:
            raise CommandFailed(str(error)) from None
        slower = 1 / self._provider.spec.speed - 1
        if slower > 0:
            await asyncio.sleep((time.monotonic() - begun) * slower)
        self._on_change(self)
        if code != 0:
            raise CommandFailed(f"command exited with code {code}", code)


def _capture_mode(body: Json, stream: str) -> Json:
    with contextlib.suppress(AttributeError):
        mode = body.get("capture", {}).get(stream)
        if isinstance(mode, dict):
            return mode
    return {"stream": {}}
