"""Does anything acknowledged get lost? ``python -m tests.bench.crash [--rounds 200] [--seed N]``.

Imports the harness. A process of its own works in the mount and says before and after each system
call what it does; the driver is killed (-9) in the middle. After the next mount every call that had
returned must show, and the one under way wholly or not at all. Bytes count as acknowledged from
``close`` or ``fsync`` on: until then the kernel may still have them. What is killed when follows from
the seed, up to the machine's timing.
"""

from __future__ import annotations

import copy
import json
import os
import random
import stat
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from tests.mount.harness import Mount, Server, mounted

Step = list[Any]
NAMES = "abcde"
SIZES = (0, 10, 1000, 4096, 5000, 40_000)
OPS_MAX = 150
"""A round ends at the latest in the middle of so many calls."""
LOG_TAIL = 20_000
FAULTS = {"drop_rate": 0.15, "error_rate": 0.15, "expire_every": 11}
MODES = [0o600, 0o755, 0o500] if os.geteuid() == 0 else [0o700, 0o755, 0o750]
"""Who is not root must go on being able to use what the test has made."""


@dataclass(slots=True)
class File:
    """``safe``: what was acknowledged; ``drafts``: what was written since, of which any part may be
    there, as the kernel hands pages over when it likes."""

    mode: int
    safe: bytes = b""
    drafts: list[bytes] = field(default_factory=list)

    @property
    def now(self) -> bytes:
        return self.drafts[-1] if self.drafts else self.safe

    def admits(self, found: bytes) -> bool:
        if not self.drafts:
            return found == self.safe
        versions = [self.safe, *self.drafts]
        low, high = min(map(len, versions)), max(map(len, versions))
        return low <= len(found) <= high and all(
            any(byte == at(version, i) for version in versions)
            or (byte == 0 and any(i >= len(version) for version in versions))
            for i, byte in enumerate(found)
        )


def _resized(data: bytes, size: int) -> bytes:
    return data[:size].ljust(size, b"\0")


def at(data: bytes, index: int) -> int | None:
    return data[index] if index < len(data) else None


@dataclass(slots=True)
class Dir:
    mode: int


@dataclass(slots=True)
class Link:
    target: str


@dataclass
class Tree:
    """What the pod must hold. ``open`` is the file that the workload has open."""

    entries: dict[str, File | Dir | Link] = field(default_factory=dict)
    open: File | None = None

    def apply(self, op: str, *arguments: Any) -> None:
        """What one system call that succeeded has changed."""
        getattr(self, f"_{op}")(*arguments)

    def _mkdir(self, path: str) -> None:
        self.entries[path] = Dir(0o755)

    def _remove(self, path: str) -> None:
        del self.entries[path]

    _unlink = _rmdir = _remove

    def _symlink(self, target: str, path: str) -> None:
        self.entries[path] = Link(target)

    def _rename(self, old: str, new: str) -> None:
        moved = {p: e for p, e in self.entries.items() if p == old or p.startswith(f"{old}/")}
        self.entries = {p: e for p, e in self.entries.items() if p not in moved and p != new}
        self.entries |= {new + p.removeprefix(old): e for p, e in moved.items()}

    def _chmod(self, path: str, mode: int) -> None:
        entry = self.entries[path]
        assert isinstance(entry, File | Dir)
        entry.mode = mode

    def _create(self, path: str) -> None:
        """open(O_CREAT | O_TRUNC)"""
        entry = self.entries.get(path)
        if entry is None:
            entry = self.entries[path] = File(0o644)
        assert isinstance(entry, File)
        entry.safe, entry.drafts = b"", []
        self.open = entry

    def _open(self, path: str) -> None:
        entry = self.entries[path]
        assert isinstance(entry, File)
        self.open = entry

    def _pwrite(self, offset: int, seed: int, size: int) -> None:
        assert self.open is not None
        if not size:
            return
        old = self.open.now.ljust(offset, b"\0")
        self.open.drafts.append(old[:offset] + bytes_of(seed, size) + old[offset + size :])

    def _ftruncate(self, size: int) -> None:
        assert self.open is not None
        file = self.open
        file.safe = _resized(file.safe, size)
        file.drafts = [_resized(draft, size) for draft in file.drafts]

    def _fsync(self) -> None:
        assert self.open is not None
        self.open.safe, self.open.drafts = self.open.now, []

    def _close(self) -> None:
        self._fsync()
        self.open = None

    def problems(self, found: dict[str, File | Dir | Link]) -> list[str]:
        """How what was found differs from what may be."""
        said = [f"{p}: lost" for p in self.entries if p not in found]
        said += [f"{p}: should not be there" for p in found if p not in self.entries]
        for path in self.entries.keys() & found.keys():
            mine, theirs = self.entries[path], found[path]
            if isinstance(mine, File) and isinstance(theirs, File) and mine.mode == theirs.mode:
                if not mine.admits(theirs.now):
                    said.append(f"{path}: {_sample(mine.safe, theirs.now)}")
            elif mine != theirs:
                said.append(f"{path}: {mine!r:.80} expected, found {theirs!r:.80}")
        return said

    def as_stored_remotely(self) -> Tree:
        """What a pod can keep: no links, the owner's bits of modes."""
        kept: dict[str, File | Dir | Link] = {}
        for path, entry in self.entries.items():
            if not isinstance(entry, Link):
                kept[path] = copy.copy(entry)
                kept[path].mode &= stat.S_IRWXU
        return Tree(kept)


