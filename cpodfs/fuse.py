"""What mounting needs of this machine: the device, the program, the permission for others.

A leaf. Looks, and changes nothing: `doctor` asks for each, `mount` before it begins.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

STDERR = 2
_OVERHEARD_BYTES = 65536
DEVICE = Path("/dev/fuse")
CONFIGURATION = Path("/etc/fuse.conf")
MTAB = Path("/etc/mtab")
_IN_A_CONTAINER = "in a container: --device /dev/fuse --cap-add SYS_ADMIN"


@dataclass(frozen=True, slots=True)
class Trouble:
    """``name``: of what is amiss; ``text``: how; ``fix``: what to do about it."""

    name: str
    text: str
    fix: str

    def __str__(self) -> str:
        return f"{self.name}: {self.text}; {self.fix}"


def device() -> Trouble | None:
    try:
        os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return Trouble(str(DEVICE), "is not there", f"as root: modprobe fuse; {_IN_A_CONTAINER}")
    except PermissionError as error:
        mode = stat.S_IMODE(DEVICE.stat().st_mode)
        if mode & 0o006 != 0o006:
            text = f"may not be opened by this user (mode {mode:04o})"
            return Trouble(str(DEVICE), text, f"as root: chmod 0666 {DEVICE}")
        return Trouble(str(DEVICE), f"cannot be opened: {error.strerror}", _IN_A_CONTAINER)
    except OSError as error:
        return Trouble(str(DEVICE), f"cannot be opened: {error.strerror}", _IN_A_CONTAINER)
    return None


def missing() -> Trouble | None:
    if shutil.which("fusermount3") is None:
        return Trouble("fusermount3", "is not on PATH", "apt install fuse3")
    # A system without an init may have none; root's unmounting does without.
    if os.getuid() != 0 and not MTAB.exists():
        fix = f"as root: ln -s /proc/self/mounts {MTAB}"
        return Trouble("fusermount3", f"cannot unmount: {MTAB} is not there", fix)
    return None


def program() -> Trouble | None:
    found = shutil.which("fusermount3")
    if found is not None and os.getuid() != 0 and not os.stat(found).st_mode & stat.S_ISUID:
        fix = f"sudo chmod u+s {found}, or apt install --reinstall fuse3"
        return Trouble("fusermount3", f"{found} is not setuid root", fix)
    return missing()


def others() -> Trouble | None:
    """Whether this user may let others in."""
    if os.getuid() == 0:
        return None
    fix = f"as root: echo user_allow_other >> {CONFIGURATION}; or mount without --allow-other"
    try:
        lines = CONFIGURATION.read_text(errors="replace").splitlines()
    except OSError as error:
        return Trouble("allow-other", f"{CONFIGURATION}: {error.strerror}", fix)
    if "user_allow_other" not in (line.partition("#")[0].strip() for line in lines):
        return Trouble("allow-other", f"user_allow_other is not in {CONFIGURATION}", fix)
    return None


@contextmanager
def overheard() -> Iterator[list[str]]:
    """The lines that this process, libraries in C included, prints on standard error in the block,
    known after its end: FUSE's library tells nobody else why it fails."""
    said: list[str] = []
    try:
        before = os.dup(STDERR)
    except OSError:  # closed: nobody can print
        yield said
        return
    kept = os.memfd_create("stderr")
    os.dup2(kept, STDERR)
    try:
        yield said
    finally:
        os.dup2(before, STDERR)
        os.lseek(kept, 0, os.SEEK_SET)
        said += os.read(kept, _OVERHEARD_BYTES).decode(errors="replace").splitlines()
        os.close(before)
        os.close(kept)


def trouble(*, allow_other: bool) -> Trouble | None:
    """The first thing that would, for all one can see, keep this user from mounting."""
    return device() or program() or (others() if allow_other else None)
