"""Contents when the journal cannot be written to: what is open, what is on the disk and what is noted stay
one and the same."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any, cast

import pytest
import trio

from cpodfs.cache.content import Content
from cpodfs.cache.schema import CONTENT, DIR, FILE, ROOT
from cpodfs.cache.store import Inode, Store, trouble
from cpodfs.dfs import Client
from cpodfs.fs.handles import Handles
from cpodfs.fs.tree import Tree
from cpodfs.sync.downloads import Download, Downloads, Pulse
from cpodfs.sync.engine import Engine


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "meta.db")


@pytest.fixture
def content(tmp_path: Path) -> Content:
    return Content(tmp_path / "content")


def fails(*_arguments: object, **_columns: object) -> None:
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorcode = sqlite3.SQLITE_FULL
    raise error


def test_a_download_that_cannot_be_noted_stays_the_file_that_is_open(
    store: Store, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else whoever goes on to write to it writes to a file that nobody uploads."""
    ino = store.create(ROOT, "f", FILE, 0o600, size=4).ino
    downloads = Downloads(store, content, cast(Client, None), parallel=1)
    opened = content.create_part(ino, 4)

    def ends() -> Download:
        fd = content.create_part(ino, 4)
        os.pwrite(fd, b"text", 0)
        os.close(fd)
        download = Download(ino, 1, 4, Pulse(1.0), available=4)
        downloads._running[ino] = download
        downloads._end(download, None)
        return download

    with monkeypatch.context() as full:
        full.setattr(store, "set", fails)
        assert not ends().finished
    assert os.fstat(opened).st_size == 0, "as after any attempt that failed"
    assert ends().finished
    assert os.path.samestat(os.fstat(opened), os.stat(content.path(ino)))
    assert os.pread(opened, 9, 0) == b"text"
    os.close(opened)


def test_a_deletion_that_is_rolled_back_does_not_cost_the_content(
    store: Store, content: Content
) -> None:
    ino = store.create(ROOT, "f", FILE, 0o600, cached=1, dirty=CONTENT).ino
    os.close(content.create(ino))
    handles = Handles(store, content)

    def unlink() -> None:
        with store.transaction():
            store.detach(ino)
            handles.discard(ino)
            fails()

    with pytest.raises(sqlite3.OperationalError):
        unlink()
    handles.sweep(set(handles.doomed))
    assert os.path.exists(content.path(ino))
    store.detach(ino)
    handles.discard(ino)
    handles.sweep(set(handles.doomed))
    assert not os.path.exists(content.path(ino))


def test_what_the_journal_cannot_is_said_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "damaged.db"
    path.write_bytes(os.urandom(8192))
    found: list[Any] = []
    for act in (lambda: sqlite3.connect(path).execute("SELECT 1 FROM t"), fails):
        with pytest.raises(sqlite3.Error) as caught:
            act()
        found.append(trouble(caught.value))
    assert "cpodfs cache check" in found[0]
    assert "disk is full" in found[1]
    assert trouble(sqlite3.IntegrityError("UNIQUE")) is None
    assert trouble(ValueError("ours")) is None


class Nobody:
    """In the place of parts that a test does not ask; ``told`` is what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []
        self.offline = True

    async def ensure(self, _directory: Inode) -> None:
        return

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.told.append((name, *arguments))


def test_an_unlink_that_fails_leaves_pending_what_was_and_a_create_nothing_open(
    store: Store, content: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    pod = store.create(ROOT, "pod", DIR, 0o700).ino
    inode = store.create(pod, "f", FILE, 0o600, cached=1, dirty=CONTENT)
    os.close(content.create(inode.ino))
    handles, engine, nobody = Handles(store, content), Nobody(), cast(Any, Nobody())
    files = cast(Any, Nobody())
    files.create = lambda ino: handles.open(ino, lambda: content.create(ino))
    tree = Tree(store, handles, cast(Engine, engine), nobody, files)
    monkeypatch.setattr(tree, "_modified", fails)
    with pytest.raises(sqlite3.OperationalError):
        trio.run(tree.unlink, pod, "f")
    assert engine.told[-1] == ("touch", ("ino", inode.ino))
    assert store.get(inode.ino) == inode
    with pytest.raises(sqlite3.OperationalError):
        trio.run(tree.create, pod, "new", 0o600)
    assert handles.open_inos() == []
    assert store.child(pod, "new") is None
