"""The on-disk format of the cache's metadata, table by table and column by column.

A leaf module. There are two trees. ``inode`` is the *local* tree: what the kernel was last told.
``remote`` is the *remote* tree: what we believe the server holds. A remote row points to the inode
whose object it is. Writeback is whatever makes the second equal to the first; there is no log of
operations, so create + rename or create + delete cost nothing that the server need ever hear of.
"""

from __future__ import annotations

VERSION = 1
"""``PRAGMA user_version``. A cache with any other (but 0: new) is refused, never guessed at."""

ROOT = 1
"""Inode and remote id of the mount's root, whose children are the pods."""

FILE, DIR, LINK = "f", "d", "l"

CONTENT, MODE, PLACE, SENT = 1, 2, 4, 8
"""Bits of ``inode.dirty``. CONTENT: the server has not got these bytes. MODE: nor these permission
bits. PLACE: nor the object under this name. SENT: an upload has begun and its outcome is not known,
so whatever the server now shows under this name may be ours."""

UNKNOWN = -1
"""``remote.size`` of a file that is either the old version or the one that we sent."""

SCHEMA = f"""
CREATE TABLE inode (
    ino INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used twice, so its FUSE generation is always 0
    parent INTEGER,            -- inode of the directory; NULL: the root, or unlinked and still open
    name TEXT,                 -- NULL exactly when parent is
    kind TEXT NOT NULL,        -- 'f' file, 'd' directory, 'l' symbolic link (kept here only)
    mode INTEGER NOT NULL,     -- permission bits (07777)
    size INTEGER NOT NULL,     -- bytes; for a dirty file the data file's own size is the truth
    atime_ns INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    ctime_ns INTEGER NOT NULL,
    target TEXT,               -- of a symbolic link
    cached INTEGER NOT NULL,   -- file: 1 when the data file is complete
    dirty INTEGER NOT NULL,    -- what the server has not been told: bits
    listed_s REAL NOT NULL,    -- directory: Unix time of the last complete listing; 0: never
    used_s REAL NOT NULL,      -- file: Unix time of the last open, for eviction
    error TEXT,                -- why writeback last failed; NULL when it did not
    UNIQUE (parent, name)
);
CREATE INDEX inode_by_parent ON inode (parent, ino);
CREATE INDEX inode_cached ON inode (used_s, ino, size) WHERE cached = 1 AND dirty = 0;
CREATE INDEX inode_dirty ON inode (ino) WHERE dirty != 0;

CREATE TABLE xattr (
    ino INTEGER NOT NULL,
    name BLOB NOT NULL,
    value BLOB NOT NULL,
    PRIMARY KEY (ino, name)
) WITHOUT ROWID;

CREATE TABLE remote (
    rid INTEGER PRIMARY KEY AUTOINCREMENT,
    rparent INTEGER,           -- rid of the directory; NULL for the root only
    name TEXT NOT NULL,
    kind TEXT NOT NULL,        -- 'f' or 'd'
    size INTEGER NOT NULL,     -- bytes; UNKNOWN (-1): we overwrote it, and never heard if it worked
    mtime_s INTEGER,           -- Unix time of the server; NULL: not known, the next listing tells
    slack_s INTEGER NOT NULL,  -- how far `mtime_s` may be off: 0 when the server has told it
    mode INTEGER NOT NULL,     -- permission bits
    readonly INTEGER NOT NULL, -- pod: 1 when received from somebody else
    ino INTEGER UNIQUE,        -- whose object this is; NULL: orphan, to be deleted at the server
    to_parent INTEGER,         -- a rename has been sent, its outcome is unknown: where it went
    to_name TEXT,
    UNIQUE (rparent, name)
);
CREATE INDEX remote_moving ON remote (to_parent, to_name) WHERE to_parent IS NOT NULL;
CREATE INDEX remote_orphan ON remote (rid) WHERE ino IS NULL;

INSERT INTO inode VALUES ({ROOT}, NULL, NULL, 'd', 448, 0, 0, 0, 0, NULL, 0, 0, 0, 0, NULL);
INSERT INTO remote VALUES ({ROOT}, NULL, '', 'd', 0, NULL, 0, 448, 0, {ROOT}, NULL, NULL);
PRAGMA user_version = {VERSION};
"""
