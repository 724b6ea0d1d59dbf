"""An upload whose client has died, or has given up: the server goes on with it, and has it seconds later."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cpodfs.cache.store import MARGIN_S
from tests.mount.harness import Mount, Server, mounted
from tests.mount.hostile import Answer, Hostile, Request
from tests.mount.test_conflicts import contents, put
from tests.patience import PATIENCE_S, until

QUICK = ("--writeback-delay", "0.1", "--timeout", "5", "--stall", "3", "--attr-ttl", "0.3")
THEIRS = "their tales, told at length"
FAILED = Answer(b'{"message": "file upload: broken", "code": 500}', 500)


class Slow:
    """Keeps an upload to itself until it is let go; those after it fail until they may ``pass_``."""

    def __init__(self, server: Server) -> None:
        self.hostile = Hostile(server)
        self.holding = False
        self.pass_ = True
        self.held = threading.Event()
        self.go = threading.Event()
        self.arrived = threading.Event()
        self.failed = 0
        self.hostile.answer("POST /v1/file/upload", self._upload)

    def _upload(self, request: Request, truth: Callable[[], Answer]) -> Answer | None:
        if self.holding:
            self.holding = self.pass_ = False
            self.held.set()
            assert self.go.wait(PATIENCE_S)
            truth()
            self.arrived.set()
            return None
        if self.pass_ or THEIRS.encode() in request.body:
            return truth()
        self.failed += 1
        return FAILED


@pytest.fixture
def slow(tmp_path: Path, own_server: Server) -> Iterator[tuple[Slow, Mount]]:
    server = Slow(own_server)
    with mounted(tmp_path, server.hostile, own_server.signup(), *QUICK) as mount:
        pod = mount.pod()
        (pod / "f").write_text("zero")
        mount.sync()
        yield server, mount
        server.go.set()
        server.pass_ = True
    server.hostile.stop()


def send_and_die(server: Slow, mount: Mount, text: str) -> None:
    """Upload something, be killed meanwhile, and see afterwards what was there before."""
    server.holding = True
    (mount.point / "pod/f").write_text(text)
    assert server.held.wait(PATIENCE_S)
    mount.kill()
    mount.start()
    (mount.point / "pod/f").write_text("newest of all")
    until(lambda: server.failed)
    mount.cli("refresh", str(mount.point / "pod"))


def test_what_arrives_after_a_kill_is_ours(slow: tuple[Slow, Mount]) -> None:
    server, mount = slow
    send_and_die(server, mount, "one, longer")
    server.go.set()
    assert server.arrived.wait(PATIENCE_S)
    mount.cli("refresh", str(mount.point / "pod"))
    server.pass_ = True
    mount.sync()
    mount.remount(wipe=True)
    assert contents(mount.point / "pod") == {"f": "newest of all"}


def test_what_somebody_else_wrote_meanwhile_is_not(slow: tuple[Slow, Mount]) -> None:
    server, mount = slow
    send_and_die(server, mount, "one, longer")
    time.sleep(MARGIN_S + 2)  # clocks are known to a few seconds
    put(mount, "/", "f", THEIRS.encode())
    server.pass_ = True
    mount.cli("sync", str(mount.point), "--stall", "60")
    assert sorted(contents(mount.point / "pod").values()) == ["newest of all", THEIRS]
    mount.remount(wipe=True)
    assert sorted(contents(mount.point / "pod").values()) == ["newest of all", THEIRS]


def test_what_was_given_up_and_arrives_after_its_successor_is_sent_over(
    slow: tuple[Slow, Mount],
) -> None:
    """The newest is here and was at the server, until the older one came: it goes there again."""
    server, mount = slow
    pod = mount.point / "pod"
    server.holding = True
    (pod / "f").write_text("one, longer")
    assert server.held.wait(PATIENCE_S)
    mount.kill()
    server.pass_ = True
    mount.start()
    (pod / "f").write_text("newest of all")
    mount.sync()
    server.go.set()
    assert server.arrived.wait(PATIENCE_S)

    def is_right() -> bool:
        os.listdir(pod)
        mount.cli("refresh", str(pod))
        mount.sync()
        return contents(pod) == {"f": "newest of all"}

    until(is_right)
    mount.remount(wipe=True)
    assert contents(pod) == {"f": "newest of all"}
