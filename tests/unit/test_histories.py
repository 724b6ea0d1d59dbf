"""Some of the random histories of `tests.bench.histories`, the same ones every time."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import trio
import trio.testing

from cpodfs.cache.schema import ROOT
from cpodfs.devnet.dfs_tree import Tree as ServerTree
from cpodfs.errors import CpodfsError, Doubtful
from cpodfs.paths import TEMP_PREFIX
from cpodfs.sync.doubt import DISTRUST_S
from cpodfs.sync.drain import drain
from cpodfs.sync.left import left
from tests.bench.histories import STALL_S, History, play
from tests.simulated import Simulated, virtual_time

AT_ONCE = 20
FOUND = (
    72202,
    90053,
    90349,
    200642,
    203601,
    205024,
    205867,
    208675,
    209813,
    302927,
    400241,
    409960,
    601321,
    608311,
    609105,
    701755,
    1103920,
    1202686,
    1209616,
    1300172,
    1407773,
    1519881,
    1611683,
    1703279,
)
"""Others in which something went wrong once."""


@pytest.mark.parametrize("first", range(0, 200, AT_ONCE))
def test_nothing_is_stranded_in_any_history(first: int, tmp_path: Path) -> None:
    for seed in range(first, first + AT_ONCE):
        trouble = play(seed, tmp_path)
        assert trouble is None, trouble


@pytest.mark.parametrize("seed", FOUND)
def test_nothing_is_stranded_where_it_once_was(seed: int, tmp_path: Path) -> None:
    trouble = play(seed, tmp_path)
    assert trouble is None, trouble


def live(kind: type[History], folder: Path, **how: bool | str) -> None:
    """Play a history of one's own making. ``how``: its attributes."""
    history = kind(Simulated(folder / "server"), folder, 1)
    for name, value in how.items():
        setattr(history, name, value)
    with virtual_time() as clock:
        trio.run(history.run, clock=clock)


class BrokenOff(History):
    """A directory is moved object by object by a driver that dies half-way. ``listed_first``: the next
    one is asked for a listing before it could find that out."""

    listed_first = False

    async def run(self) -> None:
        async with self._driver():
            store, tree = self.store, self.tree
            pod = await tree.mkdir(ROOT, "p", 0o755)
            folder = await tree.mkdir(pod.ino, "d", 0o755)
            both = await tree.mkdir(folder.ino, "both", 0o755)
            behind = await tree.mkdir(folder.ino, "behind", 0o755)
            for parent in (folder.ino, both.ino, behind.ino):
                for name in ("f", "g"):
                    _, handle = await tree.create(parent, name, 0o644)
                    await tree.files.write(handle, 0, self._bytes())
                    tree.handles.release(handle)
            assert await drain(self.engine, STALL_S)
            before = self._paths()
            home, there = store.remote_of(pod.ino), store.remote_of(folder.ino)
            assert home is not None
            assert there is not None
            aside = f"{TEMP_PREFIX}{there.rid}"
            store.set_remote(there.rid, to_parent=home.rid, to_name=aside)
            for name in (aside, f"{aside}/both"):
                await self.other.mkdir("p", f"/{name}")
            for name in ("f", "both/f"):
                await self.other.rename_file("p", f"/d/{name}", f"/{aside}/{name}")
        self.fate.away, self.fate.latency_s = self.listed_first, 0.0
        async with self._driver():
            if self.listed_first:
                await trio.sleep(0.1)
                self.fate.away = False
                await self.parts.lister.refresh(pod.ino)
            await self._finish()
            assert self._paths() == before


@pytest.mark.parametrize("listed_first", [False, True])
def test_a_move_that_was_broken_off_goes_on(tmp_path: Path, listed_first: bool) -> None:
    """The directory is at both places, and must not be shown twice."""
    live(BrokenOff, tmp_path, listed_first=listed_first)


class Stale(History):
    """A file waits for its directory, which was on its way and is to be deleted by now."""

    async def run(self) -> None:
        async with self._driver():
            pod = await self.tree.mkdir(ROOT, "p", 0o755)
            folder = await self.tree.mkdir(pod.ino, "d", 0o755)
            inode, handle = await self.tree.create(folder.ino, "f", 0o644)
            self.tree.handles.release(handle)
            assert await drain(self.engine, STALL_S)
            above, file = self.store.remote_of(folder.ino), self.store.remote_of(inode.ino)
            assert above is not None
            assert file is not None
            await self.tree.unlink(folder.ino, "f")
            await self.tree.rmdir(pod.ino, "d")
            self.engine._due.drop(("rid", file.rid))
            self.engine._waits.add(("rid", file.rid), ("rid", above.rid))
            assert await drain(self.engine, STALL_S)


