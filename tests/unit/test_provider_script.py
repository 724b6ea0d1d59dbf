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
from cpodfs.runs.provider_script import SCRIPT, Report, parse_report, words_for
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
        assert (
            self.call("setup", self.send((tmp_path / "t").read_bytes()), "output").stdout == "ok\n"
        )

    def folders(self) -> set[str]:
        """In the archive packed last."""
        with tarfile.open(self.folder / "cpodfs.out") as tar:
            return {member.name.removeprefix("./") for member in tar if member.isdir()}

    def report(self, command: str = "pack") -> tuple[Report, dict[str, str]]:
        report = parse_report(self.call(command, "output").stdout)
        data = (self.folder / "cpodfs.out").read_bytes()
        assert (report.size, report.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        with tarfile.open(self.folder / "cpodfs.out") as tar:
            files = {m.name.removeprefix("./"): tar.extractfile(m) for m in tar if m.isfile()}
            return report, {name: f.read().decode() for name, f in files.items() if f}


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


def test_a_program_in_the_background(box: Box) -> None:
    program = (
        f'printf "%s|" "$@"; echo; echo a > output/a; while [ ! -e {box.gate} ]; do sleep 0.05; done;'
        "echo b > output/b; echo more >> output/a; printf 'no newline'; echo oops >&2; exit 5"
    )
    box.call("start", "sh", "-c", program, "sh", "two words", "$HOME", "*")
    said = ""
    while not said.endswith("\n"):
        said += box.call("watch", "1").stdout
    assert said == "two words|$HOME|*|\n"
    report, files = box.report()
    assert (report.exit_code, report.unsaid, report.some) == (None, 0, True)
    assert files == {"output/a": "a\n"}
    assert not box.report()[0].some
    box.gate.write_text("")
    deadline = time.monotonic() + PATIENCE_S
    out, err = "", ""
    while True:
        done = box.call("watch", "2")
        out, err = out + done.stdout, err + done.stderr
        report, files = box.report()
        if report.exit_code is not None:
            break
        assert time.monotonic() < deadline
    assert (out, err) == ("no newline", "oops\n")
    assert (report.exit_code, report.unsaid) == (5, 0)
    assert files == {"output/a": "a\nmore\n", "output/b": "b\n"}


def test_much_output_comes_whole(box: Box) -> None:
    box.call("start", "sh", "-c", "seq 200000; printf 'grüße'")
    out = ""
    while True:
        out += box.call("watch", "5").stdout
        if (report := box.report()[0]).exit_code is not None and not report.unsaid:
            break
    assert out == "".join(f"{n}\n" for n in range(1, 200001)) + "grüße"


def test_a_program_that_never_pauses_does_not_keep_us(box: Box) -> None:
    program = f"n=0; while [ ! -e {box.gate} ]; do n=$((n + 1)); echo $n grüße; done; echo 7 >&2"
    box.call("start", "sh", "-c", program)
    out, looks = "", 4
    for _ in range(looks):
        # Half a second each, and what a slow machine adds; without an end it would take for ever.
        said = box.call("watch", "5").stdout
        assert said.endswith("\n")
        out += said
    box.gate.write_text("")
    err = ""
    while (report := box.report()[0]).exit_code is None or report.unsaid:
        done = box.call("watch", "5")
        out, err = out + done.stdout, err + done.stderr
    lines = out.splitlines()
    assert lines == [f"{n} grüße" for n in range(1, len(lines) + 1)]
    assert err == "7\n"


def test_a_watch_ends_where_there_is_no_proc_too(box: Box) -> None:
    (box.folder / "cpodfs.sh").write_text(SCRIPT.replace("/proc/uptime", "/nowhere"))
    program = f"echo up; while [ ! -e {box.gate} ]; do sleep 0.05; done"
    box.call("start", "sh", "-c", program)
    done = box.call("watch", "20")
    assert (done.stdout, done.stderr) == ("up\n", "")
    assert box.report()[0].exit_code is None


def test_an_output_folder_that_was_removed_has_nothing(box: Box) -> None:
    box.call("task", box.send(b"1"), "payload/1", "output", "rm", "-r", "output")
    assert box.report("whole")[1] == {}
    box.call("start", "true")
    box.call("watch", "20")
    assert box.report()[1] == {}


def test_an_unfinished_line_is_shown_when_nothing_else_comes(box: Box) -> None:
    program = f"printf 'first\\nhow many? '; while [ ! -e {box.gate} ]; do sleep 0.05; done; echo 3"
    box.call("start", "sh", "-c", program)
    said = ""
    while "?" not in said:
        said += box.call("watch", "2").stdout
    assert said == "first\nhow many? "
    box.gate.write_text("")
    assert box.call("watch", "50").stdout == "3\n"


def test_a_very_long_line_comes_too(box: Box) -> None:
    box.call("start", "sh", "-c", "head -c 700000 /dev/zero | tr '\\0' x; echo; sleep 60")
    out = ""
    while not out.endswith("\n"):
        out += box.call("watch", "5").stdout
    assert out == "x" * 700000 + "\n"
    kill_children(int((box.folder / "cpodfs.state/pid").read_text()))


def test_files_with_old_dates_and_odd_names_come_too(box: Box) -> None:
    program = (
        'cp -p script/x "output/old one"; touch -d "2001-01-01 00:00" "output/old one"; '
        "touch output/-n; echo 1 > 'output/a\nb'; echo 2 > 'output/*'; mkdir output/empty"
    )
    box.call("pack", "output")
    box.call("start", "sh", "-c", program)
    box.call("watch", "20")
    report, files = box.report()
    assert report.exit_code == 0
    odd = {"output/a\nb": "1\n", "output/*": "2\n"}
    assert files == {"output/old one": "x", "output/-n": ""} | odd
    assert "output/empty" in box.folders()


def test_links_are_left_out_and_told_of(box: Box) -> None:
    program = "echo a > output/a; ln -s a output/b; mkfifo output/c; ln -s /etc output/d"
    told = [f"cpodfs: output/{n}: not a file or a folder, so it is not brought" for n in "bcd"]
    box.call("task", box.send(b"1"), "payload/1", "output", "sh", "-c", program)
    assert sorted(box.call("whole", "output").stderr.splitlines()) == told
    assert box.report("whole")[1] == {"output/a": "a\n"}
    (box.folder / "cpodfs.state/exit").unlink()
    program += f"; while [ ! -e {box.gate} ]; do sleep 0.05; done"
    box.call("start", "sh", "-c", f"rm -f output/*; {program}")
    assert box.call("pack", "output").stderr == ""
    box.gate.write_text("")
    box.call("watch", "50")
    assert sorted(box.call("pack", "output").stderr.splitlines()) == told
    assert box.call("pack", "output").stderr == ""


def test_of_many_links_some_are_told_of(box: Box) -> None:
    program = "for n in $(seq 50); do ln -s x output/$n; done"
    box.call("task", box.send(b"1"), "payload/1", "output", "sh", "-c", program)
    lines = box.call("whole", "output").stderr.splitlines()
    assert lines[20:] == ["cpodfs: output: 30 more are not brought either"]


def test_a_task_starts_with_an_empty_output(box: Box) -> None:
    digest = box.send(b"first")
    words = ["sh", "-c", 'cat "$1" > output/r; echo did; exit 3', "sh", "payload/a b"]
    assert box.call("task", digest, "payload/a b", "output", *words).stdout == "did\n"
    report, files = box.report("whole")
    assert (report.exit_code, report.some, files) == (3, True, {"output/r": "first"})
    digest = box.send(b"second")
    box.call("task", digest, "payload/c", "output", "true")
    report, files = box.report("whole")
    assert (report.exit_code, files) == (0, {})


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
    box.call("start", program, "word")
    assert box.call("watch", "20").stderr == f"cpodfs: {program}: {said}\n"
    assert box.report()[0].exit_code == code
    done = box.call("task", box.send(b"1"), "payload/1", "output", program)
    assert done.stderr == f"cpodfs: {program}: {said}\n"
    assert box.report("whole")[0].exit_code == code


@pytest.mark.parametrize("words", [["exit", "3"], ["eval", "echo seen"], ["pack", "output"]])
def test_a_builtin_of_the_shell_is_no_program(box: Box, words: list[str]) -> None:
    box.call("start", *words)
    done = box.call("watch", "20")
    assert (done.stdout, words[0] in done.stderr) == ("", True)
    assert box.report()[0].exit_code == 127
    box.call("task", box.send(b"a"), "payload/a", "output", "true")
    box.call("task", box.send(b"b"), "payload/b", "output", *words)
    assert box.report("whole")[0].exit_code == 127


def test_who_waits_for_the_program_is_killed(box: Box) -> None:
    box.call("start", "sh", "-c", "echo up; exec sleep 60")
    pid = int((box.folder / "cpodfs.state/pid").read_text())
    said = ""
    while not said:
        said = box.call("watch", "1").stdout
    assert said == "up\n"
    # Stopped first: it must not have the time to write the end down.
    os.kill(pid, signal.SIGSTOP)
    kill_children(pid)
    os.kill(pid, signal.SIGKILL)
    assert "killed" in box.call("watch", "50").stderr
    assert box.report()[0].exit_code in (137, 128 + signal.SIGKILL)


def test_no_exit_code_is_taken_from_an_earlier_task(box: Box) -> None:
    box.call("task", box.send(b"a"), "payload/a", "output", "true")
    # The program's parent is the script itself.
    words = ["sh", "-c", "kill -KILL $PPID"]
    box.call("task", box.send(b"b"), "payload/b", "output", *words, ok=False)
    assert box.call("whole", "output", ok=False).returncode == 97


HASH = "0" * 64


@pytest.mark.parametrize(
    "text",
    [
        *("", "cpodfs", "cpodfs - 0 0 1 abc", f"x 0 0 1 5 {HASH}", f"cpodfs 256 0 1 5 {HASH}"),
        *(f"cpodfs -1 0 1 5 {HASH}", f"cpodfs - -1 1 5 {HASH}", f"cpodfs - 0 1 -5 {HASH}"),
        f"cpodfs {'9' * 4000} 0 1 5 {HASH}",
    ],
)
def test_not_a_report(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a report|invalid literal"):
        parse_report(text)


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
