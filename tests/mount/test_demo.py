"""``cpodfs demo`` from the outside, as somebody sees it who has just installed it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpodfs import mountpoint
from tests.mount.harness import CPODFS, Child
from tests.patience import PATIENCE_S, until

DEMO = [*CPODFS, "demo"]
REMOVED = "Unmounted and removed"
TOP = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the demo lives."""
    return tmp_path / "tmp/cpodfs-demo"


@pytest.fixture
def env(folder: Path, tmp_path: Path) -> dict[str, str]:
    """What leads elsewhere must be left alone: no server, a broken configuration file."""
    config = tmp_path / "config/cpodfs/config.toml"
    config.parent.mkdir(parents=True)
    config.write_text("this is not TOML")
    folder.parent.mkdir()
    return os.environ | {
        "TMPDIR": str(folder.parent),
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "CPODFS_SERVER": "http://127.0.0.1:1",
        "CPODFS_ATTR_TTL": "no number",
        "YAGNA_APPKEY": "of somebody else",
    }


def assert_nothing_is_left(tmp_path: Path) -> None:
    assert not [m for m in mountpoint.mounts() if tmp_path in m.mountpoint.parents]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config", "tmp"]
    assert list((tmp_path / "tmp").glob("cpodfs-demo*")) == []
    # The folder would be made again by what goes on in there.
    until(lambda: processes_in(tmp_path) == [])


