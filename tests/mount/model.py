"""A pod in a real mount and a plain folder on the local disk, driven side by side and compared.

Imports the world (server, mount, what goes wrong); ``Twin`` is one pod with its plain copy. Each operation is carried out on the mount first. Only where the network is being
disturbed may it fail with an errno of the network, and then it must not have happened. Every step
is recorded; ``python -m tests.mount.model TRACE`` runs a recorded list of steps again, ``--shrink``
looks for the shortest part of it that still fails.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import json
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.mount.world import Mismatch, World, watchdog

NETWORK = {errno.EIO, errno.ETIMEDOUT, errno.EHOSTUNREACH}
LONG_AGO_NS = 1_500_000_000 * 10**9
"""Times that were chosen are before this, those that come from a clock are after it."""
OWNERS_BITS = 0 if os.geteuid() == 0 else stat.S_IRWXU
"""Who is not root keeps these, or could not look at what the test has made."""
NOREPLACE, EXCHANGE = 1, 2
Step = tuple[Any, ...]

_libc = ctypes.CDLL(None, use_errno=True)


Outcome = tuple[str, Any]


def outcome(act: Callable[[], Any]) -> Outcome:
    try:
        return "ok", act()
    except OSError as error:
        return "error", errno.errorcode.get(error.errno or 0, str(error))


def is_network(result: Outcome) -> bool:
    return result[0] == "error" and result[1] in {errno.errorcode[n] for n in NETWORK}


class Twin:
    """One pod and its plain copy. Paths in steps are relative; handles are numbered slots."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.trace: list[Step] = []
        self.pod = world.new_pod()
        self.plain = world.folder / f"plain-{self.pod}"
        self.plain.mkdir()
        self.handles: dict[int, tuple[int, int]] = {}

    @property
    def real(self) -> Path:
        return self.world.mount.point / self.pod

    def step(self, name: str, *arguments: Any) -> Any:
        """Carry out and record one step: a method of this class by its name."""
        self.trace.append((name, *arguments))
        with watchdog(self.world):
            return getattr(self, name)(*arguments)

    def _both(self, act: Callable[[Any], Any], real: Any, plain: Any) -> Any:
        """The same act on both sides; its value, or None when it failed on both."""
        here = outcome(lambda: act(real))
        if is_network(here) and self.world.shaky:
            return None
        there = outcome(lambda: act(plain))
        if here != there:
            raise Mismatch(f"{self.trace[-1]}: mount says {here}, plain folder {there}")
        return here[1] if here[0] == "ok" else None

    def _on_path(self, act: Callable[[str], Any], path: str) -> Any:
        return self._both(act, str(self.real / path), str(self.plain / path))

    def _fetch(self, path: str) -> bool:
        """Have the bytes here, so that a write cannot fail for the network after it was accepted."""
        if not self.world.shaky:
            return True
        for _ in range(8):
            result = outcome((self.real / path).read_bytes)
            if not is_network(result):
                return True
        return False

    # -- directories and names --------------------------------------------------------------------

    def mkdir(self, path: str) -> None:
        self._on_path(os.mkdir, path)

    def rmdir(self, path: str) -> None:
        self._on_path(os.rmdir, path)

    def unlink(self, path: str) -> None:
        self._on_path(os.unlink, path)

    def rename(self, old: str, new: str, flags: int = 0) -> None:
        def act(root: Path) -> None:
            arguments = (-100, os.fsencode(root / old), -100, os.fsencode(root / new), flags)
            if _libc.renameat2(*arguments):
                raise OSError(ctypes.get_errno(), "renameat2")

        self._both(act, self.real, self.plain)

    def swap(self, one: str, other: str) -> None:
        """A exchange the way a shell does it: three renames."""
        for old, new in ((one, "t"), (other, one), ("t", other)):
            self.rename(old, new)

    def listdir(self, path: str) -> None:
        self._on_path(lambda p: sorted(os.listdir(p)), path)

    def symlink(self, target: str, path: str) -> None:
        self._on_path(lambda p: os.symlink(target, p), path)

    def readlink(self, path: str) -> None:
        self._on_path(os.readlink, path)

    # -- attributes -------------------------------------------------------------------------------

    def stat(self, path: str) -> None:
        self._on_path(lambda p: _attributes(os.stat(p)), path)

    def chmod(self, path: str, mode: int) -> None:
        self._on_path(lambda p: os.chmod(p, mode | OWNERS_BITS), path)

    def utimens(self, path: str, time_ns: int) -> None:
        self._on_path(lambda p: os.utime(p, ns=(time_ns, time_ns)), path)

    def setxattr(self, path: str, name: str, value: str, flags: int = 0) -> None:
        self._on_path(lambda p: os.setxattr(p, name, value.encode(), flags), path)

    def removexattr(self, path: str, name: str) -> None:
        self._on_path(lambda p: os.removexattr(p, name), path)

    def xattrs(self, path: str) -> None:
        self._on_path(lambda p: {n: os.getxattr(p, n) for n in os.listxattr(p)}, path)

    # -- contents ---------------------------------------------------------------------------------

    def write_file(self, path: str, seed: int, size: int) -> None:
        data = content(seed, size)
        self._on_path(lambda p: _write(p, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, data), path)

    def create_new(self, path: str) -> None:
        self._on_path(lambda p: _write(p, os.O_WRONLY | os.O_CREAT | os.O_EXCL, b""), path)

    def save(self, path: str, seed: int, size: int) -> None:
        """As editors do: write a temporary file, rename it over the old one."""
        self.write_file("t", seed, size)
        self.rename("t", path)

    def append(self, path: str, seed: int, size: int) -> None:
        if self._fetch(path):
            data = content(seed, size)
            self._on_path(lambda p: _write(p, os.O_WRONLY | os.O_APPEND, data), path)

    def write_at(self, path: str, offset: int, seed: int, size: int) -> None:
        if self._fetch(path):
            data = content(seed, size)
            self._on_path(lambda p: _write(p, os.O_WRONLY, data, offset), path)

    def truncate(self, path: str, size: int) -> None:
        """To another size: whether truncating to the same one touches the time is up to a system."""
        if (self.plain / path).is_file() and (self.plain / path).stat().st_size != size:
            self._on_path(lambda p: os.truncate(p, size), path)

    def read(self, path: str) -> None:
        self._on_path(lambda p: Path(p).read_bytes(), path)

    # -- handles ----------------------------------------------------------------------------------

    def open(self, slot: int, path: str, flags: int) -> None:
        self.close(slot)
        if not self._fetch(path):
            return
        real = outcome(lambda: os.open(self.real / path, flags, 0o644))
        if is_network(real) and self.world.shaky:
            return
        plain = outcome(lambda: os.open(self.plain / path, flags, 0o644))
        if real[0] == plain[0] == "ok":
            self.handles[slot] = real[1], plain[1]
        elif real != plain:
            raise Mismatch(f"{self.trace[-1]}: mount says {real}, plain folder {plain}")

    def _on_handle(self, slot: int, act: Callable[[int], Any]) -> None:
        if slot in self.handles:
            self._both(act, *self.handles[slot])

    def pwrite(self, slot: int, offset: int, seed: int, size: int) -> None:
        self._on_handle(slot, lambda fd: os.pwrite(fd, content(seed, size), offset))

    def pread(self, slot: int, offset: int, size: int) -> None:
        self._on_handle(slot, lambda fd: os.pread(fd, size, offset))

    def ftruncate(self, slot: int, size: int) -> None:
        self._on_handle(slot, lambda fd: os.ftruncate(fd, size))

    def fchmod(self, slot: int, mode: int) -> None:
        self._on_handle(slot, lambda fd: os.fchmod(fd, mode | OWNERS_BITS))

    def fstat(self, slot: int) -> None:
        self._on_handle(slot, lambda fd: (os.fstat(fd).st_nlink, *_attributes(os.fstat(fd))))

    def fsync(self, slot: int) -> None:
        self._on_handle(slot, os.fsync)

    def close(self, slot: int) -> None:
        self._on_handle(slot, os.close)
        self.handles.pop(slot, None)

    # -- surroundings -----------------------------------------------------------------------------

    def pause(self, seconds: float) -> None:
        """Let write-back get somewhere: that time passes is the input here."""
        time.sleep(seconds)

    def faults(self, faults: dict[str, Any]) -> None:
        self.world.faults(**faults)

    def server_down(self, kill: bool) -> None:
        self.world.server_down(kill=kill)

    def server_restart(self, kill: bool) -> None:
        self.world.server_down(kill=kill)
        self.world.calm()

    def calm(self) -> None:
        self.world.calm()

    def sync(self) -> None:
        self.world.sync()

    def kill(self) -> None:
        """kill -9 and mount again. What the kernel still had in its pages was never acknowledged."""
        for slot in self.handles:
            self.fsync(slot)
        self.world.mount.kill()
        for real, plain in self.handles.values():
            with contextlib.suppress(OSError):
                os.close(real)
            os.close(plain)
        self.handles.clear()
        self.world.mount.start()

    def remount(self) -> None:
        self._close_all()
        self.world.calm()
        self.world.mount.remount()

    def wipe(self) -> None:
        """Mount again with an empty cache, and compare with what the server itself says."""
        self._close_all()
        self.world.sync()
        self.world.mount.remount(wipe=True)
        self._forget_what_the_server_has_no_field_for()
        self.compare()
        expected = {
            path: None if stat.S_ISDIR(mode) else size
            for path, (mode, size, *_) in snapshot(self.plain, contents=False).items()
        }
        found = self.world.server_tree(self.pod)
        if found != expected:
            raise Mismatch(f"server: {difference(found, expected)}")

    def _close_all(self) -> None:
        for slot in list(self.handles):
            self.close(slot)

    def _forget_what_the_server_has_no_field_for(self) -> None:
        """Symbolic links, attributes, chosen times, and the mode but for the owner's bits."""
        for path in sorted(self.plain.rglob("*")):
            if path.is_symlink():
                path.unlink()
                continue
            for name in os.listxattr(path):
                os.removexattr(path, name)
            with contextlib.suppress(OSError):  # that it is not there is found by the comparison
                theirs = (self.real / path.relative_to(self.plain)).stat().st_mode
                if not (theirs ^ path.stat().st_mode) & stat.S_IRWXU:
                    path.chmod(stat.S_IMODE(theirs))
        for path in (self.plain, *self.plain.rglob("*")):
            os.utime(path)
        self.plain.chmod(stat.S_IMODE(self.real.stat().st_mode))

    def compare(self) -> None:
        """Both trees: names, kinds, modes, sizes, bytes, targets, attributes, chosen times."""
        attempts = 20 if self.world.shaky else 1
        for attempt in range(attempts):
            try:
                real = snapshot(self.real)
                break
            except OSError as error:
                if not (self.world.shaky and error.errno in NETWORK):
                    raise
                if not self.world.up or attempt == attempts - 1:
                    return
        plain = snapshot(self.plain)
        if real != plain:
            raise Mismatch(f"trees: {difference(real, plain)}")

    def finish(self) -> None:
        self.compare()
        self.wipe()
        self.world.check_log()
        shutil.rmtree(self.plain)


