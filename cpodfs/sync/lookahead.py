"""Listing ahead of somebody who walks a tree, so that a cold ``ls -R`` is not one call at a time.

Imports the cache. A program that walks opens a directory that nobody listed yet at once after the
one that it is in was listed, and again, and again; a person browsing takes longer. From the second
such step on, the unlisted siblings are listed too, and what is found below them, for as long as the
walker keeps coming; never more than ``AHEAD`` at once. So a look at one directory costs one call.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from cpodfs.cache.schema import ROOT
from cpodfs.cache.store import Inode, Store

AHEAD = 32
STEP_S = 0.5
WALKING_S = 5.0
REMEMBERED = 1000


class Lookahead:
    """``begin(ino)`` starts the listing of a directory in the background."""

    def __init__(self, store: Store, begin: Callable[[int], None]) -> None:
        self._store = store
        self._begin = begin
        self._listed: OrderedDict[int, float] = OrderedDict()
        self._running: set[int] = set()
        self._queue: OrderedDict[int, None] = OrderedDict()
        self._steps = 0
        self._walker_s = -WALKING_S

    def opened(self, directory: Inode) -> None:
        """A directory is about to be read."""
        now = time.monotonic()
        walking = now - self._walker_s < WALKING_S
        if not directory.listed_s and directory.parent not in (None, ROOT):
            quick = now - self._listed.get(directory.parent, -STEP_S) < STEP_S
            self._steps = self._steps + 1 if quick else 0
            if self._steps >= 2 or (walking and quick):
                walking = True
                self._want(directory.parent)
        if walking:
            self._walker_s = now
            self._fill()

    def listed(self, ino: int) -> None:
        """A listing has ended, well or not."""
        now = time.monotonic()
        self._listed[ino] = now
        while len(self._listed) > REMEMBERED:
            self._listed.popitem(last=False)
        self._running.discard(ino)
        if now - self._walker_s < WALKING_S:
            self._want(ino)
            self._fill()
        else:
            self._queue.clear()

    def _want(self, directory: int) -> None:
        for child in self._store.children(directory, limit=REMEMBERED):
            if child.is_dir and not child.listed_s and child.ino not in self._running:
                self._queue[child.ino] = None

    def _fill(self) -> None:
        while self._queue and len(self._running) < AHEAD:
            ino, _ = self._queue.popitem(last=False)
            self._running.add(ino)
            self._begin(ino)
