"""A cache that was damaged while no driver had it: nothing wrong is shown as right, or uploaded."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cpodfs.cache.schema import CONTENT
from tests.mount.harness import Child, Mount, Server, mounted
from tests.mount.world import Api
from tests.patience import PATIENCE_S, until

LATER = ("--writeback-delay", "3600", "--attr-ttl", "3600")
OLD = bytes(range(1, 201)) * 180
"""36,000 bytes, none of them zero."""


def data_file(mount: Mount, path: Path) -> Path:
    ino = path.stat().st_ino
    return next(mount.cache.iterdir()) / "content" / f"{ino & 0xFF:02x}" / str(ino)


def mount_fails(mount: Mount) -> str:
    """What a mount says that is refused."""
    done = subprocess.run(
        mount.command(), capture_output=True, text=True, env=mount.env, timeout=PATIENCE_S
    )
    assert done.returncode != 0
    return done.stderr


def _zeros(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def _one_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _shorter(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _longer(file: Path) -> None:
    with file.open("ab") as opened:
        opened.write(b"tail")


def _empty(file: Path) -> None:
    os.truncate(file, 0)


def _gone(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("damage", [_zeros, _one_byte, _shorter, _longer, _empty, _gone])
def test_a_clean_file_that_was_damaged_is_fetched_again(
    tmp_path: Path, own_server: Server, damage: Callable[[Path], None]
) -> None:
    with mounted(tmp_path, own_server, None, *LATER) as mount:
        pod = mount.pod()
        for name in ("read", "appended", "cut"):
            (pod / name).write_bytes(OLD)
        mount.sync()
        files = [data_file(mount, pod / name) for name in ("read", "appended", "cut")]
        mount.kill()
        for file in files:
            damage(file)
        mount.start()
        with (pod / "appended").open("ab") as opened:
            opened.write(b"a line\n")
        os.truncate(pod / "cut", 20_000)
        wanted = {"read": OLD, "appended": OLD + b"a line\n", "cut": OLD[:20_000]}
        assert {name: (pod / name).read_bytes() for name in wanted} == wanted
        mount.sync()
        api = Api(own_server, mount)
        assert {name: api.read("pod", name) for name in api.sizes("pod")} == wanted


@pytest.mark.parametrize("damage", [_shorter, _empty, _gone])
def test_a_pending_file_that_was_damaged_is_named_and_not_uploaded(
    tmp_path: Path, own_server: Server, damage: Callable[[Path], None]
) -> None:
    with mounted(tmp_path, own_server, None, *LATER) as mount:
        pod = mount.pod()
        (pod / "f").write_bytes(OLD)
        mount.sync()
        (pod / "f").write_bytes(OLD[::-1])
        file = data_file(mount, pod / "f")
        mount.kill()
        damage(file)
        mount.start()
        until(lambda: mount.status()["failed"])
        (failed,) = mount.status()["failed"]
        assert "f (damaged" in failed["path"]
        done = mount.cli("sync", str(mount.point), check=False)
        assert done.returncode == 1
        assert "f (damaged" in done.stderr
        assert (pod / "f").read_bytes() == OLD
        api = Api(own_server, mount)
        assert {name: api.read("pod", name) for name in api.sizes("pod")} == {"f": OLD}


def test_content_lost_while_its_upload_is_in_doubt_is_the_servers(
    tmp_path: Path, own_server: Server
) -> None:
    with mounted(tmp_path, own_server, None, "--writeback-delay", "0.02") as mount:
        pod = mount.pod()
        (pod / "f").write_bytes(OLD)
        mount.sync()
        own_server.faults(drop_rate=1.0, match="/v1/file")
        with (pod / "f").open("ab") as opened:
            opened.write(b"one line\n")
        until(lambda: mount.status()["errors"])
        file = data_file(mount, pod / "f")
        mount.kill()
        file.unlink()
        own_server.faults()
        api = Api(own_server, mount)
        api.sizes("pod")
        stored = api.read("pod", "f")
        assert stored in (OLD, OLD + b"one line\n")
        mount.start()
        assert (pod / "f").read_bytes() == stored
        with (pod / "f").open("ab") as opened:
            opened.write(b"another\n")
        until(lambda: api.sizes("pod")["f"] == len(stored + b"another\n"))
        assert api.read("pod", "f") == stored + b"another\n"


@pytest.mark.parametrize("lost", [["meta.db-wal"], ["meta.db"], ["meta.db", "meta.db-wal"]])
def test_a_cache_without_its_journal_says_so_and_keeps_what_it_had(
    tmp_path: Path, own_server: Server, lost: list[str]
) -> None:
    with mounted(tmp_path, own_server, None, *LATER) as mount:
        pod = mount.pod()
        (pod / "stored").write_bytes(OLD)
        mount.remount()  # so that not all of the journal is in the -wal
        (pod / "pending").write_bytes(b"only here")
        mount.kill()
        (folder,) = mount.cache.iterdir()
        for name in lost:
            (folder / name).unlink()
        mount.start(warned=True)
        assert "lost or older than its contents" in "".join(mount.notices)
        assert (pod / "stored").read_bytes() == OLD
        assert mount.stop() == 0
        checked = mount.cli("cache", "check", "--folder", str(folder), check=False)
        assert checked.returncode == 1
        assert "unclaimed" in checked.stdout
        mount.cli("cache", "rescue", "--folder", str(folder), str(tmp_path / "out"))
        rescued = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
        assert b"only here" in rescued
        mount.start(warned=True)
        api = Api(own_server, mount)
        assert list(api.sizes("pod")) == ["stored"]
        assert api.read("pod", "stored") == OLD


def test_an_older_journal_in_its_place_is_noticed(tmp_path: Path, own_server: Server) -> None:
    with mounted(tmp_path, own_server, None, *LATER) as mount:
        pod = mount.pod()
        (pod / "f").write_bytes(OLD)
        assert mount.stop() == 0
        (folder,) = mount.cache.iterdir()
        shutil.copy(folder / "meta.db", tmp_path / "backup")
        mount.start()
        (pod / "f").write_bytes(OLD[::-1])
        (pod / "g").write_bytes(OLD)
        assert mount.stop() == 0
        shutil.copy(tmp_path / "backup", folder / "meta.db")
        mount.start(warned=True)
        assert "lost or older than its contents" in "".join(mount.notices)
        mount.sync()
        mount.cli("refresh", str(pod))
        api = Api(own_server, mount)
        assert {name: api.read("pod", name) for name in api.sizes("pod")} == {
            "f": OLD[::-1],
            "g": OLD,
        }
        assert {path.name: path.read_bytes() for path in pod.iterdir()} == {
            "f": OLD[::-1],
            "g": OLD,
        }


def test_a_damaged_page_is_refused_or_harmless(tmp_path: Path, own_server: Server) -> None:
    with mounted(tmp_path, own_server, None, *LATER) as mount:
        pod = mount.pod()
        for number in range(20):
            (pod / f"f{number}").write_bytes(b"content %d" % number)
        assert mount.stop() == 0
        (folder,) = mount.cache.iterdir()
        database = folder / "meta.db"
        good = database.read_bytes()
        refused = 0
        for page in range(0, len(good), 4096):
            bad = bytearray(good)
            bad[page + 8 : page + 4096] = b"\xa5" * 4088
            database.write_bytes(bad)
            said = mount_fails(mount) if page < 4096 else _serves_or_says(mount, pod)
            if said:
                refused += 1
                assert "Traceback" not in said
                assert f"{database}: not a usable cache" in said
                assert "cpodfs cache rescue" in said
            assert "Traceback" not in mount.logged()
        assert refused > 1
        database.write_bytes(good)
        mount.start(warned=True)  # as a database that is older than some starts
        assert len(list(pod.iterdir())) == 20


def _serves_or_says(mount: Mount, pod: Path) -> str:
    """Why it does not start; nothing if it does, and shows what it should."""
    try:
        mount.start(warned=True)
    except AssertionError:
        assert mount.process is not None
        mount.wait()
        return "".join(mount.notices)
    assert {path.read_bytes() for path in pod.iterdir()} == {b"content %d" % n for n in range(20)}
    assert mount.stop() == 0
    return ""


def test_what_is_not_believed_does_not_become_pending_by_being_emptied(
    tmp_path: Path, own_server: Server
) -> None:
    """Killed while it empties a file that was damaged, as it waits for the disk, the driver must not
    upload the damage next time."""
    slow = tmp_path / "sitecustomize.py"
    slow.write_text(
        "import os, time\n"
        "def truncate(fd, size, _real=os.ftruncate):\n"
        "    if size == 0 and '/content/' in os.readlink(f'/proc/self/fd/{fd}'):\n"
        "        time.sleep(3600)\n"
        "    _real(fd, size)\n"
        "os.ftruncate = truncate\n"
    )
    with mounted(tmp_path, own_server, None, *LATER) as mount:
        pod = mount.pod()
        (pod / "f").write_bytes(OLD)
        mount.sync()
        file = data_file(mount, pod / "f")
        mount.kill()
        _zeros(file)
        usual, mount.env = mount.env, mount.env | {"PYTHONPATH": str(tmp_path)}
        mount.start()
        with Child([sys.executable, "-c", f"open({str(pod / 'f')!r}, 'w')"]) as writer:
            until(lambda: "dirty" in _state_of(mount, file))
            mount.kill()
            writer.wait()
        mount.env = usual
        mount.start()
        mount.sync()
        assert Api(own_server, mount).read("pod", "f") in (OLD, b"")


def _state_of(mount: Mount, file: Path) -> str:
    """ "dirty" once the journal of a running driver says so of a data file's inode."""
    with tempfile.TemporaryDirectory() as copy:
        for journal in next(mount.cache.iterdir()).glob("meta.db*"):
            shutil.copy(journal, copy)
        with contextlib.closing(sqlite3.connect(Path(copy) / "meta.db")) as database:
            query = "SELECT dirty FROM inode WHERE ino = ?"
            (dirty,) = database.execute(query, (int(file.name),)).fetchone()
    return "dirty" if dirty & CONTENT else ""


