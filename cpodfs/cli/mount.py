"""``cpodfs mount``: from flags to a running driver, in the foreground or as a daemon."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import platformdirs
import trio

from cpodfs import fuse
from cpodfs import mountpoint as mp
from cpodfs.cli.options import (
    PATH,
    Configured,
    Number,
    WholeNumber,
    configured_option,
    own_yagna,
    password_source,
    subject_options,
)
from cpodfs.cli.progress import drain_progress
from cpodfs.cli.shown import say
from cpodfs.config import RUN_GRACE_S, Settings, account_cache
from cpodfs.devnet import launch
from cpodfs.devnet.run_env import run_environment
from cpodfs.errors import ConfigError, CpodfsError, DfsError, LoginRefused, MountError, Unreachable
from cpodfs.words import count, line, printable

log = logging.getLogger(__name__)
LOG_FORMAT = "%(asctime)s %(levelname).1s %(name)s %(message)s"


def _size(_ctx: click.Context, _param: click.Parameter, value: str | int) -> int:
    """A number of bytes: 1000000, 500M, 10G; the units are binary."""
    found = re.fullmatch(r"(\d+)\s*([KMGT]?)(?:i?B)?", str(value).strip(), re.IGNORECASE)
    if found is None:
        raise click.BadParameter(f"{value!r} is no size; such as 500M or 10G")
    return int(found[1]) << (10 * " KMGT".index(found[2].upper() or " "))


@click.command(
    cls=Configured,
    epilog="Every option can also be set by a variable of the environment (--attr-ttl by "
    "CPODFS_ATTR_TTL, and so on) or in config.toml in $XDG_CONFIG_HOME/cpodfs (attr-ttl = 10). "
    "Flags come first, then the environment, then the file.",
)
@click.argument("mountpoint", type=Path)
@subject_options
@configured_option("--daemon", is_flag=True, help="Return as soon as the mount answers.")
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
    type=Number(0),
    default=5.0,
    show_default=True,
    help="Time for which a file must be left alone before it is uploaded.",
)
@configured_option(
    "--attr-ttl",
    metavar="SECONDS",
    type=Number(0),
    default=60.0,
    show_default=True,
    help="Time for which a folder's listing is taken as current.",
)
@configured_option(
    "--timeout",
    metavar="SECONDS",
    type=Number(0.1),
    default=30.0,
    show_default=True,
    help="Time that one call to the server may take, transfers excepted.",
)
@configured_option(
    "--stall",
    metavar="SECONDS",
    type=Number(0),
    default=30.0,
    show_default=True,
    help="At the end: give up after so long without progress; the next mount uploads the rest.",
)
@configured_option(
    "--uploads",
    metavar="N",
    type=WholeNumber(1, 64),
    default=4,
    show_default=True,
    help="Uploads at a time.",
)
@configured_option(
    "--downloads",
    metavar="N",
    type=WholeNumber(1, 64),
    default=4,
    show_default=True,
    help="Downloads at a time.",
)
@configured_option(
    "--keep-runs",
    metavar="N",
    type=WholeNumber(1),
    default=20,
    show_default=True,
    help="Runs whose logs stay in a pod; the oldest folders go first.",
)
@configured_option(
    "--run-grace",
    metavar="SECONDS",
    type=Number(0),
    default=RUN_GRACE_S,
    show_default=True,
    help="How long a cancelled run may take to end: from SIGINT, as at Ctrl-C, to SIGKILL, with SIGTERM "
    "after three quarters of it.",
)
@configured_option(
    "--log-file",
    type=PATH,
    help="Append the log to this file.  [default: stderr; with --daemon a file in "
    "$XDG_STATE_HOME/cpodfs]",
)
@configured_option("--verbose", "-v", is_flag=True, help="Log more.")
@click.pass_context
def mount(ctx: click.Context, /, mountpoint: Path, **options: Any) -> None:
    """Mount the pods of an account at MOUNTPOINT, an empty folder of your own.

    In the foreground, until it is unmounted or gets SIGTERM or Ctrl-C; either way what is pending is
    uploaded first. A second Ctrl-C leaves the rest to the next mount.
    """
    # What is certain, before anything is begun; of the rest FUSE itself is the judge.
    if trouble := fuse.device() or fuse.missing():
        raise MountError(str(trouble))
    point = mp.prepare(mountpoint)
    password = None if options["devnet"] else _password(ctx)
    options["own_yagna"] = own_yagna(ctx)
    serve = functools.partial(_serve, point, password, options)
    if options["daemon"]:
        log_file = options["log_file"] or _default_log(point)
        _daemonize(functools.partial(serve, log_file=log_file), log_file)
    else:
        sys.exit(
            serve(
                lambda: say(f"cpodfs: mounted at {point}", err=True),
                log_file=options["log_file"],
            )
        )


def _password(ctx: click.Context) -> Callable[[], str]:
    """Where the password comes from: file, command, variable, prompt. Never a flag's value."""
    user = ctx.params["user"]
    if not user:
        raise ConfigError("--user: whose pods? Give --user NAME or set CPODFS_USER")
    source = password_source(ctx)
    if source is not None:
        return source
    if not sys.stdin.isatty():
        raise ConfigError("no password: use --password-file, --password-command or CPODFS_PASSWORD")
    known: str = click.prompt(f"Password of {user}", hide_input=True, err=True)
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
    for path in list(dict.fromkeys(left))[:50]:
        say(f"cpodfs: not uploaded: {path}", err=True)
    if left:
        what = f"{count(len(left), 'change')} kept in the cache for the next mount"
        say(f"cpodfs: {what}", err=True)
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
        unknown = "no user" in error.message
        reason = "no such user" if unknown else "the server refuses this password"
        return LoginRefused(f"{options['user']} at {options['server']}: {reason}")
    if isinstance(error, Unreachable):
        return Unreachable(
            f"{options['server']} does not answer, and this account has no cache to serve from: "
            f"{error}"
        )
    if isinstance(error, DfsError):
        log.warning("%s", error)
        said = f"{error.status or 'no HTTP'} for {error.endpoint}"
        return CpodfsError(
            f"{options['server']} does not answer as FairOS-DFS does ({said}); is --server right?"
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

    notice = _notice(options)
    told: dict[str, Any] = {"ready": ready, "progress": progress, "notice": notice}
    theirs = _yagna_environment(options)
    if password is not None:
        settings = _settings(point, options, options["server"], options["user"])
        return await run(settings, password, lambda: theirs, **told)
    store_only = ["--no-market"] if options["own_yagna"] else []
    async with launch.running(options["devnet_state"], store_only) as net:
        settings = _settings(point, options, net.dfs_url, net.user, key=f"devnet:{net.state}")
        if options["own_yagna"]:
            return await run(settings, net.password, lambda: theirs, **told)
        settings = dataclasses.replace(settings, local_market=True, unconfined=net.unconfined)
        return await run(settings, net.password, functools.partial(devnet_environment, net), **told)


def _yagna_environment(options: Mapping[str, Any]) -> dict[str, str]:
    """What runs need to find the user's own daemon; its gftp does not go by the API's URL."""
    found = {
        "YAGNA_API_URL": options["yagna_url"],
        "YAGNA_APPKEY": os.environ.get("YAGNA_APPKEY"),
        "GSB_URL": options["gsb_url"],
    }
    return {name: value for name, value in found.items() if value}


def _notice(options: Mapping[str, Any]) -> Callable[[str], None]:
    """Says what the user must know of the cache, unless the log says it at the same place."""
    if not (options["daemon"] or options["log_file"]):
        return lambda _text: None
    return lambda text: say(f"cpodfs: {text}", err=True)


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
        network=options["network"],
        driver=options["driver"],
        sandbox=options["sandbox"],
        keep_runs=options["keep_runs"],
        run_grace_s=options["run_grace"],
    )


