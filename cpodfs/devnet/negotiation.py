"""Who offers what to whom, and who has signed: demands to agreements, and their ends.

Imports `agreements`, `constraints`, `pace`, `provider`, `rest`. A provider serves one agreement at a
time (`Provider.busy_with`): while it does, it offers nothing, and drafts asked of it are put off
until it is free again. What it offers is known to the requestor's daemon once it was broadcast.
`Negotiation` decides; the callbacks book what it decided.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from cpodfs.devnet.agreements import Agreement, Demand, Proposal
from cpodfs.devnet.constraints import ConstraintError, parse
from cpodfs.devnet.misbehave import Misbehaviour
from cpodfs.devnet.pace import Pace
from cpodfs.devnet.provider import Provider
from cpodfs.devnet.rest import Json, Problem, Signal, log, stamp

MAX_DEMANDS = 1000
MAX_KEPT_EVENTS = 1000
MAX_AGREEMENTS = 1000
DEMAND_S = 3600.0
"""How long yagna keeps a demand."""
_LIVING = ("Proposal", "Approved")

Booker = Callable[[Agreement], None]
Closer = Callable[[Agreement, str], Awaitable[None]]


class Negotiation:
    """``on_approved`` and ``on_terminated`` book what an agreement is to its requestor; ``on_ending``
    ends its activities and bills it."""

    def __init__(
        self,
        providers: Sequence[Provider],
        requestor_id: str,
        misbehave: Misbehaviour,
        on_approved: Booker,
        on_terminated: Booker,
        on_ending: Closer,
        pace: Pace,
        seed: int,
    ) -> None:
        self.providers = providers
        self.requestor_id = requestor_id
        self.demands: dict[str, Demand] = {}
        self.proposals: dict[str, Proposal] = {}
        self.agreements: dict[str, Agreement] = {}
        self.events: list[tuple[str | None, Json]] = []
        """Each with the session of its agreement."""
        self.changed = Signal()
        self._misbehave = misbehave
        self._on_approved = on_approved
        self._on_terminated = on_terminated
        self._on_ending = on_ending
        self._put_off: list[Proposal] = []
        self._pace = pace
        # Not a provider's dice: when something is broadcast must not change what else they decide.
        self._dice = random.Random(seed)  # noqa: S311 - repeatable on purpose
        self._heard: set[str] = set()
        self._broadcasts: dict[str, asyncio.TimerHandle] = {}

    # --- what is heard of offers ---

    def open(self) -> None:
        """Let providers make their offers. Needs the event loop, as timers run from here on."""
        for provider in self.providers:
            self._make_offer(provider)

    def close(self) -> None:
        """Nothing is broadcast any more."""
        for timer in self._broadcasts.values():
            timer.cancel()
        self._broadcasts.clear()

    def forget(self) -> None:
        """What the daemon has in memory: demands, with all that was said of them, and offers."""
        for demand in list(self.demands.values()):
            self.unsubscribe(demand)
        self.proposals.clear()
        self._put_off.clear()
        self._heard.clear()

    def _make_offer(self, provider: Provider) -> None:
        if self._pace.offer_delay_s == 0:
            self._broadcast(provider)
        else:
            self._later(provider, self._pace.offer_delay_s)

    def _later(self, provider: Provider, delay_s: float) -> None:
        loop = asyncio.get_running_loop()
        self._broadcasts[provider.node_id] = loop.call_later(delay_s, self._broadcast, provider)

    def _broadcast(self, provider: Provider) -> None:
        self._heard.add(provider.node_id)
        for demand in self.demands.values():
            self._offer(provider, demand)
        self._later(provider, self._dice.uniform(0.5, 1.5) * self._pace.offer_interval_s)

    def _withdraw_offer(self, provider: Provider) -> None:
        self._heard.discard(provider.node_id)
        if (timer := self._broadcasts.pop(provider.node_id, None)) is not None:
            timer.cancel()

    # --- demands and proposals ---

    def subscribe(self, properties: Json, constraints: str) -> Demand:
        """A new demand; what is heard of by then and fits is offered at once. Raises Problem."""
        if len(self.demands) >= MAX_DEMANDS:
            raise Problem(429, "too many demands")
        try:
            wanted = parse(constraints)
        except ConstraintError as error:
            # yagna takes it as well: it matches nothing.
            log.warning("constraints_broken reason=%r", str(error))
            wanted = parse("(!(&))")
        demand = Demand(properties, constraints, wanted)
        self.demands[demand.id] = demand
        for provider in self.providers:
            self._offer(provider, demand)
        return demand

    def unsubscribe(self, demand: Demand) -> None:
        self.demands.pop(demand.id, None)
        self._put_off = [said for said in self._put_off if said.demand is not demand]
        demand.changed.fire()

    def _offer(self, provider: Provider, demand: Demand) -> None:
        idle = provider.node_id in self._heard and not (provider.busy_with or provider.gone)
        if self._misbehave.no_offers or not idle or provider.node_id in demand.offered:
            return
        if not provider.fits(demand.properties, demand.wanted):
            return
        demand.offered.add(provider.node_id)
        offer = (provider.node_id, "Initial", provider.offer, provider.constraints)
        self._tell(Proposal(demand, provider, *offer))

    def _tell(self, proposal: Proposal) -> None:
        self.proposals[proposal.id] = proposal
        proposal.demand.tell(proposal.event())

    def counter(
        self, demand: Demand, previous: Proposal, properties: Json, constraints: str
    ) -> Proposal:
        """The requestor's answer to a proposal. The provider's follows as an event."""
        try:
            wanted = parse(constraints)
        except ConstraintError as error:
            raise Problem(400, f"constraints: {error}") from None
        provider = previous.provider
        said = Proposal(
            *(demand, provider, self.requestor_id, "Draft", properties, constraints, previous)
        )
        self.proposals[said.id] = said
        if provider.gone:
            return said
        if provider.draws(self._misbehave.reject_proposals):
            self._reject(said, "the provider does not want this (injected)")
        elif not provider.fits(properties, wanted):
            self._reject(said, "offer and demand do not match")
        elif _expires_s(properties) < self._pace.min_expiration_s:
            self._reject(said, "Proposal expires too early: a provider wants at least 5 min")
        elif not provider.takes(properties):
            self._reject(said, "no common payment platform")
        elif provider.busy_with:
            self._put_off.append(said)
        else:
            self._draft(said)
        return said

    def _draft(self, said: Proposal) -> None:
        provider = said.provider
        offer = (provider.node_id, "Draft", provider.draft(said.properties), provider.constraints)
        self._tell(Proposal(said.demand, provider, *offer, previous=said))

    def _reject(self, said: Proposal, reason: str) -> None:
        event = {
            "eventType": "ProposalRejectedEvent",
            "eventDate": stamp(),
            "proposalId": said.id,
            "reason": {"message": reason},
        }
        said.demand.tell(event)

    def turn_down(self, proposal: Proposal) -> None:
        """The requestor rejects a provider's proposal."""
        self.proposals[proposal.id] = replace(proposal, state="Rejected")

    # --- agreements ---

    def create_agreement(self, proposal_id: str, valid_to: str) -> Agreement:
        proposal = self.proposals.get(proposal_id)
        if proposal is None:
            raise Problem(404, f"proposal {proposal_id} is not known")
        if proposal.state != "Draft" or proposal.issuer_id == self.requestor_id:
            raise Problem(400, f"proposal {proposal_id} is not a provider's draft")
        agreement = Agreement(proposal, valid_to, self.requestor_id)
        self.agreements[agreement.id] = agreement
        return agreement

    def confirm(self, agreement: Agreement) -> None:
        """The requestor signs; the provider does too, unless it serves another by now."""
        if agreement.state != "Proposal":
            raise Problem(410, f"agreement {agreement.id} is {agreement.state}")
        provider = agreement.provider
        if provider.gone:
            return
        if provider.busy_with:
            agreement.state = "Rejected"
            self._record("AgreementRejectedEvent", agreement, reason={"message": "busy"})
        else:
            provider.busy_with = agreement.id
            self._withdraw_offer(provider)
            agreement.state, agreement.approved = "Approved", stamp()
            agreement.idle_since = time.monotonic()
            for demand in self.demands.values():
                demand.offered.discard(provider.node_id)
            self._on_approved(agreement)
            self._record("AgreementApprovedEvent", agreement)
        agreement.changed.fire()

    def cancel(self, agreement: Agreement) -> None:
        if agreement.state != "Proposal":
            raise Problem(410, f"agreement {agreement.id} is {agreement.state}")
        agreement.state = "Cancelled"
        self._record("AgreementCancelledEvent", agreement)
        agreement.changed.fire()

    async def terminate(self, agreement: Agreement, terminator: str, reason: Json) -> None:
        """End an approved agreement for good; its provider is free afterwards.

        Raises Problem when the provider does not answer: the agreement stays as it is.
        """
        if agreement.state != "Approved":
            said = f"Can't update Agreement state from {agreement.state} to Terminated."
            raise Problem(410, said)
        if agreement.provider.gone:
            service = "market/protocol/mk1/negotiation/agreement/TerminateAgreement"
            why = agreement.provider.unreachable(service).message
            raise Problem(500, f"Protocol error while terminating: {why}")
        if agreement.terminated_there:
            said = f"Can't finish operation on Agreement [{agreement.id}] due to internal error."
            raise Problem(500, f"Protocol error while terminating: Remote Terminate: {said}")
        agreement.state = "Terminated"
        self._on_terminated(agreement)
        message = str(reason.get("message", ""))
        try:
            await self.close_agreement(agreement, message)
        finally:
            details = {"terminator": terminator, "reason": {"message": message, **reason}}
            self._record("AgreementTerminatedEvent", agreement, signature="", **details)
            agreement.changed.fire()

    async def close_agreement(self, agreement: Agreement, message: str) -> None:
        """The provider ends and bills an agreement, and is free; no more than that happens."""
        if agreement.closed:
            return
        agreement.closed = True
        try:
            await self._on_ending(agreement, message)
        finally:
            agreement.provider.busy_with = None
            self._is_free(agreement.provider)

    def _is_free(self, provider: Provider) -> None:
        waiting = [said for said in self._put_off if said.provider is provider]
        self._put_off = [said for said in self._put_off if said.provider is not provider]
        for said in waiting:
            self._draft(said)
        self._make_offer(provider)

    def _record(self, kind: str, agreement: Agreement, **details: object) -> None:
        event = {"eventType": kind, "eventDate": stamp(), "agreementId": agreement.id, **details}
        self.events.append((agreement.session, event))
        del self.events[:-MAX_KEPT_EVENTS]
        self.changed.fire()

    # --- what is kept of what is over ---

    def clear_up(self) -> None:
        """Forget demands whose time is over, and the agreements that ended first of very many."""
        for demand in list(self.demands.values()):
            if time.monotonic() - demand.made > DEMAND_S:
                self.unsubscribe(demand)
        over = [key for key, one in self.agreements.items() if one.state not in _LIVING]
        for key in over[: max(0, len(self.agreements) - MAX_AGREEMENTS)]:
            del self.agreements[key]
        used = {agreement.proposal.id for agreement in self.agreements.values()}
        for key, proposal in list(self.proposals.items()):
            if proposal.demand.id not in self.demands and key not in used:
                del self.proposals[key]


def _expires_s(properties: Json) -> float:
    """How long a demand says that the computation may take, from now (s)."""
    at_ms = properties.get("golem.srv.comp.expiration")
    return at_ms / 1000 - time.time() if isinstance(at_ms, int | float) else 0.0
