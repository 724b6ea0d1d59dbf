"""Running a pod runs its author's code: whose pods run, whose do not, and what a run may touch."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from cpodfs.dfs import Client, Session
from cpodfs.runs import keyring
from tests.mount.compute import (
    SECRET,
    compute_pod,
    devnet_mounted,
    record,
    run_folders,
    run_processes,
    run_to_end,
    until,
    wait_gone,
)
from tests.mount.harness import CPODFS, Mount, RealServer, Server, mounted, run, sh
from tests.mount.strangers import REPORT, forked, recipe_files, strangers_pod, touch, vouch

DENIED = "Permission denied"
SCRIPTS = REPORT.parent


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Iterator[Mount]:
    """One mount for the tests that take a pod of their own each."""
    with mounted(tmp_path_factory.mktemp("trust"), server) as mount:
        yield mount


def reason(pod: Path) -> str:
    return os.getxattr(pod, "user.cpodfs.error").decode()


def answer(mount: Mount, pod: Path, text: str) -> subprocess.CompletedProcess[str]:
    """``cpodfs trust POD`` by somebody who types ``text``."""
    command = [*CPODFS, "trust", str(pod)]
    return subprocess.run(
        command, input=text, capture_output=True, text=True, env=mount.env, timeout=60
    )


# -- whose pods run -------------------------------------------------------------------------------


def test_a_forked_pod_runs_only_once_it_was_looked_at(theirs: Mount) -> None:
    pod = forked(theirs, "forked")
    assert DENIED in touch(pod)
    assert "its code is a stranger's" in reason(pod)
    assert "cpodfs trust forked" in reason(pod)
    assert f"run refused pod='forked': {reason(pod)}" in theirs.logged()
    assert not (pod / "logs").exists()
    for typed in ("", "n\n"):
        refused = answer(theirs, pod, typed)
        assert refused.returncode == 1
        assert DENIED in touch(pod)
    shown = answer(theirs, pod, "y\n")
    assert shown.returncode == 0
    assert (pod / "a.recipe").read_text() in shown.stdout
    assert "It runs: sh script/x.sh\n" in shown.stdout
    assert "  script/x.sh  8 bytes\n" in shown.stdout
    assert (run_to_end(pod) / "stdout.log").read_text() == "ran\n"
    with pytest.raises(OSError):
        reason(pod)
    assert "It is trusted already." in theirs.cli("trust", str(pod)).stdout


def test_trust_ends_when_the_code_changes(theirs: Mount) -> None:
    pod = forked(theirs, "changed")
    vouch(pod)
    for change in (
        "echo 'echo more' >> script/x.sh",
        "chmod +x script/x.sh",
        "touch script/new",
        "mkdir script/folder",
        "mv script/x.sh script/y.sh",
        "mv script/y.sh script/x.sh",
        "touch beside.py",
        "mkdir tools; touch tools/new",
        "printf ' ' >> a.recipe",
        "cp a.recipe recipe.json",
    ):
        sh(change, pod)
        assert DENIED in touch(pod), change
        assert "has changed since it was trusted" in reason(pod)
        vouch(pod)
    run_to_end(pod)


def test_trust_outlasts_changes_of_other_things(theirs: Mount) -> None:
    pod = forked(theirs, "unchanged")
    vouch(pod)
    run_to_end(pod)
    for change in (
        "mkdir payload; touch payload/x output/x",
        "chmod 600 script/x.sh; touch script/x.sh",
        "cp script/x.sh y; mv y script/x.sh",
    ):
        sh(change, pod)
        run_to_end(pod)


def test_a_change_is_pointed_out(theirs: Mount) -> None:
    pod = forked(theirs, "pointed out")
    vouch(pod)
    (pod / "script/x.sh").write_text("echo ran and more")
    assert "It has CHANGED" in answer(theirs, pod, "n\n").stdout
    assert DENIED in touch(pod)


@pytest.mark.parametrize(
    ("number", "command"),
    [
        *enumerate(("python3 -m payload.main", "python3 -W ignore payload/main.py")),
        *enumerate(("python3 payload", "sh -c 'cd payload; python3 main.py'"), 2),
        *enumerate(("env A=1 python3 ./payload//main.py", "python3 tools/main.py"), 4),
    ],
)
def test_a_program_outside_of_the_script_folder_counts_too(
    theirs: Mount, number: int, command: str
) -> None:
    folder = "tools" if "tools" in command else "payload"
    names = [f"{folder}/main.py", f"{folder}/__main__.py"]
    pod = forked(theirs, f"elsewhere {number}", recipe_files(command) | dict.fromkeys(names, "1"))
    shown = theirs.cli("trust", "--yes", str(pod)).stdout
    for name in names:
        assert name in shown
        (pod / name).write_text("2")
        assert DENIED in touch(pod)
        assert "has changed since it was trusted" in reason(pod)
        vouch(pod)
    run_to_end(pod)


def test_what_stands_beside_the_program_can_take_the_place_of_a_module(theirs: Mount) -> None:
    files = recipe_files("python3 -m script.main") | {"script/main.py": "import json"}
    pod = forked(theirs, "beside", files)
    vouch(pod)
    (pod / "json.py").write_text("print('evil')")
    assert DENIED in touch(pod)


def test_nobody_can_vouch_for_what_is_behind_a_link(theirs: Mount) -> None:
    pod = forked(theirs, "linked", recipe_files() | {"payload/x.sh": "echo evil"})
    vouch(pod)
    sh("mv script own; ln -s payload script", pod)
    for change in ("true", "rm script; mv own script; ln -sf ../payload/x.sh script/x.sh"):
        sh(change, pod)
        assert DENIED in touch(pod)
        assert "is a link" in reason(pod)
        refused = theirs.cli("trust", "--yes", str(pod), check=False)
        assert (refused.returncode, "is a link" in refused.stderr) == (1, True)


def test_a_script_folder_in_the_payload_is_code(theirs: Mount) -> None:
    golem = {"exec": "sh payload/code/x.sh", "payload": "payload", "script": "payload/code"}
    for number, command in enumerate((golem["exec"], "sh -c 'sh $CPODFS_SCRIPT/x.sh'")):
        files = {
            "a.recipe": json.dumps({"golem": golem | {"exec": command}}),
            "payload/data": "1",
            "payload/code/x.sh": "1",
        }
        pod = forked(theirs, f"inside {number}", files)
        vouch(pod)
        (pod / "payload/code/x.sh").write_text("2")
        assert DENIED in touch(pod)


def test_a_run_cannot_vouch_for_what_it_makes_of_itself(theirs: Mount) -> None:
    pod = forked(theirs, "self", recipe_files(script="echo echo evil > script/x.sh"))
    vouch(pod)
    run_to_end(pod)
    assert DENIED in touch(pod)


def test_trust_can_be_taken_back_or_given_for_good(theirs: Mount) -> None:
    pod = forked(theirs, "for good")
    assert "was not trusted" in theirs.cli("trust", "--revoke", str(pod)).stdout
    theirs.cli("trust", "--own", "--yes", str(pod))
    (pod / "script/x.sh").write_text("echo mine")
    assert (run_to_end(pod) / "stdout.log").read_text() == "mine\n"
    assert "is not trusted any more" in theirs.cli("trust", "--revoke", str(pod)).stdout
    assert DENIED in touch(pod)
    own = compute_pod(theirs, "own-revoked", "true")
    run_to_end(own)
    theirs.cli("trust", "--revoke", str(own))
    assert DENIED in touch(own)


def test_a_fork_of_ones_own_pod_is_ones_own(theirs: Mount) -> None:
    compute_pod(theirs, "source", "echo mine")
    theirs.cli("fork", str(theirs.point / "source"), "twin")
    assert (run_to_end(theirs.point / "twin") / "stdout.log").read_text() == "mine\n"
    foreign = forked(theirs, "foreign")
    vouch(foreign)
    done = theirs.cli("fork", str(foreign), "foreign twin")
    assert f"cpodfs trust '{theirs.point}/foreign twin'" in done.stderr
    assert DENIED in touch(theirs.point / "foreign twin")
    taken = theirs.cli("fork", str(foreign), "twin", check=False)
    assert (taken.returncode, taken.stderr) == (1, "cpodfs: twin: there is a pod of that name\n")


def test_a_received_pod_is_read_only_and_says_what_to_do(theirs: Mount) -> None:
    reference = strangers_pod(theirs.server)
    command = [*CPODFS, "receive", "-", "--mount", str(theirs.point)]
    run_it = {"capture_output": True, "text": True, "env": theirs.env, "check": True}
    said = subprocess.run(command, input=reference, **run_it).stdout
    pod = Path(said.removesuffix(": received, read-only\n"))
    assert "Read-only file system" in touch(pod)
    assert "cpodfs fork" in reason(pod)
    refused = theirs.cli("trust", "--yes", str(pod), check=False)
    assert refused.returncode == 1
    theirs.cli("fork", str(pod), "of received")
    assert DENIED in touch(theirs.point / "of received")
    theirs.cli("trust", "--yes", str(theirs.point / "of received"))
    run_to_end(theirs.point / "of received")


def test_what_one_shares_another_can_fork(theirs: Mount, tmp_path: Path, server: Server) -> None:
    compute_pod(theirs, "offered", "echo offered")
    reference = theirs.cli("share", str(theirs.point / "offered")).stdout.strip()
    with mounted(tmp_path, server) as other:
        other.cli("receive", reference, "--fork", "taken", "--mount", str(other.point))
        assert DENIED in touch(other.point / "taken")
        other.cli("trust", "--yes", str(other.point / "taken"))
        assert (run_to_end(other.point / "taken") / "stdout.log").read_text() == "offered\n"


def test_references_that_lead_nowhere(theirs: Mount) -> None:
    for option in ([], ["--fork", "nothing"]):
        done = theirs.cli("receive", "abc", "--mount", str(theirs.point), *option, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith("cpodfs: ")
        assert "Traceback" not in done.stderr


# -- what is remembered ---------------------------------------------------------------------------


def test_ones_own_and_trusted_pods_survive_the_cache_but_not_the_record(
    tmp_path: Path, server: Server
) -> None:
    with mounted(tmp_path, server) as mount:
        own, theirs = compute_pod(mount, "own", "true"), forked(mount, "theirs")
        vouch(theirs)
        mount.remount(wipe=True)
        run_to_end(own)
        run_to_end(theirs)
        records = list((tmp_path / "state/cpodfs/trust").iterdir())
        assert [path.stat().st_mode & 0o777 for path in records] == [0o600]
        assert mount.stop() == 0
        shutil.rmtree(tmp_path / "state")
        mount.start()
        for pod in (own, theirs):
            assert DENIED in touch(pod)
        mount.cli("trust", "--own", "--yes", str(own))
        run_to_end(own)


def test_a_name_that_another_pod_took_is_not_ones_own(tmp_path: Path, server: Server) -> None:
    account = server.signup()
    with mounted(tmp_path, server, account, "--attr-ttl", "1") as mount:
        pod = compute_pod(mount, "blender", "true")
        mount.sync()
        reference = strangers_pod(server)

        async def replace() -> None:
            async with Session(server.url, account[0], lambda: account[1]) as session:
                client = Client(session)
                await client.delete_pod("blender")

        async def fork() -> None:
            async with Session(server.url, account[0], lambda: account[1]) as session:
                await Client(session).fork_from_reference("blender", reference)

        trio.run(replace)
        mount.cli("refresh", str(mount.point))
        trio.run(fork)
        mount.cli("refresh", str(mount.point))
        assert (pod / "script/x.sh").read_text() == "echo ran"
        assert DENIED in touch(pod)


def test_a_removed_pod_leaves_no_claim_to_its_name(theirs: Mount) -> None:
    theirs.pod("short-lived")
    run("rmdir", theirs.point / "short-lived")
    theirs.sync()
    pod = forked(theirs, "short-lived")
    assert DENIED in touch(pod)


def test_a_pod_renamed_before_it_was_sent(theirs: Mount) -> None:
    fresh = compute_pod(theirs, "New Folder", "echo renamed")
    with contextlib.suppress(AssertionError):  # EXDEV, if it has been sent by now
        run("mv", "-T", fresh, theirs.point / "renamed")
        fresh = theirs.point / "renamed"
    assert (run_to_end(fresh) / "stdout.log").read_text() == "renamed\n"


def test_too_much_to_vouch_for(theirs: Mount) -> None:
    pod = forked(theirs, "much")
    run("truncate", "-s", "65M", pod / "script/big")
    done = theirs.cli("trust", "--yes", str(pod), check=False)
    assert done.returncode == 1
    assert "too much code to vouch for" in done.stderr
    assert DENIED in touch(pod)
    (pod / "script/big").unlink()


def test_a_recipe_cannot_draw_on_the_terminal(theirs: Mount) -> None:
    evil = "\x1b[2J\x1b[1;1Hnothing to see\x07\u202e"
    pod = forked(
        theirs,
        "evil",
        {
            "a.recipe": f'{{"golem": {{"exec": "sh \'{chr(0x202E)}\'"}}, "x": "{chr(0x7F)}"}}\r',
            "script/x.sh": evil,
        },
    )
    shown = theirs.cli("trust", "--yes", str(pod)).stdout
    assert all(c.isprintable() or c == "\n" for c in shown)


# -- the sandbox ----------------------------------------------------------------------------------


def stranger_with(script: str, *words: str) -> dict[str, str]:
    command = " ".join(["python3", f"script/{script}", *words])
    return recipe_files(command) | {f"script/{script}": (SCRIPTS / script).read_text()}


@pytest.fixture
def session_key() -> Iterator[bool]:
    """A key in the session that a driver started now inherits; False where a container has none."""
    keyring.leave_session()
    add_key = keyring._KEYCTL[os.uname().machine] - 2
    libc, session = ctypes.CDLL(None, use_errno=True), ctypes.c_long(-3)
    added = libc.syscall(add_key, b"user", b"cpodfs-test", b"x", ctypes.c_long(1), session)
    assert added > 0 or ctypes.get_errno() in keyring._HARMLESS
    yield added > 0
    keyring.leave_session()


def test_the_keys_of_the_users_session_are_not_a_strangers(
    session_key: bool, tmp_path: Path, server: Server
) -> None:
    with mounted(tmp_path, server) as mount:
        own = compute_pod(mount, "own", "python3 script/keys.py", "keys.py")
        assert (run_to_end(own) / "stdout.log").read_text() == f"{session_key}\n"
        theirs = forked(mount, "theirs", stranger_with("keys.py"))
        vouch(theirs)
        assert (run_to_end(theirs) / "stdout.log").read_text() == "False\n"


def test_a_stranger_sees_and_changes_nothing_but_his_pod(theirs: Mount, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    pod = forked(theirs, "sandboxed", stranger_with("sandboxed.py", str(secret)))
    vouch(pod)
    folder = run_to_end(pod)
    ended = record(folder)
    assert ended["state"] == "finished", (folder / "stderr.log").read_text()
    assert ended["sandbox"] is True
    report = json.loads((folder / "stdout.log").read_text())
    assert report["others"] == ["sandboxed"]
    assert report["read outside"] == "No such file or directory"
    for what in ("write outside", "write /usr", "write /", "write /etc", "set kernel"):
        assert report[what] != "done"
    assert report["home"] == []
    assert report["tmp"] == "done"
    assert report["trust"] == report["end all"] == "Operation not permitted"
    assert report["upper"] != "done"
    assert report["pids"] <= 3
    assert (pod / "output/mine").read_text() == "written"
    assert SECRET not in json.dumps(report)
    assert not secret.with_name("new").exists()


def test_ones_own_pods_run_without_a_sandbox(theirs: Mount) -> None:
    assert record(run_to_end(compute_pod(theirs, "no sandbox", "true")))["sandbox"] is False


def test_a_sandbox_for_everything_or_for_nothing(tmp_path: Path, server: Server) -> None:
    with mounted(tmp_path, server, None, "--sandbox", "on") as mount:
        own = compute_pod(mount, "own", "sh -c 'ls ..; exit 5'")
        mount.pod("other")
        ended = record(folder := run_to_end(own))
        assert (ended["sandbox"], ended["exit_code"]) == (True, 5)
        assert (folder / "stdout.log").read_text() == "own\n"
        assert mount.stop() == 0
        mount.options = ["--sandbox", "off"]
        mount.start()
        ended = record(folder := run_to_end(own))
        assert ended["sandbox"] is False
        assert (folder / "stdout.log").read_text() == "other\nown\n"
        theirs = forked(mount, "theirs")
        vouch(theirs)
        assert record(run_to_end(theirs))["sandbox"] is False


def test_where_there_is_no_bwrap(tmp_path: Path, server: Server) -> None:
    """Without it strangers' pods run as trusted; with --sandbox on nothing does."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/bwrap").write_text("#!/bin/sh\necho 'bwrap: no namespaces here' >&2; exit 1\n")
    (tmp_path / "bin/bwrap").chmod(0o755)
    mount = Mount(tmp_path, server)
    mount.env["PATH"] = f"{tmp_path}/bin:{mount.env['PATH']}"
    try:
        mount.start()
        pod = forked(mount, "theirs")
        vouch(pod)
        assert record(run_to_end(pod))["sandbox"] is False
        assert "no sandbox pod='theirs': bwrap does not work here: no namespaces" in mount.logged()
        assert mount.stop() == 0
        mount.options = ["--sandbox", "on"]
        mount.start()
        assert DENIED in touch(pod)
        assert "--sandbox on: bwrap does not work here" in reason(pod)
    finally:
        if mount.process is not None:
            mount.stop()


