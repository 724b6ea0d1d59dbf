"""Provider runs as a user meets them: ``touch .run`` in a pod whose recipe has a runtime."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpodfs.devnet.ledger import open_points
from tests.mount.compute import record, run_folders, run_processes, run_to_end, text, wait_gone
from tests.mount.harness import run
from tests.mount.provider_pods import (
    MarketMount,
    check_results,
    check_tidy,
    foreach_pod,
    market_mounted,
    most_at_once,
    provider_pod,
)
from tests.patience import until

BUDGET = 3 * (4 * 0.0001 + 0.00002) + 5 * 0.00002
"""What a provider may cost before it can be stopped, with all threads busy; 5 s of doing nothing."""
GROW = """
for i in 1 2 3 4 5 6 7 8; do echo line $i; echo data $i >> output/grow; sleep 0.8; done
echo 'grüße' >&2; cat payload/in > output/copy
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MarketMount]:
    with market_mounted(tmp_path_factory.mktemp("market")) as mount:
        yield mount


@pytest.fixture
def market(shared: MarketMount) -> Iterator[MarketMount]:
    shared.misbehave()
    yield shared
    shared.misbehave()


# -- one program ----------------------------------------------------------------------------------


def test_results_and_output_come_while_it_runs(market: MarketMount) -> None:
    pod = provider_pod(market, "live", "sh script/run.sh", GROW)
    (pod / "payload/in").write_text("payload\n")
    run("touch", pod / ".run")
    until(lambda: "grow" in (run("ls", pod / "output", check=False)))
    first = (pod / "output/grow").read_text()
    (folder,) = run_folders(pod)
    until(lambda: "line 1\n" in text(folder / "stdout.log"))
    until(lambda: len((pod / "output/grow").read_text()) > len(first))
    assert (pod / ".run").exists()
    assert "data 8" not in first
    state = json.loads((pod / ".run").read_text())
    assert state["golem"]["providers"][0]["agreement_state"] == "approved"
    assert not (pod / "output/copy").exists()
    wait_gone(pod)
    ended = check_tidy(market, folder)
    assert (ended["state"], ended["exit_code"], ended["error"]) == ("finished", 0, None)
    assert (folder / "stdout.log").read_text() == "".join(f"line {n}\n" for n in range(1, 9))
    assert (folder / "stderr.log").read_text().endswith("grüße\n")
    assert (pod / "output/grow").read_text() == "".join(f"data {n}\n" for n in range(1, 9))
    assert (pod / "output/copy").read_text() == "payload\n"
    (hired,) = ended["golem"]["providers"]
    assert hired["paid"]
    assert 0 < hired["accepted"] == hired["spent"] < ended["golem"]["budget"]


@pytest.mark.sandbox
def test_words_reach_the_program_as_they_are(market: MarketMount) -> None:
    script = 'for word; do printf "%s\\n" "$word"; done; pwd; ls; exit 7'
    pod = provider_pod(market, "words", "sh script/run.sh '$HOME; ls' '*' \"a  b\"", script)
    (pod / "payload/x").write_text("x")
    ended = check_tidy(market, run_to_end(pod))
    assert (ended["state"], ended["exit_code"]) == ("failed", 7)
    assert ended["error"] == "the program failed with exit code 7"
    said = (pod / "logs" / ended["id"] / "stdout.log").read_text()
    assert said == "$HOME; ls\n*\na  b\n/golem/work/pod\noutput\npayload\nscript\n"


def test_a_program_that_is_not_there(market: MarketMount) -> None:
    pod = provider_pod(market, "missing", "no-such-program", "")
    folder = run_to_end(pod)
    ended = check_tidy(market, folder)
    assert (ended["state"], ended["exit_code"]) == ("failed", 127)
    complaint = "cpodfs: no-such-program: not found on the provider\n"
    assert (folder / "stderr.log").read_text().endswith(complaint)


