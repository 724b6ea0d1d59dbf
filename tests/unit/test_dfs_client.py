"""The FairOS-DFS client against scripted replies: what is repeated, what is not, what it means."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable

import httpx
import pytest
import trio
import trio.testing

from cpodfs import errors
from cpodfs.dfs import Client, Session, Timeouts, models
from cpodfs.dfs._errors import classify
from cpodfs.dfs._multipart import MultipartFile, filename_parameter
from cpodfs.paths import is_safe_remote_name
from tests.unit.scripted_server import (
    LOGIN,
    PASSWORD,
    PODS,
    UPLOAD,
    Server,
    connected,
    message,
    on_the_wire,
    reply,
    stream_of,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend(jumping_clock: tuple[str, dict[str, object]]) -> tuple[str, dict[str, object]]:
    return jumping_clock


def body_of(*chunks: bytes) -> Callable[[], AsyncIterator[bytes]]:
    async def body() -> AsyncIterator[bytes]:
        for chunk in chunks:
            await trio.lowlevel.checkpoint()
            yield chunk

    return body


STORED = {"Responses": [{"fileName": "f", "message": "uploaded successfully"}]}


# -- logging in ------------------------------------------------------------------------------


async def test_many_tasks_make_one_login() -> None:
    server = Server()
    server.answers["/v1/pod/ls"] = lambda _r: reply(200, PODS)
    async with connected(server) as client:
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(client.pods)
        assert server.logins == 1
        assert client.session.stats.logins == 1
        assert client.session.stats.calls["/v1/pod/ls"] == 10


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (401, "jwt: invalid token"),
        (400, "ls pod: user not logged-in"),
        (500, "ls pod: user not logged-in"),
        (404, "pod open: user not logged-in"),
        (400, "unauthorized"),
    ],
)
async def test_expired_session_is_renewed_once_and_the_call_repeated(
    status: int, text: str
) -> None:
    server = Server()
    server.answers["/v1/pod/ls"] = [message(status, text), reply(200, PODS)]
    async with connected(server) as client:
        assert (await client.pods()).own == ("a",)
        assert server.logins == 2
        assert client.session.generation == 2


async def test_many_tasks_that_find_the_session_expired_make_one_login() -> None:
    server = Server()
    server.answers["/v1/pod/ls"] = lambda _r: reply(200, PODS)
    async with connected(server) as client:
        await client.pods()
        server.valid.clear()
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(client.pods)
        assert server.logins == 2


async def test_a_session_refused_after_the_new_login_is_an_error() -> None:
    server = Server()
    server.answers["/v1/pod/ls"] = lambda _r: message(400, "ls pod: user not logged-in")
    async with connected(server) as client:
        with pytest.raises(errors.NotLoggedIn):
            await client.pods()
        assert server.logins == 2
        assert server.paths().count("/v1/pod/ls") == 2


@pytest.mark.parametrize(
    ("status", "text"),
    [(400, "user login: invalid password"), (404, "user login: no user available")],
)
async def test_a_refused_login_is_final_until_reset(status: int, text: str) -> None:
    server = Server()
    server.answers[LOGIN] = lambda _r: message(status, text)
    async with connected(server) as client:
        for _ in range(3):
            with pytest.raises(errors.LoginRefused):
                await client.pods()
        assert server.paths() == [LOGIN]
        del server.answers[LOGIN]
        server.answers["/v1/pod/ls"] = [reply(200, PODS)]
        client.session.reset()
        assert (await client.pods()).shared == ("b",)


async def test_a_refusal_after_a_good_login_lasts_a_minute() -> None:
    """The server says "invalid password" also when its own network is down."""
    server = Server()
    server.answers["/v1/pod/ls"] = lambda _r: reply(200, PODS)
    async with connected(server) as client:
        await client.pods()
        server.valid.clear()
        server.answers[LOGIN] = lambda _r: message(400, "user login: invalid password")
        for _ in range(2):
            with pytest.raises(errors.LoginRefused):
                await client.pods()
        assert server.paths().count(LOGIN) == 2
        del server.answers[LOGIN]
        await trio.sleep(61)
        await client.pods()


async def test_a_cancelled_login_does_not_take_the_other_waiters_with_it() -> None:
    server = Server()
    server.answers["/v1/pod/ls"] = lambda _r: reply(200, PODS)
    stuck, first = trio.Event(), trio.CancelScope()
    handler = server.__call__

    async def slow_first_login(request: httpx.Request) -> httpx.Response:
        if request.url.path == LOGIN and not stuck.is_set():
            stuck.set()
            await trio.sleep_forever()
        return await handler(request)

    session = Session(
        "http://dfs.test",
        "ann",
        lambda: PASSWORD,
        transport=httpx.MockTransport(slow_first_login),
    )
    async with session:
        client = Client(session)

        async def doomed() -> None:
            with first:
                await client.pods()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(doomed)
            await stuck.wait()
            nursery.start_soon(client.pods)
            await trio.testing.wait_all_tasks_blocked()
            first.cancel()
    assert server.logins == 1
    assert server.paths().count("/v1/pod/ls") == 1


async def test_the_cookie_is_never_sent_back() -> None:
    server = Server()
    server.answers["/v1/pod/ls"] = lambda _r: reply(200, PODS)
    async with connected(server) as client:
        await client.pods()
        assert all("Cookie" not in request.headers for request in server.requests)


async def test_secrets_are_in_no_repr_and_no_exception() -> None:
    server = Server()
    server.answers[LOGIN] = lambda _r: message(400, f"user login: invalid password {PASSWORD}")
    async with connected(server) as client:
        with pytest.raises(errors.LoginRefused) as caught:
            await client.login()
        assert PASSWORD not in repr(client) + repr(client.session) + repr(caught.value)
    server = Server()
    server.answers["/v1/pod/ls"] = lambda _r: message(500, "cannot use token-1 here\x1b[31m")
    async with connected(server, extra_attempts=0) as client:
        with pytest.raises(errors.ServerError) as failed:
            await client.pods()
        assert "token-1" not in str(failed.value)
        assert "\x1b" not in str(failed.value)


# -- what is repeated ------------------------------------------------------------------------


async def test_a_get_is_repeated_after_lost_replies_and_server_errors() -> None:
    server = Server()
    lost = httpx.ReadError("gone")
    server.answers["/v1/pod/ls"] = [lost, message(500, "?"), reply(200, PODS)]
    async with connected(server) as client:
        await client.pods()
        assert client.session.stats.errors == {"Unreachable": 1, "ServerError": 1}
        assert client.session.stats.repeats == 2


async def test_a_get_is_repeated_only_so_often() -> None:
    server = Server()
    server.answers["/v1/pod/ls"] = lambda _r: message(502, "bad gateway")
    async with connected(server) as client:
        with pytest.raises(errors.ServerError):
            await client.pods()
        assert server.paths().count("/v1/pod/ls") == 3


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (httpx.ReadError("gone"), errors.Unreachable),
        (httpx.ReadTimeout("late"), errors.TimedOut),
        (httpx.RemoteProtocolError("no reply"), errors.Unreachable),
        (message(500, "mkdir: swarm is away"), errors.ServerError),
        (message(503, "busy"), errors.Overloaded),
    ],
)
async def test_a_mutation_is_not_repeated_once_it_may_have_been_done(
    failure: object, kind: type[errors.DfsError]
) -> None:
    server = Server()
    server.answers["/v1/dir/mkdir"] = [failure]
    async with connected(server) as client:
        with pytest.raises(kind) as caught:
            await client.mkdir("p", "/d")
        assert caught.value.sent
        assert server.paths().count("/v1/dir/mkdir") == 1


@pytest.mark.parametrize(
    "failure", [httpx.ConnectError("refused"), message(429, "slow down", **{"Retry-After": "7"})]
)
async def test_a_mutation_that_was_surely_not_done_is_repeated(
    failure: object,
) -> None:
    server = Server()
    server.answers["/v1/dir/mkdir"] = [failure, message(201, "created")]
    async with connected(server) as client:
        started = trio.current_time()
        await client.mkdir("p", "/d")
        if isinstance(failure, httpx.Response):
            assert trio.current_time() - started == pytest.approx(7)


async def test_who_is_asked_to_wait_for_long_is_told() -> None:
    server = Server()
    server.answers["/v1/pod/ls"] = [message(429, "slow down", **{"Retry-After": "600"})]
    async with connected(server) as client:
        with pytest.raises(errors.Overloaded) as caught:
            await client.pods()
        assert caught.value.retry_after_s == 300


async def test_nobody_listening_is_unreachable_and_unsent() -> None:
    server = Server()
    async with connected(server) as client:
        await client.pods()
        server.answers["/v1/dir/mkdir"] = [httpx.ConnectError("refused")] * 3
        with pytest.raises(errors.Unreachable) as caught:
            await client.mkdir("p", "/d")
        assert not caught.value.sent


async def test_a_metadata_call_has_a_deadline_for_all_of_it() -> None:
    async def trickle() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await trio.sleep(1)

    server = Server()
    server.answers["/v1/pod/ls"] = lambda _r: httpx.Response(200, content=trickle())
    async with connected(server, timeouts=Timeouts(metadata_s=10), extra_attempts=0) as client:
        started = trio.current_time()
        with pytest.raises(errors.TimedOut):
            await client.pods()
        assert trio.current_time() - started == pytest.approx(10, abs=1)


# -- pods ------------------------------------------------------------------------------------


async def test_a_pod_is_opened_once_before_the_first_calls_in_it() -> None:
    server = Server()
    server.answers["/v1/dir/ls"] = lambda _r: reply(200, {})
    async with connected(server) as client:
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(client.list_dir, "p", "/")
        assert server.paths().count("/v1/pod/open") == 1


async def test_a_closed_pod_is_reopened_once_and_the_call_repeated() -> None:
    server = Server()
    server.answers["/v1/dir/mkdir"] = [message(400, "mkdir: pod not open"), message(201, "ok")]
    async with connected(server) as client:
        await client.mkdir("p", "/d")
        assert server.paths()[1:] == [
            "/v1/pod/ls",
            "/v1/pod/open",
            "/v1/dir/mkdir",
            "/v1/pod/open",
            "/v1/dir/mkdir",
        ]
        server.answers["/v1/dir/mkdir"] = lambda _r: message(400, "mkdir: pod not open")
        with pytest.raises(errors.PodNotOpen):
            await client.mkdir("p", "/d")


async def test_a_pod_that_is_not_in_the_list_is_neither_opened_nor_closed() -> None:
    """A server that cannot read the list would store it anew, empty, when it is to open a pod."""
    server = Server()
    server.answers["/v1/pod/ls"] = lambda _r: reply(200, {"pods": [], "sharedPods": []})
    async with connected(server) as client:
        for call in (client.open_pod, client.refresh_pod):
            with pytest.raises(errors.PodNotFound):
                await call("p")
        with pytest.raises(errors.PodNotFound):
            await client.list_dir("p", "/")
    assert not {"/v1/pod/open", "/v1/pod/close", "/v1/dir/ls"} & set(server.paths())


async def test_pods_are_opened_again_after_a_new_login() -> None:
    server = Server()
    server.answers["/v1/dir/ls"] = lambda _r: reply(200, {})
    async with connected(server) as client:
        await client.list_dir("p", "/")
        server.valid.clear()
        await client.list_dir("p", "/")
        await client.list_dir("p", "/")
        assert server.paths().count("/v1/pod/open") == 2


async def test_presence_of_a_pod_does_not_trust_the_servers_present() -> None:
    server = Server()
    server.answers["/v1/pod/ls"] = lambda _r: reply(200, PODS)
    async with connected(server) as client:
        assert await client.pod_present("a")
        assert await client.pod_present("b")
        assert not await client.pod_present("c")


@pytest.mark.parametrize("path", ["d", "", "/a/", "//a", "/a/../b", "/.", "/a/index.dfs"])
async def test_paths_that_the_server_breaks_on_are_not_sent(path: str) -> None:
    server = Server()
    async with connected(server) as client:
        for call in (client.mkdir, client.stat_file, client.list_dir, client.rmdir):
            with pytest.raises(errors.NameRefused):
                await call("p", path)
        assert "/v1/dir/mkdir" not in server.paths()
        assert "/v1/dir/rmdir" not in server.paths()


async def test_the_root_is_never_removed_and_bytes_are_never_mangled() -> None:
    server = Server()
    async with connected(server) as client:
        with pytest.raises(errors.NameRefused):
            await client.rmdir("p", "/")
        with pytest.raises(errors.NameRefused):
            await client.mkdir("p", "/latin-\udce9")
        for name in ("index.dfs", "a/b", "..", "", "x\0", "\udcff"):
            with pytest.raises(errors.NameRefused):
                await client.upload("p", "/", name, body_of(), 0)
        assert not set(server.paths()) & {"/v1/dir/rmdir", "/v1/dir/mkdir", UPLOAD}


# -- meanings --------------------------------------------------------------------------------

TABLE: list[tuple[str, int, str, type[errors.DfsError]]] = [
    ("/v1/pod/open", 404, "pod open: pod does not exist", errors.PodNotFound),
    ("/v1/pod/close", 500, "pod close: could not find pod: p", errors.PodNotFound),
    ("/v1/pod/new", 400, "pod new: pod already exists", errors.AlreadyExists),
    ("/v1/pod/new", 400, "pod new: pod name too long", errors.TooLong),
    ("/v1/pod/new", 400, "pod new: max number of pods reached", errors.QuotaExceeded),
    ("/v1/pod/fork", 500, "pod fork: pod with fork name already exists", errors.AlreadyExists),
    ("/v1/pod/receive", 500, "pod receive: Not Found", errors.NotFound),
    ("/v1/pod/receive", 400, "pod receive: invalid reference:encoding/hex", errors.Refused),
    ("/v1/dir/mkdir", 500, "mkdir: directory name already present", errors.AlreadyExists),
    ("/v1/dir/mkdir", 500, "mkdir: directory not present", errors.NotFound),
    ("/v1/dir/mkdir", 500, "mkdir: too long directory name", errors.TooLong),
    ("/v1/dir/ls", 404, "ls: directory not present", errors.NotFound),
    ("/v1/dir/chmod", 400, "read only feed", errors.ReadOnlyPod),
    ("/v1/file/delete", 500, "x: operation not permitted: read only pod", errors.ReadOnlyPod),
    ("/v1/file/stat", 500, "file stat: file not found in dfs", errors.NotFound),
    ("/v1/file/delete", 404, "file delete: file does not exist", errors.NotFound),
    ("/v1/file/rename", 500, "x: file already exist with new name", errors.AlreadyExists),
    ("/v1/file/rename", 500, "file rename: file not present", errors.NotFound),
    ("/v1/file/upload", 500, "upload: block size must be between", errors.Refused),
    ("/v1/file/upload", 500, "file upload: directory not present", errors.NotFound),
    ("/v1/file/chmod", 400, "file chmod: invalid mode: strconv", errors.Refused),
    ("/v1/file/stat", 500, "file stat: Not Found", errors.ServerError),
    ("/v1/file/stat", 404, "no Route matched with those values", errors.BadReply),
    ("/v1/file/stat", 403, "forbidden", errors.Denied),
    ("/v2/user/signup", 402, "insufficient balance", errors.QuotaExceeded),
    ("/v2/user/signup", 400, "user signup: user name already present", errors.AlreadyExists),
    ("/v2/user/signup", 500, "password should be at least 12 characters", errors.Refused),
    ("/v2/user/delete", 500, "user delete: error downloading data", errors.Refused),
]


@pytest.mark.parametrize(("endpoint", "status", "text", "kind"), TABLE)
def test_each_known_reply_has_one_meaning(
    endpoint: str, status: int, text: str, kind: type[errors.DfsError]
) -> None:
    error = classify(endpoint, status, json.dumps({"message": text}).encode())
    assert type(error) is kind
    assert error.status == status
    assert error.endpoint == endpoint


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (404, errors.BadReply),
        (301, errors.BadReply),
        (400, errors.BadReply),
        (502, errors.ServerError),
        (401, errors.NotLoggedIn),
        (503, errors.Overloaded),
    ],
)
def test_a_reply_that_is_not_the_servers_never_means_not_found(
    status: int, kind: type[errors.DfsError]
) -> None:
    assert type(classify("/v1/file/stat", status, b"<html>nginx</html>")) is kind


# -- hostile JSON ----------------------------------------------------------------------------

ENTRY = {"name": "f", "size": "5", "mode": 33188, "modificationTime": "1700000000"}


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        json.dumps({"files": "x"}).encode(),
        b'{"files": [{"name": "f"}',
        b'{"files": [{"name": "f"} {"name": "g"}]}',
        b'{"files": []} []',
        b'{"files": [' + b'["' * 2**20 + b"]}",
    ],
)
async def test_a_malformed_listing_is_a_bad_reply(payload: bytes) -> None:
    server = Server()
    server.answers["/v1/dir/ls"] = lambda _r: httpx.Response(200, content=payload)
    async with connected(server) as client:
        with pytest.raises(errors.BadReply):
            await client.list_dir("p", "/")


MALFORMED = [
    {"size": "1"},
    {**ENTRY, "name": 3},
    {**ENTRY, "name": None},
    {**ENTRY, "size": "-1"},
    {**ENTRY, "size": "1e3"},
    {**ENTRY, "size": 2**63 + 1},
    {**ENTRY, "size": "9" * 19 + "9"},
    {**ENTRY, "size": "9" * 5000},
    {**ENTRY, "size": True},
    {**ENTRY, "size": 1.5},
    {**ENTRY, "mode": "rwx"},
    {**ENTRY, "mode": -1},
    {**ENTRY, "mode": "a number of 5000 digits"},
    {**ENTRY, "modificationTime": "٣"},
    "f",
    None,
    [ENTRY],
]


async def test_a_malformed_entry_costs_itself() -> None:
    good = [{**ENTRY, "name": name} for name in "ab"]
    listed = {"files": [good[0], *MALFORMED, good[1]], "dirs": [*MALFORMED, {"name": "d"}]}
    body = json.dumps(listed).replace('"a number of 5000 digits"', "9" * 5000).encode()
    server = Server()
    server.answers["/v1/dir/ls"] = lambda _r: httpx.Response(200, content=body)
    async with connected(server) as client:
        listing = await client.list_dir("p", "/")
    assert [entry.name for entry in listing] == ["a", "b", "d"]
    assert len(listing) == 3
    assert listing.malformed == 2 * len(MALFORMED)


async def test_what_is_not_utf8_costs_the_names_that_it_is_in() -> None:
    server = Server()
    server.answers["/v1/dir/ls"] = lambda _r: httpx.Response(
        200, content=b'{"files": [{"name": "\xff"}, {"name": "\\ud800"}, {"name": "f"}]}'
    )
    async with connected(server) as client:
        listing = await client.list_dir("p", "/")
    assert [entry.name for entry in listing if is_safe_remote_name(entry.name)] == ["f"]


async def test_nothing_but_malformed_entries_is_no_listing() -> None:
    server = Server()
    body = b'{"files": [' + b"0," * models.MAX_MALFORMED + b"0]}"
    server.answers["/v1/dir/ls"] = lambda _r: httpx.Response(200, content=body)
    async with connected(server) as client:
        with pytest.raises(errors.BadReply, match="malformed"):
            await client.list_dir("p", "/")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100, 10_000])
async def test_a_listing_is_the_same_however_it_is_cut_into_pieces(size: int) -> None:
    names = ["f", "ü", "\U0001f427" * 50, '"\\/', "x" * 5000, ""]
    listed = {"files": [{**ENTRY, "name": name} for name in names], "n": 12.5, "dirs": None}
    body = json.dumps(listed, ensure_ascii=False).encode() + b" \n"
    parser = models.ListingParser("/v1/dir/ls")
    for start in range(0, len(body), size):
        parser.feed(body[start : start + size])
    assert [entry.name for entry in parser.end()] == names


async def test_a_directory_that_takes_too_much_is_refused_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(models, "MAX_LISTING", 2**20)
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        yield b'{"files": ['
        while True:
            yield b"".join(b'{"name": "file%d"},' % n for n in range(1000))
            sent += 1000

    server = Server()
    server.answers["/v1/dir/ls"] = lambda _r: httpx.Response(200, content=endless())
    async with connected(server) as client:
        with pytest.raises(
            errors.BadReply, match=r"too large: its first [\d,]+ entries take 1 MiB"
        ):
            await client.list_dir("p", "/")
    assert 10_000 < sent < 100_000


async def test_more_pods_than_a_user_can_have_are_refused_at_once() -> None:
    async def endless() -> AsyncIterator[bytes]:
        yield b'{"pods": ["first"'
        number = 0
        while True:
            number += 1000
            yield b"".join(b',"pod%d"' % n for n in range(number - 1000, number))

    server = Server()
    server.answers["/v1/pod/ls"] = lambda _r: httpx.Response(200, content=endless())
    async with connected(server) as client:
        with pytest.raises(errors.BadReply, match="more than 65,535 pods"):
            await client.pods()


async def test_a_malformed_pod_costs_itself() -> None:
    server = Server()
    server.answers["/v1/pod/ls"] = lambda _r: reply(200, {"pods": ["a", 1, None, {}, "b"]})
    async with connected(server) as client:
        pods = await client.pods()
    assert pods.own == ("a", "b")
    assert pods.malformed == 3


async def test_others_get_in_between_while_a_long_listing_is_parsed() -> None:
    """Between any two of their turns, no more than one piece was parsed."""
    server = Server()
    body = json.dumps({"files": [{**ENTRY, "name": f"f{n}"} for n in range(20_000)]}).encode()
    server.answers["/v1/dir/ls"] = lambda _r: httpx.Response(200, content=body)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with connected(server) as client, trio.open_nursery() as nursery:
        await client.open_pod("p")
        nursery.start_soon(other)
        await client.list_dir("p", "/")
        nursery.cancel_scope.cancel()
    assert turns > len(body) // 8192


async def test_a_listing_is_read_as_the_server_writes_it() -> None:
    server = Server()
    dirs = [{"name": "d", "contentType": "inode/directory", "mode": 16832}]
    files = [ENTRY, {**ENTRY, "name": "../x\0", "size": 7}, {**ENTRY, "size": "6", "new": {}}]
    server.answers["/v1/dir/ls"] = lambda _r: reply(200, {"dirs": dirs, "files": files})
    async with connected(server) as client:
        listed = list(await client.list_dir("p", "/"))
    assert [(e.name, e.is_dir, e.size, e.mode) for e in listed] == [
        ("f", False, 5, 0o644),
        ("../x\0", False, 7, 0o644),
        ("f", False, 6, 0o644),
        ("d", True, 0, 0o700),
    ]
    assert listed[0].mtime_s == 1_700_000_000


async def test_a_reply_without_end_is_cut_off() -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b" " * 2**20

    server = Server()
    server.answers["/v1/pod/ls"] = lambda _r: httpx.Response(200, content=endless())
    async with connected(server) as client:
        with pytest.raises(errors.BadReply):
            await client.pods()


async def test_redirects_are_not_followed() -> None:
    server = Server()
    server.answers["/v1/pod/ls"] = lambda _r: reply(302, {}, Location="http://evil.test/")
    async with connected(server) as client:
        with pytest.raises(errors.BadReply):
            await client.pods()
        assert {request.url.host for request in server.requests} == {"dfs.test"}


async def test_the_clock_skew_comes_from_the_date_header() -> None:
    server = Server()
    server.answers["/v1/pod/ls"] = lambda _r: reply(200, PODS, Date="Thu, 01 Jan 2015 00:00:00 GMT")
    async with connected(server) as client:
        assert client.session.clock_skew_s is None
        await client.pods()
        assert client.session.clock_skew_s is not None
        assert client.session.clock_skew_s < -300_000_000


# -- uploads ---------------------------------------------------------------------------------


async def test_an_upload_is_exact_multipart() -> None:
    server = Server()
    server.answers[UPLOAD] = lambda _r: reply(200, STORED)
    progress: list[int] = []
    async with connected(server) as client:
        await client.upload(
            "p", "/d", 'q"\\é', body_of(b"abc", b"", b"de"), 5, on_progress=progress.append
        )
        assert client.session.stats.bytes_up == 5
    request = server.requests[-1]
    assert int(request.headers["Content-Length"]) == len(request.content)
    assert "Transfer-Encoding" not in request.headers
    boundary = request.headers["Content-Type"].split("boundary=")[1].encode()
    parts = request.content.split(b"--" + boundary)
    assert parts[0] == b""
    assert parts[-1] == b"--\r\n"
    assert b'name="podName"\r\n\r\np\r\n' in parts[1]
    assert b'name="dirPath"\r\n\r\n/d\r\n' in parts[2]
    assert 'filename="q\\"\\\\é"'.encode() in parts[-2]
    assert parts[-2].endswith(b"\r\n\r\nabcde\r\n")
    assert progress == [3, 3, 5]


def test_a_name_with_control_characters_takes_the_extended_form() -> None:
    assert filename_parameter("a\nb'") == "filename*=UTF-8''a%0Ab%27"
    assert filename_parameter("50% é") == 'filename="50% é"'


async def test_the_body_is_made_anew_after_a_new_login() -> None:
    server = Server()
    server.answers[UPLOAD] = [message(500, "user not logged-in"), reply(200, STORED)]
    async with connected(server) as client:
        await client.upload("p", "/", "f", body_of(b"abc"), 3)
    uploads = [request for request in server.requests if request.url.path == UPLOAD]
    assert len(uploads) == 2
    assert all(b"\r\n\r\nabc\r\n" in request.content for request in uploads)


class Unreadable(OSError):
    pass


class ReadingTransport(httpx.AsyncBaseTransport):
    """Takes a request's body piece by piece, as a connection does."""

    def __init__(self) -> None:
        self.uploaded = bytearray()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        assert isinstance(request.stream, httpx.AsyncByteStream)
        async for chunk in request.stream:
            if request.url.path == UPLOAD:
                self.uploaded.extend(chunk)
        if request.url.path == "/v1/pod/ls":
            return on_the_wire(reply(200, {"pods": ["p"]}))
        return on_the_wire(reply(200, {"address": "0x1", "accessToken": "t"}))


