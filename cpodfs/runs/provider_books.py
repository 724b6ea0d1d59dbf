"""Who works for a provider run, what they bill, and what they are paid, by yapapi's events.

asyncio, in the provider run's own process; imports `provider_bills` and `provider_status`.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from yapapi import events

from cpodfs.runs.provider_bills import Bills, Overbilled, price_of
from cpodfs.runs.provider_errors import describe
from cpodfs.runs.provider_status import Hired, Reporter, Status

SETTLE_S = 20.0
VANISHED_SETTLE_S = 3.0
"""How long the invoice of a provider that has vanished is waited for."""


class Books:
    """Turns yapapi's events into the status: who was hired, what was billed, what was paid."""

    def __init__(self, reporter: Reporter, bills: Bills) -> None:
        self._reporter = reporter
        self._bills = bills
        self.changed = asyncio.Event()

    def __call__(self, event: Any) -> None:
        status = self._reporter.status
        match event:
            case events.ProposalReceived():
                if event.proposal.is_draft is False:
                    status.offers += 1
            case events.AgreementConfirmed():
                hired = hired_for(status, event.agreement)
                self._bills.signed(hired.agreement, hired.price)
                # At once: whoever cleans up after us must know of it.
                self._reporter.tell()
            case events.AgreementTerminated() | events.InvoiceReceived() | events.InvoiceAccepted():
                self._on_agreement(event, status.hired.get(event.agreement.id))
            case events.PaymentFailed():
                self._reporter.note(f"payment failed: {describe(event.exc_info[1])}")
        self._reporter.changed()
        self.changed.set()

    def _on_agreement(self, event: Any, hired: Hired | None) -> None:
        if hired is None:
            return
        if isinstance(event, events.AgreementTerminated):
            if hired.agreement_state == "approved":
                hired.agreement_state = "terminated"
            return
        try:
            billed = self._bills.checked(hired.agreement, event.invoice.amount)
        except Overbilled as error:
            self.refuse(hired.agreement, str(error))
            return
        hired.spent = billed
        if isinstance(event, events.InvoiceAccepted):
            hired.accepted, hired.paid = billed, True

    async def settle(self, limit_s: Callable[[], float]) -> list[str]:
        """Wait until all that worked for us are paid; why some are not, each with its name.

        ``limit_s``: how long in all; asked every second, for it may become less. Providers that
        have vanished are waited for `VANISHED_SETTLE_S` only, and not named. Who has billed too
        much is not waited for: another invoice will not come.
        """
        self._reporter.phase("settling")
        loop = asyncio.get_running_loop()
        begun = loop.time()
        while owed := self.owed():
            waited = loop.time() - begun
            gone = all(one.agreement_state == "vanished" for one in owed)
            left = min(limit_s(), VANISHED_SETTLE_S if gone else math.inf) - waited
            if left <= 0:
                break
            self.changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.changed.wait(), min(left, 1.0))
        late = [f"no invoice from {one.name}" for one in owed if one.agreement_state != "vanished"]
        hired = self._reporter.status.hired.values()
        return late + [f"{one.name} {one.error}" for one in hired if one.refused]

    def paid(self, agreement: str, amount: Decimal) -> None:
        """Somebody else than yapapi has paid an invoice."""
        hired = self._reporter.status.hired[agreement]
        hired.spent, hired.accepted, hired.paid = amount, amount, True
        self._reporter.changed()
        self.changed.set()

    def refuse(self, agreement: str, why: str) -> None:
        """An invoice is not paid."""
        hired = self._reporter.status.hired[agreement]
        hired.refused, hired.error = True, why
        self._reporter.changed()
        self.changed.set()

    def owed(self) -> list[Hired]:
        """Those who worked for us, and are neither paid nor have billed too much."""
        hired = self._reporter.status.hired.values()
        return [one for one in hired if one.activity and not (one.paid or one.refused)]


def hired_for(status: Status, agreement: Any) -> Hired:
    """The status's entry of an agreement, made when it is new."""
    if agreement.id not in status.hired:
        said = str(agreement.details.provider_node_info.name or "?")
        name = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in said[:100])
        provider_id = agreement.details.raw_details.offer.provider_id
        price = price_of(agreement.details.provider_view.properties)
        signed = datetime.now(UTC).isoformat(timespec="milliseconds")
        hired = Hired(name, str(provider_id), agreement.id, signed=signed, price=price)
        status.hired[agreement.id] = hired
    return status.hired[agreement.id]
