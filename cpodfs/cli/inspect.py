"""``cpodfs status``, ``sync`` and ``refresh``: what a mount is doing, and asking it to hurry."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from cpodfs.cli.control import ask, mount_of, tell
from cpodfs.cli.progress import drain_progress
from cpodfs.cli.umount import wait_until_idle


@click.command()
@click.argument("mountpoint", type=Path, required=False)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def status(mountpoint: Path | None, as_json: bool) -> None:
    """Show what is pending, what is being uploaded and what failed."""
    report = ask(mount_of(mountpoint), "status")
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        Console().print(_table(report))


def _table(report: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None)
    table.add_row("mount", report["mountpoint"])
    table.add_row("account", f"{report['user']} at {report['server']}")
    table.add_row("server", "does not answer" if report["offline"] else "answers")
    table.add_row("cache", report["cache"])
    table.add_row("pending", f"{report['pending']} changes, {decimal(report['bytes'])}")
    table.add_row("deletions", str(report["deletions"]))
    for upload in report["uploads"]:
        progress = f"{decimal(upload['sent'])} of {decimal(upload['size'])}"
        table.add_row("uploading", f"{upload['path']}  {progress}")
    for failure in report["failed"]:
        table.add_row("failed", f"{failure['path']}: {failure['error']}")
    return table


@click.command()
@click.argument("path", type=Path, required=False)
@click.option(
    "--stall",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="Give up after so many seconds without progress.",
)
def sync(path: Path | None, stall: float) -> None:
    """Wait until everything in the mount of PATH is uploaded."""
    point = mount_of(path)
    tell(point, "drain")
    try:
        with drain_progress() as progress:
            report = wait_until_idle(point, stall, progress)
    finally:
        tell(point, "drain", "0")
    for failure in report["failed"]:
        click.echo(f"cpodfs: {failure['path']}: {failure['error']}", err=True)
    sys.exit(1 if report["pending"] + report["deletions"] else 0)


@click.command()
@click.argument("path", type=Path)
def refresh(path: Path) -> None:
    """Look at the server for changes of the folder PATH, now."""
    mount_of(path)
    tell(path, "refresh")
