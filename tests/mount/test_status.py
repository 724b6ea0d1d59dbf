"""``cpodfs status``: complete, true, and small enough, however much there is to tell."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.mount.harness import CPODFS, Child, Mount, Server, mounted

SLOW = ("--writeback-delay", "3600", "--cache-size", "1GiB")


@pytest.fixture
def slow(tmp_path: Path, own_server: Server):
    """A mount that uploads only when told to."""
    with mounted(tmp_path, own_server, None, *SLOW) as mount:
        yield mount


def test_what_is_cached_pending_and_failed(slow: Mount, own_server: Server) -> None:
    pod = slow.pod()
    (pod / "clean").write_bytes(b"c" * 1000)
    slow.sync()
    (pod / "dirty").write_bytes(b"d" * 300)
    (pod / "d").mkdir()
    status = slow.status()
    assert (status["pending"], status["files"], status["bytes"]) == (2, 1, 300)
    used = {"clean": 1000, "dirty": 300, "limit": 1 << 30, "unclaimed": 0}
    assert status["cache_use"] == used
    assert status["pods"] == [{"name": "pod", "received": False, "running": False}]
    assert status["calls"] >= 3
    assert 0 < status["calls_per_s"] <= status["calls"]
    own_server.faults(error_rate=1.0, match="upload")
    slow.cli("sync", str(pod), "--stall", "1", check=False)
    status = slow.status()
    assert status["errors"] == 1
    assert status["failed"][0]["path"] == "pod/dirty"
    assert status["recent_errors"]
    shown = slow.cli("status", str(pod)).stdout
    assert "300 bytes dirty, in 1 file " in shown
    assert "1000 bytes clean of at most 1.0 GiB" in shown
    assert "pod/dirty" in shown


def test_hit_rate(slow: Mount) -> None:
    pod = slow.pod()
    for name in "abc":
        (pod / name).write_text(name)
    slow.remount(wipe=True)
    assert slow.status()["reads"] == {"hits": 0, "misses": 0, "hit_rate": None}
    (pod / "a").read_text()
    for _ in range(3):
        (pod / "a").read_text()
    assert slow.status()["reads"] == {"hits": 3, "misses": 1, "hit_rate": 0.75}
    assert "75% of 4 opens from the cache" in slow.cli("status", str(pod)).stdout


def test_it_fits_into_one_attribute(slow: Mount, own_server: Server) -> None:
    pod = slow.pod()
    deep = pod.joinpath(*("d" * 100 for _ in range(8)))
    deep.mkdir(parents=True)
    slow.sync()
    own_server.faults(error_rate=1.0, match="upload")
    for number in range(100):
        (deep / f"{number:0250}").write_text("x")
    slow.cli("sync", str(pod), "--stall", "2", check=False)
    answer = os.getxattr(slow.point, "user.cpodfs.status")
    assert len(answer) < 1 << 16
    status = json.loads(answer)
    assert status["pending"] == 100
    assert 0 < len(status["failed"]) <= status["errors"]


@pytest.mark.parametrize("as_json", [False, True])
def test_watch_without_a_terminal_prints_lines(slow: Mount, as_json: bool) -> None:
    slow.pod()
    command = [*CPODFS, "status", "--watch", str(slow.point), *(["--json"] if as_json else [])]
    with Child(command, stdout=subprocess.PIPE, text=True) as watch:
        assert watch.stdout is not None
        for _ in range(2):
            line = watch.stdout.readline()
            if as_json:
                assert json.loads(line)["pending"] == 1
            else:
                assert "pending=1 " in line
        watch.terminate()
