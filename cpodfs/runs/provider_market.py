"""Hiring for a provider run: offers, agreements, activities, what they cost, and their ends.

asyncio, in the provider run's own process; imports yapapi, `recipe`, ``provider_*``. It drives
yapapi's engine as yapapi's own Executor and ServiceRunner do (`Job`, `start_worker`), because the
Executor starts one worker in two seconds, retries anywhere, and hears nothing of a provider that is
gone. One lane is one agreement with one activity; it is never used again. Invariant: whatever ends a
lane, its activity is destroyed and its agreement terminated, or whoever settles is told that it is not.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from typing import Any, Protocol

from yapapi import Golem
from yapapi.engine import Job
from yapapi.payload import Payload
from yapapi.props.com import Counter
from yapapi.strategy import SCORE_REJECTED, LeastExpensiveLinearPayuMS

from cpodfs.recipe import Runtime
from cpodfs.runs.provider_bills import is_sane
from cpodfs.runs.provider_books import hired_for
from cpodfs.runs.provider_ends import destroy
from cpodfs.runs.provider_errors import (
    CommandFailed,
    LaneFailed,
    RunFailed,
    Vanished,
    describe,
    is_silence,
    is_unanswered,
)
from cpodfs.runs.provider_pool import Pool, affordable
from cpodfs.runs.provider_remote import Remote, Yagna
from cpodfs.runs.provider_status import UNKNOWN, Hired, Reporter, Status

STRIKES = 3
"""A provider that has failed so often in this run is not hired again."""
FAILED = 125
"""Exit code for a failure that is not the program's."""
_EXPIRY_MARGIN = timedelta(minutes=5)
_WATCH_S = 1.0
_ANSWER_S = 5.0
_LANES_END_S = 10.0
_LEFT_END_S = 3.0
_RETRY_S = 0.5


class Work(Protocol):
    """What the lanes do. ``over`` is set when nothing is left to be done."""

    over: asyncio.Event

    def lanes_wanted(self) -> int:
        """How many providers would have something to do now."""

    def wants(self, provider_id: str) -> bool:
        """Whether this provider would have something to do."""

    async def lane(self, remote: Remote, hired: Hired) -> None:
        """Work with one provider. Raises LaneFailed; its end ends the lane."""

    def lane_ended(self, hired: Hired, error: str | None) -> None:
        """A lane is over; what it had begun must be begun again. Raises RunFailed to give up."""

    def nobody(self, why: str) -> None:
        """Nobody can be hired for what is left. Gives it up, or raises RunFailed for all of it."""


class Strategy(LeastExpensiveLinearPayuMS):  # type: ignore[misc]
    """The cheapest within the recipe's limits, those that have failed us last."""

    def __init__(self, runtime: Runtime, budget_left: Callable[[], Decimal]) -> None:
        limits = {Counter.CPU: runtime.max_cpu_hour, Counter.TIME: runtime.max_env_hour}
        super().__init__(
            max_fixed_price=_decimal(runtime.max_start),
            max_price_for={
                counter: _decimal(limit) / 3600
                for counter, limit in limits.items()
                if limit is not None
            },
        )
        self._budget_left = budget_left
        self.strikes: dict[str, int] = {}
        self.too_dear = 0

    async def score_offer(self, offer: Any) -> float:
        strikes = self.strikes.get(offer.issuer, 0)
        if strikes >= STRIKES or not is_sane(offer.props):
            return float(SCORE_REJECTED)
        score = float(await super().score_offer(offer))
        if score < 0 or not affordable(offer.props, self._budget_left()):
            self.too_dear += 1
            return float(SCORE_REJECTED)
        return score / (1 + 10 * strikes)


def _decimal(limit: float | None) -> Decimal:
    # A little more, for yapapi compares it with a float that may stand for a little more.
    return Decimal(math.inf) if limit is None else Decimal(str(limit)) * (1 + Decimal("1e-9"))


