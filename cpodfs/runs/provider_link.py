"""The supervisor's end of the line to a provider run's process: JSON lines to record and spools.

Imports `stream` and the standard library only, like all that the supervisor loads. The process is
ours, but what it passes on is not: a line that is not understood is text for the log.
"""

from __future__ import annotations

import binascii
import contextlib
import json
import os
import sys

from cpodfs.runs.stream import Spool

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_CHUNK_BYTES = 64 * 1024
_LINE_LIMIT_BYTES = 4 << 20

GRACE_S = 30.0
"""From SIGTERM to SIGKILL: time to end agreements and to pay."""


def command() -> list[str]:
    """argv of the process. -P: nothing of the pod stands in for a module of ours."""
    return [sys.executable, "-P", "-m", "cpodfs.runs.provider"]


def clean_up(
    status: dict[str, Any],
    env: dict[str, str],
    words: int,
    *,
    last: bool = False,
    until: str | None = None,
) -> None:
    """End and pay what a run left at the market; ``status`` is brought up to date.

    Takes `GRACE_S` at most. ``words``: a descriptor for what there is to complain of. ``env``: with
    the app-key. ``last``: nobody will try again, so invoices that have not come are forgotten.
    ``until``: when the run ended, if it has: more time is not paid for.
    Nothing to do when the ``phase`` is "over"; it is not if something may be open still.
    """
    import subprocess

    if status["phase"] == "over":
        return
    open_ones = [one for one in status["providers"] if is_open(one) or is_owed(one)]
    job = {
        "agreements": open_ones,
        "signing": status.get("signing") or [],
        "demands": status.get("demands") or [],
        "allocations": status.get("allocations") or list(filter(None, [status["allocation"]])),
        **{key: status.get(key) for key in ("payer", "begun", "expires")},
        "last": last,
        "until": until,
    }
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "cpodfs.runs.provider_cleanup"],
            input=json.dumps(job).encode(),
            stdout=subprocess.PIPE,
            stderr=words,
            env=env,
            cwd="/",
            timeout=GRACE_S,
            check=False,
        )
        ended = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        ended = {}
    for one in open_ones:
        one.update(ended.get(one["agreement"], {}))
    for total in ("spent", "accepted"):
        known = sum(one[total] for one in status["providers"])
        status[total] = round(known + status.get("earlier", {}).get(total, 0.0), 12)
    if ended.get("released"):
        status["phase"] = "over"
        status |= {key: [] for key in ("signing", "demands", "allocations") if key in status}
        return
    status["phase"] = "unsettled"
    with contextlib.suppress(OSError):  # a full disk
        os.write(words, b"cpodfs: not all agreements are ended and paid; see golem in run.json\n")


def is_owed(hired: dict[str, Any]) -> bool:
    """Whether a provider has worked and has neither been paid nor billed too much."""
    worked = hired["activity"] is not None and hired["agreement_state"] != "expired"
    return worked and not hired["paid"] and not hired.get("refused")


def is_open(hired: dict[str, Any]) -> bool:
    """Whether an agreement is to be ended: it may cost something as long as nobody does."""
    return hired["agreement_state"] in ("approved", "confirming", "vanished")


def is_any_open(status: dict[str, Any]) -> bool:
    """Whether there are agreements that are to be ended."""
    return any(map(is_open, status["providers"])) or bool(status.get("signing"))


class Link:
    """The process's stdout. Like the supervisor's own streams: `pump` moves one chunk.

    ``spools``: by stream name (``stdout``, ``stderr``). ``on_status`` gets each status.
    ``end``: the last word, {error, exit_code}, or None when there was none (yet).
    """

    def __init__(
        self, pipe: int, spools: dict[str, Spool], on_status: Callable[[dict[str, Any]], None]
    ) -> None:
        self.pipe = pipe
        self.end: dict[str, Any] | None = None
        self._spools = spools
        self._on_status = on_status
        self._line = b""
        os.set_blocking(pipe, False)

    full = False
    """The process never has to wait for the disk: it has agreements and a timeout to look after."""

    def pump(self) -> bool | None:
        """Move one chunk. True: moved; False: nothing now; None: closed."""
        try:
            chunk = os.read(self.pipe, _CHUNK_BYTES)
        except BlockingIOError:
            return False
        if not chunk and not self._line:
            return None
        *lines, self._line = (self._line + chunk).split(b"\n")
        if self._line and (not chunk or len(self._line) > _LINE_LIMIT_BYTES):
            lines, self._line = [*lines, self._line], b""
        for line in lines:
            self._take(line)
        return True

    def _take(self, line: bytes) -> None:
        try:
            message = json.loads(line)
            if "log" in message:
                data = binascii.a2b_base64(message["data"])
                self._spools[message["log"]].offer(data)
            elif "status" in message:
                self._on_status(dict(message["status"]))
            elif "end" in message:
                self.end = dict(message["end"])
            else:
                raise KeyError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self._spools["stderr"].offer(line + b"\n")
