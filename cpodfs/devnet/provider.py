"""What providers are: their names, prices, speeds and offers.

Imports `constraints`, and `rest` for what is said of one that is gone. Pure data and arithmetic, no I/O: what a provider *does* is in `activity`
and `container`. Prices are per second of use, as in an offer's coefficients.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

from cpodfs.devnet.constraints import Filter, parse
from cpodfs.devnet.rest import Problem

USAGE_VECTOR = ("golem.usage.cpu_sec", "golem.usage.duration_sec")

NETWORKS = {
    **dict.fromkeys(("holesky", "hoodi", "sepolia", "amoy"), "tglm"),
    **dict.fromkeys(("mainnet", "polygon"), "glm"),
}
"""The networks that yagna knows, each with its token."""
PLATFORMS = tuple(f"erc20-{network}-{token}" for network, token in NETWORKS.items())
DEFAULT_PLATFORM = "erc20-hoodi-tglm"
DEAD_NETWORKS = ("holesky",)
"""Nobody has funds there any more."""

DEBIT_NOTE_INTERVAL = "golem.com.scheme.payu.debit-note.interval-sec?"
_ACCEPT_TIMEOUT = "golem.com.payment.debit-notes.accept-timeout?"
CHOSEN_PLATFORM = "golem.com.payment.chosen-platform"

PROTOCOL_VERSION = "golem.com.payment.protocol.version"

_OFFER_CONSTRAINTS = "(&(golem.srv.comp.expiration>0))"


def image_hash(tag: str) -> str:
    """What the local registry says that the image of a tag hashes to."""
    return hashlib.sha3_224(tag.encode()).hexdigest()


@dataclass(frozen=True)
class ProviderSpec:
    """One provider of the local market. It serves one agreement at a time."""

    name: str
    start_price: float = 0.0
    """GLM for each activity."""
    cpu_price: float = 0.0001
    """GLM for each second of processor time."""
    duration_price: float = 0.00002
    """GLM for each second that an activity exists."""
    speed: float = 1.0
    """Below 1, a command takes ``1/speed`` times as long as its process; at most 1."""
    bandwidth: float | None = None
    """Bytes a second for transfers; None for as fast as the disk."""
    cores: int = 2
    threads: int = 4
    mem_gib: float = 8.0
    storage_gib: float = 40.0
    subnet: str = "public"
    runtime: str = "vm"
    """``golem.runtime.name``, such as ``vm-nvidia``. All run on the host's programs alike."""
    capabilities: tuple[str, ...] = ("vpn",)
    """As Golem writes them, such as ``!exp:gpu``, ``manifest-support``."""
    images: tuple[str, ...] = ()
    """Tags and hashes of the images that it can deploy; none given: all."""
    platforms: tuple[str, ...] = PLATFORMS
    debit_note_interval_s: float = 120
    """Between two debit notes of an activity; a requestor may ask for more, not for less."""

    def __post_init__(self) -> None:
        if self.debit_note_interval_s <= 0:
            raise ValueError(f"{self.name}: debit_note_interval_s is above 0")
        if not 0 < self.speed <= 1:
            raise ValueError(f"{self.name}: speed is above 0 and at most 1")

    def node_id(self, seed: int) -> str:
        """The same for the same name and seed: 0x and 40 hex digits."""
        digest = hashlib.sha256(f"{seed}:{self.name}".encode()).hexdigest()
        return f"0x{digest[:40]}"

    def offer(self, node_id: str) -> dict[str, Any]:
        """The properties of its offer, all that yapapi's default strategy wants to see."""
        return {
            "golem.activity.caps.transfer.protocol": ["http", "https", "gftp"],
            _ACCEPT_TIMEOUT: 240,
            **{
                f"golem.com.payment.platform.{platform}.address": node_id
                for platform in self.platforms
            },
            PROTOCOL_VERSION: 3,
            "golem.com.pricing.model": "linear",
            "golem.com.pricing.model.linear.coeffs": [
                *(float(self.cpu_price), float(self.duration_price), float(self.start_price)),
            ],
            "golem.com.scheme": "payu",
            DEBIT_NOTE_INTERVAL: self.debit_note_interval_s,
            "golem.com.scheme.payu.payment-timeout-sec?": 86400,
            "golem.com.usage.vector": list(USAGE_VECTOR),
            "golem.inf.cpu.architecture": "x86_64",
            "golem.inf.cpu.cores": self.cores,
            "golem.inf.cpu.threads": self.threads,
            "golem.inf.mem.gib": float(self.mem_gib),
            "golem.inf.storage.gib": float(self.storage_gib),
            "golem.node.debug.subnet": self.subnet,
            "golem.node.id.name": self.name,
            "golem.node.net.is-public": False,
            "golem.runtime.capabilities": list(self.capabilities),
            "golem.runtime.name": self.runtime,
            "golem.runtime.version": "0.3.0",
            "golem.srv.caps.multi-activity": True,
        }

    def deploys(self, package: object) -> bool:
        """Whether it can deploy a demand's ``golem.srv.comp.task_package``."""
        known = {*self.images, *map(image_hash, self.images)}
        return not self.images or any(part in known for part in str(package).split(":"))

    def cost(self, cpu_s: float, duration_s: float) -> Decimal:
        """What an activity has cost so far, by the linear model, to 1e-12 GLM."""
        terms = ((self.cpu_price, cpu_s), (self.duration_price, duration_s), (self.start_price, 1))
        total = sum((Decimal(str(price)) * Decimal(str(use)) for price, use in terms), Decimal(0))
        return total.quantize(Decimal("1e-12"))


