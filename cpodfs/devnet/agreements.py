"""Demands, proposals and agreements: the market's nouns, with no behaviour but their own.

Imports `constraints`, `provider`, `rest`. `Negotiation` moves them; nothing else changes them.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from dataclasses import dataclass, field

from cpodfs.devnet.constraints import Filter
from cpodfs.devnet.provider import Provider
from cpodfs.devnet.rest import Json, Signal, stamp


def new_id() -> str:
    return secrets.token_hex(16)


@dataclass
class Demand:
    """A requestor's subscription. ``made``: when, in monotonic seconds."""

    properties: Json
    constraints: str
    wanted: Filter
    id: str = field(default_factory=new_id)
    timestamp: str = field(default_factory=stamp)
    events: deque[Json] = field(default_factory=deque)
    changed: Signal = field(default_factory=Signal)
    made: float = field(default_factory=time.monotonic)
    offered: set[str] = field(default_factory=set)
    """Node ids whose current offer this demand has been told of."""

    def tell(self, event: Json) -> None:
        self.events.append(event)
        self.changed.fire()


@dataclass(frozen=True)
class Proposal:
    """One step of a negotiation, by either side. ``wanted`` is only set on the requestor's."""

    demand: Demand
    provider: Provider
    issuer_id: str
    state: str
    properties: Json
    constraints: str
    previous: Proposal | None = None
    id: str = field(default_factory=lambda: f"R-{new_id()}")
    timestamp: str = field(default_factory=stamp)

    def event(self) -> Json:
        return {"eventType": "ProposalEvent", "eventDate": stamp(), "proposal": self.json()}

    def json(self) -> Json:
        return {
            "proposalId": self.id,
            "issuerId": self.issuer_id,
            "state": self.state,
            "timestamp": self.timestamp,
            "properties": self.properties,
            "constraints": self.constraints,
            "prevProposalId": self.previous.id if self.previous else None,
        }


@dataclass
class Agreement:
    """What a draft became. ``state``: Proposal, Approved, Rejected, Cancelled, Terminated."""

    proposal: Proposal
    """The provider's draft; its predecessor is the requestor's last word."""
    valid_to: str
    requestor_id: str
    id: str = field(default_factory=new_id)
    timestamp: str = field(default_factory=stamp)
    state: str = "Proposal"
    approved: str | None = None
    session: str | None = None
    """The requestor's name for what belongs together (``appSessionId``)."""
    idle_since: float = field(default_factory=time.monotonic)
    """When its last activity ended, or else when it was signed (monotonic seconds)."""
    closed: bool = False
    """Its provider has ended and billed it: nothing more happens for it, whatever its state."""
    terminated_there: bool = False
    """Its provider holds it for terminated, and its requestor does not know."""
    activities: list[str] = field(default_factory=list)
    changed: Signal = field(default_factory=Signal)

    @property
    def provider(self) -> Provider:
        return self.proposal.provider

    @property
    def demand_properties(self) -> Json:
        said = self.proposal.previous
        return said.properties if said else self.proposal.demand.properties

    def expired(self) -> bool:
        """Whether the time that the requestor itself gave its computation is over."""
        at_ms = self.demand_properties.get("golem.srv.comp.expiration")
        return isinstance(at_ms, int | float) and at_ms / 1000 < time.time()

    def json(self) -> Json:
        said, demand = self.proposal.previous, self.proposal.demand
        return {
            "agreementId": self.id,
            "demand": {
                "demandId": demand.id,
                "requestorId": self.requestor_id,
                "timestamp": demand.timestamp,
                "properties": self.demand_properties,
                "constraints": said.constraints if said else demand.constraints,
            },
            "offer": {
                "offerId": self.proposal.id,
                "providerId": self.provider.node_id,
                "timestamp": self.proposal.timestamp,
                "properties": self.proposal.properties,
                "constraints": self.proposal.constraints,
            },
            "validTo": self.valid_to,
            "approvedDate": self.approved,
            "state": self.state,
            "timestamp": self.timestamp,
        }
