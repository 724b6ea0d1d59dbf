"""What reaches the server, when, and in how many calls."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from tests.mount.harness import Mount, Server, mounted, run, sh
from tests.patience import until

UPLOAD, STAT = "POST /v1/file/upload", "GET /v1/file/stat"


@pytest.fixture
def counted(tmp_path: Path, own_server: Server):
    """A mount of a server that nobody else calls, with a pod that is known and opened."""
    with mounted(tmp_path, own_server) as mount:
        mount.pod()
        mount.sync()
        own_server.reset_calls()
        yield mount


def test_trees_survive_a_remount_with_an_empty_cache(mount: Mount, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree("/usr/lib/python3/dist-packages", source, symlinks=False, dirs_exist_ok=True)
    for found in list(source.rglob("*"))[200:]:
        if found.is_file():
            found.unlink()
    (source / "empty").touch()
    (source / 'odd "name" \\ % ü').write_text("odd")
    pod = mount.pod()
    run("cp", "-r", source, pod / "cp")
    run("rsync", "-a", f"{source}/", pod / "rsync")
    (pod / "tar").mkdir()
    sh(f"tar -C {source} -cf - . | tar -xf - -C tar", pod)
    mount.remount(wipe=True)
    for copy in ("cp", "rsync", "tar"):
        run("diff", "-r", source, pod / copy)


def test_git_clone_is_clean(mount: Mount, tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    sh(
        "git init -q -b main . && for d in $(seq 25); do mkdir d$d; for f in $(seq 20); do"
        " echo $d $f > d$d/f$f; done; done; git add . && git -c user.name=t -c user.email=t"
        " commit -qm all",
        _made(origin),
    )
    pod = mount.pod()
    run("git", "clone", "-q", "--no-local", origin, pod / "clone")
    assert run("git", "status", "--porcelain", cwd=pod / "clone") == ""
    mount.remount(wipe=True)
    assert run("git", "status", "--porcelain", cwd=pod / "clone") == ""
    assert "clean" in run("git", "status", cwd=pod / "clone")
    run("git", "fsck", "--strict", cwd=pod / "clone")


def test_calls_for_a_thousand_small_files(counted: Mount, tmp_path: Path) -> None:
    """At most one upload per file and one mkdir per directory, plus a constant."""
    source = tmp_path / "source"
    for d in range(20):
        (source / f"d{d}").mkdir(parents=True)
        for f in range(50):
            (source / f"d{d}" / f"f{f}").write_text(f"{d} {f}")
    run("cp", "-r", source, counted.point / "pod")
    counted.sync()
    calls = counted.server.calls()
    assert calls.pop(UPLOAD) == 1000
    assert calls.pop("POST /v1/dir/mkdir") == 21
    assert sum(calls.values()) <= 3, calls


def test_write_close_rename_is_one_upload(counted: Mount) -> None:
    pod = counted.point / "pod"
    for version in range(20):
        (pod / "temp").write_text(f"version {version}")
        (pod / "temp").replace(pod / "file")
    counted.sync()
    assert counted.server.calls() == {UPLOAD: 1}
    counted.server.reset_calls()
    (pod / "temp").write_text("version 20")
    (pod / "temp").replace(pod / "file")
    counted.sync()
    assert counted.server.calls() == {UPLOAD: 1, STAT: 1}


def test_what_is_deleted_before_its_upload_costs_nothing(counted: Mount) -> None:
    sh(
        "echo x > f; rm f; mkdir -p d/e; rmdir -p d/e; mkdir g; echo y > g/h; rm -r g",
        counted.point / "pod",
    )
    counted.sync()
    assert counted.server.calls() == {}


def test_cached_answers_cost_no_call(counted: Mount) -> None:
    pod = counted.point / "pod"
    sh("mkdir d; echo x > d/f", pod)
    counted.sync()
    counted.remount()
    counted.server.reset_calls()
    sh("ls -lR . > /dev/null; cat d/f; test ! -e nothing; test ! -e d/nothing", pod)
    assert {k for k in counted.server.calls() if "login" not in k} == set()


def test_pods_are_opened_lazily(counted: Mount) -> None:
    for name in ("a", "b", "c"):
        (counted.pod(name) / "file").write_text(name)
    counted.remount(wipe=True)
    counted.server.reset_calls()
    run("ls", "-l", counted.point)
    assert "POST /v1/pod/open" not in counted.server.calls()
    assert (counted.point / "b/file").read_text() == "b"
    assert counted.server.calls()["POST /v1/pod/open"] == 1


def test_renames_and_deletions_reach_the_server(mount: Mount) -> None:
    pod = mount.pod()
    sh("mkdir -p a/b/c d; for f in a/1 a/b/2 a/b/c/3 d/4 5 6; do echo $f > $f; done", pod)
    mount.sync()
    sh("mv a moved; mv moved/b/c d/; mv 5 d/five; rm moved/1; echo new > a; mv 6 moved/b/2", pod)
    mount.remount(wipe=True)
    found = sh("find . -type f | sort; cat moved/b/2 d/c/3 d/five a", pod)
    assert found == "./a\n./d/4\n./d/c/3\n./d/five\n./moved/b/2\n6\na/b/c/3\n5\nnew\n"


def test_rings_of_renames(mount: Mount) -> None:
    """Swaps, rotations, and a directory that takes its own parent's name."""
    pod = mount.pod()
    sh("echo a > a; echo b > b; mkdir -p x y n/inner p/q; echo x > x/f; echo y > y/f", pod)
    sh("echo i > n/inner/f; echo p > p/f; echo q > p/q/f", pod)
    mount.sync()
    sh("mv a t; mv b a; mv t b; mv x t; mv y x; mv t y", pod)
    sh("mv n/inner t; rmdir n; mv t n; mv p/q t; mv p t/p; mv t q", pod)
    mount.remount(wipe=True)
    assert sh("cat a b x/f y/f n/f q/f q/p/f", pod) == "b\na\ny\nx\ni\nq\np\n"
    assert (
        sh("find . | sort | tr '\\n' ' '", pod)
        == ". ./a ./b ./n ./n/f ./q ./q/f ./q/p ./q/p/f ./x ./x/f ./y ./y/f "
    )


