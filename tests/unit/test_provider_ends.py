"""What was begun at a market is ended and paid, whatever yagna says of it."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ya_payment import ApiException

from cpodfs.recipe import parse_recipe
from cpodfs.runs import provider_cleanup, provider_ends
from cpodfs.runs.provider import Session
from cpodfs.runs.provider_bills import Overbilled
from cpodfs.runs.provider_cleanup import Debts
from cpodfs.runs.provider_ends import Payer, release, terminate
from cpodfs.runs.provider_status import Reporter, Status
from cpodfs.runs.provider_work import Job

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def refused(status: int, message: str = "") -> ApiException:
    error = ApiException(status=status, reason="no")
    error.body = json.dumps({"message": message})
    return error


class Market:
    """``on_terminate`` and ``state`` are what it says; an exception is raised."""

    def __init__(self, on_terminate: Any, state: Any) -> None:
        self._on_terminate, self._state = on_terminate, state

    async def terminate_agreement(self, _key: str, **_: Any) -> None:
        if self._on_terminate == "hang":
            await asyncio.sleep(3600)
        if self._on_terminate is not None:
            raise self._on_terminate

    async def get_agreement(self, _key: str) -> Any:
        if isinstance(self._state, Exception):
            raise self._state
        return SimpleNamespace(state=self._state)


OVER_THERE = (
    "Protocol error while terminating: Remote Terminate: Can't finish operation on Agreement"
)


@pytest.mark.parametrize(
    ("on_terminate", "state", "over"),
    [
        (None, "Approved", True),
        (refused(410), "Terminated", True),
        (refused(500), "Approved", False),
        (refused(500, OVER_THERE), "Approved", True),
        (refused(404), refused(404), True),
        (OSError(), OSError(), False),
        ("hang", "Approved", False),
        (refused(409), "Proposal", True),
        (refused(409), "Pending", False),
    ],
)
async def test_whether_an_agreement_is_over(
    on_terminate: Any, state: Any, over: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provider_ends, "CALL_S", 0.05)
    assert await terminate(Market(on_terminate, state), "a", "why") == over


class Payments:
    def __init__(self, *bills: Any, allocations: dict[str, Decimal] | None = None) -> None:
        self.notes = [bill for bill in bills if hasattr(bill, "debit_note_id")]
        self.invoices = [bill for bill in bills if hasattr(bill, "invoice_id")]
        self.left = allocations or {"a1": Decimal(1)}
        self.accepted: list[tuple[str, str, str]] = []
        self.released: list[str] = []
        self.since: list[Any] = []

    async def get_debit_notes(self, **since: Any) -> list[Any]:
        self.since.append(since)
        return self.notes

    async def get_invoices(self, **_: Any) -> list[Any]:
        return self.invoices

    async def accept_debit_note(self, key: str, acceptance: Any) -> None:
        self._accept(key, acceptance)

    async def accept_invoice(self, key: str, acceptance: Any) -> None:
        self._accept(key, acceptance)

    def _accept(self, key: str, acceptance: Any) -> None:
        amount, allocation = Decimal(acceptance.total_amount_accepted), acceptance.allocation_id
        if self.left[allocation] < amount:
            raise refused(400, "not enough")
        self.left[allocation] -= amount
        self.accepted.append((key, allocation, acceptance.total_amount_accepted))

    async def release_allocation(self, key: str) -> None:
        self.released.append(key)


def invoice(key: str, agreement: str, amount: str, status: str = "RECEIVED") -> Any:
    return SimpleNamespace(
        invoice_id=key,
        agreement_id=agreement,
        amount=amount,
        status=status,
        payment_platform="p",
    )


def note(key: str, agreement: str, amount: str) -> Any:
    return SimpleNamespace(
        debit_note_id=key,
        agreement_id=agreement,
        total_amount_due=amount,
        status="RECEIVED",
        payment_platform="p",
    )


def allocations(*keys: str, platform: str = "p") -> list[Any]:
    return [SimpleNamespace(id=key, payment_platform=platform) for key in keys]


def payer(api: Payments, *keys: str, told: dict[str, Any]) -> Payer:
    def check(agreement: str, amount: str) -> Decimal:
        if {"ours": "1", "dear": "0.1"}[agreement] < amount:
            raise Overbilled("too much")
        return Decimal(amount)

    return Payer(
        *(api, allocations(*keys), datetime(2026, 1, 1, tzinfo=UTC), check),
        *(lambda key, paid: told.update({key: paid}), lambda key, why: told.update({key: why})),
    )


async def test_only_our_own_bills_are_paid_once() -> None:
    api = Payments(
        *(note("n1", "ours", "0.1"), note("n2", "others", "0.1"), note("n3", "dear", "5")),
        *(invoice("i1", "ours", "0.2"), invoice("i2", "others", "0.3"), invoice("i3", "dear", "5")),
    )
    told: dict[str, Any] = {}
    ours = payer(api, "a1", told=told)
    await ours.round()
    await ours.round()
    assert api.accepted == [("n1", "a1", "0.1"), ("i1", "a1", "0.2")]
    assert told == {"ours": Decimal("0.2"), "dear": "too much"}
    assert api.since[0] == {"after_timestamp": datetime(2026, 1, 1, tzinfo=UTC)}


async def test_a_bill_that_yagna_refuses_keeps_no_other_waiting() -> None:
    left = {"a1": Decimal("0.5")}
    bills = [
        invoice("i1", "dear", "0.05"),
        invoice("i2", "ours", "0.6"),
        invoice("i3", "ours", "0.2"),
    ]
    api, told = Payments(*bills, allocations=left), dict[str, Any]()
    await payer(api, "a1", told=told).round()
    assert told == {"dear": Decimal("0.05"), "ours": Decimal("0.2")}


async def test_an_agreement_is_paid_once() -> None:
    api, told = (
        Payments(invoice("i1", "ours", "0.2"), invoice("i2", "ours", "0.3")),
        dict[str, Any](),
    )
    await payer(api, "a1", told=told).round()
    assert api.accepted == [("i1", "a1", "0.2")]


async def test_what_somebody_has_accepted_already_is_paid() -> None:
    api, told = Payments(invoice("i1", "ours", "0.2", "ACCEPTED")), dict[str, Any]()
    await payer(api, "a1", told=told).round()
    assert (api.accepted, told) == ([], {"ours": Decimal("0.2")})


async def test_a_bill_is_paid_from_an_allocation_that_has_enough() -> None:
    left = {"a1": Decimal("0.1"), "a2": Decimal(1)}
    api, told = Payments(invoice("i1", "ours", "0.2"), allocations=left), dict[str, Any]()
    await payer(api, "a1", "a2", told=told).round()
    assert api.accepted == [("i1", "a2", "0.2")]


@pytest.mark.parametrize(
    ("error", "surely"),
    [(None, True), (refused(410), True), (refused(404), True), (OSError(), False)],
)
async def test_whether_money_is_released(error: Exception | None, surely: bool) -> None:
    async def release_allocation(_key: str) -> None:
        if error is not None:
            raise error

    api = SimpleNamespace(release_allocation=release_allocation)
    assert await release(api, "a1") == surely


def job(expires_in_s: float, **options: Any) -> dict[str, Any]:
    now = datetime.now(UTC)
    one = {
        "agreement": "g",
        "agreement_state": "vanished",
        "activity": "v",
        "paid": False,
        "signed": (now - timedelta(seconds=60)).isoformat(),
        "refused": False,
        "error": None,
        "price": {"start": 0.5, "a_second": 0.01},
    }
    expires = (now + timedelta(seconds=expires_in_s)).isoformat()
    common = {"allocations": ["a1"], "demands": [], "signing": [], "payer": "0x1", "until": None}
    return (
        common | {"agreements": [one], "expires": expires, "begun": None, "last": False} | options
    )


class Control:
    async def destroy_activity(self, _key: str) -> None:
        raise refused(408)


async def settled(debts: Debts, market: Market) -> Payments:
    payments = Payments()

    async def allocation(key: str) -> Any:
        return allocations(key)[0]

    for one in debts._job["agreements"]:
        await debts.end(Control(), market, one)
    for key in debts._job["signing"]:
        await debts.forget(market, key)
    both = SimpleNamespace(_api=payments, allocation=allocation)
    await debts.pay(both)
    await debts.release(both)
    return payments


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider_cleanup, "INVOICES_S", 0.05)


@pytest.mark.usefixtures("at_once")
async def test_an_agreement_that_stays_approved_is_closed_when_its_time_is_over() -> None:
    market = Market(refused(500), "Approved")
    debts = Debts(job(expires_in_s=60))
    payments = await settled(debts, market)
    assert (debts.ended, payments.released) == ({"g": {}}, [])
    debts = Debts(job(expires_in_s=-1))
    payments = await settled(debts, market)
    assert debts.ended["released"]
    assert payments.released == ["a1"]
    ended = debts.ended["g"]
    assert ended["agreement_state"] == "expired"
    assert ended["error"].startswith("never billed; at most 1.")


@pytest.mark.usefixtures("at_once")
async def test_an_invoice_that_never_comes_is_forgotten_at_last() -> None:
    market = Market(None, "Approved")
    debts = Debts(job(expires_in_s=60))
    assert (await settled(debts, market)).released == []
    assert debts.ended == {"g": {"agreement_state": "terminated"}}
    debts = Debts(job(expires_in_s=60, last=True))
    assert (await settled(debts, market)).released == ["a1"]
    assert debts.ended["g"] == {"agreement_state": "expired", "error": "never billed"}


@pytest.mark.usefixtures("at_once")
async def test_a_signature_that_may_have_been_given_is_ended() -> None:
    debts = Debts(job(60, agreements=[], signing=["s"]))
    assert (await settled(debts, Market(refused(500), "Approved"))).released == []
    debts = Debts(job(60, agreements=[], signing=["s"]))
    assert (await settled(debts, Market(refused(500), "Rejected"))).released == ["a1"]


@pytest.mark.parametrize("error", [None, OSError()])
async def test_half_a_start_leaves_no_money_set_aside(
    tmp_path: Path, error: Exception | None
) -> None:
    """Also where the answer was lost, and the allocation is known by when it is over only."""
    recipe = b'{"golem": {"exec": "x", "runtime": {"image": "x", "budget": 1}}}'
    runtime = parse_recipe(recipe, file="a.recipe").runtime
    assert runtime is not None
    job = Job(tmp_path, ("x",), "script", "payload", "output", "logs/x", tmp_path)
    session = Session(job, runtime, Reporter(Status(Decimal(1)), io.BytesIO()))
    released: list[str] = []

    async def release_allocation(key: str) -> None:
        released.append(key)
        if error is not None:
            raise error

    async def listed() -> AsyncIterator[Any]:
        yield SimpleNamespace(id="others", expires=session._expires + timedelta(seconds=1))
        yield SimpleNamespace(id="ours", expires=session._expires)

    api = SimpleNamespace(release_allocation=release_allocation)
    payments = SimpleNamespace(allocations=listed, _api=api)
    await session._take_back(SimpleNamespace(_budget_allocations=[], _payment_api=payments))
    assert (released, session.settled) == (["ours"], error is None)
