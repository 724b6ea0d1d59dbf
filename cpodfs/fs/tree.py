"""POSIX semantics over the two trees: what each operation means, and nothing of the kernel's form.

Imports the cache and sync. Raises OSError, or a CpodfsError with its errno. An operation is atomic
from its last await on: whatever it needs from the server is awaited first, then the checks are made,
the cache is changed in one transaction and the engine is told.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from cpodfs import paths
from cpodfs.cache import content as data
from cpodfs.cache.content import Content
from cpodfs.cache.durability import Durability
from cpodfs.cache.schema import CONTENT, DIR, FILE, LINK, MODE, PLACE, ROOT
from cpodfs.cache.store import Inode, Store
from cpodfs.errors import Conflict, CpodfsError, NotFound
from cpodfs.fs.handles import Handles, OpenFile
from cpodfs.sync.downloads import Downloads
from cpodfs.sync.engine import Engine
from cpodfs.sync.lister import Lister
from cpodfs.sync.merge import Merger, Outcome
from cpodfs.sync.ops import SERVER_DIR_MODE

log = logging.getLogger(__name__)

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2


def oserror(code: int, what: object = None) -> OSError:
    return OSError(code, os.strerror(code), what)


@dataclass(frozen=True, slots=True)
class Times:
    """What ``setattr`` may change; None leaves it. Times in nanoseconds."""

    mode: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


class Tree:
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
        self.store = store
        self.content = content
        self.handles = handles
        self.engine = engine
        self._lister = lister
        self._downloads = downloads
        self._merger = merger
        self._on_outcome = on_outcome
        self._durability = Durability(store, content)
        handles.on_last_close = self._closed
        handles.on_gone = self._gone
        for ino in store.unlinked():  # the last driver died while these were open
            handles.purge(ino)

    # -- looking ----------------------------------------------------------------------------------

    def inode(self, ino: int) -> Inode:
        """The inode as the user sees it. A dirty file's size is its data file's."""
        inode = self.store.get(ino)
        if inode is None:
            raise oserror(errno.ENOENT)
        return inode

    def size(self, inode: Inode) -> int:
        if not inode.dirty & CONTENT:
            return inode.size
        file = self.handles.opened(inode.ino)
        if file is not None:
            return os.fstat(file.fd).st_size
        try:
            return self.content.size(inode.ino)
        except FileNotFoundError:
            return self.size(self._lost_content(inode))

    async def directory(self, ino: int) -> Inode:
        """A directory whose children are known."""
        inode = self._directory(ino)
        await self._lister.ensure(inode)
        return inode

    async def opendir(self, ino: int) -> None:
        """A directory is about to be read: its children become known."""
        await self._lister.opened(self._directory(ino))

    async def lookup(self, parent: int, name: str) -> Inode | None:
        """The child of that name, or None. Costs no call when the listing is known."""
        await self.directory(parent)
        return self.store.child(parent, name)

    def pod_of(self, ino: int) -> Inode | None:
        """The pod that the inode is in (or is); None for the root and for what has no name."""
        above = self.store.ancestors(ino)
        return above[-1] if above and above[-1].parent == ROOT else None

    # -- names ------------------------------------------------------------------------------------

    async def create(self, parent: int, name: str, mode: int) -> tuple[Inode, int]:
        """A new empty file and an open handle of it."""
        await self._free_name(parent, name, FILE)
        with self.store.transaction():
            inode = self.store.create(
                parent, name, FILE, mode & 0o7777, cached=1, dirty=CONTENT | PLACE
            )
            handle = self.handles.open(inode.ino, lambda: self.content.create(inode.ino))
            self._modified(parent)
        self.engine.touch(("ino", inode.ino))
        self._durability.wrote(inode.ino)
        return inode, handle

    async def mkdir(self, parent: int, name: str, mode: int) -> Inode:
        """A new directory; in the root, a new pod."""
        await self._free_name(parent, name, DIR)
        with self.store.transaction():
            mode = SERVER_DIR_MODE if parent == ROOT else mode & 0o7777
            inode = self.store.create(parent, name, DIR, mode, dirty=PLACE)
            self.store.set(inode.ino, listed_s=time.time())
            self._modified(parent)
        self.engine.touch(("ino", inode.ino))
        return inode

    async def symlink(self, parent: int, name: str, target: str) -> Inode:
        """A symbolic link: FairOS-DFS has none, so it lives in the cache."""
        await self._free_name(parent, name, LINK)
        with self.store.transaction():
            size = len(os.fsencode(target))
            inode = self.store.create(parent, name, LINK, 0o777, size=size, target=target)
            self._modified(parent)
        return inode

    async def unlink(self, parent: int, name: str) -> Inode:
        inode = await self._existing(parent, name)
        self.check_writable(inode.ino)
        if inode.is_dir:
            raise oserror(errno.EISDIR, name)
        with self.store.transaction():
            self._detach(inode)
            self._modified(parent)
        return inode

    async def rmdir(self, parent: int, name: str) -> Inode:
        """Remove an empty directory; in the root, an empty pod of one's own."""
        inode = await self._existing(parent, name)
        self.check_writable(inode.ino)
        if not inode.is_dir:
            raise oserror(errno.ENOTDIR, name)
        await self.directory(inode.ino)
        inode = await self._existing(parent, name)
        if self.store.has_children(inode.ino):
            raise oserror(errno.ENOTEMPTY, name)
        with self.store.transaction():
            self._detach(inode)
            self._modified(parent)
        return inode

    async def rename(
        self, parent: int, name: str, to_parent: int, to_name: str, flags: int
    ) -> None:
        """Rename as rename(2) says, over an existing target too; EXDEV between pods."""
        inode = await self._existing(parent, name)
        await self.directory(to_parent)
        target = self.store.child(to_parent, to_name)
        if target is not None and target.is_dir:
            await self.directory(target.ino)
        inode = await self._existing(parent, name)
        target = self.store.child(to_parent, to_name)
        self._check_rename(inode, target, to_parent, to_name, flags)
        if target is not None and target.ino == inode.ino:
            return
        with self.store.transaction():
            if target is not None and flags & RENAME_EXCHANGE:
                self._exchange(inode, target)
            else:
                if target is not None:
                    self._detach(target)
                self.store.place(inode.ino, to_parent, to_name)
            self._modified(parent)
            self._modified(to_parent)
        self.engine.touch(("ino", inode.ino))
        self._left(parent, name)

    def _exchange(self, one: Inode, other: Inode) -> None:
        assert one.parent is not None
        assert one.name is not None
        assert other.parent is not None
        assert other.name is not None
        self.store.place(one.ino, one.parent, f"{paths.TEMP_PREFIX}{one.ino}")
        self.store.place(other.ino, one.parent, one.name)
        self.store.place(one.ino, other.parent, other.name)
        self.engine.touch(("ino", other.ino))

    def _check_rename(
        self, inode: Inode, target: Inode | None, to_parent: int, to_name: str, flags: int
    ) -> None:
        assert inode.name is not None
        self.check_writable(inode.ino)
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE):
            raise oserror(errno.EINVAL, to_name)
        if flags & RENAME_NOREPLACE and target is not None:
            raise oserror(errno.EEXIST, to_name)
        if flags & RENAME_EXCHANGE and target is None:
            raise oserror(errno.ENOENT, to_name)
        self._check_name(to_parent, to_name, inode.kind)
        if self.pod_of(inode.ino) != self.pod_of(to_parent):
            self._check_pod_rename(inode, target, to_parent)
        if any(above.ino == inode.ino for above in self.store.ancestors(to_parent)):
            raise oserror(errno.EINVAL, to_name)
        if target is None or flags & RENAME_EXCHANGE:
            return
        self.check_writable(target.ino)
        if target.is_dir and not inode.is_dir:
            raise oserror(errno.EISDIR, to_name)
        if inode.is_dir and not target.is_dir:
            raise oserror(errno.ENOTDIR, to_name)
        if target.is_dir and self.store.has_children(target.ino):
            raise oserror(errno.ENOTEMPTY, to_name)

    def _check_pod_rename(self, inode: Inode, target: Inode | None, to_parent: int) -> None:
        """FairOS-DFS cannot rename a pod, but one that it has not heard of can be (New Folder…)."""
        unsent = inode.parent == ROOT and self.store.remote_of(inode.ino) is None
        if not (unsent and to_parent == ROOT and target is None):
            raise oserror(errno.EXDEV, inode.name)

    # -- attributes -------------------------------------------------------------------------------

    async def set_attributes(self, ino: int, change: Times, handle: int | None) -> Inode:
        """chmod, truncate and utimens, whichever are asked for."""
        inode = self.inode(ino)
        self.check_writable(ino)
        before = self.size(inode)
        if change.size is not None:
            await self._truncate(inode, change.size, handle)
        with self.store.transaction():
            inode = self.inode(ino)
            columns: dict[str, int] = {}
            if change.atime_ns is not None:
                columns["atime_ns"] = change.atime_ns
            if change.mtime_ns is not None:
                columns["mtime_ns"] = change.mtime_ns
            elif change.size is not None and change.size != before:
                columns["mtime_ns"] = time.time_ns()
            if change.mode is not None and change.mode != inode.mode:
                columns["mode"] = change.mode
                if inode.kind != LINK and inode.parent not in (None, ROOT):
                    self.store.mark(ino, MODE)
                    self.engine.touch(("ino", ino))
            self.store.set(ino, ctime_ns=time.time_ns(), **columns)
        return self.inode(ino)

    async def _truncate(self, inode: Inode, size: int, handle: int | None) -> None:
        if not inode.is_file:
            raise oserror(errno.EISDIR if inode.is_dir else errno.EINVAL)
        own = self.open(inode.ino, truncate=size == 0) if handle is None else handle
        try:
            file = self.handles.file(own)
            if size == 0:
                self._empty(file)
            else:
                await self._complete(file)
                self._dirty(file.ino)
                os.ftruncate(file.fd, size)
        finally:
            if handle is None:
                self.handles.release(own)

    # -- contents ---------------------------------------------------------------------------------

    def open(self, ino: int, *, truncate: bool = False) -> int:
        """A handle for reading and writing."""
        inode = self.inode(ino)
        if not inode.is_file:
            raise oserror(errno.EISDIR if inode.is_dir else errno.ELOOP)
        if truncate:
            self.check_writable(ino)
        handle = self.handles.open(ino, lambda: self._open_data(inode))
        if truncate:
            self._empty(self.handles.file(handle))
        else:
            self.store.set(ino, used_s=time.time())
        return handle

    async def open_to_read(self, ino: int) -> int:
        """A handle whose content is here, or on its way.

        Raises ESTALE when the server has another version by now: the kernel then looks the name up
        again, and finds it.
        """
        handle = self.open(ino)
        inode = self.inode(ino)
        if inode.cached or not inode.size:
            self._downloads.hits += 1
            return handle
        self._downloads.misses += 1
        try:
            await self._downloads.get(ino, inode.size).wait_begun()
        except (Conflict, NotFound) as error:
            self.handles.release(handle)
            if inode.parent is not None:
                await self._lister.refresh(inode.parent)
            raise oserror(errno.ESTALE, inode.name) from error
        except CpodfsError:
            return handle  # offline, maybe not for long: it is time enough when somebody reads
        return handle

    def _open_data(self, inode: Inode) -> int:
        if inode.cached:
            try:
                return self.content.open(inode.ino)
            except FileNotFoundError:
                inode = self._lost_content(inode)
                if inode.cached:
                    return self.content.open(inode.ino)
        if not any(d.ino == inode.ino for d in self._downloads.running()):
            return self.content.create(inode.ino, inode.size)
        return self.content.open(inode.ino)

    def _lost_content(self, inode: Inode) -> Inode:
        """The data file is not there: a loss of power before it was synced, or somebody's rm in the
        cache folder. Back to what the server has; if it has nothing, to an empty file."""
        log.error("content lost: %s", self.store.path(inode.ino))
        remote = self.store.remote_of(inode.ino)
        with self.store.transaction():
            if remote is None:
                os.close(self.content.create(inode.ino))
            else:
                self.store.set(inode.ino, cached=0, size=max(0, remote.size))
                self.store.unmark(inode.ino, CONTENT)
        return self.inode(inode.ino)

    def _empty(self, file: OpenFile) -> None:
        """Truncate to nothing, which needs no download even when nothing is here yet."""
        if not self.inode(file.ino).cached:
            # A thread of the download may still be writing to the old data file: leave it that.
            self._downloads.unwanted(file.ino, gone=True)
            fresh = self.content.create(file.ino)
            os.dup2(fresh, file.fd, inheritable=False)
            os.close(fresh)
        try:
            with self.store.transaction():
                self.store.set(file.ino, cached=1, mtime_ns=time.time_ns())
                self._dirty(file.ino)
        except BaseException:
            self.engine.closed(file.ino)  # the mark was rolled back
            raise
        os.ftruncate(file.fd, 0)

    async def read(self, handle: int, offset: int, size: int) -> bytes:
        """At most ``size`` bytes; waits for no more of the file than that."""
        file = self.handles.file(handle)
        inode = self.inode(file.ino)
        if not inode.cached and inode.size:
            try:
                await self._downloads.get(file.ino, inode.size).wait_for(offset + size)
            except CpodfsError:
                if not self.inode(file.ino).cached:  # else: emptied by somebody while we waited
                    raise
        return await data.read(file.fd, offset, size)

    async def write(self, handle: int, offset: int, buffer: bytes) -> int:
        file = self.handles.file(handle)
        await self._complete(file)
        self.content.check_room(len(buffer))
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
        self.engine.wrote(ino)
        self._durability.wrote(ino)

    async def _complete(self, file: OpenFile) -> None:
        """Wait until the whole content is here: uploads send files whole."""
        inode = self.inode(file.ino)
        if inode.cached:
            return
        self.check_writable(file.ino)
        if inode.size:
            await self._downloads.get(file.ino, inode.size).wait_for(inode.size)
        else:
            self.store.set(file.ino, cached=1)

    async def flush(self, handle: int) -> None:
        """close and fsync: bytes, then names, on the disk."""
        file = self.handles.file(handle)
        await self._durability.flush(file.ino, file.fd)

    async def sync(self, handle: int, *, remote: bool) -> None:
        """fsync; with ``remote``, the server must have it, too (EIO if it will not take it)."""
        await self.flush(handle)
        await self._durability.names()
        if remote:
            await self.engine.push(self.handles.file(handle).ino)

    async def sync_names(self) -> None:
        await self._durability.names()

    async def read_whole(self, ino: int, limit: int) -> bytes:
        """The first ``limit`` bytes of a file, for ourselves."""
        handle = self.open(ino)
        try:
            size = min(self.size(self.inode(ino)), limit)
            return await self.read(handle, 0, size) if size else b""
        finally:
            self.handles.release(handle)

    def _gone(self, ino: int) -> None:
        self._downloads.unwanted(ino, gone=True)
        self._merger.replaced.pop(ino, None)

    def _closed(self, ino: int) -> None:
        inode = self.store.get(ino)
        if inode is not None and inode.dirty & CONTENT:
            self.store.set(ino, size=self.content.size(ino))
        self.engine.closed(ino)
        self._durability.forget(ino)
        self._downloads.unwanted(ino)

    # -- checks -----------------------------------------------------------------------------------

    def _directory(self, ino: int) -> Inode:
        inode = self.inode(ino)
        if not inode.is_dir:
            raise oserror(errno.ENOTDIR)
        return inode

    async def _existing(self, parent: int, name: str) -> Inode:
        inode = await self.lookup(parent, name)
        if inode is None:
            raise oserror(errno.ENOENT, name)
        return inode

    async def _free_name(self, parent: int, name: str, kind: str) -> None:
        directory = await self.directory(parent)
        if directory.ino != ROOT and directory.parent is None:
            raise oserror(errno.ENOENT, name)  # removed while somebody's working directory
        self._check_name(parent, name, kind)
        self.check_writable(parent)
        if self.store.child(parent, name) is not None:
            raise oserror(errno.EEXIST, name)

    def _check_name(self, parent: int, name: str, kind: str) -> None:
        if parent == ROOT:
            if kind != DIR:
                raise oserror(errno.EPERM, f"{name}: only pods live at the top of the mount")
            paths.check_pod_name(name)
        elif kind == DIR:
            paths.check_dir_name(name)
        else:
            paths.check_file_name(name)

    def check_writable(self, ino: int) -> None:
        """Raise EROFS in a pod that was received from somebody else."""
        pod = self.pod_of(ino)
        remote = self.store.remote_of(pod.ino) if pod is not None else None
        if remote is not None and remote.readonly:
            raise oserror(errno.EROFS, pod.name if pod else None)

    # -- changes ----------------------------------------------------------------------------------

    def _detach(self, inode: Inode) -> None:
        parent, name = inode.parent, inode.name
        assert parent is not None
        assert name is not None
        if self.handles.opened(inode.ino) and not inode.cached and inode.size:
            self._downloads.get(inode.ino, inode.size)  # while the server still has it
        orphan = self.store.detach(inode.ino)
        self.engine.unlinked(inode.ino)
        if orphan is not None:
            self.engine.touch(("rid", orphan.rid))
        self._left(parent, name)
        self.handles.discard(inode.ino)

    def _left(self, parent: int, name: str) -> None:
        """A name became free: what the server still has there is nobody's, unless it has an heir."""
        home = self.store.remote_of(parent)
        there = self.store.remote_at(home.rid, name) if home is not None else None
        if there is not None and there.ino is None:
            self.engine.touch(("rid", there.rid))

    def _modified(self, directory: int) -> None:
        now = time.time_ns()
        self.store.set(directory, mtime_ns=now, ctime_ns=now)
