"""What a user notices when the driver dies, and how it treats big files and received pods.

Failures of server, network and disk are in test_fault_matrix.py.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import threading
import urllib.request
from pathlib import Path

import pytest

from tests.mount.harness import Mount, Server, mounted, run, sh
from tests.mount.proxy import Line
from tests.patience import PATIENCE_S

QUICK = ("--writeback-delay", "0.1")


def test_a_killed_driver_resumes(tmp_path: Path, own_server: Server) -> None:
    with mounted(tmp_path, own_server, None, "--writeback-delay", "3600") as mount:
        pod = mount.pod()
        sh("mkdir d; echo one > d/f; echo two > d/g; ln -s f d/link; chmod 700 d/g", pod)
        mount.sync()
        sh(
            "echo three >> d/f; mv d/g d/h; mkdir -p x/y; echo new > x/y/z; echo gone > t; rm t",
            pod,
        )
        open_file = os.open(pod / "d/open", os.O_CREAT | os.O_RDWR)
        os.write(open_file, b"written")
        os.fsync(open_file)
        (pod / "unlinked").write_text("x")
        unlinked = os.open(pod / "unlinked", os.O_RDWR)
        (pod / "unlinked").unlink()
        expected = sh("find . | sort; cat d/f d/h d/link d/open x/y/z", pod)
        mount.kill()
        for orphaned in (open_file, unlinked):
            with contextlib.suppress(OSError):  # ENOTCONN: there is nobody to flush to
                os.close(orphaned)
        mount.start()
        assert sh("find . | sort; cat d/f d/h d/link d/open x/y/z", pod) == expected
        mount.remount(wipe=True)
        (pod / "d/link").symlink_to("f")
        assert sh("find . | sort; cat d/f d/h d/link d/open x/y/z", pod) == expected
        assert os.listdir(tmp_path / "cache" / os.listdir(tmp_path / "cache")[0] / "content")


def test_what_is_deleted_while_open_is_believed_after_a_crash(
    tmp_path: Path, own_server: Server
) -> None:
    """A temporary file: the journal has no checksum of it, and there is nothing to fetch again."""
    with mounted(tmp_path, own_server) as mount:
        pod = mount.pod()
        mount.kill()
        mount.start()
        # O_DIRECT: else the kernel answers by itself.
        fd = os.open(pod / "file", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        try:
            os.write(fd, b"text" * 1024)
            (pod / "file").unlink()
            assert os.pread(fd, 4096, 0) == b"text" * 1024
        finally:
            os.close(fd)
        assert "has another content" not in mount.logged()


def test_kill_at_random_instants(tmp_path: Path, own_server: Server) -> None:
    """A workload whose every step is logged outside; the mount must show all that was logged."""
    seed = int(os.environ.get("CPODFS_TEST_SEED", random.randrange(1 << 30)))
    print("seed", seed)
    dice = random.Random(seed)
    with mounted(tmp_path, own_server, None, "--writeback-delay", "0.02") as mount:
        pod = mount.pod()
        expected: dict[str, str] = {}
        for _ in range(6):
            _work_until_killed(mount, pod, expected, dice)
            mount.start()
            found = {p.name: p.read_text() for p in pod.iterdir()}
            assert found == expected, f"seed {seed}"
        mount.remount(wipe=True)
        assert {p.name: p.read_text() for p in pod.iterdir()} == expected, f"seed {seed}"


def _work_until_killed(
    mount: Mount, pod: Path, expected: dict[str, str], dice: random.Random
) -> None:
    for _ in range(dice.randrange(1, 60)):
        name, other = dice.sample("abcdefgh", 2)
        step = dice.choice(["write", "write", "append", "rename", "unlink"])
        if step == "write":
            expected[name] = str(dice.random())
            (pod / name).write_text(expected[name])
        elif name not in expected:
            continue
        elif step == "append":
            with (pod / name).open("a") as file:
                file.write("+")
            expected[name] += "+"
        elif step == "rename":
            (pod / name).replace(pod / other)
            expected[other] = expected.pop(name)
        else:
            (pod / name).unlink()
            del expected[name]
    mount.kill()


def test_first_bytes_come_while_the_rest_is_downloading(tmp_path: Path, own_server: Server) -> None:
    line = Line(own_server)
    with mounted(tmp_path, line, own_server.signup()) as mount:
        path = mount.pod() / "big"
        data = os.urandom(12 << 20)
        path.write_bytes(data)
        mount.remount(wipe=True)
        assert path.stat().st_size == len(data)
        line.hold(6 << 20)
        # Who waits for all of it shall fail, and not hang.
        late = threading.Timer(PATIENCE_S / 10, line.release)
        late.start()
        try:
            with path.open("rb", buffering=0) as file:
                for at in (0, 5 << 20):
                    file.seek(at)
                    assert file.read(4096) == data[at : at + 4096]
                assert line.is_holding
                line.release()
                file.seek(-4096, os.SEEK_END)
                assert file.read() == data[-4096:]
        finally:
            late.cancel()
            line.release()
    line.stop()


def test_memory_does_not_grow_with_file_size(tmp_path: Path, own_server: Server) -> None:
    with mounted(tmp_path, own_server, None, *QUICK) as mount:
        pod = mount.pod()
        run("dd", "if=/dev/zero", f"of={pod}/big", "bs=1M", "count=512")
        with (pod / "big").open("r+b") as file:
            file.seek(499_999_999)
            file.write(b"needle")
        mount.sync()
        up = _peak_mib(mount.pid)
        mount.remount(wipe=True)
        with (pod / "big").open("rb") as file:
            file.seek(499_999_999)
            assert file.read(6) == b"needle"
        assert (pod / "big").stat().st_size == 512 << 20
        down = _peak_mib(mount.pid)
        print(f"peak MiB: up {up}, down {down}")
        assert max(up, down) < 200


def _peak_mib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def test_received_pods_are_read_only(tmp_path: Path, server: Server) -> None:
    for name in ("owner", "friend"):
        (tmp_path / name).mkdir()
    with (
        mounted(tmp_path / "owner", server) as owner,
        mounted(tmp_path / "friend", server) as friend,
    ):
        pod = owner.pod("shared")
        sh("mkdir d; echo text > d/f", pod)
        owner.sync()
        reference = _api(owner, "POST", "/v1/pod/share", podName="shared")["podSharingReference"]
        _api(friend, "GET", f"/v1/pod/receive?sharingRef={reference}")
        friend.cli("refresh", str(friend.point))
        theirs = friend.point / "shared"
        assert (theirs / "d/f").read_text() == "text\n"
        for attempt in (
            lambda: (theirs / "new").write_text("x"),
            lambda: (theirs / "d/f").open("r+"),
            lambda: (theirs / "d/f").unlink(),
            lambda: (theirs / "d/f").chmod(0o600),
            lambda: (theirs / "d/f").rename(theirs / "g"),
            lambda: (theirs / "dir").mkdir(),
            lambda: (theirs / "d").rmdir(),
            lambda: os.truncate(theirs / "d/f", 0),
            lambda: os.setxattr(theirs / "d/f", "user.x", b""),
            lambda: (theirs / ".run").touch(),
            lambda: theirs.rmdir(),
        ):
            with pytest.raises(OSError) as caught:
                attempt()
            assert caught.value.errno == errno.EROFS


def _api(mount: Mount, method: str, path: str, **body: str) -> dict:
    """A call as the mount's user, by somebody else's program."""

    def call(method: str, path: str, body: dict, **headers: str) -> dict:
        request = urllib.request.Request(
            mount.server.url + path,
            json.dumps(body).encode() if body else None,
            {"Content-Type": "application/json", **headers},
            method=method,
        )
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return json.loads(answer.read())

    login = {"userName": mount.user, "password": mount.password_file.read_text()}
    token = call("POST", "/v2/user/login", login)["accessToken"]
    return call(method, path, body, Authorization=f"Bearer {token}")