def test_who_no_longer_has_to_wait_is_no_part_of_a_ring(tmp_path: Path) -> None:
    live(Stale, tmp_path)


class Lost(History):
    """A directory that was on its way is to be deleted, and is nowhere at the server, as little as the one
    that it was to go to."""

    async def run(self) -> None:
        async with self._driver():
            pod = await self.tree.mkdir(ROOT, "p", 0o755)
            folders = [await self.tree.mkdir(pod.ino, name, 0o755) for name in ("c", "d")]
            assert await drain(self.engine, STALL_S)
            target, moving = (self.store.remote_of(folder.ino) for folder in folders)
            assert target is not None
            assert moving is not None
            for name in ("c", "d"):
                await self.other.raw_rmdir("p", f"/{name}")
            self.store.set_remote(moving.rid, to_parent=target.rid, to_name="a")
            for name in ("c", "d"):
                await self.tree.rmdir(pod.ino, name)
            await self.tree.rmdir(ROOT, "p")
            assert await drain(self.engine, STALL_S)


def test_a_lost_move_of_what_is_to_be_deleted_is_given_up(tmp_path: Path) -> None:
    live(Lost, tmp_path)


class Evicted(History):
    """A file that is not cached here moves out of a directory that was removed; another session has
    deleted it."""

    async def run(self) -> None:
        async with self._driver():
            pod = await self.tree.mkdir(ROOT, "p", 0o755)
            folder = await self.tree.mkdir(pod.ino, "d", 0o755)
            inode, handle = await self.tree.create(folder.ino, "f", 0o644)
            await self.tree.files.write(handle, 0, b"bytes")
            self.tree.handles.release(handle)
            assert await drain(self.engine, STALL_S)
            self.store.set(inode.ino, cached=0)
            await self.other.delete_file("p", "/d/f")
            await self.tree.rename(folder.ino, "f", pod.ino, "f", 0)
            await self.tree.rmdir(pod.ino, "d")
            assert await drain(self.engine, STALL_S)
            assert list(self._paths()) == ["p"]


def test_a_file_that_was_deleted_elsewhere_leaves_a_removed_directory(tmp_path: Path) -> None:
    live(Evicted, tmp_path)


class NeverMade(History):
    """A directory was renamed before it was known whether it had been made, and the driver died while it
    was renamed at the server, which has never seen it."""

    async def run(self) -> None:
        async with self._driver():
            pod = await self.tree.mkdir(ROOT, "p", 0o755)
            assert await drain(self.engine, STALL_S)
            self.fate.broken = 1.0
            folder = await self.tree.mkdir(pod.ino, "d", 0o755)
            await trio.sleep(4)
            await self.tree.rename(pod.ino, "d", pod.ino, "e", 0)
            home, supposed = self.store.remote_of(pod.ino), self.store.remote_of(folder.ino)
            assert home is not None
            assert supposed is not None
            self.store.set_remote(supposed.rid, to_parent=home.rid, to_name="e")
        self.fate.calm()
        async with self._driver():
            self.store.set(folder.ino, error=None)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch)
                assert await drain(self.engine, 30)
                nursery.cancel_scope.cancel()

    async def _watch(self) -> None:
        """``cpodfs sync`` gives up when all that is left has failed."""
        while True:
            assert self.store.failed(1) == []
            await trio.sleep(0.1)


def test_a_move_of_what_was_never_made_does_not_fail(tmp_path: Path) -> None:
    live(NeverMade, tmp_path)


class Renamed(History):
    """A pod is renamed while the server makes it, which cannot rename one."""

    async def run(self) -> None:
        self.fate.latency_s = 3.0
        async with self._driver():
            pod = await self.tree.mkdir(ROOT, "p", 0o755)
            _, handle = await self.tree.create(pod.ino, "f", 0o644)
            await self.tree.files.write(handle, 0, self._bytes())
            self.tree.handles.release(handle)
            while ("ino", pod.ino) not in self.engine._flights:
                await trio.sleep(0.1)
            await trio.sleep(0.2)
            await self.tree.rename(ROOT, "p", ROOT, "q", 0)
            assert await drain(self.engine, STALL_S)
            assert list(self.server.contents(self.user)) == ["q", "q/f"]


