"""The end of a mount that is not the only one of its kind: copies of it in other mount namespaces, as
containers make them, and other mounts at its path."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpodfs import mountpoint
from tests.mount.harness import CPODFS, Child, Mount, Server, mounted, run
from tests.patience import until

# An ordinary user may make a mount namespace in a user namespace only.
UNSHARE = ("unshare", "--mount", *(() if os.geteuid() == 0 else ("--map-root-user",)))
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount what it likes")


WHO = """import os, subprocess
print()
while True:
    try:
        print(eval(input()), flush=True)
    except OSError as error:
        print(error.strerror, flush=True)
"""


class Elsewhere(Child):
    """A process in a mount namespace of its own, with a copy of every mount."""

    def __init__(self) -> None:
        python = [*UNSHARE, sys.executable, "-u", "-c", WHO]
        super().__init__(python, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.says()

    def __exit__(self, *details: Any) -> None:
        self.kill()
        super().__exit__(*details)

    def does(self, expression: str) -> str:
        """What comes of it, or the error, as text."""
        assert self.stdin is not None
        self.stdin.write(expression + "\n")
        self.stdin.flush()
        return self.says()

    def says(self) -> str:
        assert self.stdout is not None
        return self.stdout.readline().rstrip("\n")

    def writes(self, path: Path, text: str) -> None:
        """Write to a file and keep it open: the bytes are in the kernel alone."""
        assert self.does(f"(fd := os.open({str(path)!r}, os.O_WRONLY))").isdecimal()
        assert self.does(f"os.write(fd, {text.encode()})") == str(len(text))


def umount(mount: Mount) -> None:
    mount.cli("umount", str(mount.point))


def fusermount(mount: Mount) -> None:
    run("fusermount3", "-u", mount.point)


def lazily(mount: Mount) -> None:
    run("fusermount3", "-uz", mount.point)


def sigterm(mount: Mount) -> None:
    os.kill(mount.pid, signal.SIGTERM)


def ctrl_c(mount: Mount) -> None:
    os.kill(mount.pid, signal.SIGINT)


FORCED = [fusermount, lazily, sigterm, ctrl_c]
WAYS = [umount, *FORCED]


@pytest.mark.parametrize("end", WAYS)
def test_a_copy_elsewhere_does_not_keep_the_driver(
    tmp_path: Path, server: Server, end: Callable[[Mount], None]
) -> None:
    with mounted(tmp_path, server, None, "--writeback-delay", "3600") as mount:
        pod = mount.pod()
        with Elsewhere():
            (pod / "file").write_text("text")
            end(mount)
            assert mount.wait() == 0, mount.said
            assert mountpoint.find(mount.point) is None
            mount.start()
            assert mount.status()["pending"] == 0
            assert (pod / "file").read_text() == "text"


@pytest.mark.parametrize("end", FORCED)
def test_who_has_a_file_open_in_a_copy_loses_the_mount_and_no_byte(
    tmp_path: Path, server: Server, end: Callable[[Mount], None]
) -> None:
    with mounted(tmp_path, server) as mount:
        pod = mount.pod()
        (pod / "file").touch()
        with Elsewhere() as inside:
            inside.writes(pod / "file", "written")
            end(mount)
            assert mount.wait() == 0, mount.said
            assert inside.does("os.write(fd, b'more') and os.fsync(fd)") == os.strerror(
                errno.ENOTCONN
            )
            mount.start()
            mount.remount(wipe=True)
            assert (pod / "file").read_text() == "written"


def test_umount_names_who_has_a_file_open_in_a_copy(mount: Mount) -> None:
    pod = mount.pod()
    (pod / "file").touch()
    with Elsewhere() as inside:
        inside.writes(pod / "file", "written")
        done = mount.cli("umount", str(mount.point), check=False)
        assert done.returncode == 1
        name = Path(f"/proc/{inside.pid}/comm").read_text().strip()
        assert f"in use by {name} ({inside.pid})" in done.stderr
        assert inside.does("os.close(fd)") == "None"
    assert (pod / "file").read_text() == "written"


def test_who_has_a_file_open_here_goes_on_after_a_lazy_unmount(
    tmp_path: Path, server: Server
) -> None:
    with mounted(tmp_path, server) as mount:
        pod = mount.pod()
        with Elsewhere(), (pod / "file").open("w") as file:
            file.write("one")
            file.flush()
            lazily(mount)
            until(lambda: "unmounting" in mount.logged())
            file.write(" and the other")
            file.close()
            assert mount.wait() == 0, mount.said
        mount.start()
        assert (pod / "file").read_text() == "one and the other"
        assert mount.status()["pending"] == 0


@needs_root
def test_the_next_mount_at_the_path_is_left_alone(tmp_path: Path, server: Server) -> None:
    with mounted(tmp_path, server) as mount:
        pod = mount.pod()
        with (pod / "file").open("w") as file:
            lazily(mount)
            run("mount", "-t", "tmpfs", "somebody's", mount.point)
            try:
                until(lambda: "unmounting" in mount.logged())
                file.write("text")
                assert mount.process is not None
                sigterm(mount)
                with contextlib.suppress(OSError):
                    file.close()
                assert mount.wait() == 0, mount.said
                entry = mountpoint.find(mount.point)
                assert entry is not None
                assert entry.source == "somebody's"
            finally:
                run("umount", mount.point)


@needs_root
@pytest.mark.parametrize("end", [umount, sigterm])
def test_a_mount_that_was_moved_over_another(
    tmp_path: Path, server: Server, end: Callable[[Mount], None]
) -> None:
    """The kernel lists the one below after the one above, as it is younger."""
    area = tmp_path / "area"
    area.mkdir()
    run("mount", "-t", "tmpfs", "area", area)
    run("mount", "--make-private", area)
    (area / "elsewhere").mkdir()
    try:
        with mounted(area, server) as mount:
            mount.pod()
            run("mount", "-t", "tmpfs", "below", area / "elsewhere")
            run("mount", "--move", mount.point, area / "elsewhere")
            mount.point = area / "elsewhere"
            assert mount.status()["pending"] >= 0
            end(mount)
            assert mount.wait() == 0, mount.said
            below = mountpoint.find(area / "elsewhere")
            assert below is not None
            assert below.source == "below"
    finally:
        run("umount", "-R", "-l", area)


@needs_root
def test_a_mount_under_another_ends_and_leaves_that(tmp_path: Path, server: Server) -> None:
    with mounted(tmp_path, server) as mount:
        mount.pod()
        run("mount", "-t", "tmpfs", "above", mount.point)
        try:
            sigterm(mount)
            assert mount.wait() == 0, mount.said
            entry = mountpoint.find(mount.point)
            assert entry is not None
            assert entry.source == "above"
        finally:
            run("umount", mount.point)


@needs_root
@pytest.mark.parametrize("end", [umount, sigterm])
def test_copies_in_the_own_namespace_go_with_the_mount(
    tmp_path: Path, server: Server, end: Callable[[Mount], None]
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    with mounted(tmp_path, server) as mount:
        mount.pod()
        run("mount", "--bind", mount.point, copy)
        try:
            end(mount)
            assert mount.wait() == 0, mount.said
            assert mountpoint.find(mount.point) is None
            assert mountpoint.find(copy) is None
        finally:
            run("umount", "-l", copy, check=False)


def test_a_copy_is_not_unmounted_in_place_of_the_mount(mount: Mount) -> None:
    """The driver would have ended its runs for nothing, and gone on without."""
    pod = mount.pod()
    with Elsewhere() as inside:
        umounting = [*CPODFS, "umount", str(mount.point)]
        said = inside.does(f"subprocess.run({umounting}, stderr=subprocess.PIPE)")
        assert "returncode=1" in said
        assert "another mount namespace" in said
    assert pod.is_dir()
