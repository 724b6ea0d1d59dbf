"""Does a loss of power lose anything? ``python -m tests.bench.power [--rounds 300] [--fs ext4]``.

Imports the crash test and the harness. The cache is on a disk with a volatile write cache (``disk.py``).
Random work goes on in the mount; power is cut in the middle, blocks that were not flushed survive
with a probability, the driver dies, the file system is mounted again and with it the pods. Names
must then be as they were after some call, none earlier than the last sync; each content must be what
was last closed or synced, or part of what was written since. Then all is uploaded, and the server
must have what the mount shows: nobody else has a hand in it, so there is no conflict, no clean file
that differs from the server's, nothing that stays pending.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import ctypes
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from cpodfs.dfs import DOOMED
from tests.bench.crash import Choice, Dir, File, Link, Step, Tree, bytes_of, look
from tests.mount.disk import MKFS, Disk, missing, switched_on
from tests.mount.harness import Mount, Server, mounted
from tests.mount.proxy import Line
from tests.mount.world import Api

Entries = dict[str, File | Dir | Link]
SIZES = (0, 10, 1000, 4096, 5000, 40_000, 150_000)
SLOTS = "xyz"
"""How many files are open at a time."""
CACHE_SIZE = "200000"
"""Bytes: a few files, so that there is always something to evict and to fetch again."""
SURVIVE = (0, 30, 100)
OPS_MAX = 60
DRAIN_S = 120.0
HANG_S = 240.0
LOG_TAIL = 12_000
ALARMS = ("Traceback", "wait for each other", "conflict:", "hidden:", "lost or older than")
"""What the driver's log must not say, but for what it says of the disk that is gone."""
POD = "pod"


class Fault(AssertionError):
    """What did not hold."""


@dataclass(slots=True)
class Draft(File):
    """``drafts`` are versions that a loss of power may leave, or parts of them. ``unsynced``: there
    are bytes that the next close makes durable; a truncation by path waits for an fsync."""

    unsynced: bool = False

    def write(self, version: bytes, *, unsynced: bool = True) -> None:
        self.drafts.append(version)
        self.unsynced = self.unsynced or unsynced

    def settle(self) -> None:
        self.safe, self.drafts, self.unsynced = self.now, [], False


