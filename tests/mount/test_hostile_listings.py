"""Listings as a hostile or broken server sends them: what is wrong costs itself, and nothing else."""

from __future__ import annotations

import errno
import itertools
import json
import os
import select
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mount.harness import Mount, Server, mounted, peak_mib
from tests.mount.hostile import Answer, Hostile, Request, entry, listing
from tests.patience import until

LIST = "GET /v1/dir/ls"
PODS = "GET /v1/pod/ls"
MANY = 20_000
SERVED = 50
"""How often others are served while so many entries are listed: thousands of times, in fact."""
MOST_MIB = 300


@pytest.fixture
def hostile(server: Server) -> Iterator[Hostile]:
    hostile = Hostile(server)
    yield hostile
    hostile.stop()


@pytest.fixture
def mount(tmp_path: Path, hostile: Hostile) -> Iterator[Mount]:
    """A mount that asks again at each look."""
    with mounted(tmp_path, hostile, None, "--attr-ttl", "0", "--timeout", "120") as mount:
        yield mount


def test_names_that_no_file_can_have_are_left_out(mount: Mount, hostile: Hostile) -> None:
    entries = [entry(name) for name in ("good", "..", "a/b", "nul\\u0000", "", "x" * 300)]
    body = f'{{"files":[{",".join(entries)}],"dirs":null}}'.encode()
    pod = mount.pod()
    mount.sync()
    mount.remount(wipe=True)
    hostile.answer(LIST, lambda _request, _truth: Answer(body))
    assert os.listdir(pod) == ["good"]


@pytest.mark.parametrize("body", [b"", b"{", b'{"files": 1}', b"[]", b'"gone"'])
def test_what_is_no_listing_is_an_error_until_the_server_speaks_sense(
    mount: Mount, hostile: Hostile, body: bytes
) -> None:
    pod = mount.pod()
    (pod / "f").write_text("f")
    mount.sync()
    mount.remount(wipe=True)
    hostile.answer(LIST, lambda _request, _truth: Answer(body))
    with pytest.raises(OSError) as refused:
        os.listdir(pod)
    assert refused.value.errno == errno.EIO
    asked = len(hostile.asked(LIST))
    hostile.be_honest()
    until(lambda: _listed(pod) == ["f"])
    assert len(hostile.asked(LIST)) > asked


def test_a_malformed_entry_costs_itself(mount: Mount, hostile: Hostile) -> None:
    pod = mount.pod()
    (pod / "known").write_text("known")
    (pod / "other").write_text("other")
    mount.sync()

    def lie(_request: Request, truth: Callable[[], Answer]) -> Answer:
        listed = json.loads(truth().body)
        for broken in listed["files"]:
            if broken["name"] == "known":
                broken["size"] = "-1"
        listed["files"] += [None, {"name": 3}, {**listed["files"][0], "name": "new", "size": 3}]
        return Answer(json.dumps(listed).encode())

    hostile.answer(LIST, lie)
    until(lambda: "new" in os.listdir(pod))
    assert sorted(os.listdir(pod)) == ["known", "new", "other"], "what was known stays"
    assert (pod / "known").read_text() == "known"
    assert "3 malformed entries left out of the listing of 'pod'" in mount.logged()


def test_a_long_listing_holds_nobody_else_up(
    tmp_path: Path, server: Server, hostile: Hostile
) -> None:
    with mounted(tmp_path, hostile, None, "--attr-ttl", "3600") as mount:
        pod, other = mount.pod(), mount.pod("other")
        mount.sync()
        mount.remount(wipe=True)
        (other / "f").write_text("f")
        mount.sync()
        long = Answer(listing(MANY))
        hostile.answer(LIST, lambda _request, _truth: long)
        served = 0
        with subprocess.Popen(["ls", "-f", pod], stdout=subprocess.PIPE) as ls:
            assert ls.stdout is not None
            while not select.select([ls.stdout], [], [], 0)[0]:
                assert not (other / f"absent{served}").exists()
                assert (other / "f").read_text() == "f"
                served += 1
            names = set(ls.stdout.read().split())
        assert names == {f"f{n}".encode() for n in range(MANY)}
        assert served > SERVED
        assert peak_mib(mount.pid) < MOST_MIB


@pytest.mark.parametrize(
    ("endpoint", "start"), [(LIST, b'{"files":['), (PODS, b'{"pods":["pod"],"sharedPods":[')]
)
def test_a_listing_without_end_is_an_error(
    mount: Mount, hostile: Hostile, endpoint: str, start: bytes
) -> None:
    """As is one of more pods than a user can have."""
    pod = mount.pod()
    mount.sync()
    mount.remount(wipe=True)
    item = '"p%d"' if endpoint == PODS else f'{{"name":"{"x" * 200}%d"}}'

    def endless() -> Iterator[bytes]:
        yield start
        for number in itertools.count(step=1000):
            yield "".join(f"{item % n}," for n in range(number, number + 1000)).encode()

    hostile.answer(endpoint, lambda _request, _truth: Answer(endless()))
    with pytest.raises(OSError) as refused:
        os.listdir(mount.point if endpoint == PODS else pod)
    assert refused.value.errno == errno.EIO
    said = "more than 65,535 pods" if endpoint == PODS else "the directory is too large"
    until(lambda: said in mount.logged())
    assert peak_mib(mount.pid) < MOST_MIB
    hostile.be_honest()
    until(lambda: _listed(mount.point) == ["pod"])


def _listed(folder: Path) -> list[str] | None:
    try:
        return os.listdir(folder)
    except OSError:
        return None
