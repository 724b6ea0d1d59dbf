"""The copy of a run's record and output in the pod, written through the mount.

Used by the supervisor's process only: the driver would deadlock on its own mount. Imports `state`.
The spool is the truth and the copy follows it. Everything in the pod may be the work of the program
itself, so no symlink is followed below the pod, and the pod's directory is never created: when the
mount is gone, that would leave files in the bare mount point.
"""

from __future__ import annotations

import errno
import os
import threading
import time

from cpodfs.runs import state

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

RETRY_S = 1.0
_CHUNK_BYTES = 256 * 1024
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_REFUSED = (errno.ELOOP, errno.ENOTDIR)
"""A link where the copy should be, or on the way to it."""


class PodGone(Exception):
    """The mount answers and says that there is no such pod: waiting will not help."""


def make_folder(root: str, parts: Sequence[str]) -> int:
    """Open ``root/parts…``, making what is missing below ``root``; returns the folder's fd.

    Raises OSError, NotADirectoryError or ELOOP among others for something else in its place.
    """
    fd = os.open(root, _FOLDER_FLAGS)
    for part in parts:
        try:
            try:
                inner = os.open(part, _FOLDER_FLAGS, dir_fd=fd)
            except FileNotFoundError:
                try:
                    os.mkdir(part, dir_fd=fd)
                except FileExistsError:
                    pass
                inner = os.open(part, _FOLDER_FLAGS, dir_fd=fd)
        finally:
            os.close(fd)
        fd = inner
    return fd


class Mirror:
    """Brings the copy up to the spool, step by step. Not for two threads at once."""

    def __init__(self, spool: str, mountpoint: str, pod: str, log: str) -> None:
        self._spool = spool
        self._mountpoint = mountpoint
        self._pod = os.path.join(mountpoint, pod)
        self._log = log.split("/")
        self._folder: int | None = None
        self._pairs: dict[str, tuple[int, int]] = {}
        self._record_stamp: tuple[int, int] | None = None

    def step(self) -> None:
        """Copy what is new. Raises OSError (call `drop`, try again later) or PodGone."""
        self._open()
        for name, (source, target) in self._pairs.items():
            _copy(name, source, target)
        # Last, so that a record of the end stands next to complete logs.
        self._copy_record()

    def close(self) -> None:
        """Let go of the copy; raises OSError if the mount says that a write was lost."""
        fds = self._take_fds()
        problem: OSError | None = None
        for fd in fds:
            try:
                os.close(fd)
            except OSError as exc:
                problem = exc
        if problem is not None:
            raise problem

    def drop(self) -> None:
        """Let go of the copy after an error; the next `step` opens it anew and compares."""
        self._record_stamp = None
        for fd in self._take_fds():
            try:
                os.close(fd)
            except OSError:
                pass

    def _take_fds(self) -> list[int]:
        fds = [fd for pair in self._pairs.values() for fd in pair]
        if self._folder is not None:
            fds.append(self._folder)
        self._pairs, self._folder = {}, None
        return fds

    def _open(self) -> None:
        if self._folder is None:
            try:
                self._folder = make_folder(self._pod, self._log)
            except FileNotFoundError:
                if os.path.ismount(self._mountpoint) and not os.path.isdir(self._pod):
                    raise PodGone(self._pod) from None
                raise
        for name in state.STREAMS:
            if name not in self._pairs:
                source = os.open(os.path.join(self._spool, name), os.O_RDONLY | os.O_CLOEXEC)
                try:
                    target = os.open(name, _FILE_FLAGS, 0o644, dir_fd=self._folder)
                except OSError:
                    os.close(source)
                    raise
                self._pairs[name] = (source, target)
                _skip_what_agrees(source, target)

    def _copy_record(self) -> None:
        found = os.stat(os.path.join(self._spool, state.RECORD_FILE))
        stamp = (found.st_ino, found.st_mtime_ns)
        if stamp == self._record_stamp:
            return
        record = state.read_record(self._spool)
        if record is None:
            raise OSError(errno.EIO, "the run's record cannot be read")
        assert self._folder is not None
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        temporary = f".{state.RECORD_FILE}.tmp"
        fd = os.open(temporary, flags, 0o644, dir_fd=self._folder)
        try:
            _write_all(fd, state.encode(state.public(record)))
        finally:
            os.close(fd)
        os.rename(temporary, state.RECORD_FILE, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        self._record_stamp = stamp


class Follower(threading.Thread):
    """Keeps a `Mirror` up to date until `finish`. Its own thread: the mount may hang.

    ``complete``: whether the copy is. ``problem``: why it is not, as far as the mount has told.
    """

    def __init__(self, mirror: Mirror) -> None:
        super().__init__(name="mirror", daemon=True)
        self._mirror = mirror
        self._wake = threading.Condition()
        self._news = True
        self._deadline: float | None = None
        self.complete = False
        self.problem: str | None = None

    def notify(self) -> None:
        """There is something new in the spool."""
        with self._wake:
            self._news = True
            self._wake.notify()

    def finish(self, timeout_s: float) -> bool:
        """Nothing new will come. Waits at most ``timeout_s``; True if the copy is complete."""
        with self._wake:
            self._news = True
            self._deadline = time.monotonic() + timeout_s
            self._wake.notify()
        # A little more than its own deadline: a write that hangs must not hang us.
        self.join(timeout_s + RETRY_S)
        return self.complete

    def run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._news)
                self._news = False
                last = self._deadline is not None
            try:
                self._mirror.step()
                if last:
                    self._mirror.close()
                    self.complete, self.problem = True, None
                    return
            except PodGone:
                self.problem = "there is no such pod"
                self._mirror.drop()
                if last:
                    return
                self._pause()
            except OSError as error:
                self.problem = str(error)
                self._mirror.drop()
                # What took the copy's place stays there: whoever put it there has ended.
                if (last and error.errno in _REFUSED) or not self._pause():
                    return

    def _pause(self) -> bool:
        """Wait before another try, less when `finish` is called; False when time is up."""
        with self._wake:
            asked = self._deadline
            left = RETRY_S if asked is None else min(RETRY_S, asked - time.monotonic())
            self._wake.wait_for(lambda: self._deadline != asked, timeout=max(0.0, left))
            self._news = True
            return self._deadline is None or time.monotonic() < self._deadline


def _skip_what_agrees(source: int, target: int) -> None:
    """Place both at the first byte that differs and cut off what the spool never said.

    After a driver's death pages may be missing in the middle of the copy: its size proves nothing.
    """
    limit = min(os.fstat(source).st_size, os.fstat(target).st_size)
    offset = 0
    while offset < limit:
        ours = os.pread(source, min(_CHUNK_BYTES, limit - offset), offset)
        if not ours or os.pread(target, len(ours), offset) != ours:
            break
        offset += len(ours)
    if os.fstat(target).st_size > offset:
        os.ftruncate(target, offset)
    os.lseek(source, offset, os.SEEK_SET)
    os.lseek(target, offset, os.SEEK_SET)


def _copy(name: str, source: int, target: int) -> None:
    while chunk := os.read(source, _CHUNK_BYTES):
        _write_all(target, chunk)
    if os.fstat(target).st_nlink == 0:
        raise OSError(errno.ENOENT, "the copy was deleted", name)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
