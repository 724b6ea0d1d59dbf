"""Start a devnet as a child process and stop it again: from trio code, or without any event loop.

Imports ``state`` and errors only, so it is safe in a trio program. The child lives in a session of
its own (Ctrl-C in the terminal must not kill it while the parent still uploads) and ends when the
pipe to its standard input closes, hence with its parent, however that dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import trio

from cpodfs.devnet.state import announcement, default_state, is_taken
from cpodfs.errors import CpodfsError

READY_DEADLINE_S = 60.0
STOP_DEADLINE_S = 20.0
_PREDECESSOR_DEADLINE_S = 10.0
_PREDECESSOR_POLL_S = 0.05
_LOG_NAME = "devnet.log"
_LOG_TAIL = 2000


class DevnetFailed(CpodfsError):
    """The child did not start; the message ends with what it wrote to stderr."""

    several_lines = True


_PATHS = (
    *("password_file", "control_key_file", "app_key_file"),
    *("gftp_dir", "run_path_dir", "state"),
)


@dataclass(frozen=True)
class Devnet:
    """The ready line. The market's fields are None without a market. ``unconfined``: why the market
    runs tasks without a sandbox. ``stays``: it does not end with whoever started it."""

    dfs_url: str
    user: str
    password_file: Path
    control_key_file: Path
    yagna_url: str | None
    app_key_file: Path | None
    gftp_dir: Path | None
    run_path_dir: Path | None
    unconfined: str | None
    pid: int
    state: Path
    stays: bool

    def password(self) -> str:
        """The default user's password, read from its file."""
        return self.password_file.read_text().strip()

    def control_headers(self) -> dict[str, str]:
        """What ``/devnet/…`` of both servers and signing up ask for."""
        return {"Authorization": f"Bearer {self.control_key_file.read_text().strip()}"}

    @classmethod
    def parse(cls, line: bytes) -> Devnet:
        """Raises ValueError, KeyError or TypeError for what is not a ready line."""
        fields: dict[str, Any] = json.loads(line)
        fields.setdefault("unconfined", "it is of an earlier version")
        known: dict[str, Any] = {name: fields[name] for name in cls.__dataclass_fields__}
        for name in _PATHS:
            known[name] = None if known[name] is None else Path(known[name])
        return cls(**known)


def found(state: Path) -> Devnet | None:
    """The devnet that has this folder; None when none does, or does not answer yet."""
    line = announcement(state)
    return None if line is None else Devnet.parse(line)


def _to_join(state: Path) -> Devnet | None:
    other = found(state)
    return other if other is not None and other.stays else None


@asynccontextmanager
async def running(
    state: Path | None = None, extra_args: Sequence[str] = ()
) -> AsyncIterator[Devnet]:
    """A devnet for the time of the block: one that runs by itself with this folder, else our own.

    Raises DevnetFailed when that is not ready in 10 s, after 10 s at most in which another one may
    end.
    """
    folder = (state or default_state()).absolute()
    for pause_s in _while_taken(folder):
        await trio.sleep(pause_s)
    if (other := _to_join(folder)) is not None:
        yield other
        return
    with _log(folder) as log:
        process = await trio.lowlevel.open_process(
            _command(folder, extra_args),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.file,
            start_new_session=True,
        )
        try:
            yield await _first_line(process, log)
        finally:
            with trio.CancelScope(shield=True):
                await _end(process)


async def _first_line(process: trio.Process, log: _Log) -> Devnet:
    assert process.stdout is not None
    line = b""
    with trio.move_on_after(READY_DEADLINE_S) as scope:
        while not line.endswith(b"\n"):
            chunk = await process.stdout.receive_some(65536)
            if not chunk:
                break
            line += chunk
    return _ready(line, log, timed_out=scope.cancelled_caught)


async def _end(process: trio.Process) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    await process.stdin.aclose()
    with trio.move_on_after(STOP_DEADLINE_S):
        await process.wait()
    if process.returncode is None:
        process.kill()
        await process.wait()
    await process.stdout.aclose()


class Running:
    """A devnet started by ``start``; also a context manager that stops it."""

    def __init__(self, process: subprocess.Popen[bytes], devnet: Devnet) -> None:
        self._process = process
        self.devnet = devnet

    def stop(self) -> None:
        """Let it end by itself, at most for 5 s."""
        _close(self._process)

    def wait(self, deadline_s: float) -> int:
        """Its exit status, negative for a signal. Raises subprocess.TimeoutExpired."""
        return self._process.wait(deadline_s)

    def kill(self) -> None:
        """SIGKILL, for tests of what survives it."""
        self._process.kill()
        _close(self._process)

    def __enter__(self) -> Running:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def start(state: Path | None = None, extra_args: Sequence[str] = ()) -> Running:
    """Start a devnet and wait until it answers, as ``running`` does. Raises DevnetFailed."""
    folder = state or default_state()
    for pause_s in _while_taken(folder):
        time.sleep(pause_s)
    with _log(folder) as log:
        process = subprocess.Popen(
            _command(folder, extra_args),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.file,
            start_new_session=True,
        )
        try:
            line, timed_out = _read_line(process)
            return Running(process, _ready(line, log, timed_out=timed_out))
        except BaseException:
            process.kill()
            _close(process)
            raise


def _while_taken(state: Path) -> Iterator[float]:
    """Pauses (s) to make while another devnet has the folder, up to a limit.

    The one whose parent was killed is still ending when the parent's successor comes. One that goes
    on is for the new devnet to find and to name.
    """
    deadline = time.monotonic() + _PREDECESSOR_DEADLINE_S
    while is_taken(state) and _to_join(state) is None and time.monotonic() < deadline:
        yield _PREDECESSOR_POLL_S


def _read_line(process: subprocess.Popen[bytes]) -> tuple[bytes, bool]:
    """What the child wrote up to its first newline, and whether the deadline passed first."""
    assert process.stdout is not None
    line, deadline = b"", time.monotonic() + READY_DEADLINE_S
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            if not selector.select(max(0.0, deadline - time.monotonic())):
                return line, True
            chunk = os.read(process.stdout.fileno(), 65536)
            if not chunk:
                break
            line += chunk
    return line, False


def _close(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    try:
        process.wait(STOP_DEADLINE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


def _command(state: Path, extra_args: Sequence[str]) -> list[str]:
    module = [sys.executable, "-m", "cpodfs.devnet"]
    return [*module, "--stdin-eof", "--state", str(state), *extra_args]


@dataclass(frozen=True)
class _Log:
    """The child's stderr, appended to a file; ``start`` is where this child's part begins."""

    file: IO[bytes]
    start: int

    def tail(self) -> str:
        text = Path(self.file.name).read_bytes()[self.start :]
        return text[-_LOG_TAIL:].decode("utf-8", "replace").strip().removeprefix("Error: ")


@contextlib.contextmanager
def _log(state: Path) -> Iterator[_Log]:
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = (state / _LOG_NAME).open("ab")
    except OSError as error:
        raise DevnetFailed(f"{state}: {error.strerror}") from error
    with file:
        yield _Log(file, file.tell())


def _ready(line: bytes, log: _Log, *, timed_out: bool) -> Devnet:
    if timed_out:
        raise DevnetFailed(f"the devnet was not ready in {READY_DEADLINE_S:g} s: {log.tail()}")
    try:
        return Devnet.parse(line)
    except (ValueError, KeyError, TypeError) as error:
        raise DevnetFailed(f"the devnet did not start: {log.tail()}") from error
