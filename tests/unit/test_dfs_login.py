"""Logins, time limits and the server's wish to be left alone: how seldom it is called in vain."""

from __future__ import annotations

from collections.abc import AsyncIterator
from email.utils import formatdate

import httpx
import pytest
import trio
import trio.testing

from cpodfs import errors
from cpodfs.dfs import Client, Session, Timeouts
from tests.unit.scripted_server import (
    LOGIN,
    PASSWORD,
    PODS,
    UPLOAD,
    Server,
    connected,
    message,
    reply,
)

pytestmark = pytest.mark.anyio
LS = "/v1/pod/ls"
SAME_TOKEN = {"address": "0x1", "accessToken": "always-the-same"}


@pytest.fixture
def anyio_backend(jumping_clock: tuple[str, dict[str, object]]) -> tuple[str, dict[str, object]]:
    return jumping_clock


async def calls_for(client: Client, seconds: float, *, tasks: int = 31) -> list[errors.DfsError]:
    """Many tasks that each ask for the pods four times a second; the errors they got."""
    got: list[errors.DfsError] = []

    async def ask() -> None:
        while True:
            try:
                await client.pods()
            except errors.DfsError as error:
                got.append(error)
            await trio.sleep(0.25)

    with trio.move_on_after(seconds):
        async with trio.open_nursery() as nursery:
            for _ in range(tasks):
                nursery.start_soon(ask)
    return got


# -- one login, and a pause that grows ------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (lambda _r: message(500, "user login: swarm is away"), errors.LoginFailed),
        (lambda _r: message(403, "forbidden"), errors.LoginFailed),
        (lambda _r: message(401, "who are you?"), errors.LoginFailed),
        (lambda _r: message(429, "slow down"), errors.LoginFailed),
        (lambda _r: httpx.Response(200, content=b"<html>"), errors.LoginFailed),
        (lambda _r: reply(200, {"address": "0x1"}), errors.LoginFailed),
        (lambda _r: message(400, "user login: invalid password"), errors.LoginRefused),
    ],
)
async def test_logins_that_fail_are_few_however_many_ask(
    answer: object, kind: type[errors.DfsError]
) -> None:
    server = Server()
    server.answers[LS] = lambda _r: reply(200, PODS)
    async with connected(server) as client:
        await client.pods()
        server.valid.clear()
        server.answers[LOGIN] = answer
        before = server.paths().count(LOGIN)
        got = await calls_for(client, 20)
        assert server.paths().count(LOGIN) - before <= 8
        assert {type(error) for error in got} == {kind}
        assert not any(error.sent for error in got)
        assert "the next login is due in" in str(got[-1])
        del server.answers[LOGIN]
        await trio.sleep(120)
        await client.pods()


async def test_a_session_that_is_worth_nothing_is_no_reason_to_log_in_for_ever() -> None:
    """The server answers 401 to everything, and each login with the same token."""
    server = Server()
    server.answers[LOGIN] = lambda _r: reply(200, SAME_TOKEN)
    async with connected(server) as client:
        with pytest.raises(errors.NotLoggedIn, match="refuses the session that it has just given"):
            await client.pods()
        assert server.paths() == [LOGIN, LS, LOGIN, LS]
        got = await calls_for(client, 60)
        assert server.paths().count(LOGIN) <= 10
        assert {error.errno for error in got} == {errors.NotLoggedIn.errno}
        server.valid.add("always-the-same")
        server.answers[LS] = lambda _r: reply(200, PODS)
        await trio.sleep(61)
        await client.pods()
        server.valid.clear()
        with pytest.raises(errors.NotLoggedIn):
            await client.pods()
        server.valid.add("always-the-same")
        assert (await client.pods()).own == ("a",), "it was good for a time: no long pause"


async def test_sessions_that_last_for_one_call_are_not_renewed_without_end() -> None:
    server = Server()

    def once(request: httpx.Request) -> httpx.Response:
        server.valid.clear()
        return reply(200, PODS)

    server.answers[LS] = once
    async with connected(server) as client:
        with trio.move_on_after(60):
            while True:
                await client.pods()
        first = server.logins
        with trio.move_on_after(60):
            while True:
                await client.pods()
        assert server.logins - first <= 61


async def test_one_helper_gives_the_password_at_a_time() -> None:
    asked = 0

    def password() -> str:
        nonlocal asked
        asked += 1
        return PASSWORD

    server = Server()
    server.answers[LS] = lambda _r: reply(200, PODS)
    async with Session(
        "http://dfs.test", "ann", password, transport=httpx.MockTransport(server)
    ) as session:
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(Client(session).pods)
    assert asked == 1


# -- one time limit -------------------------------------------------------------------------------


async def silent(_request: httpx.Request) -> httpx.Response:
    await trio.sleep_forever()
    raise AssertionError


async def took(act: object) -> float:
    started = trio.current_time()
    with pytest.raises(errors.TimedOut) as caught:
        await act()  # type: ignore[operator]
    assert "no answer within" in str(caught.value)
    return trio.current_time() - started