def test_what_the_pod_cannot_hold_does_not_keep_the_rest(market: MarketMount) -> None:
    script = r"""
    echo 1 > output/first
    echo 2 > "output/$(printf 'a\302\240\360\237\221\250\342\200\215\360\237\221\251')"
    echo 3 > "output/$(printf 'caf\351')"
    mkdir output/$(printf 'd%.0s' $(seq 120)); echo 4 > output/d*/f; ln -s first output/link
    echo 5 > output/last
    """
    pod = provider_pod(market, "odd", "sh script/run.sh", script)
    folder = run_to_end(pod)
    ended = check_tidy(market, folder)
    assert (ended["state"], ended["exit_code"]) == ("failed", 125)
    assert ended["error"].startswith("2 results are missing, which the pod cannot hold; the first")
    assert len(ended["golem"]["providers"]) == 1
    assert sorted(os.listdir(pod / "output")) == [
        "a\xa0\U0001f468\u200d\U0001f469",
        "first",
        "last",
    ]
    said = (folder / "stderr.log").read_text()
    for line in (
        r"not brought: 'output/caf\udce9': not UTF-8; FairOS-DFS cannot store this name",
        f"not brought: 'output/{'d' * 120}/': longer than the 100 bytes that FairOS-DFS takes",
        "output/link: not a file or a folder, so it is not brought",
    ):
        assert said.count(f"cpodfs: {line}\n") == 1


def test_results_come_while_a_program_never_stops_talking(market: MarketMount) -> None:
    script = """
    echo 1 > output/early; n=0
    while [ $n -lt 1500 ]; do n=$((n + 1)); echo $n; sleep 0.003; done
    """
    pod = provider_pod(market, "talk", "sh script/run.sh", script)
    run("touch", pod / ".run")
    until(lambda: (pod / "output/early").exists())
    (folder,) = run_folders(pod)
    assert (pod / ".run").exists()
    assert "\n1499\n" not in (folder / "stdout.log").read_text()
    wait_gone(pod)
    ended = check_tidy(market, folder)
    assert (ended["state"], ended["error"]) == ("finished", None)
    numbers = (folder / "stdout.log").read_text().split()
    assert numbers == [str(n) for n in range(1, 1501)]


def test_rm_cancels_and_pays(market: MarketMount) -> None:
    pod = provider_pod(market, "cancel", "sh script/run.sh", "echo up; exec sleep 600")
    run("touch", pod / ".run")
    until(lambda: run_folders(pod) and (run_folders(pod)[0] / "stdout.log").exists())
    (folder,) = run_folders(pod)
    until(lambda: (folder / "stdout.log").read_text() == "up\n")
    run("rm", pod / ".run")
    wait_gone(pod)
    ended = check_tidy(market, folder)
    assert (ended["state"], ended["error"]) == ("cancelled", None)
    assert [one["paid"] for one in ended["golem"]["providers"]] == [True]


# -- a task for each file -------------------------------------------------------------------------


def test_foreach_is_spread_over_providers(market: MarketMount) -> None:
    pod = foreach_pod(market, "each", 40, workers=4, seconds=0.5)
    ended = check_tidy(market, run_to_end(pod))
    assert (ended["state"], ended["exit_code"]) == ("finished", 0)
    check_results(pod, 40)
    assert len({one["id"] for one in ended["golem"]["providers"]}) == 4
    assert most_at_once(pod, 40, seconds=0.5) >= 3


def test_a_provider_lost_in_the_middle_costs_no_result(market: MarketMount) -> None:
    pod = foreach_pod(market, "lost", 40, workers=4, seconds=0.5, retries=2)
    run("touch", pod / ".run")
    until(lambda: (pod / "output").exists() and len(os.listdir(pod / "output")) >= 20)
    gone = market.post("vanish", {})["provider"]
    wait_gone(pod)
    (folder,) = run_folders(pod)
    ended = check_tidy(market, folder, gone=(gone,))
    assert (ended["state"], ended["exit_code"], ended["error"]) == ("finished", 0, None)
    check_results(pod, 40)
    assert "vanished" in (folder / "stderr.log").read_text()


