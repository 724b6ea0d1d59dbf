"""What reaches a terminal of names and output that are not ours: text, and nothing that acts."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.mount.compute import compute_pod, run_folders
from tests.mount.harness import CPODFS, Mount, Server, mounted
from tests.mount.hostile import Answer, Hostile, Request

EVIL = "[red][link=mailto:x]pod\x1b[2J\x9b1m\u202e\x7f\nforged"
SHOWN = r"[red][link=mailto:x]pod\x1b[2J\x9b1m\u202e\x7f\nforged"
SAID = b"a\x1b]0;title\x07\x1b[31mred\x1b[0m\x1b[2J\x9b\xff\n"
OURS = "\r\x1b[2K"
"""What takes away the line that says how a run goes."""
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Iterator[Mount]:
    """A mount of an account in which the server shows a pod with a name like no other."""

    def list_pods(_request: Request, truth: Callable[[], Answer]) -> Answer:
        answer = truth()
        document = json.loads(bytes(answer.body))
        document["pods"] = [*(document.get("pods") or ()), EVIL]
        return replace(answer, body=json.dumps(document).encode())

    server = Hostile(server)
    server.answer("GET /v1/pod/ls", list_pods)
    with mounted(tmp_path_factory.mktemp("shown"), server) as mount:
        assert EVIL in os.listdir(mount.point)
        yield mount
    server.stop()


def on_terminal(mount: Mount, *arguments: str) -> str:
    """All that a command shows where its output and its errors are a terminal."""
    ours, theirs = pty.openpty()
    env = mount.env | {"COLUMNS": "300", "TERM": "xterm-256color"}
    with subprocess.Popen(
        [*CPODFS, *arguments], stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env=env
    ):
        os.close(theirs)
        said = b""
        with contextlib.suppress(OSError):  # EIO: nobody has it open any more
            while data := os.read(ours, 65536):
                said += data
    os.close(ours)
    return said.decode(errors="surrogateescape").replace("\r\n", "\n")


def is_harmless(text: str) -> bool:
    return COLOURS.sub("", text.replace(OURS, "")).replace("\n", "").isprintable()


def test_names_are_text(hostile: Mount) -> None:
    point, pod = str(hostile.point), str(hostile.point / EVIL)
    for command in (
        ("status", point),
        ("trust", "--revoke", pod),
        ("cancel", pod),
        ("forget", pod),
    ):
        said = on_terminal(hostile, *command)
        assert SHOWN in COLOURS.sub("", said), command
        assert is_harmless(said), command
    for command in (("trust", pod), ("logs", pod), ("run", pod), ("fork", pod, EVIL)):
        assert is_harmless(on_terminal(hostile, *command)), command
    assert is_harmless(on_terminal(hostile, "runs", point))
    assert SHOWN in hostile.cli("status", point).stdout
    assert EVIL in {pod["name"] for pod in hostile.status()["pods"]}
    assert "\nforged" not in hostile.logged()


@pytest.fixture(scope="module")
def talkative(hostile: Mount) -> Path:
    """A pod whose program prints what acts on a terminal; it has run once."""
    pod = compute_pod(hostile, "talkative", "cat script/said")
    (pod / "script/said").write_bytes(SAID)
    shown = on_terminal(hostile, "run", "--wait", str(pod))
    assert "a\\x1b]0;title\\x07\x1b[31mred\x1b[0m\\x1b[2J\\x9b\\xff\n" in shown.replace(OURS, "")
    assert is_harmless(shown)
    return pod


def test_a_programs_output_is_text_and_colours(hostile: Mount, talkative: Path) -> None:
    for option in ((), ("-f",)):
        shown = on_terminal(hostile, "logs", *option, str(talkative))
        assert "\\x1b[2J" in shown
        assert "\x1b[31mred" in shown
        assert is_harmless(shown)


def test_a_pipe_gets_the_bytes(hostile: Mount, talkative: Path) -> None:
    (folder,) = run_folders(talkative)
    assert (folder / "stdout.log").read_bytes() == SAID
    command = [*CPODFS, "logs", str(talkative)]
    done = subprocess.run(command, capture_output=True, env=hostile.env, check=True)
    assert done.stdout == SAID
