"""Writeback as a plan: which calls make the server's tree equal to ours, and in which order."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from sync_helpers import World

from cpodfs.cache.durability import Durability
from cpodfs.cache.schema import CONTENT, DIR, FILE, MODE, SENT
from cpodfs.sync.ops import Chmod, Look, Rehome
from cpodfs.sync.planner import Blocked, Planner


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_parents_go_before_children(world: World) -> None:
    pod = world.pod()
    outer = world.make(pod, "outer", DIR)
    inner = world.make(outer, "inner", DIR)
    world.make(inner, "file")
    assert world.settle() == ["Mkdir outer", "Mkdir inner", "Upload file"]


def test_create_and_delete_is_nothing(world: World) -> None:
    pod = world.pod()
    folder = world.make(pod, "d", DIR)
    world.remove(world.make(folder, "f"))
    world.remove(folder)
    assert world.settle() == []


def test_save_by_rename_is_one_upload(world: World) -> None:
    pod = world.pod()
    old = world.make(pod, "file")
    world.settle()
    world.calls.clear()
    new = world.make(pod, "file.tmp")
    world.remove(old)
    world.move(new, pod, "file")
    assert world.settle() == ["Upload file"]


def test_a_clean_file_renamed_over_another_is_sent_again(world: World) -> None:
    """The server refuses such a rename, and deleting first would lose the name for a while."""
    pod = world.pod()
    one, other = world.make(pod, "one"), world.make(pod, "other")
    world.settle()
    world.calls.clear()
    world.remove(other)
    world.move(one, pod, "other")
    assert world.settle() == ["Upload other", "RemoveFile pod/one"]


def test_an_uncached_file_renamed_over_another_waits_for_the_deletion(world: World) -> None:
    pod = world.pod()
    one, other = world.make(pod, "one"), world.make(pod, "other")
    world.settle()
    world.store.set(one, cached=0)
    world.calls.clear()
    world.remove(other)
    world.move(one, pod, "other")
    assert world.settle() == ["RemoveFile pod/other", "Move pod/one other"]


def test_directories_are_emptied_before_they_go(world: World) -> None:
    pod = world.pod()
    folder = world.make(pod, "d", DIR)
    file = world.make(folder, "f")
    kept = world.make(folder, "kept")
    world.settle()
    world.calls.clear()
    world.remove(file)
    world.move(kept, pod, "kept")
    world.remove(folder)
    calls = world.settle()
    assert calls[-1] == "RemoveDir pod/d"
    assert set(calls[:-1]) == {"RemoveFile pod/d/f", "Move pod/d/kept kept"}


def test_a_tree_moves_child_by_child(world: World) -> None:
    pod = world.pod()
    folder = world.make(pod, "d", DIR)
    leaf = world.make(folder, "leaf", DIR)
    world.make(folder, "f")
    world.make(leaf, "g")
    world.settle()
    world.calls.clear()
    world.move(folder, pod, "e")
    assert world.settle() == [
        "Rehome pod/d e",
        "Move pod/d/leaf leaf",
        "Move pod/d/f f",
        "RemoveDir pod/d",
    ]


def test_an_unlisted_directory_is_looked_at_before_it_moves(world: World) -> None:
    pod = world.pod()
    folder = world.make(pod, "d", DIR)
    world.settle()
    world.store.set(folder, listed_s=0)
    world.calls.clear()
    world.move(folder, pod, "e")
    assert world.settle() == ["Look pod/d", "Move pod/d e"]


def test_upload_resets_the_mode(world: World) -> None:
    pod = world.pod()
    file = world.make(pod, "f", mode=0o700)
    world.settle()
    assert world.calls == ["Upload f", "Chmod pod/f"]
    world.calls.clear()
    world.store.set(file, mode=0o644)
    world.store.mark(file, MODE)
    assert world.settle() == ["Chmod pod/f"]
    world.calls.clear()
    world.store.mark(file, CONTENT)
    assert world.settle() == ["Upload f", "Chmod pod/f"]


@pytest.mark.parametrize("kind", [FILE, DIR])
def test_a_mode_taken_back_before_the_first_was_answered_is_sent(world: World, kind: str) -> None:
    pod = world.pod()
    ino = world.make(pod, "x", kind)
    world.store.set(ino, mode=0o755)
    world.store.mark(ino, MODE)
    world.settle()
    world.calls.clear()
    world.store.set(ino, mode=0o600)
    world.store.mark(ino, MODE)
    op = world.planner.plan(("ino", ino))
    assert isinstance(op, Chmod)
    op.before(world.store)  # and the driver dies
    world.store.set(ino, mode=0o755)
    world.store.mark(ino, MODE)
    assert world.settle() == ["Chmod pod/x"]


def test_names_between_which_something_may_have_been_renamed_wait(world: World) -> None:
    pod = world.pod()
    file = world.make(pod, "f")
    world.settle()
    remote = world.store.remote_of(file)
    assert remote is not None
    world.store.set_remote(remote.rid, to_parent=remote.rparent, to_name="g")  # no answer
    other = world.make(pod, "g")
    assert world.planner.plan(("ino", other)) == Blocked(("ino", file))
    world.remove(file)
    third = world.make(pod, "f")
    for ino in (other, third):
        assert world.planner.plan(("ino", ino)) == Blocked(("rid", remote.rid))


def test_bits_of_a_umask_are_not_worth_a_call(world: World) -> None:
    pod = world.pod()
    world.make(pod, "f", mode=0o644)
    assert world.settle() == ["Upload f"]


def test_what_may_have_arrived_under_an_old_name_is_deleted(world: World) -> None:
    pod = world.pod()
    moved, removed = world.make(pod, "moved"), world.make(pod, "removed")
    for ino in (moved, removed):
        world.store.set(ino, dirty=7 | SENT)
    world.move(moved, pod, "elsewhere")
    world.remove(removed)
    world.settle()
    assert set(world.calls) >= {
        "Upload elsewhere",
        "RemoveFile pod/moved",
        "RemoveFile pod/removed",
    }
    assert world.remote_tree() == {"pod", "pod/elsewhere"}


@pytest.mark.parametrize("seed", range(60))
def test_any_shuffle_of_a_tree_is_reached(world: World, seed: int) -> None:
    """Random moves, removals and creations, rings included: the two trees become equal."""
    dice = random.Random(seed)
    pod = world.pod()
    dirs, files = [pod], []
    for number in range(dice.randrange(4, 14)):
        if dice.random() < 0.5:
            dirs.append(world.make(dice.choice(dirs), f"n{number}", DIR))
        else:
            files.append(world.make(dice.choice(dirs), f"n{number}"))
    world.settle()
    for _ in range(dice.randrange(2, 25)):
        _shuffle(world, dice, dirs, files)
        if dice.random() < 0.1:
            world.settle()
    world.settle()
    assert world.remote_tree() == world.local_tree()
    assert not world.store.pending_inodes()
    assert not world.store.orphans()


def _shuffle(world: World, dice: random.Random, dirs: list[int], files: list[int]) -> None:
    movable = dirs[1:] + files
    if not movable:
        return
    ino, target = dice.choice(movable), dice.choice(dirs)
    above = {a.ino for a in world.store.ancestors(target)}
    name = f"n{dice.randrange(14)}"
    occupant = world.store.child(target, name)
    if dice.random() < 0.15:
        files.append(world.make(target, name)) if occupant is None else None
        return
    if ino in above or (occupant and occupant.ino == ino):
        return
    if occupant is not None:
        if occupant.is_dir and world.store.has_children(occupant.ino):
            return
        world.remove(occupant.ino)
        (dirs if occupant.is_dir else files).remove(occupant.ino)
    world.move(ino, target, name)


def test_a_name_is_free_when_all_that_was_to_be_deleted_there_is_not_shown(world: World) -> None:
    """Else the new file and the old directory would wait for each other, without an error."""
    pod = world.pod()
    folder = world.make(pod, "d", DIR)
    inner = world.make(folder, "inner", DIR)
    world.settle()
    world.calls.clear()
    gone = [remote.rid for ino in (folder, inner) if (remote := world.store.remote_of(ino))]
    world.remove(inner)
    world.remove(folder)
    world.make(pod, "d")
    for rid in gone:
        world.store.set_remote(rid, absent_s=1.0)
    assert world.settle() == ["Upload d"]
    assert world.remote_tree() == world.local_tree()


def test_what_was_sent_for_a_move_that_was_undone_is_settled(world: World) -> None:
    folder = world.make(world.pod(), "d", DIR)
    world.settle()
    world.store.set(folder, dirty=SENT)
    world.settle()
    assert world.store.is_settled()


def test_the_directory_above_what_was_removed_is_looked_at_first(world: World) -> None:
    """Where a file has the removed one's name by now, the server would break the connection."""
    pod = world.pod()
    folder = world.make(pod, "d", DIR)
    inner = world.make(folder, "inner")
    world.settle()
    for ino in (inner, folder):
        world.remove(ino)
    (rid,) = [rid for rid in world.store.orphans() if world.store.remote_path(rid)[-1] == "inner"]
    planner = Planner(world.store, Durability(world.store, world.content), fresh_s=60.0)
    plan, home = planner.plan(("rid", rid)), world.store.remote_of(pod)
    assert home is not None
    assert isinstance(plan, Look)
    assert plan.rid == home.rid


def test_a_directory_that_cannot_be_known_for_now_moves_object_by_object(world: World) -> None:
    """A file and a directory of one name are in it: the one cannot leave before it has moved, and the
    other is not shown before that."""
    pod = world.pod()
    folder = world.make(pod, "d", DIR)
    world.make(folder, "f")
    world.settle()
    remote = world.store.remote_of(folder)
    assert remote is not None
    world.store.set(folder, listed_s=0)
    world.move(folder, pod, "e")
    assert isinstance(world.planner.plan(("ino", folder)), Look)
    world.store.looked[remote.rid] = 1.0
    assert isinstance(world.planner.plan(("ino", folder)), Rehome)