@pytest.mark.parametrize("mute", [LOGIN, LS])
async def test_the_limit_spans_the_login_and_all_repeats(mute: str) -> None:
    server = Server()
    server.answers[LS] = lambda _r: reply(200, PODS)

    async def handler(request: httpx.Request) -> httpx.Response:
        if request.url.path == mute:
            return await silent(request)
        return await server(request)

    session = Session(
        "http://dfs.test",
        "ann",
        lambda: PASSWORD,
        transport=httpx.MockTransport(handler),
        timeouts=Timeouts(metadata_s=10),
    )
    async with session:
        assert await took(Client(session).pods) == pytest.approx(10)


async def test_who_waits_for_the_login_of_others_keeps_his_own_limit() -> None:
    session = Session(
        "http://dfs.test",
        "ann",
        lambda: PASSWORD,
        transport=httpx.MockTransport(silent),
        timeouts=Timeouts(metadata_s=10),
    )
    waits: list[float] = []

    async def late(after_s: float) -> None:
        await trio.sleep(after_s)
        waits.append(await took(Client(session).pods))

    async with session, trio.open_nursery() as nursery:
        for after_s in (0.0, 3.0, 6.0, 9.0):
            nursery.start_soon(late, after_s)
    assert waits == pytest.approx([10.0] * 4)
    assert session.stats.calls[LOGIN] <= 4


async def test_errors_that_are_slow_to_come_share_one_limit() -> None:
    async def slow(request: httpx.Request) -> httpx.Response:
        if request.url.path != LOGIN:
            await trio.sleep(4)
        return await server(request)

    server = Server()
    server.answers[LS] = lambda _r: message(500, "swarm is away")
    session = Session(
        "http://dfs.test",
        "ann",
        lambda: PASSWORD,
        transport=httpx.MockTransport(slow),
        timeouts=Timeouts(metadata_s=10),
    )
    async with session:
        assert await took(Client(session).pods) == pytest.approx(10)


async def test_a_call_that_never_left_counts_as_not_sent() -> None:
    session = Session(
        "http://dfs.test",
        "ann",
        lambda: PASSWORD,
        transport=httpx.MockTransport(silent),
    )
    async with session:
        with pytest.raises(errors.TimedOut) as caught:
            await session.call("POST", "/v1/dir/mkdir", payload={})
        assert not caught.value.sent


# -- a server that wants to be left alone ---------------------------------------------------------


def date(unix_s: float) -> str:
    return formatdate(unix_s, usegmt=True)


NOW = 1_700_000_000.0
DATED = {"Retry-After": date(NOW + 7), "Date": date(NOW)}


@pytest.mark.parametrize("status", [429, 500, 502, 503])
@pytest.mark.parametrize("headers", [{"Retry-After": "7"}, DATED], ids=["seconds", "date"])
async def test_nobody_calls_before_the_time(status: int, headers: dict[str, str]) -> None:
    server = Server()
    server.answers[LS] = [message(status, "slow down", **headers), reply(200, PODS)]
    server.answers["/v1/pod/stat"] = lambda _r: reply(200, {"podName": "p"})
    async with connected(server) as client:
        await client.login()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.pods)
            await trio.testing.wait_all_tasks_blocked()
            asked, started = len(server.requests), trio.current_time()
            await client.pod_stat("p")
            assert trio.current_time() - started == pytest.approx(7)
        assert len(server.requests) == asked + 2


async def test_a_pause_beyond_the_limit_is_an_error_at_once_and_costs_no_call() -> None:
    server = Server()
    server.answers[LS] = [message(503, "later", **{"Retry-After": "20"}), reply(200, PODS)]
    server.answers["/v1/dir/mkdir"] = [message(201, "made")]
    async with connected(server, timeouts=Timeouts(metadata_s=10)) as client:
        started = trio.current_time()
        for _ in range(3):
            with pytest.raises(errors.Overloaded) as caught:
                await client.pods()
        assert trio.current_time() - started < 5
        assert caught.value.retry_after_s == pytest.approx(20, abs=5)
        assert not caught.value.sent
        assert server.paths().count(LS) == 1
        await trio.sleep(20)
        await client.pods()


@pytest.mark.parametrize(
    ("asked", "pause_s"),
    [
        ("999999999999", 300),
        (date(NOW + 86_400), 300),
        (date(NOW - 60), 0),
        ("-5", None),
        ("soon", None),
        ("٣", None),
        ("Thu, 99 Foo 2015 99:99:99 GMT", None),
        ("", None),
    ],
)
async def test_the_pause_is_bounded_and_nonsense_is_none(asked: str, pause_s: float | None) -> None:
    server = Server()
    headers = {"Retry-After": asked.encode(), "Date": date(NOW).encode()}
    server.answers[UPLOAD] = [httpx.Response(503, json={"message": "later"}, headers=headers)]

    async def body() -> AsyncIterator[bytes]:
        yield b"x"

    async with connected(server) as client:
        with pytest.raises(errors.Overloaded) as caught:
            await client.upload("p", "/", "f", body, 1)
        assert caught.value.retry_after_s == pause_s
