"""Whether Swarm has what was uploaded, or only FairOS-DFS has: asked in the background, seldom.

Imports the cache, the DFS client and ops. An upload is answered when FairOS-DFS has the bytes; its Bee
node pushes them to Swarm afterwards. Until Swarm is known to have them ours may be needed again, and
is not evicted. A server that does not know counts as if Swarm had all, as it forgets an upload when the
pod is closed: of one that has told before, an upload is only then taken to be in Swarm when it is old.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable

import trio

from cpodfs.cache.store import Remote, Store, trouble
from cpodfs.dfs import MAX_BLOCK_SIZE, Client, FileStatus
from cpodfs.errors import BadReply, CpodfsError, Refused, ServerError
from cpodfs.sync.ops import pod_and_path

log = logging.getLogger(__name__)

CHUNK = 4096
"""Bytes of a chunk of Swarm."""
REFERENCES = 64
"""Encrypted references that a chunk holds."""
AT_ONCE = 8
"""Files asked for in one round."""
POKE_S = 1.0
ROUND_S = 4.0
"""Between two rounds, at least."""
PAUSES_S = (3.0, 10.0, 30.0, 120.0, 600.0)
"""Before a file is asked for the first time, the second, … and from then on."""
OLD_S = 900.0
"""An upload so old is taken to be in Swarm, if the server does not know any more."""
SILENT = 3
"""So often "nothing" is waited for as the beginning of something."""
DOES_NOT_KNOW = (ServerError, BadReply, Refused)


class SwarmWatch:
    """``clock``: seconds that only grow; ``may_ask()``: whether the server has nothing better to do."""

    def __init__(
        self,
        store: Store,
        dfs: Client,
        *,
        may_ask: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._dfs = dfs
        self._may_ask = may_ask
        self._clock = clock
        self._due: dict[int, float] = {}
        self._asked: dict[int, int] = {}
        self._earlier = {r.rid: r.mtime_s for r in map(store.remote, store.unswarmed()) if r}
        self._has_told = False
        self._poked = trio.Event()
        self.on_pushed: Callable[[], None] = lambda: None

    def poke(self) -> None:
        """Something was uploaded."""
        self._poked.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        while True:
            self._poked = trio.Event()
            try:
                self.look()
                with trio.move_on_after(self.next_s()):
                    await self._poked.wait()
                    await trio.sleep(POKE_S)  # for others that come at once
                    continue
                for rid in self.take_due() if self._may_ask() else ():
                    await self._ask(rid)
            except sqlite3.Error as error:  # a full disk must not end the mount
                log.warning("what Swarm has cannot be recorded: %s", trouble(error) or error)
            await trio.sleep(ROUND_S)

    def look(self) -> None:
        """Find what is new among the files of which Swarm is not known to have all."""
        waiting = set(self._store.unswarmed())
        for rid in waiting - self._due.keys():
            self._due[rid] = self._clock() + PAUSES_S[0]
        for rid in self._due.keys() - waiting:
            del self._due[rid]
            self._asked.pop(rid, None)

    def next_s(self) -> float:
        """Seconds until a file is due; infinite when none will be."""
        return max(0.0, min(self._due.values(), default=float("inf")) - self._clock())

    def take_due(self) -> list[int]:
        """The files to ask for now, the longest due first; each is due again later."""
        now_s = self._clock()
        due = sorted((due_s, rid) for rid, due_s in self._due.items() if due_s <= now_s)[:AT_ONCE]
        for _, rid in due:
            asked = self._asked[rid] = self._asked.get(rid, 0) + 1
            self._due[rid] = now_s + PAUSES_S[min(asked, len(PAUSES_S) - 1)]
        return [rid for _, rid in due]

    async def _ask(self, rid: int) -> None:
        remote = self._store.remote(rid)
        if remote is None or self._store.doubtful_above(rid) is not None:
            return
        try:
            status = await self._dfs.file_status(*pod_and_path(self._store, rid))
        except DOES_NOT_KNOW as error:
            log.debug("no file status rid=%d: %s", rid, error)
            status = None
        except CpodfsError:
            return
        now = self._store.remote(rid)
        # Uploaded anew while we asked: that was about the one before.
        if now is not None and (now.size, now.mtime_s) == (remote.size, remote.mtime_s):
            self.heard(now, status)

    def heard(self, remote: Remote, status: FileStatus | None) -> None:
        """What the server says of an upload; None: it does not know."""
        self._has_told = self._has_told or status is not None
        if self.is_pushed(remote, status):
            self._store.set_remote(remote.rid, in_swarm=1)
            self.on_pushed()

    def is_pushed(self, remote: Remote, status: FileStatus | None) -> bool:
        """Whether Swarm has all of a file, or nobody will ever know."""
        if status is None:
            earlier = self._earlier.get(remote.rid, -1) == remote.mtime_s
            if not self._has_told and not earlier:
                return True
            return remote.mtime_s is not None and time.time() - remote.mtime_s > OLD_S
        if status.total:
            return status.synced >= status.total
        # The total is not told, as over a Bee node of version 2; nor anything, over none at all.
        if not status.synced:
            return self._asked.get(remote.rid, 0) >= SILENT
        return status.synced >= chunks_of(remote.size)


def chunks_of(size: int) -> int:
    """How many chunks an upload of ours makes: the encrypted trees of its blocks and of their list."""
    full, rest = divmod(size, MAX_BLOCK_SIZE)
    blocks = full + bool(rest)
    trees = full * _tree(MAX_BLOCK_SIZE) + (_tree(rest) if rest else 0)
    # An entry of the list is a block's size, its compressed size and its reference as JSON.
    return trees + _tree(13 + 130 * blocks)


def _tree(size: int) -> int:
    level = max(1, -(-size // CHUNK))
    count = level
    while level > 1:
        level = -(-level // REFERENCES)
        count += level
    return count
