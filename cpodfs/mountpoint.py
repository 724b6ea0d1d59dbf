"""The mount point as the kernel sees it: may we mount here, is it ours, take it down.

A leaf: imports only errors. Reads ``/proc/self/mountinfo``, which never touches the file systems
themselves; whatever must touch one is done by a child process that may hang in our stead.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cpodfs.errors import MountError

FSTYPE = "fuse.cpodfs"
MOUNTINFO = Path("/proc/self/mountinfo")
ANSWER_S = 10.0
SUPERVISOR = b"cpodfs.runs.supervisor"


@dataclass(frozen=True, slots=True)
class MountEntry:
    """``owner``: the uid of whoever mounted it, which only FUSE tells. ``device``, ``mount_id`` and
    ``parent_id``, the mount that it lies on: as in mountinfo."""

    mountpoint: Path
    fstype: str
    source: str
    owner: int | None = None
    device: str = ""
    mount_id: int = 0
    parent_id: int = 0

    def is_on(self, device: str) -> bool:
        """Whether it shows the pods of the driver with this device."""
        return self.device == device and self.fstype == FSTYPE


def mounts() -> list[MountEntry]:
    """All mounts of our namespace, the topmost of several on one folder last."""
    entries = []
    for line in MOUNTINFO.read_text(errors="surrogateescape").splitlines():
        left, _, right = line.partition(" - ")
        mount_id, parent_id, device, _, point = left.split(" ")[:5]
        fstype, source, options = (*right.split(" "), "", "", "")[:3]
        owner = re.search(r"(?:^|,)user_id=(\d+)", options)
        entries.append(
            MountEntry(
                Path(_unescape(point)),
                fstype,
                _unescape(source),
                owner=int(owner[1]) if owner else None,
                device=device,
                mount_id=int(mount_id),
                parent_id=int(parent_id),
            )
        )
    # The kernel's order is that of their making; one that was moved may lie on a younger one.
    below = {entry.mount_id: entry.parent_id for entry in entries}
    return sorted(entries, key=lambda entry: _depth(entry.mount_id, below))


def _depth(mount_id: int, below: dict[int, int]) -> int:
    depth = 0
    while (parent_id := below.get(mount_id, mount_id)) != mount_id:
        mount_id, depth = parent_id, depth + 1
    return depth


def own() -> list[Path]:
    """Where this user has mounted pods, each mount once: the topmost of several on one folder, and
    not the copies that a bind mount makes."""
    topmost = {entry.mountpoint: entry for entry in mounts()}
    mine: dict[str, Path] = {}
    for entry in topmost.values():
        if entry.fstype == FSTYPE and entry.owner == os.getuid():
            mine.setdefault(entry.device, entry.mountpoint)
    return list(mine.values())


def find(path: Path) -> MountEntry | None:
    """The topmost mount on exactly this path."""
    return next((m for m in reversed(mounts()) if m.mountpoint == path), None)


def places(device: str) -> list[Path]:
    """Where in our namespace a mount can be unmounted by its path: all its copies, the uppermost
    first, without those that something else is mounted over."""
    return [entry.mountpoint for entry in _topmost(device)]


def _topmost(device: str) -> list[MountEntry]:
    topmost = {entry.mountpoint: entry for entry in mounts()}
    return [entry for entry in reversed(topmost.values()) if entry.is_on(device)]


def resolved(path: Path) -> Path:
    """The path, absolute and without symbolic links. Raises MountError without a current folder.

    In our mounts no link is looked for: a driver may hang.
    """
    try:
        absolute = Path(os.path.abspath(path))
    except FileNotFoundError:
        raise MountError(f"{path}: the current folder is gone; cd to one that is there") from None
    if _holding(absolute) is not None:
        return absolute
    above = Path(os.path.realpath(absolute.parent), absolute.name)
    return above if _holding(above) is not None else Path(os.path.realpath(absolute))


def containing(path: Path) -> MountEntry | None:
    """The cpodfs mount that a path is in, if any."""
    return _holding(resolved(path))


def _holding(absolute: Path) -> MountEntry | None:
    ours = [m for m in mounts() if m.fstype == FSTYPE]
    inside = [m for m in ours if m.mountpoint in (absolute, *absolute.parents)]
    return max(inside, key=lambda m: len(m.mountpoint.parts), default=None)


def prepare(path: Path) -> Path:
    """The absolute path of a folder that may be mounted on. Raises MountError.

    What a crashed driver left mounted there (ENOTCONN) is taken down first.
    """
    absolute = resolved(path)
    entry = find(absolute)
    if entry is not None and entry.fstype == FSTYPE:
        if not is_dead(absolute):
            raise MountError(f"{path}: already mounted; see: cpodfs status {path}")
        unmount(absolute, lazy=True)
    elif entry is not None:
        raise MountError(f"{path}: {entry.source or entry.fstype} is mounted there already")
    _check_folder(path, absolute)
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


def holders(path: Path) -> list[str]:
    """Who keeps a mount from being taken down, each as "name (pid)": whose working directory is in
    there, or an open file, or the program itself. The mount's runs do not count: they end with it.

    Only those that we may look into, which is all of the user's own.
    """
    device = os.stat(path).st_dev
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    found = []
    for pid in pids:
        with suppress(OSError):  # it has ended meanwhile, or is none of our business
            if _is_inside(pid, path, device) and not _is_of_a_run(pid):
                # The kernel cuts it, in the middle of a character if need be.
                name = Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
                found.append(f"{''.join(c if c.isprintable() else '?' for c in name)} ({pid})")
    return found


def _is_inside(pid: int, path: Path, device: int) -> bool:
    links = [f"/proc/{pid}/{name}" for name in ("cwd", "root", "exe")]
    links += [f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd")]
    for link in links:
        with suppress(OSError):
            # By name first, which touches no file system: others may hang. The name may also be
            # that of the folder that we are mounted on, in which somebody was before.
            if _is_below(os.readlink(link), path) and os.stat(link).st_dev == device:
                return True
    maps = Path(f"/proc/{pid}/maps").read_text(errors="surrogateescape")
    mark = f"{os.major(device):02x}:{os.minor(device):02x}"
    return any(line.split(maxsplit=4)[3] == mark for line in maps.splitlines())


def _is_below(name: str, path: Path) -> bool:
    return name == str(path) or name.startswith(f"{path}/")


def _is_of_a_run(pid: int) -> bool:
    """By the mark in its environment, or the supervisor that leads its session."""
    if any(v.startswith(b"CPODFS_RUN_ID=") for v in _words(pid, "environ")):
        return True
    with suppress(ProcessLookupError, FileNotFoundError):
        return SUPERVISOR in _words(os.getsid(pid), "cmdline")
    return False


def _words(pid: int, what: str) -> list[bytes]:
    return Path(f"/proc/{pid}/{what}").read_bytes().split(b"\0")


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


def unmount_device(device: str, *, lazy: bool = False) -> None:
    """Take down a mount and its copies, wherever in our namespace they are by now, and nothing else.
    Raises MountError (EBUSY: in use)."""
    # With the last of them its device's number and theirs are free, and the next mount has them.
    ids = {entry.mount_id for entry in mounts() if entry.is_on(device)}
    while ours := [entry for entry in _topmost(device) if entry.mount_id in ids]:
        unmount(ours[0].mountpoint, lazy=lazy)
        ids.discard(ours[0].mount_id)


def is_in_our_namespace(pid: int) -> bool:
    """Whether a process sees the mounts that we see; of one that we may not look into, suppose so."""
    try:
        return os.path.samefile(f"/proc/{pid}/ns/mnt", "/proc/self/ns/mnt")
    except PermissionError:
        return True
    except FileNotFoundError:  # in another namespace of processes
        return False


def is_held(ids: set[int]) -> bool:
    """Whether a process of our namespace has a file open in one of these mounts, be it gone from the
    namespace (``umount -l``). Touches no file system; as far as we may look."""
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with suppress(OSError):
            if is_in_our_namespace(pid) and _holds(pid, ids):
                return True
    return False


def _holds(pid: int, ids: set[int]) -> bool:
    for fd in os.listdir(f"/proc/{pid}/fdinfo"):
        with suppress(OSError):
            found = re.search(
                r"^mnt_id:\s*(\d+)", Path(f"/proc/{pid}/fdinfo/{fd}").read_text(), re.M
            )
            if found and int(found[1]) in ids:
                return True
    return False


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m.group(1), 8)), text)
