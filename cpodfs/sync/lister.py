"""Listings: what a directory holds, asked of the server once and then known.

Imports the cache, the DFS client, merge and locks. A directory that was listed once is answered from
the cache; after ``ttl_s`` the next look starts a refresh in the background. The first listing of a
directory is waited for, by any number of readers, once.
"""

from __future__ import annotations

import itertools
import logging
import math
import posixpath
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field

import trio

from cpodfs.cache.schema import DIR, OUTDATED_S, ROOT
from cpodfs.cache.store import Inode, Remote, Store, level, trouble
from cpodfs.dfs import Client, Entry
from cpodfs.errors import (
    BadReply,
    CpodfsError,
    Doubtful,
    NotFound,
    PodNotFound,
    TimedOut,
    Unreachable,
)
from cpodfs.sync.doubt import pause_s
from cpodfs.sync.inquiry import PAUSE_S, Inquiry, Tally
from cpodfs.sync.locks import DirLocks
from cpodfs.sync.lookahead import Lookahead
from cpodfs.sync.merge import Merger, Outcome
from cpodfs.sync.missing import Missing
from cpodfs.sync.ops import Item, child_path, moved, pod_and_path, pod_of

log = logging.getLogger(__name__)

POD_MODE = 0o700
ATTEMPTS = 3
RESOLVE_S = 10.0
QUIET_S = 60.0
QUIET_SHARE = 0.8
"""Of the patience, for what keeps a pod from being opened anew; the rest is for the server."""
PATIENCE_S = 15.0
"""So long what is to be changed in a pod stands back for a second look at something doubtful in it."""
REOPEN_MIN_S = 2.0
RELOOK_MIN_S = 1.0
"""Nobody waits for a listing to be renewed that is younger than this, whatever the metadata TTL."""
MISSED_S = 5.0
"""How long somebody who misses a name waits for a new listing, at most."""
RETRY_S = 10.0
"""How long after a listing that failed an outdated one is shown without a new attempt, at most."""
INQUIRY_S = 1.0
"""An inquiry that took no longer leaves a listing as old as it is."""
REOPEN_TTLS = 5
"""A pod that is looked at is opened anew after so many times the metadata TTL."""


@dataclass(frozen=True, slots=True)
class _Found:
    """What the server lists, in so many entries. ``readonly`` names received pods."""

    entries: Iterable[Entry]
    readonly: set[str]
    malformed: int
    count: int = 0


@dataclass(slots=True)
class _Run:
    """One listing under way. Whoever waits for it gets its error, whatever has begun since."""

    done: trio.Event = field(default_factory=trio.Event)
    error: CpodfsError | None = None


