"""A FairOS-DFS server in this process, and a mount's parts on it without a kernel, in virtual time.

Imports the development server's own handlers, so that it answers as that does, and the driver's own
client above a session that needs no network. What goes wrong is drawn for each call: it is refused,
its answer is lost before or after the work, or it takes its time. ``virtual_time`` makes hours pass
in no time: trio's clock jumps, and the ``time`` module follows it.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import httpx
import trio
import trio.testing

from cpodfs.devnet import dfs_account, dfs_files
from cpodfs.devnet import dfs_model as m
from cpodfs.devnet.dfs_content import Content
from cpodfs.devnet.dfs_routes import Call, Endpoint, Server
from cpodfs.devnet.dfs_session import Sessions
from cpodfs.devnet.dfs_store import Store, User
from cpodfs.devnet.dfs_tree import Tree
from cpodfs.devnet.faults import FaultBox, Faults
from cpodfs.dfs import Client, Timeouts, models
from cpodfs.dfs._errors import classify
from cpodfs.dfs._multipart import MultipartFile
from cpodfs.dfs.session import Stats
from cpodfs.errors import TimedOut, Unreachable
from cpodfs.sync.missing import Missing
from cpodfs.sync.swarm import SwarmWatch

T = TypeVar("T")
EPOCH_S = 1_700_000_000.0
ANSWER_S = 30.0
ENDPOINTS: dict[tuple[str, str], Endpoint] = {
    (e.method, e.path): e for e in dfs_account.ENDPOINTS + dfs_files.ENDPOINTS
}


@dataclass(slots=True)
class Fate:
    """What goes wrong with a session's calls: shares of them, and the longest latency in seconds.

    ``away``: nobody answers. Calls of the class ``reads`` (listings, stats) fail as well, unless
    they are spared. ``torn``: the connection breaks before the last byte of an upload.
    """

    dice: random.Random
    refused: float = 0.0
    broken: float = 0.0
    lost: float = 0.0
    latency_s: float = 0.0
    away: bool = False
    torn: bool = False

    def calm(self) -> None:
        self.refused = self.broken = self.lost = 0.0
        self.away = self.torn = False


@dataclass
class Simulated:
    """The server's state in a folder, and its accounts."""

    folder: Path
    server: Server = field(init=False)
    _users: int = 0

    def __post_init__(self) -> None:
        box = FaultBox(Faults(), lambda _tokens: None, lambda _empty: None)
        self.server = Server(Store(self.folder), Sessions(1e9), box, strict_open=False)
        self.server.store.db.execute("PRAGMA journal_mode = MEMORY")

    def account(self) -> User:
        self._users += 1
        return self.server.store.put_user(f"u{self._users}", f"0x{self._users}", b"", b"")

    def client(self, user: User, fate: Fate) -> Client:
        """A client with a session of its own."""
        return Client(Wire(self.server, user, fate))  # type: ignore[arg-type]

    def trees(self, user: User) -> dict[str, Tree]:
        """The account's pods by name."""
        store = self.server.store
        return {pod.name: Tree(store, pod.address) for pod in store.pods(user.name)}

    def contents(self, user: User) -> dict[str, bytes | None]:
        """All that the account's pods list, by path: bytes of files, None for directories."""
        found: dict[str, bytes | None] = {}
        for name, tree in self.trees(user).items():
            found[name] = None
            pending = ["/"]
            while pending:
                folder = pending.pop()
                dirs, files = tree.ls(folder)
                for entry in dirs:
                    path = m.join(folder, entry["name"])
                    found[name + path] = None
                    pending.append(path)
                for entry in files:
                    path = m.join(folder, entry["name"])
                    found[name + path] = self.read(tree, path)
        return found

    def read(self, tree: Tree, path: str) -> bytes:
        found = tree.need_file(path)
        return self.server.store.blob_path(found.blob).read_bytes() if found.blob else b""


