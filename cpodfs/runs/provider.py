"""A provider run, as a process of its own: ``python -m cpodfs.runs.provider``.

Gets its job as JSON on stdin, speaks JSON lines on stdout (`provider_status`), is ended by SIGTERM:
activities and agreements are then ended and paid before it leaves. asyncio, because yapapi is; the
supervisor starts it, and the driver never imports it. Its exit code is the program's, or 125.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import resource
import shutil
import signal
import sys
from collections.abc import Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
from yapapi import Golem
from yapapi.engine import NoPaymentAccountError
from yapapi.payload import Payload, vm
from yapapi.payload.package import PackageException

from cpodfs.recipe import Runtime
from cpodfs.runs.provider_bills import Bills
from cpodfs.runs.provider_books import SETTLE_S, Books
from cpodfs.runs.provider_each import EachWork
from cpodfs.runs.provider_ends import CALL_S, RUN_OVER, Payer, destroy, release, terminate
from cpodfs.runs.provider_errors import RunFailed, describe
from cpodfs.runs.provider_files import MAX_BYTES, matching
from cpodfs.runs.provider_link import GRACE_S
from cpodfs.runs.provider_market import FAILED, Crew, Strategy
from cpodfs.runs.provider_remote import PROBE_S, RETRY_S, Yagna
from cpodfs.runs.provider_status import OPEN, Reporter, Status
from cpodfs.runs.provider_work import Job, Shop, SingleWork

_CANCEL_SETTLE_S = 12.0
_STOP_S = GRACE_S - 11.0
"""From the request to stop until nothing more is waited for; then money is released, and gftp ends."""
_LEAVE_S = 3.0
_IMAGE_S = 60.0
_YAGNA_S = 60.0
"""How long yagna and its gftp may take to begin, and to end, on a machine that is busy."""
_RESTART_S = 10.0
_PAY_EVERY_S = 0.5
_ALLOCATION_MARGIN = timedelta(days=1)
"""Beyond the run's timeout: invoices may come late. Then yagna releases the money by itself."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Outcome:
    """How it ended. ``error`` None: well."""

    error: str | None
    exit_code: int


def read_job(data: bytes) -> tuple[Job, Runtime]:
    """The job as the supervisor sends it. Raises ValueError, KeyError or TypeError."""
    given = json.loads(data)
    runtime = Runtime(
        **given["runtime"] | {"capabilities": tuple(given["runtime"]["capabilities"])}
    )
    job = Job(
        pod=Path(given["pod"]),
        argv=tuple(given["argv"]),
        script=given["script"],
        payload=given["payload"],
        output=given["output"],
        log=given["log"],
        scratch=Path(given["scratch"]),
    )
    return job, runtime