class Crew:
    """The providers that work on one run. Use `run` once, inside a started ``golem``."""

    def __init__(
        self,
        golem: Golem,
        yagna: Yagna,
        runtime: Runtime,
        reporter: Reporter,
        strategy: Strategy,
        work: Work,
    ) -> None:
        self._engine = golem._engine
        self._yagna = yagna
        self._runtime = runtime
        self._reporter = reporter
        self._strategy = strategy
        self._work = work
        self._stop = asyncio.Event()
        self._workers: set[asyncio.Task[Any]] = set()
        self._news = asyncio.Event()
        self._failure: RunFailed | None = None

    @property
    def _status(self) -> Status:
        return self._reporter.status

    async def run(self, payload: Payload) -> None:
        """See the work through. Raises RunFailed; cancelled, it still ends everything it began."""
        expires = datetime.now(UTC) + timedelta(seconds=self._runtime.timeout_s) + _EXPIRY_MARGIN
        self._status.expires = expires.isoformat(timespec="milliseconds")
        job = Job(self._engine, expires, payload)
        job.agreements_pool = Pool(job, self._yagna, self._reporter, self._work.wants)
        self._engine.add_job(job)
        offers = asyncio.create_task(self._find_offers(job))
        self._reporter.phase("searching")
        try:
            async with asyncio.timeout(self._runtime.timeout_s) as limit:
                await self._hire(job, offers)
        except TimeoutError as error:
            if not limit.expired():
                raise RunFailed(f"the market does not answer: {describe(error)}") from None
            seconds = f"{self._runtime.timeout_s:g} s"
            raise RunFailed(f"timeout: not done after {seconds}") from None
        finally:
            self._reporter.phase("ending")
            offers.cancel()
            ending = asyncio.create_task(self._dismiss(job))
            while not ending.done():
                # Asked to stop meanwhile: that is what it does.
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.shield(ending)
            self._engine.finalize_job(job)

    async def _find_offers(self, job: Any) -> None:
        """yapapi gives up at the first call that fails: a yagna that was away has forgotten the demand."""
        while True:
            try:
                await job.find_offers()
            except Exception as error:
                if not is_silence(error):
                    raise
                self._reporter.note(f"the search for offers begins again: {describe(error)}")
            await asyncio.sleep(_RETRY_S)
            await self._yagna.wait()

    async def _hire(self, job: Any, offers: asyncio.Task[None]) -> None:
        """Keep as many lanes as there is work for, until the work is over."""
        loop = asyncio.get_running_loop()
        since = loop.time()
        while not self._work.over.is_set():
            if self._failure is not None:
                raise self._failure
            if offers.done():
                error = offers.exception() or TimeoutError()
                if isinstance(error, RunFailed):
                    raise error
                raise RunFailed(f"the market does not answer: {describe(error)}")
            with contextlib.suppress(Exception):
                await job.agreements_pool.cycle()
            wanted = min(self._runtime.workers, self._work.lanes_wanted())
            if len(self._workers) < wanted and await self._start_lane(job):
                since = loop.time()
                continue
            if self._workers or not wanted:
                since = loop.time()
            # A yagna that was away knows no offers when it comes back.
            elif loop.time() - max(since, self._yagna.back_at) >= self._runtime.offer_timeout_s:
                await self._yagna.wait()
                if loop.time() - self._yagna.back_at >= self._runtime.offer_timeout_s:
                    self._work.nobody(self._why_nobody(job))
            await self._wait_for_news(_RETRY_S)

    async def _start_lane(self, job: Any) -> bool:
        signed: list[Any] = []
        starting = asyncio.create_task(
            self._engine.start_worker(job, self._lane_in(job), signed.append)
        )
        try:
            worker = await asyncio.shield(starting)
        except asyncio.CancelledError:
            # An agreement may just have been signed: it must not be forgotten.
            await asyncio.wait([starting], timeout=_ANSWER_S)
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the next offer may do
            self._reporter.note(f"no agreement: {describe(error)}")
            return False
        if worker is None:
            return False
        self._workers.add(worker)
        worker.add_done_callback(partial(self._worker_done, signed))
        return True

    def _worker_done(self, signed: list[Any], worker: asyncio.Task[Any]) -> None:
        self._workers.discard(worker)
        if not worker.cancelled() and (error := worker.exception()) is not None:
            for hired in (hired_for(self._status, agreement) for agreement in signed):
                # Else it was the end of a lane, which has been dealt with.
                if hired.activity is None:
                    self._no_activity(hired, error)
        self._news.set()

    def _no_activity(self, hired: Hired, error: BaseException) -> None:
        if is_unanswered(error):
            # yagna was away: there may be one, which will be billed, and nobody is to blame.
            hired.activity = UNKNOWN
            self._lane_over(hired, None)
        else:
            self._lane_over(hired, f"no activity: {describe(error)}")

    async def _wait_for_news(self, timeout_s: float) -> None:
        waits = [asyncio.create_task(e.wait()) for e in (self._news, self._work.over)]
        try:
            await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        self._news.clear()

    def _why_nobody(self, job: Any) -> str:
        limit = f"{self._runtime.offer_timeout_s:g} s"
        offers, dear = self._status.offers, self._strategy.too_dear
        if not offers:
            return f"no offers: no provider answered in {limit}"
        if not job.proposals_confirmed and dear:
            return f"no offers within max_price and budget in {limit} ({dear} were too dear)"
        if not job.proposals_confirmed:
            return f"proposals rejected: {offers} offers in {limit}, and no provider agreed"
        if not self._strategy.strikes and job.agreements_pool.too_dear():
            left = self._status.budget - self._status.committed()
            return f"no offers within budget in {limit}: {left:f} GLM are left"
        if self._strategy.strikes:
            return f"no other provider in {limit} ({self._last_error()})"
        return f"no provider signed an agreement in {limit}"

    def _last_error(self) -> str:
        errors = [one.error for one in self._status.hired.values() if one.error]
        return f"the last one: {errors[-1]}" if errors else "none has failed"

    # -- one provider -----------------------------------------------------------------------------

    def _lane_in(self, job: Any) -> Callable[[Any], Any]:
        async def run_worker(context: Any) -> bool:
            await self._lane(job, context)
            # yapapi need not end the activity and the agreement: that is done.
            return True

        return run_worker

    async def _lane(self, job: Any, context: Any) -> None:
        hired = hired_for(self._status, context._agreement)
        hired.activity, hired.activity_state = context.id, "new"
        self._status.phase = "running"
        # At once, for whoever has to clean up after us.
        self._reporter.tell()
        remote = Remote(context, self._yagna)
        work = asyncio.create_task(self._work.lane(remote, hired))
        watch = asyncio.create_task(self._watch(remote, context, hired))
        stop = asyncio.create_task(self._stop.wait())
        error: str | None = None
        try:
            await asyncio.wait([work, watch, stop], return_when=asyncio.FIRST_COMPLETED)
            if not stop.done() or work.done():
                error = await self._why_ended(work, watch, context, hired)
        finally:
            for task in (work, watch, stop):
                task.cancel()
            await asyncio.wait([work, watch, stop])
            await self._close_lane(job, context, hired, error)

    async def _close_lane(self, job: Any, context: Any, hired: Hired, error: str | None) -> None:
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_ANSWER_S):
                await self._take_cost(context, hired)
        hired.activity_state = "ended"
        self._lane_over(hired, error)
        await destroy(context._activity._api, context.id)
        await job.agreements_pool.end(hired.agreement)

    def _lane_over(self, hired: Hired, error: str | None) -> None:
        hired.error = error
        if error is not None:
            self._strategy.strikes[hired.id] = self._strategy.strikes.get(hired.id, 0) + 1
            self._reporter.note(f"{hired.name}: {error}")
        try:
            self._work.lane_ended(hired, error)
        except RunFailed as failure:
            self._failure = self._failure or failure
        self._news.set()
        self._reporter.changed()

    async def _why_ended(
        self, work: asyncio.Task[None], watch: asyncio.Task[None], context: Any, hired: Hired
    ) -> str | None:
        """What went wrong; None when nothing did, or when it is the whole run that fails."""
        error = (work if work.done() else watch).exception()
        if isinstance(error, RunFailed):
            self._failure = self._failure or error
            return None
        if isinstance(error, Vanished):
            hired.agreement_state = "vanished"
        if isinstance(error, CommandFailed):
            return await self._lost(context) or str(error)
        if error is None:
            return None if work.done() else "the watch ended"
        return describe(error)

    async def _lost(self, context: Any) -> str | None:
        """Whether the activity is no more; asked when something failed for whatever reason."""
        try:
            async with asyncio.timeout(_ANSWER_S):
                state = await context.get_raw_state()
        except Exception:  # noqa: BLE001 - then we do not know
            return None
        if "Terminated" not in state.state:
            return None
        return f"activity lost: {state.error_message or state.reason or 'ended by the provider'}"

    async def _watch(self, remote: Remote, context: Any, hired: Hired) -> None:
        """Follow what the lane costs. Ends by LaneFailed (lost, vanished) or RunFailed (budget)."""

        async def look() -> Any:
            async with asyncio.timeout(_ANSWER_S):
                await self._take_cost(context, hired)
                return await context.get_raw_state()

        while True:
            await asyncio.sleep(_WATCH_S)
            state = await remote.patiently(look)
            hired.activity_state = str(state.state[0]).lower()
            if "Terminated" in state.state:
                raise LaneFailed(await self._lost(context) or "activity lost")
            self._check_budget()

    async def _take_cost(self, context: Any, hired: Hired) -> None:
        cost = await context.get_cost()
        if cost is not None and Decimal(str(cost)) > hired.spent:
            hired.spent = Decimal(str(round(cost, 12)))
            self._reporter.changed()

    def _check_budget(self) -> None:
        """Stop while what is owed can still be paid."""
        spent, budget = self._status.spent(), self._status.budget
        if self._status.committed() > budget:
            raise RunFailed(
                f"budget exhausted: {spent:f} of {budget:f} GLM are spent, and stopping costs the rest"
            )

    # -- the end ----------------------------------------------------------------------------------

    async def _dismiss(self, job: Any) -> None:
        self._stop.set()
        if self._workers:
            _, late = await asyncio.wait(self._workers, timeout=_LANES_END_S)
            for worker in late:
                worker.cancel()
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_LEFT_END_S):
                await job.agreements_pool.terminate_all(reason={})
