"""The calls that change the server, each with what it means for the remote tree when it succeeds.

Imports the cache, the DFS client and errors. An operation names the remote directories that it
changes (``dirs``); the engine never runs two that share one, since FairOS-DFS rewrites a directory
as a whole without a lock. ``call`` talks to the server and touches no tree; ``before`` and ``done``
change the trees and never wait. After a failure the remote tree is as it was.
"""

from __future__ import annotations

import os
import posixpath
import time
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import trio

from cpodfs.cache import content as data
from cpodfs.cache.durability import Durability
from cpodfs.cache.schema import CONTENT, DIR, FILE, MODE, PLACE, ROOT, SENT, UNKNOWN
from cpodfs.cache.store import Remote, Store
from cpodfs.dfs import DOOMED, Client, Entry, FileStat
from cpodfs.errors import (
    AlreadyExists,
    CacheDamaged,
    ChangedDuringUpload,
    Conflict,
    Doubtful,
    NotEmpty,
    NotFound,
    PodNotFound,
)
from cpodfs.paths import TEMP_PREFIX, join

Item = tuple[str, int]
"""What the engine keeps in order: ("ino", inode) or ("rid", orphaned remote id)."""

SERVER_FILE_MODE = 0o600
SERVER_DIR_MODE = 0o700
UPLOAD_CHUNK = 256 * 1024
UNKNOWN_ATTEMPTS = 3
BELIEVED_ATTEMPTS = 4
"""So often, at growing distances, the server must say of something that it is not there, before we go
on without: what was to be deleted is left alone, an upload goes over what cannot be seen."""


def pod_and_path(store: Store, rid: int) -> tuple[str, str]:
    """The pod and the absolute path inside it of a remote object."""
    return _split(store.remote_path(rid))


def pod_of(store: Store, remote: Remote) -> int:
    """The remote id of the pod that an object is in (or is)."""
    while remote.rparent not in (ROOT, None):
        above = store.remote(remote.rparent)
        assert above is not None
        remote = above
    return remote.rid


def child_path(store: Store, rparent: int, name: str) -> tuple[str, str]:
    """The pod and path of the name ``name`` in a remote directory."""
    above = store.remote_path(rparent)
    return _split([*above, name] if above or rparent == ROOT else [])


def _split(parts: list[str]) -> tuple[str, str]:
    if not parts:
        raise NotFound("the directory that it was in is gone at the server")
    return parts[0], join(parts[1:])


@dataclass(slots=True)
class Op:
    """One call. ``attempt``: how often it has failed before; ``may_be_done``: in one of these the
    server may have done it, without an answer. ``begun``: whether the call was made."""

    item: Item
    dirs: tuple[int, ...]
    attempt: int = field(default=0, init=False)
    may_be_done: bool = field(default=False, init=False)
    begun: bool = field(default=False, init=False)

    @property
    def replaces(self) -> int | None:
        """The remote id of an orphan whose content this call destroys."""
        return None

    @property
    def may_have_acted(self) -> bool:
        """Whether the server has heard all of it."""
        return self.begun

    def before(self, store: Store) -> None:
        """Journal what must be known if the outcome of the call never is. The engine calls the
        server only when that is on the disk."""

    async def call(self, store: Store, dfs: Client) -> None:
        raise NotImplementedError

    def not_done(self, store: Store) -> None:
        """The server surely did nothing: take back what ``before`` supposed."""

    def done(self, store: Store) -> list[Item]:
        """Bring the trees up to date; returns objects that now need work."""
        raise NotImplementedError


async def check_pods_shown(store: Store, dfs: Client) -> None:
    """Raise Doubtful when the list of pods lacks some that were in it: a server that cannot read all
    of the list stores, when a pod is added, what it can read, and the others are lost."""
    found = await dfs.pods()
    shown = {*found.own, *found.shared}
    for pod in store.remote_children(ROOT):
        if pod.ino is not None and pod.name not in shown:
            error = Doubtful(
                f"not while the server's list of pods lacks {pod.name!r}; if that was deleted elsewhere: "
                "cpodfs refresh --accept-deletions on it"
            )
            error.remedy = ""
            raise error


