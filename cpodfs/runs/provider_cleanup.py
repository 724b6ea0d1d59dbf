"""Ends what a provider run left at the market when its process died: ``… provider_cleanup``.

asyncio and yapapi's REST clients, in a process of its own that the supervisor starts. stdin: one
JSON object, see `clean_up`; stdout: what became of
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
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import ya_market
from ya_payment.exceptions import ApiException
from yapapi import rest
from yapapi.config import ApiConfig

from cpodfs.runs.provider_bills import SLACK_S, Overbilled, checked
from cpodfs.runs.provider_errors import describe
from cpodfs.runs.provider_link import is_owed
from cpodfs.runs.provider_status import Price

INVOICES_S = 15.0
IDLE_INVOICES_S = 2.0
"""How long invoices are waited for when nobody is known to have worked."""
GONE = (404, 410)
"""yagna's words for what it does not know, or not any more."""
_POLL_S = 0.5
_REASON = {"message": "The requestor's process died", "golem.requestor.code": "Cancelled"}


class WrongYagna(Exception):
    """It is not the one that the run had hired with: what it does not know proves nothing."""


async def clean_up(job: dict[str, Any]) -> dict[str, Any]:
    """Destroy activities, terminate agreements, pay what is billed. Waits for `INVOICES_S` at most.

    ``job``: agreements as in the record, `provider_status.Hired.shown` or `gateway_books.Rented`'s;
    payer as there; demands: to be unsubscribed; allocations: from which bills are paid; last: whether
    these are released though not all is paid; until: when the run ended, or null. Raises WrongYagna.
    """
    configuration = rest.Configuration(ApiConfig())
    ended: dict[str, Any] = {}

    def on_paid(key: str, paid: Decimal) -> None:
        ended[key] |= {"spent": float(paid), "accepted": float(paid), "paid": True}

    def on_refused(key: str, why: str) -> None:
        ended[key] |= {"refused": True, "error": why}

    async with contextlib.AsyncExitStack() as stack:
        market = rest.Market(await stack.enter_async_context(configuration.market()))
        payment = rest.Payment(await stack.enter_async_context(configuration.payment()))
        activity = rest.Activity(await stack.enter_async_context(configuration.activity()))
        await _check_payer(payment, job["payer"])
        limits = {}
        for demand in job["demands"]:
            with contextlib.suppress(ya_market.ApiException):
                await market._api.unsubscribe_demand(demand)
        for one in job["agreements"]:
            for key in one.get("activities") or filter(None, [one["activity"]]):
                with contextlib.suppress(Exception):
                    await (await activity.use_activity(key)).destroy()
            key = one["agreement"]
            agreement = rest.market.Agreement(market._api, key)
            if await agreement.terminate(_REASON) or await is_over(agreement):
                ended[key] = {"agreement_state": "terminated"}
                # One that nobody had ended until now may have gone on all the time.
                over = one["agreement_state"] == "terminated"
                limits[key] = _most(one, job["until"] if over else None)
        found = [await _allocation(payment, key) for key in job["allocations"]]
        allocations = [allocation for allocation in found if allocation is not None]
        if allocations:
            worked = any(one["activity"] for one in job["agreements"])
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(INVOICES_S if worked else IDLE_INVOICES_S):
                    await pay(payment, allocations, limits, on_paid, on_refused)
            late = [
                one for one in job["agreements"] if is_owed(one | ended.get(one["agreement"], {}))
            ]
            if job["last"] or not late:
                for allocation in allocations:
                    await allocation.delete()
    return ended


async def _check_payer(payment: Any, payer: str | None) -> None:
    addresses = [account.address async for account in payment.accounts()]
    if payer is not None and payer not in addresses:
        raise WrongYagna(f"another yagna, which does not pay from {payer}")


def _most(one: dict[str, Any], until: str | None) -> Decimal:
    """What an agreement can have cost at most until the run's end, or now."""
    end = datetime.now(UTC) if until is None else datetime.fromisoformat(until)
    price = Price(*(Decimal(str(one["price"][key])) for key in ("start", "a_second")))
    passed = end - datetime.fromisoformat(one["signed"])
    return price.most(max(0.0, passed.total_seconds()) + SLACK_S)


async def _allocation(payment: Any, key: str | None) -> Any:
    """The run's allocation; None when it is released already: then nothing can be paid."""
    if key is None:
        return None
    try:
        return await payment.allocation(key)
    except ApiException as error:
        if error.status in GONE:
            return None
        raise


async def is_over(agreement: Any) -> bool:
    """Whether an agreement has ended, or yagna knows nothing of it. False when it cannot be told."""
    try:
        details = await agreement.get_details()
    except Exception as error:  # noqa: BLE001 - yagna may fail in any way
        return getattr(error, "status", None) in GONE
    return str(details.raw_details.state) in ("Terminated", "Expired", "Rejected", "Cancelled")


async def pay(
    payment: Any,
    allocations: Sequence[Any],
    limits: dict[str, Decimal],
    on_paid: Callable[[str, Decimal], None],
    on_refused: Callable[[str, str], None],
) -> None:
    """Accept the invoices of these agreements as they come, until there is one for each.

    ``limits``: by agreement, what it can have cost; an invoice for more is refused, with a reason.
    Goes on until cancelled, whatever yagna says: it may be about to come back. Needs no events.
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
                    on_refused(invoice.agreement_id, str(error))
                    continue
                if invoice.status == "RECEIVED":
                    await _accept(invoice, amount, allocations)
                elif invoice.status not in ("ACCEPTED", "SETTLED"):
                    continue
                owed.discard(invoice.agreement_id)
                on_paid(invoice.agreement_id, amount)
        await asyncio.sleep(_POLL_S)


async def _accept(invoice: Any, amount: Decimal, allocations: Sequence[Any]) -> None:
    """From the first allocation of its platform that has enough. Raises ApiException."""
    fitting = [one for one in allocations if one.payment_platform == invoice.payment_platform]
    *others, last = fitting or allocations
    for allocation in others:
        with contextlib.suppress(ApiException):
            await invoice.accept(amount=amount, allocation=allocation)
            return
    await invoice.accept(amount=amount, allocation=last)


def main() -> int:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logging.basicConfig(level=logging.CRITICAL)
    job = json.loads(sys.stdin.read())
    try:
        ended = asyncio.run(clean_up(job))
    except Exception as error:  # noqa: BLE001 - yagna may fail in any way
        print(f"cpodfs: yagna cannot be used: {describe(error)}")
        return 1
    json.dump(ended, out)
    out.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
