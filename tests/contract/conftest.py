"""The servers that the contract is checked against: our development server, always, and the real
one at ``CPODFS_TEST_DFS_URL``, if set (``dfs dev`` will do: it lets anybody sign up)."""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from aiohttp import web

from cpodfs.devnet.dfs_server import create_app
from cpodfs.dfs import Client, Session
from tests.patience import PATIENCE_S

REAL_URL = os.environ.get("CPODFS_TEST_DFS_URL", "")


@contextmanager
def devnet_server(state_dir: Path, port: int = 0) -> Iterator[str]:
    """The development server in a thread of its own; yields its address."""
    loop = asyncio.new_event_loop()
    runners: list[web.AppRunner] = []

    async def start() -> int:
        # Made here, because the application's database belongs to the thread that opens it.
        app = create_app(state_dir, control_key=secrets.token_hex(), open_signup=True)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        runners.append(runner)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        return int(runner.addresses[0][1])

    async def stop() -> None:
        for runner in runners:
            await runner.cleanup()

    thread = threading.Thread(target=loop.run_forever, name="devnet")
    thread.start()
    try:
        bound = asyncio.run_coroutine_threadsafe(start(), loop).result(timeout=PATIENCE_S)
        yield f"http://127.0.0.1:{bound}"
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result(timeout=PATIENCE_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=PATIENCE_S)
        loop.close()


@pytest.fixture(scope="session", params=["devnet", "real"] if REAL_URL else ["devnet"])
def dfs_url(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    if request.param == "real":
        yield REAL_URL
        return
    with devnet_server(tmp_path_factory.mktemp("dfs")) as url:
        yield url


@pytest.fixture
def anyio_backend() -> str:
    return "trio"


@dataclass(frozen=True)
class Login:
    user: str
    password: str


Connect = Callable[..., Awaitable[Client]]


@pytest.fixture
async def connect(dfs_url: str, anyio_backend: str) -> AsyncIterator[Connect]:
    """A function that signs up a fresh user, or takes a given one, and returns a client."""
    async with AsyncExitStack() as stack:

        async def new_client(login: Login | None = None) -> Client:
            fresh = login is None
            login = login or Login(f"cpodfs-{secrets.token_hex(6)}", secrets.token_urlsafe(16))
            session = Session(dfs_url, login.user, lambda: login.password)
            client = Client(await stack.enter_async_context(session))
            if fresh:
                await client.signup(login.user, login.password)
            return client

        yield new_client


@pytest.fixture
async def client(connect: Connect) -> Client:
    """A client of a new user who has one empty pod, "pod"."""
    made = await connect()
    await made.create_pod("pod")
    return made