def _bind(store: Store, ino: int, rparent: int, name: str) -> bool:
    """Journal that an inode is sent to its place: should it leave that before it is known to have
    arrived, it is supposed to have (``Store.assume_sent``). Returns whether it may have been sent there
    before. Raises ChangedDuringUpload if it has left already, since the call was planned: nobody
    would look for it there."""
    inode = store.get(ino)
    home = store.remote_of(inode.parent) if inode is not None and inode.parent is not None else None
    if inode is None or home is None or (home.rid, inode.name) != (rparent, name):
        raise ChangedDuringUpload(f"{name}: renamed or deleted before it was sent")
    store.set(ino, dirty=inode.dirty | SENT)
    return bool(inode.dirty & SENT)


@dataclass(slots=True)
class _Make(Op):
    """A directory or pod is made. ``sent_before``: an earlier call may have done it."""

    ino: int
    sent_before: bool = field(default=True, init=False)

    def not_done(self, store: Store) -> None:
        if not self.sent_before:
            store.unmark(self.ino, SENT)


@dataclass(slots=True)
class CreatePod(_Make):
    name: str

    def before(self, store: Store) -> None:
        self.sent_before = _bind(store, self.ino, ROOT, self.name)

    async def call(self, store: Store, dfs: Client) -> None:
        await check_pods_shown(store, dfs)
        self.begun = True
        await dfs.create_pod(self.name)

    def done(self, store: Store) -> list[Item]:
        return _made_dir(store, self.ino, ROOT, self.name)


@dataclass(slots=True)
class Mkdir(_Make):
    rparent: int
    name: str

    def before(self, store: Store) -> None:
        self.sent_before = _bind(store, self.ino, self.rparent, self.name)

    async def call(self, store: Store, dfs: Client) -> None:
        await _mkdir(self, store, dfs, self.rparent, self.name)

    def done(self, store: Store) -> list[Item]:
        return _made_dir(store, self.ino, self.rparent, self.name)


async def _mkdir(op: Op, store: Store, dfs: Client, rparent: int, name: str) -> None:
    """Make a directory; where the server does not show all, after a closer look: it would empty one
    that it cannot read just then."""
    pod, path = child_path(store, rparent, name)
    if store.has_doubtful(rparent) and await look_for(dfs, pod, path, is_dir=True) is not None:
        raise AlreadyExists(f"{pod}{path}: there is a directory of that name")
    op.begun = True
    try:
        await dfs.mkdir(pod, path)
    except AlreadyExists:
        if op.attempt >= BELIEVED_ATTEMPTS:  # and each look since did not show it
            await dfs.relist_dir(pod, path)
        raise


def _made_dir(store: Store, ino: int, rparent: int, name: str) -> list[Item]:
    with store.transaction():
        inode = store.get(ino)
        alive = inode is not None and inode.parent is not None
        if rparent == ROOT and inode is not None and inode.name != name:
            alive = False  # renamed meanwhile, which a pod cannot be at the server
        if store.remote(rparent) is None:  # found to be gone meanwhile, with all that was in it
            return []
        there = store.remote_at(rparent, name)
        if there is not None:  # it left this name meanwhile, and was supposed to have arrived
            rid = there.rid
            store.set_remote(rid, size=0, mode=SERVER_DIR_MODE, ino=ino if alive else None)
        else:
            rid = store.add_remote(
                *(rparent, name, DIR),
                size=0,
                mtime_s=None,
                mode=SERVER_DIR_MODE,
                ino=ino if alive else None,
            )
        if inode is None or not alive:
            return [("rid", rid)]
        store.unmark(ino, SENT)
        store.replace(ino)
        if rparent != ROOT and (inode.mode ^ SERVER_DIR_MODE) & 0o700:
            store.mark(ino, MODE)
    return []


