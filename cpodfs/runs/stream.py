"""A program's output on its way from a pipe to the spool file.

Imports only `os`, for the supervisor. A spool has a limit, because what goes on writing for ever
would fill the disk of the cache, twice: the pod gets a copy.
"""

from __future__ import annotations

import os

_CHUNK_BYTES = 64 * 1024
_HELD_BYTES = 1 << 20
LOG_LIMIT_BYTES = 1 << 30
"""Of one spool, and so of its copy in the pod; what comes after it is thrown away."""


class Spool:
    """A file that only grows. ``pending``: what the disk has no room for now. ``lost``: bytes that it
    had none for. ``thrown_away``: bytes beyond the limit."""

    def __init__(self, fd: int, limit: int = LOG_LIMIT_BYTES) -> None:
        self.fd = fd
        self.pending = b""
        self.lost = 0
        self.thrown_away = 0
        self._room = limit

    def write(self, data: bytes) -> bool:
        """Take it, and write what there is room for; whether nothing is left pending."""
        kept = data[: self._room]
        self._room -= len(kept)
        self.thrown_away += len(data) - len(kept)
        self.pending += kept
        return self.flush()

    def offer(self, data: bytes) -> None:
        """Take it, from one who cannot wait: while the disk is full, most of it is lost."""
        if len(self.pending) > _HELD_BYTES and not self.flush():
            self.lost += len(data)
        else:
            self.write(data)

    def flush(self) -> bool:
        """Try again to write what is pending; whether all of it is written."""
        try:
            while self.pending:
                self.pending = self.pending[os.write(self.fd, self.pending) :]
        except OSError:
            return False
        return True


class Stream:
    """One of the program's pipes and the spool that it goes to."""

    def __init__(self, pipe: int, spool: Spool) -> None:
        self.pipe = pipe
        self._spool = spool
        os.set_blocking(pipe, False)

    @property
    def full(self) -> bool:
        """Whether the program has to wait, for the disk is full."""
        return bool(self._spool.pending)

    def pump(self) -> bool | None:
        """Move one chunk. True: moved; False: nothing now, or the disk is full; None: closed."""
        if not self._spool.flush():
            return False
        try:
            chunk = os.read(self.pipe, _CHUNK_BYTES)
        except BlockingIOError:
            return False
        return self._spool.write(chunk) if chunk else None
