"""``cpodfs devnet``: start the development servers and say where they are.

Imports the devnet's own modules (lazily: the main CLI mounts this command and must stay quick).
Of the servers exactly one line goes to stdout, the ready line; everything else goes to stderr. Both
are bound to 127.0.0.1 and nothing else can be asked for. ``ledger`` only reads their files.
"""

from __future__ import annotations

import functools
import shlex
from pathlib import Path
from typing import Any

import click

from cpodfs.devnet.state import default_state

_state_option = click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for all state.  [default: $XDG_STATE_HOME/cpodfs/devnet]",
)
_CHANCE = click.FloatRange(0.0, 1.0)


@click.group(invoke_without_command=True)
@click.pass_context
@_state_option
@click.option("--dfs-port", type=click.IntRange(0, 65535), default=0, help="0: as last time.")
@click.option("--market-port", type=click.IntRange(0, 65535), default=0, help="0: as last time.")
@click.option("--no-market", is_flag=True, help="Start the storage server only.")
@click.option("--request-log", type=click.Path(path_type=Path, dir_okay=False), help="JSON lines.")
@click.option("--stdin-eof", is_flag=True, help="Stop when standard input ends.")
@click.option("--strict-open", is_flag=True, help="Refuse calls on pods that are not open.")
@click.option("--token-lifetime", type=click.FloatRange(min=0.0), help="Seconds.  [default: 24 h]")
@click.option("--latency", "latency_s", type=float, help="Seconds before each answer.")
@click.option("--latency-jitter", "latency_jitter_s", type=float, help="Up to so much more.")
@click.option("--bandwidth", type=int, help="Bytes per second, each way.")
@click.option("--error-rate", type=float, help="Share of requests refused with --status.")
@click.option("--status", type=int, help="Status of injected errors.  [default: 500]")
@click.option("--drop-rate", type=float, help="Share of connections closed without an answer.")
@click.option("--truncate-rate", type=float, help="Share of downloads cut short.")
@click.option("--expire-every", type=int, help="Sessions end at each N-th request.")
@click.option("--directory-race", is_flag=True, default=None, help="Lose concurrent entries.")
@click.option(
    "--rmdir-bug/--no-rmdir-bug", default=None, help="The real server's mistake.  [default: on]"
)
@click.option(
    "--rename-needs-listing", is_flag=True, default=None, help="The real server's other one."
)
@click.option("--read-failure-rate", type=float, help="Share of chunk reads that find nothing.")
@click.option("--empty-store", is_flag=True, default=None, help="As after the loss of all pods.")
@click.option(
    "--swarm-delay", "swarm_delay_s", type=float, help="Seconds until Swarm has what was uploaded."
)
@click.option("--seed", type=int, help="Same seed, same faults.")
@click.option("--match", help="Faults only where this expression is found in the path.")
@click.option(
    "--providers",
    type=click.IntRange(0, 1000),
    envvar="CPODFS_DEVNET_PROVIDERS",
    help="Number of providers in the market.  [default: 4]",
)
@click.option(
    "--provider",
    "specs",
    multiple=True,
    envvar="CPODFS_DEVNET_PROVIDER",
    metavar="NAME[:KEY=VALUE,…]",
    help="A provider of its own instead, with speed, bandwidth (bytes/s), cpu_price, duration_price, "
    "start_price, cores, threads, mem_gib, storage_gib, subnet, runtime (vm, vm-nvidia, …), and, joined "
    "by +, capabilities and images (tags or hashes that it can deploy). Can be repeated.",
)
@click.option(
    "--provider-latency",
    "provider_latency_s",
    type=click.FloatRange(0.0, 60.0),
    envvar="CPODFS_DEVNET_PROVIDER_LATENCY",
    help="Market: seconds from the requestor's daemon to a provider, and as many back.  [default: 0]",
)
@click.option(
    "--vm-pace",
    "vm",
    is_flag=True,
    default=None,
    envvar="CPODFS_DEVNET_VM_PACE",
    help="Market: deploying, starting and transfers take as long as in a virtual machine.",
)
@click.option(
    "--offer-delay",
    "offer_delay_s",
    type=click.FloatRange(0.0, 3600.0),
    envvar="CPODFS_DEVNET_OFFER_DELAY",
    help="Market: seconds until a free provider's offer is heard of.  [default: 5]",
)
@click.option(
    "--offer-interval",
    "offer_interval_s",
    type=click.FloatRange(0.0, min_open=True),
    envvar="CPODFS_DEVNET_OFFER_INTERVAL",
    help="Market: seconds until it is heard of again, on average.  [default: 240]",
)
@click.option(
    "--accept-timeout",
    "accept_timeout_s",
    type=click.FloatRange(0.0, min_open=True),
    envvar="CPODFS_DEVNET_ACCEPT_TIMEOUT",
    help="Market: seconds that providers wait for a debit note to be accepted.  [default: 240]",
)
@click.option(
    "--idle-timeout",
    "idle_s",
    type=click.FloatRange(0.0, min_open=True),
    envvar="CPODFS_DEVNET_IDLE_TIMEOUT",
    help="Market: seconds that providers wait for an activity.  [default: 90]",
)
@click.option("--no-offers", is_flag=True, help="Market: nobody answers a demand.")
@click.option("--reject-proposals", type=_CHANCE, help="Market: chance of a refusal.")
@click.option("--fail-command", type=_CHANCE, help="Market: chance that a command fails.")
@click.option("--refuse-activity", type=_CHANCE, help="Market: chance that none can be made.")
@click.option("--lose-activity", type=_CHANCE, help="Market: chance that an activity is lost.")
@click.option("--vanish", type=_CHANCE, help="Market: chance that a provider disappears.")
@click.option("--transfer-bandwidth", type=float, help="Market: bytes per second of transfers.")
@click.option("--lose-invoice", type=_CHANCE, help="Market: chance that no invoice comes.")
@click.option("--overbill", type=float, help="Market: GLM too much on every invoice.")
@click.option("--invoice-delay", "invoice_delay_s", type=float, help="Market: seconds.")
@click.option("--unknown-image", is_flag=True, help="Market: no image is known.")
def devnet(
    context: click.Context,
    /,
    *,
    state: Path | None,
    dfs_port: int,
    market_port: int,
    no_market: bool,
    request_log: Path | None,
    stdin_eof: bool,
    strict_open: bool,
    token_lifetime: float | None,
    providers: int | None,
    specs: tuple[str, ...],
    **fault_options: Any,
) -> None:
    """Run a local FairOS-DFS store and Golem market (loopback only) until SIGTERM or Ctrl-C.

    Prints one JSON line with the addresses when both answer. State survives restarts; the faults
    can be changed while it runs through POST /devnet/faults at the store, and POST
    /devnet/misbehave at the market; POST /devnet/vanish there makes a provider disappear, POST
    /devnet/restart {"away_s": N} the daemon for so long, /devnet/freeze {"s": N} makes it silent, and
    /devnet/silence {"provider": NAME, "for_s": N} a provider. All need
    "Authorization: Bearer" with what is in control.key in the state folder, and so does signing up.

    To use it: cpodfs mount --devnet, with this --state as --devnet-state when that is given.
    """
    if context.invoked_subcommand is not None:
        return
    import asyncio

    from cpodfs.devnet.faults import Faults
    from cpodfs.devnet.serve import Options, serve
    from cpodfs.errors import ConfigError

    given = {name: value for name, value in fault_options.items() if value is not None}
    try:
        market = _market_options(given, providers, specs)
        options = Options(
            state=(state or default_state()).absolute(),
            faults=Faults.parse(given),
            dfs_port=dfs_port,
            market_port=None if no_market else market_port,
            request_log=request_log,
            stdin_eof=stdin_eof,
            strict_open=strict_open,
            token_lifetime_s=token_lifetime,
            **market,
        )
        asyncio.run(serve(options, functools.partial(_announce, options.state, stdin_eof)))
    except (ValueError, ConfigError) as error:
        raise click.ClickException(str(error)) from error


