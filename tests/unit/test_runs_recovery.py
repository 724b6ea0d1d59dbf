"""The driver dies: runs go on and are found again, or are recorded as lost; none runs twice."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio
import trio.testing
from runs_helpers import APP_KEY, Bench, Fifo, recipe, until

from cpodfs.runs import debts, launch, state
from cpodfs.runs import manager as manager_module
from cpodfs.runs.provider_link import GRACE_S

pytestmark = pytest.mark.anyio

# A driver that begins one run. "journal": it dies right after begin returned.
DRIVER = """
import os, signal, sys, trio
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from runs_helpers import APP_KEY, recipe
from cpodfs.runs.manager import RunManager

async def main():
    base, when, command = Path(sys.argv[2]), sys.argv[3], sys.argv[4]
    manager = RunManager(base / "runs", base / "mount", on_end=print,
                         environment=lambda: {"YAGNA_APPKEY": APP_KEY})
    async with trio.open_nursery() as nursery:
        await nursery.start(manager.run)
        print(manager.begin("pod", recipe(command)), flush=True)
        if when == "journal":
            os.kill(os.getpid(), signal.SIGKILL)

trio.run(main)
"""


@pytest.fixture
def anyio_backend():
    return "trio"


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


@pytest.fixture
def told(tmp_path):
    return Fifo(tmp_path / "told").listen()


@pytest.fixture
def gate(tmp_path):
    return Fifo(tmp_path / "gate")


@pytest.fixture
def start_driver(bench):
    """Start a driver process; returns it and the run's id."""
    started = []

    def start(command: str, when: str = "running"):
        here = str(Path(__file__).parent)
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, here, str(bench.base), when, command],
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(driver)
        return driver, driver.stdout.readline().strip()

    yield start
    for driver in started:
        driver.kill()
        driver.wait()
        driver.stdout.close()


def kill(driver) -> None:
    driver.kill()
    driver.wait()


def counting(bench, told, gate) -> str:
    return (
        f"sh -c 'echo ran >> {bench.base}/count; echo one; echo up > {told.path}; "
        f"read x < {gate.path}; echo two'"
    )


async def test_a_run_survives_the_driver_and_is_adopted(bench, told, gate, start_driver):
    driver, run_id = start_driver(counting(bench, told, gate))
    await told.line()
    kill(driver)
    async with bench.managed() as manager:
        shown = manager.current("pod")
        assert shown["id"] == run_id
        assert shown["state"] in ("starting", "running")
        await gate.release()
        assert await bench.ended() == "pod"
        (record,) = manager.history("pod")
    assert (record["state"], record["exit_code"]) == ("finished", 0)
    assert bench.published(record, "stdout.log") == b"one\ntwo\n"
    assert (bench.base / "count").read_text() == "ran\n"
    assert not any(APP_KEY.encode() in p.read_bytes() for p in bench.base.rglob("*") if p.is_file())


async def test_an_adopted_run_can_be_cancelled(bench, told, gate, start_driver):
    driver, _ = start_driver(counting(bench, told, gate))
    await told.line()
    kill(driver)
    async with bench.managed() as manager:
        assert manager.cancel("pod")
        await bench.ended()
        (record,) = manager.history("pod")
    assert record["state"] == "cancelled"


async def test_the_supervisor_of_an_adopted_run_dies(bench, told, gate, start_driver):
    driver, run_id = start_driver(counting(bench, told, gate))
    await told.line()
    await bench.copied(run_id, b"one\n")
    kill(driver)
    async with bench.managed() as manager:
        private = state.read_record(bench.runs_dir / "pod" / run_id)["private"]
        os.kill(private["supervisor"]["pid"], signal.SIGKILL)
        await bench.ended()
        (record,) = manager.history("pod")
    assert record["state"] == "lost"
    assert bench.published(record, "stdout.log") == b"one\n"


async def test_a_driver_that_dies_before_it_starts_the_program(bench, start_driver):
    driver, run_id = start_driver(f"touch {bench.base}/ran", "journal")
    driver.wait()
    async with bench.managed() as manager:
        assert manager.current("pod") is None
        (record,) = manager.history("pod")
        assert (record["id"], record["state"]) == (run_id, "lost")
        await published(bench.folder(record))
    assert json.loads(bench.published(record, "run.json"))["state"] == "lost"
    assert not (bench.base / "ran").exists()


async def test_driver_and_supervisor_die_together(bench, told, tmp_path, start_driver):
    alive = Fifo(tmp_path / "alive").listen(hold=False)
    command = f"sh -c 'exec 9> {alive.path}; echo out; echo up > {told.path}; exec sleep 1000'"
    driver, run_id = start_driver(command)
    await told.line()
    kill(driver)
    private = state.read_record(bench.runs_dir / "pod" / run_id)["private"]
    supervisor = os.pidfd_open(private["supervisor"]["pid"])
    signal.pidfd_send_signal(supervisor, signal.SIGKILL)
    await trio.lowlevel.wait_readable(supervisor)
    os.close(supervisor)
    async with bench.managed() as manager:
        await alive.closed()
        (record,) = manager.history("pod")
        assert record["state"] == "lost"
        # The next touch works.
        assert (await bench.run(recipe("true")))["state"] == "finished"