def test_a_data_file_that_cannot_be_looked_at_is_named_and_sent_when_it_can(
    tmp_path: Path, own_server: Server
) -> None:
    with mounted(tmp_path, own_server, None, *LATER) as mount:
        pod = mount.pod()
        (pod / "f").write_bytes(OLD)
        shard = data_file(mount, pod / "f").parent
        shard.rename(tmp_path / "shard")
        shard.touch()  # so that each look at what is in it is an error, as on a disk that fails
        done = mount.cli("sync", str(mount.point), check=False)
        assert done.returncode == 1
        assert "pod/f: [Errno 20] Not a directory" in done.stderr
        assert "Traceback" not in mount.logged()
        shard.unlink()
        (tmp_path / "shard").rename(shard)
        mount.sync()
        assert Api(own_server, mount).read("pod", "f") == OLD


@pytest.mark.parametrize("damage", [_zeros, _one_byte, _longer, _shorter, _gone])
def test_a_clean_file_that_was_damaged_is_not_sent_over_another(
    tmp_path: Path, own_server: Server, damage: Callable[[Path], None]
) -> None:
    """The server renames nothing over a file, so the bytes are sent: if they are the right ones."""
    with mounted(tmp_path, own_server, None, *LATER) as mount:
        pod = mount.pod()
        (pod / "f").write_bytes(OLD)
        (pod / "g").write_bytes(b"older")
        mount.sync()
        (pod / "f").rename(pod / "g")
        file = data_file(mount, pod / "g")
        mount.kill()
        damage(file)
        mount.start()
        mount.sync()
        api = Api(own_server, mount)
        assert {name: api.read("pod", name) for name in api.sizes("pod")} == {"g": OLD}
        assert (pod / "g").read_bytes() == OLD


