"""A cache folder whose journal and contents do not belong together: said, kept, and copied out."""

from __future__ import annotations

import os
import shutil
import zlib
from pathlib import Path

import pytest

from cpodfs.cache import claims
from cpodfs.cache import folder as folders
from cpodfs.cache.content import PART
from cpodfs.cache.folder import Cache, opened
from cpodfs.cache.schema import CONTENT, DIR, FILE, PLACE, ROOT
from cpodfs.errors import CacheError


def fill(cache: Cache, name: str, text: str, *, dirty: int = CONTENT | PLACE) -> int:
    store, content = cache.store, cache.content
    pod = store.child(ROOT, "pod") or store.create(ROOT, "pod", DIR, 0o700)
    inode = store.create(pod.ino, name, FILE, 0o600, size=len(text), cached=1, dirty=dirty)
    fd = content.create(inode.ino)
    os.write(fd, text.encode())
    os.close(fd)
    return inode.ino


def killed(folder: Path, *files: tuple[str, str]) -> dict[str, int]:
    """A cache as a driver leaves it that is killed while it has ``files`` open."""
    live = folder.with_name(f"{folder.name}-live")
    with opened(live) as cache:
        inos = {name: fill(cache, name, text) for name, text in files}
        shutil.copytree(live, folder)
    shutil.rmtree(live)
    return inos


