"""Brings one directory listing of the server into the two trees.

Imports the cache and names. Runs without an await, under the directory's lock, so that no call of
ours changes at the server what is being compared. Nobody's bytes vanish: what is dirty here and has
changed there is kept twice, ours under a ``name (conflict <host> <time>)``.
"""

from __future__ import annotations

import logging
import os.path
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from cpodfs.cache.schema import CONTENT, DIR, FILE, MODE, PLACE, ROOT, SENT, UNKNOWN
from cpodfs.cache.store import Inode, Remote, Store
from cpodfs.dfs import DOOMED, Entry
from cpodfs.errors import Conflict
from cpodfs.paths import FILE_NAME_MAX, RUN_NAME, is_safe_remote_name
from cpodfs.sync.ops import Item, left_behind, moved

log = logging.getLogger(__name__)

LATEST_S = 1 << 33
"""Unix time beyond which a server's clock is not believed; nanoseconds must fit 64 bits."""


@dataclass(frozen=True, slots=True)
class NameChange:
    """A name under which the kernel may remember something that is no longer so.

    ``appeared``: there was nothing by that name, which is all that the kernel can remember of it.
    """

    parent: int
    name: str
    appeared: bool = False


@dataclass(slots=True)
class Outcome:
    """What a merge did: ``changes`` for the kernel, ``work`` for the engine, ``missing`` to confirm.

    ``missing``: objects that the listing did not show. The server leaves out what it could not
    fetch just then, so each must be asked for by name before it may be taken as deleted.
    """

    changes: list[NameChange] = field(default_factory=list)
    work: list[Item] = field(default_factory=list)
    missing: list[Remote] = field(default_factory=list)


