"""The end of a mount: refused before anything is lost by it, in the time that was asked for."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpodfs import mountpoint
from tests.mount.compute import (
    Gate,
    compute_pod,
    gated_pod,
    record,
    run_folders,
    run_processes,
    wait_gone,
)
from tests.mount.harness import CPODFS, Child, Mount, Server, mounted, sh
from tests.patience import PATIENCE_S, until


@pytest.fixture
def running(mount: Mount, gate: Gate) -> Iterator[Path]:
    """A pod whose run waits at the gate."""
    with gated_pod(mount, "running", gate) as pod:
        sh("touch .run", pod)
        assert gate.wait() == "waiting"
        yield pod


@pytest.mark.parametrize("how", ["folder", "file", "program"])
def test_a_busy_mount_keeps_its_runs(mount: Mount, running: Path, how: str) -> None:
    sh("cp /bin/sleep sleep", running)
    inside = subprocess.Popen(
        [running / "sleep" if how == "program" else "sleep", "1000"],
        cwd=running if how == "folder" else "/",
        stdin=(running / "a.recipe").open() if how == "file" else None,
    )
    try:
        until(lambda: Path(f"/proc/{inside.pid}/comm").read_text() == "sleep\n")
        done = mount.cli("umount", str(mount.point), check=False)
        assert done.returncode == 1
        assert f"{mount.point}: in use by sleep ({inside.pid})" in done.stderr
        assert "cancelling" not in done.stderr
        assert (running / ".run").exists()
    finally:
        inside.kill()
        inside.wait()
    mount.cli("umount", str(mount.point))
    assert mount.wait() == 0
    mount.start()
    (folder,) = run_folders(running)
    assert record(folder)["state"] == "cancelled"


def test_umount_from_inside(mount: Mount) -> None:
    done = sh(f"{shlex.join(CPODFS)} umount {mount.point} 2>&1 || true", mount.pod())
    assert f"{mount.point}: in use by sh" in done


def test_who_was_in_the_folder_before_the_mount_is_not_inside(
    tmp_path: Path, server: Server
) -> None:
    mount = Mount(tmp_path, server)
    with Child(["sleep", "1000"], cwd=mount.point) as before:
        try:
            mount.start()
            mount.pod()
            mount.cli("umount", str(mount.point))
            assert mount.wait() == 0
        finally:
            before.kill()


@pytest.mark.parametrize("fault", [{"error_rate": 1.0}, {"drop_rate": 1.0}])
def test_umount_gives_up_in_time(tmp_path: Path, own_server: Server, fault: dict) -> None:
    """With the driver's own patience it would take longer than any test waits."""
    with mounted(tmp_path, own_server, None, "--stall", str(10 * PATIENCE_S)) as mount:
        pod = mount.pod()
        mount.sync()
        own_server.faults(**fault)
        (pod / "one").write_text("1")
        (pod / "d").mkdir()
        started = time.monotonic()
        done = mount.cli("umount", str(mount.point), "--stall", "3", check=False)
        assert time.monotonic() - started < 30, "its own patience, when not told of another"
        assert done.returncode == 1
        assert "not uploaded: pod/one" in done.stderr
        assert mount.wait() == 1
        own_server.faults()
        mount.start()
        mount.remount(wipe=True)
        assert (pod / "one").read_text() == "1"


def test_an_umount_that_was_refused_leaves_the_patience_as_it_was(
    tmp_path: Path, own_server: Server
) -> None:
    with mounted(tmp_path, own_server, None, "--stall", "60") as mount:
        pod = mount.pod()
        mount.sync()
        with (pod / "file").open("w") as file:
            mount.cli("umount", str(mount.point), "--stall", "0", check=False)
            file.write("text")
        own_server.faults(error_rate=1.0, match="/v1/file/upload")
        assert mount.process is not None
        mount.process.send_signal(signal.SIGTERM)
        until(lambda: "writeback failed" in mount.logged())
        own_server.faults()
        assert mount.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_wait_for_runs_and_loses_nothing(
    tmp_path: Path, server: Server, number: signal.Signals
) -> None:
    with mounted(tmp_path, server, None, "--run-grace", str(10 * PATIENCE_S)) as mount:
        pod = compute_pod(mount, "stubborn", ["sh", "script/stubborn.sh"])
        (pod / "script/stubborn.sh").write_text(
            "trap '' INT TERM; echo begun; while :; do read -t 1000 x < /dev/zero; sleep 1; done\n"
        )
        mount.sync()
        sh("touch .run", pod)
        until(lambda: [f for f in run_folders(pod) if (f / "stdout.log").exists()])
        (pod / "pending").write_text("text")
        process = mount.process
        assert process is not None
        process.send_signal(number)
        until(lambda: "unmounting" in mount.logged())
        process.send_signal(signal.SIGHUP)  # a closed terminal is no reason for haste
        process.send_signal(number)
        assert mount.wait() == 0, mount.said
        assert mountpoint.find(mount.point) is None
        mount.start()
        assert (pod / "pending").read_text() == "text"
        assert mount.status()["pending"] == 0 or (pod / ".run").exists()
        (folder,) = run_folders(pod)
        for pid in run_processes(folder.name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_gone(pod)


def test_however_many_signals_what_is_left_is_named(tmp_path: Path, own_server: Server) -> None:
    with mounted(tmp_path, own_server, None, "--stall", "60") as mount:
        pod = mount.pod()
        mount.sync()
        own_server.faults(error_rate=1.0, match="/v1/file/upload")
        (pod / "one").write_text("1")
        assert mount.process is not None
        mount.process.send_signal(signal.SIGTERM)
        until(lambda: "unmounted" in mount.logged())
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
            mount.process.send_signal(number)
        assert mount.wait() == 1
        assert "not uploaded: pod/one" in mount.said
