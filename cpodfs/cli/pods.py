"""What commands that name a pod share: which pod is meant, and asking its driver.

Imports mount points and errors. POD is a path in a mount, or a pod's name where there is one mount
only. Nothing here looks at the pod itself before the driver is known to answer.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpodfs import mountpoint as mp
from cpodfs.cli.control import mount_of
from cpodfs.errors import CpodfsError, MountError


@dataclass(frozen=True, slots=True)
class Pod:
    mount: Path
    name: str

    @property
    def path(self) -> Path:
        return self.mount / self.name

    @property
    def control(self) -> Path:
        """Its ``.run``."""
        return self.path / ".run"

    def ask(self, what: str, **fields: Any) -> dict[str, Any]:
        """Have the driver do something about this pod; see `request`."""
        return request(self.mount, what, pod=self.name, **fields)


def find_pod(text: str) -> Pod:
    """The pod that an argument means. Raises MountError."""
    path = mp.resolved(Path(text))
    entry = mp.containing(path)
    if entry is None and "/" not in text:
        return _existing(Pod(mount_of(None), text), text)
    mount = mount_of(path)
    parts = path.relative_to(mount).parts
    if not parts:
        raise MountError(f"{text}: the mount itself; which pod in it?")
    return _existing(Pod(mount, parts[0]), text)


def _existing(pod: Pod, text: str) -> Pod:
    try:
        os.stat(pod.path)
    except OSError as error:
        raise MountError(f"{text}: no pod: {pod.path}: {error.strerror}") from None
    return pod


def request(mount: Path, what: str, **fields: Any) -> dict[str, Any]:
    """Ask the driver of ``mount``, wait for its answer. Raises CpodfsError with what it says.

    Ctrl-C ends the command at once, and leaves the driver to it.
    """
    if mp.find(mount) is None:
        raise MountError(f"{mount}: is not mounted any more")
    name = f"user.cpodfs.request.{secrets.token_hex(8)}"
    value = json.dumps({"ask": what, **fields}).encode()
    # A handler of Python's would run only after the system call, which may take minutes.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        os.setxattr(mount, name, value)
        answer: dict[str, Any] = json.loads(os.getxattr(mount, name))
        if "ask" in answer:  # our own words: unmounted just now, they are in the folder below
            os.removexattr(mount, name)
            raise MountError(f"{mount}: is not mounted any more")
        os.setxattr(mount, name, b"")
    except OSError as error:
        raise MountError(f"{mount}: the driver does not answer: {error.strerror}") from error
    finally:
        signal.signal(signal.SIGINT, before)
    if "error" in answer:
        raise CpodfsError(answer["error"])
    return answer
