"""What agreements cost, and what they can have cost at most: no more is paid, whatever is billed.

The provider run's process; imports yapapi's properties and `provider_status`. A provider counts the
CPU seconds itself, but cannot use more of them than its threads have in the time that passes here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any

from yapapi.props.base import InvalidPropertiesError
from yapapi.props.com import ComLinear, Counter

from cpodfs.runs.provider_status import Price

SLACK_S = 5.0
"""Added to the time since the signature, which may have been made a little before we heard of it."""
MAX_THREADS = 1024
"""An offer of more is not believed: its threads are what limits its bill."""


class Overbilled(Exception):
    """A bill that is not paid; says why."""


def price_of(properties: dict[str, Any]) -> Price:
    """The price of an offer, by its properties. Raises InvalidPropertiesError or ArithmeticError."""
    threads = Decimal(str(properties.get("golem.inf.cpu.threads") or 1))
    linear = ComLinear.from_properties(properties)
    a_second = sum(
        (
            Decimal(str(price)) * (threads if counter == Counter.CPU.value else 1)
            for counter, price in linear.price_for.items()
        ),
        Decimal(0),
    )
    return Price(Decimal(str(linear.fixed_price)), a_second)


def is_sane(properties: dict[str, Any]) -> bool:
    """Whether an offer's prices are numbers that one can reckon with."""
    try:
        price = price_of(properties)
        threads = float(properties.get("golem.inf.cpu.threads") or 1)
        fine = all(part.is_finite() and part >= 0 for part in (price.start, price.a_second))
        return fine and 0 < threads <= MAX_THREADS
    except (InvalidPropertiesError, ArithmeticError, TypeError, ValueError):
        return False


def checked(billed: Any, most: Decimal) -> Decimal:
    """A bill's amount, if it may be paid. Raises Overbilled."""
    try:
        amount = Decimal(str(billed))
        fine = amount.is_finite() and 0 <= amount <= most
    except InvalidOperation:
        fine = False
    if not fine:
        raise Overbilled(f"billed {str(billed)[:40]!r} GLM for what costs {most:f} at most")
    return amount


class Bills:
    """The agreements of one run. ``clock``: seconds, monotonic."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._signed: dict[str, tuple[float, Price]] = {}

    def signed(self, key: str, price: Price) -> None:
        """From now on the agreement with this id may cost something."""
        self._signed[key] = (self._clock(), price)

    def most(self, key: str) -> Decimal:
        """What an agreement can have cost by now, in GLM; nothing if it is not known."""
        if key not in self._signed:
            return Decimal(0)
        begun, price = self._signed[key]
        return price.most(self._clock() - begun + SLACK_S)

    def checked(self, key: str, billed: Any) -> Decimal:
        """What is billed for an agreement, if it may be paid. Raises Overbilled."""
        return checked(billed, self.most(key))
