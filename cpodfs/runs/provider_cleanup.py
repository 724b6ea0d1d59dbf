"""Ends what a provider run left at the market when its process died: ``… provider_cleanup``.

asyncio and yapapi's REST clients, in a process of its own that the supervisor starts. stdin: one
JSON object {agreements, activities: lists of ids, allocation: id or null}; stdout: what became of
each agreement, {id: {agreement_state, spent, accepted, paid}}. All is paid from the run's own
allocation, so that the budget stays a limit, and the allocation is released.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from yapapi import rest
from yapapi.config import ApiConfig

from cpodfs.runs.provider_bills import Overbilled, checked, most
from cpodfs.runs.provider_market import describe

INVOICES_S = 15.0
_POLL_S = 0.5
_REASON = {"message": "The requestor's process died", "golem.requestor.code": "Cancelled"}


async def clean_up(
    agreements: list[str], activities: list[str], allocation_id: str | None
) -> dict[str, Any]:
    """Destroy activities, terminate agreements, pay what is billed. Waits for `INVOICES_S` at most."""
    configuration = rest.Configuration(ApiConfig())
    ended: dict[str, Any] = {}

    def note(key: str, paid: Decimal) -> None:
        ended[key] |= {"spent": float(paid), "accepted": float(paid), "paid": True}

    async with contextlib.AsyncExitStack() as stack:
        market = rest.Market(await stack.enter_async_context(configuration.market()))
        payment = rest.Payment(await stack.enter_async_context(configuration.payment()))
        activity = rest.Activity(await stack.enter_async_context(configuration.activity()))
        for key in activities:
            with contextlib.suppress(Exception):
                await (await activity.use_activity(key)).destroy()
        limits = {}
        for key in agreements:
            agreement = rest.market.Agreement(market._api, key)
            if await agreement.terminate(_REASON) or await _is_over(agreement):
                ended[key] = {"agreement_state": "terminated"}
                limits[key] = most_for((await agreement.get_details()), datetime.now(UTC))
        if allocation_id is not None:
            allocation = await payment.allocation(allocation_id)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(INVOICES_S):
                    await pay(payment, allocation, limits, note)
            await allocation.delete()
    return ended


async def _is_over(agreement: Any) -> bool:
    """Whether somebody else has ended it: it is to be paid all the same."""
    with contextlib.suppress(Exception):
        details = await agreement.get_details()
        return str(details.raw_details.state) in ("Terminated", "Expired")
    return False


def most_for(details: Any, now: datetime) -> Decimal:
    """What an agreement (yapapi's details of it) can have cost at most until ``now``."""
    raw = details.raw_details
    end = min(now, raw.valid_to) if raw.valid_to else now
    begun = raw.approved_date or raw.timestamp
    return most(details.provider_view.properties, max(0.0, (end - begun).total_seconds()))


async def pay(
    payment: Any,
    allocation: Any,
    limits: dict[str, Decimal],
    on_paid: Callable[[str, Decimal], None],
) -> None:
    """Accept the invoices of these agreements as they come, until there is one for each.

    ``limits``: by agreement, what it can have cost; an invoice for more is left unpaid. Goes on
    until cancelled, whatever yagna says: it may be about to come back. Needs no events.
    """
    owed = set(limits)
    while owed:
        with contextlib.suppress(Exception):
            async for invoice in payment.invoices():
                if invoice.agreement_id not in owed:
                    continue
                try:
                    amount = checked(invoice.amount, limits[invoice.agreement_id])
                except Overbilled as error:
                    owed.discard(invoice.agreement_id)
                    print(f"cpodfs: {invoice.issuer_id} {error}", file=sys.stderr)
                    continue
                if invoice.status == "RECEIVED":
                    await invoice.accept(amount=amount, allocation=allocation)
                owed.discard(invoice.agreement_id)
                on_paid(invoice.agreement_id, amount)
        await asyncio.sleep(_POLL_S)


def main() -> int:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logging.basicConfig(level=logging.CRITICAL)
    job = json.loads(sys.stdin.read())
    try:
        ended = asyncio.run(clean_up(job["agreements"], job["activities"], job["allocation"]))
    except Exception as error:  # noqa: BLE001 - yagna may fail in any way
        print(f"cpodfs: yagna cannot be used: {describe(error)}")
        return 1
    json.dump(ended, out)
    out.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
