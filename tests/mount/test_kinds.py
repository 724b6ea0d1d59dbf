"""A file here and a directory of that name elsewhere, or the reverse: both are kept, always."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from cpodfs.parts import MIN_FRESH_S
from tests.mount.harness import Mount, Server, mounted, sh
from tests.mount.test_conflicts import SLOW, _plain, elsewhere, put


@pytest.fixture
def slow(tmp_path: Path, own_server: Server) -> Iterator[Mount]:
    """A mount that uploads only when told to."""
    with mounted(tmp_path, own_server, None, *SLOW) as mount:
        yield mount


def tree(pod: Path) -> dict[str, str]:
    """Contents of files and "dir" by path, conflict copies under ``name (conflict)``."""
    found = {}
    for path in sorted(pod.rglob("*")):
        name = "/".join(map(_plain, path.relative_to(pod).parts))
        assert name not in found, f"twice: {path}"
        found[name] = "dir" if path.is_dir() else path.read_text()
    return found


def make_folder(mount: Mount, path: str) -> None:
    elsewhere(mount, lambda dfs: dfs.mkdir("pod", path))


@contextmanager
def uploads_refused(mount: Mount, server: Server) -> Iterator[None]:
    """One was tried, and it is not known whether the server has taken it; nor does it the next ones."""
    server.faults(error_rate=1.0, match="upload")
    mount.cli("sync", str(mount.point), "--stall", "1", check=False)
    yield
    server.faults()


def same_with_an_empty_cache(mount: Mount, pod: Path, expected: dict[str, str]) -> None:
    mount.sync()
    assert tree(pod) == expected
    assert mount.status()["pending"] == mount.status()["deletions"] == 0
    mount.remount(wipe=True)
    assert tree(pod) == expected
    assert "Traceback" not in mount.logged()


@pytest.mark.parametrize("refused", [False, True])
def test_a_file_here_and_a_directory_there(slow: Mount, own_server: Server, refused: bool) -> None:
    pod = slow.pod()
    slow.sync()
    (pod / "n").write_text("ours")
    with uploads_refused(slow, own_server) if refused else nullcontext():
        make_folder(slow, "/n")
    put(slow, "/n", "f", b"theirs")
    for _ in range(2):  # it may have been tried again, and be there beside their directory
        slow.cli("refresh", str(pod))
        slow.sync()
    expected = {"n": "dir", "n/f": "theirs", "n (conflict)": "ours"}
    same_with_an_empty_cache(slow, pod, expected)


def test_an_upload_goes_beside_a_directory_that_was_not_seen(slow: Mount) -> None:
    """The server takes a file where it has a directory of that name, and shows both."""
    pod = slow.pod()
    slow.sync()
    (pod / "n").write_text("ours")
    slow.cli("refresh", str(pod))
    make_folder(slow, "/n")
    put(slow, "/n", "f", b"theirs")
    for _ in range(2):
        slow.sync()
        slow.cli("refresh", str(pod))
    same_with_an_empty_cache(slow, pod, {"n": "dir", "n/f": "theirs", "n (conflict)": "ours"})


@pytest.mark.parametrize("refused", [False, True])
def test_a_directory_here_and_a_file_there(slow: Mount, own_server: Server, refused: bool) -> None:
    pod = slow.pod()
    slow.sync()
    sh("mkdir n; echo ours > n/f", pod)
    if refused:
        own_server.faults(error_rate=1.0, match="mkdir|upload")
        slow.cli("sync", str(slow.point), "--stall", "1", check=False)
        own_server.faults()
    put(slow, "/", "n", b"theirs")
    slow.cli("refresh", str(pod))
    slow.sync()
    slow.cli("refresh", str(pod))
    expected = {"n": "theirs", "n (conflict)": "dir", "n (conflict)/f": "ours\n"}
    if refused and (pod / "n").is_dir():  # it was tried again, and was there before their file
        expected = {"n": "dir", "n/f": "ours\n", "n (conflict)": "theirs"}
    same_with_an_empty_cache(slow, pod, expected)


def test_a_file_there_beside_a_directory_that_the_server_has_from_here(slow: Mount) -> None:
    """Their file was invisible here, for ever."""
    pod = slow.pod()
    sh("mkdir n; echo ours > n/f", pod)
    slow.sync()
    put(slow, "/", "n", b"theirs")
    slow.cli("refresh", str(pod))
    slow.cli("refresh", str(pod))
    expected = {"n": "dir", "n/f": "ours\n", "n (conflict)": "theirs"}
    same_with_an_empty_cache(slow, pod, expected)


def test_a_directory_replaced_there_by_a_file(slow: Mount) -> None:
    pod = slow.pod()
    sh("mkdir n; echo ours > n/f", pod)
    slow.sync()
    elsewhere(slow, lambda dfs: dfs.rmdir("pod", "/n", check=False))
    put(slow, "/", "n", b"theirs")
    (pod / "n/g").write_text("new here")
    slow.cli("refresh", str(pod))
    slow.sync()
    slow.cli("refresh", str(pod))
    found = tree(pod)
    assert found["n"] == "theirs"
    assert found["n (conflict)/g"] == "new here"
    same_with_an_empty_cache(slow, pod, found)


def test_a_pod_made_again_while_it_holds_what_cannot_be_shown(slow: Mount) -> None:
    pod = slow.pod()
    (pod / "f").write_text("old")
    slow.sync()
    put(slow, "/", ".run", b"a file that only the server shows")
    slow.cli("refresh", str(pod))
    sh("rm -r pod; mkdir pod; echo new > pod/g", slow.point)
    slow.sync()
    assert [path.name for path in slow.point.iterdir()] == ["pod"]
    same_with_an_empty_cache(slow, pod, {"g": "new\n"})


def test_rm_r_keeps_what_was_changed_there(tmp_path: Path, own_server: Server) -> None:
    """As ``rm`` of the file alone does."""
    with mounted(tmp_path, own_server, None, *SLOW, "--attr-ttl", "0.1") as mount:
        pod = mount.pod()
        sh("mkdir -p d/e; echo old > d/f; echo old > d/e/g; echo old > d/e/h", pod)
        mount.sync()
        mount.remount()
        sh("find .", pod)
        put(mount, "/d", "f", b"newer version")
        put(mount, "/d/e", "g", b"newer version, too")
        put(mount, "/d/e", "new", b"a new file")
        own_server.faults(latency_s=5.0, match="dir/ls")  # rm must not see what is new
        sh("rm -r d", pod)
        own_server.faults()
        time.sleep(MIN_FRESH_S)  # what was listed just before a deletion is not looked at again
        mount.cli("sync", str(mount.point), check=False)
        expected = {
            "d": "dir",
            "d/f": "newer version",
            "d/e": "dir",
            "d/e/g": "newer version, too",
            "d/e/new": "a new file",
        }
        same_with_an_empty_cache(mount, pod, expected)


def test_a_listing_that_arrives_after_its_directory_was_removed(
    tmp_path: Path, own_server: Server
) -> None:
    """It was merged into what has no name; the deletion waited for its children, for ever."""
    options = ("--writeback-delay", "0.1", "--attr-ttl", "1")
    with mounted(tmp_path, own_server, None, *options) as mount:
        pod = mount.pod()
        sh("mkdir d", pod)
        mount.sync()
        put(mount, "/d", "theirs", b"theirs")
        time.sleep(1)  # the age at which a listing is renewed
        own_server.faults(latency_s=3.0, match="dir/ls")
        sh("ls d; rmdir d", pod)
        own_server.faults()
        mount.cli("sync", str(mount.point), check=False)
        same_with_an_empty_cache(mount, pod, {"d": "dir", "d/theirs": "theirs"})


def test_directories_made_again_under_load(tmp_path: Path, own_server: Server) -> None:
    """Their deletions fell out of the queue."""
    options = ("--writeback-delay", "0", "--attr-ttl", "0.05")
    with mounted(tmp_path, own_server, None, *options) as mount:
        pod = mount.pod()
        own_server.faults(latency_s=0.02, latency_jitter_s=0.1)
        for _ in range(4):
            for number in range(20):
                sh(f"mkdir -p d{number}/e; echo x > d{number}/f; ls -R . > /dev/null", pod)
            for number in range(20):
                sh(f"rm -r d{number}; mkdir d{number}; ls d{number}", pod)
        own_server.faults()
        same_with_an_empty_cache(mount, pod, {f"d{number}": "dir" for number in range(20)})
