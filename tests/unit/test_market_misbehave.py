"""What goes wrong at the local market on request, its providers by specification, and its books."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from click.testing import CliRunner

from cpodfs.devnet.cli import devnet
from cpodfs.devnet.ledger import LEDGER_NAME, open_points
from cpodfs.devnet.misbehave import Misbehaviour
from cpodfs.devnet.provider import DEFAULT_PROVIDERS, image_hash, numbered, parse_spec
from tests.patience import PATIENCE_S
from tests.unit.market_tools import (
    INIT,
    ONE,
    THREE,
    Requestor,
    Served,
    processes_with,
    served,
    shell,
)

pytestmark = pytest.mark.anyio

INVOICES = "/payment-api/v1/invoices"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def market(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path, providers=ONE) as market:
        yield market


async def misbehave(market: Served, **how: object) -> None:
    await market.call("POST", "/devnet/misbehave", how)


async def test_it_is_changed_while_it_runs(market: Served) -> None:
    requestor = Requestor(market)
    await misbehave(market, no_offers=True)
    assert await requestor.events(await requestor.demand(), timeout_s=0.1) == []
    await misbehave(market, reject_proposals=1.0)
    demand = await requestor.demand()
    [offer] = await requestor.events(demand)
    await requestor.counter(demand, offer["proposal"]["proposalId"])
    [event] = await requestor.events(demand)
    assert event["eventType"] == "ProposalRejectedEvent"
    shown = await market.call("GET", "/devnet/misbehave")
    assert (shown["no_offers"], shown["reject_proposals"]) == (False, 1.0)
    await misbehave(market)
    assert await requestor.agree()


@pytest.mark.parametrize("how", [{"vanish": 2}, {"rude": True}, {"invoice_delay_s": -1}])
async def test_nonsense_is_refused_and_changes_nothing(market: Served, how: dict) -> None:
    await misbehave(market, fail_command=0.5)
    found = await market.call("POST", "/devnet/misbehave", how, status=400)
    assert next(iter(how)) in found["message"]
    assert (await market.call("GET", "/devnet/misbehave"))["fail_command"] == 0.5


async def test_a_provider_that_vanishes(market: Served) -> None:
    requestor = Requestor(market)
    agreement = await requestor.agree()
    activity = await requestor.activity(agreement)
    await requestor.results(activity, INIT)
    batch = await requestor.exec(activity, [shell("while :; do echo up; sleep 0.4711; done")])
    async with requestor.open_stream(activity, batch) as response:
        while b'"stdout"' not in await response.content.readany():
            pass
        assert await market.call("POST", "/devnet/vanish", {}) == {"provider": "solo"}
        # No last event: the line just breaks off.
        with pytest.raises(aiohttp.ClientPayloadError):
            await asyncio.wait_for(_assert_unfinished(response), PATIENCE_S)
    async with asyncio.timeout(PATIENCE_S):  # what was killed takes a moment to be gone
        while processes_with("sleep 0.4711"):
            await asyncio.sleep(0.05)
    for method, rest in (("GET", "/state"), ("GET", "/usage"), ("GET", f"/exec/{batch}")):
        path = f"/activity-api/v1/activity/{activity}{rest}"
        found = await market.call(method, path, status=500)
        assert "endpoint address not found" in found["message"]
    # Nobody can end the agreement any more: it stays approved.
    await requestor.terminate(agreement, status=500)
    path = f"/market-api/v1/agreements/{agreement}"
    assert (await market.call("GET", path))["state"] == "Approved"
    assert await market.call("GET", INVOICES) == []
    assert await requestor.events(await requestor.demand(), timeout_s=0.1) == []
    assert open_points(market.market_dir) == []
    await market.call("POST", "/devnet/vanish", {}, status=404)


async def test_a_provider_that_cannot_be_reached_for_a_while(market: Served) -> None:
    requestor = Requestor(market)
    agreement = await requestor.agree()
    activity = await requestor.activity(agreement)
    await requestor.results(activity, INIT)
    batch = await requestor.exec(activity, [shell("echo up")])
    await market.call("POST", "/devnet/vanish", {"provider": "solo", "for_s": 1})
    await requestor.terminate(agreement, status=500)
    path = f"/activity-api/v1/activity/{activity}"
    await market.call("GET", f"{path}/state", status=500)
    async with asyncio.timeout(PATIENCE_S):
        while True:
            async with market.http.get(f"{market.url}{path}/state") as response:
                if response.status == 200:
                    break
            await asyncio.sleep(0.05)
    [result] = await market.call("GET", f"{path}/exec/{batch}?timeout=20")
    assert result["stdout"] == "up\n"
    await requestor.terminate(agreement)
    assert len(await market.call("GET", INVOICES)) == 1


async def test_a_provider_that_does_not_answer(market: Served) -> None:
    requestor = Requestor(market)
    agreement = await requestor.agree()
    activity = await requestor.activity(agreement)
    await market.call("POST", "/devnet/silence", {"provider": "solo", "for_s": 4})
    results = f"/activity-api/v1/activity/{activity}/exec/none?timeout=0.1"
    await market.call("GET", results, status=408)
    # It is destroyed there all the same, once it is heard of.
    destroy = f"/activity-api/v1/activity/{activity}?timeout=0"
    await market.call("DELETE", destroy, status=408)
    # Nobody waits for this to be answered: the provider ends the agreement, and here it stays.
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(requestor.terminate(agreement), 0.3)
    path = f"/market-api/v1/agreements/{agreement}"
    [event] = await market.call("GET", "/payment-api/v1/invoiceEvents?timeout=60")
    assert event["eventType"] == "InvoiceReceivedEvent"
    assert (await market.call("GET", path))["state"] == "Approved"
    await requestor.terminate(agreement, status=500)
    await market.call("POST", "/devnet/silence", {"provider": "none", "for_s": 1}, status=404)


async def _assert_unfinished(response: aiohttp.ClientResponse) -> None:
    while said := await response.content.readany():
        assert b"finished" not in said


async def test_vanishing_by_name_leaves_the_others(tmp_path: Path) -> None:
    async with served(tmp_path, providers=THREE) as market:
        await market.call("POST", "/devnet/vanish", {"provider": "b"})
        events = await Requestor(market).events(await Requestor(market).demand())
        names = {e["proposal"]["properties"]["golem.node.id.name"] for e in events}
        assert names == {"a", "c"}


async def test_invoices_that_come_late_or_never(market: Served) -> None:
    requestor = Requestor(market)
    await misbehave(market, invoice_delay_s=0.3)
    agreement = await requestor.agree()
    await requestor.activity(agreement)
    await requestor.terminate(agreement)
    assert await market.call("GET", INVOICES) == []
    [event] = await market.call("GET", "/payment-api/v1/invoiceEvents?timeout=10")
    assert event["eventType"] == "InvoiceReceivedEvent"
    [point] = open_points(market.market_dir)
    assert point.startswith("the invoice of solo for agreement")
    await misbehave(market, lose_invoice=1.0)
    agreement = await requestor.agree()
    await requestor.activity(agreement)
    await requestor.terminate(agreement)
    assert len(await market.call("GET", INVOICES)) == 1


async def test_late_invoices_are_sent_when_the_market_stops(tmp_path: Path) -> None:
    how = Misbehaviour(invoice_delay_s=3600)
    async with served(tmp_path, providers=ONE, misbehave=how) as market:
        requestor = Requestor(market)
        await requestor.activity(await requestor.agree())
    [row] = market.ledger()
    assert row.invoiced != "-"


async def test_an_unknown_image(market: Served) -> None:
    path = "/registry/v1/image/info?tag=golem/x:latest"
    await market.call("GET", path)
    await misbehave(market, unknown_image=True)
    await market.call("GET", path, status=404)


async def test_what_a_command_starts_goes_on_until_the_activity_ends(market: Served) -> None:
    requestor = Requestor(market)
    agreement = await requestor.agree()
    activity = await requestor.activity(agreement)
    begin = "(sleep 4712; true) </dev/null >/dev/null 2>&1 & echo begun"
    results = await requestor.results(activity, [*INIT, shell(begin)])
    assert results[-1]["stdout"] == "begun\n"
    assert processes_with("sleep 4712") != []
    seen = await requestor.results(activity, [shell("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")])
    assert "sleep 4712" in seen[0]["stdout"]
    await requestor.terminate(agreement)
    assert processes_with("sleep 4712") == []


def test_providers_by_number_and_by_specification() -> None:
    assert numbered(2) == DEFAULT_PROVIDERS[:2]
    assert numbered(0) == ()
    assert len({spec.name for spec in numbered(11)}) == 11
    spec = parse_spec("slow:speed=0.5,bandwidth=1e6,cores=1,subnet=mine")
    assert (spec.name, spec.speed, spec.bandwidth, spec.cores) == ("slow", 0.5, 1e6, 1)
    assert spec.subnet == "mine"
    for text in ("", "a b", "x:speed=2", "x:speed=fast", "x:colour=1", "x:cores=1.5", "../x"):
        with pytest.raises(ValueError, match=r"name|speed|colour|cores"):
            parse_spec(text)


async def test_a_provider_of_another_kind(tmp_path: Path) -> None:
    gpu = parse_spec("g:runtime=vm-nvidia,capabilities=!exp:gpu+vpn,images=golem/a:1+abc")
    assert (gpu.runtime, gpu.capabilities) == ("vm-nvidia", ("!exp:gpu", "vpn"))
    async with served(tmp_path, providers=(*ONE, gpu)) as market:
        requestor = Requestor(market)
        wanted = "(&(golem.runtime.name=vm-nvidia)(golem.runtime.capabilities=!exp:gpu))"
        demand = await requestor.demand(wanted)
        [offer] = await requestor.events(demand)
        assert offer["proposal"]["properties"]["golem.node.id.name"] == "g"
        await market.call("DELETE", f"/market-api/v1/demands/{demand}", status=204)
    for package, deployed in (
        (f"hash:sha3:{image_hash('golem/a:1')}:http://x/y", "Ok"),
        ("hash:sha3:abc:http://x/y", "Ok"),
        ("hash:sha3:abcd:http://x/y", "Error"),
    ):
        async with served(tmp_path / package[10:14], providers=(gpu,)) as market:
            requestor = Requestor(market, package=package)
            activity = await requestor.activity(await requestor.agree())
            [result] = await requestor.results(activity, [{"deploy": {}}])
            assert result["result"] == deployed
            # Deployed or not, it cannot be done again.
            assert (await requestor.state(activity))["state"] == ["Deployed", None]


async def test_the_books_are_shown(market: Served) -> None:
    shown = CliRunner().invoke(devnet, ["ledger", "--state", str(market.folder)])
    assert (shown.exit_code, shown.output) == (0, "balanced: 0 agreements, 0 GLM paid\n")
    requestor = Requestor(market)
    await requestor.allocate()
    agreement = await requestor.agree()
    await requestor.activity(agreement)
    shown = CliRunner().invoke(devnet, ["ledger", "--state", str(market.folder)])
    assert shown.exit_code == 1
    assert f"agreement {agreement[:8]} with solo is open" in shown.output
    await requestor.terminate(agreement)
    [invoice] = await market.call("GET", INVOICES)
    accept = {"totalAmountAccepted": invoice["amount"], "allocationId": requestor.allocation}
    await market.call("POST", f"{INVOICES}/{invoice['invoiceId']}/accept", accept)
    shown = CliRunner().invoke(devnet, ["ledger", "--state", str(market.folder)])
    assert shown.exit_code == 0
    assert shown.output.splitlines()[1].split()[:3] == [agreement[:8], "solo", "ended"]
    assert shown.output.splitlines()[-1] == f"balanced: 1 agreement, {invoice['amount']} GLM paid"
    with sqlite3.connect(market.market_dir / LEDGER_NAME) as db:
        db.execute("UPDATE allocations SET spent = '0.5'")
    assert open_points(market.market_dir)[0].startswith("allocation ")
