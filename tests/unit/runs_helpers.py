"""For the tests of runs: a pod without FUSE, programs that one can talk to, and a manager around."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import trio

from cpodfs.recipe import Recipe, parse_recipe
from cpodfs.runs import state
from cpodfs.runs.manager import RunManager
from tests.evidence import files_of_runs, tails
from tests.patience import PATIENCE_S

GRACE_S = 4.0
APP_KEY = "app-key-7c5f0e"


def recipe(argv: list[str] | str, **golem: object) -> Recipe:
    command = argv if isinstance(argv, str) else shlex.join(argv)
    return parse_recipe(json.dumps({"golem": {"exec": command, **golem}}).encode(), file="a.recipe")


def python(code: str) -> Recipe:
    return recipe([sys.executable, "-S", "-c", code])


async def until(true: Callable[[], object]) -> None:
    """Wait for what another process does and nothing tells."""
    with trio.fail_after(PATIENCE_S):
        while not true():
            await trio.sleep(0.005)


class Fifo:
    """A pipe with a name: programs write lines into it, or wait for one."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        os.mkfifo(path)
        self._fd: int | None = None
        self._data = b""

    def listen(self, *, hold: bool = True) -> Fifo:
        """``hold``: keep a writing end too, so that the writers' end is not seen."""
        flags = os.O_RDWR if hold else os.O_RDONLY
        self._fd = os.open(self.path, flags | os.O_NONBLOCK)
        return self

    async def line(self) -> str:
        while b"\n" not in self._data:
            self._data += await self._read()
        line, _, self._data = self._data.partition(b"\n")
        return line.decode()

    async def closed(self) -> None:
        """Every process that had it open for writing is gone."""
        while await self._read():
            pass

    async def _read(self) -> bytes:
        assert self._fd is not None
        with trio.fail_after(PATIENCE_S):
            await trio.lowlevel.wait_readable(self._fd)
        return os.read(self._fd, 4096)

    async def release(self) -> None:
        """Let a program go on that reads a line from it."""
        with trio.fail_after(PATIENCE_S):
            await trio.to_thread.run_sync(lambda: Path(self.path).write_text("go\n"))


class Bench:
    """One manager over temporary folders; ``ended()`` waits for a run's end."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.runs_dir = base / "runs"
        self.mount = base / "mount"
        (self.mount / "pod").mkdir(parents=True, exist_ok=True)
        self._send, self._receive = trio.open_memory_channel[str](100)
        self.manager: RunManager

    @contextlib.asynccontextmanager
    async def managed(self, **options):
        options.setdefault("cancel_grace_s", GRACE_S)
        options.setdefault("environment", lambda: {"YAGNA_APPKEY": APP_KEY})
        self.manager = RunManager(
            self.runs_dir, self.mount, on_end=self._send.send_nowait, **options
        )
        with trio.fail_after(2 * PATIENCE_S):
            async with trio.open_nursery() as nursery:
                await nursery.start(self.manager.run)
                try:
                    yield self.manager
                except BaseException as error:
                    for name, said in tails(files_of_runs(self.runs_dir.glob("*/*"))):
                        error.add_note(f"{name}:\n{said}")
                    raise
                finally:
                    # A test that fails must not leave programs behind either.
                    with trio.CancelScope(shield=True):
                        await self.manager.cancel_all()
                nursery.cancel_scope.cancel()

    async def ended(self) -> str:
        with trio.fail_after(PATIENCE_S):
            return await self._receive.receive()

    async def run(self, what: Recipe, pod: str = "pod") -> dict:
        """Begin, wait, and return the last record."""
        run_id = self.manager.begin(pod, what)
        assert await self.ended() == pod
        record = self.manager.history(pod)[0]
        assert record["id"] == run_id
        return record

    def published(self, record: dict, name: str) -> bytes:
        return (self.mount / record["pod"] / record["log"] / name).read_bytes()

    async def copied(self, run_id: str, content: bytes, pod: str = "pod") -> None:
        """Wait until the copy of stdout in the pod has come that far, and the record is there."""
        folder = self.mount / pod / "logs" / run_id
        await until((folder / "run.json").exists)
        await until(lambda: (folder / "stdout.log").read_bytes() == content)

    def folder(self, record: dict) -> Path:
        return self.runs_dir / state.pod_key(record["pod"]) / record["id"]
