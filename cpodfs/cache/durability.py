"""What has been acknowledged as durable, and is: in as few syncs as can be.

Imports the cache. A close or fsync returns only when the data file, its entry in the cache folder
and the journal that names it are on the disk. Many that wait at once share one sync of the journal.

The journal goes first, in three places: it says that a file is dirty before its data file changes,
that it is shorter before it is cut, and what is sent before the server hears of it. So a loss of
power leaves no more to find out than the death of the process does.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from contextlib import suppress

import trio

from cpodfs.cache.content import Content, Lost
from cpodfs.cache.schema import CONTENT, DAMAGED
from cpodfs.cache.store import Store, level, trouble
from cpodfs.errors import CacheDamaged

log = logging.getLogger(__name__)

AT_ONCE = 32
"""Data files synced at once; each takes two descriptors besides its own."""
PASSES = 3


class Durability:
    """``wrote`` marks what a later ``flush`` must make durable."""

    def __init__(self, store: Store, content: Content) -> None:
        self.content = content
        self._store = store
        self._unsynced: set[int] = set()
        self._lost: dict[int, str] = {}
        self._syncing: dict[int, trio.Event] = {}
        self._asked = 0
        self._done = 0
        self._running = False
        self._round = trio.Event()
        self._descriptors = trio.CapacityLimiter(AT_ONCE)
        self._grown = trio.Event()
        self._room = trio.Event()
        self._room.set()
        store.on_grown = lambda: self._grown.set()

    def wrote(self, ino: int) -> None:
        self._unsynced.add(ino)

    def forget(self, ino: int) -> None:
        self._unsynced.discard(ino)
        self._lost.pop(ino, None)

    async def flush(self, ino: int, fd: int) -> None:
        """Make a file durable if it was written to since the last time. Raises OSError or CacheDamaged.

        Bytes and journal at once: neither promises anything until both are there.
        """
        while ino in self._unsynced or ino in self._syncing:
            if ino in self._syncing:
                await self._syncing[ino].wait()
            else:
                await self._flush(ino, fd)

    async def _flush(self, ino: int, fd: int) -> None:
        self._unsynced.discard(ino)
        done = self._syncing[ino] = trio.Event()
        try:
            size = os.fstat(fd).st_size
            await self.both(ino, fd)
            if ino not in self._unsynced:
                # From now on the data file holds no less, or it was damaged.
                self._store.acknowledge(ino, size)
        except BaseException:
            self._unsynced.add(ino)
            raise
        finally:
            del self._syncing[ino]
            done.set()

    async def both(self, ino: int, fd: int) -> None:
        """Make a data file and every change of names and attributes so far durable. Raises OSError or
        CacheDamaged."""
        async with self._descriptors:
            own = os.dup(fd)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self.names)
                    await self._bytes(ino, own)
            except* (OSError, CacheDamaged) as group:
                raise group.exceptions[0] from None
            finally:
                os.close(own)

    async def _bytes(self, ino: int, fd: int) -> None:
        if (why := self._why_lost(ino)) is not None:
            raise self._damaged(ino, why)
        try:
            await trio.to_thread.run_sync(self.content.sync, ino, fd)
        except Lost as error:
            inode = self._store.get(ino)
            if inode is None or not inode.dirty & CONTENT:
                raise
            damaged = self._lose(ino, error)
            with suppress(OSError):  # else nothing is sent any more
                await self.names()
            raise damaged from error

    def _lose(self, ino: int, error: Lost) -> CacheDamaged:
        why = self._lost[ino] = (
            f"the cache's disk could not keep what was written to it ({error.strerror}); it is not "
            "uploaded; write the file anew, or remove it"
        )
        damaged = self._damaged(ino, why)
        damaged.errno = error.errno or damaged.errno
        log.error("cache: %s", damaged)
        return damaged

    def _why_lost(self, ino: int) -> str | None:
        """What is the matter with a file that lost bytes, since this start or before."""
        inode = self._store.get(ino)
        if inode is not None and inode.dirty & DAMAGED:
            return self._lost.get(ino) or inode.error or "its bytes are not all there"
        return self._lost.get(ino)

    def _damaged(self, ino: int, why: str) -> CacheDamaged:
        with suppress(sqlite3.Error):  # on a full disk: as long as we live we know it anyway
            inode = self._store.get(ino)
            if inode is not None and inode.dirty & CONTENT and not inode.dirty & DAMAGED:
                self._store.damaged(ino, why)
        return CacheDamaged(f"{self._store.path(ino)}: {why}")

    async def take_error(self, ino: int, fd: int) -> None:
        """All that a file holds is about to go: what the kernel has yet to tell of it is not told of
        what comes then."""
        if self._why_lost(ino) is not None:
            with suppress(OSError):
                await trio.to_thread.run_sync(os.fdatasync, fd)

    def emptied(self, ino: int) -> None:
        """Nothing is left of what a file held: it is whole again, if bytes of it were lost."""
        if self._why_lost(ino) is not None:
            self._store.emptied(ino)
            self._lost.pop(ino, None)

    async def names(self) -> None:
        """Make every change of names and attributes so far durable. Raises OSError."""
        self._asked += 1
        mine = self._asked
        while self._done < mine:
            if self._running:
                await self._round.wait()
            else:
                await self._sync()

    async def _sync(self) -> None:
        """One sync serves all who asked before it began; who asks later may have committed later."""
        self._running = True
        asked = self._asked
        try:
            await trio.to_thread.run_sync(self._store.sync)
            self._done = asked
        finally:
            self._running = False
            self._round.set()
            self._round = trio.Event()

    # -- the journal's length ---------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Move the journal into the database in the background, until cancelled: a commit that did it
        would keep all others waiting for the disk."""
        task_status.started()
        while True:
            await self._grown.wait()
            self._grown = trio.Event()
            try:
                await self._shorten()
            except sqlite3.Error as error:  # a full disk: whoever commits is told
                why = trouble(error) or str(error)
                log.log(level(why), "the journal cannot be moved into the database: %s", why)
            finally:
                self._room.set()

    async def _shorten(self) -> None:
        """The journal begins anew when all of it was moved and nothing was committed meanwhile."""
        for _ in range(PASSES):
            before = self._store.written
            if not await trio.to_thread.run_sync(self._store.checkpoint):
                return  # somebody reads what is in there
            if self._store.written == before:
                return
            if self._room.is_set():
                self._room = trio.Event()  # from the second pass on whoever writes much waits
        self._store.finish_checkpoint()

    async def room(self) -> None:
        """Whoever writes much waits here, so that the journal can begin anew."""
        await self._room.wait()