class Session:
    """One run, from its job to its outcome."""

    def __init__(self, job: Job, runtime: Runtime, reporter: Reporter) -> None:
        self._job = job
        self._runtime = runtime
        self._reporter = reporter
        self._bills = Bills()
        self._books = Books(reporter, self._bills)
        self._stop = asyncio.Event()
        self._stop_by: float | None = None
        # A little before: yagna's clock may be another.
        self._begun = datetime.now(UTC) - timedelta(minutes=5)
        self._expires = self._begun + timedelta(seconds=runtime.timeout_s) + _ALLOCATION_MARGIN
        self.settled = True
        """Nothing is open at the market, for all one knows."""

    def stop(self) -> None:
        """End it soon: what was begun at the market is ended and paid first, as far as that goes within
        the supervisor's grace."""
        if self._stop_by is None:
            self._stop_by = asyncio.get_running_loop().time() + _STOP_S
        self._stop.set()

    async def run(self) -> Outcome:
        """Never raises for what can go wrong at a market. Not to be cancelled: see `stop`."""
        golem, strategy = self._golem()
        engine = golem._engine
        try:
            work = await self._unless_stopped(self._work())
            await self._unless_stopped(self._await_yagna(engine._api_config))
            payload = await self._unless_stopped(self._payload())
        except RunFailed as error:
            return Outcome(str(error), FAILED)
        try:
            # To its end even when stopped: half a start leaves money set aside.
            async with asyncio.timeout(_YAGNA_S):
                await golem.start()
        except NoPaymentAccountError as error:
            return Outcome(str(error), FAILED)
        except Exception as error:  # noqa: BLE001 - yagna may fail in any way
            await self._take_back(engine)
            return Outcome(f"yagna cannot be used: {describe(error)}", FAILED)
        allocation = engine._budget_allocations[0]
        yagna = self._begin(engine, allocation)
        payer = asyncio.create_task(self._payer(engine, allocation).forever(_PAY_EVERY_S))
        failure: str | None = None
        crew = Crew(golem, yagna, self._runtime, self._reporter, strategy, work)
        try:
            await self._unless_stopped(crew.run(payload))
        except RunFailed as error:
            failure = str(error)
        await self._settle(golem, yagna, allocation)
        payer.cancel()
        if failure is not None:
            return Outcome(failure, FAILED)
        return Outcome(work.error, work.exit_code if work.exit_code is not None else FAILED)

    async def _await_yagna(self, config: Any) -> None:
        """Give a yagna that is being restarted the time to come back; what is wrong with one that does
        not, the start will say."""
        deadline = asyncio.get_running_loop().time() + _RESTART_S
        async with aiohttp.ClientSession() as session:
            while asyncio.get_running_loop().time() < deadline:
                with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                    async with asyncio.timeout(PROBE_S), session.get(f"{config.root_url}/me"):
                        return
                await asyncio.sleep(RETRY_S)

    def _begin(self, engine: Any, allocation: Any) -> Yagna:
        """Write down what is set aside, and take paying into our own hands: yapapi stops for good when
        yagna does not answer once."""
        for service in engine._services:
            service.cancel()
        status = self._reporter.status
        status.allocation, status.payer = allocation.id, allocation.payment_address
        status.begun = self._begun.isoformat(timespec="milliseconds")
        self._reporter.tell()
        session, root = engine._root_api_session, engine._api_config.root_url
        yagna = Yagna(session, root, self._reporter.note)
        yagna.identity = allocation.payment_address
        return yagna

    async def _take_back(self, engine: Any) -> None:
        """Release what half a start has set aside; what cannot be now is left to who settles debts."""
        found = {one.id for one in engine._budget_allocations}
        with contextlib.suppress(Exception):
            async with asyncio.timeout(CALL_S):
                # One that was made though the answer was lost: nobody else's is over just then.
                found |= {
                    one.id
                    async for one in engine._payment_api.allocations()
                    if abs(one.expires - self._expires) < timedelta(milliseconds=1)
                }
        for key in found:
            if not await release(engine._payment_api._api, key):
                self.settled = False
                self._reporter.status.allocation = key

    def _payer(self, engine: Any, allocation: Any) -> Payer:
        books, api = self._books, engine._payment_api._api
        return Payer(api, [allocation], self._begun, books.check, books.paid, books.refuse)

    async def _unless_stopped(self, doing: Coroutine[Any, Any, _T]) -> _T:
        """Its result; when stopped, it is cancelled and waited for. Raises RunFailed then."""
        task, stop = asyncio.create_task(doing), asyncio.create_task(self._stop.wait())
        await asyncio.wait([task, stop], return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait([task])
        if task.cancelled():
            raise RunFailed("cancelled")
        return task.result()

    async def _work(self) -> SingleWork | EachWork:
        pattern, retries = self._runtime.foreach, self._runtime.retries
        if pattern is None:
            shop = Shop(self._job, self._reporter, frozenset())
            return SingleWork(shop, self._runtime.poll_s, retries)
        paths = await asyncio.to_thread(matching, self._job.pod, pattern)
        if not paths:
            raise RunFailed(f"golem.runtime.foreach: no file matches {pattern!r}")
        shop = Shop(self._job, self._reporter, frozenset(paths))
        return EachWork(shop, paths, self._runtime.poll_s, retries)

    async def _payload(self) -> Payload:
        runtime = self._runtime
        image = {"image_hash" if runtime.image_is_hash else "image_tag": runtime.image}
        try:
            async with asyncio.timeout(_IMAGE_S):
                package = await vm.repo(
                    **image,
                    min_mem_gib=runtime.min_mem_gib,
                    min_storage_gib=runtime.min_storage_gib,
                    min_cpu_threads=runtime.min_cpu_threads,
                    capabilities=list(runtime.capabilities),
                )
        except PackageException as error:
            raise RunFailed(f"image unknown: {runtime.image}: {error}") from None
        except Exception as error:  # noqa: BLE001 - the registry may fail in any way
            if ": 404" in str(error):
                raise RunFailed(f"image unknown: {runtime.image}") from None
            raise RunFailed(f"image {runtime.image}: {describe(error)}") from None
        return for_runtime(package, runtime.type)

    def _golem(self) -> tuple[Golem, Strategy]:
        runtime, status = self._runtime, self._reporter.status
        strategy = Strategy(runtime, lambda: status.budget - status.committed())
        golem = Golem(
            budget=status.budget,
            strategy=strategy,
            subnet_tag=runtime.subnet,
            payment_driver=runtime.driver,
            payment_network=runtime.network,
            event_consumer=self._books,
        )
        engine = golem._engine
        engine._create_allocations = lambda: self._set_aside(engine)
        return golem, strategy

    async def _set_aside(self, engine: Any) -> Any:
        """As yapapi does, but not for ten years, should we be unable to release it."""
        engine._budget_allocations.append(
            await engine._payment_api.new_allocation(
                engine._budget_amount,
                payment_platform="-".join(
                    (engine._payment_driver, engine._payment_network, engine._payment_token)
                ),
                payment_address=await engine._id(),
                expires=self._expires,
            ).__aenter__()
        )
        return await engine._payment_api.decorate_demand([engine._budget_allocations[0].id])

    async def _settle(self, golem: Golem, yagna: Yagna, allocation: Any) -> None:
        """End and pay what is open, leave the market; what cannot be done now is left to others."""
        engine = golem._engine
        ending = asyncio.create_task(self._end_all(engine, yagna))
        unpaid = await self._books.settle(
            lambda: self._left_s(_CANCEL_SETTLE_S) if self._stop.is_set() else SETTLE_S
        )
        await asyncio.wait([ending], timeout=self._left_s(SETTLE_S))
        ending.cancel()
        if unpaid:
            self._reporter.note(f"not all is paid: {', '.join(unpaid)}")
        status = self._reporter.status
        is_open = any(one.agreement_state in OPEN for one in status.hired.values())
        if not (is_open or status.signing or self._books.owed()):
            # Else the allocation must stay: it is what the rest will be paid from.
            released = await release(engine._payment_api._api, allocation.id)
            self.settled = released and await yagna.is_same()
        else:
            self.settled = False
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_LEAVE_S):
                await golem.stop(wait_for_payments=False)

    def _left_s(self, usual_s: float) -> float:
        """How long something may take that usually takes so long at most."""
        if self._stop_by is None:
            return usual_s
        return max(0.0, min(usual_s, self._stop_by - asyncio.get_running_loop().time()))

    async def _end_all(self, engine: Any, yagna: Yagna) -> None:
        """Once more, for all whose end yagna has not confirmed."""
        status, control = self._reporter.status, engine._activity_api._api
        market = engine._market_api._api

        async def end(key: str) -> None:
            hired = status.hired.get(key)
            if hired is not None and hired.activity is not None:
                await destroy(control, hired.activity)
            if not (await terminate(market, key, RUN_OVER) and await yagna.is_same()):
                return
            if hired is not None:
                hired.agreement_state = "terminated"
            elif key in status.signing:
                status.signing.remove(key)

        left = [key for key, one in status.hired.items() if one.agreement_state in OPEN]
        await asyncio.gather(*map(end, {*left, *status.signing}))


