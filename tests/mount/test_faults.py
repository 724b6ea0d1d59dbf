"""What a user notices when the server, the network or the driver fails: no hang, no lie, no loss."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import time
import urllib.request
from pathlib import Path

import pytest

from tests.mount.harness import Mount, Server, mounted, run, sh

QUICK = ("--writeback-delay", "0.1")


def test_an_expired_session_is_nobodys_business(tmp_path: Path, own_server: Server) -> None:
    own_server.faults(expire_every=3)
    with mounted(tmp_path, own_server, None, *QUICK) as mount:
        pod = mount.pod()
        sh("mkdir d; for i in $(seq 20); do echo $i > d/$i; done; mv d/1 d/one; rm d/2", pod)
        mount.remount(wipe=True)
        assert sh("ls d | wc -l; cat d/one d/20", pod) == "19\n1\n20\n"


def test_a_restarted_server_is_logged_in_to_again(tmp_path: Path, own_server: Server) -> None:
    with mounted(tmp_path, own_server, None, *QUICK) as mount:
        pod = mount.pod()
        (pod / "before").write_text("before")
        mount.sync()
        own_server.kill()
        (pod / "during").write_text("during")
        own_server.start_again()
        (pod / "after").write_text("after")
        mount.remount(wipe=True)
        assert sh("cat before during after", pod) == "beforeduringafter"


@pytest.mark.parametrize(
    "faults",
    [
        {"error_rate": 0.3},
        {"error_rate": 0.3, "status": 429},
        {"drop_rate": 0.3},
        {"truncate_rate": 0.5},
        {"error_rate": 0.1, "drop_rate": 0.2, "truncate_rate": 0.2, "expire_every": 7},
    ],
    ids=lambda faults: "+".join(faults),
)
def test_nothing_is_lost_on_a_bad_network(tmp_path: Path, own_server: Server, faults: dict) -> None:
    with mounted(tmp_path, own_server, None, *QUICK) as mount:
        pod = mount.pod()
        sh("mkdir -p a/b old; echo 1 > old/1; echo 2 > old/2", pod)
        mount.sync()
        own_server.faults(seed=7, match="/v1/(file|dir|pod)", **faults)
        sh(
            "for i in $(seq 15); do echo $i > a/$i; echo b$i > a/b/$i; done; sed -i s/3/three/ a/3",
            pod,
        )
        sh("mv old/1 a/old1; mv a/b moved; rm a/5; mv a/6 a/7; rm -r old; mkdir e; mkdir e/f", pod)
        expected = _tree(pod)
        mount.cli("sync", str(pod), "--stall", "60")
        own_server.faults(error_rate=0, drop_rate=0, truncate_rate=0, expire_every=0)
        mount.remount(wipe=True)
        own_server.faults(seed=8, match="/v1/(file|dir|pod)", **faults)
        assert _tree(pod, attempts=10) == expected


def test_offline_reads_and_writes(tmp_path: Path, own_server: Server) -> None:
    with mounted(tmp_path, own_server, None, *QUICK, "--timeout", "1") as mount:
        pod = mount.pod()
        sh("mkdir d; echo cached > d/cached; echo other > d/uncached", pod)
        mount.remount(wipe=True)
        assert (pod / "d/cached").read_text() == "cached\n"
        own_server.stop()
        started = time.monotonic()
        assert sorted(os.listdir(pod / "d")) == ["cached", "uncached"]
        assert (pod / "d/cached").read_text() == "cached\n"
        (pod / "d/new").write_text("written offline")
        (pod / "d/cached").rename(pod / "d/renamed")
        assert time.monotonic() - started < 2
        with pytest.raises(OSError) as caught:
            (pod / "d/uncached").read_text()
        assert caught.value.errno in (errno.EIO, errno.ETIMEDOUT, errno.EHOSTUNREACH)
        assert time.monotonic() - started < 15
        own_server.start_again()
        mount.sync()
        assert (pod / "d/uncached").read_text() == "other\n"
        mount.remount(wipe=True)
        assert sh("cat d/new d/renamed", pod) == "written offlinecached\n"


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


def test_kill_at_random_instants(tmp_path: Path, own_server: Server) -> None:
    """A workload whose every step is logged outside; the mount must show all that was logged."""
    seed = int(os.environ.get("CPODFS_TEST_SEED", random.randrange(1 << 30)))
    print("seed", seed)
    dice = random.Random(seed)
    with mounted(tmp_path, own_server, None, "--writeback-delay", "0.02") as mount:
        pod = mount.pod()
        expected: dict[str, str] = {}
        for _ in range(10):
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
    with mounted(tmp_path, own_server) as mount:
        path = mount.pod() / "big"
        data = os.urandom(1 << 20) * 12
        path.write_bytes(data)
        mount.remount(wipe=True)
        own_server.faults(bandwidth=4 << 20)
        started = time.monotonic()
        with path.open("rb", buffering=0) as file:
            assert file.read(4096) == data[:4096]
            first = time.monotonic() - started
            file.seek(6 << 20)
            assert file.read(4096) == data[6 << 20 : (6 << 20) + 4096]
            middle = time.monotonic() - started
            file.seek(-4096, os.SEEK_END)
            assert file.read() == data[-4096:]
            last = time.monotonic() - started
        assert first < middle / 2 < last / 2, (first, middle, last)


def test_memory_does_not_grow_with_file_size(tmp_path: Path, own_server: Server) -> None:
    with mounted(tmp_path, own_server, None, *QUICK) as mount:
        pod = mount.pod()
        run("dd", "if=/dev/zero", f"of={pod}/big", "bs=1M", "count=2048")
        with (pod / "big").open("r+b") as file:
            file.seek(1_999_999_999)
            file.write(b"needle")
        mount.sync()
        up = _peak_mib(mount.pid)
        mount.remount(wipe=True)
        with (pod / "big").open("rb") as file:
            file.seek(1_999_999_999)
            assert file.read(6) == b"needle"
        assert (pod / "big").stat().st_size == 2 << 30
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
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.loads(answer.read())

    login = {"userName": mount.user, "password": mount.password_file.read_text()}
    token = call("POST", "/v2/user/login", login)["accessToken"]
    return call(method, path, body, Authorization=f"Bearer {token}")


def _tree(root: Path, attempts: int = 1) -> dict[str, str]:
    """Every path below ``root`` with its content's hash. A read that fails is repeated as a user
    would."""
    found = {}
    pending = [root]
    while pending:
        folder = pending.pop()
        for name in sorted(_patiently(lambda folder=folder: os.listdir(folder), attempts)):
            path = folder / name
            if path.is_dir():
                pending.append(path)
                found[str(path.relative_to(root))] = "dir"
            else:
                data = _patiently(path.read_bytes, attempts)
                found[str(path.relative_to(root))] = hashlib.sha256(data).hexdigest()
    return found


def _patiently(read, attempts: int):
    for attempt in range(attempts):
        try:
            return read()
        except OSError:
            if attempt == attempts - 1:
                raise
    raise AssertionError