def _announce(state: Path, for_its_parent: bool, line: str) -> None:
    click.echo(line)
    if for_its_parent:
        return
    where = (
        "" if state == default_state().absolute() else f"--devnet-state {shlex.quote(str(state))} "
    )
    click.echo(f"cpodfs: mount it with: cpodfs mount --devnet {where}DIR", err=True)


_MISBEHAVIOUR = (
    *("no_offers", "reject_proposals", "fail_command", "lose_activity", "vanish"),
    *("transfer_bandwidth", "lose_invoice", "invoice_delay_s", "unknown_image"),
    *("refuse_activity", "overbill"),
)
_PACE = (
    *("provider_latency_s", "vm", "offer_delay_s", "offer_interval_s"),
    *("accept_timeout_s", "idle_s"),
)


def _market_options(
    given: dict[str, Any], providers: int | None, specs: tuple[str, ...]
) -> dict[str, Any]:
    """The market's part of the `serve.Options`, taken out of ``given``. Raises ValueError."""
    from cpodfs.devnet.misbehave import Misbehaviour
    from cpodfs.devnet.pace import Pace
    from cpodfs.devnet.provider import DEFAULT_PROVIDERS, numbered, parse_spec

    amiss = {name: given.pop(name) for name in _MISBEHAVIOUR if name in given}
    pace = {name: given.pop(name) for name in _PACE if name in given}
    named = tuple(map(parse_spec, specs))
    default = DEFAULT_PROVIDERS if providers is None else numbered(providers)
    return {
        "providers": named or default,
        "misbehave": Misbehaviour.parse(amiss),
        "pace": Pace(**pace),
        "seed": given.get("seed", 0),
    }


@devnet.command()
@_state_option
def ledger(state: Path | None) -> None:
    """Show the market's books: every agreement, what it cost, and whether all is settled.

    Exits with 1 when the books do not balance (yet).
    """
    import sqlite3

    from rich.console import Console

    from cpodfs.devnet.ledger import ledger_table, open_points
    from cpodfs.devnet.ledger_view import as_table, verdict

    folder = (state or default_state()).absolute() / "market"
    try:
        rows, points = ledger_table(folder), open_points(folder)
    except sqlite3.Error as error:
        raise click.ClickException(f"{folder}: {error}") from error
    console = Console(soft_wrap=False)
    if rows:
        console.print(as_table(rows))
    console.print(verdict(rows, points), highlight=False, soft_wrap=True)
    if points:
        raise SystemExit(1)
