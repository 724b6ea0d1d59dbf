"""Keeps the cache within its size: clean contents go, least recently used first.

Imports the cache and handles' view of what is open. Dirty contents are never touched, nor open ones;
what is left then may exceed the size, and only a full disk ends it (``Content.check_room``).
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Awaitable, Callable

import trio

from cpodfs.cache.content import Content
from cpodfs.cache.store import Store, trouble

log = logging.getLogger(__name__)

PAUSE_S = 1.0
LOW_WATER = 0.9
"""How much of the size is left in use, so that not every new file evicts another."""
AT_ONCE = 200
START = (float("-inf"), 0)


class Evictor:
    """``is_used(ino)``: whether somebody reads the file now, or may not do without its content.
    ``names``: makes the journal durable (``Durability``)."""

    def __init__(
        self,
        store: Store,
        content: Content,
        *,
        size: int,
        is_used: Callable[[int], bool],
        names: Callable[[], Awaitable[None]],
    ) -> None:
        self._store = store
        self._content = content
        self._size = size
        self._is_used = is_used
        self._names = names
        self._wanted = trio.Event()
        self._after = START
        self.on_shortage: Callable[[], None] = lambda: None

    def poke(self) -> None:
        """The cache has grown."""
        self._wanted.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            try:
                if self._excess() > 0:
                    await self._names()
                    self._evict_some()
            except (OSError, sqlite3.Error) as error:
                log.warning("nothing can be evicted: %s", trouble(error) or error)
            await trio.sleep(PAUSE_S)

    def make_room(self) -> None:
        """The disk is full: make room without waiting. Blocks for a sync."""
        try:
            if self._excess() > 0:
                self._store.sync()
                self._evict_some()
        except (OSError, sqlite3.Error) as error:
            log.warning("nothing can be evicted: %s", trouble(error) or error)

    def _excess(self) -> int:
        """Bytes that are too many, by the size given or by the disk."""
        used = self._store.cached_bytes()
        excess = used - int(self._size * LOW_WATER) if used > self._size else 0
        return max(excess, self._content.shortage())

    def _evict_some(self) -> None:
        """At most ``AT_ONCE`` files, of which the journal on the disk says that they are clean: else a
        loss of power could bring an upload back without its bytes."""
        if self._content.shortage():
            self.on_shortage()
        excess = self._excess()
        candidates = self._store.evictable(self._after, AT_ONCE)
        self._after = START
        for inode in candidates:
            if excess <= 0:
                return
            if not self._is_used(inode.ino) and not self._is_doubtful(inode.ino):
                self._evict(inode.ino)
                excess -= inode.size
        if len(candidates) == AT_ONCE:
            self._after = candidates[-1].used_s, candidates[-1].ino
        if candidates:
            self.poke()

    def _is_doubtful(self, ino: int) -> bool:
        """Whether what is here may be the last copy: the server does not show the file any more, or a
        directory that it is in."""
        remote = self._store.remote_of(ino)
        return remote is None or self._store.doubtful_above(remote.rid) is not None

    def _evict(self, ino: int) -> None:
        # The journal first: an inode that says "cached" must have its bytes.
        self._store.set(ino, cached=0)
        self._content.remove(ino)
        log.debug("evicted ino=%d", ino)
