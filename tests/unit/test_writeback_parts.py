"""The small parts of writeback by themselves: waits, retry, locks, durability, the store."""

from __future__ import annotations

import errno
import os
import re
import sqlite3
import threading
import time
from pathlib import Path

import pytest
import trio
import trio.testing
from sync_helpers import World

from cpodfs.cache import content as content_module
from cpodfs.cache.content import RESERVE, Content
from cpodfs.cache.durability import Durability
from cpodfs.cache.schema import CONTENT, DIR, FILE, ROOT, SENT, UNKNOWN, VERSION
from cpodfs.cache.store import GROWN_PAGES, ROWS_A_PAGE, Store
from cpodfs.dfs import Entry
from cpodfs.errors import CacheVersion, ChangedDuringUpload, NotFound, QuotaExceeded, Unreachable
from cpodfs.fs.handles import Handles
from cpodfs.paths import TEMP_PREFIX
from cpodfs.sync import retry
from cpodfs.sync.eviction import Evictor
from cpodfs.sync.locks import DirLocks
from cpodfs.sync.merge import Merger, Outcome
from cpodfs.sync.ops import Mkdir, Rehome, Upload
from cpodfs.sync.retry import Retry
from cpodfs.sync.schedule import Schedule
from cpodfs.sync.waits import Waits
from tests.patience import PATIENCE_S, until

PARTIAL_OR_EQUAL = re.compile(
    r" INDEX (inode_cached|inode_dirty|remote_unswarmed|remote_doubtful|remote_moving)\b"
    r"|\((ino|parent|rowid)=\?\)"
)
"""What a query's plan says when it does not look at all rows."""

A, B, C = ("ino", 1), ("ino", 2), ("rid", 3)


def test_a_ring_is_seen_when_it_closes() -> None:
    waits = Waits()
    assert waits.add(A, B) == []
    assert waits.add(B, C) == []
    assert waits.add(C, A) == [C, A, B]
    waits.remove(C)
    assert waits.chain(A) == [A, B, C]
    assert waits.pop(B) == {A}
    assert A not in waits
    assert B in waits


def test_failures_are_tried_again_at_growing_distances() -> None:
    again = Retry()
    delays = [again.failed(A, OSError()) for _ in range(12)]
    assert delays[0] < delays[3] < delays[6]
    assert delays[-1] <= retry.MAX_S * 1.2
    assert again.failed(B, NotFound("x")) == 0
    assert again.failed(B, NotFound("x")) > 0
    again.failed(C, QuotaExceeded("x"))
    assert again.failed(C, QuotaExceeded("x")) >= retry.MAX_S * 0.8


def test_one_gate_for_all_while_the_server_is_away() -> None:
    again = Retry()
    assert not again.gate_s()
    delays = {again.failed(("ino", n), Unreachable("x")) <= retry.FIRST_S * 1.2 for n in range(10)}
    assert delays == {True}, "ten calls that failed together are one failure of the network"
    assert again.offline
    again.open_gate()
    assert not again.gate_s()
    again.answered()
    assert not again.offline


def test_directories_are_locked_with_all_below_them_while_they_move(tmp_path: Path) -> None:
    world = World(tmp_path)
    pod = world.pod()
    outer = world.make(pod, "outer", DIR)
    inner = world.make(outer, "inner", DIR)
    world.settle()
    rid = {i: world.store.remote_of(i).rid for i in (pod, outer, inner)}  # type: ignore[union-attr]
    locks = DirLocks(world.store)
    freed: list[int] = []
    locks.on_free = freed.append
    locks.take((rid[inner],))
    assert locks.blocker((rid[outer],)) is None
    assert locks.blocker((rid[pod],), moving=rid[outer]) == rid[inner]
    locks.free((rid[inner],))
    assert freed == [rid[inner]]
    locks.take((rid[pod],), moving=rid[outer])
    assert locks.blocker((rid[inner],)) == rid[outer]


