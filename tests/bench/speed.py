"""Disk, cpodfs and rclone mount side by side: ``python -m tests.bench.speed [ROUNDS]``.

Medians of five rounds; in each round every measure is taken on each target in turn, so that a busy
machine hits all alike: the ratios say more than the rates. Uploads are put off (both mounts), so it
is the way to the local disk that is measured. A close of cpodfs is durable (data and name synced);
one of the disk's or of rclone's is not, hence the lines "+ fsync". rclone (a local remote,
``--vfs-cache-mode full``) is left out when it is not installed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.bench.report import machine, table
from tests.mount.harness import Server, mounted

ROUNDS = 5
BLOCKS = 64
MIB = 1 << 20
FILES = 200
WRITES = 20_000
LISTINGS = 20
READY_S = 10.0
BLOCK = os.urandom(MIB)
KILOBYTE = os.urandom(1000)

Measure = Callable[[Path], float]


def _write(path: Path, *, sync: bool) -> float:
    with path.open("wb", buffering=0) as file:
        for _ in range(BLOCKS):
            file.write(BLOCK)
        if sync:
            os.fsync(file.fileno())
    return BLOCKS


def _create(folder: Path, *, sync: bool) -> float:
    folder.mkdir()
    for number in range(FILES):
        with (folder / f"f{number}").open("wb", buffering=0) as file:
            file.write(KILOBYTE)
            if sync:
                os.fsync(file.fileno())
    return FILES


def write(folder: Path) -> float:
    return _write(folder / "big", sync=False)


def write_synced(folder: Path) -> float:
    return _write(folder / "synced", sync=True)


def read(folder: Path) -> float:
    with (folder / "big").open("rb", buffering=0) as file:
        while file.read(MIB):
            pass
    return BLOCKS


def create(folder: Path) -> float:
    return _create(folder / "many", sync=False)


def create_synced(folder: Path) -> float:
    return _create(folder / "many-synced", sync=True)


def read_small(folder: Path) -> float:
    for number in range(FILES):
        (folder / f"many/f{number}").read_bytes()
    return FILES


def stat(folder: Path) -> float:
    for number in range(FILES):
        os.stat(folder / f"many/f{number}")
    return FILES


def stat_absent(folder: Path) -> float:
    for number in range(FILES):
        (folder / f"many/none{number}").exists()
    return FILES


def readdir(folder: Path) -> float:
    for _ in range(LISTINGS):
        assert len(os.listdir(folder / "many")) == FILES
    return LISTINGS * FILES


def unlink(folder: Path) -> float:
    for number in range(FILES):
        (folder / f"many/f{number}").unlink()
    return FILES


def write_small(folder: Path) -> float:
    with (folder / "log").open("wb", buffering=0) as file:
        for _ in range(WRITES):
            file.write(KILOBYTE[:100])
    return WRITES


MEASURES: tuple[tuple[str, Measure], ...] = (
    ("write 1 MiB blocks, MiB/s", write),
    ("write 1 MiB blocks + fsync, MiB/s", write_synced),
    ("read 1 MiB blocks, warm, MiB/s", read),
    ("create 1 kB files, /s", create),
    ("create 1 kB files + fsync, /s", create_synced),
    ("open and read 1 kB, /s", read_small),
    ("stat, /s", stat),
    ("stat of what is not there, /s", stat_absent),
    ("readdir, entries/s", readdir),
    ("unlink, /s", unlink),
    ("write 100 bytes, /s", write_small),
)


@contextlib.contextmanager
def _rclone(scratch: Path) -> Iterator[Path]:
    point, remote = scratch / "rclone", scratch / "remote"
    point.mkdir()
    remote.mkdir()
    command = [
        *("rclone", "mount", str(remote), str(point), "--vfs-cache-mode", "full"),
        *("--vfs-write-back", "1h", "--cache-dir", str(scratch / "rclone-cache")),
        *("--config", "/dev/null", "--log-level", "ERROR"),
    ]
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + READY_S
        while not point.is_mount():
            assert time.monotonic() < deadline, "rclone did not mount"
            time.sleep(0.05)
        yield point
    finally:
        subprocess.run(["fusermount3", "-uz", str(point)], check=False)
        process.terminate()
        process.wait()


def _rounds(targets: dict[str, Path], rounds: int) -> dict[tuple[str, str], float]:
    """Medians of rates by (measure, target)."""
    rates: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds):
        for target in targets.values():
            (target / f"round{number}").mkdir()
        for name, measure in MEASURES:
            for label, target in targets.items():
                started = time.perf_counter()
                done = measure(target / f"round{number}")
                took = time.perf_counter() - started
                rates.setdefault((name, label), []).append(done / took)
    return {key: statistics.median(values) for key, values in rates.items()}


def _rate(value: float) -> str:
    return f"{value:,.0f}"


def _rows(medians: dict[tuple[str, str], float], labels: list[str]) -> list[tuple[str, ...]]:
    rows = []
    for name, _ in MEASURES:
        one = {label: medians[name, label] for label in labels}
        row = [name, *(_rate(one[label]) for label in labels), f"{one['cpodfs'] / one['disk']:.2f}"]
        if "rclone" in one:
            row.append(f"{one['cpodfs'] / one['rclone']:.2f}")
        rows.append(tuple(row))
    return rows


def main(rounds: int = ROUNDS) -> None:
    """Print the table."""
    print(f"{machine()}; medians of {rounds}\n")
    with (
        tempfile.TemporaryDirectory(prefix="cpodfs-speed-") as name,
        contextlib.ExitStack() as all_,
    ):
        scratch = Path(name)
        disk = scratch / "disk"
        disk.mkdir()
        server = Server(scratch / "devnet", "--no-market")
        all_.callback(server.stop)
        mount = all_.enter_context(mounted(scratch, server, None, "--writeback-delay", "3600"))
        targets = {"disk": disk, "cpodfs": mount.pod()}
        if shutil.which("rclone"):
            targets["rclone"] = all_.enter_context(_rclone(scratch))
        medians = _rounds(targets, rounds)
        mount.kill()  # nothing of this need be uploaded
    labels = list(targets)
    ratios = [f"cpodfs/{label}" for label in labels if label != "cpodfs"]
    print(table(("measure", *labels, *ratios), _rows(medians, labels)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
