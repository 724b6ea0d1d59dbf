"""How long things take at the local market: the network, a virtual machine, its habits of waiting.

Imports the standard library only. One `Pace` is shared by all parts of a market. The defaults are
those of yagna and its providers, but for the network and the machine, which cost nothing unless
they are asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

TRANSFER_ROUND_TRIPS = 3
"""Of one file: what it is, its first chunk, that it has arrived."""
_RUNTIME_S = 0.04
"""What an exe-unit takes to have its runtime do something, even without a machine."""


@dataclass(frozen=True)
class Pace:
    """Times in seconds."""

    provider_latency_s: float = 0.0
    """From the requestor's daemon to a provider, and as much back: of every call and every event."""
    vm: bool = False
    """Deploy, start, transfers and the end of an activity take as long as with a virtual machine."""
    offer_delay_s: float = 5.0
    """From the moment that a provider makes its offer anew to its first broadcast."""
    offer_interval_s: float = 240.0
    """Between two broadcasts of an offer, on average. A daemon knows what it has heard."""
    payment_cycle_s: float = 3.0
    """From the acceptance of an invoice to its payment; minutes to a day at the real one."""
    accept_timeout_s: float = 240.0
    """A provider breaks off when a debit note is not accepted for so long."""
    idle_s: float = 90.0
    """A provider breaks off when an agreement has no activity for so long."""
    min_expiration_s: float = 300.0
    """Providers sign nothing that ends earlier than that from now."""

    @property
    def deploy_s(self) -> float:
        return 3.0 if self.vm else _RUNTIME_S

    @property
    def start_s(self) -> float:
        return 2.0 if self.vm else _RUNTIME_S

    @property
    def transfer_s(self) -> float:
        """Beyond the bytes themselves."""
        travel_s = 2 * TRANSFER_ROUND_TRIPS * self.provider_latency_s
        return travel_s + (0.5 if self.vm else 0.0)

    @property
    def stop_s(self) -> float:
        return 1.5 if self.vm else 0.0

    async def cross(self) -> None:
        """One way between daemon and provider."""
        if self.provider_latency_s > 0:
            await asyncio.sleep(self.provider_latency_s)

    async def round_trip(self) -> None:
        """To a provider and back: what it leads to is known here afterwards, not before."""
        await self.cross()
        await self.cross()

    @asynccontextmanager
    async def at_provider(self) -> AsyncIterator[None]:
        """What is done in the block happens there: the call travels before, its answer after."""
        await self.cross()
        yield
        await self.cross()
