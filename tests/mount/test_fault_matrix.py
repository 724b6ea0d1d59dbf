"""Each fault of server, network and disk, and what users must be spared: hangs, lies and losses.

One story for all: a mount that knows some of a pod and has read some of it; the fault begins; what
is cached is read and everything is written, at once; what is not cached is waited for, but not for
long, and fails with the right errno; the fault ends; all is uploaded, and found by a mount with an
empty cache.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.mount.harness import Mount, Server, mounted, sh, tree
from tests.mount.proxy import Line

KB = 1000
BIG = 400 * KB
TIMEOUT_S = 1.0
QUICK = ("--writeback-delay", "0.1", "--timeout", str(TIMEOUT_S))
AT_ONCE_S = 2.0
"""For what needs no server. On a quiet machine these are milliseconds."""
PATIENCE_S = 4 * TIMEOUT_S
"""For what needs one: opening, reading and listing may each wait for ``--timeout``."""
EVERYTHING = "/v[12]/"


@dataclass
class Broken:
    """What a fault can be made of."""

    server: Server
    line: Line

    def mend(self) -> None:
        self.server.faults()
        self.line.cut()


Act = Callable[[Broken], None]


def injected(**faults: Any) -> Act:
    return lambda broken: broken.server.faults(**{"seed": 7, "match": EVERYTHING, **faults})


@dataclass(frozen=True)
class Fault:
    """``reads``: what an uncached read gives; None: the content, in spite of the fault."""

    begin: Act
    reads: int | None
    end: Act = Broken.mend
    lists: int | None = None


def _down(broken: Broken) -> None:
    broken.server.kill()


def _up(broken: Broken) -> None:
    broken.server.start_again()


FAULTS = {
    "every answer is 500": Fault(injected(error_rate=1.0), errno.EIO, lists=errno.EIO),
    "every answer is 429": Fault(injected(error_rate=1.0, status=429), errno.EIO, lists=errno.EIO),
    "answers come too late": Fault(
        injected(latency_s=3 * TIMEOUT_S), errno.ETIMEDOUT, lists=errno.ETIMEDOUT
    ),
    "the server is frozen": Fault(
        lambda broken: broken.server.freeze(),
        errno.ETIMEDOUT,
        lambda broken: broken.server.thaw(),
        lists=errno.ETIMEDOUT,
    ),
    "the server is dead": Fault(_down, errno.EHOSTUNREACH, _up, lists=errno.EHOSTUNREACH),
    "no connection lives": Fault(
        injected(drop_rate=1.0), errno.EHOSTUNREACH, lists=errno.EHOSTUNREACH
    ),
    "reset in the middle of an upload": Fault(lambda broken: broken.line.cut(up=BIG // 2), None),
    "reset in the middle of a download": Fault(
        lambda broken: broken.line.cut(down=BIG // 2), errno.EHOSTUNREACH
    ),
    "downloads are cut short": Fault(injected(truncate_rate=1.0), errno.EIO),
    "the session expires all the time": Fault(injected(expire_every=2), None),
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
            _within(PATIENCE_S, lambda: _read_uncached(pod, fault.reads))
            _within(PATIENCE_S, lambda: _list_unknown(pod, fault.lists))
            if fault.reads is not None and fault.lists is not None:
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

    _within(AT_ONCE_S, work)


def _within(limit_s: float, act: Callable[[], None]) -> None:
    started = time.monotonic()
    act()
    took = time.monotonic() - started
    assert took < limit_s, f"{took:.1f} s"


def _expecting(code: int | None, act: Callable[[], None]) -> None:
    if code is None:
        act()
        return
    with pytest.raises(OSError) as caught:
        act()
    assert caught.value.errno == code, errno.errorcode[caught.value.errno or 0]


def _read_uncached(pod: Path, code: int | None) -> None:
    def read() -> None:
        assert (pod / "d/uncached").read_bytes() == b"u" * BIG

    _expecting(code, read)


def _list_unknown(pod: Path, code: int | None) -> None:
    def listing() -> None:
        assert os.listdir(pod / "unknown") == ["f"]

    _expecting(code, listing)


def _all_arrives(mount: Mount, pod: Path) -> None:
    """After the fault, the mount recovers by itself, and what it shows is what others will see."""
    mount.cli("sync", str(pod), "--stall", "30")
    expected = tree(pod)
    assert {"d/new", "d/renamed", "made/inside/f", "d/uncached", "unknown/f"} <= expected.keys()
    assert not {"d/old", "d/cached"} & expected.keys()
    mount.remount(wipe=True)
    assert tree(pod) == expected
