"""What a task sees as its container: a folder at ``/golem``, another at ``/tmp``, and programs.

Imports `rest` for the log. With bubblewrap: no network, no capabilities, a system to read and
two folders to write; all commands of an activity share one set of processes, so that what one
leaves in the background goes on, as in a real VM. Without: plain processes, where ``/golem`` and
``/tmp`` in a command's words are replaced by the folders' real paths (a program that builds such a
path itself does not find it). A task's folder is hostile ground: no link in it is followed.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import re
import select
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from cpodfs.devnet.rest import log

Output = Callable[[str, bytes], Awaitable[None]]
"""Called with ``"stdout"`` or ``"stderr"`` and what a process has just written there; the process
is not read from until it returns."""

VOLUMES = ("golem", "tmp")
WORK_DIR = "/golem/work"
_GOLEM_DIRS = ("work", "input", "output", "resource")
_SYSTEM = ("usr", "bin", "sbin", "lib", "lib32", "lib64", "libx32", "opt")
_ETC = (
    *("alternatives", "group", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime"),
    *("mime.types", "nsswitch.conf", "passwd", "ssl/certs"),
)
_MARK = "CPODFS_ACTIVITY"
_IDLE = ("/bin/sleep", "infinity")
_START_S = 60.0
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CHUNK = 8192
"""Of output: small enough that its JSON fits one line of an event stream in aiohttp's client."""
_PIPES_GRACE_S = 1.0
_NS_GET_USERNS = 0xB701
"""See ioctl_ns(2); the number on x86 and ARM."""


class ContainerError(Exception):
    """A command that cannot be carried out, said as its requestor should read it."""


class Isolation:
    """How processes are kept apart, found out once for each market (`probe`). ``missing``: why they
    are not, in one line."""

    def __init__(self, bwrap: str | None, missing: str = "") -> None:
        self.bwrap = bwrap
        self.missing = missing

    @classmethod
    def probe(cls, scratch: Path) -> Isolation:
        """Try bubblewrap as it will be used; without it, say so in the log. Blocks briefly."""
        bwrap = shutil.which("bwrap")
        if bwrap is None:
            log.warning("sandbox_missing hint='install bubblewrap: tasks run unconfined'")
            return cls(None, "bwrap is missing; install it with: apt install bubblewrap")
        container = Container(scratch, cls(bwrap), "probe")
        container.create()
        try:
            container.start()
            done = subprocess.run(
                container.command(["/bin/sh", "-c", "echo > /golem/work/probe"]),
                capture_output=True,
                timeout=_START_S,
                check=False,
                env={},
                pass_fds=container.handles,
            )
            works = done.returncode == 0 and container.path("/golem/work/probe").exists()
            reason = done.stderr.decode(errors="replace").strip()
        except (OSError, ContainerError, subprocess.TimeoutExpired) as error:
            works, reason = False, str(error)
        finally:
            container.remove()
        if not works:
            log.warning("sandbox_broken reason=%r hint='tasks run unconfined'", reason)
            said = (reason.splitlines() or ["no reason given"])[-1].removeprefix("bwrap: ")
            return cls(None, f"bwrap does not work here: {said}")
        return cls(bwrap)


