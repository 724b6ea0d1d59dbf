"""The agreements of a provider run, signed only while what they cost at once fits into the budget.

asyncio; imports yapapi and other ``provider_*`` modules. An offer is scored long before it is signed,
and others are signed meanwhile: so what is left is looked at again at the one place where yapapi picks
an offer, under its lock, and a price counts from the signature on. yapapi says that an agreement is
terminated whatever yagna has answered; here it is only when yagna says so.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

from yapapi.agreements_pool import AgreementsPool
from yapapi.engine import Job

from cpodfs.runs.provider_bills import price_of
from cpodfs.runs.provider_ends import RUN_OVER, is_over, terminate
from cpodfs.runs.provider_remote import Yagna
from cpodfs.runs.provider_status import Reporter


def affordable(properties: dict[str, Any], left: Decimal) -> bool:
    """Whether an offer's start price, and its work until it can be stopped, can be paid."""
    price = price_of(properties)
    return price.start + price.ahead() <= left


class Pool(AgreementsPool):  # type: ignore[misc]
    """Signs what the run can afford, with those whom it ``wants`` (by provider id). Offers of others
    stay where they are, for later."""

    def __init__(
        self, job: Job, yagna: Yagna, reporter: Reporter, wants: Callable[[str], bool]
    ) -> None:
        engine = job.engine
        super().__init__(job.emit, engine.recycle_offer, market_api=engine._market_api)
        self._yagna = yagna
        self._reporter = reporter
        self._status = reporter.status
        self._wants = wants

    async def _get_agreement(self) -> Any:
        offers = self._offer_buffer
        left = self._status.budget - self._status.committed()
        kept = {
            key: offer
            for key, offer in offers.items()
            if not (self._wants(key) and affordable(offer.proposal.props, left))
        }
        for key in kept:
            del offers[key]
        try:
            # It picks before it first waits.
            agreement = await super()._get_agreement()
        finally:
            for key, offer in kept.items():
                offers.setdefault(key, offer)
        if agreement is not None:
            price = price_of(agreement.details.provider_view.properties)
            self._status.prices[agreement.id] = price
        return agreement

    async def _prepare_agreement(
        self, agreement: Any, proposal: Any = None, requires_confirmation: bool = True
    ) -> Any:
        # Known from here on: a signature binds also when the answer to it is lost.
        self._status.signing.append(agreement.id)
        self._reporter.tell()
        confirmed = await super()._prepare_agreement(agreement, proposal, requires_confirmation)
        sure = confirmed is not None or (
            await is_over(self._market_api._api, agreement.id) and await self._yagna.is_same()
        )
        if sure and agreement.id in self._status.signing:
            self._status.signing.remove(agreement.id)
        return confirmed

    async def _terminate_agreement(self, agreement_id: str, reason: dict[str, str]) -> None:
        await self.end(agreement_id)

    async def end(self, agreement_id: str) -> None:
        """Terminate an agreement, which is not used again. Whoever settles tries once more if need be."""
        self._agreements.pop(agreement_id, None)
        hired = self._status.hired.get(agreement_id)
        ended = await terminate(self._market_api._api, agreement_id, RUN_OVER)
        if ended and hired is not None and await self._yagna.is_same():
            hired.agreement_state = "terminated"
            self._reporter.changed()

    def too_dear(self) -> int:
        """How many offers wait that cost more at once than is left."""
        left = self._status.budget - self._status.committed()
        waiting = self._offer_buffer.values()
        return sum(not affordable(offer.proposal.props, left) for offer in waiting)
