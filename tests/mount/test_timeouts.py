"""``--timeout`` is one timeout: what a user waits for a silent server, whatever is asked of it."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mount.harness import Mount, Server, mounted, run

TIMEOUT_S = 8.0
TWICE_S = 2 * TIMEOUT_S
QUICK = ("--writeback-delay", "3600", "--attr-ttl", "0", "--timeout", str(TIMEOUT_S))
MB = 1_000_000


@pytest.fixture
def frozen(tmp_path: Path, own_server: Server) -> Iterator[Mount]:
    """A mount that knows the folder ``d`` of a pod, but not its contents, nor other folders."""
    with mounted(tmp_path, own_server, None, *QUICK) as mount:
        pod = mount.pod("one")
        # In a folder of its own: the kernel lets nobody look into the one that something is removed from.
        second = mount.pod("two")
        for folder in (pod / "d", pod / "unknown", second / "other"):
            folder.mkdir()
            for file in ("a", "b", "c", "e"):
                (folder / file).write_bytes(b"x" * MB)
        mount.remount(wipe=True)
        os.listdir(pod / "d")
        os.listdir(second)
        own_server.freeze()
        try:
            yield mount
        finally:
            own_server.thaw()


def test_nothing_waits_for_it_twice(frozen: Mount) -> None:
    one = frozen.point / "one"

    def set_attribute(path: Path, name: str, value: bytes) -> Callable[[], object]:
        return lambda: os.setxattr(path, f"user.cpodfs.{name}", value)

    def append() -> None:
        with (one / "d/b").open("ab", buffering=0) as file:
            file.write(b"more")

    asked: dict[str, Callable[[], object]] = {
        "cat": lambda: (one / "d/a").read_bytes(),
        "cat by a real tool": lambda: run("cat", one / "d/e"),
        "an append": append,
        "a cut": lambda: os.truncate(one / "d/c", 5),
        "a listing": lambda: os.listdir(one / "unknown"),
        "a name in an unlisted folder": lambda: (one / "unknown/a").stat(),
        "a removal": lambda: (frozen.point / "two/other").rmdir(),
        "refresh": set_attribute(one / "d", "refresh", b"1"),
        "refresh of the list of pods": set_attribute(frozen.point, "refresh", b"1"),
    }
    took: dict[str, float] = {}
    outcome: dict[str, object] = {}

    def ask(what: str, act: Callable[[], object]) -> None:
        started = time.monotonic()
        try:
            outcome[what] = act()
        except OSError as error:
            outcome[what] = error.errno
        except AssertionError as error:
            outcome[what] = errno.ETIMEDOUT if "timed out" in str(error) else str(error)
        took[what] = time.monotonic() - started

    threads = [threading.Thread(target=ask, args=each) for each in asked.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(took)
    assert outcome == dict.fromkeys(asked, errno.ETIMEDOUT)
    assert {what: s for what, s in took.items() if s >= TWICE_S} == {}


@pytest.mark.parametrize("command", [["share", "one"], ["fork", "one", "copy"], ["refresh", "one"]])
def test_commands_do_not_either(frozen: Mount, command: list[str]) -> None:
    """Nor those of which the server takes minutes as long as it lives."""
    what, *arguments = command
    paths = [str(frozen.point / arguments[0]), *arguments[1:]]
    started = time.monotonic()
    done = frozen.cli(what, *paths, check=False)
    assert done.returncode == 1
    assert time.monotonic() - started < TWICE_S, done.stderr
    assert "no answer within 8 s" in done.stderr or "timed out" in done.stderr


def test_a_mount_of_a_silent_server_is_given_up_in_time(tmp_path: Path, own_server: Server) -> None:
    mount = Mount(tmp_path, own_server, None, "--timeout", str(TIMEOUT_S))
    own_server.freeze()
    try:
        started = time.monotonic()
        done = subprocess.run(mount.command(), capture_output=True, text=True, env=mount.env)
        assert time.monotonic() - started < TWICE_S
        assert done.returncode == 1
        assert "does not answer" in done.stderr
    finally:
        own_server.thaw()
