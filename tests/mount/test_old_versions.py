"""A server that answers with an earlier version of a file, as FairOS-DFS does when it cannot read the
newest: it takes nothing away here, makes no conflict, and is not sent over what is right."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.mount.harness import Mount, Server, mounted
from tests.mount.hostile import Answer, Hostile, Lie, Request
from tests.mount.test_conflicts import contents, put
from tests.patience import until

QUICK = ("--writeback-delay", "0.1", "--timeout", "5", "--stall", "3", "--attr-ttl", "0.3")
OLD = b"first version"
NEW = "the second version, longer"
SINCE_S = 1000


class Forgetful:
    """Answers with what the file ``f`` was before, for as long as it is ``lying``."""

    def __init__(self, server: Server) -> None:
        self.hostile = Hostile(server)
        self.lying = False
        self.told = 0
        self.hostile.answer("GET /v1/dir/ls", self._lie(self._listing))
        self.hostile.answer("GET /v1/file/stat", self._lie(self._stat))
        self.hostile.answer("GET /v1/file/download", self._lie(self._download))

    def _lie(self, change: Callable[[Request, bytes], bytes]) -> Lie:
        def lie(request: Request, truth: Callable[[], Answer]) -> Answer:
            answer = truth()
            if not self.lying or answer.status != 200:
                return answer
            assert isinstance(answer.body, bytes)
            body = change(request, answer.body)
            kept = {k: v for k, v in answer.headers.items() if k.lower() != "content-length"}
            return replace(answer, body=body, headers=kept)

        return lie

    def _listing(self, _request: Request, body: bytes) -> bytes:
        said = json.loads(body)
        for entry in said.get("files") or ():
            if entry["name"] == "f":
                self._make_old(entry, "size")
                self.told += 1
        return json.dumps(said).encode()

    def _stat(self, request: Request, body: bytes) -> bytes:
        said = json.loads(body)
        if request.query["filePath"] == "/f":
            self._make_old(said, "fileSize")
        return json.dumps(said).encode()

    def _make_old(self, entry: dict[str, str], size: str) -> None:
        assert size in entry
        entry[size] = str(len(OLD))
        entry["modificationTime"] = str(int(entry["modificationTime"]) - SINCE_S)

    def _download(self, request: Request, body: bytes) -> bytes:
        return OLD if request.query.get("filePath") == "/f" else body


@pytest.fixture
def forgetful(tmp_path: Path, own_server: Server) -> Iterator[tuple[Forgetful, Mount]]:
    server = Forgetful(own_server)
    with mounted(tmp_path, server.hostile, own_server.signup(), *QUICK) as mount:
        pod = mount.pod()
        for name in "abcde":
            (pod / name).write_text(name)
        (pod / "f").write_text(NEW)
        mount.sync()
        yield server, mount
    server.hostile.stop()


def look(server: Forgetful, mount: Mount, times: int = 3) -> None:
    server.told = 0

    def told() -> bool:
        os.listdir(mount.point / "pod")
        return server.told >= times

    until(told)


def test_an_earlier_version_replaces_nothing(forgetful: tuple[Forgetful, Mount]) -> None:
    server, mount = forgetful
    pod = mount.point / "pod"
    server.lying = True
    look(server, mount)
    assert (pod / "f").read_text() == NEW
    assert os.getxattr(pod / "f", "user.cpodfs.state") == b"doubtful"
    mount.cli("refresh", str(pod))
    assert sorted(os.listdir(pod)) == list("abcdef")
    assert (pod / "f").read_text() == NEW
    server.lying = False
    until(lambda: os.listdir(pod) and not mount.status()["doubtful_count"])
    assert (pod / "f").read_text() == NEW
    assert "conflict" not in mount.logged()


def test_an_edit_waits_until_the_newest_version_is_shown(
    forgetful: tuple[Forgetful, Mount],
) -> None:
    server, mount = forgetful
    pod = mount.point / "pod"
    server.lying = True
    with open(pod / "f", "a") as file:
        file.write(", edited")
    until(lambda: os.getxattr(pod / "f", "user.cpodfs.state") == b"error")
    assert b"earlier version" in os.getxattr(pod / "f", "user.cpodfs.error")
    server.lying = False
    mount.sync()
    mount.remount(wipe=True)
    assert contents(pod) == {**{n: n for n in "abcde"}, "f": NEW + ", edited"}


def test_an_edit_is_a_conflict_once_somebody_says_that_the_earlier_version_is_right(
    forgetful: tuple[Forgetful, Mount],
) -> None:
    server, mount = forgetful
    pod = mount.point / "pod"
    server.lying = True
    look(server, mount)
    (pod / "f").write_text("ours")
    mount.cli("refresh", "--accept-deletions", str(pod))
    until(lambda: os.listdir(pod) and "f (conflict)" in contents(pod))
    assert contents(pod)["f (conflict)"] == "ours"
    assert contents(pod)["f"] == OLD.decode()


def test_what_is_not_here_is_not_read_in_an_earlier_version(
    forgetful: tuple[Forgetful, Mount],
) -> None:
    server, mount = forgetful
    mount.remount(wipe=True)
    pod = mount.point / "pod"
    assert sorted(os.listdir(pod)) == list("abcdef")
    server.lying = True
    with pytest.raises(OSError) as caught:
        (pod / "f").read_text()
    assert caught.value.errno == errno.EIO
    server.lying = False
    assert (pod / "f").read_text() == NEW


def test_a_newer_version_of_somebody_else_is_shown_at_once(
    forgetful: tuple[Forgetful, Mount],
) -> None:
    _, mount = forgetful
    pod = mount.point / "pod"
    put(mount, "/", "f", b"theirs, and much longer than what was there")
    mount.cli("refresh", str(pod))
    assert (pod / "f").read_text() == "theirs, and much longer than what was there"
