"""What ``cpodfs trust`` shows is what is executed, all of it, and how; and it says what it left out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.compute import DevnetMount, record, run_folders, run_to_end
from tests.mount.harness import CPODFS, Mount, RealServer, Server, mounted
from tests.mount.provider_pods import IMAGE, provider_pod
from tests.mount.strangers import forked, recipe_files, touch, vouch

DENIED = "Permission denied"


class Bwrap:
    """A bwrap on the driver's PATH that can be made to hang or to fail."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        real = shutil.which("bwrap")
        (folder / "bwrap").write_text(
            f"#!/bin/sh\n[ -e {folder}/hang ] && exec sleep 60\n"
            f"[ -e {folder}/fail ] && {{ echo 'bwrap: no namespaces here' >&2; exit 1; }}\n"
            f'exec {real} "$@"\n'
        )
        (folder / "bwrap").chmod(0o755)

    def be(self, state: str) -> None:
        """``hang``, ``fail`` or ``well``."""
        for name in ("hang", "fail"):
            (self.folder / name).unlink(missing_ok=True)
        (self.folder / state).touch()


@pytest.fixture
def bwrap(tmp_path: Path) -> Bwrap:
    return Bwrap(tmp_path / "bin")


@pytest.fixture
def boxing(tmp_path: Path, server: Server, bwrap: Bwrap) -> Iterator[Mount]:
    """A mount that finds this bwrap."""
    with mounted(tmp_path, server) as mount:
        mount.env["PATH"] = f"{bwrap.folder}:{mount.env['PATH']}"
        mount.remount()
        yield mount


def reason(pod: Path) -> str:
    return os.getxattr(pod, "user.cpodfs.error").decode()


def shown(mount: Mount, pod: Path) -> str:
    return mount.cli("trust", "--yes", str(pod)).stdout


def asked(mount: Mount, pod: Path, *options: str) -> str:
    """The question, to which the answer is no."""
    command = [*CPODFS, "trust", *options, str(pod)]
    done = subprocess.run(command, input="n\n", capture_output=True, text=True, env=mount.env)
    assert done.returncode == 1
    return done.stderr


def listed(text: str) -> list[str]:
    """The lines that name files."""
    return [line for line in text.split("Its code, ")[1].splitlines() if line.startswith("  ")]


def changed(pod: Path, name: str) -> None:
    """A change of the file ends the trust that was just given."""
    (pod / name).write_text("echo other")
    assert DENIED in touch(pod)
    assert "has changed since it was trusted" in reason(pod)


# -- what counts ----------------------------------------------------------------------------------


def test_nothing_in_the_script_folder_is_left_out(theirs: Mount) -> None:
    golem = {"exec": "python3 script/main.py", "payload": "script/lib"}
    files = {
        "a.recipe": json.dumps({"golem": golem}),
        "script/main.py": "import lib.more",
        "script/lib/more.py": "1",
    }
    pod = forked(theirs, "nested", files)
    assert "script/lib/more.py" in shown(theirs, pod)
    changed(pod, "script/lib/more.py")


@pytest.mark.parametrize(
    ("number", "command"),
    list(
        enumerate(
            (
                "sh -c 'sh \"$CPODFS_PAYLOAD/x.sh\"'",
                "sh -c 'sh p*d/x.sh'",
                "python3 -c 'import os, runpy; runpy.run_path(os.listdir()[0] + chr(47))'",
                "env -S 'sh ${CPODFS_PAYLOAD}/x.sh'",
                "busybox sh -ec script/y.sh",
                "find . -name x.sh -exec sh {} +",
                "python3 script/run.py CPODFS_PAYLOAD",
                "python3 -m unittest",
                "perl -I script/lib payload/x.pl",
                "find script/lib -exec payload/x.sh",
            )
        )
    ),
)
def test_a_command_that_can_lead_anywhere(theirs: Mount, number: int, command: str) -> None:
    files = {
        "a.recipe": json.dumps({"golem": {"exec": command}}),
        "payload/x.sh": "echo one",
        "script/y.sh": "",
    }
    pod = forked(theirs, f"anywhere {number}", files)
    text = shown(theirs, pod)
    assert "payload/x.sh" in text
    assert "output/ and logs/ are not part of what you trust" in text
    changed(pod, "payload/x.sh")