def test_a_pod_renamed_while_it_is_made_is_made_anew(tmp_path: Path) -> None:
    live(Renamed, tmp_path)


class NeverSent(History):
    """Something new here was removed or renamed before the server could hear of it; then somebody else
    makes it. ``pod``: a pod, else a folder."""

    pod = True
    remove = True

    async def run(self) -> None:
        self.fate.latency_s = 0.0
        async with self._driver():
            above = await self.tree.mkdir(ROOT, "p", 0o755)
            assert await drain(self.engine, STALL_S)
            self.fate.away = True
            where = ROOT if self.pod else above.ino
            await self.tree.mkdir(where, "new", 0o755)
            await trio.sleep(10)
            if self.remove:
                await self.tree.rmdir(where, "new")
            else:
                await self.tree.rename(where, "new", where, "newer", 0)
            await (self.other.create_pod("new") if self.pod else self.other.mkdir("p", "/new"))
            self.fate.away = False
            assert await drain(self.engine, STALL_S)
            await trio.sleep(60)
            assert ("new" if self.pod else "p/new") in self.server.contents(self.user)


@pytest.mark.parametrize("pod", [True, False])
@pytest.mark.parametrize("remove", [True, False])
def test_what_was_never_sent_is_not_deleted_there(tmp_path: Path, pod: bool, remove: bool) -> None:
    live(NeverSent, tmp_path, pod=pod, remove=remove)


class Underway(History):
    """Somebody reads a file that is not here, while the server renames it for us."""

    async def run(self) -> None:
        self.fate.latency_s = 0.0
        async with self._driver():
            pod = await self.tree.mkdir(ROOT, "p", 0o755)
            inode, handle = await self.tree.create(pod.ino, "f", 0o644)
            await self.tree.files.write(handle, 0, self._bytes())
            self.tree.handles.release(handle)
            assert await drain(self.engine, STALL_S)
            await trio.sleep(30)  # until Swarm has it
            self.parts._evictor._evict(inode.ino)
            home, file = self.store.remote_of(pod.ino), self.store.remote_of(inode.ino)
            assert home is not None
            assert file is not None
            self.store.set_remote(file.rid, to_parent=home.rid, to_name="g")
            await self.other.rename_file("p", "/f", "/g")
            with trio.move_on_after(1), contextlib.suppress(CpodfsError, OSError):
                await self.tree.files.read(self.tree.files.open(inode.ino), 0, 100)
            now = self.store.remote(file.rid)
            assert now is not None
            assert now.absent_s is None
            assert not self.parts.missing.distrusted


def test_what_is_being_renamed_is_not_doubted(tmp_path: Path) -> None:
    live(Underway, tmp_path)


class Torn(History):
    """The connection breaks in the middle of an upload, and somebody else saves the file."""

    async def run(self) -> None:
        self.fate.latency_s = 0.0
        async with self._driver():
            pod = await self.tree.mkdir(ROOT, "p", 0o755)
            inode, handle = await self.tree.create(pod.ino, "f", 0o644)
            await self.tree.files.write(handle, 0, b"one")
            self.tree.handles.release(handle)
            assert await drain(self.engine, STALL_S)
            await trio.sleep(100)
            self.fate.torn = True
            handle = self.tree.files.open(inode.ino)
            await self.tree.files.write(handle, 0, b"ours!")
            self.tree.handles.release(handle)
            await trio.sleep(10)
            theirs = b"somebody else's work"

            async def body() -> AsyncIterator[bytes]:
                yield theirs

            await self.other.upload("p", "/", "f", body, len(theirs))
            self.fate.torn = False
            assert await drain(self.engine, STALL_S)
            found = self.server.contents(self.user)
            assert found["p/f"] == theirs
            assert sorted(map(str, found.values())) == sorted(map(str, [None, theirs, b"ours!"]))


def test_an_upload_broken_off_in_the_middle_is_none(tmp_path: Path) -> None:
    live(Torn, tmp_path)


