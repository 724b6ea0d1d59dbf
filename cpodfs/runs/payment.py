"""What runs pay with: the platforms that a yagna has, and which of them a run takes.

Imports errors and recipe; httpx, trio. yagna has no question for its platforms as such, but its payment
cycles are listed one for each that its drivers know, whether an account was ever made there or not.
Who does not answer at once is no reason to refuse a run, which finds out by itself.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import trio

from cpodfs.errors import ConfigError
from cpodfs.recipe import Recipe

log = logging.getLogger(__name__)

PLATFORMS_PATH = "/payment-api/v1/batchCycles"
DRIVER = "erc20"
TEST_NETWORK = "hoodi"
"""yapapi's own default, holesky, is a chain that is no more."""
ASK_S = 1.0
"""yagna answers in some 10 ms, or it is not well."""
_KNOWN_S = 60.0
_UNKNOWN_S = 10.0
_MAIN_NETWORKS = ("mainnet", "polygon")
_LIMIT = 100
_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Platform:
    driver: str
    network: str
    token: str

    def __str__(self) -> str:
        return f"{self.driver}-{self.network}-{self.token}"


def platforms_in(answer: httpx.Response) -> list[Platform] | None:
    """The platforms in yagna's answer to a GET of `PLATFORMS_PATH`; None when it does not tell, as one
    from before 2025."""
    try:
        entries: Any = answer.json() if answer.status_code == httpx.codes.OK else None
    except ValueError:
        return None
    if not isinstance(entries, list):
        return None
    names = [str(e.get("platform")) for e in entries[:_LIMIT] if isinstance(e, dict)]
    found = [re.fullmatch("([a-z0-9]{1,30})-([a-z0-9]{1,30})-([a-z0-9]{1,30})", n) for n in names]
    return [Platform(*match.groups()) for match in found if match] or None


def choose(network: str | None, driver: str | None, known: Sequence[Platform] | None) -> Platform:
    """What yapapi will ask for. Without a ``network`` that is the test network of today if yagna has
    it, else another test network that it has: real money is never spent by default."""
    driver = (driver or DRIVER).lower()
    if not network:
        test = [
            p.network for p in known or () if p.driver == driver and _token(p.network) == p.token
        ]
        test = [name for name in test if name not in _MAIN_NETWORKS]
        network = TEST_NETWORK if TEST_NETWORK in test or not test else test[0]
    network = network.lower()
    return Platform(driver, network, _token(network))


def _token(network: str) -> str:
    """What yapapi asks for there."""
    return "glm" if network in _MAIN_NETWORKS else "tglm"


def lacks(known: Sequence[Platform], wanted: Platform) -> str | None:
    """What of a platform yagna does not have, in a sentence that names what it has; None: nothing."""
    if wanted in known:
        return None
    drivers = [p for p in known if p.driver == wanted.driver]
    networks = [p for p in drivers if p.network == wanted.network]
    if not drivers:
        return f"yagna has no payment driver {wanted.driver!a}; it has {_some(p.driver for p in known)}"
    if not networks:
        return (
            f"yagna has no network {wanted.network!a} for {wanted.driver}; "
            f"it has {_some(p.network for p in drivers)}"
        )
    return f"yagna has no {wanted.token} on {wanted.network}; it has {_some(p.token for p in networks)}"


def _some(names: Any) -> str:
    return ", ".join(list(dict.fromkeys(names))[:_SHOWN])


class Payments:
    """``environment()``: what runs get to see beyond the usual, which says where yagna is. ``network``
    and ``driver``: the user's choice, None where he left it to us."""

    def __init__(
        self,
        environment: Callable[[], Mapping[str, str]],
        *,
        network: str | None,
        driver: str | None,
    ) -> None:
        self._environment = environment
        self._network = network
        self._driver = driver
        self._known: list[Platform] | None = None
        self._until_s = 0.0

    async def variables(self, recipe: Recipe) -> dict[str, str]:
        """What tells yapapi with what to pay: as the recipe says, else the user, else as yagna can.
        Takes `ASK_S` at most. Raises ConfigError if yagna says that it has no such thing."""
        runtime = recipe.runtime
        network = (runtime.network if runtime else None) or self._network
        driver = (runtime.driver if runtime else None) or self._driver
        if trio.current_time() >= self._until_s:
            await self._ask()
        wanted = choose(network, driver, self._known)
        if self._known is not None and wanted not in self._known:
            await self._ask()  # it may be another yagna by now
            wanted = choose(network, driver, self._known)
            if self._known is not None and (what := lacks(self._known, wanted)) is not None:
                raise ConfigError(what)
        return {"YAGNA_PAYMENT_DRIVER": wanted.driver, "YAGNA_PAYMENT_NETWORK": wanted.network}

    async def _ask(self) -> None:
        try:
            self._known = await self._answer()
        except Exception as error:  # noqa: BLE001 - the run will say what is wrong with yagna
            log.info("yagna does not tell what it can pay with: %s", type(error).__name__)
            self._known = None
        lasts_s = _UNKNOWN_S if self._known is None else _KNOWN_S
        self._until_s = trio.current_time() + lasts_s

    async def _answer(self) -> list[Platform] | None:
        env = self._environment()
        url, key = env.get("YAGNA_API_URL"), env.get("YAGNA_APPKEY")
        if not url or not key:
            return None
        with trio.fail_after(ASK_S):
            async with httpx.AsyncClient(
                headers={"Authorization": f"Bearer {key}"},
                timeout=ASK_S,
                trust_env=False,
                # Certificates take longer to load than yagna to answer.
                verify=url.startswith("https:"),
            ) as http:
                return platforms_in(await http.get(f"{url.rstrip('/')}{PLATFORMS_PATH}"))