def test_modes_reach_the_server(mount: Mount) -> None:
    pod = mount.pod()
    sh(
        "echo echo hi > tool; chmod 755 tool; echo x > secret; chmod 400 secret; mkdir d; chmod 750 d",
        pod,
    )
    mount.remount(wipe=True)
    assert sh("stat -c %a tool secret d", pod) == "755\n400\n750\n"
    sh("echo echo ho > tool", pod)
    mount.remount(wipe=True)
    assert sh("./tool; stat -c %a tool", pod) == "ho\n755\n"


def test_a_file_written_during_its_upload_arrives_whole(tmp_path: Path, own_server: Server) -> None:
    own_server.faults(bandwidth=2_000_000)
    with mounted(tmp_path, own_server, None, "--writeback-delay", "0.2") as mount:
        path = mount.pod() / "file"
        path.write_bytes(b"a" * 1_000_000)
        until(lambda: mount.status()["uploads"])
        with path.open("r+b") as file:
            file.seek(999_999)
            file.write(b"z")
        mount.remount(wipe=True)
        assert path.read_bytes() == b"a" * 999_999 + b"z"


def test_a_file_deleted_during_its_upload_is_gone(tmp_path: Path, own_server: Server) -> None:
    own_server.faults(bandwidth=2_000_000)
    with mounted(tmp_path, own_server, None, "--writeback-delay", "0.2") as mount:
        path = mount.pod() / "file"
        path.write_bytes(b"a" * 1_000_000)
        until(lambda: mount.status()["uploads"])
        path.unlink()
        mount.remount(wipe=True)
        assert os.listdir(mount.point / "pod") == []


def test_state_attribute(tmp_path: Path, own_server: Server) -> None:
    with mounted(tmp_path, own_server, None, "--writeback-delay", "3600") as mount:
        path = mount.pod() / "file"
        path.write_text("x")
        assert os.getxattr(path, "user.cpodfs.state") == b"dirty"
        mount.sync()
        until(lambda: os.getxattr(path, "user.cpodfs.state") == b"clean")
        with pytest.raises(OSError) as caught:
            os.setxattr(path, "user.cpodfs.state", b"x")
        assert caught.value.errno == errno.EPERM
        own_server.faults(error_rate=1.0, match="upload")
        path.write_text("y")
        assert mount.cli("sync", str(path), "--stall", "1", check=False).returncode == 1
        # Its next attempt may be under way.
        until(lambda: os.getxattr(path, "user.cpodfs.state") == b"error")
        assert mount.status()["failed"][0]["error"]
        own_server.faults(error_rate=0.0)
        mount.sync()
        until(lambda: os.getxattr(path, "user.cpodfs.state") == b"clean")


