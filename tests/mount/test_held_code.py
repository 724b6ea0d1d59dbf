"""What runs is what was vouched for, whatever the server says meanwhile."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.mount.compute import run_folders, text, wait_gone
from tests.mount.harness import Mount, Server, mounted
from tests.mount.hostile import Answer, Hostile, Request
from tests.mount.strangers import forked, reason, recipe_files, touch, vouch
from tests.patience import until

DENIED = "Permission denied"
LATER = 'echo up; while [ ! -e "$CPODFS_PAYLOAD/go" ]; do sleep 0.05; done; sh "$CPODFS_SCRIPT/second.sh"'
"""A program that loads the rest of itself when it is told to."""
EVIL = "echo evil instead"


class Changing(Hostile):
    """A server that has another version of some files, from one moment to the next."""

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self._changed: dict[str, dict[str, str]] = {}
        self.answer("GET /v1/dir/ls", self._list)
        self.answer("GET /v1/file/download", self._send)
        self.answer("GET /v1/file/stat", self._tell)

    def change(self, folder: str, name: str, text: str) -> None:
        """From now on the file in this folder of every pod is another one, or a new one."""
        self._changed.setdefault(folder, {})[name] = text

    def _list(self, request: Request, truth: Callable[[], Answer]) -> Answer:
        answer = truth()
        changed = self._changed.get(request.query.get("dirPath", ""))
        if not changed or answer.status != 200:
            return answer
        document = json.loads(bytes(answer.body))
        files = {entry["name"]: entry for entry in document.get("files") or ()}
        for name, now in changed.items():
            files[name] = {
                **_fresh(name),
                **files.get(name, {}),
                "size": str(len(now)),
                "modificationTime": "1900000000",
            }
        body = json.dumps({**document, "files": list(files.values())}).encode()
        return replace(answer, body=body)

    def _send(self, request: Request, truth: Callable[[], Answer]) -> Answer:
        text = self._text(request)
        return truth() if text is None else Answer(text.encode())

    def _tell(self, request: Request, truth: Callable[[], Answer]) -> Answer:
        answer, text = truth(), self._text(request)
        if text is None or answer.status != 200:
            return answer
        document = json.loads(bytes(answer.body))
        document |= {"fileSize": str(len(text)), "modificationTime": "1900000000"}
        return replace(answer, body=json.dumps(document).encode())

    def _text(self, request: Request) -> str | None:
        folder, name = os.path.split(request.query.get("filePath", ""))
        return self._changed.get(folder, {}).get(name)


def _fresh(name: str) -> dict[str, str | int]:
    times = dict.fromkeys(("creationTime", "accessTime"), "1900000000")
    return {"name": name, "contentType": "text/plain", "mode": 0o100600, **times}


@pytest.fixture
def changing(server: Server) -> Iterator[Changing]:
    hostile = Changing(server)
    yield hostile
    hostile.stop()


@pytest.fixture
def eager(tmp_path: Path, changing: Changing) -> Iterator[Mount]:
    """A mount to which every listing is out of date at once."""
    with mounted(tmp_path, changing, None, "--attr-ttl", "0") as mount:
        yield mount


@pytest.mark.parametrize("number", range(3))
def test_a_program_that_is_changed_just_before_the_touch(
    eager: Mount, changing: Changing, number: int
) -> None:
    pod = forked(eager, f"switched {number}")
    vouch(pod)
    changing.change("/script", "x.sh", EVIL)
    if not touch(pod):
        wait_gone(pod)
        (folder,) = run_folders(pod)
        assert (folder / "stdout.log").read_text() == "ran\n"
    until(lambda: "evil" in (pod / "script/x.sh").read_text())
    assert DENIED in touch(pod)
    assert "has changed since it was trusted" in reason(pod)


def waiting(mount: Mount, name: str) -> Path:
    """A stranger's pod whose program runs, and waits for ``payload/go``."""
    files = recipe_files(script=LATER) | {"script/second.sh": "echo ran", "payload/x": "1"}
    pod = forked(mount, name, files)
    vouch(pod)
    assert touch(pod) == ""
    until(lambda: run_folders(pod) and text(run_folders(pod)[0] / "stdout.log") == "up\n")
    return pod


def go_on(pod: Path) -> str:
    """Let the program load the rest, and what it printed then."""
    (pod / "payload/go").touch()
    wait_gone(pod)
    (folder,) = run_folders(pod)
    return (folder / "stdout.log").read_text().removeprefix("up\n")


def is_held(mount: Mount, folder: Path) -> bool:
    done = mount.cli("refresh", str(folder), check=False)
    assert (done.returncode == 1) == ("stays as it is until its run has ended" in done.stderr)
    return done.returncode == 1


def test_what_a_program_loads_later_is_what_was_vouched_for(
    eager: Mount, changing: Changing
) -> None:
    pod = waiting(eager, "later")
    changing.change("/script", "second.sh", EVIL)
    changing.change("/", "json.py", "print('evil')")
    changing.change("/payload", "data", "new")
    assert is_held(eager, pod / "script")
    assert is_held(eager, pod)
    assert not is_held(eager, pod / "payload")
    assert sorted(os.listdir(pod)) == [".run", "a.recipe", "logs", "output", "payload", "script"]
    until(lambda: (pod / "payload/data").exists())
    assert go_on(pod) == "ran\n"
    until(lambda: (pod / "json.py").exists() and (pod / "script/second.sh").read_text() == EVIL)
    assert DENIED in touch(pod)
    assert not is_held(eager, pod / "script")


def test_what_runs_outlives_the_driver_as_it_is(tmp_path: Path, changing: Changing) -> None:
    with mounted(tmp_path, changing, None, "--attr-ttl", "0", "--sandbox", "off") as mount:
        pod = waiting(mount, "adopted")
        mount.kill()
        changing.change("/script", "second.sh", EVIL)
        mount.start()
        assert is_held(mount, pod / "script")
        assert go_on(pod) == "ran\n"
        until(lambda: (pod / "script/second.sh").read_text() == EVIL)


def test_what_runs_is_not_thrown_out_of_the_cache(tmp_path: Path, changing: Changing) -> None:
    """Fetched again, it could be another version of the same size."""
    with mounted(tmp_path, changing, None, "--cache-size", "1M") as mount:
        pod = waiting(mount, "kept")
        changing.change("/script", "second.sh", "echo evi")
        filler = mount.pod("filler")
        for number in range(8):
            (filler / f"{number}").write_bytes(os.urandom(1 << 19))
        mount.sync()
        until(lambda: mount.status()["cache_use"]["clean"] <= 1 << 20)
        assert go_on(pod) == "ran\n"


def test_what_a_program_changes_of_itself_overwrites_nobodys_work(
    eager: Mount, changing: Changing
) -> None:
    """Its own change is its own; what somebody else has put there meanwhile is kept beside it."""
    pod = waiting(eager, "both")
    changing.change("/script", "second.sh", EVIL)
    (pod / "script/second.sh").write_text("echo mine")
    assert go_on(pod) == "mine\n"
    until(lambda: (pod / "script/second.sh").read_text() == EVIL)
    (copy,) = (pod / "script").glob("second (conflict *")
    assert copy.read_text() == "echo mine"
    eager.sync()


def test_a_run_that_does_not_begin_holds_nothing(eager: Mount, changing: Changing) -> None:
    pod = forked(eager, "not begun")
    vouch(pod)
    with (pod / "script/x.sh").open("a") as file:
        file.write(" ")
    assert DENIED in touch(pod)
    changing.change("/script", "new", "1")
    until(lambda: (pod / "script/new").exists())
