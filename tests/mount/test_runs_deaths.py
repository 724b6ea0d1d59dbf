"""The driver, its supervisors or both die during a run: nothing is forgotten, nothing runs twice."""

from __future__ import annotations

import json
import os
import select
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpodfs.runs import state
from tests.mount.compute import (
    WAIT,
    DevnetMount,
    Gate,
    compute_pod,
    devnet_mounted,
    record,
    run_folders,
    run_processes,
    wait_gone,
)
from tests.mount.harness import run, sh
from tests.patience import PATIENCE_S, until


@pytest.fixture
def devnet(tmp_path: Path) -> Iterator[DevnetMount]:
    with devnet_mounted(tmp_path / "mount") as mount:
        yield mount


@pytest.fixture
def pod(devnet: DevnetMount, gate: Gate) -> Iterator[Path]:
    """A pod whose program waits at the gate; whatever of it is left in the end is killed."""
    yield compute_pod(devnet, "pod", ["python3", "script/gated.py", str(gate.folder)], "gated.py")
    for folder in (devnet.runs_folder / "pod").iterdir():
        for pid in run_processes(folder.name):
            os.kill(pid, signal.SIGKILL)


def started(pod: Path, gate: Gate) -> Path:
    """Touch; the run's log folder, once the program waits at the gate and has been logged."""
    run("touch", pod / ".run")
    assert gate.wait() == "waiting"
    (folder,) = run_folders(pod)
    log = folder / "stdout.log"
    until(lambda: log.exists() and log.read_text() == "one\n")
    return folder


def supervisor_of(devnet: DevnetMount, run_id: str) -> int:
    private = (state.read_record(devnet.runs_folder / "pod" / run_id) or {})["private"]
    pid: int = private["supervisor"]["pid"]
    return pid


def kill_and_wait(pid: int) -> None:
    fd = os.pidfd_open(pid)
    signal.pidfd_send_signal(fd, signal.SIGKILL)
    assert select.select([fd], [], [], PATIENCE_S)[0]
    os.close(fd)


def test_a_run_is_found_again_after_kill_9(devnet: DevnetMount, pod: Path, gate: Gate) -> None:
    folder = started(pod, gate)
    devnet.kill()
    assert len(run_processes(folder.name)) == 1
    devnet.start()
    assert (pod / ".run").exists()
    assert (
        "busy"
        in subprocess.run(["touch", pod / ".run"], capture_output=True, text=True).stderr.lower()
    )
    gate.open()
    sh(WAIT, pod)
    ended = record(folder)
    assert (ended["state"], ended["exit_code"]) == ("finished", 0)
    assert (folder / "stdout.log").read_text() == "one\ntwo\n"
    # Its working directory died with the mount, the paths in its environment lead to the new one.
    assert (pod / "output/partial").read_text() == "so far\nand more\n"
    assert gate.starts == 1
    gate.open()
    sh(f"touch .run; {WAIT}", pod)
    assert len(run_folders(pod)) == 2


def test_a_run_that_ends_without_a_driver(devnet: DevnetMount, pod: Path, gate: Gate) -> None:
    folder = started(pod, gate)
    devnet.kill()
    gate.open()
    until(lambda: run_processes(folder.name) == [])
    devnet.start()
    wait_gone(pod)
    until(lambda: record(folder)["state"] == "finished")
    assert (folder / "stdout.log").read_text() == "one\ntwo\n"
    assert "not connected" in (folder / "stderr.log").read_text()
    assert gate.starts == 1


def test_driver_and_supervisor_are_killed(devnet: DevnetMount, pod: Path, gate: Gate) -> None:
    folder = started(pod, gate)
    supervisor = supervisor_of(devnet, folder.name)
    devnet.kill()
    kill_and_wait(supervisor)
    devnet.start()
    assert not (pod / ".run").exists()
    until(lambda: folder.exists() and (folder / "run.json").exists())
    until(lambda: record(folder)["state"] == "lost")
    assert record(folder)["error"]
    assert run_processes(folder.name) == []
    assert gate.starts == 1


