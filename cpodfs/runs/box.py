"""What a sandboxed run and the local market share: a folder that the run's gftp may write.

Standard library only, and little of it. All inside a box is a stranger's word; what it may speak
of stands in a note *beside* it, which only the supervisor, outside, writes and keeps locked:

    <gftp folder>/box-<random>/        the run's own registry (see `devnet.gftp`), with ``tmp``
    <gftp folder>/box-<random>.note    the folders whose files it may offer, as JSON
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

VARIABLE = "CPODFS_GFTP_DIR"
"""Names the folder by which the local market's gftp and its providers find each other's files; in a
sandbox a box in it, for the market believes what is in the folder itself."""
PREFIX = "box-"
TMP = "tmp"
_NOTE = ".note"


def new(registry: str) -> str:
    """Where a box of its own is to be for a run; nothing is made yet."""
    return os.path.join(registry, PREFIX + os.urandom(16).hex())


def is_box(path: str) -> bool:
    return os.path.basename(path).startswith(PREFIX)


def named(env: Mapping[str, str]) -> str | None:
    """The box that a sandboxed program's environment names."""
    path = env.get(VARIABLE, "")
    return path if is_box(path) else None


class Box:
    """A box that is open as long as this object (and its process). Raises OSError."""

    def __init__(self, path: str, folders: Iterable[str]) -> None:
        self._path = path
        parent = os.path.dirname(path)
        _sweep(parent)
        os.makedirs(os.path.join(path, TMP), mode=0o700)
        draft = os.path.join(parent, f".{os.path.basename(path)}")
        self._lock = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        # Locked before it has its name, so that nobody sweeps it away.
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        os.write(self._lock, json.dumps([*folders, os.path.join(path, TMP)]).encode())
        os.rename(draft, path + _NOTE)

    def close(self) -> None:
        """Whatever was offered from it is withdrawn, and what is in it is gone."""
        _remove(self._path)
        os.close(self._lock)


def folders(path: str) -> list[str]:
    """Whose files the box may offer: absolute paths of folders; none when it is not open."""
    try:
        with open(path + _NOTE) as note:
            if not _is_locked(note.fileno()):
                return []
            found = json.load(note)
    except (OSError, ValueError):
        return []
    return [str(folder) for folder in found]


def _is_locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _sweep(parent: str) -> None:
    """Remove the boxes of supervisors that died."""
    for name in os.listdir(parent):
        if name.startswith(PREFIX) and name.endswith(_NOTE):
            path = os.path.join(parent, name.removesuffix(_NOTE))
            if not folders(path):
                _remove(path)


def _remove(path: str) -> None:
    try:
        os.unlink(path + _NOTE)
    except FileNotFoundError:
        pass
    shutil.rmtree(path, ignore_errors=True)
