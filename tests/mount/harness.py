"""Real mounts for tests and benches: a driver process, a development server, an account of its own."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cpodfs import mountpoint
from cpodfs.devnet import launch
from tests.evidence import files_of_runs, tails
from tests.patience import PATIENCE_S

STARTED: list[Mount] = []
"""Mounts of this process, the latest last: what they have left is told of a test that failed."""
CPODFS = [sys.executable, "-m", "cpodfs"]


class Child(subprocess.Popen[str]):
    """A process that is killed when its block fails: the end of the block waits for it."""

    def __exit__(self, kind: type[BaseException] | None, *details: Any) -> None:
        if kind is not None:
            self.kill()
        super().__exit__(kind, *details)


class Server:
    """A devnet, and its faults and request counters."""

    def __init__(self, state: Path, *extra: str) -> None:
        self.state = state
        self._extra = extra
        self._running = launch.start(state, extra)

    @property
    def net(self) -> launch.Devnet:
        return self._running.devnet

    @property
    def url(self) -> str:
        return self.net.dfs_url

    def stop(self) -> None:
        self._running.stop()

    def kill(self) -> None:
        self._running.kill()

    def freeze(self) -> None:
        """It takes connections, and answers nothing."""
        os.kill(self.net.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.net.pid, signal.SIGCONT)

    def start_again(self, *extra: str) -> None:
        """With further options for this time, as "--empty-store"."""
        self._running = launch.start(self.state, (*self._extra, *extra))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.url + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json", **self.control_headers()},
            method="POST",
        )
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return json.loads(answer.read() or b"{}")

    def control_headers(self) -> dict[str, str]:
        return self.net.control_headers()

    def faults(self, **faults: Any) -> None:
        self.post("/devnet/faults", faults)

    def stats(self) -> Any:
        """The server's own counters since the last reset."""
        request = urllib.request.Request(self.url + "/devnet/stats", headers=self.control_headers())
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return json.loads(answer.read())

    def calls(self) -> dict[str, int]:
        """Requests since the last reset, by "METHOD /path"; but how far Swarm is, which is asked in the
        background, some time later."""
        endpoints = self.stats()["endpoints"]
        own = ("/devnet/", "/v1/file/status")
        return {k: e["count"] for k, e in endpoints.items() if not any(name in k for name in own)}

    def reset_calls(self) -> None:
        self.post("/devnet/stats/reset", {})

    def signup(self) -> tuple[str, str]:
        """A new account: name and password."""
        user, password = f"user{secrets.token_hex(4)}", secrets.token_hex(16)
        self.post("/v2/user/signup", {"userName": user, "password": password})
        return user, password


class RealServer(Server):
    """A FairOS-DFS that somebody else runs: accounts can be made, nothing can be injected. A devnet
    wants the key of its controls for accounts, too."""

    def __init__(self, url: str, key: Path | None = None) -> None:
        self._url = url
        self._key = key

    @property
    def url(self) -> str:
        return self._url

    def control_headers(self) -> dict[str, str]:
        if self._key is None:
            return {}
        return {"Authorization": f"Bearer {self._key.read_text().strip()}"}

    def stop(self) -> None:
        return