def test_who_waits_for_a_directory_goes_before_who_can_be_called_again(tmp_path: Path) -> None:
    world = World(tmp_path)
    pod = world.pod()
    remote = world.store.remote_of(pod)
    assert remote is not None
    rid = remote.rid
    locks = DirLocks(world.store)
    order: list[str] = []

    async def waiter() -> None:
        await locks.wait_free((rid,))
        order.append("waiter")

    async def main() -> None:
        locks.take((rid,))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(waiter)
            await trio.testing.wait_all_tasks_blocked()
            locks.free((rid,))
            assert locks.blocker((rid,)) == rid, "claimed by the one who waits"
        assert locks.blocker((rid,)) is None

    trio.run(main)
    assert order == ["waiter"]


def test_many_closes_share_one_sync_of_the_journal(tmp_path: Path) -> None:
    store, content = Store(tmp_path / "meta.db"), Content(tmp_path / "content")
    durability = Durability(store, content)
    syncs = []
    gate = threading.Event()
    store_sync = store.sync

    def counted() -> None:
        syncs.append(1)
        gate.wait(PATIENCE_S)
        store_sync()

    store.sync = counted  # type: ignore[method-assign]

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(durability.names)
            await trio.sleep(0)
            gate.set()

    trio.run(main)
    assert 1 <= len(syncs) <= 2


def test_a_cache_of_another_version_is_refused(tmp_path: Path) -> None:
    Store(tmp_path / "meta.db").close()
    db = sqlite3.connect(tmp_path / "meta.db")
    db.execute(f"PRAGMA user_version = {VERSION + 1}")
    db.close()
    with pytest.raises(CacheVersion, match=str(VERSION + 1)):
        Store(tmp_path / "meta.db")


def test_a_cache_of_version_1_is_brought_to_this_one(tmp_path: Path) -> None:
    made, old = Store(tmp_path / "new.db"), tmp_path / "meta.db"
    made.close()
    Store(old).close()
    db = sqlite3.connect(old)  # version 1 was this one without what its migration adds
    for index in ("remote_doubtful", "remote_unswarmed"):
        db.execute(f"DROP INDEX {index}")
    for table, column in (
        *(("inode", "crc"), ("inode", "epoch")),
        *(("remote", "absent_s"), ("remote", "absences"), ("remote", "in_swarm")),
    ):
        db.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
    for table in ("sent", "state"):
        db.execute(f"DROP TABLE {table}")
    db.execute("INSERT INTO inode VALUES (7,1,'pod','d',448,0,1,2,3,NULL,0,4,5,6,NULL)")
    db.execute("INSERT INTO remote VALUES (7,1,'pod','d',0,NULL,0,448,0,7,NULL,NULL)")
    db.execute("PRAGMA user_version = 1")
    db.commit()
    db.close()
    store = Store(old)
    pod, remote = store.child(ROOT, "pod"), store.remote_of(7)
    assert pod is not None
    assert remote is not None
    assert (pod.ino, pod.dirty, pod.crc, pod.epoch) == (7, 4, None, 0)
    assert (remote.absent_s, remote.absences, remote.in_swarm) == (None, 0, 1)
    store.close()
    assert columns(old) == columns(tmp_path / "new.db")


def columns(path: Path) -> list[tuple[object, ...]]:
    db = sqlite3.connect(path)
    tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    found = [row for name in sorted(tables) for row in db.execute(f"PRAGMA table_info({name})")]
    version = db.execute("PRAGMA user_version").fetchall()
    db.close()
    return [*version, *found]


def test_a_failed_transaction_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "meta.db")

    def broken() -> None:
        with store.transaction():
            store.create(ROOT, "pod", DIR, 0o700)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken()
    assert store.child(ROOT, "pod") is None
    with store.transaction():
        store.create(ROOT, "pod", DIR, 0o700)
    assert store.child(ROOT, "pod") is not None


