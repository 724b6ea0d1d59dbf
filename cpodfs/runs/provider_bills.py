"""What an agreement can have cost at most: no more is paid, whatever a provider bills.

asyncio's process; imports yapapi's properties only. A provider counts the CPU seconds itself, but
cannot use more of them than its threads have in the time that passes here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any

from yapapi.props.base import InvalidPropertiesError
from yapapi.props.com import ComLinear, Counter

SLACK_S = 30.0
"""Added to the time since the signature: clocks differ, and an agreement takes time to end."""


class Overbilled(Exception):
    """A bill that is not paid; says why."""


def start_price(properties: dict[str, Any]) -> Decimal:
    """What an agreement costs at once, in GLM, by the properties of the provider's offer."""
    return Decimal(str(ComLinear.from_properties(properties).fixed_price))


def a_second(properties: dict[str, Any]) -> Decimal:
    """What an activity costs in a second at most, in GLM: all threads busy."""
    threads = Decimal(str(properties.get("golem.inf.cpu.threads") or 1))
    rates = ComLinear.from_properties(properties).price_for
    return sum(
        (
            Decimal(str(price)) * (threads if counter == Counter.CPU.value else 1)
            for counter, price in rates.items()
        ),
        Decimal(0),
    )


def is_sane(properties: dict[str, Any]) -> bool:
    """Whether an offer's prices are numbers that one can reckon with."""
    try:
        prices = (start_price(properties), a_second(properties))
        return all(price.is_finite() and price >= 0 for price in prices)
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


def most(properties: dict[str, Any], seconds: float) -> Decimal:
    """What an agreement that was signed so long ago can have cost at most, in GLM."""
    passed = Decimal(str(round(seconds + SLACK_S, 3)))
    return start_price(properties) + a_second(properties) * passed


class Bills:
    """The agreements of one run. ``clock``: seconds, monotonic."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._signed: dict[str, tuple[float, dict[str, Any]]] = {}

    def signed(self, agreement: Any) -> None:
        """From now on an agreement (yapapi's, with its details) may cost something."""
        properties = agreement.details.provider_view.properties
        self._signed[agreement.id] = (self._clock(), properties)

    def most(self, key: str) -> Decimal:
        """What the agreement with this id can have cost by now, in GLM; nothing if there is none."""
        if key not in self._signed:
            return Decimal(0)
        begun, properties = self._signed[key]
        return most(properties, self._clock() - begun)

    def checked(self, key: str, billed: Any) -> Decimal:
        """What is billed for an agreement, if it may be paid. Raises Overbilled."""
        return checked(billed, self.most(key))
