"""The mount point as the kernel sees it: may we mount here, is it ours, take it down.

A leaf: imports only errors. Reads ``/proc/self/mountinfo``, which never touches the file systems
themselves; whatever must touch one is done by a child process that may hang in our stead.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cpodfs.errors import MountError

FSTYPE = "fuse.cpodfs"
ANSWER_S = 10.0


@dataclass(frozen=True, slots=True)
class MountEntry:
    mountpoint: Path
    fstype: str
    source: str


def mounts() -> list[MountEntry]:
    """All mounts, the topmost of several on one folder last."""
    entries = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        left, _, right = line.partition(" - ")
        point = _unescape(left.split(" ")[4])
        fstype, source = (*right.split(" "), "", "")[:2]
        entries.append(MountEntry(Path(point), fstype, _unescape(source)))
    return entries


def find(path: Path) -> MountEntry | None:
    """The topmost mount on exactly this path."""
    return next((m for m in reversed(mounts()) if m.mountpoint == path), None)


def containing(path: Path) -> MountEntry | None:
    """The cpodfs mount that a path is in, if any."""
    path = Path(os.path.abspath(path))
    ours = [m for m in mounts() if m.fstype == FSTYPE]
    inside = [m for m in ours if m.mountpoint in (path, *path.parents)]
    return max(inside, key=lambda m: len(m.mountpoint.parts), default=None)


def prepare(path: Path) -> Path:
    """The absolute path of a folder that may be mounted on. Raises MountError.

    What a crashed driver left mounted there (ENOTCONN) is taken down first.
    """
    absolute = Path(os.path.realpath(path.parent), path.name) if path.name else path.resolve()
    entry = find(absolute)
    if entry is not None and entry.fstype == FSTYPE:
        if not is_dead(absolute):
            raise MountError(f"{path}: already mounted; see: cpodfs status {path}")
        unmount(absolute, lazy=True)
    elif entry is not None:
        raise MountError(f"{path}: {entry.source or entry.fstype} is mounted there already")
    _check_folder(path, absolute)
    if shutil.which("fusermount3") is None:
        raise MountError("fusermount3 is missing; install it with: apt install fuse3")
    return absolute


def _check_folder(path: Path, absolute: Path) -> None:
    try:
        info = absolute.stat()
        if not absolute.is_dir():
            raise MountError(f"{path}: not a directory")
        if info.st_uid != os.getuid():
            raise MountError(f"{path}: belongs to another user; mount on a folder of your own")
        if any(os.scandir(absolute)):
            raise MountError(f"{path}: not empty; what is in it would be hidden while mounted")
    except FileNotFoundError:
        raise MountError(f"{path}: no such folder; make it with: mkdir -p {path}") from None
    except OSError as error:
        raise MountError(f"{path}: {error.strerror}") from error


def is_dead(path: Path) -> bool:
    """Whether the driver behind a mount is gone ("Transport endpoint is not connected").

    Raises MountError when it is there and does not answer in 10 s.
    """
    try:
        # statfs, as attributes may be answered by the kernel alone.
        done = subprocess.run(
            ["stat", "-f", "--", str(path)],
            capture_output=True,
            text=True,
            errors="replace",
            env=os.environ | {"LC_ALL": "C"},
            timeout=ANSWER_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise MountError(
            f"{path}: its driver hangs; end it with kill -9 (what is pending is kept), mount again"
        ) from None
    dead = (os.strerror(errno.ENOTCONN), os.strerror(errno.ECONNABORTED))
    return done.returncode != 0 and any(reason in done.stderr for reason in dead)


def unmount(path: Path, *, lazy: bool = False) -> None:
    """Take a mount down; ``lazy``: even while it is in use. Raises MountError (EBUSY: in use)."""
    flags = ["-u", "-z"] if lazy else ["-u"]
    done = subprocess.run(
        ["fusermount3", *flags, "--", str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return
    reason = done.stderr.strip().removeprefix("fusermount3: ") or f"exit {done.returncode}"
    error = MountError(f"{path}: cannot be unmounted: {reason}")
    if re.search("busy", reason, re.IGNORECASE):
        error.errno = errno.EBUSY
    raise error


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m.group(1), 8)), text)
