"""``cpodfs umount``: flush with a progress bar, unmount, and say what could not be uploaded."""

from __future__ import annotations

import errno
import json
import os
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from cpodfs import mountpoint as mp
from cpodfs.cli.control import ask, mount_of, tell
from cpodfs.cli.options import Number
from cpodfs.cli.progress import drain_progress
from cpodfs.cli.shown import say
from cpodfs.errors import MountError

POLL_S = 0.2
END_S = 60.0
LAST_S = 1.0
SHOWN = 5
LEAVE = ": close what is open there, or leave the folder"


@click.command()
@click.argument("mountpoint", type=Path)
@click.option(
    "--stall",
    type=Number(0),
    default=30.0,
    show_default=True,
    help="Give up after so many seconds without progress; what is left stays in the cache.",
)
def umount(mountpoint: Path, stall: float) -> None:
    """End the runs at MOUNTPOINT, upload what is pending, then unmount it, with its bind mounts.

    While a program is in there it refuses, before anything else, and says which; runs do not count.

    Exits with 1, naming the files, if something could not be uploaded: it waits in the cache and is
    sent by the next mount.
    """
    point = mount_of(mountpoint, dead_too=True)
    entry = mp.find(point)
    device = entry.device if entry is not None else ""
    if mp.is_dead(point):
        mp.unmount_device(device, lazy=True)
        raise MountError(f"{point}: the driver had died; unmounted. Mount again to upload the rest")
    os.chdir("/")  # whoever called us may have stayed in there; we need not
    _refuse_a_copy(point)
    _refuse_if_busy(point, device)
    _end_runs(point)
    tell(point, "drain")
    with drain_progress() as progress:
        status = wait_until_idle(point, stall, progress)
    driver = os.pidfd_open(status["pid"])
    # The driver goes on with what came in since; not once more with what we have waited for.
    tell(point, "stall", str(min(stall, LAST_S) if _left(status) else stall))
    try:
        mp.unmount_device(device)
    except MountError as error:
        tell(point, "stall", "")
        tell(point, "drain", "0")
        tell(point, "runs", "1")
        if error.errno == errno.EBUSY:
            _refuse_if_busy(point, device)
            raise MountError(f"{point}: in use{LEAVE}") from error
        raise
    select.select([driver], [], [], stall + END_S)
    sys.exit(_verdict(status))


def _refuse_a_copy(point: Path) -> None:
    """The driver does not end with a copy, as a container has one."""
    if not mp.is_in_our_namespace(ask(point, "status")["pid"]):
        raise MountError(
            f"{point}: the copy of a mount in another mount namespace; end that there, or take down "
            f"the copy alone, with: umount {point}"
        )


def _refuse_if_busy(point: Path, device: str) -> None:
    """Before anything is done that would be for nothing, such as ending the runs."""
    if busy := list(dict.fromkeys(h for path in mp.places(device) for h in mp.holders(path))):
        shown = [*busy[:SHOWN], *([f"{len(busy) - SHOWN} more"] if len(busy) > SHOWN else [])]
        raise MountError(f"{point}: in use by {', '.join(shown)}{LEAVE}")


def _end_runs(point: Path) -> None:
    """Before anything else: their programs live in the mount, and write to it."""
    pods = ask(point, "status")["runs"]
    if pods:
        say(f"cpodfs: cancelling the runs of {', '.join(pods)}", err=True)
    tell(point, "runs", "0")


def wait_until_idle(
    point: Path, stall_s: float, progress: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Wait until nothing is pending, or nothing moved for ``stall_s``; returns the last status."""
    moved, last = time.monotonic(), (-1, -1)
    while True:
        status = ask(point, "status")
        progress(status)
        now = (status["done"], sum(u["sent"] for u in status["uploads"]))
        if now != last or status["storing"]:
            moved, last = time.monotonic(), now
        changes = _left(status)
        stuck = changes <= status["errors"] and not status["uploads"] and not status["offline"]
        waited = time.monotonic() - moved
        if not changes or waited > stall_s or (stuck and waited > min(stall_s, 3.0)):
            return status
        time.sleep(POLL_S)


def _left(status: dict[str, Any]) -> int:
    changes: int = status["pending"] + status["deletions"]
    return changes


def _verdict(status: dict[str, Any]) -> int:
    """The driver's last word, which counts what came in while it was being unmounted."""
    try:
        report = json.loads((Path(status["cache"]) / "last-unmount.json").read_text())
    except (OSError, ValueError):
        report = {}
    if report.get("pid") != status["pid"]:
        what = f"the driver (pid {status['pid']}) has not ended yet; its log says why"
        say(f"cpodfs: {what}", err=True)
        return 1
    # Of one path there may be two: a file, and the one at the server whose place it takes.
    left: dict[str, str] = {}
    for entry in report["left"]:
        left.setdefault(entry["path"], entry["error"] or "no answer")
    for path, error in list(left.items())[:50]:
        say(f"cpodfs: not uploaded: {path}: {error}", err=True)
    if report["left"]:
        say("cpodfs: kept in the cache; the next mount tries again", err=True)
    return 1 if report["left"] else 0
