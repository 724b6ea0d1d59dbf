"""Requestors that nobody here wrote, through the gateway: what they leave is ended and paid, and they
never see yagna's own key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cpodfs.devnet.ledger import open_points
from tests.mount.compute import compute_pod, record, run_processes, text, wait_gone
from tests.mount.harness import run
from tests.mount.provider_pods import MarketMount, market_mounted
from tests.patience import until

INSTANTS = [
    *("SubscriptionCreated", "AgreementCreated", "AgreementConfirmed"),
    *("activity", "batch", "accepted", "InvoiceReceived"),
]


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MarketMount]:
    with market_mounted(tmp_path_factory.mktemp("gateway"), "one two three") as mount:
        yield mount


def app_key(mount: MarketMount) -> str:
    return (mount.devnet / "app.key").read_text().strip()


def begin(mount: MarketMount, pod: Path, *options: str) -> Path:
    run_id = mount.cli("run", str(pod), *options).stdout.strip()
    return pod / "logs" / run_id


def check_settled(mount: MarketMount, folder: Path) -> dict:
    """All is ended and paid, at the market as in the record."""
    ended = record(folder)
    golem = ended["golem"]
    assert golem["phase"] == "over", golem
    assert open_points(mount.market) == []
    paid = {row.agreement: float(row.paid) for row in mount.ledger() if row.paid != "-"}
    for one in golem["providers"]:
        assert one["agreement_state"] == "terminated"
        assert abs(one["accepted"] - paid.get(one["agreement"], 0)) < 1e-9
    assert run_processes(ended["id"]) == []
    return ended


def test_a_whole_run_shows_its_costs_and_costs_no_call_more(market: MarketMount) -> None:
    pod = compute_pod(market, "whole", "python3 script/hasty.py", "hasty.py")
    folder = begin(market, pod)
    wait_gone(pod)
    ended = check_settled(market, folder)
    assert ended["state"] == "finished", text(folder / "stderr.log")
    golem = ended["golem"]
    assert "left" not in golem
    (one,) = golem["providers"]
    assert one["name"] in ("one", "two", "three")
    assert one["paid"]
    assert golem["spent"] == golem["accepted"] == one["accepted"] > 0


@pytest.mark.parametrize("instant", INSTANTS)
def test_what_a_cancelled_program_leaves_is_ended_and_paid(
    market: MarketMount, instant: str
) -> None:
    pod = compute_pod(market, f"left-{instant}", "python3 script/hasty.py", "hasty.py")
    folder = begin(market, pod, "--set", f"at={instant}")
    until(lambda: instant in text(folder / "stdout.log").splitlines())
    run("rm", pod / ".run")
    wait_gone(pod)
    ended = check_settled(market, folder)
    assert ended["state"] == "cancelled"
    assert ended["golem"]["left"]


def test_the_key_of_yagna_is_nowhere(market: MarketMount) -> None:
    pod = compute_pod(market, "keyless", "sh -c 'env; exec python3 script/hasty.py'", "hasty.py")
    folder = begin(market, pod)
    key = app_key(market)
    until(lambda: "activity" in text(folder / "stdout.log").splitlines())
    for process in run_processes(folder.name):
        for what in ("environ", "cmdline"):
            assert key.encode() not in Path(f"/proc/{process}/{what}").read_bytes()
    wait_gone(pod)
    check_settled(market, folder)
    log = (pod / "logs/hasty.log").read_text()
    assert "Bearer" in log
    for path in pod.rglob("*"):
        if path.is_file():
            assert key not in path.read_text(errors="replace"), path
    own = next(
        line.removeprefix("YAGNA_APPKEY=")
        for line in (folder / "stdout.log").read_text().splitlines()
        if line.startswith("YAGNA_APPKEY=")
    )
    assert own in log
