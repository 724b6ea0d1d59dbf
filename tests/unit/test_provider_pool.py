"""Start prices are money: no agreement is signed that the budget cannot bear."""

from __future__ import annotations

import io
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest
from ya_market import ApiException
from yapapi.agreements_pool import BufferedAgreement

from cpodfs.runs.provider_pool import Pool
from cpodfs.runs.provider_status import Hired, Price, Reporter, Status

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def properties(start: float) -> dict[str, Any]:
    return {
        "golem.com.scheme": "payu",
        "golem.com.pricing.model": "linear",
        "golem.com.pricing.model.linear.coeffs": [0.0, 0.0, start],
        "golem.com.usage.vector": ["golem.usage.cpu_sec", "golem.usage.duration_sec"],
        "golem.node.id.name": "one",
    }


class Agreement:
    def __init__(self, name: str, start: float) -> None:
        self.id = f"agreement {name}"
        view = SimpleNamespace(
            properties=properties(start), extract=lambda what: what.from_properties(properties(0))
        )
        self.details = SimpleNamespace(provider_view=view, requestor_view=view)

    async def get_details(self) -> Any:
        return self.details

    async def confirm(self) -> bool:
        return True


class Proposal:
    def __init__(self, name: str, start: float) -> None:
        self.issuer, self.props, self._start = name, properties(start), start

    async def create_agreement(self) -> Agreement:
        return Agreement(self.issuer, self._start)


def pool(status: Status) -> Pool:
    engine = SimpleNamespace(recycle_offer=lambda _offer: None, _market_api=None)
    job = SimpleNamespace(engine=engine, emit=lambda *_, **__: None)
    reporter = Reporter(status, io.BytesIO())
    return Pool(job, None, reporter, lambda name: name != "unwanted")  # type: ignore[arg-type]


async def sign(offers: Pool) -> str | None:
    agreement = await offers._get_agreement()
    if agreement is None:
        return None
    held: BufferedAgreement = offers._agreements[agreement.id]
    held.worker_task = object()  # type: ignore[assignment]
    return str(agreement.id)


async def test_start_prices_are_set_aside_from_the_signature_on() -> None:
    status = Status(Decimal(1))
    offers = pool(status)
    for name in ("a", "b", "c", "d"):
        await offers.add_proposal(1.0, Proposal(name, 0.4))  # type: ignore[arg-type]
    assert await sign(offers) is not None
    second = await sign(offers)
    assert second is not None
    assert status.committed() == Decimal("0.8")
    assert await sign(offers) is None
    assert offers.too_dear() == 2
    # One that nothing became of costs nothing: the offers are still there.
    status.hired[second] = Hired("x", "0x", second, "terminated")
    assert await sign(offers) is not None
    await offers.add_proposal(2.0, Proposal("unwanted", 0.0))  # type: ignore[arg-type]
    await offers.add_proposal(0.1, Proposal("free", 0.0))  # type: ignore[arg-type]
    assert await sign(offers) == "agreement free"


async def test_what_another_yagna_does_not_know_is_not_over() -> None:
    """The signature's answer was lost, and then somebody else answered."""
    status = Status(Decimal(1))
    gone = ApiException(status=404)

    async def unknown(_key: str, **_: Any) -> None:
        raise gone

    api = SimpleNamespace(get_agreement=unknown, terminate_agreement=unknown)
    same = [False]

    async def is_same() -> bool:
        return same[0]

    offers = pool(status)
    offers._market_api = SimpleNamespace(_api=api)
    offers._yagna = SimpleNamespace(is_same=is_same)  # type: ignore[assignment]
    agreement = Agreement("a", 0.0)
    agreement.confirm = offers.cycle  # type: ignore[method-assign]  # says nothing
    assert await offers._prepare_agreement(agreement) is None
    assert status.signing == [agreement.id]
    status.hired["b"] = Hired("x", "0x", "b")
    await offers.end("b")
    assert status.hired["b"].agreement_state == "approved"
    same[0] = True
    await offers.end("b")
    assert status.hired["b"].agreement_state == "terminated"


def test_what_is_committed() -> None:
    status = Status(Decimal(1), prices={"a": Price(Decimal("0.4"), Decimal("0.01"))})
    assert status.committed() == Decimal("0.43")
    hired = status.hired["a"] = Hired("x", "0x", "a", activity="1")
    assert status.committed() == Decimal("0.43")
    hired.spent = Decimal("0.5")
    assert status.committed() == Decimal("0.53")
    hired.activity_state = "ended"
    assert status.committed() == Decimal("0.5")
    hired.spent, hired.paid = Decimal("0.3"), True
    assert status.committed() == Decimal("0.3")
