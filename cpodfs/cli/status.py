"""``cpodfs status``: what a mount is doing, once or again and again, for people or for programs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.live import Live

from cpodfs.cli.control import ask, mount_of
from cpodfs.cli.shown import as_json, say
from cpodfs.cli.tables import Table
from cpodfs.words import count, size

WATCH_S = 1.0
PODS_SHOWN = 10
DOUBTS_SHOWN = 10


@click.command()
@click.argument("mountpoint", type=Path, required=False)
@click.option(
    "--json", "json_wanted", is_flag=True, help="For programs; with --watch a line each time."
)
@click.option("--watch", is_flag=True, help="Show it every second, until Ctrl-C.")
def status(mountpoint: Path | None, json_wanted: bool, watch: bool) -> None:
    """Show what is cached, pending, being uploaded or running, and what failed."""
    point = mount_of(mountpoint)
    if not watch:
        report = ask(point, "status")
        if json_wanted:
            click.echo(as_json(report, 2))
        else:
            Console().print(_table(report))
        return
    try:
        _watch(point, json_wanted=json_wanted)
    except KeyboardInterrupt:
        return


def _watch(point: Path, *, json_wanted: bool) -> None:
    console = Console()
    if not console.is_terminal or json_wanted:
        for report in _reports(point):
            say(as_json(report) if json_wanted else _line(report))
        return
    with Live(console=console, auto_refresh=False) as live:
        for report in _reports(point):
            live.update(_table(report), refresh=True)


def _reports(point: Path) -> Iterator[dict[str, Any]]:
    while True:
        yield ask(point, "status")
        time.sleep(WATCH_S)


def _line(report: dict[str, Any]) -> str:
    """One line, for a log."""
    parts = [
        time.strftime("%H:%M:%S"),
        f"pending={report['pending']}",
        f"files={report['files']}",
        f"bytes={report['bytes']}",
        f"deletions={report['deletions']}",
        f"uploads={len(report['uploads'])}",
        f"errors={report['errors']}",
        f"calls_per_s={report['calls_per_s']}",
        f"runs={len(report['runs'])}",
    ]
    if report["offline"]:
        parts.append("offline")
    return " ".join(parts)


def _table(report: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("mount", report["mountpoint"])
    table.add_row("account", f"{report['user']} at {report['server']}")
    answers = "does not answer" if report["offline"] else "answers"
    calls = f"{count(report['calls'], 'call')}, {report['calls_per_s']} per second"
    table.add_row("server", f"{answers}; {calls}")
    table.add_row("pods", _pods(report))
    table.add_row("runs", ", ".join(report["runs"]) or "none")
    use = report["cache_use"]
    table.add_row("cache", report["cache"])
    table.add_row("", f"{size(use['clean'])} clean of at most {size(use['limit'])}")
    table.add_row("", f"{size(use['dirty'])} dirty, in {count(report['files'], 'file')}")
    if use["unclaimed"]:
        table.add_row("", f"{size(use['unclaimed'])} unclaimed; see: cpodfs cache --help")
    waiting = report["not_in_swarm"]
    if waiting["files"]:
        files = count(waiting["files"], "file")
        table.add_row("", f"{size(waiting['bytes'])} uploaded, not in Swarm yet, in {files}")
    table.add_row("reads", _reads(report["reads"]))
    changes, deletions = count(report["pending"], "change"), count(report["deletions"], "deletion")
    table.add_row("pending", f"{changes}, {deletions}")
    _add_transfers(table, report)
    return table


def _pods(report: dict[str, Any]) -> str:
    shown = [
        f"{pod['name']} (received)" if pod["received"] else pod["name"]
        for pod in report["pods"][:PODS_SHOWN]
    ]
    more = report["pod_count"] - len(shown)
    none = "none" if report["pods_listed"] else "not listed yet"
    return ", ".join([*shown, *([f"{more} more"] if more else [])]) or none


def _reads(reads: dict[str, Any]) -> str:
    if reads["hit_rate"] is None:
        return "none yet"
    opens = count(reads["hits"] + reads["misses"], "open")
    return f"{reads['hit_rate']:.0%} of {opens} from the cache"


def _add_transfers(table: Table, report: dict[str, Any]) -> None:
    for upload in report["uploads"]:
        progress = f"{size(upload['sent'])} of {size(upload['size'])}"
        again = f"; before: {upload['error']}" if upload["error"] else ""
        table.add_row("uploading", f"{upload['path']}  {progress}{again}")
    for download in report["downloads"]:
        progress = f"{size(download['received'])} of {size(download['size'])}"
        table.add_row("fetching", f"{download['path']}  {progress}")
    _add_doubts(table, report)
    for failure in report["failed"]:
        table.add_row("failed", f"{failure['path']}: {failure['error']}")
    if report["recent_errors"]:
        table.add_row("last error", report["recent_errors"][-1])


def _add_doubts(table: Table, report: dict[str, Any]) -> None:
    """What the server does not show any more: kept."""
    for alarm in report["alarms"]:
        of = f"{alarm['missing']} of {count(alarm['known'], 'object')}"
        table.add_row(
            "alarm", f"{alarm['path'] or 'pods'}: {of} not shown by the server; all is kept"
        )
    for doubtful in report["doubtful"][:DOUBTS_SHOWN]:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(doubtful["since"]))
        table.add_row("doubtful", f"{doubtful['path']}  not shown by the server since {since}")
    more = report["doubtful_count"] - len(report["doubtful"][:DOUBTS_SHOWN])
    if more > 0:
        table.add_row("doubtful", f"{more} more")
    if ghosts := report["deletions_doubtful"]:
        table.add_row("", f"{count(ghosts, 'deletion')} of what the server does not show just now")
    if report["alarms"] or report["doubtful_count"]:
        table.add_row("", "deleted elsewhere? cpodfs refresh --accept-deletions PATH")
