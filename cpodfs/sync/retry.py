"""When to try again: growing distances per object, and one gate for all while the server is away.

Imports errors. Times are ``time.monotonic()`` seconds. Nothing is ever given up: what the server
refuses for good is tried again at the longest distance, in case somebody mended it.
"""

from __future__ import annotations

import random
import time

from cpodfs.errors import (
    AlreadyExists,
    ChangedDuringUpload,
    Conflict,
    Denied,
    DfsError,
    NotEmpty,
    NotFound,
    NotLoggedIn,
    QuotaExceeded,
    Refused,
    Unreachable,
)
from cpodfs.sync.ops import Item

FIRST_S = 1.0
MAX_S = 300.0
OFFLINE_MAX_S = 30.0
FOR_GOOD = (Refused, Denied, QuotaExceeded, FileNotFoundError)
LOOK_FIRST = (NotFound, AlreadyExists, NotEmpty, Conflict)
"""Our picture of the server was wrong: it is looked at, and then tried again at once."""


class Retry:
    """``attempts``: how often each object has failed since it last changed or succeeded."""

    def __init__(self) -> None:
        self.attempts: dict[Item, int] = {}
        self._offline_until = 0.0
        self._offline_s = 0.0

    @property
    def offline(self) -> bool:
        return self._offline_s > 0

    def gate_s(self) -> float:
        """Seconds for which nothing should be tried at all: the server is away, refuses to log us in,
        or has asked to be left alone."""
        return max(0.0, self._offline_until - time.monotonic())

    def open_gate(self) -> None:
        """Somebody is in a hurry."""
        self._offline_until = 0.0

    def answered(self) -> None:
        self._offline_s = 0.0

    def went_offline(self) -> None:
        """The server does not answer. Of several calls under way then, one moves the gate."""
        if not self.gate_s():
            self._offline_s = min(max(self._offline_s * 2, FIRST_S), OFFLINE_MAX_S)
            self._offline_until = time.monotonic() + self._offline_s * _jitter()

    def failed(self, item: Item, error: Exception) -> float:
        """Count a failure; returns the seconds until the next attempt."""
        away = isinstance(error, Unreachable | NotLoggedIn)
        if away:
            self.attempts.setdefault(item, 0)  # not the object's fault, however often
            self.went_offline()
        if isinstance(error, DfsError) and error.retry_after_s:
            pause_s = min(error.retry_after_s, MAX_S)
            self._offline_until = max(self._offline_until, time.monotonic() + pause_s)
        if away:
            return self.gate_s()
        attempt = self.attempts[item] = self.attempts.get(item, 0) + 1
        if isinstance(error, FOR_GOOD) and attempt > 1:
            return MAX_S * _jitter()
        if isinstance(error, LOOK_FIRST) and attempt == 1:
            return self.gate_s()
        if isinstance(error, Conflict):  # the server is well, however often it failed before
            return max(self.gate_s(), FIRST_S * _jitter())
        return max(self.gate_s(), min(FIRST_S * 2.0 ** min(attempt - 1, 10), MAX_S) * _jitter())


def surely_not_done(error: Exception) -> bool:
    """Whether an upload that ended so cannot have changed anything at the server."""
    if isinstance(error, ChangedDuringUpload | Conflict | OSError):
        return True
    if isinstance(error, DfsError):
        return not error.sent or isinstance(error, Refused | Denied | QuotaExceeded)
    return False


def _jitter() -> float:
    return random.uniform(0.8, 1.2)  # noqa: S311
