"""What a requestor session has at the market, learned from its calls of yagna and their answers.

Imports `gateway_failures`, `provider_bills` and `provider_status`; no I/O, and the clock is given.
`Books.shown` is the part of ``run.json`` that a requestor run fills: as a provider run's, so that
`provider_link.clean_up` and `debts` can end and pay what the program has left. Nothing here may
raise for what a program or yagna says: it is taken for what it is, or not at all.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Any

from cpodfs.runs.gateway_failures import Failures
from cpodfs.runs.provider_link import is_open, is_owed
from cpodfs.runs.provider_status import Hired, Price, amount

_NAME_CHARS = 100
_SETTLED_SHOWN = 100
_MONEY = "GLM"


@dataclass(frozen=True)
class Call:
    """A request and what yagna answered. ``asked``, ``said``: JSON, or None where there was none."""

    method: str
    path: str
    asked: Any
    status: int
    said: Any

    @property
    def fine(self) -> bool:
        return 200 <= self.status < 300

    @property
    def gone(self) -> bool:
        return self.status in (404, 410)


@dataclass
class Rented(Hired):
    """An agreement of the program's. ``agreement_state`` is "confirming" until yagna has said
    whether the provider agreed. ``open``: its activities that go on, ``times``: by activity, when it
    began and ended."""

    open: list[str] = field(default_factory=list)
    times: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    allocation: str | None = None
    """From which it was paid last."""

    def most(self, now: float) -> Decimal:
        """What it can have cost by now: the start price of each activity, and their time."""
        seconds = sum((now if end is None else end) - begin for begin, end in self.times.values())
        return self.price.start * len(self.times) + self.price.a_second * Decimal(str(seconds))

    @property
    def is_open(self) -> bool:
        """Whether there is something to be ended or to be paid."""
        return is_open(vars(self)) or is_owed(vars(self))

    def shown(self) -> dict[str, Any]:
        start = self.price.start * max(1, len(self.times))
        found = super().shown()
        for key in ("times", "open", "allocation", "done"):
            del found[key]
        price = {"start": amount(start), "a_second": amount(self.price.a_second)}
        return found | {"activities": list(self.open), "price": price}


@dataclass
class Allocation:
    """Money set aside. ``released``: the program wants it no more; it may be held for bills."""

    id: str
    total: Decimal
    platform: str
    released: bool = False


@dataclass(frozen=True)
class _Offer:
    """Whose an agreement is, and its price, if that can be told."""

    name: str
    id: str
    price: Price | None
    valid_to: datetime | None


class Refused(Exception):
    """A call that is not passed on, because of the run's limit; says why."""


