"""POSIX semantics over the two trees: what each operation means, and nothing of the kernel's form.

Imports the cache and sync. Raises OSError, or a CpodfsError with its errno. An operation is atomic
from its last await on: whatever it needs from the server is awaited first, then the checks are made,
the cache is changed in one transaction and the engine is told.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from cpodfs import paths
from cpodfs.cache.schema import CONTENT, DIR, FILE, LINK, MODE, PLACE, ROOT
from cpodfs.cache.store import Inode, Store
from cpodfs.errors import Doubtful
from cpodfs.fs import pods
from cpodfs.fs.files import Files
from cpodfs.fs.handles import Handles
from cpodfs.fs.pods import oserror
from cpodfs.sync.engine import Engine
from cpodfs.sync.lister import Lister
from cpodfs.sync.ops import SERVER_DIR_MODE

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2


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
        handles: Handles,
        engine: Engine,
        lister: Lister,
        files: Files,
    ) -> None:
        self.store = store
        self.handles = handles
        self.engine = engine
        self.files = files
        self._lister = lister
        root = store.get(ROOT)
        if root is not None and not root.mtime_ns:  # a new cache; the server has no date for it
            now = time.time_ns()
            store.set(ROOT, atime_ns=now, mtime_ns=now, ctime_ns=now)
        for ino in store.unlinked():  # the last driver died while these were open
            handles.purge(ino)

    # -- looking ----------------------------------------------------------------------------------

    async def directory(self, ino: int) -> Inode:
        """A directory whose children are known."""
        inode = self._directory(ino)
        await self._lister.ensure(inode)
        return self._directory(ino)  # it may have changed meanwhile

    async def opendir(self, ino: int) -> None:
        """A directory is about to be read: its children become known."""
        await self._lister.opened(self._directory(ino))

    async def lookup(self, parent: int, name: str) -> Inode | None:
        """The child of that name, or None. Costs no call when the listing is known and current.

        What is known is answered at once, however old the listing. A pod that is not may have been
        made elsewhere since, so an outdated list of pods is renewed first. Not so a folder's: git
        and make look for absent names in every folder, one after another.
        """
        directory = await self.directory(parent)
        found = self.store.child(parent, name)
        if found is None and parent == ROOT and not self.engine.offline:
            await self._lister.renewed(directory)
            found = self.store.child(parent, name)
        return found

    # -- names ------------------------------------------------------------------------------------

    async def create(self, parent: int, name: str, mode: int) -> tuple[Inode, int]:
        """A new empty file and an open handle of it."""
        await self._free_name(parent, name, FILE)
        handle = 0
        try:
            with self.store.transaction():
                inode = self.store.create(
                    parent, name, FILE, mode & 0o7777, cached=1, dirty=CONTENT | PLACE
                )
                handle = self.files.create(inode.ino)
                self._modified(parent)
        except BaseException:
            if handle:  # its number is given again
                self.handles.release(handle)
            raise
        self.engine.touch(("ino", inode.ino))
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
        pods.check_writable(self.store, inode.ino)
        if inode.is_dir:
            raise oserror(errno.EISDIR, name)
        with self._changing(inode):
            self._detach(inode)
            self._modified(parent)
        return inode

    async def rmdir(self, parent: int, name: str) -> Inode:
        """Remove an empty directory; in the root, an empty pod of one's own."""
        inode = await self._existing(parent, name)
        pods.check_writable(self.store, inode.ino)
        if not inode.is_dir:
            raise oserror(errno.ENOTDIR, name)
        # What it holds is not known if the server says that it is not there: the deletion looks again.
        with suppress(Doubtful):
            await self.directory(inode.ino)
        inode = await self._existing(parent, name)
        if self.store.has_children(inode.ino):
            raise oserror(errno.ENOTEMPTY, name)
        with self._changing(inode):
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
        with self._changing(target):
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
        pods.check_writable(self.store, inode.ino)
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE):
            raise oserror(errno.EINVAL, to_name)
        if flags & RENAME_NOREPLACE and target is not None:
            raise oserror(errno.EEXIST, to_name)
        if flags & RENAME_EXCHANGE and target is None:
            raise oserror(errno.ENOENT, to_name)
        self._check_name(to_parent, to_name, inode.kind)
        if pods.pod_of(self.store, inode.ino) != pods.pod_of(self.store, to_parent):
            self._check_pod_rename(inode, target, to_parent)
        if any(above.ino == inode.ino for above in self.store.ancestors(to_parent)):
            raise oserror(errno.EINVAL, to_name)
        if target is None or flags & RENAME_EXCHANGE:
            if target in self.store.ancestors(inode.ino):  # it would go below itself
                raise oserror(errno.EINVAL, to_name)
            return
        pods.check_writable(self.store, target.ino)
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
        inode = pods.inode_of(self.store, ino)
        pods.check_writable(self.store, ino)
        before = self.files.size(inode)
        if change.size is not None:
            await self.files.truncate(inode, change.size, handle)
        with self.store.transaction():
            inode = pods.inode_of(self.store, ino)
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
        return pods.inode_of(self.store, ino)

    # -- checks -----------------------------------------------------------------------------------

    def _directory(self, ino: int) -> Inode:
        inode = pods.inode_of(self.store, ino)
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
        pods.check_writable(self.store, parent)
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

    # -- changes ----------------------------------------------------------------------------------

    @contextmanager
    def _changing(self, inode: Inode | None) -> Iterator[None]:
        """A transaction that may take an inode's name away. If it fails, as on a full disk, what was
        pending of it still is."""
        try:
            with self.store.transaction():
                yield
        except BaseException:
            if inode is not None and inode.dirty:
                self.engine.touch(("ino", inode.ino))
            raise

    def _detach(self, inode: Inode) -> None:
        parent, name = inode.parent, inode.name
        assert parent is not None
        assert name is not None
        self.files.keep(inode)
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
