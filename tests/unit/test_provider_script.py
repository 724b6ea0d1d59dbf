"""The script in the container, with this machine's sh and, where it is installed, busybox's."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpodfs.runs import state
from cpodfs.runs.provider_script import (
    ALWAYS,
    ARCHIVE_BYTES,
    IF_WELL,
    PIECES_BYTES,
    SCRIPT,
    Answer,
    parse_answer,
    words_for,
)
from tests.patience import PATIENCE_S

SHELLS = [["/bin/sh"], ["bash"], ["busybox", "sh"], ["busybox-only", "sh"]]


class Box:
    """A folder as the container's ``/golem/work``, and calls of the script in it."""

    def __init__(self, folder: Path, shell: list[str], path: str | None = None) -> None:
        self.folder = folder
        self.gate = folder / "gate"
        self._shell = shell
        self._env = os.environ | ({"PATH": path} if path else {})
        (folder / "cpodfs.sh").write_text(SCRIPT)

    def call(self, *words: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
        command = [*self._shell, str(self.folder / "cpodfs.sh"), *words]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE_S, cwd="/", env=self._env
        )
        assert not ok or done.returncode == 0, done.stderr
        return done

    def send(self, data: bytes) -> str:
        (self.folder / "cpodfs.in").write_bytes(data)
        return hashlib.sha256(data).hexdigest()

    def setup(self, tmp_path: Path) -> None:
        (tmp_path / "src/script").mkdir(parents=True)
        (tmp_path / "src/script/x").write_text("x")
        with tarfile.open(tmp_path / "t", "w") as tar:
            tar.add(tmp_path / "src/script", arcname="script")
        digest = self.send((tmp_path / "t").read_bytes())
        for _ in range(2):
            assert self.call("setup", digest, "output").stdout == ""

    def folders(self) -> set[str]:
        """In the archive packed last."""
        with tarfile.open(self.folder / "cpodfs.out") as tar:
            return {member.name.removeprefix("./") for member in tar if member.isdir()}


