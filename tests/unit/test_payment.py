"""With what a run pays: the recipe's choice, the user's, or what yagna has."""

from __future__ import annotations

import json

import httpx
import pytest

from cpodfs.errors import ConfigError
from cpodfs.recipe import Recipe, parse_recipe
from cpodfs.runs.payment import Payments, Platform, choose, lacks, platforms_in

pytestmark = pytest.mark.anyio

REAL = [
    *(Platform("erc20", network, "tglm") for network in ("amoy", "hoodi", "holesky", "sepolia")),
    *(Platform("erc20", network, "glm") for network in ("polygon", "mainnet")),
]
"""What yagna 0.17.6 answers."""


@pytest.fixture
def anyio_backend() -> str:
    return "trio"


def recipe(**runtime: str) -> Recipe:
    golem: dict[str, object] = {"exec": "x"}
    if runtime:
        golem["runtime"] = {"image": "x", "budget": 1, **runtime}
    return parse_recipe(json.dumps({"golem": golem}).encode(), file="a.recipe")


def test_the_test_network_of_today_unless_yagna_has_only_others() -> None:
    assert str(choose(None, None, None)) == "erc20-hoodi-tglm"
    assert str(choose(None, None, REAL)) == "erc20-hoodi-tglm"
    older = [p for p in REAL if p.network != "hoodi"]
    assert str(choose(None, None, older)) == "erc20-amoy-tglm"
    # Real money is never the default.
    assert str(choose(None, None, older[-2:])) == "erc20-hoodi-tglm"
    assert str(choose("Polygon", "ERC20", REAL)) == "erc20-polygon-glm"


@pytest.mark.parametrize(
    ("network", "driver", "said"),
    [
        ("hoodi", "erc20", None),
        ("mars", "erc20", "no network 'mars' for erc20; it has amoy, hoodi, holesky, sepolia, pol"),
        ("hoodi", "zksync", "yagna has no payment driver 'zksync'; it has erc20"),
        ("x\n", "erc20", r"no network 'x\n' for"),
    ],
)
def test_what_is_lacking_is_named_with_what_there_is(
    network: str, driver: str, said: str | None
) -> None:
    found = lacks(REAL, choose(network, driver, REAL))
    assert (found is None) == (said is None)
    assert said is None or said in (found or "")


def test_a_token_that_is_another() -> None:
    odd = [Platform("erc20", "hoodi", "usdc")]
    assert lacks(odd, choose("hoodi", None, odd)) == "yagna has no tglm on hoodi; it has usdc"


@pytest.mark.parametrize(
    ("status", "body", "found"),
    [
        (200, [{"platform": str(REAL[0])}, {"platform": "a-b"}, {"platform": 1}, 3], REAL[:1]),
        (200, [], None),
        (200, {"a": 1}, None),
        (200, "x", None),
        (404, [{"platform": str(REAL[0])}], None),
    ],
)
def test_what_yagna_may_answer(status: int, body: object, found: object) -> None:
    assert platforms_in(httpx.Response(status, json=body)) == found
    assert platforms_in(httpx.Response(200, text="<html>")) is None


class Asked(Payments):
    """A yagna that gives these answers, the last for ever; an exception is raised."""

    def __init__(self, *answers: object, network: str | None = None) -> None:
        super().__init__(dict, network=network, driver=None)
        self.answers = list(answers)

    async def _answer(self) -> list[Platform] | None:
        answer = self.answers.pop(0) if self.answers[1:] else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[return-value]


async def test_the_recipe_goes_before_the_user() -> None:
    payments = Asked(REAL, network="polygon")
    assert (await payments.variables(recipe()))["YAGNA_PAYMENT_NETWORK"] == "polygon"
    assert await payments.variables(recipe(network="amoy")) == {
        "YAGNA_PAYMENT_DRIVER": "erc20",
        "YAGNA_PAYMENT_NETWORK": "amoy",
    }
    with pytest.raises(ConfigError, match="no payment driver 'zk'"):
        await payments.variables(recipe(driver="zk"))


async def test_a_yagna_that_was_replaced_is_asked_again() -> None:
    payments = Asked(REAL, [*REAL, Platform("erc20", "new", "tglm")])
    await payments.variables(recipe())
    assert (await payments.variables(recipe(network="new")))["YAGNA_PAYMENT_NETWORK"] == "new"


async def test_nothing_is_refused_while_nobody_can_tell() -> None:
    for answer in (None, TimeoutError(), httpx.ConnectError("x"), ValueError("no key")):
        payments = Asked(answer, network="mars")
        assert (await payments.variables(recipe()))["YAGNA_PAYMENT_NETWORK"] == "mars"