def test_cancelling_in_a_sandbox_is_as_gentle_as_outside(theirs: Mount) -> None:
    script = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *_: (print('asked'), sys.exit(7)))\n"
        "print('up', flush=True)\n"
        "while True: time.sleep(60)\n"
    )
    pod = forked(theirs, "gentle", recipe_files("python3 script/x.py") | {"script/x.py": script})
    vouch(pod)
    with subprocess.Popen(
        [*CPODFS, "run", "--wait", str(pod)], stdout=subprocess.PIPE, text=True, env=theirs.env
    ) as waiting:
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "up\n"
        theirs.cli("cancel", str(pod))
        assert waiting.stdout.read() == "asked\n"
    (folder,) = run_folders(pod)
    ended = record(folder)
    assert (ended["state"], ended["exit_code"]) == ("cancelled", 7)
    assert run_processes(folder.name) == []


def test_a_signal_inside_is_told_as_a_shell_does(theirs: Mount) -> None:
    pod = forked(theirs, "signal", recipe_files("sh -c 'kill -SEGV $$'"))
    vouch(pod)
    ended = record(run_to_end(pod))
    assert (ended["state"], ended["exit_code"], ended["signal"]) == ("failed", 139, None)


def test_what_a_stranger_leaves_behind_is_ended(theirs: Mount) -> None:
    pod = forked(theirs, "leaves", recipe_files("sh -c 'setsid sleep 1000 & sleep 1000 & echo up'"))
    vouch(pod)
    folder = run_to_end(pod)
    assert record(folder)["state"] == "finished"
    assert run_processes(folder.name) == []


