"""How commands talk to a running driver: through attributes of the mount, as the owner may.

Arguments that name a mount are of type Path, not click.Path, which looks at the file at once and
would hang where a driver hangs.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from cpodfs import mountpoint as mp
from cpodfs.errors import MountError


def mount_of(path: Path | None, *, dead_too: bool = False) -> Path:
    """The mount that ``path`` is in; without one, that of the working directory, else the only one
    of this user's.

    Raises MountError, also when its driver hangs (whoever asks it would hang as well) or has died,
    unless that will do (``dead_too``).
    """
    mount = _likeliest() if path is None else _around(path)
    if mp.is_dead(mount) and not dead_too:
        raise MountError(
            f"{mount}: its driver has died; mount again, which uploads what was pending"
        )
    return mount


def _around(path: Path) -> Path:
    entry = mp.containing(path)
    if entry is None:
        raise MountError(f"{path}: not in a cpodfs mount; see: cpodfs mount --help")
    return entry.mountpoint


def _likeliest() -> Path:
    # A working directory that is gone is in no mount.
    with contextlib.suppress(MountError):
        return _around(Path())
    mine = mp.own()
    if not mine:
        raise MountError("nothing of yours is mounted; mount with: cpodfs mount DIR")
    if len(mine) > 1:
        listed = ", ".join(map(str, mine))
        raise MountError(f"which mount? Give its path, or go there; yours are: {listed}")
    return mine[0]


def ask(mount: Path, what: str) -> dict[str, Any]:
    """A report of the driver. Raises MountError."""
    try:
        answer = os.getxattr(mount, f"user.cpodfs.{what}")
    except OSError as error:
        raise MountError(f"{mount}: the driver does not answer: {error.strerror}") from error
    report: dict[str, Any] = json.loads(answer)
    return report


def tell(path: Path, what: str, value: str = "1") -> None:
    """A command to the driver, about ``path``. Raises MountError."""
    name = f"user.cpodfs.{what}"
    try:
        os.setxattr(path, name, value.encode())
    except OSError as error:
        raise MountError(f"{path}: {what}: {error.strerror}") from error
    if mp.containing(path) is None:
        with contextlib.suppress(OSError):  # else it is an attribute of the folder below
            os.removexattr(path, name)
        raise MountError(f"{path}: is not mounted any more")
