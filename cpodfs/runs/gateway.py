"""Between a requestor run's program and yagna: ``python -P -m cpodfs.runs.gateway FD``.

asyncio and aiohttp, in a process of its own beside the supervisor, which starts it at the program's
first connection to the listening socket FD. stdin: the job as one line, see `Job`, later ``end``; at
the end of stdin alone the supervisor is dead, and so is the gateway. stdout: `provider_status`'s
lines. Passes on what the program says with its own key, with yagna's in the place of that; only
`gateway_books` knows what it means. Ends nothing at the market itself but what costs too much:
whoever reads the last status does, with `provider_link.clean_up`.
"""

from __future__ import annotations

import asyncio
import ctypes
import hmac
import json
import logging
import os
import socket
import sys
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, cast

import aiohttp
from aiohttp import web
from yarl import URL

from cpodfs.runs.gateway_books import Books, Call, Refused, Rented
from cpodfs.runs.provider_status import Reporter, Status

_MARKET, _ACTIVITY, _PAYMENT = (f"/{name}-api/v1" for name in ("market", "activity", "payment"))
_BODY_LIMIT_BYTES = 64 << 20
_KEEP_ALIVE_S = 3.0
"""Shorter than yagna's own 5 s: a request must not meet a connection that is just being closed."""
_ASK_S = 5.0
"""For a request of our own."""
_DUE_S = 5.0
"""How long the answers to what a program that is dead has asked for are waited for."""
_WATCH_S = 1.0
_HOP_BY_HOP = frozenset(
    [
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "host",
        "content-length",
        "accept-encoding",
        "authorization",
    ]
)
_LONG_POLL = ("/wait",)
_BINDING = (f"{_MARKET}/demands", f"{_ACTIVITY}/activity", f"{_PAYMENT}/allocations")
"""What makes something that must be ended again."""
_OVER_BUDGET = {"message": "The run's budget is spent", "golem.requestor.code": "Cancelled"}
_PR_SET_DUMPABLE = 4


@dataclass(frozen=True)
class Job:
    """``key``: what the program has; ``app_key``: yagna's; ``yagna``: its address; ``apis``: addresses
    of single APIs, by path. ``limit``: GLM, or None. ``stop_after``: so many failures alike end the
    run, or None."""

    key: str
    app_key: str
    yagna: str
    apis: dict[str, str]
    limit: float | None
    stop_after: int | None

    def url(self, path: str) -> str:
        """Where at yagna a request for this path goes."""
        for prefix, root in self.apis.items():
            if path.startswith(f"{prefix}/"):
                return root.rstrip("/") + path.removeprefix(prefix)
        return self.yagna.rstrip("/") + path