class Wire:
    """The session of a client whose server is in this process: see `cpodfs.dfs.Session`."""

    def __init__(self, server: Server, user: User, fate: Fate) -> None:
        self.timeouts = Timeouts()
        self.stats = Stats()
        self.generation = 1
        self.logged_in = True
        self.clock_skew_s = 0.0
        self._server = server
        self._id = server.sessions.new(user).id
        self._fate = fate

    async def call(
        self,
        method: str,
        endpoint: str,
        *,
        params: Mapping[str, str] | None = None,
        payload: Mapping[str, str] | None = None,
        **_how: Any,
    ) -> bytes:
        route = ENDPOINTS[method, endpoint]
        given = params or payload or {}
        args = {name: given.get(name, "") for name in route.needs + route.takes}
        return await self._exchange(route, lambda: route.work(self._call(args)))

    async def parse(
        self,
        endpoint: str,
        make_parser: Callable[[str], models.Parser[T]],
        params: Mapping[str, str] | None = None,
    ) -> T:
        parser = make_parser(endpoint)
        parser.feed(await self.call("GET", endpoint, params=params))
        return parser.end()

    async def send_file(self, endpoint: str, make_body: Callable[[], MultipartFile]) -> bytes:
        body = make_body()
        head, sent = b"", bytearray()
        async for chunk in body.stream():
            if not head:
                head = chunk
            elif self._fate.torn:
                raise Unreachable("the connection was lost", endpoint=endpoint)
            else:
                sent += chunk
                await self._pause()
        fields = _fields(head)
        data = bytes(sent[: body.sent])

        async def store() -> dict[str, Any]:
            call = self._call({"podName": fields["podName"]})
            tree, where = call.tree(), self._server.store
            blob = ""
            if data:
                temp = where.temp_path()
                temp.write_bytes(data)
                blob = where.adopt(temp)
            content = Content(blob, len(data), "text/plain")
            tree.put_file(
                *(fields["dirPath"], fields["files"], content),
                block=int(fields["blockSize"]),
                compression="",
                overwrite=True,
            )
            return {"Responses": [{"fileName": "", "message": "uploaded successfully"}]}

        upload = Endpoint(
            "POST", endpoint, "file upload", lambda _call: store(), statuses=dfs_files._NOT_OPEN
        )
        return await self._exchange(upload, store)

    @contextlib.asynccontextmanager
    async def open_stream(
        self, endpoint: str, params: Mapping[str, str]
    ) -> AsyncIterator[httpx.Response]:
        data = b""

        async def fetch() -> dict[str, Any]:
            nonlocal data
            call = self._call(params)
            path = params["filePath"]
            tree = call.tree()
            found = tree.need_file(path)
            store = self._server.store
            data = store.blob_path(found.blob).read_bytes() if found.blob else b""
            return {}

        route = Endpoint(
            "GET", endpoint, "download", lambda _call: fetch(), statuses={m.FILE_NOT_FOUND: 404}
        )
        await self._exchange(route, fetch)
        yield httpx.Response(200, content=data)

    async def chunks(self, response: httpx.Response, _endpoint: str) -> AsyncGenerator[bytes, None]:
        if response.content:
            yield response.content

    # -- one exchange -----------------------------------------------------------------------------

    def _call(self, args: Mapping[str, str]) -> Call:
        return Call(None, self._server, self._id, args)  # type: ignore[arg-type]

    async def _pause(self) -> None:
        await trio.sleep(self._fate.dice.uniform(0, self._fate.latency_s))

    async def _exchange(self, route: Endpoint, work: Callable[[], Awaitable[Any]]) -> bytes:
        """Carry out a call; what its client sees of it may be something else."""
        self.stats.calls[route.path] += 1
        fate, endpoint = self._fate, route.path
        await self._pause()
        if fate.away:
            raise Unreachable("away", endpoint=endpoint, sent=False)
        draw = fate.dice.random()
        if draw < fate.refused:
            raise classify(endpoint, 400, b'{"message": "simulated: refused"}')
        draw -= fate.refused
        if 0 <= draw < fate.broken:
            raise classify(endpoint, 500, b'{"message": "simulated: broken"}')
        draw -= fate.broken
        if 0 <= draw < fate.lost / 2:
            await trio.sleep(ANSWER_S)
            raise TimedOut("no answer", endpoint=endpoint)
        lost = 0 <= draw < fate.lost
        error, body = None, b"{}"
        try:
            body = _json(await work())
        except m.Panic:
            lost = True
        except m.Refusal as refusal:
            answer = route.refuse(refusal)
            assert isinstance(answer.body, bytes)
            error = classify(endpoint, answer.status, answer.body)
        if lost:
            await trio.sleep(ANSWER_S)
            raise Unreachable("the connection was lost", endpoint=endpoint)
        await self._pause()
        if error is not None:
            raise error
        return body


def _json(payload: Any) -> bytes:
    return json.dumps(payload).encode()


def _fields(head: bytes) -> dict[str, str]:
    """The fields of a form up to its file, whose name is the field ``files``."""
    found: dict[str, str] = {}
    for part in head.decode().split("--" + head.decode().split("\r\n")[0][2:]):
        about, _, value = part.partition("\r\n\r\n")
        header = about.strip().split("\r\n")[0]
        if not header:
            continue
        named = m.disposition(header.split(":", 1)[1])
        found[named["name"]] = named.get("filename", value.removesuffix("\r\n"))
    return found


@contextlib.contextmanager
def virtual_time() -> Iterator[trio.testing.MockClock]:
    """A clock for ``trio.run`` that jumps over all waiting; ``time`` tells what it shows, and
    blocking work is done in place, as no thread knows of that clock. Which task runs first is drawn
    from ``random``: who seeds that gets the same again."""
    clock = trio.testing.MockClock(autojump_threshold=0)

    def now() -> float:
        return EPOCH_S + clock.current_time()

    def now_ns() -> int:
        return int(now() * 1e9)

    async def in_place(sync: Callable[..., Any], *args: Any, **_how: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return sync(*args)

    with (
        mock.patch("time.monotonic", clock.current_time),
        mock.patch("time.time", now),
        mock.patch("time.time_ns", now_ns),
        mock.patch.dict(Missing.__init__.__kwdefaults__, clock=clock.current_time),
        mock.patch.dict(SwarmWatch.__init__.__kwdefaults__, clock=clock.current_time),
        mock.patch("trio.to_thread.run_sync", in_place),
        mock.patch("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True),
        mock.patch("trio._core._run._r", random),
    ):
        yield clock