class Lister:
    """``on_outcome`` passes what a merge found to the engine and the kernel. Between two slices of a
    merge ``room`` is awaited, for the cache's disk."""

    def __init__(
        self,
        store: Store,
        dfs: Client,
        merger: Merger,
        locks: DirLocks,
        missing: Missing,
        inquiry: Inquiry,
        *,
        ttl_s: float,
        parallel: int,
        patience_s: float = 30.0,
        on_outcome: Callable[[Outcome], None],
        room: Callable[[], Awaitable[None]],
    ) -> None:
        self._store = store
        self._dfs = dfs
        self._merger = merger
        self._locks = locks
        self._missing = missing
        self._inquiry = inquiry
        inquiry.opened_s = lambda pod: self._opened.get(pod, -math.inf)
        self._ttl_s = ttl_s
        self._patience_s = patience_s
        self._listed_s = -math.inf
        self._on_outcome = on_outcome
        self._room = room
        self._limit = trio.CapacityLimiter(parallel)
        self._running: dict[int, _Run] = {}
        self._retry_at: dict[int, float] = {}
        self._lookahead = Lookahead(store, self._begin)
        self._stopping = False
        self._opened: dict[int, float] = {}
        self._asking: set[int] = set()
        self._silent = False
        self.on_answer: Callable[[], None] = lambda: None
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the background refreshes until cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await self._look_again()

    async def opened(self, directory: Inode) -> None:
        """As ``ensure``, for somebody who reads the directory and may be walking the tree."""
        self._lookahead.opened(directory)
        await self.ensure(directory)

    async def stop(self) -> None:
        """Begin no more listings, and wait for those that run: they can find new work."""
        self._stopping = True
        for running in list(self._running.values()):
            await running.done.wait()

    async def ensure(self, directory: Inode) -> None:
        """Return when the children of ``directory`` are known. Raises a DfsError if they can't be."""
        if directory.listed_s:
            age = time.time() - directory.listed_s
            if not 0 <= age < self._ttl_s:
                self._refresh_later(directory.ino)
            return
        for _ in range(ATTEMPTS):
            await self.refresh(directory.ino)
            now = self._store.get(directory.ino)
            if now is None or now.listed_s or self._store.remote_of(now.ino) is None:
                return
        raise BadReply(f"{self._store.path(directory.ino)}: kept moving while it was listed")

    async def renewed(self, directory: Inode) -> None:
        """For somebody who misses a name: return when a listing that was outdated at the last
        ``ensure`` has been renewed, or at once where that would take longer than the server does.
        """
        ino = directory.ino
        remote, age = self._store.remote_of(ino), time.time() - directory.listed_s
        if ino not in self._running or remote is None or self._silent or 0 <= age < RELOOK_MIN_S:
            return
        if ino not in self._asking and self._locks.blocker((remote.rid,)) is not None:
            return  # uploads of ours go first
        try:
            with trio.move_on_after(min(self._patience_s, MISSED_S)) as scope:
                await self.refresh(ino)
            self._silent = self._silent or scope.cancelled_caught
        except CpodfsError as error:
            # One wait is enough: a shell or git looks for many names that are not there.
            self._silent = self._silent or isinstance(error, Unreachable)

    async def refresh(self, ino: int) -> None:
        """List now, or join whoever does. Raises a DfsError."""
        self._begin(ino)
        if (run := self._running.get(ino)) is None:  # at the end of the mount
            return
        await self._await(run.done)
        if run.error is not None:
            raise run.error

    async def _await(self, done: trio.Event) -> None:
        """Wait for what a task of ours does, as long as the server answers anything at all to any of
        them. Raises TimedOut; the task goes on."""
        since = trio.current_time()
        while not done.is_set():
            deadline = max(since, self._listed_s) + self._patience_s
            with trio.move_on_at(deadline):
                await done.wait()
            if not done.is_set() and max(since, self._listed_s) + self._patience_s <= deadline:
                raise TimedOut("the server does not answer")

    async def refresh_from_others(self, ino: int) -> None:
        """List anew after making the server forget: it answers from memory per session, where what
        others changed is not seen until the pod was closed and opened. Raises a DfsError; TimedOut
        leaves it going on. Twice when something is missing that a second look may settle."""
        assert self._nursery is not None
        run = _Run()
        self._nursery.start_soon(self._list_anew, ino, run)
        await self._await(run.done)
        if run.error is not None:
            raise run.error

    async def _list_anew(self, ino: int, run: _Run) -> None:
        try:
            await self._reopen_and_list(ino)
            remote = self._store.remote_of(ino)
            if remote is not None and self._missing.may_settle(remote.rid):
                await trio.sleep(pause_s(1))
                await self._reopen_and_list(ino)
        except CpodfsError as error:
            run.error = error
        except Exception as error:
            log.exception("refresh broke ino=%d", ino)
            run.error = CpodfsError(f"refresh failed: {error!r}")
        finally:
            run.done.set()

    async def _reopen_and_list(self, ino: int) -> None:
        remote = self._store.remote_of(ino)
        if remote is not None and remote.rid != ROOT:
            pod = pod_of(self._store, remote)
            if not await self._is_quiet(pod, min(QUIET_S, self._patience_s * QUIET_SHARE)):
                raise TimedOut("the pod is being written to all the time; try again later")
            await self._reopen(pod)
        await self.refresh(ino)

    async def _is_quiet(self, pod: int, patience_s: float) -> bool:
        """Whether nothing is being changed in a pod within that time, for which others stand back. The
        caller takes it then, or they would go on doing so."""
        with trio.move_on_after(patience_s) as patience:
            await self._locks.wait_free((pod,), moving=pod)
        return not patience.cancelled_caught

    async def _reopen(self, pod: int) -> None:
        """Make the server forget a pod in which nothing is being changed."""
        self._locks.take((pod,), moving=pod)
        try:
            if self._store.remote(pod) is None:  # removed while one waited
                return
            await self._dfs.refresh_pod(self._store.remote_path(pod)[0])
            self._opened[pod] = time.monotonic()
            self._listed_s = trio.current_time()
        except NotFound as error:
            self._missing.suspect(pod)
            raise Doubtful(f"{error.message}, though it was there") from error
        finally:
            self._locks.free((pod,), moving=pod)

    async def _reopen_if_old(self, remote: Remote) -> None:
        """The server's memory of a pod is as old as its opening; now and then, when nobody is at
        work there, it is opened anew, so that what others changed is seen without being asked for."""
        if remote.rid == ROOT:
            return
        pod = pod_of(self._store, remote)
        age_s = time.monotonic() - self._opened.setdefault(pod, time.monotonic())
        oldest_s = max(REOPEN_TTLS * self._ttl_s, REOPEN_MIN_S)
        if age_s > oldest_s and self._may_reopen(pod):
            await self._reopen(pod)

    def _may_reopen(self, pod: int) -> bool:
        """Whether nobody is at work in a pod, and it can be opened anew."""
        return self._is_trusted(pod) and self._locks.blocker((pod,), moving=pod) is None

    def _is_trusted(self, pod: int) -> bool:
        """Whether the server can be trusted to open a pod again: one that it has open is worth more
        than one that it cannot open."""
        remote = self._store.remote(pod)
        return remote is not None and remote.absent_s is None and not self._missing.is_fresh_lie

    async def list_locked(self, rid: int, resolving: int | None = None) -> None:
        """List a remote directory whose lock the caller holds, and, while ``resolving`` whether the
        server has renamed a directory, that at its old place as well. Raises a DfsError."""
        remote = self._store.remote(rid)
        if remote is None:
            return
        if remote.ino is not None and self._named(rid) is None:  # it has just lost its name
            return
        if (directory := self._named(rid)) is not None:
            self._merger.check_free(directory)
        started = self._store.remote_path(rid)
        try:
            found = await self._fetch(started)
        except NotFound as error:
            if self._store.remote_path(rid) != started or self._store.moving_above(rid):
                raise
            self._missing.said_absent(rid, error)
            raise Doubtful(f"{error.message}, though it was there") from error
        except Unreachable as error:
            if not await self._is_file_instead(rid, error):
                raise
            raise Doubtful("a file has the name of this directory at the server") from error
        if self._store.remote_path(rid) != started:
            return  # moved while we asked
        self._missing.answered(rid)
        if (now := self._store.remote(rid)) is not None and now.ino is None:
            self._look_at_orphan(rid, found.entries)
        known = self._named(rid)
        first = known is not None and not known.listed_s
        if first and not await self._inquiry.may_show(rid, found.count, found.malformed):
            self._missing.look(rid)
            raise Doubtful("the server leaves out names that are there")
        await self._merge(rid, started, found, resolving)

    async def _is_file_instead(self, rid: int, error: Unreachable) -> bool:
        """Whether a file has the name of a directory, or of one above it, by now: asked to list that,
        the server breaks the connection. The directory above tells, and is then listed anew."""
        while error.sent and not isinstance(error, TimedOut):
            remote = self._store.remote(rid)
            if remote is None or remote.rparent in (None, ROOT):
                return False
            rid = remote.rparent
            try:
                entries = await self._dfs.list_dir(*pod_and_path(self._store, rid))
            except Unreachable as above:
                error = above
                continue
            except NotFound:
                return False  # nothing is sure
            kinds = {entry.is_dir for entry in entries if entry.name == remote.name}
            if kinds == {False}:
                self._missing.look(rid)
            return kinds == {False}
        return False

    async def _merge(
        self, rid: int, started: list[str], found: _Found, resolving: int | None
    ) -> None:
        """Merge a listing slice by slice, for as long as the directory is where it was listed."""
        directory = self._named(rid)
        if directory is None:
            return  # to be deleted, or removed while we asked: nothing to show
        if found.malformed:
            path = self._store.path(directory.ino)
            log.warning("%d malformed entries left out of the listing of %r", found.malformed, path)
        clashing: list[str] = []
        merge = self._merger.listing(
            *(directory, rid, found.entries, found.readonly),
            complete=not found.malformed,
            resolving=resolving,
        )
        tally = Tally()
        for number, outcome in enumerate(merge):
            self._on_outcome(outcome)
            clashing += outcome.clashing
            for returned in outcome.returned:
                self._missing.returned(returned)
            tally.add(outcome)
            self._listed_s = trio.current_time()  # whoever waits sees that it goes on
            # What others ask takes several turns of the loop: not each is to wait for a slice.
            await trio.sleep(PAUSE_S if number > 1 else 0)
            await self._room()
            now = self._named(rid)
            if now is None or now.ino != directory.ino or self._store.remote_path(rid) != started:
                return
        if not found.malformed:
            await self._inquire(directory.ino, rid, tally, found.count)
        for name in clashing:
            await self._separate(rid, name)

    async def _inquire(self, ino: int, rid: int, tally: Tally, count: int) -> None:
        """Ask about what a listing did not show. That is part of the look: an upload that waits for it
        is to find it fresh at its end, however long a slow server took."""
        merged = self._store.get(ino)
        await self._inquiry.judge(rid, tally, count)
        now_s, after = time.time(), self._store.get(ino)
        if merged is None or after is None or after.listed_s != merged.listed_s:
            return
        if now_s - merged.listed_s > INQUIRY_S:
            self._store.set(ino, listed_s=now_s)

    async def is_absent(self, remote: Remote) -> bool:
        """Whether the server says that an object is not where it was."""
        return await self._inquiry.is_absent(remote)

    async def confirm(self, remote: Remote) -> None:
        """Ask by name for what no listing shows, as its directory is to be deleted."""
        if self._store.moving_above(remote.rid) or not await self._inquiry.is_absent(remote):
            return
        if remote.ino is None:
            await self._inquiry.give_up(remote.rid)
        else:
            await self._inquiry.settle_alone(remote)

    def _look_at_orphan(self, rid: int, entries: Iterable[Entry]) -> None:
        """A directory that is to be deleted comes back when somebody has changed what is in it."""
        self._store.looked[rid] = time.time()
        if self._merger.has_news(rid, entries):
            outcome = Outcome()
            self._merger.resurrect(rid, outcome)
            self._on_outcome(outcome)

    def _named(self, rid: int) -> Inode | None:
        """The directory here that shows a remote one; None when it has lost its name."""
        remote = self._store.remote(rid)
        inode = self._store.get(remote.ino) if remote is not None and remote.ino else None
        if inode is None or (inode.parent is None and inode.ino != ROOT):
            return None
        return inode

    async def _separate(self, rid: int, name: str) -> None:
        """The server has a file beside a directory of the same name: give the file another one, by
        which the next listing finds it. The caller holds the lock of the directory ``rid``."""
        directory = self._named(rid)
        if directory is None or self._store.remote_path(rid) == []:
            return
        pod, old = child_path(self._store, rid, name)
        new = self._merger.free_name(directory.ino, name)
        log.warning("conflict: %s%s is a file and a directory; the file is now %r", pod, old, new)
        await self._dfs.rename_file(pod, old, child_path(self._store, rid, new)[1])
        self._store.set(directory.ino, listed_s=OUTDATED_S)

    async def look_behind(self, before: Remote) -> list[Item]:
        """A directory, known as ``before``, may be where it was to be moved and at its old place as well,
        when it was moved object by object and that was broken off. What is still there follows one by
        one, as in a ``Rehome``. Returns what now needs work. Raises a DfsError, and nothing has changed."""
        now, rparent = self._store.remote(before.rid), before.rparent
        if now is None or rparent is None or self._store.remote(rparent) is None:
            return []
        to_parent, to_name = now.rparent, now.name
        if now.to_parent is not None and now.to_name is not None:
            to_parent, to_name = now.to_parent, now.to_name
        there = self._store.remote_at(rparent, before.name)
        if to_parent is None or (there is not None and there.rid != now.rid):
            return []
        if (to_parent, to_name) == (rparent, before.name):
            return []
        other = self._store.remote_at(to_parent, to_name)
        if other is not None and other.rid != now.rid:
            return []
        pod, old = child_path(self._store, rparent, before.name)
        _, new = child_path(self._store, to_parent, to_name)
        both: dict[int, tuple[set[str], set[str]]] = {}
        with suppress(NotFound):
            # Where a file has such a name by now, the server breaks off when it is to be listed.
            if await self._shows_dir(pod, new) and await self._shows_dir(pod, old):
                await self._list_both(before, pod, old, new, both)
        if not both or self._store.remote(now.rid) != now:  # gone meanwhile, with its pod
            return []
        with self._store.transaction():
            work = moved(self._store, now.rid, to_parent, to_name)
            self._leave_behind(before, rparent, both)
        return work

    async def _shows_dir(self, pod: str, path: str) -> bool:
        folder, name = posixpath.split(path)
        return any(e.is_dir and e.name == name for e in await self._dfs.list_dir(pod, folder))

    async def _list_both(
        self,
        folder: Remote,
        pod: str,
        old: str,
        new: str,
        both: dict[int, tuple[set[str], set[str]]],
    ) -> None:
        """Add the names that are still in a directory, and those that are in its new place, if there
        are two; the same of those in it."""
        came, left = await self._dfs.list_dir(pod, new), await self._dfs.list_dir(pod, old)
        dirs = {e.name for e in came if e.is_dir} & {e.name for e in left if e.is_dir}
        both[folder.rid] = {e.name for e in left}, {e.name for e in came}
        for child in self._store.remote_children(folder.rid):
            if child.kind == DIR and child.name in dirs:
                await self._list_both(
                    child, pod, f"{old}/{child.name}", f"{new}/{child.name}", both
                )

    def _leave_behind(
        self, folder: Remote, rparent: int, both: dict[int, tuple[set[str], set[str]]]
    ) -> None:
        left, came = both[folder.rid]
        old = self._store.add_remote(
            *(rparent, folder.name, DIR), size=0, mtime_s=None, mode=folder.mode, ino=None
        )
        for child in self._store.remote_children(folder.rid):
            if child.rid in both:
                self._leave_behind(child, old, both)
            elif child.name in left - came:
                self._store.set_remote(child.rid, rparent=old)
                if child.ino is not None:
                    self._store.replace(child.ino)

    async def is_at_orphan(self, moving: Remote) -> bool:
        """Whether an object that may have been renamed into a directory that nobody here has any
        more, and whose listing shows nothing therefore, is there."""
        target = self._store.remote(moving.to_parent) if moving.to_parent is not None else None
        if target is None or target.ino is not None or moving.to_name is None:
            return False
        if (now := self._store.remote(moving.rid)) is None or now.to_parent is None:
            return False
        pod, path = child_path(self._store, target.rid, moving.to_name)
        try:
            await (self._dfs.stat_dir if moving.kind == "d" else self._dfs.stat_file)(pod, path)
        except NotFound:
            return False
        return True

    # -- one listing at a time per directory ------------------------------------------------------

    def _refresh_later(self, ino: int) -> None:
        if time.monotonic() >= self._retry_at.get(ino, 0.0) and not self._merger.is_held(ino):
            self._begin(ino)

    def _begin(self, ino: int) -> None:
        if ino not in self._running and not self._stopping:
            self._start(ino)

    def _start(self, ino: int) -> None:
        assert self._nursery is not None
        run = self._running[ino] = _Run()
        self._nursery.start_soon(self._run_one, ino, run)

    async def _run_one(self, ino: int, run: _Run) -> None:
        try:
            await self._refresh(ino)
            self._retry_at.pop(ino, None)
            self._listed_s = trio.current_time()
        except CpodfsError as error:
            self._silent = self._silent or isinstance(error, Unreachable)
            log.info("listing failed ino=%d: %s", ino, error)
            run.error = error
            self._retry_at[ino] = time.monotonic() + min(self._ttl_s, RETRY_S)
        except Exception as error:
            if (why := trouble(error)) is None:
                log.exception("listing broke ino=%d", ino)
            else:  # a full disk, most likely: what is known is shown
                log.log(level(why), "listing cannot be recorded ino=%d: %s", ino, why)
                self._retry_at[ino] = time.monotonic() + RETRY_S
            run.error = CpodfsError(f"listing failed: {why or repr(error)}")
        finally:
            del self._running[ino]
            run.done.set()
            self._lookahead.listed(ino)

    async def _refresh(self, ino: int) -> None:
        remote = self._store.remote_of(ino)
        if remote is None:  # made here, and the server has not heard of it: we know it all
            return
        await self._until_known(remote.rid)
        await self._reopen_if_old(remote)
        await self._locks.wait_free((remote.rid,))
        self._locks.take((remote.rid,))
        self._asking.add(ino)
        try:
            async with self._limit:
                await self.list_locked(remote.rid)
            self._silent = False
            self.on_answer()
        finally:
            self._asking.discard(ino)
            self._locks.free((remote.rid,))

    async def _until_known(self, rid: int) -> None:
        """Wait until it is known where the server has a directory whose rename was never confirmed:
        after a crash the engine looks into that first. Raises TimedOut."""
        with trio.move_on_after(RESOLVE_S):
            while self._store.moving_above(rid) is not None:
                await self._locks.next_free()
            return
        raise TimedOut("it is not known yet whether the server has renamed this directory")

    async def _fetch(self, parts: list[str]) -> _Found:
        if not parts:
            pods = await self._dfs.pods()
            received = set(pods.shared) - set(pods.own)
            names = itertools.chain(pods.own, received)
            return _Found(map(_pod_entry, names), received, pods.malformed)
        listing = await self._dfs.list_dir(parts[0], "/" + "/".join(parts[1:]))
        return _Found(listing, set(), listing.malformed, len(listing))

    # -- what is not shown ------------------------------------------------------------------------

    def said_absent(self, rids: Iterable[int], error: NotFound | Doubtful) -> None:
        """A call about something in these directories was answered so: they are looked at again."""
        for rid in rids:
            if isinstance(error, PodNotFound):
                self._missing.said_absent(rid, error)
            elif self._store.remote(rid) is not None:
                self._missing.look(rid)

    def look_above(self, rids: Iterable[int]) -> None:
        """Calls about something in these directories go without an answer: the server breaks off, or
        hangs, where one of them has become a file. What they are in is looked at."""
        for rid in rids:
            remote = self._store.remote(rid)
            if remote is not None and remote.rparent is not None:
                self._missing.look(remote.rparent)

    async def accept_deletions(self, ino: int) -> int:
        """Ask once more, then take all that the server does not show at and below an inode as deleted;
        returns how many objects that were. Raises a DfsError when the server does not answer."""
        while (remote := self._store.remote_of(ino)) is None:  # not sent yet: where it is to go
            inode = self._store.get(ino)
            if inode is None or inode.parent is None:
                return 0
            ino = inode.parent
        if self._store.doubtful_above(remote.rid) is None:
            with suppress(NotFound, Doubtful):
                await self.refresh_from_others(ino)
        above = self._store.doubtful_above(remote.rid)
        if above is not None and above.rparent is not None:
            home = self._store.remote(above.rparent)
            with suppress(NotFound, Doubtful):
                await self.refresh_from_others(home.ino if home is not None and home.ino else ROOT)
        if left_out := self._missing.accept_left_out(remote.rid):
            await self.refresh(ino)
        accepted = [r.rid for r in self._store.doubtful() if self._is_below(r.rid, remote.rid)]
        if self._store.doubtful_above(remote.rid) is not None:
            accepted = [remote.rid]
        for rid in accepted:
            log.warning(
                "deleted elsewhere, the user says: %r", "/".join(self._store.remote_path(rid))
            )
            folder = self._store.remote(rid)
            if folder is not None and folder.rparent is not None:
                self._missing.settled(folder.rparent)
            await self._inquiry.give_up(rid)
        return left_out + len(accepted)

    def _is_below(self, rid: int, top: int) -> bool:
        remote = self._store.remote(rid)
        while remote is not None and remote.rid != top:
            remote = self._store.remote(remote.rparent) if remote.rparent is not None else None
        return remote is not None

    async def _look_again(self) -> None:
        """Ask again for what is doubtful, at growing distances."""
        self._missing.resume()
        while True:
            await self._missing.wait()
            for rid in self._missing.take_due():
                if not self._stopping:
                    await self._second_look(rid)

    async def _second_look(self, rid: int) -> None:
        remote = self._store.remote(rid)
        if remote is None:
            return
        try:
            # Not in an alarm: that is not settled by asking.
            if rid != ROOT and rid not in self._missing.alarms:
                pod = pod_of(self._store, remote)
                if self._is_trusted(pod) and await self._is_quiet(pod, PATIENCE_S):
                    await self._reopen(pod)
            if remote.ino is not None:  # else whoever doubts what is in there asks again
                await self.refresh(remote.ino)
        except (CpodfsError, sqlite3.Error) as error:
            log.debug("no second look at rid=%d: %s", rid, trouble(error) or error)
            self._missing.look(rid)


def _pod_entry(name: str) -> Entry:
    # Received ones too: with a mode that forbids writing, the kernel would refuse (EACCES) what we
    # refuse with a reason (EROFS).
    return Entry(name, True, 0, POD_MODE, 0, 0, 0)