class Books:
    """One session. ``limit``: GLM that it may cost, or None. ``clock``: seconds, monotonic."""

    def __init__(self, limit: Decimal | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self.phase = "running"
        self.failures = Failures(clock)
        self.warnings: list[str] = []
        self.demands: dict[str, None] = {}
        self.rented: dict[str, Rented] = {}
        self.allocations: dict[str, Allocation] = {}
        self.payer: str | None = None
        self.left: dict[str, int] | None = None
        self.stop: str | None = None
        """Why the run is to be ended, if it is."""
        self._begun = _now()
        self._clock = clock
        self._offers: dict[str, _Offer] = {}
        self._activities: dict[str, str] = {}
        self._invoices: dict[str, str] = {}
        self._debit_notes: dict[str, str] = {}

    # -- what passes by ---------------------------------------------------------------------------

    def take(self, call: Call) -> bool:
        """Note what a call and its answer tell; whether it was of interest."""
        for method, pattern, handler in _ROUTES:
            if call.method == method and (found := pattern.fullmatch(call.path)):
                handler(self, call, *found.groups())
                return True
        return False

    def is_known(self, agreement: str) -> bool:
        """Whether the price of an agreement is known."""
        return agreement in self._offers

    def is_invoice_known(self, invoice: str) -> bool:
        return invoice in self._invoices

    def _demand(self, call: Call) -> None:
        if call.fine and isinstance(call.said, str):
            self.demands[call.said] = None

    def _unsubscribed(self, call: Call, demand: str) -> None:
        if call.fine or call.gone:
            self.demands.pop(demand, None)

    def _agreement(self, call: Call, key: str) -> None:
        if not call.fine or not isinstance(call.said, dict):
            return
        offer = call.said.get("offer")
        if key not in self._offers and isinstance(offer, dict):
            self._offers[key] = _offer(offer, call.said.get("validTo"))
        if key in self.rented:
            self._describe(self.rented[key])
            self.settle_state(key, call.said.get("state"))

    def settle_state(self, key: str, state: Any) -> None:
        """What yagna says that an agreement is."""
        one = self.rented[key]
        if state == "Approved" and one.agreement_state == "confirming":
            one.agreement_state = "approved"
        elif state in ("Rejected", "Cancelled"):
            del self.rented[key]
        elif state in ("Terminated", "Expired"):
            self._end(one)

    def confirming(self, key: str) -> None:
        """An agreement is about to be confirmed: from here on it may cost something."""
        if key not in self.rented:
            self.rented[key] = Rented("?", "", key, "confirming", signed=_now())
            self._describe(self.rented[key])

    def _confirmed(self, call: Call, key: str) -> None:
        if key in self.rented and 400 <= call.status < 500:
            del self.rented[key]

    def _awaited(self, call: Call, key: str) -> None:
        one = self.rented.get(key)
        if one is None:
            return
        if call.fine and one.agreement_state == "confirming":
            one.agreement_state = "approved"
        elif call.status == 410 and one.agreement_state == "confirming":
            del self.rented[key]

    def _terminated(self, call: Call, key: str) -> None:
        if call.fine and key in self.rented:
            self._end(self.rented[key])

    def _agreement_events(self, call: Call) -> None:
        for event in call.said if call.fine and isinstance(call.said, list) else ():
            if not isinstance(event, dict):
                continue
            ended = "Terminated" in str(event.get("eventType") or event.get("eventtype"))
            key = event.get("agreementId")
            if ended and key in self.rented:
                self._end(self.rented[key])

    def _end(self, one: Rented) -> None:
        one.agreement_state = "terminated"
        for activity in list(one.open):
            self._stop(one, activity)

    def _activity(self, call: Call) -> None:
        agreement = call.asked.get("agreementId") if isinstance(call.asked, dict) else call.asked
        said = call.said.get("activityId") if isinstance(call.said, dict) else call.said
        one = self.rented.get(agreement) if isinstance(agreement, str) else None
        if not call.fine or not isinstance(said, str) or one is None:
            return
        self._activities[said] = one.agreement
        one.activity, one.activity_state = said, "running"
        one.open.append(said)
        one.times[said] = (self._clock(), None)

    def _destroyed(self, call: Call, activity: str) -> None:
        one = self._of_activity(activity)
        if one is not None and (call.fine or call.gone):
            self._stop(one, activity)

    def _stop(self, one: Rented, activity: str) -> None:
        if activity in one.open:
            one.open.remove(activity)
            one.times[activity] = (one.times[activity][0], self._clock())
        if not one.open:
            one.activity_state = "ended"

    def _of_activity(self, activity: str) -> Rented | None:
        return self.rented.get(self._activities.get(activity, ""))

    def _batch(self, call: Call, activity: str) -> None:
        one = self._of_activity(activity)
        if call.fine and isinstance(call.said, str) and isinstance(call.asked, dict) and one:
            self.failures.sent(one.agreement, call.said, call.asked.get("text"))

    def _results(self, call: Call, _activity: str, batch: str) -> None:
        if call.fine:
            self.failures.results(batch, call.said)

    def _allocation(self, call: Call, key: str | None = None) -> None:
        if not call.fine or not isinstance(call.said, dict):
            return
        said = call.said.get("allocationId")
        if not isinstance(said, str) or (key is not None and key not in self.allocations):
            return
        total = _decimal(call.said.get("totalAmount")) or Decimal(0)
        known = self.allocations.get(said)
        if known is None:
            platform = str(call.said.get("paymentPlatform"))
            self.allocations[said] = Allocation(said, total, platform)
        else:
            known.total = total
        if isinstance(call.said.get("address"), str):
            self.payer = call.said["address"]

    def _released(self, call: Call, key: str) -> None:
        if call.fine or call.gone:
            self.allocations.pop(key, None)

    def _invoice(self, call: Call, _key: str | None = None) -> None:
        if not call.fine:
            return
        for invoice in call.said if isinstance(call.said, list) else [call.said]:
            one = self._billed(invoice, "invoiceId", self._invoices)
            billed = _decimal(invoice.get("amount")) if one else None
            if one is None or billed is None:
                continue
            one.spent = billed
            if invoice.get("status") in ("ACCEPTED", "SETTLED"):
                one.accepted, one.paid = billed, True

    def _debit_note(self, call: Call, _key: str | None = None) -> None:
        if not call.fine:
            return
        for note in call.said if isinstance(call.said, list) else [call.said]:
            one = self._billed(note, "debitNoteId", self._debit_notes)
            due = _decimal(note.get("totalAmountDue")) if one else None
            if one is not None and due is not None:
                one.spent = max(one.spent, due)

    def _billed(self, bill: Any, kind: str, known: dict[str, str]) -> Rented | None:
        if not isinstance(bill, dict) or not isinstance(bill.get(kind), str):
            return None
        agreement = bill.get("agreementId")
        one = self.rented.get(agreement) if isinstance(agreement, str) else None
        if one is not None:
            known[bill[kind]] = one.agreement
        return one

    def _accepted(self, call: Call, invoice: str) -> None:
        one = self._paid_from(call, self._invoices.get(invoice))
        if one is not None:
            one.paid, one.spent = True, one.accepted

    def _note_accepted(self, call: Call, note: str) -> None:
        self._paid_from(call, self._debit_notes.get(note))

    def _paid_from(self, call: Call, agreement: str | None) -> Rented | None:
        one = self.rented.get(agreement or "")
        if one is None or not call.fine or not isinstance(call.asked, dict):
            return None
        paid = _decimal(call.asked.get("totalAmountAccepted"))
        if paid is None:
            return None
        one.accepted = max(one.accepted, paid)
        one.allocation = str(call.asked.get("allocationId"))
        return one

    def _describe(self, one: Rented) -> None:
        """Take over what is known of its offer."""
        if offer := self._offers.get(one.agreement):
            one.name, one.id, one.price = offer.name, offer.id, offer.price or Price()

    # -- what may be done -------------------------------------------------------------------------

    def grant(self, asked: Any, allocation: str | None = None) -> Decimal | None:
        """How much of what is asked for may be set aside; None: all of it. Raises Refused.

        ``allocation``: the one that is changed, if it is not a new one.
        """
        wanted = _decimal(asked)
        if self.limit is None or wanted is None:
            return None
        room = self.limit - self._set_aside(allocation)
        if room <= 0:
            raise Refused(
                f"{wanted:f} {_MONEY} cannot be set aside: all of the {self.limit:f} {_MONEY} that "
                "this run may cost is set aside or spent already"
            )
        if wanted <= room:
            return None
        self.warn(
            f"the program asked for {wanted:f} {_MONEY} to be set aside, and got {room:f}: "
            f"the run may cost {self.limit:f}"
        )
        return room

    def _set_aside(self, but: str | None) -> Decimal:
        """What allocations hold, and what was paid from those that are no more."""
        held = (one.total for one in self.allocations.values() if one.id != but)
        paid = (
            one.accepted
            for one in self.rented.values()
            if one.allocation is not None and one.allocation not in self.allocations
        )
        return sum(held, Decimal(0)) + sum(paid, Decimal(0))

    def afford(self, agreement: str) -> None:
        """Whether an agreement may be signed. Raises Refused."""
        if self.limit is None:
            return
        offer = self._offers.get(agreement)
        price = None if offer is None else offer.price
        if price is None:
            raise Refused("the price of this agreement cannot be told, and the run has a limit")
        total = self.committed() + price.start + price.ahead()
        if total > self.limit:
            raise Refused(
                f"the run may cost {self.limit:f} {_MONEY}; with this agreement it would be "
                f"{total:f} or more"
            )

    def committed(self) -> Decimal:
        """What is spent, and what is sure to be before all could be stopped."""
        now, total = self._clock(), Decimal(0)
        for one in self.rented.values():
            if one.paid:
                total += one.accepted
            elif one.open:
                total += max(one.spent, one.most(now) + one.price.ahead() * len(one.open))
            elif one.agreement_state == "terminated":
                total += max(one.spent, one.most(now))
            else:
                # It may begin to work at any time.
                total += max(one.spent, one.most(now)) + one.price.start + one.price.ahead()
        return total

    def exhausted(self) -> list[Rented]:
        """The agreements to be ended now, lest the run costs more than it may."""
        if self.limit is None or self.committed() <= self.limit:
            return []
        return [one for one in self.rented.values() if one.agreement_state == "approved"]

    def hold(self, allocation: str) -> bool:
        """The program releases an allocation: whether it is kept, for bills that are to come."""
        known = self.allocations.get(allocation)
        if known is None or not any(is_owed(vars(one)) for one in self.rented.values()):
            return False
        known.released = True
        return True

    def idle(self) -> list[str]:
        """The allocations that were held, and are needed no more."""
        if any(is_owed(vars(one)) for one in self.rented.values()):
            return []
        return [one.id for one in self.allocations.values() if one.released]

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)

    # -- what is told -----------------------------------------------------------------------------

    def unsettled(self) -> dict[str, int]:
        """How much is open at the market, by kind; empty when nothing is."""
        rented = self.rented.values()
        counts = {
            "demands": len(self.demands),
            "activities": sum(len(one.open) for one in rented),
            "agreements": sum(is_open(vars(one)) for one in rented),
            "unpaid": sum(is_owed(vars(one)) for one in rented),
            "allocations": len(self.allocations),
        }
        return {kind: count for kind, count in counts.items() if count}

    def shown(self) -> dict[str, Any]:
        rented = self.rented.values()
        answer: dict[str, Any] = {
            "phase": self.phase,
            "budget": None if self.limit is None else amount(self.limit),
            "spent": amount(sum((one.spent for one in rented), Decimal(0))),
            "accepted": amount(sum((one.accepted for one in rented), Decimal(0))),
            "allocation": next(iter(self.allocations), None),
            "allocations": list(self.allocations),
            "payer": self.payer,
            "begun": self._begun,
            "expires": self._expires(),
            "demands": list(self.demands),
            "providers": [one.shown() for one in self._told()],
            "warnings": [*self.warnings, *filter(None, [self.failures.warning()])],
        }
        if earlier := len(rented) - len(answer["providers"]):
            answer["earlier"] = {"agreements": earlier} | {
                total: amount(Decimal(str(answer[total])) - _sum(answer["providers"], total))
                for total in ("spent", "accepted")
            }
        if self.left is not None:
            answer["left"] = self.left
        if self.stop is not None:
            answer["stop"] = self.stop
        return answer

    def _expires(self) -> str | None:
        """When the time of all agreements that are open is over; None if it is not known."""
        offers = [self._offers.get(one.agreement) for one in self.rented.values() if one.is_open]
        times = [None if offer is None else offer.valid_to for offer in offers]
        known = [moment for moment in times if moment is not None]
        return max(known).isoformat() if known and len(known) == len(times) else None

    def _told(self) -> list[Rented]:
        """All agreements that something is open of, and the last of the others."""
        settled = [one for one in self.rented.values() if not one.is_open]
        hidden = {one.agreement for one in settled[:-_SETTLED_SHOWN]}
        return [one for one in self.rented.values() if one.agreement not in hidden]


