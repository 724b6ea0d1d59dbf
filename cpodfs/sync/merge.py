"""Brings one directory listing of the server into the two trees.

Imports the cache and names. Runs under the directory's lock, so that no call of ours changes at the
server what is being compared; a long listing in slices, so that others get in between: each looks at
the trees as they then are. Nobody's bytes vanish: what is dirty here and has changed there is kept
twice, ours under a ``name (conflict <host> <time>)``.
"""

from __future__ import annotations

import logging
import os.path
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from cpodfs.cache.content import Content
from cpodfs.cache.schema import (
    CONTENT,
    DAMAGED,
    DIR,
    FILE,
    MODE,
    OUTDATED_S,
    PLACE,
    ROOT,
    SENT,
    UNKNOWN,
)
from cpodfs.cache.store import Inode, Remote, Store
from cpodfs.dfs import DOOMED, Entry
from cpodfs.errors import Conflict, Held
from cpodfs.paths import FILE_NAME_MAX, RUN_NAME, is_safe_remote_name
from cpodfs.sync.hidden import Hidden
from cpodfs.sync.ops import SERVER_DIR_MODE, Item, left_behind, moved

log = logging.getLogger(__name__)

LATEST_S = 1 << 33
"""Unix time beyond which a server's clock is not believed; nanoseconds must fit 64 bits."""
SLICE_S = 0.002
"""After so long a merge lets others in."""
GHOST_S = 600.0
"""For so long an earlier version of a file that was to be deleted is taken for a lie."""
PAGE = 200
"""Rows looked at in one slice for what a listing did not show, or given up in one."""


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
    """What a merge did: ``changes`` for the kernel, ``work`` for the engine; ``missing`` and
    ``outdated`` to confirm.

    ``missing``: objects that the listing did not show. The server leaves out what it could not
    fetch just then, so that is no proof of their deletion (``doubt.py``). ``shown``: how many it did
    of those that were known, ``unchanged`` of them just as they were; ``returned``: which of these
    had been missing. ``outdated``: files that it shows in an earlier version than the one known, as
    the server does when it cannot read the newest; nothing was changed for that.
    ``clashing``: names of files beside directories of the same name, which the server allows: here
    there is room for one, so the file needs another name at the server. ``replaced``: files that are
    known, and not shown, where a directory is.
    """

    changes: list[NameChange] = field(default_factory=list)
    work: list[Item] = field(default_factory=list)
    missing: list[Remote] = field(default_factory=list)
    outdated: list[Remote] = field(default_factory=list)
    clashing: list[str] = field(default_factory=list)
    replaced: list[int] = field(default_factory=list)
    shown: int = 0
    unchanged: int = 0
    returned: list[Remote] = field(default_factory=list)


def _last(names: set[str | None], entries: Iterable[Entry]) -> Iterator[Entry]:
    """Entries, those of some names after all others. What may have been moved within a directory is
    seen at its old place first: it can be at both, and is then no stranger at either."""
    found: list[Entry] = []
    for entry in entries:
        if entry.name in names:
            found.append(entry)
        else:
            yield entry
    yield from found


class _Ids:
    """A set of remote ids, one bit each: a listing may show a million."""

    def __init__(self) -> None:
        self._bits = bytearray()

    def add(self, rid: int) -> None:
        byte = rid >> 3
        if byte >= len(self._bits):
            self._bits.extend(bytes(byte + 1024 - len(self._bits)))
        self._bits[byte] |= 1 << (rid & 7)

    def __contains__(self, rid: int) -> bool:
        byte = rid >> 3
        return byte < len(self._bits) and bool(self._bits[byte] >> (rid & 7) & 1)


