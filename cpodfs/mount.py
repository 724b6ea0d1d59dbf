"""The driver: puts the parts together, serves the mount, and takes it down without losing a byte.

Imports everything below the CLI. Order at the end: no new runs, running ones cancelled; the mount
detached (which makes the kernel hand over its dirty pages); what is pending uploaded; only then the
process ends. Whatever could not be uploaded stays journalled and is sent by the next mount.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import pyfuse3
import trio

from cpodfs import fuse, mountpoint
from cpodfs.cache.folder import Cache, opened
from cpodfs.cache.schema import ROOT
from cpodfs.config import Settings
from cpodfs.dfs import Client, Session, Timeouts
from cpodfs.errors import LoginRefused, MountError, Unreachable
from cpodfs.fs.control import Attributes, RunFiles
from cpodfs.fs.files import Files
from cpodfs.fs.guard import Guard
from cpodfs.fs.handles import Handles
from cpodfs.fs.operations import Operations
from cpodfs.fs.requests import Requests
from cpodfs.fs.tree import Tree
from cpodfs.notify import sd_notify
from cpodfs.paths import RUN_NAME
from cpodfs.runs.manager import RunManager
from cpodfs.runs.trust import TrustBook, trust_file
from cpodfs.status import Status
from cpodfs.sync.downloads import Downloads
from cpodfs.sync.engine import Engine, Limits
from cpodfs.sync.eviction import Evictor
from cpodfs.sync.lister import Lister
from cpodfs.sync.locks import DirLocks
from cpodfs.sync.merge import Merger, Outcome

log = logging.getLogger(__name__)

KERNEL_TIMEOUT_S = 10.0
MAX_REQUESTS = 500
"""Requests served at once. Readers that wait for the network must not keep others out."""
DETACH_S = 5.0
MIN_FRESH_S = 2.0
"""A listing younger than this is not asked for again before a write, whatever --attr-ttl says."""
LEFT_OVER_NAMES = 1000
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

Environment = Callable[[], Mapping[str, str]]
Progress = Callable[[dict[str, Any]], None]


class Driver:
    """One mounted account. ``environment`` is what runs get to see beyond the usual."""

    def __init__(
        self, settings: Settings, cache: Cache, dfs: Client, environment: Environment
    ) -> None:
        self._settings = settings
        self._cache = cache
        self._dfs = dfs
        self._mounted = False
        self._stall_s = settings.stall_s
        self._ending = False
        self._asked_to_end = trio.Event()
        self._patience = trio.CancelScope()  # of what the end waits for just now
        store = cache.store
        handles = Handles(store, cache.content)
        merger = Merger(store, handles.discard)
        locks = DirLocks(store)
        self.lister = Lister(
            *(store, dfs, merger, locks),
            ttl_s=settings.attr_ttl_s,
            parallel=settings.changes,
            patience_s=settings.timeout_s,
            on_outcome=self._on_outcome,
        )
        self.engine = Engine(
            *(store, cache.content, dfs, self.lister, merger, locks),
            delay_s=settings.writeback_delay_s,
            fresh_s=max(settings.attr_ttl_s, MIN_FRESH_S),
            limits=Limits(settings.uploads, settings.changes),
            on_outcome=self._on_outcome,
        )
        self.downloads = Downloads(
            *(store, cache.content, dfs),
            parallel=settings.downloads,
            patience_s=settings.timeout_s,
        )
        self.runs = RunManager(
            *(cache.folder / "runs", settings.mountpoint),
            environment=environment,
            on_end=self._on_run_end,
            cancel_grace_s=settings.run_grace_s,
            keep=settings.keep_runs,
        )
        files = Files(
            *(store, cache.content, handles, self.engine, self.lister, self.downloads),
            *(merger, self._on_outcome),
        )
        self.files = files
        tree = Tree(store, handles, self.engine, self.lister, files)
        self.lister.on_answer = self.engine.answered
        self.engine.is_read = self.downloads.is_read
        self._status = Status(
            *(settings, cache, dfs.session, self.engine, self.downloads, self.runs)
        )
        guard = Guard(tree, TrustBook(trust_file(cache.folder)), settings.sandbox)
        self._run_files = run_files = RunFiles(tree, self.runs, guard)
        merger.on_taken = lambda pod: run_files.not_ours([pod])
        attributes = Attributes(tree, run_files)
        requests = Requests(tree, run_files, guard, dfs, self._refresh_pods)
        attributes.ask, attributes.answer = requests.ask, requests.answer
        attributes.reports = {b"status": self.status}
        attributes.commands = {
            b"drain": self._command_drain,
            b"refresh": self._command_refresh,
            b"runs": self._command_runs,
            b"stall": self._command_stall,
        }
        self.evictor = Evictor(
            *(store, cache.content),
            size=settings.cache_size,
            is_open=lambda ino: handles.opened(ino) is not None,
        )
        self.evictor.on_shortage = files.sweep_now
        cache.content.make_room = self.evictor.make_room
        self.engine.on_clean = self.downloads.on_complete = self.evictor.poke
        self._operations = Operations(
            *(tree, run_files, attributes),
            fsync_remote=settings.fsync_remote,
            timeout_s=min(KERNEL_TIMEOUT_S, settings.attr_ttl_s),
        )

    # -- life -------------------------------------------------------------------------------------

    async def serve(self, ready: Callable[[], None], progress: Progress) -> list[str]:
        """Mount, call ``ready`` when the mount answers, and serve until unmounted or signalled.

        Returns the paths of what could not be uploaded. ``progress`` gets ``status()`` while the
        end is waited for. Raises MountError, LoginRefused, or Unreachable when there is no cache to
        serve from either.
        """
        await self._check_account()
        async with trio.open_nursery() as nursery:
            await nursery.start(self.lister.run)
            await nursery.start(self.downloads.run)
            await nursery.start(self.evictor.run)
            await nursery.start(self.files.run)
            await nursery.start(self.engine.run)
            await nursery.start(self._watch_signals)
            self._mount()
            try:
                await self._serve_mounted(ready)
            finally:
                self._mounted = False
                pyfuse3.close(unmount=False)
            left = await self._finish(progress)
            nursery.cancel_scope.cancel()
        return left

    async def _check_account(self) -> None:
        try:
            await self._dfs.login()
        except LoginRefused:
            raise
        except Unreachable as error:
            root = self._cache.store.get(ROOT)
            if root is None or not root.listed_s:
                raise
            log.warning("the server does not answer; serving from the cache: %s", error)
            self.engine.went_offline()

    def _mount(self) -> None:
        options = set(pyfuse3.default_options) | {
            *("fsname=cpodfs", "subtype=cpodfs", "default_permissions", "nosuid", "nodev"),
        }
        if self._settings.allow_other:
            options.add("allow_other")
        try:
            pyfuse3.init(self._operations, str(self._settings.mountpoint), options)
        except RuntimeError as error:
            raise MountError(
                f"{self._settings.mountpoint}: cannot mount: "
                f"{fuse.why_not(allow_other=self._settings.allow_other)}"
            ) from error
        self._mounted = True

    async def _serve_mounted(self, ready: Callable[[], None]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._detach)
            nursery.start_soon(self._start_up, nursery, ready)
            await pyfuse3.main(max_tasks=MAX_REQUESTS)
            log.info("unmounted")
            self._ending = True
            sd_notify(STOPPING="1", STATUS="uploading what is pending")
            await self._end_runs()
            nursery.cancel_scope.cancel()

    async def _start_up(self, nursery: trio.Nursery, ready: Callable[[], None]) -> None:
        # A process of its own: our threads must not touch the mount, which this one serves.
        await trio.run_process(
            ["stat", "-f", "--", str(self._settings.mountpoint)], capture_stdout=True
        )
        await nursery.start(self.runs.run)
        sd_notify(READY="1", STATUS=f"{self._settings.mountpoint} is mounted")
        ready()

    async def _watch_signals(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """The first one ends the mount; each further one what its end waits for just then.

        From before the mount until after its end, without a gap: in one, a signal would kill us.
        """
        with trio.open_signal_receiver(*SIGNALS) as signals:
            task_status.started()
            async for number in signals:
                log.info("signal %s", signal.Signals(number).name)
                if not self._ending:
                    self._ending = True
                    self._asked_to_end.set()
                elif number != signal.SIGHUP:  # a closed terminal is no reason for haste
                    self._patience.cancel()

    async def _end_runs(self) -> None:
        """When somebody is in a hurry they end without us, and the next mount records it."""
        if not self._patience.cancel_called:
            with trio.CancelScope() as self._patience:
                await self.runs.cancel_all()

    async def _detach(self) -> None:
        """When asked to: end the runs, then the mount; one that is in use is detached all the same."""
        await self._asked_to_end.wait()
        log.info("unmounting")
        sd_notify(STOPPING="1", STATUS="unmounting")
        await self._end_runs()
        path = self._settings.mountpoint
        try:
            await trio.to_thread.run_sync(mountpoint.unmount, path)
        except MountError:
            # Whoever is still inside keeps it alive: take their dirty pages, then leave.
            with suppress(Exception), trio.move_on_after(DETACH_S):
                await trio.run_process(["sync", "-f", str(path)], check=False)
            with suppress(MountError):
                await trio.to_thread.run_sync(lambda: mountpoint.unmount(path, lazy=True))
            await trio.sleep(0.1)
            pyfuse3.terminate()

    async def _finish(self, progress: Progress) -> list[str]:
        """Upload what is pending; a signal gives up at once. Returns the paths of what is left."""
        async with trio.open_nursery() as nursery:
            self._patience = nursery.cancel_scope
            nursery.start_soon(self._report, progress)
            with trio.move_on_after(min(self._settings.timeout_s, self._stall_s)):
                await self.lister.stop()
            await self.engine.drain(self._stall_s)
            nursery.cancel_scope.cancel()
        progress(self.status())
        left = self._left_over()
        report = {"time": time.time(), "pid": os.getpid(), "left": left}
        with suppress(OSError):  # a full disk must not keep us from ending well
            (self._cache.folder / "last-unmount.json").write_text(json.dumps(report))
        return [entry["path"] for entry in left]

    async def _report(self, progress: Progress) -> None:
        while True:
            status = self.status()
            progress(status)
            sd_notify(STATUS=f"uploading: {status['pending'] + status['deletions']} changes left")
            await trio.sleep(0.5)

    def _left_over(self) -> list[dict[str, Any]]:
        store = self._cache.store
        left: list[dict[str, Any]] = [
            {"path": store.path(inode.ino), "error": inode.error}
            for inode in store.pending_inodes(limit=LEFT_OVER_NAMES)
        ]
        for rid in store.orphans()[:LEFT_OVER_NAMES]:
            left.append({"path": "/".join(store.remote_path(rid)), "error": "not yet deleted"})
        return left

    # -- news between the parts -------------------------------------------------------------------

    def _on_outcome(self, outcome: Outcome) -> None:
        for item in outcome.work:
            self.engine.touch(item)
        # Deleted or made elsewhere, under a name that may have been our own.
        self._run_files.not_ours(c.name for c in outcome.changes if c.parent == ROOT)
        if not self._mounted:
            return
        for change in outcome.changes:
            if change.appeared and not self._operations.absences.believed(
                change.parent, change.name
            ):
                continue
            pyfuse3.invalidate_entry_async(
                pyfuse3.InodeT(change.parent), os.fsencode(change.name), ignore_enoent=True
            )

    def _on_run_end(self, pod: str) -> None:
        """Tell the kernel that ``.run`` is gone: who watches it with inotify hears of it."""
        inode = self._cache.store.child(ROOT, pod)
        if inode is not None and self._mounted:
            pyfuse3.invalidate_entry_async(
                pyfuse3.InodeT(inode.ino),
                RUN_NAME.encode(),
                pyfuse3.InodeT(self._run_files.ino(inode.ino)),
                ignore_enoent=True,
            )

    # -- what users ask through attributes of the root --------------------------------------------

    def status(self) -> dict[str, Any]:
        """What ``cpodfs status`` shows."""
        return self._status.report()

    async def _command_drain(self, _ino: int, value: bytes) -> None:
        if value == b"0":
            self.engine.relax()
        else:
            self.engine.hurry()

    async def _command_runs(self, _ino: int, value: bytes) -> None:
        """ "0": end all runs and begin no other; "1": runs may begin again."""
        if value == b"0":
            await self.runs.cancel_all()
        else:
            self.runs.reopen()

    async def _command_stall(self, _ino: int, value: bytes) -> None:
        """How long the end may go on without progress, in seconds; empty: as when mounted."""
        try:
            self._stall_s = max(0.0, float(value)) if value else self._settings.stall_s
        except ValueError:
            raise OSError(errno.EINVAL, "stall") from None

    async def _refresh_pods(self) -> None:
        await self.lister.refresh_from_others(ROOT)

    async def _command_refresh(self, ino: int, _value: bytes) -> None:
        inode = self._cache.store.get(ino)
        if inode is not None and not inode.is_dir:
            ino = inode.parent or ROOT
        await self.lister.refresh_from_others(ino)


async def run(
    settings: Settings,
    password: Callable[[], str],
    environment: Environment,
    *,
    ready: Callable[[], None] = lambda: None,
    progress: Progress = lambda status: None,
) -> list[str]:
    """Mount an account and serve it to the end; see ``Driver.serve``.

    What it raises may come in an ExceptionGroup, as all that passes through a nursery.
    """
    timeouts = Timeouts(metadata_s=settings.timeout_s)
    with opened(settings.cache_dir) as cache:
        session = Session(settings.server, settings.user, password, timeouts=timeouts)
        async with session:
            driver = Driver(settings, cache, Client(session), environment)
            return await driver.serve(ready, progress)
