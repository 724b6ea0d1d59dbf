"""A server played by a script, for tests of the DFS client without a network."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import trio

from cpodfs.dfs import Client, Session

PASSWORD = "correct horse battery"
LOGIN = "/v2/user/login"
UPLOAD = "/v1/file/upload"
PODS = {"pods": ["a"], "sharedPods": ["b"]}


def reply(status: int, payload: object = None, **headers: str) -> httpx.Response:
    return httpx.Response(status, json=payload if payload is not None else {}, headers=headers)


def stream_of(*chunks: bytes | Exception) -> AsyncIterator[bytes]:
    async def stream() -> AsyncIterator[bytes]:
        for chunk in chunks:
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk

    return stream()


def on_the_wire(response: httpx.Response) -> httpx.Response:
    """The reply as a network would bring it: to be read from a stream, once."""
    if not hasattr(response, "_content"):
        return response
    content = stream_of(response.content)
    return httpx.Response(response.status_code, headers=response.headers, content=content)


def message(status: int, text: str, **headers: str) -> httpx.Response:
    return reply(status, {"message": text}, **headers)


class Server:
    """Plays a server: ``answers[path]`` is called for a request, or is a list used up in order."""

    def __init__(self) -> None:
        self.answers: dict[str, object] = {
            "/v1/pod/ls": lambda _r: reply(200, {"pods": ["p"], "sharedPods": []}),
            "/v1/pod/open": lambda _r: message(200, "opened"),
        }
        self.requests: list[httpx.Request] = []
        self.valid: set[str] = set()
        self.logins = 0

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        await trio.lowlevel.checkpoint()
        if request.url.path == UPLOAD:
            await request.aread()
        self.requests.append(request)
        return on_the_wire(self._reply(request))

    def _reply(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == LOGIN and LOGIN not in self.answers:
            return self._log_in(request)
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not request.url.path.startswith("/v2/") and token not in self.valid:
            return message(401, "jwt: invalid token")
        return self._answer(request)

    def _log_in(self, request: httpx.Request) -> httpx.Response:
        assert json.loads(request.content)["password"] == PASSWORD
        self.logins += 1
        token = f"token-{self.logins}"
        self.valid.add(token)
        headers = {"Set-Cookie": "fairOS-dfs=secret-cookie; Path=/"}
        return httpx.Response(200, json={"address": "0x1", "accessToken": token}, headers=headers)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        answer = self.answers[request.url.path]
        if isinstance(answer, list):
            answer = answer.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, httpx.Response):
            return answer
        assert callable(answer)
        result = answer(request)
        assert isinstance(result, httpx.Response)
        return result

    def paths(self) -> list[str]:
        return [request.url.path for request in self.requests]


@asynccontextmanager
async def connected(server: Server, **options: object) -> AsyncIterator[Client]:
    session = Session(
        "http://dfs.test",
        "ann",
        lambda: PASSWORD,
        transport=httpx.MockTransport(server),
        **options,  # type: ignore[arg-type]
    )
    async with session:
        yield Client(session)
