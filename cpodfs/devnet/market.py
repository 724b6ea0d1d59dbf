"""A yagna-compatible market on this machine: requestors speak REST to it, providers live in it.

Imports its own package only. This module puts the parts together and owns their life: who is
booked when, what happens at a start after a crash, who ends what nobody asks for any more. The
app is to be bound to 127.0.0.1 and nowhere else: its tasks are this machine's processes.
"""

from __future__ import annotations

import asyncio
import hmac
import shutil
import socket
import time
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from cpodfs.devnet import guard, vpn
from cpodfs.devnet.activity import TERMINATED, Activity
from cpodfs.devnet.activity_api import ActivityApi
from cpodfs.devnet.agreements import Agreement, new_id
from cpodfs.devnet.container import Container, Isolation, kill_leftover, kill_marked, process_mark
from cpodfs.devnet.door import DOOR, Door, hold
from cpodfs.devnet.gftp import Registry
from cpodfs.devnet.ledger import Ledger
from cpodfs.devnet.market_api import MarketApi
from cpodfs.devnet.misbehave import MisbehaveApi, Misbehaviour
from cpodfs.devnet.negotiation import Negotiation
from cpodfs.devnet.net_api import NetApi
from cpodfs.devnet.pace import Pace
from cpodfs.devnet.payment_api import PaymentApi
from cpodfs.devnet.provider import (
    CHOSEN_PLATFORM,
    DEBIT_NOTE_INTERVAL,
    DEFAULT_PLATFORM,
    DEFAULT_PROVIDERS,
    Provider,
    ProviderSpec,
)
from cpodfs.devnet.registry_api import RegistryApi
from cpodfs.devnet.rest import Problem, iso, log, problems_as_json
from cpodfs.devnet.transfer import Transfers

MARKET: web.AppKey[Market] = web.AppKey("market")
_OPEN_PATHS = ("/registry/", "/devnet/")
"""The app-key, which every requestor has, opens neither; the latter has a key of its own."""
_VANISH_AFTER_S = 0.3
_SWEEP_S = 2.0
_INVOICE_DUE = timedelta(days=1)


