"""Another session changes the pod behind our back: nobody's bytes vanish, nothing is invented.

Most of these were found by a reviewer who tried to lose data.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from cpodfs.devnet.faults import Faults, plan
from cpodfs.dfs import Client, Session
from tests.mount.harness import Mount, Server, mounted, sh
from tests.patience import until

T = TypeVar("T")
SLOW = ("--writeback-delay", "3600")


@pytest.fixture
def slow(tmp_path: Path, own_server: Server):
    """A mount that uploads only when told to."""
    with mounted(tmp_path, own_server, None, *SLOW) as mount:
        yield mount


def elsewhere(mount: Mount, act: Callable[[Client], Awaitable[T]]) -> T:
    """What another session of the same account does."""
    password = mount.password_file.read_text()

    async def main() -> T:
        async with Session(mount.server.url, mount.user, lambda: password) as session:
            return await act(Client(session))

    return trio.run(main)


def put(mount: Mount, directory: str, name: str, data: bytes) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield data

    elsewhere(mount, lambda dfs: dfs.upload("pod", directory, name, body, len(data)))


def contents(pod: Path) -> dict[str, str]:
    """Contents by name, conflict copies under ``name (conflict)``."""
    return {_plain(p.name): p.read_text() for p in pod.iterdir() if p.is_file()}


def _plain(name: str) -> str:
    return re.sub(r" \(conflict \S+ \d{4}-\d\d-\d\d \d\d\.\d\d\.\d\d( \d+)?\)", " (conflict)", name)


def test_a_change_there_is_seen_before_it_is_overwritten(slow: Mount) -> None:
    pod = slow.pod()
    (pod / "f.txt").write_text("base")
    slow.sync()
    slow.cli("refresh", str(pod))
    put(slow, "/", "f.txt", b"theirs, longer")
    (pod / "f.txt").write_text("ours")
    slow.sync()
    slow.remount(wipe=True)
    assert contents(pod) == {"f.txt": "theirs, longer", "f (conflict).txt": "ours"}


def test_a_file_written_through_an_old_handle_becomes_a_conflict_copy(slow: Mount) -> None:
    pod = slow.pod()
    (pod / "f").write_text("v1")
    slow.sync()
    with (pod / "f").open("a") as file:
        put(slow, "/", "f", b"theirs, longer")
        slow.cli("refresh", str(pod))
        file.write("-ours")
    assert contents(pod) == {"f": "theirs, longer", "f (conflict)": "v1-ours"}
    slow.remount(wipe=True)
    assert contents(pod) == {"f": "theirs, longer", "f (conflict)": "v1-ours"}


def test_a_renamed_uncached_file_meets_a_new_one_of_that_name(slow: Mount) -> None:
    pod = slow.pod()
    (pod / "x").write_text("precious")
    slow.remount(wipe=True)
    (pod / "x").rename(pod / "n")
    put(slow, "/", "n", b"theirs")
    slow.cli("refresh", str(pod))
    assert contents(pod) == {"n": "theirs", "n (conflict)": "precious"}
    slow.remount(wipe=True)
    assert contents(pod) == {"n": "theirs", "n (conflict)": "precious"}


def test_a_new_file_here_meets_a_new_one_there(slow: Mount) -> None:
    pod = slow.pod()
    sh("echo > other", pod)
    slow.sync()
    (pod / "n").write_text("ours")
    put(slow, "/", "n", b"theirs")
    slow.cli("refresh", str(pod))
    slow.remount(wipe=True)
    assert contents(pod) == {"n": "theirs", "n (conflict)": "ours", "other": "\n"}


def test_renaming_what_was_deleted_there_keeps_it(slow: Mount) -> None:
    pod = slow.pod()
    (pod / "a").write_text("text")
    slow.sync()
    elsewhere(slow, lambda dfs: dfs.delete_file("pod", "/a"))
    (pod / "a").rename(pod / "b")
    slow.server.reset_calls()
    slow.sync()
    assert sum(slow.server.calls().values()) < 16, slow.server.calls()
    slow.remount(wipe=True)
    assert contents(pod) == {"b": "text"}


def test_deleting_what_was_changed_there_keeps_their_version(slow: Mount) -> None:
    pod = slow.pod()
    (pod / "a").write_text("old")
    slow.sync()
    slow.cli("refresh", str(pod))
    put(slow, "/", "a", b"new version")
    (pod / "a").unlink()
    slow.cli("refresh", str(pod))
    slow.remount(wipe=True)
    assert contents(pod) == {"a": "new version"}


def test_removing_a_directory_that_was_filled_there_keeps_their_file(slow: Mount) -> None:
    pod = slow.pod()
    (pod / "d").mkdir()
    slow.sync()
    put(slow, "/d", "f", b"theirs")
    (pod / "d").rmdir()
    slow.cli("sync", str(pod), check=False)
    assert (pod / "d/f").read_text() == "theirs"
    slow.remount(wipe=True)
    assert (pod / "d/f").read_text() == "theirs"


@pytest.mark.parametrize(
    "command", ["mv d D2", "mv leaf L2", "mv f g", "mkdir new", "rm f", "mv f d/"]
)
def test_a_lost_reply_is_looked_into(tmp_path: Path, own_server: Server, command: str) -> None:
    """The server has done it, but the answer never came: done once, and nothing beside it."""
    with mounted(tmp_path, own_server, None, "--writeback-delay", "0", "--timeout", "3") as mount:
        pod = mount.pod()
        sh("mkdir -p d/sub leaf; echo x > d/sub/x; echo l > leaf/l; echo f > f", pod)
        mount.sync()
        sure = Faults(drop_rate=1.0)
        seed = next(s for s in itertools.count() if plan(sure, s, 1).outcome == "drop-after")
        own_server.faults(drop_rate=1.0, seed=seed, match="mkdir|rename|delete")
        own_server.reset_calls()
        sh(command, pod)
        expected = sh("find . | sort", pod)
        until(lambda: sum(own_server.calls().values()) > 0)
        own_server.faults(drop_rate=0)
        mount.sync()
        assert sh("find . | sort", pod) == expected
        mount.remount(wipe=True)
        assert sh("find . | sort", pod) == expected


def test_an_uncached_file_can_be_read_after_its_unlink(slow: Mount) -> None:
    pod = slow.pod()
    (pod / "t").write_text("hello" * 100_000)
    slow.remount(wipe=True)
    with (pod / "t").open() as file:
        (pod / "t").unlink()
        slow.sync()
        assert file.read() == "hello" * 100_000
    with (pod / "u").open("w") as file:
        file.write("x")
    slow.remount(wipe=True)
    with (pod / "u").open() as file:
        (pod / "v").write_text("over it")
        (pod / "v").rename(pod / "u")
        slow.sync()
        assert file.read() == "x"
    assert (pod / "u").read_text() == "over it"


def test_an_open_unlinked_file_keeps_nobody_waiting(slow: Mount) -> None:
    pod = slow.pod()
    with (pod / "t").open("w+") as file:
        (pod / "t").unlink()
        file.write("more")
        file.flush()
        os.fsync(file.fileno())
        slow.sync()


def test_what_waits_for_a_deleted_file_is_woken(tmp_path: Path, own_server: Server) -> None:
    with mounted(tmp_path, own_server, None, "--writeback-delay", "0.1", "--timeout", "1") as mount:
        pod = mount.pod()
        sh("mkdir d e; echo x > d/f", pod)
        mount.sync()
        own_server.kill()
        sh("mv d/f e/f; rmdir d", pod)
        until(lambda: mount.status()["offline"])
        (pod / "e/f").unlink()
        own_server.start_again()
        mount.sync()
        mount.remount(wipe=True)
        assert sh("find . | sort", pod) == ".\n./e\n"


def test_control_names_below_the_root_are_ordinary(slow: Mount) -> None:
    pod = slow.pod()
    sh("mkdir s; echo data > s/.run; ! mkdir .cpodfs-rm-0123456789abcdef", pod)
    slow.remount(wipe=True)
    assert sh("ls -A s; cat s/.run", pod) == ".run\ndata\n"


def test_the_server_is_made_to_look_again_by_and_by(tmp_path: Path, own_server: Server) -> None:
    """It answers each session from memory, as old as the pod's opening: pods are opened anew."""
    with mounted(tmp_path, own_server, None, *SLOW, "--attr-ttl", "0.1") as mount:
        pod = mount.pod()
        (pod / "f").write_text("x")
        mount.sync()
        own_server.reset_calls()

        def reopened() -> bool:
            os.listdir(pod)
            return own_server.calls().get("POST /v1/pod/close", 0) > 0

        until(reopened)
        assert (pod / "f").read_text() == "x"
