"""Contents: opening, reading, writing, truncating, and making them durable.

Imports the cache and sync. Bytes are served from the data file as soon as they are there; they are
changed only when all of them are, since the server takes files whole. Each change is journalled
before it is made; what was acknowledged by close or fsync is on the disk.
"""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import trio

from cpodfs.cache import content as data
from cpodfs.cache.content import Content
from cpodfs.cache.durability import Durability
from cpodfs.cache.schema import CONTENT, SENT
from cpodfs.cache.store import Inode, Store
from cpodfs.errors import Conflict, CpodfsError, NotFound
from cpodfs.fs.handles import Handles, OpenFile
from cpodfs.fs.pods import check_writable, inode_of, oserror
from cpodfs.sync.downloads import Downloads
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
        self._durability = Durability(store, content)
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
            except (OSError, sqlite3.Error):
                log.exception("cannot free what was deleted")

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
        try:
            return self._content.size(inode.ino)
        except FileNotFoundError:
            return self.size(self._lost_content(inode))

    async def truncate(self, inode: Inode, size: int, handle: int | None) -> None:
        """Cut or extend a file, through a handle if there is one."""
        if not inode.is_file:
            raise oserror(errno.EISDIR if inode.is_dir else errno.EINVAL)
        own = self.open(inode.ino, truncate=size == 0) if handle is None else handle
        try:
            file = self._handles.file(own)
            if size == 0:
                self._empty(file)
            else:
                await self._complete(file)
                self._dirty(file.ino)
                os.ftruncate(file.fd, size)
        finally:
            if handle is None:
                self._handles.release(own)

    def open(self, ino: int, *, truncate: bool = False) -> int:
        """A handle for reading and writing."""
        inode = inode_of(self._store, ino)
        if not inode.is_file:
            raise oserror(errno.EISDIR if inode.is_dir else errno.ELOOP)
        if truncate:
            check_writable(self._store, ino)
        handle = self._handles.open(ino, lambda: self._open_data(inode))
        if truncate:
            self._empty(self._handles.file(handle))
        else:
            self._store.set(ino, used_s=time.time())
        return handle

    async def open_to_read(self, ino: int) -> int:
        """A handle whose content is here, or on its way.

        Raises ESTALE when the server has another version by now: the kernel then looks the name up
        again, and finds it.
        """
        handle = self.open(ino)
        inode = inode_of(self._store, ino)
        if inode.cached or not inode.size:
            self._downloads.hits += 1
            return handle
        self._downloads.misses += 1
        try:
            await self._downloads.get(ino, inode.size).wait_begun()
        except (Conflict, NotFound) as error:
            self._handles.release(handle)
            if inode.parent is not None:
                await self._lister.refresh(inode.parent)
            raise oserror(errno.ESTALE, inode.name) from error
        except CpodfsError:
            return handle  # offline, maybe not for long: it is time enough when somebody reads
        return handle

    def _open_data(self, inode: Inode) -> int:
        if inode.cached:
            try:
                return self._content.open(inode.ino)
            except FileNotFoundError:
                inode = self._lost_content(inode)
                if inode.cached:
                    return self._content.open(inode.ino)
        if not any(d.ino == inode.ino for d in self._downloads.running()):
            return self._content.create(inode.ino, inode.size)
        return self._content.open(inode.ino)

    def _lost_content(self, inode: Inode) -> Inode:
        """The data file is not there: a loss of power before it was synced, or somebody's rm in the
        cache folder. Back to what the server has; if it has nothing, to an empty file."""
        log.error("content lost: %s", self._store.path(inode.ino))
        remote = self._store.remote_of(inode.ino)
        with self._store.transaction():
            if remote is None:
                os.close(self._content.create(inode.ino))
            else:
                self._store.set(inode.ino, cached=0, size=max(0, remote.size))
                self._store.unmark(inode.ino, CONTENT | SENT)
        return inode_of(self._store, inode.ino)

    def _empty(self, file: OpenFile) -> None:
        """Truncate to nothing, which needs no download even when nothing is here yet."""
        if not inode_of(self._store, file.ino).cached:
            # A thread of the download may still be writing to the old data file: leave it that.
            self._downloads.unwanted(file.ino, gone=True)
            fresh = self._content.create(file.ino)
            os.dup2(fresh, file.fd, inheritable=False)
            os.close(fresh)
        try:
            with self._store.transaction():
                self._store.set(file.ino, cached=1, mtime_ns=time.time_ns())
                self._dirty(file.ino)
        except BaseException:
            self._engine.closed(file.ino)  # the mark was rolled back
            raise
        os.ftruncate(file.fd, 0)

    async def read(self, handle: int, offset: int, size: int) -> bytes:
        """At most ``size`` bytes; waits for no more of the file than that."""
        file = self._handles.file(handle)
        inode = inode_of(self._store, file.ino)
        download = None
        if not inode.cached and inode.size:
            try:
                download = self._downloads.get(file.ino, inode.size)
                await download.wait_for(offset + size)
            except CpodfsError:
                # Unless somebody emptied the file while we waited.
                if not inode_of(self._store, file.ino).cached:
                    raise
        found = await data.read(file.fd, offset, size)
        now = self._store.get(file.ino)
        if now is not None and not now.cached and len(found) < min(size, now.size - offset):
            # The download failed just then; the kernel would keep zeros.
            failed = download.error if download is not None else None
            raise failed or oserror(errno.EIO)
        return found

    async def write(self, handle: int, offset: int, buffer: bytes) -> int:
        file = self._handles.file(handle)
        await self._complete(file)
        self._content.check_room(len(buffer))
        self._dirty(file.ino)
        left = memoryview(buffer)
        while left:  # the kernel's write-back does not look at how much was written
            written = os.pwrite(file.fd, left, offset)
            left = left[written:]
            offset += written
        return len(buffer)

    def _dirty(self, ino: int) -> None:
        """Journal that a file is about to be changed, before it is."""
        if ino in self._merger.replaced:
            outcome = Outcome()
            self._merger.revive(ino, outcome)
            self._on_outcome(outcome)
        self._engine.wrote(ino)
        self._durability.wrote(ino)

    async def _complete(self, file: OpenFile) -> None:
        """Wait until the whole content is here: uploads send files whole."""
        inode = inode_of(self._store, file.ino)
        if inode.cached:
            return
        check_writable(self._store, file.ino)
        if inode.size:
            await self._downloads.get(file.ino, inode.size).wait_for(inode.size)
        else:
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
        self._merger.replaced.pop(ino, None)

    def _closed(self, ino: int) -> None:
        inode = self._store.get(ino)
        if inode is not None and inode.dirty & CONTENT:
            self._store.set(ino, size=self._content.size(ino))
        self._engine.closed(ino)
        self._durability.forget(ino)
        self._downloads.unwanted(ino)