@dataclass(slots=True)
class RemoveDir(Op):
    """Delete an orphaned directory or pod, after making sure that the server's one is empty.

    The server would delete a full one without asking. What others put there meanwhile is kept:
    NotEmpty makes the engine give the directory its place here back. ``dirs`` has the pod's root,
    through which the client removes nested directories.
    """

    rid: int

    async def call(self, store: Store, dfs: Client) -> None:
        pod, path = pod_and_path(store, self.rid)
        try:
            if path == "/":
                await self._delete_pod(dfs, pod)
            else:
                await dfs.rmdir(pod, path)
        except NotFound as error:
            await _believe_gone(store, dfs, self, self.rid, error)

    async def _delete_pod(self, dfs: Client, pod: str) -> None:
        entries = await dfs.list_dir(pod, "/")
        if any(not DOOMED.fullmatch(entry.name) for entry in entries):
            raise NotEmpty(f"{len(entries)} files and directories are in the pod {pod!r}")
        await dfs.delete_pod(pod)

    def done(self, store: Store) -> list[Item]:
        store.drop_remote(self.rid)
        return []


@dataclass(slots=True)
class RemoveFile(Op):
    rid: int

    @property
    def replaces(self) -> int | None:
        return self.rid

    async def call(self, store: Store, dfs: Client) -> None:
        try:
            await dfs.delete_file(*pod_and_path(store, self.rid))
        except NotFound as error:
            await _believe_gone(store, dfs, self, self.rid, error)

    def done(self, store: Store) -> list[Item]:
        store.drop_remote(self.rid)
        return []


async def _believe_gone(store: Store, dfs: Client, op: Op, rid: int, error: NotFound) -> None:
    """Raise the server's "not there" again while the object may yet be there, or appear.

    It says so of what it cannot read just then, too; and a server goes on with a request whose client
    has died: what was sent with an unknown outcome can arrive seconds later.
    """
    remote = store.remote(rid)
    if remote is None or not store.remote_path(rid):
        return
    if remote.size == UNKNOWN and op.attempt < UNKNOWN_ATTEMPTS:
        raise error
    if op.may_be_done:
        return
    if remote.rparent == ROOT and remote.size == UNKNOWN and not await dfs.pod_present(remote.name):
        return  # it was only supposed to have arrived
    if remote.rparent == ROOT or isinstance(error, PodNotFound):
        raise error
    pod, path = pod_and_path(store, rid)
    if await look_for(dfs, pod, path, is_dir=remote.kind == DIR) is not None:
        raise error


async def look_for(dfs: Client, pod: str, path: str, *, is_dir: bool) -> Entry | None:
    """What the listing of the directory above has by that name. Raises Doubtful where it leaves
    something out, which may be this; NotFound where there is no such directory."""
    folder = posixpath.dirname(path)
    entries = await dfs.list_dir(pod, folder)
    for entry in entries:
        if entry.name == posixpath.basename(path) and entry.is_dir == is_dir:
            return entry
    stat = await dfs.stat_dir(pod, folder)
    if stat.dirs + stat.files > len(entries) + entries.malformed:
        raise Doubtful(f"{pod}{path}: neither shown nor surely gone")
    return None


@dataclass(slots=True)
class Move(Op):
    """Rename one object at the server. ``to_name`` must be free there."""

    rid: int
    is_dir: bool
    to_parent: int
    to_name: str

    def before(self, store: Store) -> None:
        store.set_remote(self.rid, to_parent=self.to_parent, to_name=self.to_name)
        store.times_move(self.rid)

    async def call(self, store: Store, dfs: Client) -> None:
        pod, old = pod_and_path(store, self.rid)
        _, new = child_path(store, self.to_parent, self.to_name)
        if not self.is_dir:
            await dfs.rename_file(pod, old, new)
            return
        # The server renames from its memory of the directory, which it has only once it listed it.
        if any(entry.is_dir for entry in await dfs.list_dir(pod, old)):
            await dfs.rename_dir(pod, old, new)
        else:
            # Into a directory that is gone by now it would be lost.
            await dfs.stat_dir(pod, posixpath.dirname(new))
            await dfs.raw_rename_dir(pod, old, new)

    def done(self, store: Store) -> list[Item]:
        return moved(store, self.rid, self.to_parent, self.to_name)


