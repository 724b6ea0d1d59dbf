"""Runs from begin to end: output, ends of every kind, cancelling, what programs get to see."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import trio
import trio.testing
from runs_helpers import APP_KEY, Bench, Fifo, python, recipe, until

from cpodfs.errors import ConfigError, RunError, RunInProgress
from cpodfs.runs import manager as manager_module
from cpodfs.runs import state

pytestmark = pytest.mark.anyio


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


async def test_output_record_and_folders(bench):
    async with bench.managed() as manager:
        record = await bench.run(
            recipe("sh -c 'echo out; echo err >&2; echo result > output/r'", log="my/logs")
        )
        assert manager.current("pod") is None
    assert (record["state"], record["exit_code"], record["signal"]) == ("finished", 0, None)
    assert record["log"] == f"my/logs/{record['id']}"
    assert record["started"] <= record["ended"]
    assert bench.published(record, "stdout.log") == b"out\n"
    assert bench.published(record, "stderr.log") == b"err\n"
    assert json.loads(bench.published(record, "run.json")) == record
    assert record["recipe"]["golem"]["log"] == "my/logs"
    assert (bench.mount / "pod/output/r").read_text() == "result\n"
    assert (bench.folder(record) / "supervisor.log").read_bytes() == b""
    assert (bench.folder(record) / "stdout.log").read_bytes() == b"out\n"


@pytest.mark.parametrize(
    ("command", "outcome", "code", "number"),
    [
        ("true", "finished", 0, None),
        ("sh -c 'exit 7'", "failed", 7, None),
        ("sh -c 'kill -TERM $$'", "failed", None, "SIGTERM"),
        ("sh -c 'kill -KILL $$'", "failed", None, "SIGKILL"),
    ],
)
async def test_ends(bench, command, outcome, code, number):
    async with bench.managed():
        record = await bench.run(recipe(command))
    assert (record["state"], record["exit_code"], record["signal"]) == (outcome, code, number)
    assert record["error"] is None


async def test_program_missing(bench):
    async with bench.managed():
        record = await bench.run(recipe("no-such-program"))
    assert record["state"] == "failed"
    assert record["error"].startswith("golem.exec: 'no-such-program': no such program")
    assert record["error"].encode() in bench.published(record, "stderr.log")
    assert json.loads(bench.published(record, "run.json"))["error"] == record["error"]


async def test_program_not_executable(bench):
    (bench.mount / "pod/data").write_text("x")
    async with bench.managed():
        record = await bench.run(recipe("./data"))
    assert record["error"] == "golem.exec: './data': Permission denied"


async def test_pod_missing(bench):
    async with bench.managed(publish_s=0.05):
        record = await bench.run(recipe("true"), pod="gone")
    assert record["state"] == "failed"
    assert "gone" in record["error"]
    assert os.listdir(bench.mount) == ["pod"]


async def test_output_folder_cannot_be_made(bench):
    (bench.mount / "pod/output").write_text("a file")
    async with bench.managed():
        record = await bench.run(recipe("true"))
    assert record["state"] == "failed"
    assert "Not a directory" in record["error"]


async def test_much_output_is_complete(bench):
    async with bench.managed():
        record = await bench.run(
            python(
                "import sys; [print(i) for i in range(300000)]; print('x' * 10**6, file=sys.stderr)"
            )
        )
    expected = b"".join(b"%d\n" % i for i in range(300000))
    assert bench.published(record, "stdout.log") == expected
    assert len(bench.published(record, "stderr.log")) == 10**6 + 1


async def test_a_printed_line_is_in_the_pod_while_the_program_runs(bench, told):
    code = f"""
import os, time
print("hello")
log = os.environ["CPODFS_RUN_LOG"] + "/stdout.log"
while not os.path.exists(log) or os.path.getsize(log) == 0:
    time.sleep(0.001)
