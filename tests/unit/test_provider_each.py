"""Which task goes to which provider, and what becomes of it."""

from __future__ import annotations

import errno
import io
from decimal import Decimal
from pathlib import Path

import anyio
import pytest

from cpodfs.runs import provider_work
from cpodfs.runs.provider_each import LANE_FAILURES, EachWork
from cpodfs.runs.provider_errors import RunFailed
from cpodfs.runs.provider_market import Strategy
from cpodfs.runs.provider_status import Hired, Reporter, Status
from cpodfs.runs.provider_work import Job, Shop, SingleWork

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def status() -> Status:
    return Status(Decimal(1))


@pytest.fixture
def work(tmp_path: Path, status: Status, anyio_backend: str) -> EachWork:
    job = Job(tmp_path, ("x",), "script", "payload", "output", "logs/run", tmp_path / "scratch")
    return _work(Shop(job, _Silent(status, io.BytesIO()), frozenset()))


class _Silent(Reporter):
    def changed(self) -> None:
        return

    def log(self, stream: str, data: bytes) -> None:
        self._out.write(data)


def _work(shop: Shop) -> EachWork:
    return EachWork(shop, ["payload/a", "payload/b", "payload/c"], poll_s=1.0, retries=1)


def lane(name: str) -> Hired:
    return Hired(name, f"0x{name}", f"agreement-{name}")


async def test_each_task_is_given_out_once(work: EachWork, status: Status) -> None:
    one, two = lane("one"), lane("two")
    first, second = work._next(one), work._next(two)
    assert first is not None
    assert second is not None
    assert (first.path, second.path) == ("payload/a", "payload/b")
    assert work.lanes_wanted() == 3
    work._finish(first, one, 0, 0.1)
    third = work._next(one)
    assert third is not None
    assert third.path == "payload/c"
    work._finish(second, two, 0, 0.1)
    assert work._next(two) is None
    assert not work.over.is_set()
    work._finish(third, one, 0, 0.1)
    assert work.over.is_set()
    assert (work.exit_code, work.error) == (0, None)
    assert status.tasks == {"total": 3, "done": 3, "failed": 0, "left": 0}


