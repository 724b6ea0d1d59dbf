"""``cpodfs mount``: from flags to a running driver, in the foreground or as a daemon."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import platformdirs
import trio

from cpodfs import mountpoint as mp
from cpodfs.cli.progress import drain_progress
from cpodfs.config import Settings, account_cache, read_password_file, run_password_command
from cpodfs.devnet import launch
from cpodfs.devnet.run_env import run_environment
from cpodfs.errors import ConfigError, CpodfsError

LOG_FORMAT = "%(asctime)s %(levelname).1s %(name)s %(message)s"


@click.command()
@click.argument("mountpoint", type=click.Path(path_type=Path))
@click.option(
    "--server",
    default="http://127.0.0.1:9090",
    show_default=True,
    envvar="CPODFS_SERVER",
    help="The FairOS-DFS server.",
)
@click.option("--user", envvar="CPODFS_USER", help="The account's name at the server.")
@click.option(
    "--password-file",
    type=click.Path(path_type=Path),
    envvar="CPODFS_PASSWORD_FILE",
    help="File with the password; mode 0600.",
)
@click.option(
    "--password-command",
    envvar="CPODFS_PASSWORD_COMMAND",
    help="Command that prints the password, such as 'pass show dfs'.",
)
@click.option(
    "--devnet",
    is_flag=True,
    help="Use (and start) the local development network: no account, no internet.",
)
@click.option(
    "--devnet-state",
    type=click.Path(path_type=Path),
    envvar="CPODFS_DEVNET_STATE",
    help="Its folder, instead of the one below $XDG_STATE_HOME.",
)
@click.option("--daemon", is_flag=True, help="Return as soon as the mount answers.")
@click.option(
    "--cache-dir",
    type=click.Path(path_type=Path),
    envvar="CPODFS_CACHE_DIR",
    help="Folder for caches, instead of $XDG_CACHE_HOME/cpodfs.",
)
@click.option(
    "--writeback-delay",
    type=click.FloatRange(0),
    default=5.0,
    show_default=True,
    envvar="CPODFS_WRITEBACK_DELAY",
    help="Seconds of quiet before a change is uploaded.",
)
@click.option(
    "--attr-ttl",
    type=click.FloatRange(0),
    default=60.0,
    show_default=True,
    envvar="CPODFS_ATTR_TTL",
    help="Seconds for which a listing is taken as current.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0.1),
    default=30.0,
    show_default=True,
    envvar="CPODFS_TIMEOUT",
    help="Seconds that one metadata call may take.",
)
@click.option(
    "--uploads", type=click.IntRange(1, 64), default=4, show_default=True, help="Uploads at a time."
)
@click.option(
    "--downloads",
    type=click.IntRange(1, 64),
    default=4,
    show_default=True,
    help="Downloads at a time.",
)
@click.option(
    "--yagna-url",
    default="http://127.0.0.1:7465",
    show_default=True,
    envvar="YAGNA_API_URL",
    help="The yagna daemon that runs talk to; its key comes from YAGNA_APPKEY.",
)
@click.option("--allow-other", is_flag=True, help="Let other users of this machine in.")
@click.option(
    "--log-file",
    type=click.Path(path_type=Path),
    help="Append the log to this file (a daemon's default: in $XDG_STATE_HOME/cpodfs).",
)
@click.option("-v", "--verbose", is_flag=True, help="Log more.")
def mount(mountpoint: Path, **options: Any) -> None:
    """Mount the account's pods at MOUNTPOINT, an empty folder of your own."""
    point = mp.prepare(mountpoint)
    if options["devnet"]:
        password: Callable[[], str] | None = None
    else:
        password = _password(options)
    serve = functools.partial(_serve, point, password, options)
    if options["daemon"]:
        _daemonize(functools.partial(serve, log_file=options["log_file"] or _default_log(point)))
    else:
        sys.exit(
            serve(
                lambda: click.echo(f"cpodfs: mounted at {point}", err=True),
                log_file=options["log_file"],
            )
        )


def _password(options: Mapping[str, Any]) -> Callable[[], str]:
    """Where the password comes from: file, command, variable, prompt. Never a flag's value."""
    if not options["user"]:
        raise ConfigError("--user: whose pods? Give --user NAME or set CPODFS_USER")
    if options["password_file"]:
        return functools.partial(read_password_file, options["password_file"])
    if options["password_command"]:
        return functools.partial(run_password_command, options["password_command"])
    known = os.environ.pop("CPODFS_PASSWORD", "")
    if not known:
        if not sys.stdin.isatty():
            raise ConfigError(
                "no password: use --password-file, --password-command or CPODFS_PASSWORD"
            )
        known = click.prompt(f"Password of {options['user']}", hide_input=True, err=True)
    return lambda: known