print(open(log).read().strip(), file=open({told.path!r}, "w"))
"""
    async with bench.managed():
        bench.manager.begin("pod", python(code))
        assert await told.line() == "hello"
        await bench.ended()


async def test_the_environment_is_clean(bench, monkeypatch):
    monkeypatch.setenv("CPODFS_PASSWORD", "secret-pw")
    monkeypatch.setenv("AWS_SECRET", "secret-aws")
    monkeypatch.setenv("PYTHONPATH", "/secret")
    monkeypatch.setenv("LC_TIME", "C")
    extra = {"YAGNA_APPKEY": APP_KEY, "YAGNA_API_URL": "http://127.0.0.1:1", "PATH": "/first"}
    async with bench.managed(environment=lambda: extra):
        record = await bench.run(python("import os, json; print(json.dumps(dict(os.environ)))"))
    env = json.loads(bench.published(record, "stdout.log"))
    assert not any("secret" in value for value in env.values())
    pod = str(bench.mount / "pod")
    # Its own key to its own gateway, for no more than this run.
    key, url = env.pop("YAGNA_APPKEY"), env.pop("YAGNA_API_URL")
    assert len(key) == 32
    assert APP_KEY not in env.values()
    assert url.startswith("http://127.0.0.1:")
    assert url != extra["YAGNA_API_URL"]
    wanted = {
        "CPODFS_RUN_ID": record["id"],
        "CPODFS_POD": "pod",
        "CPODFS_SCRIPT": f"{pod}/script",
        "CPODFS_PAYLOAD": f"{pod}/payload",
        "CPODFS_OUTPUT": f"{pod}/output",
        "CPODFS_LOG": f"{pod}/logs",
        "CPODFS_RUN_LOG": f"{pod}/logs/{record['id']}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "TERM": "dumb",
        "LC_TIME": "C",
    }
    assert wanted.items() <= env.items()
    assert set(env) - set(wanted) <= {
        "PATH",
        "HOME",
        "USER",
        "LOGNAME",
        "LANG",
        "LANGUAGE",
        "TZ",
        "TMPDIR",
        "LC_ALL",
        "LC_CTYPE",
    }
    assert env["PATH"].startswith(f"/first:{os.path.dirname(sys.executable)}:")


async def test_python3_is_ours(bench):
    async with bench.managed():
        record = await bench.run(recipe("python3 -c 'import sys, yapapi; print(sys.prefix)'"))
    assert bench.published(record, "stdout.log").decode().strip() == sys.prefix


async def test_the_app_key_is_nowhere_to_be_seen(bench, told, gate):
    async with bench.managed():
        bench.manager.begin("pod", recipe(f"sh -c 'echo up > {told.path}; read x < {gate.path}'"))
        await told.line()
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                assert APP_KEY.encode() not in process.read_bytes()
        assert APP_KEY not in json.dumps(bench.manager.current("pod"))
        await gate.release()
        await bench.ended()
    files = [p for p in bench.base.rglob("*") if p.is_file()]
    assert len(files) >= 8
    assert not any(APP_KEY.encode() in p.read_bytes() for p in files)


async def test_cwd_stdin_descriptors_and_group(bench):
    code = """
import os, sys
print(os.getcwd(), os.path.realpath("/proc/self/fd/0"), os.getpgrp() == os.getpid())
print(sorted(int(n) for n in os.listdir("/proc/self/fd")))
"""
    async with bench.managed():
        record = await bench.run(python(code))
    first, second = bench.published(record, "stdout.log").decode().splitlines()
    assert first == f"{bench.mount / 'pod'} /dev/null True"
    # 3 is listdir's own.
    assert second == "[0, 1, 2, 3]"


async def test_programs_start_with_default_signals(bench):
    code = """
