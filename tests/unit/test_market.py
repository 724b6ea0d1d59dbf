"""The local market, by plain REST: negotiation, activities, confinement, payments, clearing up."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import aiohttp
import pytest
from market_tools import (
    APP_KEY,
    GO,
    INIT,
    ONE,
    PLATFORM,
    Requestor,
    Served,
    events_of,
    processes_with,
    run,
    served,
    shell,
)

from cpodfs.devnet.batch import MAX_BEHIND, Batch, Reader
from cpodfs.devnet.container import Container, Isolation
from cpodfs.devnet.gftp import Registry
from cpodfs.devnet.ledger import ledger_table, open_points
from cpodfs.devnet.misbehave import Misbehaviour
from cpodfs.devnet.pace import Pace
from cpodfs.devnet.provider import ProviderSpec
from tests.patience import PATIENCE_S

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


SANDBOX_OR_NOT = [
    pytest.param(True, id="sandbox", marks=pytest.mark.sandbox),
    pytest.param(False, id="plain"),
]


@pytest.fixture
async def market(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path, providers=ONE) as found:
        yield found


@pytest.fixture(params=SANDBOX_OR_NOT)
async def either(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path, providers=ONE, sandbox=request.param) as found:
        yield found


# --- access and errors ---


async def test_needs_the_key_but_for_the_registry(market: Served) -> None:
    async with aiohttp.ClientSession() as stranger:
        async with stranger.get(f"{market.url}/me") as response:
            assert response.status == 401
        async with stranger.get(f"{market.url}/registry/v1/image/info?tag=a/b:c") as response:
            info = await response.json()
        async with stranger.head(info["http"]) as response:
            assert response.status == 200
    me = await market.call("GET", "/me")
    assert len(me["identity"]) == 42


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/nowhere", None, 404),
        ("GET", "/registry/v1/image/info", None, 400),
        ("POST", "/market-api/v1/demands", {"properties": {}}, 400),
        ("POST", "/market-api/v1/demands", [], 400),
        ("GET", "/market-api/v1/demands/x/events", None, 404),
        ("GET", "/market-api/v1/agreements/x", None, 400),
        ("GET", f"/market-api/v1/agreements/{32 * '0'}", None, 404),
        ("GET", "/market-api/v1/agreementEvents?maxEvents=101", None, 400),
        ("POST", "/market-api/v1/agreements", {"proposalId": "x", "validTo": "y"}, 404),
        ("GET", "/market-api/v1/agreementEvents?timeout=soon", None, 400),
        ("GET", "/payment-api/v1/invoiceEvents?afterTimestamp=monday", None, 400),
        ("GET", "/activity-api/v1/activity/x/state", None, 500),
        ("DELETE", "/activity-api/v1/activity/x", None, 500),
        ("POST", "/activity-api/v1/activity", {"agreementId": "x"}, 404),
        ("POST", "/payment-api/v1/allocations", {"totalAmount": "-1"}, 400),
        ("POST", "/payment-api/v1/allocations", {"totalAmount": "NaN"}, 400),
        ("GET", "/payment-api/v1/invoices/x", None, 404),
        ("GET", "/net-api/v1/net/x", None, 404),
    ],
)
async def test_bad_requests(
    market: Served, method: str, path: str, body: object, status: int
) -> None:
    answer = await market.call(method, path, body, status)
    assert answer["message"] or status == 404


async def test_a_wrong_key_is_told_in_plain_text(market: Served) -> None:
    for headers, said in (({}, "Missing"), ({"Authorization": "Bearer x"}, "Invalid")):
        async with aiohttp.ClientSession(headers=headers) as stranger:
            async with stranger.get(f"{market.url}/me") as response:
                assert (response.status, response.content_type) == (401, "text/plain")
                assert await response.text() == f"{said} application key"


# --- negotiation ---


async def test_only_what_fits_is_offered(tmp_path: Path) -> None:
    specs = (ProviderSpec("small", mem_gib=1.0), ProviderSpec("big", mem_gib=64.0))
    async with served(tmp_path, providers=specs) as market:
        requestor = Requestor(market)
        demand = await requestor.demand("(golem.inf.mem.gib>=16)")
        [event] = await requestor.events(demand)
        assert event["eventType"] == "ProposalEvent"
        proposal = event["proposal"]
        assert proposal["state"] == "Initial"
        assert proposal["properties"]["golem.node.id.name"] == "big"
        said = await requestor.counter(demand, proposal["proposalId"])
        [draft] = await requestor.events(demand)
        assert draft["proposal"]["state"] == "Draft"
        assert draft["proposal"]["prevProposalId"] == said
        await requestor.counter(demand, draft["proposal"]["proposalId"], "(golem.inf.mem.gib>99)")
        [refusal] = await requestor.events(demand)
        assert refusal["eventType"] == "ProposalRejectedEvent"


async def test_a_demand_without_expiration_fits_nobody(market: Served) -> None:
    body = {"properties": {}, "constraints": ""}
    demand = await market.call("POST", "/market-api/v1/demands", body, 201)
    assert await Requestor(market).events(demand, timeout_s=0) == []


async def test_poll_is_woken_by_unsubscribing(market: Served) -> None:
    requestor = Requestor(market)
    demand = await requestor.demand("(golem.runtime.name=wasm)")
    path = f"/market-api/v1/demands/{demand}"
    poll = asyncio.create_task(market.call("GET", f"{path}/events?timeout=30", status=404))
    await asyncio.sleep(0)
    await market.call("DELETE", path, status=204)
    await asyncio.wait_for(poll, 5)


async def test_broken_constraints_are_taken_and_match_nothing(market: Served) -> None:
    requestor = Requestor(market)
    assert await requestor.events(await requestor.demand("(a"), timeout_s=0) == []


async def test_no_provider_signs_for_less_than_five_minutes(tmp_path: Path) -> None:
    async with served(tmp_path, providers=ONE) as market:
        requestor = Requestor(market)
        demand = await requestor.demand(life_s=200)
        [offer] = await requestor.events(demand)
        await requestor.counter(demand, offer["proposal"]["proposalId"], life_s=200)
        [refusal] = await requestor.events(demand)
        assert refusal["eventType"] == "ProposalRejectedEvent"


async def test_events_of_agreements_are_told_by_session(market: Served) -> None:
    requestor = Requestor(market)
    agreement = await requestor.agree()
    path = "/market-api/v1/agreementEvents?timeout=0"
    [event] = await market.call("GET", path)
    assert event["agreementId"] == agreement
    assert await market.call("GET", f"{path}&appSessionId=another") == []


async def test_a_provider_serves_one_agreement_at_a_time(market: Served) -> None:
    first, second = Requestor(market), Requestor(market)
    demands = [await first.demand(), await second.demand()]
    drafts = []
    for demand in demands:
        [offer] = await first.events(demand)
        await first.counter(demand, offer["proposal"]["proposalId"])
        [draft] = await first.events(demand)
        drafts.append(draft["proposal"]["proposalId"])
    taken = await first.propose(demands[0], drafts[0])
    await first.confirm(taken)
    late = await second.propose(demands[1], drafts[1])
    await second.confirm(late, status=410)
    # Asked again, the provider answers as soon as it is free; and it offers anew.
    await second.counter(demands[1], drafts[1])
    assert await second.events(demands[1], timeout_s=0) == []
    await first.terminate(taken)
    again, offer = await second.events(demands[1])
    assert (again["proposal"]["state"], offer["proposal"]["state"]) == ("Draft", "Initial")
    await second.confirm(await second.propose(demands[1], again["proposal"]["proposalId"]))
    await first.terminate(taken, status=410)


async def test_no_offers_and_rejected_proposals(tmp_path: Path) -> None:
    async with served(tmp_path / "a", misbehave=Misbehaviour(no_offers=True)) as market:
        requestor = Requestor(market)
        assert await requestor.events(await requestor.demand(), timeout_s=0) == []
    nasty = Misbehaviour(reject_proposals=1.0)
    async with served(tmp_path / "b", providers=ONE, misbehave=nasty) as market:
        requestor = Requestor(market)
        demand = await requestor.demand()
        [offer] = await requestor.events(demand)
        await requestor.counter(demand, offer["proposal"]["proposalId"])
        [refusal] = await requestor.events(demand)
        assert "injected" in refusal["reason"]["message"]


# --- activities ---


async def test_commands_and_captured_output(either: Served) -> None:
    requestor = Requestor(either)
    activity = await requestor.ready()
    bin_tail = {"atEnd": {"tail": 3, "format": "bin"}}
    commands = [
        shell("echo out; echo err >&2"),
        shell("printf 0123456789", stdout={"atEnd": {"headTail": 4}}),
        shell("printf 0123456789", stdout=bin_tail),
        shell("head -c 9000000 /dev/zero; printf end", stdout={"atEnd": {"tail": 3}}),
        shell("pwd; echo $HOME; echo x > /golem/output/y; cat ../output/y"),
        shell("exit 7"),
        shell("echo never"),
    ]
    found = await requestor.results(activity, commands)
    assert [one["index"] for one in found] == [0, 1, 2, 3, 4, 5]
    assert (found[0]["stdout"], found[0]["stderr"]) == ("out\n", "err\n")
    assert found[1]["stdout"] == "0189"
    assert found[2]["stdout"] == [0x37, 0x38, 0x39]
    assert found[3]["stdout"] == "end"
    work, home, written = found[4]["stdout"].split()
    assert work.endswith("/golem/work")
    assert (home, written) == (work, "x")
    assert (found[5]["result"], found[5]["message"]) == (
        "Error",
        "ExeScript command exited with code 7",
    )
    assert found[5]["isBatchFinished"] is True


async def test_order_of_states(market: Served) -> None:
    requestor = Requestor(market)
    activity = await requestor.activity(await requestor.agree())
    path = f"/activity-api/v1/activity/{activity}"
    [early] = await requestor.results(activity, [shell("true")])
    assert early["message"].endswith("Activity is initialized - deploy() command is expected now")
    await requestor.results(activity, INIT)
    assert (await market.call("GET", f"{path}/state"))["state"] == ["Ready", None]
    for wrong in ({"dance": {}}, {"run": {}}, {"transfer": {"from": "gftp://x"}}):
        await market.call("POST", f"{path}/exec", {"text": json.dumps([wrong])}, 400)
    [end] = await requestor.results(activity, [{"terminate": {}}])
    assert end["result"] == "Ok"
    assert (await market.call("GET", f"{path}/state"))["state"] == ["Initialized", None]
    await market.call("DELETE", path)
    assert (await market.call("GET", f"{path}/state"))["state"] == ["Terminated", None]
    await market.call("POST", f"{path}/exec", {"text": json.dumps(INIT)}, 500)


async def test_a_second_batch_finds_the_activity_busy(market: Served) -> None:
    requestor = Requestor(market)
    activity = await requestor.ready()
    batch = await requestor.exec(activity, [shell(f"until [ -e {GO} ]; do sleep 0.02; done")])
    async with asyncio.timeout(PATIENCE_S):
        while (await requestor.state(activity))["state"] != ["Ready", "Ready"]:
            await asyncio.sleep(0.02)
    [busy] = await requestor.results(activity, [shell("true")])
    assert "Busy" in busy["message"]
    market.let_go(activity)
    [result] = await market.call("GET", f"{_batch(activity, batch)}?timeout=20")
    assert result["result"] == "Ok"


def _batch(activity: str, batch: str) -> str:
    return f"/activity-api/v1/activity/{activity}/exec/{batch}"


async def test_usage_counts_processor_time(market: Served) -> None:
    requestor = Requestor(market)
    activity = await requestor.ready()
    await requestor.results(activity, [run("/usr/bin/python3", "-c", "sum(range(10**7))")])
    usage = await market.call("GET", f"/activity-api/v1/activity/{activity}/usage")
    cpu_s, duration_s = usage["currentUsage"]
    assert 0.02 < cpu_s < duration_s + 1


async def test_the_event_stream_is_live(either: Served) -> None:
    requestor = Requestor(either)
    activity = await requestor.ready()
    # The program waits for a file that is only sent once its first line was seen.
    wait = f"until [ -e {GO} ]; do echo more; sleep 0.02; done"
    kinds = await requestor.stream(activity, [shell(f"{wait}; echo zwölf >&2; exit 3")], "stdout")
    assert [next(iter(kind)) for kind in kinds] == ["started", "stdout"]
    assert kinds[1] == {"stdout": "more\n"}
    either.let_go(activity)


async def test_the_event_stream_has_no_memory_and_no_end(market: Served) -> None:
    requestor = Requestor(market)
    activity = await requestor.ready()
    batch = await requestor.exec(activity, [shell("echo one")])
    [result] = await market.call("GET", f"{_batch(activity, batch)}?timeout=20")
    assert result["stdout"] == "one\n"
    last = {"Last-Event-Id": "0"}
    async with requestor.open_stream(activity, batch, **last) as response:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(response.content.readany(), 0.5)
        await market.call("DELETE", f"/activity-api/v1/activity/{activity}")
        assert await asyncio.wait_for(response.content.readany(), PATIENCE_S) == b":ping\n"


async def test_each_piece_of_output_is_decoded_by_itself(market: Served) -> None:
    requestor = Requestor(market)
    activity = await requestor.ready()
    cut = shell("printf '\\303'; sleep 0.3; printf '\\244\\n'")
    kinds = await requestor.stream(activity, [cut])
    said = "".join(kind.get("stdout", "") for kind in kinds)
    assert said == "\ufffd\ufffd\n"
    results = await requestor.results(activity, [cut, shell("printf '\\303x'"), _mute("echo")])
    # The result has all bytes: as text if they are, or else one character for each.
    assert [one["stdout"] for one in results] == ["ä\n", "\xc3x", None]


def _mute(command: str) -> dict:
    """A command that says nothing of its output: none is kept."""
    return {"run": {"entry_point": "/bin/sh", "args": ["-c", command]}}


async def test_a_reader_that_is_behind_is_cut_off() -> None:
    batch, reader = Batch([("run", {})]), Reader(0)
    batch.readers.add(reader)
    for number in range(MAX_BEHIND):
        batch.emit(0, {"stdout": str(number)})
    assert not reader.lagged
    batch.emit(0, {"stdout": "one too many"})
    assert reader.lagged
    assert len(await reader.arrived(0)) == MAX_BEHIND
    assert await reader.arrived(0) == []
    # What is still on its way is not behind.
    far = Reader(60)
    batch.readers.add(far)
    for number in range(2 * MAX_BEHIND):
        batch.emit(0, {"stdout": str(number)})
    assert not far.lagged


async def test_results_wait_for_the_last_command_and_no_other(market: Served) -> None:
    requestor = Requestor(market)
    activity = await requestor.ready()
    loop = asyncio.get_running_loop()
    batch = await requestor.exec(activity, [shell("echo a"), shell("sleep 0.5; echo b")])
    path = _batch(activity, batch)
    assert len(await market.call("GET", f"{path}?timeout=20")) == 2
    failing = await requestor.exec(activity, [shell("exit 1"), shell("echo never")])
    begun = loop.time()
    found = await market.call("GET", f"{_batch(activity, failing)}?timeout=1.5")
    assert [one["isBatchFinished"] for one in found] == [True]
    # It failed before the last one: yagna waits for that all the same.
    assert loop.time() - begun >= 1.5


async def test_latency_is_paid_each_way(tmp_path: Path) -> None:
    slow = Pace(provider_latency_s=0.2, offer_delay_s=0)
    async with served(tmp_path, providers=ONE, pace=slow) as market:
        requestor = Requestor(market)
        activity = await requestor.ready()
        loop = asyncio.get_running_loop()
        begun = loop.time()
        batch = await requestor.exec(activity, [shell("echo lost; sleep 2; echo seen")])
        assert loop.time() - begun >= 0.4
        async with requestor.open_stream(activity, batch) as response:
            kinds = []
            async for event in events_of(response):
                kinds.append(event["kind"])
                if "finished" in event["kind"]:
                    break
        said = "".join(kind.get("stdout", "") for kind in kinds)
        assert said == "seen\n"
        [result] = await market.call("GET", f"{_batch(activity, batch)}?timeout=20")
        assert result["stdout"] == "lost\nseen\n"
        begun = loop.time()
        await market.call("DELETE", f"/activity-api/v1/activity/{activity}")
        assert loop.time() - begun >= 0.4


async def test_large_output_does_not_stop_anybody(market: Served) -> None:
    requestor = Requestor(market)
    activity = await requestor.ready()
    [big] = await requestor.results(activity, [shell("head -c 9000000 /dev/zero | tr '\\0' a")])
    assert big["stdout"] == "a" * 9_000_000


def test_a_command_does_not_die_of_the_process_between(tmp_path: Path) -> None:
    """bwrap's --die-with-parent kills some, where --pidns makes it fork twice."""
    container = Container(tmp_path, Isolation("bwrap"), "x")
    container.handles = (3, 4)
    words = container.command(["true"])
    assert "--pidns" in words
    assert "--die-with-parent" not in words


