"""Removes the oldest run folders of a pod, through the mount; for the supervisor, at its end.

Imports the standard library only. What is in the pod may be the work of the program, so no symlink
is followed, and nothing goes that does not look like a run's folder.
"""

from __future__ import annotations

import os
import re
import threading

_RUN_FOLDER = re.compile(r"\d{8}T\d{6}\.\d{3}Z-[0-9a-f]{4}")
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def prune(pod: str, logs: str, keep: int, timeout_s: float) -> None:
    """Keep the ``keep`` newest folders in ``pod``/``logs``. Errors and a mount that hangs are left
    to the next run: waits at most ``timeout_s``."""
    thread = threading.Thread(target=_prune, args=(pod, logs.split("/"), keep), daemon=True)
    thread.start()
    thread.join(timeout_s)


def _prune(pod: str, parts: list[str], keep: int) -> None:
    try:
        folder = _open(pod, parts)
    except OSError:
        return
    try:
        names = sorted(name for name in os.listdir(folder) if _RUN_FOLDER.fullmatch(name))
        if len(names) > keep:
            # Here, for it is slow to import, and until this is gone the run goes on.
            import shutil

            for name in names[:-keep]:
                shutil.rmtree(name, ignore_errors=True, dir_fd=folder)
    except OSError:
        pass
    finally:
        os.close(folder)


def _open(pod: str, parts: list[str]) -> int:
    fd = os.open(pod, _FOLDER_FLAGS)
    for part in parts:
        try:
            inner = os.open(part, _FOLDER_FLAGS, dir_fd=fd)
        finally:
            os.close(fd)
        fd = inner
    return fd
