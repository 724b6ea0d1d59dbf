"""Who waits for whom, among objects that stand in each other's way. Leaf: imports only ``Item``.

Each object waits for at most one other, so that a ring of them (a↔b) shows itself by following.
"""

from __future__ import annotations

from cpodfs.sync.ops import Item


class Waits:
    def __init__(self) -> None:
        self._on: dict[Item, Item] = {}
        self._waiting: dict[Item, set[Item]] = {}

    def __contains__(self, item: Item) -> bool:
        return item in self._on

    def add(self, item: Item, on: Item) -> list[Item]:
        """``item`` waits for ``on``; returns the ring that this closes, or nothing."""
        self._on[item] = on
        self._waiting.setdefault(on, set()).add(item)
        chain = self.chain(item)
        return chain if self._on.get(chain[-1]) == item else []

    def chain(self, item: Item) -> list[Item]:
        """``item``, what it waits for, what that waits for, …; a ring once round."""
        chain, seen = [item], {item}
        while (on := self._on.get(chain[-1])) is not None and on not in seen:
            chain.append(on)
            seen.add(on)
        return chain

    def remove(self, item: Item) -> None:
        """``item`` waits no more."""
        on = self._on.pop(item, None)
        if on is not None:
            self._waiting[on].discard(item)
            if not self._waiting[on]:
                del self._waiting[on]

    def pop(self, on: Item) -> set[Item]:
        """All that wait for ``on``, which from now on do not."""
        waiting = self._waiting.pop(on, set())
        for item in waiting:
            del self._on[item]
        return waiting
