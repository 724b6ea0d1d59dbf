"""Fetching contents: one stream per file however many read it, bytes served as they arrive.

Imports the cache and the DFS client. FairOS-DFS has no ranges: a stream starts at byte 0, and a
reader far ahead of it waits until it gets there. A broken stream starts again and only the bytes not
there yet are waited for; after ``attempts`` failures the readers get the error. A reader for whom
nothing comes gets it after ``patience_s`` seconds, once for all calls of his that follow each other,
while the attempts go on.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from cpodfs.cache.content import Content
from cpodfs.cache.store import Remote, Store, trouble
from cpodfs.dfs import Client
from cpodfs.errors import (
    BadReply,
    Conflict,
    CpodfsError,
    Doubtful,
    Held,
    NotFound,
    ServerError,
    TimedOut,
    Unreachable,
)
from cpodfs.sync.ops import pod_and_path

log = logging.getLogger(__name__)

PASSING = (BadReply, Unreachable, ServerError, Doubtful)
KEEP_GOING_BYTES = 8 << 20
"""A download of at most so many bytes is finished even when its last reader has gone."""


OTHER_S = 120.0
"""For so long another content than the one that was evicted, of the same version, is not believed."""
AGAIN_S = 5.0
"""Who comes again so soon after he waited in vain goes on with the same wait."""


@dataclass(slots=True)
class Reader:
    """Somebody who waits for bytes: through open, reads and the kernel's repeats of them, with one
    patience for all. Times are trio's."""

    since_s: float = float("-inf")
    in_vain_s: float = float("-inf")

    def comes(self) -> None:
        now = trio.current_time()
        if now - self.in_vain_s > AGAIN_S:
            self.since_s = now

    def leaves_in_vain(self) -> None:
        self.in_vain_s = trio.current_time()


@dataclass(slots=True)
class Pulse:
    """When bytes came last, of whatever file (trio's time), and how long readers do without."""

    patience_s: float
    moved_s: float = float("-inf")


@dataclass(slots=True)
class Download:
    """A file being fetched into its data file. ``available``: bytes from 0 on that may be read.

    ``queued``: it waits for others to end, and so do its readers, as long as those get on. Only when
    its turn has come does it open the part: any number may wait, and descriptors are few.
    """

    ino: int
    rid: int
    size: int
    pulse: Pulse
    queued: bool = True
    failure: CpodfsError | None = None
    tried: int = 0
    moved_s: float = float("-inf")
    available: int = 0
    crc: int = 0
    finished: bool = False
    begun: bool = False
    error: CpodfsError | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    _moved: trio.Event = field(default_factory=trio.Event)

    async def wait_for(self, end: int, reader: Reader) -> None:
        """Return when the first ``end`` bytes are there. Raises why they will not be."""
        reader.comes()
        while self.available < min(end, self.size) or (end >= self.size and not self.finished):
            await self._wait(reader)

    async def wait_begun(self, reader: Reader) -> None:
        """Return when the server has begun to answer. Raises why it did not."""
        reader.comes()
        while not (self.begun or self.finished):
            await self._wait(reader)

    async def _wait(self, reader: Reader) -> None:
        """Return when something has changed. Raises why nothing will, or has for too long."""
        try:
            await self._change(reader.since_s)
        except CpodfsError:
            reader.leaves_in_vain()
            raise

    async def _change(self, came_s: float) -> None:
        if self.error is not None:
            raise self.error
        event = self._moved
        while not event.is_set():
            since = max(came_s, self._alive_s())
            with trio.move_on_at(since + self.pulse.patience_s):
                await event.wait()
            if not event.is_set() and self._alive_s() <= since:
                raise self.failure or TimedOut("the server sends nothing")

    def _alive_s(self) -> float:
        return max(self.moved_s, self.pulse.moved_s) if self.queued else self.moved_s

    def start(self) -> None:
        """Its turn has come; the time for which others got on meanwhile does not count."""
        if self.queued:
            self.queued = False
            self.moved_s = self.pulse.moved_s

    def moved(self) -> None:
        """Bytes came."""
        self.moved_s = self.pulse.moved_s = trio.current_time()
        self.changed()

    def changed(self) -> None:
        self._moved.set()
        self._moved = trio.Event()


