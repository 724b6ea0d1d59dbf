"""The driver: serves a mount, and takes it down without losing a byte.

Imports everything below the CLI. Order at the end: no new runs, running ones cancelled; the mount
detached (which makes the kernel hand over its dirty pages); what is pending uploaded; only then the
process ends. Whatever could not be uploaded stays journalled and is sent by the next mount.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pyfuse3
import trio

from cpodfs import fuse
from cpodfs.attachment import DETACH_S, Attachment
from cpodfs.cache.folder import Cache, opened
from cpodfs.cache.schema import ROOT
from cpodfs.config import Settings
from cpodfs.dfs import Client, Session, Timeouts
from cpodfs.errors import MountError, NoSuchUser, Unreachable
from cpodfs.notify import sd_notify
from cpodfs.parts import Environment, Parts
from cpodfs.sync.drain import drain
from cpodfs.sync.left import left

log = logging.getLogger(__name__)

MAX_REQUESTS = 500
"""Requests served at once. Readers that wait for the network must not keep others out."""
LEFT_OVER_NAMES = 1000
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

Progress = Callable[[dict[str, Any]], None]


class Driver:
    """One mounted account. ``environment`` is what runs get to see beyond the usual."""

    def __init__(
        self, settings: Settings, cache: Cache, dfs: Client, environment: Environment
    ) -> None:
        self._settings = settings
        self._cache = cache
        self._dfs = dfs
        self._parts = Parts(settings, cache, dfs, environment)
        self._ending = False
        self._asked_to_end = trio.Event()
        self._patience: trio.CancelScope | None = None  # of what the end waits for just now
        self._haste = 0  # how often it was asked to wait no more before it waited
        self._runs_left = False

    async def serve(self, ready: Callable[[], None], progress: Progress) -> list[str]:
        """Mount, call ``ready`` when the mount answers, and serve until unmounted or signalled.

        Returns the paths of what could not be uploaded. ``progress`` gets ``status()`` while the
        end is waited for. Raises MountError, LoginRefused, or Unreachable when there is no cache to
        serve from either.
        """
        await self._check_account()
        async with trio.open_nursery() as nursery:
            await self._parts.run(nursery)
            await nursery.start(self._watch_signals)
            self._mount()
            try:
                attachment = Attachment(self._settings.mountpoint, self._parts.open_inos)
                await self._serve_mounted(attachment, ready)
            finally:
                self._parts.mounted = False
                pyfuse3.close(unmount=False)
            left = await self._finish(progress)
            nursery.cancel_scope.cancel()
        return left

    async def _check_account(self) -> None:
        try:
            await self._dfs.login()
        except (Unreachable, NoSuchUser) as error:
            # Of a user whose data it cannot read a server says that there is none, and what is cached
            # may be the last copy.
            root = self._cache.store.get(ROOT)
            if root is None or not root.listed_s:
                raise
            log.warning(
                "the server does not answer, or not well; serving from the cache: %s", error
            )
            self._parts.engine.went_offline()

    def _mount(self) -> None:
        options = set(pyfuse3.default_options) | {
            *("fsname=cpodfs", "subtype=cpodfs", "default_permissions", "nosuid", "nodev"),
        }
        if self._settings.allow_other:
            options.add("allow_other")
        path = self._settings.mountpoint
        try:
            with fuse.overheard() as said:
                pyfuse3.init(self._parts.operations, str(path), options)
        except RuntimeError as error:
            reason = "; ".join(line.removeprefix("fusermount3: ") for line in said) or str(error)
            trouble = fuse.trouble(allow_other=self._settings.allow_other)
            hint = trouble or "in a container, SYS_ADMIN may be missing: --cap-add SYS_ADMIN"
            raise MountError(f"{path}: {reason}; {hint}") from error
        for line in said:
            log.warning("FUSE: %s", line)
        self._parts.mounted = True

    async def _serve_mounted(self, attachment: Attachment, ready: Callable[[], None]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._start_up, nursery, ready)
            async with trio.open_nursery() as session:
                session.start_soon(self._detach, attachment, session)
                await pyfuse3.main(max_tasks=MAX_REQUESTS)
                session.cancel_scope.cancel()
            log.info("unmounted")
            self._ending = True
            sd_notify(STOPPING="1", STATUS="uploading what is pending")
            await self._end_runs()
            nursery.cancel_scope.cancel()

    async def _start_up(self, nursery: trio.Nursery, ready: Callable[[], None]) -> None:
        # A process of its own: our threads must not touch the mount, which this one serves.
        await trio.run_process(
            ["stat", "-f", "--", str(self._settings.mountpoint)],
            capture_stdout=True,
            # Ctrl-C is for us.
            start_new_session=True,
        )
        await self._parts.start_runs(nursery)
        sd_notify(READY="1", STATUS=f"{self._settings.mountpoint} is mounted")
        ready()

    async def _watch_signals(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """The first one ends the mount; each further one what its end waits for just then.

        From before the mount until after its end, without a gap: in one, a signal would kill us.
        """
        for each in SIGNALS:
            # What is restored afterwards: the exit code is still to be told.
            signal.signal(each, signal.SIG_IGN)
        with trio.open_signal_receiver(*SIGNALS) as signals:
            task_status.started()
            async for number in signals:
                log.info("signal %s", signal.Signals(number).name)
                if not self._ending:
                    self._ending = True
                    self._asked_to_end.set()
                elif number == signal.SIGHUP:
                    pass  # a closed terminal is no reason for haste
                elif self._patience is not None:
                    self._patience.cancel()
                else:
                    self._haste += 1

    @contextmanager
    def _patiently(self) -> Iterator[trio.CancelScope]:
        """What is in here is left when somebody is in a hurry."""
        with trio.CancelScope() as scope:
            self._patience = scope
            if self._haste:
                self._haste -= 1
                scope.cancel()
            try:
                yield scope
            finally:
                self._patience = None

    async def _end_runs(self) -> None:
        """When somebody is in a hurry they end without us, and the next mount records it."""
        runs = self._parts.runs
        if not runs.pods():
            await runs.cancel_all()  # so that none begins
        elif not self._runs_left:
            with self._patiently() as scope:
                await runs.cancel_all()
            self._runs_left = scope.cancelled_caught

    async def _detach(self, attachment: Attachment, session: trio.Nursery) -> None:
        """When asked to: end the runs, then the mount; one that is in use is detached all the same.

        So, too, when the mount is gone while its session lives on, but then whoever still has a file
        open in it, here and not in another namespace, may go on until it is closed.
        """
        await _first(self._asked_to_end.wait, attachment.gone)
        log.info("unmounting")
        sd_notify(STOPPING="1", STATUS="unmounting")
        await self._end_runs()
        await _first(self._asked_to_end.wait, attachment.unheld)
        await attachment.release()
        await trio.sleep(DETACH_S)
        session.cancel_scope.cancel()  # somebody's request waits for the server

    async def _finish(self, progress: Progress) -> list[str]:
        """Upload what is pending; a signal gives up at once. Returns the paths of what is left."""
        with self._patiently():
            await self._upload(progress)
        progress(self._parts.status())
        remaining = self._left_over()
        report = {"time": time.time(), "pid": os.getpid(), "left": remaining}
        with suppress(OSError):  # a full disk must not keep us from ending well
            (self._cache.folder / "last-unmount.json").write_text(json.dumps(report))
        return [entry["path"] for entry in remaining]

    async def _upload(self, progress: Progress) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._report, progress)
            with trio.move_on_after(min(self._settings.timeout_s, self._parts.stall_s)):
                await self._parts.lister.stop()
            await drain(self._parts.engine, self._parts.stall_s)
            nursery.cancel_scope.cancel()

    async def _report(self, progress: Progress) -> None:
        while True:
            status = self._parts.status()
            progress(status)
            sd_notify(STATUS=f"uploading: {status['pending'] + status['deletions']} changes left")
            await trio.sleep(0.5)

    def _left_over(self) -> list[dict[str, Any]]:
        return [
            {"path": one.path, "error": one.reason}
            for one in left(self._parts.engine, self._cache.store, LEFT_OVER_NAMES)
        ]


async def _first(*waits: Callable[[], Awaitable[object]]) -> None:
    """Wait for the first of them."""
    async with trio.open_nursery() as nursery:

        async def wait(one: Callable[[], Awaitable[object]]) -> None:
            await one()
            nursery.cancel_scope.cancel()

        for one in waits:
            nursery.start_soon(wait, one)


async def run(
    settings: Settings,
    password: Callable[[], str],
    environment: Environment,
    *,
    ready: Callable[[], None] = lambda: None,
    progress: Progress = lambda status: None,
    notice: Callable[[str], None] = lambda text: None,
) -> list[str]:
    """Mount an account and serve it to the end; see ``Driver.serve``. ``notice`` gets what the user
    must be told of the cache.

    What it raises may come in an ExceptionGroup, as all that passes through a nursery.
    """
    timeouts = Timeouts(metadata_s=settings.timeout_s)
    with opened(settings.cache_dir) as cache:
        for text in cache.notices:
            log.warning("cache: %s", text)
            notice(text)
        session = Session(settings.server, settings.user, password, timeouts=timeouts)
        async with session:
            driver = Driver(settings, cache, Client(session), environment)
            return await driver.serve(ready, progress)
