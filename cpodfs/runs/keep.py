"""Removes the oldest run folders of a pod, through the mount; for the supervisor, at its end.

Imports the standard library only. What is in the pod may be the work of the program, so no symlink
is followed, and nothing goes that does not look like a run's folder. `open_folder` is for all who
read in a pod.
"""

from __future__ import annotations

import os
import re
import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_RUN_FOLDER = re.compile(r"\d{8}T\d{6}\.\d{3}Z-[0-9a-f]{4}", re.ASCII)
_CLOCKS_AGREE_S = 24 * 3600.0
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def prune(pod: str, log: str, keep: int, timeout_s: float) -> None:
    """Keep the ``keep`` newest run folders next to ``pod``/``log``, which is one of them whatever its
    date. Errors and a mount that hangs are left to the next run: waits at most ``timeout_s``."""
    thread = threading.Thread(target=_prune, args=(pod, log, keep), daemon=True)
    thread.start()
    thread.join(timeout_s)


def _prune(pod: str, log: str, keep: int) -> None:
    *parts, run = log.split("/")
    try:
        folder = open_folder(pod, parts)
    except OSError:
        return
    try:
        if old := _too_many(os.listdir(folder), run, keep):
            # Here, for it is slow to import, and until this is gone the run goes on.
            import shutil

            for name in old:
                shutil.rmtree(name, ignore_errors=True, dir_fd=folder)
    except OSError:
        pass
    finally:
        os.close(folder)


def _too_many(names: list[str], run: str, keep: int) -> list[str]:
    """Which of these are to go, that ``keep`` stay, among them ``run``."""
    others = [name for name in names if _RUN_FOLDER.fullmatch(name) and name != run]
    return newest_first(others)[max(0, keep - 1) :]


def newest_first(names: Iterable[str]) -> list[str]:
    """Run ids by their dates; those from the future come last, as if they were the oldest."""
    # From the time when a clock was wrong, or made up: they would push out each run as it ends. One
    # of a machine whose clock is a little ahead may be in progress, and counts by its date.
    tomorrow = time.strftime("%Y%m%dT%H%M%S", time.gmtime(time.time() + _CLOCKS_AGREE_S))
    return sorted(names, key=lambda name: (name < tomorrow, name), reverse=True)


def open_folder(root: str, parts: Iterable[str]) -> int:
    """An fd of ``root/parts…``. Raises OSError: for a link below ``root`` that is ENOTDIR."""
    fd = os.open(root, _FOLDER_FLAGS)
    for part in parts:
        try:
            inner = os.open(part, _FOLDER_FLAGS, dir_fd=fd)
        finally:
            os.close(fd)
        fd = inner
    return fd