async def test_ending_an_activity_kills_its_processes(either: Served) -> None:
    requestor = Requestor(either)
    activity = await requestor.ready()
    mark = "98701.25"
    # Two generations, one in the background.
    await requestor.printed(
        activity, [shell(f"sleep {mark} & sh -c 'sleep {mark}; true' & echo up; wait")]
    )
    [folder] = either.market_dir.glob("providers/solo/*")
    assert processes_with(mark)
    await either.call("DELETE", f"/activity-api/v1/activity/{activity}")
    assert processes_with(mark) == []
    assert not folder.exists()
    answer = await either.call("GET", _batch(activity, "any"), status=500)
    assert "endpoint address not found" in answer["message"]


async def test_lost_activity_and_failed_command(tmp_path: Path) -> None:
    for name, nasty in (
        ("fail", Misbehaviour(fail_command=1.0)),
        ("lose", Misbehaviour(lose_activity=1.0)),
    ):
        async with served(tmp_path / name, providers=ONE, misbehave=nasty) as market:
            requestor = Requestor(market)
            activity = await requestor.ready()
            if name == "fail":
                [result] = await requestor.results(activity, [shell("echo fine")])
                assert result["result"] == "Error"
            else:
                batch = await requestor.exec(activity, [shell("echo fine")])
                await market.call("GET", f"{_batch(activity, batch)}?timeout=20", status=500)
            state = await market.call("GET", f"/activity-api/v1/activity/{activity}/state")
            assert state["state"] == ["Terminated" if name == "lose" else "Ready", None]