def test_a_task_that_fails_is_tried_elsewhere(market: MarketMount) -> None:
    script = "case $1 in *bad*) echo no >&2; exit 4;; esac; cp $1 output/"
    pod = provider_pod(
        market, "bad", "sh script/run.sh", script, foreach="payload/*", retries=1, workers=2
    )
    for name in ("bad", "good1", "good2"):
        (pod / "payload" / name).write_text(name)
    # Without {} the file takes the place of the last word.
    (pod / "a.recipe").write_text(
        (pod / "a.recipe").read_text().replace("sh script/run.sh", "sh script/run.sh FILE")
    )
    folder = run_to_end(pod)
    ended = check_tidy(market, folder)
    assert (ended["state"], ended["exit_code"]) == ("failed", 1)
    assert ended["golem"]["tasks"] == {"total": 3, "done": 2, "failed": 1, "left": 0}
    assert ended["error"].startswith("1 of 3 tasks failed; the first: payload/bad: exit code 4 on")
    assert ended["error"].endswith(f"see logs/{ended['id']}/tasks/1.log")
    assert sorted(os.listdir(pod / "output")) == ["good1", "good2"]
    log = (folder / "tasks/1.log").read_text().splitlines()
    assert [line for line in log if line == "no"] == ["no", "no"]
    tried = {line.split(" on ")[1].split(",")[0] for line in log if line.startswith("cpodfs:")}
    assert len(tried) == 2


def test_the_program_is_never_replaced_and_links_cost_nothing(market: MarketMount) -> None:
    script = "n=$(basename $1); cp $1 output/$n; ln -s $n output/latest-$n"
    pod = provider_pod(market, "added", "sh script/run.sh", script, foreach="payload/*", workers=2)
    for name in ("one", "two"):
        (pod / "payload" / name).write_text("exit 9\n")
    folder = run_to_end(pod)
    ended = check_tidy(market, folder)
    assert (ended["state"], ended["exit_code"], ended["error"]) == ("finished", 0, None)
    assert sorted(os.listdir(pod / "output")) == ["one", "two"]
    log = (folder / "tasks/1.log").read_text()
    assert log.endswith("cpodfs: output/latest-one: not a file or a folder, so it is not brought\n")


def test_a_file_deleted_meanwhile_fails_its_task_only(market: MarketMount) -> None:
    pod = foreach_pod(market, "deleted", 6, workers=1, seconds=0.5, retries=2)
    run("touch", pod / ".run")
    until(lambda: (pod / "output").exists() and os.listdir(pod / "output"))
    (pod / "payload/05.txt").unlink()
    wait_gone(pod)
    ended = check_tidy(market, run_folders(pod)[0])
    assert (ended["state"], ended["exit_code"]) == ("failed", 1)
    assert "payload/05.txt: the file is not there any more" in ended["error"]
    assert ended["golem"]["tasks"] == {"total": 6, "done": 5, "failed": 1, "left": 0}


def test_no_file_to_work_on(market: MarketMount) -> None:
    ended = check_tidy(market, run_to_end(foreach_pod(market, "none", 0)))
    assert ended["error"] == "golem.runtime.foreach: no file matches 'payload/*.txt'"
    assert ended["golem"]["providers"] == []


# -- what can go wrong at a market ----------------------------------------------------------------


def test_a_provider_that_vanishes(tmp_path: Path) -> None:
    """yagna cannot tell it of the end, and calls the agreement approved for ever."""
    with market_mounted(tmp_path, "one") as mount:
        pod = provider_pod(mount, "vanish", "sh script/run.sh", "sleep 20")
        mount.misbehave(vanish=1.0)
        folder = run_to_end(pod)
        ended = check_tidy(mount, folder, gone=("one",))
        assert (ended["state"], ended["exit_code"]) == ("failed", 125)
        assert "one: provider vanished: yagna said 500" in ended["error"]


