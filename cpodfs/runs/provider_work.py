"""One program on one provider: sent, started, watched, its results fetched while it runs.

asyncio; imports yapapi and the other ``provider_*`` modules. `Shop` is what both kinds of work
share: the archive, the program's conversation with us, the way into the pod. What a program prints
comes as bytes, in pieces that are asked for by where they begin, so that none is lost or doubled.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yapapi.script.command import Command, Deploy, DownloadFile, SendBytes, SendFile, Start

from cpodfs.runs.provider_errors import LaneFailed, RunFailed
from cpodfs.runs.provider_files import AWAY, BadArchive, Packed, Unpacker, pack, sha256_of
from cpodfs.runs.provider_market import FAILED
from cpodfs.runs.provider_remote import Remote, Say
from cpodfs.runs.provider_script import (
    ALWAYS,
    HELPER,
    INCOMING,
    OUTGOING,
    PIECES_BYTES,
    SCRIPT,
    SLICED,
    Answer,
    parse_answer,
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
_SLICE_BYTES = 16 << 20
"""Of one stream of a program's output, fetched as a file: for programs that print a lot."""
_FIRST_LOOK_S = 0.5
"""The next ones take twice as long each, up to the recipe's ``poll``."""
_ANSWER_CHARS = 1 << 20
_COMPLAINT_CHARS = 1 << 16
_SET_UP = 2
"""Commands at the beginning of an activity that can only be given once."""

Output = Callable[[str, bytes], None]
"""Takes the name of a stream, and bytes of it."""


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

    async def set_up(self, remote: Remote, begin: Sequence[Command] = ()) -> None:
        """Ready an activity, and carry out ``begin``. Raises LaneFailed, RunFailed."""
        packed = await self.packed()
        ready = [
            *(Deploy(), Start()),
            *(SendBytes(SCRIPT.encode(), HELPER), SendFile(str(packed.path), INCOMING)),
            Say("setup", packed.sha256, self.job.output),
        ]
        await remote.do([*ready, *begin], opening=_SET_UP)

    def scratch_file(self) -> Path:
        """A new name for what is fetched."""
        self._fetches += 1
        return self.job.scratch / f"back-{self._fetches}"

    async def take(self, archive: Path, answer: Answer) -> None:
        """Check an archive that came back and bring it into the pod. Raises LaneFailed, RunFailed.

        What the pod cannot hold is noted, and counted as missing.
        """
        try:
            async with self._unpacking:
                if not await asyncio.to_thread(_whole, archive, answer):
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


def _whole(archive: Path, answer: Answer) -> bool:
    there = archive.exists() and archive.stat().st_size == answer.size
    return there and sha256_of(archive) == answer.sha256