class Slow(History):
    """A tree is removed at a server that takes longer for each look than a look counts."""

    async def run(self) -> None:
        self.fate.latency_s = 0.0
        self.settings = dataclasses.replace(self.settings, attr_ttl_s=0.5)
        async with self._driver():
            parent = (await self.tree.mkdir(ROOT, "p", 0o755)).ino
            for name in "abc":
                parent = (await self.tree.mkdir(parent, name, 0o755)).ino
            _, handle = await self.tree.create(parent, "f", 0o644)
            self.tree.handles.release(handle)
            assert await drain(self.engine, STALL_S)
            await trio.sleep(100)
            self.fate.latency_s = 5.0
            top = self.store.child(self.store.children(ROOT)[0].ino, "a")
            assert top is not None
            assert top.parent is not None
            await self._empty(top.ino)
            await self.tree.rmdir(top.parent, "a")
            assert await drain(self.engine, 60)


def test_a_tree_is_removed_at_a_slow_server(tmp_path: Path) -> None:
    live(Slow, tmp_path)


class SlowLook(History):
    """A server that takes long for each call leaves out what was there, so that a look takes longer than
    it is fresh; meanwhile something new is to be uploaded."""

    async def run(self) -> None:
        async with self._driver():
            pod = await self.tree.mkdir(ROOT, "p", 0o755)
            for name in "abc":
                _, handle = await self.tree.create(pod.ino, name, 0o644)
                self.tree.handles.release(handle)
            assert await drain(self.engine, STALL_S)
            await self.other.open_pod("p")
            for name in "abc":
                await self.other.delete_file("p", f"/{name}")
            await trio.sleep(100)
            self.fate.latency_s = 5.0
            _, handle = await self.tree.create(pod.ino, "new", 0o644)
            self.tree.handles.release(handle)
            assert await drain(self.engine, 100)
            assert "p/new" in self.server.contents(self.user)


def test_a_file_is_uploaded_where_a_look_takes_long(tmp_path: Path) -> None:
    live(SlowLook, tmp_path)


class Unlisted(History):
    """Somebody's rmdir of ``b/a`` takes the entry of ``a`` out of the directory above ``b``, as the real
    server does; asked for ``a``, it goes on to list that."""

    async def run(self) -> None:
        async with self._driver():
            pod = await self.tree.mkdir(ROOT, "p", 0o755)
            folder = await self.tree.mkdir(pod.ino, "a", 0o755)
            for parent in (pod.ino, folder.ino):
                _, handle = await self.tree.create(parent, "f", 0o644)
                await self.tree.files.write(handle, 0, b"of a")
                self.tree.handles.release(handle)
            assert await drain(self.engine, STALL_S)
            await self.other.open_pod("p")
            await self.other.mkdir("p", "/b")
            await self.other.mkdir("p", "/b/a")
            await self.other.raw_rmdir("p", "/b/a")
            assert "p/a" not in self.server.contents(self.user)
            seen = []
            for _ in range(20):
                await trio.sleep(DISTRUST_S / 4)
                await self._look_everywhere()
                seen.append(("p/a/f" in self._paths(), self._is_doubtful("p/a")))
            assert set(seen) == {(True, True)}, "neither gone nor shown again at each other look"
            await self.tree.rename(pod.ino, "a", pod.ino, "c", 0)
            assert await drain(self.engine, STALL_S)
            assert self.server.contents(self.user)["p/c/f"] == b"of a"


def test_a_directory_that_has_lost_its_entry_stays_doubtful_until_it_is_moved(
    tmp_path: Path,
) -> None:
    live(Unlisted, tmp_path)


class Relisted(History):
    """A directory that has lost its entry at the server, and was never seen here, is made here."""

    async def run(self) -> None:
        async with self._driver():
            pod = await self.tree.mkdir(ROOT, "p", 0o755)
            assert await drain(self.engine, STALL_S)
            await self.other.open_pod("p")
            for path in ("/a", "/b", "/b/a", "/a/e"):
                await self.other.mkdir("p", path)
            await self._put_as("p", "/a", "f")
            await self.other.raw_rmdir("p", "/b/a")
            assert "p/a" not in self.server.contents(self.user)
            folder = await self.tree.mkdir(pod.ino, "a", 0o755)
            _, handle = await self.tree.create(folder.ino, "new", 0o644)
            self.tree.handles.release(handle)
            await self._finish()
            assert {"p/a/e", "p/a/f", "p/a/new"} < self._paths().keys()


