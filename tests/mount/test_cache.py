"""The cache's promises: its size, a full disk, fsync, and walking a cold tree."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.mount.harness import Mount, Server, mounted, run, sh
from tests.patience import PATIENCE_S, until

MIB = 1 << 20
LATER = ("--writeback-delay", "3600")


def _used(mount: Mount) -> int:
    content = next(mount.cache.iterdir()) / "content"
    return sum(f.stat().st_blocks * 512 for f in content.rglob("*") if f.is_file())


def test_clean_files_are_evicted_least_recently_used_first(
    tmp_path: Path, own_server: Server
) -> None:
    with mounted(tmp_path, own_server, None, *LATER, "--cache-size", "10MiB") as mount:
        pod = mount.pod()
        for number in range(6):
            (pod / f"f{number}").write_bytes(bytes([number]) * 3 * MIB)
        assert _used(mount) >= 18 * MIB, "dirty data is never evicted"
        with contextlib.ExitStack() as held:
            # What is open stays, until Swarm has all of them: only then the age alone decides.
            for number in range(6):
                held.enter_context((pod / f"f{number}").open("rb"))
            mount.sync()
            until(lambda: not mount.status()["not_in_swarm"]["files"])
        until(lambda: _used(mount) <= 10 * MIB)
        mount.remount()  # the kernel may still have all of them
        own_server.reset_calls()
        assert (pod / "f5").read_bytes() == bytes([5]) * 3 * MIB
        assert "GET /v1/file/download" not in own_server.calls(), "the youngest is still here"
        assert (pod / "f0").read_bytes() == bytes([0]) * 3 * MIB
        assert own_server.calls()["GET /v1/file/download"] == 1
        with (pod / "f1").open("rb") as file:
            for number in (2, 3, 4):
                (pod / f"f{number}").read_bytes()
            until(lambda: _used(mount) <= 10 * MIB)
            file.seek(2 * MIB)
            assert file.read(1) == bytes([1])


def test_a_full_disk_is_told_to_the_writer_and_loses_nothing(
    tmp_path: Path, own_server: Server, small_disk: Path
) -> None:
    with mounted(tmp_path, own_server, None, "--writeback-delay", "3600") as mount:
        pod = mount.pod()
        (pod / "kept").write_bytes(b"k" * 20 * MIB)
        (pod / "before").write_text("before")
        done = subprocess.run(
            ["dd", "if=/dev/zero", f"of={pod}/big", "bs=1M", "count=200", "conv=fsync"],
            capture_output=True,
            text=True,
        )
        assert done.returncode != 0
        assert "No space left on device" in done.stderr
        assert (pod / "kept").read_bytes() == b"k" * 20 * MIB
        (pod / "big").unlink()
        (pod / "after").write_bytes(b"a" * MIB)
        mount.kill()
        mount.start()
        assert sorted(os.listdir(pod)) == ["after", "before", "kept"]
        assert mount.stop() == 0
        for found in small_disk.iterdir():
            shutil.rmtree(found)
        mount.start()
        assert (pod / "kept").read_bytes() == b"k" * 20 * MIB
        assert (pod / "after").read_bytes() == b"a" * MIB


def test_df_counts_what_can_be_written(mount: Mount, pod: Path) -> None:
    before = os.statvfs(pod)
    assert before.f_bavail * before.f_frsize <= shutil.disk_usage(mount.cache).free
    assert "cpodfs" in run("df", "-h", pod)


def test_fsync_remote_waits_for_the_server(tmp_path: Path, own_server: Server) -> None:
    options = ("--fsync", "remote", "--writeback-delay", "3600")
    with mounted(tmp_path, own_server, None, *options) as mount:
        pod = mount.pod()
        (pod / "d").mkdir()
        own_server.reset_calls()
        with (pod / "d/f").open("w") as file:
            file.write("x")
            file.flush()
            os.fsync(file.fileno())
            assert own_server.calls()["POST /v1/file/upload"] == 1
            assert os.getxattr(pod / "d/f", "user.cpodfs.state") in (b"uploaded", b"clean")
            own_server.faults(error_rate=1.0, match="upload")
            file.write("y")
            file.flush()
            with pytest.raises(OSError) as caught:
                os.fsync(file.fileno())
            assert caught.value.errno == errno.EIO
        own_server.faults(error_rate=0)
        mount.remount(wipe=True)
        assert (pod / "d/f").read_text() == "xy"


def test_a_cold_walk_lists_directories_in_parallel(tmp_path: Path, own_server: Server) -> None:
    with mounted(tmp_path, own_server) as mount:
        pod = mount.pod()
        sh("for a in 1 2 3 4 5; do for b in 1 2 3 4 5; do mkdir -p $a/$b/c; done; done", pod)
        mount.remount(wipe=True)
        own_server.faults(latency_s=0.25)
        own_server.reset_calls()
        listed = run("ls", "-lR", pod)
        calls = own_server.calls()["GET /v1/dir/ls"]
        assert calls == 1 + 5 + 25 + 25, "every directory once"
        assert listed.count("total") == calls
        assert own_server.stats()["concurrency_max"] > 2


def test_one_look_costs_one_call(tmp_path: Path, own_server: Server) -> None:
    with mounted(tmp_path, own_server) as mount:
        pod = mount.pod()
        sh("for a in 1 2 3 4 5; do mkdir -p d/$a/b; done", pod)
        mount.remount(wipe=True)
        run("ls", "-l", pod)
        own_server.reset_calls()
        run("ls", "-l", pod / "d")
        assert own_server.calls() == {"GET /v1/dir/ls": 1}


def test_what_is_lost_in_the_cache_is_named_and_the_servers_copy_shown(
    tmp_path: Path, own_server: Server
) -> None:
    with mounted(tmp_path, own_server, None, "--writeback-delay", "3600") as mount:
        pod = mount.pod()
        (pod / "f").write_text("at the server")
        mount.sync()
        (pod / "f").write_text("only here")
        (pod / "new").write_text("only here")
        mount.kill()
        for file in (next(mount.cache.iterdir()) / "content").rglob("*"):
            if file.is_file():
                file.unlink()
        mount.start()
        until(lambda: len(mount.status()["failed"]) == 2)
        assert (pod / "f").read_text() == "at the server"
        (aside,) = pod.glob("f (damaged *)")
        failed = {Path(one["path"]).name: one["error"] for one in mount.status()["failed"]}
        assert set(failed) == {aside.name, "new"}
        assert "9 bytes were written, 0 are left" in failed["new"]
        (pod / "new").write_text("written anew")
        aside.unlink()
        mount.sync()
        mount.remount(wipe=True)
        found = {path.name: path.read_text() for path in pod.iterdir()}
        assert found == {"f": "at the server", "new": "written anew"}


def test_a_second_driver_on_the_same_cache_is_refused(mount: Mount, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    command = [str(other) if part == str(mount.point) else part for part in mount.command()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1
    assert "mounted already" in done.stderr
    assert str(mount.pid) in done.stderr
