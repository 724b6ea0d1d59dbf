"""The supervisor's parts that no whole run reaches at will, and how fast and small it starts."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest

from cpodfs.runs import program as program_module
from cpodfs.runs import state
from cpodfs.runs.program import Program
from cpodfs.runs.spawn import run_environment, supervisor_command, supervisor_environment
from cpodfs.runs.stream import Spool, Stream
from cpodfs.runs.supervisor import Supervisor, read_job


@pytest.fixture
def pipe():
    reader, writer = os.pipe()
    yield reader, writer
    for fd in (reader, writer):
        try:
            os.close(fd)
        except OSError:
            pass


def test_a_full_disk_holds_the_program_up_and_loses_nothing(pipe, tmp_path):
    reader, writer = pipe
    full = os.open("/dev/full", os.O_WRONLY)
    spool = Spool(full)
    stream = Stream(reader, spool)
    assert stream.pump() is False
    assert not stream.full
    os.write(writer, b"hello")
    assert stream.pump() is False
    assert stream.pump() is False
    assert spool.pending == b"hello"
    spool.fd = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    os.write(writer, b" world")
    os.close(writer)
    assert [stream.pump() for _ in range(2)] == [True, None]
    assert (tmp_path / "log").read_bytes() == b"hello world"
    os.close(spool.fd)
    os.close(full)


def test_a_log_has_a_limit(pipe, tmp_path):
    reader, writer = pipe
    spool = Spool(os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT), limit=7)
    stream = Stream(reader, spool)
    for text in (b"12345", b"6789", b"0"):
        os.write(writer, text)
        assert stream.pump() is True
    assert (tmp_path / "log").read_bytes() == b"1234567"
    assert spool.thrown_away == 3
    os.close(spool.fd)


def supervisor(tmp_path, **job):
    record = state.new_record("id", "pod", ["x"], "logs/id")
    job = {"mountpoint": str(tmp_path), "wrap": [], "open_files": 1024, "grace_s": 0.0, **job}
    wake, _ = os.pipe()
    return Supervisor(str(tmp_path), record, job, wake), record


def test_a_provider_run_without_a_last_word_has_failed(tmp_path):
    minder, record = supervisor(tmp_path)
    minder._program = types.SimpleNamespace(status=0)
    state.end_record(record, state.FINISHED)
    minder._end_link(types.SimpleNamespace(end=None), False)
    assert record["state"] == state.FAILED
    assert "died (exit code 0)" in record["error"]


def test_what_became_another_user_cannot_be_ended_and_is_told(tmp_path, monkeypatch):
    """As ``sudo`` does: signals to it are refused."""

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(program_module, "_KILL_LIMIT_S", 0.2)
    monkeypatch.setattr(os, "kill", refuse)
    monkeypatch.setattr(os, "killpg", refuse)
    minder, record = supervisor(tmp_path)
    with subprocess.Popen(["sleep", "60"]) as child:
        minder._program = Program(child)
        try:
            minder._program.cancel(0.0)
            minder._mind()
            minder._end()
        finally:
            monkeypatch.undo()
            child.kill()
    assert record["state"] == state.CANCELLED
    assert "could not be ended" in record["error"]


def test_texts_of_strangers_are_short_lines():
    long = {"a": ["x\n y " * 1000, 1, None, "two\nlines"], "b": "short"}
    cut = state.bounded(long)
    assert len(cut["a"][0]) == state.TEXT_LIMIT
    assert "\n" not in cut["a"][0]
    assert (cut["a"][1:], cut["b"]) == ([1, None, "two lines"], "short")


@pytest.mark.parametrize("data", [b"", b'{"env": {', b"[]", b"\xff"])
def test_half_a_job_is_no_job(data):
    assert read_job(data) is None


def test_a_driver_that_dies_in_the_middle_of_the_job(tmp_path):
    state.write_record(tmp_path, state.new_record("id", "pod", ["x"], "logs/id"), durable=False)
    lock = state.take_lock(tmp_path)
    subprocess.run(
        supervisor_command(tmp_path, lock, []),
        input=b'{"env": {"YAGNA_AP',
        stdout=subprocess.PIPE,
        pass_fds=[lock],
        env=supervisor_environment(os.environ),
        cwd="/",
        check=True,
    )
    os.close(lock)
    record = state.read_record(tmp_path)
    assert record["state"] == "lost"
    assert record["error"] == "the driver died before the program was started"


def test_a_run_that_has_ended_is_never_started_again(tmp_path):
    record = state.new_record("id", "pod", ["touch", str(tmp_path / "ran")], "logs/id")
    state.end_record(record, state.FINISHED)
    state.write_record(tmp_path, record, durable=False)
    lock = state.take_lock(tmp_path)
    subprocess.run(
        supervisor_command(tmp_path, lock, []),
        stdin=subprocess.DEVNULL,
        pass_fds=[lock],
        env=supervisor_environment(os.environ),
        cwd="/",
        check=True,
    )
    os.close(lock)
    assert state.read_record(tmp_path) == record
    assert not (tmp_path / "ran").exists()


def test_the_supervisor_imports_nothing_heavy():
    code = "import sys, cpodfs.runs.supervisor; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"pydantic", "trio", "httpx", "aiohttp", "asyncio", "logging", "click"}


def test_the_supervisors_environment_has_no_secrets():
    ours = {"CPODFS_PASSWORD": "x", "YAGNA_APPKEY": "y", "HOME": "/h", "LC_ALL": "C"}
    env = supervisor_environment(ours)
    assert set(env) == {"HOME", "LC_ALL", "PATH", "PYTHONPATH"}


def test_path_of_a_program():
    python = os.path.dirname(os.path.abspath(sys.executable))
    env = run_environment({"PATH": "/devnet"}, {"PATH": "/usr/bin"})
    assert env["PATH"] == f"/devnet:{python}:/usr/bin"
    assert run_environment({}, {})["PATH"] == f"{python}:{os.defpath}"
