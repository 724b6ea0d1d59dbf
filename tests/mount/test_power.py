"""After a loss of power: what was closed or synced is there, and the server's good copies are safe.

Each test makes the disk lose what it may lose at the worst moment; ``test_cycles`` is the bench.
"""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cpodfs.cache.schema import FILE, ROOT
from cpodfs.cache.store import Store
from tests.bench.power import Result, power, start_writeback
from tests.mount.disk import Disk
from tests.mount.harness import Mount, Server, mounted, run
from tests.mount.proxy import Line
from tests.mount.world import Api
from tests.patience import until

SOON = ("--writeback-delay", "0.02", "--attr-ttl", "3600")
SMALL = ("--cache-size", "100000")
OLD = bytes(range(1, 201)) * 300
"""60,000 bytes, none of them zero."""


def data_file(mount: Mount, path: Path) -> Path:
    ino = path.stat().st_ino
    return next(mount.cache.iterdir()) / "content" / f"{ino & 0xFF:02x}" / str(ino)


def lose_power(disk: Disk, mount: Mount) -> None:
    """And mount again when it is back."""
    disk.cut(1, 0)
    mount.kill()
    disk.power_on()
    mount.start()


def upload(mount: Mount) -> None:
    """All of it; and the journal on the disk says so."""
    mount.sync()
    pod = os.open(mount.pod(), os.O_RDONLY)
    os.fsync(pod)
    os.close(pod)


def commit_names(disk: Disk) -> None:
    """What a journal of the file system does every few seconds: names and sizes get to the disk, and
    contents that were not synced do not."""
    fd = os.open(disk.point / "other", os.O_WRONLY | os.O_CREAT)
    try:
        os.write(fd, b"other")
        os.fsync(fd)
    finally:
        os.close(fd)
        (disk.point / "other").unlink()