class Merger:
    """``discard(ino)`` is told of an inode that lost its name, and frees it once nobody has it open.

    ``replaced``: inodes that lost their name to a newer version, while somebody may have them open.
    ``on_taken(pod)`` is told, before it is so, that a pod known here under this name turns out to be,
    or to have been joined with, one that was made elsewhere. What ``is_held(inode)`` is not changed.
    """

    def __init__(self, store: Store, content: Content, discard: Callable[[int], None]) -> None:
        self._store = store
        self._content = content
        self._discard = discard
        self.replaced: dict[int, tuple[tuple[int, ...], str]] = {}
        self._hidden = Hidden()
        self.on_taken: Callable[[str], None] = lambda _pod: None
        self.is_held: Callable[[int], bool] = lambda _ino: False

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
            name = self.free_name(parent, name)
            self._store.place(ino, parent, name)
            self._store.mark(ino, PLACE)
        outcome.changes.append(NameChange(parent, name, appeared=True))
        outcome.work.append(("ino", ino))

    def listing(
        self,
        directory: Inode,
        rid: int,
        entries: Iterable[Entry],
        readonly: set[str],
        *,
        complete: bool = True,
        resolving: int | None = None,
    ) -> Iterator[Outcome]:
        """Merge a listing of ``directory`` (remote ``rid``) slice by slice, each of which is one
        transaction; ``readonly`` names received pods. A directory that may have been renamed into this
        one has arrived only for who is ``resolving`` that, and looks at its old place, too. Between two
        slices the trees may change, but the directory must stay: if it does not, do not go on. Only
        what a ``complete`` listing does not show is missing. Raises Held.
        """
        moving = [r for r in self._store.moving() if r.to_parent == rid and r.kind == DIR]
        newest, seen = self._store.newest_rid(), _Ids()
        left = _last({r.to_name for r in moving}, entries)
        other_kind: list[tuple[int, Entry]] = []
        more = True
        while more:
            self.check_free(directory)
            outcome, until = Outcome(), time.perf_counter() + SLICE_S
            with self._store.transaction():
                while more := (entry := next(left, None)) is not None:
                    assert entry is not None
                    other = self._entry(directory, rid, entry, readonly, seen, outcome, resolving)
                    if other is not None:
                        other_kind.append((other, entry))
                    if time.perf_counter() > until:
                        break
                if not more:
                    self._store.set(directory.ino, listed_s=time.time())
            yield outcome
        if other_kind:
            yield self._changed_kinds(directory, other_kind, seen)
        if complete:
            for page in self._unseen(rid, newest, seen):
                yield Outcome(missing=page)

    def _entry(
        self,
        directory: Inode,
        rid: int,
        entry: Entry,
        readonly: set[str],
        seen: _Ids,
        outcome: Outcome,
        resolving: int | None,
    ) -> int | None:
        """Returns the remote id of what we know under this name, if it is of another kind."""
        if not self._may_show(directory, entry.name):
            self._hidden.note(directory.ino, entry.name, self._store.path(directory.ino))
            return None
        remote = self._store.remote_at(rid, entry.name)
        if remote is None:
            arrived = self._store.remote_moving_to(rid, entry.name)
            if arrived is not None and (arrived.kind == DIR) == entry.is_dir:
                seen.add(arrived.rid)
                if entry.is_dir and arrived.rid != resolving:
                    return None
                outcome.work += moved(self._store, arrived.rid, rid, entry.name)
            else:
                self._new(directory, rid, entry, entry.name in readonly, outcome)
                made = self._store.remote_at(rid, entry.name)
                if made is not None and (made.kind == DIR) == entry.is_dir:
                    seen.add(made.rid)
            return None
        if (remote.kind == DIR) != entry.is_dir:
            return remote.rid
        seen.add(remote.rid)
        if directory.ino == ROOT and bool(remote.readonly) != (entry.name in readonly):
            self._taken(remote, readonly=not remote.readonly)
        self._seen(directory, remote, entry, outcome)
        return None

    def _unseen(self, rid: int, newest: int, seen: _Ids) -> Iterator[list[Remote]]:
        """What is known to be in a directory, was so before the listing was merged, and is not in
        it; page by page."""
        for page in self._pages(rid):
            yield [r for r in page if r.rid <= newest and r.rid not in seen and r.to_parent is None]

    def _pages(self, rid: int) -> Iterator[list[Remote]]:
        """What is in a remote directory, in the order of names."""
        after: str | None = ""
        while after is not None:
            page = self._store.remote_children(rid, after=after, limit=PAGE)
            after = page[-1].name if len(page) == PAGE else None
            yield page

    def check_free(self, directory: Inode) -> None:
        """Raise Held for a directory that stays as it is for now."""
        if self.is_held(directory.ino):
            path = self._store.path(directory.ino)
            raise Held(f"{path}: is code that runs, and stays as it is until its run has ended")

    def _taken(self, remote: Remote, *, readonly: bool) -> None:
        """A pod of one's own has become a received one, or the reverse: it is another pod."""
        self.on_taken(remote.name)
        self._store.set_remote(remote.rid, readonly=int(readonly))

    def _may_show(self, directory: Inode, name: str) -> bool:
        return is_safe_remote_name(name) and not (name == RUN_NAME and directory.parent == ROOT)

    def gone(self, remote: Remote, outcome: Outcome) -> None:
        """The server has no such object any more. What is dirty here stays, and is sent anew; what
        is held stays as it is."""
        if remote.ino is not None and self.is_held(remote.ino):
            return
        with self._store.transaction():
            for child in self._store.remote_children(remote.rid):
                self.gone(child, outcome)
            self._store.drop_remote(remote.rid)
            if remote.ino is None:
                # Its deletion may have failed, and need no more be tried.
                outcome.work.append(remote.item)
                return
            inode = self._store.get(remote.ino)
            if inode is None or inode.parent is None:
                return
            if self._is_ours(inode, remote):
                self._store.mark(inode.ino, PLACE if inode.is_dir else PLACE | CONTENT)
                outcome.work.append(("ino", inode.ino))
            else:
                self._unname(inode, outcome)

    def gone_by_slices(self, remote: Remote) -> Iterator[Outcome]:
        """As ``gone``, of what is in a directory first: between two slices others get in. What is
        renamed or shown again meanwhile stays."""
        if remote.ino is not None and self.is_held(remote.ino):
            return
        for page in self._pages(remote.rid):
            for child in page:
                if child.kind == DIR and self._still(child) is not None:
                    yield from self.gone_by_slices(child)
            if self._still(remote) is None:
                return
            outcome = Outcome()
            with self._store.transaction():
                for child in page:
                    if child.kind == FILE and (now := self._still(child)) is not None:
                        self.gone(now, outcome)
            yield outcome
        outcome = Outcome()
        if (now := self._still(remote)) is not None:
            self.gone(now, outcome)
        yield outcome

    def _still(self, before: Remote) -> Remote | None:
        """An object that is where it was, and has not been shown since."""
        now = self._store.remote(before.rid)
        if now is None or (now.rparent, now.name) != (before.rparent, before.name):
            return None
        return None if before.absent_s is not None and now.absent_s is None else now

    def is_sent_again(self, remote: Remote) -> bool:
        """Whether nothing is lost here by believing that an object is gone."""
        inode = self._store.get(remote.ino) if remote.ino is not None else None
        return inode is not None and inode.parent is not None and self._is_ours(inode, remote)

    def _is_ours(self, inode: Inode, remote: Remote) -> bool:
        """Whether an inode must stay although the server has not, or no longer, got its object:
        what we changed or renamed, and what we only supposed to have arrived there."""
        if inode.is_dir and self._store.has_children(inode.ino):
            return True
        if inode.dirty & CONTENT:
            return True
        ours = inode.dirty & PLACE or remote.size == UNKNOWN
        return bool(ours and (inode.is_dir or inode.cached))

    def has_news(self, rid: int, entries: Iterable[Entry]) -> bool:
        """Whether a listing of a directory that is to be deleted shows somebody else's work: a new
        object, or another version of one that was deleted here."""
        for entry in entries:
            known = self._store.remote_at(rid, entry.name)
            if known is None:
                arriving = self._store.remote_moving_to(rid, entry.name) is not None
                if not arriving and not DOOMED.fullmatch(entry.name):
                    return True
            elif (known.kind == DIR) != entry.is_dir:
                return True
            elif known.ino is None and known.kind == FILE:
                same = known.is_version(entry.size, entry.mtime_s)
                if not same and not known.is_older(entry.mtime_s):
                    return True
        return False

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
            if home is None or home.ino is None or self.is_held(home.ino):
                return
            self._store.looked.pop(rid, None)  # nobody here knows yet what is in there
            name = remote.name
            occupant = self._store.child(home.ino, name)
            if occupant is not None and occupant.is_dir:
                self._rejoin(occupant, remote, outcome)
                return
            if occupant is not None:
                name = self.free_name(home.ino, name)
            inode = self._store.create(home.ino, name, DIR, remote.mode_or(SERVER_DIR_MODE))
            self._store.set_remote(rid, ino=inode.ino)
            self._store.replace(inode.ino)
            outcome.changes.append(NameChange(home.ino, name, appeared=True))
            outcome.work.append(("ino", inode.ino))

    def damaged(self, ino: int, outcome: Outcome) -> None:
        """The data file of a dirty file lost bytes. What is left of it is kept, under a name of its own
        where the server has a version, and never sent; that version is shown."""
        inode, remote = self._store.get(ino), self._store.remote_of(ino)
        if inode is None or inode.parent is None or inode.name is None:
            return
        path, there = self._store.path(ino), self._content.size_or_0(ino)
        with self._store.transaction():
            if remote is not None and remote.size != UNKNOWN:
                self._store.set_remote(remote.rid, ino=None)
                self._set_aside(inode, outcome, "damaged")
                entry = Entry(
                    *(remote.name, False, remote.size, remote.mode_or(inode.mode)),
                    *(remote.mtime_s or 0, remote.mtime_s or 0, remote.mtime_s or 0),
                )
                self._adopt(inode.parent, remote.rid, entry, outcome, inode.name)
            if inode.dirty & DAMAGED:  # the disk said so
                return
            reason = (
                f"lost in the cache: {inode.size} bytes were written, {there} are left; they are not "
                "uploaded; write the file anew, or remove it"
            )
            log.error("cache: %r: %d of %d bytes are left; set aside", path, there, inode.size)
            self._store.damaged(ino, reason, size=there)

    def _rejoin(self, local: Inode, remote: Remote, outcome: Outcome) -> None:
        """A directory was removed here and made again, while the server's is not empty."""
        elsewhere = self._store.remote_of(local.ino)
        self._store.unmark(local.ino, SENT)
        if elsewhere is not None:
            outcome.work += left_behind(self._store, elsewhere)
        self._store.set_remote(remote.rid, ino=local.ino)
        if local.parent != ROOT and (local.mode ^ remote.mode_or(0)) & 0o700:
            self._store.mark(local.ino, MODE)
        self._store.set(local.ino, listed_s=0)  # nobody here knows yet what is in there
        self._store.replace(local.ino)
        outcome.work.append(("ino", local.ino))

    # -- one entry --------------------------------------------------------------------------------

    def _changed_kinds(
        self, directory: Inode, found: list[tuple[int, Entry]], seen: _Ids
    ) -> Outcome:
        """Files where we knew of directories, and the reverse; the server may well have both."""
        outcome = Outcome()
        with self._store.transaction():
            for rid, entry in found:
                remote = self._store.remote(rid)
                if remote is None or remote.name != entry.name or remote.to_parent is not None:
                    continue
                if rid in seen and self._is_received(directory):
                    continue  # nobody here can give one of them another name
                if entry.is_dir and rid in seen:
                    # Theirs is shown by a listing after ours has left the name at the server.
                    self._store.set(directory.ino, listed_s=OUTDATED_S)
                    if remote.rparent is not None:
                        self._store.looked[remote.rparent] = time.time()
                    local = self._store.child(directory.ino, entry.name)
                    if local is not None and local.ino == remote.ino:
                        self._set_aside(local, outcome)
                elif rid in seen:
                    outcome.clashing.append(entry.name)
                elif entry.is_dir:
                    outcome.replaced.append(rid)
                elif not entry.is_dir:
                    # Not asked for by name: where a file is, the server breaks the connection.
                    seen.add(rid)
                    self.gone(remote, outcome)
                    self._new(directory, remote.rparent or ROOT, entry, False, outcome)
        return outcome

    def _is_received(self, directory: Inode) -> bool:
        above = self._store.ancestors(directory.ino)
        pod = self._store.remote_of(above[-1].ino) if above else None
        return pod is not None and bool(pod.readonly)

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
        local = self._store.child(directory.ino, entry.name)
        ino: int | None = None
        if local is not None:
            ours = local.is_dir == entry.is_dir and (local.is_dir or bool(local.dirty & SENT))
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
                self._store.unmark(local.ino, SENT)  # what is there is not ours
                self._set_aside(local, outcome)
        fresh = ino is None
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
        if not fresh:  # else it is in its place
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
            "absent_s": None,
            "absences": 0,
            # Not to_parent: a directory on its way, moved object by object, is in both places, and
            # forgotten here it would be a stranger's there. Whoever resolves the move looks at both.
        }
        local = self._store.get(remote.ino) if remote.ino is not None else None
        same = entry.is_dir or remote.is_version(entry.size, entry.mtime_s)
        if same and remote.size == UNKNOWN and local is not None and local.dirty & CONTENT:
            same = not self._store.is_foreign(local.ino, entry.size, entry.mtime_s)
        if not same and remote.is_older(entry.mtime_s) and not self._is_settled_ghost(remote):
            outcome.outdated.append(remote)
            return
        if same and local is not None and local.dirty & SENT:
            news["mode"] = remote.mode  # an upload of ours may have reset it, and gives it back
        elif local is not None and remote.mode != entry.mode and not local.dirty & MODE:
            self._store.set(local.ino, mode=entry.mode)
        outcome.shown += local is not None
        outcome.unchanged += local is not None and same
        if same and remote.absent_s is not None:
            outcome.returned.append(remote)
        if same:
            if local is None and remote.absent_s is not None:
                outcome.work.append(("rid", remote.rid))  # to be deleted, and not shown until now
            if any(getattr(remote, column) != value for column, value in news.items()):
                self._store.set_remote(remote.rid, **news)
            return
        if local is not None and self._may_be_ours(local, entry):
            self._store.mark(local.ino, CONTENT)
            outcome.work.append(("ino", local.ino))  # the upload looks at it, and goes over it
            return
        news["in_swarm"] = 1  # somebody else's: nobody can tell
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

    def _may_be_ours(self, local: Inode, entry: Entry) -> bool:
        """Whether what is shown may be an upload of ours that arrived late, and what is here is newer:
        the server goes on with a request whose client has died. Its content is looked at before
        anything is sent (``Upload``)."""
        if not local.cached or local.parent is None or local.dirty & DAMAGED:
            return False
        return self._store.may_be_late(local.ino, entry.size, entry.mtime_s)

    def _is_settled_ghost(self, remote: Remote) -> bool:
        """Whether something to be deleted has been shown otherwise for so long that this is so."""
        return (
            remote.ino is None
            and remote.absent_s is not None
            and time.time() - remote.absent_s > GHOST_S
        )

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

    def _set_aside(self, local: Inode, outcome: Outcome, word: str = "conflict") -> None:
        """Rename ours, here, to a conflict name; it goes to the server beside the other version."""
        assert local.parent is not None
        assert local.name is not None
        name = self.free_name(local.parent, local.name, word)
        if word == "conflict":
            log.warning(
                "conflict: %r changed here and at the server; ours is now %r", local.name, name
            )
        outcome.changes += [
            NameChange(local.parent, local.name),
            NameChange(local.parent, name, appeared=True),
        ]
        self._store.place(local.ino, local.parent, name)
        outcome.work.append(("ino", local.ino))

    def free_name(self, parent: int, name: str, word: str = "conflict") -> str:
        """A name in a directory that tells of a conflict, and that nothing here has."""
        stem, extension = os.path.splitext(name)
        stamp = time.strftime("%Y-%m-%d %H.%M.%S", time.gmtime())
        for number in range(1000):
            suffix = (
                f" ({word} {platform.node()} {stamp}{f' {number}' if number else ''}){extension}"
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
