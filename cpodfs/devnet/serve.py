"""The devnet process: both servers on one event loop, from the lock to the last connection.

Imports the devnet's own modules. Order matters: the lock before anything is written, the ready line
only when every server accepts connections. The market is imported here, at its start, so that the
storage server can be had without it (``--no-market``).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from cpodfs.devnet.dfs_account import add_user
from cpodfs.devnet.dfs_routes import SERVER
from cpodfs.devnet.dfs_server import TOKEN_LIFETIME_S, create_app
from cpodfs.devnet.door import DOOR
from cpodfs.devnet.faults import Faults
from cpodfs.devnet.misbehave import Misbehaviour
from cpodfs.devnet.pace import Pace
from cpodfs.devnet.provider import DEFAULT_PROVIDERS, ProviderSpec
from cpodfs.devnet.state import announced, bound_socket, locked, secret_file

USER = "dev"
_GRACE_S = 1.0
_LOG_MAX = 16 << 20


@dataclass(frozen=True)
class Options:
    """``market_port`` None: no market. Port 0: the one remembered in the state folder."""

    state: Path
    faults: Faults = field(default_factory=Faults)
    dfs_port: int = 0
    market_port: int | None = None
    request_log: Path | None = None
    stdin_eof: bool = False
    strict_open: bool = False
    token_lifetime_s: float | None = None
    providers: tuple[ProviderSpec, ...] = DEFAULT_PROVIDERS
    misbehave: Misbehaviour = field(default_factory=Misbehaviour)
    pace: Pace = field(default_factory=Pace)
    seed: int = 0


async def serve(options: Options, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM, SIGINT or (with ``stdin_eof``) the end of standard input.

    ``announce`` gets the ready line. Raises ConfigError for a folder or port that is taken.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if options.stdin_eof:
        _watch_stdin(loop, stop)
    async with AsyncExitStack() as stack:
        stack.enter_context(locked(options.state))
        ready = await stack.enter_async_context(_dfs(options))
        ready |= await stack.enter_async_context(_market(options))
        ready |= {"pid": os.getpid(), "state": str(options.state), "stays": not options.stdin_eof}
        line = json.dumps(ready)
        with announced(options.state, line):
            announce(line)
            await stop.wait()


@asynccontextmanager
async def _dfs(options: Options) -> AsyncIterator[dict[str, Any]]:
    state = options.state
    lifetime = TOKEN_LIFETIME_S if options.token_lifetime_s is None else options.token_lifetime_s
    app = create_app(
        state / "dfs",
        options.faults,
        control_key=secret_file(_control_key(state)),
        request_log=options.request_log or _own_log(state),
        token_lifetime_s=lifetime,
        strict_open=options.strict_open,
    )
    password_file = state / "dev.password"
    await _ensure_user(app, password_file)
    async with _listening(app, state, "dfs", options.dfs_port) as url:
        yield {
            "dfs_url": url,
            "user": USER,
            "password_file": str(password_file),
            "control_key_file": str(_control_key(state)),
        }


def _control_key(state: Path) -> Path:
    """Its file: whoever can read it may set faults and sign up."""
    return state / "control.key"


async def _ensure_user(app: web.Application, password_file: Path) -> None:
    """The account and its password file agree afterwards, whichever of them was lost."""
    mnemonic = secret_file(password_file.with_name("dev.mnemonic"))
    await add_user(app[SERVER].store, USER, secret_file(password_file), mnemonic)


@asynccontextmanager
async def _market(options: Options) -> AsyncIterator[dict[str, Any]]:
    names = ("yagna_url", "app_key_file", "gftp_dir", "run_path_dir", "unconfined")
    if options.market_port is None:
        yield dict.fromkeys(names)
        return
    from cpodfs.devnet.market import MARKET, create_market_app
    from cpodfs.devnet.run_env import write_gftp_program

    state = options.state
    key_file, gftp_dir = state / "app.key", state / "gftp"
    app = create_market_app(
        state / "market",
        app_key=secret_file(key_file),
        control_key=secret_file(_control_key(state)),
        gftp_dir=gftp_dir,
        providers=options.providers,
        misbehave=options.misbehave,
        pace=options.pace,
        seed=options.seed,
    )
    program = write_gftp_program(state / "tools")
    async with _listening(app, state, "market", options.market_port) as url:
        yield {
            "yagna_url": url,
            "app_key_file": str(key_file),
            "gftp_dir": str(gftp_dir),
            "run_path_dir": str(program.parent),
            "unconfined": app[MARKET].unconfined,
        }


@asynccontextmanager
async def _listening(app: web.Application, state: Path, name: str, port: int) -> AsyncIterator[str]:
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=_GRACE_S)
    await runner.setup()
    try:
        bound = bound_socket(state, name, port)
        if DOOR in app:
            await app[DOOR].open(runner, bound)
        else:
            await web.SockSite(runner, bound).start()
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        await runner.cleanup()


def _own_log(state: Path) -> Path:
    """The request log in the state folder; one older generation is kept once it is large."""
    path = state / "requests.jsonl"
    if path.exists() and path.stat().st_size > _LOG_MAX:
        path.replace(path.with_suffix(".jsonl.1"))
    return path


def _watch_stdin(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    def wait_for_end() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        loop.call_soon_threadsafe(stop.set)

    threading.Thread(target=wait_for_end, name="stdin", daemon=True).start()