def settled(mount: Mount, server: Server) -> dict[str, bytes | None]:
    """What is in the pod after all is uploaded; the server has the same, and nothing was kept twice."""
    mount.sync()
    status = mount.status()
    assert (status["pending"], status["deletions"], status["errors"]) == (0, 0, 0)
    pod = mount.pod()
    shown = {
        str(path.relative_to(pod)): None if path.is_dir() else path.read_bytes()
        for path in sorted(pod.rglob("*"))
    }
    api = Api(server, mount)
    stored = {
        path: None if size is None else api.read("pod", path)
        for path, size in api.sizes("pod").items()
    }
    assert shown == stored
    assert not any("conflict" in path or "moving" in path for path in shown), list(shown)
    return shown


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Somebody reads the file for the time of the block, or until the mount dies."""

    def read() -> None:
        with contextlib.suppress(OSError):
            path.read_bytes()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield
    finally:
        reader.join()


def test_what_was_evicted_and_is_fetched_again_is_never_zeros(
    tmp_path: Path, own_server: Server, disk: Disk
) -> None:
    line = Line(own_server)
    with mounted(tmp_path, line, None, *SOON, *SMALL) as mount:
        pod = mount.pod()
        (pod / "f").write_bytes(OLD)
        upload(mount)
        data = data_file(mount, pod / "f")
        (pod / "g").write_bytes(OLD)
        upload(mount)
        until(lambda: not data.exists())
        line.hold(20_000)
        with reading(pod / "f"):
            until(lambda: mount.status()["downloads"])
            commit_names(disk)
            disk.cut(1, 0)
            mount.kill()
        line.release()
        disk.power_on()
        mount.start()
        assert (pod / "f").read_bytes() == OLD
        with (pod / "f").open("ab") as file:
            file.write(b"more")
        assert settled(mount, own_server) == {"f": OLD + b"more", "g": OLD}


def test_an_upload_that_was_done_does_not_come_back_without_its_bytes(
    tmp_path: Path, own_server: Server, disk: Disk
) -> None:
    """The file is evicted as soon as it is uploaded: nothing that came after made the journal tell."""
    with mounted(tmp_path, own_server, None, *SOON, *SMALL) as mount:
        pod = mount.pod()
        large = OLD * 2
        (pod / "f").write_bytes(large)
        data = data_file(mount, pod / "f")
        until(lambda: not data.exists())
        commit_names(disk)
        lose_power(disk, mount)
        assert (pod / "f").read_bytes() == large
        assert settled(mount, own_server) == {"f": large}


@pytest.mark.parametrize("survive", [0, 100])
def test_a_file_emptied_and_held_open_is_not_taken_for_the_servers(
    tmp_path: Path, own_server: Server, disk: Disk, survive: int
) -> None:
    with mounted(tmp_path, own_server, None, *SOON) as mount:
        pod = mount.pod()
        (pod / "f").write_bytes(OLD)
        upload(mount)
        fd = os.open(pod / "f", os.O_WRONLY | os.O_TRUNC)
        try:
            commit_names(disk)
            disk.cut(1, survive)
            mount.kill()
        finally:
            with contextlib.suppress(OSError):
                os.close(fd)
        disk.power_on()
        mount.start()
        found = (pod / "f").read_bytes()
        assert found in (OLD, b"")
        assert settled(mount, own_server) == {"f": found}


def test_an_append_that_was_not_closed_leaves_no_tail_behind_later_ones(
    tmp_path: Path, own_server: Server, disk: Disk
) -> None:
    with mounted(tmp_path, own_server, None, *SOON) as mount:
        pod = mount.pod()
        (pod / "f").write_bytes(b"acknowledged\n")
        upload(mount)
        fd = os.open(pod / "f", os.O_WRONLY | os.O_APPEND)
        try:
            os.write(fd, b"never acknowledged, and long\n")
            start_writeback(fd)  # so the driver has it
            data = data_file(mount, pod / "f")
            until(lambda: data.stat().st_size > 13)
            with data.open("rb") as file:
                os.fsync(file.fileno())
            disk.cut(1, 0)
            mount.kill()
        finally:
            with contextlib.suppress(OSError):
                os.close(fd)
        disk.power_on()
        mount.start()
        found = (pod / "f").read_bytes()
        assert found.startswith(b"acknowledged\n")
        with (pod / "f").open("ab") as file:
            file.write(b"later\n")
        assert settled(mount, own_server) == {"f": found + b"later\n"}


def _rename(pod: Path) -> None:
    (pod / "f").rename(pod / "g")


def _rename_directory(pod: Path) -> None:
    (pod / "d").rename(pod / "h")


def _upload(pod: Path) -> None:
    (pod / "f").write_bytes(OLD[::-1])


def _new(pod: Path) -> None:
    (pod / "new").mkdir()
    (pod / "new" / "n").write_bytes(OLD)


def _delete(pod: Path) -> None:
    (pod / "f").unlink()
    (pod / "d/e/x").unlink()
    (pod / "d/e").rmdir()


@pytest.mark.parametrize("change", [_rename, _rename_directory, _upload, _new, _delete])
def test_the_server_knows_nothing_that_the_disk_forgets(
    tmp_path: Path, own_server: Server, disk: Disk, change: Callable[[Path], None]
) -> None:
    with mounted(tmp_path, own_server, None, *SOON) as mount:
        pod = mount.pod()
        (pod / "d/e").mkdir(parents=True)
        for name in ("f", "d/y", "d/e/x"):
            (pod / name).write_bytes(OLD)
        before = settled(mount, own_server)
        upload(mount)
        change(pod)
        until(lambda: mount.status()["pending"] + mount.status()["deletions"] == 0)
        wanted = {
            str(path.relative_to(pod)): None if path.is_dir() else path.read_bytes()
            for path in pod.rglob("*")
        }
        assert wanted != before
        lose_power(disk, mount)
        assert settled(mount, own_server) == wanted, "the server had it already"


@pytest.mark.parametrize("size", [0, 1000, 90_000])
def test_fsync_after_a_truncation_by_path_is_durable(
    tmp_path: Path, own_server: Server, disk: Disk, size: int
) -> None:
    with mounted(tmp_path, own_server, None, "--writeback-delay", "3600") as mount:
        pod = mount.pod()
        (pod / "clean").write_bytes(OLD)
        mount.sync()
        (pod / "dirty").write_bytes(OLD)
        for name in ("clean", "dirty"):
            os.truncate(pod / name, size)
            fd = os.open(pod / name, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
        lose_power(disk, mount)
        wanted = OLD[:size].ljust(size, b"\0")
        assert (pod / "clean").read_bytes() == wanted
        assert (pod / "dirty").read_bytes() == wanted
        assert settled(mount, own_server) == {"clean": wanted, "dirty": wanted}


def test_the_first_file_of_a_new_cache_is_durable(
    tmp_path: Path, own_server: Server, disk: Disk
) -> None:
    with mounted(tmp_path, own_server, None, "--writeback-delay", "3600") as mount:
        (mount.pod() / "f").write_bytes(OLD)
        lose_power(disk, mount)
        assert settled(mount, own_server) == {"f": OLD}


def check_sync_fails(disk: Disk, fd: int) -> None:
    """Also when the disk is well again: the kernel has told of it then."""
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            os.fsync(fd)
        disk.refuse("")


def test_what_the_disk_could_not_keep_is_neither_acknowledged_nor_uploaded(
    tmp_path: Path, own_server: Server, disk: Disk
) -> None:
    """The kernel tells once of bytes that it could not write, and then forgets them."""
    with mounted(tmp_path, own_server, None, *SOON) as mount:
        pod = mount.pod()
        (pod / "f").write_bytes(OLD)
        upload(mount)
        fd = os.open(pod / "f", os.O_WRONLY)
        disk.refuse("unlucky")
        os.write(fd, b"unlucky" * 1000)
        check_sync_fails(disk, fd)
        os.write(fd, b"more")
        with pytest.raises(OSError, match="Input/output error"):
            os.close(fd)
        until(lambda: list(pod.glob("f (damaged *)")))
        (failed,) = mount.status()["failed"]
        assert "could not keep what was written" in failed["error"]
        assert (pod / "f").read_bytes() == OLD, "the server's, shown beside what is left"
        (damaged,) = pod.glob("f (damaged *)")
        (pod / "f").write_bytes(OLD[::-1])
        run("cp", damaged, pod / "g")  # who reads it is not told that it failed
        lose_power(disk, mount)
        damaged.unlink()
        assert settled(mount, own_server).keys() == {"f", "g"}
        assert (pod / "f").read_bytes() == OLD[::-1]


def test_a_journal_that_the_disk_could_not_keep_promises_nothing_more(
    tmp_path: Path, own_server: Server, disk: Disk
) -> None:
    with mounted(tmp_path, own_server, None, *SOON) as mount:
        pod = mount.pod()
        (pod / "f").write_bytes(OLD)
        upload(mount)
        disk.refuse("unlucky")
        (pod / "unlucky").mkdir()
        fd = os.open(pod, os.O_RDONLY)
        check_sync_fails(disk, fd)
        os.close(fd)
        until(lambda: mount.status()["failed"])
        assert "mounted anew" in mount.status()["failed"][0]["error"]
        assert Api(own_server, mount).sizes("pod") == {"f": len(OLD)}
        mount.kill()
        mount.start(warned=True)
        assert settled(mount, own_server) == {"f": OLD, "unlucky": None}


def test_a_journal_that_could_not_be_moved_promises_nothing_more(disk: Disk) -> None:
    store = Store(disk.point / "meta.db")
    disk.refuse("unlucky")
    store.create(ROOT, "unlucky", FILE, 0o600)
    with pytest.raises(sqlite3.OperationalError, match="disk I/O error"):
        store.checkpoint()
    disk.refuse("")
    with pytest.raises(OSError, match="could not keep the journal"):
        store.sync()
    assert not store.checkpoint(), "it may not be what it was"
    store.close()
    assert (disk.point / "meta.db-wal").stat().st_size, "nor when it is closed"


def test_a_new_file_that_the_disk_could_not_keep_can_be_written_anew(
    tmp_path: Path, own_server: Server, disk: Disk
) -> None:
    """Also with the first attempt still open, whose descriptor has the error yet to tell."""
    with mounted(tmp_path, own_server, None, *SOON) as mount:
        pod = mount.pod()
        disk.refuse("unlucky")
        fd = os.open(pod / "f", os.O_RDWR | os.O_CREAT)
        os.write(fd, b"unlucky" * 1000)
        start_writeback(fd)
        until(lambda: mount.status()["failed"])  # the upload has found it out
        disk.refuse("")
        (pod / "f").write_bytes(b"anew")
        os.close(fd)
        assert settled(mount, own_server) == {"f": b"anew"}


def test_a_damaged_file_stays_damaged_when_it_is_mounted_anew(
    tmp_path: Path, own_server: Server, disk: Disk
) -> None:
    with mounted(tmp_path, own_server, None, *SOON) as mount:
        pod = mount.pod()
        fd = os.open(pod / "f", os.O_RDWR | os.O_CREAT)
        disk.refuse("unlucky")
        os.write(fd, b"unlucky" * 1000)
        with pytest.raises(OSError, match="Input/output error"):
            os.fsync(fd)
        disk.refuse("")
        lose_power(disk, mount)
        with contextlib.suppress(OSError):
            os.close(fd)
        fd = os.open(pod / "f", os.O_WRONLY)
        os.write(fd, b"more")
        with pytest.raises(OSError, match="Input/output error"):
            os.close(fd)
        assert Api(own_server, mount).sizes("pod") == {}
        (pod / "f").unlink()
        assert settled(mount, own_server) == {}


@pytest.mark.usefixtures("loop_devices")
def test_cycles(tmp_path: Path) -> None:
    seed = int(os.environ.get("CPODFS_TEST_SEED", random.randrange(1 << 30)))
    print("seed", seed)
    found: list[str] = []
    power(tmp_path, 12, seed, result=Result(found.append))
    assert not found, "\n".join(found)
