"""The two trees (``schema.py``) as Python values: small, synchronous, every change committed.

May import the schema and errors. Every method runs to its end without an await, so a caller on the
event loop sees each one as atomic; several that must hold together go inside ``transaction()``.
A commit here survives the death of the process; ``sync()`` (blocking: call it in a thread) makes it
survive the machine's.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import sqlite3
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from cpodfs.cache.schema import (
    AFTER_A_KILL,
    CONTENT,
    DAMAGED,
    DIR,
    FILE,
    MIGRATIONS,
    PLACE,
    ROOT,
    SCHEMA,
    SENT,
    UNKNOWN,
    VERSION,
)
from cpodfs.errors import CacheError, CacheVersion

log = logging.getLogger(__name__)

INODE_COLUMNS = (
    "ino, parent, name, kind, mode, size, atime_ns, mtime_ns, ctime_ns, target, cached, dirty, "
    "listed_s, used_s, error, crc, epoch"
)
KNOWN_MAX = 10_000
GROWN_PAGES = 1500
"""Of 4 KiB: a journal that may be as long as that should be moved into the database."""
JOURNAL_PAGES = 4000
"""One as long as that is moved by whoever commits, who waits for it. Less than what is kept free for the
journal on the disk (``content.RESERVE``)."""
COMMIT_PAGES = 6
ROWS_A_PAGE = 2
"""What the smallest commit takes of it, and how many rows of a larger one a page takes, about."""
MARGIN_S = 5
"""How far apart two clocks may be of which the difference is known."""
LATE_S = 300.0
"""So long after its last byte was sent an upload may still appear at the server, clocks included."""
UNSYNCED = (sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_DIR_FSYNC)
WARN_EVERY_S = 60.0
_warned: dict[str, float] = {}
REMOTE_COLUMNS = (
    "rid, rparent, name, kind, size, mtime_s, slack_s, mode, readonly, ino, to_parent, to_name, "
    "absent_s, absences, in_swarm"
)
BELOW = (
    "WITH RECURSIVE below(rid) AS "
    "(VALUES (?) UNION ALL SELECT r.rid FROM remote r JOIN below ON r.rparent = below.rid)"
)
"""A remote object and all that is in it."""


def trouble(error: Exception) -> str | None:
    """What keeps the journal from being used, in one line; None of any other error, such as a mistake
    of our own."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return "the cache's disk is full"
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return f"the journal of the cache is damaged ({error}); unmount, then: cpodfs cache check"
    return f"the journal: {error}" if isinstance(error, sqlite3.OperationalError) else None


def level(why: str) -> int:
    """At which level to log a trouble: once a minute for all whom it strikes it is a warning."""
    now = time.monotonic()
    if now - _warned.get(why, float("-inf")) < WARN_EVERY_S:
        return logging.DEBUG
    _warned[why] = now
    return logging.WARNING


class _Database(sqlite3.Connection):
    """Tells when its disk is full: a journal that begins anew needs no more room; and when the disk
    could not keep something."""

    on_full: Callable[[], None] = staticmethod(lambda: None)
    on_unsynced: Callable[[str], object] = staticmethod(lambda _why: None)

    def execute(self, *args: Any) -> sqlite3.Cursor:
        try:
            return super().execute(*args)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                self.on_full()
            elif error.sqlite_errorcode in UNSYNCED:
                self.on_unsynced(str(error))
            raise


def _move(db: sqlite3.Connection) -> bool:
    busy, pages, moved = db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    return not busy and bool(pages == moved)


class Inode(NamedTuple):
    """A row of the local tree; the columns are explained in ``schema.py``."""

    ino: int
    parent: int | None
    name: str | None
    kind: str
    mode: int
    size: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    target: str | None
    cached: int
    dirty: int
    listed_s: float
    used_s: float
    error: str | None
    crc: int | None
    epoch: int

    @property
    def is_dir(self) -> bool:
        return self.kind == DIR

    @property
    def is_file(self) -> bool:
        return self.kind == FILE


class Remote(NamedTuple):
    """A row of the remote tree; the columns are explained in ``schema.py``."""

    rid: int
    rparent: int | None
    name: str
    kind: str
    size: int
    mtime_s: int | None
    slack_s: int
    mode: int
    readonly: int
    ino: int | None
    to_parent: int | None
    to_name: str | None
    absent_s: float | None
    absences: int
    in_swarm: int

    @property
    def item(self) -> tuple[str, int]:
        """What the engine calls it: by its inode or, an orphan, by itself."""
        return ("rid", self.rid) if self.ino is None else ("ino", self.ino)

    def mode_or(self, other: int) -> int:
        """Permission bits; ``other`` while a chmod has not been answered."""
        return other if self.mode == UNKNOWN else self.mode

    def is_version(self, size: int, mtime_s: int) -> bool:
        """Whether what the server now says of a file can be the version that we know."""
        if self.size == UNKNOWN:
            return True
        if self.mtime_s is None:
            return size == self.size
        return size == self.size and abs(mtime_s - self.mtime_s) <= self.slack_s

    def is_older(self, mtime_s: int) -> bool:
        """Whether what the server now says of a file is surely an earlier version than we know: it
        shows one when it cannot read the newest."""
        return self.mtime_s is not None and mtime_s < self.mtime_s - self.slack_s


