"""What the kernel holds: look-up counts of inodes, open files, and their data files.

Imports the cache and downloads. An inode without a name lives until the kernel has forgotten it and
nobody has it open; ``release``, ``forget`` and ``discard`` all end in the same check. Synchronous
throughout.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from cpodfs.cache.content import Content
from cpodfs.cache.store import Store
from cpodfs.sync.downloads import Reader


@dataclass(slots=True)
class OpenFile:
    """The data file of one inode, shared by all its handles. Always open for reading and writing:
    with write-back caching the kernel reads pages through writers and writes through readers."""

    ino: int
    fd: int
    handles: int = 0


@dataclass(slots=True)
class Handles:
    """``fd_limit``: no data file is opened for a user with this descriptor or a higher one, which is
    to say when so many are taken, of whatever kind. ``on_last_close(ino)`` runs when the last handle
    of a file was released."""

    store: Store
    content: Content
    fd_limit: int = 1 << 30
    on_last_close: Callable[[int], None] = lambda ino: None
    on_gone: Callable[[int], None] = lambda ino: None
    on_doomed: Callable[[], None] = lambda: None
    doomed: set[int] = field(default_factory=set)
    _lookups: dict[int, int] = field(default_factory=dict)
    _files: dict[int, OpenFile] = field(default_factory=dict)
    _by_handle: dict[int, OpenFile] = field(default_factory=dict)
    _readers: dict[int, Reader] = field(default_factory=dict)
    _next: int = 1

    def looked_up(self, ino: int) -> None:
        self._lookups[ino] = self._lookups.get(ino, 0) + 1

    def forget(self, ino: int, count: int) -> None:
        left = self._lookups.get(ino, 0) - count
        if left > 0:
            self._lookups[ino] = left
        else:
            self._lookups.pop(ino, None)
            self.discard(ino)

    def open(self, ino: int, fd: Callable[[], int]) -> int:
        """A new handle; ``fd`` opens the data file if no other handle has. Raises EMFILE."""
        file = self._files.get(ino)
        if file is None:
            file = self._files[ino] = OpenFile(ino, self._within_limit(fd()))
        file.handles += 1
        handle, self._next = self._next, self._next + 1
        self._by_handle[handle] = file
        return handle

    def _within_limit(self, fd: int) -> int:
        if fd >= self.fd_limit:  # the kernel gives the lowest one that is free
            os.close(fd)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return fd

    def file(self, handle: int) -> OpenFile:
        return self._by_handle[handle]

    def reader(self, handle: int) -> Reader:
        """The patience of whoever waits for content through a handle."""
        return self._readers.setdefault(handle, Reader())

    def opened(self, ino: int) -> OpenFile | None:
        return self._files.get(ino)

    def open_inos(self) -> list[int]:
        return list(self._files)

    def release(self, handle: int) -> None:
        file = self._by_handle.pop(handle)
        self._readers.pop(handle, None)
        file.handles -= 1
        if file.handles == 0:
            del self._files[file.ino]
            os.close(file.fd)
            self.on_last_close(file.ino)
            self.discard(file.ino)

    def discard(self, ino: int) -> None:
        """Free an inode for good if it has no name, no handle and no look-up."""
        if ino in self._files or ino in self._lookups:
            return
        inode = self.store.get(ino)
        if inode is not None and inode.parent is None and ino != 1:
            self.purge(ino)

    def purge(self, ino: int) -> None:
        """Free an inode soon. Its bytes go only once the journal that took its name away is on the
        disk: else a loss of power could bring the name back without them."""
        if ino not in self.doomed:
            self.on_gone(ino)
            self.doomed.add(ino)
            self.on_doomed()

    def sweep(self, inos: set[int]) -> None:
        """Free inodes that were doomed before the last sync of the journal."""
        for ino in inos:
            # One that has its name back, since that it lost it could not be committed, stays.
            if (inode := self.store.get(ino)) is None or inode.parent is None:
                self.content.remove(ino)
        with self.store.transaction():
            for ino in inos:
                self.store.drop(ino)
        self.doomed -= inos
