"""One of a program's outputs on its way from the pipe to the spool file.

Imports only `os`, for the supervisor. A spool has a limit, because what goes on writing for ever
would fill the disk of the cache, twice: the pod gets a copy.
"""

from __future__ import annotations

import os

_CHUNK_BYTES = 64 * 1024
LOG_LIMIT_BYTES = 1 << 30
"""Of one stream, kept in the spool and copied into the pod; what comes after it is thrown away."""


class Stream:
    """A pipe, and the spool file that it goes to. ``thrown_away``: bytes beyond the limit."""

    def __init__(self, pipe: int, spool: int, limit: int = LOG_LIMIT_BYTES) -> None:
        self.pipe = pipe
        self.spool = spool
        self.pending = b""
        self.thrown_away = 0
        self._room = limit
        os.set_blocking(pipe, False)

    def pump(self) -> bool | None:
        """Move one chunk. True: moved; False: nothing now, or the spool is full; None: closed."""
        if not self.pending:
            try:
                self.pending = os.read(self.pipe, _CHUNK_BYTES)
            except BlockingIOError:
                return False
            if not self.pending:
                return None
            self.thrown_away += max(0, len(self.pending) - self._room)
            self.pending = self.pending[: self._room]
        try:
            while self.pending:
                written = os.write(self.spool, self.pending)
                self._room -= written
                self.pending = self.pending[written:]
        except OSError:
            # The disk is full: keep the chunk and let the program wait.
            return False
        return True