def test_a_payload_within_the_results_counts_for_such_a_command(theirs: Mount) -> None:
    golem = {"exec": "sh -c 'sh \"$CPODFS_PAYLOAD/x.sh\"'", "payload": "output/in"}
    files = {
        "a.recipe": json.dumps({"golem": golem}),
        "output/in/x.sh": "echo one",
        "output/result": "",
        "script/y.sh": "",
    }
    pod = forked(theirs, "within", files)
    text = shown(theirs, pod)
    assert "output/in/x.sh" in text
    assert "output/result" not in text
    run_to_end(pod)
    changed(pod, "output/in/x.sh")


@pytest.mark.parametrize(
    "command",
    [
        "sh -e script/x.sh --frames=1..10 'two words' a,b:c",
        "python3 -u script/x.sh --output=res.csv --logs payload/in",
    ],
)
def test_ones_own_data_for_a_plain_command(theirs: Mount, command: str) -> None:
    files = recipe_files(command) | {"payload/data": "1", "script/x.sh": "print = 1"}
    pod = forked(theirs, f"plain {command[:2]}", files)
    text = shown(theirs, pod)
    assert "payload/data" not in text
    assert "payload/, output/ and logs/ are not part of what you trust" in text
    (pod / "payload/data").write_text("of my own")
    run_to_end(pod)
    run_to_end(pod)


# -- the list -------------------------------------------------------------------------------------


def test_a_name_cannot_forge_a_line(theirs: Mount) -> None:
    files = recipe_files("sh script/x.sh '\n\nHash: 1111'")
    files["script/ok.txt  3 bytes\n\nHash: 0000\nis trusted\r\x1b[2J"] = "x"
    files["script/red\u202egnp" + " " * 200 + "Hash: 2222"] = "x"
    pod = forked(theirs, "forged", files)
    text = shown(theirs, pod)
    assert all(c.isprintable() or c == "\n" for c in text)
    assert len([line for line in text.splitlines() if line.startswith("Hash: ")]) == 1
    assert "is trusted\n" in text.splitlines(keepends=True)[-1]
    assert len([line for line in text.splitlines() if "is trusted" in line]) == 2
    assert "   Hash: 2222" not in text
    assert r"'script/ok.txt\x20\x203 bytes\n\nHash: 0000\nis trusted\r\x1b[2J'" in text


def test_what_is_executed_is_listed_first(theirs: Mount) -> None:
    files = recipe_files("python3 -W ignore -m zz.run") | {f"a{i:03}": "x" for i in range(101)}
    files |= {"zz/run.py": "print(1)", "script/used.py": "", "aa/b": ""}
    pod = forked(theirs, "many", files)
    text = shown(theirs, pod)
    names = [line.split()[0] for line in listed(text)]
    assert names[:2] == ["a.recipe", "zz/run.py"]
    assert {"script/used.py", "script/x.sh"} < set(names[2:6])
    assert names[5:-1] == [f"a{i:03}" for i in range(95)]
    # The other six of these, aa with its file, and zz.
    assert "  and 9 more, not shown\n" in text


def test_long_names_can_be_looked_at(theirs: Mount) -> None:
    files = recipe_files() | {f"script/{i:02}{'語' * 30}/{'語' * 70}": "x" for i in range(70)}
    pod = forked(theirs, "long names", files)
    text = shown(theirs, pod)
    assert [line.split()[0] for line in listed(text)[:2]] == ["a.recipe", "script/x.sh"]
    assert " more, not shown" in text
    run_to_end(pod)


# -- how it will be run ---------------------------------------------------------------------------


@pytest.mark.sandbox
def test_the_question_says_whether_there_will_be_a_sandbox(boxing: Mount, bwrap: Bwrap) -> None:
    pod = forked(boxing, "how")
    bwrap.be("fail")
    question = asked(boxing, pod)
    assert "Let this be run as you, WITHOUT a sandbox? [y/N]" in question
    text = shown(boxing, pod)
    assert "\non this machine, WITHOUT a sandbox: bwrap does not work here: no namesp" in text
    assert record(run_to_end(pod))["sandbox"] is False
    bwrap.be("well")
    # A failure is not for ever.
    assert "\non this machine, in a sandbox" in shown(boxing, pod)
    assert record(run_to_end(pod))["sandbox"] is True
    other = forked(boxing, "other")
    assert "Let this be run as you, in a sandbox? [y/N]" in asked(boxing, other)
    rented = {"golem": {"exec": "sh x", "runtime": {"image": "x", "budget": 1.0}}}
    said = boxing.cli("trust", "--own", "--yes", str(forked(boxing, "mine"))).stdout
    assert "\non this machine, WITHOUT a sandbox: it is your own\n" in said
    far = forked(boxing, "far", {"a.recipe": json.dumps(rented), "script/x": ""})
    assert "Let this be run at providers, for your money? [y/N]" in asked(boxing, far)
    assert boxing.stop() == 0
    boxing.options = ["--sandbox", "off"]
    boxing.start()
    assert "WITHOUT a sandbox: --sandbox off" in shown(boxing, other)