class Watch:
    """The conversation with one program that has been begun in the background at a provider.

    ``on_output`` gets what it prints. ``when``: see `provider_script.ALWAYS`.
    """

    def __init__(self, shop: Shop, remote: Remote, on_output: Output, when: str = ALWAYS) -> None:
        self._shop = shop
        self._remote = remote
        self._on_output = on_output
        self._when = when
        self._at = {"out": 0, "err": 0}
        self._packed = 0
        self._complaint = ""

    async def to_its_end(self, poll_s: float, begin: Sequence[Command] = ()) -> int:
        """See it through; its exit code. Raises LaneFailed, RunFailed.

        ``begin``: what begins it, sent with the first look. ``poll_s``: from one look to the next.
        """
        wait_s = min(_FIRST_LOOK_S, poll_s)
        while True:
            answer = await self._look(wait_s, begin)
            begin, begun = (), time.monotonic()
            await self._fetch(answer)
            # Results that take long to fetch must not keep the output waiting all the time.
            most_s = max(poll_s, _FETCH_SHARE * (time.monotonic() - begun))
            wait_s = min(2 * wait_s, most_s)
            if answer.over:
                assert answer.exit_code is not None
                return answer.exit_code

    async def _look(self, wait_s: float, begin: Sequence[Command]) -> Answer:
        out_at, err_at = self._at["out"], self._at["err"]
        words = [str(round(wait_s * 10)), str(out_at), str(err_at), str(self._packed)]
        results = await self._remote.do(
            [*begin, Say("watch", *words, self._shop.job.output, self._when)]
        )
        said = results[-1]
        if len(said.stdout or "") > _ANSWER_CHARS:
            raise LaneFailed("the provider answers nonsense: too much of it")
        try:
            answer = parse_answer(str(said.stdout or ""), out_at, err_at)
        except ValueError as error:
            raise LaneFailed(f"the provider answers nonsense: {error}") from None
        self._take_output("out", answer.out)
        self._take_output("err", answer.err)
        if said.stderr and said.stderr != self._complaint:
            self._complaint = said.stderr
            told = str(said.stderr)[:_COMPLAINT_CHARS]
            self._on_output("stderr", told.encode(errors="backslashreplace"))
        return answer

    def _take_output(self, name: str, data: bytes) -> None:
        self._at[name] += len(data)
        if data:
            self._on_output(f"std{name}", data)

    async def _fetch(self, answer: Answer) -> None:
        """Bring what was too large for the answer."""
        shop, commands = self._shop, list[Command]()
        archive, sliced = shop.scratch_file(), shop.scratch_file()
        if answer.archive is not None:
            await asyncio.to_thread(archive.write_bytes, answer.archive)
        elif answer.size:
            commands.append(DownloadFile(OUTGOING, str(archive)))
        lengths = [min(left, _SLICE_BYTES) for left in (answer.out_left, answer.err_left)]
        much = sum(lengths) > PIECES_BYTES
        if much:
            places = zip(self._at.values(), lengths, strict=True)
            words = [str(number) for place in places for number in place]
            commands += [Say("slice", *words), DownloadFile(SLICED, str(sliced))]
        if commands:
            await self._remote.do(commands)
        if much:
            self._take_slices(await asyncio.to_thread(_read_and_remove, sliced), lengths)
        if answer.size:
            await shop.take(archive, answer)
            self._packed += 1

    def _take_slices(self, data: bytes, lengths: list[int]) -> None:
        if len(data) != sum(lengths):
            raise LaneFailed("the program's output did not arrive whole")
        self._take_output("out", data[: lengths[0]])
        self._take_output("err", data[lengths[0] :])


def _read_and_remove(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(2 * _SLICE_BYTES + 1)
    except FileNotFoundError:
        return b""
    finally:
        path.unlink(missing_ok=True)


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
        self._failed_on: list[str] = []

    def lanes_wanted(self) -> int:
        return 0 if self.over.is_set() else 1

    def wants(self, provider_id: str) -> bool:
        return provider_id not in self._failed_on

    async def lane(self, remote: Remote, hired: Hired) -> None:
        shop = self._shop
        await shop.set_up(remote, [Say("begin", "1", *shop.job.argv)])
        shop.reporter.note(f"started on {hired.name}")
        exit_code = await Watch(shop, remote, shop.reporter.log).to_its_end(self._poll_s)
        hired.done += 1
        self._finish(exit_code)

    def _finish(self, exit_code: int) -> None:
        missing = self._shop.missing()
        failed = f"the program failed with exit code {exit_code}" if exit_code else None
        self.exit_code = exit_code or (FAILED if missing else 0)
        self.error = "; ".join(filter(None, (failed, missing))) or None
        self.over.set()

    def lane_ended(self, hired: Hired, error: str | None) -> None:
        if self.over.is_set() or error is None:
            return
        self._failed_on.append(hired.id)
        if len(self._failed_on) > self._retries:
            attempts = len(self._failed_on)
            times = f" ({attempts} attempts)" if attempts > 1 else ""
            raise RunFailed(f"{hired.name}: {error}{times}")

    def nobody(self, why: str) -> None:
        raise RunFailed(why)