def test_a_directory_that_has_lost_its_entry_gets_it_back_when_it_is_made(tmp_path: Path) -> None:
    live(Relisted, tmp_path)


class Nameless(History):
    """Somebody's rename into a missing directory has lost a file and left its name, as the real server
    does, in a directory that is listed for the first time. ``alone``: nothing else is in there."""

    alone = False

    async def run(self) -> None:
        async with self._driver():
            await self.tree.mkdir(ROOT, "p", 0o755)
            assert await drain(self.engine, STALL_S)
            await self.other.open_pod("p")
            await self.other.mkdir("p", "/d")
            await self._put_as("p", "/d", "lost")
            if not self.alone:
                await self._put_as("p", "/d", "kept")
            with contextlib.suppress(CpodfsError):
                paths = {"oldPath": "/d/lost", "newPath": "/nowhere/lost"}
                await self.other._change("p", "POST", "/v1/file/rename", **paths)
            self.parts.missing._lied_s = time.monotonic()  # what is first seen now is looked into
            await self.parts.lister.refresh_from_others(self.store.children(ROOT)[0].ino)
            folder = self.store.child(self.store.children(ROOT)[0].ino, "d")
            assert folder is not None
            with pytest.raises(Doubtful):
                await self.tree.directory(folder.ino)
            await trio.sleep(2 * DISTRUST_S)
            if self.alone:  # nothing bears witness
                with pytest.raises(Doubtful):
                    await self.tree.directory(folder.ino)
                assert await self.parts.lister.accept_deletions(folder.ino) == 1
            await self.tree.directory(folder.ino)
            shown = [child.name for child in self.store.children(folder.ino)]
            assert shown == ([] if self.alone else ["kept"])


@pytest.mark.parametrize("alone", [False, True])
def test_a_name_that_names_nothing_does_not_hide_its_neighbours(
    alone: bool, tmp_path: Path
) -> None:
    live(Nameless, tmp_path, alone=alone)


class InVain(History):
    """A deletion fails; then the server is found to have no such directory any more."""

    again = False

    async def run(self) -> None:
        async with self._driver():
            pod = await self.tree.mkdir(ROOT, "p", 0o755)
            folder = await self.tree.mkdir(pod.ino, "d", 0o755)
            assert await drain(self.engine, STALL_S)
            remote = self.store.remote_of(folder.ino)
            assert remote is not None
            self.fate.refused = 1.0
            await self.tree.rmdir(pod.ino, "d")
            await trio.sleep(60)
            assert list(self.engine.failures) == [remote.rid]
            if self.again:  # the next attempt finds that out
                self.parts.missing.suspect(remote.rid)
                self.engine._failed(("rid", remote.rid), Doubtful("not there"), 60.0)
            else:
                self.parts._inquiry.believe_gone(remote.rid)
            await trio.testing.wait_all_tasks_blocked()
            assert left(self.engine, self.store, 10) == []


@pytest.mark.parametrize("again", [False, True])
def test_a_failed_deletion_of_what_is_gone_is_told_of_no_more(again: bool, tmp_path: Path) -> None:
    live(InVain, tmp_path, again=again)


class Unread(History):
    """The server counts what is in a directory that is listed for the first time, and can read none of
    it: what is made here under one of those names must not go over it."""

    async def run(self) -> None:
        async with self._driver():
            pod = await self.tree.mkdir(ROOT, "p", 0o755)
            assert await drain(self.engine, STALL_S)
            await self.other.open_pod("p")
            await self.other.mkdir("p", "/d")
            await self.other.mkdir("p", "/d/x")
            await self._put_as("p", "/d/x", "f")
            await self.parts.lister.refresh_from_others(pod.ino)
            folder = self.store.child(pod.ino, "d")
            assert folder is not None
            self.parts.missing._lied_s = None
            with self._unreadable("/d"):
                await trio.sleep(2 * DISTRUST_S)
                with pytest.raises(Doubtful):
                    await self.tree.directory(folder.ino)
            await self.tree.directory(folder.ino)
            assert [child.name for child in self.store.children(folder.ino)] == ["x"]

    @contextlib.contextmanager
    def _unreadable(self, above: str) -> Iterator[None]:
        ls = ServerTree.ls

        def nothing(tree: ServerTree, path: str) -> Any:
            return ([], []) if path == above else ls(tree, path)

        with mock.patch.object(ServerTree, "ls", nothing):
            yield


