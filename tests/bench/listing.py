"""One long listing: ``python -m tests.bench.listing [ENTRIES …]``, by default 10^4, 10^5 and 10^6.

A server lists a directory with so many entries. While one process lists it, another goes on using
the mount: it looks for absent names and reads a cached file of another pod, neither of which the
kernel answers by itself. Told are the longest that it waited, beside how long it waits when nothing is
listed, and the driver's memory at its highest.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from tests.bench.report import machine, table
from tests.mount.harness import Mount, Server, mounted, peak_mib
from tests.mount.hostile import Answer, Hostile, Lie, listing

ENTRIES = (10_000, 100_000, 1_000_000)
CALM = ("--attr-ttl", "1000000", "--timeout", "600", "--stall", "600")
CACHED = "cached"
PACE_S = 0.02


class Neighbour:
    """Somebody else who uses the mount, and notes how long each call took, in seconds. In a process of
    its own: the one that plays the server is busy while it sends a long listing."""

    def __init__(self, pod: Path) -> None:
        self._pod = pod
        (pod / CACHED).write_text("content")
        self.stats: list[float] = []
        self.cats: list[float] = []

    def during(self, act: Callable[[], object]) -> float:
        """Work while somebody does something; returns how long that took, in seconds."""
        context = get_context("spawn")
        here, there = context.Pipe()
        worker = context.Process(target=_work, args=(self._pod, there))
        worker.start()
        here.recv()  # it has begun
        begun = time.perf_counter()
        try:
            act()
            return time.perf_counter() - begun
        finally:
            here.send("stop")
            self.stats, self.cats = here.recv()
            worker.join()


def _work(pod: Path, line: Connection) -> None:
    stats: list[float] = []
    cats: list[float] = []
    line.send("begun")
    while not line.poll(PACE_S):
        begun = time.perf_counter()
        (pod / f"absent{len(stats)}").exists()
        stats.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        (pod / CACHED).read_text()
        cats.append(time.perf_counter() - begun)
    line.send((stats, cats))


def _ms(waits: list[float]) -> tuple[str, str]:
    ordered = sorted(waits)
    return f"{ordered[len(ordered) * 99 // 100] * 1000:.1f}", f"{ordered[-1] * 1000:.1f}"


def _row(what: str, neighbour: Neighbour, took: float, mount: Mount) -> tuple[str, ...]:
    waits = *_ms(neighbour.stats), *_ms(neighbour.cats)
    row = (what, f"{took:.1f}", *waits, f"{peak_mib(mount.pid):.0f}")
    print(*row, sep="  ", file=sys.stderr)
    return row


def _count(folder: Path, size: int) -> Callable[[], None]:
    def act() -> None:
        script = f"ls -f {folder} | wc -l"
        done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
        assert int(done.stdout) == size, f"{done.stdout.strip()} names of {size}"

    return act


def _lies(sizes: dict[str, int]) -> Lie:
    """Pods that are called after how many entries they have; made before they are asked for."""
    bodies = {pod: listing(size) for pod, size in sizes.items()}

    def lie(request, truth) -> Answer:  # type: ignore[no-untyped-def]
        pod = request.query["podName"]
        return Answer(bodies[pod]) if pod in bodies else truth()

    return lie


def main(*sizes: int) -> None:
    """Print the table."""
    print(f"{machine()}\n")
    rows = []
    with tempfile.TemporaryDirectory(prefix="cpodfs-listing-") as name:
        server = Server(Path(name) / "devnet", "--no-market")
        hostile = Hostile(server)
        hostile.answer("GET /v1/dir/ls", _lies({f"pod{size}": size for size in sizes}))
        try:
            for size in sizes:
                rows += _one(Path(name) / str(size), hostile, size)
        finally:
            hostile.stop()
            server.stop()
    head = ("", "seconds", "stat p99", "worst, ms", "cat p99", "worst, ms", "peak RSS, MiB")
    print(table(head, rows))


def _one(folder: Path, hostile: Hostile, size: int) -> list[tuple[str, ...]]:
    """One size, with a driver of its own: memory does not come back."""
    folder.mkdir()
    rows = []
    with mounted(folder, hostile, None, *CALM) as mount:
        target = mount.pod(f"pod{size}")
        mount.sync()
        mount.remount(wipe=True)
        neighbour = Neighbour(mount.pod("other"))
        mount.sync()
        took = neighbour.during(lambda: time.sleep(5))
        rows.append(_row("nothing is listed", neighbour, took, mount))
        for what, act in (
            (f"first listing, {size:,}", _count(target, size)),
            ("ls again, from the cache", _count(target, size)),
            ("refresh, nothing new", lambda: mount.cli("refresh", str(target))),
        ):
            rows.append(_row(what, neighbour, neighbour.during(act), mount))
        mount.kill()
    return rows


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]) if len(sys.argv) > 1 else ENTRIES)
