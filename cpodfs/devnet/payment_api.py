"""The Payment API: allocations, decorations, notes, invoices, payments; all out of the ledger.

Imports `ledger`, `pace`, `provider` and `rest`. `PaymentApi.changed` must be fired by whoever adds an event to the
ledger: the event polls wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation

from aiohttp import web

from cpodfs.devnet.ledger import Ledger, plain
from cpodfs.devnet.pace import Pace
from cpodfs.devnet.provider import (
    DEAD_NETWORKS,
    DEFAULT_PLATFORM,
    NETWORKS,
    PLATFORMS,
    PROTOCOL_VERSION,
)
from cpodfs.devnet.rest import (
    Json,
    Problem,
    Signal,
    after_timestamp,
    body_object,
    hold_s,
    iso,
    max_events,
    text_field,
)

_LEGACY_NETWORKS = ("mumbai", "goerli", "rinkeby")
"""yagna still takes them, and tells nobody of them."""
FUNDS = Decimal(1000)
"""GLM that the requestor has on each network that is alive, at first."""
_LONGEST_S = 86400.0
_PARTS = ("driver", "network", "token")
_DEFAULT_HOLD_S = 5.0
"""yapapi asks for events without a timeout; answered at once it would sleep a second each time."""


class PaymentApi:
    """``open`` and ``close`` begin and end what happens by itself: payments, releases in time."""

    def __init__(self, ledger: Ledger, pace: Pace) -> None:
        self._ledger = ledger
        self._pace = pace
        self.changed = Signal()
        self._accounts: set[str] = set()
        """Platforms whose account was initialised since the daemon's start, in memory only."""
        self._cycle: asyncio.TimerHandle | None = None
        self._releases: dict[str, asyncio.TimerHandle] = {}

    def open(self) -> None:
        for row in self._ledger.allocations():
            self._release_in_time(row)
        if self._ledger.is_unsettled():
            self._pay_soon()

    def close(self) -> None:
        """Pay what was accepted: the market is about to end."""
        for timer in (*self._releases.values(), *([self._cycle] if self._cycle else ())):
            timer.cancel()
        self._ledger.settle()

    def forget(self) -> None:
        """The daemon has restarted: no account is initialised."""
        self._accounts.clear()

    def _pay_soon(self) -> None:
        if self._cycle is None:
            loop = asyncio.get_running_loop()
            self._cycle = loop.call_later(self._pace.payment_cycle_s, self._pay)

    def _pay(self) -> None:
        self._cycle = None
        self._ledger.settle()
        self.changed.fire()

    def _release_in_time(self, row: sqlite3.Row) -> None:
        """An allocation with a timeout is released by itself."""
        if (timer := self._releases.pop(row["id"], None)) is not None:
            timer.cancel()
        if row["timeout"]:
            left_s = (datetime.fromisoformat(row["timeout"]) - datetime.now(UTC)).total_seconds()
            loop = asyncio.get_running_loop()
            # In steps: a timer of years is more than the loop can hold.
            later = self._release if left_s <= _LONGEST_S else self._release_later
            self._releases[row["id"]] = loop.call_later(
                min(max(0.0, left_s), _LONGEST_S), later, row["id"]
            )

    def _release_later(self, key: str) -> None:
        with contextlib.suppress(Problem):
            self._release_in_time(self._ledger.allocation(key))

    def _release(self, key: str) -> None:
        self._releases.pop(key, None)
        with contextlib.suppress(Problem):
            self._ledger.release_allocation(key)

    def routes(self, root: str = "/payment-api/v1") -> list[web.RouteDef]:
        return [
            web.get(f"{root}/requestorAccounts", self.accounts),
            web.get(f"{root}/batchCycles", self.batch_cycles),
            web.post(f"{root}/allocations", self.create_allocation),
            web.get(f"{root}/allocations", self.list_allocations),
            web.get(f"{root}/allocations/{{id}}", self.get_allocation),
            web.put(f"{root}/allocations/{{id}}", self.amend_allocation),
            web.delete(f"{root}/allocations/{{id}}", self.release_allocation),
            web.get(f"{root}/demandDecorations", self.decorations),
            web.get(f"{root}/invoiceEvents", self.invoice_events),
            web.get(f"{root}/debitNoteEvents", self.debit_note_events),
            web.get(f"{root}/invoices", self.list_invoices),
            web.get(f"{root}/invoices/{{id}}", self.get_invoice),
            web.post(f"{root}/invoices/{{id}}/accept", self.accept_invoice),
            web.get(f"{root}/debitNotes", self.list_debit_notes),
            web.get(f"{root}/debitNotes/{{id}}", self.get_debit_note),
            web.post(f"{root}/debitNotes/{{id}}/accept", self.accept_debit_note),
            web.get(f"{root}/payments", self.list_payments),
        ]

    async def accounts(self, _request: web.Request) -> web.Response:
        """Those initialised since the daemon has started: none, right after that."""
        address = self._ledger.identity()
        found = []
        for platform in PLATFORMS:
            driver, network, token = platform.split("-")
            shown = {"driver": driver, "network": network, "token": token.replace("glm", "GLM")}
            may = {"send": True, "receive": False}
            if platform in self._accounts:
                found.append({"platform": platform, "address": address, **shown, **may})
        return web.json_response(found)

    async def batch_cycles(self, _request: web.Request) -> web.Response:
        """When yagna pays what was accepted, for each platform that its drivers know, in use or not."""
        now = datetime.now(UTC)
        found = [
            {
                "nodeId": self._ledger.identity(),
                "platform": platform,
                "intervalSec": 300,
                "cron": None,
                "extraPayTimeSec": 240,
                "maxIntervalSec": 300,
                "nextProcess": (now + timedelta(seconds=300)).isoformat(),
                "lastProcess": None,
            }
            for platform in PLATFORMS
            if not set(platform.split("-")) & set(_LEGACY_NETWORKS)
        ]
        return web.json_response(found)

    async def create_allocation(self, request: web.Request) -> web.Response:
        body = await body_object(request)
        total = _amount(body, "totalAmount")
        platform = _platform(body)
        address = body.get("address") or self._ledger.identity()
        if address.lower() != self._ledger.identity():
            raise _refusal(
                500,
                "account-not-registered",
                f"Account {address} not registered for platform {platform}",
                body,
            )
        self._accounts.add(platform)
        timeout = _moment(body, "timeout")
        self._check(body, platform, total, timeout)
        row = self._ledger.create_allocation(address, platform, total, timeout)
        self._release_in_time(row)
        return web.json_response(_allocation(row), status=201)

    def _check(self, body: Json, platform: str, more: Decimal, timeout: str | None) -> None:
        """Whether so much more can be set aside. Raises Problem."""
        details: Json = {"paymentPlatform": platform}
        if timeout is not None and timeout <= iso(datetime.now(UTC)):
            details["requestedTimeout"] = timeout
            said = "Requested allocation timeout is in the past"
            raise _refusal(400, "validation-error/timeout-passed", said, body, details)
        dead = platform.split("-")[1] in DEAD_NETWORKS
        funds = Decimal(0) if dead else FUNDS - self._ledger.spent(platform)
        reserved = self._ledger.reserved(platform)
        if more > funds - reserved:
            details |= {
                "requestedFunds": plain(more),
                "availableFunds": plain(funds),
                "reservedFunds": plain(reserved),
            }
            said = (
                "Insufficient funds to create the allocation. Top up your account or release all"
                " existing allocations to unlock the funds via `yagna payment release-allocations`"
            )
            raise _refusal(400, "validation-error/insufficient-account-funds", said, body, details)

    async def list_allocations(self, _request: web.Request) -> web.Response:
        return web.json_response([_allocation(row) for row in self._ledger.allocations()])

    async def get_allocation(self, request: web.Request) -> web.Response:
        return web.json_response(_allocation(self._ledger.allocation(request.match_info["id"])))

    async def amend_allocation(self, request: web.Request) -> web.Response:
        body, key = await body_object(request), request.match_info["id"]
        old = self._ledger.allocation(key)
        known = Decimal(old["total"])
        total = known if body.get("totalAmount") is None else _amount(body, "totalAmount")
        timeout = _moment(body, "timeout")
        self._check(body, old["platform"], max(total - known, Decimal(0)), timeout)
        row = self._ledger.amend_allocation(key, total, timeout or old["timeout"])
        self._release_in_time(row)
        return web.json_response(_allocation(row))

    async def release_allocation(self, request: web.Request) -> web.Response:
        self._ledger.release_allocation(request.match_info["id"])
        return web.json_response(None)

    async def decorations(self, request: web.Request) -> web.Response:
        """What a demand must say for these allocations to pay: properties and constraints."""
        keys = [key for key in request.query.get("allocationIds", "").split(",") if key]
        rows = [self._ledger.allocation(key) for key in keys]
        properties, constraints = [], []
        for row in rows:
            name = f"golem.com.payment.platform.{row['platform']}.address"
            properties.append({"key": name, "value": row["address"]})
            constraints.append(f"({name}=*)")
        properties.append({"key": PROTOCOL_VERSION, "value": "3"})
        combined = f"(|{''.join(constraints)})" if len(constraints) != 1 else constraints[0]
        found = {"properties": properties, "constraints": [combined, f"({PROTOCOL_VERSION}>1)"]}
        return web.json_response(found)

    async def invoice_events(self, request: web.Request) -> web.Response:
        return await self._events(request, "invoice", "invoiceId")

    async def debit_note_events(self, request: web.Request) -> web.Response:
        return await self._events(request, "debit_note", "debitNoteId")

    async def _events(self, request: web.Request, kind: str, key_name: str) -> web.Response:
        after, limit = after_timestamp(request), max_events(request)
        found: list[sqlite3.Row] = []

        def ready() -> bool:
            found[:] = self._ledger.events(kind, after, limit)
            return bool(found)

        await self.changed.until(ready, hold_s(request, _DEFAULT_HOLD_S))
        return web.json_response(
            [
                {"eventType": row["type"], "eventDate": row["at"], key_name: row["subject"]}
                for row in found
            ]
        )

    async def list_invoices(self, _request: web.Request) -> web.Response:
        return web.json_response(self._ledger.invoices())

    async def get_invoice(self, request: web.Request) -> web.Response:
        return web.json_response(self._ledger.invoice(request.match_info["id"]))

    async def accept_invoice(self, request: web.Request) -> web.Response:
        return await self._accept(request, self._ledger.accept_invoice)

    async def list_debit_notes(self, _request: web.Request) -> web.Response:
        return web.json_response(self._ledger.debit_notes())

    async def get_debit_note(self, request: web.Request) -> web.Response:
        return web.json_response(self._ledger.debit_note(request.match_info["id"]))

    async def accept_debit_note(self, request: web.Request) -> web.Response:
        return await self._accept(request, self._ledger.accept_debit_note)

    async def _accept(
        self, request: web.Request, book: Callable[[str, Decimal, str], None]
    ) -> web.Response:
        body = await body_object(request)
        amount, allocation = _amount(body, "totalAmountAccepted"), text_field(body, "allocationId")
        book(request.match_info["id"], amount, allocation)
        self._pay_soon()
        return web.json_response(None)

    async def list_payments(self, request: web.Request) -> web.Response:
        after = after_timestamp(request)
        found: list[Json] = []

        def ready() -> bool:
            found[:] = self._ledger.payments(after)
            return bool(found)

        await self.changed.until(ready, hold_s(request, 0.0))
        return web.json_response(found)


