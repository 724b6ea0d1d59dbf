"""The surroundings of the model test: a server and a mount, and what goes wrong with them.

Imports the harness. One world serves many examples, each in a pod of its own; whoever breaks it throws
it away.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpodfs import mountpoint
from tests.mount.harness import Mount, Server
from tests.patience import PATIENCE_S

SYNC_S = 60.0
HANG_S = 120.0
ALARMS = ("Traceback", "wait for each other", "conflict:", "hidden:")
"""What the driver's log must not say: nobody else changes these pods."""


class Mismatch(AssertionError):
    """The mount and the plain folder disagree."""


class World:
    """A server and a mount that last for many examples, each of which has a pod of its own."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="model-"))
        self.server = Server(self.folder / "devnet", "--no-market")
        self.up = True
        self.faulty = False
        self._options = (3600.0, 60.0)
        self.mount = Mount(self.folder, self.server, None, *self._flags())
        self.mount.start()
        self._pods = 0
        self._log_read = 0

    def _flags(self) -> tuple[str, ...]:
        delay, ttl = self._options
        return (
            *("--writeback-delay", str(delay), "--attr-ttl", str(ttl)),
            *("--timeout", "2", "--stall", "60"),
        )

    @property
    def shaky(self) -> bool:
        return self.faulty or not self.up

    def close(self) -> None:
        if self.mount.process is not None:
            self.mount.kill()
        if mountpoint.find(self.mount.point) is not None:
            mountpoint.unmount(self.mount.point, lazy=True)
        if self.up:
            self.server.stop()
        shutil.rmtree(self.folder)

    def configure(self, delay: float, ttl: float) -> None:
        if (delay, ttl) != self._options:
            self._options = (delay, ttl)
            self.mount.options = self._flags()
            self.mount.remount()

    def new_pod(self) -> str:
        self._pods += 1
        name = f"pod{self._pods}"
        (self.mount.point / name).mkdir()
        return name

    def faults(self, **faults: Any) -> None:
        if self.up:
            self.server.faults(match="/v1/(file|dir|pod)", **faults)
            self.faulty = True

    def server_down(self, *, kill: bool) -> None:
        if self.up:
            (self.server.kill if kill else self.server.stop)()
            self.up = False

    def calm(self) -> None:
        """The network is as it should be."""
        if not self.up:
            self.server.start_again()
            self.up = True
        if self.faulty:
            self.server.faults()
            self.faulty = False

    def sync(self) -> None:
        """Wait until the server has heard of everything."""
        self.calm()
        point = self.mount.point
        os.setxattr(point, b"user.cpodfs.drain", b"1")
        deadline = time.monotonic() + SYNC_S
        while (status := self.mount.status())["pending"] or status["deletions"]:
            if time.monotonic() > deadline:
                raise Mismatch(f"not synced in {SYNC_S} s: {status}")
            time.sleep(0.01)
        os.setxattr(point, b"user.cpodfs.drain", b"0")

    def check_log(self) -> None:
        said = self.mount.logged()
        news, self._log_read = said[self._log_read :], len(said)
        if any(alarm in news for alarm in ALARMS):
            raise Mismatch(f"the driver's log says:\n{news[-6000:]}")

    def server_tree(self, pod: str) -> dict[str, int | None]:
        """What the server itself lists: sizes of files, None for directories, by path in the pod."""
        return Api(self.server, self.mount).sizes(pod)


class Api:
    """The server, spoken to by somebody who is not the driver."""

    def __init__(self, server: Server, mount: Mount) -> None:
        """A session of its own for the mount's account."""
        self._url = server.url
        self._token = ""
        login = {"userName": mount.user, "password": mount.password_file.read_text()}
        self._token = self.call("POST", "/v2/user/login", **login)["accessToken"]

    def call(self, method: str, path: str, **body: str) -> Any:
        return json.loads(self._raw(method, path, **body) or b"{}")

    def sizes(self, pod: str) -> dict[str, int | None]:
        """All of a pod, opened anew: sizes of files, None for directories, by path in the pod."""
        self.call("POST", "/v1/pod/open", podName=pod)
        found: dict[str, int | None] = {}
        pending = ["/"]
        while pending:
            folder = pending.pop()
            query = urllib.parse.urlencode({"podName": pod, "dirPath": folder})
            listing = self.call("GET", f"/v1/dir/ls?{query}")
            for entry in listing.get("dirs") or ():
                path = os.path.join(folder, entry["name"])
                found[path[1:]] = None
                pending.append(path)
            for entry in listing.get("files") or ():
                found[os.path.join(folder, entry["name"])[1:]] = int(entry["size"])
        return found

    def read(self, pod: str, path: str) -> bytes:
        """The content of a file of an open pod."""
        query = urllib.parse.urlencode({"podName": pod, "filePath": f"/{path}"})
        return self._raw("GET", f"/v1/file/download?{query}")

    def _raw(self, method: str, path: str, **body: str) -> bytes:
        request = urllib.request.Request(
            self._url + path,
            json.dumps(body).encode() if body else None,
            {"Content-Type": "application/json", "Authorization": f"Bearer {self._token}"},
            method=method,
        )
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            content: bytes = answer.read()
        return content


@contextlib.contextmanager
def watchdog(world: World) -> Iterator[None]:
    """A call into the mount that hangs would hang the test: the driver's death ends both."""

    def bite() -> None:
        print(f"watchdog: no answer for {HANG_S} s", file=sys.stderr)
        world.mount.process and world.mount.process.kill()

    timer = threading.Timer(HANG_S, bite)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
