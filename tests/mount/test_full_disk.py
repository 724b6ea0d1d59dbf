"""A disk on which not a byte is free, because somebody else has taken what the cache keeps for its
journal: nobody who only reads notices, and what is pending waits."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mount.harness import Server, mounted
from tests.patience import until

FILES = 20
OFTEN = 1500
"""More opens than a journal has room for that was never full."""


@contextmanager
def full(disk: Path) -> Iterator[None]:
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, pytest.raises(OSError) as caught:  # noqa: PT012
        while True:
            file.write(bytes(4096))
    assert caught.value.errno == errno.ENOSPC
    yield
    ballast.unlink()


def test_reading_needs_no_room(tmp_path: Path, own_server: Server, small_disk: Path) -> None:
    quick = ("--attr-ttl", "0.1", "--writeback-delay", "0.1")
    with mounted(tmp_path, own_server, None, *quick) as mount:
        pod = mount.pod()
        (pod / "folder").mkdir()
        names = [f"f{number}" for number in range(FILES)]
        for name in names:
            (pod / "folder" / name).write_text(name)
        os.setxattr(pod / "folder" / "f0", "user.mark", b"seen")
        (pod / "empty").touch()
        mount.sync()
        mount.remount()
        with full(small_disk):
            for number in range(OFTEN):
                name = names[number % FILES]
                path = pod / "folder" / name
                with path.open() as file:
                    assert file.read() == name
                assert path.stat().st_size == len(name)
            assert sorted(os.listdir(pod / "folder")) == sorted(names)
            assert os.getxattr(pod / "folder" / "f0", "user.mark") == b"seen"
            assert (pod / "empty").read_text() == ""
            assert not (pod / "folder" / "absent").exists()
            assert not (mount.point / "absent").exists()
            assert "pending" in mount.cli("status", str(mount.point), "--json").stdout
            assert os.statvfs(mount.point).f_bavail >= 0
            with pytest.raises(OSError) as caught:
                (pod / "new").write_text("text")
            assert caught.value.errno == errno.ENOSPC
        (pod / "new").write_text("text")
        mount.sync()
        assert "Traceback" not in mount.logged()


def test_what_is_pending_waits_for_room(
    tmp_path: Path, own_server: Server, small_disk: Path
) -> None:
    with mounted(tmp_path, own_server, None, "--writeback-delay", "3600") as mount:
        pod = mount.pod()
        mount.sync()
        for number in range(FILES):
            (pod / f"f{number}").write_text(str(number))
        with (pod / "open").open("w") as file:
            file.write("written")
            os.fsync(file.fileno())
            with full(small_disk):
                os.setxattr(mount.point, "user.cpodfs.drain", b"1")
                until(lambda: "disk is full" in mount.logged())
                for number in range(OFTEN):
                    assert (pod / f"f{number % FILES}").read_text() == str(number % FILES)
        mount.sync()
        assert "Traceback" not in mount.logged()
        assert mount.stop() == 0, mount.said
        for cache in small_disk.iterdir():
            shutil.rmtree(cache)
        mount.start()
        assert (pod / "open").read_text() == "written"
        assert [(pod / f"f{number}").read_text() for number in range(FILES)] == list(
            map(str, range(FILES))
        )
