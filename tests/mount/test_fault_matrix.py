"""Each fault of server, network and disk, and what users must be spared: hangs, lies and losses.

One story for all: a mount that knows some of a pod and has read some of it; the fault begins; what
is cached is read and everything is written, at once; what is not cached is waited for, but not for
long, and fails with the right errno; the fault ends; all is uploaded, and found by a mount with an
empty cache.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.mount.harness import Mount, Server, mounted, sh, tree
from tests.mount.proxy import Line
from tests.patience import until

KB, MB = 1000, 1_000_000
BIG = 400 * KB
TIMEOUT_S = 1.0
QUICK = ("--writeback-delay", "0.1", "--timeout", str(TIMEOUT_S))
NO_HANG_S = 60.0
"""For anything at all. What needs no server takes milliseconds on a quiet machine, and what needs one
some times ``--timeout``; a loaded machine is slower, but a hang is longer still."""
NEVER_S = 2 * NO_HANG_S
"""Longer than anybody waits for an answer here."""
EVERYTHING = "/v[12]/"


@dataclass
class Broken:
    """What a fault can be made of."""

    server: Server
    line: Line

    def mend(self) -> None:
        self.server.faults()
        self.line.cut()
        self.line.hang_up()


Act = Callable[[Broken], None]


def injected(**faults: Any) -> Act:
    return lambda broken: broken.server.faults(**{"seed": 7, "match": EVERYTHING, **faults})


@dataclass(frozen=True)
class Fault:
    """``reads`` and ``lists``: the errnos of what needs the server; none: it works all the same.
    ``at_times``: it may work all the same."""

    begin: Act
    reads: tuple[int, ...] = ()
    lists: tuple[int, ...] = ()
    end: Act = Broken.mend
    at_times: bool = False


TOO_LATE = (errno.ETIMEDOUT,)
UNREACHABLE = (errno.EHOSTUNREACH, *TOO_LATE)
"""On a busy machine ``--timeout`` may be over before the last attempt has failed."""
REFUSED = (errno.EIO, errno.ETIMEDOUT)
"""It is asked some times before it is believed, and the time may be over by then."""

FAULTS = {
    "every answer is 500": Fault(injected(error_rate=1.0), REFUSED, REFUSED),
    "every answer is 429": Fault(injected(error_rate=1.0, status=429), REFUSED, REFUSED),
    "answers come too late": Fault(injected(latency_s=NEVER_S), TOO_LATE, TOO_LATE),
    "the server is frozen": Fault(
        lambda broken: broken.server.freeze(),
        *(TOO_LATE, TOO_LATE),
        end=lambda broken: broken.server.thaw(),
    ),
    "the server is dead": Fault(
        lambda broken: broken.server.kill(),
        *(UNREACHABLE, UNREACHABLE),
        end=lambda broken: broken.server.start_again(),
    ),
    "no connection lives": Fault(injected(drop_rate=1.0), UNREACHABLE, UNREACHABLE),
    "reset in the middle of an upload": Fault(lambda broken: broken.line.cut(up=BIG // 2)),
    "reset in the middle of a download": Fault(
        lambda broken: broken.line.cut(down=BIG // 2), UNREACHABLE
    ),
    "downloads are cut short": Fault(injected(truncate_rate=1.0), UNREACHABLE),
    "the session expires in the middle": Fault(injected(expire_every=7)),
    "some chunks cannot be read": Fault(
        injected(read_failure_rate=0.4), REFUSED, REFUSED, at_times=True
    ),
    "no chunk can be read": Fault(injected(read_failure_rate=1.0), REFUSED, REFUSED, at_times=True),
    "the list of pods is empty": Fault(injected(pods_empty=True)),
    "the pod is not there": Fault(injected(not_there=["pod"]), REFUSED, REFUSED),
    "a folder is not there": Fault(injected(not_there=["pod/d"]), REFUSED),
    "the store is empty": Fault(injected(empty_store=True), REFUSED, REFUSED),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_no_hang_no_lie_no_loss(tmp_path: Path, own_server: Server, fault: Fault) -> None:
    line = Line(own_server)
    broken = Broken(own_server, line)
    with mounted(tmp_path, line, own_server.signup(), *QUICK) as mount:
        pod = _prepared(mount)
        fault.begin(broken)
        try:
            _what_is_here_works(pod)
            _in_time(lambda: _read_uncached(pod, fault))
            _in_time(lambda: _list_unknown(pod, fault))
            if fault.reads and fault.lists and not fault.at_times:
                assert mount.status()["pending"], "nothing can have been uploaded"
        finally:
            fault.end(broken)
        _all_arrives(mount, pod)
    line.stop()


def _prepared(mount: Mount) -> Path:
    """A pod of which the root and ``d`` are known, and ``d/cached`` has been read."""
    pod = mount.pod()
    sh("mkdir d unknown; echo cached > d/cached; echo old > d/old; echo x > unknown/f", pod)
    (pod / "d/uncached").write_bytes(b"u" * BIG)
    mount.remount(wipe=True)
    os.listdir(pod / "d")
    assert (pod / "d/cached").read_text() == "cached\n"
    return pod


def _what_is_here_works(pod: Path) -> None:
    """Known directories are listed, cached files read, and everything is written, without delay."""

    def work() -> None:
        assert sorted(os.listdir(pod / "d")) == ["cached", "old", "uncached"]
        assert (pod / "d/cached").read_text() == "cached\n"
        (pod / "d/new").write_bytes(b"n" * BIG)
        (pod / "d/cached").write_text("changed")
        (pod / "d/cached").rename(pod / "d/renamed")
        (pod / "d/old").unlink()
        (pod / "made/inside").mkdir(parents=True)
        (pod / "made/inside/f").write_text("inside")
        assert not (pod / "d/none").exists()

    _in_time(work)


def _in_time(act: Callable[[], None]) -> None:
    started = time.monotonic()
    act()
    took = time.monotonic() - started
    assert took < NO_HANG_S, f"{took:.1f} s"


def _expecting(
    codes: tuple[int, ...], act: Callable[[], object], *, at_times: bool = False
) -> None:
    error = 0
    try:
        act()
    except OSError as caught:
        error = caught.errno or 0
    allowed = {*codes, *((0,) if at_times or not codes else ())}
    assert error in allowed, errno.errorcode.get(error, "it works, though it cannot")


def _read_uncached(pod: Path, fault: Fault) -> None:
    def read() -> None:
        assert (pod / "d/uncached").read_bytes() == b"u" * BIG

    _expecting(fault.reads, read, at_times=fault.at_times)


def _list_unknown(pod: Path, fault: Fault) -> None:
    def listing() -> None:
        assert os.listdir(pod / "unknown") == ["f"]

    _expecting(fault.lists, listing, at_times=fault.at_times)


def _all_arrives(mount: Mount, pod: Path) -> None:
    """After the fault, the mount recovers by itself, and what it shows is what others will see."""
    mount.cli("sync", str(pod), "--stall", "30")
    # What was deleted here while the server did not show it is deleted when it does.
    until(lambda: not mount.status()["deletions_doubtful"] and not mount.status()["deletions"])
    expected = tree(pod)
    assert {"d/new", "d/renamed", "made/inside/f", "d/uncached", "unknown/f"} <= expected.keys()
    assert not {"d/old", "d/cached"} & expected.keys()
    mount.remount(wipe=True)
    assert tree(pod) == expected


@pytest.fixture
def slow(tmp_path: Path, own_server: Server):
    """A mount of a server over a line that takes a second for a big file."""
    own_server.faults(bandwidth=BIG)
    with mounted(tmp_path, own_server, None, *QUICK) as mount:
        yield mount


def test_a_server_killed_in_the_middle_of_an_upload(slow: Mount, own_server: Server) -> None:
    pod = slow.pod()
    (pod / "big").write_bytes(b"1" * BIG)
    slow.sync()
    (pod / "big").write_bytes(b"2" * BIG)
    (pod / "new").write_bytes(b"3" * BIG)
    until(lambda: any(u["sent"] > BIG // 4 for u in slow.status()["uploads"]))
    own_server.kill()
    assert os.getxattr(pod / "big", "user.cpodfs.state") != b"clean"
    own_server.start_again()
    slow.cli("sync", str(pod), "--stall", "30")
    slow.remount(wipe=True)
    assert (pod / "big").read_bytes() == b"2" * BIG
    assert (pod / "new").read_bytes() == b"3" * BIG
    assert sorted(os.listdir(pod)) == ["big", "new"]


def test_a_server_killed_in_the_middle_of_a_download(slow: Mount, own_server: Server) -> None:
    pod = slow.pod()
    (pod / "big").write_bytes(b"1" * BIG)
    slow.remount(wipe=True)
    os.listdir(pod)
    with (pod / "big").open("rb", buffering=0) as file:
        assert file.read(1) == b"1"
        own_server.kill()
        file.seek(BIG - 1)
        _in_time(lambda: _expecting(UNREACHABLE, lambda: file.read(1)))
    own_server.start_again()
    until(lambda: not _fails(lambda: (pod / "big").read_bytes()))
    assert (pod / "big").read_bytes() == b"1" * BIG


def test_a_reader_is_told_of_a_full_disk(
    tmp_path: Path, own_server: Server, small_disk: Path
) -> None:
    with mounted(tmp_path, own_server, None, *QUICK) as mount:
        pod = mount.pod()
        (pod / "big").write_bytes(b"b" * 50 * MB)
        mount.sync()
        assert mount.stop() == 0
        for found in small_disk.iterdir():
            shutil.rmtree(found)
        with (small_disk / "somebody-else").open("wb") as other:
            os.posix_fallocate(other.fileno(), 0, 50 * MB)
        mount.start()
        _expecting((errno.ENOSPC,), lambda: (pod / "big").read_bytes())
        (pod / "small").write_text("there is room for this")
        (small_disk / "somebody-else").unlink()
        assert (pod / "big").read_bytes() == b"b" * 50 * MB
        mount.remount()
        assert (pod / "small").read_text() == "there is room for this"


@pytest.mark.parametrize(
    "faults",
    [
        {"error_rate": 0.2, "status": 429},
        {"drop_rate": 0.3},
        {"error_rate": 0.1, "drop_rate": 0.2, "truncate_rate": 0.2, "expire_every": 7},
    ],
    ids=lambda faults: "+".join(faults),
)
def test_nothing_is_lost_on_a_bad_network(tmp_path: Path, own_server: Server, faults: dict) -> None:
    """Some calls fail, and of some nobody knows whether they did."""
    with mounted(tmp_path, own_server, None, "--writeback-delay", "0.1") as mount:
        pod = mount.pod()
        sh("mkdir -p a/b old; echo 1 > old/1; echo 2 > old/2", pod)
        mount.sync()
        own_server.faults(seed=7, match="/v1/(file|dir|pod)", **faults)
        sh(
            "for i in $(seq 8); do echo $i > a/$i; echo b$i > a/b/$i; done; sed -i s/3/three/ a/3",
            pod,
        )
        sh("mv old/1 a/old1; mv a/b moved; rm a/5; mv a/6 a/7; rm -r old; mkdir e; mkdir e/f", pod)
        expected = tree(pod)
        mount.cli("sync", str(pod), "--stall", "60")
        own_server.faults()
        mount.remount(wipe=True)
        own_server.faults(seed=8, match="/v1/(file|dir|pod)", **faults)
        assert tree(pod, attempts=10) == expected


def _fails(act: Callable[[], object]) -> bool:
    try:
        act()
    except OSError:
        return True
    return False
