"""Who works for a provider run, what they bill, and what they are paid.

asyncio, in the provider run's own process; imports `provider_bills` and `provider_status`. yapapi's
events tell who was hired; what is billed and paid is told by `provider_ends.Payer`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from yapapi import events

from cpodfs.runs.provider_bills import Bills, price_of
from cpodfs.runs.provider_status import Hired, Reporter, Status

SETTLE_S = 20.0
"""How long invoices are waited for; later ones are paid by whoever settles debts."""


class Books:
    """Turns yapapi's events into the status, and keeps it true to what is paid."""

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
        self._tell()

    def check(self, agreement: str, billed: Any) -> Decimal:
        """What is billed for an agreement of ours. Raises Overbilled, or KeyError if it is not ours."""
        hired = self._reporter.status.hired[agreement]
        amount = self._bills.checked(agreement, billed)
        hired.spent = max(hired.spent, amount)
        return amount

    async def settle(self, limit_s: Callable[[], float]) -> list[str]:
        """Wait until all that worked for us are paid; what is not, in words.

        ``limit_s``: how long in all; asked every second, for it may become less. Providers that
        have vanished are not waited for, nor those who have billed too much.
        """
        self._reporter.phase("settling")
        loop = asyncio.get_running_loop()
        begun = loop.time()
        while owed := [one for one in self.owed() if one.agreement_state != "vanished"]:
            left = limit_s() - (loop.time() - begun)
            if left <= 0:
                break
            self.changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.changed.wait(), min(left, 1.0))
        hired = self._reporter.status.hired.values()
        late = [f"no invoice from {one.name} yet" for one in owed]
        return late + [f"{one.name} {one.error}" for one in hired if one.refused]

    def paid(self, agreement: str, amount: Decimal) -> None:
        """An invoice is accepted."""
        hired = self._reporter.status.hired[agreement]
        if hired.activity_state == "ended":
            # It is sent when the agreement is over, whatever yagna says.
            hired.agreement_state = "terminated"
        hired.spent, hired.accepted, hired.paid = amount, amount, True
        self._tell()

    def refuse(self, agreement: str, why: str) -> None:
        """An invoice is not paid."""
        hired = self._reporter.status.hired[agreement]
        hired.refused, hired.error = True, why
        self._tell()

    def owed(self) -> list[Hired]:
        """Those who worked for us, and are neither paid nor have billed too much."""
        hired = self._reporter.status.hired.values()
        return [one for one in hired if one.activity and not (one.paid or one.refused)]

    def _tell(self) -> None:
        self._reporter.changed()
        self.changed.set()


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
