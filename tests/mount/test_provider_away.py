"""Provider runs while yagna is away, or answers nothing: they wait for it, and nothing stays open."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpodfs.devnet.ledger import open_points
from tests.mount.compute import record, run_folders, text, wait_gone
from tests.mount.harness import run
from tests.mount.provider_pods import (
    MarketMount,
    check_results,
    check_tidy,
    foreach_pod,
    provider_pod,
)
from tests.patience import until

SLOW = "for i in 1 2 3 4 5 6 7 8; do echo line $i; echo $i >> output/lines; sleep 1; done"


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MarketMount]:
    mount = MarketMount(tmp_path_factory.mktemp("market"))
    # Or a yagna that was restarted would know few offers for minutes.
    mount.env["CPODFS_DEVNET_OFFER_INTERVAL"] = "1"
    try:
        mount.start()
        yield mount
    finally:
        if mount.process is not None:
            mount.stop()


def begun(pod: Path) -> Path:
    """Touch it, wait for the program's first line; the run's folder."""
    run("touch", pod / ".run")
    until(lambda: run_folders(pod) and "line 1\n" in text(run_folders(pod)[0] / "stdout.log"))
    return run_folders(pod)[0]


@pytest.mark.parametrize(
    ("what", "how"),
    [("restart", {"away_s": 3.0}), ("freeze", {"s": 25.0})],
    ids=["restarted", "frozen"],
)
def test_a_run_goes_on_when_yagna_is_back(market: MarketMount, what: str, how: dict) -> None:
    pod = provider_pod(market, what, "sh script/run.sh", SLOW)
    folder = begun(pod)
    market.post(what, how)
    wait_gone(pod)
    ended = check_tidy(market, folder)
    assert (ended["state"], ended["exit_code"], ended["error"]) == ("finished", 0, None)
    assert (folder / "stdout.log").read_text() == "".join(f"line {n}\n" for n in range(1, 9))
    assert (pod / "output/lines").read_text() == "".join(f"{n}\n" for n in range(1, 9))
    (hired,) = ended["golem"]["providers"]
    assert hired["paid"]
    assert "yagna answers again" in (folder / "stderr.log").read_text()


def test_tasks_go_on_when_yagna_is_back(market: MarketMount) -> None:
    pod = foreach_pod(market, "tasks", 12, workers=3, seconds=1.0)
    run("touch", pod / ".run")
    until(lambda: (pod / "output").exists() and len(os.listdir(pod / "output")) >= 4)
    market.post("restart", {"away_s": 2.0})
    wait_gone(pod)
    ended = check_tidy(market, run_folders(pod)[0])
    assert (ended["state"], ended["error"]) == ("finished", None)
    check_results(pod, 12)
    assert len(ended["golem"]["providers"]) == 3


def test_a_run_begins_when_yagna_is_back(market: MarketMount) -> None:
    pod = provider_pod(market, "start", "sh script/run.sh", "echo done")
    market.post("restart", {"away_s": 4.0})
    run("touch", pod / ".run")
    wait_gone(pod)
    assert check_tidy(market, run_folders(pod)[0])["state"] == "finished"


def test_offers_are_looked_for_again(market: MarketMount) -> None:
    """A yagna that was away has forgotten the demand, and knows no offers for a while."""
    market.misbehave(no_offers=True)
    pod = provider_pod(market, "offers", "sh script/run.sh", "echo done")
    run("touch", pod / ".run")
    until(lambda: run_folders(pod) and '"searching"' in text(pod / ".run"))
    (folder,) = run_folders(pod)
    market.post("restart", {"away_s": 1.0})
    until(lambda: "answers again" in text(folder / "stderr.log"))
    assert "begins again" in text(folder / "stderr.log")
    market.misbehave()
    wait_gone(pod)
    assert check_tidy(market, folder)["state"] == "finished"


def test_what_is_open_is_ended_when_yagna_is_back(market: MarketMount) -> None:
    """Also when the run's own process was killed meanwhile."""
    pod = provider_pod(market, "killed", "sh script/run.sh", f"{SLOW}; sleep 600")
    folder = begun(pod)
    market.post("restart", {"away_s": 12.0})
    os.kill(record(folder)["pid"], signal.SIGKILL)
    wait_gone(pod)
    ended = record(folder)
    assert (ended["state"], ended["golem"]["phase"]) == ("failed", "unsettled")
    assert "process died (SIGKILL)" in ended["error"]
    until(lambda: record(folder)["golem"]["phase"] == "over")
    assert open_points(market.market) == []
    (hired,) = check_tidy(market, folder)["golem"]["providers"]
    assert hired["paid"]