@dataclass
class Memory(Tree):
    """What the pod holds, and each state of its names since the last sync: any may be found."""

    handles: dict[str, Draft] = field(default_factory=dict)
    states: list[list[tuple[str, File | Dir | Link, int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.entries = {p: _draft(e) for p, e in self.entries.items()}
        self._synced()

    def apply(self, op: str, *arguments: Any) -> None:
        super().apply(op, *arguments)
        if op in ("mkdir", "unlink", "rmdir", "symlink", "rename", "chmod", "open"):
            self._note()

    def admits(self, found: Entries) -> bool:
        return any(not Tree(_restored(state)).problems(found) for state in self.states)

    def complaints(self, found: Entries) -> list[str]:
        """Why no state will do: of the one that is nearest."""
        return min((Tree(_restored(s)).problems(found) for s in self.states), key=len)

    def _note(self) -> None:
        kept = [(p, e, getattr(e, "mode", 0)) for p, e in self.entries.items()]
        self.states.append(kept)

    def _synced(self) -> None:
        self.states = []
        self._note()

    def _file(self, path: str) -> Draft:
        entry = self.entries[path]
        assert isinstance(entry, Draft)
        return entry

    def _open(self, slot: str, path: str, how: str) -> None:
        if path not in self.entries:
            self.entries[path] = Draft(0o644, unsynced=True)
        file = self.handles[slot] = self._file(path)
        if how == "truncate":
            file.write(b"")

    def _write(self, slot: str, offset: int, seed: int, size: int) -> None:
        """``offset`` -1: at the end."""
        file = self.handles[slot]
        if size:
            old = file.now
            offset = len(old) if offset < 0 else offset
            old = old.ljust(offset, b"\0")
            file.write(old[:offset] + bytes_of(seed, size) + old[offset + size :])

    def _ftruncate(self, slot: str, size: int) -> None:
        file = self.handles[slot]
        file.write(file.now[:size].ljust(size, b"\0"))

    def _truncate(self, path: str, size: int) -> None:
        file = self._file(path)
        file.write(file.now[:size].ljust(size, b"\0"), unsynced=False)

    def _fsync(self, slot: str) -> None:
        self.handles[slot].settle()
        self._synced()

    def _close(self, slot: str) -> None:
        file = self.handles.pop(slot)
        if file.unsynced:
            file.settle()
            self._synced()

    def _fsyncdir(self, _path: str) -> None:
        self._synced()

    def _hand_over(self, _slot: str) -> None:
        """The driver gets the kernel's dirty pages, and need not keep them yet."""

    def _read(self, _path: str) -> None:
        pass

    _pause = _peek = _read


def _draft(entry: File | Dir | Link) -> File | Dir | Link:
    return Draft(entry.mode, entry.safe) if type(entry) is File else entry


def _restored(state: list[tuple[str, File | Dir | Link, int]]) -> Entries:
    entries: Entries = {}
    for path, entry, mode in state:
        entries[path] = entry
        if not isinstance(entry, Link) and entry.mode != mode:
            entries[path] = copy.copy(entry)
            entries[path].mode = mode
    return entries


class Work(Choice):
    """Draws the next call. ``offline``: only what needs no content from the server. ``quiet``: only
    what promises nothing, so that what reaches the disk does so in no order of ours."""

    def __init__(self, dice: random.Random) -> None:
        super().__init__(dice)
        self.offline = False
        self.quiet = False
        self._here: list[Draft] = []
        self._next: list[Step] = []

    def go_offline(self) -> None:
        self.offline, self._here = True, []

    def next(self, tree: Tree) -> Step:
        assert isinstance(tree, Memory)
        if self._next:
            return self._next.pop(0)
        if tree.handles and self._dice.random() < 0.6:
            return self._on_handle(tree)
        names = [self._mkdir, self._remove, self._rename, self._rename, self._chmod, self._symlink]
        lasting = [self._fill] * 4 + [self._save_over] * 2 + [self._append] * 2 + [self._fsyncdir]
        passing = [self._hold] * 2 + [self._read] * 2 + [self._peek] * 2 + [self._truncate] * 2
        passing += [self._rename_dir, self._rename_dir, self._pause]
        makers = [*names, *passing] if self.quiet else [*names, *passing, *lasting]
        while True:
            step = self._dice.choice(makers)(tree)
            if step is not None:
                return step

    def _size(self) -> int:
        return self._dice.choice(SIZES)

    def _seed(self) -> int:
        return self._dice.getrandbits(16)

    def _on_handle(self, tree: Memory) -> Step:
        slot = self._dice.choice(sorted(tree.handles))
        ops = ["write", "append", "append", "ftruncate", "hand_over", "hand_over"]
        op = self._dice.choice(ops if self.quiet else [*ops, "fsync", "close", "close"])
        if op in ("write", "append"):
            offset = -1 if op == "append" else self._dice.choice((0, 10, 4096, 5000))
            return ["write", slot, offset, self._seed(), self._size()]
        return [op, slot, self._size()] if op == "ftruncate" else [op, slot]

    def _slot(self, tree: Memory) -> str | None:
        return next((s for s in SLOTS if s not in tree.handles), None)

    def _known(self, tree: Tree) -> str | None:
        """A file whose content may be asked for."""
        path = self._pick(tree, File)
        if path is None or (self.offline and not any(tree.entries[path] is f for f in self._here)):
            return None
        return path

    def _begin(self, tree: Tree, path: str) -> str | None:
        """A slot in which a file can be made at ``path``."""
        assert isinstance(tree, Memory)
        if not isinstance(tree.entries.get(path, File(0)), File):
            return None
        return self._slot(tree)

    def made(self, file: Draft) -> None:
        """Its content came into being here."""
        self._here.append(file)

    def _fill(self, tree: Tree) -> Step | None:
        path = self._place(tree)
        slot = self._begin(tree, path)
        if slot is None:
            return None
        self._next = [["write", slot, 0, self._seed(), self._size()], ["close", slot]]
        return ["open", slot, path, "truncate"]

    def _save_over(self, tree: Tree) -> Step | None:
        path = self._pick(tree, File)
        if path is None:
            return None
        beside = f"{path}.new"
        slot = self._begin(tree, beside)
        if slot is None:
            return None
        self._next = [["write", slot, 0, self._seed(), self._size()], ["close", slot]]
        if self._dice.random() < 0.5:
            self._next.insert(1, ["fsync", slot])
        self._next.append(["rename", beside, path])
        return ["open", slot, beside, "truncate"]

    def _hold(self, tree: Tree) -> Step | None:
        """Opened, and left so: emptied, or to be appended to."""
        how = self._dice.choice(["truncate", "truncate", ""])
        path = self._known(tree) if how == "" else self._pick(tree, File)
        slot = None if path is None else self._begin(tree, path)
        return None if slot is None else ["open", slot, path, how]

    def _append(self, tree: Tree) -> Step | None:
        path = self._known(tree)
        slot = None if path is None else self._begin(tree, path)
        if slot is None:
            return None
        self._next = [["write", slot, -1, self._seed(), self._size()], ["close", slot]]
        return ["open", slot, path, ""]

    def _truncate(self, tree: Tree) -> Step | None:
        path = self._known(tree)
        slot = None if path is None else self._begin(tree, path)
        if slot is None:
            return None
        if not self.quiet and self._dice.random() < 0.6:
            self._next = [["open", slot, path, ""], ["fsync", slot], ["close", slot]]
        return ["truncate", path, self._size()]

    def _read(self, tree: Tree) -> Step | None:
        path = self._known(tree)
        return None if path is None else ["read", path]

    def _peek(self, tree: Tree) -> Step | None:
        """Opened and closed: what is not here is fetched meanwhile."""
        path = self._known(tree)
        return None if path is None else ["peek", path]

    def _rename_dir(self, tree: Tree) -> Step | None:
        old, new = self._pick(tree, Dir), self._place(tree)
        if old is None or new in tree.entries or f"{new}/".startswith(f"{old}/"):
            return None
        return ["rename", old, new]

    def _fsyncdir(self, tree: Tree) -> Step:
        return ["fsyncdir", self._pick(tree, Dir) or ""]

    def _pause(self, _tree: Tree) -> Step:
        return ["pause", round(self._dice.choice((0.02, 0.2, 1.2)) * self._dice.random(), 3)]


class Hands:
    """Carries calls out in the mount; what it has open dies with the driver."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._fds: dict[str, int] = {}

    def do(self, op: str, *arguments: Any) -> bytes:
        """What was read; nothing for other calls."""
        one = arguments[0]
        match op:
            case "open":
                flags = os.O_RDWR | os.O_CREAT | (os.O_TRUNC if arguments[2] else 0)
                self._fds[one] = os.open(self._at(arguments[1]), flags, 0o644)
            case "write":
                self._write(self._fds[one], *arguments[1:])
            case "ftruncate" | "fsync":
                getattr(os, op)(self._fds[one], *arguments[1:])
            case "close":
                os.close(self._fds.pop(one))
            case "hand_over":
                start_writeback(self._fds[one])
            case "fsyncdir":
                with _opened(self._at(one)) as fd:
                    os.fsync(fd)
            case "read":
                return (self._root / one).read_bytes()
            case "peek":
                with _opened(self._at(one)):
                    pass
            case "pause":
                time.sleep(one)
            case "rename":
                os.rename(self._at(one), self._at(arguments[1]))
            case "symlink":
                os.symlink(one, self._at(arguments[1]))
            case "mkdir":
                os.mkdir(self._at(one), 0o755)
            case _:
                getattr(os, op)(self._at(one), *arguments[1:])
        return b""

    def let_go(self) -> None:
        for fd in self._fds.values():
            with contextlib.suppress(OSError):
                os.close(fd)
        self._fds = {}

    def _write(self, fd: int, offset: int, seed: int, size: int) -> None:
        offset = os.fstat(fd).st_size if offset < 0 else offset
        os.pwrite(fd, bytes_of(seed, size), offset)

    def _at(self, path: str) -> str:
        return os.path.join(self._root, path)


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


_libc = ctypes.CDLL(None, use_errno=True)


def start_writeback(fd: int) -> None:
    """Dirty pages leave the kernel, as they do by themselves by and by; nothing is flushed."""
    whole = ctypes.c_int64(0)
    _libc.sync_file_range(fd, whole, whole, 7)


class Life:
    """A disk, a mount and a pod, from the first work on until something does not hold."""

    def __init__(
        self, mount: Mount, disk: Disk, server: Server, line: Line, seed: str, evidence: Path | None
    ) -> None:
        """``evidence``: where the cache is kept as the last cut has left it."""
        self.mount = mount
        self.evidence = evidence
        self.calls = 0
        self._disk = disk
        self._server = server
        self._line = line
        self._dice = random.Random(seed)
        self._pod = mount.pod(POD)
        self._hands = Hands(self._pod)
        self._memory = Memory()
        self._log_read = 0
        self.recent: collections.deque[str] = collections.deque(maxlen=80)
        with _opened(self._pod) as fd:
            os.fsync(fd)

    def round(self, survive: int) -> None:
        work = Work(self._dice)
        in_flight = self._until_cut(work, survive)
        if self._dice.random() < 0.25:  # again, while it takes up its work
            self._power_on()
            time.sleep(self._dice.choice((0.05, 1.0)) * self._dice.random())
            self._cut(survive)
        self._power_on()
        self._inspect(in_flight)
        if self._dice.random() < 0.5:
            self.settle()

    def settle(self) -> None:
        """All is uploaded, and the server's is what the mount shows."""
        self._drain()
        shown = look(self._pod)
        problems = [] if self._memory.admits(shown) else self._memory.complaints(shown)
        self._memory = Memory(shown)
        api = Api(self._server, self.mount)
        # What is being removed, and not shown, goes with the next removal.
        there = {p: size for p, size in api.sizes(POD).items() if not DOOMED.match(p)}
        mine = {p: e for p, e in shown.items() if not isinstance(e, Link)}
        problems += [f"{p}: not at the server" for p in mine if p not in there]
        problems += [f"{p}: only at the server" for p in there if p not in mine]
        for path in sorted(mine.keys() & there.keys()):
            entry = mine[path]
            if isinstance(entry, File):
                problems += self._differences(path, entry.safe, api.read(POD, path))
        self._check_log()
        if problems:
            raise Fault("after the upload:\n  " + "\n  ".join(problems))

    def _differences(self, path: str, shown: bytes, stored: bytes) -> list[str]:
        state = os.getxattr(self._pod / path, "user.cpodfs.state").decode()
        if shown == stored:
            known = state in ("clean", "uploaded")  # uploaded: and not yet in Swarm
            return [] if known else [f"{path}: {state} after the upload"]
        kind = "zeros" if shown and not any(shown) else "other bytes"
        return [f"{path}: {state}, {kind} here: {_brief(shown)}; at the server: {_brief(stored)}"]

    # -- work -------------------------------------------------------------------------------------

    def _until_cut(self, work: Work, survive: int) -> Step | None:
        """The call during which power was cut, if it had not returned."""
        weather = self._dice.choice(["fair", "slow", "narrow", "bad", "offline"])
        self.recent.append(f"-- {weather}, survive {survive}")
        faults: dict[str, dict[str, Any]] = {
            "slow": {"latency_s": 0.1, "latency_jitter_s": 0.2},
            "narrow": {"bandwidth": 100_000},
            "bad": {"drop_rate": 0.15, "error_rate": 0.15, "expire_every": 11},
        }
        self._server.faults(
            seed=self._dice.getrandbits(30), match="/v1/(file|dir)", **faults.get(weather, {})
        )
        last = self._dice.randrange(1, OPS_MAX)
        offline_at = self._dice.randrange(last) if weather == "offline" else last
        quiet_at = last - self._dice.choice((0, 0, 3, 8))
        try:
            for number in range(last):
                work.quiet = number >= quiet_at
                if number >= offline_at and not work.offline and not self._memory.handles:
                    self.recent.append("-- no server")
                    self._line.cut(up=1, down=1)
                    self._line.hang_up()
                    work.go_offline()
                self._step(work)
                if self._dice.random() < 0.15:
                    self._write_back()
            if work.quiet:
                time.sleep(3 * self._dice.random())
            return self._last_step(work.next(self._memory), survive)
        finally:
            self._line.cut()
            self._server.faults()

    def _step(self, work: Work) -> None:
        step = work.next(self._memory)
        self.recent.append(str(step))
        try:
            got = self._hands.do(*step)
        except OSError as error:
            raise Fault(f"{step}: {error}") from error
        self._did(step)
        if step[0] == "open" and step[3] == "truncate":
            work.made(self._memory.handles[step[1]])
        if step[0] == "read":
            entry = self._memory.entries[step[1]]
            assert isinstance(entry, File)
            if got != entry.now:
                raise Fault(f"{step[1]}: read {_brief(got)}, there is {_brief(entry.now)}")

    def _did(self, step: Step) -> None:
        self._memory.apply(*step)
        self.calls += 1

    def _last_step(self, step: Step, survive: int) -> Step | None:
        self.recent.append(f"{step}, and in it the cut")
        with ThreadPoolExecutor(1) as beside:
            doing = beside.submit(self._hands.do, *step)
            time.sleep(self._dice.choice((0.001, 0.01, 0.1, 6)) * self._dice.random() ** 2)
            if self._dice.random() < 0.5:
                self._write_back()
            self._cut(survive)
            try:
                doing.result()
            except OSError:
                return step
            finally:
                self._hands.let_go()
        self._did(step)
        return None

    def _write_back(self) -> None:
        """Something of what was not flushed gets to the disk, as it may at any time."""
        files = [
            f for part in ("content/*/*", "meta.db*") for f in self.mount.cache.glob(f"*/{part}")
        ]
        how = self._dice.choice(["pages", "pages", "a file", "all"])
        chosen = self._dice.sample(sorted(files), self._dice.randint(1, len(files)))
        self.recent.append(f"-- the kernel writes back: {how}")
        for file in chosen if how == "pages" else chosen[:1]:
            with contextlib.suppress(FileNotFoundError), _opened(file) as fd:
                if how == "a file":
                    os.fdatasync(fd)
                elif how == "all":
                    _libc.syncfs(fd)
                else:
                    start_writeback(fd)

    # -- power ------------------------------------------------------------------------------------

    def _cut(self, survive: int) -> None:
        self._check_log()
        self._disk.cut(self._dice.getrandbits(30), survive)
        self.mount.kill()
        self._log_read = len(self.mount.logged())

    def _power_on(self) -> None:
        often = self._disk.fs in ("ext4", "btrfs") and self._dice.random() < 0.7
        self._disk.power_on(*(("commit=1",) if often else ()))
        if self.evidence is not None:
            shutil.rmtree(self.evidence, ignore_errors=True)
            shutil.copytree(self.mount.cache, self.evidence)
        self.mount.options = options(self._dice)
        self.mount.start(warned=True)  # of files that nobody had closed

    def _check_log(self) -> None:
        said = self.mount.logged()
        news, self._log_read = said[self._log_read :], len(said)
        if any(alarm in news for alarm in ALARMS):
            raise Fault("the driver's log tells of it")

    def _inspect(self, in_flight: Step | None) -> None:
        found = look(self._pod)
        before = self._memory
        admitted = before.admits(found)
        if not admitted and in_flight is not None:
            after = copy.deepcopy(before)
            after.apply(*in_flight)
            admitted = after.admits(found)
        if not admitted:
            problems = before.complaints(found)
            raise Fault("after the cut:\n  " + "\n  ".join(problems))
        self._memory = Memory(found)

    def _drain(self) -> None:
        point = self.mount.point
        os.setxattr(point, b"user.cpodfs.drain", b"1")
        deadline = time.monotonic() + DRAIN_S
        while (status := self.mount.status())["pending"] or status["deletions"]:
            if time.monotonic() > deadline:
                raise Fault(f"stuck for {DRAIN_S:g} s: {status}")
            time.sleep(0.02)
        os.setxattr(point, b"user.cpodfs.drain", b"0")
        if status["errors"]:
            raise Fault(f"errors after the upload: {status}")


def _brief(data: bytes) -> str:
    return f"{len(data)} bytes {data[:16]!r}…{data[-8:]!r}"


def options(dice: random.Random) -> tuple[str, ...]:
    """How the driver is started."""
    return (
        *("--cache-size", CACHE_SIZE, "--timeout", "5"),
        *("--writeback-delay", dice.choice(("0.02", "0.02", "0.5"))),
        *("--attr-ttl", dice.choice(("1", "60"))),
    )


@dataclass
class Result:
    """``evidence``: a folder for the caches of faults. ``kept``, ``lost``: blocks that were not
    flushed when power was cut."""

    on_fault: Callable[[str], None] = print
    evidence: Path | None = None
    rounds: int = 0
    calls: int = 0
    kept: int = 0
    lost: int = 0
    faults: int = 0


@contextlib.contextmanager
def _watched(mount: Mount) -> Iterator[None]:
    """A call into the mount that hangs ends with the driver."""

    def bite() -> None:
        print(f"no answer for {HANG_S:g} s", file=sys.stderr)
        if mount.process is not None:
            mount.process.kill()

    timer = threading.Timer(HANG_S, bite)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def power(
    folder: Path,
    rounds: int,
    seed: int,
    *,
    fs: str = "ext4",
    size: int = 0,
    survive: int | None = None,
    result: Result,
) -> None:
    """Run it. After a fault the next round has a new disk and a new account."""
    server = Server(folder / "devnet", "--no-market")
    try:
        while result.rounds < rounds:
            own = folder / f"life{result.rounds}"
            own.mkdir()
            _live(own, server, rounds, seed, fs, size, survive, result)
    finally:
        server.stop()


def _live(
    folder: Path,
    server: Server,
    rounds: int,
    seed: int,
    fs: str,
    size: int,
    survive: int | None,
    result: Result,
) -> None:
    line = Line(server)
    flags = options(random.Random(seed))
    with (
        switched_on(folder / "cache", fs=fs, size=size) as disk,
        mounted(folder, line, None, *flags) as mount,
    ):
        evidence = result.evidence and result.evidence / f"{fs}-seed{seed}-from{result.rounds}"
        life = Life(mount, disk, server, line, f"{seed}:{result.rounds}", evidence)
        try:
            while result.rounds < rounds:
                result.rounds += 1
                with _watched(mount):
                    percent = SURVIVE[result.rounds % 3] if survive is None else survive
                    life.round(percent)
                    if result.rounds == rounds:
                        life.settle()
            if evidence is not None:
                shutil.rmtree(evidence, ignore_errors=True)
        except (AssertionError, OSError) as error:
            result.faults += 1
            result.on_fault(_account(life, seed, fs, percent, result.rounds, error))
        finally:
            result.calls += life.calls
            line.stop()
            counters = disk.counters()
            result.kept += counters["kept"]
            result.lost += counters["lost"]


def _account(life: Life, seed: int, fs: str, percent: int, number: int, error: Exception) -> str:
    return "\n".join(
        [
            f"seed {seed}, round {number}, {fs}, survive {percent}: {type(error).__name__}: {error}",
            "the calls before, oldest first:",
            *(f"  {line}" for line in life.recent),
            "the driver's log:",
            life.mount.logged()[-LOG_TAIL:],
        ]
    )


def commit() -> str:
    """What is tested."""
    asked = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip() or "no commit"


@click.command()
@click.option("--rounds", default=300, show_default=True, help="How often power is cut.")
@click.option("--seed", default=None, type=int, help="Which run.  [default: another each time]")
@click.option("--fs", type=click.Choice(list(MKFS)), default="ext4", show_default=True)
@click.option(
    "--size", default=0, help="Of the disk, in MiB.  [default: what the file system needs]"
)
@click.option(
    "--survive",
    default=None,
    type=click.IntRange(0, 100),
    help="Percent of the blocks not flushed that survive.  [default: 0, 30 and 100 in turn]",
)
@click.option(
    "--evidence",
    type=click.Path(path_type=Path),
    help="Keep the caches of faults in this folder, as the last cut has left them.",
)
@click.option(
    "--report", type=click.Path(path_type=Path), help="Append what is found to this file."
)
def main(
    rounds: int,
    seed: int | None,
    fs: str,
    size: int,
    survive: int | None,
    report: Path | None,
    evidence: Path | None,
) -> None:
    """Cut the power of the cache's disk in the middle of work, look what is there."""
    if lacking := missing(fs):
        raise click.ClickException(lacking)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # not without taking the disk down
    seed = random.randrange(1 << 30) if seed is None else seed
    print(f"seed {seed}", flush=True)
    started = time.monotonic()

    def tell(text: str) -> None:
        print(text, flush=True)
        if report is not None:
            with report.open("a") as file:
                file.write(text + "\n")

    result = Result(tell, evidence)
    try:
        with tempfile.TemporaryDirectory(prefix="power-") as folder:
            power(Path(folder), rounds, seed, fs=fs, size=size, survive=survive, result=result)
    finally:
        tell(
            f"{commit()}: {fs}, seed {seed}, survive {'all' if survive is None else survive}: "
            f"{result.rounds} cuts, {result.calls} calls, of unflushed blocks {result.kept} kept and "
            f"{result.lost} lost, {result.faults} faults, {time.monotonic() - started:.0f} s"
        )
    sys.exit(bool(result.faults))


if __name__ == "__main__":
    main()