@pytest.mark.parametrize(
    ("how", "runtime", "error"),
    [
        ({"no_offers": True}, {"offer_timeout": 2}, "no offers: no provider answered in 2 s"),
        ({"reject_proposals": 1.0}, {"offer_timeout": 6}, "proposals rejected: "),
        (
            {"fail_command": 1.0},
            {"retries": 1},
            "command failed: ExeScript command exited with code 1",
        ),
        ({"lose_activity": 1.0}, {}, "activity lost: the provider lost this activity"),
        ({"transfer_bandwidth": 2000.0}, {"timeout": "4s"}, "timeout: not done after 4 s"),
        ({"unknown_image": True}, {}, "image unknown: "),
        ({}, {"max_price": {"cpu_hour": 1e-6}, "offer_timeout": 6}, "no offers within max_price"),
        ({}, {"budget": BUDGET}, "budget exhausted: "),
        ({}, {"budget": 1e-4, "offer_timeout": 6}, "no offers within max_price and budget"),
        ({}, {"capabilities": ["warp"], "offer_timeout": 2}, "no offers: "),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_each_misbehaviour_ends_clearly(
    market: MarketMount, how: dict, runtime: dict, error: str, request: pytest.FixtureRequest
) -> None:
    name = f"amiss{request.node.callspec.id}".replace(":", "")[:60].strip()
    pod = provider_pod(market, name, "sh script/run.sh", "sleep 20", **runtime)
    (pod / "payload/some").write_bytes(os.urandom(20_000))
    market.misbehave(**how)
    done = market.cli("run", "--wait", str(pod), check=False)
    assert done.returncode == 125
    assert error in done.stderr
    (folder,) = run_folders(pod)
    ended = check_tidy(market, folder)
    assert (ended["state"], ended["exit_code"]) == ("failed", 125)
    assert error in ended["error"]
    assert ended["golem"]["accepted"] <= ended["golem"]["budget"]


def test_a_late_invoice_is_waited_for(market: MarketMount) -> None:
    pod = provider_pod(market, "late", "true", "")
    market.misbehave(invoice_delay_s=2.0)
    ended = check_tidy(market, run_to_end(pod))
    assert (ended["state"], ended["exit_code"]) == ("finished", 0)
    assert [one["paid"] for one in ended["golem"]["providers"]] == [True]


def test_a_bill_for_more_than_it_can_have_cost_is_not_paid(tmp_path: Path) -> None:
    with market_mounted(tmp_path, "one") as mount:
        pod = provider_pod(mount, "overbilled", "sh script/run.sh", "echo done > output/done")
        mount.misbehave(overbill=0.5)
        ended = record(run_to_end(pod))
        assert (pod / "output/done").read_text() == "done\n"
        (row,) = mount.ledger()
    assert (ended["state"], ended["exit_code"], ended["error"]) == ("finished", 0, None)
    (hired,) = ended["golem"]["providers"]
    assert "for what costs 0.0" in hired["error"]
    assert (hired["paid"], hired["accepted"], float(row.paid or 0)) == (False, 0, 0)
    assert hired["spent"] < 0.1


def test_a_provider_that_makes_no_activity_is_given_up(market: MarketMount) -> None:
    pod = foreach_pod(market, "refused", 3, workers=2, retries=1)
    market.misbehave(refuse_activity=1.0)
    ended = check_tidy(market, run_to_end(pod))
    assert (ended["state"], ended["exit_code"]) == ("failed", 125)
    assert "8 providers in a row failed; the last: no activity: yagna said 500" in ended["error"]
    assert len(ended["golem"]["providers"]) < 12


def test_an_invoice_that_comes_too_late_is_paid_all_the_same(market: MarketMount) -> None:
    pod = provider_pod(market, "unbilled", "sh script/run.sh", "echo done > output/done")
    market.misbehave(invoice_delay_s=24.0)
    run("touch", pod / ".run")
    wait_gone(pod)
    (folder,) = run_folders(pod)
    ended = record(folder)
    assert (ended["state"], ended["exit_code"], ended["error"]) == ("finished", 0, None)
    assert ended["golem"]["phase"] == "unsettled"
    assert "not all is paid: no invoice from" in (folder / "stderr.log").read_text()
    assert (pod / "output/done").read_text() == "done\n"
    until(lambda: record(folder)["golem"]["phase"] == "over")
    (hired,) = check_tidy(market, folder)["golem"]["providers"]
    assert hired["paid"]


@pytest.mark.parametrize(
    ("how", "phase"),
    [({"no_offers": True}, "searching"), ({"invoice_delay_s": 4.0}, "settling")],
    ids=["searching", "settling"],
)
def test_it_can_be_cancelled_at_any_time(market: MarketMount, how: dict, phase: str) -> None:
    pod = provider_pod(market, f"cancel {phase}", "true", "")
    market.misbehave(**how)
    run("touch", pod / ".run")
    until(lambda: run_folders(pod) and _phase(pod) == phase)
    run("rm", pod / ".run")
    wait_gone(pod)
    ended = check_tidy(market, run_folders(pod)[0])
    assert (ended["state"], ended["error"]) == ("cancelled", None)
    assert all(one["paid"] for one in ended["golem"]["providers"])


def _phase(pod: Path) -> str:
    state = json.loads(text(pod / ".run") or "{}")
    return str(state.get("golem", {}).get("phase"))


def test_the_death_of_the_process_is_a_failed_run(market: MarketMount) -> None:
    pod = provider_pod(market, "death", "sh script/run.sh", "echo up; exec sleep 600")
    run("touch", pod / ".run")
    until(lambda: run_folders(pod) and "up" in text(run_folders(pod)[0] / "stdout.log"))
    (folder,) = run_folders(pod)
    os.kill(record(folder)["pid"], signal.SIGKILL)
    wait_gone(pod)
    ended = check_tidy(market, folder)
    assert (ended["state"], ended["exit_code"]) == ("failed", None)
    assert "process died (SIGKILL)" in ended["error"]
    assert [one["paid"] for one in ended["golem"]["providers"]] == [True]


def test_the_supervisors_death_leaves_nothing_open(market: MarketMount) -> None:
    pod = provider_pod(market, "unminded", "sh script/run.sh", "echo up; exec sleep 600")
    run("touch", pod / ".run")
    until(lambda: run_folders(pod) and "up" in text(run_folders(pod)[0] / "stdout.log"))
    (folder,) = run_folders(pod)
    spool = next(market.runs_folder.glob(f"*/{folder.name}"))
    private = json.loads((spool / "run.json").read_text())["private"]
    os.kill(private["supervisor"]["pid"], signal.SIGKILL)
    wait_gone(pod)
    ended = check_tidy(market, folder)
    assert (ended["state"], ended["error"]) == ("lost", "the supervisor died")
    assert [one["paid"] for one in ended["golem"]["providers"]] == [True]
    assert ended["golem"]["phase"] == "over"


def test_a_killed_driver(tmp_path: Path) -> None:
    """With its market gone too: the run goes on elsewhere, or its end is recorded; the next touch works."""
    with market_mounted(tmp_path, "one two") as mount:
        pod = provider_pod(
            *(mount, "killed", "sh script/run.sh", "echo x > output/x; sleep 15"),
            retries=2,
            timeout=30,
        )
        run("touch", pod / ".run")
        until(lambda: text(pod / "output/x") == "x\n")
        devnet = int((mount.devnet / "lock").read_text())
        mount.kill()
        until(lambda: not Path(f"/proc/{devnet}").exists())
        mount.start()
        wait_gone(pod)
        (folder,) = run_folders(pod)
        ended = record(folder)
        assert (ended["state"] == "finished") == (ended["error"] is None)
        assert run_processes(ended["id"]) == []
        assert (pod / "output/x").read_text() == "x\n"
        (pod / "script/run.sh").write_text("echo y > output/y")
        assert record(run_to_end(pod))["state"] == "finished"
        assert (pod / "output/y").read_text() == "y\n"
        until(lambda: all(row.ended for row in mount.ledger()))


def test_a_market_that_dies_is_settled_with_when_it_is_back(tmp_path: Path) -> None:
    with market_mounted(tmp_path, "one two") as mount:
        pod = provider_pod(
            *(mount, "away", "sh script/run.sh", "echo x > output/x; sleep 60"),
            retries=2,
            timeout=20,
        )
        run("touch", pod / ".run")
        until(lambda: text(pod / "output/x") == "x\n")
        os.kill(int((mount.devnet / "lock").read_text()), signal.SIGKILL)
        wait_gone(pod)
        (folder,) = run_folders(pod)
        ended = record(folder)
        assert (ended["state"], ended["golem"]["phase"]) == ("failed", "unsettled")
        assert [one["agreement_state"] for one in ended["golem"]["providers"]] != ["terminated"]
        mount.kill()
        mount.start()
        until(lambda: record(folder)["golem"]["phase"] == "over")
        assert open_points(mount.market) == []
        assert [one["paid"] for one in record(folder)["golem"]["providers"]] == [True]


def test_start_prices_stay_within_the_budget(tmp_path: Path) -> None:
    providers = " ".join(f"{name}:start_price=0.4" for name in ("one", "two", "three", "four"))
    with market_mounted(tmp_path, providers) as mount:
        pod = foreach_pod(mount, "dear", 6, seconds=0.5, workers=4)
        ended = check_tidy(mount, run_to_end(pod))
        assert ended["state"] == "finished"
        check_results(pod, 6)
        assert len(ended["golem"]["providers"]) == 2
        assert 0.8 <= ended["golem"]["spent"] == ended["golem"]["accepted"] <= 1
