"""Users, logins, pods, sharing: the same on our development server and on a real one."""

from __future__ import annotations

import secrets

import httpx
import pytest
import trio

from cpodfs import errors
from cpodfs.dfs import Client, Session
from cpodfs.dfs._login import Token

from .conftest import Connect, Login, devnet_server
from .helpers import names, read, write

pytestmark = pytest.mark.anyio


async def test_signup_login_logout(connect: Connect) -> None:
    client = await connect()
    user = client.session.user
    assert await client.user_present(user)
    assert not await client.user_present(user + "x")
    assert (await client.pods()).own == ()
    await client.logout()
    assert (await client.pods()).own == ()
    assert client.session.stats.logins == 2


async def test_signup_is_refused_for_a_taken_name_and_a_short_password(connect: Connect) -> None:
    client = await connect()
    with pytest.raises(errors.AlreadyExists):
        await client.signup(client.session.user, "long enough a password")
    with pytest.raises(errors.Refused):
        await client.signup("u" + secrets.token_hex(6), "short")


async def test_signup_makes_a_mnemonic(connect: Connect) -> None:
    client = await connect()
    account = await client.signup("u" + secrets.token_hex(6), "long enough a password")
    assert account.address.startswith("0x")
    assert len(account.mnemonic.split()) == 12
    assert account.mnemonic not in repr(account)


async def test_wrong_password_and_unknown_user(connect: Connect) -> None:
    user = (await connect()).session.user
    for login in (Login(user, "not the right one"), Login(user + "x", "not the right one")):
        with pytest.raises(errors.LoginRefused):
            await (await connect(login)).pods()


async def test_a_session_ended_elsewhere_is_renewed(client: Client, dfs_url: str) -> None:
    """The token is good, but the server no longer knows its session."""
    await write(client, "/f", b"before")
    token = (await client.session._login.token()).text
    async with httpx.AsyncClient(base_url=dfs_url) as other:
        reply = await other.post("/v1/user/logout", headers={"Authorization": f"Bearer {token}"})
        assert reply.status_code == 200
    await write(client, "/g", b"after")
    assert await names(client) == ["f", "g"]
    assert client.session.stats.logins == 2


async def test_a_bad_token_is_renewed_even_in_the_middle_of_a_large_upload(
    client: Client,
) -> None:
    await client.login()
    client.session._login._token = Token("aa.bb.cc")
    await write(client, "/big", b"x" * 8_000_000)
    assert (await client.stat_file("pod", "/big")).size == 8_000_000


async def test_delete_user(connect: Connect) -> None:
    login = Login("u" + secrets.token_hex(6), "long enough a password")
    await (await connect()).signup(login.user, login.password)
    client = await connect(login)
    with pytest.raises(errors.DfsError):
        await client.delete_user("not the right one")
    await client.delete_user(login.password)
    assert not client.session.logged_in


async def test_the_life_of_a_pod(client: Client) -> None:
    assert (await client.pods()).own == ("pod",)
    with pytest.raises(errors.AlreadyExists):
        await client.create_pod("pod")
    await client.close_pod("pod")
    await client.close_pod("pod")
    await client.open_pod("pod")
    await client.sync_pod("pod")
    assert (await client.pod_stat("pod")).name == "pod"
    assert await client.pod_present("pod")
    await client.delete_pod("pod")
    assert (await client.pods()).own == ()
    assert not await client.pod_present("pod")


async def test_calls_in_a_closed_pod_open_it(client: Client) -> None:
    await write(client, "/f", b"x")
    for _ in range(2):
        await client.close_pod("pod")
        assert await names(client) == ["f"]


async def test_a_pod_that_is_not_there(client: Client) -> None:
    for call in (client.open_pod, client.delete_pod, client.pod_stat, client.share_pod):
        with pytest.raises(errors.NotFound):
            await call("nope")
    for in_pod in (client.list_dir, client.mkdir, client.stat_file, client.delete_file):
        with pytest.raises(errors.NotFound):
            await in_pod("nope", "/x")


async def test_pod_names(client: Client) -> None:
    accepted = ["x" * 64, "é" * 32, "a b", "dots.and-dashes", "Ünïcode ☃"]
    for name in accepted:
        await client.create_pod(name)
        await client.mkdir(name, "/d")
    assert sorted((await client.pods()).own) == sorted([*accepted, "pod"])
    for name in ("x" * 65, "é" * 33):
        with pytest.raises(errors.TooLong):
            await client.create_pod(name)
    with pytest.raises(errors.Refused):
        await client.create_pod("")


async def test_a_deleted_pods_content_does_not_come_back(client: Client) -> None:
    await client.mkdir("pod", "/d")
    await write(client, "/d/f", b"old")
    await client.delete_pod("pod")
    await client.create_pod("pod")
    assert await names(client) == []