@pytest.mark.parametrize(
    ("chunks", "size", "kind"),
    [
        ((b"abc", Unreadable("disk")), 9, Unreadable),
        ((b"abc",), 9, errors.ChangedDuringUpload),
        ((b"abc", b"def"), 4, errors.ChangedDuringUpload),
        ((b"abc", httpx.ReadError("the source's own")), 9, httpx.ReadError),
    ],
)
async def test_a_failing_body_ends_before_the_last_boundary(
    chunks: tuple[bytes | Exception, ...], size: int, kind: type[Exception]
) -> None:
    transport = ReadingTransport()

    async def body() -> AsyncIterator[bytes]:
        for chunk in chunks:
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk

    session = Session("http://dfs.test", "ann", lambda: PASSWORD, transport=transport)
    async with session:
        with pytest.raises(kind):
            await Client(session).upload("p", "/", "f", body, size)
    assert transport.uploaded.endswith(b"abc")
    assert session.stats.calls[UPLOAD] == 1


async def test_an_upload_that_the_server_did_not_store_is_an_error() -> None:
    server = Server()
    refused = {"Responses": [{"fileName": "f", "message": "unexpected EOF"}]}
    server.answers[UPLOAD] = [reply(200, refused), reply(200, {"Responses": None})]
    async with connected(server) as client:
        with pytest.raises(errors.ServerError, match="unexpected EOF"):
            await client.upload("p", "/", "f", body_of(b"x"), 1)
        with pytest.raises(errors.BadReply):
            await client.upload("p", "/", "f", body_of(b"x"), 1)