class Market:
    """The parts and what connects them. Lives in one event loop; `running` is its life."""

    def __init__(
        self,
        state_dir: Path,
        *,
        providers: Sequence[ProviderSpec],
        seed: int,
        misbehave: Misbehaviour,
        gftp_dir: Path,
        sandbox: bool,
        pace: Pace,
    ) -> None:
        self._state_dir = state_dir
        self._sandbox = sandbox
        self._misbehave = misbehave
        self._pace = pace
        self._isolation = Isolation(None, "it was not asked for")
        self._ledger = Ledger(state_dir)
        self._transfers = Transfers(Registry(gftp_dir))
        self._activities: dict[str, tuple[Agreement, Activity]] = {}
        self._notes: dict[str, asyncio.Task[None]] = {}
        self._late: dict[str, asyncio.TimerHandle] = {}
        self._vanishing: set[asyncio.Task[None]] = set()
        self.negotiation = Negotiation(
            [Provider.create(spec, seed) for spec in providers],
            self._ledger.identity(),
            misbehave,
            self._book_agreement,
            lambda agreement: self._ledger.agreement_terminated(agreement.id),
            self._close_agreement,
            pace,
            seed,
        )
        self._payment = PaymentApi(self._ledger, pace)
        self._net = NetApi(self._connect, pace)
        self.door = Door(self._forget)

    @property
    def unconfined(self) -> str | None:
        """Why tasks are run without a sandbox; None when they are in one. Known once it serves."""
        return None if self._isolation.bwrap is not None else self._isolation.missing

    def routes(self) -> list[web.RouteDef]:
        activity = ActivityApi(
            self._activities, self._create_activity, self._end_activity, self._pace
        )
        return [
            web.get("/me", self._me),
            *MarketApi(self.negotiation, self._pace, self._ledger).routes(),
            *activity.routes(),
            *self._payment.routes(),
            *self._net.routes(),
            *RegistryApi(self._misbehave).routes(),
            *MisbehaveApi(self._misbehave, self._vanish, self._silence, self.door).routes(),
        ]

    async def _me(self, _request: web.Request) -> web.Response:
        found = {"identity": self._ledger.identity(), "name": "devnet", "role": "manager"}
        return web.json_response(found)

    async def running(self, _app: web.Application) -> AsyncIterator[None]:
        """aiohttp's ``cleanup_ctx``: clear up after a crash, sweep while serving, end everything."""
        self._recover()
        await asyncio.to_thread(shutil.rmtree, self._state_dir / "providers", ignore_errors=True)
        if self._sandbox:
            probe_dir = self._state_dir / "providers" / ".probe"
            self._isolation = await asyncio.to_thread(Isolation.probe, probe_dir)
        else:
            log.warning("sandbox_off hint='tasks run unconfined, as you asked'")
        async with self._transfers:
            self.negotiation.open()
            self._payment.open()
            sweeper = asyncio.create_task(self._sweep(), name="market sweeper")
            try:
                yield
            finally:
                sweeper.cancel()
                await self.door.close()
                self.negotiation.close()
                for agreement in list(self.negotiation.agreements.values()):
                    if agreement.state == "Approved":
                        await self._stop_agreement(agreement)
                self._send_late_invoices()
                self._payment.close()
                self._ledger.close()

    async def _stop_agreement(self, agreement: Agreement) -> None:
        why = "the market is stopping"
        if agreement.closed or agreement.provider.gone:
            await self.negotiation.close_agreement(agreement, why)
        else:
            await self.negotiation.terminate(agreement, "Provider", {"message": why})

    def _forget(self) -> None:
        """What yagna has only in memory, and loses when it is restarted."""
        self.negotiation.forget()
        self._payment.forget()
        self._net.forget()

    def _recover(self) -> None:
        """A market that was killed left processes and agreements open: end and bill them."""
        for row in self._ledger.activities_left_open():
            if row["pid"] is not None and kill_leftover(row["pid"], row["pid_started"]):
                log.warning("leftover_killed activity=%s pid=%s", row["id"], row["pid"])
            kill_marked(row["id"])
            self._ledger.activity_abandoned(row["id"])
        for key in self._ledger.open_agreements():
            log.warning("agreement_closed agreement=%s reason='market restarted'", key)
            self._ledger.agreement_terminated(key)
            self._ledger.agreement_closed(key, "the market was restarted")
            self._ledger.issue_invoice(key, _due())

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(
                min(_SWEEP_S, self._pace.idle_s / 4, self._pace.accept_timeout_s / 4)
            )
            for agreement in list(self.negotiation.agreements.values()):
                try:
                    await self._look_after(agreement)
                except Exception:  # noqa: BLE001 - one that fails must not end all that follow
                    log.exception("sweep_failed agreement=%s", agreement.id)
            self.negotiation.clear_up()
            known = self.negotiation.agreements
            for key, (agreement, _activity) in list(self._activities.items()):
                if agreement.id not in known:
                    del self._activities[key]

    async def _look_after(self, agreement: Agreement) -> None:
        """What a provider does of itself about an agreement of its own."""
        if agreement.state != "Approved" or agreement.closed or agreement.provider.gone:
            return
        if (why := self._break_reason(agreement)) is not None:
            log.warning("agreement_broken agreement=%s reason=%r", agreement.id, why)
            await self.negotiation.terminate(agreement, "Provider", {"message": why})
        elif agreement.expired():
            # Its requestor's yagna does not notice: there it stays approved.
            await self.negotiation.close_agreement(agreement, "the agreement has expired")

    def _break_reason(self, agreement: Agreement) -> str | None:
        now, pace = datetime.now(UTC), self._pace
        alive = any(self._activities[key][1].state != TERMINATED for key in agreement.activities)
        if not alive and time.monotonic() - agreement.idle_since > pace.idle_s:
            return f"No activity created within {pace.idle_s:g}s"
        oldest = self._ledger.oldest_unaccepted(agreement.id)
        if oldest and oldest < iso(now - timedelta(seconds=pace.accept_timeout_s)):
            return f"Requestor hasn't accepted a DebitNote within {pace.accept_timeout_s:g}s"
        return None

    # --- what Negotiation decides is booked here ---

    def _book_agreement(self, agreement: Agreement) -> None:
        chosen = agreement.demand_properties.get(CHOSEN_PLATFORM) or DEFAULT_PLATFORM
        address = agreement.demand_properties.get(f"golem.com.payment.platform.{chosen}.address")
        self._ledger.agreement_approved(
            agreement.json(),
            provider=agreement.provider.spec.name,
            provider_id=agreement.provider.node_id,
            platform=chosen,
            payer=str(address or self._ledger.identity()),
        )

    async def _close_agreement(self, agreement: Agreement, reason: str) -> None:
        for key in agreement.activities:
            await self._end_activity(self._activities[key][1], "the agreement was terminated")
        self._ledger.agreement_closed(agreement.id, reason)
        provider = agreement.provider
        if provider.gone or provider.draws(self._misbehave.lose_invoice):
            log.warning("invoice_lost agreement=%s provider=%s", agreement.id, provider.spec.name)
        elif self._misbehave.invoice_delay_s > 0:
            delay_s = self._misbehave.invoice_delay_s
            loop = asyncio.get_running_loop()
            self._late[agreement.id] = loop.call_later(delay_s, self._bill, agreement.id)
        else:
            self._bill(agreement.id)

    def _bill(self, agreement_id: str) -> None:
        self._late.pop(agreement_id, None)
        self._ledger.issue_invoice(agreement_id, _due(), Decimal(str(self._misbehave.overbill)))
        self._payment.changed.fire()

    def _send_late_invoices(self) -> None:
        for key, timer in list(self._late.items()):
            timer.cancel()
            self._bill(key)

    # --- providers that disappear ---

    async def _vanish(self, name: str | None, for_s: float | None) -> str | None:
        """Let a provider disappear, by name, or any that is at work; its name.

        With ``for_s`` it only cannot be reached for so long, and goes on meanwhile.
        """
        for provider in self.negotiation.providers:
            if not provider.gone and (
                provider.spec.name == name or (name is None and provider.busy_with)
            ):
                if for_s is None:
                    await self._disappear(provider)
                else:
                    self._cut_off(provider, for_s)
                return provider.spec.name
        return None

    def _silence(self, name: str, for_s: float) -> str | None:
        """Let a provider answer nothing for so long; its name, None when it is not known."""
        for provider in self.negotiation.providers:
            if provider.spec.name == name:
                provider.silent_until = time.monotonic() + for_s
                return name
        return None

    def _cut_off(self, provider: Provider, for_s: float) -> None:
        provider.gone = True
        log.warning("provider_cut_off provider=%s seconds=%g", provider.spec.name, for_s)

        def back() -> None:
            provider.gone = False

        asyncio.get_running_loop().call_later(for_s, back)

    async def _disappear(self, provider: Provider) -> None:
        provider.gone = True
        log.warning("provider_vanished provider=%s", provider.spec.name)
        for agreement, activity in list(self._activities.values()):
            if agreement.provider is provider:
                await self._end_activity(activity, "the provider vanished")
        if provider.busy_with is not None:
            # In its requestor's books it stays approved, for ever.
            self._ledger.agreement_closed(provider.busy_with, "the provider vanished")

    def _vanish_soon(self, provider: Provider) -> None:
        """For a command that has just begun: it is to be in the middle of it."""

        async def later() -> None:
            await asyncio.sleep(_VANISH_AFTER_S)
            if not provider.gone:
                await self._disappear(provider)

        task = asyncio.create_task(later())
        self._vanishing.add(task)
        task.add_done_callback(self._vanishing.discard)

    async def _connect(self, network: str, ip: str, port: int) -> socket.socket | None:
        """A connection to what listens in the activity that was deployed with this address."""
        for agreement, activity in self._activities.values():
            if activity.is_at(network, ip) and not agreement.provider.gone:
                return await asyncio.to_thread(vpn.connect, process_mark(activity.id), port)
        return None

    # --- activities ---

    async def _create_activity(self, agreement_id: str) -> Activity:
        agreement = self.negotiation.agreements.get(agreement_id)
        if agreement is None:
            raise Problem(404, f"Not found: Agreement [{agreement_id}] not found.")
        if agreement.state != "Approved":
            said = f"Agreement {agreement_id} is not Approved. Current state: {agreement.state}"
            raise Problem(400, f"Bad request: {said}")
        key = new_id()
        provider = agreement.provider
        if provider.gone:
            raise provider.unreachable("activity")
        if provider.draws(self._misbehave.refuse_activity):
            raise Problem(500, "the provider did not make the activity")
        container = Container(
            self._state_dir / "providers" / provider.spec.name / key,
            self._isolation,
            provider.spec.name,
            lambda pid, started: self._ledger.activity_process(key, pid, started),
        )
        activity = Activity(
            provider,
            container,
            self._transfers,
            key=key,
            package=agreement.demand_properties.get("golem.srv.comp.task_package"),
            misbehave=self._misbehave,
            pace=self._pace,
            on_change=self._book_activity,
            on_vanish=lambda: self._vanish_soon(provider),
        )
        self._ledger.activity_created(key, agreement.id)
        self._activities[key] = (agreement, activity)
        agreement.activities.append(key)
        await activity.begin()
        self._notes[key] = asyncio.create_task(self._write_debit_notes(agreement, activity))
        return activity

    def _book_activity(self, activity: Activity) -> None:
        self._ledger.activity_used(
            activity.id,
            activity.state,
            cpu_s=activity.cpu_s,
            duration_s=activity.duration_s,
            cost=activity.cost,
        )

    async def _end_activity(self, activity: Activity, reason: str | None = None) -> None:
        await activity.end(reason)
        notes = self._notes.pop(activity.id, None)
        if notes is not None:
            notes.cancel()
            agreement = self._activities[activity.id][0]
            agreement.idle_since = time.monotonic()
            if not agreement.provider.gone:
                self._debit(agreement, activity)

    async def _write_debit_notes(self, agreement: Agreement, activity: Activity) -> None:
        terms = agreement.proposal.properties
        interval_s = float(terms[DEBIT_NOTE_INTERVAL])
        while True:
            await asyncio.sleep(interval_s)
            if activity.state == TERMINATED:
                return
            self._book_activity(activity)
            if not agreement.provider.gone:
                self._debit(agreement, activity)

    def _debit(self, agreement: Agreement, activity: Activity) -> None:
        self._ledger.issue_debit_note(agreement.id, activity.id, activity.cost, activity.usage)
        self._payment.changed.fire()


