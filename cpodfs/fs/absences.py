"""Which names the kernel believes not to exist, because it was told so a moment ago.

A leaf. A name that appears at the server must be taken out of the kernel's memory if it is there as
absent, and only then: the kernel drops whatever it knows by that name, and with it the working
directory of somebody who has just gone there. Synchronous throughout.
"""

from __future__ import annotations

import time
from itertools import islice

ABSENT_TIMEOUT_S = 1.0
"""How long the kernel may remember that there is no such name."""
_LATE_S = 0.1
"""What is so near its end will be forgotten by the time that news of it arrive."""


class Absences:
    """Names as (inode of the directory, name)."""

    def __init__(self) -> None:
        self._told: dict[tuple[int, str], float] = {}  # until when; the oldest first

    def asked(self, parent: int, name: str) -> None:
        """The kernel asks, so it remembers nothing by that name."""
        self._told.pop((parent, name), None)

    def told(self, parent: int, name: str) -> None:
        """The kernel is about to be told that there is no such name."""
        now = time.monotonic()
        for known in list(islice(self._told, 2)):  # two for each new one, so they do not pile up
            if self._told[known] < now:
                del self._told[known]
        self._told[parent, name] = now + ABSENT_TIMEOUT_S

    def believed(self, parent: int, name: str) -> bool:
        """Whether the kernel would go on saying that there is no such name."""
        return self._told.get((parent, name), 0.0) - time.monotonic() > _LATE_S