async def test_a_lost_upload_is_not_repeated() -> None:
    server = Server()
    server.answers[UPLOAD] = [httpx.ReadError("gone")]
    async with connected(server) as client:
        with pytest.raises(errors.Unreachable):
            await client.upload("p", "/", "f", body_of(b"x"), 1)
        assert server.paths().count(UPLOAD) == 1


async def test_a_large_body_is_never_held_in_one_piece() -> None:
    chunk = b"x" * 65536
    largest = 0

    async def body() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield chunk

    multipart = MultipartFile({"podName": "p"}, "f", body, 64 * len(chunk))
    total = 0
    async for piece in multipart.stream():
        largest = max(largest, len(piece))
        total += len(piece)
    assert total == multipart.content_length
    assert largest == len(chunk)
    assert multipart.complete


# -- downloads -------------------------------------------------------------------------------

DOWNLOAD = "/v1/file/download"


async def test_a_download_streams_and_knows_its_size() -> None:
    server = Server()
    server.answers[DOWNLOAD] = lambda _r: httpx.Response(200, content=b"hello")
    async with connected(server) as client:
        async with client.download("p", "/f") as download:
            assert download.size == 5
            assert b"".join([chunk async for chunk in download]) == b"hello"
        assert client.session.stats.bytes_down == 5
        async with client.download("p", "/f"):
            pass  # leaving early is fine


