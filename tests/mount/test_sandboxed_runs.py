"""What the program of a pod of somebody else may see and touch, and how it is ended."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpodfs.runs import keyring
from tests.mount.compute import (
    SECRET,
    compute_pod,
    devnet_mounted,
    record,
    run_folders,
    run_processes,
    run_to_end,
    wait_gone,
)
from tests.mount.harness import CPODFS, Child, Mount, RealServer, Server, mounted, run
from tests.mount.strangers import REPORT, forked, reason, recipe_files, touch, vouch
from tests.patience import until

DENIED = "Permission denied"
SCRIPTS = REPORT.parent


def stranger_with(script: str, *words: str) -> dict[str, str]:
    command = " ".join(["python3", f"script/{script}", *words])
    return recipe_files(command) | {f"script/{script}": (SCRIPTS / script).read_text()}


@pytest.fixture
def session_key() -> Iterator[bool]:
    """A key in the session that a driver started now inherits; False where a container has none."""
    keyring.leave_session()
    add_key = keyring._KEYCTL[os.uname().machine] - 2
    libc, session = ctypes.CDLL(None, use_errno=True), ctypes.c_long(-3)
    added = libc.syscall(add_key, b"user", b"cpodfs-test", b"x", ctypes.c_long(1), session)
    assert added > 0 or ctypes.get_errno() in keyring._HARMLESS
    yield added > 0
    keyring.leave_session()


@pytest.mark.sandbox
def test_the_keys_of_the_users_session_are_not_a_strangers(
    session_key: bool, tmp_path: Path, server: Server
) -> None:
    with mounted(tmp_path, server) as mount:
        own = compute_pod(mount, "own", "python3 script/keys.py", "keys.py")
        assert (run_to_end(own) / "stdout.log").read_text() == f"{session_key}\n"
        theirs = forked(mount, "theirs", stranger_with("keys.py"))
        vouch(theirs)
        assert (run_to_end(theirs) / "stdout.log").read_text() == "False\n"


@pytest.mark.sandbox
def test_a_stranger_sees_and_changes_nothing_but_his_pod(theirs: Mount, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    pod = forked(theirs, "sandboxed", stranger_with("sandboxed.py", str(secret)))
    vouch(pod)
    folder = run_to_end(pod)
    ended = record(folder)
    assert ended["state"] == "finished", (folder / "stderr.log").read_text()
    assert ended["sandbox"] is True
    report = json.loads((folder / "stdout.log").read_text())
    assert report["others"] == ["sandboxed"]
    assert report["read outside"] == "No such file or directory"
    for what in ("write outside", "write /usr", "write /", "write /etc", "set kernel"):
        assert report[what] != "done"
    assert report["home"] == []
    assert report["tmp"] == "done"
    assert report["trust"] == report["end all"] == "Operation not permitted"
    assert report["upper"] != "done"
    assert report["pids"] <= 3
    assert (pod / "output/mine").read_text() == "written"
    assert SECRET not in json.dumps(report)
    assert not secret.with_name("new").exists()


def test_ones_own_pods_run_without_a_sandbox(theirs: Mount) -> None:
    assert record(run_to_end(compute_pod(theirs, "no sandbox", "true")))["sandbox"] is False


@pytest.mark.sandbox
def test_a_sandbox_for_everything_or_for_nothing(tmp_path: Path, server: Server) -> None:
    with mounted(tmp_path, server, None, "--sandbox", "on") as mount:
        own = compute_pod(mount, "own", "sh -c 'ls ..; exit 5'")
        mount.pod("other")
        ended = record(folder := run_to_end(own))
        assert (ended["sandbox"], ended["exit_code"]) == (True, 5)
        assert (folder / "stdout.log").read_text() == "own\n"
        assert mount.stop() == 0
        mount.options = ["--sandbox", "off"]
        mount.start()
        ended = record(folder := run_to_end(own))
        assert ended["sandbox"] is False
        assert (folder / "stdout.log").read_text() == "other\nown\n"
        theirs = forked(mount, "theirs")
        vouch(theirs)
        assert record(run_to_end(theirs))["sandbox"] is False


def test_where_there_is_no_bwrap(tmp_path: Path, server: Server) -> None:
    """Without it strangers' pods run as trusted; with --sandbox on nothing does."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/bwrap").write_text("#!/bin/sh\necho 'bwrap: no namespaces here' >&2; exit 1\n")
    (tmp_path / "bin/bwrap").chmod(0o755)
    mount = Mount(tmp_path, server)
    mount.env["PATH"] = f"{tmp_path}/bin:{mount.env['PATH']}"
    try:
        mount.start()
        pod = forked(mount, "theirs")
        vouch(pod)
        assert record(run_to_end(pod))["sandbox"] is False
        assert "no sandbox pod='theirs': bwrap does not work here: no namespaces" in mount.logged()
        assert mount.stop() == 0
        mount.options = ["--sandbox", "on"]
        mount.start()
        assert DENIED in touch(pod)
        assert "--sandbox on: bwrap does not work here" in reason(pod)
    finally:
        if mount.process is not None:
            mount.stop()


