"""The kernel's edge: FUSE requests to the tree and back, and nothing else.

Imports pyfuse3, the tree and the control files. Every handler goes through ``_answer``: an exception
with an errno becomes that errno, any other is logged and becomes EIO; none ends the mount. Names
are bytes here and ``str`` inside. Each entry given to the kernel adds one to its look-up count.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import sqlite3
import stat
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext

from cpodfs.cache.content import RESERVE
from cpodfs.cache.schema import LINK, ROOT
from cpodfs.cache.store import Inode, level, trouble
from cpodfs.errors import CacheDamaged, CpodfsError
from cpodfs.fs.absences import ABSENT_TIMEOUT_S, Absences
from cpodfs.fs.control import (
    CONTROL_HANDLE_BIT,
    RUN_INO_BIT,
    XATTR_PREFIX,
    Attributes,
    RunFiles,
    pod_of,
)
from cpodfs.fs.pods import check_writable, inode_of, oserror
from cpodfs.fs.provenance import Provenance
from cpodfs.fs.tree import Times, Tree
from cpodfs.paths import RUN_NAME, decode_name

log = logging.getLogger(__name__)

KINDS = {"f": stat.S_IFREG, "d": stat.S_IFDIR, "l": stat.S_IFLNK}
BLOCK = 4096
READDIR_BATCH = 64
FORGET_BATCH = 64
_F = TypeVar("_F", bound=Callable[..., Awaitable[Any]])


def _answer(handler: _F) -> _F:
    @functools.wraps(handler)
    async def wrapped(*arguments: Any) -> Any:
        try:
            return await handler(*arguments)
        except FUSEError:
            raise
        except CpodfsError as error:
            log.debug("%s: %s", handler.__name__, error)
            raise FUSEError(error.errno) from error
        except OSError as error:
            raise FUSEError(error.errno or errno.EIO) from error
        except sqlite3.Error as error:
            if (why := trouble(error)) is None:
                log.exception("%s failed", handler.__name__)
            else:
                log.log(level(why), "%s: %s", handler.__name__, why)
            full = getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL
            raise FUSEError(errno.ENOSPC if full else errno.EIO) from error
        except Exception as error:
            log.exception("%s failed", handler.__name__)
            raise FUSEError(errno.EIO) from error

    return wrapped  # type: ignore[return-value]


class Operations(pyfuse3.Operations):
    """``timeout_s``: how long the kernel may answer from what it was told, without asking."""

    enable_writeback_cache = True
    supports_dot_lookup = True

    def __init__(
        self,
        tree: Tree,
        runs: RunFiles,
        attributes: Attributes,
        provenance: Provenance,
        *,
        timeout_s: float,
        fsync_remote: bool = False,
    ) -> None:
        super().__init__()
        self._tree = tree
        self._runs = runs
        self._attributes = attributes
        self._provenance = provenance
        self._timeout_s = timeout_s
        self._fsync_remote = fsync_remote
        self.absences = Absences()
        self._uid, self._gid = os.getuid(), os.getgid()

    # -- entries ----------------------------------------------------------------------------------

    def _entry(self, inode: Inode) -> EntryAttributes:
        entry = EntryAttributes()
        size = self._tree.files.size(inode) if inode.is_file else inode.size
        entry.st_ino = inode.ino
        entry.st_mode = KINDS[inode.kind] | inode.mode
        entry.st_nlink = 0 if inode.parent is None and inode.ino != ROOT else 1
        entry.st_uid, entry.st_gid = self._uid, self._gid
        entry.st_size = size
        entry.st_blksize = BLOCK
        entry.st_blocks = (size + 511) // 512
        entry.st_atime_ns, entry.st_mtime_ns = inode.atime_ns, inode.mtime_ns
        entry.st_ctime_ns = inode.ctime_ns
        entry.entry_timeout = entry.attr_timeout = self._timeout_s
        return entry

    def _run_entry(self, pod: int) -> EntryAttributes:
        """Attributes of ``.run``, never remembered by the kernel: it comes and goes by itself."""
        entry = EntryAttributes()
        inode = inode_of(self._tree.store, pod)
        entry.st_ino = pyfuse3.InodeT(self._runs.ino(pod))
        entry.st_mode = stat.S_IFREG | 0o600
        entry.st_nlink = 1
        entry.st_uid, entry.st_gid = self._uid, self._gid
        entry.st_size = len(self._runs.state(pod)) if self._runs.exists(pod) else 0
        entry.st_blksize = BLOCK
        entry.st_mtime_ns = entry.st_ctime_ns = entry.st_atime_ns = inode.ctime_ns
        entry.entry_timeout = entry.attr_timeout = 0
        return entry

    def _absent(self, timeout_s: float) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(0)
        entry.entry_timeout = timeout_s
        return entry

    def _given(self, inode: Inode) -> EntryAttributes:
        self._tree.handles.looked_up(inode.ino)
        return self._entry(inode)

    @_answer
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        if name == b".":
            return self._given(inode_of(self._tree.store, parent_inode))
        if name == b"..":
            above = inode_of(self._tree.store, parent_inode).parent
            return self._given(inode_of(self._tree.store, above or ROOT))
        text = _looked_up(name)
        if text is None:
            return self._absent(ABSENT_TIMEOUT_S)
        if self._runs.is_run_name(parent_inode, text):
            if self._runs.exists(parent_inode):
                return self._run_entry(parent_inode)
            return self._absent(0)
        self.absences.asked(parent_inode, text)
        inode = await self._tree.lookup(parent_inode, text)
        if inode is not None:
            return self._given(inode)
        self.absences.told(parent_inode, text)
        return self._absent(ABSENT_TIMEOUT_S)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """There is no way to answer with an error, so none may leave here. Thousands can come at
        once: others get in between."""
        for number, (ino, count) in enumerate(inode_list, 1):
            if ino & RUN_INO_BIT:
                continue
            try:
                self._tree.handles.forget(ino, count)
            except Exception:
                log.exception("forget failed ino=%d", ino)
            if number % FORGET_BATCH == 0:
                await trio.lowlevel.checkpoint()

    @_answer
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        if inode & RUN_INO_BIT:
            return self._run_entry(pod_of(inode))
        return self._entry(inode_of(self._tree.store, inode))

    @_answer
    async def setattr(
        self,
        inode: int,
        attr: EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        if inode & RUN_INO_BIT:
            pod = pod_of(inode)
            if not self._runs.may_touch(pod, ctx.pid):
                raise oserror(errno.EBUSY, RUN_NAME)
            return self._run_entry(pod)
        if fields.update_uid or fields.update_gid:
            self._check_owner(attr, fields)
        change = Times(
            mode=stat.S_IMODE(attr.st_mode) if fields.update_mode else None,
            size=attr.st_size if fields.update_size else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )
        changed = await self._tree.set_attributes(inode, change, fh)
        if fields.update_mode or fields.update_size:
            self._provenance.changed(inode, ctx.pid)
        return self._entry(changed)

    def _check_owner(self, attr: EntryAttributes, fields: pyfuse3.SetattrFields) -> None:
        """All belongs to whoever mounted; to say so again (``cp -a``, ``rsync``) is no error."""
        uid = attr.st_uid if fields.update_uid else self._uid
        gid = attr.st_gid if fields.update_gid else self._gid
        if (uid, gid) != (self._uid, self._gid):
            raise oserror(errno.EPERM)

    @_answer
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        found = inode_of(self._tree.store, inode)
        if found.kind != LINK or found.target is None:
            raise oserror(errno.EINVAL)
        return os.fsencode(found.target)

    # -- names ------------------------------------------------------------------------------------

    @_answer
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext
    ) -> EntryAttributes:
        text = decode_name(name)
        if self._runs.is_run_name(parent_inode, text):
            raise oserror(errno.EPERM, RUN_NAME)
        made = await self._tree.mkdir(parent_inode, text, mode & ~ctx.umask)
        if parent_inode == ROOT:
            self._runs.made(text)
        self._provenance.changed(made.ino, ctx.pid)
        return self._given(made)

    @_answer
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        if not stat.S_ISREG(mode):
            raise oserror(errno.EPERM)
        info, entry = await self.create(parent_inode, name, mode, os.O_RDWR, ctx)
        await self.release(info.fh)
        return entry

    @_answer
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        text = decode_name(name)
        if self._runs.is_run_name(parent_inode, text):
            raise oserror(errno.EPERM, RUN_NAME)
        made = await self._tree.symlink(parent_inode, text, decode_name(target))
        self._provenance.changed(made.ino, ctx.pid)
        return self._given(made)

    @_answer
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        raise oserror(errno.EPERM)  # as link(2) has it for file systems without hard links

    @_answer
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        text = decode_name(name)
        if self._runs.is_run_name(parent_inode, text):
            await self._runs.cancel(parent_inode)
            return
        await self._tree.unlink(parent_inode, text)
        self._provenance.removed(parent_inode, text, ctx.pid)

    @_answer
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        text = decode_name(name)
        self._runs.check_idle(parent_inode, text)
        await self._tree.rmdir(parent_inode, text)
        self._provenance.removed(parent_inode, text, ctx.pid)
        if parent_inode == ROOT:
            self._runs.not_ours([text])

    @_answer
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        old, new = decode_name(name_old), decode_name(name_new)
        if self._runs.is_run_name(parent_inode_old, old) or self._runs.is_run_name(
            parent_inode_new, new
        ):
            raise oserror(errno.EPERM, RUN_NAME)
        self._runs.check_idle(parent_inode_old, old)
        await self._tree.rename(parent_inode_old, old, parent_inode_new, new, flags)
        self._provenance.removed(parent_inode_old, old, ctx.pid)
        for parent, name in ((parent_inode_old, old), (parent_inode_new, new)):
            if (moved := self._tree.store.child(parent, name)) is not None:
                self._provenance.changed(moved.ino, ctx.pid)
        if parent_inode_old == ROOT and old != new:
            self._runs.moved(old, new)

    # -- files ------------------------------------------------------------------------------------

    @_answer
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        text = decode_name(name)
        if self._runs.is_run_name(parent_inode, text):
            if flags & os.O_EXCL:
                # cp, tar, rsync: who copies or unpacks a pod has not asked to run it.
                raise oserror(errno.EPERM, RUN_NAME)
            handle = await self._runs.create(parent_inode, ctx.pid)
            return _control_info(handle), self._run_entry(parent_inode)
        found = None if flags & os.O_EXCL else await self._tree.lookup(parent_inode, text)
        if found is not None:  # since the kernel looked, somebody made it elsewhere
            return await self.open(found.ino, flags, ctx), self._given(found)
        inode, handle = await self._tree.create(parent_inode, text, mode & ~ctx.umask)
        self._provenance.opened(handle, inode.ino, ctx.pid)
        return FileInfo(fh=handle, keep_cache=True), self._given(inode)

    @_answer
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        if inode & RUN_INO_BIT:
            writing = flags & os.O_ACCMODE != os.O_RDONLY
            return _control_info(self._runs.open(pod_of(inode), writing=writing))
        if flags & os.O_ACCMODE != os.O_RDONLY:
            check_writable(self._tree.store, inode)
        # A content that is here changes only through this mount: the kernel's pages may stay. What
        # must be fetched anew might be another version by now.
        cached = bool(inode_of(self._tree.store, inode).cached)
        if flags & os.O_TRUNC:
            handle = await self._tree.files.open_emptied(inode)
        elif flags & os.O_ACCMODE == os.O_WRONLY:
            handle = self._tree.files.open(inode)
        else:
            handle = await self._tree.files.open_to_read(inode)
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            self._provenance.opened(handle, inode, ctx.pid)
        return FileInfo(fh=handle, keep_cache=cached)

    @_answer
    async def read(self, fh: int, off: int, size: int) -> bytes:
        if fh & CONTROL_HANDLE_BIT:
            return self._runs.read(fh, off, size)
        return await self._tree.files.read(fh, off, size)

    @_answer
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        if fh & CONTROL_HANDLE_BIT:
            return len(buf)
        return await self._tree.files.write(fh, off, buf)

    @_answer
    async def flush(self, fh: int) -> None:
        if fh & CONTROL_HANDLE_BIT:
            return
        try:
            await self._tree.files.flush(fh)
        except CacheDamaged:
            if self._provenance.is_writer(fh):  # who only reads may be rescuing what is left
                raise

    @_answer
    async def release(self, fh: int) -> None:
        if fh & CONTROL_HANDLE_BIT:
            self._runs.release(fh)
        else:
            self._tree.handles.release(fh)
            self._provenance.closed(fh)

    @_answer
    async def fsync(self, fh: int, datasync: bool) -> None:
        if not fh & CONTROL_HANDLE_BIT:
            await self._tree.files.sync(fh, remote=self._fsync_remote)

    # -- directories ------------------------------------------------------------------------------

    @_answer
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        await self._tree.opendir(inode)
        return inode

    @_answer
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """Entries in the order of inode numbers, which serve as cookies that changes do not move.

        ``.run`` comes first: ``rm -r`` ends the run before it deletes what the run works on.
        """
        if start_id < ROOT and self._runs.is_run_name(fh, RUN_NAME) and self._runs.exists(fh):
            start_id = ROOT
            if not pyfuse3.readdir_reply(token, RUN_NAME.encode(), self._run_entry(fh), start_id):
                return
        while children := self._tree.store.children(fh, start_id, READDIR_BATCH):
            for child in children:
                name = os.fsencode(child.name or "")
                if not pyfuse3.readdir_reply(token, name, self._entry(child), child.ino):
                    return
                self._tree.handles.looked_up(child.ino)
                start_id = child.ino

    @_answer
    async def releasedir(self, fh: int) -> None:
        return

    @_answer
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self._tree.files.sync_names()

    # -- the rest ---------------------------------------------------------------------------------

    @_answer
    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        """Space is the cache's: what can be written now, evicting what is clean. What is used is
        what waits for upload. The store behind it has no known end."""
        disk = os.statvfs(self._tree.files.root)
        store = self._tree.store
        answer = pyfuse3.StatvfsData()
        answer.f_bsize, answer.f_frsize = disk.f_bsize, disk.f_frsize
        room = disk.f_bavail + (store.evictable_bytes() - RESERVE) // disk.f_frsize
        answer.f_bfree = answer.f_bavail = max(0, room)
        answer.f_blocks = answer.f_bfree + store.totals()["bytes"] // disk.f_frsize
        answer.f_files, answer.f_ffree, answer.f_favail = disk.f_files, disk.f_ffree, disk.f_favail
        answer.f_namemax = 255
        return answer

    @_answer
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        # The kernel asks for security.capability before every write: nothing here may be slow.
        if not name.startswith(b"user.") or inode & RUN_INO_BIT:
            raise FUSEError(pyfuse3.ENOATTR)
        found = inode_of(self._tree.store, inode)
        if name.startswith(XATTR_PREFIX):
            value = self._attributes.get(found, name)
        else:
            value = self._tree.store.xattr(inode, name)
        if value is None:
            raise FUSEError(pyfuse3.ENOATTR)
        return value

    @_answer
    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        # The computed ones are not listed: `cp -a` and `mv` would try to set them on the copy.
        return [] if inode & RUN_INO_BIT else self._tree.store.xattrs(inode)

    @_answer
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        _check_xattr_name(inode, name)
        if name.startswith(XATTR_PREFIX):
            await self._attributes.set(inode_of(self._tree.store, inode), name, value)
            return
        check_writable(self._tree.store, inode)
        self._tree.store.set_xattr(inode, name, value)

    @_answer
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        _check_xattr_name(inode, name)
        if name.startswith(XATTR_PREFIX):
            raise oserror(errno.EPERM)
        check_writable(self._tree.store, inode)
        if not self._tree.store.remove_xattr(inode, name):
            raise FUSEError(pyfuse3.ENOATTR)


def _check_xattr_name(inode: int, name: bytes) -> None:
    if not name.startswith(b"user.") or inode & RUN_INO_BIT:
        raise oserror(errno.EOPNOTSUPP)


def _looked_up(name: bytes) -> str | None:
    """A name that no file can have is simply not there."""
    try:
        return decode_name(name)
    except CpodfsError:
        return None


def _control_info(handle: int) -> FileInfo:
    return FileInfo(fh=handle, direct_io=True)
