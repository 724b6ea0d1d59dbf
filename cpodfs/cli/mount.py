"""``cpodfs mount``: from flags to a running driver, in the foreground or as a daemon."""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import platformdirs
import trio

from cpodfs import mountpoint as mp
from cpodfs.cli.progress import drain_progress
from cpodfs.config import (
    RUN_GRACE_S,
    Settings,
    account_cache,
    config_path,
    read_password_file,
    run_password_command,
    toml_defaults,
)
from cpodfs.devnet import launch
from cpodfs.devnet.run_env import run_environment
from cpodfs.errors import ConfigError, CpodfsError, LoginRefused, Unreachable
from cpodfs.runs.sandbox import MODES

_F = TypeVar("_F", bound=Callable[..., Any])
LOG_FORMAT = "%(asctime)s %(levelname).1s %(name)s %(message)s"


class _Configured(click.Command):
    """A command whose options may also stand in the configuration file, below all else."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not set(args) & set(ctx.help_option_names):
            path = config_path()
            values = toml_defaults(path)
            known = {param.name for param in self.params if isinstance(param, click.Option)}
            if unknown := sorted(values.keys() - known):
                raise ConfigError(f"{path}: {unknown[0]}: no such option; see: cpodfs mount --help")
            ctx.default_map = values
        return super().parse_args(ctx, args)


def configured_option(
    *names: str, aliases: Sequence[str] = (), **settings: Any
) -> Callable[[_F], _F]:
    """An option that is also the variable CPODFS_<NAME>; ``aliases`` are asked after that."""
    variable = "CPODFS_" + names[0].removeprefix("--").replace("-", "_").upper()
    return click.option(*names, envvar=[variable, *aliases], **settings)


def _size(_ctx: click.Context, _param: click.Parameter, value: str | int) -> int:
    """A number of bytes: 1000000, 500M, 10G; the units are binary."""
    found = re.fullmatch(r"(\d+)\s*([KMGT]?)(?:i?B)?", str(value).strip(), re.IGNORECASE)
    if found is None:
        raise click.BadParameter(f"{value!r} is no size; such as 500M or 10G")
    return int(found[1]) << (10 * " KMGT".index(found[2].upper() or " "))


_PATH = click.Path(path_type=Path)


@click.command(
    cls=_Configured,
    epilog="Every option can also be set by a variable of the environment (--attr-ttl by "
    "CPODFS_ATTR_TTL, and so on) or in config.toml in $XDG_CONFIG_HOME/cpodfs (attr-ttl = 10). "
    "Flags come first, then the environment, then the file.",
)
@click.argument("mountpoint", type=Path)
@configured_option(
    "--server",
    metavar="URL",
    default="http://127.0.0.1:9090",
    show_default=True,
    help="The FairOS-DFS server.",
)
@configured_option("--user", metavar="NAME", help="The account's name at the server.")
@configured_option(
    "--password-file",
    type=_PATH,
    help="File whose first line is the password; only you may read it (mode 0600).",
)
@configured_option(
    "--password-command",
    metavar="COMMAND",
    help="Command that prints the password, such as 'pass show dfs'. With neither, the password is "
    "that in CPODFS_PASSWORD, or asked for.",
)
@configured_option(
    "--devnet",
    is_flag=True,
    help="Use a store and a Golem market on this machine, started and stopped with the mount.",
)
@configured_option(
    "--devnet-state",
    type=_PATH,
    help="Folder of their state.  [default: $XDG_STATE_HOME/cpodfs/devnet]",
)
@configured_option("--daemon", is_flag=True, help="Return as soon as the mount answers.")
@configured_option(
    "--cache-dir",
    type=_PATH,
    help="Folder for caches, one below it per account.  [default: $XDG_CACHE_HOME/cpodfs]",
)
@configured_option(
    "--cache-size",
    metavar="SIZE",
    callback=_size,
    default="10G",
    show_default=True,
    help="What contents may take up: bytes, or with K, M, G or T. What is not yet uploaded is never "
    "thrown out.",
)
@configured_option(
    "--fsync",
    type=click.Choice(["local", "remote"]),
    default="local",
    show_default=True,
    help="What fsync waits for: the local disk, or also the upload.",
)
@configured_option(
    "--writeback-delay",
    metavar="SECONDS",
    type=click.FloatRange(0),
    default=5.0,
    show_default=True,
    help="Time for which a file must be left alone before it is uploaded.",
)
@configured_option(
    "--attr-ttl",
    metavar="SECONDS",
    type=click.FloatRange(0),
    default=60.0,
    show_default=True,
    help="Time for which a folder's listing is taken as current.",
)
@configured_option(
    "--timeout",
    metavar="SECONDS",
    type=click.FloatRange(0.1),
    default=30.0,
    show_default=True,
    help="Time that one call to the server may take, transfers excepted.",
)
@configured_option(
    "--stall",
    metavar="SECONDS",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="At the end: give up after so long without progress; the next mount uploads the rest.",
)
@configured_option(
    "--uploads",
    metavar="N",
    type=click.IntRange(1, 64),
    default=4,
    show_default=True,
    help="Uploads at a time.",
)
@configured_option(
    "--downloads",
    metavar="N",
    type=click.IntRange(1, 64),
    default=4,
    show_default=True,
    help="Downloads at a time.",
)
@configured_option(
    "--yagna-url",
    metavar="URL",
    aliases=["YAGNA_API_URL"],
    default="http://127.0.0.1:7465",
    show_default=True,
    help="The yagna daemon that runs talk to (also YAGNA_API_URL); its key is YAGNA_APPKEY's.",
)
@configured_option(
    "--sandbox",
    type=click.Choice(MODES),
    default="auto",
    show_default=True,
    help="Run programs in bwrap, where only their pod can be written and other pods and your home are "
    "not to be seen. auto: those of pods that are not your own, where bwrap works.",
)
@configured_option(
    "--keep-runs",
    metavar="N",
    type=click.IntRange(1),
    default=20,
    show_default=True,
    help="Runs whose logs stay in a pod; the oldest folders go first.",
)
@configured_option(
    "--run-grace",
    metavar="SECONDS",
    type=click.FloatRange(0),
    default=RUN_GRACE_S,
    show_default=True,
    help="How long a cancelled run may take to end: from SIGINT, as at Ctrl-C, to SIGKILL, with SIGTERM "
    "after three quarters of it.",
)
@configured_option("--allow-other", is_flag=True, help="Let other users of this machine in.")
@configured_option(
    "--log-file",
    type=_PATH,
    help="Append the log to this file.  [default: stderr; with --daemon a file in "
    "$XDG_STATE_HOME/cpodfs]",
)
@configured_option("--verbose", "-v", is_flag=True, help="Log more.")
def mount(mountpoint: Path, **options: Any) -> None:
    """Mount the pods of an account at MOUNTPOINT, an empty folder of your own.

    In the foreground, until it is unmounted or gets SIGTERM or Ctrl-C; either way what is pending is
    uploaded first. A second Ctrl-C leaves the rest to the next mount.
    """
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


def known_password(options: Mapping[str, Any]) -> str | None:
    """The password, from wherever it comes without asking. Raises ConfigError."""
    if options["password_file"]:
        return read_password_file(options["password_file"])
    if options["password_command"]:
        return run_password_command(options["password_command"])
    return os.environ.get("CPODFS_PASSWORD") or None


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
    try:
        with drain_progress() as progress:
            left = trio.run(_mounted, point, password, options, ready, progress)
    except BaseExceptionGroup as group:
        raise _explained(_cause(group), options) from None
    except CpodfsError as error:
        raise _explained(error, options) from None
    for path in left[:50]:
        click.echo(f"cpodfs: not uploaded: {path}", err=True)
    if left:
        click.echo(f"cpodfs: {len(left)} changes wait in the cache for the next mount", err=True)
    return 1 if left else 0


def _cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error of ours that a nursery wrapped, or the group itself when it is somebody else's."""
    ours = group.subgroup(CpodfsError)
    error: BaseException | None = ours
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return group if error is None else error


def _explained(error: BaseException, options: Mapping[str, Any]) -> BaseException:
    """What kept us from mounting, with what the user can do about it."""
    if isinstance(error, LoginRefused):
        return LoginRefused(f"{options['user']} at {options['server']}: {error}")
    if isinstance(error, Unreachable):
        return Unreachable(
            f"{options['server']} does not answer, and this account has no cache to serve from: "
            f"{error}"
        )
    return error


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
        stall_s=options["stall"],
        cache_size=options["cache_size"],
        fsync_remote=options["fsync"] == "remote",
        uploads=options["uploads"],
        downloads=options["downloads"],
        allow_other=options["allow_other"],
        yagna_url=options["yagna_url"],
        sandbox=options["sandbox"],
        keep_runs=options["keep_runs"],
        run_grace_s=options["run_grace"],
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