def test_a_supervisor_is_killed(devnet: DevnetMount, pod: Path, gate: Gate) -> None:
    folder = started(pod, gate)
    kill_and_wait(supervisor_of(devnet, folder.name))
    wait_gone(pod)
    assert record(folder)["state"] == "lost"
    assert (folder / "stdout.log").read_text() == "one\n"
    assert run_processes(folder.name) == []
    gate.open()
    sh(f"touch .run; {WAIT}", pod)
    assert [record(f)["state"] for f in run_folders(pod)] == ["lost", "finished"]


def test_what_hides_from_a_dead_supervisor_is_ended_too(
    devnet: DevnetMount, pod: Path, gate: Gate
) -> None:
    """Without the run's mark: in its session, left alone; in one of its own, with its parent."""
    hidden = "env -i sleep 1001 & echo $! >&2) ; env -i setsid sleep 1002 & echo $! >&2"
    command = f"({hidden}; exec python3 script/gated.py {gate.folder}"
    recipe = {"golem": {"exec": shlex.join(["sh", "-c", command])}}
    (pod / "a.recipe").write_text(json.dumps(recipe))
    folder = started(pod, gate)
    until(lambda: (folder / "stderr.log").read_text().count("\n") == 2)
    fds = [os.pidfd_open(int(pid)) for pid in (folder / "stderr.log").read_text().split()]
    kill_and_wait(supervisor_of(devnet, folder.name))
    wait_gone(pod)
    assert record(folder)["state"] == "lost"
    for fd in fds:
        assert select.select([fd], [], [], PATIENCE_S)[0]
        os.close(fd)


def test_a_touch_right_before_kill_9_is_not_forgotten(
    devnet: DevnetMount, pod: Path, gate: Gate
) -> None:
    sh(f"touch .run; kill -9 {devnet.pid}", pod)
    devnet.wait()
    (journalled,) = [p.name for p in (devnet.runs_folder / "pod").iterdir()]
    devnet.start()
    gate.open()
    wait_gone(pod)
    folder = pod / "logs" / journalled
    until(lambda: (folder / "run.json").exists() and record(folder)["ended"])
    ended = record(folder)
    assert ended["state"] in ("finished", "failed", "lost")
    assert gate.starts == (1 if ended["state"] == "finished" else 0), ended
    assert ended["state"] == "finished" or ended["error"]


def test_sigterm_cancels_and_records(devnet: DevnetMount, pod: Path, gate: Gate) -> None:
    folder = started(pod, gate)
    assert devnet.stop() == 0, devnet.said
    assert run_processes(folder.name) == []
    assert (gate.folder / "terminated").exists()
    devnet.start()
    assert not (pod / ".run").exists()
    assert record(folder)["state"] == "cancelled"
    assert (folder / "stdout.log").read_text() == "one\n"
    assert gate.starts == 1


def test_after_an_umount_that_failed_runs_begin_again(
    devnet: DevnetMount, pod: Path, gate: Gate
) -> None:
    inside = subprocess.Popen(["sleep", "1000"], cwd=pod)
    try:
        done = devnet.cli("umount", str(devnet.point), check=False)
        assert done.returncode == 1
        assert "in use" in done.stderr
    finally:
        inside.kill()
        inside.wait()
    gate.open()
    sh(f"touch .run; {WAIT}", pod)
    assert gate.starts == 1


def test_umount_cancels_and_records(devnet: DevnetMount, pod: Path, gate: Gate) -> None:
    folder = started(pod, gate)
    devnet.cli("umount", str(devnet.point))
    assert devnet.wait() == 0
    assert run_processes(folder.name) == []
    devnet.start()
    assert record(folder)["state"] == "cancelled"
    assert (pod / "output/partial").read_text() == "so far\n"
    assert gate.starts == 1