class Container:
    """The folder of one activity and the processes in it.

    ``create``, ``start``, any number of ``run``, ``remove``. ``on_process`` is told the process
    group that runs (pid, start time in clock ticks), and (None, None) when it has ended, so that
    somebody can end it when this process cannot. The folder's name marks its processes
    (`kill_marked`). ``handles``: descriptors that processes of `command` must inherit.
    """

    def __init__(
        self,
        folder: Path,
        isolation: Isolation,
        hostname: str,
        on_process: Callable[[int | None, int | None], None] = lambda _pid, _started: None,
    ) -> None:
        self.folder = folder.absolute()
        self._isolation = isolation
        self._hostname = re.sub(r"[^A-Za-z0-9-]", "-", hostname)[:63] or "provider"
        self._on_process = on_process
        self._anchor: subprocess.Popen[bytes] | None = None
        self.handles: tuple[int, ...] = ()
        self._used_s = 0.0
        self._seen_s = 0.0

    def create(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (self.folder / "tmp").mkdir(exist_ok=True)
        for name in _GOLEM_DIRS:
            (self.folder / "golem" / name).mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        """Begin the processes' common world, if they are confined. Blocks for some milliseconds.

        Raises ContainerError. bwrap dies with the thread that starts it: not for a passing one.
        """
        if self._isolation.bwrap is None:
            return
        reader, writer = os.pipe()
        try:
            self._anchor = subprocess.Popen(
                [
                    *self._confined("--unshare-all", "--die-with-parent", "--info-fd", str(writer)),
                    *_IDLE,
                ],
                pass_fds=[writer],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=self._environment(),
                start_new_session=True,
            )
            os.close(writer)
            writer = -1
            proc = Path(f"/proc/{_read_json(reader)['child-pid']}")
            _wait_for_users(proc)
            self.handles = _namespaces(proc)
        except (OSError, ValueError, KeyError) as error:
            why = "bwrap ended at once" if isinstance(error, ValueError) else repr(error)
            raise ContainerError(f"the container cannot be started: {why}") from None
        finally:
            for handle in (reader, writer):
                if handle >= 0:
                    os.close(handle)

    @property
    def cpu_s(self) -> float:
        """Processor seconds of everything that ran here; only grows.

        Unconfined, what goes on in the background is not counted.
        """
        background_s = 0.0 if self._anchor is None else _processor_time_s(self._anchor.pid)
        self._seen_s = max(self._seen_s, self._used_s + background_s)
        return self._seen_s

    def remove(self) -> None:
        """End every process, forget the folder."""
        used_s = self.cpu_s
        if self._anchor is not None:
            kill_group(self._anchor.pid)
            self._anchor.wait()
            self._anchor = None
        for handle in self.handles:
            os.close(handle)
        self.handles = ()
        self._used_s = used_s
        kill_marked(self.folder.name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def path(self, container_path: str) -> Path:
        """Where a container path lies here, links not followed. Raises ContainerError."""
        parts = PurePosixPath(container_path).parts
        if len(parts) < 2 or parts[0] != "/" or ".." in parts or "\0" in container_path:
            raise ContainerError(f"{container_path}: not an absolute path in the container")
        if parts[1] not in VOLUMES:
            raise ContainerError(f"{container_path}: only below /golem and /tmp can be transferred")
        return self.folder.joinpath(*parts[1:])

    def open_to_read(self, container_path: str) -> int:
        """A descriptor of a regular file; no part of its path may be a link."""
        path = self.path(container_path)
        with self._parent(path, container_path, create=False) as parent:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            handle = _open(path.name, flags, parent, container_path)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise ContainerError(f"{container_path}: not a regular file")
        return handle

    def open_to_write(self, container_path: str) -> int:
        """A descriptor of a new, empty file in place of what was there; makes its folders."""
        path = self.path(container_path)
        with self._parent(path, container_path, create=True) as parent:
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                os.unlink(path.name, dir_fd=parent)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            return _open(path.name, flags, parent, container_path)

    @contextlib.contextmanager
    def _parent(self, path: Path, said: str, *, create: bool) -> Iterator[int]:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        at = os.open(self.folder, flags)
        try:
            for name in path.relative_to(self.folder).parts[:-1]:
                if create:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(name, dir_fd=at)
                inner = _open(name, flags, at, said)
                os.close(at)
                at = inner
            yield at
        finally:
            os.close(at)

    def command(self, argv: Sequence[str]) -> list[str]:
        """The words to start ``argv`` with, confined if that is possible."""
        if self._isolation.bwrap is None:
            return [self._here(word) for word in argv]
        user, pid = map(str, self.handles)
        # Without --die-with-parent: with --pidns bwrap forks twice, and a program whose grandparent
        # is slower than it to leave is then killed for no reason (bwrap 0.8: 1 in 9,600 on a busy
        # machine). It dies all the same, with the first process of its namespace.
        apart = (f"--unshare-{what}" for what in ("net", "ipc", "uts", "cgroup-try"))
        return [*self._confined("--userns", user, "--pidns", pid, *apart), *argv]

    def _confined(self, *namespaces: str) -> list[str]:
        assert self._isolation.bwrap is not None
        return [
            *(self._isolation.bwrap, *namespaces, "--new-session"),
            *("--cap-drop", "ALL", "--hostname", self._hostname, *_system_mounts()),
            *("--proc", "/proc", "--dev", "/dev"),
            *(word for name in VOLUMES for word in ("--bind", str(self.folder / name), f"/{name}")),
            *("--remount-ro", "/", "--chdir", WORK_DIR, "--"),
        ]

    def _here(self, word: str) -> str:
        """A word with container paths replaced, wherever one begins in it."""
        return re.sub(
            r"(?<![\w./~-])/(golem|tmp)(?=[/\s\"';|&)>]|$)",
            lambda found: str(self.folder / found[1]),
            word,
        )

    def _environment(self) -> dict[str, str]:
        confined = self._isolation.bwrap is not None
        home = WORK_DIR if confined else str(self.path(WORK_DIR))
        temp = "/tmp" if confined else str(self.path("/tmp"))  # noqa: S108 - the container's
        mark = {_MARK: self.folder.name}
        return {"PATH": _PATH, "HOME": home, "TMPDIR": temp, "LANG": "C.UTF-8"} | mark

    async def run(self, argv: Sequence[str], on_output: Output) -> int:
        """Run a program to its end, passing on its output as it comes.

        Returns the exit code, as a shell gives it (128 + number for a signal). Its process group is
        killed when this is cancelled; what it leaves in the background goes on until `remove`.
        Raises ContainerError when it cannot be started.
        """
        try:
            process = subprocess.Popen(  # noqa: ASYNC220 - returns at once, waits by pidfd
                self.command(argv),
                cwd=self.path(WORK_DIR),
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=self.handles,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            raise ContainerError(f"{argv[0]}: cannot be started: {error}") from None
        self._on_process(process.pid, started_at(process.pid))
        assert process.stdout is not None
        assert process.stderr is not None
        readers = [
            asyncio.create_task(_pump("stdout", process.stdout.fileno(), on_output)),
            asyncio.create_task(_pump("stderr", process.stderr.fileno(), on_output)),
        ]
        try:
            await _exited(process.pid)
        except BaseException:
            kill_group(process.pid)
            raise
        finally:
            _pid, status, usage = os.wait4(process.pid, 0)  # noqa: ASYNC222 - it is dead
            code = os.waitstatus_to_exitcode(status)
            process.returncode = code
            self._used_s += usage.ru_utime + usage.ru_stime
            self._on_process(None, None)
            try:
                await asyncio.wait(readers, timeout=_PIPES_GRACE_S)
            finally:
                for reader in readers:
                    reader.cancel()
                process.stdout.close()
                process.stderr.close()
        return code if code >= 0 else 128 - code


def _wait_for_users(proc: Path) -> None:
    """bwrap tells of its child before that is somebody in its own user namespace: whoever joins it
    too soon is nobody there, and fails. Raises ContainerError or OSError."""
    deadline = time.monotonic() + _START_S
    while not all((proc / name).read_text().strip() for name in ("uid_map", "gid_map")):
        if time.monotonic() >= deadline:
            raise ContainerError("bwrap did not make its user namespace")
        time.sleep(0.001)


def _namespaces(proc: Path) -> tuple[int, int]:
    """The pid namespace of bwrap's child, and before it the user namespace that owns it, which whoever
    joins the former must be in. The child itself may have gone on to another user namespace: for an
    ordinary user bwrap makes two. Raises OSError."""
    pid = os.open(proc / "ns/pid", os.O_RDONLY)
    try:
        return fcntl.ioctl(pid, _NS_GET_USERNS), pid
    except OSError:
        os.close(pid)
        raise


def _read_json(handle: int) -> Any:
    """All that is written to a pipe, in time. Raises ValueError for anything but JSON."""
    said = b""
    while select.select([handle], [], [], _START_S)[0] and (chunk := os.read(handle, 65536)):
        said += chunk
    return json.loads(said)


def _system_mounts() -> list[str]:
    words: list[str] = []
    for name in _SYSTEM:
        path = Path("/", name)
        if path.is_symlink():
            words += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            words += ["--ro-bind", str(path), str(path)]
    for name in _ETC:
        words += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    return words


def _open(name: str, flags: int, parent: int, said: str) -> int:
    try:
        return os.open(name, flags, 0o644, dir_fd=parent)
    except OSError as error:
        raise ContainerError(f"{said}: {error.strerror} (links are not followed)") from None


def _processor_time_s(pid: int) -> float:
    """Seconds used by a process, what it has waited for, and all its living descendants."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0.0
    own_s = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return own_s + sum(_processor_time_s(int(child)) for child in children)


async def _exited(pid: int) -> None:
    """Wait until a child has ended, leaving it to be reaped."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    handle = os.pidfd_open(pid)
    loop.add_reader(handle, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(handle)
        os.close(handle)


async def _pump(name: str, handle: int, on_output: Output) -> None:
    loop = asyncio.get_running_loop()
    os.set_blocking(handle, False)
    readable = asyncio.Event()
    loop.add_reader(handle, readable.set)
    try:
        while True:
            try:
                data = os.read(handle, _CHUNK)
            except BlockingIOError:
                readable.clear()
                await readable.wait()
                continue
            if not data:
                return
            await on_output(name, data)
            # A program that writes without end must not keep everybody else from running.
            await asyncio.sleep(0)
    finally:
        loop.remove_reader(handle)


def kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def started_at(pid: int) -> int | None:
    """A process's start time in clock ticks since boot, which tells it from a later namesake."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])


def process_mark(activity: str) -> bytes:
    """What an activity's processes have in their environment."""
    return f"{_MARK}={activity}".encode()


def kill_marked(activity: str) -> None:
    """Kill what an activity's commands left behind, known by the mark in its environment."""
    mark = process_mark(activity)
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError):
            if mark in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                os.kill(int(name), signal.SIGKILL)


def kill_leftover(pid: int, started: int | None) -> bool:
    """End a process group that an earlier market left behind, if it is still that one."""
    if started is None or started_at(pid) != started:
        return False
    kill_group(pid)
    return True


class Throttle:
    """Spaces out a transfer to so many bytes a second; None lets everything through."""

    def __init__(self, bytes_s: float | None) -> None:
        self._bytes_s = bytes_s
        self._begun = time.monotonic()
        self._sent = 0

    async def sent(self, count: int) -> None:
        if self._bytes_s is None:
            return
        self._sent += count
        ahead = self._sent / self._bytes_s - (time.monotonic() - self._begun)
        if ahead > 0:
            await asyncio.sleep(ahead)
