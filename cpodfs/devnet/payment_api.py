"""The Payment API: allocations, decorations, notes, invoices, payments; all out of the ledger.

Imports `ledger` and `rest`. `PaymentApi.changed` must be fired by whoever adds an event to the
ledger: the event polls wait for it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation

from aiohttp import web

from cpodfs.devnet.ledger import Ledger, plain
from cpodfs.devnet.provider import PLATFORMS
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
_DEFAULT_HOLD_S = 5.0
"""yapapi asks for events without a timeout; answered at once it would sleep a second each time."""


class PaymentApi:
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.changed = Signal()

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
        address = self._ledger.identity()
        found = []
        for platform in PLATFORMS:
            driver, network, token = platform.split("-")
            found.append(
                {
                    "platform": platform,
                    "address": address,
                    "driver": driver,
                    "network": network,
                    "token": token,
                    "send": True,
                    "receive": True,
                }
            )
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
        platform = body.get("paymentPlatform") or PLATFORMS[0]
        if platform not in PLATFORMS:
            raise Problem(400, f"no account for payment platform {platform}")
        address = body.get("address") or self._ledger.identity()
        row = self._ledger.create_allocation(address, platform, total, _moment(body, "timeout"))
        return web.json_response(_allocation(row), status=201)

    async def list_allocations(self, _request: web.Request) -> web.Response:
        return web.json_response([_allocation(row) for row in self._ledger.allocations()])

    async def get_allocation(self, request: web.Request) -> web.Response:
        return web.json_response(_allocation(self._ledger.allocation(request.match_info["id"])))

    async def amend_allocation(self, request: web.Request) -> web.Response:
        body = await body_object(request)
        row = self._ledger.amend_allocation(
            request.match_info["id"], _amount(body, "totalAmount"), _moment(body, "timeout")
        )
        return web.json_response(_allocation(row))

    async def release_allocation(self, request: web.Request) -> web.Response:
        self._ledger.release_allocation(request.match_info["id"])
        return web.json_response(None)

    async def decorations(self, request: web.Request) -> web.Response:
        """What a demand must say for these allocations to pay: properties and constraints."""
        keys = [key for key in request.query.get("allocationIds", "").split(",") if key]
        rows = [self._ledger.allocation(key) for key in keys]
        properties = [{"key": "golem.com.payment.protocol.version", "value": "2"}]
        constraints = []
        for row in rows:
            name = f"golem.com.payment.platform.{row['platform']}.address"
            properties.append({"key": name, "value": row["address"]})
            constraints.append(f"({name}=*)")
        combined = f"(|{''.join(constraints)})" if len(constraints) > 1 else "".join(constraints)
        found = {"properties": properties, "constraints": [combined] if combined else []}
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
        self.changed.fire()
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
