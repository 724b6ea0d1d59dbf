"""What one does with files in a shell, through the kernel."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import subprocess
import time
from pathlib import Path

import pytest

from tests.mount.harness import Child, Mount, run, sh


def refuses(code: int, call, *arguments) -> None:
    with pytest.raises(OSError) as caught:
        call(*arguments)
    assert caught.value.errno == code, os.strerror(caught.value.errno or 0)


def test_write_at_any_offset_append_and_truncate(pod: Path) -> None:
    path = pod / "file"
    path.write_bytes(b"0123456789")
    with path.open("r+b") as file:
        file.seek(4)
        file.write(b"AB")
        file.seek(20)
        file.write(b"end")
    assert path.read_bytes() == b"0123AB6789" + b"\0" * 10 + b"end"
    os.truncate(path, 3)
    with path.open("ab") as file:
        file.write(b"-more")
    assert path.read_bytes() == b"012-more"
    os.truncate(path, 10)
    assert path.read_bytes() == b"012-more\0\0"
    path.write_bytes(b"")
    assert path.stat().st_size == 0


def test_shell_redirections_and_sed(pod: Path) -> None:
    out = sh(
        "for i in 1 2 3; do echo line$i >> f; done; sed -i s/line2/two/ f; cat f; wc -c < f", pod
    )
    assert out == "line1\ntwo\nline3\n16\n"


def test_save_as_vim_does(pod: Path) -> None:
    path = pod / "text"
    path.write_text("old\n")
    path.rename(pod / "text~")
    path.write_text("new\n")
    os.fsync(os.open(path, os.O_RDONLY))
    (pod / "text~").unlink()
    temporary = pod / ".text.swp"
    temporary.write_text("newer\n")
    temporary.replace(path)
    assert path.read_text() == "newer\n"
    assert os.listdir(pod) == ["text"]


def test_unlinked_file_lives_while_open(pod: Path) -> None:
    path = pod / "file"
    with path.open("w+b") as file:
        file.write(b"kept")
        file.flush()
        path.unlink()
        assert not path.exists()
        file.write(b" and more")
        file.seek(0)
        assert file.read() == b"kept and more"
        assert os.fstat(file.fileno()).st_nlink == 0
    path.write_bytes(b"another")
    assert path.read_bytes() == b"another"


def test_rename_over_files_and_directories(pod: Path) -> None:
    sh("mkdir -p d/e empty full/x; echo a > a; echo b > b; echo f > d/e/f", pod)
    (pod / "a").replace(pod / "b")
    assert (pod / "b").read_text() == "a\n"
    (pod / "d").rename(pod / "empty")
    assert (pod / "empty/e/f").read_text() == "f\n"
    refuses(errno.ENOTEMPTY, os.rename, pod / "empty", pod / "full")
    refuses(errno.EISDIR, os.rename, pod / "b", pod / "full")
    refuses(errno.ENOTDIR, os.rename, pod / "full", pod / "b")
    refuses(errno.EINVAL, os.rename, pod / "full", pod / "full/x/y")
    refuses(errno.ENOENT, os.rename, pod / "nothing", pod / "b")
    assert sorted(os.listdir(pod)) == ["b", "empty", "full"]


def test_exchange_and_noreplace(pod: Path) -> None:
    sh("echo a > a; echo b > b", pod)
    run("python3", "-c", _RENAMEAT2, "a", "b", "2", cwd=pod)
    assert (pod / "a").read_text() == "b\n"
    assert (pod / "b").read_text() == "a\n"
    assert "17" in run("python3", "-c", _RENAMEAT2, "a", "b", "1", cwd=pod)


_RENAMEAT2 = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.renameat2(-100, sys.argv[1].encode(), -100, sys.argv[2].encode(), int(sys.argv[3])):
    print(ctypes.get_errno())
"""


def test_modes_times_and_xattrs(mount: Mount, pod: Path) -> None:
    path = pod / "script"
    path.write_text("#!/bin/sh\necho ran\n")
    path.chmod(0o751)
    os.utime(path, ns=(1_234_567_890_123_456_789, 987_654_321_123_456_789))
    os.setxattr(path, "user.colour", b"green")
    os.setxattr(path, "user.other", b"x")
    os.removexattr(path, "user.other")
    assert run(path) == "ran\n"
    for _ in range(2):
        found = path.stat()
        assert stat.S_IMODE(found.st_mode) == 0o751
        assert found.st_mtime_ns == 987_654_321_123_456_789
        assert found.st_uid == os.getuid()
        assert os.listxattr(path) == ["user.colour"]
        assert os.getxattr(path, "user.colour") == b"green"
        mount.remount()
    refuses(errno.ENODATA, os.getxattr, path, "user.none")
    # The kernel itself keeps these from who is not root.
    trusted = errno.EOPNOTSUPP if os.geteuid() == 0 else errno.EPERM
    refuses(trusted, os.setxattr, path, "trusted.x", b"")
    refuses(errno.EPERM, os.chown, path, 12345, 12345)
    os.chown(path, os.getuid(), os.getgid())


def test_symbolic_links(mount: Mount, pod: Path) -> None:
    (pod / "target").write_text("text")
    (pod / "link").symlink_to("target")
    assert (pod / "link").read_text() == "text"
    assert os.readlink(pod / "link") == "target"
    mount.remount()
    assert (pod / "link").read_text() == "text"
    refuses(errno.EPERM, os.link, pod / "target", pod / "hard")


