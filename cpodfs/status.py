"""What a mount is doing, as one report: what ``cpodfs status`` shows and ``umount`` waits by.

Imports the cache, sync, the DFS session and runs; mount.py makes one. The report is asked for several
times a second while somebody waits, on the event loop, and must fit into one extended attribute:
nothing here may walk the tree, and lists have limits.
"""

from __future__ import annotations

import json
import os
from typing import Any

from cpodfs import __version__
from cpodfs.cache.claims import unclaimed
from cpodfs.cache.folder import Cache
from cpodfs.cache.schema import ROOT
from cpodfs.config import Settings
from cpodfs.dfs import Session
from cpodfs.runs.manager import RunManager
from cpodfs.sync.downloads import Downloads
from cpodfs.sync.engine import Engine
from cpodfs.sync.left import left
from cpodfs.sync.missing import Missing

MAX_BYTES = 60_000
"""The kernel takes 64 KiB for one attribute."""
LISTED = 50
ERRORS = 5
LISTS = (
    *("uploads", "downloads", "failed", "left", "pods", "recent_errors", "runs", "alarms"),
    "doubtful",
)


class Status:
    """``report()`` gathers what the parts of the driver know."""

    def __init__(
        self,
        settings: Settings,
        cache: Cache,
        session: Session,
        engine: Engine,
        downloads: Downloads,
        runs: RunManager,
        missing: Missing,
    ) -> None:
        self._settings = settings
        self._cache = cache
        self._session = session
        self._engine = engine
        self._downloads = downloads
        self._runs = runs
        self._missing = missing

    def report(self) -> dict[str, Any]:
        """Sizes in bytes. ``not_in_swarm``: what FairOS has, and Swarm is not known to have. Lists are
        cut when the whole would not fit into one attribute; the counts beside them are not."""
        report = {
            **self._mount(),
            **self._cache.store.totals(),
            **self._traffic(),
            "cache_use": self._cache_use(),
            "not_in_swarm": self._cache.store.unswarmed_totals(),
            "reads": self._reads(),
            "runs": self._runs.pods(),
            **self._pods(),
            **self._doubts(),
        }
        return _cut(report)

    def _mount(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "pid": os.getpid(),
            "mountpoint": str(self._settings.mountpoint),
            "server": self._settings.server,
            "user": self._settings.user,
            "cache": str(self._cache.folder),
            "offline": self._engine.offline,
        }

    def _traffic(self) -> dict[str, Any]:
        store, stats, counters = self._cache.store, self._session.stats, self._engine.counters
        found = left(self._engine, store, LISTED)
        return {
            "uploads": [self._upload(*one) for one in self._engine.uploading().items()],
            "storing": self._engine.is_being_stored(),
            "downloads": [
                {"path": store.path(d.ino), "received": d.available, "size": d.size}
                for d in self._downloads.running()[:LISTED]
            ],
            "failed": [{"path": one.path, "error": one.reason} for one in found if one.failed],
            "left": [{"path": one.path, "reason": one.reason} for one in found],
            "errors": store.totals()["errors"] + len(self._engine.failures),
            "recent_errors": list(counters.recent)[-ERRORS:],
            "done": counters.done,
            "bytes_sent": counters.bytes_sent,
            "calls": sum(stats.calls.values()),
            "calls_per_s": round(stats.calls_per_s(), 1),
        }

    def _upload(self, ino: int, moved: tuple[int, int]) -> dict[str, Any]:
        inode = self._cache.store.get(ino)
        sent, size = moved
        return {
            "path": self._cache.store.path(ino),
            "sent": sent,
            "size": size,
            "error": None if inode is None else inode.error,
        }

    def _cache_use(self) -> dict[str, int]:
        store = self._cache.store
        return {
            "clean": store.cached_bytes(),
            "dirty": store.totals()["bytes"],
            "limit": self._settings.cache_size,
            "unclaimed": unclaimed(self._cache.content)[1],
        }

    def _reads(self) -> dict[str, Any]:
        """Opens for reading since the mount: how many found the content here."""
        hits, misses = self._downloads.hits, self._downloads.misses
        rate = round(hits / (hits + misses), 3) if hits + misses else None
        return {"hits": hits, "misses": misses, "hit_rate": rate}

    def _pods(self) -> dict[str, Any]:
        store = self._cache.store
        pods = store.children(ROOT)
        running = set(self._runs.pods())
        shown = []
        for pod in pods[:LISTED]:
            remote = store.remote_of(pod.ino)
            shown.append(
                {
                    "name": pod.name,
                    "received": bool(remote is not None and remote.readonly),
                    "running": pod.name in running,
                }
            )
        root = store.get(ROOT)
        listed = root is not None and bool(root.listed_s)
        return {"pods": shown, "pod_count": len(pods), "pods_listed": listed}

    def _doubts(self) -> dict[str, Any]:
        """What the server does not show any more, and where that is so much that only the user can
        say whether it was deleted. ``since`` in Unix time."""
        store, alarms = self._cache.store, self._missing.alarms
        return {
            "alarms": [
                {
                    "path": "/".join(store.remote_path(rid)),
                    "missing": folder.missing,
                    "known": folder.known,
                }
                for rid, folder in list(alarms.items())[:LISTED]
            ],
            "doubtful": [
                {"path": store.path(r.ino), "since": r.absent_s}
                for r in store.doubtful(limit=LISTED)
                if r.ino is not None
            ],
            "doubtful_count": store.doubtful_count(),
            "deletions_doubtful": store.ghost_count(),
        }


def _cut(report: dict[str, Any]) -> dict[str, Any]:
    """The longest list first, halved until all fits."""
    while len(json.dumps(report)) > MAX_BYTES:
        longest = max(LISTS, key=lambda name: len(json.dumps(report[name])))
        if not report[longest]:
            break
        report[longest] = report[longest][: len(report[longest]) // 2]
    return report