async def test_chances_repeat_with_the_seed(tmp_path: Path) -> None:
    async def outcomes(folder: Path, seed: int) -> list[str]:
        nasty = Misbehaviour(fail_command=0.5)
        async with served(folder, providers=ONE, misbehave=nasty, seed=seed) as market:
            requestor = Requestor(market)
            activity = await requestor.ready()
            return [
                (await requestor.results(activity, [run("/bin/true")]))[0]["result"]
                for _ in range(12)
            ]

    first = await outcomes(tmp_path / "a", 1)
    assert set(first) == {"Ok", "Error"}
    assert await outcomes(tmp_path / "b", 1) == first
    assert await outcomes(tmp_path / "c", 2) != first


# --- transfers and confinement ---


async def test_transfers_follow_no_link_and_leave_no_folder(either: Served, tmp_path: Path) -> None:
    requestor = Requestor(either)
    activity = await requestor.ready()
    secret = tmp_path / "secret"
    secret.write_text("host only")
    registry = Registry(tmp_path / "gftp")
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(700_000))
    published, slot = registry.add(source, "publish"), registry.add(target, "receive")
    there = {"transfer": {"from": published, "to": "container:/golem/work/deep/er/x"}}
    back = {"transfer": {"from": "container:/golem/work/deep/er/x", "to": slot}}
    assert len(await requestor.results(activity, [there, back])) == 2
    assert target.read_bytes() == source.read_bytes()

    links = (
        f"ln -s {secret} /golem/work/file; ln -s {tmp_path} /golem/work/dir; mkfifo /golem/work/p"
    )
    [linked] = await requestor.results(activity, [shell(links)])
    assert linked["result"] == "Ok"
    refused = [
        *("/golem/work/file", "/golem/work/dir/secret", "/golem/../secret", "/etc/passwd"),
        *("golem/work/x", "/golem", "/golem/work", "/golem/work/p", "/golem/work/none", ""),
    ]
    for path in refused:
        out = {"transfer": {"from": f"container:{path}", "to": slot}}
        [result] = await requestor.results(activity, [out])
        assert result["result"] == "Error", path
    assert target.read_bytes() == source.read_bytes()
    wrong = [
        {"transfer": {"from": published, "to": "container:/golem/work/dir/new"}},
        {"transfer": {"from": str(secret), "to": "container:/golem/work/s"}},
        {"transfer": {"from": f"file://{secret}", "to": "container:/golem/work/s"}},
        {"transfer": {"from": "http://192.0.2.1/x", "to": "container:/golem/work/s"}},
        {"transfer": {"from": slot, "to": "container:/golem/work/s"}},
        {"transfer": {"from": "container:/golem/work/deep/er/x", "to": published}},
        {"transfer": {"from": published, "to": slot}},
    ]
    for command in wrong:
        [result] = await requestor.results(activity, [command])
        assert result["result"] == "Error", command
    assert not (tmp_path / "new").exists()
    # A link in the way of a transfer is replaced, not followed.
    over = {"transfer": {"from": published, "to": "container:/golem/work/file"}}
    assert (await requestor.results(activity, [over]))[0]["result"] == "Ok"
    assert secret.read_text() == "host only"
    registry.close()