class Downloads:
    def __init__(
        self,
        store: Store,
        content: Content,
        dfs: Client,
        *,
        parallel: int,
        attempts: int = 3,
        patience_s: float = 30.0,
    ) -> None:
        self._store = store
        self._content = content
        self._dfs = dfs
        self._limit = trio.CapacityLimiter(parallel)
        self._attempts = attempts
        self._pulse = Pulse(patience_s)
        self._running: dict[int, Download] = {}
        self._others: dict[int, tuple[int, float]] = {}  # unexpected checksums, since when
        self.hits = 0
        """Opens for reading that found the content here, or nothing to fetch."""
        self.misses = 0
        self.on_complete: Callable[[], None] = lambda: None
        self.is_held: Callable[[int], bool] = lambda _ino: False
        self.on_absent: Callable[[int, Exception], None] = lambda _rid, _error: None
        """Told the remote id of what the server says is not there."""
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the downloads until cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    def running(self) -> list[Download]:
        return list(self._running.values())

    def is_running(self, ino: int) -> bool:
        return ino in self._running

    def is_read(self, rid: int | None) -> bool:
        """Whether the content of this remote object is being fetched."""
        return any(download.rid == rid for download in self._running.values())

    def get(self, ino: int, size: int) -> Download:
        """The download of a file that is not cached, started if need be. Raises NotFound or Held."""
        download = self._running.get(ino)
        if download is None:
            assert self._nursery is not None
            remote = self._store.remote_of(ino)
            if remote is None:
                raise NotFound("the content was not here yet when the file was deleted")
            if self.is_held(ino):
                # The server may have another version, of the same size.
                raise Held("its content was lost here, and another would not be what is run")
            os.close(self._content.create_part(ino, size))
            download = Download(ino, remote.rid, size, self._pulse)
            self._running[ino] = download
            self._nursery.start_soon(self._fetch, download)
        download.tried = 0  # whoever comes late may hope as much as who came first
        return download

    def unwanted(self, ino: int, *, gone: bool = False) -> None:
        """The last reader closed the file (or, ``gone``, it will never be read again)."""
        download = self._running.get(ino)
        if download is not None and (gone or download.size > KEEP_GOING_BYTES):
            # The name of the part goes at once: the next download gets a file of its own,
            # and what this one's thread still writes harms nobody.
            del self._running[ino]
            self._content.remove_part(ino)
            download.scope.cancel()

    def tidy(self, ino: int) -> None:
        """Nobody has the file open: a part that nothing is fetched into can go."""
        if ino not in self._running:
            self._content.remove_part(ino)

    async def _fetch(self, download: Download) -> None:
        error: CpodfsError | None = None
        try:
            with download.scope:
                while download.tried < self._attempts:
                    download.tried += 1
                    try:
                        async with self._limit:
                            download.start()
                            await self._into_part(download)
                        error = None
                        break
                    except PASSING as failure:
                        error = download.failure = failure
                        log.info(
                            *("download broke ino=%d attempt=%d: %s", download.ino),
                            *(download.tried, failure),
                        )
                        pause_s = failure.retry_after_s or 0.0
                        await trio.sleep(max(0.1 * 2**download.tried, pause_s))
        except CpodfsError as failure:
            error = failure
        except OSError as failure:
            error = CpodfsError(f"cannot write to the cache: {failure}")
            error.errno = failure.errno or error.errno
        except Exception as failure:
            if (why := trouble(failure)) is None:
                log.exception("download broke ino=%d", download.ino)
            error = CpodfsError(f"download failed: {why or repr(failure)}")
        finally:
            self._end(download, error)

    def _end(self, download: Download, error: CpodfsError | None) -> None:
        given_up = self._running.get(download.ino) is not download
        if not given_up:
            del self._running[download.ino]
        complete = error is None and download.available == download.size
        if complete and not given_up and self._record(download):
            download.finished = True
            self.on_complete()
        else:
            # Emptied, not removed: whoever has the part open reads the next attempt's bytes.
            download.available = 0
            if not given_up:
                self._content.empty_part(download.ino)
            download.error = error or BadReply("the download was given up")
        download.changed()

    def _record(self, download: Download) -> bool:
        try:
            if self._store.get(download.ino) is None:
                return False
            self._content.complete(download.ino)
            try:
                self._store.set(download.ino, cached=1, crc=download.crc, epoch=self._store.epoch)
            except sqlite3.Error:
                # Whoever has it open must see the next attempt, too, which has to go to this file.
                self._content.reopen(download.ino)
                raise
        except (OSError, sqlite3.Error) as error:
            log.warning(
                "download cannot be recorded ino=%d: %s", download.ino, trouble(error) or error
            )
            return False
        return True

    async def _into_part(self, download: Download) -> None:
        fd = self._content.open_part(download.ino)
        started = self._store.remote_path(download.rid)
        try:
            await self._stream(download, fd)
        except NotFound as error:
            if not error.endpoint:  # our own word: it is deleted here
                raise
            now = self._store.remote_path(download.rid)
            if now != started or self._store.moving_above(download.rid):
                raise Doubtful(f"{error.message}, while we rename it") from error
            # That the server does not find what it had is no proof of a deletion.
            self.on_absent(download.rid, error)
            raise Doubtful(f"{error.message}, though it was there") from error
        finally:
            os.close(fd)

    async def _stream(self, download: Download, fd: int) -> None:
        remote = self._store.remote(download.rid)
        if remote is None:
            raise NotFound("the file is no longer at the server")
        offset = download.crc = 0
        async with self._dfs.download(*pod_and_path(self._store, download.rid)) as body:
            if body.size != download.size:
                raise await self._other_version(remote, download, body.size)
            if not download.begun:
                download.begun = True
                download.moved()
            async for chunk in body:
                self._content.check_room(len(chunk))
                download.crc = await trio.to_thread.run_sync(
                    _write_all, fd, chunk, offset, download.crc
                )
                offset += len(chunk)
                if offset > download.available:
                    download.available = offset
                    download.moved()
        self._check_crc(download)
        # Before it takes the data file's place: else a loss of power could leave holes in it.
        await trio.to_thread.run_sync(os.fdatasync, fd)

    async def _other_version(self, remote: Remote, download: Download, size: int) -> CpodfsError:
        """What to make of a body of another size: somebody's new version, or an earlier one, as the
        server sends when it cannot read the newest."""
        stat = await self._dfs.stat_file(*pod_and_path(self._store, remote.rid))
        if remote.is_version(stat.size, stat.mtime_s) or remote.is_older(stat.mtime_s):
            return Doubtful(f"{size} bytes sent, though {download.size} are there")
        return Conflict(f"{size} bytes at the server, {download.size} expected")

    def _check_crc(self, download: Download) -> None:
        """Raise Doubtful for content that is not the one which was here, or was sent from here, before
        it was evicted; unless the server sends it again and again."""
        inode = self._store.get(download.ino)
        known = None if inode is None or self._store.is_outdated else inode.crc
        if known is None or known == download.crc:
            self._others.pop(download.ino, None)
            return
        now_s = trio.current_time()
        crc, since_s = self._others.get(download.ino, (download.crc, now_s))
        if crc != download.crc or now_s - since_s < OTHER_S:
            self._others[download.ino] = download.crc, since_s if crc == download.crc else now_s
            raise Doubtful("another content sent than the one that was here before")
        log.warning(
            "another content, of the same size and time: %r", self._store.path(download.ino)
        )
        del self._others[download.ino]


def _write_all(fd: int, chunk: bytes, offset: int, crc: int) -> int:
    """Write all of a chunk; returns the CRC-32 of everything up to its end."""
    view = memoryview(chunk)
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written
    return zlib.crc32(chunk, crc)