def test_a_directory_of_which_nothing_can_be_read_is_not_shown_as_empty(tmp_path: Path) -> None:
    live(Unread, tmp_path)


class Returned(History):
    """The entry of a directory is missing for a while; the server lists it all the time."""

    async def run(self) -> None:
        async with self._driver():
            pod = await self.tree.mkdir(ROOT, "p", 0o755)
            for parent in (pod.ino, (await self.tree.mkdir(pod.ino, "a", 0o755)).ino):
                _, handle = await self.tree.create(parent, "f", 0o644)
                self.tree.handles.release(handle)
            assert await drain(self.engine, STALL_S)
            await self.other.open_pod("p")
            there = self.server.trees(self.user)["p"]
            with there._store.change():
                there._unlist("/", "D", "a")
            await trio.sleep(1000)
            await self.parts.lister.refresh_from_others(pod.ino)
            assert self._is_doubtful("p/a")
            with there._store.change():
                there._list("/", "D", "a")
            await trio.sleep(3600)
            assert not self._is_doubtful("p/a"), "nobody has looked"


def test_a_doubt_ends_by_itself_when_the_entry_is_back(tmp_path: Path) -> None:
    live(Returned, tmp_path)


class Meanwhile(History):
    """Many new files wait for their turn at a slow server; somebody else makes one of that name."""

    async def run(self) -> None:
        async with self._driver():
            pod = await self.tree.mkdir(ROOT, "p", 0o755)
            assert await drain(self.engine, STALL_S)
            await trio.sleep(300)
            await self.other.open_pod("p")
            self.fate.latency_s = 5.0
            for number in range(12):
                _, handle = await self.tree.create(pod.ino, f"f{number}", 0o644)
                await self.tree.files.write(handle, 0, b"ours")
                self.tree.handles.release(handle)
            await trio.sleep(30)
            there = self.server.contents(self.user)
            waiting = [f"f{n}" for n in range(12) if f"p/f{n}" not in there]
            await self._put_as("p", "/", waiting[len(waiting) // 2])
            theirs = (b"%d." % self.written) * self.written
            assert await drain(self.engine, STALL_S)
            assert theirs in self.server.contents(self.user).values()


def test_a_file_that_waits_for_its_turn_is_looked_for_then(tmp_path: Path) -> None:
    live(Meanwhile, tmp_path)


class Replaced(History):
    """A directory has become a file at the server, which breaks off any call about what was in it.
    ``change``: what is done there meanwhile."""

    change = "write"

    async def run(self) -> None:
        async with self._driver():
            pod = await self.tree.mkdir(ROOT, "p", 0o755)
            folder = await self.tree.mkdir(pod.ino, "c", 0o755)
            for name in ("b", "d"):
                _, handle = await self.tree.create(folder.ino, name, 0o644)
                await self.tree.files.write(handle, 0, self._bytes())
                self.tree.handles.release(handle)
            assert await drain(self.engine, STALL_S)
            await self.other.open_pod("p")
            await self.other.raw_rmdir("p", "/c")
            await self._put_as("p", "/", "c")
            if self.change == "write":
                inode = self.store.child(folder.ino, "b")
                assert inode is not None
                ours = self.tree.files.open(inode.ino)
                await self.tree.files.write(ours, 0, b"ours")
                self.tree.handles.release(ours)
            elif self.change == "mkdir":
                await self.tree.mkdir(folder.ino, "new", 0o755)
            elif self.change == "remove":
                await self.tree.unlink(folder.ino, "b")
            else:
                await self.tree.rename(folder.ino, "b", pod.ino, "b", 0)
            await self._finish()
            assert self._paths()["p/c"] is not None


@pytest.mark.parametrize("change", ["write", "mkdir", "remove", "rename"])
def test_a_directory_that_became_a_file_keeps_nothing_waiting(change: str, tmp_path: Path) -> None:
    live(Replaced, tmp_path, change=change)