@functools.cache
def content(seed: int, size: int) -> bytes:
    return (f"<{seed}>".encode() * (size // 3 + 1))[:size]


def _write(path: str, flags: int, data: bytes, offset: int = 0) -> None:
    fd = os.open(path, flags, 0o644)
    try:
        if flags & os.O_APPEND or not offset:
            os.write(fd, data)
        else:
            os.pwrite(fd, data, offset)
    finally:
        os.close(fd)


def _attributes(found: os.stat_result) -> tuple[int, int, int]:
    chosen = found.st_mtime_ns if found.st_mtime_ns < LONG_AGO_NS else 0
    if stat.S_ISDIR(found.st_mode):
        return found.st_mode, 0, chosen
    return found.st_mode, found.st_size, 0 if stat.S_ISLNK(found.st_mode) else chosen


def snapshot(root: Path, *, contents: bool = True) -> dict[str, tuple[Any, ...]]:
    """Everything below a folder that both sides must have alike."""
    found: dict[str, tuple[Any, ...]] = {}
    pending = [root]
    while pending:
        folder = pending.pop()
        for name in os.listdir(folder):
            path = folder / name
            status = path.lstat()
            extra: tuple[Any, ...] = ()
            if stat.S_ISDIR(status.st_mode):
                pending.append(path)
            if stat.S_ISLNK(status.st_mode):
                extra = (os.readlink(path),)
            elif contents:
                extra = tuple((n, os.getxattr(path, n)) for n in sorted(os.listxattr(path)))
                if stat.S_ISREG(status.st_mode):
                    extra = (path.read_bytes(), *extra)
            found[str(path.relative_to(root))] = (*_attributes(status), *extra)
    return found


def difference(real: dict[str, Any], plain: dict[str, Any]) -> str:
    lines = [
        f"  {path}: mount {_short(real.get(path, 'has none'))}, plain {_short(plain.get(path, 'has none'))}"
        for path in sorted({*real, *plain})
        if real.get(path, 0) != plain.get(path, 0) or (path in real) != (path in plain)
    ]
    return "\n" + "\n".join(lines)


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        parts = [oct(value[0]), *(repr(v) for v in value[1:])]
        return "(" + ", ".join(p if len(p) < 60 else p[:40] + f"…{len(p)}" for p in parts) + ")"
    return repr(value)


# -- the same steps again ---------------------------------------------------------------------------


def replay(steps: list[Step], config: tuple[float, float]) -> str | None:
    """Why the steps fail in a world of their own, or None."""
    world = World()
    try:
        world.configure(*config)
        twin = Twin(world)
        try:
            for step in steps:
                twin.step(*step)
            twin.step("finish")
        except (AssertionError, OSError) as error:
            return f"{type(error).__name__}: {error}\n--- log\n{world.mount.logged()[-5000:]}"
    finally:
        world.close()
    return None


def shrink(steps: list[Step], config: tuple[float, float], tries: int = 2) -> list[Step]:
    """Leave out ever smaller parts as long as it still fails (once in ``tries``)."""

    def fails(candidate: list[Step]) -> bool:
        return any(replay(candidate, config) for _ in range(tries))

    size = max(len(steps) // 2, 1)
    while size:
        at = 0
        while at < len(steps):
            candidate = steps[:at] + steps[at + size :]
            if fails(candidate):
                steps = candidate
                print(f"{len(steps)} steps", file=sys.stderr)
            else:
                at += size
        size //= 2
    return steps


def main() -> None:
    recorded = json.loads(Path(sys.argv[1]).read_text())
    steps, config = [tuple(s) for s in recorded["steps"]], tuple(recorded["config"])
    if "--shrink" in sys.argv:
        steps = shrink(steps, config)
        Path(sys.argv[1] + ".short").write_text(json.dumps({"config": config, "steps": steps}))
    for step in steps:
        print(step)
    print(replay(steps, config) or "passed")


if __name__ == "__main__":
    main()
