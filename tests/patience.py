"""How long tests wait: for what must come, so long that only what never comes fails a test.

A deadline here is no promise of cpodfs's. Where a duration is the promise, the test makes its
alternative last much longer than any busy machine needs, or waits for the events in their order.
"""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_S = 300.0
"""For one thing that another process does."""
POLL_S = 0.01


def until(true: Callable[[], object]) -> None:
    """Wait for what other processes do and no event tells."""
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(POLL_S)