def for_runtime(package: Any, name: str) -> Payload:
    """A package of `vm.repo` for the runtime of this name, such as ``vm-nvidia``; yapapi's own can only be
    asked for from ``vm``, though the others take the same images and commands."""
    constraints = dataclasses.replace(package.constraints, runtime=name)
    return dataclasses.replace(package, constraints=constraints)


def limit_files(scratch: Path) -> None:
    """From now on no file that this process or its gftp writes may fill more than half of what is
    free where ``scratch`` is: how much a provider sends is for the provider to say."""
    free = shutil.disk_usage(scratch).free
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limits = [MAX_BYTES, free // 2] + ([] if hard == resource.RLIM_INFINITY else [hard])
    resource.setrlimit(resource.RLIMIT_FSIZE, (min(limits), hard))


async def _main(data: bytes, reporter_out: Any) -> int:
    job, runtime = read_job(data)
    reporter = Reporter(Status(Decimal(str(runtime.budget))), reporter_out)
    session = Session(job, runtime, reporter)
    # Nobody would mind the run any more, so it is brought to its end.
    reporter.on_unheard = session.stop
    job.scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
    limit_files(job.scratch)
    os.environ["TMPDIR"] = str(job.scratch)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, session.stop)
    try:
        outcome = await session.run()
    finally:
        shutil.rmtree(job.scratch, ignore_errors=True)
    reporter.end(outcome.error, outcome.exit_code, settled=session.settled)
    return outcome.exit_code


def main() -> int:
    """Entry point; see the module's docstring."""
    # Whatever a library prints must not stand between our lines.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    logging.basicConfig(level=logging.CRITICAL)
    return asyncio.run(_main(sys.stdin.buffer.read(), out))


if __name__ == "__main__":
    sys.exit(main())
