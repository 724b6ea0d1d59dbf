"""``cpodfs doctor``: looks before you mount, and says what to do. Takes the options of ``mount``."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.text import Text

from cpodfs.cli import shown
from cpodfs.cli.options import Configured, own_yagna, password_source, subject_options
from cpodfs.cli.tables import Table
from cpodfs.config import account_cache
from cpodfs.devnet import launch
from cpodfs.devnet.state import default_state

if TYPE_CHECKING:
    from cpodfs.doctor import Finding, Subject

_COLOURS = {"ok": "green", "warn": "yellow", "bad": "red", "unknown": "yellow"}


class _Doctor(Configured):
    """Reads the configuration file of ``mount``, of which it knows only a part."""

    knows_all = False


@click.command(cls=_Doctor)
@subject_options
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.pass_context
def doctor(ctx: click.Context, /, as_json: bool, **_options: Any) -> None:
    """Say whether everything is there for mounting and running, and how to mend what is not.

    Give it the options that you mount with. Exits with 1 when something needed is broken. To see
    whether there are funds, 0.1 is set aside at yagna for a moment.
    """
    # Here: it imports much, which the other commands need not wait for.
    from cpodfs.doctor import BAD, examine

    with _subject(ctx) as subject:
        findings = examine(subject)
    if as_json:
        click.echo(shown.as_json([dataclasses.asdict(f) for f in findings], 2))
    else:
        Console(highlight=False).print(_table(findings))
    sys.exit(1 if any(f.state == BAD for f in findings) else 0)


def _table(findings: list[Finding]) -> Table:
    table = Table(box=None, show_header=False)
    for finding in findings:
        table.add_row(
            Text(finding.state, style=_COLOURS[finding.state]), finding.name, finding.text
        )
        if finding.fix:
            table.add_row("", "", f"→ {finding.fix}")
    return table


@contextlib.contextmanager
def _subject(ctx: click.Context) -> Iterator[Subject]:
    from cpodfs.doctor import Subject

    options = ctx.params
    shared = {name: options[name] for name in ("network", "driver", "sandbox", "allow_other")}
    path = os.environ.get("PATH", os.defpath)
    if not options["devnet"]:
        server, user = options["server"], options["user"]
        password = password_source(ctx)
        yield Subject(
            server=server,
            user=user,
            password=None if password is None else password(),
            cache=account_cache(options["cache_dir"], server, user or "nobody"),
            **_users_yagna(options),
            path=path,
            **shared,
        )
        return
    with _devnet((options["devnet_state"] or default_state()).absolute()) as net:
        yagna = {
            "yagna_url": net.yagna_url or "",
            "app_key": net.app_key_file.read_text().strip() if net.app_key_file else None,
        }
        own = own_yagna(ctx)
        yield Subject(
            server=net.dfs_url,
            user=net.user,
            password=net.password(),
            cache=account_cache(options["cache_dir"], f"devnet:{net.state}", net.user),
            **(_users_yagna(options) if own else yagna),
            path=path if own else f"{net.run_path_dir}{os.pathsep}{path}",
            **shared,
        )


def _users_yagna(options: dict[str, Any]) -> dict[str, Any]:
    """A daemon that is not the devnet's."""
    return {
        "yagna_url": options["yagna_url"],
        "app_key": os.environ.get("YAGNA_APPKEY") or None,
        "gsb_url": options["gsb_url"] or "unix:/tmp/yagna.sock",
    }


@contextlib.contextmanager
def _devnet(state: Path) -> Iterator[launch.Devnet]:
    """The devnet that has this folder, such as a mount's; or one for as long as we look."""
    if (found := launch.found(state)) is not None:
        yield found
        return
    with launch.start(state) as running:
        yield running.devnet