def moved(store: Store, rid: int, to_parent: int, to_name: str) -> list[Item]:
    """Record that the server has renamed an object."""
    if store.remote(to_parent) is None:  # gone meanwhile, with all that was in it
        store.drop_remote(rid)
        return []
    with store.transaction():
        at = {"rparent": to_parent, "name": to_name, "to_parent": None, "to_name": None}
        store.set_remote(rid, **at, absent_s=None, absences=0)
        remote = store.remote(rid)
        if remote is None or remote.ino is None:
            return [("rid", rid)]
        store.replace(remote.ino)
    return []


@dataclass(slots=True)
class Rehome(_Make):
    """Move a directory that has sub-directories: make it anew; then its children move one by one.

    The server's own rename of such a tree edits the wrong lists (see ``dfs._trees``) and is not
    atomic. Ours can be cut off anywhere: the old directory is an orphan from now on, and goes when
    the last child has left it.
    """

    rid: int
    to_parent: int
    to_name: str

    def before(self, store: Store) -> None:
        self.sent_before = _bind(store, self.ino, self.to_parent, self.to_name)

    async def call(self, store: Store, dfs: Client) -> None:
        await _mkdir(self, store, dfs, self.to_parent, self.to_name)

    def done(self, store: Store) -> list[Item]:
        with store.transaction():
            old = store.remote(self.rid)
            work = left_behind(store, old) if old is not None else []
            work += _made_dir(store, self.ino, self.to_parent, self.to_name)
            if old is not None and old.mode != SERVER_DIR_MODE:
                store.mark(self.ino, MODE)
        return work


def left_behind(store: Store, old: Remote) -> list[Item]:
    """A directory has a new object at the server: what is in ``old`` must follow, then it can go."""
    with store.transaction():
        if old.ino is not None:
            for child in store.children(old.ino):
                store.assume_sent(child.ino)
        store.set_remote(old.rid, ino=None)
        children = [c.ino for c in store.remote_children(old.rid) if c.ino is not None]
        for ino in children:
            store.mark(ino, PLACE)
    return [("rid", old.rid), *(("ino", ino) for ino in children)]


@dataclass(slots=True)
class Resolve(Op):
    """Find out whether the server has renamed an object; the engine lists both directories."""


@dataclass(slots=True)
class Look(Op):
    """List a directory that must be known before it can move; the engine does it."""

    rid: int


def move_aside(store: Store, remote: Remote) -> Move:
    """Break a cycle of renames (a↔b, or d/x → d): out of the way first, home later."""
    assert remote.rparent is not None
    assert remote.ino is not None
    pod_rid = pod_of(store, remote)
    return Move(
        ("ino", remote.ino),
        tuple({remote.rparent, pod_rid}),
        remote.rid,
        remote.kind == DIR,
        pod_rid,
        f"{TEMP_PREFIX}{remote.rid}",
    )


@dataclass(slots=True)
class Chmod(Op):
    ino: int
    rid: int
    is_dir: bool
    mode: int

    def before(self, store: Store) -> None:
        store.set_remote(self.rid, mode=UNKNOWN)

    async def call(self, store: Store, dfs: Client) -> None:
        pod, path = pod_and_path(store, self.rid)
        await (dfs.chmod_dir if self.is_dir else dfs.chmod_file)(pod, path, self.mode)

    def done(self, store: Store) -> list[Item]:
        with store.transaction():
            store.set_remote(self.rid, mode=self.mode)
            inode = store.get(self.ino)
            if inode is not None and inode.mode == self.mode:
                store.unmark(self.ino, MODE)
        return []