async def test_http_transfers_from_loopback(market: Served) -> None:
    requestor = Requestor(market)
    activity = await requestor.ready()
    info = f"{market.url}/registry/v1/image/info?hash=abc"
    get = {"transfer": {"from": info, "to": "container:/golem/work/info"}}
    found = await requestor.results(activity, [get, run("/bin/cat", "/golem/work/info")])
    assert json.loads(found[1]["stdout"])["sha3"] == "abc"


@pytest.mark.sandbox
async def test_a_sandbox_confines(tmp_path: Path) -> None:
    async with served(tmp_path, providers=ONE) as market:
        requestor = Requestor(market)
        activity = await requestor.ready()
        for denied in (
            "echo x > /usr/x",
            "echo x > /golem/../x",
            f"cat {market.market_dir}/ledger.sqlite",
            f"ls {tmp_path}/gftp",
            "cat /etc/shadow",
            f"exec 3<>/dev/tcp/127.0.0.1/{market.url.rpartition(':')[2]}",
        ):
            [result] = await requestor.results(activity, [run("/bin/bash", "-c", denied)])
            assert result["result"] == "Error", denied
        env = await requestor.results(activity, [run("/usr/bin/env")])
        assert APP_KEY not in env[0]["stdout"]
        kept = [shell("echo kept > /tmp/x"), shell("cat /tmp/x; hostname")]
        assert (await requestor.results(activity, kept))[1]["stdout"] == "kept\nsolo\n"


