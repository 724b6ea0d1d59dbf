"""``cpodfs sync`` and ``refresh``: asking a mount to hurry, and to look again."""

from __future__ import annotations

import errno
import sys
from pathlib import Path

import click

from cpodfs.cli.control import mount_of, tell
from cpodfs.cli.options import Number
from cpodfs.cli.progress import drain_progress
from cpodfs.cli.shown import say
from cpodfs.cli.umount import wait_until_idle
from cpodfs.errors import MountError


@click.command()
@click.argument("path", type=Path, required=False)
@click.option(
    "--stall",
    type=Number(0),
    default=30.0,
    show_default=True,
    help="Give up after so many seconds without progress.",
)
def sync(path: Path | None, stall: float) -> None:
    """Wait until everything in the mount of PATH (default: the one you are in, else your only one) is uploaded."""
    point = mount_of(path)
    tell(point, "drain")
    try:
        with drain_progress() as progress:
            report = wait_until_idle(point, stall, progress)
    finally:
        tell(point, "drain", "0")
    changes = report["pending"] + report["deletions"]
    if changes:
        for one in report["left"]:
            say(f"cpodfs: not uploaded: {one['path']}: {one['reason']}", err=True)
        if changes > len(report["left"]):
            say(f"cpodfs: and {changes - len(report['left'])} more", err=True)
    sys.exit(1 if changes else 0)


@click.command()
@click.argument("path", type=Path, required=False)
@click.option(
    "--accept-deletions",
    is_flag=True,
    help="What the server does not show there any more was deleted: drop it here, too.",
)
def refresh(path: Path | None, accept_deletions: bool) -> None:
    """Look at the server for changes of the folder PATH, now; without PATH: for other pods.

    What was there and is not shown any more is kept while it may be the server's fault; `cpodfs status`
    names it. --accept-deletions says that it was deleted elsewhere.
    """
    point = mount_of(path)
    try:
        tell(path or point, "refresh", "accept-deletions" if accept_deletions else "1")
    except MountError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EBUSY:
            what = "is code that runs, and stays as it is until its run has ended"
            raise MountError(f"{path}: {what}") from error
        raise