def processes_in(folder: Path) -> list[int]:
    """Processes, other than this one, that have a folder on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if os.fsencode(folder) in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def read_until(demo: subprocess.Popen[str], start: str) -> str:
    """What it says up to the end of the line that starts so."""
    assert demo.stdout is not None
    said = ""
    for line in demo.stdout:
        said += line
        if line.startswith(start):
            return said
    raise AssertionError(said)


@contextlib.contextmanager
def begun(env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        DEMO, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env=env
    ) as demo:
        try:
            yield demo
        except BaseException:
            demo.terminate()  # or the end of the block would wait for it
            raise


def test_from_mount_to_remount(env: dict[str, str], folder: Path, tmp_path: Path) -> None:
    folder.mkdir()  # another demo's
    done = subprocess.run(
        [*DEMO, "--exit"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=env,
        timeout=PATIENCE_S,
    )
    folder.rmdir()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    shown = done.stdout
    for command in ("cpodfs mount", "mkdir", "cp -r", "cat", "touch", "tail -f", "ls", "rm -r"):
        assert f"\n$ {command} " in shown
    providers = set(re.findall(r"back from (\S+) in ", shown))
    assert len(providers) >= 2
    assert "(9 of 9)\narea of the set: about 1.51 " in shown
    picture = shown[shown.index("mandelbrot.txt\n  ") :].splitlines()[1:26]
    assert len(picture) == 25
    assert max(line.count("@") for line in picture) > 30
    digests = re.findall(r"^([0-9a-f]{64})  -$", shown, re.MULTILINE)
    assert len(digests) == 2
    assert digests[0] == digests[1]
    assert shown.endswith(f"\n{REMOVED} {folder}-2, and with it all that this demo has made.\n")
    assert_nothing_is_left(tmp_path)


def test_stays_until_interrupted(env: dict[str, str], folder: Path, tmp_path: Path) -> None:
    with begun(env) as demo:
        said = read_until(demo, "The picture is ").splitlines()
        assert said[-2] == f"Look around in {folder}/pods, from another terminal."
        picture = Path(said[-1].removeprefix("The picture is ").removesuffix("."))
        assert greys(picture.read_bytes()) == (432, 243, {0, 254})
        demo.send_signal(signal.SIGINT)
        assert demo.stdout is not None
        assert demo.stdout.read().splitlines()[-1].startswith(f"{REMOVED} {folder}, ")
        assert demo.wait(PATIENCE_S) == 0
    assert_nothing_is_left(tmp_path)


def greys(png: bytes) -> tuple[int, int, set[int]]:
    """Width, height, the darkest and the brightest value of a picture in grey."""
    start, end = png.index(b"IHDR") + 4, png.index(b"IDAT") + 4
    width, height, bits, colours = struct.unpack_from(">2I2B", png, start)
    assert (png[:8], bits, colours) == (b"\x89PNG\r\n\x1a\n", 8, 0)
    lines = zlib.decompressobj().decompress(png[end:])
    assert len(lines) == height * (width + 1)
    # Each row begins with the number of its filter.
    pixels = [value for at, value in enumerate(lines) if at % (width + 1)]
    return width, height, {min(pixels), max(pixels)}


def test_interrupted_while_somebody_is_in_its_folder(
    env: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    with begun(env) as demo:
        read_until(demo, "Ctrl-C here")
        with Child(["sleep", "1000"], cwd=folder / "pods/mandelbrot/output") as inside:
            demo.send_signal(signal.SIGINT)
            demo.send_signal(signal.SIGINT)
            assert demo.stdout is not None
            said = demo.stdout.read()
            inside.kill()
        assert demo.wait(PATIENCE_S) == 0
    assert f"\n{REMOVED} {folder}, " in said
    assert said.endswith(f"\nStill in there: sleep ({inside.pid}). Leave with: cd\n")
    assert_nothing_is_left(tmp_path)


@pytest.mark.parametrize("step", ["$ cpodfs mount", "$ cpodfs umount", "$ touch"])
def test_interrupted_early_leaves_nothing(
    env: dict[str, str], folder: Path, tmp_path: Path, step: str
) -> None:
    with begun(env) as demo:
        read_until(demo, step)
        demo.send_signal(signal.SIGTERM)
        assert demo.stdout is not None
        assert f"{REMOVED} {folder}, " in demo.stdout.read()
        assert demo.wait(PATIENCE_S) == 130
    assert_nothing_is_left(tmp_path)


def test_failure_says_why(env: dict[str, str], tmp_path: Path) -> None:
    tools = tmp_path / "tmp/tools"
    tools.mkdir()
    for name in ("mkdir", "cat"):
        (tools / name).symlink_to(f"/bin/{name}")
    done = subprocess.run(
        [*DEMO, "--exit"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=env | {"PATH": str(tools)},
        timeout=PATIENCE_S,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "cpodfs: demo: cpodfs mount failed: fusermount3: is not on PATH; apt install fuse3\n"
    )
    assert_nothing_is_left(tmp_path)


def test_the_tour_in_the_readme_can_be_pasted(tmp_path: Path) -> None:
    readme = (TOP / "README.rst").read_text()
    start = readme.index("A tour of five minutes\n")
    end = readme.index("With a FairOS-DFS server of your own::")
    blocks = re.findall(r"::\n\n((?:    .*\n|\n)+)", readme[start:end])
    script = "".join(re.sub("^    ", "", block, flags=re.MULTILINE) for block in blocks)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    try:
        done = subprocess.run(
            ["bash", "-e"],
            input=script,
            capture_output=True,
            text=True,
            cwd=TOP,
            env={"HOME": str(tmp_path), "PATH": path},
            timeout=PATIENCE_S,
        )
    finally:
        if mountpoint.find(tmp_path / "pods") is not None:
            mountpoint.unmount(tmp_path / "pods", lazy=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"state": "starting"' in done.stdout
    assert "done\n6\n{" in done.stdout
    assert "}\n6\n" in done.stdout
    assert re.search(r"^ pending +0 changes", done.stdout, re.MULTILINE)


def test_two_lines_to_paste() -> None:
    lines = (TOP / "README.rst").read_text().splitlines()
    commands = [line for line in lines if line.startswith("    ")]
    assert len([line for line in commands if line.endswith(" cpodfs demo")]) == 0
    assert len([line for line in commands if line.endswith("/cpodfs demo")]) == 1
    assert len([line for line in commands if line.endswith(".ci/check")]) == 1


def test_a_driver_that_dies_does_not_keep_the_demo_from_its_end(
    env: dict[str, str], tmp_path: Path, folder: Path
) -> None:
    with begun(env) as demo:
        read_until(demo, "Ctrl-C here")
        status = json.loads(os.getxattr(folder / "pods", "user.cpodfs.status"))
        os.kill(status["pid"], signal.SIGKILL)
        demo.send_signal(signal.SIGINT)
        assert demo.wait(PATIENCE_S) == 0
    assert_nothing_is_left(tmp_path)
