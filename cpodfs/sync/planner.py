"""Decides, from the two trees alone, the next call that one object needs.

Imports the cache and ops. Pure but for bits that turn out to be settled. An object goes to its place
only when its directory is in place and the name there is free (an upload may replace an orphaned
file); else it is blocked on whoever stands in the way. Chains of blocked objects can close to a ring
(a↔b): the engine sees that and moves one aside.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from cpodfs.cache.durability import Durability
from cpodfs.cache.schema import (
    CONTENT,
    DAMAGED,
    DIR,
    FILE,
    LINK,
    MODE,
    OUTDATED_S,
    PLACE,
    ROOT,
    SENT,
    UNKNOWN,
)
from cpodfs.cache.store import Inode, Remote, Store
from cpodfs.sync.ops import (
    Chmod,
    CreatePod,
    Item,
    Look,
    Mkdir,
    Move,
    Op,
    Rehome,
    RemoveDir,
    RemoveFile,
    Resolve,
    Upload,
    pod_of,
)

LOOKS_S = 120.0
"""For so long the looks that precede a deletion count, however long a slow server takes for each."""


@dataclass(frozen=True, slots=True)
class Blocked:
    """Nothing can be done for an object until something was done for ``on``."""

    on: Item


@dataclass(frozen=True, slots=True)
class Damaged:
    """The data file of an inode lost bytes that were written: it must not be sent."""

    ino: int


Plan = Op | Blocked | Damaged | None


class Planner:
    """``fresh_s``: for so long a listing tells what the server has under a name."""

    def __init__(self, store: Store, durability: Durability, fresh_s: float = float("inf")) -> None:
        self._store = store
        self._durability = durability
        self._fresh_s = fresh_s
        self._began_s: dict[int, float] = {}

    def plan(self, item: Item) -> Plan:
        """The next operation for an object, what it waits for, or None when it is as it should be."""
        kind, number = item
        return self._plan_inode(number) if kind == "ino" else self._plan_orphan(number)

    def _plan_inode(self, ino: int) -> Plan:
        mine = self._store.remote_of(ino)
        if mine is not None and mine.to_parent is not None:
            return self._resolve(("ino", ino), mine)
        inode = self._store.get(ino)
        if inode is None or inode.parent is None or not inode.dirty or inode.kind == LINK:
            return None
        if inode.dirty & DAMAGED:
            return self._separate(inode, mine)
        home = self._store.remote_of(inode.parent)
        moving = self._store.moving_above(home.rid) if home is not None else None
        if moving is not None:
            return Blocked(moving.item)
        unsettled = self._unsettled_above(inode)
        if unsettled is not None or home is None:
            return Blocked(("ino", inode.parent if unsettled is None else unsettled))
        assert inode.name is not None
        there = self._store.remote_at(home.rid, inode.name)
        if there is not None and mine is not None and there.rid == mine.rid:
            there = None
            if inode.dirty & PLACE:
                self._store.unmark(ino, PLACE)
        arriving = self._store.remote_moving_to(home.rid, inode.name)
        leaving = there if there is not None and there.to_parent is not None else None
        if (other := arriving or leaving) is not None:
            return Blocked(other.item)  # else nobody could tell which of the two is there
        there = self._without_ghost(inode, there)
        if inode.is_dir:
            return self._plan_dir(inode, mine, home, there)
        return self._plan_file(inode, mine, home, there)

    def _without_ghost(self, inode: Inode, there: Remote | None) -> Remote | None:
        """What stands in the way at an object's place. Not what was to be deleted there and is not
        shown any more; but a file that is sent goes over it, in case that it is there after all."""
        if there is None or not self._is_ghost(there):
            return there
        if there.kind == FILE and inode.is_file and (inode.cached or inode.dirty & CONTENT):
            return there
        self._store.drop_remote(there.rid)
        return None

    def _is_ghost(self, remote: Remote) -> bool:
        """Whether an object, with all that is known to be in it, is to be deleted and not shown."""
        if remote.ino is not None or remote.absent_s is None:
            return False
        return all(self._is_ghost(child) for child in self._store.remote_children(remote.rid))

    def _resolve(self, item: Item, moving: Remote) -> Plan:
        """Find out first whether the server has renamed it, unless its directories move, too."""
        dirs = {rid for rid in (moving.rparent, moving.to_parent) if rid is not None}
        for rid in dirs:
            above = self._store.moving_above(rid)
            if above is not None and above.rid != moving.rid:
                return Blocked(above.item)
        return Resolve(item, tuple(dirs))

    def _unsettled_above(self, inode: Inode) -> int | None:
        """The topmost directory above that is not in place at the server, if any.

        A file only needs its own directory to exist, wherever its path leads now; a directory that
        moves could otherwise be sent below itself.
        """
        above = self._store.ancestors(inode.ino)[1:]
        if inode.is_file:
            above = above[:1]
        return next((a.ino for a in reversed(above) if a.dirty & PLACE), None)

    def _plan_dir(
        self, inode: Inode, mine: Remote | None, home: Remote, there: Remote | None
    ) -> Plan:
        name = inode.name or ""
        if mine is None:
            if there is not None:
                return Blocked(there.item)
            if home.rid == ROOT:
                return CreatePod(("ino", inode.ino), (ROOT,), inode.ino, name)
            return Mkdir(("ino", inode.ino), (home.rid,), inode.ino, home.rid, name)
        if (mine.rparent, mine.name) != (home.rid, name):
            if there is not None:
                return Blocked(there.item)
            return self._move_dir(inode, mine, home)
        self._store.unmark(inode.ino, SENT)  # what was sent to move it is for nothing
        return self._chmod(inode, mine)

    def _move_dir(self, inode: Inode, mine: Remote, home: Remote) -> Plan:
        item: Item = ("ino", inode.ino)
        if not inode.listed_s and mine.rid not in self._store.looked:
            return Look(item, (mine.rid,), mine.rid)
        name = inode.name or ""
        # What is outdated has a directory that is not shown yet, or may have.
        has_dirs = inode.listed_s <= OUTDATED_S or self._store.has_remote_dirs(mine.rid)
        if has_dirs or self._is_doubtful(mine):
            return Rehome(item, (home.rid,), inode.ino, mine.rid, home.rid, name)
        return self._move(mine, home, name)

    def _plan_file(
        self, inode: Inode, mine: Remote | None, home: Remote, there: Remote | None
    ) -> Plan:
        name = inode.name or ""
        elsewhere = mine is not None and (mine.rparent, mine.name) != (home.rid, name)
        if there is not None and (there.ino is not None or there.kind == DIR):
            return Blocked(there.item)
        if not inode.dirty & CONTENT and mine is not None and elsewhere:
            doubtful = there is None and self._is_doubtful(mine)
            if there is None and not (doubtful and inode.cached):
                return self._move(mine, home, name)
            if there is not None and not inode.cached:
                return Blocked(there.item)
            # Renamed over a file: the server refuses that, and delete + rename would lose the name
            # for a while. Or the server does not show it, and can hardly rename it. We have the
            # bytes: send them.
            self._store.mark(inode.ino, CONTENT)
            inode = self._store.get(inode.ino) or inode
        if inode.dirty & CONTENT or mine is None:
            return self._upload(inode, home, there or (None if elsewhere else mine))
        return self._chmod(inode, mine)

    def _separate(self, inode: Inode, mine: Remote | None) -> Plan:
        """What a damaged file leaves to do: the server's version must be shown beside it."""
        if mine is None or mine.rparent is None:
            return None
        if mine.size != UNKNOWN:
            return Damaged(inode.ino)
        if self._is_fresh(inode.parent):
            return None
        return Look(("ino", inode.ino), (mine.rparent,), mine.rparent)

    def _upload(self, inode: Inode, home: Remote, known: Remote | None) -> Plan:
        item: Item = ("ino", inode.ino)
        assert inode.cached, "an upload needs the whole content"
        is_short = self._durability.content.size_or_0(inode.ino) < inode.size
        if is_short and not self._store.is_doubted(inode):
            in_doubt = known is not None and known.size == UNKNOWN
            if in_doubt and not self._is_fresh(inode.parent):
                return Look(item, (home.rid,), home.rid)  # which version has the server?
            return Damaged(inode.ino)
        if known is None and not self._is_fresh(inode.parent):
            return Look(item, (home.rid,), home.rid)  # is there something of that name by now?
        name = inode.name or ""
        return Upload(item, (home.rid,), inode.ino, home.rid, name, self._durability, known)

    def _is_doubtful(self, remote: Remote) -> bool:
        """Whether the server does not show an object, or a directory that it is in."""
        doubtful = self._store.doubtful_above(remote.rid)
        return doubtful is not None and doubtful.rparent != ROOT

    def _is_fresh(self, directory: int | None) -> bool:
        """Whether the last listing of a directory is recent enough to overwrite what it lacks."""
        inode = self._store.get(directory) if directory is not None else None
        remote = self._store.remote_of(inode.ino) if inode is not None else None
        if inode is None or remote is None:
            return False
        seen_s = max(inode.listed_s, self._store.looked.get(remote.rid, 0.0))
        return 0 <= time.time() - seen_s < self._fresh_s

    def _unseen_above(self, orphan: Remote) -> int | None:
        """The topmost directory above an orphan that should be listed before the orphan is deleted:
        its own, and with ``rm -r`` those above that are to be deleted, too, and the one that they
        are in: where a file has their name by now, the server breaks the connection. Each once: before
        the last one was listed, the first may be outdated."""
        now_s = time.time()
        if not 0 <= now_s - self._began_s.get(orphan.rid, -LOOKS_S) < LOOKS_S:
            self._began_s[orphan.rid] = now_s
        since_s = min(self._began_s[orphan.rid], now_s - self._fresh_s)
        found, directory = None, self._remote_above(orphan)
        while directory is not None and directory.rid != ROOT:
            inode = self._store.get(directory.ino) if directory.ino is not None else None
            looked_s = self._store.looked.get(directory.rid, 0.0)
            seen_s = max(looked_s, inode.listed_s) if inode is not None else looked_s
            if not since_s <= seen_s <= now_s:
                found = directory.rid
            if directory.ino is not None:
                break
            directory = self._remote_above(directory)
        return found

    def _remote_above(self, remote: Remote) -> Remote | None:
        return self._store.remote(remote.rparent) if remote.rparent is not None else None

    def _move(self, mine: Remote, home: Remote, name: str) -> Move:
        assert mine.rparent is not None
        assert mine.ino is not None
        dirs = tuple({mine.rparent, home.rid})
        return Move(("ino", mine.ino), dirs, mine.rid, mine.kind == DIR, home.rid, name)

    def _chmod(self, inode: Inode, mine: Remote) -> Plan:
        if not inode.dirty & MODE:
            return None
        if mine.mode == inode.mode or mine.rparent in (ROOT, None):  # a pod has no mode
            self._store.unmark(inode.ino, MODE)
            return None
        assert mine.rparent is not None
        item: Item = ("ino", inode.ino)
        # A directory's mode and its list of children are one object to the server.
        dirs = (mine.rparent, mine.rid) if inode.is_dir else (mine.rparent,)
        return Chmod(item, dirs, inode.ino, mine.rid, inode.is_dir, inode.mode)

    def _plan_orphan(self, rid: int) -> Plan:
        remote = self._store.remote(rid)
        if remote is None or remote.ino is not None or remote.rparent is None:
            self._began_s.pop(rid, None)
            return None
        if remote.to_parent is not None:
            return self._resolve(("rid", rid), remote)
        moving = self._store.moving_above(remote.rparent)
        if moving is not None:
            return Blocked(moving.item)
        if remote.kind == FILE:
            heir = self._heir(remote)
            if heir is not None:
                return Blocked(("ino", heir))
            if remote.absent_s is not None:
                return None
            unseen = self._unseen_above(remote)
            if unseen is not None:
                return Look(("rid", rid), (unseen,), unseen)  # did somebody change it since?
            return RemoveFile(("rid", rid), (remote.rparent,), rid)
        child = self._store.unfinished_child(rid)
        if child is not None:
            return Blocked(child.item)
        if remote.absent_s is not None:
            return None
        arriving = self._store.moving_into(rid)
        if arriving is not None:
            return Blocked(arriving.item)
        dirs = tuple({remote.rparent, rid, pod_of(self._store, remote)})
        return RemoveDir(("rid", rid), dirs, rid)

    def _heir(self, orphan: Remote) -> int | None:
        """The inode whose upload to this very name is due, which spares the deletion."""
        assert orphan.rparent is not None
        home = self._store.remote(orphan.rparent)
        if home is None or home.ino is None:
            return None
        heir = self._store.child(home.ino, orphan.name)
        is_due = heir is not None and heir.is_file and heir.dirty & CONTENT
        return heir.ino if heir is not None and is_due else None
