"""Whether the data files and the journal belong together; what nobody claims is kept, and told of.

Imports the cache. After an end that was none, the folder is gone through once. A data file that no
inode has is moved to ``unclaimed/``, where nothing overwrites it: it may be the only copy there is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from cpodfs.cache.content import PART, Content, sync_folder
from cpodfs.cache.store import Store


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
    _count(folder, max(counted, store.starts) + 1)
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
    """Set aside what no inode claims; remove parts, and evicted contents that were left over."""
    claimed, moved, highest = store.claimed(), 0, 0
    for ino, path in data_files(content):
        highest = max(highest, ino)
        if ino in claimed:
            continue
        if store.get(ino) is not None and not older:
            path.unlink()  # evicted, or fetched, just before the end: the server has it
        elif path.stat().st_size:
            content.set_aside(ino)
            moved += 1
        else:
            path.unlink()
    for part in content.root.glob(f"*/*{PART}"):
        part.unlink()
    if moved:
        sync_folder(content.unclaimed)
    # A journal that lost its newest part would give the same numbers again.
    store.never_again(highest)
    return moved


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
