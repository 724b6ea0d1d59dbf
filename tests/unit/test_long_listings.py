"""Listings that are merged in slices: others change the trees in between."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from cpodfs.cache.schema import DIR, ROOT
from cpodfs.dfs import Entry
from cpodfs.fs.operations import Operations
from cpodfs.sync import merge
from cpodfs.sync.merge import Merger, Outcome
from tests.unit.sync_helpers import World


@pytest.fixture(autouse=True)
def _one_entry_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "SLICE_S", -1.0)
    monkeypatch.setattr(merge, "PAGE", 1)


def file(name: str, size: int = 0) -> Entry:
    return Entry(name, False, size, 0o600, 1_700_000_000, 0, 0)


def merging(
    world: World, pod: int, entries: list[Entry], *, complete: bool = True
) -> Iterator[Outcome]:
    merger = Merger(world.store, world.content, lambda ino: None)
    directory, home = world.store.get(pod), world.store.remote_of(pod)
    assert directory is not None
    assert home is not None
    return merger.listing(directory, home.rid, entries, set(), complete=complete)


def names(world: World, pod: int) -> list[str]:
    return sorted(child.name or "" for child in world.store.children(pod))


def test_what_is_made_here_between_two_slices_is_kept_beside_theirs(tmp_path: Path) -> None:
    world = World(tmp_path)
    pod = world.pod()
    outcomes = merging(world, pod, [file("a", 3), file("b", 3), file("c", 3)])
    next(outcomes)
    assert names(world, pod) == ["a"]
    mine = world.make(pod, "b")
    assert len(list(outcomes)) >= 2
    found = names(world, pod)
    assert found[:2] == ["a", "b"]
    assert found[2].startswith("b (conflict ")
    assert found[3] == "c"
    kept = world.store.get(mine)
    assert kept is not None
    assert kept.name == found[2]


def test_what_is_deleted_or_renamed_here_between_two_slices_stays_so(tmp_path: Path) -> None:
    world = World(tmp_path)
    pod = world.pod()
    inos = [world.make(pod, name) for name in "abc"]
    world.settle()
    outcomes = merging(world, pod, [file(name) for name in "abc"])
    next(outcomes)
    world.remove(inos[1])
    world.move(inos[2], pod, "d")
    assert not any(outcome.missing for outcome in outcomes)
    assert names(world, pod) == ["a", "d"]
    world.calls.clear()
    assert sorted(world.settle()) == ["Move pod/c d", "RemoveFile pod/b"]


def test_what_is_absent_is_known_at_the_end_only(tmp_path: Path) -> None:
    world = World(tmp_path)
    pod = world.pod()
    for name in "abcd":
        world.make(pod, name)
    world.settle()
    world.store.set(pod, listed_s=1.0)
    outcomes = merging(world, pod, [file(name) for name in "ac"])
    assert not next(outcomes).missing
    cut_off = world.store.get(pod)
    assert cut_off is not None
    assert cut_off.listed_s == 1.0, "a merge that is broken off is no listing"
    assert [r.name for outcome in outcomes for r in outcome.missing] == ["b", "d"]
    whole = world.store.get(pod)
    assert whole is not None
    assert whole.listed_s > 1.0


def test_nothing_is_absent_from_a_listing_that_is_not_complete(tmp_path: Path) -> None:
    world = World(tmp_path)
    pod = world.pod()
    world.make(pod, "a")
    world.settle()
    outcomes = list(merging(world, pod, [], complete=False))
    assert not any(outcome.missing for outcome in outcomes)


def test_what_arrived_or_came_during_the_merge_is_not_absent(tmp_path: Path) -> None:
    """A file whose rename got no answer, and one of which the upload has ended since."""
    world = World(tmp_path)
    pod = world.pod()
    ino = world.make(pod, "old")
    world.settle()
    moving, home = world.store.remote_of(ino), world.store.remote_of(pod)
    assert moving is not None
    assert home is not None
    world.move(ino, pod, "new")
    world.store.set_remote(moving.rid, to_parent=home.rid, to_name="new")
    outcomes = merging(world, pod, [file("new"), file("x")])
    next(outcomes)
    world.make(pod, "later")
    world.settle()
    assert not any(outcome.missing for outcome in outcomes)
    assert names(world, pod) == ["later", "new", "x"]
    world.calls.clear()
    assert world.settle() == []


def test_a_listing_that_says_nothing_new_writes_nothing(tmp_path: Path) -> None:
    world = World(tmp_path)
    pod = world.pod()
    entries = [file(name) for name in "abc"]
    list(merging(world, pod, entries))
    changes = world.store._db.total_changes
    list(merging(world, pod, entries))
    assert world.store._db.total_changes - changes == 1, "but when it was listed"


def test_a_name_that_is_listed_twice_is_one_object(tmp_path: Path) -> None:
    world = World(tmp_path)
    pod = world.pod()
    list(merging(world, pod, [file("a", 1), file("a", 1)]))
    assert [(child.name, child.kind) for child in world.store.children(pod)] == [("a", "f")]
    assert world.remote_tree() == {"pod", "pod/a"}


def test_others_get_in_between_while_the_kernel_forgets() -> None:
    forgotten: list[int] = []
    turns = 0
    handles = SimpleNamespace(forget=lambda ino, count: forgotten.append(ino))
    operations: Any = SimpleNamespace(_tree=SimpleNamespace(handles=handles))

    async def other() -> None:
        nonlocal turns
        while len(forgotten) < 1000:
            turns += 1
            await trio.lowlevel.checkpoint()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            await Operations.forget(operations, [(ino, 1) for ino in range(ROOT + 1, ROOT + 1001)])

    trio.run(main)
    assert forgotten == list(range(ROOT + 1, ROOT + 1001))
    assert turns > 10


def test_a_tree_that_is_gone_goes_by_slices_and_what_is_changed_in_between_stays(
    tmp_path: Path,
) -> None:
    world = World(tmp_path)
    pod = world.pod()
    folder = world.make(pod, "d", DIR)
    inner = world.make(folder, "inner", DIR)
    for parent in (folder, inner):
        for name in "ab":
            world.make(parent, name)
    world.settle()
    remote = world.store.remote_of(folder)
    assert remote is not None
    merger = Merger(world.store, world.content, lambda ino: None)
    slices = merger.gone_by_slices(remote)
    next(slices)
    assert names(world, folder) == ["b", "inner"]
    mine = world.make(inner, "mine")
    assert len(list(slices)) >= 4
    assert names(world, folder) == ["inner"]
    assert names(world, inner) == ["mine"]
    world.settle()
    assert world.remote_tree() == world.local_tree()
    assert world.store.remote_of(mine) is not None


@pytest.mark.parametrize("again", [False, True])
def test_what_is_renamed_or_shown_again_while_its_tree_goes_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    monkeypatch.setattr(merge, "PAGE", 10)
    world = World(tmp_path)
    pod = world.pod()
    folder = world.make(pod, "d", DIR)
    inner = world.make(folder, "a", DIR)
    for parent in (folder, inner):
        world.make(parent, "f")
    world.settle()
    remote, home = world.store.remote_of(folder), world.store.remote_of(pod)
    file = world.store.child(folder, "f")
    assert remote is not None
    assert home is not None
    assert file is not None
    moved = world.store.remote_of(file.ino)
    assert moved is not None
    world.store.set_remote(remote.rid, absent_s=1.0)
    remote = remote._replace(absent_s=1.0)
    slices = Merger(world.store, world.content, lambda ino: None).gone_by_slices(remote)
    next(slices)  # what is in d/a
    if again:
        world.store.set_remote(remote.rid, absent_s=None)
    else:
        world.move(file.ino, pod, "f")
        world.store.set_remote(moved.rid, rparent=home.rid)
    list(slices)
    assert names(world, pod) == (["d"] if again else ["f"])
    assert world.store.remote_of(file.ino) is not None
