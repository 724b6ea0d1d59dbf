"""What the server has not been told yet, by path and with the reason, for whoever waits for it.

Imports the engine and the store. Nothing here changes anything.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpodfs.cache.store import Store
from cpodfs.sync.engine import Engine
from cpodfs.sync.ops import Item


@dataclass(frozen=True, slots=True)
class Left:
    """``path``: relative to the mount. ``failed``: whether ``reason`` is an error."""

    path: str
    reason: str
    failed: bool


def left(engine: Engine, store: Store, limit: int) -> list[Left]:
    """At most ``limit`` changes and as many deletions; those that failed first."""
    changes: list[Item] = [("ino", inode.ino) for inode in store.failed(limit)]
    changes += [("ino", inode.ino) for inode in store.pending_inodes(limit=limit)]
    deletions: list[Item] = [("rid", rid) for rid in engine.failures]
    deletions += [("rid", rid) for rid in store.orphans(limit)]
    items = [*list(dict.fromkeys(changes))[:limit], *list(dict.fromkeys(deletions))[:limit]]
    return [_left(engine, store, item) for item in items]


def _left(engine: Engine, store: Store, item: Item) -> Left:
    path, failure = _path(store, item), _failure(engine, store, item)
    if failure is not None:
        return Left(path, failure, failed=True)
    if engine.is_under_way(item):
        return Left(path, "is being sent" if item[0] == "ino" else "is being deleted", failed=False)
    cause = engine.waits_for(item)
    if cause == item:
        return Left(path, "not sent yet" if item[0] == "ino" else "not deleted yet", failed=False)
    why = _failure(engine, store, cause)
    detail = f" ({why})" if why else ""
    return Left(path, f"waits for {_path(store, cause)}{detail}", failed=False)


def _path(store: Store, item: Item) -> str:
    kind, number = item
    return store.path(number) if kind == "ino" else "/".join(store.remote_path(number))


def _failure(engine: Engine, store: Store, item: Item) -> str | None:
    kind, number = item
    if kind == "rid":
        return engine.failures.get(number)
    inode = store.get(number)
    return inode.error if inode is not None else None
