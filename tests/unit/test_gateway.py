"""The gateway on the wire, before a yagna that does as it is told: keys, streams, sockets, limits."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import socket
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any, cast

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from yarl import URL

from cpodfs.runs.gateway import Gateway, Job
from cpodfs.runs.gateway_books import Books
from cpodfs.runs.provider_status import Reporter, Status

pytestmark = pytest.mark.anyio
KEY, APP_KEY = "the-run's", "yagna's"
PAYMENT = "/payment-api/v1"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Bench:
    """A gateway with a program's session before it and a yagna behind it."""

    def __init__(self, **job: Any) -> None:
        self.asked: list[tuple[str, str, Any]] = []
        self.out = io.BytesIO()
        self.books = Books(None if job.get("limit") is None else Decimal(str(job["limit"])))
        self.job = {"key": KEY, "app_key": APP_KEY, "apis": {}, "stop_after": None}
        self.job |= {"limit": None} | job
        self.slow = asyncio.Event()
        self.program: aiohttp.ClientSession

    async def yagna(self, request: web.Request) -> web.StreamResponse:
        assert request.headers["Authorization"] == f"Bearer {APP_KEY}"
        body = await request.text()
        self.asked.append((request.method, request.raw_path, json.loads(body) if body else None))
        if request.path.endswith("/tcp"):
            answer = web.WebSocketResponse()
            await answer.prepare(request)
            async for message in answer:
                await answer.send_bytes(message.data[::-1])
            return answer
        if request.path.endswith("/exec/b"):
            stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await stream.prepare(request)
            await stream.write(b"data: 1\n\n")
            await self.slow.wait()
            await stream.write(b"data: 2\n\n")
            return stream
        if request.path == f"{PAYMENT}/allocations":
            if not self.asked[-1][2].get("quick"):
                await self.slow.wait()
            total = self.asked[-1][2]["totalAmount"]
            return web.json_response({"allocationId": "x", "totalAmount": total}, status=201)
        return web.json_response({"identity": "0x1"})

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncIterator[Bench]:
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", self.yagna)
        listener = socket.create_server(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with TestServer(app) as server:
            job = Job(yagna=str(server.make_url("")), **self.job)
            reporter = Reporter(cast(Status, self.books), self.out)
            self.ended = asyncio.Event()
            gateway = asyncio.create_task(
                Gateway(job, self.books, reporter).serve(listener, self.ended)
            )
            headers = {"Authorization": f"Bearer {KEY}"}
            async with aiohttp.ClientSession(url, headers=headers) as self.program:
                yield self
            self.slow.set()
            self.ended.set()
            await gateway

    def last_words(self) -> tuple[dict[str, Any], dict[str, Any]]:
        *_, status, end = map(json.loads, self.out.getvalue().splitlines())
        return status["status"], end["end"]


async def test_a_call_goes_through_with_yagnas_key() -> None:
    async with Bench().run() as bench:
        async with bench.program.get("/me?a=%20b&c") as answer:
            assert await answer.json() == {"identity": "0x1"}
        assert bench.asked == [("GET", "/me?a=%20b&c", None)]
    assert bench.last_words()[1] == {"error": None, "exit_code": 0}
    assert bench.last_words()[0]["phase"] == "over"


@pytest.mark.parametrize("key", ["", "Bearer", f"Bearer {APP_KEY}", KEY, f"Bearer {KEY}ü"])
async def test_any_other_key_is_refused(key: str) -> None:
    async with Bench().run() as bench:
        async with bench.program.get("/me", headers={"Authorization": key}) as answer:
            assert answer.status == 401
        assert bench.asked == []


@pytest.mark.parametrize("path", ["/payment-api/v1/%61llocations", "//me", "/x/../me"])
async def test_a_path_has_one_spelling(path: str) -> None:
    async with Bench().run() as bench:
        url = URL(f"{bench.program._base_url}".rstrip("/") + path, encoded=True)
        async with aiohttp.ClientSession() as plain:
            headers = {"Authorization": f"Bearer {KEY}"}
            async with plain.get(url, headers=headers) as answer:
                assert (answer.status, bench.asked) == (400, [])


async def test_events_pass_as_they_come() -> None:
    async with Bench().run() as bench:
        async with bench.program.get("/activity-api/v1/activity/a/exec/b") as answer:
            assert answer.content_type == "text/event-stream"
            assert await answer.content.readline() == b"data: 1\n"
            bench.slow.set()
            assert (await answer.content.read()).endswith(b"data: 2\n\n")


async def test_a_websocket_passes_both_ways() -> None:
    async with Bench().run() as bench:
        async with bench.program.ws_connect("/net-api/v1/net/n/10.0.0.1/22/tcp") as ws:
            await ws.send_bytes(b"abc")
            assert (await ws.receive(5)).data == b"cba"


async def test_what_a_dead_program_has_asked_for_is_known() -> None:
    async with Bench().run() as bench:
        asking = asyncio.create_task(
            bench.program.post(f"{PAYMENT}/allocations", json={"totalAmount": "1"})
        )
        while not bench.asked:
            await asyncio.sleep(0.01)
        asking.cancel()
    status, _ = bench.last_words()
    assert (status["phase"], status["allocations"]) == ("unsettled", ["x"])
    assert status["left"] == {"allocations": 1}


async def test_the_limit_bounds_an_allocation_and_refuses_the_next() -> None:
    async with Bench(limit=0.5).run() as bench:
        asked = {"totalAmount": "2", "quick": True}
        async with bench.program.post(f"{PAYMENT}/allocations", json=asked) as answer:
            assert answer.status == 201
            assert (await answer.json())["totalAmount"] == "0.5"
        async with bench.program.post(f"{PAYMENT}/allocations", json=asked) as answer:
            assert (answer.status, answer.content_type) == (400, "application/problem+json")
            assert "0.5 GLM" in (await answer.json())["detail"]
        assert len(bench.asked) == 1


async def test_a_yagna_that_is_away_is_one_that_takes_long() -> None:
    async with Bench(apis={"/market-api/v1": "http://127.0.0.1:1"}).run() as bench:
        async with bench.program.get("/market-api/v1/demands") as answer:
            assert (answer.status, answer.content_type) == (504, "application/problem+json")
