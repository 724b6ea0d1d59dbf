"""The agreements of a provider run, signed only while what they cost at once fits into the budget.

asyncio; imports yapapi and `provider_status`. An offer is scored long before it is signed, and
others are signed meanwhile: so what is left is looked at again at the one place where yapapi picks
an offer, under its lock, and a price counts from the signature on.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from yapapi.agreements_pool import AgreementsPool
from yapapi.engine import Job

from cpodfs.runs.provider_bills import price_of
from cpodfs.runs.provider_status import Status


def affordable(properties: dict[str, Any], left: Decimal) -> bool:
    """Whether an offer's start price, and its work until it can be stopped, can be paid."""
    price = price_of(properties)
    return price.start + price.ahead() <= left


class Pool(AgreementsPool):  # type: ignore[misc]
    """Signs what ``status`` can afford. Offers that it cannot stay where they are, for later."""

    def __init__(self, job: Job, status: Status) -> None:
        engine = job.engine
        super().__init__(job.emit, engine.recycle_offer, market_api=engine._market_api)
        self._status = status

    async def _get_agreement(self) -> Any:
        offers = self._offer_buffer
        left = self._status.budget - self._status.committed()
        dear = {
            key: offer
            for key, offer in offers.items()
            if not affordable(offer.proposal.props, left)
        }
        for key in dear:
            del offers[key]
        try:
            # It picks before it first waits.
            agreement = await super()._get_agreement()
        finally:
            for key, offer in dear.items():
                offers.setdefault(key, offer)
        if agreement is not None:
            price = price_of(agreement.details.provider_view.properties)
            self._status.prices[agreement.id] = price
        return agreement

    def too_dear(self) -> int:
        """How many offers wait that cost more at once than is left."""
        left = self._status.budget - self._status.committed()
        waiting = self._offer_buffer.values()
        return sum(not affordable(offer.proposal.props, left) for offer in waiting)
