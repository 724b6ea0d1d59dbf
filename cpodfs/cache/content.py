"""File contents on the local disk: one data file per inode, named by its number.

Imports nothing of ours. A data file is complete: content on its way from the server is in a *part*
beside it, which takes its place when all of it is on the disk. The data file of a dirty inode holds
all of its bytes and its size is the file's size. Reading is from the page cache on the event loop
when it would not block, else in a thread; writing goes to the page cache, which does not wait for
the disk. Names from servers and pods never become file names here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import trio

RESERVE = 32 << 20
"""Bytes of the disk that no content may take: the journal must always have room."""
LOOK_EVERY = 16 << 20
"""At most so many bytes are written between two looks at the free space."""
PART = ".part"
_OPEN, _NEW = os.O_RDWR | os.O_CLOEXEC, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
_CRC_CHUNK = 1 << 20


class Lost(OSError):
    """The disk could not keep bytes of a data file. The kernel says so once, and drops them: the next
    sync would promise what is not there (https://wiki.postgresql.org/wiki/Fsync_Errors)."""


class Content:
    """The data files below one folder. ``unclaimed``: the folder of those that no inode has."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.unclaimed = root.parent / "unclaimed"
        self._until_look = 0
        self.make_room: Callable[[], None] = lambda: None
        shards = [root / f"{shard:02x}" for shard in range(256)]
        if not shards[-1].is_dir():
            for shard in shards:
                shard.mkdir(mode=0o700, parents=True, exist_ok=True)
            sync_folder(root)
        sync_folder(root.parent)

    def path(self, ino: int) -> str:
        return f"{self.root}/{ino & 0xFF:02x}/{ino}"  # not a Path: this is asked for very often

    def create(self, ino: int) -> int:
        """A new, empty data file, replacing any; returns an open descriptor."""
        return os.open(self.path(ino), _NEW, 0o600)

    def open(self, ino: int) -> int:
        return os.open(self.path(ino), _OPEN)

    def open_dirty(self, ino: int) -> int:
        """As ``open``. A file that nothing was written to may have none after a loss of power."""
        return os.open(self.path(ino), _OPEN | os.O_CREAT, 0o600)

    def size(self, ino: int) -> int:
        return os.stat(self.path(ino)).st_size

    def size_or_0(self, ino: int) -> int:
        """Bytes of a data file; 0 where there is none: it may have been empty when power was lost."""
        try:
            return self.size(ino)
        except FileNotFoundError:
            return 0

    def create_part(self, ino: int, size: int) -> int:
        """A new part of ``size`` zero bytes, emptying any; returns an open descriptor."""
        fd = os.open(self.path(ino) + PART, _NEW, 0o600)
        os.ftruncate(fd, size)
        return fd

    def open_part(self, ino: int) -> int:
        return os.open(self.path(ino) + PART, _OPEN)

    def empty_part(self, ino: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.truncate(self.path(ino) + PART, 0)

    def complete(self, ino: int) -> None:
        """The part, all of it on the disk, becomes the data file."""
        os.rename(self.path(ino) + PART, self.path(ino))

    def reopen(self, ino: int) -> None:
        """The data file becomes a part again."""
        os.rename(self.path(ino), self.path(ino) + PART)

    def remove_part(self, ino: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path(ino) + PART)

    def remove(self, ino: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path(ino))

    def set_aside(self, ino: int) -> Path | None:
        """Move a data file that is not what it should be to ``unclaimed``; None if there is none."""
        self.unclaimed.mkdir(mode=0o700, exist_ok=True)
        for number in range(1000):
            aside = self.unclaimed / (f"{ino}.{number}" if number else f"{ino}")
            if not aside.exists():
                break
        try:
            os.rename(self.path(ino), aside)
        except FileNotFoundError:
            return None
        return aside

    def shortage(self) -> int:
        """Bytes that are lacking on the disk for comfortable work; 0 when there is enough."""
        return max(0, 2 * RESERVE - self._available())

    def check_room(self, size: int) -> None:
        """Raise ENOSPC before a write takes the last of the disk, which the journal needs to keep
        what was acknowledged before."""
        self._until_look -= size + 1
        if self._until_look > 0:
            return
        if self._available() < 2 * RESERVE:
            self.make_room()
        available = self._available()
        if available < RESERVE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.root))
        self._until_look = min((available - RESERVE) // 2, LOOK_EVERY)

    def _available(self) -> int:
        disk = os.statvfs(self.root)
        return disk.f_bavail * disk.f_frsize

    def sync(self, ino: int, fd: int) -> None:
        """Make the data file and its name survive a loss of power. Blocks: run it in a thread. Raises
        Lost, or another OSError, which may pass."""
        try:
            os.fdatasync(fd)
        except OSError as error:
            raise Lost(error.errno, error.strerror) from error
        sync_folder(os.path.dirname(self.path(ino)))


def sync_folder(path: str | Path) -> None:
    """Make the names in a folder survive a loss of power. Blocks."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def checksum(fd: int) -> int:
    """CRC-32 of a whole data file. Blocks: run it in a thread."""
    crc, offset = 0, 0
    while chunk := os.pread(fd, _CRC_CHUNK, offset):
        crc = zlib.crc32(chunk, crc)
        offset += len(chunk)
    return crc


async def read(fd: int, offset: int, size: int) -> bytes:
    """At most ``size`` bytes at ``offset``; fewer only at the end of the file."""
    buffer = bytearray(size)
    try:
        got = os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
            raise
        got = -1
    if got == size:
        return bytes(buffer)
    # Short: the end of the file, or the rest is not in the page cache.
    return await trio.to_thread.run_sync(_read_fully, fd, offset, size)


def _read_fully(fd: int, offset: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.pread(fd, size, offset)
        if not part:
            break
        parts.append(part)
        offset += len(part)
        size -= len(part)
    return b"".join(parts)
