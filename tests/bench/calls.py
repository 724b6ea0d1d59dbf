"""What everyday work costs in calls: ``python -m tests.bench.calls``.

Counted by the development server itself (GET /devnet/stats), from the first system call until all
is uploaded; sizes are those of the requests' and answers' bodies. Nothing is timed, so a busy
machine does not matter. A cold cache was wiped; a warm one is that of the mount before, whose
driver has ended.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.bench.report import machine, table
from tests.mount.harness import Mount, Server, mounted, run, sh

MIB = 1 << 20
SAVES = 20
DIRS, FILES = 20, 50
ORIGIN = (
    "git init -q -b main . && for d in $(seq 25); do mkdir d$d; for f in $(seq 20); do"
    " echo $d $f > d$d/f$f; done; done; git add . &&"
    " git -c user.name=t -c user.email=t commit -qm all"
)
SHORT = {
    "POST /v1/file/upload": "upload",
    "GET /v1/file/download": "download",
    "GET /v1/dir/ls": "dir/ls",
    "POST /v1/dir/mkdir": "mkdir",
    "GET /v1/file/stat": "stat",
    "GET /v1/file/status": "file/status",
    "POST /v1/file/chmod": "chmod",
    "POST /v1/pod/open": "pod/open",
    "GET /v1/pod/ls": "pod/ls",
    "POST /v2/user/login": "login",
}


class Count:
    """The rows of the table: what was done, and what the server saw of it."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.rows: list[tuple[str, ...]] = []

    @contextlib.contextmanager
    def of(self, what: str) -> Iterator[None]:
        self._server.reset_calls()
        yield
        seen = {
            SHORT.get(name, name): totals
            for name, totals in self._server.stats()["endpoints"].items()
            if "/devnet/" not in name
        }
        by_count = sorted(seen.items(), key=lambda one: -one[1]["count"])
        detail = ", ".join(f"{totals['count']} {name}" for name, totals in by_count) or "none"
        row = (
            str(sum(t["count"] for t in seen.values())),
            _size(sum(t["bytes_in"] for t in seen.values())),
            _size(sum(t["bytes_out"] for t in seen.values())),
        )
        self.rows.append((what, *row, detail))


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"


def _clone(mount: Mount, count: Count, scratch: Path) -> None:
    origin = scratch / "origin"
    origin.mkdir()
    sh(ORIGIN, origin)
    pod = mount.pod("clone")
    mount.sync()
    with count.of("git clone, 500 files"):
        run("git", "clone", "-q", "--no-local", origin, pod / "clone")
        mount.sync()


def _save(file: Path, version: int) -> None:
    """As an editor saves: beside the file, to the disk, then over it."""
    draft = file.with_name(f".{file.name}.tmp")
    with draft.open("wb") as out:
        out.write(bytes([version]) * MIB)
        out.flush()
        os.fsync(out.fileno())
    draft.replace(file)


def _editor(mount: Mount, count: Count) -> None:
    pod = mount.pod("editor")
    _save(pod / "text", 255)
    mount.sync()
    with count.of(f"{SAVES} saves of 1 MiB, in a row"):
        for version in range(SAVES):
            _save(pod / "text", version)
        mount.sync()
    with count.of(f"{SAVES} saves of 1 MiB, each uploaded"):
        for version in range(SAVES):
            _save(pod / "text", version)
            mount.sync()


def _copy(mount: Mount, count: Count, scratch: Path) -> None:
    source = scratch / "source"
    for d in range(DIRS):
        (source / f"d{d}").mkdir(parents=True)
        for f in range(FILES):
            (source / f"d{d}" / f"f{f}").write_text(f"{d} {f}\n" * 100)
    pod = mount.pod("copy")
    mount.sync()
    with count.of("cp -r, 1,000 files in 20 directories"):
        run("cp", "-r", source, pod / "tree")
        mount.sync()


def _again(mount: Mount, *, wipe: bool) -> None:
    """Mount anew, and wait for the calls of the start: they belong to no command."""
    mount.remount(wipe=wipe)
    os.listdir(mount.point)


def _reading(mount: Mount, count: Count) -> None:
    tree = mount.point / "copy/tree"
    listing, search = ["ls", "-lR", tree], ["grep", "-r", "19 49", tree]
    _again(mount, wipe=True)
    with count.of("ls -lR of it, cold"):
        run(*listing)
    _again(mount, wipe=False)
    with count.of("ls -lR of it, warm"):
        run(*listing)
    mount.options = ["--attr-ttl", "0.5"]
    _again(mount, wipe=False)
    time.sleep(0.5)
    with count.of("ls -lR of it, warm, listings out of date"):
        run(*listing)
        time.sleep(2)  # the listings are renewed behind the command's back
    mount.options = []
    _again(mount, wipe=True)
    with count.of("grep -r in it, cold"):
        run(*search)
    _again(mount, wipe=False)
    with count.of("grep -r in it, warm"):
        run(*search)


def main() -> None:
    """Print the table."""
    print(f"{machine()}\n")
    with tempfile.TemporaryDirectory(prefix="cpodfs-calls-") as name:
        scratch = Path(name)
        server = Server(scratch / "devnet", "--no-market")
        try:
            with mounted(scratch, server) as mount:
                count = Count(server)
                _clone(mount, count, scratch)
                _editor(mount, count)
                _copy(mount, count, scratch)
                _reading(mount, count)
        finally:
            server.stop()
    print(table(("work", "calls", "sent", "received", "which"), count.rows, text=(0, 4)))


if __name__ == "__main__":
    main()