def test_others_cannot_clear_the_journal_away(tmp_path: Path) -> None:
    """Whoever closes a database last clears its journal away. Closing any descriptor of it drops the
    locks that tell others that somebody still has it open: sync() and checkpoint() must not."""
    store = Store(tmp_path / "meta.db")
    store.create(ROOT, "pod", DIR, 0o700)
    store.sync()
    assert store.checkpoint()
    journal = (tmp_path / "meta.db-wal").stat()
    other = os.fork()
    if other == 0:
        others = sqlite3.connect(tmp_path / "meta.db", timeout=0)
        others.execute("SELECT * FROM inode").fetchall()
        others.close()
        os._exit(0)
    assert os.waitpid(other, 0)[1] == 0
    assert (tmp_path / "meta.db-wal").stat().st_ino == journal.st_ino
    store.create(ROOT, "later", DIR, 0o700)
    assert (tmp_path / "meta.db-wal").stat().st_size >= journal.st_size > 0


def fill(store: Store, first: int) -> None:
    """So much that the journal should be moved."""
    with store.transaction():
        for number in range(first, first + ROWS_A_PAGE * GROWN_PAGES):
            store.create(ROOT, f"pod{number}", DIR, 0o700)


def journal_pages(store: Store) -> int:
    """How long it is after one more commit."""
    store.set(ROOT, used_s=time.time())
    assert store._checkpointer is not None
    _, pages, _ = store._checkpointer.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    return int(pages)


def test_the_journal_is_moved_while_others_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by a commit, which would keep the loop from all else until the disk has it; and it begins
    anew, whoever commits meanwhile: whoever writes much waits for that."""
    store, content = Store(tmp_path / "meta.db"), Content(tmp_path / "content")
    durability = Durability(store, content)
    database, checkpoint = tmp_path / "meta.db", store.checkpoint
    before = database.stat().st_size
    moved, gate, passes = threading.Event(), threading.Event(), []

    def slow() -> bool:
        assert passes or database.stat().st_size == before, "no commit has moved it"
        done = checkpoint()
        moved.set()
        gate.wait(PATIENCE_S)
        passes.append(done)
        return done

    monkeypatch.setattr(store, "checkpoint", slow)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(durability.run)
            fill(store, 0)
            await trio.to_thread.run_sync(moved.wait, PATIENCE_S)
            store.create(ROOT, "meanwhile", DIR, 0o700)
            await durability.room()  # not yet
            gate.set()
            ended = lambda: len(passes) > 1 and durability._room.is_set()  # noqa: E731
            await trio.to_thread.run_sync(until, ended)
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert journal_pages(store) < 20
    assert database.stat().st_size > before
    store.close()


def write_on(store: Store, durability: Durability) -> None:
    """Many commits, large and small, while the journal is moved."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(durability.run)
            for round_ in range(10):
                fill(store, round_ * ROWS_A_PAGE * GROWN_PAGES)
                for _ in range(50):
                    store.set(ROOT, used_s=time.time())
                    await trio.sleep(0)
                await durability.room()
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_the_journal_stays_short_whoever_commits_all_the_time(tmp_path: Path) -> None:
    store, content = Store(tmp_path / "meta.db"), Content(tmp_path / "content")
    write_on(store, Durability(store, content))
    assert (tmp_path / "meta.db-wal").stat().st_size < RESERVE
    store.close()


def test_whoever_reads_the_database_holds_nobody_up(tmp_path: Path) -> None:
    """The journal cannot begin anew while somebody reads an older version of what is in it."""
    store, content = Store(tmp_path / "meta.db"), Content(tmp_path / "content")
    durability = Durability(store, content)
    other = sqlite3.connect(f"file:{tmp_path}/meta.db?mode=ro", uri=True, isolation_level=None)
    other.execute("BEGIN")
    other.execute("SELECT count(*) FROM inode").fetchone()
    checkpoint, passes = store.checkpoint, []

    def counted() -> bool:
        passes.append(checkpoint())
        return passes[-1]

    store.checkpoint = counted  # type: ignore[method-assign]

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(durability.run)
            fill(store, 0)
            while not passes:
                await trio.sleep(0)
            await durability.room()
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert passes == [False]
    other.close()
    assert checkpoint()
    store.close()


