"""Touch-to-run as a user meets it: a real mount with its devnet, ``touch``, ``cat``, ``rm``, ``tail``."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from cpodfs.devnet.ledger import ledger_table, open_points
from tests.mount.compute import (
    IN_DELETE_SELF,
    SECRET,
    WAIT,
    DevnetMount,
    Gate,
    Inotify,
    compute_pod,
    devnet_mounted,
    gated_pod,
    record,
    run_folders,
    run_processes,
    run_to_end,
    text,
    wait_gone,
)
from tests.mount.harness import Mount, Server, mounted, run, sh
from tests.patience import until


@pytest.fixture(scope="module")
def devnet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevnetMount]:
    """One mount for the tests that take a pod of their own."""
    with devnet_mounted(tmp_path_factory.mktemp("runs")) as mount:
        yield mount


@pytest.fixture
def gated(devnet: DevnetMount, gate: Gate, request: pytest.FixtureRequest) -> Iterator[Path]:
    with gated_pod(devnet, request.node.name, gate) as pod:
        yield pod


# -- a run from touch to end ----------------------------------------------------------------------


def test_a_run_leaves_logs_record_and_results(devnet: DevnetMount) -> None:
    command = "python3 script/report.py 'two words' \"$HOME\" '*' ';' a\\ b"
    pod = compute_pod(devnet, "report", command, "report.py", "sibling.py")
    folder = run_to_end(pod)
    assert (folder / "stdout.log").read_text() == "to stdout\n"
    assert (folder / "stderr.log").read_text() == "to stderr\n"
    ended = record(folder)
    assert (ended["state"], ended["exit_code"], ended["signal"]) == ("finished", 0, None)
    assert ended["host"] == socket.gethostname()
    assert ended["id"] == folder.name
    assert ended["recipe"] == json.loads((pod / "a.recipe").read_text())
    times = [datetime.fromisoformat(ended[key]) for key in ("created", "started", "ended")]
    assert times == sorted(times)
    report = json.loads((pod / "output/report.json").read_text())
    assert report["argv"] == ["two words", "$HOME", "*", ";", "a b"]
    assert report["cwd"] == str(pod)
    assert report["sibling"] == 42
    assert (report["stdin"], report["group"]) == ("", True)


def test_the_environment_is_clean(devnet: DevnetMount) -> None:
    pod = compute_pod(devnet, "env", "python3 script/report.py", "report.py", "sibling.py")
    folder = run_to_end(pod)
    report = json.loads((pod / "output/report.json").read_text())
    environ = report["environ"]
    assert SECRET not in json.dumps(report)
    assert len(environ["YAGNA_APPKEY"]) > 20
    assert environ["YAGNA_API_URL"].startswith("http://127.0.0.1:")
    assert environ["CPODFS_RUN_ID"] == folder.name
    assert environ["CPODFS_PAYLOAD"] == str(pod / "payload")
    assert environ["CPODFS_RUN_LOG"] == str(folder)
    # A virtual environment is known by the place of its python3.
    assert Path(report["executable"]).parent == Path(sys.executable).parent
    assert environ["PYTHONDONTWRITEBYTECODE"] == "1"
    assert run("find", pod, "-name", "__pycache__") == ""
    shown = (folder / "run.json").read_text() + devnet.logged()
    assert environ["YAGNA_APPKEY"] not in shown
    assert SECRET not in shown


def test_a_yagna_of_ones_own(tmp_path: Path, server: Server) -> None:
    mount = Mount(tmp_path, server)
    mount.env |= {
        "YAGNA_APPKEY": "their-key",
        "YAGNA_API_URL": "http://127.0.0.1:1/",
        "TOKEN": SECRET,
    }
    try:
        mount.start()
        folder = run_to_end(compute_pod(mount, "yagna", "env"))
        lines = (folder / "stdout.log").read_text().splitlines()
        assert not any(SECRET in line or "their-key" in line for line in lines)
        ask = "import os, urllib.request as u; u.urlopen(os.environ['YAGNA_API_URL'] + '/me')"
        folder = run_to_end(compute_pod(mount, "refused", ["python3", "-c", ask]))
        assert "HTTP Error 401" in text(folder / "stderr.log")
        bearer = "{'Authorization': 'Bearer ' + os.environ['YAGNA_APPKEY']}"
        ask = ask.replace("'/me'", f"'/me', headers={bearer}").replace(
            "u.urlopen(", "u.urlopen(u.Request("
        )
        folder = run_to_end(compute_pod(mount, "gone", ["python3", "-c", ask + ")"]))
        assert "HTTP Error 504" in text(folder / "stderr.log")
        assert mount.stop() == 0
    finally:
        if mount.process is not None:
            mount.kill()


def test_a_pod_that_is_not_here_yet(mount: Mount) -> None:
    """After the loss of the cache the recipe and the script come from the server."""
    command = [sys.executable, "script/stamps.py", "output/stamps", "1", "0"]
    compute_pod(mount, "far", command, "stamps.py")
    mount.remount(wipe=True)
    folder = run_to_end(mount.point / "far")
    assert record(folder)["state"] == "finished"
    assert (mount.point / "far/output/stamps").exists()


def test_ids_sort_by_time_and_every_run_keeps_its_logs(devnet: DevnetMount) -> None:
    pod = compute_pod(devnet, "ids", "sh -c 'echo run >> output/all; wc -l < output/all'")
    folders = [run_to_end(pod) for _ in range(3)]
    assert folders == run_folders(pod)
    assert [(f / "stdout.log").read_text().strip() for f in folders] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("sh -c 'exit 42'", {"state": "failed", "exit_code": 42, "signal": None}),
        ("sh -c 'kill -SEGV $$'", {"state": "failed", "exit_code": None, "signal": "SIGSEGV"}),
        ("no-such-program", {"state": "failed", "exit_code": None, "signal": None}),
    ],
)
def test_failures_are_recorded(devnet: DevnetMount, command: str, expected: dict) -> None:
    folder = run_to_end(compute_pod(devnet, "failures", command))
    ended = record(folder)
    assert {key: ended[key] for key in expected} == expected
    if command == "no-such-program":
        assert "golem.exec: 'no-such-program'" in ended["error"]
        assert "no-such-program" in (folder / "stderr.log").read_text()


def test_a_program_in_the_pod_is_started_by_its_path(devnet: DevnetMount) -> None:
    pod = compute_pod(devnet, "program", "./script/tool.sh 'it works'")
    sh("printf '#!/bin/sh\\necho $1' > script/tool.sh; chmod +x script/tool.sh", pod)
    assert (run_to_end(pod) / "stdout.log").read_text() == "it works\n"


def test_much_output_arrives_whole(devnet: DevnetMount) -> None:
    pod = compute_pod(devnet, "much", "sh -c 'seq 500000; seq 1000 >&2'")
    folder = run_to_end(pod)
    lines = "".join(f"{n}\n" for n in range(1, 500001))
    assert (folder / "stdout.log").read_text() == lines
    assert (folder / "stderr.log").read_text().endswith("\n999\n1000\n")


# -- the control file -----------------------------------------------------------------------------


def test_the_control_file_exists_while_the_run_does(gated: Path, gate: Gate) -> None:
    assert ".run" not in run("ls", "-a", gated).split()
    run("touch", gated / ".run")
    assert ".run" in run("ls", "-a", gated).split()
    assert gate.wait() == "waiting"
    state = json.loads(run("cat", gated / ".run"))
    (folder,) = run_folders(gated)
    assert state["id"] == folder.name
    until(lambda: json.loads(run("cat", gated / ".run"))["state"] == "running")
    gate.open()
    sh(WAIT, gated)
    assert ".run" not in run("ls", "-a", gated).split()
    with pytest.raises(FileNotFoundError):
        (gated / ".run").read_text()


def test_a_second_touch_is_busy(gated: Path, gate: Gate) -> None:
    run("touch", gated / ".run")
    gate.wait()
    done = subprocess.run(["touch", ".run"], cwd=gated, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Device or resource busy" in done.stderr
    with pytest.raises(OSError) as caught:
        (gated / ".run").touch()
    assert caught.value.errno == errno.EBUSY
    assert run("sh", "-c", "echo > .run", cwd=gated, check=False) == ""
    gate.open()
    wait_gone(gated)
    assert gate.starts == 1


def test_many_touches_at_once_start_one_run(gated: Path, gate: Gate) -> None:
    touches = [
        subprocess.Popen(["touch", ".run"], cwd=gated, stderr=subprocess.PIPE) for _ in range(8)
    ]
    said = [touch.communicate()[1] for touch in touches]
    assert sorted(touch.returncode for touch in touches) == [0] + [1] * 7
    assert sum(b"Device or resource busy" in words for words in said) == 7
    gate.wait()
    gate.open()
    wait_gone(gated)
    assert gate.starts == 1


def test_python_and_the_shell_can_touch_too(devnet: DevnetMount) -> None:
    pod = compute_pod(devnet, "touches", "true")
    for start in (
        lambda: (pod / ".run").touch(),
        lambda: sh("echo > .run", pod),
        lambda: sh(": > .run", pod),
        lambda: (pod / ".run").write_text("{}"),
    ):
        before = len(run_folders(pod))
        start()
        wait_gone(pod)
        assert len(run_folders(pod)) == before + 1


def test_rm_cancels(gated: Path, gate: Gate) -> None:
    run("touch", gated / ".run")
    gate.wait()
    run("rm", gated / ".run")
    wait_gone(gated)
    (folder,) = run_folders(gated)
    ended = record(folder)
    assert (ended["state"], ended["exit_code"]) == ("cancelled", 7)
    assert (gate.folder / "terminated").read_text() == "SIGINT\n"
    assert (folder / "stdout.log").read_text() == "one\n"
    assert run_processes(folder.name) == []
    assert run("rm", ".run", cwd=gated, check=False) == ""


def test_after_rm_a_script_may_go_on_at_once(devnet: DevnetMount) -> None:
    """On a machine so busy that the end takes longer than rm waits for it, after a while."""
    pod = compute_pod(devnet, "again", "sh -c 'echo up; exec sleep 1000'")
    at_once = []
    for number in range(5):
        run("touch", pod / ".run")
        until(lambda: len(run_folders(pod)) > number)  # noqa: B023
        before = os.stat(pod / ".run").st_ino
        run("rm", pod / ".run")
        at_once.append(not (pod / ".run").exists())
        wait_gone(pod)
    assert any(at_once)
    run("touch", pod / ".run")
    assert os.stat(pod / ".run").st_ino != before
    run("rm", "-r", pod)
    assert not pod.exists()


def test_nothing_else_can_take_the_name(devnet: DevnetMount) -> None:
    pod = compute_pod(devnet, "names", "true")
    for command in ("mv a.recipe .run", "mkdir .run", "ln -s a.recipe .run", "ln a.recipe .run"):
        done = subprocess.run(command.split(), cwd=pod, capture_output=True, text=True)
        assert done.returncode == 1, command
        assert "not permitted" in done.stderr
    assert sorted(os.listdir(pod)) == ["a.recipe", "script"]
    assert run_folders(pod) == []
    for command in ("cp a.recipe .run", "sh -Cc 'echo > .run'"):
        done = subprocess.run(shlex.split(command), cwd=pod, capture_output=True, text=True)
        assert done.returncode != 0, command
    assert run_folders(pod) == []
    # Deeper in the pod it is a name like others.
    sh("mkdir d; touch d/.run; mv d/.run d/x; mkdir d/.run", pod)
    assert run_folders(pod) == []


def test_a_copy_of_a_running_pod_does_not_run(gated: Path, gate: Gate, tmp_path: Path) -> None:
    run("touch", gated / ".run")
    gate.wait()
    copy = gated.with_name("a copy")
    run("cp", "-r", gated, copy, check=False)
    run("tar", "-cf", tmp_path / "all.tar", ".", cwd=gated)
    run("tar", "-xf", tmp_path / "all.tar", cwd=copy, check=False)
    assert (copy / "a.recipe").read_text() == (gated / "a.recipe").read_text()
    assert not (copy / ".run").exists()
    gate.open()
    wait_gone(gated)
    assert gate.starts == 1


def test_odd_names_of_pods(devnet: DevnetMount) -> None:
    for name in ("two words", "quo'te\"s", "ünï-cödé", "-n", "%41"):
        pod = compute_pod(devnet, name, "sh -c 'pwd; printenv CPODFS_POD'")
        folder = run_to_end(pod)
        assert (folder / "stdout.log").read_text() == f"{pod}\n{name}\n"
        assert record(folder)["pod"] == name


def test_the_control_file_is_never_stored(tmp_path: Path, own_server: Server, gate: Gate) -> None:
    with mounted(tmp_path, own_server, None, "--writeback-delay", "0.1") as mount:
        command = [sys.executable, "script/gated.py", str(gate.folder)]
        pod = compute_pod(mount, "stored", command, "gated.py")
        mount.sync()
        sh("touch .run", pod)
        gate.wait()
        mount.sync()
        run("cp", "-r", pod, tmp_path / "copy")
        run("rsync", "-a", f"{pod}/", tmp_path / "rsynced")
        own_server.reset_calls()
        mount.pod("again")
        run("rsync", "-a", "--exclude", ".run", f"{pod}/", mount.point / "again")
        gate.open()
        wait_gone(pod)
        mount.remount(wipe=True)
        for name in ("stored", "again"):
            assert ".run" not in run("find", mount.point / name)
    requests = (own_server.state / "requests.jsonl").read_text()
    assert "gated.py" in requests
    assert ".run" not in requests.replace(".run.json", "")


# -- while it runs --------------------------------------------------------------------------------


def test_tail_and_inotify_see_lines_as_they_are_printed(gated: Path, gate: Gate) -> None:
    run("touch", gated / ".run")
    gate.wait()
    (folder,) = run_folders(gated)
    until(lambda: (folder / "stdout.log").exists())
    tail = subprocess.Popen(
        ["tail", "-n", "+1", "-f", folder / "stdout.log"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert tail.stdout is not None
        assert tail.stdout.readline() == "one\n"
        assert (gated / "output/partial").read_text() == "so far\n"
        assert (gated / ".run").exists()
        watch = Inotify(folder / "stdout.log")
        gate.open()
        assert watch.wait()
        watch.close()
        assert tail.stdout.readline() == "two\n"
    finally:
        tail.kill()
        tail.communicate()


def test_inotify_tells_the_end(gated: Path, gate: Gate) -> None:
    for _ in range(2):
        run("touch", gated / ".run")
        gate.wait()
        watch = Inotify(gated / ".run", IN_DELETE_SELF)
        gate.open()
        assert watch.wait()
        assert not (gated / ".run").exists()
        watch.close()
    assert [record(folder)["state"] for folder in run_folders(gated)] == ["finished"] * 2


def test_pods_run_at_the_same_time(devnet: DevnetMount, tmp_path: Path) -> None:
    gates = [Gate(tmp_path / f"gate{n}") for n in range(3)]
    pods = [
        compute_pod(
            devnet, f"many{n}", ["python3", "script/gated.py", str(gate.folder)], "gated.py"
        )
        for n, gate in enumerate(gates)
    ]
    run("touch", *(pod / ".run" for pod in pods))
    for gate in gates:
        gate.wait()
    assert all((pod / ".run").exists() for pod in pods)
    for gate in gates:
        gate.open()
        gate.close()
    for pod in pods:
        wait_gone(pod)
        assert record(run_folders(pod)[-1])["state"] == "finished"


def test_a_pod_stays_in_its_place_while_it_runs(gated: Path, gate: Gate) -> None:
    run("touch", gated / ".run")
    gate.wait()
    for command in (["mv", "-T", gated, gated.with_name("moved")], ["rmdir", gated]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1
        assert "busy" in done.stderr
    gate.open()
    wait_gone(gated)


def test_logs_that_are_deleted_meanwhile_do_no_harm(gated: Path, gate: Gate) -> None:
    run("touch", gated / ".run")
    gate.wait()
    (folder,) = run_folders(gated)
    until(lambda: text(folder / "stdout.log") and (folder / "run.json").exists())
    run("rm", "-r", gated / "logs", gated / "output")
    (gated / "output").mkdir()
    gate.open()
    wait_gone(gated)
    assert record(folder)["state"] == "finished"
    assert (folder / "stdout.log").read_text() == "one\ntwo\n"


def test_children_that_the_program_leaves_are_ended(devnet: DevnetMount) -> None:
    pod = compute_pod(devnet, "children", "sh -c 'setsid sleep 1000 & sleep 1000 & echo started'")
    folder = run_to_end(pod)
    assert record(folder)["state"] == "finished"
    assert run_processes(folder.name) == []


def test_a_program_that_ignores_signals_is_killed(devnet: DevnetMount) -> None:
    pod = compute_pod(
        devnet, "stubborn", "sh -c 'trap \"\" INT TERM; echo up; while :; do sleep 1; done'"
    )
    run("touch", pod / ".run")
    until(lambda: run_folders(pod) and (run_folders(pod)[-1] / "stdout.log").exists())
    (folder,) = run_folders(pod)
    until(lambda: (folder / "stdout.log").read_text() == "up\n")
    run("rm", pod / ".run")
    # It does not wait for long: the run is still there, and says so.
    assert json.loads((pod / ".run").read_text())["state"] == "running"
    assert os.listdir(pod)[0] == ".run"
    wait_gone(pod)
    ended = record(folder)
    assert (ended["state"], ended["signal"]) == ("cancelled", signal.SIGKILL.name)
    assert run_processes(folder.name) == []


# -- Golem ----------------------------------------------------------------------------------------


def test_an_unmodified_requestor_script(devnet: DevnetMount) -> None:
    pod = compute_pod(devnet, "words", "python3 script/words.py", "words.py")
    (pod / "payload").mkdir()
    for n in range(1, 4):
        (pod / f"payload/{n}.txt").write_text("word " * n)
    folder = run_to_end(pod)
    ended = record(folder)
    assert ended["state"] == "finished", (folder / "stderr.log").read_text()
    counts = {p.name: p.read_text().strip() for p in (pod / "output").iterdir()}
    assert counts == {f"{n}.txt.count": str(n) for n in range(1, 4)}
    providers = {line.split(" by ")[1] for line in (folder / "stdout.log").read_text().splitlines()}
    assert len(providers) == 2


def test_a_cancelled_requestor_ends_its_agreements_and_pays(devnet: DevnetMount) -> None:
    pod = compute_pod(devnet, "long", "python3 script/long.py", "long.py")
    run("touch", pod / ".run")
    until(lambda: run_folders(pod) and (run_folders(pod)[0] / "stdout.log").exists())
    (folder,) = run_folders(pod)
    until(lambda: (folder / "stdout.log").read_text().startswith("on "))
    run("rm", pod / ".run")
    wait_gone(pod)
    assert record(folder)["state"] == "cancelled"
    assert open_points(devnet.devnet / "market") == []
    (row,) = [row for row in ledger_table(devnet.devnet / "market") if float(row.cost) > 0][-1:]
    assert row.paid