def _default_log(point: Path) -> Path:
    """Where a daemon's log goes: one file per mount point, in $XDG_STATE_HOME/cpodfs."""
    folder = platformdirs.user_state_path("cpodfs")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: no place for the log: {error.strerror}; --log-file") from None
    return folder / f"{str(point).strip('/').replace('/', '-') or 'root'}.log"


def _log_to(path: Path | None, *, verbose: bool) -> None:
    handler = logging.StreamHandler() if path is None else _log_file(path)
    handler.setFormatter(_Lines(LOG_FORMAT))
    logging.basicConfig(handlers=[handler], level=logging.DEBUG if verbose else logging.INFO)
    for noisy in ("httpx", "httpcore", "pyfuse3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("cpodfs").setLevel(logging.DEBUG if verbose else logging.INFO)


class _Lines(logging.Formatter):
    """One line for each event, whatever names are in it; a traceback's lines are indented."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return line(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return "  " + printable(super().formatException(ei)).replace("\n", "\n  ")


def _log_file(path: Path) -> logging.Handler:
    try:
        # It names files: a new one is for its owner only.
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600))
        return logging.FileHandler(path)
    except OSError as error:
        raise ConfigError(
            f"--log-file: {path}: cannot be written to: {error.strerror}; choose another"
        ) from None


def _daemonize(serve: Callable[..., int], log_file: Path) -> None:
    """Fork; the parent returns when the child says that the mount answers, or why it will not."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        with os.fdopen(reader, "r") as said:
            verdict = said.read()
        if verdict == "ready":
            return
        raise CpodfsError(verdict or f"the driver ended unexpectedly; see {log_file}")
    os.close(reader)
    os.setsid()
    _as_daemon(serve, writer, log_file)


def _as_daemon(serve: Callable[..., int], writer: int, log_file: Path) -> None:
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
    except BaseException:  # the parent must hear of it: nobody else will
        log.exception("driver failed")
        tell(f"the driver failed unexpectedly; see {log_file}")
    os._exit(code)
