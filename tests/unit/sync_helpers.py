"""A small world for tests of writeback: a cache on disk and a plan carried out without a server."""

from __future__ import annotations

from pathlib import Path

from cpodfs.cache.content import Content
from cpodfs.cache.durability import Durability
from cpodfs.cache.schema import CONTENT, DIR, FILE, PLACE, ROOT
from cpodfs.cache.store import Store
from cpodfs.sync.ops import Item, Look, Op, move_aside
from cpodfs.sync.planner import Blocked, Planner


class World:
    """``calls`` lists what was asked of the server, in order, as text."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder / "meta.db")
        self.content = Content(folder / "content")
        self.planner = Planner(self.store, Durability(self.store, self.content))
        self.calls: list[str] = []

    def make(self, parent: int, name: str, kind: str = FILE, mode: int = 0o600) -> int:
        """Something new here, of which the server has not heard."""
        dirty = PLACE if kind == DIR else PLACE | CONTENT
        mode = 0o700 if kind == DIR else mode
        inode = self.store.create(parent, name, kind, mode, cached=1, dirty=dirty)
        if kind == DIR:
            self.store.set(inode.ino, listed_s=2.0)
        return inode.ino

    def pod(self, name: str = "pod") -> int:
        ino = self.make(ROOT, name, DIR)
        self.settle()
        self.calls.clear()
        return ino

    def move(self, ino: int, parent: int, name: str) -> None:
        self.store.place(ino, parent, name)

    def remove(self, ino: int) -> None:
        self.store.detach(ino)

    def settle(self) -> list[str]:
        """Carry out whatever is planned, pretending that the server does as it is told."""
        for _ in range(1000):
            items = [("ino", i.ino) for i in self.store.pending_inodes()]
            items += [("rid", rid) for rid in self.store.orphans()]
            plans = {item: self.planner.plan(item) for item in items}
            ops = [plan for plan in plans.values() if isinstance(plan, Op)]
            if not ops and not (ops := self._aside(plans)):
                break
            self._carry_out(ops[0])
        return self.calls

    def _aside(self, plans: dict[Item, object]) -> list[Op]:
        for item, plan in plans.items():
            remote = self.store.remote_of(item[1]) if item[0] == "ino" else None
            if isinstance(plan, Blocked) and remote and not remote.name.startswith(".cpodfs-"):
                return [move_aside(self.store, remote)]
        return []

    def _carry_out(self, op: Op) -> None:
        target = getattr(op, "name", None) or getattr(op, "to_name", "")
        path = ""
        if hasattr(op, "rid"):
            path = "/".join(self.store.remote_path(op.rid))
        self.calls.append(" ".join(filter(None, [type(op).__name__, path, target])))
        if isinstance(op, Look):
            self.store.set(op.item[1], listed_s=2.0)
            return
        op.before(self.store)
        op.done(self.store)

    def remote_tree(self) -> set[str]:
        found = set()
        pending = [ROOT]
        while pending:
            for child in self.store.remote_children(pending.pop()):
                found.add("/".join(self.store.remote_path(child.rid)))
                pending.append(child.rid)
        return found

    def local_tree(self) -> set[str]:
        found = set()
        pending = [ROOT]
        while pending:
            for child in self.store.children(pending.pop()):
                found.add(self.store.path(child.ino))
                pending.append(child.ino)
        return found