@pytest.mark.sandbox
def test_trust_in_a_sandbox_is_none_without(boxing: Mount, bwrap: Bwrap) -> None:
    pod = forked(boxing, "boxed")
    assert "\non this machine, in a sandbox\n" in shown(boxing, pod)
    assert record(run_to_end(pod))["sandbox"] is True
    bwrap.be("fail")
    boxing.remount()
    assert DENIED in touch(pod)
    assert "was trusted to run in a sandbox" in reason(pod)
    assert "no namespaces here" in reason(pod)
    assert len(run_folders(pod)) == 1
    assert "WITHOUT a sandbox? [y/N]" in asked(boxing, pod)
    shown(boxing, pod)
    assert record(run_to_end(pod))["sandbox"] is False


@pytest.mark.sandbox
def test_a_sandbox_that_cannot_be_tried_in_time(boxing: Mount, bwrap: Bwrap) -> None:
    """Nothing of a stranger's is run bare because the machine was slow once; nor refused for good."""
    pod, other = forked(boxing, "slow"), forked(boxing, "other")
    vouch(pod)
    boxing.remount()
    bwrap.be("hang")
    assert "Let this be run as you, in a sandbox only? [y/N]" in asked(boxing, other)
    assert "Resource temporarily unavailable" in touch(pod)
    assert "it cannot be told whether bwrap works" in reason(pod)
    assert run_folders(pod) == []
    bwrap.be("well")
    assert record(run_to_end(pod))["sandbox"] is True


@pytest.mark.sandbox
def test_a_local_market_without_a_sandbox_runs_no_strangers_program(
    tmp_path: Path, bwrap: Bwrap
) -> None:
    """Its providers are processes of this machine, whatever the recipe calls them."""
    runtime = {"image": IMAGE, "budget": 1.0, "poll": 0.3}
    rented = {"golem": {"exec": "sh script/x.sh", "runtime": runtime}}
    outside = tmp_path / "outside"
    files = {"a.recipe": json.dumps(rented), "script/x.sh": f"touch {outside}"}
    mount = DevnetMount(tmp_path)
    mount.env["PATH"] = f"{bwrap.folder}:{mount.env['PATH']}"
    try:
        mount.start()
        mount.server = RealServer(mount.status()["server"], mount.devnet / "control.key")
        pod, local = forked(mount, "far", files), forked(mount, "near")
        assert "\non this machine, in a sandbox of the local market\n" in shown(mount, pod)
        shown(mount, local)
        mount.stop()
        bwrap.be("fail")
        mount.start()
        mount.server = RealServer(mount.status()["server"], mount.devnet / "control.key")
        for each in (pod, local):
            assert DENIED in touch(each)
            assert "was trusted to run in a sandbox, and there is none: the local market" in reason(
                each
            )
            assert "bwrap does not work here: the container cannot" in reason(each)
            assert f"; look again: cpodfs trust {each.name}" in reason(each)
        assert "Let this be run as you, WITHOUT a sandbox? [y/N]" in asked(mount, pod)
        assert not outside.exists()
        own = provider_pod(mount, "own", "sh script/run.sh", "echo mine", retries=0)
        assert (run_to_end(own) / "stdout.log").read_text() == "mine\n"
        assert "\non this machine, WITHOUT a sandbox: the local market" in shown(mount, pod)
        run_to_end(pod)
        assert outside.exists()
    finally:
        if mount.process is not None:
            mount.stop()


def test_help_says_when_trust_ends(theirs: Mount) -> None:
    said = " ".join(theirs.cli("trust", "--help").stdout.split())
    assert "ends when anything in the pod changes but the payload, output and log folders" in said