def test_a_full_disk_has_the_journal_moved(tmp_path: Path) -> None:
    """One that begins anew needs no more room, so that small changes can go on."""
    store = Store(tmp_path / "meta.db")
    grown: list[int] = []
    store.on_grown = lambda: grown.append(1)
    store._db.execute("PRAGMA max_page_count = 1")  # as many as there are
    with pytest.raises(sqlite3.OperationalError, match="full"):
        fill(store, 0)
    assert grown == [1]
    store.close()


def test_a_cache_works_where_no_memory_can_be_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full disk, and in some file systems. There a commit moves the journal."""
    Store(tmp_path / "meta.db").close()
    connect = Store._connect

    def refused(store: Store, locking: str) -> sqlite3.Connection:
        if locking == "NORMAL":
            raise sqlite3.OperationalError("disk I/O error")
        return connect(store, locking)

    monkeypatch.setattr(Store, "_connect", refused)
    store, content = Store(tmp_path / "meta.db"), Content(tmp_path / "content")
    write_on(store, Durability(store, content))
    assert (tmp_path / "meta.db-wal").stat().st_size < RESERVE
    assert not (tmp_path / "meta.db-shm").exists()
    store.close()


@pytest.mark.parametrize("full", [False, True])
def test_the_journal_is_on_the_disk_before_bytes_are_evicted(
    full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a loss of power could bring an upload back that was done, without its bytes."""
    world = World(tmp_path)
    store, content = world.store, Content(tmp_path / "content")
    pod = world.pod()
    store.set(pod, cached=0)
    ino = store.create(pod, "f", FILE, 0o600, size=1, cached=1).ino
    home = store.remote_of(pod)
    assert home is not None
    store.add_remote(home.rid, "f", FILE, size=1, mtime_s=1, mode=0o600, ino=ino)
    os.close(content.create(ino))
    done: list[str] = []
    sync, remove = store.sync, content.remove
    monkeypatch.setattr(store, "sync", lambda: (done.append("sync"), sync()))
    monkeypatch.setattr(content, "remove", lambda i: (done.append("remove"), remove(i)))
    names = Durability(store, content).names
    evictor = Evictor(store, content, size=0, is_used=lambda _ino: False, names=names)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(evictor.run)
            evictor.poke()
            while "remove" not in done:
                await trio.sleep(0)
            nursery.cancel_scope.cancel()

    evictor.make_room() if full else trio.run(main)
    assert done == ["sync", "remove"]


def test_what_is_asked_often_does_not_walk_the_tree(tmp_path: Path) -> None:
    """``df`` and ``cpodfs status`` ask on the event loop; a tree may have a million objects."""
    store = Store(tmp_path / "meta.db")
    asked: list[str] = []
    store._db.set_trace_callback(asked.append)
    for ask in (
        *(store.totals, store.cached_bytes, store.evictable_bytes, store.is_settled),
        *(store.unswarmed, store.unswarmed_totals, store.doubtful, store.doubtful_count),
        *(store.ghost_count, store.pending_inodes, store.orphans, store.moving, store.unlinked),
    ):
        ask()
    store.failed(1)
    store.has_doubtful(ROOT)
    store._db.set_trace_callback(None)
    assert len(asked) > 15
    for query in asked:
        for *_, step in store._db.execute(f"EXPLAIN QUERY PLAN {query}"):
            assert PARTIAL_OR_EQUAL.search(step), f"{step}: {query}"


def test_the_last_of_the_disk_is_kept_for_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = Content(tmp_path / "content")
    content.check_room(1 << 20)
    left = [content_module.RESERVE - 1]
    monkeypatch.setattr(content, "_available", lambda: left[0])
    content.make_room = lambda: left.__setitem__(0, 3 * content_module.RESERVE)
    content._until_look = 0
    content.check_room(1)
    left[0], content.make_room, content._until_look = 0, lambda: None, 0
    with pytest.raises(OSError) as caught:
        content.check_room(1)
    assert caught.value.errno == errno.ENOSPC