class Talk:
    """A program begun in a box and what has been heard of it, as `provider_work.Watch` asks."""

    def __init__(self, box: Box, *words: str, when: str = ALWAYS) -> None:
        self.box = box
        self.out, self.err, self.packed = b"", b"", 0
        self.files: dict[str, str] = {}
        self.complaint = ""
        self._when = when
        if words:
            box.call("begin", "1", *words)

    def look(self, tenths: int = 5, *, lost: bool = False) -> Answer:
        """One look; ``lost``: its answer never arrives, so it is made again."""
        at = (len(self.out), len(self.err))
        words = (str(tenths), *map(str, at), str(self.packed), "output", self._when)
        if lost:
            self.box.call("watch", *words)
        done = self.box.call("watch", *words)
        answer = parse_answer(done.stdout, *at)
        self.complaint = done.stderr
        self.out, self.err = self.out + answer.out, self.err + answer.err
        self.files = self._unpacked(answer)
        return answer

    def to_its_end(self, *, lost: bool = False) -> int:
        files: dict[str, str] = {}
        deadline = time.monotonic() + PATIENCE_S
        while not (answer := self.look(lost=lost)).over:
            assert time.monotonic() < deadline
            files |= self.files
        self.files = files | self.files
        assert answer.exit_code is not None
        return answer.exit_code

    def _unpacked(self, answer: Answer) -> dict[str, str]:
        if not answer.size:
            return {}
        self.packed += 1
        data = (self.box.folder / "cpodfs.out").read_bytes()
        assert (answer.size, answer.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert answer.archive == (data if len(data) <= ARCHIVE_BYTES else None)
        with tarfile.open(self.box.folder / "cpodfs.out") as tar:
            files = {m.name.removeprefix("./"): tar.extractfile(m) for m in tar if m.isfile()}
            return {name: f.read().decode() for name, f in files.items() if f}


@pytest.fixture(params=SHELLS, ids=lambda shell: shell[0].rpartition("/")[2])
def box(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Box]:
    program, *words = request.param
    busybox, path = shutil.which("busybox"), None
    if program == "busybox-only" and busybox:
        # An image in which all tools are busybox's.
        program, path = busybox, str(tmp_path / "bin")
        (tmp_path / "bin").mkdir()
        subprocess.run([busybox, "--install", "-s", path], check=True)
    (tmp_path / "work").mkdir()
    shell = [program, *words] if shutil.which(program) else SHELLS[0]
    box = Box(tmp_path / "work", shell, path)
    box.setup(tmp_path)
    yield box
    # Programs of a test that has failed wait for it.
    box.gate.write_text("")


def kill_children(pid: int) -> None:
    found = state.children(pid)
    assert found
    for child in found:
        os.kill(child, signal.SIGKILL)


def test_what_did_not_arrive_whole_is_refused(box: Box) -> None:
    box.send(b"something")
    done = box.call("setup", "0" * 64, "output", ok=False)
    assert done.returncode == 91
    assert "did not arrive whole" in done.stderr


@pytest.mark.parametrize("lost", [False, True])
def test_a_program_in_the_background(box: Box, lost: bool) -> None:
    program = (
        f'printf "%s|" "$@"; echo; echo a > output/a; while [ ! -e {box.gate} ]; do sleep 0.05; done;'
        "echo b > output/b; echo more >> output/a; printf 'no newline'; echo oops >&2; exit 5"
    )
    talk = Talk(box, "sh", "-c", program, "sh", "two words", "$HOME", "*")
    while not talk.out.endswith(b"\n"):
        answer = talk.look(1, lost=lost)
        assert (answer.exit_code, answer.out_left, answer.err_left) == (None, 0, 0)
    assert talk.out == b"two words|$HOME|*|\n"
    talk.look(1, lost=lost)
    talk.look(1, lost=lost)
    assert talk.packed >= 1
    assert talk.files == {}
    # What begins it may come twice, too.
    box.call("begin", "1", "false")
    box.gate.write_text("")
    assert talk.to_its_end(lost=lost) == 5
    assert (talk.out, talk.err) == (b"two words|$HOME|*|\nno newline", b"oops\n")
    assert talk.files == {"output/a": "a\nmore\n", "output/b": "b\n"}


def test_much_output_comes_whole(box: Box) -> None:
    talk = Talk(box, "sh", "-c", "seq 200000; printf 'grüße'")
    assert talk.to_its_end() == 0
    assert talk.out == ("".join(f"{n}\n" for n in range(1, 200001)) + "grüße").encode()


def test_output_is_bytes(box: Box) -> None:
    program = r"head -c 300000 /dev/urandom > said; cat said; printf '\000\377\r\n'"
    talk = Talk(box, "sh", "-c", program)
    assert talk.to_its_end() == 0
    assert talk.out == (box.folder / "pod/said").read_bytes() + b"\x00\xff\r\n"


def test_much_output_can_be_fetched_as_a_file(box: Box) -> None:
    talk = Talk(box, "sh", "-c", "seq 100000; seq 3 >&2")
    answer = talk.look(50)
    while answer.exit_code is None:
        answer = talk.look(50)
    rest = b"".join(b"%d\n" % n for n in range(1, 100001))[len(talk.out) :]
    assert answer.out_left == len(rest)
    box.call("slice", str(len(talk.out)), "1000", "2", "4")
    assert (box.folder / "cpodfs.log").read_bytes() == rest[:1000] + b"2\n3\n"


def test_a_program_that_never_pauses_does_not_keep_us(box: Box) -> None:
    program = f"n=0; while [ ! -e {box.gate} ]; do n=$((n + 1)); echo $n grüße; done; echo 7 >&2"
    talk = Talk(box, "sh", "-c", program)
    for _ in range(4):
        # Half a second each, and what a slow machine adds; without an end it would take for ever.
        assert len(talk.look().out) <= PIECES_BYTES
    box.gate.write_text("")
    assert talk.to_its_end() == 0
    lines = talk.out.decode().splitlines()
    assert lines == [f"{n} grüße" for n in range(1, len(lines) + 1)]
    assert talk.err == b"7\n"


def test_a_watch_ends_where_there_is_no_proc_too(box: Box) -> None:
    (box.folder / "cpodfs.sh").write_text(SCRIPT.replace("/proc/uptime", "/nowhere"))
    program = f"echo up; while [ ! -e {box.gate} ]; do sleep 0.05; done"
    talk = Talk(box, "sh", "-c", program)
    assert talk.look(20).exit_code is None
    assert talk.out == b"up\n"


def test_where_there_is_no_base64(box: Box) -> None:
    (box.folder / "cpodfs.sh").write_text(SCRIPT.replace("command -v base64", "false"))
    talk = Talk(box, "sh", "-c", "printf 'a\\377'; echo b > output/b")
    assert talk.to_its_end() == 0
    assert (talk.out, talk.files) == (b"a\xff", {"output/b": "b\n"})


def test_an_output_folder_that_was_removed_has_nothing(box: Box) -> None:
    talk = Talk(box, "rm", "-r", "output")
    assert talk.to_its_end() == 0
    assert talk.files == {}


def test_an_unfinished_line_comes(box: Box) -> None:
    program = f"printf 'first\nhow many? '; while [ ! -e {box.gate} ]; do sleep 0.05; done; echo 3"
    talk = Talk(box, "sh", "-c", program)
    while b"?" not in talk.out:
        talk.look(2)
    assert talk.out == b"first\nhow many? "
    box.gate.write_text("")
    talk.to_its_end()
    assert talk.out == b"first\nhow many? 3\n"


def test_a_large_archive_is_not_in_the_answer(box: Box) -> None:
    talk = Talk(box, "sh", "-c", "head -c 100000 /dev/zero | tr '\\0' x > output/much")
    assert talk.to_its_end() == 0
    assert talk.files == {"output/much": "x" * 100000}


def test_files_that_are_replaced_all_the_time(box: Box) -> None:
    """As by a program that writes beside a file, and renames: what was found is gone when it is packed."""
    program = (
        f"n=0; while [ ! -e {box.gate} ]; do n=$((n + 1)); echo $n > output/.new$n; "
        "mv output/.new$n output/now; done; echo end > output/now"
    )
    talk = Talk(box, "sh", "-c", program)
    for _ in range(12):
        assert talk.look(0).exit_code is None
    box.gate.write_text("")
    assert talk.to_its_end() == 0
    assert talk.files["output/now"] == "end\n"


def test_files_with_old_dates_and_odd_names_come_too(box: Box) -> None:
    program = (
        'cp -p script/x "output/old one"; touch -d "2001-01-01 00:00" "output/old one"; '
        "touch output/-n; echo 1 > 'output/a\nb'; echo 2 > 'output/*'; mkdir output/empty"
    )
    talk = Talk(box, "sh", "-c", program)
    assert talk.to_its_end() == 0
    odd = {"output/a\nb": "1\n", "output/*": "2\n"}
    assert talk.files == {"output/old one": "x", "output/-n": ""} | odd
    assert "output/empty" in box.folders()


def test_links_are_left_out_and_told_of(box: Box) -> None:
    program = (
        "echo a > output/a; ln -s a output/b; mkfifo output/c; ln -s /etc output/d; "
        f"while [ ! -e {box.gate} ]; do sleep 0.05; done"
    )
    told = [f"cpodfs: output/{n}: not a file or a folder, so it is not brought" for n in "bcd"]
    talk = Talk(box, "sh", "-c", program)
    talk.look()
    assert (talk.complaint, talk.files) == ("", {"output/a": "a\n"})
    box.gate.write_text("")
    assert talk.to_its_end(lost=True) == 0
    assert sorted(talk.complaint.splitlines()) == told


def test_of_many_links_some_are_told_of(box: Box) -> None:
    talk = Talk(box, "sh", "-c", "for n in $(seq 50); do ln -s x output/$n; done")
    talk.to_its_end()
    assert talk.complaint.splitlines()[20:] == ["cpodfs: output: 30 more are not brought either"]


def test_a_task_starts_with_an_empty_output(box: Box) -> None:
    words = ["sh", "-c", 'cat "$1" > output/r; echo did', "sh", "payload/a b"]
    digest = box.send(b"first")
    for _ in range(2):
        box.call("task", "1", digest, "payload/a b", "output", *words)
    talk = Talk(box, when=IF_WELL)
    assert (talk.to_its_end(), talk.out, talk.files) == (0, b"did\n", {"output/r": "first"})
    box.call("task", "2", box.send(b"second"), "payload/c", "output", "true")
    talk = Talk(box, when=IF_WELL)
    assert (talk.to_its_end(), talk.out, talk.files) == (0, b"", {})


def test_a_task_that_fails_brings_nothing(box: Box) -> None:
    words = ["sh", "-c", "echo x > output/r; exit 3"]
    box.call("task", "1", box.send(b"1"), "payload/1", "output", *words)
    talk = Talk(box, when=IF_WELL)
    assert (talk.to_its_end(), talk.files, talk.packed) == (3, {}, 0)


@pytest.mark.parametrize(
    ("program", "said", "code"),
    [
        ("no-such-program", "not found on the provider", 127),
        ("script/nothing", "not found on the provider", 127),
        ("script/x", "not an executable file", 126),
        ("./script", "not an executable file", 126),
    ],
)
def test_a_missing_program(box: Box, program: str, said: str, code: int) -> None:
    talk = Talk(box, program, "word")
    assert talk.to_its_end() == code
    assert talk.err.decode() == f"cpodfs: {program}: {said}\n"


@pytest.mark.parametrize("words", [["exit", "3"], ["eval", "echo seen"], ["pack", "output"]])
def test_a_builtin_of_the_shell_is_no_program(box: Box, words: list[str]) -> None:
    talk = Talk(box, *words)
    assert talk.to_its_end() == 127
    assert (talk.out, words[0] in talk.err.decode()) == (b"", True)


def test_who_waits_for_the_program_is_killed(box: Box) -> None:
    talk = Talk(box, "sh", "-c", "echo up; exec sleep 60")
    pid = int((box.folder / "cpodfs.state/pid").read_text())
    while not talk.out:
        talk.look(1)
    assert talk.out == b"up\n"
    # Stopped first: it must not have the time to write the end down.
    os.kill(pid, signal.SIGSTOP)
    kill_children(pid)
    os.kill(pid, signal.SIGKILL)
    assert talk.to_its_end() in (137, 128 + signal.SIGKILL)
    assert b"killed" in talk.err


HASH = "0" * 64


@pytest.mark.parametrize(
    "text",
    [
        *("", "cpodfs", "cpodfs - 0 0 1 abc", f"x 0 0 0 5 {HASH}", f"cpodfs 256 0 0 5 {HASH}"),
        *(f"cpodfs -1 0 0 5 {HASH}", f"cpodfs - -1 0 5 {HASH}", f"cpodfs - 0 0 -5 {HASH}"),
        *(f"cpodfs {'9' * 4000} 0 0 5 {HASH}", f"cpodfs - 0 0 0 {HASH}", "cpodfs - 0 0 5 -"),
        *("out 0 1 bYQ==", "out 1 1 bYQ==\ncpodfs - 0 0 0 -", "out 0 2 bYQ==\ncpodfs - 0 0 0 -"),
        *("out 0 1 b!!\ncpodfs - 0 0 0 -", "odd 0 1 bYQ==\ncpodfs - 0 0 0 -"),
        *("out 0\ncpodfs - 0 0 0 -", f"cpodfs - 0 0 2 {HASH} bYQ=="),
    ],
)
def test_not_an_answer(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a|instead of|base64|padding|hexadecimal"):
        parse_answer(text, 0, 0)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("x a={} {}", "x a=p/1 p/1"),
        ("x {} FILE", "x p/1 FILE"),
        ("x -v FILE", "x -v p/1"),
        ("x", "x p/1"),
        ("script/x", "script/x p/1"),
        ("python3 script/count.py", "python3 script/count.py p/1"),
        ("python3 -u ./script//in/count.py", "python3 -u ./script//in/count.py p/1"),
        ("ls script", "ls script p/1"),
        ("python3 script/count.py p/FILE", "python3 script/count.py p/1"),
        ("python3 script/../p/FILE", "python3 p/1"),
        ("python3 scripts", "python3 p/1"),
    ],
)
def test_the_words_for_a_file(argv: str, words: str) -> None:
    assert words_for(tuple(argv.split()), "p/1", "script") == words.split()


def test_the_script_folder_may_lie_deep() -> None:
    assert words_for(("sh", "code/in/run"), "p/1", "code/in") == ["sh", "code/in/run", "p/1"]
    assert words_for(("sh", "code/run"), "p/1", "code/in") == ["sh", "p/1"]