async def test_speed_and_bandwidth_stretch_time(tmp_path: Path) -> None:
    slow = (ProviderSpec("slow", speed=0.25, bandwidth=1_000_000),)
    async with served(tmp_path, providers=slow) as market:
        requestor = Requestor(market)
        activity = await requestor.ready()
        loop = asyncio.get_running_loop()
        begun = loop.time()
        await requestor.results(activity, [run("/bin/sleep", "0.1")])
        assert loop.time() - begun > 0.4
        source = tmp_path / "source"
        source.write_bytes(bytes(600_000))
        registry = Registry(tmp_path / "gftp")
        url = registry.add(source, "publish")
        begun = loop.time()
        await requestor.results(
            activity, [{"transfer": {"from": url, "to": "container:/golem/work/x"}}]
        )
        assert loop.time() - begun > 0.55
        registry.close()


# --- payments ---


ALLOCATIONS = "/payment-api/v1/allocations"


async def test_accounts_are_known_once_something_was_set_aside(market: Served) -> None:
    path = "/payment-api/v1/requestorAccounts"
    assert await market.call("GET", path) == []
    found = await Requestor(market).allocate()
    [account] = await market.call("GET", path)
    assert (account["platform"], account["address"]) == (PLATFORM, found["address"])


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({"totalAmount": "1001", "paymentPlatform": PLATFORM}, "insufficient-account-funds"),
        ({"totalAmount": "1", "paymentPlatform": "erc20-holesky-tglm"}, "insufficient-account"),
        ({"totalAmount": "1", "paymentPlatform": "erc20-mars-tglm"}, "bad-payment-platform"),
        ({"totalAmount": "1", "timeout": "2020-01-01T00:00:00Z"}, "timeout-passed"),
    ],
)
async def test_what_is_refused_to_be_set_aside(market: Served, body: dict, kind: str) -> None:
    async with market.http.post(market.url + ALLOCATIONS, json=body) as response:
        assert (response.status, response.content_type) == (400, "application/problem+json")
        found = await response.json(content_type=None)
    assert found["detail"]
    assert kind in found.get("instance", found["type"])


