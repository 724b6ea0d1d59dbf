"""What a provider run has come to: the part of ``run.json`` that it fills, and the lines it speaks.

Imports the standard library only. One JSON object a line on stdout, read by `provider_link` in the
supervisor: ``{"log": "stdout"|"stderr", "data": <base64>}``, ``{"status": {…}}`` (the whole of it, at most
`STATUS_EVERY_S`), and at the end ``{"end": {"error": …, "exit_code": …}}``.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from itertools import islice
from typing import Any, BinaryIO

STATUS_EVERY_S = 0.2
AHEAD_S = 3
"""From a look at the costs to the next one, and until a provider has stopped."""
FAILED_SHOWN = 100
UNKNOWN = "unknown"
"""In place of an activity's id: there may be one."""
OPEN = ("approved", "vanished")
"""States of an agreement that is to be ended."""
_DATA_BYTES = 16384


@dataclass(frozen=True)
class Price:
    """What an agreement costs, in GLM: ``start`` at once, ``a_second`` at most while it works."""

    start: Decimal = Decimal(0)
    a_second: Decimal = Decimal(0)

    def ahead(self) -> Decimal:
        """What it costs until it can have been stopped."""
        return self.a_second * AHEAD_S

    def most(self, seconds: float) -> Decimal:
        """What it can have cost so long after the signature."""
        return self.start + self.a_second * Decimal(str(round(seconds, 3)))


@dataclass
class Hired:
    """One agreement. ``spent``: what it has cost so far or was billed for; ``accepted``: paid.

    ``agreement_state``: approved, vanished (so is the provider; yagna may call it approved for ever),
    terminated, or expired (its time is over, and nobody could be told). ``refused``: it has billed too
    much, and is not paid. ``signed``: when, UTC, ISO 8601.
    """

    name: str
    id: str
    agreement: str
    agreement_state: str = "approved"
    activity: str | None = None
    activity_state: str | None = None
    done: int = 0
    spent: Decimal = Decimal(0)
    accepted: Decimal = Decimal(0)
    paid: bool = False
    refused: bool = False
    error: str | None = None
    signed: str = ""
    price: Price = field(default_factory=Price)

    def shown(self) -> dict[str, Any]:
        return asdict(self) | {
            "price": {"start": amount(self.price.start), "a_second": amount(self.price.a_second)},
            "spent": amount(self.spent),
            "accepted": amount(self.accepted),
        }


@dataclass
class Status:
    """``phase``: starting, searching, running, ending, settling, and at the end over, or unsettled
    if something may be open at the market. Amounts in GLM."""

    budget: Decimal
    phase: str = "starting"
    allocation: str | None = None
    payer: str | None = None
    """The address that pays: yagna's identity, by which one knows it again."""
    begun: str | None = None
    """Before this time (UTC, ISO 8601) nothing was billed."""
    expires: str | None = None
    """When the agreements' time is over, likewise."""
    signing: list[str] = field(default_factory=list)
    """Agreements that may have been signed: it is not known."""
    offers: int = 0
    hired: dict[str, Hired] = field(default_factory=dict)
    tasks: dict[str, int] | None = None
    failed: list[dict[str, Any]] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    """Results that the pod cannot hold: their quoted names, and why."""
    prices: dict[str, Price] = field(default_factory=dict)
    """By agreement, from the moment it is signed."""

    def spent(self) -> Decimal:
        return sum((one.spent for one in self.hired.values()), Decimal(0))

    def committed(self) -> Decimal:
        """What is spent, and what is sure to be: of all that are not over the start price, and the
        work that will be done before they can be stopped."""
        total = Decimal(0)
        for key in self.hired.keys() | self.prices.keys():
            one, price = self.hired.get(key), self.prices.get(key, Price())
            if one is None:
                total += price.start + price.ahead()
            elif one.paid or (one.activity is None and one.agreement_state not in OPEN):
                total += one.spent
            else:
                total += max(one.spent, price.start)
                total += Decimal(0) if one.activity_state == "ended" else price.ahead()
        return total

    def accepted(self) -> Decimal:
        return sum((one.accepted for one in self.hired.values()), Decimal(0))

    def shown(self) -> dict[str, Any]:
        answer: dict[str, Any] = {
            "phase": self.phase,
            "budget": amount(self.budget),
            "spent": amount(self.spent()),
            "accepted": amount(self.accepted()),
            "allocation": self.allocation,
            "payer": self.payer,
            "begun": self.begun,
            "expires": self.expires,
            "signing": list(self.signing),
            "offers": self.offers,
            "providers": [one.shown() for one in self.hired.values()],
        }
        if self.tasks is not None:
            answer |= {"tasks": dict(self.tasks), "failed": self.failed[:FAILED_SHOWN]}
        if self.missing:
            first = islice(self.missing.items(), FAILED_SHOWN)
            answer["missing"] = [{"file": name, "error": why} for name, why in first]
        return answer


def amount(value: Decimal) -> float:
    """For JSON: GLM as a number, to twelve places."""
    return round(float(value), 12)


class Reporter:
    """Speaks to the supervisor. One event loop; `changed` may be called as often as one likes.

    ``on_unheard`` is called when the supervisor is gone; nothing here raises for that.
    """

    def __init__(self, status: Status, out: BinaryIO) -> None:
        self.status = status
        self.on_unheard: Callable[[], None] = lambda: None
        self._out = out
        self._due: asyncio.TimerHandle | None = None

    def log(self, stream: str, data: bytes) -> None:
        """Bytes for ``stdout.log`` or ``stderr.log``."""
        for at in range(0, len(data), _DATA_BYTES):
            part = base64.b64encode(data[at : at + _DATA_BYTES]).decode()
            self._say({"log": stream, "data": part})

    def note(self, text: str) -> None:
        """A line of our own, for ``stderr.log``."""
        self.log("stderr", f"cpodfs: {text}\n".encode(errors="backslashreplace"))

    def changed(self) -> None:
        """The status is not what it was: tell, soon."""
        if self._due is None:
            loop = asyncio.get_running_loop()
            self._due = loop.call_later(STATUS_EVERY_S, self.tell)

    def phase(self, name: str) -> None:
        self.status.phase = name
        self.changed()

    def tell(self) -> None:
        """Tell the status now."""
        if self._due is not None:
            self._due.cancel()
            self._due = None
        self._say({"status": self.status.shown()})

    def end(self, error: str | None, exit_code: int, *, settled: bool = True) -> None:
        """The last word. ``settled``: nothing is open at the market, for all one knows."""
        self.status.phase = "over" if settled else "unsettled"
        self.tell()
        self._say({"end": {"error": error, "exit_code": exit_code}})

    def _say(self, message: dict[str, Any]) -> None:
        try:
            self._out.write(json.dumps(message).encode() + b"\n")
            self._out.flush()
        except BrokenPipeError:
            self.on_unheard()