import signal
print([s.name for s in signal.Signals if signal.getsignal(s) is signal.SIG_IGN])
print(signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""
    async with bench.managed():
        record = await bench.run(python(code))
    # Python itself ignores these two.
    assert bench.published(record, "stdout.log").decode() == "['SIGPIPE', 'SIGXFSZ']\nset()\n"


async def test_one_run_per_pod_and_several_pods(bench, told, gate):
    (bench.mount / "other").mkdir()
    waiting = recipe(f"sh -c 'echo up > {told.path}; read x < {gate.path}'")
    async with bench.managed() as manager:
        run_id = manager.begin("pod", waiting)
        with pytest.raises(RunInProgress, match=run_id):
            manager.begin("pod", waiting)
        await told.line()
        with pytest.raises(RunInProgress, match=run_id):
            manager.begin("pod", waiting)
        await until(lambda: manager.current("pod")["state"] == "running")
        shown = manager.current("pod")
        assert shown["id"] == run_id
        assert shown["pid"] > 0
        json.dumps(shown)
        await bench.run(recipe("true"), pod="other")
        await gate.release()
        assert await bench.ended() == "pod"
        await bench.run(recipe("true"))
        assert len(manager.history("pod")) == 2


async def test_cancel_lets_the_program_clean_up(bench, told):
    code = f"""
import signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
print("up", file=open({told.path!r}, "w"))
for _ in range(2):
    print(signal.Signals(signal.sigwait([signal.SIGINT, signal.SIGTERM])).name)
sys.exit(3)
"""
    async with bench.managed(cancel_grace_s=8.0) as manager:
        assert not manager.cancel("pod")
        manager.begin("pod", python(code))
        await told.line()
        assert manager.cancel("pod")
        await bench.ended()
        assert not manager.cancel("pod")
        record = manager.history("pod")[0]
    assert (record["state"], record["exit_code"]) == ("cancelled", 3)
    assert bench.published(record, "stdout.log") == b"SIGINT\nSIGTERM\n"


async def test_cancel_waits_for_what_the_program_started(bench, told):
    inner = (
        f'trap "echo inner done; exit" TERM; echo up > {told.path}; while :; do sleep 0.01; done'
    )
    async with bench.managed() as manager:
        manager.begin("pod", recipe(["sh", "-c", f"sh -c '{inner}' & wait"]))
        await told.line()
        manager.cancel("pod")
        await bench.ended()
        record = manager.history("pod")[0]
    assert record["state"] == "cancelled"
    assert record["signal"] == "SIGINT"
    assert bench.published(record, "stdout.log") == b"inner done\n"


async def test_a_program_that_ignores_term_is_killed_after_the_grace(bench, told):
    command = f"sh -c 'trap \"\" INT TERM; echo up > {told.path}; while :; do sleep 0.05; done'"
    async with bench.managed(cancel_grace_s=0.2) as manager:
        manager.begin("pod", recipe(command))
        await told.line()
        manager.cancel("pod")
        await bench.ended()
        record = manager.history("pod")[0]
    assert (record["state"], record["signal"]) == ("cancelled", "SIGKILL")


async def test_cancel_at_once(bench):
    async with bench.managed() as manager:
        manager.begin("pod", recipe("sleep 1000"))
        assert manager.cancel("pod")
        await bench.ended()
        record = manager.history("pod")[0]
    assert record["state"] == "cancelled"
    assert record["started"] is None
    assert json.loads(bench.published(record, "run.json"))["state"] == "cancelled"


async def test_cancel_while_the_supervisor_starts(bench):
    async with bench.managed() as manager:
        manager.begin("pod", recipe("sleep 1000"))
        # Past the check before the start, before the supervisor can listen.
        await trio.testing.wait_all_tasks_blocked()
        manager.cancel("pod")
        await bench.ended()
        assert manager.history("pod")[0]["state"] == "cancelled"


async def test_cancel_all_kills_what_does_not_end(bench, told, tmp_path, monkeypatch):
    # A supervisor that hangs: it has a grace of minutes, the manager has not.
    monkeypatch.setattr(manager_module, "_LOGS_S", 0.1 - 600)
    alive = Fifo(tmp_path / "alive").listen(hold=False)
    command = f"sh -c 'trap \"\" INT TERM; exec 9> {alive.path}; echo up > {told.path}; while :; do sleep 0.05; done'"
    async with bench.managed(cancel_grace_s=600) as manager:
        manager.begin("pod", recipe(command))
        await told.line()
        await manager.cancel_all()
        await alive.closed()
        assert await bench.ended() == "pod"
        record = manager.history("pod")[0]
        assert (record["state"], record["error"]) == ("cancelled", "killed: it did not end in time")
        with pytest.raises(RunError, match="taken down"):
            manager.begin("pod", recipe("true"))


@pytest.mark.parametrize("how", ["&", "setsid"])
async def test_no_orphans(bench, tmp_path, told, how):
    alive = Fifo(tmp_path / "alive").listen(hold=False)
    # Each holds a writing end of `alive` while it lives; the second is in a session of its own.
    sleeper = f"exec 9> {alive.path}; echo up > {told.path}; exec sleep 1000"
    start = f"sh -c '{sleeper}' &" if how == "&" else f"(setsid sh -c '{sleeper}' &) "
    async with bench.managed():
        record = await bench.run(recipe(["sh", "-c", f"{start}\nread x < {told.path}; exit 5"]))
        await alive.closed()
    assert (record["state"], record["exit_code"]) == ("failed", 5)


async def test_logs_come_back_when_their_folder_vanishes(bench, told, gate):
    command = f"sh -c 'echo one; echo up > {told.path}; read x < {gate.path}; echo two'"
    hidden = bench.base / "hidden"
    async with bench.managed() as manager:
        run_id = manager.begin("pod", recipe(command))
        await told.line()
        await bench.copied(run_id, b"one\n")
        # As when the mount dies: open files fail, the pod is not there, and later is again.
        shutil.rmtree(bench.mount / "pod/logs")
        (bench.mount / "pod").rename(hidden)
        await gate.release()
        await until(lambda: manager.current("pod")["state"] == "finished")
        hidden.rename(bench.mount / "pod")
        await bench.ended()
        record = manager.history("pod")[0]
    assert bench.published(record, "stdout.log") == b"one\ntwo\n"
    assert json.loads(bench.published(record, "run.json"))["state"] == "finished"


async def test_a_link_in_the_log_folders_place_is_not_followed(bench):
    outside = bench.base / "outside"
    outside.mkdir()
    (bench.mount / "pod/logs").symlink_to(outside)
    async with bench.managed(publish_s=0.05):
        record = await bench.run(recipe("echo hi"))
    assert record["state"] == "finished"
    assert (bench.folder(record) / "stdout.log").read_bytes() == b"hi\n"
    assert os.listdir(outside) == []


async def test_the_supervisor_dies(bench, told, tmp_path):
    alive = Fifo(tmp_path / "alive").listen(hold=False)
    command = f"sh -c 'exec 9> {alive.path}; echo up > {told.path}; exec sleep 1000'"
    async with bench.managed() as manager:
        run_id = manager.begin("pod", recipe(command))
        await told.line()
        record = state.read_record(bench.runs_dir / "pod" / run_id)
        os.kill(record["private"]["supervisor"]["pid"], signal.SIGKILL)
        await bench.ended()
        await alive.closed()
        record = manager.history("pod")[0]
    assert (record["state"], record["error"]) == ("lost", "the supervisor died")
    assert b"the supervisor died" in bench.published(record, "stderr.log")
    assert json.loads(bench.published(record, "run.json"))["state"] == "lost"


@pytest.mark.parametrize(
    ("problem", "shown"),
    [
        (ConfigError("yagna: no app-key"), "cannot start the supervisor: yagna: no app-key"),
        (KeyError(APP_KEY), "cannot start the supervisor: KeyError"),
    ],
)
async def test_no_environment(bench, problem, shown):
    def environment():
        raise problem

    async with bench.managed(environment=environment):
        record = await bench.run(recipe("true"))
    assert (record["state"], record["error"]) == ("failed", shown)
    assert json.loads(bench.published(record, "run.json"))["error"] == shown


async def test_an_environment_that_cannot_be_passed_on(bench):
    async with bench.managed(environment=lambda: {"ELSE": "a\0b"}):
        record = await bench.run(recipe("true"))
    assert record["error"] == "golem.exec: 'true': cannot be started (ValueError)"


async def test_what_the_supervisor_could_not_copy_is_copied_once_more(bench, monkeypatch):
    async with bench.managed(publish_s=0.05) as manager:
        close_record = manager._close_record

        def back_again(run):
            (bench.base / "hidden").rename(bench.mount / "pod")
            manager._publish_s = 5
            close_record(run)

        monkeypatch.setattr(manager, "_close_record", back_again)
        record = await bench.run(recipe(f"mv {bench.mount}/pod {bench.base}/hidden"))
    assert record["state"] == "finished"
    assert json.loads(bench.published(record, "run.json"))["state"] == "finished"


async def test_only_the_last_runs_are_remembered(bench):
    async with bench.managed(keep=2) as manager:
        ids = [(await bench.run(recipe("true")))["id"] for _ in range(4)]
        assert [r["id"] for r in manager.history("pod")] == [ids[3], ids[2]]
    assert sorted(os.listdir(bench.mount / "pod/logs")) == ids[2:]


async def test_a_run_that_cannot_be_recorded_is_refused(bench):
    bench.runs_dir.mkdir()
    (bench.runs_dir / "pod").write_text("in the way")
    (bench.runs_dir / "pod").rename(bench.base / "x")
    async with bench.managed() as manager:
        (bench.base / "x").rename(bench.runs_dir / "pod")
        with pytest.raises(RunError, match="cannot be recorded"):
            manager.begin("pod", recipe("true"))
        assert manager.current("pod") is None


async def test_not_started(bench):
    async with bench.managed() as manager:
        pass
    with pytest.raises(RunError, match="not being served"):
        manager.begin("pod", recipe("true"))


async def test_on_end_that_raises_does_not_end_the_manager(bench):
    async with bench.managed() as manager:
        send = manager._on_end

        def on_end(pod):
            send(pod)
            raise RuntimeError("boom")

        manager._on_end = on_end
        await bench.run(recipe("true"))
        await bench.run(recipe("true"))


async def test_no_zombies_and_no_descriptors_are_left(bench):
    async with bench.managed():
        await bench.run(recipe("true"))
        children, fds = state.children(os.getpid()), len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            await bench.run(recipe("true"))
        assert state.children(os.getpid()) == children
        assert len(os.listdir("/proc/self/fd")) == fds
