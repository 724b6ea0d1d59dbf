"""What Swarm is known to have: when it is asked for, and what an answer means. No server."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cpodfs.cache.schema import DIR, FILE, ROOT
from cpodfs.cache.store import Remote, Store
from cpodfs.devnet.dfs_model import chunks_of_upload
from cpodfs.dfs import MAX_BLOCK_SIZE, Client, FileStatus, Session
from cpodfs.sync.swarm import AT_ONCE, OLD_S, PAUSES_S, SILENT, SwarmWatch, chunks_of

SIZE = 10_000


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class World:
    def __init__(self, folder: Path, *, files: int = 1) -> None:
        self.store = Store(folder / "meta.db")
        self.clock = Clock()
        pod = self.add(ROOT, "pod", DIR)
        self.earlier = self.add(pod, "earlier", FILE)
        self.watch = self.made()
        self.files = [self.add(pod, f"f{number}", FILE) for number in range(files)]

    def made(self) -> SwarmWatch:
        client = Client(Session("http://dfs.test", "ann", lambda: ""))
        return SwarmWatch(self.store, client, may_ask=lambda: True, clock=self.clock)

    def add(self, rparent: int, name: str, kind: str) -> int:
        home = self.store.remote(rparent)
        assert home is not None
        assert home.ino is not None
        cached = int(kind == FILE)
        ino = self.store.create(home.ino, name, kind, 0o600, size=SIZE, cached=cached).ino
        now_s = int(time.time())
        rid = self.store.add_remote(
            rparent, name, kind, size=SIZE, mtime_s=now_s, mode=0o600, ino=ino
        )
        self.store.set_remote(rid, in_swarm=int(kind == DIR))
        return rid

    def remote(self, rid: int) -> Remote:
        remote = self.store.remote(rid)
        assert remote is not None
        return remote

    def hear(self, rid: int, status: FileStatus | None) -> bool:
        self.watch.heard(self.remote(rid), status)
        return bool(self.remote(rid).in_swarm)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_swarm_has_a_file_when_it_has_all_chunks(world: World) -> None:
    [file] = world.files
    assert not world.hear(file, FileStatus(10, 10, 9))
    assert world.hear(file, FileStatus(10, 10, 10))


def test_without_a_total_the_chunks_are_counted(world: World) -> None:
    [file] = world.files
    assert not world.hear(file, FileStatus(0, 0, chunks_of(SIZE) - 1))
    assert world.hear(file, FileStatus(0, 0, chunks_of(SIZE)))


@pytest.mark.parametrize("size", [1, 4096, 4097, 1_000_000, MAX_BLOCK_SIZE, 100_000_001])
def test_chunks_are_counted_as_the_server_makes_them(size: int) -> None:
    assert chunks_of(size) == chunks_of_upload(size, min(max(size, 1_000_000), MAX_BLOCK_SIZE))


def test_a_server_that_does_not_know_counts_as_before(world: World) -> None:
    [file] = world.files
    assert world.hear(file, None)


def test_nothing_may_be_the_beginning_of_something(world: World) -> None:
    [file] = world.files
    world.watch.look()
    for _ in range(SILENT - 1):
        world.clock.now_s += PAUSES_S[-1]
        assert file in world.watch.take_due()
        assert not world.hear(file, FileStatus(0, 0, 0))
    world.clock.now_s += PAUSES_S[-1]
    world.watch.take_due()
    assert world.hear(file, FileStatus(0, 0, 0))


def test_what_a_server_has_forgotten_is_there_when_it_is_old(world: World) -> None:
    [file] = world.files
    assert not world.hear(file, FileStatus(10, 10, 5))
    assert not world.hear(file, None), "the pod was opened anew since"
    assert not world.hear(world.earlier, None), "uploaded before this mount"
    for rid in (file, world.earlier):
        world.store.set_remote(rid, mtime_s=int(time.time() - OLD_S - 1))
        assert world.hear(rid, None)


def test_it_is_asked_ever_less_often_and_for_few_at_once(tmp_path: Path) -> None:
    world = World(tmp_path, files=3 * AT_ONCE)
    world.watch.look()
    assert world.watch.take_due() == []
    world.clock.now_s += PAUSES_S[0]
    first = world.watch.take_due()
    assert len(first) == AT_ONCE
    assert not set(first) & set(world.watch.take_due())
    asked, started = 0, world.clock.now_s
    while world.clock.now_s < started + 3600:
        asked += world.files[0] in world.watch.take_due()
        world.clock.now_s += 1.0
    assert asked <= len(PAUSES_S) + 3600 / PAUSES_S[-1]


def test_what_swarm_has_is_asked_for_no_more(world: World) -> None:
    [file] = world.files
    world.watch.look()
    world.hear(file, FileStatus(1, 1, 1))
    world.hear(world.earlier, FileStatus(1, 1, 1))
    world.watch.look()
    assert world.watch.next_s() == float("inf")


def test_only_what_swarm_has_is_evictable(world: World) -> None:
    [file] = world.files
    start = (float("-inf"), 0)
    assert world.store.evictable(start, 10) == []
    assert world.store.evictable_bytes() == 0
    assert world.store.unswarmed_totals() == {"files": 2, "bytes": 2 * SIZE}
    world.hear(file, FileStatus(1, 1, 1))
    assert [inode.name for inode in world.store.evictable(start, 10)] == ["f0"]
    assert world.store.evictable_bytes() == SIZE
