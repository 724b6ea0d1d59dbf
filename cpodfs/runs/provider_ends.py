"""The ends of what was begun at a market: activities destroyed, agreements terminated, bills paid.

asyncio; imports yapapi's REST clients, `provider_bills` and `provider_errors`. Used by the run's own
process and by `provider_cleanup` after it. Nothing here trusts that a call which failed had no
effect, nor that one which succeeded will be followed by an event: yagna is asked for what is there.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

from ya_payment import ApiException, models

from cpodfs.runs.provider_bills import Overbilled

GONE = (404, 410)
"""yagna's words for what it does not know, or not any more."""
CALL_S = 7.0
"""For one call: yagna's own to a provider that does not answer may have no limit."""
RUN_OVER = "The run is over"
_OPEN = ("Approved", "Pending")
"""States of an agreement that binds, or may."""
_OVER_THERE = "Remote Terminate: Can't finish operation"


async def destroy(api: Any, activity: str) -> bool:
    """Destroy an activity; whether it surely is. ``api``: ya_activity's for control."""
    return await _surely(api.destroy_activity(activity))


async def unsubscribe(api: Any, demand: str) -> None:
    """Take a demand back; one that yagna has forgotten is. ``api``: ya_market's."""
    with contextlib.suppress(Exception):
        async with asyncio.timeout(CALL_S):
            await api.unsubscribe_demand(demand)


async def terminate(api: Any, agreement: str, message: str) -> bool:
    """Terminate an agreement; whether it surely is over. ``api``: ya_market's."""
    code = "Success" if message == RUN_OVER else "Cancelled"
    reason = {"message": message, "golem.requestor.code": code}
    try:
        async with asyncio.timeout(CALL_S):
            await api.terminate_agreement(agreement, request_body=reason)
            return True
    except Exception as error:  # noqa: BLE001 - yagna may fail in any way
        # Over at the provider, which has heard of an end whose answer was lost.
        if _OVER_THERE in str(getattr(error, "body", "")):
            return True
    return await is_over(api, agreement)


async def is_over(api: Any, agreement: str) -> bool:
    """Whether an agreement has ended, or yagna knows nothing of it. False when it cannot be told."""
    try:
        async with asyncio.timeout(CALL_S):
            state = (await api.get_agreement(agreement)).state
    except Exception as error:  # noqa: BLE001 - yagna may fail in any way
        return getattr(error, "status", None) in GONE
    return str(state) not in _OPEN


class Payer:
    """Accepts what providers bill for the agreements of one run, from its allocations.

    ``api``: ya_payment's. ``begun``: nothing billed before is looked at, if it is known. ``check(agreement, amount)``:
    the amount if it may be paid; raises Overbilled; KeyError for an agreement of somebody else.
    ``on_paid(agreement, amount)`` and ``on_refused(agreement, why)`` are told of invoices.
    """

    def __init__(
        self,
        api: Any,
        allocations: Sequence[Any],
        begun: datetime | None,
        check: Callable[[str, Any], Decimal],
        on_paid: Callable[[str, Decimal], None],
        on_refused: Callable[[str, str], None],
    ) -> None:
        self._api = api
        self._allocations = allocations
        self._since = {} if begun is None else {"after_timestamp": begun}
        self._check = check
        self._on_paid = on_paid
        self._on_refused = on_refused
        self._settled: set[str] = set()
        self._paid: set[str] = set()

    async def round(self) -> None:
        """Accept all that has come. Raises what yagna says; another round begins where it failed."""
        async with asyncio.timeout(2 * CALL_S):
            for note in await self._api.get_debit_notes(**self._since):
                await self._accept_note(note)
            for invoice in await self._api.get_invoices(**self._since):
                # One that yagna refuses must not keep the others waiting.
                with contextlib.suppress(ApiException):
                    await self._accept_invoice(invoice)

    async def forever(self, pause_s: float) -> None:
        """Rounds until cancelled, whatever yagna says: it may be about to come back."""
        while True:
            with contextlib.suppress(Exception):
                await self.round()
            await asyncio.sleep(pause_s)

    async def _accept_note(self, note: Any) -> None:
        if note.status != "RECEIVED" or note.debit_note_id in self._settled:
            return
        try:
            amount = self._check(note.agreement_id, note.total_amount_due)
        except (KeyError, Overbilled):
            # Its invoice is refused in words; yagna cannot reject a note.
            return
        # One that is too late or too much for the allocation must not keep the invoices waiting.
        with contextlib.suppress(Exception):
            await self._accept(self._api.accept_debit_note, note.debit_note_id, note, amount)
            self._settled.add(note.debit_note_id)

    async def _accept_invoice(self, invoice: Any) -> None:
        key = invoice.invoice_id
        known = key in self._settled or invoice.agreement_id in self._paid
        if known or invoice.status not in ("RECEIVED", "ACCEPTED", "SETTLED"):
            return
        try:
            amount = self._check(invoice.agreement_id, invoice.amount)
        except KeyError:
            return
        except Overbilled as error:
            self._settled.add(key)
            self._on_refused(invoice.agreement_id, str(error))
            return
        if invoice.status == "RECEIVED":
            await self._accept(self._api.accept_invoice, key, invoice, amount)
        self._paid.add(invoice.agreement_id)
        self._on_paid(invoice.agreement_id, amount)

    async def _accept(self, call: Callable[..., Any], key: str, bill: Any, amount: Decimal) -> None:
        """From the first allocation of the bill's platform that has enough. Raises ApiException."""
        platform = bill.payment_platform
        fitting = [one for one in self._allocations if one.payment_platform == platform]
        *others, last = fitting or self._allocations
        for allocation in (*others, last):
            acceptance = models.Acceptance(
                total_amount_accepted=f"{amount:f}", allocation_id=allocation.id
            )
            try:
                await call(key, acceptance)
            except ApiException:
                if allocation is last:
                    raise
            else:
                return


async def release(api: Any, allocation: str) -> bool:
    """Release an allocation; whether it surely is. ``api``: ya_payment's."""
    return await _surely(api.release_allocation(allocation))


async def _surely(call: Awaitable[Any]) -> bool:
    """Whether a call that takes something away has done so, or there is nothing of it."""
    try:
        async with asyncio.timeout(CALL_S):
            await call
    except Exception as error:  # noqa: BLE001 - yagna may fail in any way
        return getattr(error, "status", None) in GONE
    return True