def _sum(shown: list[dict[str, Any]], total: str) -> Decimal:
    return sum((Decimal(str(one[total])) for one in shown), Decimal(0))


def _offer(said: Mapping[str, Any], valid_to: Any) -> _Offer:
    properties = said.get("properties")
    named = properties.get("golem.node.id.name") if isinstance(properties, dict) else None
    name = str(named or "?")[:_NAME_CHARS]
    return _Offer(
        "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name),
        str(said.get("providerId"))[:_NAME_CHARS],
        _price(properties),
        _moment(valid_to),
    )


def _moment(text: Any) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _decimal(value: Any) -> Decimal | None:
    """An amount, if it is one."""
    try:
        number = Decimal(str(value))
    except InvalidOperation:
        return None
    return number if number.is_finite() and number >= 0 else None


def _price(properties: Any) -> Price | None:
    # Here: yapapi takes a third of the time that a gateway takes to be there for the first call.
    from yapapi.props.base import InvalidPropertiesError

    from cpodfs.runs.provider_bills import price_of

    try:
        price = price_of(properties)
        fine = all(part.is_finite() and part >= 0 for part in (price.start, price.a_second))
    except (InvalidPropertiesError, ArithmeticError, TypeError, ValueError, AttributeError):
        return None
    except AssertionError:
        # yapapi's own word for coefficients that do not fit.
        return None
    return price if fine else None