def test_the_schedule_follows_what_was_said_last() -> None:
    schedule = Schedule()
    assert schedule.put(A, 50)
    assert not schedule.put(A, 60), "later costs no entry"
    assert schedule.put(B, 0)
    assert schedule.pop() == B
    assert schedule.pop() is None
    assert 55 < schedule.next_s() <= 60
    assert schedule.put(A, 0)
    assert schedule.pop() == A
    assert schedule.next_s() == float("inf")
    schedule.put(C, 0)
    schedule.drop(C)
    assert schedule.pop() is None


def test_offline_time_does_not_count_against_an_object() -> None:
    again = Retry()
    for _ in range(2000):
        again.open_gate()
        again.failed(A, Unreachable("x"))
    again.open_gate()
    assert again.failed(A, NotFound("x")) == 0
    for _ in range(2000):
        assert again.failed(A, OSError()) <= retry.MAX_S * 1.2


def test_what_was_deleted_keeps_its_bytes_until_the_journal_is_on_the_disk(tmp_path: Path) -> None:
    store, content = Store(tmp_path / "meta.db"), Content(tmp_path / "content")
    handles = Handles(store, content)
    pod = store.create(ROOT, "pod", DIR, 0o700)
    ino = store.create(pod.ino, "f", FILE, 0o600, cached=1).ino
    os.close(content.create(ino))
    store.detach(ino)
    handles.discard(ino)
    assert content.path(ino)
    assert os.path.exists(content.path(ino)), "a loss of power could bring the name back"
    assert store.unlinked() == [ino], "and the next driver knows what to free"
    store.sync()
    handles.sweep(set(handles.doomed))
    assert not os.path.exists(content.path(ino))
    assert store.unlinked() == []


def test_a_lost_upload_to_a_new_name_is_taken_for_ours(tmp_path: Path) -> None:
    """mv O N; edit N; the upload arrives, its answer does not; then the directory is listed."""
    world = World(tmp_path)
    pod = world.pod()
    ino = world.make(pod, "O")
    world.settle()
    world.move(ino, pod, "N")
    world.store.mark(ino, CONTENT | SENT)
    home = world.store.remote_of(pod)
    directory = world.store.get(pod)
    assert home is not None
    assert directory is not None
    entries = [Entry(name, False, size, 0o600, 5, 5, 5) for name, size in (("O", 0), ("N", 3))]
    merger = Merger(world.store, world.content, lambda ino: None)
    outcomes = list(merger.listing(directory, home.rid, entries, set()))
    assert not any(outcome.changes for outcome in outcomes)
    assert [c.name for c in world.store.children(pod)] == ["N"]
    world.calls.clear()
    assert world.settle() == ["Upload N", "RemoveFile pod/O"]


def test_a_write_to_what_was_deleted_with_its_directory_is_kept_above(tmp_path: Path) -> None:
    world = World(tmp_path)
    pod = world.pod()
    folder = world.make(pod, "d", DIR)
    file = world.make(folder, "f")
    world.settle()
    merger = Merger(world.store, world.content, lambda ino: None)
    remote = world.store.remote_of(folder)
    assert remote is not None
    merger.gone(remote, Outcome())
    assert world.local_tree() == {"pod"}
    merger.revive(file, Outcome())
    world.store.mark(file, CONTENT)
    (kept,) = world.store.children(pod)
    assert (kept.name or "").startswith("f (conflict ")
    world.settle()
    assert world.remote_tree() == world.local_tree()


