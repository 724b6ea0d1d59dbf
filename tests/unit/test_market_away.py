"""The market's daemon that is away, frozen or has just started, and what it knows of offers then."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from cpodfs.devnet.pace import Pace
from tests.patience import PATIENCE_S
from tests.unit.market_tools import GO, ONE, Requestor, Served, served, shell

pytestmark = pytest.mark.anyio

QUICK = Pace(offer_delay_s=0, offer_interval_s=0.5)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def market(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path, providers=ONE, pace=QUICK) as market:
        yield market


async def test_a_daemon_that_is_away_forgets_and_its_providers_go_on(market: Served) -> None:
    requestor = Requestor(market)
    demand = await requestor.demand()
    agreement = await requestor.agree(demand)
    activity = await requestor.activity(agreement)
    await requestor.results(activity, [{"deploy": {}}, {"start": {}}])
    wait = shell(f"until [ -e {GO} ]; do echo .; sleep 0.05; done; echo ended")
    batch = await requestor.exec(activity, [wait])
    path = f"/activity-api/v1/activity/{activity}/exec/{batch}?timeout=60"
    poll = asyncio.create_task(market.call("GET", path))
    async with requestor.open_stream(activity, batch) as response:
        assert await response.content.readany()
        identity = await market.call("GET", "/me")
        await market.call("POST", "/devnet/restart", {"away_s": 1.0})
        with pytest.raises(aiohttp.ClientError):
            await market.call("GET", "/me")
        with pytest.raises(aiohttp.ClientError):
            await asyncio.wait_for(_read_out(response), PATIENCE_S)
    with pytest.raises(aiohttp.ClientError):
        await poll
    market.let_go(activity)  # the provider is there all the time
    await _back(market)
    assert await market.call("GET", "/me") == identity
    events = f"/market-api/v1/demands/{demand}/events"
    await market.call("GET", events, status=404)
    found = await market.call("GET", f"/market-api/v1/agreements/{agreement}")
    assert found["state"] == "Approved"
    [result] = await market.call("GET", path)
    assert result["stdout"].endswith("ended\n")
    await requestor.terminate(agreement)
    [row] = market.ledger()
    assert (row.state, row.invoiced) == ("Terminated", row.cost)


async def _read_out(response: aiohttp.ClientResponse) -> None:
    while await response.content.readany():
        pass


async def _back(market: Served) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                await market.call("GET", "/me")
            except aiohttp.ClientError:
                await asyncio.sleep(0.05)
            else:
                return


async def test_a_daemon_that_has_restarted_knows_no_offers_until_they_are_broadcast(
    tmp_path: Path,
) -> None:
    slow = Pace(offer_delay_s=0, offer_interval_s=3)
    async with served(tmp_path, providers=ONE, pace=slow) as market:
        requestor = Requestor(market)
        assert await requestor.events(await requestor.demand(), timeout_s=0)
        await market.call("POST", "/devnet/restart", {"away_s": 0.2})
        await _back(market)
        demand = await requestor.demand()
        assert await requestor.events(demand, timeout_s=0) == []
        assert await requestor.events(demand, timeout_s=60)


async def test_an_offer_is_heard_of_a_while_after_it_was_made(tmp_path: Path) -> None:
    async with served(tmp_path, providers=ONE, pace=Pace(offer_delay_s=0.7)) as market:
        requestor = Requestor(market)
        demand = await requestor.demand()
        assert await requestor.events(demand, timeout_s=0) == []
        agreement = await requestor.agree(demand)
        await requestor.terminate(agreement)
        assert await requestor.events(demand, timeout_s=0) == []
        assert await requestor.events(demand, timeout_s=60)


async def test_a_frozen_daemon_answers_later(market: Served) -> None:
    loop = asyncio.get_running_loop()
    begun = loop.time()
    waiting = asyncio.create_task(market.call("GET", "/market-api/v1/agreementEvents?timeout=0.5"))
    await asyncio.sleep(0.1)
    await market.call("POST", "/devnet/freeze", {"s": 1.5})
    await market.call("GET", "/me")
    assert await waiting == []
    assert loop.time() - begun >= 1.5
    await market.call("POST", "/devnet/freeze", {"s": 3600})
    asked = asyncio.create_task(market.call("GET", "/me"))
    await market.call("POST", "/devnet/freeze", {"s": 0})
    await asyncio.wait_for(asked, PATIENCE_S)


@pytest.mark.parametrize("body", [{}, {"away_s": -1}, {"away_s": "2"}, {"away_s": True}])
async def test_nonsense_does_not_send_it_away(market: Served, body: dict) -> None:
    await market.call("POST", "/devnet/restart", body, status=400)
    await market.call("GET", "/me")