def test_after_a_good_end_nothing_is_said(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        fill(cache, "f", "text")
        epoch = cache.store.epoch
    with opened(tmp_path / "c") as cache:
        assert cache.notices == ()
        assert (cache.store.was_cut, cache.store.epoch) == (False, epoch)


def test_after_a_kill_contents_are_doubted_and_parts_go(tmp_path: Path) -> None:
    ino = killed(tmp_path / "c", ("f", "text"))["f"]
    part = tmp_path / "c" / "content" / f"{ino:02x}" / f"{ino}{PART}"
    part.write_bytes(b"half")
    with opened(tmp_path / "c") as cache:
        assert cache.notices == ()
        assert cache.store.was_cut
        inode = cache.store.get(ino)
        assert inode is not None
        assert inode.epoch < cache.store.epoch
        assert not part.exists()
        assert cache.content.size(ino) == 4


@pytest.mark.parametrize("lost", ["meta.db-wal", "meta.db*", "*.db* starts"])
def test_a_lost_journal_is_said_and_what_it_named_is_kept(tmp_path: Path, lost: str) -> None:
    ino = killed(tmp_path / "c", ("f", "the only copy"))["f"]
    for pattern in lost.split():
        for path in (tmp_path / "c").glob(pattern):
            path.unlink()
    with opened(tmp_path / "c") as cache:
        journal, moved, unclaimed = cache.notices
        assert "lost or older than its contents" in journal
        assert "1 data files" in moved
        assert "cpodfs cache rescue DIR" in unclaimed
        assert (cache.content.unclaimed / f"{ino}").read_text() == "the only copy"
        assert fill(cache, "new", "text") > ino, "a number is not given again"
    assert folders.rescue(tmp_path / "c", tmp_path / "out") == (1, len("the only copy"))
    assert (tmp_path / "out" / "unclaimed" / f"{ino}").read_text() == "the only copy"
    assert (tmp_path / "c" / "unclaimed" / f"{ino}").exists()


def test_an_older_database_in_its_place_is_noticed(tmp_path: Path) -> None:
    with opened(tmp_path / "c"):
        pass
    shutil.copy(tmp_path / "c" / "meta.db", tmp_path / "old.db")
    with opened(tmp_path / "c") as cache:
        ino = fill(cache, "f", "text")
    shutil.copy(tmp_path / "old.db", tmp_path / "c" / "meta.db")
    with opened(tmp_path / "c") as cache:
        assert "older than its contents" in cache.notices[0]
        assert (cache.content.unclaimed / f"{ino}").read_text() == "text"


def test_a_damaged_page_is_refused_and_all_can_be_copied_out(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        for number in range(200):
            fill(cache, f"f{number}", f"text {number}")
    with (tmp_path / "c" / "meta.db").open("r+b") as database:
        database.seek(2 * 4096)
        database.write(os.urandom(4096))
    with pytest.raises(CacheError, match=r"not a usable cache.*cpodfs cache rescue"):
        with opened(tmp_path / "c"):
            pass
    files, _ = folders.rescue(tmp_path / "c", tmp_path / "out")
    assert files == 200
    texts = {path.read_text() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert texts == {f"text {number}" for number in range(200)}


def test_names_made_of_damage_lead_out_of_nothing(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        for name in ("../../out", "f", ".."):
            fill(cache, name, name)
    database = bytearray((tmp_path / "c" / "meta.db").read_bytes())
    database[100:108] = b"\xff" * 8  # the head of its first page
    (tmp_path / "c" / "meta.db").write_bytes(database)
    files, _ = folders.rescue(tmp_path / "c", tmp_path / "deep" / "er" / "out")
    assert files == 3
    assert sorted(p.name for p in (tmp_path / "deep" / "er").iterdir()) == ["out"]
    assert not (tmp_path / "deep" / "out").exists()


def test_check_names_what_is_not_as_it_was(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        store, content = cache.store, cache.content
        short, other, lost, good = (
            fill(cache, name, "text", dirty=dirty)
            for name, dirty in (("short", 0), ("other", 0), ("lost", CONTENT), ("good", 0))
        )
        for ino in (other, good):
            store.set(ino, crc=zlib.crc32(b"text"))
        os.truncate(content.path(short), 3)
        Path(content.path(other)).write_text("tEXT")
        content.remove(lost)
    found = folders.check(tmp_path / "c")
    assert (found.files, found.bytes) == (4, 11)
    assert [(d.path, d.what, d.is_pending) for d in found.damaged] == [
        ("pod/short", "3 bytes, 4 expected", False),
        ("pod/other", "has another content than it had", False),
        ("pod/lost", "0 of 4 bytes are left", True),
    ]


def test_a_target_that_holds_something_is_refused(tmp_path: Path) -> None:
    killed(tmp_path / "c", ("f", "text"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(CacheError, match="out"):
        folders.rescue(tmp_path / "c", tmp_path / "out")


def test_a_lost_journal_is_said_once_and_contents_are_doubted(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        fill(cache, "f", "text")
    old = (tmp_path / "c" / "meta.db").read_bytes()
    for _ in range(3):
        with opened(tmp_path / "c") as cache:
            assert cache.notices == ()
    (tmp_path / "c" / "meta.db").write_bytes(old)
    with opened(tmp_path / "c") as cache:
        assert "older than its contents" in cache.notices[0]
        (pod,) = cache.store.children(ROOT)
        (inode,) = cache.store.children(pod.ino)
        assert inode.epoch < cache.store.epoch, "its content is looked at before it is believed"
    with opened(tmp_path / "c") as cache:
        assert cache.notices == ()


def test_check_says_what_is_said_only_once(tmp_path: Path) -> None:
    killed(tmp_path / "c", ("f", "text"))
    (tmp_path / "c" / "meta.db-wal").unlink()
    found = folders.check(tmp_path / "c")
    assert "older than its contents" in found.notices[0]


@pytest.mark.parametrize(
    ("there", "crc", "is_kept"),
    [
        ("text", None, False),
        ("text", zlib.crc32(b"text"), False),
        ("tEXT", zlib.crc32(b"text"), True),
        ("longer text", None, True),
    ],
)
def test_what_is_not_the_servers_is_kept_whatever_the_journal_says(
    tmp_path: Path, there: str, crc: int | None, is_kept: bool
) -> None:
    """As after a power cut just after an eviction, or with a journal that lost what came after it."""
    with opened(tmp_path / "c-live") as cache:
        ino = fill(cache, "f", there, dirty=0)
        cache.store.set(ino, cached=0, crc=crc, size=len("text"))
        shutil.copytree(tmp_path / "c-live", tmp_path / "c")
    with opened(tmp_path / "c") as cache:
        assert cache.content.size_or_0(ino) == 0
        assert [path.read_text() for path in claims.aside(cache.content)] == [there] * is_kept


def test_a_file_that_format_1_knew_to_be_longer_is_not_taken_for_damaged(tmp_path: Path) -> None:
    """It noted the size when a file was closed: not of one that was being written anew at a kill."""
    with opened(tmp_path / "c-live") as cache:
        ino = fill(cache, "f", "new")
        cache.store.set(ino, size=30_000)
        database = cache.store._db
        for table, column in (
            *(("inode", "crc"), ("inode", "epoch"), ("remote", "absent_s")),
            *(("remote", "absences"), ("remote", "in_swarm")),
        ):
            for index in ("remote_doubtful", "remote_unswarmed"):
                database.execute(f"DROP INDEX IF EXISTS {index}")
            database.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
        database.executescript("DROP TABLE state; DROP TABLE sent; PRAGMA user_version = 1;")
        shutil.copytree(tmp_path / "c-live", tmp_path / "c")
        database.executescript(
            "CREATE TABLE state (starts, epoch, ended); INSERT INTO state VALUES (1, 1, 0)"
        )
    with opened(tmp_path / "c") as cache:
        assert cache.store.was_cut
        inode = cache.store.get(ino)
        assert inode is not None
        assert inode.dirty & CONTENT
        assert cache.content.size(ino) >= inode.size