class Merger:
    """``discard(ino)`` is told of an inode that lost its name, and frees it once nobody has it open.

    ``replaced``: inodes that lost their name to a newer version, while somebody may have them open.
    ``on_taken(pod)`` is told, before it is so, that a pod known here under this name turns out to be,
    or to have been joined with, one that was made elsewhere.
    """

    def __init__(self, store: Store, discard: Callable[[int], None]) -> None:
        self._store = store
        self._discard = discard
        self.replaced: dict[int, tuple[tuple[int, ...], str]] = {}
        self.on_taken: Callable[[str], None] = lambda _pod: None

    def revive(self, ino: int, outcome: Outcome) -> None:
        """Somebody writes to a version that another from the server has replaced under its name,
        through a handle that is still open: it becomes a conflict copy, in the nearest directory
        above that is still there. Raises Conflict when there is none."""
        above, name = self.replaced.pop(ino)
        named = (self._store.get(directory) for directory in above)
        parent = next((d.ino for d in named if d is not None and d.parent is not None), None)
        if parent is None:
            raise Conflict(f"{name}: deleted at the server, with the pod that it was in")
        log.warning("conflict: %r is written to here and was changed at the server", name)
        with self._store.transaction():
            name = self._free_name(parent, name)
            self._store.place(ino, parent, name)
            self._store.mark(ino, PLACE)
        outcome.changes.append(NameChange(parent, name, appeared=True))
        outcome.work.append(("ino", ino))

    def listing(
        self, directory: Inode, rid: int, entries: Iterable[Entry], readonly: set[str]
    ) -> Outcome:
        """Merge a listing of ``directory`` (remote ``rid``); ``readonly`` names received pods."""
        outcome = Outcome()
        with self._store.transaction():
            known = {r.name: r for r in self._store.remote_children(rid)}
            for entry in entries:
                if not self._may_show(directory, entry.name):
                    log.warning(
                        "hidden: unusable name %r in %s",
                        entry.name,
                        self._store.path(directory.ino),
                    )
                    continue
                remote = known.pop(entry.name, None)
                if remote is not None and (remote.kind == DIR) != entry.is_dir:
                    # The server may have both, and show one. Ours counts until it is known gone.
                    outcome.missing.append(remote)
                elif remote is None:
                    self._new(directory, rid, entry, entry.name in readonly, outcome)
                else:
                    if directory.ino == ROOT and bool(remote.readonly) != (entry.name in readonly):
                        self._taken(remote, readonly=not remote.readonly)
                    self._seen(directory, remote, entry, outcome)
            outcome.missing += [r for r in known.values() if r.to_parent is None]
            self._store.set(directory.ino, listed_s=time.time())
        return outcome

    def _taken(self, remote: Remote, *, readonly: bool) -> None:
        """A pod of one's own has become a received one, or the reverse: it is another pod."""
        self.on_taken(remote.name)
        self._store.set_remote(remote.rid, readonly=int(readonly))

    def _may_show(self, directory: Inode, name: str) -> bool:
        return is_safe_remote_name(name) and not (name == RUN_NAME and directory.parent == ROOT)

    def gone(self, remote: Remote, outcome: Outcome) -> None:
        """The server has no such object any more. What is dirty here stays, and is sent anew."""
        with self._store.transaction():
            for child in self._store.remote_children(remote.rid):
                self.gone(child, outcome)
            self._store.drop_remote(remote.rid)
            inode = self._store.get(remote.ino) if remote.ino is not None else None
            if inode is None or inode.parent is None:
                return
            if self._is_ours(inode, remote):
                self._store.mark(inode.ino, PLACE if inode.is_dir else PLACE | CONTENT)
                outcome.work.append(("ino", inode.ino))
            else:
                self._unname(inode, outcome)

    def _is_ours(self, inode: Inode, remote: Remote) -> bool:
        """Whether an inode must stay although the server has not, or no longer, got its object:
        what we changed or renamed, and what we only supposed to have arrived there."""
        if inode.is_dir and self._store.has_children(inode.ino):
            return True
        if inode.dirty & CONTENT:
            return True
        ours = inode.dirty & PLACE or remote.size == UNKNOWN
        return bool(ours and (inode.is_dir or inode.cached))

    def resurrect(self, rid: int, outcome: Outcome) -> None:
        """Give an orphaned directory, which turned out not to be empty, its place here back."""
        remote = self._store.remote(rid)
        if remote is None or remote.ino is not None or remote.rparent is None:
            return
        with self._store.transaction():
            home = self._store.remote(remote.rparent)
            if home is not None and home.ino is None:
                self.resurrect(home.rid, outcome)
                home = self._store.remote(remote.rparent)
            if home is None or home.ino is None:
                return
            name = remote.name
            if self._store.child(home.ino, name):
                name = self._free_name(home.ino, name)
            inode = self._store.create(home.ino, name, DIR, remote.mode)
            self._store.set_remote(rid, ino=inode.ino)
            self._store.replace(inode.ino)
            outcome.changes.append(NameChange(home.ino, name, appeared=True))
            outcome.work.append(("ino", inode.ino))

    # -- one entry --------------------------------------------------------------------------------

    def _new(
        self, directory: Inode, rid: int, entry: Entry, readonly: bool, outcome: Outcome
    ) -> None:
        """An object where we knew of none: ours with a lost reply, or somebody else's."""
        if entry.is_dir and DOOMED.fullmatch(entry.name):
            # On its way out through the pod's root when the client that moved it there died.
            orphan = self._store.add_remote(
                *(rid, entry.name, DIR), size=0, mtime_s=None, mode=entry.mode, ino=None
            )
            outcome.work.append(("rid", orphan))
            return
        if self._store.remote_at(rid, entry.name) is not None:
            return  # supposed to be there since this merge began: ours, or on its way out
        on_its_way = self._store.remote_moving_to(rid, entry.name)
        if on_its_way is not None:
            outcome.work += moved(self._store, on_its_way.rid, rid, entry.name)
            return
        local = self._store.child(directory.ino, entry.name)
        ino: int | None = None
        if local is not None:
            ours = local.is_dir if entry.is_dir else bool(local.dirty & SENT)
            elsewhere = self._store.remote_of(local.ino)
            if ours and (elsewhere is None or local.is_dir):
                ino = local.ino
                if local.is_dir:
                    self._join(local, entry)
                if elsewhere is not None:
                    # Its new home, made by us or not: the children will follow.
                    outcome.work += left_behind(self._store, elsewhere)
            elif ours:
                # Our upload to its new name, whose answer was lost: the next one goes over it.
                self._store.add_remote(
                    *(rid, entry.name, FILE),
                    size=UNKNOWN,
                    mtime_s=None,
                    mode=entry.mode,
                    ino=None,
                )
                return
            else:
                self._set_aside(local, outcome)
        if ino is None:
            ino = self._create(directory.ino, entry).ino
            if directory.listed_s:  # else nobody can have been told that there was no such name
                outcome.changes.append(NameChange(directory.ino, entry.name, appeared=True))
        self._store.add_remote(
            *(rid, entry.name, DIR if entry.is_dir else FILE),
            size=entry.size,
            mtime_s=entry.mtime_s,
            mode=entry.mode,
            ino=ino,
            readonly=int(readonly),
        )
        self._store.replace(ino)

    def _join(self, local: Inode, entry: Entry) -> None:
        """A directory of ours and the server's of that name are one from now on."""
        if local.parent == ROOT:
            # Or ours after all, made by a call that got no answer: nothing tells.
            self.on_taken(entry.name)
        self._store.unmark(local.ino, SENT)
        if (local.mode ^ entry.mode) & 0o700:
            self._store.mark(local.ino, MODE)

    def _seen(self, directory: Inode, remote: Remote, entry: Entry, outcome: Outcome) -> None:
        """An object that we knew, here under the name that we knew."""
        news: dict[str, Any] = {
            "size": entry.size,
            "mtime_s": entry.mtime_s,
            "slack_s": 0,
            "mode": entry.mode,
            # Not to_parent: a directory on its way, moved object by object, is in both places, and
            # forgotten here it would be a stranger's there. Whoever resolves the move looks at both.
        }
        local = self._store.get(remote.ino) if remote.ino is not None else None
        if local is not None and remote.mode != entry.mode and not local.dirty & MODE:
            self._store.set(local.ino, mode=entry.mode)
        same = remote.is_version(entry.size, entry.mtime_s)
        if entry.is_dir or same:
            self._store.set_remote(remote.rid, **news)
            return
        if local is None:  # deleted here, changed there since: the newer version is somebody's work
            self._store.set_remote(remote.rid, **news)
            self._adopt(directory.ino, remote.rid, entry, outcome)
            return
        self._store.set_remote(remote.rid, ino=None)
        if local.dirty & CONTENT:
            self._set_aside(local, outcome)
        else:
            self._replaced(local)
        self._store.set_remote(remote.rid, **news)
        place = local if local.parent is not None else directory
        parent, name = (
            (place.parent, place.name) if local.parent is not None else (directory.ino, entry.name)
        )
        assert parent is not None
        self._adopt(parent, remote.rid, entry, outcome, name or entry.name)

    def _adopt(
        self, parent: int, rid: int, entry: Entry, outcome: Outcome, name: str | None = None
    ) -> None:
        """A new inode for new content: the kernel keeps what it knows of an inode's pages."""
        wanted = name or entry.name
        occupant = self._store.child(parent, wanted)
        if occupant is not None:
            self._set_aside(occupant, outcome)
        inode = self._create(parent, entry, wanted)
        self._store.set_remote(rid, ino=inode.ino)
        self._store.replace(inode.ino)
        outcome.changes.append(NameChange(parent, wanted))
        outcome.work.append(("ino", inode.ino))

    def _create(self, parent: int, entry: Entry, name: str | None = None) -> Inode:
        return self._store.create(
            *(parent, name or entry.name, DIR if entry.is_dir else FILE),
            entry.mode,
            size=entry.size,
            mtime_ns=min(entry.mtime_s, LATEST_S) * 1_000_000_000
            or None,  # the list of pods has no times
        )

    def _set_aside(self, local: Inode, outcome: Outcome) -> None:
        """Rename ours, here, to a conflict name; it goes to the server beside the other version."""
        assert local.parent is not None
        assert local.name is not None
        name = self._free_name(local.parent, local.name)
        log.warning("conflict: %s changed here and at the server; ours is now %r", local.name, name)
        outcome.changes += [
            NameChange(local.parent, local.name),
            NameChange(local.parent, name, appeared=True),
        ]
        self._store.place(local.ino, local.parent, name)
        outcome.work.append(("ino", local.ino))

    def _free_name(self, parent: int, name: str) -> str:
        stem, extension = os.path.splitext(name)
        stamp = time.strftime("%Y-%m-%d %H.%M.%S", time.gmtime())
        for number in range(1000):
            suffix = (
                f" (conflict {platform.node()} {stamp}{f' {number}' if number else ''}){extension}"
            )
            room = FILE_NAME_MAX - len(suffix.encode())
            candidate = stem.encode()[:room].decode(errors="ignore") + suffix
            if self._store.child(parent, candidate) is None:
                return candidate
        raise AssertionError("a thousand conflicts in one second")

    def _unname(self, inode: Inode, outcome: Outcome) -> None:
        assert inode.parent is not None
        assert inode.name is not None
        outcome.changes.append(NameChange(inode.parent, inode.name))
        self._replaced(inode)

    def _replaced(self, inode: Inode) -> None:
        assert inode.parent is not None
        assert inode.name is not None
        self._store.detach(inode.ino)
        if inode.is_file:
            above = tuple(a.ino for a in self._store.ancestors(inode.parent))
            self.replaced[inode.ino] = (above, inode.name)
        self._discard(inode.ino)
