"""One account's cache folder: its lock, its metadata and its contents.

Imports the cache. Layout: ``lock``, ``meta.db`` (+ ``-wal``, ``-shm``), ``starts``,
``content/``, ``unclaimed/``, ``runs/``, and ``last-unmount.json``. The lock is the kernel's (flock), so a dead
driver's is free by itself.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cpodfs.cache import claims
from cpodfs.cache.content import Content, sync_folder
from cpodfs.cache.store import Store
from cpodfs.errors import CacheError, CacheLocked, CacheVersion


@dataclass(frozen=True, slots=True)
class Cache:
    """``notices``: what is to be said of the contents at the start, in one line each."""

    folder: Path
    store: Store
    content: Content
    notices: tuple[str, ...] = ()


@contextmanager
def opened(folder: Path) -> Iterator[Cache]:
    """The cache in ``folder``, made if missing. Raises CacheLocked, CacheVersion or CacheError.

    One made just now that has come to hold nothing goes again when the block fails, as at login.
    """
    is_new = not folder.exists()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if is_new:
            sync_folder(folder.parent)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CacheError(f"{folder}: cannot use the cache folder: {error}") from error
    try:
        _lock(folder, lock)
        store = Store(folder / "meta.db")
        in_vain = False
        try:
            content = Content(folder / "content")
            yield Cache(folder, store, content, tuple(claims.settle(folder, store, content)))
        except BaseException:
            in_vain = is_new and store.is_blank()
            raise
        finally:
            store.close()
            if in_vain:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _lock(folder: Path, lock: int) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
        raise CacheLocked(
            f"{folder}: in use: this account is mounted already (process {owner}); "
            "use that mount, or unmount it first"
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)


def check(folder: Path) -> claims.Found:
    """Look at every content of a cache that nobody has open. Raises CacheError."""
    with opened(folder) as cache:
        found = claims.check(cache.store, cache.content)
        found.notices = cache.notices
        return found


def rescue(folder: Path, target: Path) -> tuple[int, int]:
    """Copy what no name belongs to, or all contents if the journal is unusable, to ``target``, which
    must be new or empty. Returns files and bytes copied. Raises CacheError."""
    try:
        try:
            with opened(folder) as cache:
                return claims.rescue(cache.content, target, None)
        except (CacheLocked, CacheVersion):
            raise
        except CacheError:
            return claims.rescue(Content(folder / "content"), target, claims.names_of(folder))
    except OSError as error:
        raise CacheError(f"{target}: cannot copy to it: {error}; nothing was removed") from error