def test_changes_made_elsewhere_appear(mount: Mount, server: Server, tmp_path: Path) -> None:
    pod = mount.pod()
    sh("mkdir d; echo one > d/f; echo stays > d/g; echo goes > d/h", pod)
    mount.sync()
    (tmp_path / "other").mkdir()
    account = (mount.user, mount.password_file.read_text())
    with mounted(tmp_path / "other", server, account) as other:
        sh("echo second > pod/d/f; echo new > pod/d/n; rm pod/d/h", other.point)
        assert other.stop() == 0
    with (pod / "d/f").open() as still_open:
        mount.cli("refresh", str(pod / "d"))
        assert sorted(os.listdir(pod / "d")) == ["f", "g", "n"]
        assert (pod / "d/f").read_text() == "second\n"
        assert (pod / "d/n").read_text() == "new\n"
        assert still_open.read() == "one\n"


def test_nobodys_bytes_vanish_in_a_conflict(mount: Mount, server: Server, tmp_path: Path) -> None:
    pod = mount.pod()
    (pod / "f.txt").write_text("base")
    mount.sync()
    mount.cli("refresh", str(pod))
    (tmp_path / "other").mkdir()
    with mounted(
        tmp_path / "other", server, (mount.user, mount.password_file.read_text())
    ) as other:
        (other.point / "pod/f.txt").write_text("theirs")
        assert other.stop() == 0
    (pod / "f.txt").write_text("ours, longer")
    mount.cli("refresh", str(pod))
    mount.remount(wipe=True)
    contents = {name.split(" (")[0]: (pod / name).read_text() for name in sorted(os.listdir(pod))}
    assert contents == {"f": "ours, longer", "f.txt": "theirs"}


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_what_the_server_refuses_for_good_is_kept_and_named(
    tmp_path: Path, own_server: Server
) -> None:
    with mounted(tmp_path, own_server, None, "--writeback-delay", "0.1", "--stall", "2") as mount:
        pod = mount.pod()
        mount.sync()
        own_server.faults(error_rate=1.0, status=402, match="upload")
        (pod / "f").write_text("my only copy")
        until(lambda: os.getxattr(pod / "f", "user.cpodfs.state") == b"error")
        assert b"cpodfs sync pod/f" in os.getxattr(pod / "f", "user.cpodfs.error")
        assert "pod/f" in mount.cli("status", str(pod)).stdout
        assert mount.stop() != 0
        assert "pod/f" in mount.said
        mount.start()
        assert (pod / "f").read_text() == "my only copy"
        own_server.faults(error_rate=0)
        mount.sync()
        mount.remount(wipe=True)
        assert (pod / "f").read_text() == "my only copy"


def test_changes_of_one_directory_never_meet_at_the_server(
    tmp_path: Path, own_server: Server
) -> None:
    """It rewrites a directory as a whole, mode and list, and forgets what happened meanwhile."""
    own_server.faults(directory_race=True)
    source = tmp_path / "source"
    sh(
        "for d in 1 2 3 4; do mkdir -p $d/e/empty; for f in 1 2 3; do echo $f > $d/$f; cp $d/$f $d/e; done; done; chmod -R go-rwx,u-w . ; chmod u+w .",
        _made(source),
    )
    with mounted(tmp_path, own_server, None, "--writeback-delay", "0.05") as mount:
        pod = mount.pod()
        run("rsync", "-a", f"{source}/", pod / "copy")
        run("cp", "-a", source, pod / "copy2")
        sh(
            "chmod -R u+w copy2; mv copy2/1 copy2/one; mv copy2/2/e copy2/3/2e; rm -r copy2/4/e",
            pod,
        )
        expected = sh("find . -printf '%p %y %m\n' | sort", pod)
        mount.remount(wipe=True)
        run("diff", "-r", source, pod / "copy")
        assert sh("find . -printf '%p %y %m\n' | sort", pod) == expected
