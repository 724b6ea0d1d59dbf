"""The supervisor's end of a requestor run's gateway: its socket, its key, its process.

Imports `provider_link`, `stream` and the standard library only, like all that the supervisor loads.
The socket listens before the program starts, and `gateway` is started only when somebody connects:
a program that has nothing to do with yagna costs nothing, and the first to call waits in the backlog.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time

from cpodfs.runs.provider_link import Link
from cpodfs.runs.stream import Spool, Stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

KEY, URL = "YAGNA_APPKEY", "YAGNA_API_URL"
_DEFAULT_URL = "http://127.0.0.1:7465"
_APIS = {
    f"YAGNA_{name}_URL": f"/{name.lower()}-api/v1"
    for name in ("MARKET", "ACTIVITY", "PAYMENT", "NET")
}
_BACKLOG = 1024
END_S = 20.0
"""How long it has to find out what the program has left."""


class Gateway:
    """One run's. ``env``: the program's environment, in which there is no key but its own.

    ``pipe``: readable when somebody connects, and `start` is due. Raises OSError.
    """

    def __init__(self, env: dict[str, str], limits: dict[str, Any]) -> None:
        import socket

        self._listener: socket.socket | None = socket.create_server(
            ("127.0.0.1", 0), backlog=_BACKLOG
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._link: Link | None = None
        self.pipe = self._listener.fileno()
        key = os.urandom(16).hex()
        self._job = {
            "key": key,
            "app_key": env[KEY],
            "yagna": env.get(URL) or _DEFAULT_URL,
            "apis": {path: env[name] for name, path in _APIS.items() if env.get(name)},
            **limits,
        }
        self.env = {name: value for name, value in env.items() if name not in _APIS}
        port = self._listener.getsockname()[1]
        self.env |= {KEY: key, URL: f"http://127.0.0.1:{port}"}

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(
        self, run_id: str, spools: dict[str, Spool], on_status: Callable[[dict[str, Any]], None]
    ) -> list[Stream | Link]:
        """Start the process; what is to be pumped from now on. Raises OSError."""
        assert self._listener is not None
        fd = self._listener.fileno()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "cpodfs.runs.gateway", str(fd)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd="/",
                # Ours, in which there is no secret: the key goes through stdin.
                env={**os.environ, "CPODFS_RUN_ID": run_id},
                pass_fds=[fd],
                process_group=0,
            )
        finally:
            # Closed here, so that nobody waits for an answer once the process is gone.
            self._listener.close()
            self._listener = None
        stdout, stderr = self._process.stdout, self._process.stderr
        assert stdout is not None
        assert stderr is not None
        self._say(json.dumps(self._job).encode() + b"\n")
        self._link = Link(stdout.fileno(), spools, on_status)
        return [self._link, Stream(stderr.fileno(), spools["stderr"])]

    def finish(self) -> bool:
        """The program has ended: hear what is left of it, for `END_S` at most. True if it was heard."""
        if self._listener is not None:
            self._listener.close()
        if self._process is None or self._link is None:
            return True
        self._say(b"end\n")
        deadline = time.monotonic() + END_S
        while self._link.end is None and (left := deadline - time.monotonic()) > 0:
            select.select([self._link.pipe], [], [], left)
            if self._link.pump() is None:
                break
        # Whether it has said its last word or not: it has nothing more to do.
        self._process.kill()
        self._process.wait()
        return self._link.end is not None

    def _say(self, line: bytes) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except BrokenPipeError:
            # It died; what it said last is in the log.
            pass
