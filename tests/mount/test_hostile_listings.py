"""Listings as a hostile or broken server sends them: what is wrong costs itself, and nothing else."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.harness import Mount, Server, mounted
from tests.mount.hostile import Answer, Hostile, entry
from tests.patience import until

LIST = "GET /v1/dir/ls"


@pytest.fixture
def hostile(server: Server) -> Iterator[Hostile]:
    hostile = Hostile(server)
    yield hostile
    hostile.stop()


@pytest.fixture
def mount(tmp_path: Path, hostile: Hostile) -> Iterator[Mount]:
    """A mount that asks again at each look."""
    with mounted(tmp_path, hostile, None, "--attr-ttl", "0", "--timeout", "5") as mount:
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


def _listed(folder: Path) -> list[str] | None:
    try:
        return os.listdir(folder)
    except OSError:
        return None
