"""Which remote directories are being changed right now.

FairOS-DFS rewrites a directory as a whole without a lock, so changes of one directory go one after
another, and a directory must not move while anything below it changes. Everything here is one
synchronous step on the event loop; ``wait_free`` is the only await.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import trio

from cpodfs.cache.store import Store


class DirLocks:
    """Exclusive use of remote directories by id. ``on_free`` hears of each one that is let go."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._busy: set[int] = set()
        self._moving: set[int] = set()
        self._freed = trio.Event()
        self._claimed: Counter[int] = Counter()
        self._claimed_below: Counter[int] = Counter()
        self.on_free: Callable[[int], None] = lambda rid: None

    def blocker(
        self, dirs: Iterable[int], moving: int | None = None, *, waited: bool = False
    ) -> int | None:
        """A directory in use that keeps one from using ``dirs`` (and from moving ``moving``).

        Those who wait (and have ``waited``) go before those who can be called again.
        """
        for rid in dirs:
            if rid in self._busy or (not waited and rid in self._claimed):
                return rid
            for above in self._above(rid):
                if above in self._moving or (not waited and above in self._claimed_below):
                    return above
        if moving is not None:
            return next((b for b in self._busy if b == moving or moving in self._above(b)), None)
        return None

    def is_taken(self, rid: int) -> bool:
        """Whether somebody uses or claims a directory, or all below it, and will let it go."""
        claimed = self._claimed[rid] or self._claimed_below[rid]
        return rid in self._busy or rid in self._moving or bool(claimed)

    def take(self, dirs: Iterable[int], moving: int | None = None) -> None:
        """Use directories for which ``blocker`` has just said None."""
        self._busy.update(dirs)
        if moving is not None:
            self._moving.add(moving)
            self._busy.add(moving)

    def free(self, dirs: Iterable[int], moving: int | None = None) -> None:
        freed = set(dirs)
        if moving is not None:
            self._moving.discard(moving)
            freed.add(moving)
        self._busy -= freed
        self._freed.set()
        self._freed = trio.Event()
        for rid in freed:
            self.on_free(rid)

    async def next_free(self) -> None:
        """Return when somebody lets go of any directory."""
        await self._freed.wait()

    async def wait_free(self, dirs: Iterable[int], moving: int | None = None) -> None:
        """Return when ``dirs`` could be taken; take them before the next await."""
        wanted = tuple(dirs)
        below = () if moving is None else (moving,)
        self._claimed.update(wanted)
        self._claimed_below.update(below)
        try:
            while self.blocker(wanted, moving, waited=True) is not None:
                await self._freed.wait()
        except BaseException:
            self._unclaim(wanted, below)
            for rid in {*wanted, *below}:  # whoever stood back for us need not
                self.on_free(rid)
            raise
        self._unclaim(wanted, below)

    def _unclaim(self, dirs: tuple[int, ...], below: tuple[int, ...]) -> None:
        self._claimed -= Counter(dirs)
        self._claimed_below -= Counter(below)

    def _above(self, rid: int) -> list[int]:
        found: list[int] = []
        remote = self._store.remote(rid)
        while remote is not None:
            found.append(remote.rid)
            remote = self._store.remote(remote.rparent) if remote.rparent is not None else None
        return found
