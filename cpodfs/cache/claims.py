"""Whether the data files and the journal belong together; what nobody claims is kept, and told of.

Imports the cache. After an end that was none, the folder is gone through once. A data file that no
inode has is moved to ``unclaimed/``, where nothing overwrites it: it may be the only copy there is.
"""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from cpodfs.cache import content as data
from cpodfs.cache.content import PART, Content, sync_folder
from cpodfs.cache.schema import CONTENT
from cpodfs.cache.store import Inode, Store


@dataclass(frozen=True, slots=True)
class Damage:
    """A data file that is not what the journal says. ``is_pending``: the server has not got it."""

    path: str
    what: str
    is_pending: bool


@dataclass(slots=True)
class Found:
    """What a look at a whole cache found. ``notices``: of the journal, which are given only once.
    ``unclaimed``: files and their bytes."""

    files: int = 0
    bytes: int = 0
    notices: tuple[str, ...] = ()
    damaged: list[Damage] = field(default_factory=list)
    unclaimed: list[tuple[Path, int]] = field(default_factory=list)


def settle(folder: Path, store: Store, content: Content) -> list[str]:
    """Go through the data files if anything speaks for it. Returns what the user must be told."""
    counted = _starts(folder)
    is_new = not store.starts
    older = store.lost_journal or counted > store.starts or (is_new and any(data_files(content)))
    found = []
    if older or store.was_cut:
        moved = _gather(store, content, older=older)
        if older:
            found.append(
                f"{folder}: the journal of this cache is lost or older than its contents: changes "
                "that were pending may be missing"
            )
        if moved:
            found.append(
                f"{folder}: {moved} data files that the journal does not know were set aside"
            )
    starts = max(counted, store.starts) + 1
    if older:
        store.is_outdated = True
        store.doubt(starts)  # and it is said once
    _count(folder, starts)
    files, size = unclaimed(content)
    if files:
        found.append(
            f"{content.unclaimed}: {files} files, {size} bytes, of which no name is known; to see "
            "them: cpodfs cache check; to copy them out: cpodfs cache rescue DIR"
        )
    return found


def unclaimed(content: Content) -> tuple[int, int]:
    """How many data files were set aside, and their bytes."""
    sizes = [path.stat().st_size for path in aside(content)]
    return len(sizes), sum(sizes)


def aside(content: Content) -> list[Path]:
    """The data files that were set aside."""
    return sorted(content.unclaimed.iterdir()) if content.unclaimed.is_dir() else []


def data_files(content: Content) -> Iterator[tuple[int, Path]]:
    """All data files as (inode, path), without parts and what is not ours."""
    for shard in sorted(content.root.iterdir()):
        if shard.is_dir():
            for path in sorted(shard.iterdir()):
                if path.name.isdecimal():
                    yield int(path.name), path


def _gather(store: Store, content: Content, *, older: bool) -> int:
    """Set aside what no inode claims; remove parts, and evicted contents that were left over. What
    was evicted and is not known to be is known to be now."""
    claimed, moved, highest = set(store.claimed()), 0, 0
    for ino, path in data_files(content):
        highest = max(highest, ino)
        if ino in claimed:
            claimed.remove(ino)
            continue
        inode = store.get(ino)
        if inode is not None and not older and _is_servers(inode, path):
            path.unlink()  # evicted, or fetched, just before the end
        elif path.stat().st_size:
            content.set_aside(ino)
            moved += 1
        else:
            path.unlink()
    for part in content.root.glob(f"*/*{PART}"):
        part.unlink()
    if moved:
        sync_folder(content.unclaimed)
    with store.transaction():
        for ino in claimed:
            store.not_cached(ino)
    # A journal that lost its newest part would give the same numbers again.
    store.never_again(highest)
    return moved