def _sample(mine: bytes, theirs: bytes) -> str:
    return f"{len(theirs)} bytes {theirs[:20]!r}, acknowledged {len(mine)} bytes {mine[:20]!r}"


def bytes_of(seed: int, size: int) -> bytes:
    return (f"{seed:x}." * (size // 2 + 1)).encode()[:size]


class Choice:
    """Draws the next system call that must succeed, given the tree."""

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice

    def next(self, tree: Tree) -> Step:
        if tree.open is not None and self._dice.random() < 0.7:
            return self._on_open()
        makers = [self._mkdir, self._remove, self._rename, self._rename, self._chmod, self._symlink]
        if tree.open is None:
            makers += [self._create] * 4 + [self._open] * 2
        while True:
            step = self._dice.choice(makers)(tree)
            if step is not None:
                return step

    def _on_open(self) -> Step:
        op = self._dice.choice(["pwrite", "pwrite", "ftruncate", "fsync", "close", "close"])
        if op == "pwrite":
            return [
                op,
                self._dice.choice(SIZES),
                self._dice.getrandbits(16),
                self._dice.choice(SIZES),
            ]
        return [op, self._dice.choice(SIZES)] if op == "ftruncate" else [op]

    def _pick(self, tree: Tree, *kinds: type) -> str | None:
        found = sorted(p for p, e in tree.entries.items() if isinstance(e, kinds))
        return self._dice.choice(found) if found else None

    def _place(self, tree: Tree) -> str:
        dirs = sorted(p for p, e in tree.entries.items() if isinstance(e, Dir) and p.count("/") < 2)
        folder = self._dice.choice(["", "", *(f"{d}/" for d in dirs)])
        return folder + self._dice.choice(NAMES)

    def _mkdir(self, tree: Tree) -> Step | None:
        path = self._place(tree)
        return None if path in tree.entries else ["mkdir", path]

    def _remove(self, tree: Tree) -> Step | None:
        path = self._pick(tree, File, Dir, Link)
        if path is None or _has_children(tree, path):
            return None
        return ["rmdir" if isinstance(tree.entries[path], Dir) else "unlink", path]

    def _rename(self, tree: Tree) -> Step | None:
        old, new = self._pick(tree, File, Dir, Link), self._place(tree)
        if old is None or f"{new}/".startswith(f"{old}/") or _has_children(tree, new):
            return None
        target = tree.entries.get(new)
        if target is not None and isinstance(target, Dir) != isinstance(tree.entries[old], Dir):
            return None
        return ["rename", old, new]

    def _chmod(self, tree: Tree) -> Step | None:
        path = self._pick(tree, File, Dir)
        return None if path is None else ["chmod", path, self._dice.choice(MODES)]

    def _symlink(self, tree: Tree) -> Step | None:
        path = self._place(tree)
        return None if path in tree.entries else ["symlink", self._dice.choice(NAMES), path]

    def _create(self, tree: Tree) -> Step | None:
        path = self._place(tree)
        return ["create", path] if isinstance(tree.entries.get(path, File(0)), File) else None

    def _open(self, tree: Tree) -> Step | None:
        path = self._pick(tree, File)
        return None if path is None else ["open", path]


def _has_children(tree: Tree, path: str) -> bool:
    return any(p.startswith(f"{path}/") for p in tree.entries)


class Worker:
    """Carries steps out, in a process of its own."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._fd = -1

    def do(self, op: str, *arguments: Any) -> None:
        paths = [os.path.join(self._root, a) for a in arguments if isinstance(a, str)]
        match op:
            case "create":
                self._fd = os.open(paths[0], os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
            case "open":
                self._fd = os.open(paths[0], os.O_RDWR)
            case "pwrite":
                os.pwrite(self._fd, bytes_of(*arguments[1:]), arguments[0])
            case "ftruncate":
                os.ftruncate(self._fd, arguments[0])
            case "fsync" | "close":
                getattr(os, op)(self._fd)
            case "rename":
                os.rename(*paths)
            case "symlink":
                os.symlink(arguments[0], paths[1])
            case "chmod":
                os.chmod(paths[0], arguments[1])
            case "mkdir":
                os.mkdir(paths[0], 0o755)
            case _:
                getattr(os, op)(paths[0])


def run_workload(root: str, seed: str) -> None:
    """The workload: steps until the mount dies under it. Says each on stdout before and after."""
    tree = Tree(look(Path(root)))
    choice, worker = Choice(random.Random(seed)), Worker(root)
    while True:
        step = choice.next(tree)
        os.write(1, (json.dumps(step) + "\n").encode())
        try:
            worker.do(*step)
        except OSError as error:
            os.write(1, (json.dumps(["failed", str(error)]) + "\n").encode())
            return
        os.write(1, b"done\n")
        tree.apply(*step)


def look(root: Path) -> dict[str, File | Dir | Link]:
    """What is there."""
    found: dict[str, File | Dir | Link] = {}
    for path in sorted(root.rglob("*")):
        name, mode = str(path.relative_to(root)), stat.S_IMODE(path.lstat().st_mode)
        if path.is_symlink():
            found[name] = Link(os.readlink(path))
        elif path.is_dir():
            found[name] = Dir(mode)
        else:
            found[name] = File(mode, path.read_bytes())
    return found


@dataclass
class Crash:
    """Rounds of work, death and inspection in one pod."""

    mount: Mount
    server: Server
    seed: int
    calls: int = 0
    tree: Tree = field(default_factory=Tree)

    def __post_init__(self) -> None:
        self._dice = random.Random(self.seed)
        self._pod = self.mount.pod()
        self._recent: deque[Step] = deque(maxlen=40)

    def round(self, number: int) -> None:
        if self._dice.random() < 0.3:
            self.server.faults(seed=number, match="/v1/(file|dir)", **FAULTS)
        in_flight = self._work_until_killed(f"{self.seed}:{number}")
        self.server.faults()
        if self._dice.random() < 0.2:  # again, while it is taking up its work
            self.mount.start()
            time.sleep(self._dice.random() * 0.05)
            self.mount.kill()
        self.mount.start()
        self._inspect(number, in_flight)
        if self._dice.random() < 0.2:
            self.mount.sync()

    def _work_until_killed(self, seed: str) -> Step | None:
        """Returns the step during which the driver died; ``tree`` has all before it."""
        last, pause_s = self._dice.randrange(1, OPS_MAX), self._dice.expovariate(1000)
        command = [sys.executable, "-m", "tests.bench.crash", "--work", str(self._pod), seed]
        self.tree.open = None
        under_way: Step | None = None
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdout is not None
            for line in worker.stdout:
                if line == "done\n":
                    assert under_way is not None
                    try:
                        self.tree.apply(*under_way)
                    except KeyError as error:
                        raise AssertionError(f"{error} came into being by itself") from error
                    self._recent.append(under_way)
                    self.calls += 1
                    under_way, last = None, last - 1
                    continue
                step = json.loads(line)
                if step[0] == "failed":
                    assert self.mount.process is None, f"{under_way}: {step[1]}"
                    break
                under_way = step
                if last == 0:
                    time.sleep(pause_s)
                    self.mount.kill()
        return under_way

    def _inspect(self, number: int, in_flight: Step | None) -> None:
        found = look(self._pod)
        before, after = self.tree, copy.deepcopy(self.tree)
        if in_flight is not None:
            after.apply(*in_flight)
        problems = before.problems(found)
        if problems and after.problems(found):
            raise AssertionError(
                f"seed {self.seed}, round {number}, during {in_flight}:\n  "
                + "\n  ".join([*problems, "calls before, oldest first:", *map(str, self._recent)])
            )
        self.tree = Tree(found)

    def finish(self) -> None:
        """All that is acknowledged, from the server alone."""
        self.mount.remount(wipe=True)
        found = Tree(look(self._pod)).as_stored_remotely().entries
        problems = self.tree.as_stored_remotely().problems(found)
        if problems:
            raise AssertionError(
                f"seed {self.seed}, with an empty cache:\n  " + "\n  ".join(problems)
            )


def crash(folder: Path, rounds: int, seed: int) -> int:
    """Run it; returns how many calls were acknowledged. Raises AssertionError, naming the seed."""
    server = Server(folder / "devnet", "--no-market")
    try:
        with mounted(folder, server, None, "--writeback-delay", "0.02") as mount:
            test = Crash(mount, server, seed)
            try:
                for number in range(rounds):
                    test.round(number)
                test.finish()
            except (AssertionError, OSError) as error:
                error.add_note(f"seed {seed}; the driver's log:\n{mount.logged()[-LOG_TAIL:]}")
                raise
            return test.calls
    finally:
        server.stop()


@click.command()
@click.option("--rounds", default=200, show_default=True, help="How often the driver is killed.")
@click.option("--seed", default=None, type=int, help="Which run.  [default: another each time]")
@click.option("--work", nargs=2, hidden=True)
def main(rounds: int, seed: int | None, work: tuple[str, str] | None) -> None:
    """Kill the driver in the middle of its work, mount again, look what is there."""
    if work:
        run_workload(*work)
        return
    seed = random.randrange(1 << 30) if seed is None else seed
    print(f"seed {seed}", flush=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="crash-") as folder:
        calls = crash(Path(folder), rounds, seed)
    print(
        f"{rounds} kills, {calls} calls acknowledged, none lost, {time.monotonic() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
