"""Requestors that nobody here wrote, through the gateway: what they leave is ended and paid, and they
never see yagna's own key."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpodfs.devnet.ledger import open_points
from cpodfs.runs import state
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
    folder = pod / "logs" / mount.cli("run", str(pod), *options).stdout.strip()
    until((folder / "run.json").exists)
    return folder


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


def stubborn(mount: MarketMount, name: str, command: str, *options: str) -> tuple[Path, Path]:
    """A pod whose requestor runs this command at a provider, and the log folder of its run."""
    pod = compute_pod(mount, name, ["python3", "script/stubborn.py", command], "stubborn.py")
    return pod, begin(mount, pod, *options)


def held(mount: MarketMount, name: str, instant: str = "batch") -> tuple[Path, Path]:
    """A pod whose run has come to this instant, and the run's log folder."""
    pod = compute_pod(mount, name, "python3 script/hasty.py", "hasty.py")
    folder = begin(mount, pod, "--set", f"at={instant}")
    until(lambda: instant in text(folder / "stdout.log").splitlines())
    return pod, folder


def test_a_killed_program(market: MarketMount) -> None:
    pod, folder = held(market, "killed")
    os.kill(record(folder)["pid"], signal.SIGKILL)
    wait_gone(pod)
    ended = check_settled(market, folder)
    assert (ended["state"], ended["signal"]) == ("failed", "SIGKILL")
    assert ended["golem"]["left"]["activities"] == 1
    assert "all is ended and paid now" in text(folder / "stderr.log")


@pytest.mark.parametrize("who", ["supervisor", "gateway"])
def test_a_killed_process_of_ours(market: MarketMount, who: str) -> None:
    pod, folder = held(market, f"killed-{who}")
    private = state.read_record(market.runs_folder / pod.name / folder.name)["private"]
    supervisor = private["supervisor"]["pid"]
    if who == "supervisor":
        os.kill(supervisor, signal.SIGKILL)
    else:
        (gateway,) = (
            pid
            for pid in state.children(supervisor)
            if b"cpodfs.runs.gateway" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
        os.kill(gateway, signal.SIGKILL)
        run("rm", pod / ".run")
    wait_gone(pod)
    check_settled(market, folder)


def test_a_killed_driver_and_supervisor(tmp_path: Path) -> None:
    with market_mounted(tmp_path, "one two") as market:
        pod, folder = held(market, "all")
        private = state.read_record(market.runs_folder / "all" / folder.name)["private"]
        market.kill()
        os.kill(private["supervisor"]["pid"], signal.SIGKILL)
        market.start()
        until(lambda: record(folder).get("golem", {}).get("phase") == "over")
        wait_gone(pod)
        assert record(folder)["state"] == "lost"
        check_settled(market, folder)


def test_late_invoices_are_paid_later(market: MarketMount) -> None:
    """Later than the end of the run is willing to wait for them."""
    market.misbehave(invoice_delay_s=20)
    try:
        pod, folder = held(market, "late")
        run("rm", pod / ".run")
        wait_gone(pod)
        assert record(folder)["golem"]["phase"] == "unsettled"
        assert "not all could be ended" in text(folder / "stderr.log")
        until(lambda: record(folder)["golem"]["phase"] == "over")
        check_settled(market, folder)
    finally:
        market.misbehave()


def test_a_bill_that_is_too_high_is_not_paid(tmp_path: Path) -> None:
    with market_mounted(tmp_path, "one two") as market:
        market.misbehave(overbill=0.5)
        pod, folder = held(market, "overbilled")
        run("rm", pod / ".run")
        wait_gone(pod)
        golem = record(folder)["golem"]
        assert golem["phase"] == "over"
        (one,) = golem["providers"]
        assert one["refused"]
        assert one["accepted"] == 0


# -- what a run may cost --------------------------------------------------------------------------


def test_a_requestor_gets_no_more_than_its_run_may_cost(market: MarketMount) -> None:
    pod, folder = stubborn(market, "bounded", "sleep 60", "--max-cost", "0.01")
    wait_state = lambda: record(folder)["golem"]["providers"][0]["agreement_state"]  # noqa: E731
    until(lambda: record(folder).get("golem", {}).get("providers"))
    assert record(folder)["golem"]["budget"] == 0.01
    until(lambda: wait_state() == "terminated")
    run("rm", pod / ".run")
    wait_gone(pod)
    ended = check_settled(market, folder)
    assert 0 < ended["golem"]["accepted"] <= 0.01
    warnings = ended["warnings"]
    assert any("asked for 5 GLM" in warning and "got 0.01" in warning for warning in warnings)
    assert any("has cost what it may" in warning for warning in warnings)
    paid = [float(row.paid) for row in market.ledger() if row.agreement in str(ended)]
    assert sum(paid) <= 0.01


def test_a_run_that_may_cost_nothing_to_speak_of(market: MarketMount) -> None:
    pod, folder = stubborn(market, "poor", "true", "--max-cost", "0.0000001")
    until(lambda: any("would be" in warning for warning in record(folder)["warnings"]))
    run("rm", pod / ".run")
    wait_gone(pod)
    golem = check_settled(market, folder)["golem"]
    assert golem["providers"] == []


# -- failures alike -------------------------------------------------------------------------------


def test_failures_alike_are_warned_of_and_end_the_run_if_wished(market: MarketMount) -> None:
    pod, folder = stubborn(
        market, "futile", "echo no blender here >&2; exit 3", "--stop-after", "12"
    )
    warned = lambda: [w for w in record(folder)["warnings"] if "failed alike" in w]  # noqa: E731
    until(warned)
    assert "no blender here" in warned()[0]
    wait_gone(pod)
    ended = check_settled(market, folder)
    assert ended["state"] == "failed"
    assert ended["error"].startswith("stopped: the first batch of 12 agreements in a row")
