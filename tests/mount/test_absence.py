"""A server that says "not there" of what is: nothing cached is lost, or hidden, on its word alone.

The development server says it in the words of a real FairOS-DFS that cannot read its chunks.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.harness import Mount, Server, mounted, sh, tree
from tests.mount.hostile import Answer, Hostile
from tests.mount.test_conflicts import elsewhere
from tests.patience import until

TTL_S = 0.3
QUICK = ("--writeback-delay", "0.1", "--timeout", "5", "--stall", "3", "--attr-ttl", str(TTL_S))
FILES = 40


@pytest.fixture
def quick(tmp_path: Path, own_server: Server) -> Iterator[Mount]:
    """A mount whose listings are soon out of date."""
    with mounted(tmp_path, own_server, None, *QUICK) as mount:
        yield mount


def filled(mount: Mount, name: str = "pod") -> dict[str, str]:
    """A pod with 40 cached files, uploaded; its tree."""
    pod = mount.pod(name)
    sh(f"mkdir d; for i in $(seq {FILES}); do echo content $i > d/$i; done; echo top > top", pod)
    mount.sync()
    return tree(pod)


def state(path: Path) -> str:
    return os.getxattr(path, "user.cpodfs.state").decode()


def listings(mount: Mount) -> int:
    calls = mount.server.calls()
    return calls.get("GET /v1/dir/ls", 0) + calls.get("GET /v1/pod/ls", 0)


def look_often(mount: Mount, pod: Path, known: dict[str, str], times: int = 12) -> None:
    """Until the server has been asked for so many listings, all is as it was."""
    mount.server.reset_calls()

    def asked() -> bool:
        assert tree(pod) == known
        os.listdir(mount.point)
        return listings(mount) >= times

    until(asked)


def all_is_well(mount: Mount) -> bool:
    os.listdir(mount.point)
    for pod in mount.point.iterdir():
        tree(pod)
    status = mount.status()
    counts = ("doubtful_count", "alarms", "pending", "deletions", "deletions_doubtful")
    return not any(status[name] for name in counts)


def test_cached_files_stay_while_the_server_cannot_read(quick: Mount) -> None:
    known = filled(quick)
    for seed in range(3):
        quick.server.faults(read_failure_rate=0.4, seed=seed)
        look_often(quick, quick.point / "pod", known)
    quick.server.faults()
    until(lambda: all_is_well(quick))
    assert tree(quick.point / "pod") == known
    assert "deleted elsewhere, the user says" not in quick.logged()
    quick.remount(wipe=True)
    assert tree(quick.point / "pod") == known


def test_an_empty_list_of_pods_is_an_alarm(quick: Mount) -> None:
    known = filled(quick)
    pod = quick.point / "pod"
    quick.server.faults(pods_empty=True)
    look_often(quick, pod, known)
    until(lambda: quick.status()["alarms"] == [{"path": "", "missing": 1, "known": 1}])
    assert state(pod / "d/1") == "doubtful"
    assert "has not shown pod since" in os.getxattr(pod / "d/1", "user.cpodfs.error").decode()
    shown = quick.cli("status", str(pod)).stdout
    assert "1 of 1 object not shown by the server; all is kept" in re.sub(r"\s+", " ", shown)
    assert quick.logged().count("alarm: ") == 1
    quick.server.faults()
    until(lambda: all_is_well(quick))
    until(lambda: state(pod / "d/1") == "clean")


def test_a_server_restarted_empty_takes_nothing_away(quick: Mount) -> None:
    """Reading, writing, deleting and renaming go on; all of it arrives when the server is itself."""
    filled(quick)
    pod = quick.point / "pod"
    quick.server.faults(empty_store=True)
    until(lambda: os.listdir(quick.point) and quick.status()["alarms"])
    sh("echo new > d/new; echo changed > d/1; rm d/2; mv d/3 d/three; mkdir e; echo e > e/e", pod)
    expected = tree(pod)
    look_often(quick, pod, expected)
    assert quick.stop() == 1, "not all could be uploaded"
    quick.start()
    look_often(quick, pod, expected)
    assert quick.cli("sync", str(pod), "--stall", "1", check=False).returncode == 1
    assert quick.status()["pending"]
    quick.server.faults()
    until(lambda: all_is_well(quick))
    quick.sync()
    assert tree(pod) == expected
    quick.remount(wipe=True)
    assert tree(pod) == expected


def test_doctor_names_what_is_kept(quick: Mount) -> None:
    filled(quick)
    quick.server.faults(pods_empty=True)
    until(lambda: os.listdir(quick.point) and quick.status()["alarms"])

    def found() -> str:
        options = (*("--server", quick.server.url, "--user", quick.user, "--json"),)
        where = ("--cache-dir", str(quick.cache), "--password-file", str(quick.password_file))
        said = quick.cli("doctor", *options, *where, check=False).stdout
        findings = {f["name"]: f["text"] for f in json.loads(said)}
        return findings.get("deletions", "")

    assert "1 object not shown" in found()
    assert quick.stop() == 0
    assert "1 object not shown" in found(), "from the cache, without a driver"


@pytest.mark.parametrize("how", ["refresh", "looking"])
def test_one_file_deleted_elsewhere_is_soon_gone(quick: Mount, how: str) -> None:
    filled(quick)
    folder = quick.point / "pod/d"
    elsewhere(quick, lambda dfs: dfs.delete_file("pod", "/d/7"))
    if how == "refresh":
        quick.cli("refresh", str(folder))
    else:
        until(lambda: "7" not in os.listdir(folder))
    assert sorted(os.listdir(folder)) == sorted(str(i) for i in range(1, FILES + 1) if i != 7)
    assert "alarm" not in quick.logged()


def test_deletions_are_accepted_when_the_user_says_so(quick: Mount) -> None:
    """What is only here goes to the server again: the pod is made anew for it, and only then."""
    filled(quick)
    pod = quick.point / "pod"
    elsewhere(quick, lambda dfs: dfs.delete_pod("pod"))
    until(lambda: os.listdir(quick.point) and quick.status()["alarms"])
    (pod / "d/mine").write_text("mine")
    (quick.point / "other").mkdir()
    quick.cli("sync", str(pod), "--stall", "1", check=False)
    assert elsewhere(quick, lambda dfs: dfs.pods()).own == (), "nothing is added to a doubtful list"
    assert len(os.listdir(pod / "d")) == FILES + 1
    quick.cli("refresh", "--accept-deletions", str(pod))
    assert os.listdir(pod / "d") == ["mine"]
    quick.sync()
    quick.remount(wipe=True)
    assert (pod / "d/mine").read_text() == "mine"
    assert os.listdir(pod) == ["d"]
    assert sorted(os.listdir(quick.point)) == ["other", "pod"]


def test_what_is_not_here_cannot_be_read_and_is_not_deleted(quick: Mount) -> None:
    known = filled(quick)
    quick.remount(wipe=True)
    pod = quick.point / "pod"
    assert len(os.listdir(pod / "d")) == FILES
    quick.server.faults(not_there=["pod/d/5"])
    with pytest.raises(OSError) as caught:
        (pod / "d/5").read_text()
    assert caught.value.errno == errno.EIO
    assert "5" in os.listdir(pod / "d")
    assert (pod / "d/6").read_text() == "content 6\n"
    quick.server.faults()
    until(lambda: _readable(pod / "d/5"))
    assert tree(pod) == known


def _readable(path: Path) -> bool:
    try:
        return path.read_text() == "content 5\n"
    except OSError:
        return False


def test_what_is_doubtful_can_be_deleted_renamed_and_changed(quick: Mount) -> None:
    """Whatever the server shows later: the file that was deleted here is deleted there then."""
    filled(quick)
    pod = quick.point / "pod"
    quick.server.faults(not_there=["pod/d/1", "pod/d/2", "pod/d/3"])
    until(lambda: os.listdir(pod / "d") and quick.status()["doubtful_count"] == 3)
    sh("rm d/1; mv d/2 d/two; echo changed > d/3", pod)
    until(lambda: not quick.status()["pending"] and not quick.status()["deletions"])
    expected = tree(pod)
    quick.server.faults()
    quick.cli("refresh", str(pod / "d"))
    quick.sync()
    assert tree(pod) == expected
    quick.remount(wipe=True)
    assert tree(pod) == expected


def test_a_doubtful_file_that_returns_changed_is_a_new_version(quick: Mount) -> None:
    filled(quick)
    pod = quick.point / "pod"
    quick.server.faults(not_there=["pod/d/1"])
    until(lambda: os.listdir(pod / "d") and quick.status()["doubtful_count"] == 1)
    quick.server.faults()

    async def change(dfs) -> None:
        async def body():
            yield b"theirs, longer"

        await dfs.upload("pod", "/d", "1", body, 14)

    elsewhere(quick, change)
    quick.cli("refresh", str(pod / "d"))
    assert (pod / "d/1").read_text() == "theirs, longer"
    assert quick.status()["doubtful_count"] == 0


def test_a_doubtful_file_is_not_evicted(tmp_path: Path, own_server: Server) -> None:
    # Of what Swarm has, which would not be evicted either, this server says nothing.
    ignorant = {"error_rate": 1.0, "status": 404, "match": "/v1/file/status"}
    own_server.faults(**ignorant)
    with mounted(tmp_path, own_server, None, *QUICK, "--cache-size", "1MB") as mount:
        pod = mount.pod()
        (pod / "last copy").write_bytes(b"l" * 400_000)
        sh("for i in 1 2 3 4 5; do echo > $i; done", pod)
        mount.sync()
        own_server.faults(not_there=["pod/last copy"], **ignorant)
        until(lambda: os.listdir(pod) and mount.status()["doubtful_count"])
        (pod / "a").write_bytes(b"a" * 700_000)
        (pod / "b").write_bytes(b"b" * 700_000)
        mount.sync()
        until(lambda: mount.status()["cache_use"]["clean"] < 1_000_000)
        assert (pod / "last copy").read_bytes() == b"l" * 400_000


def test_a_mount_begins_though_the_server_knows_no_such_user(
    tmp_path: Path, own_server: Server
) -> None:
    """It says so, too, when it cannot read what it has of him."""
    hostile = Hostile(own_server)
    unknown = Answer(b'{"message": "user login: no user available", "code": 404}', 404)
    with mounted(tmp_path, hostile, own_server.signup(), *QUICK) as mount:
        known = filled(mount)
        assert mount.stop() == 0
        hostile.answer("POST /v2/user/login", lambda _request, _truth: unknown)
        mount.start()
        assert tree(mount.point / "pod") == known
    hostile.stop()
