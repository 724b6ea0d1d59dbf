"""Waiting for writeback: until the server has everything, or has one file.

Imports the engine and the store. Each ends by itself when nothing moves any more.
"""

from __future__ import annotations

import errno

import trio

from cpodfs.cache.schema import CONTENT, DAMAGED, PLACE
from cpodfs.cache.store import Store
from cpodfs.sync.engine import Engine


async def drain(engine: Engine, stalled_s: float) -> bool:
    """Send all that is pending. False when nothing moved for ``stalled_s`` seconds."""
    engine.hurry()
    last, since = engine.moved(), trio.current_time()
    try:
        while not engine.is_idle():
            moved = engine.moved()
            if moved != last or engine.is_being_stored():
                last, since = moved, trio.current_time()
            if engine.rests(stalled_s) or trio.current_time() - since > stalled_s:
                return False
            with trio.move_on_after(min(stalled_s, 1.0)):
                await engine.progressed()
        return True
    finally:
        engine.relax()


async def push(engine: Engine, store: Store, ino: int) -> None:
    """Return when the server has the file. Raises EIO, with the reason, when an attempt fails."""
    if (inode := store.get(ino)) is None or not inode.dirty:
        return
    engine.send_now(ino)
    failed = False
    while not failed and not inode.dirty & DAMAGED:
        await engine.progressed()
        inode = store.get(ino)
        if inode is None or inode.parent is None or not inode.dirty & (CONTENT | PLACE):
            return
        failed = engine.is_failing(ino)
    raise OSError(errno.EIO, inode.error or "the server did not take it")
