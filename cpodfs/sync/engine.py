"""The writeback queue: what to send next, how much at once, and what to do when it fails.

Imports the planner, operations, locks and lister. Objects, not operations, are queued: each is
planned anew at the moment it may run, so whatever happened meanwhile is taken into account and
coalesces by itself. All state changes are synchronous; the only awaits are inside ``_run_op`` (the
server) and in ``run`` (nothing to do). A failed call is retried for ever, at growing distances.
"""

from __future__ import annotations

import logging
import shlex
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import trio

from cpodfs.cache.durability import Durability
from cpodfs.cache.schema import DIR
from cpodfs.cache.store import Remote, Store, level, trouble
from cpodfs.dfs import Client
from cpodfs.errors import (
    AlreadyExists,
    BadReply,
    ChangedDuringUpload,
    Conflict,
    CpodfsError,
    Denied,
    DfsError,
    Doubtful,
    NotEmpty,
    NotFound,
    Refused,
    ServerError,
    Unreachable,
    Unseen,
)
from cpodfs.paths import TEMP_PREFIX
from cpodfs.sync import retry
from cpodfs.sync.lister import Lister
from cpodfs.sync.locks import DirLocks
from cpodfs.sync.merge import Merger, Outcome
from cpodfs.sync.missing import Missing
from cpodfs.sync.ops import (
    BELIEVED_ATTEMPTS,
    Item,
    Look,
    Move,
    Op,
    RemoveDir,
    Resolve,
    Upload,
    move_aside,
    moved,
)
from cpodfs.sync.planner import Blocked, Damaged, Planner
from cpodfs.sync.retry import Retry
from cpodfs.sync.schedule import Schedule
from cpodfs.sync.waits import Waits

log = logging.getLogger(__name__)

STARTS_AT_ONCE = 8
IN_USE_S = 0.5
BUSY_S = 0.5
"""While somebody waits for the end: how soon a file that is being written to is tried again."""
UNANSWERED = (Unreachable, BadReply, ServerError)
"""After these the server may have done what was asked."""
MOVE_REFUSED = (NotFound, AlreadyExists, Refused, Denied)
"""Clear answers to a rename, unlike a lost connection."""


@dataclass(slots=True)
class Limits:
    """How many calls of each kind may be under way at once."""

    uploads: int = 4
    changes: int = 8


@dataclass(slots=True)
class _Flight:
    op: Op
    moving: int | None
    scope: trio.CancelScope
    again: bool = False


@dataclass(slots=True)
class Counters:
    """What writeback did since the mount: calls that succeeded, bytes sent, failures."""

    done: int = 0
    bytes_sent: int = 0
    failed: int = 0
    recent: deque[str] = field(default_factory=lambda: deque(maxlen=20))


def _log_broken(what: str, item: Item, error: Exception) -> None:
    if (why := trouble(error)) is None:
        log.exception("%s item=%s", what, item)
    else:
        log.log(level(why), "%s item=%s: %s", what, item, why)


