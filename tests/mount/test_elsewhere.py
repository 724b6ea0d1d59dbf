"""What another session made: seen at the first look, and never pulled from under anybody's feet."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpodfs.cli.pods import request
from tests.mount.harness import Mount, Server, mounted, run
from tests.mount.strangers import strangers_pod, touch
from tests.mount.test_conflicts import elsewhere
from tests.patience import until

TTL_S = 1.0
SLOW_S = 0.4
LONG_S = 30.0
"""Of an answer: who does not wait for it is sooner done, on any machine."""
OWNER = ("setpriv", "--bounding-set", "-all") if os.geteuid() == 0 else ()
"""Before a command: what a user may do who is not root. The tests may be run by root, who may do
what the modes forbid; without its capabilities it is an ordinary owner of its files."""


@pytest.fixture
def mount(tmp_path: Path, own_server: Server) -> Iterator[Mount]:
    """A mount whose listings are soon out of date."""
    with mounted(tmp_path, own_server, None, "--attr-ttl", str(TTL_S)) as mount:
        yield mount


def make(mount: Mount, pod: str, *folders: str) -> None:
    """Make a pod, or folders of one that is there, in another session."""

    async def act(dfs) -> None:
        if not folders:
            await dfs.create_pod(pod)
            return
        await dfs.open_pod(pod)
        for folder in folders:
            await dfs.mkdir(pod, folder)

    elsewhere(mount, act)


def out_of_date(mount: Mount) -> None:
    """Mount anew, with a cache whose listings are older than --attr-ttl."""
    mount.remount()
    time.sleep(TTL_S)


def where_in(folder: Path) -> str:
    """Where a shell is that has gone into a folder, when all news of its name have arrived.

    The kernel takes them in as it does changes of the folder above: one after another.
    """
    done = subprocess.run(
        ["sh", "-c", 'cd "$0" && ! rmdir ../absent 2>/dev/null && /bin/pwd', folder],
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or done.stderr


# -- the first look ------------------------------------------------------------------------------


def test_the_first_look_finds_a_pod_made_elsewhere(mount: Mount) -> None:
    mount.pod()
    mount.sync()
    make(mount, "other")
    out_of_date(mount)
    assert os.listdir(mount.point / "other") == []


def test_nobody_waits_for_an_absent_name_in_a_folder(mount: Mount) -> None:
    """git and make ask for many, in every folder."""
    pod = mount.pod()
    (pod / "known").touch()
    mount.sync()
    out_of_date(mount)
    mount.server.faults(latency_s=LONG_S)
    started = time.monotonic()
    assert not (pod / "absent").exists()
    (pod / "new").write_text("text")
    assert time.monotonic() - started < LONG_S
    mount.server.faults()


def test_many_absent_names_cost_one_listing(mount: Mount) -> None:
    pod = mount.pod()
    (pod / "known").touch()
    mount.sync()
    mount.options = ["--attr-ttl", "3600"]
    mount.remount()
    os.utime(pod / "known")
    _age(mount)
    mount.start()
    mount.server.reset_calls()
    for number in range(100):
        assert not (mount.point / f"absent{number}").exists()
    assert mount.server.calls().get("GET /v1/pod/ls") == 1
    assert mount.server.calls().get("GET /v1/dir/ls", 0) <= 1


def _age(mount: Mount) -> None:
    """Take the mount down; its listings were made long ago."""
    assert mount.stop() == 0
    [database] = mount.cache.glob("*/meta.db")
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE inode SET listed_s = 1 WHERE listed_s != 0")
    connection.close()


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_without_the_server_an_absent_name_is_soon_told(mount: Mount, how: str) -> None:
    pod = mount.pod()
    (pod / "known").touch()
    mount.sync()
    looks, timeout_s = 20, 5.0
    mount.options = ["--attr-ttl", str(TTL_S), "--timeout", str(timeout_s)]
    out_of_date(mount)
    if how == "killed":
        mount.server.kill()
    else:
        mount.server.freeze()
    try:
        started = time.monotonic()
        for number in range(looks):
            assert not (mount.point / f"absent{number}").exists()
            assert (pod / "known").exists()
        took_s = time.monotonic() - started
        assert took_s < 3 * timeout_s, "the server was waited for again and again"
        time.sleep(TTL_S)
        started = time.monotonic()
        for number in range(looks):
            assert not (mount.point / f"missing{number}").exists()
        assert time.monotonic() - started < timeout_s, "it is known not to answer"
    finally:
        if how == "killed":
            mount.server.start_again()
        else:
            mount.server.thaw()


@pytest.mark.parametrize("path", ["other", "pod/folder"])
def test_a_new_folder_stays_somebodys_working_directory(mount: Mount, path: str) -> None:
    mount.pod()
    mount.sync()
    for number in range(3):
        name = f"{path}{number}"
        pod, _, folder = name.partition("/")
        make(mount, pod, *([f"/{folder}"] if folder else []))
        out_of_date(mount)
        mount.server.faults(latency_s=SLOW_S)
        os.listdir(mount.point)
        until(lambda: name in os.listdir(mount.point) or folder in os.listdir(mount.point / "pod"))  # noqa: B023
        assert where_in(mount.point / name) == str(mount.point / name)
        mount.server.faults()


def test_what_was_absent_is_there_after_a_refresh(mount: Mount) -> None:
    mount.options = ["--attr-ttl", "3600"]
    mount.remount()
    pod = mount.pod()
    mount.sync()
    os.listdir(mount.point)
    for number in range(3):
        make(mount, f"other{number}")
        make(mount, "pod", f"/folder{number}")
        for folder in (mount.point / f"other{number}", pod / f"folder{number}"):
            assert not folder.exists()
            mount.cli("refresh", str(folder.parent))
            assert folder.is_dir()
            assert where_in(folder) == str(folder)


# -- received ------------------------------------------------------------------------------------


def test_the_owner_of_a_received_pod_is_told_that_it_is_read_only(mount: Mount) -> None:
    reference = strangers_pod(mount.server)
    name = request(mount.point, "receive", reference=reference, new=None)["pod"]
    pod = mount.point / name
    for folder in (pod, pod / "script"):
        for command in ("touch new", "mkdir new", "rm -f *", "echo > new"):
            said = _as_owner(folder, command)
            assert "Read-only file system" in said, command
    assert os.listdir(pod / "script") == ["x.sh"]
    assert "Read-only file system" in _as_owner(pod, "touch .run")
    assert "cpodfs fork" in os.getxattr(pod, "user.cpodfs.error").decode()
    assert "Read-only file system" in touch(pod)
    with pytest.raises(OSError) as caught:
        (pod / "file").touch()
    assert caught.value.errno == errno.EROFS


def _as_owner(folder: Path, command: str) -> str:
    done = subprocess.run([*OWNER, "sh", "-c", command], cwd=folder, capture_output=True, text=True)
    assert done.returncode != 0
    return done.stderr


# -- what is known ---------------------------------------------------------------------------------


def test_status_says_whether_pods_were_listed(mount: Mount) -> None:
    mount.pod()
    mount.remount(wipe=True)
    assert mount.status()["pods_listed"] is False
    assert "not listed yet" in mount.cli("status", str(mount.point)).stdout
    run("ls", mount.point)
    assert mount.status()["pods_listed"] is True
    assert "not listed yet" not in mount.cli("status", str(mount.point)).stdout