async def test_a_run_that_ends_without_a_driver_or_a_mount_is_copied_later(
    bench, told, gate, start_driver
):
    driver, run_id = start_driver(counting(bench, told, gate))
    await told.line()
    await bench.copied(run_id, b"one\n")
    kill(driver)
    # Away with the mount, then with the supervisor in the middle of its tries to reach it.
    shutil.rmtree(bench.mount / "pod/logs")
    (bench.mount / "pod").rename(bench.base / "hidden")
    folder = bench.runs_dir / "pod" / run_id
    await gate.release()
    await until(lambda: state.read_record(folder)["state"] == "finished")
    private = state.read_record(folder)["private"]
    supervisor = os.pidfd_open(private["supervisor"]["pid"])
    signal.pidfd_send_signal(supervisor, signal.SIGKILL)
    await trio.lowlevel.wait_readable(supervisor)
    os.close(supervisor)
    (bench.base / "hidden").rename(bench.mount / "pod")
    async with bench.managed() as manager:
        await published(folder)
        (record,) = manager.history("pod")
    assert record["state"] == "finished"
    assert bench.published(record, "stdout.log") == b"one\ntwo\n"
    assert json.loads(bench.published(record, "run.json"))["state"] == "finished"


async def test_what_a_crash_left_in_the_runs_folder_is_no_obstacle(bench):
    parent = bench.runs_dir / "pod"
    (parent / ".new-20261124T000000.000Z-abcd").mkdir(parents=True)
    (parent / "20261124T000000.000Z-dead").mkdir()
    (parent / "20261124T000001.000Z-dead").mkdir()
    (parent / "20261124T000001.000Z-dead/run.json").write_text("{broken")
    (bench.runs_dir / "a file").write_text("")
    async with bench.managed() as manager:
        assert manager.history("pod") == []
        assert not list(parent.glob(".new-*"))
        assert (await bench.run(recipe("true")))["state"] == "finished"
        shutil.rmtree(bench.runs_dir)
        assert manager.history("pod") == []


async def test_cancelling_the_manager_leaves_the_run_alone(bench, told, gate):
    async with bench.managed() as manager:
        run_id = manager.begin("pod", recipe(counting(bench, told, gate)))
        await told.line()
        manager._nursery.cancel_scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        bench.manager._active.clear()
    async with bench.managed() as manager:
        assert manager.current("pod")["id"] == run_id
        await gate.release()
        await bench.ended()
        assert manager.history("pod")[0]["state"] == "finished"
    assert (bench.base / "count").read_text() == "ran\n"


async def test_an_adopted_runs_folder_is_removed(bench, told, gate, start_driver):
    driver, run_id = start_driver(counting(bench, told, gate))
    await told.line()
    kill(driver)
    async with bench.managed() as manager:
        await trio.testing.wait_all_tasks_blocked()
        folder = bench.runs_dir / "pod" / run_id
        supervisor = state.read_record(folder)["private"]["supervisor"]["pid"]
        # It must not write into the folder while that is being removed.
        os.kill(supervisor, signal.SIGSTOP)
        shutil.rmtree(folder)
        os.kill(supervisor, signal.SIGKILL)
        assert await bench.ended() == "pod"
        assert manager.current("pod") is None
        state.kill_leftovers(run_id)
        assert (await bench.run(recipe("true")))["state"] == "finished"


async def test_a_lock_that_cannot_be_looked_at_is_looked_at_again(
    bench, told, gate, start_driver, monkeypatch
):
    driver, _ = start_driver(counting(bench, told, gate))
    await told.line()
    kill(driver)
    async with bench.managed() as manager:
        take_lock, tries = state.take_lock, []

        def fails(folder):
            tries.append(folder)
            if len(tries) <= 2:
                raise OSError(errno.EMFILE, "too many open files")
            return take_lock(folder)

        monkeypatch.setattr(state, "take_lock", fails)
        await gate.release()
        await bench.ended()
        assert len(tries) > 2
        assert manager.history("pod")[0]["state"] == "finished"


async def test_a_run_is_over_when_its_end_is_written_down(
    bench, told, gate, start_driver, monkeypatch
):
    """A full disk keeps it in progress: said to be over, it would be running for ever after."""
    monkeypatch.setattr(manager_module, "_ROOM_RETRY_S", 0.01)
    driver, _ = start_driver(counting(bench, told, gate))
    await told.line()
    kill(driver)
    write_record, tries = state.write_record, []

    def full(folder, record, *, durable):
        tries.append(record["state"])
        if len(tries) <= 2:
            raise OSError(errno.ENOSPC, "no space left on device")
        write_record(folder, record, durable=durable)

    async with bench.managed() as manager:
        record = manager.current("pod")
        folder = bench.runs_dir / "pod" / record["id"]
        monkeypatch.setattr(state, "write_record", full)
        private = state.read_record(folder)["private"]
        os.kill(private["supervisor"]["pid"], signal.SIGKILL)
        await bench.ended()
        assert tries == ["lost"] * 3
        assert manager.history("pod")[0]["state"] == "lost"