class Mount:
    """One account's mount, served by a driver process in the foreground."""

    def __init__(
        self, folder: Path, server: Server, account: tuple[str, str] | None = None, *options: str
    ) -> None:
        self.point = folder / "pods"
        self.cache = folder / "cache"
        self.log = folder / "driver.log"
        self.server = server
        self.user, password = account or server.signup()
        self.password_file = folder / "password"
        self.password_file.write_text(password)
        self.password_file.chmod(0o600)
        self.options: Sequence[str] = options
        self.env = os.environ | {
            "XDG_STATE_HOME": str(folder / "state"),
            "XDG_CONFIG_HOME": str(folder / "config"),
        }
        self.point.mkdir(exist_ok=True)
        self.process: subprocess.Popen[str] | None = None
        self.notices: list[str] = []
        """What it said before it was mounted, or why it was not."""

    def command(self) -> list[str]:
        return [
            *(*CPODFS, "mount", str(self.point), "--server", self.server.url, "--user", self.user),
            *("--password-file", str(self.password_file), "--cache-dir", str(self.cache)),
            *("--log-file", str(self.log), *self.options),
        ]

    def start(self, *, warned: bool = False) -> Mount:
        """``warned``: it may have something to say of its cache first, which ``notices`` has."""
        assert self.process is None
        if self not in STARTED:
            STARTED.append(self)
        self.process = subprocess.Popen(
            self.command(), stderr=subprocess.PIPE, text=True, env=self.env
        )
        assert self.process.stderr is not None
        if not select.select([self.process.stderr], [], [], PATIENCE_S)[0]:
            raise AssertionError("the mount was not ready in time")
        self.notices = []
        while "mounted at" not in (line := self.process.stderr.readline()):
            if not line:
                raise AssertionError("".join(self.notices) + self.logged()[-3000:])
            self.notices.append(line)
        if self.notices and not warned:
            self.process.kill()
            raise AssertionError("".join(self.notices))
        return self

    def evidence(self) -> Iterator[tuple[str, str]]:
        """Titles and texts of what its driver and its runs wrote down; the mount is not touched."""
        yield from tails([self.log, *files_of_runs(self.cache.glob("*/runs/*/*"))])

    def logged(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def stop(self) -> int:
        """SIGTERM; returns the exit code. What the driver said last is in ``said``."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        assert self.process is not None
        _, self.said = self.process.communicate(timeout=PATIENCE_S)
        code = self.process.returncode
        self.process = None
        return code

    def kill(self) -> None:
        """kill -9, and the dead mount is left for the next start to clean up."""
        assert self.process is not None
        self.process.kill()
        self.wait()

    def remount(self, *, wipe: bool = False) -> None:
        code = self.stop()
        assert code == 0, self.said + self.logged()[-3000:]
        if wipe:
            shutil.rmtree(self.cache)
        self.start()

    def cli(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*CPODFS, *arguments], capture_output=True, text=True, env=self.env, timeout=PATIENCE_S
        )
        assert not check or done.returncode == 0, done.stderr
        return done

    def sync(self) -> None:
        """Wait until everything is uploaded."""
        self.cli("sync", str(self.point))

    def status(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(os.getxattr(self.point, "user.cpodfs.status"))
        return answer

    def pod(self, name: str = "pod") -> Path:
        """A pod of that name, made if need be."""
        path = self.point / name
        path.mkdir(exist_ok=True)
        return path


@contextlib.contextmanager
def mounted(
    folder: Path, server: Server, account: tuple[str, str] | None = None, *options: str
) -> Iterator[Mount]:
    """A mount for the time of the block, taken down whatever happens."""
    mount = Mount(folder, server, account, *options)
    try:
        yield mount.start()
    finally:
        if mount.process is not None:
            mount.kill()
        if mountpoint.find(mount.point) is not None:
            mountpoint.unmount(mount.point, lazy=True)


def peak_mib(pid: int) -> float:
    """The highest RSS of a process since it began."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def run(*argv: str | Path, cwd: Path | None = None, check: bool = True) -> str:
    """A real tool's standard output."""
    done = subprocess.run(
        [str(a) for a in argv], cwd=cwd, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert not check or done.returncode == 0, f"{argv}: {done.stderr}"
    return done.stdout


def sh(script: str, cwd: Path, check: bool = True) -> str:
    """What a shell user would type."""
    return run("sh", "-ec", script, cwd=cwd, check=check)


def tree(root: Path, attempts: int = 1) -> dict[str, str]:
    """Every path below ``root`` with its content's hash. A read that fails is repeated as a user
    would."""
    found = {}
    pending = [root]
    while pending:
        folder = pending.pop()
        for name in sorted(_patiently(functools.partial(os.listdir, folder), attempts)):
            path = folder / name
            if path.is_dir():
                pending.append(path)
                found[str(path.relative_to(root))] = "dir"
            else:
                data = _patiently(path.read_bytes, attempts)
                found[str(path.relative_to(root))] = hashlib.sha256(data).hexdigest()
    return found


def _patiently(read: Callable[[], Any], attempts: int) -> Any:
    for attempt in range(attempts):
        try:
            return read()
        except OSError:
            if attempt == attempts - 1:
                raise
    raise AssertionError