@pytest.mark.sandbox
def test_cancelling_in_a_sandbox_is_as_gentle_as_outside(theirs: Mount) -> None:
    script = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *_: (print('asked'), sys.exit(7)))\n"
        "print('up', flush=True)\n"
        "while True: time.sleep(60)\n"
    )
    pod = forked(theirs, "gentle", recipe_files("python3 script/x.py") | {"script/x.py": script})
    vouch(pod)
    with Child(
        [*CPODFS, "run", "--wait", str(pod)], stdout=subprocess.PIPE, text=True, env=theirs.env
    ) as waiting:
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "up\n"
        theirs.cli("cancel", str(pod))
        assert waiting.stdout.read() == "asked\n"
    (folder,) = run_folders(pod)
    ended = record(folder)
    assert (ended["state"], ended["exit_code"]) == ("cancelled", 7)
    assert run_processes(folder.name) == []


@pytest.mark.sandbox
def test_a_signal_inside_is_told_as_a_shell_does(theirs: Mount) -> None:
    pod = forked(theirs, "signal", recipe_files("sh -c 'kill -SEGV $$'"))
    vouch(pod)
    ended = record(run_to_end(pod))
    assert (ended["state"], ended["exit_code"], ended["signal"]) == ("failed", 139, None)


@pytest.mark.sandbox
def test_what_a_stranger_leaves_behind_is_ended(theirs: Mount) -> None:
    pod = forked(theirs, "leaves", recipe_files("sh -c 'setsid sleep 1000 & sleep 1000 & echo up'"))
    vouch(pod)
    folder = run_to_end(pod)
    assert record(folder)["state"] == "finished"
    assert run_processes(folder.name) == []


@pytest.mark.sandbox
@pytest.mark.parametrize("stays", [False, True])
def test_a_program_that_stops_its_sandbox_is_ended(theirs: Mount, stays: bool) -> None:
    """Nobody would hear of its end: bwrap's first process, which waits for it, does nothing more."""
    pod = forked(theirs, f"stops {stays}", stranger_with("tracer.py", "60" if stays else "0"))
    vouch(pod)
    folder = run_to_end(pod)
    ended = record(folder)
    if (folder / "stdout.log").read_text() == "refused\n":
        pytest.skip("this kernel lets nobody trace what is not its child")
    assert (ended["state"], ended["signal"]) == ("failed", "SIGKILL")
    assert ended["error"] == "it stopped its sandbox's own process, and was killed for that"
    assert run_processes(folder.name) == []


@pytest.mark.sandbox
def test_a_sandbox_does_not_outlive_the_driver_in_vain(tmp_path: Path, server: Server) -> None:
    """It goes on and its logs are kept, but its pod is lost to it with the mount that it knew."""
    with mounted(tmp_path, server) as mount:
        script = "echo up; while [ -e script/x.sh ]; do sleep 0.05; done; echo blind"
        pod = forked(mount, "blind", recipe_files(script=script))
        vouch(pod)
        run("touch", pod / ".run")
        until(lambda: run_folders(pod) and (run_folders(pod)[0] / "stdout.log").exists())
        (folder,) = run_folders(pod)
        until(lambda: (folder / "stdout.log").read_text() == "up\n")
        mount.kill()
        mount.start()
        wait_gone(pod)
        assert record(folder)["state"] == "finished"
        assert (folder / "stdout.log").read_text() == "up\nblind\n"


@pytest.mark.sandbox
def test_golem_from_a_sandbox(tmp_path: Path) -> None:
    """A stranger's requestor finds the market, with a key that nobody else gets to see."""
    with devnet_mounted(tmp_path) as mount:
        mount.server = RealServer(mount.status()["server"], mount.devnet / "control.key")
        pod = forked(mount, "words", stranger_with("words.py"))
        (pod / "payload").mkdir()
        (pod / "payload/1.txt").write_text("two words")
        vouch(pod)
        key = (mount.devnet / "app.key").read_text().strip()
        with Child(
            [*CPODFS, "run", "--wait", str(pod)], env=mount.env, stdout=subprocess.DEVNULL
        ) as waiting:
            seen = set()
            while waiting.poll() is None:
                seen |= _command_lines()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    waiting.wait(0.1)
        assert waiting.returncode == 0
        assert any(b"bwrap" in line for line in seen)
        assert not any(key.encode() in line for line in seen)
        (folder,) = run_folders(pod)
        assert record(folder)["sandbox"] is True
        assert (pod / "output/1.txt.count").read_text().strip() == "2"
        assert key not in (folder / "run.json").read_text() + mount.logged()
        wait_gone(pod)


def _command_lines() -> set[bytes]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.add(path.read_bytes())
    return found