async def drained(client: Client) -> None:
    async with client.download("p", "/f") as download:
        async for _ in download:
            pass


@pytest.mark.parametrize(
    ("length", "chunks", "kind"),
    [
        ("9", (b"hello",), errors.BadReply),
        ("3", (b"hello",), errors.BadReply),
        ("9", (b"hello", httpx.RemoteProtocolError("incomplete")), errors.Unreachable),
        ("9", (b"hello", httpx.ReadTimeout("idle")), errors.TimedOut),
        ("nine", (b"hello",), errors.BadReply),
        ("-5", (b"hello",), errors.BadReply),
    ],
)
async def test_a_download_is_whole_or_an_error(
    length: str, chunks: tuple[bytes | Exception, ...], kind: type[Exception]
) -> None:
    server = Server()
    server.answers[DOWNLOAD] = lambda _r: httpx.Response(
        200, content=stream_of(*chunks), headers={"Content-Length": length}
    )
    async with connected(server) as client:
        with pytest.raises(kind):
            await drained(client)


async def test_a_download_of_nothing_and_one_that_is_missing() -> None:
    server = Server()
    server.answers[DOWNLOAD] = [
        httpx.Response(200, content=b"", headers={"Content-Length": "0"}),
        message(404, "download: file not found in dfs"),
        message(401, "jwt: invalid token"),
        httpx.ReadError("gone"),
        httpx.Response(200, content=b"x"),
    ]
    async with connected(server) as client:
        async with client.download("p", "/f") as download:
            assert [chunk async for chunk in download] == []
        with pytest.raises(errors.NotFound):
            async with client.download("p", "/f"):
                pytest.fail("a missing file was opened")
        async with client.download("p", "/f") as download:
            assert [chunk async for chunk in download] == [b"x"]


# -- configuration ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    ["localhost:9090", "ftp://h/", "http://", "http://u:p@h/", "http://h/?q=1", "http://h\0/"],
)
def test_an_unusable_address_is_a_configuration_error(url: str) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        Session(url, "ann", lambda: PASSWORD)
    assert "u:p" not in str(caught.value)
