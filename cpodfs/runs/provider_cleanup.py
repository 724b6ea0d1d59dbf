"""Ends what a run left at the market when its process or program did not: ``… provider_cleanup``.

asyncio and yapapi's REST clients, in a process of its own that the supervisor starts. stdin: one
JSON object, see `clean_up`; stdout: what became of each agreement, {id: {agreement_state, spent,
accepted, paid}}, and under "released" whether the allocations are. All is paid from the run's own
allocations, so that the budget stays a limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
import time
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import aiohttp
from ya_payment import ApiException
from yapapi import rest
from yapapi.config import ApiConfig

from cpodfs.runs.provider_bills import SLACK_S, checked
from cpodfs.runs.provider_ends import GONE, Payer, destroy, release, terminate, unsubscribe
from cpodfs.runs.provider_errors import describe
from cpodfs.runs.provider_link import GRACE_S, is_open, is_owed
from cpodfs.runs.provider_remote import Yagna
from cpodfs.runs.provider_status import Price

INVOICES_S = 15.0
IDLE_INVOICES_S = 2.0
"""How long invoices are waited for when nobody is known to have worked."""
_POLL_S = 0.5
_WAIT_S = GRACE_S - 14.0
"""From the start until no invoice is waited for any more; the start of this process comes before, the
release of the money after it."""
_MESSAGE = "The requestor's process died"


class WrongYagna(Exception):
    """It is not the one that the run had hired with: what it does not know proves nothing."""


async def clean_up(job: dict[str, Any]) -> dict[str, Any]:
    """Destroy activities, terminate agreements, pay what is billed. Waits for `INVOICES_S` at most.

    ``job``: agreements as in the record, `provider_status.Hired.shown` or `gateway_books.Rented`'s;
    payer, begun, expires and signing as there; demands: to be unsubscribed; allocations: from which
    bills are paid; last: whether what has not been billed is forgotten; until: when the run ended, or
    null. Raises WrongYagna.
    """
    configuration = rest.Configuration(ApiConfig())
    async with contextlib.AsyncExitStack() as stack:
        market = rest.Market(await stack.enter_async_context(configuration.market()))._api
        payments = await stack.enter_async_context(configuration.payment())
        payment = rest.Payment(payments)
        control = rest.Activity(await stack.enter_async_context(configuration.activity()))._api
        session = await stack.enter_async_context(
            aiohttp.ClientSession(headers=payments.default_headers)
        )
        yagna = Yagna(session, configuration.root_url, lambda _text: None)
        await _check_yagna(yagna, payment, job["payer"])
        debts = Debts(job)
        await asyncio.gather(
            *(unsubscribe(market, key) for key in job["demands"]),
            *(debts.end(control, market, one) for one in job["agreements"]),
            *(debts.forget(market, key) for key in job["signing"]),
        )
        await debts.pay(payment)
        await debts.release(payment)
    return debts.ended


async def _check_yagna(yagna: Yagna, payment: Any, payer: str | None) -> None:
    """One that has just started knows its identity, and no accounts."""
    identity = await yagna.look()
    if identity is None:
        raise TimeoutError
    if payer not in (None, identity) and payer not in [
        one.address async for one in payment.accounts()
    ]:
        raise WrongYagna(f"another yagna, {identity}, which does not pay from {payer}")


class Debts:
    """``ended``: what became of each agreement, as the job's sender expects it."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._job = job
        self._begun = time.monotonic()
        self._limits: dict[str, Decimal] = {}
        self._signing = set(job["signing"])
        self.ended: dict[str, Any] = {one["agreement"]: {} for one in job["agreements"]}

    async def end(self, control: Any, market: Any, one: dict[str, Any]) -> None:
        """Destroy one's activity, terminate its agreement; or see that its time is over."""
        key, was_over = one["agreement"], not is_open(one)
        if not was_over:
            for activity in one.get("activities") or filter(None, [one["activity"]]):
                await destroy(control, activity)
            if await terminate(market, key, _MESSAGE):
                self.ended[key]["agreement_state"] = "terminated"
            elif self._is_expired():
                # yagna calls it approved for ever when its provider cannot be told.
                self.ended[key]["agreement_state"] = "expired"
                if is_owed(one):
                    self.ended[key]["error"] = (
                        f"never billed; at most {_most(one, None):f} GLM are owed"
                    )
        # One that nobody had ended until now may have gone on all the time.
        self._limits[key] = _most(one, self._job["until"] if was_over else None)

    async def forget(self, market: Any, key: str) -> None:
        """End an agreement of which it is not known whether it was signed."""
        if await terminate(market, key, _MESSAGE) or self._is_expired():
            self._signing.discard(key)

    def _is_expired(self) -> bool:
        expires = self._job["expires"]
        return expires is not None and datetime.fromisoformat(expires) < datetime.now(UTC)

    async def pay(self, payment: Any) -> None:
        """Pay what is billed, and what may be soon."""

        def check(key: str, billed: Any) -> Decimal:
            return checked(billed, self._limits[key])

        def on_paid(key: str, paid: Decimal) -> None:
            amount = float(paid)
            self.ended[key] |= {"spent": amount, "accepted": amount, "paid": True}
            # It is sent when the agreement is over, whatever yagna says.
            self.ended[key]["agreement_state"] = "terminated"

        def on_refused(key: str, why: str) -> None:
            self.ended[key] |= {"refused": True, "error": why}

        found = [await _allocation(payment, key) for key in self._job["allocations"]]
        allocations = [allocation for allocation in found if allocation is not None]
        if not allocations:
            return
        begun = datetime.fromisoformat(self._job["begun"]) if self._job["begun"] else None
        payer = Payer(payment._api, allocations, begun, check, on_paid, on_refused)
        worked = any(one["activity"] for one in self._job["agreements"])
        # What has been learnt is to be told in time: whoever started us waits no longer than `GRACE_S`.
        left_s = max(0.5, _WAIT_S - (time.monotonic() - self._begun))
        wait_s = min(left_s, INVOICES_S if worked else IDLE_INVOICES_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while True:
                    with contextlib.suppress(Exception):
                        await payer.round()
                    if not self._late():
                        break
                    await asyncio.sleep(_POLL_S)

    async def release(self, payment: Any) -> None:
        """Release the allocations if nothing is open and owed any more."""
        for one in self._now():
            given_up = self._job["last"] or self._is_expired()
            if given_up and is_owed(one) and not is_open(one):
                self.ended[one["agreement"]] |= {
                    "agreement_state": "expired",
                    "error": "never billed",
                }
        if any(is_owed(one) or is_open(one) for one in self._now()) or self._signing:
            return
        released = [await release(payment._api, key) for key in self._job["allocations"]]
        self.ended["released"] = all(released)

    def _now(self) -> list[dict[str, Any]]:
        return [one | self.ended[one["agreement"]] for one in self._job["agreements"]]

    def _late(self) -> bool:
        """Whether somebody who can be reached has not billed yet."""
        return any(is_owed(one) and not is_open(one) for one in self._now())


async def _allocation(payment: Any, key: str) -> Any:
    """None when it is released already: then nothing can be paid from it."""
    try:
        return await payment.allocation(key)
    except ApiException as error:
        if error.status in GONE:
            return None
        raise


def _most(one: dict[str, Any], until: str | None) -> Decimal:
    """What an agreement can have cost at most until the run's end, or now."""
    end = datetime.now(UTC) if until is None else datetime.fromisoformat(until)
    price = Price(*(Decimal(str(one["price"][key])) for key in ("start", "a_second")))
    passed = end - datetime.fromisoformat(one["signed"])
    return price.most(max(0.0, passed.total_seconds()) + SLACK_S)


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
