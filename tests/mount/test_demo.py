"""``cpodfs demo`` from the outside, as somebody sees it who has just installed it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cpodfs import mountpoint
from tests.mount.harness import CPODFS

DEMO = [*CPODFS, "demo"]
TOP = Path(__file__).parents[2]
LIMIT_S = 60.0


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """What leads elsewhere must be left alone: no server, a broken configuration file."""
    config = tmp_path / "config/cpodfs/config.toml"
    config.parent.mkdir(parents=True)
    config.write_text("this is not TOML")
    return os.environ | {
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "CPODFS_SERVER": "http://127.0.0.1:1",
        "CPODFS_ATTR_TTL": "no number",
        "YAGNA_APPKEY": "of somebody else",
    }


def test_from_mount_to_remount(env: dict[str, str], tmp_path: Path) -> None:
    begun = time.monotonic()
    done = subprocess.run(
        [*DEMO, "--exit"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=env,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - begun < LIMIT_S
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
    assert shown.endswith("Done: unmounted, and the demo's folder is removed.\n")
    assert list((tmp_path / "state/cpodfs").iterdir()) == []
    assert not (tmp_path / "cache").exists()
    assert not [m for m in mountpoint.mounts() if tmp_path in m.mountpoint.parents]


def test_stays_until_interrupted(env: dict[str, str], tmp_path: Path) -> None:
    with subprocess.Popen(
        DEMO, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env=env
    ) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if line.startswith("Look around in "):
                break
        pods = Path(line.removeprefix("Look around in ").split(",")[0])
        assert (pods / "mandelbrot/output/mandelbrot.pgm").read_text().startswith("P2\n432 243\n")
        demo.send_signal(signal.SIGINT)
        assert "Done" in demo.stdout.read()
        assert demo.wait(30) == 0
    assert mountpoint.find(pods) is None
    assert list((tmp_path / "state/cpodfs").iterdir()) == []


def test_interrupted_early_leaves_nothing(env: dict[str, str], tmp_path: Path) -> None:
    with subprocess.Popen(
        DEMO, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env=env
    ) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if line.startswith("$ cpodfs mount"):
                break
        demo.send_signal(signal.SIGTERM)
        demo.stdout.read()
        assert demo.wait(60) == 130
    assert not [m for m in mountpoint.mounts() if tmp_path in m.mountpoint.parents]
    assert list((tmp_path / "state/cpodfs").iterdir()) == []


def test_failure_says_why(env: dict[str, str], tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("mkdir", "cat"):
        (tools / name).symlink_to(f"/bin/{name}")
    done = subprocess.run(
        [*DEMO, "--exit"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=env | {"PATH": str(tools)},
        timeout=120,
    )
    assert done.returncode == 1
    assert "fusermount3 is missing; install it with: apt install fuse3" in done.stderr
    assert list((tmp_path / "state/cpodfs").iterdir()) == []


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
            timeout=120,
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
