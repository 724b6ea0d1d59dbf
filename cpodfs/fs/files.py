"""Contents: opening, reading, writing, truncating, and making them durable.

Imports the cache and sync. Bytes are served from the data file as soon as they are there; they are
changed only when all of them are, since the server takes files whole. That a file changes is in the
journal on the disk before it does; what was acknowledged by close or fsync is on the disk. A data
file that is not what the journal says is not believed: what the server has is fetched again, what it
has not is an error until writeback has set it aside.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from cpodfs.cache import content as data
from cpodfs.cache.content import Content
from cpodfs.cache.durability import Durability
from cpodfs.cache.schema import CONTENT
from cpodfs.cache.store import Inode, Store, trouble
from cpodfs.errors import CacheDamaged, Conflict, CpodfsError, Doubtful, NotFound
from cpodfs.fs.handles import Handles, OpenFile
from cpodfs.fs.pods import check_writable, inode_of, oserror
from cpodfs.sync.downloads import Downloads, Reader
from cpodfs.sync.drain import push
from cpodfs.sync.engine import Engine
from cpodfs.sync.lister import Lister
from cpodfs.sync.merge import Merger, Outcome

log = logging.getLogger(__name__)

SWEEP_S = 0.5


class Files:
    def __init__(
        self,
        store: Store,
        content: Content,
        handles: Handles,
        engine: Engine,
        lister: Lister,
        downloads: Downloads,
        merger: Merger,
        durability: Durability,
        on_outcome: Callable[[Outcome], None],
    ) -> None:
        self._store = store
        self._content = content
        self._handles = handles
        self._engine = engine
        self._lister = lister
        self._downloads = downloads
        self._merger = merger
        self._on_outcome = on_outcome
        self._durability = durability
        self._unjournalled: dict[int, object] = {}
        """Files that became dirty, which the journal on the disk does not say yet: since when."""
        self._looked_at: dict[int, trio.Event] = {}
        handles.on_last_close = self._closed
        handles.on_gone = self._gone
        self._doomed = trio.Event()
        handles.on_doomed = lambda: self._doomed.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Free what was deleted, in batches, until cancelled."""
        task_status.started()
        while True:
            await self._doomed.wait()
            self._doomed = trio.Event()
            await trio.sleep(SWEEP_S)
            try:
                doomed = set(self._handles.doomed)
                await self._durability.names()
                self._handles.sweep(doomed)
            except (OSError, sqlite3.Error) as error:
                log.warning("cannot free what was deleted: %s", trouble(error) or error)

    def sweep_now(self) -> None:
        """The disk is full: free what was deleted without waiting. Blocks for a sync."""
        if self._handles.doomed:
            self._store.sync()
            self._handles.sweep(set(self._handles.doomed))

    @property
    def root(self) -> Path:
        """The folder of the data files, on the disk that limits what can be written."""
        return self._content.root

    def create(self, ino: int) -> int:
        """A handle of a new, empty file."""
        handle = self._handles.open(ino, lambda: self._content.create(ino))
        self._durability.wrote(ino)
        return handle

    def keep(self, inode: Inode) -> None:
        """The file is about to lose its name: fetch what is not here yet for whoever has it open,
        while the server still has it."""
        if self._handles.opened(inode.ino) and not inode.cached and inode.size:
            self._downloads.get(inode.ino, inode.size)

    def size(self, inode: Inode) -> int:
        """Bytes. A dirty file's size is its data file's."""
        if not inode.dirty & CONTENT:
            return inode.size
        file = self._handles.opened(inode.ino)
        if file is not None:
            return os.fstat(file.fd).st_size
        return self._content.size_or_0(inode.ino)

    async def truncate(self, inode: Inode, size: int, handle: int | None) -> None:
        """Cut or extend a file, through a handle if there is one."""
        if not inode.is_file:
            raise oserror(errno.EISDIR if inode.is_dir else errno.EINVAL)
        own = self.open(inode.ino, emptied=size == 0) if handle is None else handle
        try:
            file = self._handles.file(own)
            if size == 0:
                await self._empty(file)
            else:
                await self._complete(file, self._handles.reader(own))
                await self._about_to_change(file.ino, cut_to=size)
                os.ftruncate(file.fd, size)
        finally:
            if handle is None:
                self._handles.release(own)

    def open(self, ino: int, *, emptied: bool = False) -> int:
        """A handle for reading and writing. ``emptied``: what is in the file does not matter."""
        inode = inode_of(self._store, ino)
        if not inode.is_file:
            raise oserror(errno.EISDIR if inode.is_dir else errno.ELOOP)
        if ino in self._merger.replaced:
            # The kernel has not yet heard of the newer version of that name: it looks again.
            raise oserror(errno.ESTALE, inode.name)
        handle = self._handles.open(ino, lambda: self._open_data(inode, emptied=emptied))
        if not emptied:
            with contextlib.suppress(sqlite3.OperationalError):  # to read needs no room
                self._store.set(ino, used_s=time.time())
        return handle

    async def open_emptied(self, ino: int) -> int:
        """A handle of a file that has just been emptied."""
        check_writable(self._store, ino)
        handle = self.open(ino, emptied=True)
        try:
            await self._empty(self._handles.file(handle))
        except BaseException:
            self._handles.release(handle)
            raise
        return handle

    async def open_to_read(self, ino: int) -> int:
        """A handle whose content is here, or on its way.

        Raises ESTALE when the server has another version by now: the kernel then looks the name up
        again, and finds it. Raises Doubtful when the server says that it is not there.
        """
        handle = self.open(ino)
        inode = inode_of(self._store, ino)
        if inode.cached or not inode.size:
            self._downloads.hits += 1
            return handle
        self._downloads.misses += 1
        try:
            await self._downloads.get(ino, inode.size).wait_begun(self._handles.reader(handle))
        except (Conflict, NotFound) as error:
            self._handles.release(handle)
            if inode.parent is not None:
                await self._lister.refresh(inode.parent)
            raise oserror(errno.ESTALE, inode.name) from error
        except Doubtful:
            self._handles.release(handle)
            raise
        except CpodfsError:
            return handle  # offline, maybe not for long: it is time enough when somebody reads
        except BaseException:
            self._handles.release(handle)
            raise
        return handle

    # -- data files, and whether they are believed ------------------------------------------------

    def _open_data(self, inode: Inode, *, emptied: bool) -> int:
        if inode.cached and inode.dirty & CONTENT:
            return self._open_dirty(inode, emptied=emptied)
        if inode.cached:
            with contextlib.suppress(FileNotFoundError):
                return self._content.open(inode.ino)
            self._disbelieve(inode, "is not there")
        if self._downloads.is_running(inode.ino):
            return self._content.open_part(inode.ino)
        return self._content.create_part(inode.ino, inode.size)

    def _open_dirty(self, inode: Inode, *, emptied: bool) -> int:
        if self._content.size_or_0(inode.ino) < inode.size and not emptied:
            self._engine.send_now(inode.ino)  # which sets it aside
            raise CacheDamaged(
                f"{self._store.path(inode.ino)}: the cache has lost bytes of it that the server has "
                "not got; see: cpodfs status"
            )
        return self._content.open_dirty(inode.ino)

    async def _look(self, file: OpenFile) -> None:
        """Before the content of a clean file is believed for the first time since an end that was
        none: it must be what the journal says. Else it is fetched again."""
        while (inode := inode_of(self._store, file.ino)).cached and not inode.dirty & CONTENT:
            if inode.epoch >= self._store.epoch:
                return
            if file.ino in self._looked_at:
                await self._looked_at[file.ino].wait()
                continue
            looked = self._looked_at[file.ino] = trio.Event()
            try:
                found = os.fstat(file.fd).st_size, inode.crc
                if found[0] == inode.size and inode.crc is not None:
                    crc = await trio.to_thread.run_sync(data.checksum, file.fd)
                    found = found[0], crc
                now = self._store.get(file.ino)
                if now is None or now.dirty & CONTENT or not now.cached:
                    continue  # somebody emptied it meanwhile
                if now.epoch >= self._store.epoch:
                    return  # and it was uploaded since
                if found == (now.size, now.crc):
                    with contextlib.suppress(sqlite3.OperationalError):  # to read needs no room
                        self._store.set(file.ino, epoch=self._store.epoch)
                    return
                # First the part: what is not believed must not stay open once it is not "cached".
                fresh = self._content.create_part(file.ino, now.size)
                try:
                    self._disbelieve(now, "has another content than it had")
                except BaseException:
                    os.close(fresh)
                    raise
                self._replace_data(file, fresh)
            finally:
                del self._looked_at[file.ino]
                looked.set()

    def _disbelieve(self, inode: Inode, what: str) -> None:
        """The data file of a clean file is not what the journal says: the server's content counts."""
        aside = self._content.set_aside(inode.ino)
        kept = f"; kept as {aside}" if aside is not None else ""
        log.error(
            "cache: the data file %s, and is fetched again: %r ino=%d%s",
            *(what, self._store.path(inode.ino), inode.ino, kept),
        )
        self._store.set(inode.ino, cached=0)

    def _replace_data(self, file: OpenFile, fresh: int) -> None:
        os.dup2(fresh, file.fd, inheritable=False)
        os.close(fresh)

    async def _empty(self, file: OpenFile) -> None:
        """Truncate to nothing, which needs no download even when nothing is here yet."""
        now, inode = time.time_ns(), inode_of(self._store, file.ino)
        is_believed = inode.dirty & CONTENT or inode.epoch >= self._store.epoch
        if inode.cached and not is_believed:
            # It must not become what is pending, should we end before it is empty.
            self._store.set(file.ino, cached=0)
            inode = inode_of(self._store, file.ino)
        if inode.cached:
            self._mark(file.ino, mtime_ns=now)
        else:
            # A thread of the download may still be writing to its part: leave it that.
            self._downloads.unwanted(file.ino, gone=True)
            self._replace_data(file, self._content.create(file.ino))
            self._mark(file.ino, mtime_ns=now, cached=1, size=0)
        await self._durability.take_error(file.ino, file.fd)
        await self._about_to_change(file.ino, cut_to=0)
        os.ftruncate(file.fd, 0)
        self._durability.emptied(file.ino)

    async def read(self, handle: int, offset: int, size: int) -> bytes:
        """At most ``size`` bytes; waits for no more of the file than that."""
        file = self._handles.file(handle)
        await self._look(file)
        inode = inode_of(self._store, file.ino)
        download = None
        if not inode.cached and inode.size:
            try:
                download = self._downloads.get(file.ino, inode.size)
                await download.wait_for(offset + size, self._handles.reader(handle))
            except CpodfsError:
                # Unless somebody emptied the file while we waited.
                if not inode_of(self._store, file.ino).cached:
                    raise
        found = await data.read(file.fd, offset, size)
        now = self._store.get(file.ino)
        failed = download.error if download is not None else None
        if now is not None and not now.cached:
            # The download failed just then, or began anew; the kernel would keep zeros.
            if failed is not None or len(found) < min(size, now.size - offset):
                raise failed or oserror(errno.EIO)
        elif failed is not None:
            found = await data.read(file.fd, offset, size)
        return found

    async def write(self, handle: int, offset: int, buffer: bytes) -> int:
        file = self._handles.file(handle)
        await self._complete(file, self._handles.reader(handle))
        self._content.check_room(len(buffer))
        await self._about_to_change(file.ino)
        left = memoryview(buffer)
        while left:  # the kernel's write-back does not look at how much was written
            written = os.pwrite(file.fd, left, offset)
            left = left[written:]
            offset += written
        return len(buffer)

    async def _about_to_change(self, ino: int, *, cut_to: int | None = None) -> None:
        """Return when the journal on the disk says that a file is dirty, and no longer than
        ``cut_to``. The caller changes the data file before it awaits anything."""
        while True:
            cut = cut_to is not None and cut_to < inode_of(self._store, ino).size
            self._mark(ino, **({"size": cut_to} if cut else {}))
            since = self._unjournalled.get(ino)
            if since is None and not cut:
                return
            await self._durability.names()
            # Unless an upload made it clean meanwhile, and somebody else dirty.
            if self._unjournalled.get(ino) is since:
                self._unjournalled.pop(ino, None)

    def _mark(self, ino: int, **columns: Any) -> None:
        """Journal that a file is dirty, and ``columns`` with it."""
        if ino in self._merger.replaced:
            outcome = Outcome()
            self._merger.revive(ino, outcome)
            self._on_outcome(outcome)
        was_clean = not inode_of(self._store, ino).dirty & CONTENT
        try:
            with self._store.transaction():
                if columns:
                    self._store.set(ino, **columns)
                self._engine.wrote(ino)
        except BaseException:
            self._engine.closed(ino)  # the mark was rolled back
            raise
        self._durability.wrote(ino)
        if was_clean:
            self._unjournalled[ino] = object()

    async def _complete(self, file: OpenFile, reader: Reader) -> None:
        """Wait until the whole content is here: uploads send files whole."""
        await self._look(file)
        inode = inode_of(self._store, file.ino)
        if inode.cached:
            return
        check_writable(self._store, file.ino)
        if inode.size:
            await self._downloads.get(file.ino, inode.size).wait_for(inode.size, reader)
        else:
            self._content.complete(file.ino)
            self._store.set(file.ino, cached=1)

    async def flush(self, handle: int) -> None:
        """close and fsync: bytes, then names, on the disk."""
        file = self._handles.file(handle)
        await self._durability.flush(file.ino, file.fd)

    async def sync(self, handle: int, *, remote: bool) -> None:
        """fsync; with ``remote``, the server must have it, too (EIO if it will not take it)."""
        await self.flush(handle)
        await self._durability.names()
        if remote:
            await push(self._engine, self._store, self._handles.file(handle).ino)

    async def sync_names(self) -> None:
        await self._durability.names()

    async def read_whole(self, ino: int, limit: int) -> bytes:
        """The first ``limit`` bytes of a file, for ourselves."""
        handle = self.open(ino)
        try:
            size = min(self.size(inode_of(self._store, ino)), limit)
            return await self.read(handle, 0, size) if size else b""
        finally:
            self._handles.release(handle)

    def _gone(self, ino: int) -> None:
        self._downloads.unwanted(ino, gone=True)
        self._downloads.tidy(ino)
        self._merger.replaced.pop(ino, None)
        self._durability.forget(ino)
        self._unjournalled.pop(ino, None)

    def _closed(self, ino: int) -> None:
        self._engine.closed(ino)
        self._downloads.unwanted(ino)
        self._downloads.tidy(ino)
