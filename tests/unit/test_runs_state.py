"""The record of a run on disk: names, locks, identities."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpodfs.runs import state


@pytest.mark.parametrize("pod", ["", ".", "..", "a/b", "../../etc", "a\0b", "ü", "x" * 900, "%2E"])
def test_pod_key_stays_in_its_folder(pod):
    key = state.pod_key(pod)
    assert key not in ("", ".", "..")
    assert not set(key) & set("/\0.")
    assert len(key) <= 200


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(max_size=3))
def test_pod_keys_differ(one, other):
    assert (state.pod_key(one) == state.pod_key(other)) == (one == other)


def test_long_pod_names_differ():
    assert state.pod_key("x" * 900) != state.pod_key("x" * 901)


def test_run_ids_sort_by_time_and_have_the_documented_form():
    ids = [state.new_run_id() for _ in range(50)]
    times = [i.partition("-")[0] for i in ids]
    assert times == sorted(times)
    year, rest = ids[0][:4], ids[0][4:]
    assert year.isdigit()
    assert rest[4] == "T"
    assert rest[11] == "."
    assert rest[15:17] == "Z-"
    assert len(ids[0]) == len("20261124T053012.123Z-ab12")


def test_record_round_trip_and_privacy(tmp_path):
    record = state.new_record("id", "pod", ["a", "b"], "logs/id")
    state.write_record(tmp_path, record, durable=True)
    assert state.read_record(tmp_path) == record
    assert "private" not in state.public(record)
    assert (tmp_path / "run.json").stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["run.json"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"version": 99}', b'{"version": 1}', b"[" * 100_000, b"\xff"]
)
def test_a_broken_record_is_no_record(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    assert state.read_record(tmp_path) is None


def test_no_record(tmp_path):
    assert state.read_record(tmp_path / "none") is None


def test_lock_is_exclusive_and_passes_to_a_child(tmp_path):
    lock = state.take_lock(tmp_path)
    assert lock is not None
    assert state.take_lock(tmp_path) is None
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock]
    )
    os.close(lock)
    assert state.take_lock(tmp_path) is None
    child.communicate(b"\n")
    again = state.take_lock(tmp_path)
    assert again is not None
    os.close(again)


def test_a_pid_used_again_is_not_taken_for_the_old_process():
    me = state.identity(os.getpid())
    fd = state.open_pidfd(me)
    assert fd is not None
    os.close(fd)
    assert state.open_pidfd(me | {"start_ticks": me["start_ticks"] - 1}) is None


@pytest.mark.parametrize(
    "who", [None, {}, {"pid": "1"}, {"pid": 0}, {"pid": -1}, {"pid": 2**22 + 1, "start_ticks": 1}]
)
def test_no_such_process(who):
    assert state.open_pidfd(who) is None


@pytest.fixture
def orphans(tmp_path):
    """A dead supervisor's identity, and the pids of three processes without a mark: of its session;
    one of a session of its own, left to whoever takes orphans in; and the child of the first. A
    fourth, with the run's mark, is in the session."""
    # Its mark is to be seen only once ``env`` has become it: so it says when that is.
    marked = "import time; print(flush=True); time.sleep(1000)"
    shell = f"env CPODFS_RUN_ID=marked {sys.executable} -S -c '{marked}' & "
    shell += "echo $$; env -i setsid sh -c 'echo $$; exec sleep 1000' & env -i sleep 1000 & echo $!"
    leader = (
        "import subprocess, sys; sys.path.insert(0, sys.argv[1])\n"
        "subprocess.Popen(['env', '-i', 'PATH=/usr/bin:/bin', 'sh', '-c', sys.argv[2] + '; wait'])\n"
        "input()"
    )
    with subprocess.Popen(
        [sys.executable, "-S", "-c", leader, "", shell],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as supervisor:
        said = [supervisor.stdout.readline().strip() for _ in range(4)]
        pids = [int(line) for line in said if line]
        fds = [os.pidfd_open(pid) for pid in pids]
        who = state.identity(supervisor.pid)
        supervisor.kill()
    yield who, fds
    for fd in fds:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        os.close(fd)


def is_gone(fd, timeout_s=10.0):
    return bool(select.select([fd], [], [], timeout_s)[0])


def test_leftovers_are_known_by_their_session_and_their_parents(orphans):
    who, fds = orphans
    # Nobody with a mark in it: the number may be that of others by now.
    assert state.kill_leftovers("20261124T000000.000Z-none", who) == 0
    assert state.kill_leftovers("marked", who) == 4
    assert all(map(is_gone, fds))


@pytest.mark.parametrize("change", ["boot", "number", "missing", "other"])
def test_who_only_seems_to_be_of_the_session_is_spared(orphans, change):
    who, fds = orphans
    changed = {
        # The machine was started again, and numbers begin anew.
        "boot": who | {"boot": "another"},
        # The number went to another process: there was nobody left in the session.
        "number": who | {"pid": os.getsid(0), "start_ticks": 1},
        "missing": {key: who[key] for key in ("pid", "start_ticks")},
        "other": "no identity",
    }[change]
    assert state.kill_leftovers("marked", changed) == 1
    assert not any(is_gone(fd, 0) for fd in fds)


def test_leftovers_are_known_by_their_environment():
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", "print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={"CPODFS_RUN_ID": "20261124T000000.000Z-test"},
    )
    child.stdout.readline()
    assert child.pid in state.children(os.getpid())
    assert state.kill_leftovers("20261124T000000.000Z-tes") == 0
    assert state.kill_leftovers("20261124T000000.000Z-test") == 1
    assert child.wait() == -9
    child.stdin.close()
    child.stdout.close()


def test_whose_a_thread_or_process_is():
    code = (
        "import subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        grandchild = int(child.stdout.readline())
        tasks: list[int] = []
        thread = threading.Thread(
            target=lambda: tasks.append(threading.get_native_id()) or gate.wait()
        )
        gate = threading.Event()
        thread.start()
        try:
            while not tasks:
                time.sleep(0.001)
            assert state.descends(grandchild, child.pid)
            assert state.descends(grandchild, os.getpid())
            assert state.descends(child.pid, child.pid)
            assert state.descends(tasks[0], os.getpid())
            assert not state.descends(tasks[0], child.pid)
            assert not state.descends(os.getpid(), child.pid)
            assert not state.descends(0, child.pid)
        finally:
            gate.set()
            thread.join()
            os.kill(grandchild, signal.SIGKILL)
            child.stdin.close()