@dataclass(slots=True)
class Upload(Op):
    """Send a file whole to ``name``, over whatever orphan or earlier version is there.

    ``changed`` is set by whoever writes to the data file while it is being read here. The body then
    raises before its last byte, and the server, which parses the form before it acts, has done
    nothing: readers elsewhere see the old file or the new one, never a mixture. ``known`` is the
    version that will be replaced; when the server has another by now, the call raises Conflict.
    What is sent is on this disk before: a loss of power must not leave the server a better version
    than the one that would be sent again.
    """

    ino: int
    rparent: int
    name: str
    durability: Durability
    known: Remote | None
    changed: bool = field(default=False, init=False)
    stored_s: int | None = field(default=None, init=False)
    slack_s: int = field(default=0, init=False)
    sent_before: bool = field(default=True, init=False)
    size: int = field(default=0, init=False)
    crc: int = field(default=0, init=False)
    sent: int = field(default=0, init=False)
    ended: bool = field(default=False, init=False)

    @property
    def may_have_acted(self) -> bool:
        return self.ended

    @property
    def replaces(self) -> int | None:
        return self.known.rid if self.known is not None and self.known.ino is None else None

    def before(self, store: Store) -> None:
        self.changed = False

    def about_to_send(self, store: Store) -> None:
        """Journal that from now on the server may have either version, and nobody else's doing."""
        with store.transaction():
            self.sent_before = _bind(store, self.ino, self.rparent, self.name)
            self.begun = True
            there = store.remote_at(self.rparent, self.name)
            if there is not None:
                store.set_remote(there.rid, size=UNKNOWN, mtime_s=None)
            store.note_sending(self.ino, self.size)

    @property
    def all_sent(self) -> bool:
        """Whether the server has every byte, and will act on them whatever becomes of us."""
        return self.begun and self.sent == self.size

    def not_done(self, store: Store) -> None:
        """The server surely did nothing: what we knew of it still holds."""
        if not self.begun:
            return
        store.note_not_sent(self.ino, self.size)
        if self.sent_before:
            return
        with store.transaction():
            store.unmark(self.ino, SENT)
            store.forget_sent(self.ino)
            if self.known is not None and (there := store.remote(self.known.rid)) is not None:
                store.set_remote(
                    there.rid,
                    size=self.known.size,
                    mtime_s=self.known.mtime_s,
                    slack_s=self.known.slack_s,
                )

    async def call(self, store: Store, dfs: Client) -> None:
        pod, directory = pod_and_path(store, self.rparent)
        fd = self.durability.content.open_dirty(self.ino)
        try:
            await self._look(store, fd)
            await self._check_version(store, dfs, *child_path(store, self.rparent, self.name))
            started = time.time()
            self.size = os.fstat(fd).st_size
            self.about_to_send(store)
            await self.durability.both(self.ino, fd)
            if self.changed:
                raise ChangedDuringUpload(f"{self.name}: written to before it was uploaded")
            await dfs.upload(
                *(pod, directory, self.name),
                lambda: self._body(store, fd, dfs.session.clock_skew_s),
                self.size,
                on_progress=self._progress,
            )
        finally:
            os.close(fd)
        skew_s = dfs.session.clock_skew_s
        if skew_s is not None:
            # Somewhere in between, and both clocks are only known to about a second.
            self.stored_s = round(time.time() + skew_s)
            self.slack_s = round(time.time() - started) + 2

    async def _look(self, store: Store, fd: int) -> None:
        """What was clean is sent where the server cannot rename, or has lost it. It must be what it
        was; else the server's content counts, if it has any."""
        inode = store.get(self.ino)
        if inode is None or not store.is_doubted(inode):
            return
        found = os.fstat(fd).st_size, await trio.to_thread.run_sync(data.checksum, fd)
        now = store.get(self.ino)
        if now is None or not now.cached or (now.size, now.crc) != (inode.size, inode.crc):
            raise ChangedDuringUpload(f"{self.name}: written to before it was uploaded")
        if found == (now.size, now.crc):
            store.set(self.ino, epoch=store.epoch)
            return
        path, reason = store.path(self.ino), "the cache has another content than it had"
        if store.remote_of(self.ino) is None:
            reason += "; it is not uploaded; write the file anew, or remove it"
            store.damaged(self.ino, reason, size=found[0])
            raise CacheDamaged(f"{path}: {reason}")
        aside = self.durability.content.set_aside(self.ino)
        store.unmark(self.ino, CONTENT)
        store.set(self.ino, cached=0)
        raise CacheDamaged(
            f"{path}: {reason}; the server's counts, and this one is kept as {aside}"
        )

    async def _check_version(self, store: Store, dfs: Client, pod: str, path: str) -> None:
        if self.known is None:
            return
        if self.known.mtime_s is None and self.known.size != UNKNOWN:
            return
        there: FileStat | Entry | None
        try:
            there = await dfs.stat_file(pod, path)
        except PodNotFound:
            raise
        except NotFound:
            # Deleted elsewhere, so that nothing of theirs is overwritten; or it cannot be seen now.
            if self.attempt >= BELIEVED_ATTEMPTS:
                return
            there = await look_for(dfs, pod, path, is_dir=False)
        if there is None:
            return
        if self.known.size == UNKNOWN:
            if store.is_foreign(self.ino, there.size, there.mtime_s):
                raise Conflict(f"{pod}{path}: changed at the server since it was sent first")
            return
        if self.known.is_version(there.size, there.mtime_s):
            return
        if self.known.is_older(there.mtime_s):
            error = Doubtful(f"{pod}{path}: the server shows an earlier version than it had")
            error.remedy = "if that is the right one: cpodfs refresh --accept-deletions {path}"
            raise error
        if await self._is_late(store, dfs, pod, path, there.size):
            return
        raise Conflict(f"{pod}{path}: changed at the server since it was read")

    async def _is_late(self, store: Store, dfs: Client, pod: str, path: str, size: int) -> bool:
        """Whether what the server has is what we sent earlier, byte by byte. If not, it is no longer
        taken to be that."""
        sent = store.sent(self.ino, size)
        if not sent:
            return False
        crc = got = 0
        async with dfs.download(pod, path) as body:
            async for chunk in body:
                got += len(chunk)
                crc = zlib.crc32(chunk, crc)
        if got == size and crc in sent:
            return True
        store.forget_sent(self.ino)
        return False

    async def _body(self, store: Store, fd: int, skew_s: float | None) -> AsyncIterator[bytes]:
        offset = self.crc = 0
        while True:
            chunk = await data.read(fd, offset, min(UPLOAD_CHUNK, self.size - offset))
            if self.changed or (not chunk and offset < self.size):
                raise ChangedDuringUpload(f"{self.name}: written to while it was being uploaded")
            if not chunk:  # the end of the form follows, upon which the server acts
                self.ended = True
                store.note_sent(self.ino, self.size, self.crc, skew_s)
                return
            offset += len(chunk)
            self.crc = zlib.crc32(chunk, self.crc)
            yield chunk

    def _progress(self, sent: int) -> None:
        self.sent = sent

    def done(self, store: Store) -> list[Item]:
        with store.transaction():
            inode, mine = store.get(self.ino), store.remote_of(self.ino)
            there = store.remote_at(self.rparent, self.name)
            if not self.sent_before:  # else an earlier one may arrive yet
                store.forget_sent(self.ino)
            alive = inode is not None and inode.parent is not None
            if store.remote(self.rparent) is None:  # gone meanwhile, with all that was in it
                return []
            earlier = there or mine
            before = earlier.mode if earlier else SERVER_FILE_MODE
            work: list[Item] = []
            if mine is not None and (there is None or mine.rid != there.rid):
                store.set_remote(mine.rid, ino=None)
                work.append(("rid", mine.rid))
            rid = there.rid if there else self._add(store)
            store.set_remote(
                rid,
                size=self.size,
                mtime_s=self.stored_s,
                slack_s=self.slack_s,
                mode=SERVER_FILE_MODE,
                ino=self.ino if alive else None,
                absent_s=None,
                absences=0,
                in_swarm=int(not self.size),  # FairOS has it, which pushes it there by and by
            )
            if inode is None or not alive:
                return [*work, ("rid", rid)]
            if self.changed:
                store.unmark(self.ino, SENT)
                store.note_error(self.ino, None)
            else:
                store.unmark(self.ino, SENT | CONTENT)
                right = {"size": self.size, "crc": self.crc, "epoch": store.epoch}
                store.set(self.ino, error=None, **right)
            store.replace(self.ino)
            # An upload resets the mode at the server. Bits for group and others that only come from
            # a umask are not worth a call: the mount is its owner's alone.
            kept = before == inode.mode != SERVER_FILE_MODE
            if kept or (inode.mode ^ SERVER_FILE_MODE) & 0o700:
                store.mark(self.ino, MODE)
        return work

    def _add(self, store: Store) -> int:
        return store.add_remote(
            *(self.rparent, self.name, FILE),
            size=self.size,
            mtime_s=None,
            mode=SERVER_FILE_MODE,
            ino=None,
        )
