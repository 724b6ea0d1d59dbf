"""Pods whose programs run on providers: recipes with a runtime, the market behind them, its books."""

from __future__ import annotations

import contextlib
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpodfs.devnet.ledger import LedgerRow, ledger_table, open_points
from tests.mount.compute import DevnetMount, record, run_folders, run_processes
from tests.mount.harness import Mount
from tests.patience import PATIENCE_S

IMAGE = "d646d7b93083d817846c2ae5c62c72ca0507782385a2e29291a3d376"
LATENCY_S = 0.15
"""From the requestor's yagna to a provider, and as much back."""
PROVIDERS = "one two three four five six seven eight nine ten eleven twelve"
UPPER = (
    "sleep ${2:-0.3}\nn=$(basename $1 .txt)\ntr a-z A-Z < $1 > output/$n.out\n"
    "stamp=$(date +%s%N)\necho $stamp > output/$n.stamp\necho $n $stamp\n"
)


class MarketMount(DevnetMount):
    """A mount whose market has the providers named, all alike and cheap, and does as it is told."""

    def __init__(self, folder: Path, providers: str = PROVIDERS, *options: str) -> None:
        super().__init__(folder, *options)
        self.env["CPODFS_DEVNET_PROVIDER"] = providers
        self.env["CPODFS_DEVNET_PROVIDER_LATENCY"] = str(LATENCY_S)

    @property
    def market(self) -> Path:
        return self.devnet / "market"

    def post(self, path: str, body: dict[str, Any]) -> Any:
        port = json.loads((self.devnet / "ports.json").read_text())["market"]
        key = (self.devnet / "control.key").read_text().strip()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/devnet/{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
        )
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return json.loads(answer.read())

    def misbehave(self, **how: Any) -> None:
        """Nothing but this goes wrong from now on."""
        self.post("misbehave", how)

    def ledger(self) -> list[LedgerRow]:
        return ledger_table(self.market)


@contextlib.contextmanager
def market_mounted(
    folder: Path, providers: str = PROVIDERS, *options: str
) -> Iterator[MarketMount]:
    mount = MarketMount(folder, providers, *options)
    try:
        yield mount.start()  # type: ignore[misc]
    finally:
        if mount.process is not None:
            mount.stop()


def provider_pod(mount: Mount, name: str, command: str, script: str, **runtime: Any) -> Path:
    """A pod with ``script/run.sh`` and a recipe for ``command`` on a provider."""
    pod = mount.pod(name)
    for folder in ("script", "payload"):
        (pod / folder).mkdir(exist_ok=True)
    (pod / "script/run.sh").write_text(script)
    defaults = {"image": IMAGE, "budget": 1, "timeout": "10m", "poll": 0.3, "retries": 0}
    golem = {"exec": command, "runtime": defaults | runtime}
    (pod / "a.recipe").write_text(json.dumps({"name": name, "golem": golem}))
    return pod


def foreach_pod(mount: Mount, name: str, files: int, **runtime: Any) -> Path:
    """A pod with a task for each of so many files: ``output/<n>.out`` is its text in capitals."""
    seconds = runtime.pop("seconds", 0.3)
    command = f"sh script/run.sh {{}} {seconds}"
    pod = provider_pod(mount, name, command, UPPER, foreach="payload/*.txt", **runtime)
    for number in range(files):
        (pod / f"payload/{number:02}.txt").write_text(f"text {number}\n")
    return pod


def check_results(pod: Path, files: int) -> None:
    """Every result is there, right, and the one that its task's log tells of."""
    (folder,) = run_folders(pod)
    told = (folder / "stdout.log").read_text()
    for number in range(files):
        assert (pod / f"output/{number:02}.out").read_text() == f"TEXT {number}\n"
        stamp = (pod / f"output/{number:02}.stamp").read_text().strip()
        log = (folder / f"tasks/{number + 1}.log").read_text()
        assert log.splitlines()[-1] == f"{number:02} {stamp}"
        assert told.count(f"payload/{number:02}.txt: done by") == 1
    tasks = record(folder)["golem"]["tasks"]
    assert tasks == {"total": files, "done": files, "failed": 0, "left": 0}


def most_at_once(pod: Path, files: int, seconds: float) -> int:
    """How many tasks were asleep at the same time, each for so long before its stamp."""
    stamps = [int((pod / f"output/{number:02}.stamp").read_text()) for number in range(files)]
    asleep_ns = int(seconds * 1e9)
    return max(sum(0 <= other - stamp < asleep_ns for other in stamps) for stamp in stamps)


def check_tidy(mount: MarketMount, folder: Path, gone: tuple[str, ...] = ()) -> dict[str, Any]:
    """Nothing is left of a run but its record, which is returned: no process, no open agreement.

    But with providers that are ``gone``: yagna calls their agreements approved for ever.
    """
    ended = record(folder)
    assert run_processes(ended["id"]) == []
    assert not (folder.parent.parent / ".run").exists()
    assert [point for point in open_points(mount.market) if not gone] == []
    golem = ended["golem"]
    assert golem["phase"] == ("unsettled" if gone else "over")
    states = {one["name"]: one["agreement_state"] for one in golem["providers"]}
    assert states == {name: "vanished" if name in gone else "terminated" for name in states}
    paid = {row.agreement: float(row.paid) for row in mount.ledger()}
    for one in golem["providers"]:
        assert abs(one["accepted"] - paid[one["agreement"]]) < 1e-9
    return ended