def _allocation(row: sqlite3.Row) -> Json:
    total, spent = Decimal(row["total"]), Decimal(row["spent"])
    return {
        "allocationId": row["id"],
        "address": row["address"],
        "paymentPlatform": row["platform"],
        "totalAmount": plain(total),
        "spentAmount": plain(spent),
        "remainingAmount": plain(total - spent),
        "timestamp": row["created"],
        "timeout": row["timeout"],
        "makeDeposit": False,
    }


def _platform(body: Json) -> str:
    """The payment platform that an allocation is for: a name, or its three parts. Raises Problem."""
    given = body.get("paymentPlatform") or DEFAULT_PLATFORM
    parts = (
        given if isinstance(given, dict) else dict(zip(_PARTS, str(given).split("-"), strict=False))
    )
    driver = str(parts.get("driver") or "erc20").lower()
    network = str(parts.get("network") or "hoodi").lower()
    token = str(parts.get("token") or NETWORKS.get(network, "")).lower()
    platform = f"{driver}-{network}-{token}"
    if platform not in PLATFORMS:
        why = {"parseError": f"Validate network failed (2): Invalid network name: {network}"}
        said = "Payment platform doesn't parse"
        raise _refusal(400, "bad-payment-platform", said, body, why)
    return platform


def _refusal(status: int, kind: str, detail: str, body: Json, more: Json | None = None) -> Problem:
    """An allocation that is refused; ``kind`` with what follows a slash is its instance."""
    root = "/payment-api/v1/allocations/"
    details: Json = {"type": root + kind.partition("/")[0], "detail": detail, "requestBody": body}
    if "/" in kind:
        details["instance"] = root + kind
    return Problem(status, detail, {**details, **(more or {})})


def _amount(body: Json, name: str) -> Decimal:
    try:
        amount = Decimal(str(body.get(name)))
    except InvalidOperation:
        raise Problem(400, f"{name}: not an amount") from None
    if not amount.is_finite() or amount < 0:
        raise Problem(400, f"{name}: not an amount")
    return amount


def _moment(body: Json, name: str) -> str | None:
    if body.get(name) is None:
        return None
    try:
        return iso(datetime.fromisoformat(text_field(body, name)))
    except ValueError:
        raise Problem(400, f"{name}: not an ISO date") from None
