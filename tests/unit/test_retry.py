"""When the writeback queue tries again: what is one object's fault, and what holds for all."""

from __future__ import annotations

import pytest

from cpodfs.errors import LoginFailed, NotFound, Overloaded, Refused, ServerError, Unreachable
from cpodfs.sync.ops import Item
from cpodfs.sync.retry import MAX_S, Retry

ONE: Item = ("ino", 1)


def asking(seconds: float, error: Overloaded | LoginFailed) -> Overloaded | LoginFailed:
    error.retry_after_s = seconds
    return error


@pytest.mark.parametrize("kind", [Overloaded, LoginFailed])
def test_a_pause_that_the_server_asks_for_holds_for_all(
    kind: type[Overloaded | LoginFailed],
) -> None:
    retry = Retry()
    delay_s = retry.failed(ONE, asking(100, kind("later")))
    assert delay_s >= retry.gate_s() == pytest.approx(100, abs=5)
    retry.failed(("ino", 2), asking(5, kind("later")))
    assert retry.gate_s() == pytest.approx(100, abs=5), "the longest counts"
    retry.failed(ONE, asking(10_000, kind("later")))
    assert retry.gate_s() <= MAX_S


def test_a_failed_login_is_not_the_objects_fault() -> None:
    retry = Retry()
    for _ in range(10):
        retry.open_gate()
        assert retry.failed(ONE, asking(3, LoginFailed("swarm is away"))) <= 40
    assert retry.attempts == {ONE: 0}
    assert retry.offline


def test_an_error_of_one_object_holds_nobody_else_up() -> None:
    retry = Retry()
    for error in (ServerError("?"), Overloaded("busy"), Refused("no"), NotFound("none")):
        retry.failed(ONE, error)
    assert retry.attempts == {ONE: 4}
    assert not retry.gate_s()
    retry.failed(ONE, Unreachable("gone"))
    assert retry.gate_s()