def _due() -> str:
    return iso(datetime.now(UTC) + _INVOICE_DUE)


def _require_key(app_key: str) -> Middleware:
    expected = f"Bearer {app_key}".encode()

    @web.middleware
    async def require_key(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode()
        if not request.path.startswith(_OPEN_PATHS) and not hmac.compare_digest(given, expected):
            what = "Invalid" if given else "Missing"
            return web.Response(status=401, text=f"{what} application key")
        return await handler(request)

    return require_key


def create_market_app(
    state_dir: Path,
    *,
    app_key: str,
    control_key: str,
    providers: Sequence[ProviderSpec] = DEFAULT_PROVIDERS,
    seed: int = 0,
    misbehave: Misbehaviour | None = None,
    gftp_dir: Path,
    sandbox: bool = True,
    pace: Pace | None = None,
) -> web.Application:
    """The market as an aiohttp application; ``state_dir`` gets the ledger and providers' folders.

    The devnet starts it in an asyncio process of its own::

        keys = {"app_key": key, "control_key": control_key}
        app = create_market_app(state / "market", **keys, gftp_dir=state / "gftp")
        runner = web.AppRunner(app, shutdown_timeout=1.0)
        await runner.setup()                      # after a crash: leftovers are ended and billed
        await app[DOOR].open(runner, bound_socket)
        ...
        await runner.cleanup()                    # ends activities, agreements, processes

    and hands requestors `run_env.run_environment` with the same ``app_key`` and ``gftp_dir``.
    ``shutdown_timeout`` bounds the wait for long polls. One market per ``state_dir`` at a time.

    ``pace``: how long things take, and how long providers wait. ``sandbox``: confine tasks with bubblewrap if it works here;
    whether it does is said in the log. Raises OSError or sqlite3.Error when the state cannot be opened.
    """
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    market = Market(
        state_dir,
        providers=providers,
        seed=seed,
        misbehave=misbehave or Misbehaviour(),
        gftp_dir=gftp_dir,
        sandbox=sandbox,
        pace=pace or Pace(),
    )
    app = web.Application(
        middlewares=[
            hold,
            problems_as_json,
            guard.local_only,
            guard.controls_need_key(control_key, "/devnet/"),
            _require_key(app_key),
        ],
        client_max_size=16 << 20,
    )
    app[MARKET] = market
    app[DOOR] = market.door
    app.add_routes(market.routes())
    app.cleanup_ctx.append(market.running)
    return app