_MARKET, _ACTIVITY, _PAYMENT = (f"/{name}-api/v1" for name in ("market", "activity", "payment"))
_ID = "([^/]+)"
_ROUTES: list[tuple[str, re.Pattern[str], Callable[..., None]]] = [
    (method, re.compile(path), handler)
    for method, path, handler in (
        ("POST", f"{_MARKET}/demands", Books._demand),
        ("DELETE", f"{_MARKET}/demands/{_ID}", Books._unsubscribed),
        ("GET", f"{_MARKET}/agreements/{_ID}", Books._agreement),
        ("POST", f"{_MARKET}/agreements/{_ID}/confirm", Books._confirmed),
        ("POST", f"{_MARKET}/agreements/{_ID}/wait", Books._awaited),
        ("POST", f"{_MARKET}/agreements/{_ID}/terminate", Books._terminated),
        ("GET", f"{_MARKET}/agreementEvents", Books._agreement_events),
        ("POST", f"{_ACTIVITY}/activity", Books._activity),
        ("DELETE", f"{_ACTIVITY}/activity/{_ID}", Books._destroyed),
        ("POST", f"{_ACTIVITY}/activity/{_ID}/exec", Books._batch),
        ("GET", f"{_ACTIVITY}/activity/{_ID}/exec/{_ID}", Books._results),
        ("POST", f"{_PAYMENT}/allocations", Books._allocation),
        ("PUT", f"{_PAYMENT}/allocations/{_ID}", Books._allocation),
        ("DELETE", f"{_PAYMENT}/allocations/{_ID}", Books._released),
        ("GET", f"{_PAYMENT}/invoices", Books._invoice),
        ("GET", f"{_PAYMENT}/invoices/{_ID}", Books._invoice),
        ("POST", f"{_PAYMENT}/invoices/{_ID}/accept", Books._accepted),
        ("GET", f"{_PAYMENT}/debitNotes", Books._debit_note),
        ("GET", f"{_PAYMENT}/debitNotes/{_ID}", Books._debit_note),
        ("POST", f"{_PAYMENT}/debitNotes/{_ID}/accept", Books._note_accepted),
    )
]
