"""Compute pods for tests and benches: a mount with its devnet, pods with recipes, runs to wait for."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpodfs import mountpoint
from tests.mount.harness import CPODFS, Mount, sh
from tests.patience import PATIENCE_S, until

SCRIPTS = Path(__file__).with_name("run_scripts")
WAIT = "while [ -e .run ]; do sleep 0.05; done"
SECRET = "8c1f-only-the-driver-knows"
IN_MODIFY, IN_DELETE_SELF = 0x2, 0x400


class DevnetMount(Mount):
    """What ``cpodfs mount --devnet`` gives a user: a mount whose runs find a market."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.point = folder / "pods"
        self.cache = folder / "cache"
        self.log = folder / "driver.log"
        self.devnet = folder / "devnet"
        self.options = options
        self.env = os.environ | {
            "XDG_STATE_HOME": str(folder / "state"),
            "XDG_CONFIG_HOME": str(folder / "config"),
            "DATABASE_PASSWORD": SECRET,
            "CPODFS_PASSWORD": SECRET,
        }
        self.point.mkdir(parents=True, exist_ok=True)
        self.process: subprocess.Popen[str] | None = None

    def command(self) -> list[str]:
        return [
            *(*CPODFS, "mount", str(self.point), "--devnet", "--devnet-state", str(self.devnet)),
            *(
                "--cache-dir",
                str(self.cache),
                "--log-file",
                str(self.log),
                "--run-grace",
                "8",
                *self.options,
            ),
        ]

    @property
    def runs_folder(self) -> Path:
        """Where the driver keeps its records and spools, one folder per pod."""
        (found,) = self.cache.glob("*/runs")
        return found


@contextlib.contextmanager
def devnet_mounted(folder: Path, *options: str) -> Iterator[DevnetMount]:
    """A ``DevnetMount`` for the time of the block, taken down whatever happens."""
    mount = DevnetMount(folder, *options)
    try:
        yield mount.start()
    finally:
        if mount.process is not None:
            mount.stop()
        if mountpoint.find(mount.point) is not None:
            mountpoint.unmount(mount.point, lazy=True)


def compute_pod(mount: Mount, name: str, argv: list[str] | str, *scripts: str) -> Path:
    """A pod with a recipe for the command ``argv`` and copies of these ``run_scripts``."""
    pod = mount.pod(name)
    (pod / "script").mkdir(exist_ok=True)
    for script in scripts:
        shutil.copy(SCRIPTS / script, pod / "script")
    command = argv if isinstance(argv, str) else shlex.join(argv)
    (pod / "a.recipe").write_text(json.dumps({"name": name, "golem": {"exec": command}}))
    return pod


def run_to_end(pod: Path) -> Path:
    """Touch, wait as a shell user would, and return the run's log folder."""
    before = run_folders(pod)
    sh(f"touch .run; {WAIT}", pod)
    (new,) = [folder for folder in run_folders(pod) if folder not in before]
    return new


def run_folders(pod: Path) -> list[Path]:
    """The log folders of a pod's runs, the oldest first."""
    logs = pod / "logs"
    return sorted(logs.iterdir()) if logs.exists() else []


def record(folder: Path) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return answer


def text(path: Path) -> str:
    """What a file holds so far: nothing, if it is not there yet."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def wait_gone(pod: Path) -> None:
    until(lambda: not (pod / ".run").exists())


def run_processes(run_id: str) -> list[int]:
    """The processes that belong to a run, by the mark in their environment."""
    mark = f"CPODFS_RUN_ID={run_id}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


class Gate:
    """A folder outside the mount where ``gated.py`` counts its runs and waits to be let on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._gate, self._said = folder / "gate", folder / "said"
        for fifo in (self._gate, self._said):
            os.mkfifo(fifo)
        # Open for both, so that neither side's opening waits for the other's.
        self._fds = [os.open(fifo, os.O_RDWR) for fifo in (self._gate, self._said)]

    @property
    def starts(self) -> int:
        """How often the program was started."""
        count = self.folder / "count"
        return len(count.read_text().splitlines()) if count.exists() else 0

    def wait(self) -> str:
        """The next line that the program said to the test."""
        assert select.select([self._fds[1]], [], [], PATIENCE_S)[0], "the program said nothing"
        return os.read(self._fds[1], 4096).decode().strip()

    def open(self) -> None:
        """Let the program on, once."""
        os.write(self._fds[0], b"go\n")

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)


class Inotify:
    """A watch on one path, for lack of inotify-tools."""

    def __init__(self, path: Path, mask: int = IN_MODIFY) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.fd = libc.inotify_init1(os.O_CLOEXEC)
        if libc.inotify_add_watch(self.fd, os.fsencode(path), mask) < 0:
            raise OSError(ctypes.get_errno(), "inotify_add_watch", path)

    def wait(self, timeout_s: float = PATIENCE_S) -> bool:
        """Whether there was an event in time."""
        if not select.select([self.fd], [], [], timeout_s)[0]:
            return False
        os.read(self.fd, 65536)
        return True

    def close(self) -> None:
        os.close(self.fd)


@contextlib.contextmanager
def gated_pod(mount: Mount, test: str, gate: Gate) -> Iterator[Path]:
    """A pod of a test's own whose program waits at the gate; ended whatever happens."""
    name = test.removeprefix("test_")[:60]
    pod = compute_pod(mount, name, ["python3", "script/gated.py", str(gate.folder)], "gated.py")
    yield pod
    if pod.exists():
        sh("rm -f .run", pod)
        wait_gone(pod)