def test_a_directory_on_its_way_is_not_forgotten_where_it_came_from(tmp_path: Path) -> None:
    """Moved object by object, it is in both places when that is broken off."""
    world = World(tmp_path)
    pod = world.pod()
    folder = world.make(pod, "d", DIR)
    world.settle()
    remote, home = world.store.remote_of(folder), world.store.remote_of(pod)
    directory = world.store.get(pod)
    assert remote is not None
    assert home is not None
    assert directory is not None
    aside = f"{TEMP_PREFIX}{remote.rid}"
    world.store.set_remote(remote.rid, to_parent=home.rid, to_name=aside)
    merger = Merger(world.store, world.content, lambda ino: None)
    old, new = (Entry(name, True, 0, 0o700, 5, 5, 5) for name in ("d", aside))
    list(merger.listing(directory, home.rid, [old], set()))
    list(merger.listing(directory, home.rid, [new, old], set()))
    assert world.store.remote_path(remote.rid) == ["pod", "d"]  # nobody has looked at both places
    list(merger.listing(directory, home.rid, [new, old], set(), resolving=remote.rid))
    assert [c.name for c in world.store.children(pod)] == ["d"]
    moved = world.store.remote(remote.rid)
    assert moved is not None
    assert moved.name == aside


def test_an_upload_with_an_unknown_outcome_does_not_cost_the_mode(tmp_path: Path) -> None:
    """The server gives what is uploaded the mode 0600; only the answer makes us give it back."""
    world = World(tmp_path)
    pod = world.pod("pod")
    file = world.make(pod, "f", mode=0o755)
    world.settle()
    directory, home = world.store.get(pod), world.store.remote_of(pod)
    before = world.store.remote_of(file)
    assert directory is not None
    assert home is not None
    assert before is not None
    assert before.mode == 0o755
    world.store.mark(file, CONTENT | SENT)
    world.store.set_remote(before.rid, size=UNKNOWN, mtime_s=None)
    merger = Merger(world.store, world.content, lambda ino: None)
    list(merger.listing(directory, home.rid, [Entry("f", False, 9, 0o600, 5, 5, 5)], set()))
    world.settle()
    inode, after = world.store.get(file), world.store.remote_of(file)
    assert inode is not None
    assert after is not None
    assert inode.mode == after.mode == 0o755


@pytest.mark.parametrize("kind", [FILE, DIR])
def test_what_left_its_place_before_it_was_sent_there_is_not_sent(
    tmp_path: Path, kind: str
) -> None:
    """The journal would say that it was sent to its new name; what a kill leaves at the old one would
    then be somebody else's."""
    world = World(tmp_path)
    pod = world.pod()
    ino = world.make(pod, "old", kind)
    op = world.planner.plan(("ino", ino))
    assert isinstance(op, Upload | Mkdir)
    world.move(ino, pod, "new")
    with pytest.raises(ChangedDuringUpload, match="renamed"):
        op.about_to_send(world.store) if isinstance(op, Upload) else op.before(world.store)
    inode = world.store.get(ino)
    assert inode is not None
    assert not inode.dirty & SENT


def test_a_directory_that_left_its_place_before_it_was_made_anew_is_not_made(
    tmp_path: Path,
) -> None:
    world = World(tmp_path)
    pod = world.pod()
    outer = world.make(pod, "d", DIR)
    world.make(outer, "inner", DIR)
    world.settle()
    world.move(outer, pod, "e")
    op = world.planner.plan(("ino", outer))
    assert isinstance(op, Rehome)
    world.move(outer, pod, "d")
    with pytest.raises(ChangedDuringUpload, match="renamed"):
        op.before(world.store)


def test_an_upload_whose_end_was_not_journaled_is_not_somebody_elses(tmp_path: Path) -> None:
    """The journal is on the disk before an upload begins; what it says of the last byte, which the
    server may have acted on, may be lost with the power."""
    world = World(tmp_path)
    pod = world.pod()
    file = world.make(pod, "f")
    world.settle()
    world.store.note_sent(file, 3, 1234, 0.0)  # an earlier one, whose answer never came
    world.store.mark(file, CONTENT | SENT)
    op = world.planner.plan(("ino", file))
    assert isinstance(op, Upload)
    op.size = 5
    op.about_to_send(world.store)
    later_s = round(time.time()) + 100
    assert not world.store.is_foreign(file, 5, later_s)
    assert world.store.is_foreign(file, 7, later_s)
    op.not_done(world.store)
    assert world.store.is_foreign(file, 5, later_s)