DEFAULT_PROVIDERS: tuple[ProviderSpec, ...] = (
    ProviderSpec("amber-falcon", cpu_price=0.00003, duration_price=0.00001),
    ProviderSpec("brave-otter", cpu_price=0.00005, duration_price=0.00001, cores=4, threads=8),
    ProviderSpec("calm-heron", cpu_price=0.00008, duration_price=0.00002, mem_gib=16.0),
    ProviderSpec("dusty-lynx", cpu_price=0.00010, duration_price=0.00002, speed=0.5, mem_gib=4.0),
)
"""yapapi takes the cheapest first: it is a quick one here, so that a first look is not a slow one."""


def numbered(count: int) -> tuple[ProviderSpec, ...]:
    """So many providers: the default ones, then more like them under numbered names."""
    default = DEFAULT_PROVIDERS
    return tuple(
        spec if round_ == 0 else replace(spec, name=f"{spec.name}-{round_ + 1}")
        for round_, spec in (
            (number // len(default), default[number % len(default)]) for number in range(count)
        )
    )


def parse_spec(text: str) -> ProviderSpec:
    """``name`` or ``name:key=value,…`` with the fields of a spec; the words of a list joined by ``+``.

    Raises ValueError with what is wrong.
    """
    name, _, rest = text.partition(":")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,40}", name):
        raise ValueError(f"{text!r}: a provider's name is letters, digits, - and _")
    given: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        kind = _SETTABLE.get(key)
        if kind is None:
            raise ValueError(f"{text!r}: {key!r} is none of {', '.join(_SETTABLE)}")
        try:
            given[key] = kind(value)
        except ValueError:
            raise ValueError(f"{text!r}: {key} is a number, not {value!r}") from None
    return ProviderSpec(name, **given)


_SETTABLE: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("start_price", "cpu_price", "duration_price", "speed", "bandwidth"), float),
    **dict.fromkeys(("mem_gib", "storage_gib", "debit_note_interval_s"), float),
    **dict.fromkeys(("cores", "threads"), int),
    **dict.fromkeys(("subnet", "runtime"), str),
    **dict.fromkeys(
        ("capabilities", "images"), lambda words: tuple(filter(None, words.split("+")))
    ),
}


@dataclass
class Provider:
    """A provider as the market sees it. ``busy_with`` is the agreement it serves, if any."""

    spec: ProviderSpec
    node_id: str
    offer: dict[str, Any]
    dice: random.Random
    """Its own, so that what happens here does not depend on the order of events elsewhere."""
    busy_with: str | None = None
    gone: bool = False
    """It has vanished: it offers, answers and bills nothing any more."""
    silent_until: float = 0.0
    """It hears and does not answer before that (monotonic seconds)."""
    demands: Filter = field(default_factory=lambda: parse(_OFFER_CONSTRAINTS))
    """What it asks of a demand."""

    @classmethod
    def create(cls, spec: ProviderSpec, seed: int) -> Provider:
        node_id = spec.node_id(seed)
        dice = random.Random(f"{seed}:{spec.name}")  # noqa: S311 - repeatable on purpose
        return cls(spec, node_id, spec.offer(node_id), dice)

    @property
    def constraints(self) -> str:
        return _OFFER_CONSTRAINTS

    def fits(self, properties: dict[str, Any], wanted: Filter) -> bool:
        """Whether demand and offer match, each by the other's constraints."""
        return wanted.matches(self.offer) and self.demands.matches(properties)

    def draft(self, demand: dict[str, Any]) -> dict[str, Any]:
        """Its answer to a counter-proposal: the offer, with longer intervals if asked for."""
        answer = dict(self.offer)
        for key in (DEBIT_NOTE_INTERVAL, _ACCEPT_TIMEOUT):
            asked = demand.get(key)
            if isinstance(asked, int | float) and asked > answer[key]:
                answer[key] = asked
        return answer

    def takes(self, demand: dict[str, Any]) -> bool:
        """Whether the payment platform that a requestor has chosen, if any, is one of ours."""
        chosen = demand.get(CHOSEN_PLATFORM)
        return chosen is None or chosen in self.spec.platforms

    async def answers(self, limit_s: float | None) -> None:
        """Wait while it is silent. Raises Problem 408 when that is longer than ``limit_s``."""
        left_s = self.silent_until - time.monotonic()
        if left_s > 0:
            await asyncio.sleep(left_s if limit_s is None else min(left_s, limit_s))
            if limit_s is not None and left_s > limit_s:
                raise Problem(408, "Timeout")

    def unreachable(self, service: str) -> Problem:
        """What yagna's central net says of a service of a node that is not there."""
        address = f"/net/{self.node_id}/{service}"
        return Problem(
            500,
            f"GSB error: Remote service at `{address}` error: Bad request: endpoint address not found",
        )

    def draws(self, chance: float) -> bool:
        return chance > 0 and self.dice.random() < chance