async def test_money_set_aside_is_released_once_or_in_time(market: Served) -> None:
    requestor = Requestor(market)
    path = f"{ALLOCATIONS}/{(await requestor.allocate('990'))['allocationId']}"
    await market.call("POST", ALLOCATIONS, {"totalAmount": "11"}, 400)
    await market.call("DELETE", path)
    await market.call("DELETE", path, status=410)
    await market.call("GET", path, status=404)
    soon = datetime.now(UTC) + timedelta(seconds=0.7)
    body = {"totalAmount": "990", "timeout": soon.isoformat()}
    found = await market.call("POST", ALLOCATIONS, body, 201)
    async with asyncio.timeout(PATIENCE_S):
        while await market.call("GET", ALLOCATIONS):
            await asyncio.sleep(0.05)
    await market.call("DELETE", f"{ALLOCATIONS}/{found['allocationId']}", status=410)


async def test_what_a_demand_must_say_to_be_paid_for(market: Served) -> None:
    key = (await Requestor(market).allocate())["allocationId"]
    path = "/payment-api/v1/demandDecorations?allocationIds="
    found = await market.call("GET", path + key)
    assert {"key": "golem.com.payment.protocol.version", "value": "3"} in found["properties"]
    assert found["constraints"] == [
        f"(golem.com.payment.platform.{PLATFORM}.address=*)",
        "(golem.com.payment.protocol.version>1)",
    ]
    await market.call("GET", f"{path}{key},none", status=404)
    requestor = Requestor(market)
    assert await requestor.events(await requestor.demand(f"(&{''.join(found['constraints'])})"))


async def test_invoice_is_accepted_once_and_paid_by_the_next_cycle(tmp_path: Path) -> None:
    pace = Pace(offer_delay_s=0, payment_cycle_s=0.5)
    async with served(tmp_path, providers=ONE, pace=pace) as market:
        requestor = Requestor(market)
        await requestor.allocate("1")
        agreement = await requestor.agree()
        activity = await requestor.activity(agreement)
        await requestor.results(activity, [*INIT, run("/bin/true")])
        poll = asyncio.create_task(market.call("GET", "/payment-api/v1/invoiceEvents?timeout=20"))
        await requestor.terminate(agreement)
        [event] = await asyncio.wait_for(poll, 5)
        path = f"/payment-api/v1/invoices/{event['invoiceId']}"
        invoice = await market.call("GET", path)
        assert invoice["agreementId"] == agreement
        assert invoice["activityIds"] == [activity]
        assert (invoice["payerAddr"], invoice["status"]) == ("0xpayer", "RECEIVED")
        amount = invoice["amount"]
        assert Decimal(amount) > 0
        accept = {"totalAmountAccepted": amount, "allocationId": requestor.allocation}
        await market.call("POST", f"{path}/accept", {**accept, "totalAmountAccepted": "9"}, 400)
        await market.call("POST", f"{path}/accept", accept)
        assert (await market.call("GET", path))["status"] == "ACCEPTED"
        await market.call("POST", f"{path}/accept", accept)
        assert await market.call("GET", "/payment-api/v1/payments") == []
        [payment] = await market.call("GET", "/payment-api/v1/payments?timeout=20")
        assert payment["amount"] == amount
        assert (await market.call("GET", path))["status"] == "SETTLED"
        left = await market.call("GET", f"{ALLOCATIONS}/{requestor.allocation}")
        assert left["spentAmount"] == amount
        assert Decimal(left["remainingAmount"]) == 1 - Decimal(amount)
        [row] = market.ledger()
        assert (row.state, row.reason) == ("Terminated", "enough")
        assert (row.cost, row.invoiced, row.paid) == (amount, amount, amount)
        assert open_points(market.market_dir) == []


async def test_an_allocation_cannot_be_overdrawn(market: Served) -> None:
    requestor = Requestor(market)
    await requestor.allocate("0.0000000001")
    agreement = await requestor.agree()
    await requestor.results(await requestor.activity(agreement), [*INIT, run("/bin/true")])
    await requestor.terminate(agreement)
    [invoice] = await market.call("GET", "/payment-api/v1/invoices")
    body = {"totalAmountAccepted": invoice["amount"], "allocationId": requestor.allocation}
    path = f"/payment-api/v1/invoices/{invoice['invoiceId']}/accept"
    answer = await market.call("POST", path, body, 400)
    assert "Not enough funds" in answer["message"]
    await market.call("DELETE", f"{ALLOCATIONS}/{requestor.allocation}")
    answer = await market.call("POST", path, body, 400)
    assert "not found" in answer["message"]
    assert market.ledger()[0].paid == "0"


