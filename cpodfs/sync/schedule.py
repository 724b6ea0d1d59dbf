"""Objects and the times at which they are due: a heap whose entries may be stale. Leaf.

Moving an object to a later time costs nothing: its old entry is put right when it comes up.
"""

from __future__ import annotations

import heapq
import time

from cpodfs.sync.ops import Item


class Schedule:
    """Times are ``time.monotonic()`` seconds."""

    def __init__(self) -> None:
        self._due: dict[Item, float] = {}
        self._heap: list[tuple[float, Item]] = []

    def __contains__(self, item: Item) -> bool:
        return item in self._due

    def items(self) -> list[Item]:
        return list(self._due)

    def put(self, item: Item, delay_s: float) -> bool:
        """Make an object due in ``delay_s``; whether that is earlier than it was."""
        due = time.monotonic() + delay_s
        earlier = self._due.get(item)
        self._due[item] = due
        if earlier is not None and due >= earlier:
            return False
        heapq.heappush(self._heap, (due, item))
        return True

    def drop(self, item: Item) -> None:
        self._due.pop(item, None)

    def due_s(self, item: Item) -> float:
        """Seconds until an object in here is due."""
        return max(0.0, self._due[item] - time.monotonic())

    def next_s(self) -> float:
        """Seconds until anything is due; infinite when nothing ever will be."""
        self._settle()
        return max(0.0, self._heap[0][0] - time.monotonic()) if self._heap else float("inf")

    def pop(self) -> Item | None:
        """Take out an object that is due now."""
        if self.next_s() > 0:
            return None
        _, item = heapq.heappop(self._heap)
        del self._due[item]
        return item

    def _settle(self) -> None:
        """Bring an entry that is true to the top."""
        while self._heap:
            due, item = self._heap[0]
            wanted = self._due.get(item)
            if wanted == due:
                return
            heapq.heappop(self._heap)
            if wanted is not None and wanted > due:
                heapq.heappush(self._heap, (wanted, item))