def test_a_sandbox_does_not_outlive_the_driver_in_vain(tmp_path: Path, server: Server) -> None:
    """It goes on and its logs are kept, but its pod is lost to it with the mount that it knew."""
    with mounted(tmp_path, server) as mount:
        script = "echo up; while [ -e script/x.sh ]; do sleep 0.05; done; echo blind"
        pod = forked(mount, "blind", recipe_files(script=script))
        vouch(pod)
        run("touch", pod / ".run")
        until(lambda: run_folders(pod) and (run_folders(pod)[0] / "stdout.log").exists())
        (folder,) = run_folders(pod)
        until(lambda: (folder / "stdout.log").read_text() == "up\n")
        mount.kill()
        mount.start()
        wait_gone(pod)
        assert record(folder)["state"] == "finished"
        assert (folder / "stdout.log").read_text() == "up\nblind\n"


def test_golem_from_a_sandbox(tmp_path: Path) -> None:
    """A stranger's requestor finds the market, with a key that nobody else gets to see."""
    with devnet_mounted(tmp_path) as mount:
        mount.server = RealServer(mount.status()["server"])
        pod = forked(mount, "words", stranger_with("words.py"))
        (pod / "payload").mkdir()
        (pod / "payload/1.txt").write_text("two words")
        vouch(pod)
        key = (mount.devnet / "app.key").read_text().strip()
        with subprocess.Popen(
            [*CPODFS, "run", "--wait", str(pod)], env=mount.env, stdout=subprocess.DEVNULL
        ) as waiting:
            seen = set()
            while waiting.poll() is None:
                seen |= _command_lines()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    waiting.wait(0.1)
        assert waiting.returncode == 0
        assert any(b"bwrap" in line for line in seen)
        assert not any(key.encode() in line for line in seen)
        (folder,) = run_folders(pod)
        assert record(folder)["sandbox"] is True
        assert (pod / "output/1.txt.count").read_text().strip() == "2"
        assert key not in (folder / "run.json").read_text() + mount.logged()
        wait_gone(pod)


def _command_lines() -> set[bytes]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.add(path.read_bytes())
    return found