class Engine:
    """``delay_s``: how long an object must be left alone before the server hears of it."""

    def __init__(
        self,
        store: Store,
        durability: Durability,
        dfs: Client,
        lister: Lister,
        merger: Merger,
        locks: DirLocks,
        missing: Missing,
        *,
        delay_s: float,
        fresh_s: float,
        limits: Limits,
        on_outcome: Callable[[Outcome], None],
    ) -> None:
        self._store = store
        self._dfs = dfs
        self._lister = lister
        self._merger = merger
        self._locks = locks
        self._missing = missing
        self._durability = durability
        self._planner = Planner(store, durability, fresh_s)
        self._delay_s = delay_s
        self._limits = limits
        self._on_outcome = on_outcome
        self.counters = Counters()
        self.failures: dict[int, str] = {}
        """Why deletions have failed, by remote id. Those of inodes the store keeps."""
        self._due = Schedule()
        self._flights: dict[Item, _Flight] = {}
        self._waits = Waits()
        self._parked: dict[int | str, deque[Item]] = {}
        self._retry = Retry()
        self._unsure: dict[Item, tuple[int, ...]] = {}
        self._unanswered: set[Item] = set()
        self._marked: set[int] = set()
        self._have_failed = False
        self.on_clean: Callable[[], None] = lambda: None
        self.is_read: Callable[[int | None], bool] = lambda rid: False
        self._draining = False
        self._wake = trio.Event()
        self._progress = trio.Event()
        self._nursery: trio.Nursery | None = None
        locks.on_free = self._on_free
        store.on_unsettled = self._noted

    # -- what the file system says ----------------------------------------------------------------

    def touch(self, item: Item) -> None:
        """An object changed: it is due after the delay of quiet."""
        self._retry.attempts.pop(item, None)
        flight = self._flights.get(item)
        if flight is not None:
            flight.again = True
            return
        self._schedule(item, 0.0 if self._draining else self._delay_s)

    def wrote(self, ino: int) -> None:
        """Called before bytes go into a data file: journals that the file is dirty."""
        item = ("ino", ino)
        flight = self._flights.get(item)
        if flight is not None and isinstance(flight.op, Upload):
            flight.op.changed = True
        if ino not in self._marked:
            self._store.wrote(ino)
            self._marked.add(ino)
        self.touch(item)

    def closed(self, ino: int) -> None:
        """Nobody has the file open any more."""
        self._marked.discard(ino)

    def unlinked(self, ino: int) -> None:
        """The file lost its name: an upload of it under way is for nothing."""
        self._marked.discard(ino)
        item: Item = ("ino", ino)
        self._due.drop(item)
        self._wake_waiting(item)
        flight = self._flights.get(item)
        if flight is not None and isinstance(flight.op, Upload):
            flight.op.changed = True
            if not flight.op.all_sent:  # else: hear it out
                flight.scope.cancel()

    # -- what the user asks -----------------------------------------------------------------------

    def is_idle(self) -> bool:
        return not self._flights and self._store.is_settled()

    def uploading(self) -> dict[int, tuple[int, int]]:
        """Bytes sent and to send of each upload under way, by inode."""
        return {
            f.op.ino: (f.op.sent, f.op.size)
            for f in self._flights.values()
            if isinstance(f.op, Upload)
        }

    @property
    def offline(self) -> bool:
        return self._retry.offline

    def went_offline(self) -> None:
        """Somebody else found that the server does not answer."""
        self._retry.went_offline()

    def answered(self) -> None:
        """Somebody else got an answer of the server."""
        self._retry.answered()

    def hurry(self) -> None:
        """From now on nothing waits for its delay, and what has failed is tried at once."""
        self._draining = True
        self._retry.open_gate()
        for item in self._due.items():
            self._schedule(item, 0.0)
        self._wake.set()

    def retry(self) -> None:
        """What kept some things from being sent is over: none of them waits any longer."""
        self._retry_others()

    def relax(self) -> None:
        self._draining = False

    def moved(self) -> tuple[int, int]:
        """Grows while there is progress; what was refused before and is sent again is none."""
        flights = self._flights.values()
        sent = sum(f.op.sent for f in flights if isinstance(f.op, Upload) and f.op.attempt <= 1)
        return self.counters.done, sent

    async def progressed(self) -> None:
        """Return when an operation has ended, well or not."""
        await self._progress.wait()

    def rests(self, seconds: float) -> bool:
        """Whether nothing is under way or kept back by a listing, and nothing will be in so many
        seconds."""
        return not self._flights and not self._parked and self._due.next_s() > seconds

    def is_being_stored(self) -> bool:
        """Whether an upload's last byte was sent and the server is at work on it, which takes as
        long as it takes; the client knows how long it may."""
        return any(
            isinstance(f.op, Upload) and f.op.all_sent and f.op.attempt <= 1
            for f in self._flights.values()
        )

    def send_now(self, ino: int) -> None:
        """What is pending of an object is due at once, as if it had never failed."""
        self._retry.attempts.pop(("ino", ino), None)
        self._schedule(("ino", ino), 0.0)

    def is_failing(self, ino: int) -> bool:
        """Whether the object, or one that it waits for, has failed since."""
        return any(item in self._retry.attempts for item in self._waits.chain(("ino", ino)))

    def is_under_way(self, item: Item) -> bool:
        return item in self._flights

    def waits_for(self, item: Item) -> Item:
        """The last of what an object waits for, one after another; itself if it does not."""
        return self._waits.chain(item)[-1]

    def stranded(self) -> list[Item]:
        """Objects that are not settled and that nothing will ever come back to: always empty.

        What is not settled is due, under way or kept back by something that is under way, or it
        waits for what is.
        """
        parked = {
            item for where, items in self._parked.items() if self._is_taken(where) for item in items
        }
        return [
            item
            for item in self._store.unsettled()
            if not any(
                i in self._due or i in self._flights or i in parked for i in self._waits.chain(item)
            )
        ]

    def _is_taken(self, where: int | str) -> bool:
        if isinstance(where, str):
            return bool(self._count(where) >= getattr(self._limits, where))
        return self._locks.is_taken(where)

    # -- the queue --------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Work until cancelled. What an earlier driver left pending is due at once."""
        self._store.forget_strays()
        for remote in self._store.moving():  # first: nothing below them can be done before
            self._schedule(remote.item, 0.0)
        for inode in self._store.pending_inodes():
            self._schedule(("ino", inode.ino), 0.0)
        for rid in self._store.orphans():
            self._schedule(("rid", rid), 0.0)
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            while True:
                self._wake = trio.Event()
                wait_s = self._start_due()
                if wait_s:
                    with trio.move_on_after(wait_s):
                        await self._wake.wait()
                else:
                    await trio.lowlevel.checkpoint()  # let the file system in between

    def _noted(self, item: Item) -> None:
        """The store has come to hold something that is not settled: it is seen to, whoever made it
        so. Whoever knows better when says it by ``touch``."""
        known = item in self._due or item in self._flights or item in self._waits
        if not known:
            self._schedule(item, 0.0 if self._draining else self._delay_s)

    def _schedule(self, item: Item, delay_s: float) -> None:
        if self._due.put(item, delay_s):
            self._wake.set()

    def _start_due(self) -> float:
        """Start some of what is due; returns the seconds until the next will be (0: there is more)."""
        for _ in range(STARTS_AT_ONCE):
            if gate_s := self._retry.gate_s():
                return gate_s
            item = self._due.pop()
            if item is None:
                return self._due.next_s()
            self._try(item)
        return 0.0

    def _try(self, item: Item) -> None:
        """Start the next operation for an object, or note what it waits for."""
        try:
            try:
                self._try_once(item)
            except OSError as error:  # of the cache's disk, which may answer again
                self._failed(item, error, self._retry.failed(item, error))
        except Exception as error:  # noqa: BLE001
            # Our own mistake, or a full disk: one object must not end the mount.
            _log_broken("cannot plan", item, error)
            self._schedule(item, retry.MAX_S)

    def _try_once(self, item: Item) -> None:
        if item in self._flights:
            self._flights[item].again = True
            return
        self._waits.remove(item)
        plan = self._planner.plan(item)
        if plan is None:
            self._settled(item)
        elif isinstance(plan, Blocked):
            self._block(item, plan.on)
        elif isinstance(plan, Damaged):
            outcome = Outcome()
            self._merger.damaged(plan.ino, outcome)
            self._settled(item)
            self._on_outcome(outcome)
        else:
            self._start(plan)

    def _start(self, op: Op) -> None:
        if gate_s := self._retry.gate_s():
            self._schedule(op.item, gate_s)
            return
        moving = op.rid if isinstance(op, Move) and op.is_dir else None
        # A look changes nothing, and may find why an earlier attempt failed.
        verify = None if isinstance(op, Look) else self._unsure.get(op.item)
        dirs = tuple({*op.dirs, *(verify or ())})
        kind = "uploads" if isinstance(op, Upload) else "changes"
        if self._count(kind) >= getattr(self._limits, kind):
            self._park(kind, op.item)
            return
        busy = self._locks.blocker(dirs, moving)
        if busy is not None:
            self._park(busy, op.item)
            return
        if self.is_read(op.replaces):
            # Somebody has it open after its unlink, and not all of it is here yet.
            self._schedule(op.item, IN_USE_S)
            return
        assert self._nursery is not None
        op.dirs = dirs
        op.attempt = self._retry.attempts.get(op.item, 0)
        op.may_be_done = op.item in self._unanswered
        self._locks.take(dirs, moving)
        flight = self._flights[op.item] = _Flight(op, moving, trio.CancelScope())
        self._nursery.start_soon(self._fly, flight, verify)

    def _count(self, kind: str) -> int:
        uploads = sum(isinstance(f.op, Upload) for f in self._flights.values())
        return uploads if kind == "uploads" else len(self._flights) - uploads

    def _park(self, where: int | str, item: Item) -> None:
        self._parked.setdefault(where, deque()).append(item)

    def _on_free(self, rid: int) -> None:
        self._unpark(rid, lambda: self._locks.blocker((rid,)) is None)
        if rid in self._parked:
            # Somebody is at work above: it is him that they wait for now.
            busy = self._locks.blocker((rid,))
            if busy != rid:
                waiting = self._parked.pop(rid)
                for item in waiting:
                    if busy is None:
                        self._schedule(item, 0.0)
                    else:
                        self._park(busy, item)

    def _unpark(self, where: int | str, free: Callable[[], bool]) -> None:
        queue = self._parked.get(where)
        rounds = len(queue) if queue else 0
        while queue and rounds and free():
            rounds -= 1
            self._try(queue.popleft())
        if not queue:
            self._parked.pop(where, None)

    # -- who waits for whom -----------------------------------------------------------------------

    def _block(self, item: Item, on: Item) -> None:
        ring = self._waits.add(item, on)
        if ring:
            self._break(ring)
        elif on not in self._flights and on not in self._waits:
            self._schedule(on, self._patience(on))

    def _patience(self, item: Item) -> float:
        """Whoever stands in somebody's way is due at once, unless it has just failed."""
        failed = item in self._retry.attempts and item in self._due
        return self._due.due_s(item) if failed else 0.0

    def _break(self, ring: list[Item]) -> None:
        stale = [item for item in ring if not self._still_waits(item)]
        for item in stale:
            self._waits.remove(item)
            self._schedule(item, 0.0)
        if stale:
            return
        for item in ring:
            remote = self._store.remote_of(item[1]) if item[0] == "ino" else None
            if remote is not None and not remote.name.startswith(TEMP_PREFIX):
                self._waits.remove(item)
                self._start(move_aside(self._store, remote))
                return
        log.error("objects wait for each other: %r", ring)
        for item in ring:
            self._schedule(item, retry.MAX_S)

    def _still_waits(self, item: Item) -> bool:
        """Whether an object must wait for the one that it waits for: what was so when it was planned
        may be so no more."""
        plan = self._planner.plan(item)
        return isinstance(plan, Blocked) and self._waits.chain(item)[1:2] == [plan.on]

    def _wake_waiting(self, item: Item, delay_s: float = 0.0) -> None:
        for waiting in self._waits.pop(item):
            self._schedule(waiting, delay_s)

    # -- one operation ----------------------------------------------------------------------------

    async def _fly(self, flight: _Flight, verify: tuple[int, ...] | None) -> None:
        op = flight.op
        error: Exception | None = None
        finished, work = False, None
        try:
            with flight.scope:
                work = await self._run_op(op, verify)
                finished = True
        except (CpodfsError, OSError) as failure:
            error = failure
        except Exception as failure:
            # Our own mistake, or SQLite on a full disk: it must not end the mount.
            if trouble(failure) is None:  # else it is told of below
                log.exception("writeback broke item=%s", op.item)
            error = failure
        finally:
            del self._flights[op.item]
            if flight.scope.cancelled_caught:
                error = ChangedDuringUpload("given up: the file was deleted")
            try:
                if error is not None:
                    self._fail(op, error)
                elif work is not None:
                    self._succeeded(op, work, again=flight.again)
                elif finished:
                    self._looked(op)
            except Exception as failure:  # noqa: BLE001
                _log_broken("writeback broke", op.item, failure)
                self._schedule(op.item, retry.MAX_S)
            self._locks.free(op.dirs, flight.moving)
            kind = "uploads" if isinstance(op, Upload) else "changes"
            self._unpark(kind, lambda: self._count(kind) < getattr(self._limits, kind))
            self._progress.set()
            self._progress = trio.Event()

    async def _run_op(self, op: Op, verify: tuple[int, ...] | None) -> list[Item] | None:
        """What now needs work; None when nothing was done but to look."""
        if verify is not None or isinstance(op, Resolve):
            await self._verify(op, verify or op.dirs)
            return None
        if isinstance(op, Look):
            await self._lister.list_locked(op.rid)
            return None
        log.debug("start %r", op)
        op.before(self._store)
        await self._durability.names()
        await op.call(self._store, self._dfs)
        return op.done(self._store)

    async def _verify(self, op: Op, dirs: tuple[int, ...]) -> None:
        """What an earlier attempt did is not known: look before doing anything."""
        item = op.item
        find = self._store.remote_of if item[0] == "ino" else self._store.remote
        moving = find(item[1])
        target = moving.to_parent if moving is not None else None
        await self._list_around(moving, target, dirs)
        if moving is not None and await self._lister.is_at_orphan(moving):
            assert target is not None
            self._on_work(moved(self._store, moving.rid, target, moving.to_name or ""))
        left = self._store.remote(moving.rid) if moving is not None else None
        if left is not None and left.to_parent is not None:  # not where it was to go
            lost = await self._lister.is_absent(left)
            if lost and op.attempt < BELIEVED_ATTEMPTS:
                raise Unseen("renamed, and shown neither under its old name nor its new one")
            self._store.set_remote(left.rid, to_parent=None, to_name=None)
            self._unsure.pop(item, None)
            if lost:
                self._missing.suspect(left.rid)
                if left.rparent in dirs:  # a file may have its name by now
                    await self._lister.list_locked(left.rparent)
            return
        self._unsure.pop(item, None)
        known = find(item[1])
        above = self._store.remote(known.rparent) if known is not None and known.rparent else None
        if known is not None and above is not None and above.ino is None:
            # In a directory that nobody here has any more, whose listing shows nothing therefore.
            await self._lister.confirm(known)

    async def _list_around(
        self, moving: Remote | None, target: int | None, dirs: tuple[int, ...]
    ) -> None:
        """List the directories of an operation. A directory that was on its way is looked for in both
        places, before and after: what a listing says alone would be taken for all that there is."""
        tree = moving if target is not None and moving is not None and moving.kind == DIR else None
        if tree is not None:
            self._on_work(await self._lister.look_behind(tree))
        # The target first: the object found there is then not missed where it came from.
        for rid in sorted(dirs, key=lambda rid: rid != target):
            await self._lister.list_locked(rid, moving.rid if moving is not None else None)
            if rid == target and tree is not None:
                self._on_work(await self._lister.look_behind(tree))

    def _on_work(self, items: Iterable[Item]) -> None:
        for item in items:
            self._schedule(item, 0.0)

    def _succeeded(self, op: Op, work: Iterable[Item], *, again: bool) -> None:
        self._retry.answered()
        self._unanswered.discard(op.item)
        self.counters.done += 1
        if isinstance(op, Upload):
            self.counters.bytes_sent += op.size
            if not op.changed:
                self._marked.discard(op.ino)
                self.on_clean()
        self._forgive(op.item)
        if self._retry.attempts.pop(op.item, None) is not None and self._have_failed:
            self._have_failed = False
            self._retry_others()
        self._on_work(work)
        self._schedule(op.item, self._delay_s if again and not self._draining else 0.0)
        self._wake_waiting(op.item)

    def _looked(self, op: Op) -> None:
        """The server answers, but nothing is done yet: attempts go on counting."""
        self._retry.answered()
        self._schedule(op.item, 0.0)
        self._wake_waiting(op.item)

    def _settled(self, item: Item) -> None:
        self._retry.attempts.pop(item, None)
        self._unsure.pop(item, None)
        self._forgive(item)
        self._unanswered.discard(item)
        # Not at once: should it be in the way though nothing needs doing, this must not spin.
        self._wake_waiting(item, 0.02)
        self._progress.set()
        self._progress = trio.Event()

    def _forgive(self, item: Item) -> None:
        if item[0] == "rid":
            self.failures.pop(item[1], None)

    def _retry_others(self) -> None:
        """The server is well again: whatever waits for its next attempt need not."""
        for item in [i for i in self._retry.attempts if i in self._due]:
            self._schedule(item, 0.0)

    def _explained(self, ino: int, error: Exception) -> str:
        """What went wrong and, where there is something, what to do."""
        remedy = error.remedy if isinstance(error, DfsError) else ""
        path = shlex.quote(self._store.path(ino))
        return f"{error}; {remedy.format(path=path)}" if remedy else str(error)

    def _fail(self, op: Op, error: Exception) -> None:
        if retry.surely_not_done(error) or not op.may_have_acted:
            op.not_done(self._store)
        if isinstance(error, ChangedDuringUpload):
            self._schedule(op.item, min(self._delay_s, BUSY_S) if self._draining else self._delay_s)
            return
        again = op.item in self._retry.attempts
        delay_s = self._retry.failed(op.item, error)
        if again and isinstance(error, Unreachable) and error.sent:
            self._lister.look_above(op.dirs)
        may_be_done = isinstance(error, DfsError) and (error.sent or error.half_done)
        if may_be_done and not isinstance(op, Upload | Look):
            self._unsure[op.item] = op.dirs
            if isinstance(error, UNANSWERED):
                self._unanswered.add(op.item)
        if isinstance(error, NotFound | Doubtful):
            self._lister.said_absent(op.dirs, error)
        if isinstance(error, Conflict | Unseen):  # to be looked into, and soon settled
            log.info("%s item=%s: %s", type(error).__name__.lower(), op.item, error)
            self._unsure[op.item] = op.dirs
            self._schedule(op.item, delay_s)
            return
        absent = isinstance(error, NotFound | Doubtful)
        if absent and op.item[0] == "rid" and op.attempt >= BELIEVED_ATTEMPTS:
            # To be deleted, and neither there nor where it was to go. Should it be shown again, it will be.
            self._store.set_remote(op.item[1], to_parent=None, to_name=None)
            self._missing.suspect(op.item[1])
            self._unsure.pop(op.item, None)
            self._schedule(op.item, 0.0)
            return
        if isinstance(op, Move) and isinstance(error, MOVE_REFUSED) and not error.half_done:
            # It has not moved, and no earlier attempt can have: those are resolved before another.
            self._store.set_remote(op.rid, to_parent=None, to_name=None)
        if isinstance(op, RemoveDir) and isinstance(error, NotEmpty):
            outcome = Outcome()
            self._merger.resurrect(op.rid, outcome)
            self._on_outcome(outcome)
        self._failed(op.item, error, delay_s)

    def _failed(self, item: Item, error: Exception, delay_s: float) -> None:
        """It is told of, and tried again after ``delay_s``."""
        self.counters.failed += 1
        self._have_failed = True
        self.counters.recent.append(f"{time.strftime('%H:%M:%S')} {error}")
        if item[0] == "ino":
            self._store.note_error(item[1], self._explained(item[1], error))
        elif self._planner.plan(item) is not None:
            self.failures[item[1]] = f"not deleted: {error}"
        else:  # it has turned out to be gone, perhaps since an earlier attempt
            self._forgive(item)
        why = trouble(error)
        how = logging.WARNING if why is None else level(why)
        log.log(how, "writeback failed item=%s retry_s=%.1f: %s", item, delay_s, why or error)
        self._schedule(item, delay_s)