GOLEM = {"phase": "running", "allocation": "x", "providers": [], "spent": 0, "accepted": 0}


def tidied(monkeypatch, failures=0):
    """Stands in for the process that talks to the market; tells what it was given."""
    calls = []

    def clean_up(status, env, words, *, last, until):
        assert status == GOLEM
        assert env["YAGNA_APPKEY"] == APP_KEY
        calls.append(True)
        if len(calls) > failures:
            os.write(words, b"tidied\n")
            status["phase"] = "over"

    monkeypatch.setattr(launch, "clean_up", clean_up)
    return calls


def hire(folder):
    """Make a record say that the run has providers."""
    record = state.read_record(folder)
    record["golem"] = dict(GOLEM)
    state.write_record(folder, record, durable=False)
    return record


async def test_the_supervisor_of_a_provider_run_dies(bench, told, gate, monkeypatch):
    calls = tidied(monkeypatch)
    async with bench.managed() as manager:
        run_id = manager.begin("pod", recipe(counting(bench, told, gate)))
        await told.line()
        folder = bench.runs_dir / "pod" / run_id
        await until(lambda: state.read_record(folder)["state"] == "running")
        private = hire(folder)["private"]
        os.kill(private["supervisor"]["pid"], signal.SIGKILL)
        await bench.ended()
        (record,) = manager.history("pod")
    assert calls == [True]
    assert (record["state"], record["golem"]["phase"]) == ("lost", "over")
    assert b"tidied\n" in bench.published(record, "stderr.log")


async def test_a_provider_run_that_nobody_minds_is_tidied_up_after_the_start(bench, monkeypatch):
    calls = tidied(monkeypatch)
    record = state.new_record("20261124T000000.000Z-abcd", "pod", ["x"], "logs/x")
    folder = bench.folder(record)
    folder.mkdir(parents=True)
    state.write_record(folder, record, durable=False)
    hire(folder)
    async with bench.managed() as manager:
        assert await bench.ended() == "pod"
        (record,) = manager.history("pod")
        assert (await bench.run(recipe("true")))["state"] == "finished"
    assert calls == [True]
    assert (record["state"], record["golem"]["phase"]) == ("lost", "over")


async def test_while_yagna_is_away_it_is_tried_again(bench, monkeypatch):
    """The run is over for its user at once; its agreements are ended when they can be."""
    calls = tidied(monkeypatch, failures=3)
    monkeypatch.setattr(debts, "PAUSES_S", (0.01,))
    monkeypatch.setattr(debts, "LOOK_S", 0.01)
    looks, later = iter([False, False, True, True]), [False]

    async def is_there(_environment):
        return next(looks, later[0])

    monkeypatch.setattr(debts, "_is_there", is_there)
    record = state.new_record(state.new_run_id(), "pod", ["x"], "logs/x")
    folder = bench.folder(record)
    folder.mkdir(parents=True)
    state.write_record(folder, record, durable=False)
    hire(folder)
    async with bench.managed() as manager:
        assert await bench.ended() == "pod"
        assert manager.history("pod")[0]["golem"]["phase"] == "running"
        await until(lambda: len(calls) == 3)
    later[0] = True
    # The next driver takes it up.
    async with bench.managed() as manager:
        copy = bench.mount / "pod/logs/x/run.json"
        await until(lambda: json.loads(copy.read_bytes())["golem"]["phase"] == "over")
        (record,) = manager.history("pod")
    assert len(calls) == 4
    assert (record["state"], record["golem"]["phase"]) == ("lost", "over")


async def test_old_debts_are_let_be(bench, monkeypatch):
    calls = tidied(monkeypatch)
    record = state.new_record(state.new_run_id(), "pod", ["x"], "logs/x")
    folder = bench.folder(record)
    folder.mkdir(parents=True)
    state.end_record(record, state.LOST)
    record["private"]["published"] = True
    state.write_record(folder, record, durable=False)
    hire(folder)
    long_ago = time.time() - debts.REMEMBERED_S - 1
    os.utime(folder / "run.json", (long_ago, long_ago))
    monkeypatch.setattr(debts, "PAUSES_S", (0.0,))
    async with bench.managed():
        assert (await bench.run(recipe("true")))["state"] == "finished"
    assert calls == []


async def test_provider_runs_get_the_time_to_tidy_up(bench, told, gate, monkeypatch):
    async with bench.managed() as manager:
        manager.begin("pod", recipe(counting(bench, told, gate)))
        await told.line()
        manager._active["pod"].record["private"]["hires"] = True
        waits = []
        move_on_after = trio.move_on_after
        monkeypatch.setattr(
            trio, "move_on_after", lambda s, **k: waits.append(s) or move_on_after(s, **k)
        )
        await manager.cancel_all()
    assert waits[0] > 2 * GRACE_S


async def published(folder: Path) -> None:
    """Wait until the copy of a run has been completed by a process that is not ours to await."""
    await until(lambda: state.read_record(folder)["private"]["published"])
