"""How often a mount logs in when logins lead nowhere: each one sends the password."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.mount.harness import Mount, Server, mounted
from tests.mount.hostile import Answer, Hostile, Lie, Request
from tests.patience import until

LOGIN = "POST /v2/user/login"
PENDING = 31
WATCHED_S = 6.0
FEW = 12
"""A pause that doubles from a second allows four in that time, and a repeat of the first or two."""


@pytest.fixture
def hostile(own_server: Server) -> Iterator[Hostile]:
    hostile = Hostile(own_server)
    yield hostile
    hostile.stop()


def refusal(status: int) -> Lie:
    return lambda request, truth: Answer(b'{"message": "swarm is away"}', status)


def same_token(request: Request, truth: object) -> Answer:
    return Answer(b'{"address": "0x1", "accessToken": "always-the-same"}')


@pytest.mark.parametrize(
    "lie",
    [refusal(500), refusal(429), refusal(401), same_token],
    ids=["500", "429", "401", "a token that is worth nothing"],
)
def test_pending_files_do_not_log_in_one_by_one(
    tmp_path: Path, hostile: Hostile, own_server: Server, lie: Lie
) -> None:
    with mounted(tmp_path, hostile, own_server.signup(), "--writeback-delay", "0.1") as mount:
        pod = mount.pod()
        (pod / "first").write_text("text")
        mount.sync()
        hostile.answer(LOGIN, lie)
        own_server.kill()  # which ends the sessions
        own_server.start_again()
        before = len(hostile.asked(LOGIN))
        for number in range(PENDING):
            (pod / f"{number}").write_text("text")
        until(lambda: len(hostile.asked(LOGIN)) > before)
        time.sleep(WATCHED_S)
        assert len(hostile.asked(LOGIN)) - before <= FEW
        assert mount.status()["pending"] == PENDING
        hostile.be_honest()
        until(lambda: not mount.status()["pending"])


def test_a_user_is_told_at_once(tmp_path: Path, hostile: Hostile, own_server: Server) -> None:
    with mounted(tmp_path, hostile, own_server.signup()) as mount:
        (mount.pod() / "d").mkdir()
        mount.remount(wipe=True)
        hostile.answer(LOGIN, same_token)
        for endpoint in ("GET /v1/pod/ls", "GET /v1/dir/ls", "POST /v1/pod/open"):
            hostile.answer(endpoint, lambda _request, truth: replace(truth(), status=401))
        before = len(hostile.asked(LOGIN))
        until(lambda: _refused(mount))
        started = time.monotonic()
        for _ in range(50):
            with pytest.raises(PermissionError):
                os.listdir(mount.point / "unknown")
        assert time.monotonic() - started < 30, "not --timeout each"
        assert len(hostile.asked(LOGIN)) - before <= FEW
        hostile.be_honest()
        until(lambda: not _refused(mount))


def _refused(mount: Mount) -> bool:
    try:
        os.listdir(mount.point)
    except PermissionError:
        return True
    return False
