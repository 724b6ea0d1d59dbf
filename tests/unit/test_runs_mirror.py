"""The copy of a run in its pod: follows the spool, heals, and is not led astray."""

from __future__ import annotations

import os
import shutil

import pytest

from cpodfs.runs import state
from cpodfs.runs.mirror import Follower, Mirror, make_folder
from cpodfs.runs.supervisor import publish


@pytest.fixture
def place(tmp_path):
    spool, mount = tmp_path / "spool", tmp_path / "mount"
    spool.mkdir()
    (mount / "pod").mkdir(parents=True)
    record = state.new_record("id", "pod", ["x"], "logs/id")
    state.end_record(record, state.LOST, "test")
    state.write_record(spool, record, durable=False)
    (spool / "stdout.log").write_bytes(b"one\n")
    (spool / "stderr.log").write_bytes(b"")
    return spool, mount, mount / "pod" / "logs" / "id"


def mirror_of(spool, mount) -> Mirror:
    return Mirror(str(spool), str(mount), "pod", "logs/id")


def test_follows(place):
    spool, mount, copy = place
    mirror = mirror_of(spool, mount)
    mirror.step()
    assert (copy / "stdout.log").read_bytes() == b"one\n"
    with open(spool / "stdout.log", "ab") as file:
        file.write(b"two\n")
    mirror.step()
    assert (copy / "stdout.log").read_bytes() == b"one\ntwo\n"
    mirror.close()
    assert sorted(os.listdir(copy)) == ["run.json", "stderr.log", "stdout.log"]


@pytest.mark.parametrize(
    "damaged", [b"", b"on", b"one\nmore than there was", b"\0\0\0\n", b"one\n"]
)
def test_heals_a_copy_that_a_dead_driver_left(place, damaged):
    spool, mount, copy = place
    copy.mkdir(parents=True)
    (copy / "stdout.log").write_bytes(damaged)
    mirror = mirror_of(spool, mount)
    mirror.step()
    mirror.close()
    assert (copy / "stdout.log").read_bytes() == b"one\n"


def test_a_copy_that_agrees_is_not_written_again(place):
    spool, mount, copy = place
    mirror = mirror_of(spool, mount)
    mirror.step()
    os.utime(copy / "stdout.log", ns=(1, 1))
    mirror.drop()
    mirror.step()
    mirror.close()
    assert (copy / "stdout.log").stat().st_mtime_ns == 1


@pytest.mark.parametrize("gone", ["logs", "logs/id", "logs/id/stdout.log"])
def test_a_deleted_copy_comes_back(place, gone):
    spool, mount, copy = place
    mirror = mirror_of(spool, mount)
    mirror.step()
    target = mount / "pod" / gone
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(OSError, match="deleted"):
        mirror.step()
    mirror.drop()
    mirror.step()
    mirror.close()
    assert (copy / "stdout.log").read_bytes() == b"one\n"


def test_never_makes_the_pod(place):
    spool, mount, _ = place
    shutil.rmtree(mount / "pod")
    with pytest.raises(FileNotFoundError):
        mirror_of(spool, mount).step()
    assert os.listdir(mount) == []


@pytest.mark.parametrize("link", ["logs", "logs/id", "logs/id/stdout.log"])
def test_follows_no_link_out_of_the_pod(place, tmp_path, link):
    spool, mount, _ = place
    outside = tmp_path / "outside"
    outside.mkdir()
    at = mount / "pod" / link
    at.parent.mkdir(parents=True, exist_ok=True)
    at.symlink_to(outside / "victim" if link.endswith(".log") else outside)
    with pytest.raises(OSError):
        mirror_of(spool, mount).step()
    assert os.listdir(outside) == []


def test_make_folder_refuses_a_file_in_its_way(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(NotADirectoryError):
        make_folder(str(tmp_path), ["a", "b"])


def test_no_descriptor_is_left_behind(place):
    spool, mount, _ = place
    before = len(os.listdir("/proc/self/fd"))
    mirror = mirror_of(spool, mount)
    mirror.step()
    mirror.close()
    shutil.rmtree(mount / "pod")
    with pytest.raises(FileNotFoundError):
        mirror.step()
    mirror.drop()
    assert len(os.listdir("/proc/self/fd")) == before


def test_follower_gives_up_in_time(place):
    spool, mount, _ = place
    shutil.rmtree(mount / "pod")
    follower = Follower(mirror_of(spool, mount))
    follower.start()
    assert follower.finish(0.05) is False
    assert not follower.is_alive()
    assert str(mount / "pod") in follower.problem


def test_publish_completes_the_copy_and_notes_it(place):
    spool, mount, copy = place
    (spool / "stderr.log").unlink()
    assert publish(str(spool), str(mount), 5.0)
    assert state.read_record(spool)["private"]["published"]
    assert sorted(os.listdir(copy)) == ["run.json", "stderr.log", "stdout.log"]
    assert b'"state": "lost"' in (copy / "run.json").read_bytes()
    assert b"private" not in (copy / "run.json").read_bytes()


def test_publish_without_a_pod(place):
    spool, mount, _ = place
    shutil.rmtree(mount / "pod")
    assert not publish(str(spool), str(mount), 0.05)
    private = state.read_record(spool)["private"]
    assert private["published"] is False
    assert str(mount / "pod") in private["problem"]
