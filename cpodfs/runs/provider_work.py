"""One program on one provider: sent, started, watched, its results fetched while it runs.

asyncio; imports yapapi and the other ``provider_*`` modules. `Shop` is what both kinds of work
share: the archive, the scripts for the container, the way into the pod. What a script's commands
print is known in order and at once, through `Say`, not through yapapi's event consumers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yapapi import events
from yapapi.script.command import Run

from cpodfs.runs.provider_errors import LaneFailed, RunFailed
from cpodfs.runs.provider_files import AWAY, BadArchive, Packed, Unpacker, pack, sha256_of
from cpodfs.runs.provider_market import FAILED
from cpodfs.runs.provider_script import (
    HELPER,
    INCOMING,
    OUTGOING,
    SCRIPT,
    Report,
    parse_report,
)
from cpodfs.runs.provider_status import FAILED_SHOWN, Hired, Reporter
from cpodfs.runs.stream import LOG_LIMIT_BYTES

MOUNT_WAIT_S = 60.0
"""How long a mount that does not answer is waited for."""
_MOUNT_RETRY_S = 1.0
_MISSING_LIMIT = 10_000
"""Names that are remembered; of more it is said that they are so many."""
_FETCH_SHARE = 4
"""A fetch that took t seconds is followed by at least so many times t without one."""

Output = Callable[[str, str], None]


class Say(Run):  # type: ignore[misc]
    """A call of our script in the container; ``on_output(stream, text)`` hears what it prints."""

    def __init__(self, words: list[str], on_output: Output) -> None:
        super().__init__("/bin/sh", HELPER, *words)
        self._on_output = on_output

    def emit(self, event_class: Any, **kwargs: Any) -> Any:
        event = super().emit(event_class, **kwargs)
        if isinstance(event, events.CommandStdOut):
            self._on_output("stdout", event.output)
        elif isinstance(event, events.CommandStdErr):
            self._on_output("stderr", event.output)
        return event


@dataclass(frozen=True)
class Job:
    """What the supervisor asks for. Folders and ``log`` are relative to ``pod``, a path."""

    pod: Path
    argv: tuple[str, ...]
    script: str
    payload: str
    output: str
    log: str
    scratch: Path


class Shop:
    """The pod's side of the work. ``leave_out``: files that are not sent in the archive."""

    def __init__(self, job: Job, reporter: Reporter, leave_out: frozenset[str]) -> None:
        self.job = job
        self.reporter = reporter
        self._leave_out = leave_out
        self._packed: Packed | None = None
        self._packing = asyncio.Lock()
        self._unpacking = asyncio.Lock()
        self._unpacker = Unpacker(job.pod, job.output)
        self._fetches = 0
        self._log_room = LOG_LIMIT_BYTES

    async def packed(self) -> Packed:
        """The archive of script and payload, made once. Raises RunFailed."""
        async with self._packing:
            if self._packed is None:
                names = (self.job.script, self.job.payload)
                target = self.job.scratch / "sent.tar"
                self._packed = await self.in_pod(pack, self.job.pod, names, target, self._leave_out)
            return self._packed

    def within_limit(self, text: bytes) -> bytes:
        """As much of a task's output as the logs of all tasks together have room for."""
        kept = text[: self._log_room]
        if len(kept) < len(text) and self._log_room:
            self.reporter.note(f"the logs of the tasks are cut: {LOG_LIMIT_BYTES} bytes at most")
            self._log_room = 0
        self._log_room = max(0, self._log_room - len(kept))
        return kept

    async def in_pod(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call what reads or writes the mount, in a thread; while the mount is away, again for a while.

        Raises RunFailed, and BadArchive unchanged.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + MOUNT_WAIT_S
        while True:
            try:
                return await asyncio.to_thread(function, *arguments)
            except OSError as error:
                if error.errno not in AWAY or loop.time() >= deadline:
                    raise RunFailed(f"the pod cannot be used: {error}") from None
            await asyncio.sleep(_MOUNT_RETRY_S)

    def open(self, context: Any, packed: Packed) -> tuple[Any, list[str]]:
        """The script that readies an activity; what it complains of."""
        said: list[str] = []
        script = context.new_script()
        script.deploy()
        script.start()
        script.upload_bytes(SCRIPT.encode(), HELPER)
        script.upload_file(str(packed.path), INCOMING)
        script.add(Say(["setup", packed.sha256, self.job.output], into(said)))
        return script, said

    def fetch(self, script: Any) -> Path:
        """Add a fetch of the packed results to a script; where they will be."""
        self._fetches += 1
        target = self.job.scratch / f"back-{self._fetches}.tar"
        script.download_file(OUTGOING, str(target))
        return target

    async def take(self, archive: Path, report: Report) -> None:
        """Check an archive that came back and bring it into the pod. Raises LaneFailed, RunFailed.

        What the pod cannot hold is noted, and counted as missing.
        """
        try:
            async with self._unpacking:
                if not await asyncio.to_thread(_whole, archive, report):
                    raise LaneFailed("the results did not arrive whole")
                self._miss(await self.in_pod(self._unpacker.unpack, archive))
        except BadArchive as error:
            raise LaneFailed(f"the results were refused: {error}") from None
        finally:
            await asyncio.to_thread(archive.unlink, missing_ok=True)

    def _miss(self, names: dict[str, str]) -> None:
        missing = self.reporter.status.missing
        for name, why in names.items():
            if name in missing or len(missing) >= _MISSING_LIMIT:
                continue
            missing[name] = why
            if len(missing) <= FAILED_SHOWN:
                self.reporter.note(f"not brought: {name}: {why}")
            self.reporter.changed()

    def missing(self) -> str | None:
        """What to say of the run when results are missing."""
        missing = self.reporter.status.missing
        if not missing:
            return None
        name, why = next(iter(missing.items()))
        results = "1 result is" if len(missing) == 1 else f"{len(missing)} results are"
        return f"{results} missing, which the pod cannot hold; the first: {name}: {why}"


def _whole(archive: Path, report: Report) -> bool:
    there = archive.exists() and archive.stat().st_size == report.size
    return there and sha256_of(archive) == report.sha256


def into(said: list[str], on_error: Output | None = None) -> Output:
    """An ``on_output`` that keeps what it hears; ``on_error`` gets what comes on stderr."""

    def hear(stream: str, text: str) -> None:
        if on_error is not None and stream == "stderr":
            on_error(stream, text)
        else:
            said.append(text)

    return hear


def complete(script: Any) -> None:
    """Raise LaneFailed unless all commands of a script have finished: a stream may break off."""
    try:
        script.results  # noqa: B018 - raises when there are none
    except AttributeError:
        raise LaneFailed("provider vanished: its answer broke off") from None


def report_in(said: list[str]) -> Report:
    """The report among what ``pack`` printed. Raises LaneFailed."""
    try:
        return parse_report("".join(said))
    except ValueError as error:
        raise LaneFailed(f"the provider answers nonsense: {error}") from None


class SingleWork:
    """The recipe's program, once. ``exit_code`` is its own when ``over`` is set.

    Only a provider's failure begins it again elsewhere, at most ``retries`` times.
    """

    def __init__(self, shop: Shop, poll_s: float, retries: int) -> None:
        self.over = asyncio.Event()
        self.exit_code: int | None = None
        self.error: str | None = None
        self._shop = shop
        self._poll_s = poll_s
        self._retries = retries
        self._failures = 0

    def lanes_wanted(self) -> int:
        return 0 if self.over.is_set() else 1

    async def lane(self, context: Any, hired: Hired) -> AsyncGenerator[Any, Any]:
        shop = self._shop
        script, said = shop.open(context, await shop.packed())
        script.add(Say(["start", *shop.job.argv], into(said)))
        yield script
        complete(script)
        shop.reporter.note(f"started on {hired.name}")
        loop, poll_s = asyncio.get_running_loop(), self._poll_s
        while True:
            script = context.new_script()
            script.add(Say(["watch", str(round(poll_s * 10))], shop.reporter.log))
            packing: list[str] = []
            script.add(Say(["pack", shop.job.output], into(packing, shop.reporter.log)))
            yield script
            complete(script)
            report = report_in(packing)
            if report.some:
                begun = loop.time()
                script = context.new_script()
                archive = shop.fetch(script)
                yield script
                complete(script)
                await shop.take(archive, report)
                poll_s = max(self._poll_s, _FETCH_SHARE * (loop.time() - begun))
            if report.exit_code is not None and not report.unsaid:
                break
        hired.done += 1
        self._finish(report.exit_code)

    def _finish(self, exit_code: int) -> None:
        missing = self._shop.missing()
        failed = f"the program failed with exit code {exit_code}" if exit_code else None
        self.exit_code = exit_code or (FAILED if missing else 0)
        self.error = "; ".join(filter(None, (failed, missing))) or None
        self.over.set()

    def lane_ended(self, hired: Hired, error: str | None) -> None:
        if self.over.is_set() or error is None:
            return
        self._failures += 1
        if self._failures > self._retries:
            times = f" ({self._failures} attempts)" if self._failures > 1 else ""
            raise RunFailed(f"{hired.name}: {error}{times}")