def _is_servers(inode: Inode, path: Path) -> bool:
    """Whether a data file that is not known to be here is what the server has, and not what was
    written since, in a part of the journal that is damaged."""
    if inode.dirty & CONTENT or path.stat().st_size != inode.size:
        return False
    if inode.crc is None:  # fetched for the first time
        return True
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return data.checksum(fd) == inode.crc
    finally:
        os.close(fd)


def _starts(folder: Path) -> int:
    try:
        return int((folder / "starts").read_text())
    except (OSError, ValueError):
        return 0


def _count(folder: Path, starts: int) -> None:
    """Beside the database, so that an older one in its place is noticed."""
    with suppress(OSError):  # on a full disk
        temporary = folder / "starts.new"
        with temporary.open("w") as file:
            file.write(f"{starts}\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / "starts")


# -- without a mount ------------------------------------------------------------------------------


def check(store: Store, content: Content) -> Found:
    """Look at every content, to its last byte."""
    found = Found(unclaimed=[(path, path.stat().st_size) for path in aside(content)])
    for ino in sorted(store.claimed()):
        inode = store.get(ino)
        if inode is None or inode.parent is None:
            continue  # deleted
        found.files += 1
        found.bytes += content.size_or_0(ino)
        if (what := _damage(inode, content)) is not None:
            found.damaged.append(Damage(store.path(ino), what, bool(inode.dirty & CONTENT)))
    return found


def _damage(inode: Inode, content: Content) -> str | None:
    there = content.size_or_0(inode.ino)
    if inode.dirty & CONTENT:
        return f"{there} of {inode.size} bytes are left" if there < inode.size else None
    if there != inode.size:
        return f"{there} bytes, {inode.size} expected"
    if inode.crc is None or not inode.size:
        return None
    fd = content.open(inode.ino)
    try:
        return None if data.checksum(fd) == inode.crc else "has another content than it had"
    finally:
        os.close(fd)


def rescue(content: Content, target: Path, names: dict[int, str] | None) -> tuple[int, int]:
    """Copy what is unclaimed to a folder that is new or empty; returns files and bytes copied.

    ``names``: with them, all data files go, those that have a name under it. Raises OSError.
    """
    target.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(target.iterdir()):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(target))
    wanted = [(path, f"unclaimed/{path.name}") for path in aside(content)]
    if names is not None:
        wanted += [(path, names.get(ino, f"nameless/{ino}")) for ino, path in data_files(content)]
    total = 0
    for path, name in wanted:
        try:
            _copy(path, target / name)
        except (FileExistsError, NotADirectoryError):  # names that damage made the same
            _copy(path, target / "nameless" / path.name)
        total += path.stat().st_size
    return len(wanted), total


def _copy(path: Path, goal: Path) -> None:
    goal.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.open("rb") as source, goal.open("xb") as copy:
        shutil.copyfileobj(source, copy)


def names_of(folder: Path) -> dict[int, str]:
    """As many names of data files as a damaged journal still tells. Reads a copy of it."""
    found: dict[int, tuple[int, str]] = {}
    with tempfile.TemporaryDirectory() as scratch, suppress(OSError, sqlite3.Error):
        for journal in folder.glob("meta.db*"):
            shutil.copyfile(journal, Path(scratch) / journal.name)
        with closing(sqlite3.connect(Path(scratch) / "meta.db")) as db:
            for ino, parent, name in db.execute("SELECT ino, parent, name FROM inode"):
                if isinstance(name, str) and isinstance(parent, int):
                    found[ino] = parent, name
    paths = {ino: _path(found, ino) for ino in found}
    return {ino: path for ino, path in paths.items() if path is not None}


def _path(found: dict[int, tuple[int, str]], ino: int) -> str | None:
    """A path that leads out of no folder, whatever the damage made of the names."""
    parts: list[str] = []
    while ino in found:
        ino, name = found[ino]
        if name in ("", ".", "..") or "/" in name or "\0" in name or len(parts) > 1000:
            return None
        parts.append(name)
    return "/".join(reversed(parts))