def test_a_clean_file_that_was_damaged_is_not_sent_where_the_server_has_it_no_more(
    tmp_path: Path, own_server: Server
) -> None:
    with mounted(tmp_path, own_server, None, *LATER) as mount:
        pod = mount.pod()
        (pod / "f").write_bytes(OLD)
        mount.sync()
        (pod / "f").rename(pod / "g")
        file = data_file(mount, pod / "g")
        mount.kill()
        _one_byte(file)
        api = Api(own_server, mount)
        api.sizes("pod")
        api.call("DELETE", "/v1/file/delete", podName="pod", filePath="/f")
        mount.start()
        mount.cli("refresh", "--accept-deletions", str(pod))
        mount.sync()
        assert not api.sizes("pod")
        assert not list(pod.iterdir())
        assert "another content than it had" in mount.logged()
        (kept,) = next(mount.cache.iterdir()).glob("unclaimed/*")
        assert len(kept.read_bytes()) == len(OLD)
        assert "Traceback" not in mount.logged()


def test_a_clean_file_that_was_damaged_is_not_read_while_it_waits_to_be_sent(
    tmp_path: Path, own_server: Server
) -> None:
    with mounted(tmp_path, own_server, None, *LATER) as mount:
        pod = mount.pod()
        (pod / "f").write_bytes(OLD)
        (pod / "g").write_bytes(b"older")
        mount.sync()
        (pod / "f").rename(pod / "g")
        file = data_file(mount, pod / "g")
        mount.kill()
        _one_byte(file)
        own_server.faults(drop_rate=1.0, match="/v1/file/(stat|upload|delete|rename)")
        mount.start()
        until(lambda: mount.status()["errors"])
        assert (pod / "g").read_bytes() == OLD
        own_server.faults()
        mount.sync()
        assert (pod / "g").read_bytes() == OLD
