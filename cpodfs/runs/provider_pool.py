"""The agreements of a provider run, signed only while their start prices fit into the budget.

asyncio; imports yapapi and `provider_status`. An offer is scored long before it is signed, and
others are signed meanwhile: so what is left is looked at again at the one place where yapapi picks
an offer, under its lock, and a start price counts from the signature on.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from yapapi.agreements_pool import AgreementsPool
from yapapi.engine import Job

from cpodfs.runs.provider_bills import start_price
from cpodfs.runs.provider_status import Status


def affordable(price: Decimal, left: Decimal) -> bool:
    """Whether a start price leaves anything for the work. None at all is always affordable."""
    return not price or price < left


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
            if not affordable(start_price(offer.proposal.props), left)
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
            price = start_price(agreement.details.provider_view.properties)
            self._status.start_prices[agreement.id] = price
        return agreement

    def too_dear(self) -> int:
        """How many offers wait that cost more at once than is left."""
        left = self._status.budget - self._status.committed()
        prices = [start_price(offer.proposal.props) for offer in self._offer_buffer.values()]
        return len([price for price in prices if not affordable(price, left)])
