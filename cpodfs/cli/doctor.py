"""``cpodfs doctor``: looks before you mount, and says what to do. Takes the options of ``mount``."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cpodfs.cli.mount import configured_option, known_password
from cpodfs.config import account_cache, config_path, toml_defaults
from cpodfs.devnet import launch
from cpodfs.devnet.state import default_state
from cpodfs.runs.sandbox import MODES

if TYPE_CHECKING:
    from cpodfs.doctor import Finding, Subject

_PATH = click.Path(path_type=Path)
_COLOURS = {"ok": "green", "warn": "yellow", "bad": "red", "unknown": "yellow"}


class _Configured(click.Command):
    """Reads the configuration file of ``mount``, of which it knows only a part."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not set(args) & set(ctx.help_option_names):
            ctx.default_map = toml_defaults(config_path())
        return super().parse_args(ctx, args)


@click.command(cls=_Configured)
@configured_option(
    "--server", metavar="URL", default="http://127.0.0.1:9090", help="The FairOS-DFS server."
)
@configured_option("--user", metavar="NAME", help="The account's name at the server.")
@configured_option("--password-file", type=_PATH, help="File with the password.")
@configured_option("--password-command", metavar="COMMAND", help="Command that prints it.")
@configured_option("--devnet", is_flag=True, help="Look at the local store and market instead.")
@configured_option("--devnet-state", type=_PATH, help="Folder of their state.")
@configured_option("--cache-dir", type=_PATH, help="Folder for caches.")
@configured_option(
    "--yagna-url",
    metavar="URL",
    aliases=["YAGNA_API_URL"],
    default="http://127.0.0.1:7465",
    help="The yagna daemon; its key is YAGNA_APPKEY's.",
)
@configured_option(
    "--network",
    metavar="NAME",
    aliases=["YAGNA_PAYMENT_NETWORK"],
    default="holesky",
    show_default=True,
    help="The network to pay on.",
)
@configured_option(
    "--driver",
    metavar="NAME",
    aliases=["YAGNA_PAYMENT_DRIVER"],
    default="erc20",
    show_default=True,
    help="What to pay with.",
)
@configured_option(
    "--sandbox", type=click.Choice(MODES), default="auto", show_default=True, help="As in mount."
)
@configured_option("--allow-other", is_flag=True, help="Ask for what that needs, too.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def doctor(as_json: bool, **options: Any) -> None:
    """Say whether everything is there for mounting and running, and how to mend what is not.

    Give it the options that you mount with. Exits with 1 when something needed is broken. To see
    whether there are funds, 0.1 is set aside at yagna for a moment.
    """
    # Here: it imports much, which the other commands need not wait for.
    from cpodfs.doctor import BAD, examine

    with _subject(options) as subject:
        findings = examine(subject)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(f) for f in findings], indent=2))
    else:
        Console(highlight=False).print(_table(findings))
    sys.exit(1 if any(f.state == BAD for f in findings) else 0)


def _table(findings: list[Finding]) -> Table:
    table = Table(box=None, show_header=False)
    for finding in findings:
        table.add_row(
            Text(finding.state, style=_COLOURS[finding.state]), finding.name, Text(finding.text)
        )
        if finding.fix:
            table.add_row("", "", Text(f"→ {finding.fix}"))
    return table


@contextlib.contextmanager
def _subject(options: Mapping[str, Any]) -> Iterator[Subject]:
    from cpodfs.doctor import Subject

    shared = {name: options[name] for name in ("network", "driver", "sandbox", "allow_other")}
    path = os.environ.get("PATH", os.defpath)
    if not options["devnet"]:
        server, user = options["server"], options["user"]
        yield Subject(
            server=server,
            user=user,
            password=known_password(options),
            cache=account_cache(options["cache_dir"], server, user or "nobody"),
            yagna_url=options["yagna_url"],
            app_key=os.environ.get("YAGNA_APPKEY") or None,
            path=path,
            **shared,
        )
        return
    with _devnet((options["devnet_state"] or default_state()).absolute()) as net:
        yield Subject(
            server=net.dfs_url,
            user=net.user,
            password=net.password(),
            cache=account_cache(options["cache_dir"], f"devnet:{net.state}", net.user),
            yagna_url=net.yagna_url or "",
            app_key=net.app_key_file.read_text().strip() if net.app_key_file else None,
            path=f"{net.run_path_dir}{os.pathsep}{path}",
            **shared,
        )


@contextlib.contextmanager
def _devnet(state: Path) -> Iterator[launch.Devnet]:
    """The devnet that has this folder, such as a mount's; or one for as long as we look."""
    if not _is_running(state):
        with launch.start(state) as running:
            yield running.devnet
        return
    ports = json.loads((state / "ports.json").read_text())
    yield launch.Devnet(
        dfs_url=f"http://127.0.0.1:{ports.get('dfs')}",
        user="dev",
        password_file=state / "dev.password",
        yagna_url=f"http://127.0.0.1:{ports.get('market')}",
        app_key_file=state / "app.key",
        gftp_dir=state / "gftp",
        run_path_dir=state / "tools" / "bin",
        pid=0,
        state=state,
    )


def _is_running(state: Path) -> bool:
    try:
        with (state / "lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
