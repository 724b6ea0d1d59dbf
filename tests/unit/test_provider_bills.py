"""What is paid of what providers bill."""

from __future__ import annotations

from decimal import Decimal

import pytest

from cpodfs.runs.provider_bills import SLACK_S, Bills, Overbilled, is_sane, price_of

HOUR_S = 3600


def offer(cpu: object = 0.0, env: object = 0.0, start: object = 0.0, threads: object = 2) -> dict:
    return {
        "golem.com.scheme": "payu",
        "golem.com.pricing.model": "linear",
        "golem.com.pricing.model.linear.coeffs": [cpu, env, start],
        "golem.com.usage.vector": ["golem.usage.cpu_sec", "golem.usage.duration_sec"],
        "golem.inf.cpu.threads": threads,
    }


@pytest.fixture
def now() -> list[float]:
    return [1000.0]


@pytest.fixture
def bills(now: list[float]) -> Bills:
    bills = Bills(lambda: now[0])
    bills.signed("a", price_of(offer(0.1, 0.01, 0.5)))
    return bills


def test_start_price_and_all_threads_for_the_time_that_passed(bills: Bills, now: list) -> None:
    a_second = Decimal("0.21")
    slack = Decimal(str(SLACK_S))
    assert bills.most("a") == Decimal("0.5") + a_second * slack
    now[0] += 10
    assert bills.most("a") == Decimal("0.5") + a_second * (slack + 10)
    assert bills.most("somebody else's") == 0


def test_what_may_be_paid(bills: Bills, now: list) -> None:
    now[0] += 10
    assert bills.checked("a", "3.65") == Decimal("3.65")
    assert bills.checked("a", "0") == 0
    for billed in ("3.66", "-0.1", "NaN", "Infinity", "a lot", None):
        with pytest.raises(Overbilled, match=r"3\.65"):
            bills.checked("a", billed)
    with pytest.raises(Overbilled):
        bills.checked("somebody else's", "0.01")


@pytest.mark.parametrize(
    "properties",
    [
        {},
        offer(cpu=float("nan")),
        offer(env=-0.1),
        offer(start=float("inf")),
        offer(start="much"),
        offer(threads="many"),
        offer(threads=-1, cpu=0.1),
        offer(threads=100_000),
    ],
)
def test_offers_that_cannot_be_reckoned_with(properties: dict) -> None:
    assert is_sane(offer(0.1, 0.1, 0.1))
    assert not is_sane(properties)
