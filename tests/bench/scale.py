"""Many files: ``python -m tests.bench.scale [FILES [PENDING]]``, by default 100,000 and 20,000.

Start-up and memory (RSS of the driver) with so many files known in the cache, and with so many
waiting for a server that is gone. The cache is filled in one transaction while nothing is mounted,
as listings or writes would have left it; the server never hears of these files.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cpodfs.cache.folder import Cache, opened
from cpodfs.cache.schema import CONTENT, DIR, FILE, PLACE, ROOT
from tests.bench.report import machine, table
from tests.mount.harness import Mount, Server, mounted

FILES, PENDING = 100_000, 20_000
PER_DIRECTORY = 1000
STARTS = 3
SETTLE_S = 3.0
CALM = ("--attr-ttl", "1000000", "--writeback-delay", "0.1", "--timeout", "2", "--stall", "1")


def rss_mib(mount: Mount) -> float:
    status = Path(f"/proc/{mount.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def _filled(mount: Mount, fill: Callable[[Cache, int, int], None]) -> None:
    """Change the cache of a mount that is not running: ``fill(cache, pod inode, pod rid)``."""
    with opened(next(mount.cache.iterdir())) as cache:
        pod = cache.store.child(ROOT, "pod")
        assert pod is not None
        remote = cache.store.remote_of(pod.ino)
        assert remote is not None
        with cache.store.transaction():
            fill(cache, pod.ino, remote.rid)


def known(count: int) -> Callable[[Cache, int, int], None]:
    """So many files that the server has, in directories that were listed."""

    def fill(cache: Cache, pod: int, pod_rid: int) -> None:
        store, now = cache.store, time.time()
        for start in range(0, count, PER_DIRECTORY):
            name = f"d{start}"
            parent = store.create(pod, name, DIR, 0o700).ino
            store.set(parent, listed_s=now)
            rid = store.add_remote(
                *(pod_rid, name, DIR), size=0, mtime_s=int(now), mode=0o700, ino=parent
            )
            for number in range(start, min(start + PER_DIRECTORY, count)):
                file = store.create(parent, f"file{number}", FILE, 0o600, size=1000)
                store.add_remote(
                    *(rid, f"file{number}", FILE),
                    size=1000,
                    mtime_s=int(now),
                    mode=0o600,
                    ino=file.ino,
                )

    return fill


def pending(count: int) -> Callable[[Cache, int, int], None]:
    """So many new files of which the server has not heard."""

    def fill(cache: Cache, pod: int, pod_rid: int) -> None:
        parent = cache.store.create(pod, "pending", DIR, 0o700, dirty=PLACE).ino
        cache.store.set(parent, listed_s=time.time())
        for number in range(count):
            file = cache.store.create(
                *(parent, f"new{number}", FILE, 0o600), size=4, cached=1, dirty=CONTENT | PLACE
            )
            Path(cache.content.path(file.ino)).write_bytes(b"data")

    return fill


def _start_s(mount: Mount) -> float:
    started = time.perf_counter()
    mount.start()
    return time.perf_counter() - started


def _starts(mount: Mount) -> float:
    """The median of some start-ups; it is mounted afterwards."""
    took = []
    for _ in range(STARTS):
        if mount.process is not None:
            mount.stop()
        took.append(_start_s(mount))
    return statistics.median(took)


class Bench:
    """One mount whose driver's memory is looked at after each step."""

    def __init__(self, mount: Mount) -> None:
        self._mount = mount
        self.rows: list[tuple[str, ...]] = []
        self._first = 0.0
        self._usual_s: dict[str, float] = {}

    def _row(self, what: str, files: int, took: float, note: str) -> None:
        rss = rss_mib(self._mount)
        self._first = self._first or rss
        each = f"{(rss - self._first) * 1024 * 1024 / files:,.0f}" if files else ""
        self.rows.append((what, f"{took:.2f}", f"{rss:.0f}", each, note))

    def empty(self, how: str) -> None:
        """The start-up that others are compared with."""
        self._usual_s[how] = _starts(self._mount)
        self._row(f"mounted {how}, nothing in it", 0, self._usual_s[how], "")

    def start(self, what: str, files: int, how: str) -> None:
        took = _starts(self._mount)
        ratio = f"{took / self._usual_s[how]:.2f} × the start with nothing in it"
        self._row(f"mounted {how}, {what}", files, took, ratio)

    def step(self, what: str, files: int, act: Callable[[], str]) -> None:
        started = time.perf_counter()
        note = act()
        self._row(what, files, time.perf_counter() - started, note)


def _shell(script: str, mount: Mount) -> Callable[[], str]:
    def act() -> str:
        done = subprocess.run(
            ["sh", "-c", script], cwd=mount.point, capture_output=True, text=True, check=True
        )
        return f"prints {done.stdout.strip()}"

    return act


def _settled(mount: Mount) -> Callable[[], str]:
    def act() -> str:
        time.sleep(SETTLE_S)
        status = mount.status()
        return f"{status['pending']} pending, offline: {status['offline']}"

    return act


def _drained(mount: Mount, server: Server) -> Callable[[], str]:
    def act() -> str:
        server.start_again()
        mount.cli("sync", str(mount.point), "--stall", "60")
        return f"{mount.status()['done']} calls"

    return act


def main(files: int = FILES, waiting: int = PENDING) -> None:
    """Print the table."""
    print(f"{machine()}\n")
    with tempfile.TemporaryDirectory(prefix="cpodfs-scale-") as name:
        scratch = Path(name)
        server = Server(scratch / "devnet", "--no-market")
        try:
            with mounted(scratch, server, None, *CALM) as mount:
                mount.pod()
                mount.sync()
                bench = Bench(mount)
                bench.empty("online")
                server.stop()
                bench.empty("offline")
                server.start_again()
                _known(bench, mount, files)
                _pending(bench, mount, server, files, waiting)
                mount.kill()
        finally:
            server.stop()
    print(table(("step", "seconds", "RSS, MiB", "B/file", ""), bench.rows, text=(0, 4)))


def _known(bench: Bench, mount: Mount, files: int) -> None:
    mount.stop()
    _filled(mount, known(files))
    bench.start(f"{files:,} files known", files, "online")
    bench.step("find | wc -l", files, _shell("find . | wc -l", mount))
    bench.step("ls -lR | wc -l", files, _shell("ls -lR | wc -l", mount))
    bench.step("ls -lR | wc -l, again", files, _shell("ls -lR | wc -l", mount))


def _pending(bench: Bench, mount: Mount, server: Server, files: int, waiting: int) -> None:
    mount.stop()
    _filled(mount, pending(waiting))
    server.stop()
    bench.start(f"{waiting:,} more pending", files + waiting, "offline")
    bench.step(f"{SETTLE_S:.0f} s later", files + waiting, _settled(mount))
    bench.step("ls -l of one folder", files + waiting, _shell("ls -l pod/d0 | wc -l", mount))
    bench.step("server back, all uploaded", files + waiting, _drained(mount, server))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