async def test_debit_notes_come_by_the_interval(tmp_path: Path) -> None:
    eager = (ProviderSpec("eager", debit_note_interval_s=0.1),)
    async with served(tmp_path, providers=eager) as market:
        requestor = Requestor(market)
        await requestor.allocate()
        await requestor.ready()
        after, totals = "1970-01-01T00:00:00Z", []
        while len(totals) < 3:
            path = f"/payment-api/v1/debitNoteEvents?afterTimestamp={after}&timeout=20"
            for event in await market.call("GET", path):
                after = event["eventDate"].replace("+", "%2B")
                note = await market.call(
                    "GET", f"/payment-api/v1/debitNotes/{event['debitNoteId']}"
                )
                totals.append(Decimal(note["totalAmountDue"]))
                assert len(note["usageCounterVector"]) == 2
        assert totals == sorted(totals)
        accept = {"totalAmountAccepted": str(totals[-1]), "allocationId": requestor.allocation}
        path = f"/payment-api/v1/debitNotes/{note['debitNoteId']}"
        await market.call("POST", f"{path}/accept", accept)
        assert (await market.call("GET", path))["status"] == "ACCEPTED"
        # It is spent at once, and only once: the invoice takes the rest.
        money = f"{ALLOCATIONS}/{requestor.allocation}"
        assert Decimal((await market.call("GET", money))["spentAmount"]) == totals[-1]
        await requestor.terminate(note["agreementId"])
        [invoice] = await market.call("GET", "/payment-api/v1/invoices")
        accept = {"totalAmountAccepted": invoice["amount"], "allocationId": requestor.allocation}
        path = f"/payment-api/v1/invoices/{invoice['invoiceId']}/accept"
        await market.call("POST", path, accept)
        assert (await market.call("GET", money))["spentAmount"] == invoice["amount"]
        assert open_points(market.market_dir) == []


# --- clearing up ---


EAGER = (ProviderSpec("eager", debit_note_interval_s=0.2),)


async def test_a_provider_breaks_off_when_its_debit_notes_are_not_accepted(tmp_path: Path) -> None:
    pace = Pace(offer_delay_s=0, accept_timeout_s=2)
    async with served(tmp_path, providers=EAGER, pace=pace) as market:
        requestor = Requestor(market)
        activity = await requestor.ready()
        await requestor.exec(activity, [run("/bin/sleep", "98702.5")])
        event = await requestor.agreement_event("AgreementTerminatedEvent")
        assert event["terminator"] == "Provider"
        assert "DebitNote" in event["reason"]["message"]
        assert processes_with("98702.5") == []
        [row] = market.ledger()
        assert (row.state, row.invoiced != "-", row.paid) == ("Terminated", True, "0")
        # Its provider is free for others.
        assert await requestor.agree()


async def test_a_provider_goes_on_while_its_debit_notes_are_accepted(tmp_path: Path) -> None:
    pace = Pace(offer_delay_s=0, accept_timeout_s=2)
    async with served(tmp_path, providers=EAGER, pace=pace) as market:
        requestor = Requestor(market)
        await requestor.allocate()
        activity = await requestor.ready()
        batch = await requestor.exec(activity, [run("/bin/sleep", "5")])
        poll = asyncio.create_task(market.call("GET", f"{_batch(activity, batch)}?timeout=60"))
        after = "1970-01-01T00:00:00Z"
        while not poll.done():
            path = f"/payment-api/v1/debitNoteEvents?afterTimestamp={after}&timeout=1"
            for event in await market.call("GET", path):
                after = event["eventDate"].replace("+", "%2B")
                path = f"/payment-api/v1/debitNotes/{event['debitNoteId']}"
                note = await market.call("GET", path)
                due = {"totalAmountAccepted": note["totalAmountDue"]}
                await market.call(
                    "POST", f"{path}/accept", due | {"allocationId": requestor.allocation}
                )
        [result] = await poll
        assert result["result"] == "Ok"


async def test_a_provider_breaks_off_an_agreement_without_activity(tmp_path: Path) -> None:
    async with served(tmp_path, providers=ONE, pace=Pace(offer_delay_s=0, idle_s=1)) as market:
        requestor = Requestor(market)
        await requestor.agree()
        event = await requestor.agreement_event("AgreementTerminatedEvent")
        assert "No activity" in event["reason"]["message"]


async def test_an_agreement_that_has_expired_stays_approved(tmp_path: Path) -> None:
    pace = Pace(offer_delay_s=0, min_expiration_s=0, idle_s=8)
    async with served(tmp_path, providers=ONE, pace=pace) as market:
        requestor = Requestor(market)
        agreement = await requestor.agree(life_s=1)
        activity = await requestor.activity(agreement)
        [event] = await market.call("GET", "/payment-api/v1/invoiceEvents?timeout=60")
        assert (await requestor.state(activity))["state"][0] == "Terminated"
        path = f"/market-api/v1/agreements/{agreement}"
        assert (await market.call("GET", path))["state"] == "Approved"
        await requestor.terminate(agreement)
        invoices = await market.call("GET", "/payment-api/v1/invoices")
        assert [one["invoiceId"] for one in invoices] == [event["invoiceId"]]