def _serve(
    point: Path,
    password: Callable[[], str] | None,
    options: Mapping[str, Any],
    ready: Callable[[], None],
    *,
    log_file: Path | None,
) -> int:
    _log_to(log_file, verbose=options["verbose"])
    with drain_progress() as progress:
        left = trio.run(_mounted, point, password, options, ready, progress)
    for path in left[:50]:
        click.echo(f"cpodfs: not uploaded: {path}", err=True)
    if left:
        click.echo(f"cpodfs: {len(left)} changes wait in the cache for the next mount", err=True)
    return 1 if left else 0


async def _mounted(
    point: Path,
    password: Callable[[], str] | None,
    options: Mapping[str, Any],
    ready: Callable[[], None],
    progress: Any,
) -> list[str]:
    from cpodfs.mount import (
        run,
    )  # here: it starts FUSE's library, which the other commands need not

    if password is not None:
        appkey = os.environ.get("YAGNA_APPKEY")
        environment = {"YAGNA_API_URL": options["yagna_url"]}
        if appkey:
            environment["YAGNA_APPKEY"] = appkey
        settings = _settings(point, options, options["server"], options["user"])
        return await run(settings, password, lambda: environment, ready=ready, progress=progress)
    async with launch.running(options["devnet_state"]) as net:
        settings = _settings(point, options, net.dfs_url, net.user, key=f"devnet:{net.state}")
        return await run(
            settings,
            net.password,
            functools.partial(devnet_environment, net),
            ready=ready,
            progress=progress,
        )


def devnet_environment(net: launch.Devnet) -> dict[str, str]:
    """What runs need to find the local market."""
    if net.yagna_url is None or net.app_key_file is None or net.gftp_dir is None:
        return {}
    return run_environment(
        market_url=net.yagna_url,
        app_key=net.app_key_file.read_text().strip(),
        tool_dir=net.state / "tools",
        gftp_dir=net.gftp_dir,
        base={},
    )


def _settings(
    point: Path, options: Mapping[str, Any], server: str, user: str, key: str = ""
) -> Settings:
    return Settings(
        server=server,
        user=user,
        mountpoint=point,
        cache_dir=account_cache(options["cache_dir"], key or server, user),
        writeback_delay_s=options["writeback_delay"],
        attr_ttl_s=options["attr_ttl"],
        timeout_s=options["timeout"],
        uploads=options["uploads"],
        downloads=options["downloads"],
        allow_other=options["allow_other"],
        yagna_url=options["yagna_url"],
    )


def _default_log(point: Path) -> Path:
    """Where a daemon's log goes: one file per mount point, in $XDG_STATE_HOME/cpodfs."""
    folder = platformdirs.user_state_path("cpodfs", ensure_exists=True)
    return folder / f"{str(point).strip('/').replace('/', '-') or 'root'}.log"


def _log_to(path: Path | None, *, verbose: bool) -> None:
    handler = logging.StreamHandler() if path is None else logging.FileHandler(path)
    logging.basicConfig(
        handlers=[handler], format=LOG_FORMAT, level=logging.DEBUG if verbose else logging.INFO
    )
    for noisy in ("httpx", "httpcore", "pyfuse3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("cpodfs").setLevel(logging.DEBUG if verbose else logging.INFO)


def _daemonize(serve: Callable[..., int]) -> None:
    """Fork; the parent returns when the child says that the mount answers, or why it will not."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        with os.fdopen(reader, "r") as said:
            verdict = said.read()
        if verdict == "ready":
            return
        raise CpodfsError(verdict or "the driver ended before the mount answered; see its log")
    os.close(reader)
    os.setsid()
    _as_daemon(serve, writer)


def _as_daemon(serve: Callable[..., int], writer: int) -> None:
    told = False

    def tell(verdict: str) -> None:
        nonlocal told
        if not told:
            told = True
            os.write(writer, verdict.encode(errors="replace"))
            os.close(writer)
            null = os.open(os.devnull, os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)

    code = 1
    try:
        code = serve(lambda: tell("ready"))
    except CpodfsError as error:
        tell(str(error))
    except BaseException as error:  # the parent must hear of it: nobody else will
        tell(f"the driver failed: {error!r}")
        logging.getLogger(__name__).exception("driver failed")
    os._exit(code)
