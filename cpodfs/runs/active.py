"""A run in progress as the driver knows it: its folder, its lock, and how to signal who minds it.

Imports `state`; trio. Used by `manager` only.
"""

from __future__ import annotations

import logging
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from cpodfs.runs import state

if TYPE_CHECKING:
    from cpodfs.runs.state import Record

log = logging.getLogger(__name__)

_LOCK_RETRY_S = 0.5


@dataclass
class Run:
    """``lock`` is held until the supervisor has it, None from then on; ``pidfd`` is set once the
    supervisor listens to signals. ``supervisor``: its pid, while it is a child of this process."""

    pod: str
    id: str
    folder: Path
    record: Record
    lock: int | None = None
    pidfd: int | None = None
    supervisor: int | None = None
    cancelled: bool = False
    ended: trio.Event = field(default_factory=trio.Event)

    @property
    def hires(self) -> bool:
        """Whether there may be agreements of it to be ended, which takes some time."""
        if self.record["private"].get("hires"):
            return True
        return bool((state.read_record(self.folder) or {}).get("golem"))

    def signal(self, number: signal.Signals) -> None:
        """Signal the supervisor, if it is there and listens."""
        if self.pidfd is not None:
            try:
                signal.pidfd_send_signal(self.pidfd, number)
            except ProcessLookupError:
                pass

    def pass_on_cancel(self) -> None:
        """Make up for a `RunManager.cancel` that came before the supervisor could be signalled."""
        if self.cancelled:
            self.signal(signal.SIGTERM)

    async def try_lock(self) -> int | None:
        """The lock; None when somebody minds the run, or when it cannot be told now."""
        try:
            return state.take_lock(self.folder)
        except OSError as exc:
            log.warning("run's lock cannot be looked at pod=%r run=%s: %s", self.pod, self.id, exc)
            await trio.sleep(_LOCK_RETRY_S)
            return None

    def write_end(self, outcome: str, error: str | None) -> bool:
        """Write down how it ended. False when the disk is full: then it is worth another try."""
        state.end_record(self.record, outcome, error)
        try:
            state.write_record(self.folder, self.record, durable=True)
            with open(self.folder / state.STREAMS[1], "ab") as file:
                file.write(f"cpodfs: {error}\n".encode(errors="backslashreplace"))
        except OSError as exc:
            log.warning("record not written pod=%r run=%s: %s", self.pod, self.id, exc)
            return exc.errno not in state.FULL
        return True

    def let_go(self) -> None:
        self.close_pidfd()
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def close_pidfd(self) -> None:
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None
