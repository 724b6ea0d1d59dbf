"""A served market for tests, a requestor that speaks plain REST, and yapapi scripts as processes."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from cpodfs.devnet.door import DOOR
from cpodfs.devnet.ledger import LedgerRow, ledger_table
from cpodfs.devnet.market import create_market_app
from cpodfs.devnet.pace import Pace
from cpodfs.devnet.provider import ProviderSpec
from cpodfs.devnet.run_env import run_environment
from tests.patience import PATIENCE_S

SCRIPTS = Path(__file__).with_name("yapapi_scripts")
APP_KEY = "test-key"
CONTROL_KEY = "control-key"
PLATFORM = "erc20-hoodi-tglm"
ONE = (ProviderSpec("solo"),)
THREE = tuple(ProviderSpec(name, cpu_price=1e-4) for name in "abc")

_NO_TIMEOUT = aiohttp.ClientTimeout(total=None)

Commands = list[dict[str, Any]]
INIT: Commands = [{"deploy": {}}, {"start": {"args": []}}]


GO = "/golem/input/go"


def run(entry_point: str, *args: str, **capture: Any) -> dict[str, Any]:
    """A command whose output is streamed, or captured as it is said."""
    modes = {"stdout": {"stream": {}}, "stderr": {"stream": {}}} | capture
    return {"run": {"entry_point": entry_point, "args": list(args), "capture": modes}}


def shell(command: str, **capture: Any) -> dict[str, Any]:
    return run("/bin/sh", "-c", command, **capture)


@dataclass
class Served:
    url: str
    folder: Path
    http: aiohttp.ClientSession

    @property
    def market_dir(self) -> Path:
        return self.folder / "market"

    def let_go(self, activity: str) -> None:
        """Make the file that the commands of `Requestor.stream` wait for."""
        [folder] = self.market_dir.glob(f"providers/*/{activity}/golem/input")
        (folder / Path(GO).name).touch()

    def ledger(self) -> list[LedgerRow]:
        return ledger_table(self.market_dir)

    def environment(self) -> dict[str, str]:
        added = run_environment(
            market_url=self.url,
            app_key=APP_KEY,
            tool_dir=self.folder / "tool",
            gftp_dir=self.folder / "gftp",
        )
        return {**os.environ, **added}

    async def start_script(self, name: str, *args: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, str(SCRIPTS / name), *args),
            cwd=self.folder,
            env=self.environment(),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def run_script(self, name: str, *args: str) -> str:
        """Its standard output; it must succeed."""
        out, err, code = await self.ended_script(name, *args)
        assert code == 0, err
        return out

    async def ended_script(self, name: str, *args: str) -> tuple[str, str, int | None]:
        """Its standard output and error, and its exit code."""
        process = await self.start_script(name, *args)
        out, err = await asyncio.wait_for(process.communicate(), PATIENCE_S)
        return out.decode(), err.decode(), process.returncode

    async def call(self, method: str, path: str, body: Any = None, status: int = 200) -> Any:
        """One request; the JSON of its answer, which must have ``status``."""
        key = CONTROL_KEY if path.startswith("/devnet/") else APP_KEY
        headers = {"Authorization": f"Bearer {key}"}
        url = self.url + path
        async with self.http.request(method, url, json=body, headers=headers) as response:
            text = await response.text()
            assert response.status == status, text
            return await response.json() if text else None


@asynccontextmanager
async def served(folder: Path, **options: Any) -> AsyncIterator[Served]:
    options.setdefault("pace", Pace(offer_delay_s=0))
    app = create_market_app(
        folder / "market",
        app_key=APP_KEY,
        control_key=CONTROL_KEY,
        gftp_dir=folder / "gftp",
        **options,
    )
    runner = web.AppRunner(app, shutdown_timeout=0.2)
    await runner.setup()
    bound = socket.create_server(("127.0.0.1", 0))
    await app[DOOR].open(runner, bound)
    port = bound.getsockname()[1]
    try:
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {APP_KEY}"}) as http:
            yield Served(f"http://127.0.0.1:{port}", folder, http)
    finally:
        await runner.cleanup()


@dataclass
class Requestor:
    """Negotiates step by step, as yapapi does, with everything in sight."""

    market: Served
    allocation: str = ""
    package: str = ""

    async def allocate(self, amount: str = "1") -> dict[str, Any]:
        body = {"totalAmount": amount, "paymentPlatform": PLATFORM}
        found = await self.market.call("POST", "/payment-api/v1/allocations", body, 201)
        self.allocation = found["allocationId"]
        return dict(found)

    def properties(self, life_s: float = 600) -> dict[str, Any]:
        return {
            "golem.srv.comp.expiration": int((time.time() + life_s) * 1000),
            "golem.com.payment.chosen-platform": PLATFORM,
            f"golem.com.payment.platform.{PLATFORM}.address": "0xpayer",
            "golem.srv.comp.task_package": self.package,
        }

    async def demand(self, constraints: str = "(&)", life_s: float = 600) -> str:
        body = {"properties": self.properties(life_s), "constraints": constraints}
        return str(await self.market.call("POST", "/market-api/v1/demands", body, 201))

    async def events(self, demand: str, timeout_s: float = 60) -> list[dict[str, Any]]:
        path = f"/market-api/v1/demands/{demand}/events?timeout={timeout_s}&maxEvents=10"
        return list(await self.market.call("GET", path))

    async def counter(
        self, demand: str, proposal: str, constraints: str = "(&)", life_s: float = 600
    ) -> str:
        body = {"properties": self.properties(life_s), "constraints": constraints}
        path = f"/market-api/v1/demands/{demand}/proposals/{proposal}"
        return str(await self.market.call("POST", path, body))

    async def propose(self, demand: str, draft: str) -> str:
        body = {"proposalId": draft, "validTo": "2099-01-01T00:00:00+00:00"}
        return str(await self.market.call("POST", "/market-api/v1/agreements", body))

    async def confirm(self, agreement: str, status: int = 204) -> None:
        path = f"/market-api/v1/agreements/{agreement}"
        await self.market.call("POST", f"{path}/confirm", status=204)
        await self.market.call("POST", f"{path}/wait?timeout=60", status=status)

    async def agree(self, demand: str | None = None, life_s: float = 600) -> str:
        """An approved agreement with the first provider that offers."""
        demand = demand or await self.demand(life_s=life_s)
        [offer] = await self.events(demand)
        await self.counter(demand, offer["proposal"]["proposalId"], life_s=life_s)
        [draft] = await self.events(demand)
        agreement = await self.propose(demand, draft["proposal"]["proposalId"])
        await self.confirm(agreement)
        return agreement

    async def terminate(self, agreement: str, status: int = 200) -> None:
        path = f"/market-api/v1/agreements/{agreement}/terminate"
        await self.market.call("POST", path, {"message": "enough"}, status)

    async def activity(self, agreement: str) -> str:
        body = {"agreementId": agreement}
        found = await self.market.call("POST", "/activity-api/v1/activity", body)
        return str(found["activityId"])

    async def state(self, activity: str) -> dict[str, Any]:
        return dict(await self.market.call("GET", f"/activity-api/v1/activity/{activity}/state"))

    async def exec(self, activity: str, commands: Commands) -> str:
        path = f"/activity-api/v1/activity/{activity}/exec"
        return str(await self.market.call("POST", path, {"text": json.dumps(commands)}))

    async def results(self, activity: str, commands: Commands) -> list[dict[str, Any]]:
        """Send a batch and poll until it is finished."""
        batch = await self.exec(activity, commands)
        path = f"/activity-api/v1/activity/{activity}/exec/{batch}?timeout=20"
        while True:
            found = await self.market.call("GET", path)
            if found and found[-1]["isBatchFinished"]:
                return list(found)

    async def stream(
        self, activity: str, commands: Commands, until: str = "finished"
    ) -> list[dict[str, Any]]:
        """What commands say, up to the first event of kind ``until`` of the last one.

        They wait until the stream is open: what is said before is lost.
        """
        wait = f"until [ -e {GO} ]; do echo; sleep 0.02; done; rm {GO}"
        batch = await self.exec(activity, [shell(wait), *commands])
        found = []
        async with self.open_stream(activity, batch) as response:
            async for event in events_of(response):
                assert event["batch_id"] == batch
                if event["index"] == 0 and "stdout" in event["kind"]:
                    self.market.let_go(activity)
                elif event["index"] > 0:
                    found.append(event["kind"])
                    if until in event["kind"] and event["index"] == len(commands):
                        return found
        raise AssertionError(f"the stream broke off: {found}")

    def open_stream(self, activity: str, batch: str, **headers: str) -> Any:
        url = f"{self.market.url}/activity-api/v1/activity/{activity}/exec/{batch}"
        headers = {"Accept": "text/event-stream", **headers}
        return self.market.http.get(url, headers=headers, timeout=_NO_TIMEOUT)

    async def printed(self, activity: str, commands: Commands) -> None:
        """Send a batch and wait until its last command has printed something."""
        async with asyncio.timeout(PATIENCE_S):
            await self.stream(activity, commands, "stdout")

    async def ready(self) -> str:
        """A started activity in an agreement of its own."""
        activity = await self.activity(await self.agree())
        assert [one["result"] for one in await self.results(activity, INIT)] == ["Ok", "Ok"]
        return activity

    async def agreement_event(self, kind: str, timeout_s: float = 120) -> dict[str, Any]:
        """The next event of this kind, waited for."""
        after = "1970-01-01T00:00:00Z"
        while True:
            path = f"/market-api/v1/agreementEvents?afterTimestamp={after}&timeout={timeout_s}"
            found = await self.market.call("GET", path)
            assert found, f"no {kind} in {timeout_s} s"
            for event in found:
                if event["eventType"] == kind:
                    return dict(event)
            after = found[-1]["eventDate"].replace("+", "%2B")


async def events_of(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The events of an open stream, until it ends or breaks off (aiohttp.ClientPayloadError)."""
    assert response.content_type == "text/event-stream"
    rest = b""
    async for chunk in response.content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data: "):
                yield json.loads(line[6:])


def processes_with(word: str) -> list[int]:
    """Processes (zombies apart) that have ``word`` in their command line, this one excepted."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and int(folder.name) != os.getpid():
            try:
                if word.encode() in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue
    return found
