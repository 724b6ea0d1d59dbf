"""An activity: one container of a provider, its batches of commands, what it uses and costs.

Imports `batch`, `container`, `pace`, `provider`, `rest`, `transfer`. It is yagna's exe-unit (its
exe_unit.rs): the commands of a batch run one after another up to the first failure; a batch that is
sent while a command of another one runs fails as busy. `Activity.end` is the one way out: afterwards
no process of it exists and its folder is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from decimal import Decimal

from cpodfs.devnet.batch import Batch, Capture, CommandFailed
from cpodfs.devnet.container import Container, ContainerError
from cpodfs.devnet.misbehave import Misbehaviour
from cpodfs.devnet.pace import Pace
from cpodfs.devnet.provider import Provider
from cpodfs.devnet.rest import Json, Problem, log
from cpodfs.devnet.transfer import Transfers

MAX_BATCHES = 1000
"""More than these, and those that finished first are forgotten."""

INITIALIZED, DEPLOYED, READY, TERMINATED = "Initialized", "Deployed", "Ready", "Terminated"

_TRANSFER_ERROR = "Local service error: Transfer error: "
_STATE_ERROR = "Local service error: State error: "
_EXPECTED = {
    INITIALIZED: "Activity is initialized - deploy() command is expected now",
    DEPLOYED: "Activity is deployed - start() command is expected now",
    READY: "Cannot send command after a successful start()",
}
_AFTER = {"deploy": DEPLOYED, "start": READY}


class Activity:
    """See the module. ``package``: what its demand wants to be deployed. ``on_change`` is called whenever state or usage are worth booking."""

    def __init__(
        self,
        provider: Provider,
        container: Container,
        transfers: Transfers,
        *,
        key: str,
        package: object,
        misbehave: Misbehaviour,
        pace: Pace,
        on_change: Callable[[Activity], None],
        on_vanish: Callable[[], None],
    ) -> None:
        self.id = key
        self.state = INITIALIZED
        self.pending: str | None = None
        """The state that the command that runs now leads to."""
        self.reason: str | None = None
        self.batches: dict[str, Batch] = {}
        self._addresses: set[tuple[str, str]] = set()
        """(network id, IP address) that it was deployed with."""
        self._package = package
        self._provider = provider
        self._container = container
        self._transfers = transfers
        self._misbehave = misbehave
        self._pace = pace
        self._on_change = on_change
        self._on_vanish = on_vanish
        self._begun = time.monotonic()
        self._ended: float | None = None
        self._running: dict[asyncio.Task[None], Batch] = {}
        self._ending: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        await asyncio.to_thread(self._container.create)
        self._container.start()

    @property
    def cpu_s(self) -> float:
        return self._container.cpu_s

    @property
    def duration_s(self) -> float:
        return (self._ended or time.monotonic()) - self._begun

    @property
    def usage(self) -> list[float]:
        """In the order of the offer's usage vector: processor seconds, seconds of existence."""
        return [self.cpu_s, self.duration_s]

    @property
    def cost(self) -> Decimal:
        return self._provider.spec.cost(self.cpu_s, self.duration_s)

    def is_at(self, network: str, ip: str) -> bool:
        """Whether it has this address in a network, and is there."""
        return self.state == READY and (network, ip) in self._addresses

    def unreachable(self) -> Problem:
        """What yagna says of an exe-unit that is not there (any more)."""
        return self._provider.unreachable(f"exeunit/{self.id}")

    def send(self, commands: list[tuple[str, Json]]) -> Batch:
        """Begin a batch. Raises Problem when the activity is over."""
        if self.state == TERMINATED:
            raise self.unreachable()
        self._forget_finished()
        batch = Batch(commands)
        self.batches[batch.id] = batch
        task = asyncio.create_task(self._run_batch(batch), name=f"batch {batch.id}")
        self._running[task] = batch
        task.add_done_callback(self._running.pop)
        return batch

    def _forget_finished(self) -> None:
        beyond = len(self.batches) - MAX_BATCHES + 1
        finished = [key for key, batch in self.batches.items() if batch.finished]
        for key in finished[: max(0, beyond)]:
            del self.batches[key]

    async def end(self, reason: str | None = None) -> None:
        """Stop everything, kill every process, remove the folder; all that is done at return.

        May be called again, at the same time too. Called by a command of the activity itself,
        it does not return: the command is cancelled like everything else.
        """
        if self._ending is None:
            self._ending = asyncio.create_task(self._end(reason))
        await asyncio.shield(self._ending)

    async def _end(self, reason: str | None) -> None:
        await asyncio.sleep(self._pace.stop_s)
        self.state, self.reason, self._ended = TERMINATED, reason, time.monotonic()
        await self._stop(self._running)
        self._on_change(self)
        for batch in self.batches.values():
            batch.end()
        await asyncio.to_thread(self._container.remove)

    async def _stop(self, running: dict[asyncio.Task[None], Batch]) -> None:
        tasks = list(running)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _run_batch(self, batch: Batch) -> None:
        for index, (name, body) in enumerate(batch.commands):
            captures = {kind: Capture(_mode(name, body, kind)) for kind in ("stdout", "stderr")}
            batch.emit(index, {"started": {"command": {name: body}}})
            failure: CommandFailed | None = None
            try:
                await self._run_command(name, body, batch, index, captures)
            except CommandFailed as error:
                failure = error
            except Exception as error:  # noqa: BLE001 - a fault of ours is the command's failure
                log.exception("command_broke activity=%s command=%s", self.id, name)
                failure = CommandFailed(f"the provider failed: {error!r}")
            streams = {kind: capture.value() for kind, capture in captures.items()}
            batch.add_result(index, failure, **streams)
            if failure is not None:
                return

    async def _run_command(
        self, name: str, body: Json, batch: Batch, index: int, captures: dict[str, Capture]
    ) -> None:
        if name == "terminate":
            return await self._terminate(batch)
        if name == "sign":
            raise CommandFailed("signing not supported: binary built without the 'sgx' feature")
        self._expect(name)
        self.pending = _AFTER.get(name, self.state)
        try:
            match name:
                case "deploy":
                    self._addresses = set(_addresses(body))
                    await asyncio.sleep(self._pace.deploy_s)
                    if not self._provider.spec.deploys(self._package):
                        raise CommandFailed(f"{_TRANSFER_ERROR}{self._package}: no such image")
                case "start":
                    await asyncio.sleep(self._pace.start_s)
                case "transfer":
                    report = None
                    if body.get("progress") is not None:
                        report = lambda kind: batch.emit(index, {"progress": kind})  # noqa: E731
                    await self._transfer(body, report)
                case _:
                    await self._run(body, batch, index, captures)
        finally:
            # Also after a failure: what could not be deployed cannot be deployed again.
            if self.state != TERMINATED:
                self.state = self.pending
                self._on_change(self)
            self.pending = None

    def _expect(self, command: str) -> None:
        """Raise CommandFailed when this command is not possible now."""
        if self.pending is not None:
            pair = f"StatePair({self.state}, Some({self.pending}))"
            raise CommandFailed(f"{_STATE_ERROR}Busy: {pair}")
        wanted = {INITIALIZED: ("deploy",), DEPLOYED: ("start",), READY: ("run", "transfer")}
        if command not in wanted[self.state]:
            raise CommandFailed(_STATE_ERROR + _EXPECTED[self.state])

    async def _terminate(self, batch: Batch) -> None:
        """Stop what runs in other batches; the activity may be deployed again."""
        others = {task: other for task, other in self._running.items() if other is not batch}
        await self._stop(others)
        for other in others.values():
            if len(other.results) < len(other.commands):
                other.add_result(len(other.results), CommandFailed("Runtime error: stopped"))
        self.state = INITIALIZED
        self._on_change(self)

    async def _transfer(self, body: Json, report: Callable[[Json], None] | None) -> None:
        limits = [self._provider.spec.bandwidth, self._misbehave.transfer_bandwidth]
        bandwidth = min((limit for limit in limits if limit), default=None)
        await asyncio.sleep(self._pace.transfer_s)
        try:
            await self._transfers.transfer(
                self._container, body["from"], body["to"], bandwidth, report
            )
        except ContainerError as error:
            raise CommandFailed(_TRANSFER_ERROR + str(error)) from None

    async def _run(
        self, body: Json, batch: Batch, index: int, captures: dict[str, Capture]
    ) -> None:
        if self._provider.draws(self._misbehave.lose_activity):
            await self.end("the provider lost this activity")
        if self._provider.draws(self._misbehave.vanish):
            self._on_vanish()
        if self._provider.draws(self._misbehave.fail_command):
            raise CommandFailed("ExeScript command exited with code 1 (injected)", 1)

        async def on_output(stream: str, data: bytes) -> None:
            if said := captures[stream].add(data):
                batch.emit(index, {stream: said})

        begun = time.monotonic()
        argv = [body["entry_point"], *map(str, body.get("args", []))]
        try:
            code = await self._container.run(argv, on_output)
        except ContainerError as error:
            raise CommandFailed(f"ExeScript command error: {error}") from None
        slower = 1 / self._provider.spec.speed - 1
        if slower > 0:
            await asyncio.sleep((time.monotonic() - begun) * slower)
        self._on_change(self)
        if code != 0:
            raise CommandFailed(f"ExeScript command exited with code {code}", code)


def _addresses(deploy: Json) -> Iterator[tuple[str, str]]:
    networks = deploy.get("net")
    for one in networks if isinstance(networks, list) else ():
        if isinstance(one, dict):
            yield str(one.get("id")), str(one.get("nodeIp"))


def _mode(command: str, body: Json, stream: str) -> Json | None:
    """How a command's stream is captured; of a ``run`` that does not say so, not at all."""
    if command != "run":
        return {"stream": {}}
    with contextlib.suppress(AttributeError):
        mode = body.get("capture", {}).get(stream)
        if isinstance(mode, dict):
            return mode
    return None
