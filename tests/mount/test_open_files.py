"""Limits of open files: how many a mount allows, and that what is open can be written and closed."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cpodfs import mountpoint
from tests.mount.compute import compute_pod, run_to_end, text
from tests.mount.harness import Mount, Server

SOFT = 100


class Limited(Mount):
    """Its driver is started with these limits of open files."""

    soft, hard = SOFT, 4000

    def command(self) -> list[str]:
        limits = f'ulimit -Sn {self.soft}; ulimit -Hn {self.hard}; exec "$@"'
        return ["sh", "-c", limits, "sh", *super().command()]


@pytest.fixture
def limited(tmp_path: Path, server: Server) -> Iterator[Limited]:
    mount = Limited(tmp_path, server)
    try:
        yield mount
    finally:
        if mount.process is not None:
            mount.kill()
        if mountpoint.find(mount.point) is not None:
            mountpoint.unmount(mount.point, lazy=True)


@pytest.fixture(autouse=True)
def _room() -> Iterator[None]:
    """This process, too, opens many."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_soft_limit_is_no_limit(limited: Limited) -> None:
    pod = limited.start().pod()
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context((pod / f"f{n}").open("w")) for n in range(3 * SOFT)]
        for number, file in enumerate(files):
            file.write(str(number))
    limited.sync()
    limited.remount(wipe=True)
    assert [(pod / f"f{n}").read_text() for n in range(3 * SOFT)] == list(map(str, range(3 * SOFT)))


def test_programs_get_the_soft_limit_that_the_driver_was_started_with(limited: Limited) -> None:
    limited.start()
    pod = compute_pod(limited, "limits", ["sh", "-c", "ulimit -Sn; ulimit -Hn"])
    log = run_to_end(pod)
    assert text(log / "stdout.log") == f"{SOFT}\n{limited.hard}\n"


def test_beyond_the_hard_limit_open_fails_and_nothing_else(limited: Limited) -> None:
    limited.hard = 300
    limited.options = ("--writeback-delay", "0.05", "--uploads", "16", "--downloads", "16")
    pod = limited.start().pod()
    for number in range(limited.hard):
        (pod / f"old{number}").write_text(f"old {number}")
    limited.sync()
    limited.remount(wipe=True)
    fds = _open_until_refused(pod)
    assert len(fds) > limited.hard / 3
    os.close(os.open(pod / "old0", os.O_RDONLY))  # is open already: costs nothing
    with ThreadPoolExecutor(64) as many:
        seen = list(many.map(_change, fds))
    assert seen == [f"old {number}".encode() for number in range(len(fds))]
    limited.sync()
    assert "Too many open files" not in limited.logged()
    limited.remount(wipe=True)
    for number in range(limited.hard):
        changed = "new" if number < len(fds) else "old"
        assert (pod / f"old{number}").read_text() == f"{changed} {number}"


def _open_until_refused(pod: Path) -> list[int]:
    """Descriptors of the files old0, old1 and so on, whose content is not here yet."""
    fds: list[int] = []
    with pytest.raises(OSError) as caught:  # noqa: PT012
        while True:
            fds.append(os.open(pod / f"old{len(fds)}", os.O_RDWR))
    assert caught.value.errno == errno.EMFILE
    return fds


def _change(fd: int) -> bytes:
    before = os.pread(fd, 100, 0)
    os.pwrite(fd, b"new", 0)
    os.fsync(fd)
    os.close(fd)
    return before
