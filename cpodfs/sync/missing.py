"""The register of what the server does not show although it did, and when it is asked again.

Imports the cache and the rule (``doubt.py``). That an object is doubtful, since when and how often that
was confirmed is in the remote tree; only the topmost object is marked, what is below it is as doubtful.
Alarms and the times of the next looks are in memory, and found anew by the first looks after a start.
Synchronous but for ``wait``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace

import trio

from cpodfs.cache.schema import DIR, ROOT
from cpodfs.cache.store import Remote, Store
from cpodfs.errors import PodNotFound
from cpodfs.sync import doubt
from cpodfs.sync.doubt import Absence, Folder, Verdict
from cpodfs.sync.ops import pod_of

log = logging.getLogger(__name__)

_NO_LOOK = Absence(holds=True, confirmed=0)


class Missing:
    """``clock``: seconds that only grow. ``alarms``: by the remote id of the folder, what is not shown
    of it."""

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._confirmed_s: dict[int, float] = {}
        self._looks: dict[int, int] = {}
        self._due: dict[int, float] = {}
        self._left_out: dict[int, tuple[int, Absence]] = {}
        self._accepted: set[int] = set()
        self._lied_s: float | None = None
        self._changed = trio.Event()
        self.alarms: dict[int, Folder] = {}
        self.outdated: set[int] = set()
        """Remote ids of doubtful files that are shown, in an earlier version."""

    @property
    def distrusted(self) -> bool:
        """Whether the server was caught not long ago saying "not there" of what is."""
        return self._lied_s is not None and self._clock() - self._lied_s < doubt.DISTRUST_S

    @property
    def is_fresh_lie(self) -> bool:
        """Whether that was so short a time ago that no pod should be opened anew."""
        return self._lied_s is not None and self._clock() - self._lied_s < doubt.CAUTION_S

    # -- one object -------------------------------------------------------------------------------

    def said_absent(self, rid: int, error: Exception) -> None:
        """The server says that a directory or file is not there, or that its pod is not."""
        remote = self._store.remote(rid)
        if remote is None or remote.rid == ROOT:
            return
        if isinstance(error, PodNotFound):
            rid = pod_of(self._store, remote)
        self.suspect(rid)

    def suspect(self, rid: int) -> None:
        """Keep an object as doubtful, until its folder was looked at again."""
        remote = self._store.remote(rid)
        if remote is None or remote.rparent is None:
            return
        if remote.absent_s is None:
            self._store.set_remote(rid, absent_s=time.time(), absences=0)
            log.debug(
                "doubtful: the server does not show %r", "/".join(self._store.remote_path(rid))
            )
            if not self.distrusted:
                self._looks.pop(remote.rparent, None)
        self.look(remote.rparent)

    def confirm(self, rid: int, opened_s: float | None) -> None:
        """It was asked for in each way, and is not there. ``opened_s``: when the server was last made
        to forget what it knew of the pod, without which it would only say the same again; None: of a
        pod itself."""
        remote = self._store.remote(rid)
        if remote is None:
            return
        now_s, last_s = self._clock(), self._confirmed_s.get(rid)
        asked_anew = last_s is None or opened_s is None or opened_s > last_s
        if asked_anew and self._absence(remote).counts(now_s):
            self._confirmed_s[rid] = now_s
            self._store.set_remote(rid, absences=remote.absences + 1)

    def judge(self, rid: int, folder: Folder) -> Verdict:
        remote = self._store.remote(rid)
        if remote is None or remote.absent_s is None:
            return Verdict.DOUBTFUL
        return doubt.judge(folder, self._absence(remote), self._lied_s, self._clock())

    def _absence(self, remote: Remote) -> Absence:
        holds = remote.kind == DIR and self.holds(remote)
        last_s = self._confirmed_s.get(remote.rid)
        return Absence(holds, remote.absences, last_s, remote.rid in self.outdated)

    def is_outdated(self, rid: int, outdated: bool) -> None:
        """Whether a doubtful object is shown in an earlier version, or not at all. What was confirmed
        of one says nothing of the other."""
        if outdated != (rid in self.outdated):
            (self.outdated.add if outdated else self.outdated.discard)(rid)
            self.unconfirmed(rid)

    def accept_older(self, rid: int) -> None:
        """From now on whatever version the server shows of a file is the newest."""
        self.outdated.discard(rid)
        self._confirmed_s.pop(rid, None)
        remote = self._store.remote(rid)
        if remote is not None and remote.rparent is not None:
            self._store.set_remote(rid, mtime_s=0, slack_s=0, absent_s=None, absences=0)
            self.look(remote.rparent)

    def holds(self, remote: Remote) -> bool:
        """Whether something is known to be in a directory or pod, here or there."""
        if self._store.remote_children(remote.rid, limit=1):
            return True
        return remote.ino is not None and self._store.has_children(remote.ino)

    def seen(self, rid: int) -> None:
        """An object is there, and so are the directories above it. Not the pod: what the server has in
        memory of one that was deleted elsewhere it goes on to show."""
        remote = self._store.doubtful_above(rid)
        while remote is not None and remote.rparent != ROOT:
            self._clear(remote)
            remote = self._store.doubtful_above(remote.rid)

    def _clear(self, remote: Remote) -> None:
        self._store.set_remote(remote.rid, absent_s=None, absences=0)
        self.returned(remote)

    def answered(self, rid: int) -> None:
        """The server lists a directory: it is there, and so are those above it. But the server goes on
        to list one that has lost its entry in the directory above (as one does when a namesake below
        a neighbour is removed), and nobody else sees that: the doubt ends where that shows it again.
        """
        remote = self._store.doubtful_above(rid)
        while remote is not None and remote.rparent not in (ROOT, None):
            above = self._store.remote(remote.rparent)
            if above is None:
                return
            if above.ino is None:  # its listing shows nothing here
                self._clear(remote)
            else:
                self.unconfirmed(remote.rid)
                self.look(above.rid)
            remote = self._store.doubtful_above(above.rid)

    def unconfirmed(self, rid: int) -> None:
        """A doubtful object may be there after all: what was confirmed counts no more."""
        self._confirmed_s.pop(rid, None)
        self._store.set_remote(rid, absences=0)

    def returned(self, remote: Remote) -> None:
        """It was doubtful, and is shown again as it was: the server lied."""
        self._confirmed_s.pop(remote.rid, None)
        self.outdated.discard(remote.rid)
        self._lied_s = self._clock()
        log.debug("shown again: %r", "/".join(self._store.remote_path(remote.rid)))

    # -- one folder -------------------------------------------------------------------------------

    def alarm(self, rid: int, folder: Folder) -> None:
        """Much of a folder is not shown: said once, until it is settled."""
        if rid not in self.alarms:
            log.warning(
                "alarm: the server does not show %d of the %d objects known in %s; all is kept; if they "
                "were deleted elsewhere: cpodfs refresh --accept-deletions PATH",
                *(folder.missing, folder.known, self._name(rid)),
            )
        self.alarms[rid] = folder
        self.look(rid)

    def calm(self, rid: int) -> None:
        """What is missing of a folder, if anything, is no alarm."""
        if self.alarms.pop(rid, None) is not None:
            log.warning("no alarm any more: %s", self._name(rid))

    def settled(self, rid: int) -> None:
        """Nothing is missing of a folder."""
        self.calm(rid)
        self._due.pop(rid, None)
        if not self.distrusted:
            self._looks.pop(rid, None)

    def may_settle(self, rid: int) -> bool:
        """Whether something was found missing in a folder for the first time, and is no alarm."""
        if rid in self.alarms:
            return False
        return any(r.rparent == rid and r.absences == 1 for r in self._store.doubtful())

    def _name(self, rid: int) -> str:
        return repr("/".join(self._store.remote_path(rid))) if rid != ROOT else "the list of pods"

    def are_lost(self, rid: int, left_out: int, opened_s: float, *, witness: bool) -> bool:
        """Whether names that a first listing left out, though the server counts them, are lost there: a
        rename that failed half-way leaves such a name for ever, and what else is in the directory is
        to be seen. They are when as many were left out each time, ever later, by a pod opened anew and
        a server that was not caught in a lie; where nothing is shown, which would bear ``witness``, when
        the user says so. ``opened_s``: see ``confirm``."""
        now_s = self._clock()
        before, looks = self._left_out.get(rid, (left_out, _NO_LOOK))
        if before != left_out or self.distrusted or not witness:
            looks = _NO_LOOK
        elif looks.counts(now_s) and (looks.last_s is None or opened_s > looks.last_s):
            looks = replace(looks, confirmed=looks.confirmed + 1, last_s=now_s)
        self._left_out[rid] = left_out, looks
        if looks.confirmed < doubt.MANY and rid not in self._accepted:
            return False
        self.is_whole(rid)
        log.warning(
            "the server has lost what %d of the names in %s name; what it shows is shown",
            *(left_out, self._name(rid)),
        )
        return True

    def is_whole(self, rid: int) -> None:
        """A first listing left nothing out, or may be shown as it is."""
        self._left_out.pop(rid, None)
        self._accepted.discard(rid)

    def accept_left_out(self, rid: int) -> int:
        """What the listings of a directory have left out is lost, the user says. Returns how many names
        that are."""
        left_out, _ = self._left_out.get(rid, (0, _NO_LOOK))
        if left_out:
            self._accepted.add(rid)
        return left_out

    # -- when to ask again ------------------------------------------------------------------------

    def look(self, rid: int) -> None:
        """A folder is to be listed again, the later the more often it was."""
        if rid not in self._due:
            looks = self._looks[rid] = self._looks.get(rid, 0) + 1
            self._due[rid] = self._clock() + doubt.pause_s(looks)
            self._changed.set()

    def hurry(self) -> None:
        """Somebody waits: look at once, as if it were the first time."""
        self._looks.clear()
        self._due = dict.fromkeys(self._due, self._clock())
        self._changed.set()

    def resume(self) -> None:
        """After a start: look at all that was doubtful."""
        for remote in self._store.doubtful():
            if remote.rparent is not None:
                self.look(remote.rparent)

    def take_due(self) -> list[int]:
        """Folders that are to be listed now; each once."""
        now_s = self._clock()
        due = [rid for rid, due_s in self._due.items() if due_s <= now_s]
        for rid in due:
            del self._due[rid]
        return due

    async def wait(self) -> None:
        """Return when a folder may be due."""
        next_s = min(self._due.values(), default=float("inf")) - self._clock()
        self._changed = trio.Event()
        with trio.move_on_after(max(0.0, next_s)):
            await self._changed.wait()
