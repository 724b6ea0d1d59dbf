"""Asks the server again, in other ways, about what a listing did not show, and acts on the verdict.

Imports the cache, the DFS client, merge and the register. The caller holds the lock of the directory
that was listed. What is neither deleted nor shown stays as it is here, whatever the server says.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace

import trio

from cpodfs.cache.schema import DIR, ROOT, UNKNOWN
from cpodfs.cache.store import Remote, Store
from cpodfs.dfs import Client
from cpodfs.errors import NotFound
from cpodfs.sync.doubt import Folder, Verdict, is_much
from cpodfs.sync.locks import DirLocks
from cpodfs.sync.merge import Merger, Outcome
from cpodfs.sync.missing import Missing
from cpodfs.sync.ops import look_for, pod_and_path, pod_of

log = logging.getLogger(__name__)

AT_ONCE = 200
"""Objects that are marked before others get in between."""
ALONE = Folder(known=1, missing=1, unchanged=0, whole=True)
"""What is missing where nothing bears witness of it."""
PAUSE_S = 0.001
"""Between two slices of a long merge."""


@dataclass(slots=True)
class Tally:
    """What the slices of one merge found together; see ``Outcome``."""

    shown: int = 0
    unchanged: int = 0
    missing: list[Remote] = field(default_factory=list)
    outdated: list[Remote] = field(default_factory=list)
    replaced: set[int] = field(default_factory=set)

    def add(self, outcome: Outcome) -> None:
        self.shown += outcome.shown
        self.unchanged += outcome.unchanged
        self.missing += outcome.missing
        self.outdated += outcome.outdated
        self.replaced.update(outcome.replaced)


class Inquiry:
    """``opened_s(pod)``: when the server was last made to forget what it knew of a pod."""

    def __init__(
        self,
        store: Store,
        dfs: Client,
        merger: Merger,
        locks: DirLocks,
        missing: Missing,
        on_outcome: Callable[[Outcome], None],
    ) -> None:
        self._store = store
        self._dfs = dfs
        self._merger = merger
        self._locks = locks
        self._missing = missing
        self._on_outcome = on_outcome
        self.opened_s: Callable[[int], float] = lambda _pod: float("-inf")

    async def judge(self, rid: int, tally: Tally, entries: int) -> None:
        """What becomes of what a listing of so many entries did not show."""
        missing = await self._settle(rid, tally, entries)
        missing += self._still_outdated(tally.outdated)
        if not missing:
            self._missing.calm(rid)
            if self._store.has_doubtful(rid):
                self._missing.look(rid)
            else:
                self._missing.settled(rid)
            return
        await self._mark(missing)
        outdated = {remote.rid for remote in tally.outdated}
        for remote in missing:
            self._missing.is_outdated(remote.rid, remote.rid in outdated)
        folder = Folder(
            *(tally.shown + len(missing), len(missing), tally.unchanged),
            whole=True,
            is_root=rid == ROOT,
        )
        if is_much(folder):
            self._missing.alarm(rid, folder)
            return
        whole = await self.is_whole(rid, entries)
        absent = [remote for remote in missing if await self._confirm(remote)]
        await self._carry_out(rid, replace(folder, missing=len(absent), whole=whole), absent)

    async def _mark(self, missing: list[Remote]) -> None:
        for start in range(0, len(missing), AT_ONCE):
            with self._store.transaction():
                for remote in missing[start : start + AT_ONCE]:
                    self._missing.suspect(remote.rid)
            await trio.lowlevel.checkpoint()

    async def _carry_out(self, rid: int, folder: Folder, absent: list[Remote]) -> None:
        verdicts = [self._missing.judge(remote.rid, folder) for remote in absent]
        for remote, verdict in zip(absent, verdicts, strict=True):
            if verdict is Verdict.DELETED:
                await self.give_up(remote.rid)
        if Verdict.ALARM in verdicts:
            self._missing.alarm(rid, folder)
        elif self._store.has_doubtful(rid):
            self._missing.calm(rid)
            # The look that was due may have come to no more than to join this one.
            self._missing.look(rid)
        else:
            self._missing.settled(rid)

    def believe_gone(self, rid: int) -> None:
        """The server has no such object any more: that is certain, or the user's word."""
        remote = self._store.remote(rid)
        if rid in self._missing.outdated:
            self._missing.accept_older(rid)
        elif remote is not None:
            outcome = Outcome()
            self._merger.gone(remote, outcome)
            self._on_outcome(outcome)

    async def give_up(self, rid: int) -> None:
        """As ``believe_gone``; of a large directory slice by slice."""
        remote = self._store.remote(rid)
        if remote is not None and rid not in self._missing.outdated:
            for outcome in self._merger.gone_by_slices(remote):
                self._on_outcome(outcome)
                await trio.sleep(PAUSE_S)
        else:
            self.believe_gone(rid)

    async def _settle(self, rid: int, tally: Tally, entries: int) -> list[Remote]:
        """What there is to doubt of what is missing: not an object that was to be deleted, nor one that
        was only supposed to have arrived and is sent again."""
        doubtful: list[Remote] = []
        spare: list[Remote] = []
        for remote in tally.missing:
            if self._store.remote(remote.rid) is None or self._store.moving_above(remote.rid):
                continue
            supposed = remote.size == UNKNOWN and self._merger.is_sent_again(remote)
            (spare if remote.ino is None or supposed else doubtful).append(remote)
        sure = bool(spare) and await self.is_whole(rid, entries)
        for remote in spare:
            if sure and await self.is_absent(remote):
                await self.give_up(remote.rid)
                continue
            self._missing.suspect(remote.rid)
            # A listing leaves out for ever a name that the server has lost: that of a file where by now
            # a directory is can be one.
            lost = remote.rid in tally.replaced and await self._confirm(remote)
            if lost and self._missing.judge(remote.rid, ALONE) is Verdict.DELETED:
                await self.give_up(remote.rid)
                self._missing.look(rid)  # for that directory
        return doubtful

    def _still_outdated(self, outdated: list[Remote]) -> list[Remote]:
        """What there is to doubt of what is shown in an earlier version: not what was to be deleted,
        which is when the version to be deleted is shown again."""
        doubtful: list[Remote] = []
        for remote in outdated:
            now = self._store.remote(remote.rid)
            if now is None or (now.size, now.mtime_s) != (remote.size, remote.mtime_s):
                continue
            if now.ino is None:
                self._missing.suspect(now.rid)
            else:
                doubtful.append(now)
        return doubtful

    # -- asking -----------------------------------------------------------------------------------

    async def _confirm(self, remote: Remote) -> bool:
        """Whether an object is not there, or not as it was, by whatever way it is asked for."""
        if remote.rid in self._missing.outdated:
            if not await self._is_outdated(remote):
                return False
        elif not await self.is_absent(remote):
            self._missing.seen(remote.rid)
            return False
        elif await self._lists(remote):
            self._missing.unconfirmed(remote.rid)
            return False
        if self._store.remote(remote.rid) is not None:
            pod = pod_of(self._store, remote)
            self._missing.confirm(remote.rid, self.opened_s(pod) if pod != remote.rid else None)
        return True

    async def settle_alone(self, remote: Remote) -> None:
        """Doubt an object whose directory nobody here has any more, so that no neighbour bears witness,
        until that was confirmed. Raises a DfsError."""
        self._missing.suspect(remote.rid)
        pod, path = pod_and_path(self._store, remote.rid)
        # Step 1: its directory's listing; that may be gone, too.
        with suppress(NotFound):
            if await look_for(self._dfs, pod, path, is_dir=remote.kind == DIR) is not None:
                return
        # Step 2: by name, again and again.
        if not await self._confirm(remote):
            return
        if self._missing.judge(remote.rid, ALONE) is Verdict.DELETED:
            await self.give_up(remote.rid)
        elif remote.rparent is not None:
            self._missing.look(remote.rparent)  # which makes the server forget what it knew

    async def is_absent(self, remote: Remote) -> bool:
        """Whether the server says, asked by name, that an object is not where it was."""
        if self._store.remote(remote.rid) is None:
            return False  # its directory was found to be gone meanwhile, and all in it
        if remote.rparent == ROOT:
            return await self._is_pod_absent(remote)
        pod, path = pod_and_path(self._store, remote.rid)
        try:
            await (self._dfs.stat_dir if remote.kind == "d" else self._dfs.stat_file)(pod, path)
        except NotFound:
            return True
        return False

    async def _lists(self, remote: Remote) -> bool:
        """Whether the server lists a directory that it does not show; see ``Missing.answered``."""
        if remote.kind != DIR or remote.rparent == ROOT or self._store.remote(remote.rid) is None:
            return False
        try:
            await self._dfs.list_dir(*pod_and_path(self._store, remote.rid))
        except NotFound:
            return False
        return True

    async def _is_outdated(self, remote: Remote) -> bool:
        """Whether the server shows an earlier version of a file, asked by name, too."""
        if self._store.remote(remote.rid) is None:
            return False
        try:
            stat = await self._dfs.stat_file(*pod_and_path(self._store, remote.rid))
        except NotFound:
            return False  # neither there as listed, nor surely gone
        if remote.is_version(stat.size, stat.mtime_s):
            self._missing.seen(remote.rid)
        return remote.is_older(stat.mtime_s)

    async def _is_pod_absent(self, remote: Remote) -> bool:
        if await self._dfs.pod_present(remote.name):
            return False
        # A pod that the server has open may be all that is left of it: one that holds something is
        # not closed to find out.
        if self._missing.holds(remote) or self._locks.blocker((remote.rid,), moving=remote.rid):
            return True
        try:
            await self._dfs.refresh_pod(remote.name)
        except NotFound:
            return True
        return False

    async def may_show(self, rid: int, entries: int, malformed: int) -> bool:
        """Whether a first listing, which nothing known can be compared with, may be taken as it is: it
        is looked into where it shows nothing, or the server leaves things out."""
        if entries and not self._missing.distrusted and not self._store.doubtful(limit=1):
            return True
        left_out = await self._left_out(rid, entries + malformed)
        if left_out == 0:
            self._missing.is_whole(rid)
            return True
        remote = self._store.remote(rid)
        if left_out is None or remote is None:
            return False
        opened_s = self.opened_s(pod_of(self._store, remote))
        return self._missing.are_lost(rid, left_out, opened_s, witness=entries > 0)

    async def is_whole(self, rid: int, entries: int) -> bool:
        """Whether a listing of so many entries left none out."""
        return await self._left_out(rid, entries) == 0

    async def _left_out(self, rid: int, entries: int) -> int | None:
        """How many names a listing of so many entries left out: the server counts a directory's names
        without fetching what they are names of. None where it does not say."""
        if rid == ROOT:
            return 0
        pod, path = pod_and_path(self._store, rid)
        try:
            stat = await self._dfs.stat_dir(pod, path)
        except NotFound:
            return None
        left_out = max(0, stat.dirs + stat.files - entries)
        if left_out:
            log.info("a listing leaves out %d: %s%s", left_out, pod, path)
        return left_out