async def test_stopping_the_market_ends_everything(tmp_path: Path) -> None:
    async with served(tmp_path, providers=ONE) as market:
        activity = await Requestor(market).ready()
        await Requestor(market).exec(activity, [run("/bin/sleep", "98703.5")])
    assert processes_with("98703.5") == []
    [row] = ledger_table(tmp_path / "market")
    assert (row.state, row.reason) == ("Terminated", "the market is stopping")


SERVER = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from market_tools import ONE, served
async def main():
    async with served(Path(sys.argv[2]), providers=ONE, sandbox=sys.argv[3] == "True") as market:
        print(market.url, flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""


@pytest.mark.parametrize("sandbox", SANDBOX_OR_NOT)
async def test_a_killed_market_is_cleared_up_at_its_next_start(
    tmp_path: Path, sandbox: bool
) -> None:
    root = str(Path(__file__).parent)
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SERVER, root, str(tmp_path), str(sandbox)),
        stdout=asyncio.subprocess.PIPE,
    )
    assert server.stdout
    url = (await server.stdout.readline()).decode().strip()
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {APP_KEY}"}) as http:
        requestor = Requestor(Served(url, tmp_path, http))
        activity = await requestor.ready()
        mark = f"98704.{int(sandbox)}5"
        await requestor.printed(activity, [shell(f"echo up; exec sleep {mark}")])
        [folder] = (tmp_path / "market").glob("providers/solo/*")
    server.send_signal(signal.SIGKILL)
    await server.wait()
    async with served(tmp_path, providers=ONE) as market:
        assert processes_with(mark) == []
        # Its agreements are known by the ledger.
        requestor = Requestor(market)
        [invoice] = await market.call("GET", "/payment-api/v1/invoices")
        path = f"/market-api/v1/agreements/{invoice['agreementId']}"
        assert (await market.call("GET", path))["state"] == "Terminated"
        await requestor.terminate(invoice["agreementId"], status=410)
        [row] = ledger_table(tmp_path / "market")
        assert (row.state, row.invoiced) == ("Terminated", row.cost)
        assert not folder.exists()


# --- networks ---


async def test_networks_are_booked(market: Served) -> None:
    body = {"ip": "192.168.0.0", "mask": "255.255.255.0"}
    net = await market.call("POST", "/net-api/v1/net", body)
    path = f"/net-api/v1/net/{net['id']}"
    await market.call("POST", f"{path}/addresses", {"ip": "192.168.0.1"})
    await market.call("POST", f"{path}/nodes", {"id": "me", "ip": "192.168.0.1"})
    await market.call("POST", f"{path}/nodes", {"id": "n", "ip": "192.168.0.1"}, 409)
    await market.call("POST", f"{path}/nodes", {"id": "n", "ip": "10.0.0.1"}, 400)
    await market.call("POST", f"{path}/nodes", {"id": "n", "ip": "192.168.0.2"})
    await market.call("POST", f"{path}/nodes", {"id": "n", "ip": "192.168.0.2"})
    nodes = await market.call("GET", f"{path}/nodes")
    assert nodes == [{"id": "me", "ip": "192.168.0.1"}, {"id": "n", "ip": "192.168.0.2"}]
    await market.call("DELETE", f"{path}/nodes/n")
    await market.call("DELETE", path)
    await market.call("GET", path, status=404)


SERVER_OF_LINES = """
import socketserver
class Echo(socketserver.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            self.wfile.write(line.upper())
socketserver.ThreadingTCPServer(("0.0.0.0", {port}), Echo).serve_forever()
"""


async def test_a_server_in_an_activity_is_reached_through_the_network(either: Served) -> None:
    requestor = Requestor(either)
    net = await either.call("POST", "/net-api/v1/net", {"ip": "192.168.0.0/24"})
    activity = await requestor.activity(await requestor.agree())
    where = {"id": net["id"], "ip": net["ip"], "nodeIp": "192.168.0.2", "nodes": {}}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = SERVER_OF_LINES.format(port=port)
    serve = run("/bin/sh", "-c", 'exec python3 -c "$1" >/dev/null 2>&1 </dev/null &', "sh", program)
    done = await requestor.results(activity, [{"deploy": {"net": [where]}}, {"start": {}}, serve])
    assert [one["result"] for one in done] == ["Ok"] * 3
    url = f"{either.url}/net-api/v1/net/{net['id']}/tcp/192.168.0.2/{port}"
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                line = await either.http.ws_connect(url)
                break
            except aiohttp.WSServerHandshakeError:
                await asyncio.sleep(0.1)  # it does not listen yet
        await line.send_bytes(b"one\ntwo")
        await line.send_bytes(b"\n")
        said = b""
        while said != b"ONE\nTWO\n":
            said += await line.receive_bytes()
        await line.close()
    for wrong, status in ((url.replace(".2/", ".3/"), 504), (url + "0000", 400)):
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await either.http.ws_connect(wrong)
        assert refused.value.status == status