def test_mmap_and_programs(pod: Path) -> None:
    path = pod / "data"
    path.write_bytes(b"a" * 10_000)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        view[5000:5003] = b"xyz"
        view.flush()
    assert path.read_bytes()[4999:5004] == b"axyza"
    run("cp", "/bin/echo", pod / "echo")
    assert run(pod / "echo", "hello") == "hello\n"


def test_sqlite(pod: Path) -> None:
    db = pod / "db"
    run("sqlite3", db, "create table t(a integer primary key, b text)")
    inserts = "".join(f"insert into t(b) values('row {i}');" for i in range(200))
    run("sqlite3", db, f"begin; {inserts} commit; update t set b='changed' where a % 7 = 0")
    assert run("sqlite3", db, "select count(*), sum(b='changed') from t") == "200|28\n"
    assert run("sqlite3", db, "pragma integrity_check") == "ok\n"
    assert os.listdir(pod) == ["db"]


def test_names_that_the_store_refuses(pod: Path) -> None:
    refuses(errno.EINVAL, (pod / "index.dfs").touch)
    refuses(errno.EINVAL, (pod / "index.dfs").mkdir)
    refuses(errno.EINVAL, (pod / "new\nline").touch)
    refuses(errno.EINVAL, os.mkdir, os.fsencode(pod) + b"/\xff\xfe")
    refuses(errno.ENAMETOOLONG, (pod / ("d" * 101)).mkdir)
    refuses(errno.ENAMETOOLONG, (pod / ("ü" * 128)).touch)
    (pod / ("ü" * 127)).touch()
    (pod / "ordinary").touch()
    refuses(errno.EINVAL, os.rename, pod / "ordinary", pod / "index.dfs")
    assert len(os.listdir(pod)) == 2


def test_top_level_holds_pods_only(mount: Mount) -> None:
    refuses(errno.EPERM, (mount.point / "file").touch)
    refuses(errno.EPERM, (mount.point / "link").symlink_to, "x")
    refuses(errno.ENAMETOOLONG, (mount.point / ("p" * 65)).mkdir)
    refuses(errno.EINVAL, (mount.point / " padded ").mkdir)
    pod = mount.pod("one")
    mount.pod("two")
    refuses(errno.EEXIST, os.mkdir, pod)
    (pod / "file").write_text("x")
    refuses(errno.ENOTEMPTY, os.rmdir, pod)
    mount.sync()
    refuses(errno.EXDEV, os.rename, pod, mount.point / "three")
    refuses(errno.EXDEV, os.rename, pod / "file", mount.point / "two/file")
    sh("mv one/file two/; rmdir one", mount.point)
    mount.remount(wipe=True)
    assert os.listdir(mount.point) == ["two"]
    assert (mount.point / "two/file").read_text() == "x"


def test_a_new_pod_may_be_renamed_before_the_server_hears_of_it(mount: Mount) -> None:
    """What a file manager does for "New Folder"."""
    (mount.point / "New Folder").mkdir()
    (mount.point / "New Folder").rename(mount.point / "blender")
    mount.remount(wipe=True)
    assert os.listdir(mount.point) == ["blender"]


def test_directory_listing_while_it_changes(pod: Path) -> None:
    for number in range(300):
        (pod / f"f{number}").touch()
    with os.scandir(pod) as entries:
        seen = {next(entries).name for _ in range(10)}
        for number in range(300):
            if f"f{number}" not in seen and number % 2:
                (pod / f"f{number}").unlink()
        rest = [entry.name for entry in entries]
    names = [*seen, *rest]
    assert len(names) == len(set(names))
    assert {f"f{n}" for n in range(0, 300, 2)} <= set(names)


def test_statfs_and_owner(mount: Mount) -> None:
    found = os.statvfs(mount.point)
    assert found.f_namemax == 255
    assert found.f_bavail > 0
    assert mount.point.stat().st_uid == os.getuid()
    assert stat.S_IMODE(mount.point.stat().st_mode) == 0o700


def test_the_top_and_a_pod_have_sensible_dates(mount: Mount) -> None:
    for wipe in (False, True):
        for folder in (mount.point, mount.pod()):
            found = folder.stat()
            for date in (found.st_mtime, found.st_ctime, found.st_atime):
                assert abs(time.time() - date) < 100
        mount.remount(wipe=wipe)


def test_mtime_moves_with_writes_only(pod: Path) -> None:
    path = pod / "file"
    path.write_text("x")
    os.utime(path, (1, 1))
    path.read_text()
    assert path.stat().st_mtime == 1
    before = time.time()
    with path.open("a") as file:
        file.write("y")
    assert before - 1 < path.stat().st_mtime < time.time() + 1


def test_tail_follows_a_growing_file(pod: Path) -> None:
    path = pod / "log"
    path.touch()
    with Child(["tail", "-f", path], stdout=subprocess.PIPE, text=True) as tail:
        assert tail.stdout is not None
        with path.open("a", buffering=1) as log:
            for number in range(3):
                log.write(f"line {number}\n")
                assert tail.stdout.readline() == f"line {number}\n"
        tail.kill()
