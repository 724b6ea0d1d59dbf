"""Running a pod runs its author's code: whose pods run, and whose do not."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import trio

from cpodfs.dfs import Client, Session
from tests.mount.compute import (
    compute_pod,
    run_to_end,
)
from tests.mount.harness import CPODFS, Mount, Server, mounted, run, sh
from tests.mount.strangers import REPORT, forked, reason, recipe_files, strangers_pod, touch, vouch
from tests.patience import PATIENCE_S

DENIED = "Permission denied"
SCRIPTS = REPORT.parent


def answer(mount: Mount, pod: Path, text: str) -> subprocess.CompletedProcess[str]:
    """``cpodfs trust POD`` by somebody who types ``text``."""
    command = [*CPODFS, "trust", str(pod)]
    return subprocess.run(
        command, input=text, capture_output=True, text=True, env=mount.env, timeout=PATIENCE_S
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
        records = list((tmp_path / "state/cpodfs/trust").rglob("*.json"))
        assert [path.stat().st_mode & 0o777 for path in records] == [0o600, 0o600]
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
        mount.cli("refresh", "--accept-deletions", str(pod))
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
