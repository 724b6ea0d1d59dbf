"""Commands and the driver where standard streams are closed (``2>&-``): cron, containers, init."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpodfs import mountpoint
from tests.mount.harness import CPODFS, Mount, Server
from tests.patience import PATIENCE_S, until

CLOSED = ["2>&-", "<&- >&- 2>&-"]


def closed(argv: list[str], how: str, mount: Mount) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", f"{shlex.join(argv)} {how}"],
        capture_output=True,
        text=True,
        env=mount.env,
        timeout=PATIENCE_S,
    )


@pytest.fixture
def mount(tmp_path: Path, server: Server) -> Iterator[Mount]:
    """Not yet mounted."""
    mount = Mount(tmp_path, server)
    yield mount
    if mountpoint.find(mount.point) is not None:
        mountpoint.unmount(mount.point, lazy=True)


@pytest.mark.parametrize("how", CLOSED)
def test_a_daemon_and_the_commands(mount: Mount, how: str) -> None:
    assert closed([*mount.command(), "--daemon"], how, mount).returncode == 0
    driver = mount.status()["pid"]
    held = {os.readlink(f"/proc/{driver}/fd/{number}") for number in (0, 1, 2)}
    assert held == {"/dev/null"}
    (mount.pod("one") / "f").write_text("text")
    point = str(mount.point)
    for command in (
        ["status", point],
        ["sync", point],
        ["refresh", f"{point}/one"],
        ["runs", point],
    ):
        done = closed([*CPODFS, *command], how, mount)
        assert done.returncode == 0, command
    refused = closed([*CPODFS, "run", f"{point}/one"], how, mount)
    assert refused.returncode == 1, "what nobody reads is no other error"
    assert closed([*CPODFS, "umount", point], how, mount).returncode == 0
    assert mountpoint.find(mount.point) is None


def test_what_a_command_prints_is_printed_all_the_same(mount: Mount) -> None:
    assert closed([*CPODFS, "--version"], "2>&-", mount).stdout.startswith("cpodfs")


def test_the_driver_in_the_foreground(mount: Mount) -> None:
    with subprocess.Popen(
        ["sh", "-c", f"exec {shlex.join(mount.command())} <&- >&- 2>&-"], env=mount.env
    ) as driver:
        until(lambda: mountpoint.find(mount.point) is not None)
        (mount.pod("one") / "f").write_text("text")
        driver.terminate()
        assert driver.wait(PATIENCE_S) == 0
    assert mountpoint.find(mount.point) is None
    assert "Traceback" not in mount.logged()