async def test_share_and_receive(connect: Connect, client: Client) -> None:
    await client.mkdir("pod", "/d")
    await write(client, "/d/f", b"shared")
    reference = await client.share_pod("pod")
    reader = await connect()
    info = await reader.receive_info(reference)
    assert info.pod == "pod"
    assert info.password not in repr(info)
    await reader.receive_pod(reference)
    assert (await reader.pods()).shared == ("pod",)
    assert await read(reader, "/d/f") == b"shared"
    with pytest.raises(errors.AlreadyExists):
        await reader.receive_pod(reference)


async def test_a_received_pod_is_read_only(connect: Connect, client: Client) -> None:
    await client.mkdir("pod", "/d")
    await write(client, "/f", b"shared")
    reader = await connect()
    await reader.receive_pod(await client.share_pod("pod"))
    with pytest.raises(errors.ReadOnlyPod):
        await write(reader, "/g", b"x")
    with pytest.raises(errors.ReadOnlyPod):
        await reader.delete_file("pod", "/f")
    with pytest.raises(errors.ReadOnlyPod):
        await reader.mkdir("pod", "/e")
    with pytest.raises(errors.ReadOnlyPod):
        await reader.chmod_file("pod", "/f", 0o644)
    await reader.refresh_pod("pod")
    assert await names(reader) == ["d/", "f"]


async def test_a_receiver_sees_changes_after_a_refresh(connect: Connect, client: Client) -> None:
    await write(client, "/one", b"1")
    reader = await connect()
    await reader.receive_pod(await client.share_pod("pod"))
    assert await names(reader) == ["one"]
    await write(client, "/two", b"2")
    await reader.refresh_pod("pod")
    assert await names(reader) == ["one", "two"]


async def test_forgetting_a_received_pod_leaves_the_owners(
    connect: Connect, client: Client
) -> None:
    await write(client, "/f", b"kept")
    reader = await connect()
    await reader.receive_pod(await client.share_pod("pod"))
    await reader.delete_pod("pod")
    assert (await reader.pods()).shared == ()
    assert await read(client, "/f") == b"kept"


async def test_references_that_lead_nowhere(client: Client) -> None:
    with pytest.raises(errors.Refused):
        await client.receive_info("zz")
    with pytest.raises(errors.NotFound):
        await client.receive_info("ab" * 32)
    with pytest.raises(errors.NotFound):
        await client.receive_pod("ab" * 32)


async def test_forks(connect: Connect, client: Client) -> None:
    await client.mkdir("pod", "/d")
    await write(client, "/d/f", b"copied")
    await client.chmod_file("pod", "/d/f", 0o644)
    await client.fork_pod("pod", "mine")
    assert await read(client, "/d/f", "mine") == b"copied"
    assert (await client.stat_file("mine", "/d/f")).mode == 0o600
    with pytest.raises(errors.AlreadyExists):
        await client.fork_pod("pod", "mine")
    other = await connect()
    await other.fork_from_reference("theirs", await client.share_pod("pod"))
    assert await read(other, "/d/f", "theirs") == b"copied"
    await write(other, "/d/f", b"changed", "theirs")
    assert await read(client, "/d/f") == b"copied"


async def test_share_and_receive_a_file(connect: Connect, client: Client) -> None:
    await write(client, "/f", b"for you")
    other = await connect()
    await other.create_pod("inbox")
    await other.mkdir("inbox", "/in")
    reference = await client.share_file("pod", "/f", other.session.user)
    assert await other.receive_file("inbox", "/in", reference) == "/in/f"
    assert await read(other, "/in/f", "inbox") == b"for you"
    with pytest.raises(errors.AlreadyExists):
        await other.receive_file("inbox", "/in", reference)
    with pytest.raises(errors.NotFound):
        await client.share_file("pod", "/nope", other.session.user)


async def test_many_tasks_at_once_make_one_login_and_one_opening(
    connect: Connect, client: Client
) -> None:
    await client.logout()
    calls = client.session.stats.calls
    before = calls["/v2/user/login"], calls["/v1/pod/open"]
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(client.list_dir, "pod", "/")
    assert calls["/v2/user/login"] - before[0] == 1
    assert calls["/v1/pod/open"] - before[1] == 1


async def test_the_clock_of_the_server_is_known(client: Client) -> None:
    assert client.session.clock_skew_s is not None
    assert abs(client.session.clock_skew_s) < 5


async def test_a_restarted_server_is_not_the_callers_business(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Only the development server keeps its state over a restart."""
    state = tmp_path_factory.mktemp("dfs")
    with devnet_server(state) as url:
        session = Session(url, "ann", lambda: "long enough a password")
        async with session:
            client = Client(session)
            await client.signup("ann", "long enough a password")
            await client.create_pod("pod")
            await write(client, "/f", b"kept")
    async with Session(url, "ann", lambda: "long enough a password") as session:
        client = Client(session)
        with pytest.raises(errors.Unreachable) as caught:
            await client.list_dir("pod", "/")
        assert not caught.value.sent
        with devnet_server(state, port=int(url.rpartition(":")[2])):
            assert await read(client, "/f") == b"kept"
        with devnet_server(state, port=int(url.rpartition(":")[2])):
            await write(client, "/f", b"changed")
            assert await read(client, "/f") == b"changed"
        assert session.stats.logins == 2