class Store:
    """The metadata of one account. Not thread-safe: one owner, the event loop.

    ``starts``: how often it was opened before. ``epoch``: a data file that was right at an earlier
    one must be looked at before it is believed. ``was_cut``: the last driver did not end well.
    ``lost_journal``: of what that one committed, some is gone. ``is_outdated``: contents, here and at
    the server, may be newer than what is in here.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the database. Raises CacheVersion or CacheError."""
        self._path = path
        self.is_outdated = False
        self._depth = 0
        # Rows as read, until they change: most requests of the kernel ask for one again and again.
        self._known: dict[int, Inode] = {}
        # Told of each object, as an ``Item``, that the server must be told or asked of from now on,
        # so that none can come into being that nobody sees to. Also for what is rolled back later.
        self.on_unsettled: Callable[[tuple[str, int]], None] = lambda item: None
        # Unix time of the last look at directories that are to be deleted at the server, which have
        # no inode any more that would know; by remote id. Not kept: the next driver looks again.
        self.looked: dict[int, float] = {}
        # Called when so much was written that ``checkpoint()`` is due.
        self.on_grown: Callable[[], None] = lambda: None
        self._commits = self._grown_at = 0
        self._failure = ""
        had_journal = os.path.exists(f"{path}-wal")
        try:
            self._db, is_shared = self._open()
            self._check_version(had_journal)
            self._check_pages()
            self._start(had_journal)
            # For checkpoint(), which runs in a thread while the loop goes on with the other one.
            self._checkpointer = self._connect("NORMAL") if is_shared else None
            for db in self._connections():
                db.on_unsynced = self._failed
            self._db.execute("PRAGMA busy_timeout = 0")  # nobody else ought to write
            # For sync(). Open for as long as the database: closing any descriptor of a file drops
            # the process's POSIX locks on it, and others could then clear the journal away.
            self._files = [os.open(f"{path}{end}", os.O_RDONLY) for end in ("-wal", "")]
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL:
                raise CacheError(f"{path}: its disk is full; make room and try again") from error
            raise self._unusable(str(error)) from error

    def _open(self) -> tuple[_Database, bool]:
        """The loop's connection; whether there can be another. That needs a memory that both share,
        for which a full disk has no room, and some file systems no means: there whoever commits
        moves the journal."""
        try:
            db = self._connect("NORMAL")
        except sqlite3.OperationalError:
            return self._connect("EXCLUSIVE"), False
        db.execute(f"PRAGMA wal_autocheckpoint = {JOURNAL_PAGES}")
        return db, True

    def _connect(self, locking: str) -> _Database:
        db = sqlite3.connect(
            self._path,
            isolation_level=None,
            cached_statements=256,
            check_same_thread=False,
            factory=_Database,
        )
        try:
            db.execute(f"PRAGMA locking_mode = {locking}")
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute("SELECT 1 FROM sqlite_master").fetchone()
        except BaseException:
            db.close()
            raise
        db.on_full = lambda: self.on_grown()
        return db

    def _connections(self) -> list[_Database]:
        return [self._db] if self._checkpointer is None else [self._checkpointer, self._db]

    def _unusable(self, reason: str) -> CacheError:
        return CacheError(
            f"{self._path}: not a usable cache: {reason}; nothing was changed; what is in it: "
            f"cpodfs cache rescue DIR; then move {self._path.parent} away and mount anew"
        )

    def _check_pages(self) -> None:
        found = [text for (text,) in self._db.execute("PRAGMA quick_check(1)")]
        if found != ["ok"]:
            self._db.close()
            raise self._unusable(" ".join("; ".join(found).split()))

    def _start(self, had_journal: bool) -> None:
        self.starts, self.epoch, ended = self._db.execute("SELECT * FROM state").fetchone()
        self.was_cut = not ended
        self.lost_journal = self.was_cut and not had_journal
        if self.was_cut:
            self.epoch = self.starts + 1
        self._db.execute(
            "UPDATE state SET starts = starts + 1, epoch = ?, ended = 0", (self.epoch,)
        )
        # In the database itself: should the journal be lost, it says that it was not closed.
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _check_version(self, had_journal: bool) -> None:
        (found,) = self._db.execute("PRAGMA user_version").fetchone()
        if found == 0:
            os.chmod(self._path, 0o600)
            self._db.executescript(f"BEGIN; {SCHEMA} COMMIT;")
            return
        if found > VERSION:
            self._db.close()
            raise CacheVersion(
                f"{self._path}: written in format {found}, this cpodfs knows only {VERSION}; use the "
                "cpodfs that wrote it to upload what is pending, then remove the folder"
            )
        for version in range(found, VERSION):
            script = MIGRATIONS[version] + (AFTER_A_KILL.get(version, "") if had_journal else "")
            self._db.executescript(f"BEGIN; {script} COMMIT;")

    def doubt(self, starts: int) -> None:
        """The journal is older than the contents, of which none is believed without a look. ``starts``:
        how often the cache was opened, this time included."""
        self.epoch = starts
        self._db.execute("UPDATE state SET starts = ?, epoch = ?", (starts, starts))

    def close(self) -> None:
        """Close it as what it is: complete, and on the disk."""
        with suppress(sqlite3.Error):  # on a full disk it counts as cut off, which costs a look
            if not self._failure:
                self._db.execute("UPDATE state SET ended = 1")
        for db in self._connections():
            db.close()
        for fd in self._files:
            os.close(fd)

    def sync(self) -> None:
        """Make every commit so far survive a loss of power. Blocks: run it in a thread. Raises OSError,
        and once it has, it always does: the kernel tells only once of what it could not write, and
        then drops it (https://wiki.postgresql.org/wiki/Fsync_Errors)."""
        if not self._failure:
            try:
                for fd in self._files:
                    os.fdatasync(fd)
            except OSError as error:
                self._failed(error.strerror or str(error))
        if self._failure:
            raise OSError(errno.EIO, self._failure, str(self._path))

    def _failed(self, why: str) -> None:
        """From now on nothing is acknowledged, nor sent. What is in the journal as it is read now may
        be another one tomorrow, so it is not moved either."""
        self._failure = (
            f"the cache's disk could not keep the journal ({why}); nothing is uploaded until that disk "
            "works and is mounted anew"
        )
        log.error("%s: %s", self._path, self._failure)
        self._db.execute("PRAGMA wal_autocheckpoint = 0")
        # A lock that is not the process's own keeps SQLite from moving it when it is closed.
        everything = struct.pack("hhqqi", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
        with suppress(OSError):
            fcntl.fcntl(self._files[1], fcntl.F_OFD_SETLK, everything)

    @property
    def written(self) -> int:
        """Rows written so far: as long as it stays the same, nothing was committed."""
        return self._db.total_changes

    def checkpoint(self) -> bool:
        """Move the journal into the database; returns whether all was moved that was in there at the
        beginning: nobody else was reading it. Blocks: run it in a thread, once at a time. The loop
        goes on meanwhile. Raises sqlite3.Error."""
        if self._failure:
            return False
        return self._checkpointer is None or _move(self._checkpointer)

    def finish_checkpoint(self) -> None:
        """Move the little that was committed during ``checkpoint``, so that the next commit begins the
        journal anew. Raises sqlite3.Error."""
        if self._checkpointer is not None:
            _move(self._db)

    def _note_growth(self) -> None:
        self._commits += 1
        pages = self.written // ROWS_A_PAGE + COMMIT_PAGES * self._commits
        if pages - self._grown_at > GROWN_PAGES:
            self._grown_at = pages
            self.on_grown()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing; may be nested (the outermost commits). Must not contain an await."""
        if self._depth:
            yield
            return
        self._db.execute("BEGIN IMMEDIATE")
        self._depth = 1
        try:
            yield
            self._db.execute("COMMIT")
            self._note_growth()
        except BaseException:
            self._known.clear()
            if self._db.in_transaction:  # on a full disk SQLite has rolled back by itself
                self._db.execute("ROLLBACK")
            raise
        finally:
            self._depth = 0

    # -- the local tree ---------------------------------------------------------------------------

    def get(self, ino: int) -> Inode | None:
        known = self._known.get(ino)
        return self._inode("ino = ?", (ino,)) if known is None else known

    def is_doubted(self, inode: Inode) -> bool:
        """Whether the content was right before an end that was none, and nobody has looked since."""
        return inode.crc is not None and inode.epoch < self.epoch

    def child(self, parent: int, name: str) -> Inode | None:
        return self._inode("parent = ? AND name = ?", (parent, name))

    def children(self, parent: int, after: int = 0, limit: int = -1) -> list[Inode]:
        """Children in the order of their inode numbers, those above ``after``; -1: no limit."""
        rows = self._db.execute(
            f"SELECT {INODE_COLUMNS} FROM inode WHERE parent = ? AND ino > ? ORDER BY ino LIMIT ?",
            (parent, after, limit),
        )
        return [Inode._make(row) for row in rows]

    def has_children(self, parent: int) -> bool:
        query = "SELECT 1 FROM inode WHERE parent = ? LIMIT 1"
        return self._db.execute(query, (parent,)).fetchone() is not None

    def is_blank(self) -> bool:
        """Whether nothing is in here: no pod was made, and none was ever looked for."""
        root = self.get(ROOT)
        return not self.has_children(ROOT) and (root is None or not root.listed_s)

    def create(
        self,
        parent: int,
        name: str,
        kind: str,
        mode: int,
        *,
        size: int = 0,
        mtime_ns: int | None = None,
        target: str | None = None,
        cached: int = 0,
        dirty: int = 0,
    ) -> Inode:
        """A new inode under a name that must be free. Times are now unless ``mtime_ns`` is given."""
        now = time.time_ns()
        mtime = now if mtime_ns is None else mtime_ns
        row = self._db.execute(
            f"INSERT INTO inode ({INODE_COLUMNS}) VALUES "
            "(NULL,?,?,?,?,?,?,?,?,?,?,?,0,?,NULL,NULL,0) RETURNING " + INODE_COLUMNS,
            (
                *(parent, name, kind, mode, size, mtime, mtime, mtime if mtime_ns else now),
                *(target, cached, dirty, now / 1e9),
            ),
        ).fetchone()
        if dirty:
            self.on_unsettled(("ino", row[0]))
        return Inode._make(row)

    def set(self, ino: int, **columns: Any) -> None:
        """Change columns (trusted names) of one inode."""
        self._known.pop(ino, None)
        names = ", ".join(f"{name} = ?" for name in columns)
        self._db.execute(
            f"UPDATE inode SET {names} WHERE ino = ?",
            (*columns.values(), ino),
        )
        if columns.get("dirty"):
            self.on_unsettled(("ino", ino))
        if not self._depth:
            self._note_growth()

    def mark(self, ino: int, bits: int) -> None:
        """Set ``dirty`` bits; an earlier error no longer counts, but that the file is damaged."""
        self._known.pop(ino, None)
        self._db.execute(
            f"UPDATE inode SET dirty = dirty | ?, error = iif(dirty & {DAMAGED}, error, NULL) "
            "WHERE ino = ?",
            (bits, ino),
        )
        self.on_unsettled(("ino", ino))

    def wrote(self, ino: int, **columns: Any) -> None:
        """Bytes of a file are about to change: it is dirty, and what was known of its content no longer
        counts. ``columns`` change with it."""
        with self.transaction():
            self.set(ino, crc=None, **columns)
            self.mark(ino, CONTENT)

    def damaged(self, ino: int, reason: str, **columns: Any) -> None:
        """The data file of a file that is dirty lost bytes; ``columns`` change with it."""
        with self.transaction():
            self.mark(ino, DAMAGED)
            self.set(ino, error=reason, **columns)

    def emptied(self, ino: int) -> None:
        """Nothing is left of what a file held, so that it is whole again."""
        with self.transaction():
            self.unmark(ino, DAMAGED)
            self.mark(ino, CONTENT)

    def note_error(self, ino: int, error: str | None) -> None:
        """What went wrong last; that the file is damaged goes before all else."""
        self._known.pop(ino, None)
        self._db.execute(
            f"UPDATE inode SET error = ? WHERE ino = ? AND NOT dirty & {DAMAGED}", (error, ino)
        )

    def acknowledge(self, ino: int, size: int) -> None:
        """So many bytes of a file are on the disk for good, should it still be dirty."""
        self._known.pop(ino, None)
        self._db.execute(
            f"UPDATE inode SET size = ? WHERE ino = ? AND dirty & {CONTENT} AND size != ?",
            (size, ino, size),
        )

    def unmark(self, ino: int, bits: int) -> None:
        self._known.pop(ino, None)
        self._db.execute("UPDATE inode SET dirty = dirty & ~? WHERE ino = ?", (bits, ino))

    def detach(self, ino: int) -> Remote | None:
        """Take the inode's name away. Its remote object becomes an orphan, which is returned."""
        with self.transaction():
            self.assume_sent(ino)
            inode, remote = self.get(ino), self.remote_of(ino)
            self._known.pop(ino, None)
            # What was written here has no checksum: whoever has it open must believe it.
            self._db.execute(
                f"UPDATE inode SET epoch = CASE WHEN dirty & {CONTENT} THEN ? ELSE epoch END, "
                "parent = NULL, name = NULL, dirty = 0, ctime_ns = ? WHERE ino = ?",
                (self.epoch, time.time_ns(), ino),
            )
            if remote is not None:
                if inode is not None and inode.is_dir:
                    self.looked[remote.rid] = inode.listed_s
                self.set_remote(remote.rid, ino=None)
            return remote

    def drop(self, ino: int) -> None:
        """Forget an unlinked inode for good."""
        with self.transaction():
            self._known.pop(ino, None)
            self._db.execute("DELETE FROM xattr WHERE ino = ?", (ino,))
            self.forget_sent(ino)
            self._db.execute("DELETE FROM inode WHERE ino = ? AND parent IS NULL", (ino,))

    def place(self, ino: int, parent: int, name: str) -> None:
        """Move an inode to a free name; PLACE is set or cleared to match the remote tree."""
        with self.transaction():
            self.assume_sent(ino)
            self.set(ino, parent=parent, name=name, ctime_ns=time.time_ns())
            self.replace(ino)

    def assume_sent(self, ino: int) -> None:
        """Before an object leaves a name under which it may have arrived: suppose it did.

        Else the server could keep what nobody here knows to delete.
        """
        inode = self.get(ino)
        if inode is None or not inode.dirty & SENT:
            return
        home = self.remote_of(inode.parent) if inode.parent is not None else None
        if home is None or inode.name is None:
            return
        there = self.remote_at(home.rid, inode.name)
        mode = 0o700 if inode.is_dir else 0o600
        # A pod cannot be renamed there: it is made anew, and this one is to be deleted.
        owner = ino if self.remote_of(ino) is None and home.rid != ROOT else None
        if there is None:
            self.add_remote(
                *(home.rid, inode.name, inode.kind),
                size=UNKNOWN,
                mtime_s=None,
                mode=mode,
                ino=owner,
            )
        elif there.ino is None and owner is not None:
            self.set_remote(there.rid, ino=owner)
        self.unmark(ino, SENT)

    def replace(self, ino: int) -> None:
        """Recompute the PLACE bit of an inode from the two trees."""
        inode, remote = self.get(ino), self.remote_of(ino)
        if inode is None or inode.parent is None or inode.kind not in (FILE, DIR):
            return
        home = self.remote_of(inode.parent)
        if home and remote and (remote.rparent, remote.name) == (home.rid, inode.name):
            self.unmark(ino, PLACE)
        else:
            self.mark(ino, PLACE)

    def pending_inodes(self, after: int = 0, limit: int = -1) -> list[Inode]:
        rows = self._db.execute(
            f"SELECT {INODE_COLUMNS} FROM inode WHERE dirty != 0 AND +parent IS NOT NULL AND ino > ? "
            "ORDER BY ino LIMIT ?",
            (after, limit),
        )
        return [Inode._make(row) for row in rows]

    def unsettled(self) -> list[tuple[str, int]]:
        """What the server has not been told or asked: ("ino", inode) or ("rid", orphan or
        object whose rename has an outcome that is not known)."""
        pending = [("ino", inode.ino) for inode in self.pending_inodes()]
        pending += [("rid", rid) for rid in self.orphans()]
        moving = {remote.item for remote in self.moving()}
        return [*pending, *(moving - set(pending))]

    def is_settled(self) -> bool:
        """Whether the server knows all."""
        pending = "SELECT 1 FROM inode WHERE dirty != 0 AND +parent IS NOT NULL LIMIT 1"
        orphan = "SELECT 1 FROM remote WHERE ino IS NULL AND absent_s IS NULL LIMIT 1"
        return not any(self._db.execute(query).fetchone() for query in (pending, orphan))

    def failed(self, limit: int) -> list[Inode]:
        """Pending inodes whose writeback has failed."""
        rows = self._db.execute(
            f"SELECT {INODE_COLUMNS} FROM inode WHERE dirty != 0 AND +parent IS NOT NULL "
            "AND +error IS NOT NULL LIMIT ?",
            (limit,),
        )
        return [Inode._make(row) for row in rows]

    def claimed(self) -> frozenset[int]:
        """Inodes that have a data file."""
        return frozenset(
            ino for (ino,) in self._db.execute("SELECT ino FROM inode WHERE cached = 1")
        )

    def not_cached(self, ino: int) -> None:
        """The data file of an inode is not there; of a clean one the server has it."""
        self._known.pop(ino, None)
        self._db.execute("UPDATE inode SET cached = 0 WHERE ino = ? AND dirty = 0", (ino,))

    def never_again(self, ino: int) -> None:
        """No inode gets this number, or one below it, from now on."""
        self._db.execute(
            "UPDATE sqlite_sequence SET seq = max(seq, ?) WHERE name = 'inode'", (ino,)
        )

    def unlinked(self) -> list[int]:
        """Inodes without a name: left over when the driver died while they were open."""
        rows = self._db.execute("SELECT ino FROM inode WHERE parent IS NULL AND ino != ?", (ROOT,))
        return [ino for (ino,) in rows]

    def ancestors(self, ino: int) -> list[Inode]:
        """The inode and the directories above it, nearest first, without the root.

        Empty for the root; ends early (and so does not end in a pod) for an unlinked inode.
        """
        found: list[Inode] = []
        inode = self.get(ino)
        while inode is not None and inode.ino != ROOT:
            found.append(inode)
            inode = self.get(inode.parent) if inode.parent is not None else None
        return found

    def path(self, ino: int) -> str:
        """Where the user sees the inode, relative to the mount; for messages."""
        return "/".join(i.name or "(deleted)" for i in reversed(self.ancestors(ino)))

    def totals(self) -> dict[str, int]:
        """Counts for ``status``: objects, files and their bytes, errors, deletions.

        Uses the partial indexes.
        """
        pending, files, size, errors = self._db.execute(
            f"SELECT count(*), coalesce(sum(dirty & {CONTENT}), 0), "
            f"coalesce(sum(size) FILTER (WHERE dirty & {CONTENT}), 0), count(error) "
            "FROM inode WHERE dirty != 0 AND +parent IS NOT NULL"
        ).fetchone()
        orphans = "SELECT count(*) FROM remote WHERE ino IS NULL AND absent_s IS NULL"
        deletions = self._db.execute(orphans).fetchone()[0]
        return {
            "pending": pending,
            "files": files,
            "bytes": size,
            "errors": errors,
            "deletions": deletions,
        }

    def cached_bytes(self) -> int:
        """Bytes of clean files whose content is here."""
        query = "SELECT coalesce(sum(size), 0) FROM inode WHERE cached = 1 AND dirty = 0"
        total: int = self._db.execute(query).fetchone()[0]
        return total

    def evictable_bytes(self) -> int:
        """Of these, the bytes that would not be lost with what is here."""
        total = self.cached_bytes()
        for pinned in ("in_swarm = 0", "absent_s IS NOT NULL AND in_swarm != 0"):
            query = (
                "SELECT coalesce(sum(inode.size), 0) FROM remote JOIN inode USING (ino) "
                f"WHERE {pinned} AND cached = 1 AND dirty = 0"
            )
            total -= self._db.execute(query).fetchone()[0]
        return total

    def evictable(self, after: tuple[float, int], limit: int) -> list[Inode]:
        """Clean files with content here, the least recently used first, from those on that come
        after (time of use, inode). Not what only FairOS has, or what it does not show any more."""
        columns = ", ".join(f"inode.{name}" for name in INODE_COLUMNS.split(", "))
        rows = self._db.execute(
            f"SELECT {columns} FROM inode LEFT JOIN remote USING (ino) "
            "WHERE cached = 1 AND dirty = 0 AND (used_s, inode.ino) > (?, ?) "
            "AND in_swarm IS NOT 0 AND absent_s IS NULL ORDER BY used_s, inode.ino LIMIT ?",
            (*after, limit),
        )
        return [Inode._make(row) for row in rows]

    # -- extended attributes ----------------------------------------------------------------------

    def xattr(self, ino: int, name: bytes) -> bytes | None:
        row = self._db.execute(
            "SELECT value FROM xattr WHERE ino = ? AND name = ?", (ino, name)
        ).fetchone()
        return None if row is None else bytes(row[0])

    def xattrs(self, ino: int) -> list[bytes]:
        return [
            bytes(name)
            for (name,) in self._db.execute("SELECT name FROM xattr WHERE ino = ?", (ino,))
        ]

    def set_xattr(self, ino: int, name: bytes, value: bytes) -> None:
        self._db.execute("INSERT OR REPLACE INTO xattr VALUES (?,?,?)", (ino, name, value))

    def remove_xattr(self, ino: int, name: bytes) -> bool:
        return (
            self._db.execute("DELETE FROM xattr WHERE ino = ? AND name = ?", (ino, name)).rowcount
            > 0
        )

    # -- uploads with an outcome that is not known -------------------------------------------------

    def note_sending(self, ino: int, size: int) -> None:
        """An upload of so many bytes begins, of which the server may act on the last one at any time:
        a loss of power may take ``note_sent`` back."""
        row = (ino, size, UNKNOWN, float("inf"))
        self._db.execute("INSERT OR REPLACE INTO sent VALUES (?,?,?,?)", row)

    def note_not_sent(self, ino: int, size: int) -> None:
        """The upload of so many bytes that had begun has surely done nothing."""
        row = (ino, size, UNKNOWN)
        self._db.execute("DELETE FROM sent WHERE ino = ? AND size = ? AND crc = ?", row)

    def note_sent(self, ino: int, size: int, crc: int, skew_s: float | None) -> None:
        """From now on the server, whose clock is so much ahead, may act on an upload of so many bytes
        with this CRC-32. Where its clock is not known, times tell nothing."""
        sent_s = time.time() + skew_s if skew_s is not None else float("inf")
        self.note_not_sent(ino, size)  # it has a checksum now
        self._db.execute("INSERT OR REPLACE INTO sent VALUES (?,?,?,?)", (ino, size, crc, sent_s))

    def sent(self, ino: int, size: int) -> frozenset[int]:
        """The checksums of such uploads of so many bytes."""
        rows = self._db.execute("SELECT crc FROM sent WHERE ino = ? AND size = ?", (ino, size))
        return frozenset(crc for (crc,) in rows)

    def may_be_late(self, ino: int, size: int, mtime_s: int) -> bool:
        """Whether a version that the server shows can be such an upload, by its size and time."""
        row = self._db.execute(
            "SELECT 1 FROM sent WHERE ino = ? AND size = ? AND abs(? - sent_s) < ? LIMIT 1",
            (ino, size, mtime_s, LATE_S),
        ).fetchone()
        return row is not None

    def is_foreign(self, ino: int, size: int, mtime_s: int) -> bool:
        """Whether a version that the server shows is surely somebody else's, though an upload of ours
        may have replaced what was known: it came after that, and has another size."""
        (sent_s,) = self._db.execute(
            "SELECT min(sent_s) FROM sent WHERE ino = ?", (ino,)
        ).fetchone()
        if sent_s is None or mtime_s <= sent_s + MARGIN_S:
            return False
        return not self.sent(ino, size)

    def times_move(self, rid: int) -> None:
        """The server gives what it renames, and all below that, the present as modification time; those
        of uploads tell nothing any more."""
        with self.transaction():
            self._db.execute(
                f"{BELOW} UPDATE remote SET mtime_s = NULL WHERE rid IN (SELECT rid FROM below)",
                (rid,),
            )
            self._db.execute(
                f"{BELOW} UPDATE sent SET sent_s = ? WHERE ino IN "
                "(SELECT ino FROM remote WHERE rid IN (SELECT rid FROM below) AND ino IS NOT NULL)",
                (rid, float("inf")),
            )

    def forget_sent(self, ino: int) -> None:
        self._db.execute("DELETE FROM sent WHERE ino = ?", (ino,))

    # -- the remote tree --------------------------------------------------------------------------

    def remote(self, rid: int) -> Remote | None:
        return self._remote("rid = ?", (rid,))

    def remote_of(self, ino: int) -> Remote | None:
        return self._remote("ino = ?", (ino,))

    def remote_at(self, rparent: int, name: str) -> Remote | None:
        return self._remote("rparent = ? AND name = ?", (rparent, name))

    def remote_children(self, rid: int, *, after: str = "", limit: int = -1) -> list[Remote]:
        """What is in a remote directory in the order of names, those above ``after``; -1: no limit.

        No object has the name "" but the root.
        """
        rows = self._db.execute(
            f"SELECT {REMOTE_COLUMNS} FROM remote WHERE rparent = ? AND name > ? "
            "ORDER BY name LIMIT ?",
            (rid, after, limit),
        )
        return [Remote._make(row) for row in rows]

    def unfinished_child(self, rid: int) -> Remote | None:
        """Something in a remote directory that is shown here, or has still to be deleted."""
        return self._remote(
            "rparent = ? AND (ino IS NOT NULL OR absent_s IS NULL) ORDER BY name LIMIT 1", (rid,)
        )

    def has_remote_dirs(self, rid: int) -> bool:
        query = "SELECT 1 FROM remote WHERE rparent = ? AND kind = ? LIMIT 1"
        return self._db.execute(query, (rid, DIR)).fetchone() is not None

    def newest_rid(self) -> int:
        """The highest remote id so far; none is used twice."""
        return int(self._db.execute("SELECT max(rid) FROM remote").fetchone()[0])

    def moving_into(self, rid: int) -> Remote | None:
        """An object of which it is not known whether the server has renamed it into a directory."""
        return self._remote("to_parent = ?", (rid,))

    def moving_above(self, rid: int) -> Remote | None:
        """The object itself, or the nearest directory above it, of which it is not known whether
        the server has renamed it: until that is found out, paths through it mean nothing."""
        remote = self.remote(rid)
        while remote is not None and remote.to_parent is None:
            remote = self.remote(remote.rparent) if remote.rparent is not None else None
        return remote

    def remote_moving_to(self, rparent: int, name: str) -> Remote | None:
        """The object that a rename with an unknown outcome may have put at this place."""
        return self._remote("to_parent = ? AND to_name = ?", (rparent, name))

    def moving(self) -> list[Remote]:
        """Objects whose rename has been sent, with an outcome that is not known."""
        query = f"SELECT {REMOTE_COLUMNS} FROM remote WHERE to_parent IS NOT NULL"
        return [Remote._make(row) for row in self._db.execute(query)]

    def doubtful(self, limit: int = -1) -> list[Remote]:
        """What the server does not show any more, the topmost object only; -1: no limit."""
        query = f"SELECT {REMOTE_COLUMNS} FROM remote WHERE absent_s IS NOT NULL LIMIT ?"
        return [Remote._make(row) for row in self._db.execute(query, (limit,))]

    def unswarmed(self) -> list[int]:
        """Remote ids of files of which only FairOS is known to have the content."""
        query = "SELECT rid FROM remote WHERE in_swarm = 0 AND +ino IS NOT NULL"
        return [rid for (rid,) in self._db.execute(query)]

    def unswarmed_totals(self) -> dict[str, int]:
        """Their number and bytes."""
        files, size = self._db.execute(
            "SELECT count(*), coalesce(sum(max(size, 0)), 0) FROM remote "
            "WHERE in_swarm = 0 AND +ino IS NOT NULL"
        ).fetchone()
        return {"files": files, "bytes": size}

    def has_doubtful(self, rparent: int) -> bool:
        """Whether the server does not show something any more that was in a directory."""
        query = "SELECT 1 FROM remote WHERE absent_s IS NOT NULL AND +rparent = ? LIMIT 1"
        return self._db.execute(query, (rparent,)).fetchone() is not None

    def doubtful_count(self) -> int:
        """How many objects that are shown here the server does not show."""
        query = "SELECT count(*) FROM remote WHERE absent_s IS NOT NULL AND +ino IS NOT NULL"
        return int(self._db.execute(query).fetchone()[0])

    def ghost_count(self) -> int:
        """How many objects the server does not show any more, and are deleted when it does."""
        query = "SELECT count(*) FROM remote WHERE absent_s IS NOT NULL AND +ino IS NULL"
        return int(self._db.execute(query).fetchone()[0])

    def doubtful_above(self, rid: int) -> Remote | None:
        """The object itself, or the nearest directory above it, that the server does not show."""
        if not self._db.execute(
            "SELECT 1 FROM remote WHERE absent_s IS NOT NULL LIMIT 1"
        ).fetchone():
            return None
        remote = self.remote(rid)
        while remote is not None and remote.absent_s is None:
            remote = self.remote(remote.rparent) if remote.rparent is not None else None
        return remote

    def orphans(self, limit: int = -1) -> list[int]:
        """What is to be deleted at the server, which shows it."""
        query = "SELECT rid FROM remote WHERE ino IS NULL AND absent_s IS NULL LIMIT ?"
        rows = self._db.execute(query, (limit,))
        return [rid for (rid,) in rows]

    def forget_strays(self) -> None:
        """Forget what was listed into a directory after its removal here, as earlier versions did:
        the deletion waited for it for ever. Whatever it is, it is found again at the server."""
        rows = self._db.execute(
            "SELECT c.rid, c.ino FROM remote p JOIN remote c ON c.rparent = p.rid "
            "LEFT JOIN inode i ON i.ino = c.ino LEFT JOIN inode d ON d.ino = i.parent "
            "WHERE p.ino IS NULL AND c.ino IS NOT NULL AND (i.parent IS NULL OR d.ino IS NULL "
            f"OR (d.parent IS NULL AND d.ino != {ROOT}))"
        ).fetchall()
        for rid, ino in rows:
            with self.transaction():
                self.drop_remote(rid)
                self.detach(ino)

    def add_remote(
        self,
        rparent: int,
        name: str,
        kind: str,
        *,
        size: int,
        mtime_s: int | None,
        mode: int,
        ino: int | None,
        readonly: int = 0,
    ) -> int:
        """A new remote row (its place must be free); returns the rid."""
        cursor = self._db.execute(
            "INSERT INTO remote (rparent, name, kind, size, mtime_s, slack_s, mode, readonly, ino) "
            "VALUES (?,?,?,?,?,0,?,?,?)",
            (rparent, name, kind, size, mtime_s, mode, readonly, ino),
        )
        rid = cursor.lastrowid
        assert rid is not None
        if ino is None:
            self.on_unsettled(("rid", rid))
        return rid

    def set_remote(self, rid: int, **columns: Any) -> None:
        """Change columns (trusted names) of one remote row."""
        names = ", ".join(f"{name} = ?" for name in columns)
        self._db.execute(
            f"UPDATE remote SET {names} WHERE rid = ?",
            (*columns.values(), rid),
        )
        is_moving = columns.get("to_parent") is not None
        if is_moving or columns.get("ino", rid) is None or columns.get("absent_s", rid) is None:
            remote = self.remote(rid)
            if remote is not None and (is_moving or remote.ino is None):
                self.on_unsettled(remote.item)

    def drop_remote(self, rid: int) -> None:
        """Forget a remote object and, for a directory, all that it held."""
        rows = self._db.execute(
            f"{BELOW} DELETE FROM remote WHERE rid IN (SELECT rid FROM below) RETURNING rid", (rid,)
        )
        for (dropped,) in rows.fetchall():
            self.looked.pop(dropped, None)

    def remote_path(self, rid: int) -> list[str]:
        """Components from the pod's name on down of where the server has this object; none for the
        root, and for what was in a directory that is no more."""
        parts: list[str] = []
        remote = self.remote(rid)
        while remote is not None and remote.rparent is not None:
            parts.append(remote.name)
            remote = self.remote(remote.rparent)
        return parts[::-1] if remote is not None else []

    # -- rows -------------------------------------------------------------------------------------

    def _inode(self, where: str, arguments: tuple[Any, ...]) -> Inode | None:
        row = self._db.execute(
            f"SELECT {INODE_COLUMNS} FROM inode WHERE {where}", arguments
        ).fetchone()
        if row is None:
            return None
        if len(self._known) >= KNOWN_MAX:
            self._known.clear()
        inode = self._known[row[0]] = Inode._make(row)
        return inode

    def _remote(self, where: str, arguments: tuple[Any, ...]) -> Remote | None:
        row = self._db.execute(
            f"SELECT {REMOTE_COLUMNS} FROM remote WHERE {where}",
            arguments,
        ).fetchone()
        return None if row is None else Remote._make(row)
