"""The mount as its driver holds it: known by its device, watched, and let go.

Imports mountpoint and pyfuse3. A path tells little: the mount may have been moved, another one may
lie over it or have taken its place. Nor does the session end with the mount: a copy of it in another
mount namespace (a container, ``unshare -m``), or a file that is still open in it, keeps it alive.
"""

from __future__ import annotations

import logging
import select
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import pyfuse3
import trio

from cpodfs import mountpoint
from cpodfs.errors import MountError

log = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0
"""How often the list of mounts is read when the kernel tells of no change."""
HELD_EVERY_S = 1.0
DETACH_S = 5.0
LAST_S = 0.5
"""How long a session takes to end by itself, at most, once its mount has gone for good."""


class Attachment:
    """``open_inos``: the inodes that anybody, in whatever namespace, has open."""

    def __init__(self, path: Path, open_inos: Callable[[], Iterable[int]]) -> None:
        """What was just mounted at ``path``. Raises MountError when it is not there any more."""
        entry = mountpoint.find(path)
        if entry is None or entry.fstype != mountpoint.FSTYPE:
            raise MountError(f"{path}: unmounted as soon as it was mounted; mount again")
        self._device = entry.device
        self._ids = {entry.mount_id}
        self._open_inos = open_inos

    def _is_there(self) -> bool:
        ours = [m for m in mountpoint.mounts() if m.is_on(self._device)]
        self._ids.update(m.mount_id for m in ours)
        return bool(ours)

    async def gone(self) -> None:
        """Return once the mount is gone from our namespace, with all its copies there. Usually the
        session ends with it, just before or just after this."""
        with mountpoint.MOUNTINFO.open() as info, select.epoll() as changes:
            changes.register(info, select.EPOLLPRI)
            while await trio.to_thread.run_sync(self._is_there):
                # A change between the look and the wait is not told: look now and then.
                with trio.move_on_after(LOOK_EVERY_S):
                    await trio.lowlevel.wait_readable(changes.fileno())
        await trio.sleep(LAST_S)

    async def unheld(self) -> None:
        """Return once no process of our namespace has a file open in the mount that is gone."""
        while True:
            if not any(self._open_inos()):
                return
            if not await trio.to_thread.run_sync(mountpoint.is_held, self._ids):
                return
            await trio.sleep(HELD_EVERY_S)

    async def release(self) -> None:
        """Unmount what is ours, in use or not, take the dirty pages of all who have files open, and
        end the session."""
        try:
            await trio.to_thread.run_sync(mountpoint.unmount_device, self._device)
        except MountError as error:
            log.info("%s", error)
            await self._take_pages()
            with suppress(MountError):
                await trio.to_thread.run_sync(
                    lambda: mountpoint.unmount_device(self._device, lazy=True)
                )
        await trio.sleep(LAST_S)
        await self._take_pages()
        pyfuse3.terminate()

    async def _take_pages(self) -> None:
        """Make the kernel hand over what it has not written yet. No path leads to a copy in another
        namespace, so inode by inode: to drop a page, the kernel must write it first."""
        with trio.move_on_after(DETACH_S):
            for ino in list(self._open_inos()):
                with suppress(OSError):  # it knows this inode no more
                    await trio.to_thread.run_sync(
                        pyfuse3.invalidate_inode, pyfuse3.InodeT(ino), abandon_on_cancel=True
                    )