class Gateway:
    """One run's. ``serve`` until it is told that the program has ended, then `end`."""

    def __init__(self, job: Job, books: Books, reporter: Reporter) -> None:
        self._job = job
        self._books = books
        self._reporter = reporter
        self._due: set[asyncio.Task[web.Response]] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self._yagna: aiohttp.ClientSession

    async def serve(self, listener: socket.socket, ended: asyncio.Event) -> None:
        """Pass calls on until ``ended``; then say what is open."""
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
        headers = {"Authorization": f"Bearer {self._job.app_key}", "Accept-Encoding": "identity"}
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, headers=headers, max_line_size=1 << 16
        ) as self._yagna:
            app = web.Application(client_max_size=_BODY_LIMIT_BYTES)
            app.router.add_route("*", "/{tail:.*}", self._handle)
            runner = web.AppRunner(
                app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1
            )
            await runner.setup()
            await web.SockSite(runner, listener).start()
            watch = asyncio.create_task(self._watch())
            await ended.wait()
            watch.cancel()
            await self._end()
            await runner.cleanup()

    # -- one call ---------------------------------------------------------------------------------

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        said = request.headers.get("Authorization", "")
        if not hmac.compare_digest(said.encode(), f"Bearer {self._job.key}".encode()):
            return web.Response(status=401, text="this key is not the run's")
        if not request.raw_path.startswith("/") or any(
            odd in request.raw_path.partition("?")[0] for odd in ("%", "//", "/.")
        ):
            return _problem(400, "Bad request", "the path is not one of yagna's")
        try:
            if request.headers.get("Upgrade", "").lower() == "websocket":
                return await self._socket(request)
            if request.method == "GET" or request.path.endswith(_LONG_POLL):
                return await self._pass_on(request, b"")
            # What changes something at yagna is seen through, though the program has died.
            body = await request.read()
            task = asyncio.create_task(self._change(request, body))
            self._due.add(task)
            task.add_done_callback(self._due.discard)
            return await asyncio.shield(task)
        except Refused as why:
            self._books.warn(str(why))
            self._reporter.changed()
            return _problem(400, "Beyond the run's limit", str(why))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            # yapapi takes a 504 for "nothing yet", and asks again.
            return _problem(504, "No answer", f"yagna does not answer ({type(error).__name__})")

    async def _change(self, request: web.Request, body: bytes) -> web.Response:
        """A call that changes something: what it may do is decided, and what it did is noted."""
        method, path, asked = request.method, request.path, _json(body)
        if held := self._hold(method, path):
            return held
        body = await self._checked(method, path, asked, body)
        answer = await self._pass_on(request, body)
        assert isinstance(answer, web.Response)
        return answer

    def _hold(self, method: str, path: str) -> web.Response | None:
        """The answer to the release of an allocation from which bills have yet to be paid."""
        key = path.removeprefix(f"{_PAYMENT}/allocations/")
        if method == "DELETE" and key != path and self._books.hold(key):
            self._reporter.changed()
            return web.json_response(None)
        return None

    async def _checked(self, method: str, path: str, asked: Any, body: bytes) -> bytes:
        """The body to be passed on. Raises Refused."""
        allocations, agreements = f"{_PAYMENT}/allocations", f"{_MARKET}/agreements/"
        if path.startswith(allocations) and method in ("POST", "PUT") and isinstance(asked, dict):
            key = path.removeprefix(allocations).strip("/") or None
            granted = self._books.grant(asked.get("totalAmount"), key)
            if granted is not None:
                return json.dumps(asked | {"totalAmount": f"{granted:f}"}).encode()
        elif path.startswith(agreements) and path.endswith("/confirm"):
            key = path.removeprefix(agreements).removesuffix("/confirm")
            if not self._books.is_known(key):
                await self._ask("GET", f"{agreements}{key}")
            self._books.afford(key)
            self._books.confirming(key)
            # At once: whoever cleans up after us must know of it.
            self._reporter.tell()
        elif path.startswith(f"{_PAYMENT}/invoices/") and path.endswith("/accept"):
            invoice = path.removeprefix(f"{_PAYMENT}/invoices/").removesuffix("/accept")
            if not self._books.is_invoice_known(invoice):
                await self._ask("GET", f"{_PAYMENT}/invoices/{invoice}")
        return body

    async def _pass_on(self, request: web.Request, body: bytes) -> web.StreamResponse:
        if not body and request.can_read_body:
            body = await request.read()
        path, _, query = request.raw_path.partition("?")
        url = URL(self._job.url(path) + (f"?{query}" if query else ""), encoded=True)
        async with self._yagna.request(
            request.method,
            url,
            data=body or None,
            headers=_end_to_end(request.headers),
            skip_auto_headers=("Content-Type", "User-Agent", "Accept"),
            allow_redirects=False,
        ) as answer:
            if answer.content_type == "text/event-stream":
                return await self._stream(request, answer)
            said = await answer.read()
            self._take(Call(request.method, path, _json(body), answer.status, _json(said)))
            return web.Response(
                status=answer.status, body=said, headers=_end_to_end(answer.headers)
            )

    def _take(self, call: Call) -> None:
        if not self._books.take(call):
            return
        if call.method == "POST" and call.path in _BINDING:
            # Before the program hears of it, which may be the last that it does.
            self._reporter.tell()
        else:
            self._reporter.changed()

    async def _stream(
        self, request: web.Request, answer: aiohttp.ClientResponse
    ) -> web.StreamResponse:
        """A batch's events, as they come."""
        response = web.StreamResponse(status=answer.status, headers=_end_to_end(answer.headers))
        await response.prepare(request)
        batch, rest = request.path.rpartition("/")[2], b""
        try:
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
                *lines, rest = (rest + chunk)[-_BODY_LIMIT_BYTES:].split(b"\n")
                for line in lines:
                    if line.startswith(b"data:"):
                        self._books.failures.event(batch, _json(line.removeprefix(b"data:")))
            self._reporter.changed()
        except (aiohttp.ClientError, OSError):
            # It broke off in the middle: so it does for the program.
            if request.transport is not None:
                request.transport.abort()
        return response

    async def _socket(self, request: web.Request) -> web.StreamResponse:
        """A websocket: a VPN's TCP."""
        url = URL(self._job.url(request.raw_path), encoded=True)
        try:
            there = await self._yagna.ws_connect(url, max_msg_size=0, autoping=False)
        except aiohttp.WSServerHandshakeError as error:
            return _problem(error.status, "No websocket", error.message)
        here = web.WebSocketResponse(max_msg_size=0, autoping=False)
        await here.prepare(request)
        async with there:
            ways = [
                asyncio.create_task(_pump(here, there)),
                asyncio.create_task(_pump(there, here)),
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
            await here.close()
        return here

    # -- our own ----------------------------------------------------------------------------------

    async def _ask(self, method: str, path: str, body: Any = None) -> Call | None:
        """A call of our own, noted like the program's; None when yagna does not answer."""
        url = self._job.url(path)
        timeout = aiohttp.ClientTimeout(total=_ASK_S)
        try:
            async with self._yagna.request(method, url, json=body, timeout=timeout) as answer:
                call = Call(method, path, body, answer.status, _json(await answer.read()))
        except (aiohttp.ClientError, TimeoutError, OSError):
            return None
        self._books.take(call)
        return call

    async def _watch(self) -> None:
        """End agreements when the run costs what it may; see how often it fails alike."""
        told = None
        while True:
            await asyncio.sleep(_WATCH_S)
            for one in self._books.exhausted():
                self._books.warn("agreements were ended: the run has cost what it may")
                if one.agreement not in {task.get_name() for task in self._ending}:
                    task = asyncio.create_task(self._dismiss(one), name=one.agreement)
                    self._ending.add(task)
                    task.add_done_callback(self._ending.discard)
            failures = self._books.failures
            if self._job.stop_after is not None and failures.streak >= self._job.stop_after:
                self._books.stop = failures.sentence()
            if told != (told := (failures.warning(), self._books.stop)):
                self._reporter.tell()

    async def _dismiss(self, one: Rented) -> None:
        for activity in list(one.open):
            await self._ask("DELETE", f"{_ACTIVITY}/activity/{activity}")
        await self._ask("POST", f"{_MARKET}/agreements/{one.agreement}/terminate", _OVER_BUDGET)
        self._reporter.changed()

    async def _end(self) -> None:
        """The program has ended: find out what it has left."""
        if self._due:
            await asyncio.wait(set(self._due), timeout=_DUE_S)
        for one in list(self._books.rented.values()):
            if one.agreement_state == "confirming":
                await self._unsure(one.agreement)
        for allocation in self._books.idle():
            await self._ask("DELETE", f"{_PAYMENT}/allocations/{allocation}")
        left = self._books.unsettled()
        self._books.left = left or None
        self._reporter.end(None, 0, settled=not left)

    async def _unsure(self, agreement: str) -> None:
        """An agreement to which nobody knows whether the provider has agreed."""
        path = f"{_MARKET}/agreements/{agreement}"
        call = await self._ask("GET", path)
        if call is not None and call.fine and agreement in self._books.rented:
            done = await self._ask("POST", f"{path}/cancel")
            if done is not None and done.fine:
                self._books.settle_state(agreement, "Cancelled")


async def _pump(source: Any, target: Any) -> None:
    """Pass on one direction of a websocket until it is closed."""
    async for message in source:
        match message.type:
            case aiohttp.WSMsgType.TEXT:
                await target.send_str(message.data)
            case aiohttp.WSMsgType.BINARY:
                await target.send_bytes(message.data)
            case aiohttp.WSMsgType.PING:
                await target.ping(message.data)
            case aiohttp.WSMsgType.PONG:
                await target.pong(message.data)


def _end_to_end(headers: Any) -> list[tuple[str, str]]:
    """The headers that are not about one connection only."""
    return [(name, value) for name, value in headers.items() if name.lower() not in _HOP_BY_HOP]


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _problem(status: int, title: str, detail: str) -> web.Response:
    """As yagna says what is wrong, with ``message`` for its clients' sake."""
    found = {"type": "about:blank", "title": title, "status": status, "detail": detail}
    return web.json_response(
        found | {"message": detail}, status=status, content_type="application/problem+json"
    )


async def _run(listener: socket.socket, out: int) -> None:
    stdin = asyncio.StreamReader(limit=1 << 20)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin
    )
    job = Job(**json.loads(await stdin.readline()))
    books = Books(None if job.limit is None else Decimal(str(job.limit)))
    ended = asyncio.Event()

    async def listen() -> None:
        if await stdin.readline() != b"end\n":
            os._exit(1)
        ended.set()

    with os.fdopen(out, "wb", buffering=0) as lines:
        # All that it asks of a status the books have, too.
        reporter = Reporter(cast(Status, books), lines)
        reporter.on_unheard = lambda: os._exit(1)
        hearing = asyncio.create_task(listen())
        await Gateway(job, books, reporter).serve(listener, ended)
        await hearing


def main() -> int:
    # The program is of the same user, and the key in our memory is not for it.
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    out = os.dup(1)
    os.dup2(2, 1)
    logging.basicConfig(level=logging.CRITICAL)
    asyncio.run(_run(socket.socket(fileno=int(sys.argv[1])), out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
