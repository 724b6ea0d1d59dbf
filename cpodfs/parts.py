"""The parts of a mount, made and connected: what each tells the others, the kernel and the user.

Imports everything below `mount`, which serves them. Nothing here waits; the parts' tasks are begun by
`Parts.run`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping

import pyfuse3
import trio

from cpodfs.cache.durability import Durability
from cpodfs.cache.folder import Cache
from cpodfs.cache.schema import ROOT
from cpodfs.config import Settings
from cpodfs.dfs import Client
from cpodfs.fs.control import Attributes, RunFiles
from cpodfs.fs.files import Files
from cpodfs.fs.guard import Guard
from cpodfs.fs.handles import Handles
from cpodfs.fs.operations import Operations
from cpodfs.fs.provenance import Provenance
from cpodfs.fs.requests import Requests
from cpodfs.fs.tree import Tree
from cpodfs.limits import raise_open_files
from cpodfs.paths import RUN_NAME
from cpodfs.runs.manager import RunManager
from cpodfs.runs.payment import Payments
from cpodfs.runs.trust import TrustBook, trust_file
from cpodfs.status import Status
from cpodfs.sync.downloads import Downloads
from cpodfs.sync.engine import Engine, Limits
from cpodfs.sync.eviction import Evictor
from cpodfs.sync.holds import Holds
from cpodfs.sync.inquiry import Inquiry
from cpodfs.sync.lister import Lister
from cpodfs.sync.locks import DirLocks
from cpodfs.sync.merge import Merger, Outcome
from cpodfs.sync.missing import Missing
from cpodfs.sync.swarm import SwarmWatch

KERNEL_TIMEOUT_S = 10.0
MIN_FRESH_S = 2.0
"""A listing younger than this is not asked for again before a write, whatever --attr-ttl says."""

Environment = Callable[[], Mapping[str, str]]


class Parts:
    """``mounted``: whether the kernel is to be told news. ``stall_s``: how long the end of the mount
    may go on without progress."""

    def __init__(
        self, settings: Settings, cache: Cache, dfs: Client, environment: Environment
    ) -> None:
        self.mounted = False
        self.stall_s = settings.stall_s
        self._settings = settings
        self._cache = cache
        self._handles = Handles(cache.store, cache.content, raise_open_files())
        self._holds = Holds(cache.store, cache.folder / "runs" / "held.json")
        self._make_sync(dfs)
        self.runs = RunManager(
            *(cache.folder / "runs", settings.mountpoint),
            environment=environment,
            on_end=self._on_run_end,
            on_over=self._on_run_over,
            cancel_grace_s=settings.run_grace_s,
            keep=settings.keep_runs,
        )
        self._payments = Payments(environment, network=settings.network, driver=settings.driver)
        self.status = Status(
            *(settings, cache, dfs.session, self.engine, self.downloads, self.runs, self.missing)
        ).report
        self._make_fs(dfs)
        self._connect()

    def _make_sync(self, dfs: Client) -> None:
        store, content, settings = self._cache.store, self._cache.content, self._settings
        self._durability = Durability(store, content)
        self._merger = Merger(store, content, self._handles.discard)
        locks = DirLocks(store)
        self.missing = Missing(store)
        self._inquiry = Inquiry(store, dfs, self._merger, locks, self.missing, self._on_outcome)
        self.lister = Lister(
            *(store, dfs, self._merger, locks, self.missing, self._inquiry),
            ttl_s=settings.attr_ttl_s,
            parallel=settings.changes,
            patience_s=settings.timeout_s,
            on_outcome=self._on_outcome,
            room=self._durability.room,
        )
        self.engine = Engine(
            *(store, self._durability, dfs, self.lister, self._merger, locks, self.missing),
            delay_s=settings.writeback_delay_s,
            fresh_s=max(settings.attr_ttl_s, MIN_FRESH_S),
            limits=Limits(settings.uploads, settings.changes),
            on_outcome=self._on_outcome,
        )
        self.downloads = Downloads(
            *(store, content, dfs),
            parallel=settings.downloads,
            patience_s=settings.timeout_s,
        )
        self._swarm = SwarmWatch(
            *(store, dfs),
            may_ask=lambda: not self.engine.offline and not self.engine.uploading(),
        )
        self._evictor = Evictor(
            *(store, content),
            size=settings.cache_size,
            is_used=lambda ino: self._handles.opened(ino) is not None or self._holds.covers(ino),
            names=self._durability.names,
        )

    def _make_fs(self, dfs: Client) -> None:
        store, settings = self._cache.store, self._settings
        self._files = Files(
            *(store, self._cache.content, self._handles, self.engine, self.lister),
            *(self.downloads, self._merger, self._durability, self._on_outcome),
        )
        tree = Tree(store, self._handles, self.engine, self.lister, self._files)
        book = TrustBook(trust_file(self._cache.folder))
        provenance = Provenance(store, self._holds.holding, self.runs.is_of_run)
        guard = self._guard = Guard(
            *(tree, book, self._holds, provenance, settings.sandbox),
            local_market=settings.local_market,
            unconfined=settings.unconfined,
        )
        self._run_files = RunFiles(tree, self.runs, guard, self._payments)
        attributes = Attributes(tree, self._run_files)
        requests = Requests(
            *(tree, self._run_files, guard, dfs, self._refresh_pods),
            forgotten=self._inquiry.believe_gone,
        )
        attributes.ask, attributes.answer = requests.ask, requests.answer
        attributes.reports = {b"status": self.status}
        attributes.commands = {
            b"drain": self._command_drain,
            b"refresh": self._command_refresh,
            b"runs": self._command_runs,
            b"stall": self._command_stall,
        }
        self.operations = Operations(
            *(tree, self._run_files, attributes, provenance),
            fsync_remote=settings.fsync_remote,
            timeout_s=min(KERNEL_TIMEOUT_S, settings.attr_ttl_s),
        )

    def _connect(self) -> None:
        """Where two parts know of each other, the lower one has a hook for the higher."""
        self.lister.on_answer = self.engine.answered
        self._merger.on_taken = lambda pod: self._run_files.not_ours([pod])
        self._merger.is_held = self.downloads.is_held = self._holds.is_held
        self.downloads.on_absent = self.missing.said_absent
        self.engine.is_read = self.downloads.is_read
        self.downloads.on_complete = self._swarm.on_pushed = self._evictor.poke
        self.engine.on_clean = self._uploaded
        self._evictor.on_shortage = self._files.sweep_now
        self._cache.content.make_room = self._evictor.make_room

    async def run(self, nursery: trio.Nursery) -> None:
        """Begin the tasks of all parts but of the runs, which need a mount that answers."""
        storing = (self._durability, self.downloads, self._evictor, self._swarm, self._files)
        for part in (self.lister, *storing, self.engine):
            await nursery.start(part.run)

    def open_inos(self) -> list[int]:
        """The files that anybody has open."""
        return self._handles.open_inos()

    async def start_runs(self, nursery: trio.Nursery) -> None:
        """Begin to serve runs, and find those that go on. The mount must answer."""
        await nursery.start(self.runs.run)
        self._holds.end_all_but(self.runs.pods())

    def _uploaded(self) -> None:
        self._swarm.poke()
        self._evictor.poke()

    # -- news between the parts -------------------------------------------------------------------

    def _on_outcome(self, outcome: Outcome) -> None:
        for item in outcome.work:
            self.engine.touch(item)
        # Deleted or made elsewhere, under a name that may have been our own.
        self._run_files.not_ours(c.name for c in outcome.changes if c.parent == ROOT)
        if not self.mounted:
            return
        for change in outcome.changes:
            if change.appeared and not self.operations.absences.believed(
                change.parent, change.name
            ):
                continue
            pyfuse3.invalidate_entry_async(
                pyfuse3.InodeT(change.parent), os.fsencode(change.name), ignore_enoent=True
            )

    async def _on_run_over(self, pod: str) -> None:
        await self._guard.settle(pod)

    def _on_run_end(self, pod: str) -> None:
        """Tell the kernel that ``.run`` is gone: who watches it with inotify hears of it. What the
        server has to say of the pod is heard again."""
        self._holds.end(pod)
        self.engine.retry()
        inode = self._cache.store.child(ROOT, pod)
        if inode is not None and self.mounted:
            pyfuse3.invalidate_entry_async(
                pyfuse3.InodeT(inode.ino),
                RUN_NAME.encode(),
                pyfuse3.InodeT(self._run_files.ino(inode.ino)),
                ignore_enoent=True,
            )

    # -- what users ask through attributes of the root --------------------------------------------

    async def _command_drain(self, _ino: int, value: bytes) -> None:
        if value == b"0":
            self.engine.relax()
        else:
            self.engine.hurry()
            self.missing.hurry()

    async def _command_runs(self, _ino: int, value: bytes) -> None:
        """ "0": end all runs and begin no other; "1": runs may begin again."""
        if value == b"0":
            await self.runs.cancel_all()
        else:
            self.runs.reopen()

    async def _command_stall(self, _ino: int, value: bytes) -> None:
        """How long the end may go on without progress, in seconds; empty: as when mounted."""
        try:
            self.stall_s = max(0.0, float(value)) if value else self._settings.stall_s
        except ValueError:
            raise OSError(errno.EINVAL, "stall") from None

    async def _refresh_pods(self) -> None:
        await self.lister.refresh_from_others(ROOT)

    async def _command_refresh(self, ino: int, value: bytes) -> None:
        """ "accept-deletions": what the server does not show there is deleted, the user says."""
        inode = self._cache.store.get(ino)
        if value == b"accept-deletions":
            await self.lister.accept_deletions(ino)
            return
        if inode is not None and not inode.is_dir:
            ino = inode.parent or ROOT
        await self.lister.refresh_from_others(ino)
