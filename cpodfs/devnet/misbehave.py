"""What goes wrong at the local market on purpose, and the requests that change it while it runs.

Imports `door`, `rest`. One `Misbehaviour` is shared by all parts of a market and changed in place, so that
``POST /devnet/misbehave`` holds for all of them at once. Chances are drawn by each provider's own
dice (`provider.Provider.draws`), from the market's seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any

import pydantic
from aiohttp import web
from pydantic import Field
from pydantic.dataclasses import dataclass as checked_dataclass

from cpodfs.devnet.door import Door
from cpodfs.devnet.rest import Json, Problem, body_object

Chance = Annotated[float, Field(ge=0, le=1)]

_MAX_AWAY_S = 3600.0


@checked_dataclass(config=pydantic.ConfigDict(extra="forbid"))
class Misbehaviour:
    """What goes wrong, on every provider alike. The default is nothing."""

    no_offers: bool = False
    """Nobody answers a demand."""
    reject_proposals: Chance = 0.0
    """The chance that a counter-proposal is rejected."""
    fail_command: Chance = 0.0
    """The chance that a ``run`` command fails (exit code 1) instead of being run."""
    refuse_activity: Chance = 0.0
    """The chance that no activity can be made for an agreement."""
    lose_activity: Chance = 0.0
    """The chance that a ``run`` command ends with its whole activity instead."""
    vanish: Chance = 0.0
    """The chance that a provider disappears for good in the middle of a ``run`` command."""
    transfer_bandwidth: Annotated[float, Field(gt=0)] | None = None
    """Bytes a second for every transfer, if lower than the provider's own."""
    lose_invoice: Chance = 0.0
    """The chance that a provider never sends its invoice."""
    overbill: Annotated[float, Field(ge=0)] = 0.0
    """GLM that every invoice has beyond what the agreement has cost."""
    invoice_delay_s: Annotated[float, Field(ge=0, le=3600)] = 0.0
    """How late invoices come after the end of an agreement."""
    unknown_image: bool = False
    """The registry knows no image."""

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> Misbehaviour:
        """Raises ValueError, naming the field, for what is unknown or out of range."""
        return pydantic.TypeAdapter(cls).validate_python(dict(options))

    def become(self, other: Misbehaviour) -> None:
        """Take over every field, for all who hold this one."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(other, field.name))


class MisbehaveApi:
    """``/devnet/…`` on the market's port; the control key is asked for, not the app-key.

    ``vanish(name, for_s)`` makes a provider disappear, or some busy one when the name is None, for
    good or for so long; it returns the name, or None when there is no such provider. ``silence(name, s)``
    does so likewise for one that does not answer.
    """

    def __init__(
        self,
        misbehave: Misbehaviour,
        vanish: Callable[[str | None, float | None], Awaitable[str | None]],
        silence: Callable[[str, float], str | None],
        door: Door,
    ) -> None:
        self._misbehave = misbehave
        self._vanish = vanish
        self._silence = silence
        self._door = door

    def routes(self, root: str = "/devnet") -> list[web.RouteDef]:
        return [
            web.get(f"{root}/misbehave", self.show),
            web.post(f"{root}/misbehave", self.change),
            web.post(f"{root}/vanish", self.vanish),
            web.post(f"{root}/silence", self.silence),
            web.post(f"{root}/restart", self.restart),
            web.post(f"{root}/freeze", self.freeze),
        ]

    async def show(self, _request: web.Request) -> web.Response:
        return web.json_response(dataclasses.asdict(self._misbehave))

    async def change(self, request: web.Request) -> web.Response:
        """What the JSON object does not name is off."""
        try:
            self._misbehave.become(Misbehaviour.parse(await body_object(request)))
        except ValueError as error:
            raise Problem(400, str(error)) from None
        return await self.show(request)

    async def vanish(self, request: web.Request) -> web.Response:
        """``{"provider": name, "for_s": N}``; without a name, one that is at work.

        With ``for_s`` it is back after so long, and goes on all the time.
        """
        body = await body_object(request)
        name = body.get("provider")
        for_s = _seconds(body, "for_s") if "for_s" in body else None
        gone = await self._vanish(name if isinstance(name, str) else None, for_s)
        if gone is None:
            raise Problem(404, "no such provider is at work")
        return web.json_response({"provider": gone})

    async def silence(self, request: web.Request) -> web.Response:
        """``{"provider": name, "for_s": N}``: it hears what it is told, and answers after so long."""
        body = await body_object(request)
        name = self._silence(str(body.get("provider")), _seconds(body, "for_s"))
        if name is None:
            raise Problem(404, "no such provider")
        return web.json_response({"provider": name})

    async def restart(self, request: web.Request) -> web.Response:
        """``{"away_s": N}``: the daemon is gone for so long, and comes back with what it keeps on disk."""
        away_s = _seconds(await body_object(request), "away_s")
        await self._door.leave(away_s)
        return web.json_response({"away_s": away_s})

    async def freeze(self, request: web.Request) -> web.Response:
        """``{"s": N}``: the daemon answers nothing for so long; 0: it does again."""
        seconds = _seconds(await body_object(request), "s")
        self._door.freeze(seconds)
        return web.json_response({"s": seconds})


def _seconds(body: Json, name: str) -> float:
    value = body.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Problem(400, f"{name}: a number of seconds is expected")
    if not 0 <= value <= _MAX_AWAY_S:
        raise Problem(400, f"{name}: 0 to {_MAX_AWAY_S:g} s")
    return float(value)
