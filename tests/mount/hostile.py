"""A server that answers what it likes: a proxy before a server, whose answers a test can replace.

Threads, sockets and nothing of ours. ``answer(endpoint, lie)`` has one function answer the requests to
one endpoint from now on; all others get the server's own answer, and so does a lie that asks for it::

    hostile.answer("GET /v1/dir/ls", lambda request, truth: Answer(b'{"files": "none"}'))
    hostile.answer("GET /v1/file/stat", lambda request, truth: replace(truth(), status=401))

A lie runs in a thread of its own for each connection and may wait as long as it likes.
"""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cpodfs.devnet import launch
from tests.mount.harness import Server
from tests.patience import PATIENCE_S

NOT_FORWARDED = {"host", "connection", "content-length", "transfer-encoding"}
"""Headers that belong to one connection; whoever sends writes its own."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request as it came. ``at_s``: when, by the monotonic clock; ``query`` decoded."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    target: str
    at_s: float

    @property
    def endpoint(self) -> str:
        return f"{self.method} {self.path}"


@dataclass(frozen=True, slots=True)
class Answer:
    """``body`` as pieces is sent chunked, each as it comes, without a length."""

    body: bytes | Iterable[bytes] = b"{}"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})


Lie = Callable[[Request, Callable[[], Answer]], Answer | None]
"""Gets the request, and a function that asks the server. None: the connection ends unanswered."""


class Hostile(Server):
    """Another server's, with some of its answers replaced. ``requests``: all that came, in order."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._lies: dict[str, Lie] = {}
        self.requests: list[Request] = []
        self._listener = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._listener.daemon_threads = True
        threading.Thread(target=self._listener.serve_forever, daemon=True).start()

    @property
    def net(self) -> launch.Devnet:
        return self._server.net

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.server_address[1]}"

    def answer(self, endpoint: str, lie: Lie) -> None:
        """``endpoint``: method and path, as in ``GET /v1/dir/ls``."""
        self._lies[endpoint] = lie

    def be_honest(self, endpoint: str | None = None) -> None:
        """Pass on the server's own answers again, of one endpoint or of all."""
        if endpoint is None:
            self._lies = {}
        else:
            self._lies.pop(endpoint, None)

    def asked(self, endpoint: str) -> list[Request]:
        return [request for request in list(self.requests) if request.endpoint == endpoint]

    def stop(self) -> None:
        self._listener.shutdown()
        self._listener.server_close()

    def _truth(self, request: Request) -> Answer:
        address = urllib.parse.urlsplit(self._server.url)
        line = http.client.HTTPConnection(address.hostname or "", address.port, timeout=PATIENCE_S)
        with contextlib.closing(line):
            sent = {k: v for k, v in request.headers.items() if k.lower() not in NOT_FORWARDED}
            body = request.body if request.body or request.method != "GET" else None
            line.request(request.method, request.target, body, sent)
            got = line.getresponse()
            kept = {k: v for k, v in got.getheaders() if k.lower() not in NOT_FORWARDED}
            return Answer(got.read(), got.status, kept)

    def _reply(self, request: Request) -> Answer | None:
        self.requests.append(request)
        lie = self._lies.get(request.endpoint)
        if lie is None:
            return self._truth(request)
        return lie(request, lambda: self._truth(request))

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        reply = self._reply

        class Handler(_Handler):
            def reply(self, request: Request) -> Answer | None:
                return reply(request)

        return Handler


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def reply(self, request: Request) -> Answer | None:
        raise NotImplementedError

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError):  # the driver left early, or died
            super().handle_one_request()
            return
        self.close_connection = True

    def _serve(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        answer = self.reply(
            Request(
                self.command,
                url.path,
                dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True)),
                dict(self.headers.items()),
                self._read_body(),
                self.path,
                time.monotonic(),
            )
        )
        if answer is None:
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if isinstance(answer.body, bytes):
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            self.wfile.write(answer.body)
            return
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for piece in answer.body:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")

    do_GET = do_POST = do_DELETE = _serve

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = bytearray()
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return bytes(body)

    def log_message(self, format: str, *args: Any) -> None:
        return


def entry(name: str, size: int = 1000, *, is_dir: bool = False) -> str:
    """One entry of a listing as the server writes it, in JSON; the name must need no escaping."""
    kind = "inode/directory" if is_dir else "text/plain"
    mode = 0o040700 if is_dir else 0o100600
    return (
        f'{{"name":"{name}","contentType":"{kind}","size":"{size}","mode":{mode},'
        '"creationTime":"1700000000","modificationTime":"1700000000","accessTime":"1700000000"}'
    )


def listing(files: int) -> bytes:
    """A listing of so many files, named f0, f1, …"""
    return ('{"files":[' + ",".join(entry(f"f{n}") for n in range(files)) + "]}").encode()
