"""``cpodfs devnet``: start the development servers and say where they are.

Imports the devnet's own modules (lazily: the main CLI mounts this command and must stay quick).
Exactly one line goes to stdout, the ready line; everything else goes to stderr. Both servers are
bound to 127.0.0.1 and nothing else can be asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cpodfs.devnet.state import default_state


@click.command()
@click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for all state.  [default: $XDG_STATE_HOME/cpodfs/devnet]",
)
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
@click.option("--seed", type=int, help="Same seed, same faults.")
@click.option("--match", help="Faults only where this expression is found in the path.")
def devnet(
    *,
    state: Path | None,
    dfs_port: int,
    market_port: int,
    no_market: bool,
    request_log: Path | None,
    stdin_eof: bool,
    strict_open: bool,
    token_lifetime: float | None,
    **fault_options: Any,
) -> None:
    """Run a local FairOS-DFS store and Golem market (loopback only) until SIGTERM or Ctrl-C.

    Prints one JSON line with the addresses when both answer. State survives restarts; the faults
    can be changed while it runs through POST /devnet/faults.
    """
    import asyncio

    from cpodfs.devnet.faults import Faults
    from cpodfs.devnet.serve import Options, serve
    from cpodfs.errors import ConfigError

    given = {name: value for name, value in fault_options.items() if value is not None}
    try:
        options = Options(
            state=(state or default_state()).absolute(),
            faults=Faults.parse(given),
            dfs_port=dfs_port,
            market_port=None if no_market else market_port,
            request_log=request_log,
            stdin_eof=stdin_eof,
            strict_open=strict_open,
            token_lifetime_s=token_lifetime,
        )
        asyncio.run(serve(options, click.echo))
    except (ValueError, ConfigError) as error:
        raise click.ClickException(str(error)) from error
