"""The Market API: HTTP to `Negotiation` and back, with its long polls.

Imports `agreements`, `ledger`, `negotiation`, `pace`, `rest`.
"""

from __future__ import annotations

import re

from aiohttp import web

from cpodfs.devnet.agreements import Agreement, Demand, Proposal
from cpodfs.devnet.ledger import Ledger
from cpodfs.devnet.negotiation import Negotiation
from cpodfs.devnet.pace import Pace
from cpodfs.devnet.rest import (
    Json,
    Problem,
    after_timestamp,
    body_object,
    hold_s,
    max_events,
    text_field,
)

MAX_EVENTS = 100
_ID = re.compile(r"[0-9a-f]{32}")


class MarketApi:
    """``ledger``: the agreements that an earlier market has signed."""

    def __init__(self, negotiation: Negotiation, pace: Pace, ledger: Ledger) -> None:
        self._market = negotiation
        self._ledger = ledger
        self._pace = pace

    def routes(self, root: str = "/market-api/v1") -> list[web.RouteDef]:
        demand, proposal = f"{root}/demands/{{id}}", f"{root}/demands/{{id}}/proposals/{{proposal}}"
        agreement = f"{root}/agreements/{{id}}"
        return [
            web.post(f"{root}/demands", self.subscribe),
            web.get(f"{root}/demands", self.list_demands),
            web.delete(demand, self.unsubscribe),
            web.get(f"{demand}/events", self.demand_events),
            web.get(proposal, self.get_proposal),
            web.post(proposal, self.counter),
            web.post(f"{proposal}/reject", self.reject),
            web.post(f"{root}/agreements", self.create_agreement),
            web.get(agreement, self.get_agreement),
            web.post(f"{agreement}/confirm", self.confirm),
            web.post(f"{agreement}/wait", self.wait),
            web.post(f"{agreement}/cancel", self.cancel),
            web.post(f"{agreement}/terminate", self.terminate),
            web.get(f"{root}/agreementEvents", self.agreement_events),
        ]

    # --- demands ---

    async def subscribe(self, request: web.Request) -> web.Response:
        properties, constraints = _base(await body_object(request))
        return web.json_response(self._market.subscribe(properties, constraints).id, status=201)

    async def list_demands(self, _request: web.Request) -> web.Response:
        return web.json_response(
            [
                {
                    "demandId": demand.id,
                    "requestorId": self._market.requestor_id,
                    "timestamp": demand.timestamp,
                    "properties": demand.properties,
                    "constraints": demand.constraints,
                }
                for demand in self._market.demands.values()
            ]
        )

    async def unsubscribe(self, request: web.Request) -> web.Response:
        self._market.unsubscribe(self._demand(request))
        return web.Response(status=204)

    async def demand_events(self, request: web.Request) -> web.Response:
        demand, limit = self._demand(request), max_events(request, MAX_EVENTS)
        await demand.changed.until(
            lambda: bool(demand.events) or demand.id not in self._market.demands,
            hold_s(request, 5.0),
        )
        if demand.id not in self._market.demands:
            raise Problem(404, f"demand {demand.id} was unsubscribed")
        count = min(limit, len(demand.events))
        return web.json_response([demand.events.popleft() for _ in range(count)])

    def _demand(self, request: web.Request) -> Demand:
        demand = self._market.demands.get(request.match_info["id"])
        if demand is None:
            raise Problem(404, f"demand {request.match_info['id']} is not known")
        return demand

    # --- proposals ---

    def _proposal(self, request: web.Request) -> Proposal:
        demand, key = self._demand(request), request.match_info["proposal"]
        proposal = self._market.proposals.get(key)
        if proposal is None or proposal.demand is not demand:
            raise Problem(404, f"proposal {key} is not known")
        return proposal

    async def get_proposal(self, request: web.Request) -> web.Response:
        return web.json_response(self._proposal(request).json())

    async def counter(self, request: web.Request) -> web.Response:
        proposal = self._proposal(request)
        properties, constraints = _base(await body_object(request))
        await self._pace.round_trip()
        said = self._market.counter(proposal.demand, proposal, properties, constraints)
        return web.json_response(said.id)

    async def reject(self, request: web.Request) -> web.Response:
        self._market.turn_down(self._proposal(request))
        return web.Response(status=204)

    # --- agreements ---

    def _agreement(self, request: web.Request) -> Agreement:
        agreement = self._market.agreements.get(_agreement_id(request))
        if agreement is None:
            raise Problem(404, f"Agreement [{request.match_info['id']}] not found.")
        return agreement

    async def create_agreement(self, request: web.Request) -> web.Response:
        body = await body_object(request)
        proposal_id, valid_to = text_field(body, "proposalId"), text_field(body, "validTo")
        agreement = self._market.create_agreement(proposal_id, valid_to)
        return web.json_response(agreement.id)

    async def get_agreement(self, request: web.Request) -> web.Response:
        agreement = self._market.agreements.get(_agreement_id(request))
        if agreement is None and (kept := self._ledger.agreement(request.match_info["id"])):
            return web.json_response(kept)
        return web.json_response(self._agreement(request).json())

    async def confirm(self, request: web.Request) -> web.Response:
        agreement = self._agreement(request)
        agreement.session = request.query.get("appSessionId")
        await self._pace.round_trip()
        self._market.confirm(agreement)
        return web.Response(status=204)

    async def wait(self, request: web.Request) -> web.Response:
        agreement = self._agreement(request)
        timeout_s = hold_s(request, 15.0)
        if not await agreement.changed.until(lambda: agreement.state != "Proposal", timeout_s):
            raise Problem(408, "not confirmed in time")
        if agreement.state != "Approved":
            raise Problem(410, f"agreement {agreement.id} is {agreement.state}")
        return web.Response(status=204)

    async def cancel(self, request: web.Request) -> web.Response:
        self._market.cancel(self._agreement(request))
        return web.Response()

    async def terminate(self, request: web.Request) -> web.Response:
        kept = self._ledger.agreement(_agreement_id(request))
        if kept is not None and kept["state"] == "Terminated":
            raise Problem(410, "Can't update Agreement state from Terminated to Terminated.")
        agreement = self._agreement(request)
        reason = await body_object(request) if request.can_read_body else {}
        await self._pace.round_trip()
        if agreement.state == "Approved":
            await agreement.provider.answers(None)
        nobody_waits = request.transport is None or request.transport.is_closing()
        if nobody_waits and agreement.state == "Approved" and not agreement.provider.gone:
            # The provider has been told all the same; that it did so is lost.
            agreement.terminated_there = True
            await self._market.close_agreement(agreement, str(reason.get("message", "")))
            return web.Response()
        await self._market.terminate(agreement, "Requestor", reason)
        return web.Response()

    async def agreement_events(self, request: web.Request) -> web.Response:
        after, limit = after_timestamp(request), max_events(request, MAX_EVENTS)
        session = request.query.get("appSessionId")
        found: list[Json] = []

        def ready() -> bool:
            found[:] = [
                event
                for of, event in self._market.events
                if event["eventDate"] > after and (session is None or of == session)
            ]
            return bool(found)

        await self._market.changed.until(ready, hold_s(request, 5.0))
        return web.json_response(found[:limit])


def _agreement_id(request: web.Request) -> str:
    key = request.match_info["id"]
    if not _ID.fullmatch(key):
        raise Problem(400, f"Invalid Agreement id [{key}]")
    return key


def _base(body: Json) -> tuple[Json, str]:
    properties, constraints = body.get("properties"), body.get("constraints")
    if not isinstance(properties, dict) or not isinstance(constraints, str):
        raise Problem(400, "properties (an object) and constraints (a text) are expected")
    return properties, constraints