async def test_the_logs_of_all_tasks_have_one_limit(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(provider_work, "LOG_LIMIT_BYTES", 10)
    said = io.BytesIO()
    job = Job(tmp_path, ("x",), "script", "payload", "output", "logs/run", tmp_path / "scratch")
    shop = Shop(job, _Silent(Status(Decimal(1)), said), frozenset())
    kept = [shop.within_limit(text) for text in (b"12345", b"6789", b"abc", b"d")]
    assert kept == [b"12345", b"6789", b"a", b""]
    assert said.getvalue().count(b"are cut: 10 bytes") == 1


async def test_a_failed_task_goes_to_another_provider(work: EachWork, status: Status) -> None:
    one, two = lane("one"), lane("two")
    task = work._next(one)
    assert task is not None
    work._finish(task, one, 4, 0.1)
    assert task.state == "waiting"
    for _ in range(2):
        other = work._next(one)
        assert other is not None
        assert other is not task
        work._finish(other, one, 0, 0.1)
    # Only what failed here is left: another provider is to be hired.
    assert work._next(one) is None
    assert work._next(two) is task
    work._finish(task, two, 4, 0.1)
    assert work.over.is_set()
    assert work.exit_code == 1
    assert work.error == (
        "1 of 3 tasks failed; the first: payload/a: exit code 4 on two (2 attempts), "
        "see logs/run/tasks/1.log"
    )
    assert status.failed == [{"task": 1, "file": "payload/a", "error": "exit code 4 on two"}]


async def test_results_that_the_pod_cannot_hold_are_not_forgotten(
    tmp_path: Path, status: Status
) -> None:
    said = io.BytesIO()
    job = Job(tmp_path, ("x",), "script", "payload", "output", "logs/run", tmp_path / "scratch")
    shop = Shop(job, _Silent(status, said), frozenset())
    each, single = _work(shop), SingleWork(shop, 1.0, 0)
    shop._miss({"'output/a'": "reserved"})
    shop._miss({"'output/a'": "reserved", "'output/b'": "not UTF-8"})
    assert said.getvalue().count(b"not brought: 'output/a': reserved") == 1
    text = "2 results are missing, which the pod cannot hold; the first: 'output/a': reserved"
    single._finish(0)
    assert (single.exit_code, single.error) == (125, text)
    single._finish(3)
    assert (single.exit_code, single.error) == (3, f"the program failed with exit code 3; {text}")
    assert (each.exit_code, each.error) == (125, text)
    each.tasks[0].state = "failed"
    assert each.exit_code == 1
    assert str(each.error).endswith(f"see logs/run/tasks/1.log; {text}")
    assert status.shown()["missing"] == [
        {"file": "'output/a'", "error": "reserved"},
        {"file": "'output/b'", "error": "not UTF-8"},
    ]


async def test_a_provider_does_not_get_again_what_it_has_failed(
    work: EachWork, status: Status
) -> None:
    one = lane("one")
    task = work._next(one)
    assert task is not None
    for other in work.tasks[1:]:
        other.state = "done"
    work.lane_ended(one, "activity lost")
    assert work._next(one) is None
    assert not work.wants("0xone")
    assert work.wants("0xtwo")
    work.nobody("no other provider in 5 s")
    assert work.over.is_set()
    assert status.tasks == {"total": 3, "done": 2, "failed": 1, "left": 0}


async def test_nobody_for_tasks_that_were_never_tried_fails_the_run(work: EachWork) -> None:
    with pytest.raises(RunFailed, match="no offers"):
        work.nobody("no offers")


async def test_a_provider_that_fails_what_others_can_do_gets_nothing_more(tmp_path: Path) -> None:
    job = Job(tmp_path, ("x",), "script", "payload", "output", "logs/run", tmp_path / "scratch")
    shop = Shop(job, _Silent(Status(Decimal(1)), io.BytesIO()), frozenset())
    work = EachWork(shop, [f"payload/{n}" for n in range(5)], poll_s=1.0, retries=1)
    bad, good = lane("bad"), lane("good")
    for left in (3, 2, 1):
        task = work._next(bad)
        assert task is not None
        work._finish(task, bad, 1, 0.1)
        assert work.wants("0xbad")
        assert work._next(good) is task
        work._finish(task, good, 0, 0.1)
        assert work.wants("0xbad") == (left > 1)


async def test_a_lane_that_is_lost_gives_its_task_back(work: EachWork) -> None:
    one = lane("one")
    task = work._next(one)
    assert task is not None
    work.lane_ended(one, "provider vanished")
    assert (task.state, task.attempts, task.failed_on) == ("waiting", 1, {"0xone"})
    work.lane_ended(one, "provider vanished")
    assert task.attempts == 1
    again = work._next(lane("two"))
    assert again is task
    work.lane_ended(lane("two"), None)
    assert (task.state, task.attempts) == ("waiting", 1)


async def test_a_lane_that_is_lost_counts_once(work: EachWork) -> None:
    for _ in range(2):
        task = work._next(lane("one"))
        assert task is not None
        work.lane_ended(lane("one"), "provider vanished")
        assert work._next(lane("two")) is task
        work._finish(task, lane("two"), 0, 0.1)
    assert work.wants("0xone")


async def test_providers_that_only_fail_end_the_run(work: EachWork) -> None:
    for _ in range(LANE_FAILURES - 1):
        work.lane_ended(lane("one"), "no")
    with pytest.raises(RunFailed, match="8 providers in a row failed; the last: no"):
        work.lane_ended(lane("one"), "no")


async def test_what_waiting_does_not_mend_ends_the_run_at_once(work: EachWork) -> None:
    def refused() -> None:
        raise OSError(errno.EACCES, "no")

    with (
        anyio.fail_after(provider_work.MOUNT_WAIT_S / 2),
        pytest.raises(RunFailed, match="the pod cannot be used"),
    ):
        await work._shop.in_pod(refused)


class Offer:
    def __init__(self, issuer: str, cpu: float, env: float, start: float) -> None:
        self.issuer, self.id = issuer, issuer
        self.props = {
            "golem.com.scheme": "payu",
            "golem.com.pricing.model": "linear",
            "golem.com.pricing.model.linear.coeffs": [cpu, env, start],
            "golem.com.usage.vector": ["golem.usage.cpu_sec", "golem.usage.duration_sec"],
        }


async def test_prices_and_failures_decide_who_is_hired() -> None:
    from cpodfs.recipe import parse_recipe

    recipe = (
        b'{"golem": {"exec": "x", "runtime": {"image": "x", "budget": 0.5,'
        b'"max_price": {"start": 0.7, "cpu_hour": 0.36, "env_hour": 0.036}}}}'
    )
    runtime = parse_recipe(recipe, file="a.recipe").runtime
    assert runtime is not None
    strategy = Strategy(runtime, lambda: Decimal("0.5"))
    exact = await strategy.score_offer(Offer("a", 0.0001, 0.00001, 0.0))
    dearer = await strategy.score_offer(Offer("b", 0.0001, 0.00001, 0.1))
    assert exact > dearer > 0
    for offer in (
        *(Offer("c", 0.00011, 0.00001, 0.0), Offer("c", 0.0001, 0.000011, 0.0)),
        *(Offer("c", 0.0, 0.0, 0.6), Offer("c", 0.0, 0.0, 0.71)),
    ):
        assert await strategy.score_offer(offer) < 0
    assert strategy.too_dear == 4
    strategy.strikes["a"] = 1
    assert 0 < await strategy.score_offer(Offer("a", 0.0001, 0.00001, 0.0)) < dearer
    strategy.strikes["a"] = 3
    assert await strategy.score_offer(Offer("a", 0.0001, 0.00001, 0.0)) < 0
