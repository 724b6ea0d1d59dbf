"""``cpodfs run``, ``runs``, ``logs`` and ``cancel``, as scripts and people use them."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.compute import (
    Gate,
    compute_pod,
    gated_pod,
    record,
    run_folders,
    run_processes,
    run_to_end,
    wait_gone,
)
from tests.mount.harness import CPODFS, Child, Mount, Server, mounted, run
from tests.patience import PATIENCE_S, until


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Iterator[Mount]:
    with mounted(tmp_path_factory.mktemp("commands"), server) as mount:
        yield mount


@pytest.fixture
def gated(mount: Mount, gate: Gate, request: pytest.FixtureRequest) -> Iterator[Path]:
    with gated_pod(mount, request.node.name, gate) as pod:
        yield pod


def begin(mount: Mount, *arguments: str | Path) -> Child:
    """A command whose output is read while it runs."""
    return Child(
        [*CPODFS, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=mount.env,
    )


# -- run ------------------------------------------------------------------------------------------


def test_run_does_what_touch_does(mount: Mount, gated: Path, gate: Gate) -> None:
    done = mount.cli("run", str(gated))
    assert gate.wait() == "waiting"
    assert (gated / ".run").exists()
    (folder,) = run_folders(gated)
    assert done.stdout == f"{folder.name}\n"
    busy = mount.cli("run", str(gated), check=False)
    assert busy.returncode == 1
    assert busy.stderr == (
        f"cpodfs: {gated.name}: run {folder.name} is in progress; see it: cpodfs logs -f "
        f"{gated.name}; end it: cpodfs cancel {gated.name}\n"
    )
    gate.open()
    wait_gone(gated)
    assert gate.starts == 1


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("sh -c 'echo out; echo err >&2; exit 0'", 0, ""),
        ("sh -c 'echo out; echo err >&2; exit 42'", 42, "failed"),
        ("sh -c 'echo out; echo err >&2; kill -SEGV $$'", 139, "failed"),
        ("no-such-program", 1, "golem.exec: 'no-such-program': no such program"),
    ],
)
def test_wait_prints_the_output_and_exits_as_the_run_did(
    mount: Mount, command: str, code: int, said: str
) -> None:
    pod = compute_pod(mount, "exits", command)
    done = mount.cli("run", "--wait", str(pod), check=False)
    assert done.returncode == code
    assert done.stdout == ("out\n" if "echo" in command else "")
    assert ("err\n" in done.stderr) == ("echo" in command)
    assert said in done.stderr
    assert (done.stderr == "err\n") == (code == 0)
    assert done.stderr.count(said) == 1 or not said


def test_warnings_are_shown_to_who_runs(mount: Mount) -> None:
    pod = mount.pod("warned")
    golem = {"exec": "echo a && echo b", "ouput": "out"}
    (pod / "a.recipe").write_text(json.dumps({"golem": golem}))
    done = mount.cli("run", "--wait", str(pod))
    assert done.stdout == "a && echo b\n"
    shell, unknown = done.stderr.splitlines()
    assert shell.startswith("cpodfs: warning: a.recipe: golem.exec: no shell runs it, so && is but")
    assert unknown == "cpodfs: warning: a.recipe: golem.ouput: unknown key, kept"
    assert mount.cli("run", str(pod)).stderr == done.stderr
    wait_gone(pod)


def test_what_cannot_be_run_says_why(mount: Mount, tmp_path: Path) -> None:
    plain = mount.pod("plain")
    for command, where in (
        ("run", tmp_path),
        ("logs", mount.point),
        ("cancel", mount.point / "no such pod"),
    ):
        done = mount.cli(command, str(where), check=False)
        assert done.returncode == 1
        assert done.stderr.startswith("cpodfs: ")
    done = mount.cli("run", "--wait", str(plain), check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("cpodfs: plain: not a compute pod: there is no recipe.json")
    assert done.stderr.count("\n") == 1
    assert "it never ran" in mount.cli("logs", str(plain), check=False).stderr
    assert "no run is in progress" in mount.cli("cancel", str(plain), check=False).stderr


def test_settings_for_one_run(mount: Mount) -> None:
    pod = compute_pod(mount, "settings", "sh -c 'echo $CPODFS_SET_FRAMES; echo $CPODFS_SET_A'")
    done = mount.cli("run", "-w", str(pod), "--set", "frames=10", "--set", "a=b=c d")
    assert done.stdout == "10\nb=c d\n"
    assert record(run_folders(pod)[-1])["set"] == {"frames": "10", "a": "b=c d"}
    assert mount.cli("run", "-w", str(pod)).stdout == "\n\n"
    assert mount.cli("run", "-w", str(pod), "--set", "golem.exec=echo other").stdout == "other\n"
    assert record(run_folders(pod)[-1])["recipe"]["golem"]["exec"] == "echo other"
    for bad in ("frames", "=1", "golem.output=x", "golem.runtime.budget=1", "golem.exec='"):
        done = mount.cli("run", str(pod), "--set", bad, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith("cpodfs: ")
    assert len(run_folders(pod)) == 3


@pytest.mark.parametrize("by", ["interrupt", "command"])
def test_a_run_that_is_waited_for_can_be_cancelled(
    mount: Mount, gated: Path, gate: Gate, by: str
) -> None:
    with begin(mount, "run", "--wait", gated) as waiting:
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "one\n"
        gate.wait()
        if by == "interrupt":
            waiting.send_signal(signal.SIGINT)
        else:
            mount.cli("cancel", str(gated))
        out, err = waiting.communicate(timeout=PATIENCE_S)
    assert waiting.returncode == 130, err
    assert out == ""
    assert "cancelled" in err
    assert not (gated / ".run").exists()
    (folder,) = run_folders(gated)
    assert (record(folder)["state"], record(folder)["exit_code"]) == ("cancelled", 7)
    assert run_processes(folder.name) == []


def test_a_terminal_gets_a_line_of_progress(mount: Mount, gated: Path, gate: Gate) -> None:
    terminal, ours = pty.openpty()
    with Child(
        [*CPODFS, "run", "--wait", str(gated)], stderr=ours, stdout=subprocess.PIPE, env=mount.env
    ) as waiting:
        os.close(ours)
        gate.wait()
        shown = b""
        while b": running 0:0" not in shown:
            assert select.select([terminal], [], [], PATIENCE_S)[0]
            shown += os.read(terminal, 4096)
        gate.open()
        assert waiting.wait(PATIENCE_S) == 0
        assert waiting.stdout is not None
        assert waiting.stdout.read() == b"one\ntwo\n"
    assert gated.name.encode() in shown
    os.close(terminal)


def test_the_mount_is_taken_down_meanwhile(tmp_path: Path, server: Server, gate: Gate) -> None:
    with mounted(tmp_path, server) as mount:
        pod = compute_pod(mount, "p", ["python3", "script/gated.py", str(gate.folder)], "gated.py")
        with begin(mount, "run", "--wait", pod) as waiting:
            gate.wait()
            assert mount.stop() == 0
            _, err = waiting.communicate(timeout=PATIENCE_S)
        assert waiting.returncode != 0
        assert "Traceback" not in err


# -- logs -----------------------------------------------------------------------------------------


def test_logs_of_the_newest_run_and_of_others(mount: Mount) -> None:
    pod = compute_pod(mount, "logs", "sh -c 'echo $CPODFS_RUN_ID; echo err >&2'")
    folders = [run_to_end(pod) for _ in range(2)]
    for option, run_id, expected in [
        ((), (), folders[1]),
        (("-f",), (folders[0].name,), folders[0]),
        ((), (folders[0].name[:-5],), folders[0]),
    ]:
        done = mount.cli("logs", *option, str(pod), *run_id)
        assert (done.stdout, done.stderr) == (f"{expected.name}\n", "err\n")
    assert "no such run" in mount.cli("logs", str(pod), "1999", check=False).stderr


def test_logs_are_found_where_the_recipe_puts_them(mount: Mount) -> None:
    pod = mount.pod("log folder")
    (pod / "a.recipe").write_text('{"golem": {"exec": "echo deep", "log": "a/b"}}')
    assert mount.cli("run", "-w", str(pod)).stdout == "deep\n"
    assert mount.cli("logs", str(pod)).stdout == "deep\n"
    assert len(json.loads(mount.cli("runs", "--json", str(pod)).stdout)) == 1


def test_logs_follow_line_by_line_until_the_end(mount: Mount, gate: Gate) -> None:
    wait = f"head -c 3 {gate.folder}/gate > /dev/null"
    script = f"echo one; {wait}; echo two; {wait}; echo three"
    pod = compute_pod(mount, "live", ["sh", "-c", script])
    mount.cli("run", str(pod))
    with begin(mount, "logs", "-f", pod) as following:
        assert following.stdout is not None
        # Each line comes while the program waits to be let on to the next.
        for line in ("one\n", "two\n"):
            assert following.stdout.readline() == line
            assert (pod / ".run").exists()
            gate.open()
        assert following.stdout.read() == "three\n"
        assert following.wait(PATIENCE_S) == 0
    assert not (pod / ".run").exists()


def test_following_may_begin_before_the_first_word(mount: Mount, gated: Path, gate: Gate) -> None:
    mount.cli("run", str(gated))
    with begin(mount, "logs", "-f", gated) as following:
        gate.wait()
        gate.open()
        out, err = following.communicate(timeout=PATIENCE_S)
    assert (following.returncode, out, err) == (0, "one\ntwo\n", "")


@pytest.mark.parametrize("place", ["file", "run", "logs"])
def test_logs_do_not_lead_out_of_the_pod(mount: Mount, tmp_path: Path, place: str) -> None:
    """What a program has put there, sandboxed or not."""
    pod = compute_pod(mount, f"linked {place}", "echo said")
    name = "20991124T000000.000Z-abcd"
    secret = tmp_path / "logs" / name / "stdout.log"
    secret.parent.mkdir(parents=True)
    secret.write_text("secret")
    link = {"file": f"logs/{name}/stdout.log", "run": f"logs/{name}", "logs": "logs"}[place]
    (pod / link).parent.mkdir(parents=True, exist_ok=True)
    (pod / link).symlink_to(tmp_path / link)
    for option in ((), ("-f",)):
        done = mount.cli("logs", *option, str(pod), check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("cpodfs: ")
        assert "link" in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_run_that_turns_its_own_log_into_a_link(mount: Mount, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    command = f'ln -sf {secret} "$CPODFS_RUN_LOG/stdout.log"; exit 3'
    pod = compute_pod(mount, "turns", ["sh", "-c", command])
    done = mount.cli("run", "--wait", str(pod), check=False)
    assert (done.returncode, done.stdout) == (3, "")
    assert "stdout.log: is a link, which is not followed\n" in done.stderr


# -- runs -----------------------------------------------------------------------------------------


def test_runs_are_listed_the_newest_first(mount: Mount) -> None:
    one = compute_pod(mount, "list one", "sh -c 'exit 3'")
    two = compute_pod(mount, "list two", "sleep 0.2")
    ids = [run_to_end(pod).name for pod in (one, two, one)]
    shown = mount.cli("runs", str(one)).stdout
    assert [line.split()[0] for line in shown.splitlines()] == ["pod", "list", "list"]
    assert shown.index(ids[2]) < shown.index(ids[0])
    assert "failed" in shown
    assert ids[1] not in shown
    everything = json.loads(mount.cli("runs", "--json", str(mount.point)).stdout)
    mine = [r for r in everything if r["pod"].startswith("list ")]
    assert [r["id"] for r in mine] == ids[::-1]
    assert [r["exit_code"] for r in mine] == [3, 0, 3]
    assert mine[1]["started"] < mine[1]["ended"]
    assert len(json.loads(mount.cli("runs", "--json", "--last", "1", str(one)).stdout)) == 1


def test_runs_of_the_pod_that_a_fork_was_made_from_are_not_its_own(mount: Mount) -> None:
    pod = compute_pod(mount, "origin", "true")
    first = run_to_end(pod).name
    mount.cli("fork", str(pod), "forked")
    fork = mount.point / "forked"
    assert [folder.name for folder in run_folders(fork)] == [first]
    assert mount.cli("runs", "--json", str(fork)).stdout == "[]\n"
    mount.cli("run", "--wait", str(fork))
    second = run_folders(fork)[-1].name
    shown = json.loads(mount.cli("runs", "--json", str(fork)).stdout)
    assert [(each["id"], each["pod"]) for each in shown] == [(second, "forked")]


def test_a_run_in_progress_is_listed(mount: Mount, gated: Path, gate: Gate) -> None:
    mount.cli("run", str(gated))
    gate.wait()
    (folder,) = run_folders(gated)
    until((folder / "run.json").exists)
    until(lambda: record(folder)["state"] == "running")
    assert "running" in mount.cli("runs", str(gated)).stdout
    gate.open()


def test_broken_records_do_no_harm(mount: Mount) -> None:
    pod = compute_pod(mount, "records", "true")
    good = run_to_end(pod).name
    for number, text in enumerate(["", "{", "[]", '{"created": 1, "started": [], "state": {}}']):
        folder = pod / f"logs/20200101T00000{number}.000Z-0000"
        folder.mkdir()
        (folder / "run.json").write_text(text)
    shown = mount.cli("runs", str(pod)).stdout
    assert good in shown


RECORD = {
    "id": "x",
    "state": "finished",
    "created": "2026-01-01T00:00:00Z",
    "started": "2026-01-01T00:00:00Z",
    "ended": "2026-01-01T00:00:01Z",
    "exit_code": 0,
}


def nested(levels: int) -> str:
    return '{"created": "1", "x": ' + "[" * levels + "]" * levels + "}"


@pytest.mark.parametrize(
    "text",
    [
        *(
            json.dumps(RECORD | change)
            for change in (
                {"started": "2026-01-01T00:00:00"},
                {"ended": "2026-01-01T00:00:01"},
                {"started": "0001-01-01T00:00:00+14:00"},
                {"started": "9999-12-31T23:59:59-12:00"},
                {"ended": "9999-12-31T23:59:59Z"},
                {"created": {"a": [1]}, "state": {"b": None}, "exit_code": {}, "signal": [1]},
                {"exit_code": 10**4000},
                {"exit_code": None, "error": "\x1b[31m\x9b2J\r\n\x7f\u202e\ud800 end\n" * 1000},
                {"\x1b[2J\x7f": "\x7f"},
            )
        ),
        json.dumps(RECORD).replace("0}", "NaN}"),
        json.dumps(RECORD).replace("0}", "1e999}"),
        json.dumps(RECORD).replace("0}", "1" * 5000 + "}"),
        *map(nested, (100, 330, 900, 100_000)),
    ],
)
def test_nothing_in_a_record_breaks_the_listing(mount: Mount, text: str) -> None:
    pod = compute_pod(mount, "hostile", "true")
    if not run_folders(pod):
        run_to_end(pod)
    good, hostile = run_folders(pod)[-1], pod / "logs/20200101T000000.000Z-0000"
    hostile.mkdir(exist_ok=True)
    (hostile / "run.json").write_text(text)
    for option in ((), ("--json",)):
        done = mount.cli("runs", *option, str(pod))
        assert good.name in done.stdout
        assert done.stderr == ""
        assert all(c == "\n" or c.isprintable() for c in done.stdout)
    # Two runs at most, whatever one of them says, and a heading.
    assert len(mount.cli("runs", str(pod)).stdout.splitlines()) <= 3
    json.loads(done.stdout, parse_constant=pytest.fail)


def test_a_record_that_is_a_link_is_none(mount: Mount, tmp_path: Path) -> None:
    pod = compute_pod(mount, "linked record", "true")
    folder = pod / "logs/20200101T000000.000Z-0000"
    folder.mkdir(parents=True)
    (tmp_path / "run.json").write_text(json.dumps(RECORD))
    (folder / "run.json").symlink_to(tmp_path / "run.json")
    assert json.loads(mount.cli("runs", "--json", str(pod)).stdout) == []


def test_the_run_that_has_just_ended_keeps_its_logs(tmp_path: Path, server: Server) -> None:
    """Whatever dates others have: of a clock that was wrong, or of a program's invention."""
    with mounted(tmp_path, server, None, "--keep-runs", "3") as mount:
        pod = compute_pod(mount, "future", "echo said")
        for number in range(3):
            (pod / f"logs/2099010{number}T000000.000Z-abcd").mkdir(parents=True)
        for number in range(4):
            assert mount.cli("run", "--wait", str(pod)).stdout == "said\n"
            wait_gone(pod)
            dated = [folder.name[:4] for folder in run_folders(pod)]
            assert len(dated) == 3
            assert dated.count("2099") == max(0, 2 - number)


def test_the_last_runs_are_kept(tmp_path: Path, server: Server) -> None:
    with mounted(tmp_path, server, None, "--keep-runs", "3") as mount:
        pod = compute_pod(mount, "kept", "true")
        folders = [run_to_end(pod) for _ in range(2)]
        (pod / "logs/notes").write_text("mine")
        for _ in range(3):
            run("touch", pod / ".run")
            wait_gone(pod)
        kept = [f for f in run_folders(pod) if f.name != "notes"]
        assert len(kept) == 3
        assert not set(folders) & set(kept)
        assert all(record(folder)["state"] == "finished" for folder in kept)
        mount.remount(wipe=True)
        assert sorted(os.listdir(pod / "logs")) == [*(f.name for f in kept), "notes"]
